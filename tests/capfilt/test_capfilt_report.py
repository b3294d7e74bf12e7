"""The report: figures that add up, nothing that runs or fetches, a page that works in a browser."""

import dataclasses
import gc
import json
import re
import tracemalloc
from collections import Counter, defaultdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from capfilt_crawl import annotations, crawl, jpeg, planned, sample, scored, write_tar

from capfilt.__main__ import main
from capfilt.report import page as report_page
from capfilt.report import steps as report_steps
from capfilt.report.counts import ReportOptions
from capfilt.report.page import Cards
from capfilt.report.write import report
from capfilt.schema import STATUSES
from capfilt.select.choose import Whole, select, select_part
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


@pytest.fixture(scope="module")
def two_captions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return scored(crawl(folder / "in"), folder / "run", captions=2)


def report_of(run, config, folder):
    """The report of a selection with these settings."""
    select(run, "chosen", config, replace=True, allow_empty=True)
    return report(run, ReportOptions(select="chosen", to=str(folder), per_group=3))


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
    assert record["without_score"] == {"web": record["texts_in"]["web"] - sum(record["histogram"]["web"])}
    text = page.read_text()
    assert '<th scope="row">All</th><td class="n">111</td>' in text


def test_the_page_is_whole_small_and_asks_nobody(page):
    text = page.read_text()
    assert len(text) < 5_000_000
    elements = Elements(text).elements
    assert {tag for tag, _ in elements}.isdisjoint({"iframe", "object", "embed", "form", "base", "a", "video", "audio"})
    for tag, attributes in elements:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert attributes.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
        assert attributes.get("href", "data:,") == "data:,"
    assert sum(tag == "script" for tag, _ in elements) == 2
    assert not re.search(r"url\(|@import", text)
    for line in HOSTILE[:5]:
        assert line not in text


def test_a_selection_is_shown_with_its_reasons(run):
    select(run, "strict", SelectConfig("web-else-syn", itm=0.9))
    text = Path(report(run, ReportOptions(select="strict", per_group=4))).read_text()
    assert "web-else-syn, itm 0.9" in text
    assert '<span class="fate">dropped</span>: <span class="why">below 0.9</span>' in text
    assert '<span class="fate">dropped</span>: <span class="why">the web text passes</span>' in text
    assert 'class="text kept"' in text
    assert "<h3>Files that could not be decoded</h3>" in text
    assert "html_page" in text
    assert "<h3>On the edge</h3>" in text
    assert "<h3>The web text was wrong</h3>" in text
    assert "<title>Rehearsal: 111 web images in, " in text


def test_every_status_has_words():
    assert report_page.STATUSES.keys() == set(STATUSES)


def test_a_title_can_be_given(run, tmp_path):
    text = Path(report(run, ReportOptions(to=str(tmp_path), title="Ours & theirs"))).read_text()
    assert "<title>Rehearsal: Ours &amp; theirs</title>" in text
    assert "<h1>Rehearsal: Ours &amp; theirs</h1>" in text
    assert 'property="og:title" content="Rehearsal: Ours &amp; theirs"' in text


def test_a_rehearsal_is_announced(run, page, capsys):
    assert '<p class="alert" role="alert">These scores are made up (--scorer fake)' in page.read_text()
    assert main(["report", run.where]) == 0
    assert "made up" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings",
    [{}, {"policy": "web-else-syn"}, {"policy": "web-else-syn", "itm": 0.333}, {"only": "syn"}, {"human": "00000*"},
     {"policy": "web-else-syn", "itm_web": 0.6}, {"itm_syn": 0.2, "shared": 3},
     {"rules": "junk", "duplicates": "sha256"}],
)  # fmt: skip
def test_each_step_of_the_slider_is_what_select_would_keep(two_captions, settings, tmp_path):
    run = two_captions
    where = Path(report_of(run, SelectConfig(**settings), tmp_path))
    record = json.loads(where.with_name("report.json").read_bytes())
    assert record["thresholds"][0] == 0
    assert record["thresholds"][-1] == 1
    assert settings.get("itm", 0.5) in record["thresholds"]
    kept = set()
    for at, value in list(enumerate(record["thresholds"]))[::29]:
        account = select(run, f"t{at}", SelectConfig(**(settings | {"itm": value})), replace=True, allow_empty=True)
        assert {kind: counts[at] for kind, counts in record["kept_at"].items() if counts[at]} == account["kept"]
        kept.add(sum(account["kept"].values()))
    assert len(kept) > 3, "the threshold makes a difference"


