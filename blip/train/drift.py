"""Record the settings of a run in its folder, and compare them with those of the run that it continues."""

from __future__ import annotations

import json
import platform
import socket
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from blip import files
from blip.errors import without_credentials
from blip.startup import program

FREE_TO_CHANGE = frozenset(
    {"log_every", "save_every", "keep_checkpoints", "eval_every", "trackers", "skip_nonfinite", "allow_change"}
    | {"workers", "worker_timeout", "max_bad_fraction", "timeout", "out", "remote"}
)
"""Settings that do not change what is computed; all others must stay the same when a run continues."""
YOUNGER = {
    "decode.length_rule": "generated",
    "answers.length_rule": "generated",
    "train.towers": [],
    "clip": None,
    "model.dropout": None,
}
"""Settings missing from older checkpoints, by their whole names -> the value that was in effect."""
RENAMED = {"data.wrong": "data.negatives", "data.alike": "data.hard_negatives"}
"""Whole names of settings in older checkpoints -> their names today."""


def plain(value: Any) -> Any:
    """Settings as JSON: paths as strings, tuples as lists, addresses without what may be secret in them."""
    return json.loads(without_credentials(json.dumps(value, default=str, sort_keys=True)))


def flatten(settings: dict, prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} -> {"train.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def drift(before: dict, now: dict) -> list[str]:
    """List `name: before -> now` for each setting that differs but must not."""
    old = {RENAMED.get(name, name): value for name, value in flatten(plain(before)).items()}
    new = flatten(plain(now))
    for name in new.keys() - old.keys():
        if name in YOUNGER:
            old[name] = YOUNGER[name]
    gone = "(not set)"
    return [
        f"{name}: {old.get(name, gone)} -> {new.get(name, gone)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, gone) != new.get(name, gone) and not FREE_TO_CHANGE & set(name.split("."))
    ]


def refuse_drift(saved: dict, now: dict, where: Path) -> None:
    """Raise ValueError with all differences between the facts of a checkpoint and of the run that would continue it."""
    lines = drift(saved["settings"], now["settings"])
    if saved["fingerprint"] != now["fingerprint"]:
        files = _other_files(saved.get("remote_files", {}), now.get("remote_files", {}))
        reason = files or "files or rows are not the same"
        lines.append(f"data: fingerprint {saved['fingerprint']} -> {now['fingerprint']} ({reason})")
    before, layout = saved["layout"], now["layout"]
    changed = [f"{name} {before[name]} -> {layout[name]}" for name in layout if before[name] != layout[name]]
    if changed:
        lines.append(
            f"processes: {', '.join(changed)}; which pairs meet in a batch, and so the losses, would change. "
            f"Continue with {before['world']} processes of {before['batch_size']} pairs x {before['accumulate']}"
        )
    if lines:
        listed = "\n  ".join(lines)
        raise ValueError(
            f"{where} was made with other settings:\n  {listed}\n"
            "Go back to those, choose a new output directory, or set train.allow_change to continue all the same."
        )


def _other_files(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Name the remote files that have another size or tag."""
    others = [file for file, identity in before.items() if file in now and now[file] != identity]
    if not others:
        return ""
    (size, tag), (size_now, tag_now) = before[others[0]], now[others[0]]
    more = f", and {len(others) - 1} more files" * (len(others) > 1)
    return (
        f"{others[0]} is another file now: {size:,} bytes, tag {tag or 'none'} -> {size_now:,} bytes, tag "
        f"{tag_now or 'none'}{more}"
    )


_VERSIONED = ("openblip", "torch", "torchvision", "timm", "transformers", "accelerate", "datasets", "pillow", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on."""
    installed = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = "not installed"
    return installed


def git_commit() -> str | None:
    """Commit of the source tree this package runs from, with a + if it has changes; None outside a checkout."""
    here, git = Path(__file__).resolve().parent, program("git")
    if git is None:
        return None

    def run(*words: str) -> str:
        command = [git, "-C", str(here), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        if not run("ls-files", Path(__file__).name):
            return None
        return run("rev-parse", "HEAD") + ("+" if run("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def describe_run(out: Path, settings: dict, layout: dict[str, int], device: str) -> None:
    """Write config.yaml (the effective settings) and add this start to run.json (versions, commit, command, host)."""
    files.replace_file(out / "config.yaml", yaml.safe_dump(plain(settings), sort_keys=False).encode())
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "command": plain(sys.argv),
        "commit": git_commit(),
        "versions": versions(),
        "device": device,
        **layout,
    }
    path = out / "run.json"
    try:
        starts = json.loads(path.read_bytes())["starts"]
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        starts = []
    files.replace_file(path, json.dumps({"starts": [*starts, start]}, indent=1).encode())
