"""Files from the hub: the cache first, and no waiting for a hub that is out of reach."""

import socket
import time

import pytest

from blip import hub


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
