"""Every tensor is on the model's device, and few values are read from it: on a CUDA device that is not there."""

import dataclasses
from typing import NamedTuple

import accelerate
import numpy as np
import pytest
import torch
from fake_cuda import DEVICE, FakeCuda, Misplaced, backward
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from blip.inference import answering, zero_shot
from blip.inference.features import embed_images, embed_texts, ground_texts, match_texts
from blip.inference.generate import generate, generate_texts
from blip.inference.settings import AnswerConfig, DecodeConfig
from blip.models.blip import Blip, Captioner, Matcher
from blip.models.dialogue import Dialogue
from blip.models.nlvr import Nlvr
from blip.models.presets import TINY
from blip.models.settings import DialogueModelConfig, NlvrModelConfig
from blip.models.vqa import Vqa
from blip.nn import host
from blip.nn.settings import TrainingOptions
from blip.objectives.batch import Batch, DialogueBatch, QuestionBatch, SentenceBatch
from blip.objectives.caption import Caption, CaptionConfig
from blip.objectives.clip import Clip, ClipConfig
from blip.objectives.dialogue import DialogueObjective
from blip.objectives.nlvr import NlvrObjective
from blip.objectives.objective import Clock
from blip.objectives.pretrain import Pretrain, PretrainConfig
from blip.objectives.retrieval import Retrieval, RetrievalConfig
from blip.objectives.vqa import VqaConfig, VqaObjective
from blip.tokenizer import Tokenizer
from blip.train import loop
from blip.train.settings import TrainConfig
from capfilt.score.models import BlipScorer
from capfilt.score.scorer import Item
from capfilt.settings import ScoreConfig
from eval.retrieval import retrieval

WORLD = Tokenizer.load("world")
SIDE = 32
CONFIG = dataclasses.replace(
    TINY,
    vision=dataclasses.replace(TINY.vision, image_size=SIDE, depth=2, width=64, heads=2),
    text=WORLD.text_config(dataclasses.replace(TINY.text, width=48, layers=2, heads=2, hidden=96)),
    embed_dim=16,
)
OPTIONS = TrainingOptions(drop_path=0.1, dropout=0.1, attention_dropout=0.1)
QUEUE = {"queue_size": 24, "negative_floor": 1e-4}


@pytest.fixture
def cuda(monkeypatch):
    with FakeCuda().installed(monkeypatch) as device:
        yield device


