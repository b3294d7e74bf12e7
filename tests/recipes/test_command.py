"""The command line: what is off is said in a line with status 2, what fits arrives in the run."""

import dataclasses
import re
import sys
import tomllib
import typing
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from blip import files
from blip.data.settings import SourceConfig
from blip.errors import DataError
from blip.lock import RunLocked
from recipes import __main__ as programs
from recipes import caption, command, dialogue, nlvr, pretrain, retrieval, vqa
from recipes.bootstrap.settings import BootstrapRun
from recipes.pretrain import PretrainRun

CONFIGS = Path(command.__file__).parent / "configs"
OPTIONS = Path(__file__).parents[1] / "options.txt"
RECIPES = {
    "bootstrap": BootstrapRun,
    "caption": caption.CaptionRun,
    "dialogue": dialogue.DialogueRun,
    "nlvr": nlvr.NlvrRun,
    "pretrain": pretrain.PretrainRun,
    "retrieval": retrieval.RetrievalRun,
    "vqa": vqa.VqaRun,
}
LAID_OVER = {
    "blip_2022": ("pretrain_base", "pretrain"),
    "caption_large_coco": ("caption_coco", "caption"),
    "clip_world": ("pretrain_world", "pretrain"),
    "filter_coco": ("retrieval_coco", "retrieval"),
    "filter_world": ("filter_world", "retrieval"),
    "nlvr2": ("nlvr2", "nlvr"),
    "visdial": ("visdial", "dialogue"),
    "visdial_world": ("visdial_world", "dialogue"),
    "bootstrap_easy": ("bootstrap_world", "bootstrap"),
    "bootstrap_world_large": ("bootstrap_world", "bootstrap"),
    "caption_world_small": ("caption_world", "caption"),
    "filter_world_small": ("filter_world", "retrieval"),
    "nlvr_world_small": ("nlvr_world", "nlvr"),
    "visdial_world_small": ("visdial_world", "dialogue"),
    "vqa_world_small": ("vqa_world", "vqa"),
}
"""Configs that only say what differs from another, or are not named after their recipe -> the other, and the recipe."""
BASES = {"drawn", "finetune", "finetune_world"}
"""Configs that others are based on, and that are no runs."""


def refused(capsys, args: list[str], settings: type = PretrainRun) -> str:
    """What is said of a command line that does not fit."""
    with pytest.raises(SystemExit) as stop:
        command.read(settings, args)
    output = capsys.readouterr()
    assert stop.value.code == 2
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") <= 3
    assert "Traceback" not in output.err
    return output.err


