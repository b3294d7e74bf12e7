"""The bootstrapping experiment with a few images and steps: machinery, files, and that a kill changes nothing."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from page_rules import faults

from blip.data.formats.sources import open_source
from blip.data.settings import SourceConfig
from blip.train.drift import drift
from blip.train.settings import TrainConfig
from blip.train.towers import Tower
from capfilt.run import Run as Job
from capfilt.verify import verify
from recipes import command
from recipes.bootstrap import plan
from recipes.bootstrap.rows import ROWS, TEACHER
from recipes.bootstrap.run import bootstrap, spelled
from recipes.bootstrap.settings import BootstrapRun

CONFIGS = Path(command.__file__).parent / "configs"
EASY = [word for name in ("bootstrap_world", "bootstrap_easy") for word in ("--config", str(CONFIGS / f"{name}.yaml"))]
SHORT = ["--seeds", "0", "--rows", "neither", "filter", "both", "both_larger", "both_shared", "continued"]


def read(*args: str) -> BootstrapRun:
    return command.read(BootstrapRun, spelled([*EASY, *args]))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Settings of a finished run, and its results."""
    run = read(*SHORT, "--out", str(tmp_path_factory.mktemp("bootstrap") / "runs"))
    return run, bootstrap(run)


def settings_of(run: BootstrapRun, stage: str) -> dict:
    return yaml.safe_load((Path(run.out) / "seed-0" / stage / "config.yaml").read_text())


def test_every_row_is_scored(done):
    run, results = done
    assert list(results["rows"]) == run.rows
    for row, row_results in results["rows"].items():
        (scores,) = row_results["seeds"].values()
        for name in ("tr@1", "ir@1", "tr@1_zero_shot", "ir@1_zero_shot", "tr@1_composition", "noise_kept"):
            assert 0 <= scores[name] <= 100
        assert {"cider", "cider_composition", "attribute_recall", "attribute_precision_composition"} <= scores.keys()
        assert ("filter_auc" in scores) == bool(ROWS[row].cleaner)
        assert scores["steps"] == run.train.steps
        assert scores["pairs"] == run.train.steps * run.train.batch_size
    assert json.loads((Path(run.out) / "results.json").read_text()) == results


def test_models_learn_from_what_their_row_says(done):
    """Each row's data are the crawl or an export of its job; people have the same share in all; only one goes on."""
    run, _ = done
    for row in run.rows:
        settings = settings_of(run, f"{row}/pretrain")
        *web, people = settings["data"]["sources"]
        assert people["path"].endswith("people/train.json")
        if not web:
            continue
        (web,) = web
        where = f"capfilt/{ROWS[row].cleaner}/clean/{ROWS[row].keep}/*.tar" if ROWS[row].cleaner else "crawl/*.tar"
        assert web["path"].endswith(where)
        pairs = len(open_source(SourceConfig(web["path"])))
        human = people["weight"] * run.world.people
        assert human / (human + pairs) == pytest.approx(run.people_share, abs=0.01)
        ramp = settings["objective"]["alpha_ramp_epochs"] * (human + pairs)
        assert ramp == pytest.approx(8 * run.world.crawl / (1 - run.people_share), rel=0.01)
        start = settings["model"]["start_from"]
        assert (start or "").endswith("neither/pretrain/model") == (row == "continued")
        assert settings["train"]["seed"] == 0


def test_fine_tuning_has_its_own_rates(done):
    """What is measured is trained at `fine_tuning`'s rates, a cleaner at its recipe's."""
    run, _ = done
    rates = {stage: settings_of(run, stage)["train"]["lr"] for stage in ("both/captioner", "both/retrieval")}
    assert rates == {"both/captioner": run.fine_tuning.captioner_lr, "both/retrieval": run.fine_tuning.retrieval_lr}
    for stage, recipe in (("captioner", "caption_world"), ("filter", "filter_world")):
        own = command.content(str(CONFIGS / f"{recipe}.yaml"))["train"]["lr"]
        assert settings_of(run, f"cleaners/{stage}")["train"]["lr"] == own != rates["both/captioner"]


