"""Every HTML page of the project: its rules in the text, and what a browser makes of it on a phone and a desktop."""

import json
from pathlib import Path

import pytest
import torch
from capfilt_crawl import crawl, sample, scored, write_tar
from page_rules import faults
from PIL import Image

from blip.app.commands import explain, search
from blip.app.review import Review
from blip.inference.explain import Explanation
from capfilt.calibrate import audit
from capfilt.calibrate.grade import Kind
from capfilt.report.counts import ReportOptions
from capfilt.report.inspect import Inspection
from capfilt.report.write import report
from capfilt.run import Run
from eval.caption_page import report as captions_page
from recipes import command, demo
from recipes.bootstrap import report as bootstrap_report
from recipes.bootstrap.settings import BootstrapRun
from recipes.pretrain import PretrainRun

CRAWLED = "<script>document.title='pwned'</script> \" onload='x' & <b>"
PAGES = {
    "capfilt": 4,
    "audit": 0,
    "inspect": 0,
    "review": 0,
    "captions": 4,
    "search": 4,
    "explain": 4,
    "demo": 4,
    "bootstrap": 4,
}
"""Pages, with how many figures each has on top."""
SERVED = ("inspect", "review")
WIDTHS, SCHEMES = (390, 1280), ("light", "dark")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A folder with every page."""
    folder = tmp_path_factory.mktemp("pages")
    for name in PAGES:
        (folder / f"{name}.html").write_text(globals()[f"make_{name}"](folder))
    return folder


def make_capfilt(folder):
    members = [m for i in range(6) for m in sample(f"h{i}", i, f"{CRAWLED} {i} {'long' * 60}")]
    write_tar(folder / "in" / "a.tar", [*members, ("bad.jpg", b"<html>"), ("bad.txt", CRAWLED.encode())])
    crawl(folder / "in", shards=1, rows=30)
    run = scored(folder / "in" / "*.tar", folder / "run")
    return Path(report(run, ReportOptions(per_group=6))).read_text()


def make_audit(folder):
    audit.write(Run.open(str(folder / "run")), 20)
    return (folder / "run" / audit.PAGE).read_text()


def make_inspect(folder):
    return Inspection(Run.open(str(folder / "run"))).page({})


def make_review(folder):
    return Review(None, ["a.jpg", "b.jpg"], {}).page({})


def make_captions(folder):
    names = ("bleu_1", "bleu_4", "cider", "rouge_l")
    record = {f"{name}{end}": value for name in names for end, value in (("", 0.5), ("_low", 0.4), ("_high", 0.6))}
    ids = [f"image {i}" for i in range(30)]
    references = {name: [CRAWLED, "a star"] for name in ids}
    facts = {"prompt": "a picture of ", "decode": {"beams": 3}, "images": 30}
    cider = {name: i / 10 for i, name in enumerate(ids)}
    return captions_page(record | facts, cider, references, dict.fromkeys(ids, CRAWLED), None, 30)


def make_search(folder):
    long = folder / ("a very long name of a photograph " * 5 + ".png")
    Image.new("RGB", (40, 30), "teal").save(long)
    hits = [search.Hit(long, 1.5 - i, 0.4, 0.8 if i < 3 else None) for i in range(5)]
    return search.sheet(
        [search.SearchResult("a red <b> bicycle", hits), search.SearchResult("x" * 120, hits)], str(folder), 1
    )


def make_explain(folder):
    maps = torch.rand(4, 3, 3, generator=torch.Generator().manual_seed(0))
    explanation = Explanation(["a", "red<b>", "bicycle", "x" * 40], maps, maps.mean(0), 0.9)
    panels = explain.images(Image.new("RGB", (48, 32), "teal"), explanation)
    return explain.page("photos/a.png", "a red<b> bicycle " + "x" * 40, panels, explanation)


def make_demo(folder):
    run = command.read(
        PretrainRun, ["--config", str(command.__file__).replace("command.py", "configs/pretrain_demo.yaml")]
    )
    names = [f"{key}@{r}{stage}" for key in ("tr", "ir") for r in (1, 5, 10) for stage in ("", "_itc")]
    names += [*demo.COMPARED]
    scores = {f"{name}{again}": 50.0 for name in names for again in ("", demo.AGAIN)}
    scores |= {"web_right": 40.7, "web_right_kept": 74.7, "synthetic_true": 37.0, "synthetic_true_kept": 36.0}
    kinds = {"right": Kind(6000, 5000, None), "vague": Kind(9000, 1000, 0.9), "wrong": Kind(9000, 1000, 0.9)}
    for where in (folder, folder / "noisy"):
        where.mkdir(exist_ok=True)
        lines = [{"step": s, "losses": {"itc": 4 / s, "itm": 1 / s, "lm": 5 / s}} for s in range(1, 9)]
        (where / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return demo._page(folder, scores | {"seconds": 661.0, "steps": 500}, kinds, [], run, 200)


def make_bootstrap(folder):
    """Without the images of a run, which the experiment's own test has."""
    run = command.read(BootstrapRun, ["--out", str(folder), "--train.steps", "9"])
    columns = [column.name for column in bootstrap_report.table.COLUMNS]
    scores = {row: {seed: dict.fromkeys(columns, 50.0 + seed + i) for seed in (0, 1)}
              for i, row in enumerate(("neither", "both", "longer"))}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap_report, "_shown_seed", lambda scores: None)
        return bootstrap_report._page(None, run, scores, {"seed-0/both/pretrain": 1234.5})


