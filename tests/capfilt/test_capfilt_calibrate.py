import base64
import contextlib
import csv
import http.client
import io
import json
import math
import re
import shlex
import shutil
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from capfilt_crawl import annotations, crawl, make_fake, planned, sample, scored, write_tar
from PIL import Image

from capfilt.__main__ import main
from capfilt.calibrate import audit
from capfilt.calibrate.threshold import CalibrateOptions, auc, calibrate, calibration_error, threshold_for
from capfilt.report.write import report
from capfilt.run import Run
from capfilt.score.scorer import FakeScorer, Matched
from capfilt.store.identity import text_id

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


def key_of(run):
    return {entry["id"]: entry for entry in pq.read_table(Path(run.where) / audit.KEY).to_pylist()}


def fill(sheet, answers):
    with sheet.open("w", newline="") as file:
        csv.writer(file).writerows([("id", "match"), *answers.items()])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A scored run of which 80 texts are drawn."""
    folder = tmp_path_factory.mktemp("audit")
    run = scored(crawl(folder / "in", shards=4), folder / "run", maker=make_fake)
    assert main(["calibrate", run.where, "--count", "80"]) == 0
    return run


def test_an_audit_from_sheet_to_precision(drawn, tmp_path, capsys):
    run, sheet = drawn, tmp_path / "labels.csv"
    page = (Path(run.where) / audit.PAGE).read_text()
    rows = list(csv.DictReader((Path(run.where) / audit.LABELS).open()))
    assert all(row.keys() == {"id", "match"} and row["match"] == "" for row in rows)  # no score, no source, no text
    key = key_of(run)
    assert [row["id"] for row in rows] == list(key)
    assert page.count("<img ") == len(rows) > 60
    assert not any(f"{entry['score']:.4f}"[:6] in page for entry in key.values())  # who judges must not see scores
    # What the labels stand for adds up to all texts of the run.
    total = sum(len(r["itm_web"]) for r in annotations(run).to_pylist())
    assert sum(e["weight"] for e in key.values() if e["source"] == "web") == pytest.approx(total, rel=1e-3)
    # A person who says yes to scores above 0.6, and skips one.
    fill(sheet, {i: "y" if entry["score"] > 0.6 else "N" for i, entry in key.items()} | {rows[0]["id"]: "s"})
    capsys.readouterr()
    assert main(["calibrate", run.where, "--labels", str(sheet), "--target", "0.5"]) == 0
    stdout = capsys.readouterr().out
    assert f"{len(rows) - 1} labels" in stdout
    assert "at 0.6   precision 100.0%" in stdout
    assert "recall 100.0%" in stdout
    assert "chosen on half of the labels" in stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--port", "8000"), "--port is of the page to judge with: give --judge, too"),
        (("--port", "8000", "--labels", "l.csv"), "--port is of the page to judge with: give --judge, too"),
        (("--reference", "coco.json"), "--reference is for --method reference, got --method audit"),
        (("--method", "null", "--labels", "l.csv"), "--labels is for --method audit, got --method null"),
    ],
)
def test_options_without_effect_are_refused(drawn, capsys, options, message):
    assert main(["calibrate", drawn.where, *options]) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


def test_a_damaged_key_is_drawn_again(drawn, tmp_path, capsys):
    shutil.copytree(drawn.where, run := tmp_path / "run")
    (run / audit.KEY).write_bytes(b"x")
    fill(tmp_path / "l.csv", dict.fromkeys(key_of(drawn), "y"))
    assert main(["calibrate", str(run), "--labels", str(tmp_path / "l.csv")]) == 2
    assert f"{audit.KEY} is damaged: `capfilt calibrate` with the --count of before" in capsys.readouterr().err
    assert main(["calibrate", str(run), "--count", "80"]) == 0
    assert main(["calibrate", str(run), "--labels", str(tmp_path / "l.csv")]) == 0


def test_commands_can_be_pasted(drawn, tmp_path, capsys):
    shutil.copytree(drawn.where, run := tmp_path / "my run")
    assert main(["calibrate", str(run), "--count", "80"]) == 0
    commands = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  capfilt")]
    assert shlex.split(commands[0], comments=True) == ["capfilt", "calibrate", str(run), "--judge"]
    assert shlex.split(commands[1]) == ["capfilt", "calibrate", str(run), "--labels", str(run / audit.LABELS)]
    assert f"capfilt calibrate &#39;{run}&#39; --labels labels.csv" in (run / audit.PAGE).read_text()


@pytest.mark.parametrize("options", [[], ["--judge"]])
def test_a_run_without_scores_has_nothing_to_judge(tmp_path, capsys, options):
    run = planned(crawl(tmp_path / "in", shards=1), tmp_path / "run")
    assert main(["calibrate", run.where, *options]) == 2
    assert "no text has a score, so there is nothing to judge; run `capfilt score" in capsys.readouterr().err
    assert not (tmp_path / "run" / "report").exists()


def test_answers_stay_when_texts_are_drawn_again(drawn, tmp_path, capsys):
    shutil.copytree(drawn.where, tmp_path / "run")
    run = str(tmp_path / "run")
    sheet = tmp_path / "run" / audit.LABELS
    ids = [row["id"] for row in csv.DictReader(sheet.open())]
    fill(sheet, dict.fromkeys(ids, "") | {ids[3]: "y"})
    assert main(["calibrate", run, "--count", "120"]) == 0
    again = {row["id"]: row["match"] for row in csv.DictReader(sheet.open())}
    assert len(again) > len(ids)
    assert {i: answer for i, answer in again.items() if answer} == {ids[3]: "y"}
    before = sheet.read_bytes()
    fill(sheet, dict.fromkeys(again, "n"))
    capsys.readouterr()
    assert main(["calibrate", run, "--count", "80"]) == 2
    assert "answers to" in capsys.readouterr().err
    assert set(audit.read_labels(sheet).values()) == {False}
    assert sheet.read_bytes() != before


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_answers_that_a_spreadsheet_has_saved_stay(drawn, tmp_path, separator):
    shutil.copytree(drawn.where, tmp_path / "run")
    sheet = tmp_path / "run" / audit.LABELS
    ids = [row["id"] for row in csv.DictReader(sheet.open())]
    given = dict(zip(ids, ("Yes", "0", "skip", "y"), strict=False))
    lines = [f"{i}{separator}{given.get(i, '')}\r\n" for i in ids]
    sheet.write_bytes(f"\ufeffid{separator}match\r\n{''.join(lines)}".encode())
    assert main(["calibrate", str(tmp_path / "run"), "--count", "80"]) == 0
    answers = {row["id"]: row["match"] for row in csv.DictReader(sheet.open())}
    assert {i: answer for i, answer in answers.items() if answer} == dict(zip(ids, "ynsy", strict=False))


def test_a_sheet_without_its_first_line_is_not_overwritten(drawn, tmp_path, capsys):
    shutil.copytree(drawn.where, tmp_path / "run")
    sheet = tmp_path / "run" / audit.LABELS
    sheet.write_text("0123456789abcdef,y\n")
    assert main(["calibrate", str(tmp_path / "run"), "--count", "80"]) == 2
    assert f"{audit.LABELS} has not the columns id, match" in capsys.readouterr().err
    assert sheet.read_text() == "0123456789abcdef,y\n"


def test_a_sheet_of_other_texts_is_refused(drawn, run, tmp_path, capsys):
    fill(tmp_path / "l.csv", {**dict.fromkeys(key_of(drawn), "y"), "0123456789abcdef": "n"})
    assert main(["calibrate", drawn.where, "--labels", str(tmp_path / "l.csv")]) == 2
    stderr = capsys.readouterr().err
    assert "1 of" in stderr
    assert "'0123456789abcdef'" in stderr
    assert main(["calibrate", run.where, "--labels", str(tmp_path / "l.csv")]) == 2
    assert "draw texts with" in capsys.readouterr().err
    other = Run.open(drawn.where)
    other.fingerprint = "of other models"
    with pytest.raises(ValueError, match="is of another run"):
        audit.read(other, str(tmp_path / "l.csv"), 0.9)


def request(server, method, path, body=None, **headers):
    """Status and body of a request to a page's server."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    origin = {"Origin": f"http://127.0.0.1:{server.server_port}"} if method == "POST" else {}
    connection.request(method, f"/{server.secret}/{path}", body, {**origin, **headers})
    reply = connection.getresponse()
    return reply.status, reply.read()


