"""Options of all programs: one way to declare them, the same checks wherever they are given."""

import dataclasses
import re
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import pytest

from blip.app import cli
from blip.options import argument, content, docs, flat, option, options_of, read, verb, walk, written
from capfilt import __main__ as capfilt
from eval.__main__ import COMMANDS as MEASURES


@dataclass(frozen=True)
class Source:
    """Where something is."""

    path: str
    """File or folder."""
    weight: float = 1.0
    """Passes over it."""

    def __post_init__(self):
        if self.weight <= 0:
            raise ValueError(f"weight must be positive, got {self.weight}")


@dataclass(frozen=True)
class Train:
    """How to train."""

    batch_size: int = 8
    """Pairs at once."""
    lr: float | None = 0.1
    """Peak rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decays."""
    rule: Literal["old", "2022", "null"] = "old"
    """What counts."""


@dataclass(frozen=True)
class Shared:
    """What several share."""

    device: str = "auto"
    """Where it computes."""


@dataclass(frozen=True, kw_only=True)
class Run(Shared):
    """A run of 100% nothing."""

    out: str = option(metavar="DIR", was="to")
    """Folder."""
    quick: bool = False
    """Leave things out."""
    checks: bool = True
    """Look twice."""
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    """Seeds."""
    train: Train = Train(batch_size=4)
    """Training"""
    sources: list[Source] = field(default_factory=list)
    """What is read."""
    held_out: Source | None = None
    """What is measured on"""


def run(*args: str) -> Run:
    return read(Run, ["--out", "x", *map(str, args)], "try", files=True)


def refused(*args: str) -> str:
    with pytest.raises(ValueError, match=r"\A.+\Z") as error:  # one line
        run(*args)
    return str(error.value)


def config(folder: Path, content: str, name: str = "a.yaml") -> str:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    return str(path)


def test_what_is_given_arrives_and_the_rest_is_the_default():
    assert run() == Run(out="x", train=Train(batch_size=4))
    given = run("--train.lr", "1e-4", "--quick", "--checks", "no", "--seeds", "3", "4", "--train.betas", "0.5", "0.6")
    train = Train(batch_size=4, lr=1e-4, betas=(0.5, 0.6))
    assert given == Run(out="x", quick=True, checks=False, seeds=[3, 4], train=train)
    for words in (["--seeds", "[7, 8]"], ["--seeds", "[7,", "8]"], ["--seeds=[7, 8]"], ["--seeds", "7", "8"]):
        assert run(*words).seeds == [7, 8]
    assert run("--seeds", "7", "--seeds+", "8", "9").seeds == [7, 8, 9]
    assert isinstance(run("--train.lr", "2").train.lr, float)
    assert run("--train.lr", "null").train.lr is None
    assert run("--train.rule", "null").train.rule == "null", "a choice"


def test_words_of_a_name_are_joined_by_dashes_or_underscores():
    assert run("--train.batch-size", "3") == run("--train.batch_size", "3") == run("--train.batch_size=3")
    assert run("--held_out.path", "a_b") == run("--held-out.path", "a_b")
    assert run("--held_out.path", "a_b").held_out == Source("a_b")


def test_a_flag_stands_alone_or_says_yes_or_no():
    assert [run(*args).quick for args in (["--quick"], ["--quick", "true"], ["--quick=false"])] == [True, True, False]
    assert run("--quick", "--train.lr", "3").quick


def test_sections_are_laid_over_each_other_and_lists_are_replaced(tmp_path):
    first = config(tmp_path, "train: {lr: 1e-4, batch_size: 5}\nsources: [{path: a, weight: 5}]\nheld_out: {path: h}\n")
    then = config(tmp_path, "train: {lr: .inf}\nsources: [{path: b}]\nheld_out: null\n", "b.yaml")
    given = run("--config", first, "--config", then)
    assert given.train == Train(batch_size=5, lr=float("inf"))
    assert (given.sources, given.held_out) == ([Source("b")], None)
    assert run("--config", then, "--config", first).sources == [Source("a", 5.0)]
    assert run("--config", first, "--sources.weight", "2").sources == [Source("a", 2.0)]
    assert run("--config", first, "--sources+", "{path: c}").sources == [Source("a", 5.0), Source("c")]
    assert run("--train.batch_size", "9", "--config", first).train.batch_size == 5, "the later one counts"


