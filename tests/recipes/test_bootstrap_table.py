"""The bootstrapping experiment's numbers against hand arithmetic."""

import math

import pytest

from recipes.bootstrap import table
from recipes.bootstrap.rows import ROWS

NEITHER = {"tr@1": (50.0, 54.0, 52.0), "ir@1": (40.0, 41.0, 42.0)}
BOTH = {"tr@1": (60.0, 62.0, 64.0), "ir@1": (41.0, 40.0, 42.0)}


def scores(**rows) -> dict:
    """Row -> seed -> column, all main columns alike where nothing is said of them."""
    return {
        row: {
            seed: {c.name: values.get(c.name, values["tr@1"])[seed] for c in table.MAIN}
            for seed in range(len(values["tr@1"]))
        }
        for row, values in rows.items()
    }


def test_means_and_paired_differences():
    by_row = scores(neither=NEITHER, both=BOTH)
    mean = table.means(by_row, "neither", "tr@1")
    assert (mean.value, mean.seeds) == (52.0, 3)
    assert mean.error == pytest.approx(2 / math.sqrt(3))  # deviation of 50, 54, 52 is 2
    paired = table.difference(by_row, "both", "neither", "tr@1")  # 10, 8, 12
    assert paired.value == 10
    assert paired.error == pytest.approx(2 / math.sqrt(3))
    assert paired.verdict == "higher"
    assert paired.text(1, True) == "+10.0 ± 1.2"
    within = table.difference(by_row, "both", "neither", "ir@1")  # 1, -1, 0
    assert (within.value, within.verdict) == (0.0, "open")
    assert table.difference(by_row, "neither", "both", "tr@1").verdict == "lower"


def test_differences_are_of_seeds_that_both_rows_have():
    by_row = scores(neither=NEITHER, both=BOTH)
    del by_row["both"][1]
    by_row["both"][7] = {"tr@1": 1000.0}
    paired = table.difference(by_row, "both", "neither", "tr@1")
    assert (paired.value, paired.seeds) == (11.0, 2)
    del by_row["both"][0]
    one = table.difference(by_row, "both", "neither", "tr@1")
    assert (one.value, one.error, one.verdict) == (12.0, None, "one seed")
    assert table.difference(by_row, "filter", "neither", "tr@1") is None


def test_exactly_two_standard_errors_are_not_beyond():
    assert table.Mean(2.0, 1.0, 3).verdict == "open"
    assert table.Mean(2.0001, 1.0, 3).verdict == "higher"
    assert table.Mean(-2.0001, 1.0, 3).verdict == "lower"
    assert table.Mean(0.0, 0.0, 3).verdict == "open"


def test_findings_say_whether_they_agree():
    by_row = scores(neither=NEITHER, both=BOTH, longer=NEITHER, captioner={"tr@1": (70.0, 73.0, 74.0)})
    verdicts = {one["claim"]: one["says"] for one in table.findings(by_row)}
    assert verdicts["captioning and filtering help"] == "agrees in 5 of 6"  # ir@1 is open
    assert verdicts["longer training on the noisy texts gains nothing"] == "agrees in 6 of 6"
    assert verdicts["both help more than captioning alone"] == "agrees in 0 of 6, the other way in 6"
    assert "filtering alone helps" not in verdicts, "a row that is not there says nothing"


def test_tables_name_rows_and_mark_what_is_beyond():
    text = table.markdown(scores(neither=NEITHER, both=BOTH))
    main, differences, findings = text.strip().split("\n\n")
    assert "| neither: the crawl as it is | 52.0 ± 1.2 | 41.0 ± 0.6 |" in main
    assert differences.count(ROWS["both"].title) == 1
    assert "+10.0 ± 1.2 ▲ | +0.0 ± 0.6 |" in differences
    assert "higher in 5 of 6" in differences
    assert findings.splitlines()[2].startswith("| captioning and filtering help | +10.0 ± 1.2 ▲ |")
    for part in (main, differences, findings):
        assert len({line.count("|") for line in part.splitlines()}) == 1
    assert table.markdown({}) == "\n"


def test_results_hold_every_seed():
    results = table.results(scores(neither=NEITHER, both=BOTH))
    assert list(results["rows"]) == ["neither", "both"]
    assert results["rows"]["both"]["seeds"]["1"]["tr@1"] == 62.0
    assert results["rows"]["both"]["mean"]["tr@1"]["value"] == 62.0
    assert results["rows"]["both"]["difference"]["tr@1"]["value"] == 10.0
