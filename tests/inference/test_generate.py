"""Writing: against transformers, an uncached loop with its own sampler, and itself in other batches."""

import dataclasses
import hashlib
import math

import goldens
import pytest
import torch
from test_parity import transformers_config
from transformers import BlipForConditionalGeneration, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from blip.checkpoints.layouts import original_captioning, original_vqa, transformers_captioning
from blip.checkpoints.table import from_theirs, to_theirs
from blip.inference import generate as module
from blip.inference.generate import generate, generate_texts, queries
from blip.inference.settings import DECODE_PRESETS, AnswerConfig, DecodeConfig
from blip.models.blip import Blip
from blip.models.vqa import Vqa
from blip.nn.context import Absorbed, Context
from blip.nn.stack import Cache

TEXT = goldens.CONFIG.text
ROWS = 12
LENGTHS = torch.tensor([1, 4, 2, 6, 1, 3, 5, 2, 4, 1, 3, 2])
NUCLEUS = DecodeConfig(method="nucleus", max_length=16, min_length=0)


@pytest.fixture(scope="module")
def model():
    """Its weights are the same whatever version of timm or torch begins with others."""
    g = torch.Generator().manual_seed(3)
    model = Blip(goldens.CONFIG).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.15 + ("norm" in name and name.endswith("weight")))
        model.med.head_bias[TEXT.sep_id] += 0.6  # some rows stop early, some never
    return model


@pytest.fixture(scope="module")
def captioner(model):
    theirs = BlipForConditionalGeneration(transformers_config()).eval()
    theirs.load_state_dict(to_theirs(transformers_captioning(model), model.state_dict()), strict=True)
    return theirs


@pytest.fixture(scope="module")
def images():
    return torch.randn(ROWS, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def context(model, images):
    with torch.no_grad():
        return model.context(model.vision(images))


@pytest.fixture(scope="module")
def prompts():
    """Of different lengths: ids and keep."""
    ids = torch.randint(4, 97, (ROWS, 6), generator=torch.Generator().manual_seed(2))
    ids[:, 0] = TEXT.dec_id
    keep = torch.arange(6) < LENGTHS[:, None]
    return ids.masked_fill(~keep, TEXT.pad_id), keep


def keys(rows=ROWS):
    return [f"shard-{i}/é{i * i}" for i in range(rows)]


def up_to_end(ids, start=0):
    ids = ids.tolist()
    return ids[: ids.index(TEXT.sep_id, start) + 1] if TEXT.sep_id in ids[start:] else ids


# transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"beams": 1},
        {"beams": 1, "repetition_penalty": 1.4, "min_length": 10},
        {"beams": 3},
        {"beams": 3, "num": 3, "length_penalty": 0.0, "min_length": 0},
        {"beams": 3, "num": 2, "length_penalty": 2.0, "max_length": 12, "repetition_penalty": 1.3},
        {"beams": 5, "num": 5, "length_penalty": -1.0, "min_length": 8},
        {"beams": 5, "num": 2, "min_length": 20},
        {"beams": 5, "max_length": 7, "min_length": 7, "length_penalty": 0.5},
        {"beams": 2, "num": 2, "repetition_penalty": 0.8, "max_length": 25},
    ],
    ids=str,
)
def test_searching_equals_transformers(model, captioner, images, context, prompts, options):
    """Our rows together with prompts of different lengths, theirs one at a time."""
    config = DecodeConfig(**options)
    ours = generate(model, context, *prompts, config)
    for row, length in enumerate(LENGTHS.tolist()):
        prompt = torch.cat([prompts[0][row : row + 1, :length], torch.tensor([[TEXT.sep_id]])], 1)  # it drops the last
        theirs = captioner.generate(
            images[row : row + 1],
            prompt,
            num_beams=config.beams,
            num_return_sequences=config.num,
            max_length=config.max_length,
            min_length=config.min_length,
            repetition_penalty=config.repetition_penalty,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            **({"length_penalty": config.length_penalty} if config.beams > 1 else {}),
        )
        for n in range(config.num):
            expected = up_to_end(theirs.sequences[n])  # behind which theirs puts more [SEP]
            ids = ours.ids[row, n].tolist()
            assert ids[: len(expected)] == expected, (row, n)
            assert set(ids[len(expected) :]) <= {TEXT.pad_id}
            assert bool(ours.finished[row, n]) == (expected[-1] == TEXT.sep_id)
        if config.beams > 1:
            torch.testing.assert_close(ours.scores[row], theirs.sequences_scores, rtol=1e-4, atol=1e-4)