def test_jobs_have_their_own_captioner_and_filter(done):
    run, _ = done
    job = Job.open(str(Path(run.out) / "seed-0/capfilt/own/job"))
    assert job.rows == run.world.crawl
    assert job.config.captioner.endswith("seed-0/cleaners/captioner/model")
    assert job.config.filter.endswith("seed-0/cleaners/filter/model")
    assert verify(job.where).status() == 0
    larger = Job.open(str(Path(run.out) / "seed-0/capfilt/larger/job"))
    assert larger.config.captioner.endswith("seed-0/cleaners/larger/captioner/model")
    shared = Job.open(str(Path(run.out) / "seed-0/capfilt/shared/job"))
    assert shared.config.captioner == shared.config.filter
    assert shared.config.prompt == ""
    assert job.config.decode == "nucleus"


def test_selections_keep_web_texts_all_texts_or_what_passes(done):
    run, _ = done
    counts = json.loads((Path(run.out) / "seed-0/capfilt/own/stage.json").read_text())["results"]
    assert counts["filter"]["synthetic"] == 0
    usable = run.world.crawl  # 0.25% of 48 images are broken: none
    assert (counts["captioner"]["web"], counts["captioner"]["synthetic"]) == (usable, usable)
    assert counts["captioner"]["noise_kept"] == 100
    assert counts["both"]["web"] == counts["filter"]["web"]
    assert counts["both"]["texts"] == counts["both"]["web"] + counts["both"]["synthetic"]


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("href", "src")]


def test_the_page_needs_nothing_else(done):
    run, _ = done
    text = (Path(run.out) / "report.html").read_text()
    links = [link for link in Page(text).links if not link.startswith(("data:image/jpeg;base64,", "data:,"))]
    assert links == ["seed-0/capfilt/own/job/report/both/report.html"]
    assert (Path(run.out) / links[0]).is_file()
    assert "None" not in text
    for row in run.rows:
        assert ROWS[row].title in text
    assert "web text, " in text
    assert faults(text) == []
    assert "generated, " in text


def test_what_is_done_is_not_done_again(done, capsys):
    run, results = done
    before = {path: path.stat().st_mtime_ns for path in Path(run.out).rglob("stage.json")}
    table = (Path(run.out) / "table.md").read_text()
    assert bootstrap(run) == results
    assert bootstrap(dataclasses.replace(run, table=True, rows=["both"])) == results
    assert {path: path.stat().st_mtime_ns for path in Path(run.out).rglob("stage.json")} == before
    assert (Path(run.out) / "table.md").read_text() == table
    assert "stage " not in capsys.readouterr().out


def test_other_settings_are_refused(done):
    run, _ = done
    other = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=5))
    with pytest.raises(ValueError, match="pretrain was made with other settings: steps: 4 -> 5"):
        bootstrap(other)


def test_the_teacher_is_planned_whatever_is_asked_for():
    names = plan.plan(read("--rows", "both_beam", "--seeds", "3")).stages
    assert f"seed-3/{TEACHER.name}/pretrain" in names
    assert "seed-3/capfilt/beam" in names
    assert not [name for name in names if "larger" in name or "seed-0" in name]


def test_a_larger_captioner_and_filter_can_be_given(tmp_path):
    run = read("--rows", "both_larger", "--seeds", "3", "--larger.captioner", "c", "--larger.filter", "f")
    names = plan.plan(run).stages
    assert not [name for name in names if "cleaners/larger" in name]
    assert names["seed-3/capfilt/larger"].settings["models"] == ["c", "f"]


def test_rates_are_those_of_the_configs_unless_given():
    """The captioner's and the retrieval model's of the rows; those of the cleaners stay."""

    def rates(*args):
        stages = plan.plan(read("--rows", "both", "--seeds", "3", *args)).stages
        names = ("both/captioner", "both/retrieval", "cleaners/captioner", "cleaners/filter")
        return [stages[f"seed-3/{name}"].settings["lr"] for name in names]

    assert rates("--fine_tuning.captioner_lr", "null", "--fine_tuning.retrieval_lr", "null") == [None] * 4
    assert rates("--fine_tuning.captioner_lr", "1e-4", "--fine_tuning.retrieval_lr", "2e-4") == [1e-4, 2e-4, None, None]


