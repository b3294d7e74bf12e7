"""A regression guard: losses and scores of short TINY runs are those that were recorded, to 1e-4.

It says that a change of the code has left these numbers alone, not that they are right: other tests show that, by hand
arithmetic and by independent code. A change that means to change them records them again and says why:

    python -m tests.numbers.record tests/numbers/short.json --short

A redesign that may change no number is compared to the bit on one machine instead: python -m tests.numbers BASE_TREE
"""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
from compare import compare, differences, renamed, without_names
from record import ROOT, SHORT_FORM

HERE = Path(__file__).parent
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def recorded():
    return json.loads((HERE / "short.json").read_text())


def test_numbers_are_as_they_were(recorded, tmp_path):
    out = tmp_path / "now.json"
    line = [sys.executable, "-P", str(HERE / "record.py"), str(out), "--short", "--folder", str(tmp_path / "runs")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    now = json.loads(out.read_text())
    for name in SHORT_FORM:
        compared, lines = differences(recorded[name], now[name], TOLERANCE)
        assert compared > 8, f"{name}: only {compared} values were compared"
        assert not lines, f"{name}: {len(lines)} of {compared} values changed:\n" + "\n".join(lines[:10])
    assert now.keys() == recorded.keys()


def test_a_small_change_is_seen(recorded):
    before, after = copy.deepcopy(recorded), copy.deepcopy(recorded)
    assert differences(before, after)[1] == []
    after["pretrain"]["2"]["itm"] *= 1.001
    compared, lines = differences(before, after, TOLERANCE)
    assert compared > 100
    assert [line.partition(":")[0] for line in lines] == ["/pretrain/2/itm"]
    assert not compare(before, after, TOLERANCE)
    after["pretrain"]["2"]["itm"] = before["pretrain"]["2"]["itm"] * (1 + 1e-6)
    assert compare(before, after, TOLERANCE)
    assert not compare(before, after)


def test_nothing_compared_is_no_success():
    assert not compare({}, {})
    assert not compare({"machine": {"torch": "2"}}, {"machine": {"torch": "2"}})
    assert not compare({"a": {"x": 1}, "b": {}}, {"a": {"x": 1}, "b": {}})


@pytest.mark.parametrize(
    "after",
    [
        {"a": {"x": [1.0, 2.0]}, "b": {"y": 3}},  # longer
        {"a": {"x": [1.0]}},  # a section is missing
        {"a": {"x": [1.0]}, "b": {"y": 3}, "c": {"z": 1}},  # one is new
        {"a": {"x": [1]}, "b": {"y": 3}},  # another type
        {"a": {"x": [float("nan")]}, "b": {"y": 3}},
        {"a": {"x": [1.0]}, "b": {"y": True}},
    ],
)
def test_what_is_missing_or_of_another_kind_differs(after):
    before = {"a": {"x": [1.0]}, "b": {"y": 3}}
    assert compare(before, copy.deepcopy(before))
    assert not compare(before, after)


def test_tensors_may_have_other_names_but_not_other_contents():
    before = {"run": {"weights": {"med.0.q": "F32 [2] aa", "med.1.q": "F32 [2] bb", "head": "F32 [1] cc"}}}
    after = {"run": {"weights": {"text.0.q": "F32 [2] aa", "text.1.q": "F32 [2] bb", "head": "F32 [1] cc"}}}
    table = {r"med\.(\d+)\.q": r"text.\1.q"}
    assert not compare(before, after)
    assert compare(renamed(before, table), after)
    assert compare(without_names(before), without_names(after))
    after["run"]["weights"]["text.1.q"] = "F32 [2] aa"
    assert not compare(renamed(before, table), after)
    assert not compare(without_names(before), without_names(after))


def test_records_of_different_machines_are_not_compared(tmp_path):
    for name, torch in (("one", "2.11"), ("other", "2.12")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"machine": {"torch": torch}, "run": {"loss": 1.0}}))
    line = [sys.executable, "-P", str(HERE / "compare.py"), str(tmp_path / "one.json"), str(tmp_path / "other.json")]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2
    assert "different machines" in done.stderr
    assert "'2.11' before, '2.12' after" in done.stderr
