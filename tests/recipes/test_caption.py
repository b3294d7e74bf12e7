"""The captioner's fine-tune: its loss, its prompt, whole runs, the choice of the best epoch, and bad input."""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import goldens
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from stub_run import SEARCHED, Numbers, Stub, Zygote, curve, quick
from test_objectives import CONFIG, make_batch

import blip.train.loop
from blip import files
from blip.checkpoints.checkpoint import from_pretrained, save_pretrained
from blip.checkpoints.layouts import original_captioning
from blip.checkpoints.table import from_theirs, to_theirs
from blip.data.formats.sources import Record
from blip.data.prepare.captions import PrepareCaptions, check_prompt
from blip.data.settings import DataConfig, SourceConfig
from blip.data.transforms import EvalTransform
from blip.inference.settings import CAPTION_PROMPT, DecodeConfig
from blip.models.blip import Blip, starting_with
from blip.objectives.batch import Batch
from blip.objectives.caption import Caption, CaptionConfig
from blip.objectives.objective import Clock
from blip.objectives.pretrain import Pretrain, PretrainConfig
from blip.tensors import read_tensors
from blip.text import clean_caption
from blip.tokenizer import Tokenizer
from blip.train.log import read_metrics
from blip.train.loop import fit
from blip.train.state import Checkpoints
from blip.world import files as world_files
from blip.world.scene import COLOURS, scene_of
from eval.captioning import captions_of, score
from eval.images import Images
from recipes import caption as recipe
from recipes import command
from recipes.building import ModelChoice, build_feed, build_model
from recipes.run import BestModel, HeldOut

# The loss -------------------------------------------------------------------------------------------------------------


def build(**options) -> Caption:
    torch.manual_seed(0)
    objective = Caption(Blip(CONFIG), CaptionConfig(**options))
    with torch.no_grad():
        for p in objective.model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return objective.train()


def prompted(batch: Batch, prompt: int) -> Batch:
    return dataclasses.replace(batch, prompt=prompt)


@pytest.fixture(scope="module")
def original():
    return load_file(goldens.HERE / "captioning.safetensors")


@pytest.fixture
def captioner():
    """The original's weights; what its captioner lacks keeps the first weights of ours."""
    torch.manual_seed(5)
    model = Blip(goldens.CONFIG)
    table = original_captioning(model)
    theirs = {name: value for name, value in goldens.checkpoint().items() if name in goldens.keys("captioning")}
    model.load_state_dict(from_theirs(table, theirs, model.state_dict(), "goldens"), strict=False)
    return Caption(model, CaptionConfig()).train()


def their_batch(original) -> Batch:
    ids, keep = original["ids"].long(), original["keep"]
    return Batch(goldens.batch(0).image, ids, keep, ["0", "1", "2", "3"], prompt=3)


def test_loss_and_every_gradient_of_the_original(captioner, original):
    outcome = captioner(their_batch(original), Clock())
    torch.testing.assert_close(outcome.losses["lm"], original["loss"][0], rtol=1e-5, atol=1e-5)
    outcome.losses["lm"].backward()
    table = original_captioning(captioner.model)
    rows = {row.ours for row in table.rows}
    grads = {name: p.grad for name, p in captioner.model.named_parameters() if name in rows}
    gradients = to_theirs(table, grads)
    expected = {name.removeprefix("grad."): value for name, value in original.items() if name.startswith("grad.")}
    assert len(expected) == 91
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1e-2)
        assert float((gradients[name] - gradient).abs().max() / scale) < 5e-5, name


def test_only_what_the_original_learned_gets_a_gradient(captioner, original):
    captioner(their_batch(original), Clock()).losses["lm"].backward()
    table = original_captioning(captioner.model)
    learned = {row.ours for row in table.rows}
    for name, parameter in captioner.model.named_parameters():
        assert (parameter.grad is not None) == (name in learned), name