def test_a_recipe_is_the_same_when_only_its_comments_change(monkeypatch, tmp_path):
    run, name = read("--rows", "both", "--seeds", "3"), "seed-3/both/captioner"
    before, text = plan.plan(run), yaml.safe_dump(command.content(plan.world_capfilt.CAPTIONER))
    config = tmp_path / "caption_world.yaml"
    monkeypatch.setattr(plan.world_capfilt, "CAPTIONER", str(config))
    config.write_text("# Another header\n" + text)
    assert plan.plan(run).fingerprints == before.fingerprints
    config.write_text(text.replace("batch_size: 64", "batch_size: 63"))
    after = plan.plan(run)
    assert after.fingerprints[name] != before.fingerprints[name]
    assert drift(before.stages[name].settings, after.stages[name].settings) == ["recipe.train.batch_size: 64 -> 63"]


def test_steps_are_equal_but_where_it_says_longer():
    run = read()
    assert {name: plan.steps_of(run, row) for name, row in ROWS.items()} == dict.fromkeys(ROWS, 4) | {"longer": 8}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--rows", "bath"], "rows bath: expected some of neither, filter"),
        (["--seeds", "a"], "seeds"),
        (["--seeds"], "rows or seeds is empty"),
        (["--people_share", "1"], "people_share must be between 0 and 1"),
        (["--larger.filter", "x"], "give both or neither"),
        (["--data.sources", '[{"path": "x"}]'], "data.sources must be empty"),
        (["--longer", "0.5"], "longer must be 1 or more"),
        (["--fine_tuning.captioner_lr", "-1"], "captioner_lr must be a number of 0 or more"),
        (["--cleaners.retrieval_lr", "-0.1"], "retrieval_lr must be a number of 0 or more"),
        (["--train.steps", "null"], "train.steps is missing"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(capsys, args, message):
    with pytest.raises(SystemExit) as stop:
        read(*args)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_seeds_and_rows_are_given_as_words():
    assert spelled(["--seeds", "0", "1", "--out", "x", "--table"]) == [
        "--seeds=[0, 1]", "--out", "x", "--table=true"
    ]  # fmt: skip
    run = read("--rows", "neither", "both", "--seeds", "5")
    assert (run.rows, run.seeds) == (["neither", "both"], [5])


def test_a_stage_is_known_by_the_settings_that_decide_it_and_by_what_older_runs_name():
    assert plan._plain(TrainConfig(clip=None), "train.")["clip"] is None
    assert "towers" not in plan._plain(TrainConfig(), "train.")
    assert plan._plain(TrainConfig(towers=[Tower("vision")]), "train.")["towers"][0]["part"] == "vision"
    models = [stage.settings["model"] for stage in plan.plan(read()).stages.values() if "model" in stage.settings]
    assert models
    assert not any("dropout" in settings for settings in models)


def started(out: Path, *args: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = str(CONFIGS.parents[1])
    command_line = [sys.executable, "-m", "recipes.bootstrap", *EASY, *args, "--out", str(out)]
    return subprocess.Popen(command_line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            start_new_session=True)  # fmt: skip


@pytest.mark.slow
def test_kills_in_the_middle_and_two_commands_at_once_give_the_same_results(tmp_path):
    """One run undisturbed; one killed with -9 again and again; one by two commands that share the work."""
    rows = ["--seeds", "0", "--rows", "neither", "captioner", "both", "both_shared"]
    assert started(tmp_path / "whole", *rows).wait(900) == 0
    expected = (tmp_path / "whole/results.json").read_bytes()
    killed, stages = tmp_path / "killed", []
    for _ in range(40):
        process = started(killed, *rows)
        wanted = len(stages) + 4
        while process.poll() is None:
            stages = list(killed.rglob("stage.json"))
            if len(stages) >= wanted:
                time.sleep(0.3)  # into the next stage
                break
            time.sleep(0.02)
        ended = process.poll()
        if ended is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if ended is not None:
            assert ended == 0
            break
    else:
        pytest.fail("it did not come to an end")
    assert (killed / "results.json").read_bytes() == expected
    pair = [started(tmp_path / "shared", *rows) for _ in range(2)]
    assert [process.wait(900) for process in pair] == [0, 0]
    assert (tmp_path / "shared/results.json").read_bytes() == expected