BROKEN = {
    "null": ("out: x\ntrain:\n  epochs: null\n", ["FILE: train.epochs is null", "leave it out"]),
    "typo": ("out: x\ntrain:\n  batchsize: 3\n", ["train", "batchsize"]),
    "typo of a section": ("out: x\ntrian:\n  lr: 3\n", ["trian"]),
    "typo in a list": ("out: x\ndata:\n  sources:\n    - path: a\n      wieght: 1\n", ["data.sources", "wieght"]),
    "typo in an optional section": ("out: x\nworld:\n  images: 3\n", ["world", "images"]),
    "a word for a number": ("out: x\ntrain:\n  batch_size: many\n", ["train.batch_size", "many"]),
    "a fraction for a whole number": ("out: x\ntrain:\n  steps: 3.5\n", ["train.steps", "3.5"]),
    "a word for yes or no": ("out: x\nmodel:\n  checkpoint: maybe\n", ["model.checkpoint", "maybe"]),
    "a number for a section": ("out: x\nmodel: 5\n", ["FILE", "model", "5"]),
    "nothing for a section": ("out: x\ntrain:\nmodel:\n  size: tiny\n", ["FILE", "train"]),
    "not one of the choices": ("out: x\nmodel:\n  size: huge\n", ["model.size", "huge", "large"]),
    "tuple length": ("out: x\ntrain:\n  betas: [0.9]\n", ["train.betas", "2 elements"]),
    "rule": ("out: x\ntrain:\n  batch_size: 0\n", ["batch_size must be 1 or more, got 0"]),
    "rule of a share": ("out: x\ndata:\n  flip: 50\n", ["flip must be in [0, 1], got 50"]),
    "rule of a number of operations": ("out: x\ndata:\n  augment_ops: -1\n", ["augment_ops must be 0 or more, got -1"]),
    "rule of a wait": ("out: x\ndata:\n  worker_timeout: 0\n", ["worker_timeout must be positive, got 0"]),
    "rule of a buffer": ("out: x\ndata:\n  shuffle_buffer: 0\n", ["shuffle_buffer must be 1 or more, got 0"]),
    "rule of a warm-up": ("out: x\ntrain:\n  warmup_steps: -5\n", ["warmup_steps must be 0 or more, got -5"]),
    "rule of an interval": ("out: x\ntrain:\n  eval_every: -5\n", ["eval_every must be 0 or more, got -5"]),
    "rule of a list's item": ("out: x\ndata:\n  sources:\n    - {path: a, weight: -1}\n", ["weight of source a"]),
    "required option of a list's item": ("out: x\ndata:\n  sources:\n    - weight: 1\n", ["data.sources", "path"]),
    "required option of a section": ("out: x\nheld_out:\n  k: 3\n", ["held_out", "path"]),
    "required option": ("train:\n  lr: 1\n", ["out"]),
    "key twice": ("out: x\ntrain:\n  lr: 1\n  lr: 2\n", ["FILE, line 4", "lr"]),
    "section twice": ("train:\n  lr: 1\nout: x\ntrain:\n  steps: 2\n", ["FILE, line 4", "train"]),
    "a list for a key": ("out: x\n? [a, b]\n: c\n", ["FILE, line 2"]),
    "python call": ("out: !!python/object/apply:pathlib.Path.touch ['HIT']\n", ["FILE, line 1", "python/object"]),
    "python name": ("out: x\ntrain: !!python/name:os.system\n", ["FILE, line 2", "python/name"]),
    "list": ("- a\n- b\n", ["FILE", "mapping", "list"]),
    "empty": ("", ["FILE", "mapping"]),
    "syntax": ("out: x\ntrain: {lr: 1\nmodel: ]\n", ["FILE, line 3"]),
    "tab": ("out: x\ntrain:\n\tlr: 1\n", ["FILE, line 3"]),
    "two documents": ("out: x\n---\nout: y\n", ["FILE, line 2"]),
    "depth": ("out: " + "[" * 5000, ["FILE", "deep"]),
    "binary": (bytes(range(256)), ["FILE"]),
    "Latin 1": ("out: caf\u00e9\n".encode("latin1"), ["FILE", "utf-8"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_config_is_one_line_that_names_what(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content, named = BROKEN[name]
    path = tmp_path / "broken.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    stderr = refused(capsys, ["--config", str(path)])
    for word in named:
        assert word.replace("FILE", str(path)) in stderr
    assert [p.name for p in tmp_path.iterdir()] == ["broken.yaml"], "something was executed"


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--config", "gone.yaml"], "gone.yaml: no such file"),
        (["--config=gone.yaml"], "gone.yaml: no such file"),
        (["--config", "."], "no such file"),
        (["--config"], "--config"),
        (["--out", "x", "--train.speed", "3"], "--train.speed"),
        (["--out", "x", "--train.lr", "null"], "--train.lr is null"),
        (["--out", "x", "--train.lr=null"], "--train.lr is null"),
        (["--out", "x", "--train.step", "5"], "no option --train.step; did you mean --train.steps?"),
        (["--out", "x", "--train.step=5"], "no option --train.step; did you mean --train.steps?"),
        (["--out", "x", "--held_out.sorce.path", "a"], "did you mean --held-out.source.path?"),
        (["--ou", "x"], "no option --ou; did you mean --out?"),
        (["--out", "x", "--conf", "gone.yaml"], "no option --conf; did you mean --config?"),
        (["--out", "x", "--print"], "no option --print; did you mean --print-config?"),
        (["--out", "x", "--zzz", "3"], "no option --zzz; --help lists them all"),
        (["--out", "x", "--train.lr", "fast"], "train.lr"),
        (["--out", "x", "--train.precision", "int8"], "train.precision"),
        (["--out", "x", "--train", "gone.yaml"], "gone.yaml"),
        (["--out", "x", "stray"], "stray"),
        (["--out"], "--out"),
        ([], "out"),
        (["--out", "x", "--data.sources", "!!python/object/apply:pathlib.Path.touch ['HIT']"], "data.sources"),
    ],
)
def test_broken_options_are_one_line_that_names_what(capsys, tmp_path, monkeypatch, args, named):
    monkeypatch.chdir(tmp_path)
    assert named in refused(capsys, args)
    assert list(tmp_path.iterdir()) == []


EXPLAINED = {
    "bootstrap": "Steps of the row that trains longer, as a multiple of `train.steps` (default: 2.0)",
    "pretrain": "Weight of the teacher's soft targets in the contrastive loss (default: 0.4)",
    "caption": "Label smoothing of the language-modelling loss (default: 0.1)",
    "retrieval": "Epochs over which alpha rises linearly from 0 (default: 1.0)",
    "nlvr": "Most word pieces of a sentence, first and last special tokens included; the rest is cut off (default: 64)",
    "dialogue": "Negatives per question: false answers beside the true one (default: 2)",
    "vqa": "Label smoothing of the loss of an answer's words (default: 0.1)",
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_option_is_explained(capsys, recipe):
    with pytest.raises(SystemExit) as stop:
        command.read(RECIPES[recipe], ["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    text = " ".join(printed.split())
    assert EXPLAINED[recipe] in text
    assert "--train.skip-nonfinite" in text
    options = re.findall(r"^  --([a-z.-]+)([^\n]*)\n(?=([^\n]*))", printed, re.M)
    assert {name for name, _, _ in options} >= {path.replace("_", "-") for path in walk(RECIPES[recipe])}
    for name, after, below in options:
        assert "  " in after.rstrip() or below.startswith(" " * 20), f"--{name} without its meaning"
    assert text.count("(default: ") >= 40


def test_the_printed_config_is_the_run(capsys, tmp_path):
    args = ["--config", str(CONFIGS / "pretrain_base.yaml"), "--train.lr", "0.5", "--held_out.source.path", "a.json"]
    with pytest.raises(SystemExit) as stop:
        command.read(PretrainRun, [*args, "--print-config"])
    assert stop.value.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert yaml.safe_load(printed.read_text())["train"]["lr"] == 0.5
    assert command.read(PretrainRun, ["--config", str(printed)]) == command.read(PretrainRun, args)


@pytest.mark.parametrize("name", sorted({path.stem for path in CONFIGS.glob("*.yaml")} - BASES))
def test_every_config_is_a_run(name):
    """What it says arrives, whether it is given alone or after the one that it is based on."""
    base, recipe = LAID_OVER.get(name, (name, name.split("_")[0]))
    args = [option for stem in dict.fromkeys([base, name]) for option in ("--config", str(CONFIGS / f"{stem}.yaml"))]
    run = command.read(RECIPES[recipe], args)
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    if "base" in content:
        assert command.read(RECIPES[recipe], args[-2:]) == run
        assert "base" not in command.content(args[-1])
        del content["base"]
    assert_arrived(content, run)


def assert_arrived(content: dict, run: object) -> None:
    for key, value in content.items():
        arrived = getattr(run, key)
        if isinstance(value, dict):
            assert_arrived(value, arrived)
        elif key == "sources":
            for one, source in zip(value, arrived, strict=True):
                assert_arrived(one, source)
        else:
            assert (list(arrived) if isinstance(arrived, tuple) else arrived) == value, key


def test_a_config_is_laid_over_another():
    base, over = CONFIGS / "pretrain_base.yaml", CONFIGS / "blip_2022.yaml"
    run = command.read(PretrainRun, ["--config", str(base), "--config", str(over)])
    assert_arrived(yaml.safe_load(over.read_text()), run)
    assert (run.train.clip, run.train.schedule, run.data.augment_magnitude) == (None, "epoch_decay", 5)
    assert (run.train.batch_size, run.model.vision_weights) == (90, "deit_base_patch16_224.fb_in1k")
    assert [source.kind for source in run.data.sources] == ["human", "web"]


def based(folder, **files: str) -> list[str]:
    """Files of options in folders of their own names; the first as an option."""
    for name, content in files.items():
        (folder / name).mkdir()
        (folder / name / "run.yaml").write_text(content)
    return ["--config", str(folder / next(iter(files)) / "run.yaml")]


def test_a_config_states_what_differs_from_its_base(tmp_path):
    """Mappings are merged over any number of files, lists and null take their place, paths start from the file."""
    low = "data: {workers: 7, sources: [{path: a, weight: 5}, {path: b}]}\nheld_out: {source: {path: h}, k: 3}\n"
    middle = "base: ../low/run.yaml\nout: x\ntrain:\n  betas: [0.5, 0.6]\n  lr: 1.0e-3\nworld: {train: 5}\n"
    top = "base: ../middle/run.yaml\ntrain: {lr: 2.0e-3}\ndata: {sources: [{path: c}]}\nheld_out: {k: 4}\nworld: null\n"
    config = based(tmp_path, top=top, middle=middle, low=low)
    for args in (config, ["=".join(config)]):
        run = command.read(PretrainRun, [*args, "--train.steps", "9"])
        assert (run.out, run.data.workers, run.data.sources) == ("x", 7, [SourceConfig("c")])
        assert (run.train.betas, run.train.lr, run.train.steps) == ((0.5, 0.6), 2e-3, 9)
        assert (run.held_out.source.path, run.held_out.k, run.world) == ("h", 4, None)
    assert command.read(PretrainRun, [*config, "--data.sources+", "{path: d}"]).data.sources[1] == SourceConfig("d")


@pytest.mark.parametrize(
    ("top", "low", "named"),
    [
        ("base: ../low/run.yaml", "base: ../top/run.yaml", "low/run.yaml: base ../top/run.yaml is itself based on"),
        ("base: run.yaml", "", "top/run.yaml: base run.yaml is itself based on this file"),
        ("base: gone.yaml", "", "top/gone.yaml: no such file"),
        ("base: [../low/run.yaml]", "", "top/run.yaml: base: expected text, got ['../low/run.yaml']"),
        ("base: ../low/run.yaml", "out: x\nout: y", "low/run.yaml, line 2"),
        ("base: ../low/run.yaml", "model: 5", "low/run.yaml: model: expected a mapping of options, got 5"),
        ("base: ../low/run.yaml", "train:\n  lr: null", "low/run.yaml: train.lr is null"),
        ("base: ../low/run.yaml", "train:\n  sped: 3", "sped"),
    ],
)
def test_a_base_that_does_not_fit_is_one_line_that_names_the_file(capsys, tmp_path, top, low, named):
    assert named in refused(capsys, ["--out", "x", *based(tmp_path, top=top, low=low)])


@pytest.mark.parametrize("how", ["file", "option"])
def test_a_new_list_of_sources_takes_nothing_from_the_old_one(tmp_path, how):
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text("out: x\ndata:\n  sources:\n    - {path: a.json, split: train, weight: 5}\n")
    new.write_text("data:\n  sources:\n    - path: b.json\n")
    given = ["--config", str(new)] if how == "file" else ["--data.sources", '[{"path": "b.json"}]']
    run = command.read(PretrainRun, ["--config", str(old), *given, "--data.sources+", '{"path": "c.json"}'])
    assert run.data.sources == [SourceConfig("b.json"), SourceConfig("c.json")]


@pytest.mark.parametrize(("former", "now"), [("wrong", "negatives"), ("alike", "hard_negatives")])
def test_former_names_of_dialogue_options_are_refused_with_those_of_today(capsys, tmp_path, former, now):
    path = tmp_path / "old.yaml"
    path.write_text(f"out: x\ndata:\n  {former}: 1\n")
    assert f"{path}: data.{former} is now called data.{now}" in refused(
        capsys, ["--config", str(path)], RECIPES["dialogue"]
    )
    line = f"--data.{former} is now called --data.{now.replace('_', '-')}"
    assert line in refused(capsys, ["--out", "x", f"--data.{former}", "1"], RECIPES["dialogue"])


def walk(kind: type, before: str = "") -> list[str]:
    """Names of all options of a settings class; those of a list's items as `list.name`."""
    hints, names = typing.get_type_hints(kind), []
    for field in dataclasses.fields(kind):
        inner = [t for t in (hints[field.name], *typing.get_args(hints[field.name])) if dataclasses.is_dataclass(t)]
        name = before + field.name
        names += walk(inner[0], f"{name}.") if inner else [name]
    return names


def test_options_appear_and_disappear_on_purpose():
    """An option is a promise: adding or removing one means changing tests/options.txt as well."""
    options = sorted(f"{recipe} {option}" for recipe, settings in RECIPES.items() for option in walk(settings))
    assert options == OPTIONS.read_text().splitlines()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DataError("row 3 of a.json\n  is odd"), 2),
        (ValueError("x"), 2),
        (FileNotFoundError("y"), 2),
        (files.WriteError("could not write z: 10 bytes are free"), 1),
        (RunLocked("process 7 writes to runs/x"), 1),
    ],
)
def test_a_recipes_own_errors_are_one_line(capsys, error, status):
    def fails():
        raise error

    with pytest.raises(SystemExit) as stop:
        command.run(fails)
    assert stop.value.code == status
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert str(error).split("\n")[0] in stderr


def test_what_is_our_own_mistake_keeps_its_traceback():
    def fails():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        command.run(fails)


def test_each_program_is_there_and_its_recipes_are_those_that_are_told_of(capsys, monkeypatch):
    scripts = tomllib.loads((CONFIGS.parents[1] / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(scripts) == {"blip", "capfilt", "blip-eval", "blip-recipe"}
    for target in scripts.values():
        module, _, name = target.partition(":")
        assert callable(getattr(import_module(module), name))
    assert {*RECIPES, "demo"} == set(programs.RECIPES)
    programs.main(["--help"])
    stdout = capsys.readouterr().out
    assert all(f"{name}" in stdout for name in programs.RECIPES)
    monkeypatch.setattr(sys, "argv", ["blip-recipe"])
    with pytest.raises(SystemExit) as stop:
        programs.main(["caption", "--out", "x", "--train.speed", "3"])
    assert stop.value.code == 2
    assert "--train.speed" in capsys.readouterr().err
    for args, words in (([], "no command given"), (["captoin"], "there is no command 'captoin'")):
        with pytest.raises(SystemExit) as stop:
            programs.main(args)
        assert stop.value.code == 2
        assert words in capsys.readouterr().err