def test_the_cases_above_end_early_and_late(model, context, prompts):
    finished = generate(model, context, *prompts, DecodeConfig(beams=3)).finished
    assert finished.any()
    assert not finished.all()


# The original ---------------------------------------------------------------------------------------------------------

CAPTION = {"beams": 3, "max_length": 20, "min_length": 5}
OTHER = {"beams": 5, "max_length": 16, "min_length": 6, "length_penalty": 1.2, "repetition_penalty": 1.1}
QUESTIONS = torch.tensor([[98, 5 + i, 5 + 7 * i % 92, 5 + (3 * i + 5) % 92, 3] for i in range(60)])


@pytest.fixture(scope="module")
def original():
    """A `Blip` and a `Vqa` with the weights that the goldens' searches were recorded with."""
    checkpoint = goldens.checkpoint()
    state = {name: checkpoint[name] for name in checkpoint if name.startswith(("visual_encoder.", "text_decoder."))}
    captioner = Blip(goldens.CONFIG).eval()
    state = from_theirs(original_captioning(captioner), state, captioner.state_dict(), "goldens")
    captioner.load_state_dict(state, strict=False)
    answerer = Vqa(goldens.CONFIG).eval()
    state, g = to_theirs(original_vqa(answerer), answerer.state_dict()), torch.Generator().manual_seed(3)
    tied = "text_decoder.cls.predictions.decoder"
    for name in sorted(state):
        if not name.startswith("text_decoder."):
            state[name] = checkpoint[name]
        elif not name.startswith(tied):
            state[name] = 0.15 * torch.randn(state[name].shape, generator=g) + name.endswith("LayerNorm.weight")
    state[f"{tied}.weight"] = state["text_decoder.bert.embeddings.word_embeddings.weight"]
    state[f"{tied}.bias"] = state["text_decoder.cls.predictions.bias"]
    answerer.load_state_dict(from_theirs(original_vqa(answerer), state, answerer.state_dict(), "goldens"))
    with torch.no_grad():
        captioner.med.head_bias[TEXT.sep_id] += 2.5
        answerer.answer.head_bias[TEXT.sep_id] += 1.8
    return captioner, answerer


@pytest.mark.parametrize(
    ("name", "prompt", "options"),
    [
        ("prompt", [97, 45, 12, 38], CAPTION),
        ("no prompt", [97], CAPTION),
        ("five beams", [97, 45, 12, 38], OTHER),
        ("answers", [97], None),
    ],
)
@torch.no_grad()
def test_searching_by_the_rule_of_2022_equals_the_original(original, name, prompt, options):
    """Its unmodified code on transformers 4.15.0; by today's rule many texts are others."""
    captioner, answerer = original
    images = torch.randn(60, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([prompt]).expand(60, -1)
    keep = torch.ones_like(ids, dtype=torch.bool)
    if options is None:
        reads, context = answerer, answerer.question.context(answerer.vision(images))
        context = answerer.context(QUESTIONS, torch.ones_like(QUESTIONS, dtype=torch.bool), context)
        configs = [AnswerConfig(length_rule=rule).decode() for rule in ("2022", "generated")]
    else:
        reads, context = captioner, captioner.context(captioner.vision(images))
        configs = [DecodeConfig(**options, length_rule=rule) for rule in ("2022", "generated")]
    texts = []
    for config in configs:
        texts.append([up_to_end(row[len(prompt) :]) for row in generate(reads, context, ids, keep, config).ids[:, 0]])
    expected = goldens.searched(name)
    assert texts[0] == expected
    assert sum(ours != theirs for ours, theirs in zip(texts[1], expected, strict=True)) > 8
    ended = [row[-1] == TEXT.sep_id for row in expected]
    assert any(ended)
    assert not all(ended)


# Sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 7}, {"top_p": 0.6, "temperature": 1.7}, {"top_p": 1.0, "temperature": 0.7}], ids=str
)
def test_samples_have_the_distribution_of_the_nucleus(model, context, options):
    draws = 20000
    config = DecodeConfig(method="nucleus", num=draws, max_length=3, min_length=0, **options)
    prompt = torch.tensor([[TEXT.dec_id, 40]])
    keep, one = torch.ones_like(prompt, dtype=torch.bool), context[torch.tensor([5])]
    words = generate(model, one, prompt, keep, config, ["a"]).ids[0, :, 2]
    with torch.no_grad():
        scores = model.caption_logits(prompt, keep, one)[:, -1].double()
    scores = TemperatureLogitsWarper(float(config.temperature))(prompt, scores)
    if config.top_k:
        scores = TopKLogitsWarper(config.top_k)(prompt, scores)
    probs = TopPLogitsWarper(config.top_p)(prompt, scores).softmax(1)[0]
    counts = torch.bincount(words, minlength=len(probs)).double()
    assert counts[probs == 0].sum() == 0
    common = probs * draws >= 5
    rest = torch.stack([counts[~common].sum(), draws * probs[~common].sum()])
    chi = ((counts - draws * probs)[common] ** 2 / (draws * probs[common])).sum()
    chi = chi + (rest[0] - rest[1]) ** 2 / rest[1].clamp(min=1)
    assert common.sum() >= 5
    likelihood = torch.special.gammaincc(common.sum() / 2, chi / 2)
    assert 1e-3 < likelihood < 1 - 1e-3, "also more even than chance is wrong"


