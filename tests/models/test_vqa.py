"""Question answering: the original's loss, scores and answers (recorded in goldens), and what must not matter."""

import dataclasses

import goldens
import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import SMALLEST, TOKENIZER
from transformers import BlipConfig, BlipForQuestionAnswering

from blip.checkpoints.layouts import original_vqa, transformers_vqa
from blip.checkpoints.table import from_theirs, to_theirs
from blip.inference.answering import Candidates, answers, encode_questions, rank
from blip.inference.generate import generate
from blip.inference.settings import AnswerConfig, DecodeConfig
from blip.models.blip import Blip
from blip.models.vqa import Vqa
from blip.nn.text import TextPass
from blip.objectives.batch import QuestionBatch
from blip.objectives.objective import Clock
from blip.objectives.vqa import VqaConfig, VqaObjective

TEXT = goldens.CONFIG.text
LAYOUT = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def golden():
    tensors = load_file(goldens.HERE / "vqa.safetensors")
    return {name: value.long() if value.dtype == torch.int32 else value for name, value in tensors.items()}


@pytest.fixture
def model(golden):
    model = Vqa(goldens.CONFIG).eval()
    state = {name: value for name, value in goldens.checkpoint().items() if name.startswith("visual_encoder.")}
    state |= {name: value for name, value in goldens.checkpoint().items() if name.startswith("text_encoder.")}
    state |= {name: value for name, value in golden.items() if name.startswith("text_decoder.")}
    model.load_state_dict(from_theirs(original_vqa(model), state, model.state_dict(), "goldens"))
    return model


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The original's tokenizer of the goldens."""
    from blip.tokenizer import Tokenizer

    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join([*LAYOUT, *(f"w{i}" for i in range(92))]) + "\n")
    tokenizer = Tokenizer.load(path)
    assert (tokenizer.dec_id, tokenizer.enc_id) == (TEXT.dec_id, TEXT.enc_id)
    return tokenizer


def batch(golden) -> QuestionBatch:
    ids = golden["question.ids"].clone()
    ids[:, 0] = TEXT.cls_id
    answers = golden["answer.ids"].clone()
    answers[:, 0] = TEXT.cls_id
    owner = torch.arange(4).repeat_interleave(golden["answer.count"])
    return QuestionBatch(
        goldens.batch(0).image, ids, golden["question.keep"], ["a", "b", "c", "d"],
        answer_ids=answers, answer_keep=golden["answer.keep"], weights=golden["answer.weights"], question=owner,
    )  # fmt: skip


def questions_of(model, golden, rows=slice(None)):
    image = model.question.context(model.vision(goldens.batch(0).image[rows]))
    return model.context(golden["question.ids"][rows], golden["question.keep"][rows], image)


def candidates_of(golden, words) -> Candidates:
    texts = [
        words.decode([ids[keep].tolist()])[0]
        for ids, keep in zip(golden["candidate.ids"], golden["candidate.keep"], strict=True)
    ]
    return Candidates(texts, words)


# The original ---------------------------------------------------------------------------------------------------------


def test_every_tensor_of_the_original_has_a_place():
    model = Vqa(goldens.CONFIG)
    # A released decoder's keys and values read questions, whatever the width of images.
    state = to_theirs(original_vqa(model), model.state_dict())
    kept = {name: shape for name, shape in goldens.keys("vqa").items() if not name.endswith("position_ids")}
    assert {name: list(value.shape) for name, value in state.items()} == kept


def test_loss_and_every_gradient(model, golden):
    objective = VqaObjective(model, VqaConfig()).train()
    outcome = objective(batch(golden), Clock())
    close(outcome.losses["vqa"].detach(), golden["loss"])
    outcome.losses["vqa"].backward()
    table = original_vqa(model)
    gradients = to_theirs(table, {name: p.grad for name, p in model.named_parameters()})
    expected = {name.removeprefix("grad."): value for name, value in golden.items() if name.startswith("grad.")}
    assert set(expected) == {name for row in table.rows for name in row.theirs}
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=0.1)  # the gradient of a key's bias is only rounding error
        error = float((gradients[name] - gradient).abs().max() / scale)
        assert error < 5e-5, f"{name}: {error}"