@pytest.mark.parametrize("prompt", [0, 1, 4])
def test_loss_by_hand(prompt):
    objective, batch = build(), prompted(make_batch((9, 7, 12)), prompt)
    model = objective.model
    loss = objective(batch, Clock()).losses["lm"]
    context = model.context(model.vision(batch.image))
    logits = model.caption_logits(starting_with(batch.ids, CONFIG.text.dec_id), batch.keep, context)
    terms = []
    for row in range(len(batch)):
        for at in range(prompt + 1, int(batch.keep[row].sum())):
            log_p = logits[row, at - 1].log_softmax(0)
            terms.append(-0.9 * log_p[batch.ids[row, at]] - 0.1 * log_p.mean())
    torch.testing.assert_close(loss, torch.stack(terms).mean(), rtol=1e-5, atol=1e-6)


def test_nothing_is_learned_of_the_prompt_but_it_is_read():
    objective, batch = build(), prompted(make_batch((9, 7, 12)), 3)
    other = batch.ids.clone()
    other[:, 1:4] = torch.tensor([50, 60, 70])
    assert not torch.equal(other, batch.ids)
    before = objective(batch, Clock())
    after = objective(dataclasses.replace(batch, ids=other), Clock())
    assert before.losses["lm"] != after.losses["lm"], "what follows depends on the prompt"
    unmasked = objective(prompted(batch, 0), Clock())
    assert unmasked.losses["lm"] != before.losses["lm"]


def test_padding_changes_nothing():
    objective, batch = build(), prompted(make_batch((9, 5, 12)), 2)
    wide = dataclasses.replace(batch, ids=F.pad(batch.ids, (0, 11), value=77), keep=F.pad(batch.keep, (0, 11)))
    a, b = objective(batch, Clock()).losses["lm"], objective(wide, Clock()).losses["lm"]
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_word_accuracy_is_of_the_words_that_are_asked_for(monkeypatch):
    objective, batch = build(), prompted(make_batch((6, 5)), 2)
    right = {1: 3, 0: 1}  # of 3 + 2 words (with [SEP]) the first row's first and both of the second's

    def vocabulary(states):
        logits = torch.zeros(len(states), CONFIG.text.vocab_size)
        at = 0
        for row in range(2):
            for place in range(1, int(batch.keep[row].sum())):
                word = batch.ids[row, place] if place > 2 and place - 2 <= right[row] else 1
                logits[at, word] = 5.0
                at += 1
        return logits

    monkeypatch.setattr(objective.model.med, "vocabulary", vocabulary)
    assert objective(batch, Clock()).health["word_accuracy"].item() == pytest.approx((1 + 2) / 5)


# Evaluation by epochs -------------------------------------------------------------------------------------------------


def evaluated_at(out) -> list[tuple[int, float]]:
    return [(line["step"], line["epoch"]) for line in read_metrics(out / "metrics.jsonl") if "eval" in line]


@pytest.mark.parametrize(
    ("batch", "total", "at"),
    [
        (4, {"epochs": 2.0}, [8, 16]),
        (5, {"steps": 15}, [7, 13, 15]),
        (64, {"steps": 2}, [1, 2]),
        (3, {"steps": 4}, [4]),
    ],
)
def test_every_epoch_of_32_pairs_is_evaluated_when_it_is_over(tmp_path, batch, total, at):
    config = quick(batch_size=batch, eval_each_epoch=True, **total)
    fit(Stub(), Numbers(32), config, out=tmp_path, evaluate=lambda _: {"score": 1.0})
    assert evaluated_at(tmp_path) == [(step, step * batch / 32) for step in at]


def test_what_is_evaluated_is_saved_before(tmp_path):
    steps = []

    def evaluate(_):
        steps.append(Checkpoints(tmp_path, 1).newest()[1]["step"])
        return {"score": 1.0}

    fit(Stub(), Numbers(32), quick(steps=20, eval_each_epoch=True, save_every=50), out=tmp_path, evaluate=evaluate)
    assert steps == [8, 16, 20]


# What a run starts from -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A TINY model's folder."""
    folder = tmp_path_factory.mktemp("start") / "model"
    save_pretrained(*build_model(ModelChoice(size="tiny", tokenizer="world"), seed=3), folder)
    return folder