def splitmix(state, *values):
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state


def gumbel(config, key, number, step, word):
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    state = splitmix(0, config.seed, int.from_bytes(digest, "big"), number)
    for count in (step, word):
        state = splitmix(state, count * 0x9E3779B97F4A7C15)
    return -math.log(-math.log(((state >> 12) + 0.5) / 2**52))


def plain_nucleus(model, context, prompt, config, key, number):
    """One text, without a cache, in plain Python."""
    ids = list(prompt)
    while len(ids) < config.max_length and ids[-1] != TEXT.sep_id:
        now = torch.tensor([ids])
        scores = model.caption_logits(now, torch.ones_like(now, dtype=torch.bool), context)[0, -1].tolist()
        for word in set(ids):
            factor = config.repetition_penalty
            scores[word] = scores[word] * factor if scores[word] < 0 else scores[word] / factor
        if len(ids) < config.min_length:
            scores[TEXT.sep_id] = -math.inf
        order = sorted(range(len(scores)), key=lambda word: -scores[word])[: config.top_k or None]
        weights = [math.exp((scores[word] - scores[order[0]]) / config.temperature) for word in order]
        kept = [w for i, w in enumerate(order) if sum(weights[:i]) < config.top_p * sum(weights)]
        step = len(ids) - len(prompt)
        ids.append(max(kept, key=lambda w: scores[w] / config.temperature + gumbel(config, key, number, step, w)))
    return ids


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num": 3, "seed": 7, "top_p": 0.7},
        {"top_k": 5, "repetition_penalty": 1.3, "temperature": 1.5, "min_length": 9, "seed": 2**70},
    ],
    ids=str,
)
@torch.no_grad()
def test_samples_equal_a_plain_sampler_with_the_same_counters(model, context, prompts, options):
    config = dataclasses.replace(NUCLEUS, **options)
    ours = generate(model, context, *prompts, config, keys())
    for row, length in enumerate(LENGTHS.tolist()):
        prompt, one = prompts[0][row, :length].tolist(), context[torch.tensor([row])]
        for n in range(config.num):
            expected = plain_nucleus(model, one, prompt, config, keys()[row], n)
            assert ours.ids[row, n].tolist()[: len(expected)] == expected
            assert ours.finished[row, n] == (expected[-1] == TEXT.sep_id)


def test_a_nucleus_wider_than_the_head_is_found(model, context, prompts, monkeypatch):
    config = dataclasses.replace(NUCLEUS, top_p=0.97, temperature=2.0, num=2)
    expected = generate(model, context, *prompts, config, keys())
    monkeypatch.setattr(module, "HEAD", 2)
    generated = generate(model, context, *prompts, config, keys())
    assert torch.equal(generated.ids, expected.ids)


