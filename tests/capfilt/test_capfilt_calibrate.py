import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from capfilt_crawl import annotations, crawl, make_fake, planned, sample, scored, write_tar

from capfilt.__main__ import main
from capfilt.calibrate import audit
from capfilt.calibrate.threshold import CalibrateOptions, auc, calibrate, calibration_error, threshold_for
from capfilt.report.write import report
from capfilt.score.scorer import FakeScorer, Matched

HERE = {"decode_workers": 0}


class Honest(FakeScorer):
    """A filter that knows: the number in the text is that of the image, or only near it."""

    def _match(self, text, seen, shift):
        number = int(text.split()[-1]) if text.split()[-1].isdigit() else -1
        gap = abs(number - self.numbers.get(seen, -100))
        return Matched(4.0 if gap <= 1 else -4.0, 1.0 / (1 + gap), 5)


def make_honest(run):
    scorer = Honest(0, run.config.captions, "enc")
    scorer.numbers = numbers
    return scorer


numbers = {}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose filter is honest about the number in each image's text."""
    folder = tmp_path_factory.mktemp("calibrate")
    members = [m for i in range(60) for m in sample(f"{i:03d}", i, f"image {i}")]
    write_tar(folder / "in" / "a.tar", members)
    learn(folder / "in" / "a.tar", folder)
    return scored(folder / "in" / "a.tar", folder / "run", maker=make_honest)


def learn(path, folder):
    """Which pixels are of which image."""
    import hashlib

    from capfilt.score.pool import Decoder, DecodeTask, Setup
    from capfilt.settings import ReadConfig, ScoreConfig

    plan = planned(path, folder / "learn")
    decoder = Decoder(Setup(plan.where, ScoreConfig(scorer="fake"), ReadConfig(), (16,)))
    (source,) = plan.sources.values()
    for row in decoder.run(DecodeTask(source, 0, source.rows)):
        numbers[hashlib.sha256(row.pixels[0].tobytes()).hexdigest()] = row.number


def test_wilson_intervals():
    assert audit.wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # tabulated
    assert audit.wilson(0.95, 130)[0] == pytest.approx(0.898, abs=1e-3)
    assert audit.wilson(0.95, 290)[0] == pytest.approx(0.919, abs=1e-3)
    assert audit.wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert audit.wilson(0.0, 10)[0] == 0.0


def test_shares_are_weighted():
    labels = [audit.Label("a", "web", 0.9, 30.0, True), audit.Label("b", "web", 0.9, 10.0, False)]
    share, low, high = audit.weighted_share(labels)
    assert share == 0.75
    assert (low, high) == audit.wilson(0.75, 40**2 / (30**2 + 10**2))


def test_measures_of_a_filter():
    right, wrong = np.array([0.9, 0.8, 0.4]), np.array([0.1, 0.4])
    assert auc(right, wrong) == pytest.approx((2 + 2 + 1.5) / 6)
    assert threshold_for(right, wrong, 0.99) == 0.8
    assert threshold_for(wrong, right, 0.99) is None
    assert calibration_error(np.ones(5), np.zeros(5)) == 0
    assert calibration_error(np.full(4, 0.5), np.full(4, 0.5)) == pytest.approx(0)
    assert calibration_error(np.full(4, 0.9), np.full(4, 0.9)) == pytest.approx(0.4)


def test_the_null_floor_is_of_wrong_pairs_and_reaches_the_report(run):
    lines = calibrate(run, CalibrateOptions("null", count=50, **HERE), make_honest)
    assert lines[0].startswith("50 captions with an image that is not theirs")
    # Shuffling by one gives near misses, which this filter takes for right: 1 / (1 + e^-4) = 0.98.
    floor = json.loads(run.storage.read("report/null.json"))
    assert sum(floor["histogram"]) == 50
    assert floor["histogram"][int(200 / (1 + math.exp(-4)))] >= 45
    assert "shuffled" in Path(report(run)).read_text()


@pytest.mark.parametrize("column", ["caption", "none"])
def test_a_reference_set_tells_hard_negatives_from_random_ones(run, tmp_path, column):
    """Its captions are found whatever the crawl's column is."""
    reference = run.sources["a.tar"].path
    run = planned(reference, tmp_path / "run", reading={"caption_column": column})
    lines = calibrate(run, CalibrateOptions("reference", count=40, reference=reference, **HERE), make_honest)
    text = "\n".join(lines)
    assert "40 images" in lines[0]
    random, hard = (line for line in lines if line.startswith("against"))
    random, hard = (float(line.split("AUC ")[1].split(",")[0]) for line in (random, hard))
    assert random > 0.9 > hard > 0.4
    assert "at 0.9: recall 100.0%, wrong ones kept" in text


def test_an_audit_from_sheet_to_precision(tmp_path, capsys):
    run = scored(crawl(tmp_path / "in", shards=4), tmp_path / "run", maker=make_fake)
    assert main(["calibrate", run.where, "--count", "80"]) == 0
    sheet = tmp_path / "run" / "report" / "audit.csv"
    page = (tmp_path / "run" / "report" / "audit.html").read_text()
    rows = list(csv.DictReader(sheet.open()))
    assert page.count("<img ") == len(rows) > 60
    assert not any(r["score"][:6] in page for r in rows)  # who labels must not see scores
    # What the labels stand for adds up to all texts of the run.
    total = sum(len(r["itm_web"]) for r in annotations(run).to_pylist())
    assert sum(float(r["weight"]) for r in rows if r["source"] == "web") == pytest.approx(total, rel=1e-3)
    # A person who says yes to scores above 0.6.
    with sheet.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows({**r, "match": "y" if float(r["score"]) > 0.6 else "N"} for r in rows)
    capsys.readouterr()
    assert main(["calibrate", run.where, "--labels", str(sheet), "--target", "0.5"]) == 0
    stdout = capsys.readouterr().out
    assert "at 0.6   precision 100.0%" in stdout
    assert "recall 100.0%" in stdout
    assert "chosen on half of the labels" in stdout


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("a,b\n1,2\n", "has not the columns"),
        ("id,source,score,weight,text,match\n1,web,0.5,1,x,maybe\n", "line 2: match must be y or n"),
        ("id,source,score,weight,text,match\n1,web,0.5,1,x,\n", "no row has y or n"),
        ("id,source,score,weight,text,match\n1,web,high,1,x,y\n", "line 2: score and weight must be numbers"),
    ],
)
def test_a_wrong_sheet_is_said(tmp_path, content, error):
    (tmp_path / "s.csv").write_text(content)
    with pytest.raises(ValueError, match=error):
        audit.read_labels(tmp_path / "s.csv")


def test_formulas_do_not_reach_a_spreadsheet():
    assert audit._harmless("=cmd|' /C calc'!A0") == "'=cmd|' /C calc'!A0"
    assert audit._harmless("two\nlines") == "two lines"
