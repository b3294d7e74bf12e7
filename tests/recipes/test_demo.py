"""The demo with a few images and steps: all parts of the story, its figures and its page."""

import contextlib
import json
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from page_rules import faults

from blip.checkpoints import checkpoint
from blip.data.formats.sources import open_source
from blip.data.settings import SourceConfig
from capfilt.run import Run as Job
from capfilt.verify import verify
from recipes import command, demo, world_capfilt
from recipes.pretrain import PretrainRun

CONFIG = str(Path(command.__file__).parent / "configs" / "pretrain_demo.yaml")
SMALL = ["--world.train", "60", "--world.held_out", "6", "--world.image_size", "32", "--model.image_size", "32"]
SMALL += ["--model.patch_size", "16", "--held_out.k", "2", "--train.steps", "4", "--train.batch_size", "8"]
SMALL += ["--train.warmup_steps", "1", "--train.log_every", "1", "--train.precision", "float32"]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Where the demo ran, its settings and its scores."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # Untrained models keep everything or nothing, so that a threshold of one half would leave this to chance.
        patch.setattr(demo, "THRESHOLD", 0.0)
        run = command.read(PretrainRun, ["--config", CONFIG, "--out", "runs/demo", *SMALL])
        scores = demo.demo(run)
        yield folder / "runs/demo", run, scores


def test_both_models_are_scored_side_by_side(story):
    out, _, scores = story
    assert json.loads((out / "results.json").read_text()) == scores
    for name in ("tr@1", "ir@1", "tr@1_itc", "ir@1_itc", "cider", "attribute_precision"):
        assert 0 <= scores[name] <= 1000
        assert 0 <= scores[f"{name}_bootstrapped"] <= 1000
    assert 0 <= scores["filter_auc"] <= 1
    assert {f"filter_auc_{kind}" for kind in ("mismatched", "near_miss", "vague")} <= scores.keys()
    assert scores["seconds"] >= sum(value for name, value in scores.items() if name.startswith("seconds_"))


def test_the_second_training_sees_what_the_job_exported(story):
    out, run, scores = story
    job = Job.open(str(out / "capfilt"))
    assert job.rows == run.world.train == 60
    assert verify(job.where).status() == 0
    source = open_source(SourceConfig(str(out / "clean" / "*.tar")))
    assert len(source) == scores["texts_kept"] > 55  # a text of each image that is not broken
    noisy, again = ((folder / "config.yaml").read_text() for folder in (out / "noisy", out))
    assert "world/crawl/*.tar" in noisy
    assert "world/crawl" not in again
    assert "clean/*.tar" in again
    for text in (noisy, again):
        assert "human/train.json" in text
        assert "weight: 2.0" in text
        assert "steps: 4" in text
    for folder in ("model", "captioner/model", "noisy/model", "noisy/captioner/model", "noisy/filter/model"):
        checkpoint.from_pretrained(out / folder)


class Links(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name == "href" and tag == "a"]


def test_the_page_leads_to_the_report(story):
    out, _, scores = story
    text = (out / "report.html").read_text()
    (link,) = Links(text).links
    assert faults(text) == []
    assert (out / link).is_file()
    assert f"{scores['tr@1_bootstrapped']:.1f}" in text
    assert "one word wrong" in text
    assert "None" not in text
    right, kept = round(scores["web_right"]), round(scores["web_right_kept"])
    assert f"<h1>Right web texts {right}% → {kept}%</h1>" in text
    assert text.count("<svg") == 6


def test_times_are_summed_over_starts(tmp_path):
    """A stage that fails counts, and so does one that has been done before."""
    clock = demo.Stopwatch(tmp_path / "out" / "times.json")
    with contextlib.suppress(ValueError), clock.part("one"):
        time.sleep(0.05)
        raise ValueError
    first = clock.seconds["one"]
    assert first >= 0.05
    again = demo.Stopwatch(tmp_path / "out" / "times.json")
    for name in ("one", "two"):
        with again.part(name):
            time.sleep(0.02)
    assert again.seconds["one"] >= first + 0.02
    assert again.total() == pytest.approx(again.seconds["one"] + again.seconds["two"])
    assert json.loads((tmp_path / "out" / "times.json").read_text()) == again.seconds


def test_intervals_are_wilsons():
    """75 of 100: 65.7% to 82.5%, by the formula's own example."""
    one = demo._estimate(75.0, 100)
    assert (one.low, one.high) == pytest.approx((65.6955, 82.4556), abs=1e-3)


def test_started_again_it_says_the_same(story, monkeypatch):
    out, run, scores = story
    monkeypatch.chdir(out.parents[1])
    monkeypatch.setattr(demo, "THRESHOLD", 0.0)
    again = demo.demo(run)
    assert {k: v for k, v in again.items() if "seconds" not in k} == {
        k: v for k, v in scores.items() if "seconds" not in k
    }


def test_nothing_kept_is_no_end(story, tmp_path):
    """A filter that keeps nothing leaves the human-captioned images to learn from."""
    people = [SourceConfig("human/train.json")]
    (tmp_path / "clean").mkdir()
    (tmp_path / "clean" / "_SUCCESS").write_text('{"pairs": 0}')
    assert world_capfilt.bootstrapped(tmp_path / "clean", people) == people
    (tmp_path / "clean" / "_SUCCESS").write_text('{"pairs": 3}')
    assert world_capfilt.bootstrapped(tmp_path / "clean", people) == [
        SourceConfig(str(tmp_path / "clean" / "*.tar"), kind="web"), *people
    ]  # fmt: skip