def test_a_start_brings_size_tokenizer_and_weights(start):
    before, _ = from_pretrained(start)
    for choice in (ModelChoice(), ModelChoice(size="tiny", tokenizer="world")):
        model, tokenizer = build_model(dataclasses.replace(choice, start_from=str(start)), seed=0)
        assert model.config == before.config
        assert len(tokenizer) == before.config.text.vocab_size
        for name, value in before.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name


def test_the_seed_decides_what_a_continued_model_is_trained_with(start):
    def queue(seed):
        model, _ = build_model(ModelChoice(start_from=str(start)), seed=seed)
        objective = Pretrain(model, PretrainConfig(queue_size=5))
        return {name: value for name, value in objective.state_dict().items() if not name.startswith("model.")}

    first, again, other = queue(1), queue(1), queue(2)
    assert first
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


def test_how_it_is_trained_is_the_runs_choice(start):
    choice = ModelChoice(start_from=str(start), image_size=96, drop_path=0.2, patch_drop=0.5, checkpoint=True)
    model, _ = build_model(choice, seed=0)
    vision, vit = model.config.vision, model.vision.vit
    assert (vision.image_size, vision.drop_path, vision.patch_drop, vision.checkpoint) == (96, 0.2, 0.5, True)
    assert (vit.grad_checkpointing, vit.patch_drop.prob) == (True, 0.5)
    assert vit.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert vit.pos_embed.shape[1] == 1 + 6 * 6
    before, _ = from_pretrained(start, image_size=96)
    for name, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("choice", "named"),
    [
        ({"size": "base"}, "is a model of size tiny, not base: leave model.size out"),
        ({"tokenizer": "OTHER"}, "another tokenizer than OTHER: leave that out"),
        ({"vision_weights": "deit_base"}, "model.vision_weights deit_base would not be used"),
        ({"text_weights": "bert"}, "model.text_weights bert would not be used"),
    ],
)
def test_a_setting_that_contradicts_the_start_is_refused(start, tmp_path, choice, named):
    if "tokenizer" in choice:
        other = tmp_path / "vocab.txt"
        other.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(99))]))
        choice, named = {"tokenizer": str(other)}, named.replace("OTHER", str(other))
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        build_model(ModelChoice(start_from=str(start), **choice), seed=0)
    assert str(error.value).startswith(f"model.start_from {start}")
    assert "\n" not in str(error.value)


