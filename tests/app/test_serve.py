"""`blip serve`: a real client on loopback gets what the commands print, and what it may not have is refused."""

import base64
import contextlib
import http.client
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from PIL import Image
from test_cli import lines, model, photos, png  # noqa: F401

import blip
from blip import installed
from blip.app import cli
from blip.app.loaded import open_model
from blip.app.service import Models, Served, Service
from blip.app.web import WAITING, is_local
from blip.checkpoints import checkpoint
from blip.inference.answering import ANSWERS
from blip.models.presets import TINY
from blip.models.vqa import Vqa

TEXTS = ["a red circle", "two small stars", "a blue moon"]
QUESTION = "What colour is the circle?"


@pytest.fixture(scope="module")
def vqa_model(model, tmp_path_factory) -> str:  # noqa: F811
    where = tmp_path_factory.mktemp("vqa") / "model"
    loaded, tokenizer = blip.from_pretrained(model)
    checkpoint.save_pretrained(Vqa.from_blip(loaded), tokenizer, where)
    (where / ANSWERS).write_text(json.dumps(["red", "blue", "a circle", "two", "yes", "no"]))
    return str(where)


class Server:
    """A `blip serve` of its own process."""

    def __init__(self, *args: str, **environment: str) -> None:
        self.errors: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "blip.app.cli", "serve", "--port", "0", *args],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(blip.__file__).parents[1]), **environment},
        )  # fmt: skip
        self.reader = threading.Thread(target=lambda: self.errors.extend(self.process.stderr), daemon=True)
        self.reader.start()
        self.line = self.process.stdout.readline()
        match = re.match(r"(http://[\d.]+:(\d+)) ", self.line)
        assert match, self.line + "".join(self.errors)
        self.address, self.port = match[1], int(match[2])
        self.before = httpx.get(f"{self.address}/health", timeout=60)

    def wait(self) -> "Server":
        for _ in range(600):
            if httpx.get(f"{self.address}/health", timeout=60).status_code == 200:
                return self
            time.sleep(0.1)
        raise AssertionError("".join(self.errors))

    def post(self, route: str, image: bytes | None = None, **fields) -> httpx.Response:
        files = [("image", ("photo", image))] if image is not None else []
        for name, value in fields.items():
            files += [(name, (None, str(one))) for one in (value if isinstance(value, list) else [value])]
        return httpx.post(f"{self.address}/v1/{route}", files=files, timeout=60)

    def json(self, route: str, **fields) -> httpx.Response:
        if isinstance(fields.get("image"), bytes):
            fields["image"] = base64.b64encode(fields["image"]).decode()
        return httpx.post(f"{self.address}/v1/{route}", json=fields, timeout=60)

    def stop(self, sent: int = signal.SIGTERM) -> int:
        self.process.send_signal(sent)
        status = self.process.wait(60)
        self.reader.join(10)
        return status


@contextlib.contextmanager
def serving(*args: str, **environment: str):
    server = Server(*args, **environment)
    try:
        yield server.wait()
    finally:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def server(model, vqa_model):  # noqa: F811
    with serving("--model", model, "--vqa", vqa_model) as server:
        yield server
        assert not [line for line in server.errors if "Traceback" in line]


@pytest.fixture
def printed(model, vqa_model, photos, monkeypatch, capfd):  # noqa: F811
    """What a command prints of an image as JSON."""

    def printed(command: str, *args: str) -> dict:
        chosen = vqa_model if command == "vqa" else model
        assert cli.main([command, *map(str, args), "--json", "--device", "cpu", "--model", chosen]) == 0
        (line,) = lines(capfd.readouterr().out)
        return line

    return printed


def problem(response: httpx.Response) -> tuple[int, str, str]:
    (error,) = response.json().values()
    assert set(error) == {"code", "message"}
    assert "\n" not in error["message"]
    assert "Traceback" not in error["message"]
    return response.status_code, error["code"], error["message"]


# What the commands print ----------------------------------------------------------------------------------------------