def texts(rows: int, longest: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of texts of different lengths."""
    lengths = 3 + torch.arange(rows) % (longest - 2)
    keep = torch.arange(longest) < lengths[:, None]
    ids = (torch.arange(rows * longest).view(rows, longest) % 40 + 10).masked_fill(~keep, 0)
    ids[:, 0] = WORLD.cls_id
    return ids, keep


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 3, SIDE, SIDE)


def pixels(*shape: int) -> torch.Tensor:
    """Images as data workers hand them over."""
    return torch.randint(256, (*shape, 3, SIDE, SIDE), dtype=torch.uint8)


KEYS = [f"{i}" for i in range(5)]
QUESTIONS = {"weights": torch.ones(7), "question": torch.tensor([0, 0, 1, 2, 3, 3, 4])}
BATCHES = {
    "pairs": lambda: Batch(pixels(5), *texts(5), KEYS, prompt=2, image_ids=torch.tensor([0, 1, 0, 2, 3])),
    "questions": lambda: QuestionBatch(
        pixels(5), *texts(5), KEYS, **dict(zip(("answer_ids", "answer_keep"), texts(7), strict=True)), **QUESTIONS
    ),
    "sentences": lambda: SentenceBatch(pixels(5, 2), *texts(5), torch.tensor([0, 1, 0, 1, 1]), KEYS),
    "dialogues": lambda: DialogueBatch(pixels(5), *texts(5, 6), *texts(30), 3, KEYS),
}


class Case(NamedTuple):
    build: object
    batch: str


CASES = {
    "pretrain": Case(lambda: Pretrain(Blip(CONFIG, OPTIONS), PretrainConfig(**QUEUE)), "pairs"),
    "retrieval": Case(lambda: Retrieval(Blip(CONFIG, OPTIONS), RetrievalConfig(**QUEUE)), "pairs"),
    "caption": Case(lambda: Caption(Blip(CONFIG, OPTIONS), CaptionConfig()), "pairs"),
    "clip": Case(lambda: Clip(Blip(CONFIG, OPTIONS), ClipConfig()), "pairs"),
    "vqa": Case(lambda: VqaObjective(Vqa(CONFIG, OPTIONS), VqaConfig()), "questions"),
    "nlvr": Case(lambda: NlvrObjective(Nlvr(NlvrModelConfig.of(CONFIG, 2), OPTIONS)), "sentences"),
    "dialogue": Case(lambda: DialogueObjective(Dialogue(DialogueModelConfig.of(CONFIG, True), OPTIONS)), "dialogues"),
}


class Data:
    """The same batch again and again."""

    def __init__(self, name: str):
        self.name = name

    def __len__(self) -> int:
        return 20

    def batches(self, start, count, rank, world, batch_size):
        for _ in range(count):
            yield BATCHES[self.name]()


def train(objective, name, out, monkeypatch, cuda, **options):
    """Make three steps of the training loop, without a checkpoint, which would read the weights."""

    def steps(run):
        cuda.strict = True
        return whole(run)

    whole = loop._Run.train
    monkeypatch.setattr(loop._Run, "train", steps)
    monkeypatch.setattr(loop._Run, "_save", lambda run: None)
    monkeypatch.setattr(accelerate.Accelerator, "device", DEVICE)
    cuda.strict = False
    config = TrainConfig(batch_size=5, steps=3, precision="bfloat16", clip=1.0, **options)
    return loop.fit(objective, Data(name), config, out=out)


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_training_step_waits_once(name, tmp_path, monkeypatch, cuda):
    objective, case = CASES[name].build(), CASES[name]
    updates = []
    after_step = objective.after_step
    monkeypatch.setattr(objective, "after_step", lambda carries: updates.append(after_step(carries)))
    assert train(objective, case.batch, tmp_path, monkeypatch, cuda).steps == 3
    assert (len(updates), cuda.reads) == (3, 3)
    assert {p.device for p in objective.parameters()} | {b.device for b in objective.buffers()} == {DEVICE}


def test_accumulation_waits_no_more_often(tmp_path, monkeypatch, cuda):
    train(CASES["pretrain"].build(), "pairs", tmp_path, monkeypatch, cuda, accumulate=2)
    assert cuda.reads == 3


def test_autocast_is_that_of_a_gpu(cuda):
    objective = cuda.move(CASES["caption"].build())
    seen = []
    objective.model.med.blocks[0].up.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cuda", torch.bfloat16):
        objective(BATCHES["pairs"]().to(DEVICE), Clock())
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_torch_and_of_all_that_is_trained(name):
    """`fake_cuda.backward`, which replaces torch's engine, on tensors with values; `untrained` names what has none."""
    gradients = []
    for compute in (torch.Tensor.backward, backward):
        torch.manual_seed(0)
        objective = CASES[name].build()
        batch = BATCHES[CASES[name].batch]().to(torch.device("cpu"))
        compute(sum(objective(batch, Clock(epoch=1.0)).losses.values()))
        gradients.append({name: p.grad for name, p in objective.named_parameters() if p.requires_grad})
    for (part, theirs), ours in zip(gradients[0].items(), gradients[1].values(), strict=True):
        assert (theirs is None) == (ours is None) == (part in objective.untrained()), part
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["caption", "retrieval", "clip"])
def test_parts_of_a_model_train_whole(name):
    """A captioner, a matcher or a matcher's towers in place of a whole `Blip`."""
    part = {"caption": Captioner, "retrieval": Matcher, "clip": Matcher}[name](CONFIG, OPTIONS)
    kind, config = {
        "caption": (Caption, CaptionConfig()),
        "retrieval": (Retrieval, RetrievalConfig(**QUEUE)),
        "clip": (Clip, ClipConfig()),
    }[name]
    objective = kind(part, config)
    sum(objective(BATCHES["pairs"]().to(torch.device("cpu")), Clock()).losses.values()).backward()
    assert {n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None} == objective.untrained()


