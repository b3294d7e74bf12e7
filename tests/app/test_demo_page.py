"""The page of `blip demo` in a real browser, and what must not be had from it; skipped without Gradio."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_blip_demo import HOSTILE, QUESTION, TEXTS, answering, capfilt_run, vqa_model  # noqa: F401
from test_cli import model, png  # noqa: F401

from blip import installed

try:
    installed.require("demo", "the page")
except ValueError as missing:
    pytest.skip(str(missing), allow_module_level=True)

import httpx
from gradio_client import Client, handle_file

from blip.app import demo_page
from blip.app.demo import Demo
from blip.app.demo_page import serving
from blip.app.index import Index, IndexOrigin
from blip.app.loaded import load
from blip.app.web import is_local
from blip.origin import SYNTHETIC

IMAGES = 12
_REAL, _RESOLVE = socket.socket.connect, socket.getaddrinfo
_HERE = ("127.0.0.1", "::1", "localhost")


@pytest.fixture(scope="module")
def abroad():
    """Other machines that somebody tried to connect to, or whose address was looked up; nobody gets there."""
    tried = []

    def refuse(where):
        tried.append(where)
        raise socket.gaierror("no network here")

    def connect(self, address):
        near = self.family == socket.AF_UNIX or str(address[0]) in _HERE
        return _REAL(self, address) if near else refuse(address)

    def resolve(host, *more, **named):
        near = host is None or (host.decode() if isinstance(host, bytes) else host) in _HERE
        return _RESOLVE(host, *more, **named) if near else refuse(host)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        patch.setattr(socket, "getaddrinfo", resolve)
        yield tried


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(IMAGES):
        (folder / f"p{i}.png").write_bytes(png(i))
    return folder


@pytest.fixture(scope="module")
def whole(model, vqa_model, capfilt_run, images) -> Demo:  # noqa: F811
    made = answering(model, vqa_model, run=capfilt_run)
    made.index = Index(images, images / ".blip-index", IndexOrigin.of(made.matcher, model, "float32"))
    made.refresh()
    return made


@pytest.fixture(scope="module")
def address(whole, abroad):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_ALLOWED_PATHS", "/")  # of somebody's other page
        before = dict(os.environ)
        with serving(whole) as address:
            folder = Path(os.environ["GRADIO_TEMP_DIR"])
            yield address.rstrip("/")
        assert not folder.exists()
        # Tests change it, too.
        assert {name: os.environ.get(name) for name in before if "PYTEST" not in name} == {
            name: value for name, value in before.items() if "PYTEST" not in name
        }
    assert abroad == []


@pytest.fixture(scope="module")
def client(address, abroad):
    before = len(abroad)
    made = Client(address, verbose=False, analytics_enabled=False)
    del abroad[before:]  # the client, not the page, asks the hub what to call itself
    return made


@pytest.fixture(autouse=True)
def single_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# What must not be had -------------------------------------------------------------------------------------------------


def test_it_listens_here_only(address):
    assert address.startswith("http://127.0.0.1:")
    page = httpx.get(address)
    assert page.status_code == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    config = httpx.get(f"{address}/config").json()
    assert not config.get("analytics_enabled")
    assert config.get("footer_links") in ([], None)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", ""])
def test_another_name_is_refused(address, host):
    """A page elsewhere whose name is made to lead here must not get at it."""
    assert httpx.get(address, headers={"host": host}).status_code == 403


def test_nothing_is_written_beside_the_code(address):
    assert list(Path(demo_page.__file__).parent.rglob("*.pyi")) == []


def test_another_origin_may_not_read(address):
    response = httpx.get(f"{address}/config", headers={"origin": "http://evil.example"})
    assert response.headers.get("access-control-allow-origin") != "http://evil.example"


@pytest.mark.parametrize("path", [
    "/etc/passwd", "//etc/passwd", "../../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "pyproject.toml",
    "http://169.254.169.254/latest/meta-data", "https://93.184.216.34/", "http:/example.com", "HTTP://example.com",
    "http%3A%2F%2Fexample.com", "file:///etc/passwd",
])  # fmt: skip
@pytest.mark.parametrize("route", ["/gradio_api/file=", "/file=", "/gradio_api/file/", "/gradio_api/proxy="])
def test_files_of_the_machine_are_refused(address, abroad, route, path):
    response = httpx.get(f"{address}{route}{path}")
    assert response.status_code in (403, 404), response.text[:200]
    assert "root:" not in response.text
    if route == "/gradio_api/file=" and ".." not in path:
        assert response.status_code == 403
    assert abroad == []


def test_not_even_those_it_shows(address, whole, images):
    for path in (images / "p1.png", Path(whole.run, "job.json"), Path(__file__)):
        assert httpx.get(f"{address}/gradio_api/file={path}").status_code == 403


def test_a_large_upload_is_refused(address):
    def upload(size: int, **headers: str):
        files = {"files": ("p.png", png(1) + b"\0" * size)}
        return httpx.post(f"{address}/gradio_api/upload", files=files, headers=headers)

    assert upload(6_000_000).status_code == 413
    assert upload(4_000_000).status_code == 200

    def dribble():  # without a length, so that the server has to count
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="p.png"\r\n\r\n'
        for _ in range(60):
            yield b"\0" * 100_000
        yield b"\r\n--x--\r\n"

    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert httpx.post(f"{address}/gradio_api/upload", content=dribble(), headers=headers).status_code == 413


@pytest.mark.parametrize("route", ["upload", "queue/join", "component_server", "run/caption", "call/caption"])
def test_a_body_without_a_length_is_counted_as_it_comes(address, route):
    form = "multipart/form-data; boundary=XX" if route == "upload" else "application/json"
    sent = 0

    def dribble():
        nonlocal sent
        yield (
            b'--XX\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
            if route == "upload"
            else b'{"fn_index":0,"session_hash":"x","data":["'
        )
        for _ in range(400):
            sent += 1 << 20
            yield b"a" * (1 << 20)

    with socket.create_connection(("127.0.0.1", httpx.URL(address).port), timeout=30) as connection:
        head = f"POST /gradio_api/{route} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {form}\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        with contextlib.suppress(ConnectionError):
            for part in dribble():
                connection.sendall(b"%x\r\n%b\r\n" % (len(part), part))
        answer = b""
        with contextlib.suppress(ConnectionError):
            answer = connection.recv(100)
    assert answer.startswith(b"HTTP/1.1 413")
    assert sent < 100 << 20  # the other end stopped reading
    assert httpx.get(address).status_code == 200


def test_what_is_uploaded_lies_in_a_folder_of_its_own(address):
    (path,) = httpx.post(f"{address}/gradio_api/upload", files={"files": ("x.html", b"<script>1</script>")}).json()
    assert "openblip-demo-" in path
    response = httpx.get(f"{address}/gradio_api/file={path}")
    assert response.headers["content-disposition"].startswith("attachment")
    assert response.headers["x-content-type-options"] == "nosniff"


def post_raw(address: str, image: dict) -> str:
    """What the page is told when a question names this for an image, without anything being uploaded."""
    config = httpx.get(f"{address}/config").json()
    (number,) = [one["id"] for one in config["dependencies"] if one["api_name"] == "match"]
    body = {"fn_index": number, "data": [image, "a star"], "session_hash": os.urandom(6).hex()}
    assert httpx.post(f"{address}/gradio_api/queue/join", json=body).status_code == 200
    with httpx.stream("GET", f"{address}/gradio_api/queue/data", params={"session_hash": body["session_hash"]},
                      timeout=60) as stream:  # fmt: skip
        for line in stream.iter_lines():
            if "process_completed" in line:
                return line
    raise AssertionError("no answer")


@pytest.mark.parametrize("given", [
    {"path": "/etc/passwd"}, {"path": "http://example.com/x.png"}, {"path": "https://93.184.216.34/x.png"},
    {"path": "/etc/passwd", "url": "data:image/png;base64,AAAA"}, {"path": str(Path(__file__).resolve())},
    {"path": "nowhere", "url": "http://169.254.169.254/"},
])  # fmt: skip
def test_a_question_cannot_name_files_or_addresses(address, abroad, given):
    body = post_raw(address, given | {"meta": {"_type": "gradio.FileData"}})
    assert '"success":false' in body
    assert "root:" not in body
    assert "Traceback" not in body
    assert abroad == []


@pytest.mark.parametrize("case", [name for name in HOSTILE if name != "6 MB"])
def test_files_that_are_no_images_get_a_friendly_line(client, tmp_path, case):
    content, message = HOSTILE[case]
    (tmp_path / "p.png").write_bytes(content)
    shown = client.predict(handle_file(tmp_path / "p.png"), "a star", api_name="/match")
    assert shown.startswith('<p role="alert" class="problem"><b>Please check:</b> this image cannot be used: ')
    assert message in shown
    assert str(tmp_path) not in shown
    assert "Traceback" not in shown


def test_an_error_of_ours_tells_no_details(client, whole, images, monkeypatch, capfd):
    def fall(*_):
        raise RuntimeError("the secret is /root/secret")

    monkeypatch.setattr(whole, "match", fall)
    shown = client.predict(handle_file(images / "p1.png"), "a star", api_name="/match")
    assert "Something went wrong" in shown
    assert "secret" not in shown
    assert "the secret is" in capfd.readouterr().err


def test_twenty_at_once_all_get_their_own_answer(client, whole, images):
    paths = [str(images / f"p{i % IMAGES}.png") for i in range(20)]
    expected = {path: demo_page.matches(whole.match(path, "\n".join(TEXTS))) for path in set(paths)}
    assert len(set(expected.values())) == IMAGES
    with ThreadPoolExecutor(20) as pool:
        match = lambda path: client.predict(handle_file(path), "\n".join(TEXTS), api_name="/match")  # noqa: E731
        assert list(pool.map(match, paths)) == [expected[path] for path in paths]


def test_local_or_not():
    assert all(map(is_local, ("127.0.0.1", "localhost", "::1", "[::1]", "127.3.2.1")))
    assert not any(map(is_local, ("0.0.0.0", "::", "192.168.1.2", "example.com", "")))


# In a browser ---------------------------------------------------------------------------------------------------------


class Page:
    """The page, opened; everything that it asks for is kept."""

    def __init__(self, browser, address: str) -> None:
        self.address, self.requests, self.errors = address, [], []
        self.view = browser.new_page()
        self.view.set_viewport_size({"width": 1280, "height": 900})
        self.view.set_default_timeout(60_000)
        self.view.on("request", lambda request: self.requests.append(request.url))
        self.view.on("pageerror", lambda error: self.errors.append(str(error)))
        self.view.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.view.goto(address)
        self.view.get_by_role("tab", name="Describe").wait_for()

    def tab(self, name: str) -> None:
        self.view.get_by_role("tab", name=name).click()

    def upload(self, path: Path | str) -> None:
        self.view.locator("input[type=file]").first.set_input_files(str(path))
        self.view.locator(".image-frame img, [data-testid=image] img, .image-container img").first.wait_for()

    def press(self, name: str) -> None:
        self.view.get_by_role("button", name=name, exact=True).click()

    def shot(self, name: str) -> None:
        """Keep a picture of the page where OPENBLIP_SHOTS says."""
        if os.environ.get("OPENBLIP_SHOTS"):
            self.view.wait_for_timeout(400)
            self.view.screenshot(path=f"{os.environ['OPENBLIP_SHOTS']}/{name}.png", full_page=True)

    def outside(self) -> list[str]:
        return [url for url in self.requests if not url.startswith((self.address, "data:", "blob:", "about:"))]


@pytest.fixture
def page(browser, address):
    page = Page(browser, address)
    yield page
    assert page.outside() == []
    assert page.errors == []
    page.view.close()


@pytest.mark.parametrize(("label", "method"), [("beam search", "beam"), ("nucleus sampling", "nucleus")])
def test_describe(page, whole, images, label, method):
    page.upload(images / "p3.png")
    page.view.get_by_text(label).first.click()
    page.press("Describe it")
    page.view.locator("#captions li").first.wait_for()
    captions = page.view.locator("#captions li").all_inner_texts()
    expected = whole.caption(str(images / "p3.png"), method, 3)
    assert len(captions) == 3
    for line, text in zip(captions, expected, strict=True):
        assert line.startswith(text.text)
        assert f"{text.logprob:.2f}" in line
    page.shot(f"describe-{method}")


def test_ask(page, whole, images):
    page.upload(images / "p3.png")
    page.tab("Ask")
    page.view.get_by_label("Question").fill(QUESTION)
    page.press("Ask it")
    best = whole.answer(str(images / "p3.png"), QUESTION, 5)
    page.view.locator("#answers td").first.wait_for()
    rows = page.view.locator("#answers tr").all_inner_texts()[1:]
    for row, answer in zip(rows, best, strict=True):
        assert row.startswith(answer.text)
        assert f"{100 * answer.probability:.1f}%" in row
    page.shot("ask")


def test_match(page, whole, images):
    page.upload(images / "p4.png")
    page.tab("Match")
    page.view.get_by_label("Texts to compare").fill("\n".join(TEXTS))
    page.press("Compare")
    page.view.locator("#matches td").first.wait_for()
    rows = page.view.locator("#matches tr").all_inner_texts()[1:]
    matches = sorted(whole.match(str(images / "p4.png"), "\n".join(TEXTS)), key=lambda one: -one[2])
    for row, (text, itc, itm) in zip(rows, matches, strict=True):
        assert text in row  # markup in it included
        assert f"{100 * itm:.1f}%" in row
        assert f"{itc:.3f}" in row
    page.shot("match")


def test_look(page, whole, images):
    page.upload(images / "p4.png")
    page.tab("Explain")
    page.view.get_by_label("Text to explain").fill(TEXTS[0])
    page.press("Show where")
    page.view.locator("#maps img").nth(3).wait_for()
    chance, shown = whole.explain_match(str(images / "p4.png"), TEXTS[0])
    assert f"{100 * chance:.1f}%" in page.view.locator("#looks").inner_text()
    legend = page.view.locator("#maps").inner_text()
    assert all(name in legend for name, _ in shown)
    assert page.view.locator("#maps img").first.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    page.shot("look")


def test_search(page, whole, images):
    page.tab("A folder")
    assert f"{IMAGES} images can be searched" in page.view.locator("#indexed").inner_text()
    page.view.get_by_label("Text to search for").fill(TEXTS[0])
    page.press("Search")
    page.view.locator("#found img").nth(IMAGES - 1).wait_for()
    hits = whole.search(TEXTS[0], 12)
    listed = page.view.locator("#found").inner_text()
    at = [
        listed.index(f"{n}. {hit.name}: match score {hit.score:.3f}, {100 * hit.itm:.1f}%")
        for n, hit in enumerate(hits, 1)
    ]
    assert at == sorted(at)
    for name in page.view.locator("#found figcaption").all():
        assert name.evaluate("e => e.scrollWidth <= e.clientWidth && getComputedStyle(e).textOverflow != 'ellipsis'")
    page.shot("search")
    (images / "new.png").write_bytes(png(77))
    try:
        page.press("Index new and changed images")
        page.view.get_by_text(f"{IMAGES + 1} images can be searched").wait_for()
    finally:
        (images / "new.png").unlink()
        whole.refresh()


def test_capfilt(page, whole):
    page.tab("A CapFilt run")
    page.press("Show")
    page.view.locator("#capfilt iframe").wait_for()
    frame = page.view.frame_locator("#capfilt iframe")
    frame.locator(".card").first.wait_for()
    report = json.loads(Path(whole.run, "report/strict/report.json").read_text())
    kept = sum(report["kept"].values())
    assert f"{kept:,} texts kept" in frame.locator("body").inner_text()
    assert frame.locator(".text.kept").count() > 0
    assert frame.locator(".text:not(.kept)").count() > 0
    assert page.view.locator("#capfilt iframe").get_attribute("sandbox") == "allow-scripts"
    slider = frame.locator("input[type=range]").first
    before = frame.locator("body").inner_text()
    slider.focus()
    for _ in range(12):
        page.view.keyboard.press("ArrowRight")
    assert frame.locator("body").inner_text() != before, "the slider works in its frame"
    inside = next(one for one in page.view.frames if one.parent_frame)
    assert inside.evaluate("origin") == "null"
    reached = inside.evaluate(f"fetch('{page.address}/config').then(() => 'reached', () => 'refused')")
    assert reached == "refused"
    page.errors.clear()  # of the fetch
    page.shot("capfilt")


def test_a_mistake_is_told_on_the_page(page, images, tmp_path):
    page.press("Describe it")
    problem = page.view.locator("#captions [role=alert]")
    problem.get_by_text("choose an image first").wait_for()
    assert problem.inner_text() == "Please check: choose an image first"
    assert page.view.get_by_text("Error", exact=True).count() == 0
    (tmp_path / "page.png").write_bytes(b"<!doctype html><html></html>")
    page.view.locator("input[type=file]").first.set_input_files(str(tmp_path / "page.png"))
    page.view.wait_for_timeout(500)
    page.press("Describe it")
    page.view.get_by_text("is an HTML page").wait_for()
    page.shot("mistake")
    page.view.close()


def test_a_large_image_is_told_of_before_it_is_sent(browser, address, tmp_path):
    page = Page(browser, address)
    (tmp_path / "large.png").write_bytes(png(1) + b"\0" * 6_000_000)
    page.view.locator("input[type=file]").first.set_input_files(str(tmp_path / "large.png"))
    page.view.get_by_text(re.compile("exceed|too large|maximum", re.IGNORECASE)).first.wait_for()
    assert page.outside() == []
    page.view.close()


def test_without_more_than_a_model_it_says_what_is_needed(browser, model, abroad):  # noqa: F811
    with serving(Demo(load(model, "cpu", "auto"))) as address:
        page = Page(browser, address.rstrip("/"))
        for tab, option in (("Ask", "--vqa"), ("A folder", "--folder"), ("A CapFilt run", "--capfilt")):
            page.tab(tab)
            page.view.get_by_text(option).first.wait_for()
        assert page.outside() == []
        page.view.close()


@pytest.fixture(scope="module")
def of_the_world(model, whole):  # noqa: F811
    """A page whose model has seen nothing but synthetic shapes."""
    shapes = dataclasses.replace(load(model, "cpu", "auto"), trained_on=(SYNTHETIC,))
    made = Demo(shapes, run=str(whole.run), names=["demo/<b>model"])
    made.index = whole.index
    with serving(made) as address:
        yield address.rstrip("/")


def test_it_names_its_models_and_what_they_were_trained_on(of_the_world, page, browser):
    assert "what it was trained on is not recorded" in page.view.locator("#models").inner_text()
    assert page.view.locator("#examples").count() == 0
    other = Page(browser, of_the_world)
    text = other.view.locator("#models").inner_text()
    assert text == "demo/<b>model: trained on synthetic shapes; on photographs its answers mean nothing."
    other.view.close()


def test_examples_and_everything_else_by_keyboard(of_the_world, browser):
    """From the first tab to a caption of an example without a mouse."""
    page = Page(browser, of_the_world)
    focused = lambda: page.view.evaluate(  # noqa: E731
        "(e => e.getAttribute('aria-label') || e.innerText || e.getAttribute('placeholder') || e.type || '')"
        "(document.activeElement).trim()"
    )
    page.view.locator("#examples button").nth(3).wait_for()
    names = []
    for _ in range(60):
        page.view.keyboard.press("Tab")
        names.append(focused())
        if names[-1] == "Example 2":
            page.view.keyboard.press("Enter")
            page.view.locator("[data-testid=image] img, .image-frame img, .image-container img").first.wait_for()
        if names[-1] == "Describe it":
            break
    assert [name for name in names if name.startswith("Example")] == [f"Example {n}" for n in range(1, 5)]
    assert {"An image", "Describe"} <= set(names), names
    page.view.keyboard.press("Enter")
    page.view.locator("#captions li").first.wait_for()
    assert page.outside() == []
    page.view.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_can_be_read_on_phones_and_desktops(of_the_world, browser, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = Page(context, of_the_world)
    page.view.locator("#examples button[aria-label]").nth(3).wait_for()
    page.view.set_viewport_size({"width": width, "height": 900})

    def check(where: str) -> None:
        page.view.wait_for_timeout(600)  # until what fades in is there
        faults = [one for one in axe.run(page.view).response["violations"] if one["impact"] in ("serious", "critical")]
        shown = [(one["id"], [node["html"][:160] for node in one["nodes"]]) for one in faults]
        assert not shown, (where, shown)
        assert page.view.evaluate("document.documentElement.scrollWidth") <= width, where

    check("at the start")
    page.press("Describe it")
    page.view.locator("#captions [role=alert]").wait_for()
    check("after a mistake")
    page.view.locator("#examples button").first.click()
    page.press("Describe it")
    page.view.locator("#captions li").first.wait_for()
    check("captions")
    for tab in ("Ask", "Match", "Explain", "A folder", "A CapFilt run"):
        page.tab(tab)
        check(tab)
    context.close()


# The command ----------------------------------------------------------------------------------------------------------

OFFLINE = """
import socket, sys
real, look_up = socket.socket.connect, socket.getaddrinfo
def refuse(where):
    open("connections", "a").write(f"{where}\\n")
    raise OSError("no network here")