def test_it_says_where_it_is_and_is_healthy_once_loaded(server):
    assert re.fullmatch(
        r"http://127\.0\.0\.1:\d+ serves \S+/model once it is loaded; press Ctrl-C to stop\n", server.line
    )
    assert server.before.status_code == 503
    assert server.before.headers["retry-after"].isdigit()
    health = httpx.get(f"{server.address}/health").json()
    assert health["status"] == "ok"
    assert health["waiting"] == 0
    assert re.fullmatch("[0-9a-f]{16}", health["revision"])


@pytest.mark.parametrize("options", [
    {}, {"num": 3}, {"method": "nucleus", "num": 4, "seed": 7}, {"num": 2, "prompt": "a small"}, {"prompt": ""},
])  # fmt: skip
def test_captions_are_those_of_the_command(server, printed, options):
    args = [part for name, value in options.items() for part in ("--" + name, str(value))]
    for name in ("p2.png", "p7.png"):
        line, image = printed("caption", f"photos/{name}", *args), png(int(name[1]))
        for response in (server.post("caption", image, **options), server.json("caption", image=image, **options)):
            reply = response.json()
            assert response.status_code == 200, reply
            assert set(reply) == {"captions", "model"}
            assert [one["text"] for one in reply["captions"]] == line["captions"]
            assert [one["logprob"] for one in reply["captions"]] == pytest.approx(line["logprob"], abs=6e-4)
            assert [one["finished"] for one in reply["captions"]] == line["finished"]


def test_answers_are_those_of_the_command(server, printed):
    line = printed("vqa", "photos/p3.png", QUESTION, "--top", "4")
    reply = server.post("answer", png(3), question=QUESTION, top=4).json()
    assert [one["text"] for one in reply["answers"]] == line["answers"]
    assert [one["probability"] for one in reply["answers"]] == pytest.approx(line["probability"], abs=2e-5)
    assert len(server.json("answer", image=png(3), question=QUESTION).json()["answers"]) == 1


def test_matches_are_those_of_the_command(server, printed):
    line = printed("match", "photos/p4.png", *TEXTS)
    for response in (server.post("match", png(4), texts=TEXTS), server.json("match", image=png(4), texts=TEXTS)):
        reply = response.json()
        assert set(reply) == {"itc", "itm", "model"}
        assert reply["itc"] == pytest.approx(line["itc"], abs=2e-5)
        assert reply["itm"] == pytest.approx(line["itm"], abs=2e-5)


def test_embeddings_are_those_of_python(server, model):  # noqa: F811
    loaded = blip.load(model, device="cpu")
    (row,) = server.post("embed", png(5)).json()["embeddings"]
    assert row == pytest.approx(loaded.embed_image(png(5))[0].tolist(), abs=1e-5)
    rows = server.json("embed", texts=TEXTS).json()["embeddings"]
    assert torch.tensor(rows).allclose(loaded.embed_text(TEXTS), atol=1e-5)
    assert server.post("embed", texts=TEXTS[:1]).json()["embeddings"] == [pytest.approx(rows[0], abs=1e-5)]


def test_several_clients_share_batches_and_each_gets_its_own(server, model):  # noqa: F811
    loaded = blip.load(model, device="cpu")
    prompts = ["a picture of ", "", "a small"]
    captions = {(i, p): loaded.caption(png(i), prompt=p, num=2) for i in range(6) for p in prompts}
    matches = {i: loaded.match(png(i), TEXTS[: 1 + i % 3]).itc[0].tolist() for i in range(6)}
    assert len(set(map(tuple, captions.values()))) > 6

    def one(number: int) -> None:
        i, prompt = number % 6, prompts[number % 3]
        if number % 4 == 3:
            reply = server.post("match", png(i), texts=TEXTS[: 1 + i % 3]).json()
            assert reply["itc"] == pytest.approx(matches[i], abs=1e-5)
        elif number % 8 == 5:
            assert problem(server.post("caption", png(i), prompt="a " * 90, num=2))[0] == 400
        else:
            reply = server.post("caption", png(i), prompt=prompt, num=2).json()
            assert [one["text"] for one in reply["captions"]] == captions[i, prompt]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(64)))


