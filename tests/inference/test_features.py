"""Features against transformers' matching model, one pair at a time, and what must not change them."""

import subprocess
import sys

import pytest
import torch
from PIL import Image
from test_parity import close, matcher, model  # noqa: F401
from transformers import BlipForImageTextRetrieval

import blip
from blip.data.image_files import reader
from blip.data.transforms import EvalTransform
from blip.errors import DataError
from blip.inference import matching
from blip.inference.features import Features
from blip.tokenizer import Tokenizer

TEXTS = ["w3 w9", "w4", "w8 w1 w2 w7 w30 w31", "w60 w61 w62"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The pieces of the golden model."""
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(92))]))
    return Tokenizer.load(path)


@pytest.fixture(scope="module")
def features(model, tokenizer):  # noqa: F811
    return Features(model, tokenizer, reader(32), batch=2, max_tokens=30)


@pytest.fixture(scope="module")
def photos():
    return [Image.effect_noise((40 + i, 30), 90 + i).convert("RGB") for i in range(3)]


@pytest.fixture(scope="module")
def theirs(matcher: BlipForImageTextRetrieval, features, photos):  # noqa: F811
    """Cosine, match logits and [ENC] state of one pair by transformers, without padding."""

    @torch.no_grad()
    def of(i: int, text: str):
        pixels = EvalTransform(32)(photos[i])[None]
        ids, _ = features.tokenizer.encode([text], first="cls", max_length=30)
        enc, _ = features.tokenizer.encode([text], first="enc", max_length=30)
        cosine = matcher(input_ids=ids, pixel_values=pixels, use_itm_head=False).itm_score
        logits = matcher(input_ids=enc, pixel_values=pixels, use_itm_head=True).itm_score
        tokens = matcher.vision_model(pixels).last_hidden_state
        state = matcher.text_encoder(enc, encoder_hidden_states=tokens).last_hidden_state[0, 0]
        return cosine[0, 0], logits[0], state

    return of


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_every_image_with_every_text(model, tokenizer, photos, theirs, batch):  # noqa: F811
    read = reader(32)
    scores = Features(model, tokenizer, read, batch=batch, max_tokens=30).match(photos, TEXTS)
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


def test_cosines_are_exact_under_autocast(features, photos):
    """In bfloat16 they would have three digits, and ties."""
    with torch.autocast("cpu", torch.bfloat16):
        scores = features.match(photos, TEXTS)
        images, words = features.embed_image(photos), features.embed_text(TEXTS)
    assert scores.itc.dtype == scores.logits.dtype == torch.float32
    close(scores.itc, images @ words.T)


def test_pairs_and_one_image(features, photos, theirs):
    pairs = features.ground(photos, TEXTS[:3])
    assert pairs.shape == (3, 24)
    for i in range(3):
        close(pairs[i], theirs(i, TEXTS[i])[2])
    one = features.ground(photos[1:2], TEXTS)
    for j, text in enumerate(TEXTS):
        close(one[j], theirs(1, text)[2])
    with pytest.raises(ValueError, match="3 images and 2 texts"):
        features.ground(photos, TEXTS[:2])


def test_embeddings_by_paths_images_and_tensors(features, photos, tmp_path):
    for i, image in enumerate(photos):
        image.save(tmp_path / f"{i}.png")
    paths = [tmp_path / "0.png", str(tmp_path / "1.png"), photos[2]]
    expected = features.embed_image(torch.stack([EvalTransform(32)(image) for image in photos]))
    assert torch.equal(features.embed_image(paths), expected)
    close(features.embed_image(photos) @ features.embed_text(TEXTS).T, features.match(photos, TEXTS).itc)
    close(expected.norm(dim=1), torch.ones(3))
    assert features.embed_image([]).shape == (0, 16) == features.embed_text([]).shape


def test_texts_are_cleaned(features):
    assert torch.equal(features.embed_text(["  W3. w9!"]), features.embed_text(["w3 w9"]))


def test_what_cannot_be_used_is_named(features, photos, tmp_path):
    (tmp_path / "a.png").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"a.png cannot be used: is an HTML page"):
        features.embed_image([photos[0], tmp_path / "a.png"])
    with pytest.raises(ValueError, match=r"'\.\.\.' cannot be compared"):
        features.embed_text(["w1", "..."])
    with pytest.raises(ValueError, match="list of texts"):
        features.embed_text("w1")
    with pytest.raises(ValueError, match="list or a tensor"):
        features.embed_image("a.png")
    with pytest.raises(ValueError, match="nothing to match"):
        features.match(photos, [])


def test_load_honours_type_and_size(model, tokenizer, tmp_path, photos):  # noqa: F811
    blip.save_pretrained(model, tokenizer, tmp_path / "model")
    exact = blip.load(tmp_path / "model")
    features = blip.load(tmp_path / "model", dtype=torch.bfloat16, image_size=48)
    assert (exact.dtype, features.dtype, features.device) == (torch.float32, torch.bfloat16, torch.device("cpu"))
    assert {p.dtype for p in features.model.parameters()} == {torch.bfloat16}
    assert features.read.keywords["read"].transform.image_size == 48
    assert features.embed_image(photos).dtype == features.match(photos, TEXTS).logits.dtype == torch.float32
    half = blip.load(tmp_path / "model", dtype=torch.bfloat16)
    torch.testing.assert_close(half.embed_image(photos), exact.embed_image(photos), atol=0.03, rtol=0)
    with pytest.raises(FileNotFoundError, match="not a model directory"):
        blip.load(tmp_path / "gone")


def test_importing_the_package_brings_no_torch():
    program = "import blip, sys; blip.BASE; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert {"load", "Features", "MatchScores"} <= set(blip.__all__)


def test_a_former_name_is_refused_with_the_new_one():
    with pytest.raises(AttributeError, match=r"blip\.Matches is now blip\.MatchScores"):
        blip.Matches  # noqa: B018
    with pytest.raises(AttributeError, match=r"blip\.write is now blip\.generate_texts"):
        blip.write  # noqa: B018
    assert blip.generate_texts.__name__ == "generate_texts"


def test_chosen_texts_are_those_that_are_matched(model, features, photos):  # noqa: F811
    """Images with no text, few and more than go through the model at once, in any order, equal all with all."""
    tokens = torch.cat(list(features.tokens(photos)))
    ids, keep = features._tokenize(TEXTS, "enc")
    everything = features.match(photos, TEXTS).logits
    chosen = [torch.tensor([0, 2, 1, 3]), torch.tensor([], dtype=torch.int64), torch.tensor([3])]
    for batch in (1, 2, 3, 100):
        logits = matching.match(model, tokens, ids, keep, chosen, batch)
        assert [x.shape for x in logits] == [(4, 2), (0, 2), (1, 2)]
        for i, rows in enumerate(chosen):
            close(logits[i], everything[i, rows])
    with pytest.raises(ValueError, match="for 2 images, but there are 3"):
        matching.match(model, tokens, ids, keep, chosen[:2])


def test_a_image_that_is_too_much_for_the_transform_is_named(model, tokenizer, tmp_path, monkeypatch):  # noqa: F811
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 30)).save(path)
    made = Features(model, tokenizer, reader(32))

    def fail(image):
        raise MemoryError

    monkeypatch.setattr(made.read.keywords["read"], "transform", fail)
    with pytest.raises(DataError, match=r"a\.png cannot be used: too little memory"):
        made.embed_image([path])