def test_cards_change_with_the_slider_as_select_decides(two_captions):
    """Every text of two parts at many thresholds."""
    run, config = two_captions, SelectConfig("web-else-syn")
    steps = report_steps.thresholds(config)
    for part in run.plan[:2]:
        whole = Whole(Copies())
        spans = report_steps.ranges(select_part(run, part, config, whole, defaultdict(Counter)), config, steps)
        for at in range(0, 201, 10):
            other = dataclasses.replace(config, itm=steps[at])
            chosen = select_part(run, part, other, whole, defaultdict(Counter))
            assert ((spans.above < at) & (at <= spans.upto)).tolist() == chosen["kept"].to_pylist()


@pytest.mark.parametrize(
    "settings",
    [{"policy": "rank-k"}, {"policy": "fraction"}, {"by": "margin"},
     {"policy": "threshold-table", "itm_web": 0.4, "itm_syn": 0.6}],
)  # fmt: skip
def test_a_selection_without_one_threshold_has_no_slider(run, settings, tmp_path):
    where = Path(report_of(run, SelectConfig(**settings), tmp_path))
    assert json.loads(where.with_name("report.json").read_bytes())["thresholds"] is None
    assert 'type="range"' not in where.read_text()


def test_a_selection_that_more_than_a_threshold_decides_has_no_slider(run):
    """As its texts would not be those of the steps."""
    config = SelectConfig()
    chosen = select_part(run, run.plan[0], config, Whole(Copies()), defaultdict(Counter))
    kept = chosen["kept"].to_numpy().copy()
    kept[np.flatnonzero(kept)[0]] = False
    chosen = chosen.set_column(chosen.schema.get_field_index("kept"), "kept", pa.array(kept))
    assert report_steps.ranges(chosen, config, report_steps.thresholds(config)) is None


def test_all_that_drops_is_in_the_line_about_the_selection(run):
    select(run, "all", SelectConfig("rank-k", k=2, itm=0, duplicates="phash64", duplicate_bits=2, shared=3))
    text = Path(report(run, ReportOptions(select="all", per_group=1))).read_text()
    assert "rank-k, k 2, duplicates phash64, duplicate_bits 2, shared 3." in text
    assert "the best 2 texts of each image, but for those that another setting of the selection drops." in text
    select(run, "syn", SelectConfig(only=["syn"]))
    text = Path(report(run, ReportOptions(select="syn", per_group=1))).read_text()
    assert "blip, itm 0.5, only syn." in text


def test_a_small_fraction_is_not_said_to_be_none(run, tmp_path):
    text = Path(report_of(run, SelectConfig("fraction", fraction=0.004), tmp_path)).read_text()
    assert "the best 0.4% of all texts" in text


def test_a_card_makes_objects_of_its_own_row_only(tmp_path):
    """A page has cards of hundreds of parts, each of a thousand rows."""
    run = scored(crawl(tmp_path / "in", shards=1, rows=400), tmp_path / "run", part_size=400)
    cards = Cards(run, SelectConfig(), Whole(Copies()))
    tracemalloc.start()
    try:
        assert cards.card(run.plan[0].pid, 7).image.startswith("data:image/jpeg;base64,")
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 400_000
    finally:
        tracemalloc.stop()