@torch.no_grad()
def test_ranking_in_2022s_way(model, golden, words):
    candidates, questions = candidates_of(golden, words), questions_of(model, golden)
    for k in (16, 4):
        ranked = rank(model, questions, candidates, AnswerConfig(k=k, smoothing=0.1))
        for row in range(4):
            theirs = words.decode([[i for i in ids if i > 4] for ids in golden[f"rank{k}.ids"][row].tolist()])
            scores = dict(zip(theirs, (-golden[f"rank{k}.nll"][row]).tolist(), strict=True))
            ours = [candidates.texts[i] for i in ranked.index[row]]
            assert set(ours) == set(theirs)
            close(ranked.scores[row], torch.tensor([scores[text] for text in ours]))
            best = golden["candidate.ids"][golden[f"rank{k}.best"][row]]
            assert ours[0] == words.decode([best.tolist()])[0]


@torch.no_grad()
def test_writing_without_padding(model, golden):
    prompt, config = (
        torch.tensor([[TEXT.dec_id]]),
        DecodeConfig(beams=3, max_length=10, min_length=1, length_penalty=0.0),
    )
    for row in range(4):
        length = int(golden["question.keep"][row].sum())
        image = model.question.context(model.vision(goldens.batch(0).image[row : row + 1]))
        alone = golden["question.ids"][row : row + 1, :length]
        context = model.context(alone, torch.ones_like(alone, dtype=torch.bool), image)
        (ids,) = generate(model, context, prompt, prompt > 0, config).ids[0]
        theirs = golden["generated.alone"][row]
        assert ids.tolist() == theirs[: len(ids)].tolist()
        assert not theirs[len(ids) :].any()


@torch.no_grad()
def test_padding_is_masked_when_writing_where_the_original_reads_it(model, golden):
    """`models/blip_vqa.py:94` gives beam search a mask of ones: a question's answer depends on its neighbours'."""
    assert not torch.equal(golden["generated.alone"], golden["generated.together"])
    prompts = torch.full((4, 1), TEXT.dec_id)
    config = DecodeConfig(beams=3, max_length=10, min_length=1, length_penalty=0.0)
    generated = generate(model, questions_of(model, golden), prompts, prompts > 0, config).ids[:, 0]
    for ids, theirs in zip(generated.tolist(), golden["generated.alone"].tolist(), strict=True):
        assert ids + [0] * (10 - len(ids)) == theirs
    # With a mask of ones, and states at padding as the original has them, ours answers what the original answered.
    keep, seen = golden["question.keep"], model.question.context(model.vision(goldens.batch(0).image))
    states = torch.stack([_states(model, golden, row, seen[torch.tensor([row])]) for row in range(4)])
    everything = model.answer.context(states, torch.ones_like(keep))
    generated = generate(model, everything, prompts, prompts > 0, config).ids[:, 0]
    for ids, theirs in zip(generated.tolist(), golden["generated.together"].tolist(), strict=True):
        assert ids + [0] * (10 - len(ids)) == theirs


def _states(model, golden, row, image):
    """All states (T, D) of a padded question, those at padding too, each computed as if it were the question's last."""
    ids, keep = golden["question.ids"][row : row + 1], golden["question.keep"][row : row + 1]
    x = model.question._embed(ids, torch.arange(ids.shape[1])[None])
    mask = torch.zeros(1, 1, 1, ids.shape[1]).masked_fill(~keep, float("-inf"))
    for i, block in enumerate(model.question.blocks):
        q, k, v = (part.view(1, -1, TEXT.heads, 12).transpose(1, 2) for part in block.text.qkv(x).chunk(3, -1))
        seen = ((q @ k.transpose(2, 3)) / 12**0.5 + mask).softmax(-1) @ v
        x = block.text_norm(x + block.text.out(seen.transpose(1, 2).flatten(2)))
        x = block.cross_norm(x + block.cross.out(image.attend(i, block.cross.query(x), 0.0)))
        x = block.feed_forward(x)
    return x[0]


