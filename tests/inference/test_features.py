"""Features against transformers' matching model, one pair at a time, and what must not change them."""

import pytest
import torch
from PIL import Image
from test_parity import close, matcher, model  # noqa: F401
from transformers import BlipForImageTextRetrieval

from blip.data.transforms import EvalTransform
from blip.inference import matching
from blip.inference.features import embed_images, embed_texts, ground_texts, match_texts, text_ids
from blip.tokenizer import Tokenizer

TEXTS = ["w3 w9", "w4", "w8 w1 w2 w7 w30 w31", "w60 w61 w62"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The pieces of the golden model."""
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(92))]))
    return Tokenizer.load(path)


@pytest.fixture(scope="module")
def photos():
    return [Image.effect_noise((40 + i, 30), 90 + i).convert("RGB") for i in range(3)]


@pytest.fixture(scope="module")
def tokens(model, photos):  # noqa: F811
    """Image tokens of all photos."""
    with torch.no_grad():
        return model.vision(torch.stack([EvalTransform(32)(image) for image in photos]))


@pytest.fixture(scope="module")
def theirs(matcher: BlipForImageTextRetrieval, tokenizer, photos):  # noqa: F811
    """Cosine, match logits and [ENC] state of one pair by transformers, without padding."""

    @torch.no_grad()
    def of(i: int, text: str):
        pixels = EvalTransform(32)(photos[i])[None]
        ids, _ = tokenizer.encode([text], first="cls", max_length=30)
        enc, _ = tokenizer.encode([text], first="enc", max_length=30)
        cosine = matcher(input_ids=ids, pixel_values=pixels, use_itm_head=False).itm_score
        logits = matcher(input_ids=enc, pixel_values=pixels, use_itm_head=True).itm_score
        states = matcher.vision_model(pixels).last_hidden_state
        state = matcher.text_encoder(enc, encoder_hidden_states=states).last_hidden_state[0, 0]
        return cosine[0, 0], logits[0], state

    return of


LIMIT = {"max_tokens": 30}


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_every_image_with_every_text(model, tokenizer, tokens, theirs, batch):  # noqa: F811
    scores = match_texts(model, tokenizer, tokens.split(batch), TEXTS, batch=batch, **LIMIT)
    assert scores.itc.shape == (3, 4)
    assert scores.logits.shape == (3, 4, 2)
    assert scores.logits[..., 1].std() > 0.01, "the test needs pairs that differ"
    for i in range(3):
        for j, text in enumerate(TEXTS):
            cosine, logits, _ = theirs(i, text)
            close(scores.itc[i, j], cosine)
            close(scores.logits[i, j], logits)
            close(scores.probability[i, j], logits.softmax(0)[1])
            close(scores.score[i, j], logits[1] + cosine)


def test_cosines_are_exact_under_autocast(model, tokenizer, tokens):  # noqa: F811
    """In bfloat16 they would have three digits, and ties."""
    with torch.autocast("cpu", torch.bfloat16):
        scores = match_texts(model, tokenizer, [tokens], TEXTS)
        images, words = embed_images(model, [tokens]), embed_texts(model, tokenizer, TEXTS)
    assert scores.itc.dtype == scores.logits.dtype == torch.float32
    close(scores.itc, images @ words.T)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_pairs_and_one_image(model, tokenizer, tokens, theirs, batch):  # noqa: F811
    pairs = ground_texts(model, tokenizer, tokens.split(batch), TEXTS[:3], **LIMIT)
    assert pairs.shape == (3, 24)
    for i in range(3):
        close(pairs[i], theirs(i, TEXTS[i])[2])
    one = ground_texts(model, tokenizer, [tokens[1:2]], TEXTS, **LIMIT)
    for j, text in enumerate(TEXTS):
        close(one[j], theirs(1, text)[2])
    for count in (2, 4):
        with pytest.raises(ValueError, match=f"3 images and {count} texts"):
            ground_texts(model, tokenizer, tokens.split(batch), TEXTS[:count])


def test_embeddings(model, tokenizer, tokens):  # noqa: F811
    images, words = embed_images(model, tokens.split(2)), embed_texts(model, tokenizer, TEXTS, batch=3)
    close(images @ words.T, match_texts(model, tokenizer, [tokens], TEXTS).itc)
    close(images.norm(dim=1), torch.ones(3))
    assert embed_images(model, []).shape == (0, 16) == embed_texts(model, tokenizer, []).shape


def test_texts_are_cleaned(model, tokenizer):  # noqa: F811
    assert torch.equal(embed_texts(model, tokenizer, ["  W3. w9!"]), embed_texts(model, tokenizer, ["w3 w9"]))


def test_texts_that_cannot_be_compared(model, tokenizer, tokens):  # noqa: F811
    with pytest.raises(ValueError, match=r"'\.\.\.' cannot be compared"):
        embed_texts(model, tokenizer, ["w1", "..."])
    with pytest.raises(ValueError, match="list of texts"):
        embed_texts(model, tokenizer, "w1")
    with pytest.raises(ValueError, match="nothing to match: 3 images and 0 texts"):
        match_texts(model, tokenizer, [tokens], [])


def test_chosen_texts_are_those_that_are_matched(model, tokenizer, tokens):  # noqa: F811
    """Images with no text, few and more than go through the model at once, in any order, equal all with all."""
    ids, keep = text_ids(model, tokenizer, TEXTS, "enc")
    everything = match_texts(model, tokenizer, [tokens], TEXTS).logits
    chosen = [torch.tensor([0, 2, 1, 3]), torch.tensor([], dtype=torch.int64), torch.tensor([3])]
    for batch in (1, 2, 3, 100):
        logits = matching.match(model, tokens, ids, keep, chosen, batch)
        assert [x.shape for x in logits] == [(4, 2), (0, 2), (1, 2)]
        for i, rows in enumerate(chosen):
            close(logits[i], everything[i, rows])
    with pytest.raises(ValueError, match="for 2 images, but there are 3"):
        matching.match(model, tokens, ids, keep, chosen[:2])
