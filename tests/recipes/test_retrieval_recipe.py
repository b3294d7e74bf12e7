"""The retrieval fine-tune: pairs of one image in both losses, image ids from data, whole runs, the best epoch."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import goldens
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from stub_run import SEARCHED, Zygote, curve
from test_losses import contrastive
from test_objectives import NEGATIVES, build, make_batch

from blip.checkpoints.checkpoint import from_pretrained, save_pretrained, trained_on
from blip.checkpoints.layouts import original_matching, original_training
from blip.checkpoints.table import from_theirs, to_theirs
from blip.data.formats.sources import Record
from blip.data.prepare.captions import image_id_of
from blip.data.settings import SourceConfig
from blip.models.blip import Blip
from blip.objectives import negatives
from blip.objectives.batch import Batch
from blip.objectives.matching import matching_loss
from blip.objectives.negatives import IdQueue, hard_negatives
from blip.objectives.objective import Clock
from blip.objectives.pretrain import Pretrain
from blip.objectives.retrieval import Retrieval, RetrievalConfig
from blip.objectives.similarity import Embedded, EmbeddedPair
from blip.objectives.targets import SameImage
from blip.tokenizer import Tokenizer
from blip.train.log import read_metrics
from blip.world import files
from eval.retrieval import Gallery, retrieval
from recipes import command
from recipes import retrieval as recipe
from recipes.building import ModelChoice, build_feed, build_model
from recipes.run import BestModel

# The losses -----------------------------------------------------------------------------------------------------------


def test_pairs_of_one_image_share_the_target_by_hand():
    """Ids 5, 5, 7 in the batch and 7, -100 in the queue: targets 1/2 1/2 0 0 0, the same again, and 0 0 1/2 1/2 0."""
    vectors = F.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    pair = EmbeddedPair(Embedded(vectors[:3]), Embedded(vectors[3:6]))
    images, texts = vectors[6:], vectors[6:].flip(0)
    ids = torch.tensor([5, 5, 7])
    same = ids[:, None] == torch.tensor([5, 5, 7, 7, -100])
    loss, _ = contrastive(pair, pair, images, texts, torch.tensor(0.1), 0.0, SameImage(same))
    expected = 0.0
    for query, everything in ((vectors[:3], [*vectors[3:6], *texts]), (vectors[3:6], [*vectors[:3], *images])):
        for row, (a, b) in enumerate([(0, 1), (0, 1), (2, 3)]):
            logits = [float(query[row] @ key) / 0.1 for key in everything]
            log_z = math.log(sum(map(math.exp, logits)))
            expected += (log_z - (logits[a] + logits[b]) / 2) / 6
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_soft_targets_are_mixed_with_the_shared_ones():
    vectors = F.normalize(torch.randn(14, 4, generator=torch.Generator().manual_seed(1)), dim=1)
    student, teacher = (EmbeddedPair(Embedded(v[:3]), Embedded(v[3:])) for v in (vectors[:6], vectors[6:12]))
    queue, same = vectors[12:], torch.tensor([[1, 0, 1, 0, 1], [0, 1, 0, 0, 0], [1, 0, 1, 0, 1]]).bool()
    expected = 0
    for query, slow, key in (
        (vectors[:3], vectors[6:9], vectors[9:12]), (vectors[3:6], vectors[9:12], vectors[6:9])
    ):  # fmt: skip
        everything = torch.cat([key, queue])
        target = 0.4 * (slow @ everything.T / 0.2).softmax(1) + 0.6 * same / torch.tensor([[3.0], [1], [3]])
        expected += F.cross_entropy(query @ everything.T / 0.2, target) / 2
    loss, _ = contrastive(student, teacher, queue, queue, torch.tensor(0.2), 0.4, SameImage(same))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_a_pair_of_the_same_image_is_never_a_negative():
    cosines = torch.tensor([[0.9, 0.8, 0.3, 0.1], [0.8, 0.9, 0.2, 0.2], [0.5, 0.1, 0.9, 0.4], [0.1, 0.2, 0.9, 0.3]])
    same = torch.tensor([3, 3, 4, 5])[:, None] == torch.tensor([3, 3, 4, 5])
    torch.manual_seed(0)
    draws = [hard_negatives(cosines, torch.tensor(0.1), 0.0, same) for _ in range(4000)]
    drawn = torch.stack([chosen for chosen, _ in draws])
    assert all(is_drawn.all() for _, is_drawn in draws)
    assert not same[torch.arange(4), drawn].any()
    assert (drawn[:, 0] == 2).float().mean().item() == pytest.approx(1 / (1 + math.exp(-2)), abs=0.03)
    assert (drawn[:, 1] == 2).float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_a_row_that_underflows_draws_evenly_and_one_without_other_images_is_said():
    cosines = torch.full((3, 3), -1.0).fill_diagonal_(1.0)
    torch.manual_seed(0)
    draws = torch.stack(
        [hard_negatives(cosines, torch.tensor(0.001), 0.0, torch.eye(3).bool())[0] for _ in range(2000)]
    )
    for row in range(3):
        shares = draws[:, row].bincount(minlength=3) / 2000
        assert shares[row] == 0
        assert shares.max().item() == pytest.approx(0.5, abs=0.05)
    same = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 1]]).bool()
    assert hard_negatives(cosines, torch.tensor(0.1), 0.0, same)[1].tolist() == [False, True, True]
    with pytest.raises(ValueError, match="at least 2 pairs"):
        hard_negatives(torch.ones(1, 1), torch.tensor(0.1), 0.0, torch.ones(1, 1).bool())


def test_rows_that_are_left_out_do_not_count():
    logits = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    counted = torch.tensor([True, True, False, True, True, False])
    expected = F.cross_entropy(logits[counted], torch.tensor([1, 1, 0, 0]))
    torch.testing.assert_close(matching_loss(logits, 2, counted), expected)
    torch.testing.assert_close(matching_loss(logits, 2, torch.ones(6).bool()), matching_loss(logits, 2))


# The objective --------------------------------------------------------------------------------------------------------


def objective(pretrain: Pretrain, **options) -> Retrieval:
    """With the student, teacher and queues of a `Pretrain`."""
    config = RetrievalConfig(**{"queue_size": len(pretrain.image_queue.features), "alpha_ramp_epochs": 0, **options})
    made = Retrieval(Blip(pretrain.model.config), config)
    missing = made.load_state_dict(pretrain.state_dict(), strict=False)
    assert missing.missing_keys == ["id_queue.features", "id_queue.next"]
    assert missing.unexpected_keys == []
    return made.train()


def with_ids(batch: Batch, *ids: int) -> Batch:
    return dataclasses.replace(batch, image_ids=torch.tensor(ids))


def test_where_all_images_differ_it_is_pre_training_without_lm(monkeypatch):
    answers = iter([*NEGATIVES] * 2)
    monkeypatch.setattr(negatives, "hard_negatives", lambda *_: (next(answers), torch.ones(5).bool()))
    pretrain, batch = build(), with_ids(make_batch(), 1, 2, 3, 4, 5)
    ours = objective(pretrain)
    a, b = pretrain(batch, Clock(epoch=1.0)), ours(batch, Clock(epoch=1.0))
    assert list(b.losses) == ["itc", "itm"]
    for name in b.losses:
        torch.testing.assert_close(b.losses[name], a.losses[name], rtol=1e-5, atol=1e-6)
    for name, value in a.health.items():
        torch.testing.assert_close(b.health[name], value, msg=name)


def test_where_all_images_differ_the_same_negatives_are_drawn():
    pretrain, batch = build(negative_floor=0.0), with_ids(make_batch(), 1, 2, 3, 4, 5)
    pretrain.teacher.update(pretrain.model, 0.0)  # pre-training draws by student and teacher, this by the student
    ours, losses = objective(pretrain), []
    for one in (pretrain, ours):
        torch.manual_seed(4)
        losses.append(one(batch, Clock(epoch=1.0)).losses["itm"])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def original():
    return load_file(goldens.HERE / "retrieval.safetensors")


def test_the_originals_losses_negatives_gradients_and_queues(monkeypatch, original):
    pretrain = Pretrain(Blip(goldens.CONFIG), goldens.PRETRAIN)
    table = original_training(pretrain)
    pretrain.load_state_dict(from_theirs(table, goldens.checkpoint(), pretrain.state_dict(), "goldens"))
    ours = objective(pretrain, alpha=0.3, momentum=1.0)
    ours.id_queue.features.copy_(original["queue_ids"])
    ours.id_queue.next.copy_(pretrain.text_queue.next)
    answers = iter([original["negative_image"], original["negative_text"]])
    noted = []
    monkeypatch.setattr(negatives, "draw", lambda weights: (noted.append(weights), next(answers))[1])
    outcome = ours(dataclasses.replace(goldens.batch(0, trim=True), image_ids=original["image_ids"]), Clock(epoch=1.0))
    losses = torch.stack([outcome.losses["itc"], outcome.losses["itm"]])
    torch.testing.assert_close(losses, original["losses"], rtol=1e-5, atol=1e-5)
    for weights, name in zip(noted, ("weights_t2i", "weights_i2t"), strict=True):
        torch.testing.assert_close(weights, original[name], rtol=1e-5, atol=1e-5)
    losses.sum().backward()
    grads = {name: p.grad for name, p in ours.model.named_parameters() if p.grad is not None}
    state = to_theirs(original_matching(ours.model), grads)
    expected = {name.removeprefix("grad."): value for name, value in original.items() if name.startswith("grad.")}
    assert len(expected) == 93
    compared = expected.keys() & state.keys()
    assert len(compared) >= 92
    for name in compared:
        scale = expected[name].abs().max().clamp(min=1e-2)
        assert float((state[name] - expected[name]).abs().max() / scale) < 5e-5, name
    torch.testing.assert_close(ours.model.temperature.grad, expected["temp"], rtol=1e-4, atol=1e-4)
    ours.after_step([outcome.carry])
    assert torch.equal(ours.id_queue.features, original["after.idx_queue"])
    torch.testing.assert_close(ours.text_queue.features.T, original["after.text_queue"], rtol=1e-5, atol=1e-5)


def test_a_batch_of_one_image_has_no_negatives_and_learns_on():
    ours = objective(build())
    outcome = ours(with_ids(make_batch(), 8, 8, 8, 8, 8), Clock(epoch=1.0))
    sum(outcome.losses.values()).backward()
    assert outcome.health["itm_without_negative"] == 1
    assert all(p.grad.isfinite().all() for p in ours.model.parameters() if p.grad is not None)
    logits = []
    ours.model.match_head.register_forward_hook(lambda _, __, output: logits.append(output))
    itm = ours(with_ids(make_batch(), 8, 8, 8, 8, 8), Clock(epoch=1.0)).losses["itm"]
    torch.testing.assert_close(itm, F.cross_entropy(logits[0][:5], torch.ones(5).long()))


def test_ids_enter_their_queue_with_the_features():
    ours = objective(build(queue_size=7))
    before = ours.state_dict()["id_queue.features"].clone()
    assert before.tolist() == [-100] * 7
    carry = ours(with_ids(make_batch(), 1, 2, 3, 4, 5), Clock(epoch=1.0)).carry
    assert torch.equal(ours.id_queue.features, before), "forward changes nothing"
    ours.after_step([carry, carry])
    assert ours.id_queue.features.tolist() == [3, 4, 5, 4, 5, 1, 2]
    assert ours.text_queue.next.item() == ours.id_queue.next.item() == 3
    assert torch.equal(ours.text_queue.features[5:], carry.features.text.vector[:2])


def test_a_batch_without_ids_is_refused():
    with pytest.raises(ValueError, match=r"needs Batch\.image_ids"):
        objective(build())(make_batch(), Clock(epoch=1.0))


def test_queue_of_ids_may_be_empty():
    queue = IdQueue(0)
    queue.push(torch.tensor([1, 2]))
    assert queue.features.shape == (0,)


# Image ids ------------------------------------------------------------------------------------------------------------


def test_a_image_is_known_by_its_file_or_bytes(tmp_path):
    drawn = Image.new("RGB", (4, 4))
    ids = [
        image_id_of(Record(key, image, ["a"]))
        for key, image in (
            ("a:0", tmp_path / "1.jpg"), ("b:7", tmp_path / "1.jpg"), ("a:1", tmp_path / "2.jpg"),
            ("a:2", b"one"), ("a:3", b"one"), ("a:4", b"two"), ("a:5", drawn), ("a:6", drawn),
        )
    ]  # fmt: skip
    assert ids[0] == ids[1] != ids[2]
    assert ids[3] == ids[4] != ids[5]
    assert ids[6] != ids[7]
    assert all(0 <= one < 2**63 for one in ids)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the splits of the synthetic world, and many.json with a row for each caption."""
    folder = tmp_path_factory.mktemp("world")
    for split, count in (("train", 16), ("val", 6), ("test", 4)):
        files.write(folder, "json", split, count, size=32)
    rows = json.loads((folder / "train.json").read_text())
    rows = [{**row, "caption": caption} for row in rows[:3] for caption in row["caption"][:4]]
    (folder / "many.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_one_image_have_one_id(world, streaming):
    config = dataclasses.replace(
        recipe.RetrievalRun("out").data,
        sources=[SourceConfig(str(world / "many.json"))],
        workers=0,
        streaming=streaming,
    )
    feed, _ = build_feed(config, 32, Tokenizer.load("world"), seed=0)
    (batch,) = feed.batches(0, 1, 0, 1, 12)
    rows = json.loads((world / "many.json").read_text())
    images = [rows[int(key.split(":")[1])]["image"] for key in batch.keys]
    same = batch.image_ids[:, None] == batch.image_ids
    assert same.tolist() == [[a == b for b in images] for a in images]
    assert torch.equal(batch.to(torch.device("cpu")).image_ids, batch.image_ids)


# Whole runs -----------------------------------------------------------------------------------------------------------

FEW = ["--data.max_tokens", "40", "--data.workers", "0", "--train.batch_size", "4", "--train.epochs", "2"]
FEW += ["--train.eval_each_epoch", "true", "--train.lr", "3e-3", "--train.warmup_steps", "0", "--train.log_every", "1"]
FEW += ["--train.precision", "float32", "--train.timeout", "20", "--train.save_every", "3"]
FEW += ["--objective.queue_size", "13", "--validation.k", "3", "--test.k", "3"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A TINY model for images of 32 pixels."""
    folder = tmp_path_factory.mktemp("small") / "model"
    save_pretrained(*build_model(ModelChoice(size="tiny", tokenizer="world", image_size=32), seed=3), folder)
    return folder


def options(world, start, out, *more: str) -> list[str]:
    held_out = [
        f"--{name}.source.path={world / file}" for name, file in (("validation", "val.json"), ("test", "test.json"))
    ]
    sources = json.dumps([{"path": str(world / "train.json")}])
    return [*FEW, "--model.start_from", str(start), "--data.sources", sources, *held_out, "--out", str(out), *more]


def job(args: list[str], kill_in_offer: int = -1) -> None:
    """The recipe as its module runs it; the process kills itself when evaluation number `kill_in_offer` is over."""
    count, offer = iter(range(100)), BestModel.offer

    def struck(*given):
        result = offer(*given)
        if next(count) == kill_in_offer:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    BestModel.offer = struck
    command.run(lambda: recipe.retrieve(command.read(recipe.RetrievalRun, args)))


class RetrievalZygote(Zygote):
    """A zygote that has imported this module as well."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = SEARCHED
        run = [sys.executable, "-c", "import stub_run, test_retrieval_recipe; stub_run.serve()"]
        self.process = subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def finish(self, log, args: list[str], world: int = 1, status: int = 0, **arguments) -> None:
        pids = self.spawn(log, module="test_retrieval_recipe", function="job", args=args, world=world, **arguments)
        statuses = [self.wait(pid, 120) for pid in pids]
        assert statuses == [status] * world, Path(f"{log}-0").read_text()


@pytest.fixture(scope="module")
def zygote():
    return RetrievalZygote()


@pytest.fixture(scope="module")
def finished(world, small, zygote, tmp_path_factory):
    """The folder of a run of 2 epochs of 4 steps."""
    folder = tmp_path_factory.mktemp("finished")
    zygote.finish(folder / "log", options(world, small, folder / "out"))
    return folder / "out"


def evaluations(out) -> list[dict]:
    return [line for line in read_metrics(out / "metrics.jsonl") if "eval" in line]


def test_a_run_keeps_the_model_with_the_best_mean_recall(finished, world):
    evaluated = evaluations(finished)
    recalls = [line["eval"]["mean_recall"] for line in evaluated]
    best = evaluated[recalls.index(max(recalls))]
    results = json.loads((finished / "results.json").read_text())
    assert [line["step"] for line in evaluated] == [4, 8]
    assert (results["kept"], results["steps"]) == (best["step"], 8)
    model, tokenizer = from_pretrained(finished / "model")
    for name, file in (("validation", "val.json"), ("test", "test.json")):
        gallery = Gallery.open(SourceConfig(str(world / file)), 32)
        assert retrieval(model, tokenizer, *gallery, k=3, max_tokens=40) == results[name]
    assert trained_on(finished / "model") == ("other images", "synthetic shapes")  # the weights' images are unknown
    card = ModelCard.load(finished / "model/README.md")
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    scores = {(one.dataset_name, one.dataset_split): one for one in card.data.eval_results
              if one.metric_name == "Mean of the recalls"}  # fmt: skip
    assert {key: one.metric_value for key, one in scores.items()} == {
        (f"{world.name}/val", "validation"): round(results["validation"]["mean_recall"], 2),
        (f"{world.name}/test", "test"): round(results["test"]["mean_recall"], 2),
    }
    assert {name for losses in curve(finished).values() for name in losses} >= {"itc", "itm"}


@pytest.mark.parametrize("at", [0, 1])
def test_a_killed_run_ends_with_the_same_model_and_scores(zygote, tmp_path, world, small, finished, at):
    args, out = options(world, small, tmp_path / "out"), tmp_path / "out"
    zygote.finish(tmp_path / "log", args, status=-signal.SIGKILL, kill_in_offer=at)
    zygote.finish(tmp_path / "log", args)
    assert curve(out) == curve(finished)
    assert evaluations(out) == evaluations(finished)
    for name in ("results.json", "model/model.safetensors"):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name


def test_two_processes_draw_negatives_from_each_other(zygote, tmp_path, world, small):
    more = ["--objective.negatives_all_ranks", "true", "--train.steps", "2"]
    zygote.finish(tmp_path / "log", options(world, small, tmp_path / "out", *more), world=2)
    assert json.loads((tmp_path / "out/results.json").read_text())["steps"] == 2


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--data.prompt", "a picture of "], "compares texts without a prompt"),
        (["--validation.k", "0"], "validation.k must be 1 or more, got 0"),
        (["--validation.source.path", "gone.json"], "gone.json"),
        (["--objective.queue_size", "-1"], "queue_size must be 0 or more, got -1"),
        (["--data.sources", "[]"], "no data: give at least one source"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_trained(capsys, tmp_path, world, small, more, named):
    with pytest.raises(SystemExit) as stop:
        command.run(
            lambda: recipe.retrieve(command.read(recipe.RetrievalRun, options(world, small, tmp_path / "out", *more)))
        )
    assert stop.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert named in errors[0]
    assert not (tmp_path / "out/metrics.jsonl").exists()
