"""The words that docs/words.md rules out stand nowhere."""

import ast
import io
import re
import subprocess
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "words.md"
FOLDERS = ("blip", "capfilt", "eval", "recipes", "benchmarks", "tests")
DATA = re.compile(r"a picture of\b")
"""What is said to a model."""
SAYS = ("blip/world/", "tests/world/")
"""Where strings that are no docstrings are what the synthetic world says of its images."""


def banned():
    rows = [row.strip("|").split("|")[0].strip() for row in PAGE.read_text().splitlines() if row.startswith("| ")]
    assert rows[0] == "not"
    assert len(rows) > 5
    return rows[1:]


def parts(name):
    """A name as words: `found_rows` and `FoundRows` are "found rows"."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)).lower()


def said(source, path):
    """(line, text) of all that a file of Python says: its names, comments and docstrings, and strings of words."""
    docs = {
        (node.value.lineno, node.value.col_offset)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_said = token.type == tokenize.STRING and " " in token.string and not path.startswith(SAYS)
        if token.type == tokenize.NAME:
            yield token.start[0], parts(token.string)
        elif is_said or token.type == tokenize.COMMENT or token.start in docs:
            yield token.start[0], token.string


def faults(path, texts, words):
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, words)) + r")\b", re.IGNORECASE)
    for line, text in texts:
        for match in pattern.finditer(DATA.sub("", text)):
            yield f"{path}:{line}: {match[0]}"


def files(*endings):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    names = listed if any(listed) else [str(path.relative_to(ROOT)) for path in ROOT.rglob("*")]
    return [name for name in names if name.endswith(endings) and (ROOT / name).is_file()]


def test_a_fault_is_seen():
    source = 'def show_pictures(x):\n    """Of a picture."""\n    return "picture"  # from nothing\n'
    found = list(faults("x.py", said(source, "blip/x.py"), banned()))
    assert found == ["x.py:1: pictures", "x.py:2: picture", "x.py:3: from nothing"]
    assert list(faults("x.py", [(1, "say 'a picture of ' first")], banned())) == []


def test_no_python_says_them():
    names = [name for name in files(".py") if name.startswith(FOLDERS) and Path(name) != Path("tests/test_words.py")]
    assert len(names) > 250
    found = [fault for name in names for fault in faults(name, said((ROOT / name).read_text(), name), banned())]
    assert found == []


def test_no_page_or_configuration_says_them():
    names = [name for name in files(".md", ".rst", ".yaml", ".toml", "Makefile") if name != "docs/words.md"]
    assert len(names) > 50
    found = [
        fault
        for name in names
        for fault in faults(name, enumerate((ROOT / name).read_text().splitlines(), 1), banned())
    ]
    assert found == []
