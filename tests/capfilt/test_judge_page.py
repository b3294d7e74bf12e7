"""The page of the audit in a browser: keys, reload, download. Skipped without Chromium."""

import csv
import re
import shutil
from pathlib import Path

import pytest
from test_capfilt_calibrate import drawn, serving  # noqa: F401

from capfilt.calibrate import audit
from capfilt.run import Run


def labels(path):
    return {row["id"]: row["match"] for row in csv.DictReader(Path(path).open()) if row["match"]}


def see(page, where, start):
    """Wait until an element's text begins so."""
    page.locator(where, has_text=re.compile("^" + start)).wait_for(state="attached")


def test_keys_are_saved_and_a_reload_goes_on(browser, drawn, tmp_path):  # noqa: F811
    shutil.copytree(drawn.where, tmp_path / "run")
    sheet = tmp_path / "run" / audit.LABELS
    ids = [row["id"] for row in csv.DictReader(sheet.open())]
    with serving(audit.judge(Run.open(str(tmp_path / "run")), 80, 0)) as server:
        page = browser.new_context().new_page()
        page.goto(server.address)
        for number, key in enumerate("yns", 1):
            page.keyboard.press(key)
            see(page, "#progress", f"{number} of")
        assert labels(sheet) == {ids[0]: "y", ids[1]: "n", ids[2]: "s"}
        page.reload()
        assert page.inner_text("#progress") == f"3 of {len(ids)}"
        assert page.locator(".item:visible").get_attribute("data-id") == ids[3]
        page.keyboard.press("u")  # the last answer before the reload
        see(page, "#progress", "2 of")
        assert labels(sheet) == {ids[0]: "y", ids[1]: "n"}
        assert page.locator(".item:visible").get_attribute("data-id") == ids[2]
        page.keyboard.press("ArrowLeft")
        page.click("[data-answer=y]")  # another answer to the second text
        see(page, "#spoken", "yes")
        assert labels(sheet) == {ids[0]: "y", ids[1]: "y"}
        page.keyboard.press("Control+y")
        page.keyboard.press("?")
        assert page.is_visible("#keys")
        assert labels(sheet) == {ids[0]: "y", ids[1]: "y"}
        page.context.set_offline(True)  # as if the command were gone
        page.keyboard.press("n")
        page.wait_for_selector("#trouble:visible")
        assert "Not saved" in page.inner_text("#trouble")
        assert page.inner_text("#progress") == f"2 of {len(ids)}"
        page.context.set_offline(False)
        page.keyboard.press("n")
        see(page, "#progress", "3 of")
        assert page.is_hidden("#trouble")
        page.context.close()


def test_a_page_of_its_own_gives_the_sheet_to_download(browser, drawn, tmp_path):  # noqa: F811
    page = browser.new_page()
    requests = []
    page.on("request", lambda request: requests.append(request.url) if request.url.startswith("http") else None)
    page.goto((Path(drawn.where) / audit.PAGE).as_uri())
    ids = [item.get_attribute("data-id") for item in page.locator(".item").all()]
    page.keyboard.type("yyn")
    see(page, "#progress", "3 of")
    page.reload()
    see(page, "#progress", f"3 of {len(ids)}")
    page.keyboard.type("n" * (len(ids) - 3))
    page.wait_for_selector("#finished:visible")
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "labels.csv")
    assert audit.read_labels(tmp_path / "labels.csv") == {i: n < 2 for n, i in enumerate(ids)}
    assert requests == []
    page.close()


@pytest.mark.parametrize("scripts", [True, False])
def test_all_can_be_read_on_a_phone(browser, drawn, scripts):  # noqa: F811
    context = browser.new_context(java_script_enabled=scripts, viewport={"width": 390, "height": 844})
    page = context.new_page()
    page.goto((Path(drawn.where) / audit.PAGE).as_uri())
    shown = page.locator(".item:visible").count()
    assert shown == 1 if scripts else shown > 60
    assert page.locator("main").bounding_box()["width"] <= 390
    if scripts:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()