WRONG = {
    "null": ("train: {batch_size: null}", "train.batch_size is null"),
    "a section without value": ("train:", "train is null"),
    "a name": ("train: {batchsize: 3}", "there is no option train.batchsize; did you mean train.batch_size?"),
    "a name in a list": ("sources: [{path: a, wight: 3}]", "did you mean sources.0.weight?"),
    "a word for a number": ("train: {batch_size: many}", "train.batch_size: expected a whole number, got 'many'"),
    "a fraction": ("train: {batch_size: 2.0}", "train.batch_size: expected a whole number, got 2.0"),
    "yes for a number": ("train: {batch_size: yes}", "expected a whole number, got True"),
    "yes for a fraction": ("train: {lr: true}", "train.lr: expected a number, got True"),
    "not a number": ("train: {lr: .nan}", "train.lr: expected a number, got nan"),
    "not a number in a list": ("train: {betas: [0.9, .nan]}", "train.betas.1: expected a number, got nan"),
    "a number for text": ("out: 2014", "out: expected text, got 2014"),
    "a number for yes": ("quick: 1", "quick: expected true or false, got 1"),
    "a list's length": ("train: {betas: [0.9]}", "train.betas: expected a list of 2 elements, got [0.9]"),
    "one for a list": ("seeds: 3", "seeds: expected a list, got 3"),
    "a choice": ("train: {rule: new}", "train.rule: expected one of old, 2022, null, got 'new'"),
    "a key twice": ("quick: true\nquick: false", ", line 2: duplicate key 'quick'"),
    "a key twice within": ("train:\n  lr: 1\n  lr: 2", ", line 3: duplicate key 'lr'"),
    "a former name": ("to: x", ": to is now called out"),
    "a date that is none": ("out: 2020-99-99", "month must be in 1..12"),
    "a program": ("out: !!python/object/apply:os.getcwd []", ", line 1: could not determine a constructor"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_file_that_will_not_do_is_named_with_the_option(tmp_path, what):
    content, message = WRONG[what]
    path = config(tmp_path, content)
    error = refused("--config", path)
    assert error.startswith(f"--config {path}")
    assert message in error


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--train.batch-size", "null"], "--train.batch-size is null; give a value, or leave it out"),
        (["--train.batch_size=1e3"], "--train.batch-size: expected a whole number, got '1e3'"),
        (["--train.batch-size", "٣"], "expected a whole number"),
        (["--train.lr", "nan"], "--train.lr: expected a number, got 'nan'"),
        (["--train.betas", "1", "2", "3"], "--train.betas: expected a list of 2 elements"),
        (["--train.betas", "[1, .nan]"], "--train.betas.1: expected a number, got nan"),
        (["--sources", "[{path: a, path: b}]"], "--sources: duplicate key 'path'"),
        (["--sources", "[{path: a, wight: 3}]"], "there is no option sources.0.wight; did you mean sources.0.weight?"),
        (["--sources", "[{weight: 3}]"], "--sources.0.path is required"),
        (["--held-out.weight", "3"], "--held_out.path is required"),
        (["--sources", "[{path: a, weight: -1}]"], "sources.0.weight must be positive, got -1.0"),
        (["--train.batchsize", "3"], "there is no option --train.batchsize; did you mean --train.batch-size?"),
        (["--train.batch", "3"], "did you mean --train.batch-size?"),
        (["--to", "y"], "--to is now called --out"),
        (["--to=y"], "--to is now called --out"),
        (["--quick", "maybe"], "unexpected argument 'maybe' (see try --help)"),
        (["--quick=maybe"], "--quick: expected true or false, got 'maybe'"),
        (["--train", "a.yaml"], "--train: expected a mapping of options, got 'a.yaml'"),
        (["--config"], "--config: expected one argument"),
    ],
)
def test_an_option_that_will_not_do_is_named(args, message):
    assert message in refused(*args)


def test_a_file_says_only_what_differs_from_its_base(tmp_path):
    config(tmp_path, "train: {lr: 1, batch_size: 2}\nseeds: [1, 2]\nsources: [{path: a, weight: 3}]\n", "deep.yaml")
    config(tmp_path / "in", "base: ../deep.yaml\ntrain: {lr: 2}\nseeds: [5]\n", "middle.yaml")
    top = config(tmp_path, "train: {rule: 2022}\nbase: in/middle.yaml\nsources: [{path: b}]\n", "top.yaml")
    expected = Run(out="x", train=Train(2, 2.0, rule="2022"), seeds=[5], sources=[Source("b")])
    assert run("--config", top) == expected
    assert run("--config", top, "--train.lr", "7").train.lr == 7
    assert run("--config", tmp_path / "in/middle.yaml").train == Train(2, 2.0)
    merged = {"train": {"lr": 2, "batch_size": 2, "rule": 2022}, "seeds": [5], "sources": [{"path": "b"}]}
    assert content(top) == merged