def test_forgotten_captions_are_counted_all_the_same(run, page, monkeypatch, tmp_path):
    whole = json.loads((page.parent / "report.json").read_text())["texts"]
    monkeypatch.setattr("capfilt.report.counts._MOST", 5)
    texts = json.loads(Path(report(run, ReportOptions(to=str(tmp_path)))).with_name("report.json").read_text())["texts"]
    for kind in ("web", "syn"):
        assert texts[kind]["counts_are_partial"]
        assert texts[kind]["texts"] == whole[kind]["texts"]
        assert texts[kind]["words_each"] == whole[kind]["words_each"]
        assert texts[kind]["vocabulary"] <= 5 < whole[kind]["vocabulary"]


def test_the_same_run_gives_the_same_page(run, tmp_path):
    one = Path(report(run, ReportOptions(to=str(tmp_path / "a")))).read_bytes()
    assert one == Path(report(run, ReportOptions(to=str(tmp_path / "b")))).read_bytes()


def test_many_groups_stay_under_the_limit(run, monkeypatch, tmp_path):
    monkeypatch.setattr(report_page, "_LIMIT", 60_000)
    text = Path(report(run, ReportOptions(per_group=50, to=str(tmp_path)))).read_text()
    assert 40_000 < len(text) < 60_000
    assert text.count("<article") > 2
    assert "Every text, once" in text


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


def test_the_slider_counts_what_select_keeps_and_every_card_answers(browser, run, page):
    record = json.loads((page.parent / "report.json").read_bytes())
    view = opened(browser, page)
    for at in (100, 37, 200, 0):
        view.evaluate(
            "t => {const s=document.getElementById('threshold');s.value=t;s.dispatchEvent(new Event('input'))}", at
        )
        account = select(run, "browser", SelectConfig(itm=at / 200), replace=True, allow_empty=True)
        kept, texts = sum(account["kept"].values()), sum(record["texts_in"].values())
        assert f"{kept:,} of {texts:,} texts kept" in view.inner_text("#counts")
        assert f"{account['kept'].get('web', 0):,} of {record['texts_in']['web']:,} web texts" in view.inner_text(
            "#counts"
        )
        for text in view.locator(".text[data-upto]").all()[:60]:
            is_kept = float(text.locator(".score").text_content()) >= at / 200 - 0.0005
            assert text.locator(".fate").text_content() == ("kept" if is_kept else "dropped")
        assert f"--itm {at / 200:g}" in view.inner_text("#command")
    assert view.title().startswith("Rehearsal: 111 web images in")  # nothing in the crawl has run
    assert [url for url in view.requests if not url.startswith(("file:", "data:"))] == []
    assert view.errors == []


def test_marked_images_are_downloaded_by_id(browser, run, page):
    view = opened(browser, page)
    assert not view.is_enabled("#download")
    boxes = view.locator(".marked")
    ids = {boxes.nth(i).get_attribute("value") for i in range(2)}
    for i in range(2):
        boxes.nth(i).check()
    with view.expect_download() as download:
        view.click("#download")
    assert set(Path(download.value.path()).read_text().split()) == ids
    assert ids <= set(annotations(run)["sample_id"].to_pylist())
    assert view.errors == []


def test_images_are_blurred_until_somebody_wants_to_see(browser, page):
    view = opened(browser, page)
    blur = "() => getComputedStyle(document.querySelector('.card img')).filter"
    assert "blur" in view.evaluate(blur)
    view.check("#clear")
    assert view.evaluate("() => [...document.images].every(i => getComputedStyle(i).filter === 'none')")
    assert view.evaluate("() => document.querySelector('.card img').naturalWidth") > 0


def test_without_scripts_the_page_still_tells(browser, page):
    view = opened(browser, page, scripts=False)
    assert not view.is_visible("#threshold")
    assert not view.is_visible("#download")
    assert "Every row of the input, once" in view.inner_text("body")
    assert view.locator(".card").count() > 10
