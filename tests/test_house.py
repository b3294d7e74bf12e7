"""The layout: which folder may import which, and calls that nobody makes."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"blip", "capfilt", "eval", "recipes", "benchmarks", "tests"}
MAY_IMPORT = {
    "blip": {"blip"},
    "eval": {"blip", "eval"},
    "capfilt": {"blip", "capfilt"},
    "recipes": {"blip", "capfilt", "eval", "recipes"},
}
ROOMS = {"timm": 3, "transformers": 2, "accelerate": 2, "datasets": 3}
"""In how many files of the library a large dependency may be named."""


def modules(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_arrows_point_one_way(folder):
    assert modules(folder)
    for path in modules(folder):
        ours = {name.split(".")[0] for name in imports(path)} & OURS
        assert ours <= MAY_IMPORT[folder], f"{path} imports {ours - MAY_IMPORT[folder]}"


CHAPTERS = ("nn", "models", "objectives", "train", "inference", "checkpoints", "data", "world", "app")
"""Chapters of the library in the order of reading: each imports itself and those before it."""
FOUNDATION = {
    *("startup", "errors", "settings", "processes", "files", "lock", "progress", "tensors", "dist", "hub", "options"),
    *("installed", "keyed", "origin", "text", "tokenizer"),
}
"""Files beside the chapters, which import no chapter; `tokenizer` may import the first."""


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def graph():
    """Each of our modules -> those that it imports, anywhere in the file and for type checkers, too."""
    paths = {name_of(path): path for folder in MAY_IMPORT for path in modules(folder)}
    imported = {}
    for name, path in paths.items():
        tree = ast.parse(path.read_text())
        targets = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                targets |= inside & set(paths) or {node.module}
                if not inside <= set(paths):
                    targets.add(node.module)
        imported[name] = (targets & set(paths)) - {name}
    return imported


def chapter_of(name):
    """Place of a module of the library in the order, 0 for the foundation."""
    parts = name.split(".")
    if len(parts) == 1:
        return len(CHAPTERS)  # the public names
    if parts[1] in CHAPTERS:
        return 1 + CHAPTERS.index(parts[1])
    assert parts[1] in FOUNDATION, f"{name} is in no chapter"
    return 1 if parts[1] == "tokenizer" else 0


def test_chapters_import_only_what_comes_before():
    imported = graph()
    ours = [name for name in imported if name.split(".")[0] == "blip"]
    assert {name.split(".")[1] for name in ours if "." in name} == {*CHAPTERS, *FOUNDATION}
    wrong = [
        f"{name} imports {other}"
        for name in ours
        for other in imported[name]
        if chapter_of(other) > chapter_of(name) or (chapter_of(name) == 0 and other == "blip.tokenizer")
    ]
    assert wrong == []


def circles(imported):
    """Groups of modules each of which reaches all the others (Tarjan's strongly connected components)."""
    index, low, stack, groups = {}, {}, [], []

    def visit(name):
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in imported[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = set()
            while name not in group:
                group.add(stack.pop())
            groups.append(frozenset(group))

    for name in imported:
        if name not in index:
            visit(name)
    return {group for group in groups if len(group) > 1}


def test_no_files_import_each_other():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == {frozenset("abc")}
    assert circles(graph()) == set()


def test_no_two_public_classes_have_one_name():
    places = {}
    for folder in MAY_IMPORT:
        for path in modules(folder):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert len(places) > 200
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


def test_tests_mirror_the_chapters():
    """A folder of tests for each chapter and package, and nothing else but what several of them share."""
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders - {"numbers"} == {*CHAPTERS, *MAY_IMPORT} - {"blip"}


@pytest.mark.parametrize("package", ROOMS)
def test_a_large_dependency_is_named_in_few_files(package):
    users = [path for path in modules("blip") if package in {name.split(".")[0] for name in imports(path)}]
    assert 1 <= len(users) <= ROOMS[package], users


def test_nobody_rebinds_the_builtin_eval():
    for folder in (*MAY_IMPORT, "tests", "benchmarks"):
        for path in modules(folder):
            assert "eval" not in set(imports(path)), f"{path}: write `from eval.x import y`"


def test_nothing_is_unpickled_or_executed():
    for folder in (*MAY_IMPORT, "benchmarks"):
        for path in modules(folder):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    check_call(path, node)


def check_call(path, node):
    name = ast.unparse(node.func)
    where = f"{path}:{node.lineno} {name}"
    words = {keyword.arg: keyword.value for keyword in node.keywords}
    assert name not in {"eval", "exec", "pickle.load", "pickle.loads", "os.system"}, where
    assert not name.endswith(("extractall", "register_for_checkpointing")), where
    assert not name.endswith("load_state_dict_from_url"), where
    if name == "torch.load":
        assert ast.unparse(words.get("weights_only", ast.Constant(False))) == "True", f"{where} without weights_only"
    if name == "yaml.load":
        assert [ast.unparse(arg) for arg in node.args[1:]] == ["_OneKeyLoader"], where
    if "trust_remote_code" in words:
        assert ast.unparse(words["trust_remote_code"]) == "False", where
    if "shell" in words:
        assert ast.unparse(words["shell"]) == "False", where