def test_a_base_is_checked_as_any_file(tmp_path):
    one = config(tmp_path, "base: two.yaml\n", "one.yaml")
    assert refused("--config", one) == f"--config {one}: base {tmp_path / 'two.yaml'}: no such file"
    two = config(tmp_path, "train: {lr: 1, lr: 2}\n", "two.yaml")
    assert f"base {two}, line 1: duplicate key 'lr'" in refused("--config", one)
    config(tmp_path, "train: {batchsize: 2}\n", "two.yaml")
    assert f"base {two}: there is no option train.batchsize" in refused("--config", one)
    config(tmp_path, "base: one.yaml\n", "two.yaml")
    assert f"base {two}: base one.yaml is itself based on this file; remove one of the two" in refused("--config", one)
    config(tmp_path, "base: in/../two.yaml\n", "two.yaml")
    assert "base in/../two.yaml is itself based on this file" in refused("--config", two)
    for wrong, message in (("base: null\n", "base is null"), ("base: [one.yaml]\n", "base: expected text")):
        config(tmp_path, wrong, "one.yaml")
        assert message in refused("--config", one)
    assert "there is no option train.base" in refused("--config", config(tmp_path, "train: {base: one.yaml}\n"))


def test_all_settings_are_printed_as_yaml(tmp_path, capsys):
    args = ["--train.betas", "0.5", "0.6", "--sources", "[{path: a}]", "--seeds", "[]"]
    with pytest.raises(SystemExit) as stop:
        run("--print-config", *args)
    assert not stop.value.code
    assert run("--config", config(tmp_path, capsys.readouterr().out)) == run(*args)