@contextlib.contextmanager
def serving(server):
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_reload_of_the_page_reads_no_image_again(drawn, monkeypatch):
    read, shown_image = [], audit.shown_image
    monkeypatch.setattr(audit, "shown_image", lambda *args: read.append(args[1]) or shown_image(*args))
    with serving(audit.judge(Run.open(drawn.where), 80, 0)) as server:
        pages = [request(server, "GET", "")[1] for _ in range(3)]
    assert pages[0] == pages[1] == pages[2]
    assert len(read) == len({(entry["pid"], entry["row"]) for entry in key_of(drawn).values()})


def widths_of(page):
    images = re.findall('src="data:image/jpeg;base64,([^"]*)"', page)
    return len(images), {Image.open(io.BytesIO(base64.b64decode(image))).width for image in images}


def test_a_page_of_many_texts_has_smaller_images_and_a_line_says_how_large_it_is(drawn, tmp_path, monkeypatch, capsys):
    shutil.copytree(drawn.where, run := tmp_path / "run")
    command = ["calibrate", str(run), "--count", "80"]
    assert main(command) == 0
    assert "note: " not in capsys.readouterr().out
    count, _ = widths_of((run / audit.PAGE).read_text())
    monkeypatch.setattr(audit, "_SIDES", ((32, 78), (16, 60), (8, 60)))
    for limit, side in ((4_700_000, 32), (1, 8)):
        monkeypatch.setattr(audit, "_LIMIT", limit)
        assert main(command) == 0
        assert widths_of((run / audit.PAGE).read_text()) == (count, {side})
    monkeypatch.setattr(audit, "_LARGE", 1000)
    capsys.readouterr()
    assert main(command) == 0
    size = (run / audit.PAGE).stat().st_size / 1e6
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "note: " in line]
    assert line.startswith(f"note: with so many texts page.html has {size:.1f} MB")