# The prompt -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world_tokenizer() -> Tokenizer:
    return Tokenizer.load("world")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the splits of the synthetic world."""
    folder = tmp_path_factory.mktemp("world")
    for split, count in (("train", 20), ("val", 6), ("test", 4)):
        world_files.write(folder, "json", split, count, size=32)
    return folder


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("prompt", ["", CAPTION_PROMPT, "a picture of"])
def test_the_prompt_stands_before_every_cleaned_caption(world, world_tokenizer, prompt, streaming):
    source = SourceConfig(str(world / "train.json"))
    config = DataConfig([source], prompt=prompt, max_words=8, max_tokens=40, workers=0, streaming=streaming)
    feed, _ = build_feed(config, 32, world_tokenizer, seed=0)
    (batch,) = feed.batches(0, 1, 0, 1, 6)
    assert batch.prompt == len(prompt.split())
    known = {c for row in json.loads((world / "train.json").read_text()) for c in row["caption"]}
    cleaned = {" ".join([*prompt.split(), *clean_caption(c, 8).split()]) for c in known}
    texts = [t.replace(" ,", ",").replace(" :", ":") for t in world_tokenizer.decode(batch.ids)]
    cleaned = {c.replace(" ,", ",") for c in cleaned}
    assert set(texts) <= cleaned
    assert batch.to(torch.device("cpu")).prompt == batch.prompt


def test_another_prompt_is_other_data(world, world_tokenizer):
    prints = set()
    for streaming in (False, True):
        for prompt in ("", CAPTION_PROMPT):
            config = DataConfig([SourceConfig(str(world / "train.json"))], prompt, max_tokens=40, streaming=streaming)
            prints.add(build_feed(config, 32, world_tokenizer, seed=0)[1])
    assert len(prints) == 4


def test_a_prompt_must_fit_and_be_known(world_tokenizer):
    assert check_prompt(world_tokenizer, DataConfig(prompt=CAPTION_PROMPT, max_tokens=6)) == 3
    with pytest.raises(ValueError, match=r"data.prompt 'a picture of ' is 3 word pieces long.* data.max_tokens = 5"):
        check_prompt(world_tokenizer, DataConfig(prompt=CAPTION_PROMPT, max_tokens=5))
    with pytest.raises(ValueError, match=r"data.prompt '\u732b' has words that tokenizer world does not know"):
        check_prompt(world_tokenizer, DataConfig(prompt="\u732b"))


def test_a_long_caption_loses_its_end_and_keeps_prompt_and_sep(world_tokenizer):
    record = Record("a:0", Image.new("RGB", (8, 8)), ["a small red star above a blue ring and " * 9])
    config = DataConfig(prompt=CAPTION_PROMPT, max_tokens=12)
    sample = PrepareCaptions(EvalTransform(8), world_tokenizer, config)(record, (0, 0, 0, 0))
    (pieces,) = sample.texts
    assert len(pieces) == 12
    assert pieces[-1] == world_tokenizer.sep_id
    assert world_tokenizer.decode([pieces]) == ["a picture of a small red star above a blue"]


# Whole runs -----------------------------------------------------------------------------------------------------------

FEW = ["--data.prompt", CAPTION_PROMPT, "--data.max_tokens", "40", "--data.workers", "0", "--train.batch_size", "4"]
FEW += ["--train.epochs", "3", "--train.eval_each_epoch", "true", "--train.lr", "3e-3", "--train.warmup_steps", "0"]
FEW += ["--train.precision", "float32", "--train.log_every", "1", "--train.timeout", "20", "--train.save_every", "3"]
FEW += ["--decode.beams", "1", "--decode.max_length", "20"]


def options(world, start, out, *more: str) -> list[str]:
    held_out = [
        f"--{name}.source.path={world / file}" for name, file in (("validation", "val.json"), ("test", "test.json"))
    ]
    sources = json.dumps([{"path": str(world / "train.json")}])
    return [*FEW, "--model.start_from", str(start), "--data.sources", sources, *held_out, "--out", str(out), *more]


def job(args: list[str], kill: str = "", at: int = 0) -> None:
    """The recipe as its module runs it; the process kills itself at a moment, counted from 0, where asked to."""
    if kill:
        strike(kill, at)
    command.run(lambda: recipe.caption(command.read(recipe.CaptionRun, args)))


def strike(moment: str, at: int) -> None:
    count = iter(range(100))

    def maybe() -> None:
        if next(count) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def event(name, path):
        if moment == "model half written" and name == "before rename" and path.name == ".new-model":
            maybe()

    offer, test, step = BestModel.offer, BestModel._test, blip.train.loop._Run._step

    def before(function):
        return lambda *args: (maybe(), function(*args))[1]

    def after(function):
        return lambda *args: (function(*args), maybe())[0]

    files.checkpoint_event = event
    if moment == "model written, scores not":
        BestModel.offer = after(offer)
    if moment == "before the test":
        BestModel._test = before(test)
    if moment == "step":
        blip.train.loop._Run._step = after(step)


class CaptionZygote(Zygote):
    """A zygote that has imported this module as well."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = SEARCHED
        run = [sys.executable, "-c", "import stub_run, test_caption; stub_run.serve()"]
        self.process = subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def finish(self, log, args: list[str], world: int = 1, status: int = 0, **arguments) -> str:
        """Run to the end; what the main process printed."""
        pids = self.spawn(log, module="test_caption", function="job", args=args, world=world, **arguments)
        statuses = [self.wait(pid, 120) for pid in pids]
        log_text = Path(f"{log}-0").read_text()
        assert statuses == [status] * world, log_text
        return log_text