# transformers ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_transformers_says_the_same_of_each_next_word():
    """Of one question without padding, which it reads otherwise (its decoder's mask of the question is not used)."""
    config = dataclasses.replace(goldens.CONFIG, vision=dataclasses.replace(goldens.CONFIG.vision, width=24))
    torch.manual_seed(6)
    model = Vqa(config).eval()  # transformers' decoder reads what is as wide as images
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.15)
    vision = {
        "hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6, "initializer_range": 0.02,
    }  # fmt: skip
    text = {
        "vocab_size": 99, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 32, "encoder_hidden_size": 24, "layer_norm_eps": 1e-12,
        "bos_token_id": 97, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0,
    }  # fmt: skip
    theirs = BlipForQuestionAnswering(BlipConfig(vision_config=vision, text_config=text)).eval()
    theirs.load_state_dict(to_theirs(transformers_vqa(model), model.state_dict()), strict=True)
    question, answer = torch.tensor([[98, 12, 31, 7, 3]]), torch.tensor([[97, 20, 41, 9]])
    image = goldens.batch(0).image[:1]
    tokens = theirs.vision_model(image).last_hidden_state
    mask = torch.ones_like(question)
    states = theirs.text_encoder(question, attention_mask=mask, encoder_hidden_states=tokens).last_hidden_state
    expected = theirs.text_decoder(answer, attention_mask=torch.ones_like(answer), encoder_hidden_states=states).logits
    context = model.context(question, mask.bool(), model.question.context(model.vision(image)))
    (our_states,) = model.answer(
        [TextPass(answer, torch.ones_like(answer, dtype=torch.bool), causal=True, context=context)]
    )
    close(model.answer.vocabulary(our_states), expected[0])


# What must not matter -------------------------------------------------------------------------------------------------

ANSWERS = ["yes", "no", "red", "blue", "two", "one", "star", "large star", "large red star", "left", "right"]


@pytest.fixture
def small():
    torch.manual_seed(4)
    model = Vqa.from_blip(Blip(SMALLEST)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


QUESTIONS = ["is there a star", "what is the colour of the large ring on the left", "how many", "two"]


@pytest.fixture
def contexts(small):
    return _contexts(small, range(4))


def _contexts(model, rows):
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(8))[list(rows)]
    with torch.no_grad():
        tokens = model.vision(images)
    return encode_questions(model, TOKENIZER, tokens, [QUESTIONS[i] for i in rows], list(range(len(rows))), 35)


def by_text(candidates, ranked, row):
    return {candidates.texts[i]: float(s) for i, s in zip(ranked.index[row], ranked.scores[row], strict=True)}


