"""`blip.pipeline` against transformers' `generate` on exported models, and the shapes of transformers 4's results."""

import numpy as np
import pytest
import torch
from test_export import FROM, answerer, images, model, words  # noqa: F401
from transformers import AutoProcessor, BlipForConditionalGeneration, BlipForQuestionAnswering

import blip
from blip.checkpoints import export
from blip.data.transforms import EvalTransform

QUESTIONS = ["w3 w9?", "W4", "w8 w1 w2 w7 w30"]


@pytest.fixture(scope="module")
def captioner(model, words, tmp_path_factory):  # noqa: F811
    """Folders of ours and of transformers, with its model and processor."""
    return _both(model, words, tmp_path_factory.mktemp("captioner"), BlipForConditionalGeneration, "captioning")


@pytest.fixture(scope="module")
def oracle(answerer, words, tmp_path_factory):  # noqa: F811
    return _both(answerer, words, tmp_path_factory.mktemp("oracle"), BlipForQuestionAnswering, None)


def _both(network, tokenizer, folder, kind, use):
    blip.save_pretrained(network, tokenizer, folder / "ours")
    export.write(network, tokenizer, folder / "theirs", "transformers", FROM, use)
    return folder, kind.from_pretrained(folder / "theirs").eval(), AutoProcessor.from_pretrained(folder / "theirs")


def theirs(captioner, image, prompt=None, **how):
    """What transformers 4 did for one image: `generate` on the processor's output, then `decode`."""
    _, network, processor = captioner
    given = processor(text=prompt, return_tensors="pt") if prompt is not None else {}
    given.pop("pixel_values", None) if given else None
    pixels = EvalTransform(32)(image)[None]
    ids = network.generate(pixels, **given, **how)
    return [{"generated_text": processor.decode(row, skip_special_tokens=True)} for row in ids]


@pytest.mark.parametrize("side", ["ours", "theirs"])
def test_captions_are_those_of_generate(captioner, side):
    pipe = blip.pipeline("image-to-text", captioner[0] / side, device="cpu", batch_size=2)
    expected = [theirs(captioner, image) for image in images()]
    assert len({one["generated_text"] for (one,) in expected}) > 1, "the test needs captions that differ"
    assert pipe(images()) == expected
    assert [pipe(image) for image in images()] == expected
    assert pipe(np.asarray(images()[0])) == expected[0]


@pytest.mark.parametrize(
    "how",
    [
        {"max_new_tokens": 3},
        {"max_new_tokens": 29},
        {"max_length": 9},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "max_length": 12, "min_length": 6},
        {"num_beams": 3, "length_penalty": 2.0, "max_length": 15},
        {"repetition_penalty": 1.7},
        {"do_sample": False, "min_length": 15},
    ],
)
@pytest.mark.parametrize("prompt", [None, "", "w4 w7"])
def test_options_are_those_of_generate(captioner, how, prompt):
    pipe, image = blip.pipeline("image-to-text", captioner[0] / "ours", device="cpu"), images()[1]
    how = {**how, "max_new_tokens": 27} if how.get("max_new_tokens") == 29 and prompt else how
    expected = theirs(captioner, image, prompt, **how)
    assert pipe(image, prompt=prompt, generate_kwargs=how) == expected
    assert all(one["generated_text"].startswith(prompt or "") for one in expected)
    if set(how) == {"max_new_tokens"}:
        assert pipe(image, prompt=prompt, **how) == expected


@pytest.mark.parametrize("side", ["ours", "theirs"])
def test_answers_are_those_of_generate(oracle, side):
    folder, network, processor = oracle
    pipe = blip.pipeline("visual-question-answering", folder / side, device="cpu", batch_size=2)

    def expected(image, question, **how):
        inputs = processor(images=image, text=question, return_tensors="pt")
        inputs["pixel_values"] = EvalTransform(32)(image)[None]
        ids = network.generate(**inputs, **how)
        return [{"answer": processor.decode(row, skip_special_tokens=True).strip()} for row in ids]

    one, two, three = images()
    answers = [expected(image, question) for image, question in zip(images(), QUESTIONS, strict=True)]
    assert len({answer["answer"] for (answer,) in answers}) > 1, "the test needs answers that differ"
    assert pipe(image=one, question=QUESTIONS[0]) == pipe(one, QUESTIONS[0]) == answers[0]
    rows = [{"image": image, "question": question} for image, question in zip(images(), QUESTIONS, strict=True)]
    assert pipe(rows[0]) == answers[0]
    assert pipe(rows) == answers
    assert pipe(rows[:1]) == answers[:1]
    assert pipe(images(), QUESTIONS[1]) == [expected(image, QUESTIONS[1]) for image in images()]
    assert pipe(two, QUESTIONS) == [expected(two, question) for question in QUESTIONS]
    each = [expected(image, question) for question in QUESTIONS[:2] for image in (one, three)]
    assert pipe([one, three], QUESTIONS[:2]) == each
    assert pipe(one, QUESTIONS[2], max_new_tokens=2) == expected(one, QUESTIONS[2], max_new_tokens=2)
    beams = {"num_beams": 3, "max_length": 10}
    assert pipe(one, QUESTIONS[2], generate_kwargs=beams) == expected(one, QUESTIONS[2], **beams)


def test_a_loaded_model_and_wrong_use(captioner, oracle):
    loaded = blip.load(captioner[0] / "ours", device="cpu")
    image = images()[0]
    pipe = blip.pipeline("image-to-text", loaded)
    assert pipe(image) == theirs(captioner, image)
    with pytest.raises(ValueError, match="task must be one of image-to-text, visual-question-answering, got 'vqa'"):
        blip.pipeline("vqa", loaded)
    with pytest.raises(ValueError, match=r"cannot answer questions; load one of recipes\.vqa"):
        blip.pipeline("visual-question-answering", loaded)
    with pytest.raises(ValueError, match=r"cannot caption; load one of recipes\.caption"):
        blip.pipeline("image-to-text", oracle[0] / "ours")
    for how, message in (
        ({"generate_kwargs": {"do_sample": True}}, "do_sample has no equal here"),
        ({"max_new_tokens": "9"}, "max_new_tokens must be a whole number, got '9'"),
        ({"generate_kwargs": {"num_beams": 2.5}}, "beams must be a whole number, got 2.5"),
        ({"generate_kwargs": {"max_new_tokens": 3}, "max_new_tokens": 3}, "given twice"),
        (
            {"generate_kwargs": {"assistant_model": None}},
            "generate_kwargs has 'assistant_model'; known are max_new_tok",
        ),
        ({"max_new_tokens": 500}, "exceeds the model's 32 positions"),
        ({"prompt": 3}, "prompt must be a text, got int"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            pipe(image, **how)
        assert "\n" not in str(error.value)
    pipe = blip.pipeline("visual-question-answering", oracle[0] / "ours")
    for given, message in (
        ((image,), "dictionaries with `image` and `question`"),
        (({"image": image},), "dictionaries with `image` and `question`"),
        (([image],), "dictionaries with `image` and `question`"),
        ((image, " "), "a question must be a text with words"),
        ((image, ["w1", 3]), "a question must be a text with words, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(*given)


def test_torch_is_not_seeded(captioner):
    """Sampling leaves the global state as it was."""
    loaded = blip.load(captioner[0] / "ours", device="cpu")
    before = torch.random.get_rng_state()
    loaded.caption(images(), decode="nucleus", prompt="")
    assert torch.equal(before, torch.random.get_rng_state())