def connect(self, address):
    near = self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1")
    return real(self, address) if near else refuse(address)
socket.socket.connect = connect
near = (None, "127.0.0.1", b"127.0.0.1", "localhost")
socket.getaddrinfo = lambda host, *more, **named: look_up(host, *more, **named) if host in near else refuse(host)
from blip.app import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_the_command_needs_no_network_and_leaves_nothing(model, images, tmp_path, sent, status):  # noqa: F811
    shutil.copytree(images, tmp_path / "photos", ignore=shutil.ignore_patterns(".*"))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    environment |= {"TMPDIR": str(tmp_path), "HTTP_PROXY": "http://127.0.0.1:9", "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(
        [sys.executable, "-c", OFFLINE, "demo", "--model", model, "--folder", "photos"],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background has it ignored
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        match = re.match(r"(http://127\.0\.0\.1:\d+)/? shows the page", line)
        assert match, line + process.stderr.read()
        assert httpx.get(match[1], trust_env=False).status_code == 200
        (folder,) = tmp_path.glob("openblip-demo-*")
        process.send_signal(sent)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status, err
    assert "Traceback" not in err
    assert not folder.exists()
    assert not (tmp_path / "connections").exists()
    assert json.loads((tmp_path / "photos/.blip-index/index.json").read_text())["format"] == "openblip-index"
