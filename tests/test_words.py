"""The words that docs/words.md rules out stand nowhere, and those of its second table in no name."""

import ast
import io
import itertools
import re
import subprocess
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "words.md"
FOLDERS = ("blip", "capfilt", "eval", "recipes", "benchmarks", "tests")
DATA = re.compile(r"a picture of\b")
"""What is said to a model."""
WORLD = ("blip/world/", "tests/world/")
"""Where strings that are no docstrings are what the synthetic world says of its images."""
STAY = {
    ("blip/app/doctor.py", "said"),  # a key of what `blip doctor --json` prints
    ("recipes/building.py", "eye"),  # of the vision encoder
}
"""Names that stay for now: the list may only become shorter."""


def banned(heading):
    """Words in the left column of the table with that heading, which may have several, comma-separated."""
    lines = PAGE.read_text().splitlines()
    rows = itertools.takewhile(lambda line: line.startswith("| "), lines[lines.index(f"| {heading} | but |") + 2 :])
    words = [word.strip() for row in rows for word in row.split("|")[1].split(",")]
    assert len(words) > 5
    assert len(set(words)) == len(words)
    return words


def definitions(source):
    """(line, name) of all that a file of Python names: functions but tests, classes, parameters, variables, fields."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [] if node.name.startswith("test_") else [node.name]
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names = [node.id if isinstance(node, ast.Name) else node.attr]
        elif isinstance(node, ast.arg):
            names = [node.arg]
        elif isinstance(node, ast.alias):
            names = [node.asname]
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar):
            names = [node.name]
        elif isinstance(node, ast.MatchMapping):
            names = [node.rest]
        yield from ((node.lineno, name) for name in names if name)


def name_faults(source, words):
    """(line, name, word) of each definition whose name has one of some words; `held_out` is a word of its own."""
    pattern = re.compile(r"\b(" + "|".join(map(parts, words)) + r")\b")
    for line, name in definitions(source):
        if match := pattern.search(parts(name).replace("held out", "")):
            yield line, name, match[0]


def parts(name):
    """A name as words: `found_rows` and `FoundRows` are "found rows"."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)).lower()


def texts_of(source, path):
    """(line, text) of all that a file of Python says: its names, comments and docstrings, and strings of words."""
    docs = {
        (node.value.lineno, node.value.col_offset)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_prose = token.type == tokenize.STRING and " " in token.string and not path.startswith(WORLD)
        if token.type == tokenize.NAME:
            yield token.start[0], parts(token.string)
        elif is_prose or token.type == tokenize.COMMENT or token.start in docs:
            yield token.start[0], token.string


def faults(path, texts, words):
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, words)) + r")\b", re.IGNORECASE)
    for line, text in texts:
        for match in pattern.finditer(DATA.sub("", text)):
            yield f"{path}:{line}: {match[0]}"


def files(*suffixes):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    names = listed if any(listed) else [str(path.relative_to(ROOT)) for path in ROOT.rglob("*")]
    return [name for name in names if name.endswith(suffixes) and (ROOT / name).is_file()]


def test_a_fault_is_seen():
    source = 'def show_pictures(x):\n    """Of a picture."""\n    return "picture"  # from nothing\n'
    problems = list(faults("x.py", texts_of(source, "blip/x.py"), banned("not")))
    assert problems == ["x.py:1: pictures", "x.py:2: picture", "x.py:3: from nothing"]
    assert list(faults("x.py", [(1, "say 'a picture of ' first")], banned("not"))) == []


def test_no_python_says_them():
    names = [name for name in files(".py") if name.startswith(FOLDERS) and Path(name) != Path("tests/test_words.py")]
    assert len(names) > 250
    words = banned("not")
    problems = [fault for name in names for fault in faults(name, texts_of((ROOT / name).read_text(), name), words)]
    assert problems == []


def test_no_page_or_configuration_says_them():
    names = [name for name in files(".md", ".rst", ".yaml", ".toml", "Makefile") if name != "docs/words.md"]
    assert len(names) > 50
    words = banned("not")
    problems = [
        fault for name in names for fault in faults(name, enumerate((ROOT / name).read_text().splitlines(), 1), words)
    ]
    assert problems == []


def test_a_fault_in_a_name_is_seen():
    source = """
import a as found, b.said
from c import told
class Exam:
    told: int = 1
    def look_at(self, asked, *held, **tmp2): self.looked = 1
    def test_what_is_said(): pass
async def ask_again(held_out=1, *, stuff): pass
for foo, (fan, _) in x: alike: int = 1
with open(x) as endings: pass
try: pass
except E as tells: pass
eye = [ending for ending in x if (says := ending)]
SAID_FIRST, finding, founds, tmp_22 = x["found"], x.said, f(told=1), lambda looks: 1
match x:
    case {"a": asks, **saids}: pass
    case [*tell]: pass
"""
    seen = sorted((line, name) for line, name, _ in name_faults(source, banned("in no name")))
    assert seen == [
        *[
            (2, "found"),
            (4, "Exam"),
            (5, "told"),
            (6, "asked"),
            (6, "held"),
            (6, "look_at"),
            (6, "looked"),
            (6, "tmp2"),
        ],
        *[(8, "ask_again"), (8, "stuff"), (9, "alike"), (9, "fan"), (9, "foo"), (10, "endings"), (12, "tells")],
        *[(13, "ending"), (13, "eye"), (13, "says"), (14, "SAID_FIRST"), (14, "looks"), (16, "asks"), (17, "tell")],
    ]


def test_no_name_has_them():
    names, words = files(".py"), banned("in no name")
    assert len(names) > 250
    faults = [(path, *fault) for path in names for fault in name_faults((ROOT / path).read_text(), words)]
    assert [f"{path}:{line}: {name}" for path, line, name, _ in faults if (path, name) not in STAY] == []
    assert {(path, name) for path, _, name, _ in faults} == STAY, "take what is gone from the list"