def straightforward(model, context, texts, smoothing):
    """Each candidate on its own row, in full, by cross-entropy: the way the original goes, without padding."""
    scores = []
    for text in texts:
        ids = torch.tensor([[TOKENIZER.dec_id, *TOKENIZER.pieces(text, 30)[1:]]])
        one = TextPass(ids[:, :-1], torch.ones_like(ids[:, :-1], dtype=torch.bool), causal=True, context=context)
        (states,) = model.answer([one])
        loss = torch.nn.functional.cross_entropy(
            model.answer.vocabulary(states), ids[0, 1:], reduction="sum", label_smoothing=smoothing
        )
        scores.append(-float(loss))
    return dict(zip(texts, scores, strict=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@torch.no_grad()
def test_scores_are_those_of_each_candidate_alone(small, contexts, smoothing):
    candidates = Candidates(ANSWERS, TOKENIZER)
    ranked = rank(small, contexts, candidates, AnswerConfig(k=100, smoothing=smoothing))
    assert ranked.index.shape == (4, len(ANSWERS))
    for row in range(4):
        expected = straightforward(small, contexts[torch.tensor([row])], ANSWERS, smoothing)
        ours = by_text(candidates, ranked, row)
        assert ours == pytest.approx(expected, abs=2e-5)
        assert list(ours.values()) == sorted(ours.values(), reverse=True)
    if smoothing:
        expected = straightforward(small, contexts[torch.tensor([0])], ANSWERS, 0.0)
        sure = {candidates.texts[i]: float(s) for i, s in zip(ranked.index[0], ranked.logprobs[0], strict=True)}
        assert sure == pytest.approx(expected, abs=2e-5)


@torch.no_grad()
def test_neither_order_nor_repeats_nor_company_change_a_score(small, contexts):
    config = AnswerConfig(k=4)
    candidates = Candidates(ANSWERS, TOKENIZER)
    wanted = rank(small, contexts, candidates, config)
    other = Candidates([*reversed(ANSWERS), "red", "Yes"], TOKENIZER)
    shuffled = rank(small, contexts, other, config)
    for row in range(4):
        ours, theirs = by_text(candidates, wanted, row), by_text(other, shuffled, row)
        assert list(map(str.lower, ours)) == list(map(str.lower, theirs))
        assert list(ours.values()) == pytest.approx(list(theirs.values()), abs=1e-5)
        alone = rank(small, _contexts(small, [row]), candidates, config)
        assert alone.index[0].tolist() == wanted.index[row].tolist()
        close(alone.scores[0], wanted.scores[row])
        assert answers(small, TOKENIZER, _contexts(small, [row]), config, candidates)[0][0].text == next(iter(ours))


@torch.no_grad()
def test_padding_of_a_question_changes_nothing(small):
    tokens = small.vision(torch.zeros(1, 3, 32, 32))
    ids, keep = TOKENIZER.encode(["is there a star"], first="enc", max_length=35)
    long_ids, long_keep = (torch.nn.functional.pad(x, (0, 7)) for x in (ids, keep))
    long_ids[~long_keep] = 7  # whatever stands at padding
    candidates = Candidates(ANSWERS, TOKENIZER)
    image = small.question.context(tokens)
    ranked = [
        rank(small, small.context(i, k, image), candidates, AnswerConfig())
        for i, k in ((ids, keep), (long_ids, long_keep))
    ]
    assert torch.equal(ranked[0].index, ranked[1].index)
    close(ranked[0].scores, ranked[1].scores, 1e-6)


@torch.no_grad()
def test_a_searched_answer_has_the_probability_it_is_ranked_with(small, contexts):
    config = AnswerConfig(max_length=8)
    searched = answers(small, TOKENIZER, contexts, config)
    for row, ((text, logprob),) in enumerate(searched):
        ids = TOKENIZER.pieces(text, 30) if text else None
        if not text or len(ids) > 8:
            continue
        ranked = rank(small, contexts[torch.tensor([row])], Candidates([text], TOKENIZER), config)
        if TOKENIZER.decode([ids]) == [text] and len(ids) < 8:
            assert float(ranked.logprobs[0, 0]) == pytest.approx(logprob, abs=1e-4)


def test_several_questions_of_an_image_share_its_tokens(small):
    tokens = torch.randn(2, small.vision.tokens if hasattr(small.vision, "tokens") else 17, 24)
    together = encode_questions(small, TOKENIZER, tokens, [QUESTIONS[0], QUESTIONS[1], QUESTIONS[0]], [1, 0, 0], 35)
    config, candidates = AnswerConfig(), Candidates(ANSWERS, TOKENIZER)
    ranked = rank(small, together, candidates, config)
    for row, (text, image) in enumerate([(QUESTIONS[0], 1), (QUESTIONS[1], 0), (QUESTIONS[0], 0)]):
        alone = rank(small, encode_questions(small, TOKENIZER, tokens[[image]], [text], [0], 35), candidates, config)
        close(alone.scores[0], ranked.scores[row])


def test_what_cannot_be_ranked_is_refused(small, contexts):
    with pytest.raises(ValueError, match="no candidate answers"):
        Candidates([], TOKENIZER)
    with pytest.raises(ValueError, match="'  ' has no words"):
        Candidates(["yes", "  "], TOKENIZER)
    with pytest.raises(ValueError, match="does not know"):
        Candidates(["yes", "\u4e00"], TOKENIZER)
    long = Candidates(["yes", "red " * 40], TOKENIZER)
    with pytest.raises(ValueError, match=r"'red red .*' has 41 word pieces, more than the model's 32"):
        rank(small, contexts, long, AnswerConfig())
    with pytest.raises(ValueError, match="training mode"):
        rank(small.train(), contexts, Candidates(ANSWERS, TOKENIZER), AnswerConfig())
