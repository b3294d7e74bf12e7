"""Captions edited in the browser: saved beside the images at once, taken back one by one or all together."""

import contextlib
import hashlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
from PIL import Image

from blip.app.cli import main
from blip.app.review import Review, serve
from blip.app.sidecars import Beside, SidecarOptions
from blip.data.image_files import find

TEXTS = {"a.jpg": "a dog\n", "b.jpg": None, "sub/c.png": "two\r\n\r\nlines", "d.jpg": "ein Äffchen\n"}


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for number, (name, text) in enumerate(TEXTS.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (40 * number, 90, 120)).save(path)
        if text is not None:
            path.with_suffix(".txt").write_bytes(text.encode())
    (folder / "e.jpg").write_bytes(b"not an image")
    (folder / "f.jpg").write_bytes((folder / "a.jpg").read_bytes())
    (folder / "f.txt").write_bytes(b"\xff\xfe not text")
    return folder


@contextlib.contextmanager
def serving(photos):
    """A server as `blip review` runs it."""
    inputs = find([str(photos)], beside=[".txt"])
    beside = Beside(SidecarOptions(sidecar=".txt", overwrite=True), inputs)
    beside.survey()
    beside.begin({"review": ".txt"})
    server = serve(Review(beside, inputs.paths, dict(beside.problems)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        beside.finish()


def request(server, path, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    origin = {"Origin": f"http://127.0.0.1:{server.server_port}"}
    connection.request("POST" if body else "GET", f"/{server.secret}/{path}", body and json.dumps(body), origin)
    reply = connection.getresponse()
    content = reply.read()
    return reply.status, content if reply.headers["Content-Type"] == "image/jpeg" else json.loads(content)


def state(photos):
    files = (path for path in photos.rglob("*") if path.is_file() and ".blip-undo" not in path.parts)
    return {path.relative_to(photos).as_posix(): path.read_bytes() for path in files}


def test_captions_are_saved_and_all_are_taken_back(photos, capsys):
    before = state(photos)
    with serving(photos) as server:
        status, dog = request(server, "item?from=0")
        assert (status, dog["text"], dog["file"], dog["there"]) == (200, "a dog", "a.txt", True)
        assert dog["digest"] == hashlib.sha256(b"a dog\n").hexdigest()
        status, after = request(server, "save", {"n": 0, "text": " a big dog \n\n on grass", "digest": dog["digest"]})
        assert (status, after["text"]) == (200, "a big dog\non grass")
        assert (photos / "a.txt").read_bytes() == b"a big dog\non grass\n"
        status, one = request(server, "item?from=0&missing=1")
        assert (status, one["n"], one["text"], one["there"]) == (200, 1, "", False)
        assert request(server, "save", {"n": 1, "text": "a cat", "digest": ""})[0] == 200
        assert (photos / "b.txt").read_bytes() == b"a cat\n"
        assert request(server, "item?from=0&contains=%C3%84FF")[1]["text"] == "ein Äffchen"
        assert request(server, "item?from=0&contains=C.PNG")[1]["text"] == "two\nlines"
        assert request(server, "item?from=0&step=-1&contains=a")[1]["n"] == 0
        assert request(server, "item?from=2&step=-1&contains=cat")[1]["n"] == 1
        assert request(server, "item?from=0&contains=zebra") == (404, {"error": "no image fits"})
        assert request(server, "image?n=0")[1][:3] == b"\xff\xd8\xff"
    assert main(["caption", str(photos), "--undo"]) == 0
    assert "1 removed, 1 restored" in capsys.readouterr().err
    assert state(photos) == before


def test_a_caption_that_was_created_is_taken_back_by_removing_it(photos):
    before = state(photos)
    with serving(photos) as server:
        one = request(server, "save", {"n": 1, "text": "a cat", "digest": ""})[1]
        assert request(server, "save", {"n": 1, "text": None, "digest": one["digest"]})[1]["there"] is False
        assert state(photos) == before
        there = request(server, "item?from=0")[1]
        status, answer = request(server, "save", {"n": 0, "text": None, "digest": there["digest"]})  # not created here
        assert status == 400
        assert "is left as it is" in answer["error"]
    assert state(photos) == before


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"n": 0, "text": "x", "digest": "of another text"}, "was edited since"),
        ({"n": 1, "text": "x", "digest": "there was none"}, "was edited since"),
        ({"n": 99, "text": "x", "digest": ""}, "there is no image '99'"),
        ({"n": "../../x", "text": "x", "digest": ""}, "there is no image"),
        ({"text": "x", "digest": ""}, "there is no image"),
        ({"n": 0, "text": 7, "digest": ""}, "text is the caption"),
        ({"n": 1, "text": "\ud800", "digest": ""}, "is not UTF-8"),
        ({"n": 1, "text": "a\0b", "digest": ""}, "a null character"),
    ],
)
def test_wrong_requests_change_nothing(photos, body, error):
    before = state(photos)
    with serving(photos) as server:
        status, answer = request(server, "save", body)
        assert status == 400
        assert error in answer["error"]
    assert state(photos) == before


