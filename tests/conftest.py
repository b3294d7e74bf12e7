"""Fixtures shared by the tests."""

import os
import shutil
from pathlib import Path

import pytest
import torch


def pytest_configure(config):
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1" if os.environ.get("PYTEST_XDIST_WORKER") else "2")))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real photographs, emoji and vocabularies; tests that need it skip without it."""
    folder = Path(os.environ.get("OPENBLIP_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("real data not at hand: set OPENBLIP_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """One piece per letter and digit."""
    from blip.tokenizer import Tokenizer  # here, because it is slow to import and few tests need it

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(vocab))
    return Tokenizer.load(path)


_QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="module")
def browser():
    """A Chromium that playwright drives; its tests are skipped where one of the two is missing."""
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        if not (chromium or os.path.exists(own)):
            pytest.skip("no chromium on this machine: `playwright install chromium` brings one")
        browser = playwright.chromium.launch(executable_path=chromium or own, args=_QUIET)
        yield browser
        browser.close()