def test_the_page_about_it_is_true(server, photos, monkeypatch):  # noqa: F811
    """Its commands and its program get what it says, and its table has the routes that there are."""
    monkeypatch.chdir(photos)
    (photos / "photo.jpg").write_bytes(png(1))
    page = (Path(blip.__file__).parents[1] / "docs/serving.md").read_text()
    here = page.replace("http://127.0.0.1:8000", server.address)
    (program,) = re.findall(r"```python\n(.*?)```", here, re.DOTALL)
    names: dict = {}
    exec(program, names)  # our own page
    assert len(names["captions"]) == 3
    assert len(names["embedding"]) == TINY.embed_dim
    commands = [shlex.split(line) for line in here.splitlines() if line.startswith("curl ")]
    assert len(commands) == 4
    if shutil.which("curl"):
        for command in commands:
            done = subprocess.run(command, capture_output=True, check=True)
            assert "error" not in json.loads(done.stdout), done.stdout
    routes = httpx.get(server.address + "/openapi.json").json()["paths"]
    assert set(re.findall(r"^\| (?:GET|POST) (\S+)", page, re.MULTILINE)) == {*routes, "/openapi.json"}
    for route in ("caption", "answer", "match", "embed"):
        (fields,) = re.findall(rf"^\| POST /v1/{route} \| (.*?) \|", page, re.MULTILINE)
        forms = routes[f"/v1/{route}"]["post"]["requestBody"]["content"]
        assert set(re.findall(r"`(\w+)`", fields)) - {"beam", "nucleus"} == set(
            forms["application/json"]["schema"]["properties"]
        )


# What is refused ------------------------------------------------------------------------------------------------------

BITMAP = io.BytesIO()
Image.new("1", (7000, 3000)).save(BITMAP, "PNG")

WRONG = {
    "too many captions": ("caption", {"num": 11}, "num: input should be less than or equal to 10, got"),
    "no captions": ("caption", {"num": 0}, "num: input should be greater than or equal to 1"),
    "no number": ("caption", {"num": "three"}, "num: input should be a valid integer"),
    "half a caption": ("caption", {"num": 1.5}, "num: input should be a valid integer"),
    "an unknown method": ("caption", {"method": "magic"}, "method: input should be 'beam' or 'nucleus'"),
    "a large seed": ("caption", {"seed": 1 << 70}, "seed: "),
    "a field that is none": ("caption", {"nume": 3}, "there is no field 'nume'; give image, num"),
    "an unknown prompt": ("caption", {"prompt": "собака"}, "does not know"),
    "a long prompt": ("caption", {"prompt": "a " * 100}, "a prompt of"),
    "a longer prompt": ("caption", {"prompt": "a" * 2001}, "at most 2000 characters"),
    "no question": ("answer", {}, "question is missing"),
    "a question without words": ("answer", {"question": " ! "}, "question: it has no words"),
    "no answers": ("answer", {"question": "a", "top": 0}, "top: "),
    "no texts": ("match", {}, "texts is missing"),
    "too many texts": ("match", {"texts": ["a"] * 21}, "at most 20 items"),
    "a text without words": ("match", {"texts": ["a", "!!"]}, "cannot be compared"),
    "a text of unknown words": (
        "match",
        {"texts": ["a star", "красная звезда"]},
        "all word pieces of 'красная звезда'",
    ),
    "a question of unknown words": ("answer", {"question": "где звезда?"}, "all word pieces of the question"),
    "a long text": ("match", {"texts": ["a" * 2001]}, "text 1 has 2,001 characters"),
    "image and texts": ("embed", {"texts": ["a"]}, "either image or texts"),
}