def test_each_answer_is_saved_at_once(drawn, tmp_path):
    shutil.copytree(drawn.where, tmp_path / "run")
    sheet = tmp_path / "run" / audit.LABELS
    with serving(audit.judge(Run.open(str(tmp_path / "run")), 80, 0)) as server:
        ids = [row["id"] for row in csv.DictReader(sheet.open())]
        for i, answer in ((4, "y"), (2, "n"), (7, "s")):
            status, body = request(server, "POST", "label", json.dumps({"id": ids[i], "match": answer}))
            assert (status, json.loads(body)) == (200, {"saved": ids[i]})
        rows = [(row["id"], row["match"]) for row in csv.DictReader(sheet.open())]
        assert rows[:3] == [(ids[4], "y"), (ids[2], "n"), (ids[7], "s")]
        assert sorted(i for i, _ in rows) == sorted(ids)
        assert request(server, "POST", "label", json.dumps({"id": ids[2], "match": ""}))[0] == 200  # undone
        assert {row["id"]: row["match"] for row in csv.DictReader(sheet.open())}[ids[2]] == ""
        for wrong in (
            {"id": "x", "match": "y"},
            {"id": ids[0], "match": "maybe"},
            {"id": ids[0]},
            {"id": [1], "match": "y"},
        ):
            assert request(server, "POST", "label", json.dumps(wrong))[0] == 400
        status, page = request(server, "GET", "")
        assert status == 200
        assert f'[["{ids[4]}", "y"], ["{ids[7]}", "s"]]'.encode() in page.replace(b"&#34;", b'"')
    assert audit.read_labels(sheet) == {ids[4]: True}


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("a,b\n1,2\n", "has not the columns"),
        ("id,match\n1,maybe\n", "line 2: match must be y, n or s"),
        ("id,match\n1,\n2,s\n", "no row has y or n"),
        ("id,match\n1,y\n1,n\n", "line 3: 1 has another answer above"),
        ("id,source,score,weight,text,match\n1,web,0.5,1,x,y\n", "is a sheet of an older version"),
    ],
)
def test_a_wrong_sheet_is_said(tmp_path, content, error):
    (tmp_path / "s.csv").write_text(content)
    with pytest.raises(ValueError, match=error):
        audit.read_labels(tmp_path / "s.csv")


# Label Studio ---------------------------------------------------------------------------------------------------------


def annotated(i, *choices, **changes):
    """A task as Label Studio exports it in the format JSON, with an annotation for each choice."""
    chosen = {"id": "r1", "type": "choices", "origin": "manual", "from_name": "match", "to_name": "image"}
    annotations = [
        {"id": n, "completed_by": n, "was_cancelled": choice is None, "ground_truth": False, "lead_time": 2.5,
         "result": [] if choice is None else [{**chosen, "value": {"choices": [choice]}}]}
        for n, choice in enumerate(choices, 1)
    ]  # fmt: skip
    prediction = {"model_version": "capfilt all", "result": [{**chosen, "value": {"choices": ["match"]}}]}
    data = {"id": i, "image": "/data/local-files/?d=images/00000/000000000.jpg", "text": "a text"}
    return {"id": 7, "annotations": annotations, "drafts": [], "predictions": [prediction], "data": data, **changes}


