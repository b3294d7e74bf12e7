"""The container of `blip serve`, as far as it can be checked without building it."""

import fnmatch
import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from blip import options
from blip.app.cli import COMMANDS
from blip.app.commands import serve

ROOT = Path(__file__).parents[1]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()


def instructions(text: str) -> list[tuple[str, str]]:
    """Name and rest of each line of a Dockerfile, continued lines joined."""
    lines = re.sub(r"\\\n\s*", " ", re.sub(r"(?m)^#.*\n", "", text)).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


DOCKERFILE = instructions((ROOT / "Dockerfile").read_text())


def all_of(name: str) -> list[str]:
    return [rest for instruction, rest in DOCKERFILE if instruction == name]


def is_ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path from the builder: the last pattern that fits it or a folder above decides."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        parts = path.split("/")
        above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        plain = pattern.lstrip("!")
        fits = (
            any(fnmatch.fnmatch(part, plain[3:]) for part in parts)
            if plain.startswith("**/")
            else any(part.count("/") == plain.count("/") and fnmatch.fnmatch(part, plain) for part in above)
        )
        ignored = not pattern.startswith("!") if fits else ignored
    return ignored


def test_what_is_copied_is_there_and_reaches_the_builder():
    copied = [shlex.split(rest) for rest in all_of("COPY")]
    sources = [source.rstrip("/") for *parts, _ in copied for source in parts]
    assert len(sources) >= 5
    for source in sources:
        assert (ROOT / source).exists(), source
        files = [name for name in TRACKED if name == source or name.startswith(source + "/")]
        assert files, f"{source} is not in the repository"
        assert not [name for name in files if is_ignored(name)]


def test_the_wheel_is_whole():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    files = [project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"]
    copied = " ".join(all_of("COPY")).split()
    for name in [*files, *(package.rstrip("*") for package in packages)]:
        assert name in copied, name
    (extras,) = re.findall(r"\[([\w,]+)\]\"", " ".join(all_of("RUN")))
    assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"])
    assert "serve" in extras.split(",")


@pytest.mark.parametrize("path", [
    "runs/demo/model/model.safetensors", ".git/config", ".venv/bin/python", "tests/conftest.py", "docs/index.md",
    ".env", "blip/__pycache__/x.cpython-312.pyc", "blip/.hidden",
])  # fmt: skip
def test_nothing_else_reaches_the_builder(path):
    assert is_ignored(path)


def test_its_entry_is_a_command_with_options_that_there_are():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (entry,), (args,) = map(json.loads, all_of("ENTRYPOINT")), map(json.loads, all_of("CMD"))
    assert entry[0] in project["project"]["scripts"]
    assert args[0] in COMMANDS
    chosen = options.read(serve.ServeOptions, args[1:], "blip serve")
    assert chosen.host == "0.0.0.0"
    assert f"EXPOSE {chosen.port}" in (ROOT / "Dockerfile").read_text()


def test_its_health_check_asks_a_route():
    pytest.importorskip("fastapi")
    from blip.app.service import Service

    (check,) = all_of("HEALTHCHECK")
    command = json.loads(check[check.index("CMD") + 3 :])
    (port, path) = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", command[-1]).groups()
    assert int(port) == serve.ServeOptions().port
    assert path in Service(batch=1, wait=0).api.openapi()["paths"]
    compile(command[-1], "HEALTHCHECK", "exec")


def test_who_it_runs_as_and_where_the_model_is():
    from blip.app.commands.shared import MODEL_VARIABLE

    assert re.match(r"[1-9]\d*", all_of("USER")[-1]), "a user who is not root, by number"
    assert f"{MODEL_VARIABLE}=/model" in " ".join(all_of("ENV")).split()
    names = [name for name, _ in DOCKERFILE]
    assert names.count("FROM") == 2
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert all("-slim" in rest for rest in all_of("FROM"))


def test_make_image_builds_it():
    done = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "image", "TORCH_INDEX=https://example.org/cu"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    words = shlex.split(done.stdout.splitlines()[-1])
    assert words[:2] == ["docker", "build"]
    assert words[-1] == "."
    (argument,) = [word for word in words if "TORCH_INDEX" in word]
    assert argument.partition("=")[0] in [rest.partition("=")[0] for rest in all_of("ARG")]