@pytest.mark.parametrize("form", ["post", "json"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_fields_are_named(server, case, form):
    route, fields, message = WRONG[case]
    given = {"image": png(1), **fields}
    status, code, text = problem(getattr(server, form)(route, **given))
    assert (status, code) == (400, "invalid_request")
    assert message in text


def test_unknown_words_are_not_embedded(server):
    status, code, text = problem(server.json("embed", texts=["a star", "звезда"]))
    assert (status, code) == (400, "invalid_request")
    assert "'звезда' are unknown to this model's tokenizer" in text


def test_unknown_words_are_noted_in_the_answer(server):
    note = "1 of 3 word pieces of {} are unknown to this model's tokenizer".format
    for route, given in (("match", {"image": png(1)}), ("embed", {})):
        reply = server.post(route, texts=["a star", "a red звезда"], **given).json()
        assert reply["notes"] == [note("'a red звезда'")]
        assert "notes" not in server.post(route, texts=["a star", "a red circle"], **given).json()
    reply = server.json("answer", image=png(1), question="what colour звезда?").json()
    assert reply["notes"] == [note("the question 'what colour звезда?'")]
    assert reply["answers"] == server.json("answer", image=png(1), question="what colour луна?").json()["answers"]
    assert "notes" not in server.json("answer", image=png(1), question=QUESTION).json()
    assert "notes" not in server.json("embed", image=png(1)).json()
    schemas = httpx.get(server.address + "/openapi.json").json()["components"]["schemas"]
    noted = {name: schema for name, schema in schemas.items() if "notes" in schema["properties"]}
    assert set(noted) == {"AnswersReply", "MatchReply", "EmbedReply"}
    for schema in noted.values():
        assert "notes" not in schema["required"]
        assert schema["properties"]["notes"]["items"] == {"type": "string"}


@pytest.mark.parametrize("fields", [
    {"num": True}, {"num": "2"}, {"num": 2.0}, {"num": [2]}, {"num": math.inf}, {"prompt": 3}, {"prompt": "\ud800"},
    {"prompt": ["a"]}, {"image": 3}, {"image": ["AAAA"]}, {"image": "%%%"}, {"image": "http://127.0.0.1/x.png"},
    {"image": "/etc/passwd"}, {"image": ""}, {"image": None}, {"image": {"path": "/etc/passwd"}},
])  # fmt: skip
def test_json_of_the_wrong_types(server, fields):
    body = json.dumps({"image": base64.b64encode(png(1)).decode(), **fields})
    response = httpx.post(f"{server.address}/v1/caption", content=body, headers={"content-type": "application/json"})
    assert problem(response)[:2] in ((400, "invalid_request"), (415, "not_an_image")), fields


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b'{"num": 1' + b"0" * 5000 + b"}"]
)
def test_bodies_that_are_no_json_object(server, body):
    response = httpx.post(f"{server.address}/v1/caption", content=body, headers={"content-type": "application/json"})
    assert problem(response)[0] == 400


def test_what_is_null_is_not_given(server):
    expected = server.json("caption", image=png(1)).json()
    assert server.json("caption", image=png(1), num=None, prompt=None, seed=None).json() == expected
    wrapped = base64.encodebytes(png(1)).decode()  # as the program base64 writes it
    assert server.json("caption", image=wrapped).json() == expected


def test_forms_that_are_off(server):
    url = f"{server.address}/v1/caption"
    assert problem(httpx.post(url, files={"image": (None, "photo.jpg")}))[2].startswith("image: expected a file")
    assert "image is missing" in problem(httpx.post(url, files={"num": (None, "1")}))[2]
    twice = httpx.post(url, files=[("image", png(1)), ("num", (None, "1")), ("num", (None, "2"))])
    assert "'num' is given twice" in problem(twice)[2]
    assert problem(httpx.post(url, files=[("image", png(1)), ("image", png(2))]))[0] == 400
    assert problem(httpx.post(url, data={"num": "1"}))[:2] == (415, "unknown_form")
    assert problem(httpx.post(url, content=b"x"))[:2] == (415, "unknown_form")
    broken = httpx.post(url, content=b"--y", headers={"content-type": "multipart/form-data"})
    assert problem(broken)[:2] == (400, "invalid_request")
    fields = {f"f{i}": (None, "1") for i in range(500)}
    assert problem(httpx.post(url, files=fields))[0] == 400