def test_more_samples_leave_the_first_as_they_were(model, context, prompts):
    few, many = (
        generate(model, context, *prompts, dataclasses.replace(NUCLEUS, num=num), keys()).ids for num in (2, 4)
    )
    width = few.shape[2]
    assert torch.equal(many[:, :2, :width], few)
    assert (many[:, :, :width] != many[:, :1, :width]).any(2)[:, 1:].float().mean() > 0.9
    other = generate(model, context, *prompts, dataclasses.replace(NUCLEUS, num=2, seed=1), keys()).ids
    assert up_to_end(other[0, 0]) != up_to_end(few[0, 0])


# Batches and caches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        DecodeConfig(beams=1),
        DecodeConfig(beams=3, num=2),
        DecodeConfig(beams=3, num=2, length_rule="2022"),
        dataclasses.replace(NUCLEUS, num=2),
        DECODE_PRESETS["capfilt_2022"],
    ],
    ids=["greedy", "beam", "beam by 2022", "nucleus", "capfilt"],
)
@torch.no_grad()
def test_no_text_changes_with_the_batch_or_its_order(model, config):
    g = torch.Generator().manual_seed(8)
    rows, longest = 64, 5
    tokens = model.vision(torch.randn(rows, 3, 32, 32, generator=g))
    ids = torch.randint(4, 97, (rows, longest), generator=g)
    ids[:, 0] = TEXT.dec_id
    keep = torch.arange(longest) < torch.randint(1, longest + 1, (rows, 1), generator=g)
    ids = ids.masked_fill(~keep, TEXT.pad_id)

    def texts(size, order):
        padded = torch.full((rows, config.num, config.max_length), TEXT.pad_id)
        for some in order.split(size):
            width = int(keep[some].sum(1).max())
            context = model.med.context(tokens[some], queries=queries(config, width))
            names = [keys(rows)[i] for i in some]
            written = generate(model, context, ids[some, :width], keep[some, :width], config, names).ids
            padded[some, :, : written.shape[2]] = written
        return padded

    expected = texts(rows, torch.arange(rows))
    for size in (1, 8, 32):
        assert torch.equal(texts(size, torch.randperm(rows, generator=g)), expected), size


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_an_absorbed_context_equals_a_projected_one(model, images, prompts, masked):
    tokens, index = model.vision(images), torch.tensor([3, 0, 3, 7])
    ids, keep = (x[:8] for x in prompts)
    seen = torch.arange(tokens.shape[1]) < torch.randint(1, 18, (ROWS, 1)) if masked else None
    few, many = (model.med.context(tokens, seen, queries=n)[index].expand(2) for n in (12, 13))
    assert [type(few), type(many)] == [Absorbed, Context]
    assert len(few) == len(many) == 4
    for logits_of in (model.caption_logits, model.match):
        torch.testing.assert_close(logits_of(ids, keep, few), logits_of(ids, keep, many), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="12 texts for 4 contexts with 2 texts each"):
        model.match(*prompts, few)


def test_a_context_is_projected_where_a_gradient_is_wanted(model, images):
    tokens = model.vision(images)
    assert type(model.med.context(tokens, queries=1)) is Context
    model.med.context(tokens)[torch.tensor([1])].kv[0].sum().backward()
    assert model.med.blocks[0].cross.kv.weight.grad.abs().sum() > 0
    model.zero_grad()