def test_labels_of_label_studio_for_drawn_texts_are_those_of_the_sheet(drawn, tmp_path, capsys):
    answers = {i: entry["score"] > 0.6 for i, entry in key_of(drawn).items()}
    fill(tmp_path / "labels.csv", {i: "y" if match else "n" for i, match in answers.items()})
    tasks = [annotated(i, "match" if match else "no match") for i, match in answers.items()]
    (tmp_path / "project.JSON").write_text(json.dumps(tasks))
    printed = []
    for name in ("labels.csv", "project.JSON"):
        assert main(["calibrate", drawn.where, "--labels", str(tmp_path / name)]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_labels_of_texts_that_were_not_drawn_count_once_and_it_is_said(drawn, tmp_path, capsys):
    key = key_of(drawn)
    rows = annotations(drawn).to_pylist()
    scores = {text_id(r["sample_id"], "web", i): s for r in rows for i, s in enumerate(r["itm_web"] or [])}
    others = [i for i, score in scores.items() if i not in key and score >= 0.6]
    low = [i for i, score in scores.items() if i not in key and score < 0.5]
    (tmp_path / "p.json").write_text(
        json.dumps([annotated(others[0], "match"), annotated(others[1], "no match"), annotated(low[0], "no match")])
    )
    assert main(["calibrate", drawn.where, "--labels", str(tmp_path / "p.json")]) == 0
    stdout = capsys.readouterr().out
    assert "web: 3 labels, 1 match" in stdout
    assert "3 of the labelled texts were not drawn" in stdout
    assert "hold for the labelled texts alone" in stdout
    assert "at 0.6   precision 50.0% (9.5% to 90.5%), recall 100.0%, 2 texts kept" in stdout  # Wilson of 1 in 2
    drawn_one = next(i for i, entry in key.items() if entry["source"] == "web" and entry["score"] >= 0.6)
    (tmp_path / "p.json").write_text(json.dumps([annotated(drawn_one, "match"), annotated(others[1], "no match")]))
    assert main(["calibrate", drawn.where, "--labels", str(tmp_path / "p.json")]) == 0
    stdout, weight = capsys.readouterr().out, key[drawn_one]["weight"]
    assert f"at 0.6   precision {weight / (weight + 1):.1%} " in stdout
    shutil.copytree(drawn.where, tmp_path / "run", ignore=shutil.ignore_patterns("audit"))  # nothing was ever drawn
    assert main(["calibrate", str(tmp_path / "run"), "--labels", str(tmp_path / "p.json")]) == 0
    assert "2 of the labelled texts were not drawn" in capsys.readouterr().out


def test_the_majority_of_annotators_counts(drawn, tmp_path, capsys):
    ids = list(key_of(drawn))
    tasks = [
        annotated(ids[0], "match", "no match", "match"),
        annotated(ids[1], "match", "no match"),  # a tie
        annotated(ids[2], None),  # skipped
        annotated(ids[3], None, "no match"),
        annotated(ids[4]),  # a prediction alone is not a label
        annotated(ids[5], "match"),
        annotated(ids[5], "match"),  # imported twice
    ]
    (tmp_path / "p.json").write_text(json.dumps(tasks))
    votes = audit.read_label_studio(tmp_path / "p.json")
    assert votes == {
        ids[0]: [True, False, True], ids[1]: [True, False], ids[3]: [False], ids[5]: [True, True]
    }  # fmt: skip
    assert main(["calibrate", drawn.where, "--labels", str(tmp_path / "p.json")]) == 0
    stdout = capsys.readouterr().out
    assert stdout.startswith("3 labels")
    assert "1 text is left out" in stdout


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("", "is not JSON text"),
        ("[" * 100_000, "is not JSON text"),
        (b"\xff\xfe[\x00", "is not JSON text"),
        ('{"tasks": []}', "is not a list of tasks"),
        ('[{"id": 1, "image": "x.jpg", "text": "a", "match": "match", "annotator": 1}]', "task 1, is not .* JSON-MIN"),
        ("[7]", "task 1, is not of the expected form"),
        ([annotated("a", "match"), annotated("b", annotations=[3])], "task 2, is not of the expected form"),
        ([annotated(["a"], "match")], r"data.id is \['a'\]"),
        ([annotated("a", "maybe")], r"task 1: expected the choice 'match' or 'no match', got \['maybe'\]"),
        ([annotated("a"), {"data": {"id": "b"}, "predictions": []}], "no task has an annotation"),
        ([annotated("a", None)], "no task has an annotation"),
        ([annotated("a", "match", "no match")], "on every text as many annotations say match as no match"),
        ([annotated("0123456789abcdef", "match")], "1 of 1 ids are of no text .* '0123456789abcdef'"),
    ],
)
def test_a_wrong_export_of_label_studio_is_refused(drawn, tmp_path, capsys, content, error):
    content = json.dumps(content) if isinstance(content, list) else content
    (tmp_path / "p.json").write_bytes(content.encode() if isinstance(content, str) else content)
    assert main(["calibrate", drawn.where, "--labels", str(tmp_path / "p.json")]) == 2
    stderr = capsys.readouterr().err
    assert re.search(error, stderr), stderr
    assert stderr.count("\n") == 1