def bomb() -> bytes:
    """A PNG of 20 million pixels by its header, and of many more bytes than such an image has."""
    part = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))  # noqa: E731
    head = part(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + part(b"IDAT", zlib.compress(b"\0" * 1_000_000)) + part(b"IEND", b"")


def test_what_is_no_image_and_what_is_too_large(server):
    for content in (b"<!doctype html><html></html>", b"%PDF-1.7", b"\0" * 100, png(1)[:-40], b"<svg></svg>"):
        assert problem(server.post("caption", content))[0] == 415
        assert problem(server.json("caption", image=content))[0] == 415
    assert problem(server.post("caption", b""))[0] == 400
    assert problem(server.post("caption", BITMAP.getvalue()))[:2] == (413, "too_many_pixels")
    assert problem(server.post("caption", bomb()))[:2] == (413, "too_many_pixels")
    assert problem(server.post("caption", png(1) + b"\0" * 5_500_000))[:2] == (413, "too_large")
    assert problem(server.post("caption", png(1) + b"\0" * (5 << 20)))[:2] == (413, "too_many_bytes")


@pytest.mark.parametrize("form", ["application/json", "multipart/form-data; boundary=XX", "text/plain"])
def test_a_chunked_body_of_100_mb_is_not_read(server, form):
    before = psutil.Process(server.process.pid).memory_info().rss
    sent, begin = 0, b'--XX\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        head = f"POST /v1/caption HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {form}\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        with contextlib.suppress(ConnectionError):
            for i in range(100):
                part = (begin if not i else b"") + b"a" * (1 << 20)
                connection.sendall(b"%x\r\n%b\r\n" % (len(part), part))
                sent += 1 << 20
        answer = b""
        with contextlib.suppress(ConnectionError):
            answer = connection.recv(100)
    if form == "text/plain":  # refused without reading it; what comes is dropped
        assert answer.startswith((b"HTTP/1.1 415", b"HTTP/1.1 413"))
    else:
        assert answer.startswith(b"HTTP/1.1 413")
        assert sent < 50 << 20
    assert psutil.Process(server.process.pid).memory_info().rss - before < 40 << 20
    assert server.post("caption", png(1)).status_code == 200


@pytest.mark.parametrize("length", ["104857600", "-1", "1e9", "9" * 30])
def test_a_length_that_is_too_large_or_none(server, length):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        head = "POST /v1/caption HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())
        assert re.match(rb"HTTP/1.1 4(00|13)", connection.recv(100))


@pytest.mark.parametrize("headers", [
    {"host": "evil.example"}, {"host": "evil.example:8000"}, {"host": "127.0.0.1.evil.example"}, {"host": ""},
    {"origin": "http://evil.example"}, {"origin": "null"},
])  # fmt: skip
def test_other_names_and_origins_are_refused(server, headers):
    for route in ("/health", "/openapi.json"):
        assert problem(httpx.get(server.address + route, headers=headers))[:2] == (403, "forbidden")


def test_routes(server):
    for name in ("localhost", "LocalHost"):
        assert httpx.get(server.address + "/health", headers={"host": f"{name}:{server.port}"}).status_code == 200
    for path in ("/docs", "/redoc", "/", "/v1", "/health/", "/static/x", "/%2e%2e/etc/passwd"):
        assert problem(httpx.get(server.address + path))[:2] == (404, "no_such_route")
    assert problem(httpx.get(server.address + "/v1/caption"))[:2] == (405, "wrong_method")
    schema = httpx.get(server.address + "/openapi.json").json()
    assert set(schema["paths"]) == {"/v1/caption", "/v1/answer", "/v1/match", "/v1/embed", "/health"}
    forms = schema["paths"]["/v1/caption"]["post"]["requestBody"]["content"]
    assert set(forms) == {"multipart/form-data", "application/json"}
    assert set(forms["application/json"]["schema"]["properties"]) == {"image", "num", "prompt", "seed", "method"}
    assert forms["application/json"]["schema"]["required"] == ["image"]
    assert "http" not in json.dumps(schema)


def test_a_model_without_the_parts(vqa_model):
    service = Service(batch=4, wait=0)
    service.models = Models(Served(open_model(vqa_model, device="cpu"), "org/vqa"))
    assert service.models.verbs == ("answer",)
    with running(service) as client:
        for route in ("caption", "match", "embed"):
            status, code, message = problem(client(f"/v1/{route}", files={"image": png(1)}))
            assert (status, code) == (422, "not_supported")
            assert "org/vqa" in message
        assert client("/v1/answer", files={"image": png(1)}, data={"question": "a"}).status_code == 200


def test_captions_only_have_no_questions(model):  # noqa: F811
    service = Service(batch=4, wait=0)
    service.models = Models(Served(open_model(model, device="cpu"), "a/model"))
    with running(service) as client:
        status, _, message = problem(client("/v1/answer", files={"image": png(1)}, data={"question": "a"}))
        assert status == 422
        assert "--vqa DIR" in message


@contextlib.contextmanager
def running(service: Service):
    """A service in this process; gives a function that posts to it."""
    import uvicorn

    opened = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(service.app, log_level="warning", lifespan="off"))
    threading.Thread(target=service.batches.run, daemon=True).start()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
    thread.start()
    address = f"http://127.0.0.1:{opened.getsockname()[1]}"
    try:
        yield lambda path, **more: httpx.post(address + path, timeout=60, **more)
    finally:
        server.should_exit = True
        thread.join()


