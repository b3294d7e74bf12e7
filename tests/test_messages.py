"""What messages and pages advise exists: packages that are on an index, pages of the documentation by their titles."""

import ast
import re
from pathlib import Path

import pytest

from blip import installed
from blip.errors import DOCS

ROOT = Path(__file__).parent.parent
SOURCES = [path for name in ("blip", "capfilt", "eval", "recipes") for path in sorted((ROOT / name).rglob("*.py"))]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TITLES = {page.read_text().splitlines()[0].removeprefix("# ") for page in PAGES}


def strings(path):
    """String constants of a file, the parts of an f-string joined, without docstrings."""
    tree = ast.parse(path.read_text())
    skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if id(node) in skipped or id(node) in parts:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        if isinstance(node, ast.JoinedStr):
            values = [
                one.value if isinstance(one, ast.Constant) else f"{{{ast.unparse(one.value)}}}" for one in node.values
            ]
            yield "".join(map(str, values))


def test_no_message_and_no_page_names_this_project_as_a_package():
    assert len(SOURCES) > 100
    wrong = [f"{path.relative_to(ROOT)}: {word}" for path in [*SOURCES, *PAGES, *(ROOT / "recipes").rglob("*.yaml")]
             for word in re.findall(r"openblip\[.*|install openblip\b.*", path.read_text())]  # fmt: skip
    assert wrong == []


def test_messages_name_pages_by_title_and_address():
    texts = [(path, text) for path in SOURCES for text in strings(path)]
    assert [str(path) for path, text in texts if re.search(r"docs/\w+\.md", text)] == []
    named = [title for _, text in texts for title in re.findall(r'"([^"]+)" at \{DOCS\}', " ".join(text.split()))]
    assert len(named) >= 2
    assert set(named) <= TITLES
    assert re.fullmatch(r"https://[\w.-]+(/[\w.-]+)*", DOCS)


@pytest.mark.parametrize(
    ("extra", "command"),
    [
        ("demo", "pip install 'gradio>=6.22'"),
        ("video", "pip install 'av>=14'"),
        ("serve", "pip install 'fastapi>=0.115' 'uvicorn>=0.30' 'python-multipart>=0.0.18'"),
        ("none", "pip install -e '.[none]' in the checkout"),
    ],
)
def test_the_command_that_installs_an_extra(extra, command):
    assert installed.remedy(extra) == command


def test_a_checkout_that_is_not_installed_gets_a_command_too(monkeypatch):
    monkeypatch.setattr(installed, "PROJECT", "no-such-project-here")
    assert installed.remedy("demo") == "pip install -e '.[demo]' in the checkout"