def test_help_is_complete_and_in_groups(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stop:
        read(Run, ["--help"], "try", files=True, examples="examples:\n  try --out x")
    assert not stop.value.code
    stdout = capsys.readouterr().out
    assert stdout.startswith("usage: try --out DIR [options]\n\nA run of 100% nothing.\n")
    assert stdout.endswith("examples:\n  try --out x\n")
    for line in (
        "  --out DIR                   Folder (required)\n",
        "  --quick                     Leave things out\n",
        "  --checks true|false         Look twice (default: true)\n",
        "  --seeds INT [INT ...]       Seeds (default: 0 1)\n",
        "\nWhat several share:\n  --device TEXT               Where it computes (default: auto)\n",
        "\ntrain: Training:\n",
        "  --train.batch-size INT      Pairs at once (default: 4)\n",
        "  --train.rule {old,2022,null}\n                              What counts (default: old)\n",
        "  --sources MAPPING [MAPPING ...]\n",
        "\neach of sources: What is read:\n  --sources.path TEXT         File or folder\n",
        "\nheld-out: What is measured on:\n",
        "  --held-out MAPPING          the whole section as inline YAML, or null for none\n",
    ):
        assert line in stdout, line


@dataclass(frozen=True, kw_only=True)
class Program:
    """What is given by place, several times, and as part of something else."""

    images: list[str] = argument("IMAGE")
    """Images."""
    question: str = argument("QUESTION")
    """Question."""
    template: list[str] = option(list, repeat=True)
    """Templates."""
    source: Source = flat(skip=("weight",))
    """Where"""
    train: dict[str, Any] = flat(part=Train)
    """What of the plan is said again"""
    replace: list[tuple[str, str]] = option(list, metavar="OLD NEW", repeat=True)
    """Two texts at a time"""
    deep: bool = True
    """Switch that is on"""


def test_arguments_repeated_options_and_flat_sections():
    given = read(Program, ["a", "null", "what?", "--path", "p", "--template", "[x]", "--template", "1"], "try")
    assert given == Program(images=["a", "null"], question="what?", template=["[x]", "1"], source=Source("p"), train={})
    given = read(Program, ["--path=p", "--lr", "2", "--batch_size=3", "--", "--a_b", "what?"], "try")
    assert (given.images, given.train) == (["--a_b"], {"lr": 2.0, "batch_size": 3})
    given = read(Program, ["a", "b", "--path=p", "--replace", "x y", "", "--no-deep", "--replace", "1", "2"], "try")
    assert (given.replace, given.deep) == ([("x y", ""), ("1", "2")], False)
    assert read(Program, ["a", "b", "--path=p", "--no_deep", "--deep"], "try").deep
    for args, message in (
        (["a"], "the following arguments are required: QUESTION"),
        (["a", "b"], "--path is required"),
        (["a", "b", "--weight", "2"], "there is no option --weight"),
        (["a", "b", "--path", "p", "--lr", "x"], "--lr: expected a number, got 'x'"),
        (["a", "b", "--path", "p", "--replace", "x"], "--replace: expected 2 arguments"),
        (["a", "b", "--path", "p", "--no-deep=false"], "there is no option --no-deep"),
    ):
        with pytest.raises(ValueError, match=message):
            read(Program, args, "try")


def test_the_first_word_is_one_of_the_verbs(capsys):
    verbs = {"caption": "say what images show", "vqa": "answer"}
    assert verb("try", ["vqa", "--help"], verbs, "About.") == "vqa"
    assert verb("try", ["--help"], verbs, "About.") is None
    assert "  caption  say what images show\n  vqa      answer\n" in capsys.readouterr().out
    for args, message in (([], "give one of caption, vqa"), (["captoin"], "did you mean caption?"), (["--x"], "'--x'")):
        with pytest.raises(ValueError, match=re.escape(message)):
            verb("try", args, verbs, "About.")


def test_options_are_written_as_they_were_read():
    kind = options_of(import_module("capfilt.commands.score"))
    args = [
        "run",
        "--batch",
        "4",
        "--also",
        "language",
        "--also",
        "mine.py:A=b c",
        "--allow-damaged",
        "--max-error-rate",
    ]
    args += ["0.5", "--precision", "bfloat16", "--no-lenient", "--prompt", "-- a ", "--image-size", "null"]
    chosen = read(kind, args, "capfilt score")
    assert written(chosen)[0] == "run"
    assert read(kind, written(chosen), "capfilt score") == chosen
    assert written(read(kind, ["run"], "capfilt score")) == ["run"]


# The programs ---------------------------------------------------------------------------------------------------------


def programs() -> dict[str, type]:
    """Each command line of blip, capfilt and blip-eval, and its options; the recipes' are in test_command.py."""
    ours = {("blip", name): f"blip.app.commands.{name}" for name in cli.COMMANDS}
    ours |= {("capfilt", name): f"capfilt.commands.{name.replace('-', '_')}" for name in capfilt.VERBS}
    options = {" ".join(words): options_of(import_module(module)) for words, module in ours.items()}
    measures = {name: kind for name, (kind, _) in MEASURES.items()}
    return options | {f"blip-eval {name}": kind for name, kind in measures.items()}


@pytest.mark.parametrize("name", programs())
def test_every_option_is_explained(name, capsys):
    kind = programs()[name]
    for one in walk(kind):
        if not dataclasses.is_dataclass(one.kind):
            assert docs(one.owner)[one.field.name], f"{name} --{one.name}"
    with pytest.raises(SystemExit):
        read(kind, ["--help"], name)
    stdout = capsys.readouterr().out
    for one in walk(kind):
        if "argument" not in one.field.metadata and not dataclasses.is_dataclass(one.kind):
            assert re.search(rf"^  --{re.escape(one.name)}( |$)", stdout, re.M), one.name


def test_one_thing_has_one_name():
    names = {name: {one.name: one.kind for one in walk(kind)} for name, kind in programs().items()}
    of_models = [options for options in names.values() if {"model", "captioner"} & options.keys()]
    assert len(of_models) >= 17
    assert all("precision" in options for options in of_models)
    assert all(str(options["precision"]) == str(of_models[0]["precision"]) for options in of_models)
    every = {option for options in names.values() for option in options}
    assert not every & {"dtype", "batch-size", "output", "amp"}
    assert {"batch", "device", "out", "seed", "limit", "json"} <= every


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["score", "x", "--dtype", "bfloat16"], "--dtype is now called --precision"),
        (["plan", "--out", "x", "--dtype=bfloat16"], "--dtype is now called --precision"),
        (["score", "x", "--batch-size", "4"], "--batch-size is now called --batch"),
        (["run", "--out", "x", "--batch_size", "4"], "--batch-size is now called --batch"),
    ],
)
def test_former_names_are_refused_with_those_of_today(args, message, capsys):
    assert capfilt.main(args) == 2
    assert message in capsys.readouterr().err


def test_help_loads_nothing_heavy():
    program = """
import contextlib, io, sys
from capfilt import __main__ as capfilt
from eval import __main__ as evaluations
heavy = {"torch", "transformers", "timm", "datasets", "yaml"}
with contextlib.redirect_stdout(io.StringIO()):
    assert capfilt.main(["--help"]) == 0
    evaluations.main(["--help"])
    assert not {*heavy, "numpy", "pyarrow"} & set(sys.modules), set(sys.modules)
    for main, names in ((capfilt.main, capfilt.VERBS), (evaluations.main, evaluations.COMMANDS)):
        for name in names:
            with contextlib.suppress(SystemExit):
                main([name, "--help"])
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
