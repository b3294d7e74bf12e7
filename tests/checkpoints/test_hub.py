"""Files and models from the hub: the cache first, and no waiting for a hub that is out of reach."""

import hashlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from test_cli import model  # noqa: F401

import blip
from blip import hub
from blip.checkpoints import checkpoint


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def listening(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield server


def test_a_cached_file_needs_no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: str(tmp_path / "config.json"))
    monkeypatch.setattr(hub, "in_reach", lambda: pytest.fail("asked the network"))
    assert hub.file("someone/model", "config.json", "--model") == tmp_path / "config.json"


def test_in_reach(listening, monkeypatch):
    assert hub.in_reach()
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    assert not hub.in_reach()


def test_a_slow_lookup_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(hub.socket, "create_connection", lambda *_: time.sleep(1) or socket.socket())
    start = time.perf_counter()
    assert not hub.in_reach(0.2)
    assert time.perf_counter() - start < 0.9


def test_a_proxy_is_taken_to_work(monkeypatch):
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not hub.in_reach()
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    assert hub.in_reach()


def test_a_failed_download_says_what_to_do(listening, monkeypatch):
    def refuse(*_):
        raise OSError("404 Client Error\nand more lines")

    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    with pytest.raises(FileNotFoundError, match="404 Client Error") as error:
        hub.file("someone/model", "model.safetensors", "--model")
    message = str(error.value)
    assert "hf download someone/model model.safetensors" in message
    assert "--model" in message
    assert "\n" not in message


# Models ---------------------------------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """A hub with one repository, whose revisions are folders: its commits are the SHA-1 of their names."""

    def __init__(self, revisions):
        super().__init__(("127.0.0.1", 0), Requests)
        self.revisions, self.fetched = revisions, []

    def commit(self, revision):
        return hashlib.sha1(revision.encode()).hexdigest()

    def files(self, commit):
        folder = next(folder for name, folder in self.revisions.items() if commit in (name, self.commit(name)))
        return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


class Requests(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET(content=False)

    def do_GET(self, content=True):
        hub, parts = self.server, self.path.partition("?")[0].strip("/").split("/")
        if parts[:4] == ["api", "models", "org", "name"] and parts[4] == "revision":
            name = "/".join(parts[5:]).replace("%2F", "/")
            if name not in hub.revisions:
                self.answer(404, {"X-Error-Code": "RevisionNotFound"})
            else:
                info = {"_id": "0", "id": "org/name", "sha": hub.commit(name), "siblings": []}
                self.answer(200, {"Content-Type": "application/json"}, json.dumps(info).encode())
        elif parts[:5] == ["api", "models", "org", "name", "tree"]:
            listed = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": digest(path)}
                for name, path in hub.files(parts[5]).items()
            ]
            self.answer(200, {"Content-Type": "application/json"}, json.dumps(listed).encode())
        elif parts[:3] == ["org", "name", "resolve"]:
            name, path = "/".join(parts[4:]), hub.files(parts[3])["/".join(parts[4:])]
            data = path.read_bytes()
            headers = {"ETag": f'"{digest(path)}"', "X-Repo-Commit": parts[3], "Content-Length": str(len(data))}
            if content:
                hub.fetched.append(name)
            self.answer(200, headers, data, content)
        else:
            self.answer(404, {})

    def answer(self, status, headers, data=b"", content=True):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if content:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


def digest(path):
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def serving(monkeypatch, tmp_path):
    """Serve folders as revisions of org/name, with an empty cache."""
    servers = []
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def serve(**revisions):
        server = Hub(revisions)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(hub.constants, "ENDPOINT", place)
        template = place + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        return server

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def variant(folder, target, temperature):
    """A copy of a model folder with another temperature."""
    network, words = blip.from_pretrained(folder)
    network.temperature.data.fill_(temperature)
    blip.save_pretrained(network, words, target)
    return target


def offline(monkeypatch):
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")