# Under load -----------------------------------------------------------------------------------------------------------


def test_more_than_64_are_sent_away_and_the_others_are_answered(model, monkeypatch):  # noqa: F811
    service = Service(batch=4, wait=0)
    service.models = Models(Served(open_model(model, device="cpu"), "a/model"))
    begun, free = threading.Event(), threading.Event()
    work = service.models.work

    def slow(kind, items):
        begun.set()
        assert free.wait(60)
        return work(kind, items)

    monkeypatch.setattr(service.models, "work", slow)
    with running(service) as client, ThreadPoolExecutor(WAITING + 1) as pool:
        request = lambda: client("/v1/embed", json={"texts": ["a star"]})  # noqa: E731
        first = pool.submit(request)
        assert begun.wait(60)
        others = [pool.submit(request) for _ in range(WAITING)]
        for _ in range(600):
            if service.batches.waiting == WAITING:
                break
            time.sleep(0.05)
        assert service.batches.waiting == WAITING
        response = client("/v1/embed", json={"texts": ["a star"]})
        assert problem(response)[:2] == (503, "busy")
        assert int(response.headers["retry-after"]) >= 1
        free.set()
        assert {one.result().status_code for one in (first, *others)} == {200}
        assert service.batches.waiting == 0


def test_an_error_of_ours_tells_no_details_and_hurts_nobody_else(model, monkeypatch, capfd):  # noqa: F811
    service = Service(batch=8, wait=0.2)
    service.models = Models(Served(open_model(model, device="cpu"), "a/model"))
    work = service.models.work

    def falls(kind, items):
        if any("bad" in texts for texts in items):
            raise RuntimeError("the secret is /root/secret")
        if any("nan" in texts for texts in items):
            return [[[math.nan]] for _ in items]
        return work(kind, items)

    monkeypatch.setattr(service.models, "work", falls)
    texts = [["a star"], ["bad"], ["a circle"], ["nan"]]
    with running(service) as client, ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda some: client("/v1/embed", json={"texts": some}), texts[:3]))
        assert [one.status_code for one in replies] == [200, 500, 200]
        assert "secret" not in replies[1].text
        assert "the secret is" in capfd.readouterr().err
        assert problem(client("/v1/embed", json={"texts": ["nan"]}))[:2] == (500, "not_finite")
        assert service.batches.waiting == 0


