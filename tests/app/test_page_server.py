"""The server of a page: for this machine's browser, with the secret of its address, and for nobody else."""

import contextlib
import http.client
import json
import socket
import threading
import time

import pytest

from blip.app.html.serve import LARGEST, PageServer


def page(_):
    return "a page \ud800"


def save(given):
    if given.get("id") == "wrong":
        raise ValueError("a wrong id")
    if given.get("id") == "gone":
        raise KeyError("it is gone")
    if given.get("id") == "full":
        raise OSError(28, "No space left on device")
    return {"saved": given}


@pytest.fixture(scope="module")
def server():
    server = PageServer(
        {"GET /": page, "GET /image": lambda given: b"\xff\xd8" + given["n"].encode(), "POST /label": save}
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def ask(server, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path, body, headers or {})
    reply = connection.getresponse()
    return reply.status, reply.read(), reply.headers


def origin(server):
    return {"Origin": f"http://127.0.0.1:{server.server_port}"}


def test_a_page_an_image_and_an_answer(server):
    at = f"/{server.secret}"
    assert server.address == f"http://127.0.0.1:{server.server_port}{at}/"
    status, body, headers = ask(server, "GET", f"{at}/")
    assert (status, body) == (200, b"a page ?")
    assert headers["Referrer-Policy"] == "no-referrer"  # the address has the secret
    assert headers["Cache-Control"] == "no-store"
    assert ask(server, "GET", f"{at}/image?n=7")[:2] == (200, b"\xff\xd87")
    status, body, _ = ask(server, "POST", f"{at}/label", json.dumps({"id": "é"}), origin(server))
    assert (status, json.loads(body)) == (200, {"saved": {"id": "é"}})
    local = {"Host": f"localhost:{server.server_port}", "Origin": f"http://localhost:{server.server_port}"}
    assert ask(server, "POST", f"{at}/label", "{}", local)[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": None},
    ],
)
def test_other_hosts_and_origins_are_refused(server, headers):
    headers = {k: v for k, v in {**origin(server), **headers}.items() if v is not None}
    status, body, _ = ask(server, "POST", f"/{server.secret}/label", "{}", headers)
    assert (status, json.loads(body)) == (403, {"error": "only pages of this server may ask it"})
    if headers.get("Host") or headers.get("Origin") in ("null", "http://evil.example"):
        assert ask(server, "GET", f"/{server.secret}/", None, headers)[0] == 403


@pytest.mark.parametrize("path", ["/", "", "/wrong/", "/{}x/", "/{}/other", "/{}/label", "/{}/../", "/%C3%A9/"])
def test_nothing_without_the_secret(server, path):
    status, body, _ = ask(server, "GET", path.format(server.secret) or "/x")
    assert (status, json.loads(body)) == (404, {"error": "there is no such page"})


def test_bodies_are_small_and_plain(server):
    def post(body, **headers):
        return ask(server, "POST", f"/{server.secret}/label", body, origin(server) | headers)[0]

    assert post(b"x" * (LARGEST + 1)) == 413
    assert post(b" " * (LARGEST - 2) + b"{}") == 200
    assert post(None, **{"Content-Length": "9" * 400}) == 413
    assert post(None, **{"Content-Length": "-1"}) == 411
    assert post(iter([b"{}"])) == 411  # chunked
    assert post(b"[") == post(b"[]") == post(b"\xff") == post(b"[" * 60_000) == 400


def test_errors_are_said(server):
    def post(what):
        status, body, _ = ask(server, "POST", f"/{server.secret}/label", json.dumps({"id": what}), origin(server))
        return status, json.loads(body)["error"]

    assert post("wrong") == (400, "a wrong id")
    assert post("gone") == (404, "it is gone")
    assert post("full") == (500, "OSError: [Errno 28] No space left on device")


def test_who_says_nothing_holds_up_nobody(server):
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            silent = stack.enter_context(socket.create_connection(("127.0.0.1", server.server_port)))
            silent.sendall(b"GET /")
        before = time.monotonic()
        assert ask(server, "GET", f"/{server.secret}/")[0] == 200
        assert time.monotonic() - before < 5


def test_a_port_that_is_taken(server):
    with pytest.raises(ValueError, match=f"port {server.server_port} .* give another --port"):
        PageServer({}, server.server_port)
    with pytest.raises(ValueError, match="give another --port"):
        PageServer({}, 99999)
