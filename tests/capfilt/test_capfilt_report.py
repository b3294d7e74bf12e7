"""The report: figures that add up, nothing that runs or fetches, a page that works in a browser."""

import gc
import json
import re
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from capfilt_crawl import annotations, crawl, jpeg, planned, sample, scored, write_tar

from capfilt.__main__ import main
from capfilt.report.counts import ReportOptions
from capfilt.report.page import Cards
from capfilt.report.write import report
from capfilt.select.choose import Whole, select
from capfilt.select.copies import Copies
from capfilt.select.policies import SelectConfig

HOSTILE = [
    "<script>document.title='pwned'</script>",
    "</script><script>document.title='pwned'</script>",
    "<img src=x onerror=\"document.title='pwned'\">",
    "\" onmouseover=\"document.title='pwned'",
    "<iframe src=http://localhost:1/></iframe>",
    "\u202e right to left \u2028 and a line",
    "a\0b",
    "<!-- ",
    "&lt;b&gt;",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    members = [m for i, text in enumerate(HOSTILE) for m in sample(f"h{i}", i, text)]
    members += [m for i in range(40) for m in sample(f"a{i:02d}", i, "the same text" if i % 2 else None)]
    members += [
        ("<b>bad</b>.jpg", b"<html>"),
        ("<b>bad</b>.txt", b"a page"),
        ("t.jpg", jpeg(1)[:-60]),
        ("t.txt", b"torn"),
    ]
    write_tar(folder / "in" / "bad.tar", members)
    crawl(folder / "in", shards=2, rows=30)
    return scored(folder / "in" / "*.tar", folder / "run")


@pytest.fixture(scope="module")
def page(run):
    return Path(report(run))


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))


def test_figures_add_up(run, page):
    record = json.loads((page.parent / "report.json").read_bytes())
    rows = annotations(run).to_pylist()
    assert record["rows"] == sum(record["rows_in"].values()) == len(rows) == 111
    assert sum(record["texts_in"].values()) == sum(record["kept"].values()) + sum(record["dropped"].values())
    for kind in ("web", "syn"):
        scores = np.array([p for row in rows for p in row[f"itm_{kind}"] if p is not None], dtype=np.float32)
        for step in (0, 60, 100, 190):
            assert sum(record["histogram"][kind][step:]) == (scores >= np.float32(step / 200)).sum()
    assert record["repeated"]["web"][0] == ["the same text", 20]
    assert sum(shard["rows"] for shard in record["shards"].values()) == 111
    assert record["error_codes"] == {"html_page": 1, "truncated": 1}
    text = page.read_text()
    assert "<td>rows in</td><td>111</td>" in text


def test_the_page_is_whole_small_and_asks_nobody(page):
    text = page.read_text()
    assert len(text) < 5_000_000
    elements = Elements(text).elements
    allowed = "html head meta title style body h1 h2 h3 p table tr td th div input svg rect path polyline text label"
    assert {tag for tag, _ in elements} <= {*allowed.split(), "img", "b", "span", "code", "script"}
    for tag, attributes in elements:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert attributes.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
        assert "href" not in attributes
    assert sum(tag == "script" for tag, _ in elements) == 2
    assert not re.search(r"url\(|@import", text)
    for line in HOSTILE[:5]:
        assert line not in text


def test_a_selection_is_shown_with_its_reasons(run):
    select(run, "strict", SelectConfig("web-else-syn", itm=0.9))
    text = Path(report(run, ReportOptions(select="strict", per_group=4))).read_text()
    assert "web-else-syn, itm 0.9" in text
    assert "dropped, itm below 0.9" in text
    assert "dropped, the web text passes" in text
    assert 'class="text kept"' in text
    assert "status decode_error" in text
    assert "html_page" in text
    assert "<h3>borderline" in text


def test_all_that_drops_is_in_the_line_about_the_selection(run):
    select(run, "all", SelectConfig("rank-k", k=2, itm=0, duplicates="phash64", duplicate_bits=2, shared=3))
    text = Path(report(run, ReportOptions(select="all", per_group=1))).read_text()
    assert "rank-k, k 2, duplicates phash64, duplicate_bits 2, shared 3." in text