# What is caught -------------------------------------------------------------------------------------------------------

PLANTED = {
    "a tensor of the host": (lambda x: x + torch.zeros(len(x), 1), Misplaced),
    "an index of the host": (lambda x: x[torch.arange(len(x))], Misplaced),
    "a mask of the host": (lambda x: x.masked_fill(torch.zeros(x.shape) > 1, 0.0), Misplaced),
    "item": (lambda x: x * x.sum().item(), DataDependentOutputException),
    "bool": (lambda x: x if x.sum() > 0 else -x, DataDependentOutputException),
    "tolist": (lambda x: x * x[0].tolist()[0], DataDependentOutputException),
    "cpu": (lambda x: x * x.sum().cpu(), Misplaced),
    "nonzero": (lambda x: x * len(x.nonzero()), DynamicOutputShapeException),
    "an index of booleans": (lambda x: x[x > 0], DynamicOutputShapeException),
    "a draw that checks its weights": (lambda x: x * x.softmax(1).multinomial(1), Misplaced),
    "a list": (lambda x: x * torch.tensor([2.0], device=x.device), Misplaced),
    "a blocking copy": (lambda x: x * torch.tensor([2.0]).to(x.device), Misplaced),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_strays_or_waits_is_caught(name, tmp_path, monkeypatch, cuda):
    plant, error = PLANTED[name]
    objective = CASES["caption"].build()
    embed = objective.model.vision.forward

    def planted(image):
        tokens = embed(image)
        return tokens + 0 * plant(tokens[:, 0]).sum()

    monkeypatch.setattr(objective.model.vision, "forward", planted)
    with pytest.raises(error):
        train(objective, "pairs", tmp_path, monkeypatch, cuda)


def test_a_further_read_is_counted(tmp_path, monkeypatch, cuda):
    objective = CASES["caption"].build()
    embed = objective.model.vision.forward

    def embed_again(image):
        return embed(host.read(image)[0].to(DEVICE, non_blocking=True))

    monkeypatch.setattr(objective.model.vision, "forward", embed_again)
    train(objective, "pairs", tmp_path, monkeypatch, cuda)
    assert cuda.reads == 6


# Inference ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(cuda):
    return cuda.move(Blip(CONFIG).eval())


def tokens(model, count=5):
    with torch.no_grad():
        return model.vision(images(count).to(DEVICE, non_blocking=True))


DECODING = {
    "beam": DecodeConfig(beams=3, num=2, max_length=20, repetition_penalty=1.2),
    "beam 2022": DecodeConfig(beams=3, max_length=20, min_length=5, length_rule="2022"),
    "greedy": DecodeConfig(beams=1, max_length=20),
    "nucleus": DecodeConfig(method="nucleus", num=2, max_length=20, min_length=0, top_k=50),
}
PROMPTS = ["a red", "", "a small blue ring", "two", "a"]


@pytest.mark.parametrize("name", DECODING)
def test_decoding_waits_for_the_check_and_for_the_texts(name, cuda, model):
    """At most 19 steps, checked after 8 and 16; the stand-in for what is read never says that a text is finished."""
    cuda.answer = torch.ones_like
    captions = generate_texts(model, WORLD, tokens(model), DECODING[name], prompt=PROMPTS, keys=KEYS)
    assert [len(some) for some in captions] == [DECODING[name].num] * 5
    assert cuda.reads == 3


def test_prompts_on_the_device_are_read_once(cuda, model):
    """The stand-in for them says that each fills the whole text."""
    cuda.answer = lambda empty: empty.fill_(WORLD.dec_id)
    context = model.context(tokens(model))
    prompts = torch.ones(5, 20, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="20 tokens leaves no room"):
        generate(model, context, prompts, prompts > 0, DECODING["greedy"])
    assert cuda.reads == 1


def test_finished_texts_end_the_decoding(cuda, model):
    """The stand-in for the check, zeros, says that all are finished: one check and the texts."""
    generate_texts(model, WORLD, tokens(model), DECODING["beam"], keys=KEYS)
    assert cuda.reads == 2


def test_embedding_and_matching_wait_for_nothing(cuda, model):
    parts, phrases = [tokens(model, 3), tokens(model, 2)], ["a red star", "a ring", "two small green crosses"]
    matched = match_texts(model, WORLD, parts, phrases, batch=2)
    assert (matched.probability.shape, matched.score.shape) == ((5, 3), (5, 3))
    assert ground_texts(model, WORLD, parts[:1], phrases).shape == (3, 48)
    words, seen = embed_texts(model, WORLD, phrases), embed_images(model, parts)
    classes = zero_shot.class_embeddings(lambda some: embed_texts(model, WORLD, some), ["star", "ring"])
    chances = zero_shot.probabilities(seen, classes, model.temperature)
    assert {t.device for t in (matched.itc, matched.logits, words, seen, chances)} == {DEVICE}
    assert cuda.reads == 0


def test_reranking_waits_once_a_batch(cuda, model):
    """3 batches of images: their embeddings, and their matches; 2 batches of texts."""
    views = [images(2), images(2), images(1)]
    phrases = [f"a {colour} {shape}" for colour in ("red", "blue") for shape in ("star", "ring", "cross")]
    recalls = retrieval(model, WORLD, views, phrases, [0, 1, 2, 3, 4, 4], k=2, batch=3)
    assert recalls
    assert cuda.reads == 3 + 2 + 3


def test_answering_waits_for_the_count_and_for_the_answers(cuda):
    model = cuda.move(Vqa(CONFIG).eval())
    candidates = answering.Candidates(["yes", "no", "two", "a red star", "a red ring", "blue"], WORLD)
    cuda.strict = False
    candidates.to(DEVICE)
    cuda.strict = True
    cuda.answer = torch.ones_like
    questions = ["is there a star", "how many rings are there", "what is red"]
    context = answering.encode_questions(model, WORLD, tokens(model, 2), questions, [0, 0, 1])
    assert cuda.reads == 0
    answering.rank(model, context, candidates, AnswerConfig(k=4, smoothing=0.1))
    assert cuda.reads == 1
    best = answering.answers(model, WORLD, context, AnswerConfig(k=4), candidates, num=2)
    assert [[answer.text for answer in some] for some in best] == [[candidates.texts[1]] * 2] * 3
    assert cuda.reads == 1 + 2


@pytest.mark.parametrize("decode", ["capfilt_2022", "caption_2022"])
def test_capfilt_waits_for_the_texts_and_for_the_matches(decode, monkeypatch, cuda):
    """Images with several numbers of texts, which are matched apart and read together."""
    # Tensors without values know no inference mode.
    monkeypatch.setattr(BlipScorer, "_fitting", torch.no_grad()(BlipScorer._fitting.__wrapped__))
    cuda.strict = False
    config = ScoreConfig(filter="f", decode=decode, precision="bfloat16")
    scorer = BlipScorer((Blip(CONFIG), WORLD), (Blip(CONFIG), WORLD), config, "cuda")
    cuda.strict = True
    views = [np.zeros((SIDE, SIDE, 3), np.uint8)]
    web = [["a red star"], [], ["one", "a large moon", "yellow " * 40], ["x"]]
    items = [Item(f"{i:032x}", views, some) for i, some in enumerate(web)]
    scorer.score(items)
    assert cuda.reads == 2 + 1  # decoding is over at its first check, as the stand-in says
    scorer.embed(items)
    assert cuda.reads == 4