@pytest.mark.parametrize(
    "config",
    [
        DecodeConfig(beams=1, min_length=9),
        DecodeConfig(beams=1, length_rule="2022"),
        DecodeConfig(beams=4, num=3, length_penalty=0.7),
        DecodeConfig(beams=4, num=3, length_penalty=0.7, length_rule="2022"),
        NUCLEUS,
    ],
    ids=["greedy", "greedy by 2022", "beam", "beam by 2022", "nucleus"],
)
@pytest.mark.parametrize("absorbed", [False, True])
@torch.no_grad()
def test_what_is_said_of_a_text_equals_reading_it_without_a_cache(model, images, prompts, config, absorbed):
    tokens = model.vision(images)
    context = model.med.context(tokens, queries=1 if absorbed else None)
    assert isinstance(context, Absorbed) == absorbed
    generated = generate(model, context, *prompts, config, keys())
    for row, length in enumerate(LENGTHS.tolist()):
        for n in range(config.num):
            ids = generated.ids[row, n]
            end = (
                ids.tolist().index(TEXT.sep_id) + 1 if generated.finished[row, n] else min(len(ids), config.max_length)
            )
            assert end == config.max_length or generated.finished[row, n]
            assert ids[end:].eq(TEXT.pad_id).all()
            read = ids[None, :end]
            logits = model.caption_logits(read, read >= 0, model.context(tokens[row : row + 1]))
            expected = logits[0].log_softmax(1)[torch.arange(end - 1), ids[1:end]]
            close = {"rtol": 1e-5, "atol": 1e-5}
            torch.testing.assert_close(generated.logprobs[row, n, length:end], expected[length - 1 :], **close)
            assert generated.logprobs[row, n, :length].eq(0).all()
            assert generated.logprobs[row, n, end:].eq(0).all()
            counted = end - (int(generated.finished[row, n]) if config.length_rule == "2022" else length)
            score = expected[length - 1 :].sum() / counted**config.length_penalty
            torch.testing.assert_close(generated.scores[row, n], score, **close)
    if config.method == "beam":
        assert (generated.scores.diff(dim=1) <= 0).all()


def test_rows_that_are_over_are_left_out(model, context, prompts, monkeypatch):
    """The other tests would not notice if they were read to the end."""
    taken, take = [], Cache.take
    monkeypatch.setattr(Cache, "take", lambda cache, index: (taken.append(len(index)), take(cache, index)))
    generate(model, context, *prompts, DecodeConfig(beams=1, max_length=30))
    assert taken
    assert min(taken) < ROWS


def test_several_rows_look_at_one_context(model, context, prompts):
    ids, keep = (x[:6] for x in prompts)
    some = torch.tensor([4, 9])
    shared = generate(model, context[some].expand(3), ids, keep, DecodeConfig(beams=2))
    alone = generate(model, context[some.repeat_interleave(3)], ids, keep, DecodeConfig(beams=2))
    assert torch.equal(shared.ids, alone.ids)


def test_half_precision(model, images, prompts):
    half = Blip(goldens.CONFIG).eval()
    half.load_state_dict(model.state_dict())
    half = half.to(torch.bfloat16)
    full = generate(model, model.context(model.vision(images)), *prompts, DecodeConfig(beams=3))
    for few in (None, 1):
        with torch.no_grad():
            contexts = [half.med.context(half.vision(images.bfloat16()), queries=few)]
            with torch.autocast("cpu", torch.bfloat16):
                contexts.append(model.med.context(model.vision(images), queries=few))
                assert type(contexts[1]) is Context
                generated = [generate(model, contexts[1], *prompts, DecodeConfig(beams=3))]
        generated.append(generate(half, contexts[0], *prompts, DecodeConfig(beams=3)))
        for written in generated:
            assert written.logprobs.dtype == torch.float32
            assert (written.scores[:, 0] - full.scores[:, 0]).abs().median() < 0.1
        assert generate(half, contexts[0], *prompts, NUCLEUS, keys()).scores.isfinite().all()


# Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_length": 21}, "min_length 21 is more than max_length 20"),
        ({"num": 4}, "num 4 is more than the 3 beams"),
        ({"beams": 0}, "beams must be 1 or more"),
        ({"max_length": 1, "min_length": 0}, "max_length must be 2 or more"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"temperature": 0.0}, "temperature"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"length_rule": "2021"}, "length_rule must be one of generated, 2022, got '2021'"),
        ({"length_rule": None}, "length_rule must be one of generated, 2022, got None"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DecodeConfig(**options)


def test_a_length_rule_without_quotes_is_a_number_in_yaml():
    for config in (
        DecodeConfig(length_rule=2022),
        AnswerConfig(length_rule=2022),
        AnswerConfig(length_rule=2022).decode(),
    ):
        assert config.length_rule == "2022"
    with pytest.raises(ValueError, match="length_rule must be one of generated, 2022, got 2023"):
        AnswerConfig(length_rule=2023)


def test_presets():
    assert DECODE_PRESETS["capfilt_2022"] == DecodeConfig(
        method="nucleus", top_p=0.9, top_k=50, repetition_penalty=1.1, max_length=20, min_length=5
    )
    assert DECODE_PRESETS["caption_2022"] == DecodeConfig(beams=3, max_length=20, min_length=5, length_rule="2022")
    assert DECODE_PRESETS["greedy"].beams == 1
    assert DECODE_PRESETS["nucleus"].top_k == 0


def test_what_does_not_fit_is_refused(model, context, prompts):
    ids, keep = prompts

    def refused(message, ids=ids, keep=keep, config=None, context=context, model=model, **options):
        with pytest.raises(ValueError, match=message) as error:
            generate(model, context, ids, keep, config or DecodeConfig(**options))
        assert "\n" not in str(error.value)

    refused("12 prompts for 2 contexts with 3 texts each", context=context[torch.tensor([0, 1])].expand(3))
    refused("max_length 33 exceeds the model's 32 positions", max_length=33)
    refused("a prompt of 6 tokens leaves no room up to max_length 6", max_length=6)
    refused("nucleus needs a key for each of 12 rows, got none", method="nucleus")
    refused("50 beams are too many for a vocabulary of 99", beams=50)
    refused("two equal grids", keep=keep[:, :3])
    refused("two equal grids", ids=ids[:0], keep=keep[:0])
    refused(r"start with \[DEC\]", ids=ids[:, 1:], keep=keep[:, 1:])
    refused(r"start with \[DEC\]", ids=ids.flip(1), keep=keep.flip(1))
    refused(r"contains \[SEP\]", ids=ids.masked_fill(ids == ids[1, 2], TEXT.sep_id))
    long = torch.full((ROWS, 40), TEXT.dec_id)
    refused("a prompt of 40 tokens exceeds the model's 32 positions", ids=long, keep=long > 0)
    with pytest.raises(ValueError, match="got 3"):
        generate(model, context, ids, keep, NUCLEUS, keys(3))
    with pytest.raises(ValueError, match="a row's key is a str, got int 0"):
        generate(model, context, ids, keep, NUCLEUS, range(ROWS))
    try:
        refused("training mode", model=model.train())
    finally:
        model.eval()


# Words ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaker(tokenizer):
    torch.manual_seed(5)
    model = Blip(dataclasses.replace(goldens.CONFIG, text=tokenizer.text_config(TEXT))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def test_write_takes_prompts_and_returns_words(speaker, tokenizer, images):
    config = DecodeConfig(beams=3, num=2, max_length=12)
    texts = generate_texts(speaker, tokenizer, images[:3], config, prompt=["ab", "", "c d e"])
    with torch.no_grad():
        tokens = speaker.vision(images[:3])
    for other in (tokens, speaker.context(tokens)):
        assert [[t.text for t in some] for some in texts] == [
            [t.text for t in some]
            for some in generate_texts(speaker, tokenizer, other, config, prompt=["ab", "", "c d e"])
        ]
    for row, prompt in enumerate(["ab", "", "c d e"]):
        ids, keep = tokenizer.encode([prompt], first="dec", max_length=30)
        one = speaker.context(tokens[row : row + 1])
        generated = generate(speaker, one, ids[:, :-1], keep[:, :-1], config)
        for n in range(2):
            written = generated.ids[0, n, keep.sum() - 1 :]
            assert texts[row][n].text == tokenizer.decode([written])[0]
            assert texts[row][n].logprob == pytest.approx(float(generated.logprobs[0, n].sum()), abs=1e-4)
            assert texts[row][n].finished == generated.finished[0, n]
    same = generate_texts(speaker, tokenizer, images[:3], config, prompt="ab")
    assert same[0][0].text == texts[0][0].text


def test_write_refuses(speaker, tokenizer, images):
    config = DecodeConfig(max_length=12)
    with pytest.raises(ValueError, match="exceeds the model's 32 positions"):
        generate_texts(speaker, tokenizer, images, config, prompt="x " * 60)
    with pytest.raises(ValueError, match="2 prompts for 12 contexts"):
        generate_texts(speaker, tokenizer, images, config, prompt=["a", "b"])
    with pytest.raises(ValueError, match="needs a key"):
        generate_texts(speaker, tokenizer, images, DECODE_PRESETS["nucleus"])
    with pytest.raises(ValueError, match="does not fit the model"):
        generate_texts(Blip(goldens.CONFIG).eval(), tokenizer, images, config)
