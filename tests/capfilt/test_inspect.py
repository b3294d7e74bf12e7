"""Looking through a run: what the filters find equals plain Python over the annotations, page after page."""

import json
import re

import pytest
from capfilt_crawl import annotations, crawl, jpeg, make_fake, scored, write_tar
from test_capfilt_calibrate import ask, serving

from capfilt.report import inspect as inspecting
from capfilt.select.choose import select, tables_of
from capfilt.select.policies import SelectConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A crawl with broken images, and a selection of it with rules."""
    folder = tmp_path_factory.mktemp("inspect")
    crawl(folder / "in", shards=3)
    images = {"a": jpeg(1)[:300], "b": b"<html>", "c": jpeg(2), "d": jpeg(3)}
    texts = {"a": "cut off", "b": "a page", "c": "IMG_2041.JPG", "d": '<b>Ein "Ä"</b>'}
    hostile = [m for k in images for m in ((f"{k}.jpg", images[k]), (f"{k}.txt", texts[k].encode()))]
    write_tar(folder / "in" / "hostile.tar", hostile)
    run = scored(folder / "in", folder / "run", maker=make_fake)
    select(run, "some", SelectConfig(rules="junk", itm=0.6))
    return run


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(inspecting, "_CARDS", 5)


def everything(inspection, **filters):
    """The cards of all requests, by (part, row)."""
    cards, after, requests = [], "", 0
    while True:
        answer = inspection.cards({**filters, "after": after} if after else filters)
        assert len(answer["cards"]) <= inspecting._CARDS
        cards += answer["cards"]
        after, requests = answer["after"], requests + 1
        if not after:
            assert answer["searched"] == answer["parts"]
            return cards, requests


def wanted(run, keep_text=None, keep_row=None):
    """What should be found: rows with a text of the selection that fits, in the order of the plan."""
    notes = {
        (n["part_id"], i): n for pid in {p.pid for p in run.plan} for i, n in enumerate(run.parts.read(pid).to_pylist())
    }
    texts = {}
    for table in tables_of(run, "some"):
        for text in table.to_pylist():
            texts.setdefault((text["part_id"], text["row"]), []).append(text)
    order = [(part.pid, i) for part in run.plan for i in range(part.rows)]
    return [
        at for at in order
        if (keep_row is None or keep_row(notes[at])) and (keep_text is None or any(map(keep_text, texts.get(at, []))))
    ]  # fmt: skip


def test_every_row_once(run, few):
    cards, requests = everything(inspecting.Inspection(run, "some"))
    assert [(c["pid"], c["row"]) for c in cards] == wanted(run)
    assert len(cards) == sum(part.rows for part in run.plan) == len(annotations(run))
    assert requests >= len(cards) // 5
    broken = [c for c in cards if not c["image"]]
    assert broken
    assert all(c["detail"] for c in broken)


@pytest.mark.parametrize(
    ("filters", "keep_text", "keep_row"),
    [
        ({"source": "syn"}, lambda t: t["text_source"] == "syn", None),
        ({"verdict": "kept"}, lambda t: t["kept"], None),
        ({"least": "0.6", "most": "0.8"}, lambda t: t["score"] is not None and 0.6 <= t["score"] <= 0.8, None),
        ({"source": "web", "verdict": "dropped", "least": "0.1"},
         lambda t: t["text_source"] == "web" and not t["kept"] and (t["score"] or 0) >= 0.1, None),
        ({"text": "ä"}, lambda t: "ä" in (t["text"] or "").lower(), None),
        ({"status": "decode_error"}, None, lambda n: n["status"] == "decode_error"),
        ({"shard": "1.TAR"}, None, lambda n: "1.tar" in n["source_uri"]),
        ({"rule": "FILE_NAME"}, None, lambda n: any("file_name" in flag for flag in n["rule_flags"] or [])),
        ({"text": "nothing says this"}, lambda t: False, None),
    ],
)  # fmt: skip
def test_filters(run, few, filters, keep_text, keep_row):
    cards, _ = everything(inspecting.Inspection(run, "some"), **filters)
    assert [(c["pid"], c["row"]) for c in cards] == wanted(run, keep_text, keep_row)
    assert bool(cards) == (filters.get("text") != "nothing says this")


def test_verdicts_are_those_of_the_selection(run):
    shown = {(c["pid"], c["row"]): c["texts"] for c in everything(inspecting.Inspection(run, "some"))[0]}
    for table in tables_of(run, "some"):
        for text in table.to_pylist():
            assert any(
                (t["text"], t["text_source"], t["score"], t["kept"], t["reason"])
                == (text["text"], text["text_source"], text["score"], text["kept"], text["reason"])
                for t in shown[text["part_id"], text["row"]]
            )


@pytest.mark.parametrize(
    "filters", [{"status": "fine"}, {"least": "high"}, {"after": "x"}, {"after": "9:1:2"}, {"after": "999:0"}]
)
def test_wrong_filters_are_said(run, filters):
    with pytest.raises(ValueError, match=next(iter(filters))):
        inspecting.Inspection(run).cards(filters)


def test_over_http(run):
    with serving(inspecting.inspect(run)) as server:
        status, page = ask(server, "GET", "")
        assert status == 200
        assert b"img-src 'self' data:" in page.replace(b"&#39;", b"'")
        status, body = ask(server, "GET", "cards?status=ok")
        card = json.loads(body)["cards"][0]
        status, image = ask(server, "GET", f"image?pid={card['pid']}&row={card['row']}")
        assert (status, image[:3]) == (200, b"\xff\xd8\xff")
        for wrong in (
            "pid=x&row=0",
            f"pid={card['pid']}&row=99999",
            f"pid={card['pid']}&row=-1",
            f"pid={card['pid']}",
            "pid=../../job.json&row=0",
        ):
            assert ask(server, "GET", f"image?{wrong}")[0] == 404
        assert ask(server, "GET", "cards?status=x")[0] == 400


def test_in_the_browser(browser, run):
    errors = []
    with serving(inspecting.inspect(run, "some")) as server:
        page = browser.new_context(viewport={"width": 390, "height": 844}).new_page()
        page.on("pageerror", lambda error: errors.append(error))
        page.goto(server.address)
        page.locator(".card").first.wait_for()
        page.select_option("[name=verdict]", "kept")
        page.locator("#found", has_text=re.compile("parts searched|searched")).wait_for()
        kept = wanted(run, lambda t: t["kept"])
        page.wait_for_url("**#verdict=kept")
        page.locator(f".card >> nth={min(60, len(kept)) - 1}").wait_for()
        page.reload()  # the filters are in the address
        page.locator(f".card >> nth={min(60, len(kept)) - 1}").wait_for()
        assert page.input_value("[name=verdict]") == "kept"
        assert page.locator(".card").count() == min(60, len(kept))
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.fill("[name=least]", "0.1")
        page.keyboard.press("Enter")
        page.wait_for_url("**#least=0.1&verdict=kept")
        page.context.close()
    assert errors == []