def test_a_repository_is_downloaded_once_and_whole(model, serving, tmp_path, monkeypatch):  # noqa: F811
    main = variant(model, tmp_path / "main", 0.5)
    (main / "sub").mkdir()
    for name in ("sub/model.safetensors", "sub/config.json", "pytorch_model.bin", "run.py", "optimizer.pt"):
        (main / name).write_bytes(b"x")
    (main / "answers.json").write_text('["yes"]')
    server = serving(main=main, **{"v1.0": variant(model, tmp_path / "old", 0.25)})
    assert blip.from_pretrained("org/name")[0].temperature == 0.5
    wanted = {
        "README.md",
        "answers.json",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sorted(server.fetched) == sorted(wanted), "each once, and nothing else"
    assert blip.load("org/name", revision="v1.0", device="cpu").model.temperature == 0.25
    assert blip.load("org/name@v1.0").path == checkpoint.locate("org/name", "v1.0")
    with pytest.raises(FileNotFoundError, match="org/name@gone cannot be downloaded") as error:
        blip.load("org/name@gone")
    assert "hf download org/name --revision gone" in str(error.value)
    assert "\n" not in str(error.value)
    fetched = list(server.fetched)
    offline(monkeypatch)
    monkeypatch.setattr(hub, "in_reach", lambda: pytest.fail("asked the network"))
    assert blip.from_pretrained("org/name@v1.0")[0].temperature == 0.25
    assert blip.load("org/name").model.temperature == 0.5
    assert server.fetched == fetched


def test_pickled_weights_come_only_where_there_are_no_others(model, serving, tmp_path):  # noqa: F811
    main = variant(model, tmp_path / "main", 0.5)
    (main / "model.safetensors").unlink()
    torch.save({}, main / "pytorch_model.bin")
    server = serving(main=main)
    folder = checkpoint.locate("org/name")
    assert (folder / "pytorch_model.bin").is_file()
    assert "pytorch_model.bin" in server.fetched


def test_an_interrupted_download_is_continued(model, serving, tmp_path):  # noqa: F811
    server = serving(main=variant(model, tmp_path / "main", 0.5))
    weights = checkpoint.locate("org/name") / "model.safetensors"
    weights.unlink()
    server.fetched.clear()
    assert blip.from_pretrained("org/name")[0].temperature == 0.5
    assert set(server.fetched) <= {"model.safetensors"}


@pytest.mark.parametrize("name", ["org/name", "org/name@v1"])
def test_offline_there_is_one_line_with_one_remedy(monkeypatch, tmp_path, name):
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    offline(monkeypatch)
    load, start = blip.load, time.perf_counter()
    with pytest.raises(FileNotFoundError, match=f"^{name} is not in the local cache") as error:
        load(name)
    assert time.perf_counter() - start < 2
    message = str(error.value)
    assert message.count("hf download") == 1
    assert f"hf download org/name{' --revision v1' * name.endswith('@v1')}`" in message
    assert "\n" not in message


def test_a_name_leads_nowhere_else(model, tmp_path, monkeypatch):  # noqa: F811
    """Neither a name nor a revision is a path; a folder of that name wins."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "folder", lambda *_: pytest.fail("asked the hub"))
    for name in ("org/name@../../etc", "org/name@v1/../x", "org/name@", "org/name@.hidden", "org/../name", "a/b/c@v"):
        with pytest.raises(FileNotFoundError, match="is not a model directory"):
            blip.load(name)
    for revision in ("../../etc", "", "a b", ".x", "x/../../y", "/etc", "v1\n"):
        with pytest.raises(ValueError, match="is not a branch, tag or commit"):
            blip.load("org/name", revision=revision)
    with pytest.raises(ValueError, match="contradicts org/name@v1"):
        blip.from_pretrained("org/name@v1", revision="v2")
    with pytest.raises(ValueError, match="is a local path"):
        blip.load(model, revision="v1")
    for name in ("org/name@v1", "me@home"):
        variant(model, Path(name), 0.125)
        assert blip.load(name).model.temperature == 0.125
    for name in ("", "  ", None):
        with pytest.raises(ValueError, match="no model: give a model directory"):
            blip.load(name)


def test_revisions_are_names_of_git():
    assert hub.parsed("org/name@refs/pr/12") == ("org/name", "refs/pr/12")
    assert hub.parsed("org/na-me.x@v1.0") == ("org/na-me.x", "v1.0")
    assert hub.parsed("org/name") == ("org/name", None)
    assert hub.parsed("name") is None
