"""Every HTML page of the project: its rules in the text, and what a browser makes of it on a phone and a desktop."""

import contextlib
import json
import threading
import urllib.request
from pathlib import Path

import pytest
import torch
from capfilt_crawl import crawl, make_fake, sample, scored, write_tar
from page_rules import faults
from PIL import Image

from blip.app import review
from blip.app.commands import explain, search
from blip.app.html.serve import PageServer
from blip.app.sidecars import Beside, SidecarOptions
from blip.data.image_files import find
from blip.inference.explain import Explanation
from blip.origin import OTHER, SYNTHETIC
from capfilt.calibrate import audit
from capfilt.calibrate.grade import Kind
from capfilt.report.counts import ReportOptions
from capfilt.report.inspect import inspect
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
    "judge": 0,
    "inspect": 0,
    "review": 0,
    "captions": 4,
    "search": 4,
    "explain": 4,
    "demo": 4,
    "bootstrap": 4,
}
"""Pages, with how many figures each has on top."""
WIDTHS, SCHEMES = (390, 1280), ("light", "dark")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The address of every page: a file, or a server on this machine."""
    folder = tmp_path_factory.mktemp("pages")
    with contextlib.ExitStack() as serving:
        yield {name: address(globals()[f"make_{name}"](folder), folder / f"{name}.html", serving) for name in PAGES}


def address(made, path, serving):
    if not isinstance(made, PageServer):
        path.write_text(made)
        return path.as_uri()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    serving.callback(made.server_close)
    serving.callback(made.shutdown)
    return made.address


def text_of(address):
    with urllib.request.urlopen(address) as reply:
        return reply.read().decode()


def make_capfilt(folder):
    members = [m for i in range(6) for m in sample(f"h{i}", i, f"{CRAWLED} {i} {'long' * 60}")]
    write_tar(folder / "in" / "a.tar", [*members, ("bad.jpg", b"<html>"), ("bad.txt", CRAWLED.encode())])
    crawl(folder / "in", shards=1, rows=30)

    def maker(run):
        scorer = make_fake(run)
        scorer.facts |= {"trained_on": json.dumps([SYNTHETIC])}
        return scorer

    run = scored(folder / "in" / "*.tar", folder / "run", maker=maker)
    return Path(report(run, ReportOptions(per_group=6))).read_text()


def make_audit(folder):
    audit.write(Run.open(str(folder / "run")), 20)
    return (folder / "run" / audit.PAGE).read_text()


def make_judge(folder):
    return audit.judge(Run.open(str(folder / "run")), 20, 0)


def make_inspect(folder):
    return inspect(Run.open(str(folder / "run")))


def make_review(folder):
    photos = folder / "photos"
    photos.mkdir()
    for name, text in (("a" * 200, CRAWLED), ("b", "שתי צורות"), ("c", "")):
        Image.new("RGB", (40, 30), "teal").save(photos / f"{name}.jpg")
        (photos / f"{name}.txt").write_text(text)
    (photos / "d.jpg").write_text("no image")
    inputs = find([str(photos)], beside=[".txt"])
    beside = Beside(SidecarOptions(sidecar=".txt", overwrite=True), inputs)
    beside.survey()
    beside.begin({"review": ".txt"})
    return review.serve(review.Review(beside, inputs.paths, dict(beside.problems)))


def make_captions(folder):
    names = ("bleu_1", "bleu_4", "cider", "rouge_l")
    record = {f"{name}{end}": value for name in names for end, value in (("", 0.5), ("_low", 0.4), ("_high", 0.6))}
    ids = [f"image {i}" for i in range(30)]
    references = {name: [CRAWLED, "a star"] for name in ids}
    facts = {"prompt": "a picture of ", "decode": {"beams": 3}, "images": 30}
    cider = {name: i / 10 for i, name in enumerate(ids)}
    return captions_page(record | facts, cider, references, dict.fromkeys(ids, CRAWLED), None, 30, (SYNTHETIC,))


def make_search(folder):
    long = folder / ("a very long name of a photograph " * 5 + ".png")
    Image.new("RGB", (40, 30), "teal").save(long)
    hits = [search.Hit(long, 1.5 - i, 0.4, 0.8 if i < 3 else None) for i in range(5)]
    return search.sheet(
        [search.SearchResult("a red <b> bicycle", hits), search.SearchResult("x" * 120, hits)],
        str(folder), 1, (SYNTHETIC,),
    )  # fmt: skip


def make_explain(folder):
    maps = torch.rand(4, 3, 3, generator=torch.Generator().manual_seed(0))
    explanation = Explanation(["a", "red<b>", "bicycle", "x" * 40], maps, maps.mean(0), 0.9)
    panels = explain.images(Image.new("RGB", (48, 32), "teal"), explanation)
    return explain.page("photos/a.png", "a red<b> bicycle " + "x" * 40, panels, explanation, (OTHER, SYNTHETIC))


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
    text = text_of(pages[name])
    assert faults(text, PAGES[name], crawled=[CRAWLED, "pwned"], served=pages[name].startswith("http")) == []
    assert "<script>document.title" not in text


def test_pages_of_models_that_know_only_synthetic_shapes_say_so(pages):
    note = "The model was trained on synthetic shapes; on photographs its answers mean nothing."
    assert {name for name in PAGES if note in text_of(pages[name])} == {"capfilt", "captions", "search"}


def test_a_rule_that_is_broken_is_noticed(pages):
    text = text_of(pages["capfilt"])
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


def check(browser, address, use, width, scheme, scripts):
    """Open and use a page as someone would: it fits, runs without errors, asks nobody, and axe has no serious fault."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=scripts,
        reduced_motion="reduce",
    )  # fmt: skip
    view, requests, errors = context.new_page(), [], []
    view.on("request", lambda request: requests.append(request.url))
    view.on("pageerror", lambda error: errors.append(str(error)))
    view.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    view.goto(address, wait_until="networkidle" if address.startswith("http") else "load")

    def fits(when):
        assert view.locator("body").bounding_box()["width"] <= width
        assert view.evaluate("() => document.documentElement.scrollWidth - innerWidth") <= 0, f"{when} it is too wide"
        assert view.evaluate("() => document.getAnimations().length") == 0

    def accessible(when):
        violations = axe.Axe().run(view).response["violations"] if scripts else []
        serious = [one for one in violations if one["impact"] in ("serious", "critical")]
        assert [(when, one["id"], one["nodes"][0]["html"][:200]) for one in serious] == []

    fits("opened")
    assert view.locator("h1").is_visible()
    assert "pwned" not in view.title()
    assert view.locator("noscript").count() == 0 or view.locator("noscript").is_visible() == (not scripts)
    accessible("opened")
    for one in view.locator("details").all():
        one.evaluate("element => element.open = true")
    if scripts:
        use(view)
    fits("used")
    accessible("used")
    assert [url for url in requests if not url.startswith((address.rpartition("/")[0], "data:"))] == []
    assert [error for error in errors if "404" not in error] == []  # an image that cannot be read
    context.close()