@functools.cache
def the_caption_zygote() -> CaptionZygote:
    return CaptionZygote()


@pytest.fixture
def zygote() -> CaptionZygote:
    return the_caption_zygote()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A TINY model for images of 32 pixels."""
    folder = tmp_path_factory.mktemp("small") / "model"
    save_pretrained(*build_model(ModelChoice(size="tiny", tokenizer="world", image_size=32), seed=3), folder)
    return folder


@pytest.fixture(scope="module")
def finished(world, small, tmp_path_factory):
    """The folder of a run of 3 epochs of 5 steps."""
    folder = tmp_path_factory.mktemp("finished")
    the_caption_zygote().finish(folder / "log", options(world, small, folder / "out"))
    return folder / "out"


def evaluations(out) -> list[dict]:
    return [line for line in read_metrics(out / "metrics.jsonl") if "eval" in line]


def test_a_run_leaves_the_best_model_and_its_scores(finished, world):
    evaluated = evaluations(finished)
    assert [line["step"] for line in evaluated] == [5, 10, 15]
    cider = [line["eval"]["cider"] for line in evaluated]
    assert [line["eval"]["best"] for line in evaluated] == [
        float(c > max(cider[:i], default=-1)) for i, c in enumerate(cider)
    ]
    results = json.loads((finished / "results.json").read_text())
    best = evaluated[cider.index(max(cider))]
    assert (results["kept"], results["epoch"], results["steps"]) == (best["step"], best["epoch"], 15)
    assert results["validation"] == {name: value for name, value in best["eval"].items() if name != "best"}
    assert {"cider", "bleu_4", "attribute_precision", "attribute_recall"} <= results["test"].keys()


def test_what_the_kept_model_says_is_what_was_scored(finished, world):
    model, tokenizer = from_pretrained(finished / "model")
    results = json.loads((finished / "results.json").read_text())
    decode = DecodeConfig(beams=1, max_length=20)
    for name, file in (("validation", "val.json"), ("test", "test.json")):
        images = Images.open(SourceConfig(str(world / file)))
        written = {
            row["image_id"]: row["caption"] for row in json.loads((finished / f"captions-{name}.json").read_text())
        }
        assert captions_of(model, tokenizer, images, decode, prompt=CAPTION_PROMPT) == written
        scores = score(images.references, written, tokenizer="python", resamples=0).values
        assert scores == {key: results[name][key] for key in scores}


def test_it_learns_and_leaves_alone_what_does_not_write(finished, small):
    losses = [losses["lm"] for losses in curve(finished).values()]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    before, after = (from_pretrained(folder)[0].state_dict() for folder in (small, finished / "model"))
    assert_untouched(before, after)


def assert_untouched(before: dict, after: dict) -> None:
    idle = ("text.", "text_norm.", "image_proj.", "text_proj.", "match_head.", "temperature")
    for name, value in before.items():
        inside = name.removeprefix("med.blocks.").split(".", 1)[-1] if name.startswith("med.blocks.") else name
        assert torch.equal(after[name], value) == inside.startswith(idle), name


def test_two_processes_share_the_images_and_leave_alone_what_does_not_write(zygote, tmp_path, world, small):
    zygote.finish(tmp_path / "log", options(world, small, tmp_path / "out", "--train.steps", "3"), world=2)
    before, after = (from_pretrained(folder)[0].state_dict() for folder in (small, tmp_path / "out/model"))
    assert_untouched(before, after)
    for name, count in (("validation", 6), ("test", 4)):
        rows = json.loads((tmp_path / f"out/captions-{name}.json").read_text())
        assert len({row["image_id"] for row in rows}) == len(rows) == count


@pytest.mark.parametrize(
    ("kill", "at"),
    [("step", 7), ("model half written", 0), ("model written, scores not", 0), ("model written, scores not", 2),
     ("before the test", 0)],
)  # fmt: skip
def test_a_killed_run_keeps_the_same_epoch_with_the_same_scores(zygote, tmp_path, world, small, finished, kill, at):
    args, out = options(world, small, tmp_path / "out"), tmp_path / "out"
    zygote.finish(tmp_path / "log", args, status=-signal.SIGKILL, kill=kill, at=at)
    zygote.finish(tmp_path / "log", args)
    assert curve(out) == curve(finished)
    assert evaluations(out) == evaluations(finished)
    for name in ("results.json", "captions-validation.json", "captions-test.json", "model/model.safetensors"):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_finished_run_says_its_result_again_and_does_nothing(world, small, finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "out")
    monkeypatch.setattr(recipe, "captions_of", None)
    run = command.read(recipe.CaptionRun, options(world, small, tmp_path / "out"))
    result, folder = recipe.caption(run)
    results = json.loads((finished / "results.json").read_text())
    assert result.metrics["cider"] == results["validation"]["cider"]
    assert result.metrics["test_cider"] == results["test"]["cider"]
    assert folder == tmp_path / "out/model"
    assert (tmp_path / "out/results.json").read_bytes() == (finished / "results.json").read_bytes()


def test_without_validation_the_last_model_is_kept(world, small, tmp_path, monkeypatch):
    args = options(world, small, tmp_path / "out", "--train.steps=2")
    args = [arg for arg in args if not arg.startswith("--validation")]
    result, folder = recipe.caption(command.read(recipe.CaptionRun, args))
    newest, _ = Checkpoints(tmp_path / "out", 1).newest()
    trained = read_tensors(newest / "objective.safetensors")
    for name, value in from_pretrained(folder)[0].state_dict().items():
        assert torch.equal(value, trained[f"model.{name}"]), name
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert set(results) == {"steps", "kept", "test"}
    assert result.metrics == {f"test_{name}": value for name, value in results["test"].items()}

    scored = []
    monkeypatch.setattr(BestModel, "_test", lambda *_: scored.append("again") or {"cider": 9.0})
    recipe.caption(command.read(recipe.CaptionRun, args))
    assert not scored
    # Another test set, and then another model in the same place: what was said of the old ones does not hold.
    changed = ["--test.limit", "2", "--train.allow_change", "true"]
    assert recipe.caption(command.read(recipe.CaptionRun, [*args, *changed]))[0].metrics == {"test_cider": 9.0}
    shutil.rmtree(tmp_path / "out/checkpoints")
    recipe.caption(command.read(recipe.CaptionRun, [*args, "--train.lr", "0.01"]))
    assert scored == ["again"] * 2


# The choice of the best -----------------------------------------------------------------------------------------------


def best_model(out, tokenizer) -> BestModel:
    return BestModel(recipe.CaptionRun(str(out)), tokenizer, {}, by="cider", about="A captioner.")


def test_the_first_of_the_best_is_kept(tmp_path, small, monkeypatch):
    model, tokenizer = from_pretrained(small)
    kept, written = best_model(tmp_path, tokenizer), []
    monkeypatch.setattr(kept, "write", lambda _, captions, scores: written.append(captions["a"]))
    with (tmp_path / "metrics.jsonl").open("w") as lines:
        for step, cider in enumerate([0.0, 0.3, 0.2, 0.3, 0.31], 1):
            scores = kept.offer(model, {"a": str(step)}, {"cider": cider})
            lines.write(json.dumps({"step": step, "epoch": 1.0, "eval": scores}) + "\n")
            lines.flush()
    assert written == ["1", "2", "5"]
    assert [line["eval"]["best"] for line in evaluations(tmp_path)] == [1, 1, 0, 0, 1]


def test_a_full_disk_stops_the_run(tmp_path, small, monkeypatch):
    model, tokenizer = from_pretrained(small)
    kept = best_model(tmp_path, tokenizer)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(files.WriteError, match="model"):
        kept.write(model)
    assert not (tmp_path / "model").exists()


# Scores ---------------------------------------------------------------------------------------------------------------


def test_only_the_image_world_is_graded_by_its_truth(world):
    rows = json.loads((world / "val.json").read_text())
    (truth_of,) = recipe.truth([row["image_id"] for row in rows])
    assert truth_of({row["image_id"]: row["caption"][0] for row in rows}) == {
        **{"attribute_precision": 1.0, "all_true": 1.0}, "attribute_recall": pytest.approx(0.5, abs=0.4)
    }  # fmt: skip
    thing = scene_of(rows[0]["image_id"]).things[0]
    wrong = next(colour for colour in COLOURS if all(t.colour != colour for t in scene_of(rows[0]["image_id"]).things))
    (truth_of,) = recipe.truth([rows[0]["image_id"]])
    assert truth_of({rows[0]["image_id"]: f"a {wrong} {thing.shape}"})["attribute_precision"] == 0.5
    assert recipe.truth([139, 285]) == recipe.truth(["a.jpg"]) == recipe.truth([rows[0]["image_id"], "world-cup"]) == []


# COCO's files ---------------------------------------------------------------------------------------------------------

QUICK = ["--train.steps", "2", "--train.epochs", "1"]


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """COCO as it lies on disk: images in train2014 and val2014, Karpathy's file and the release's three."""
    root, tokens = tmp_path_factory.mktemp("coco"), iter(range(100))
    splits = {"train": "train2014", "restval": "val2014", "val": "val2014", "test": "val2014"}
    images, rows = [], {"train": [], "val": [], "test": []}
    for cocoid, split in enumerate(["train"] * 5 + ["restval"] * 3 + ["val"] * 2 + ["test"] * 2, 300):
        folder = splits[split]
        name = f"COCO_{folder}_{cocoid:012}.jpg"
        (root / folder).mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (next(tokens), 90, 200)).save(root / folder / name)
        captions = [f"An image of {word} red stars." for word in ("two", "three", "four", "five", "six")]
        sentences = [{"raw": caption, "tokens": caption.lower().split()} for caption in captions]
        images.append({"filepath": folder, "filename": name, "cocoid": cocoid, "split": split, "sentences": sentences})
        if split in ("train", "restval"):
            rows["train"] += [
                {"image": f"{folder}/{name}", "caption": caption, "image_id": f"coco_{cocoid}"} for caption in captions
            ]
        else:
            rows[split].append({"image": f"{folder}/{name}", "caption": captions})
    (root / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    for split, some in rows.items():
        (root / f"coco_karpathy_{split}.json").write_text(json.dumps(some))
    return root


@pytest.mark.parametrize("layout", ["karpathy", "release"])
def test_cocos_files_as_they_are(coco, small, tmp_path, layout):
    if layout == "karpathy":
        path = str(coco / "dataset_coco.json")
        train = {"path": path, "split": "train+restval", "weight": 5}
        held_out = [f"--{name}.source={json.dumps({'path': path, 'split': split})}" for name, split in VAL_TEST]
    else:
        train = {"path": str(coco / "coco_karpathy_train.json")}
        held_out = [f"--{name}.source.path={coco / f'coco_karpathy_{split}.json'}" for name, split in VAL_TEST]
    args = [*FEW, *QUICK, "--model.start_from", str(small), "--data.sources", json.dumps([train]), *held_out]
    run = command.read(recipe.CaptionRun, [*args, "--out", str(tmp_path)])
    feed, _ = build_feed(run.data, 32, Tokenizer.load("world"), seed=0)
    assert len(feed) == 40, "an epoch shows eight images with five captions each"
    result, _ = recipe.caption(run)
    assert 0 <= result.metrics["cider"] <= 10
    for name, ids in (("validation", [308, 309]), ("test", [310, 311])):
        written = json.loads((tmp_path / f"captions-{name}.json").read_text())
        assert [row["image_id"] for row in written] == ids


VAL_TEST = (("validation", "val"), ("test", "test"))


def test_the_references_of_an_image_are_taken_together(coco, small):
    rows = json.loads((coco / "coco_karpathy_train.json").read_text())
    model, tokenizer = from_pretrained(small)
    held_out = HeldOut(SourceConfig(str(coco / "coco_karpathy_train.json")), limit=2)
    run = recipe.CaptionRun("out", decode=DecodeConfig(beams=1, max_length=8))
    evaluation = recipe.CaptionEvaluation("validation", held_out, run, model, tokenizer)
    assert evaluation.images.references == {f"coco_{n}": [row["caption"] for row in rows[:5]] for n in (300, 301)}
    scores = evaluation.scores({"coco_300": rows[0]["caption"], "coco_301": "nothing of the kind"})
    assert scores["bleu_4"] > 0.3
    assert set(scores) == {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider", "rouge_l"}


# Bad input ------------------------------------------------------------------------------------------------------------


def refused(capsys, args: list[str]) -> str:
    """The one line that a run with bad input ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        job(args)
    assert stop.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def rows_with(tmp_path, world, **change) -> str:
    """val.json with the images' full paths, and its second row changed."""
    rows = [{**row, "image": str(world / row["image"])} for row in json.loads((world / "val.json").read_text())]
    rows[1].update(change)
    (tmp_path / "held.json").write_text(json.dumps(rows))
    return json.dumps({"path": str(tmp_path / "held.json"), "image_root": str(world)})


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--data.sources", "[]"], "no data: give at least one source"),
        (["--data.sources", '[{"path": "gone.json"}]'], "gone.json"),
        (["--data.sources", "NO CAPTIONS"], "held.json: row 0: the row has no caption"),
        (["--validation.source", "NO CAPTIONS"], "held.json: no reference captions for 6 images ("),
        (["--test.source", "ONE WITHOUT"], "held.json: no reference captions for 1 image (world-0-val-000001)"),
        (["--validation.source.path", "gone.json"], "gone.json"),
        (["--validation.limit", "0"], "limit must be 1 or more, got 0"),
        (["--validation.source", "NO IMAGES"], "image world-0-val-000000"),
        (["--model.start_from", "/gone/model"], "error: model.start_from: /gone/model is not a model directory"),
        (["--model.size", "base"], "leave model.size out"),
        (["--model.image_size", "72"], "72 is not a multiple"),
        (["--data.max_tokens", "5"], "leaves no room for a caption in data.max_tokens = 5"),
        (["--data.prompt", "\u732b"], "data.prompt '\u732b' has words"),
        (["--decode.max_length", "4", "--decode.min_length", "0"], "max_length"),
        (["--objective.label_smoothing", "1"], "label_smoothing must be in [0, 1), got 1.0"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_trained(capsys, tmp_path, monkeypatch, world, small, more, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if more[1] == "NO CAPTIONS":
        rows = [{**row, "caption": []} for row in json.loads((world / "val.json").read_text())]
        (tmp_path / "held.json").write_text(json.dumps(rows))
        source = {"path": str(tmp_path / "held.json")}
        more = [more[0], json.dumps([source] if "data" in more[0] else source)]
    if more[1] == "ONE WITHOUT":
        more = [more[0], rows_with(tmp_path, world, caption=[])]
    if more[1] == "NO IMAGES":
        shutil.copy(world / "val.json", tmp_path)
        more = [more[0], json.dumps({"path": "val.json"})]
    assert named in refused(capsys, options(world, small, tmp_path / "out", *more))
    assert not (tmp_path / "out/metrics.jsonl").exists()


def test_a_image_that_breaks_an_evaluation_is_named_and_the_run_can_go_on(capsys, tmp_path, world, small):
    source = rows_with(tmp_path, world, image=str(tmp_path / "broken.jpg"))
    (tmp_path / "broken.jpg").write_bytes(b"<html>")
    args = options(world, small, tmp_path / "out", *QUICK, "--validation.source", source.replace(str(world), "/"))
    stderr = refused(capsys, args)
    assert "world-0-val-000001" in stderr
    assert len(curve(tmp_path / "out")) == 2
    shutil.copy(next((world / "images/val").iterdir()), tmp_path / "broken.jpg")
    job(args)
    assert len(curve(tmp_path / "out")) == 2
    assert [line["step"] for line in evaluations(tmp_path / "out")] == [2]