def test_a_card_makes_objects_of_its_own_row_only(tmp_path):
    """A page has cards of hundreds of parts, each of a thousand rows."""
    run = scored(crawl(tmp_path / "in", shards=1, rows=400), tmp_path / "run", part_size=400)
    cards = Cards(run, SelectConfig(), Whole(Copies()))
    tracemalloc.start()
    try:
        assert "<img" in cards.card(run.plan[0].pid, 7)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 400_000
    finally:
        tracemalloc.stop()


def test_forgotten_captions_are_counted_all_the_same(run, page, monkeypatch, tmp_path):
    whole = json.loads((page.parent / "report.json").read_text())["texts"]
    monkeypatch.setattr("capfilt.report.counts._MOST_CAPTIONS", 5)
    texts = json.loads(Path(report(run, ReportOptions(to=str(tmp_path)))).with_name("report.json").read_text())["texts"]
    for kind in ("web", "syn"):
        assert texts[kind]["counts_are_partial"]
        assert texts[kind]["texts"] == whole[kind]["texts"]
        assert texts[kind]["words_each"] == whole[kind]["words_each"]


def test_the_same_run_gives_the_same_page(run, tmp_path):
    one = Path(report(run, ReportOptions(to=str(tmp_path / "a")))).read_bytes()
    assert one == Path(report(run, ReportOptions(to=str(tmp_path / "b")))).read_bytes()


def test_many_groups_stay_under_the_limit(run, monkeypatch):
    from capfilt.report import page as report_page

    monkeypatch.setattr(report_page, "_LIMIT", 60_000)
    text = Path(report(run, ReportOptions(per_group=50))).read_text()
    assert len(text) < 75_000
    assert "Every row and every text" in text


def test_a_run_without_results_or_complete_ones_says_so(tmp_path, capsys):
    folder = crawl(tmp_path / "in")
    planned(folder, tmp_path / "run")
    assert main(["report", str(tmp_path / "run")]) == 2
    assert "nothing is scored yet" in capsys.readouterr().err
    assert main(["score", str(tmp_path / "run"), "--limit", "20", "--decode-workers", "0"]) == 0
    assert main(["report", str(tmp_path / "run")]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert "Only 2 of 9 parts are scored" in path.read_text()


# In a browser ---------------------------------------------------------------------------------------------------------


def opened(browser, page, scripts=True):
    view = browser.new_page(java_script_enabled=scripts)
    view.requests, view.errors = [], []
    view.on("request", lambda request: view.requests.append(request.url))
    view.on("pageerror", lambda error: view.errors.append(str(error)))
    view.on("console", lambda message: view.errors.append(message.text) if message.type == "error" else None)
    view.goto(page.as_uri())
    return view


def test_the_slider_counts(browser, page):
    record = json.loads((page.parent / "report.json").read_bytes())
    view = opened(browser, page)
    for step in (100, 37, 200, 0):
        view.evaluate(
            "t => {const s=document.getElementById('slider');s.value=t;s.dispatchEvent(new Event('input'))}", step
        )
        kept = {kind: sum(record["histogram"][kind][step:]) for kind in ("web", "syn")}
        text = view.inner_text("#counts")
        assert f"keeps {kept['web'] + kept['syn']:,} texts" in text
        assert f"web {kept['web']:,} of" in text
    assert view.title().startswith("CapFilt report")  # nothing in the crawl has run
    assert [url for url in view.requests if not url.startswith(("file:", "data:"))] == []
    assert view.errors == []


def test_images_are_blurred_until_somebody_wants_to_see(browser, page):
    view = opened(browser, page)
    blur = "() => getComputedStyle(document.querySelector('.card img')).filter"
    assert "blur" in view.evaluate(blur)
    view.check("#clear")
    assert view.evaluate(blur) == "none"
    assert view.evaluate("() => document.querySelector('.card img').naturalWidth") > 0


def test_without_scripts_the_page_still_tells(browser, page):
    view = opened(browser, page, scripts=False)
    assert not view.is_visible("#slider")
    assert "rows in" in view.inner_text("body")
    assert view.locator(".card").count() > 10