def use(view):
    """Use a page that has nothing to use but details."""


def use_capfilt(view):
    view.locator("#threshold").fill("190")
    view.check("#clear")
    view.locator(".marked").first.check()


def use_audit(view):
    view.keyboard.type("?yn")
    view.locator("#answered", has_text="number 3").wait_for()


def use_judge(view):
    """From the start to the end, after a mistake and with a failure."""
    count = view.locator(".item").count()
    view.keyboard.type("?" + "u" * count + "ynu")
    view.locator("#answered", has_text="number 2").wait_for()
    view.keyboard.type("s" * count)
    view.locator("#finished").wait_for()
    view.evaluate(
        "() => { const one = document.getElementById('trouble'); one.textContent = 'x'; one.hidden = false; }"
    )


def use_inspect(view):
    view.select_option("[name=verdict]", "dropped")
    view.wait_for_url("**#verdict=dropped")
    view.check("#clear")
    view.fill("[name=text]", "nothing says this")
    view.keyboard.press("Enter")
    view.locator("#found", has_text="No row").wait_for()
    view.click("[type=reset]")
    view.locator(".card").first.wait_for()


def use_review(view):
    """Past every image, and with a caption that is not saved."""
    for number in (2, 3, 4, 1):
        view.keyboard.press("PageDown")
        view.locator("#place", has_text=f"{number} of 4").wait_for()
    view.fill("#caption", "a draft")
    view.keyboard.press("PageDown")
    view.locator("#trouble", has_text="not saved").wait_for()


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [("capfilt", 390, "dark"), ("demo", 390, "light"), ("explain", 1280, "dark"), ("inspect", 390, "light")],
)
def test_pages_in_a_browser(browser, pages, name, width, scheme):
    check(browser, pages[name], globals().get(f"use_{name}", use), width, scheme, scripts=True)


@pytest.mark.slow
@pytest.mark.parametrize("scripts", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_every_page_in_every_view(browser, pages, name, width, scheme, scripts):
    check(browser, pages[name], globals().get(f"use_{name}", use), width, scheme, scripts)