def test_a_folder_that_is_moved_away_is_not_made_anew(photos):
    with serving(photos) as server:
        assert request(server, "save", {"n": 1, "text": "a cat", "digest": ""})[0] == 200
        photos.rename(photos.with_name("elsewhere"))
        assert request(server, "item?from=0")[1]["problem"] == "the image is not there any more"
        status, answer = request(server, "save", {"n": 0, "text": "x", "digest": ""})
        assert (status, answer) == (400, {"error": "the image is not there any more"})
        assert not photos.exists()
        photos.with_name("elsewhere").rename(photos)
    assert (photos / "a.txt").read_bytes() == b"a dog\n"


def test_what_cannot_be_shown_or_edited_is_said(photos):
    with serving(photos) as server:
        number = next(n for n in range(6) if request(server, f"item?from={n}")[1]["name"].endswith("f.jpg"))
        item = request(server, f"item?from={number}")[1]
        assert item["problem"] == "f.txt is not UTF-8 text"
        assert request(server, "save", {"n": number, "text": "x", "digest": item["digest"]})[0] == 400
        assert (photos / "f.txt").read_bytes() == b"\xff\xfe not text"
        status, answer = request(server, f"image?n={number - 1}")
        assert status == 404
        assert "not one of" in answer["error"]


def test_the_command_serves_until_it_is_interrupted(photos):
    code = "from blip.app.cli import command; command()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "review", str(photos)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    address = re.search(r"http://127\.0\.0\.1:(\d+)/([\w-]+)/", process.stdout.readline())
    connection = http.client.HTTPConnection("127.0.0.1", int(address[1]), timeout=10)
    connection.request("POST", f"/{address[2]}/save", json.dumps({"n": 1, "text": "a cat", "digest": ""}),
                       {"Origin": f"http://127.0.0.1:{address[1]}"})  # fmt: skip
    assert connection.getresponse().status == 200
    other = subprocess.run([sys.executable, "-c", code, "review", str(photos)], capture_output=True, text=True)
    assert other.returncode == 2
    assert "another command is writing captions" in other.stderr
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    assert (photos / "b.txt").read_text() == "a cat\n"
    assert [path.name for path in (photos / ".blip-undo").iterdir()] != []


@pytest.mark.parametrize(
    ("given", "error"),
    [(["nothing"], "no such file"), (["photos", "--sidecar", "txt"], "begins with a dot"), (["empty"], "no image")],
)
def test_wrong_use(tmp_path, photos, capsys, monkeypatch, given, error):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stop:
        main(["review", *given])
    assert stop.value.code == 2
    assert error in capsys.readouterr().err


def test_with_the_keyboard(browser, photos):
    with serving(photos) as server:
        page = browser.new_context(viewport={"width": 390, "height": 844}).new_page()
        page.goto(server.address)
        page.locator("#place", has_text="1 of 6").wait_for()
        assert page.locator("#caption").evaluate("node => document.activeElement === node")
        page.keyboard.press("Control+a")
        page.keyboard.type("a small dog")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("on grass")
        page.keyboard.press("Enter")
        page.locator("#place", has_text="2 of 6").wait_for()
        assert (photos / "a.txt").read_text() == "a small dog\non grass\n"
        page.keyboard.type("a draft")
        page.keyboard.press("PageDown")  # would lose the draft
        page.locator("#trouble", has_text="is not saved").wait_for()
        page.keyboard.press("Escape")
        assert page.input_value("#caption") == ""
        assert page.is_hidden("#trouble")
        page.keyboard.press("Control+z")
        page.locator("#state", has_text="Taken back").wait_for()
        assert (photos / "a.txt").read_text() == "a dog\n"
        assert page.input_value("#caption") == "a dog"
        page.keyboard.press("PageUp")
        page.locator("#place", has_text="6 of 6").wait_for()
        page.reload()
        page.locator("#place", has_text="6 of 6").wait_for()
        page.check("#missing")
        page.locator("#place", has_text="2 of 6").wait_for()
        page.fill("#caption", "a cat")
        page.locator("#caption").press("Enter")
        page.locator("#state", has_text="Saved b.txt").wait_for()
        assert (photos / "b.txt").read_text() == "a cat\n"
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.context.close()
