"""The quality loop on the synthetic world, where the truth about every text is known: wrong in, right out."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from capfilt_crawl import HERE, annotations, planned, scored, write_tar

from blip.data.formats.sources import open_source
from blip.data.settings import SourceConfig
from blip.world.judge import judge
from blip.world.scene import draw, scene
from blip.world.text import captions
from capfilt.calibrate.grade import grade
from capfilt.export import export
from capfilt.run import Run
from capfilt.score.loop import score
from capfilt.score.scorer import FakeScorer, Matched, Scores, SyntheticText
from capfilt.select.choose import read_account, select
from capfilt.select.policies import SelectConfig
from capfilt.store.identity import sample_id


def chance(*parts):
    """A number from 0 to 1 that is always the same."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big") / 2**48


def another(scenes, i):
    """A caption of another scene that is not true of this one."""
    return next(
        t for j in range(i + 7, i + 99) for t in captions(scenes[j % len(scenes)]) if not judge(scenes[i], t).true
    )


def packed(shown, size=32):
    """The bytes of a scene's file."""
    buffer = io.BytesIO()
    draw(shown, size).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def shuffled_crawl(folder, count, split="train", share=0.4, size=32):
    """A shard of right captions, of which a share is exchanged; returns the scenes."""
    scenes = [scene(5, i, split) for i in range(count)]
    members = []
    for i, shown in enumerate(scenes):
        wrong = chance("wrong", i) < share
        text = another(scenes, i) if wrong else captions(shown)[i % 5]
        record = {"image_id": shown.image_id, "kind": "shuffled" if wrong else "right"}
        contents = {"jpg": packed(shown, size), "txt": text.encode(), "json": json.dumps(record).encode()}
        members += [(f"{i:04d}.{suffix}", content) for suffix, content in contents.items()]
    write_tar(folder / "a.tar", members)
    return scenes


class Oracle(FakeScorer):
    """A filter that sees the scene and errs once in some hundred times, a captioner that is wrong every third time."""

    scenes: dict = {}  # noqa: RUF012

    def score(self, items):
        return [self._judged(item) for item in items]

    def _judged(self, item):
        number, shown = self.scenes[item.sample_id]
        others = [one for _, one in self.scenes.values()]
        text = captions(shown)[0] if number % 3 else another(others, number)
        caption = SyntheticText(text, -1.0, True, self._margin(shown, text))
        return Scores([self._margin(shown, text) for text in item.texts], [caption])

    def _margin(self, shown, text):
        doubt = sum(chance(shown.image_id, text, k) for k in range(12)) - 6  # about a normal deviate
        return Matched((3 if judge(shown, text).true else -3) + doubt, 0.5, 9)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    scenes = shuffled_crawl(folder / "in", 300)
    Oracle.scenes = {sample_id("a.tar", i, f"{i:04d}"): (i, one) for i, one in enumerate(scenes)}
    run = scored(folder / "in" / "a.tar", folder / "run", maker=lambda run: Oracle(0, 1, "enc"))
    select(run, "half", SelectConfig())
    return run


def test_wrong_texts_are_dropped_and_right_ones_kept(run):
    """Fault 28."""
    grades = grade(run, "half")
    right, wrong = grades["right"], grades["shuffled"]
    assert right.texts + wrong.texts == 300
    assert 90 < wrong.texts < 150
    assert 1 - wrong.kept / wrong.texts >= 0.95
    assert right.kept / right.texts >= 0.95
    assert grades["wrong"] == wrong
    syn = read_account(run, "half")
    assert syn["kept"]["syn"] == pytest.approx(200, abs=6)  # the captioner's wrong texts are gone as well


def test_what_is_exported_is_right(run, tmp_path):
    export(run, "half", "wds", str(tmp_path / "out"))
    source, true = open_source(SourceConfig(str(tmp_path / "out" / "*.tar"))), []
    shown = {packed(one): one for _, one in Oracle.scenes.values()}
    for i in range(len(source)):
        record = source[i]
        true.append(judge(shown[record.image], record.captions[0]).true)
    assert np.mean(true) >= 0.97
    assert len(true) > 350


def test_the_area_is_that_of_all_pairs(run):
    rows = annotations(run).to_pylist()
    margins = {"right": [], "shuffled": []}
    for row in rows:
        margins[json.loads(row["extra_json"])["kind"]] += row["itm_margin_web"]
    wins = [(r > w) + 0.5 * (r == w) for r in margins["right"] for w in margins["shuffled"]]
    assert grade(run, "half")["shuffled"].auc == pytest.approx(np.mean(wins), abs=1e-12)
    assert grade(run, "half")["right"].auc is None


def test_a_crawl_without_truth_is_refused(run):
    with pytest.raises(ValueError, match="no row has a column 'truth'"):
        grade(run, "half", column="truth")


@pytest.mark.slow
def test_a_real_filter_finds_exchanged_captions(tmp_path, monkeypatch):
    """Fault 28 with a TINY filter trained for some minutes: 95% of random exchanges."""
    from capfilt.score.models import BlipScorer
    from recipes import command
    from recipes.pretrain import PretrainRun as Training
    from recipes.pretrain import pretrain

    monkeypatch.chdir(tmp_path)
    config = Path(command.__file__).parent / "configs" / "pretrain_world.yaml"
    options = ["--config", str(config), "--out", "filter", "--world.train", "8000", "--train.steps", "600"]
    _, model = pretrain(command.read(Training, options))
    shuffled_crawl(tmp_path / "in", 600, "val", size=63)
    crawl = planned(tmp_path / "in" / "a.tar", tmp_path / "run", 64, filter=str(model), scorer="blip")
    assert score(crawl, lambda run: BlipScorer.load(run.config, "cpu"), HERE, io.StringIO()) == 0
    select(crawl, "half", SelectConfig())
    grades = grade(Run.open(crawl.where), "half")
    assert grades["shuffled"].auc >= 0.97
    assert 1 - grades["shuffled"].kept / grades["shuffled"].texts >= 0.95
    assert grades["right"].kept / grades["right"].texts >= 0.6
