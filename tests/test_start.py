"""A wrong name of a file or model is reported before anything slow is imported."""

import json
import subprocess
import sys

import pytest
from PIL import Image

RECIPES = ("pretrain", "caption", "retrieval", "vqa", "nlvr", "dialogue", "bootstrap")
SLOW = ("torchvision", "timm", "datasets", "transformers", "accelerate", "pycocoevalcap", "pandas", "sympy")
"""Packages that take seconds to import."""
_MAIN = """
import importlib, json, sys
try:
    status = getattr(importlib.import_module(sys.argv[1]), "main")(sys.argv[2:])
except SystemExit as stop:
    status = stop.code
print(json.dumps([status, sorted(name for name in sys.modules if "." not in name)]))
"""
_RECIPE = "import sys; from importlib import import_module; from recipes import command; name = sys.argv.pop(1)\n"
_RECIPE += "try:\n    command.run(import_module(name).main)\nexcept SystemExit as stop:\n"
_RECIPE += "    import json; print(json.dumps([stop.code, sorted(n for n in sys.modules if '.' not in n)]))"


def imported(program, *args, cwd):
    ran = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True, cwd=cwd, timeout=120)
    assert "Traceback" not in ran.stderr, ran.stderr
    status, modules = json.loads(ran.stdout.splitlines()[-1])
    assert status == 2
    return ran.stderr, modules


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_looks_for_its_config_before_it_imports_what_is_slow(recipe, tmp_path):
    stderr, modules = imported(_RECIPE, f"recipes.{recipe}", "--config", "nothere.yaml", cwd=tmp_path)
    assert stderr == "error: --config nothere.yaml: no such file\n"
    assert not {*SLOW} & {*modules}


@pytest.mark.parametrize(
    "line",
    [
        "blip.app.cli caption photo.jpg --model nothere",
        "blip.app.cli caption photo.jpg --model nothere.pth",
        "blip.app.cli search photos dog --model https://host/model",
        "blip.app.cli vqa photo.jpg what --model ./nothere",
        "eval.__main__ captioning --model nothere --source.path rows.json --out scores",
        "eval.__main__ retrieval --model nothere --source.path rows.json",
        "capfilt.__main__ run --input photos --out run --filter nothere",
        "capfilt.__main__ plan --input photos --out run --filter photos --captioner nothere.pth",
    ],
)
def test_a_model_is_looked_for_before_torch_is_imported(line, tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("photo.jpg", "photos/a.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "rows.json").write_text('[{"image": "photo.jpg", "image_id": "1", "caption": "a dog"}]')
    stderr, modules = imported(_MAIN, *line.split(), cwd=tmp_path)
    assert "nothere" in stderr or "https://host/model" in stderr
    assert stderr.count("\n") == 1
    assert "torch" not in modules


def test_an_image_is_looked_for_before_torch_is_imported(tmp_path):
    stderr, modules = imported(_MAIN, "blip.app.cli", "caption", "nothere.jpg", "--model", "org/name", cwd=tmp_path)
    assert stderr == "error: no such file or folder: nothere.jpg\n"
    assert "torch" not in modules