def test_requests_of_a_kind_go_through_together(model, monkeypatch):  # noqa: F811
    service = Service(batch=5, wait=0.5)
    service.models = Models(Served(open_model(model, device="cpu"), "a/model"))
    sizes, work = [], service.models.work
    monkeypatch.setattr(service.models, "work", lambda kind, items: sizes.append(len(items)) or work(kind, items))
    with running(service) as client, ThreadPoolExecutor(10) as pool:
        request = lambda _: client("/v1/caption", files={"image": png(1)}).json()  # noqa: E731
        replies = list(pool.map(request, range(10)))
    assert sizes == [5, 5]
    assert all(reply == replies[0] for reply in replies)


# The command ----------------------------------------------------------------------------------------------------------


def test_sigterm_finishes_what_is_in_work_and_the_log_has_no_content(model):  # noqa: F811
    with serving("--model", model, "--wait-ms", "1500") as server:
        with ThreadPoolExecutor(1) as pool:
            reply = pool.submit(server.post, "embed", None, texts=["a purple secret"])
            time.sleep(0.5)  # it waits for others by now
            assert httpx.get(f"{server.address}/health?key=secret").json()["waiting"] == 1
            assert server.stop() == 0
            assert len(reply.result().json()["embeddings"]) == 1
        with pytest.raises(httpx.ConnectError):
            server.post("embed", texts=["a star"])
        log = "".join(server.errors)
    assert re.search(r"^127\.0\.0\.1 POST /v1/embed 200 \d+ ms$", log, re.MULTILINE)
    assert "secret" not in log
    assert "Traceback" not in log


def test_ctrl_c(model):  # noqa: F811
    with serving("--model", model) as server:
        assert server.stop(signal.SIGINT) == 130
        assert "Traceback" not in "".join(server.errors)


def test_it_writes_no_file(model, tmp_path):  # noqa: F811
    """So that it runs where everything but the folder of temporary files is read-only."""
    program = tmp_path / "watch.py"
    program.write_text(
        "import os, sys\n"
        "def watch(event, args):\n"
        "    writes = event == 'open' and isinstance(args[1], str) and set(args[1]) & set('wax+')\n"
        "    writes = writes or event == 'open' and args[1] is None and args[2] & (os.O_WRONLY | os.O_RDWR)\n"
        "    if writes or event in ('os.mkdir', 'os.rename', 'tempfile.mkstemp', 'tempfile.mkdtemp'):\n"
        "        if str(args[0]) != os.devnull: print('WRITES', event, args, file=sys.stderr, flush=True)\n"
        "sys.addaudithook(watch)\n"
        "from blip.app import cli\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    noise = io.BytesIO()
    Image.frombytes("RGB", (1100, 1100), random.Random(1).randbytes(1100 * 1100 * 3)).save(noise, "PNG")
    assert len(noise.getvalue()) > 3_000_000  # more than is kept in memory of most forms
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(blip.__file__).parents[1])}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(program), "serve", "--port", "0", "--model", model]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        address = process.stdout.readline().split()[0]
        for _ in range(600):
            if httpx.get(f"{address}/health", timeout=60).status_code == 200:
                break
            time.sleep(0.1)
        response = httpx.post(f"{address}/v1/caption", files={"image": noise.getvalue()}, timeout=60)
        assert response.status_code == 200, response.text
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    begin, _, served = stderr.partition("ready: ")
    assert "WRITES" not in served, served
    writes = [line for line in begin.splitlines() if "WRITES" in line]
    assert all(str(tmp_path) in line or "torchinductor" in line for line in writes), writes  # by import torch


def refused(capfd, *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["serve", *map(str, args)])
    err = capfd.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_without_fastapi_it_says_what_to_install(monkeypatch, capfd, model):  # noqa: F811
    real = installed._version
    monkeypatch.setattr(installed, "_version", lambda name: None if name == "fastapi" else real(name))
    message = refused(capfd, "--model", model)
    assert "blip serve needs fastapi>=" in message
    assert "it is not installed" in message