@pytest.mark.parametrize("name", PAGES)
def test_every_page_keeps_the_rules(pages, name):
    text = (pages / f"{name}.html").read_text()
    assert faults(text, PAGES[name], crawled=[CRAWLED, "pwned"], served=name in SERVED) == []
    assert "<script>document.title" not in text


def test_a_rule_that_is_broken_is_noticed(pages):
    text = (pages / "capfilt.html").read_text()
    for before, after, rule in (
        ('lang="en">', ">", "lang"),
        ("<h2>", "<h4>", "heading levels"),
        ('scope="row"', "", "th scope"),
        ('<td class="n">', "<td>", "numbers on the right"),
        ('alt="', 'title="', "image without alt"),
        ("<main>", "<div>", "one main"),
        ("<details", "<div", "tables in details"),
        ("const number", "const  number", "policy script-src"),
        ("--bg:#fff", "--bg:#eee", "policy style-src"),
        ("<h1>", "<h1>!", "title is h1"),
        ('rel="icon" href="data:,"', 'rel="icon" href="https://x.example/a.ico"', "link leads to"),
    ):
        assert before in text
        assert any(problem.startswith(rule) for problem in faults(text.replace(before, after))), rule


# In a browser ---------------------------------------------------------------------------------------------------------


def check(browser, path, width, scheme, scripts):
    """Open a page as someone would: it fits, runs without errors, asks nobody, and axe has no serious fault."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=scripts
    )
    view, requests, errors = context.new_page(), [], []
    view.on("request", lambda request: requests.append(request.url))
    view.on("pageerror", lambda error: errors.append(str(error)))
    view.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    view.goto(path.as_uri())
    body = view.locator("body").bounding_box()
    assert body["width"] <= width
    beyond = "() => document.documentElement.scrollWidth - innerWidth"
    assert not scripts or view.evaluate(beyond) <= 0, "the page scrolls sideways"
    assert view.locator("h1").is_visible()
    assert "pwned" not in view.title()
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert errors == []
    if scripts:
        for one in view.locator("details").all():
            one.evaluate("element => element.open = true")
        assert view.evaluate("() => document.documentElement.scrollWidth - innerWidth") <= 0, (
            "opened, it scrolls sideways"
        )
        serious = [v for v in axe.Axe().run(view).response["violations"] if v["impact"] in ("serious", "critical")]
        assert [(v["id"], v["nodes"][0]["html"][:200]) for v in serious] == []
    context.close()


@pytest.mark.parametrize(
    ("name", "width", "scheme"), [("capfilt", 390, "dark"), ("demo", 390, "light"), ("explain", 1280, "dark")]
)
def test_pages_in_a_browser(browser, pages, name, width, scheme):
    check(browser, pages / f"{name}.html", width, scheme, scripts=True)


@pytest.mark.slow
@pytest.mark.parametrize("scripts", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_every_page_in_every_view(browser, pages, name, width, scheme, scripts):
    check(browser, pages / f"{name}.html", width, scheme, scripts)