def test_wrong_use_is_one_line(capfd, model):  # noqa: F811
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen at 127.0.0.1 port {port}" in refused(capfd, "--model", model, "--port", port)
    assert "cannot listen at 192.0.2.1" in refused(capfd, "--model", model, "--host", "192.0.2.1")
    assert "port must be 65535 or less" in refused(capfd, "--model", model, "--port", "70000")
    assert "port must be 0 or more" in refused(capfd, "--port", "-1")
    assert "batch must be 1 or more" in refused(capfd, "--batch", "0")
    assert "wait_ms must be 0 or more" in refused(capfd, "--wait-ms", "-1")


@pytest.mark.parametrize(("args", "message"), [
    (("--model", "nothere"), "nothere"), ((), "no model"), (("--vqa", "MODEL"), "recipes.vqa"),
])  # fmt: skip
def test_a_model_that_cannot_be_served_ends_it(model, args, message):  # noqa: F811
    args = [model if arg == "MODEL" else arg for arg in args]
    given = ["--model", model, *args] if "--vqa" in args else args
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLIP_MODEL"}
    done = subprocess.run([sys.executable, "-m", "blip.app.cli", "serve", "--port", "0", *given], env=environment,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def test_local_or_not():
    assert all(map(is_local, ("127.0.0.1", "localhost", "::1", "[::1]", "127.3.2.1")))
    assert not any(map(is_local, ("0.0.0.0", "::", "192.168.1.2", "example.com", "")))


# The long version -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fifty_clients_and_a_thousand_requests(model, vqa_model, capsys):  # noqa: F811
    """No error, memory stays flat, and everybody gets what the model gives alone."""
    loaded, vqa = blip.load(model, device="cpu"), blip.load(vqa_model, device="cpu")
    images = {i: png(i) for i in range(12)}
    sampled = {i: loaded.caption(images[i], num=2, decode="nucleus", seed=i) for i in images}
    likely = {i: loaded.caption(images[i]) for i in images}
    fits = {i: loaded.match(images[i], TEXTS).itc[0].tolist() for i in images}
    answered = {i: vqa.answer(images[i], QUESTION) for i in images}

    with serving("--model", model, "--vqa", vqa_model) as server:
        process, seconds = psutil.Process(server.process.pid), []

        def post(connection: http.client.HTTPConnection, route: str, **fields) -> dict:
            began = time.monotonic()
            connection.request("POST", f"/v1/{route}", json.dumps(fields), {"content-type": "application/json"})
            response = connection.getresponse()
            reply = json.loads(response.read())
            seconds.append(time.monotonic() - began)
            assert response.status == 200, reply
            return reply

        def client(number: int, count: int = 20) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
            for turn in range(count):
                i = (number + 7 * turn) % 12
                sent = {"image": base64.b64encode(images[i]).decode()}
                match (number + turn) % 4:
                    case 0:
                        reply = post(connection, "caption", **sent)
                        assert reply["captions"][0]["text"] == likely[i]
                    case 1:
                        sent |= {"num": 2, "method": "nucleus", "seed": i}
                        reply = post(connection, "caption", **sent)
                        assert [one["text"] for one in reply["captions"]] == sampled[i]
                    case 2:
                        reply = post(connection, "match", texts=TEXTS, **sent)
                        assert reply["itc"] == pytest.approx(fits[i], abs=1e-5)
                    case 3:
                        reply = post(connection, "answer", question=QUESTION, **sent)
                        assert reply["answers"][0]["text"] == answered[i]

        with ThreadPoolExecutor(50) as pool:
            list(pool.map(client, 3 * [*range(50)]))  # the first thousands fill the allocator's caches
            before, began = process.memory_info().rss, time.monotonic()
            seconds.clear()
            list(pool.map(client, range(50)))
        took, after = time.monotonic() - began, process.memory_info().rss
        seconds.sort()
        with capsys.disabled():
            print(f"\n{len(seconds)} requests of 50 clients in {took:.1f} s: {len(seconds) / took:.0f} a second, p50 "
                  f"{1000 * seconds[500]:.0f} ms, p95 {1000 * seconds[950]:.0f} ms; memory {before >> 20} -> "
                  f"{after >> 20} MiB")  # fmt: skip
        assert len(seconds) == 1000
        assert after - before < 32 << 20
        assert not [line for line in server.errors if "Traceback" in line]
