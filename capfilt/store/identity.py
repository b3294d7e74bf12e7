"""Identity of results: ids of rows and parts, and the fingerprint of all settings that decide them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def _digest(*parts: object) -> str:
    """Hash parts with their lengths (SHA-256), so that no two lists of parts give the same bytes."""
    h = hashlib.sha256()
    for part in parts:
        text = str(part).encode("utf-8", "surrogatepass")
        h.update(len(text).to_bytes(8, "little") + text)
    return h.hexdigest()


def sample_id(relpath: str, row: int, key: str) -> str:
    """Return the id of a row, 32 hex digits, from its file's path under the input root, its number and its key."""
    return _digest(relpath, row, key)[:32]


def text_id(sample: str, source: str, index: int) -> str:
    """Return the id of a row's text, 16 hex digits, which does not reveal its source (web or syn)."""
    return hashlib.sha256(f"audit {sample} {source} {index}".encode()).hexdigest()[:16]


def part_id(relpath: str, size: int, content: str, lo: int, hi: int, fingerprint: str) -> str:
    """Return the id, 16 hex digits, of rows lo to hi of a file with this content, scored in this way."""
    return _digest(relpath, size, content, lo, hi, fingerprint)[:16]


def fingerprint(config: dict[str, Any]) -> str:
    """Return 16 hex digits of all settings that decide results."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def differences(before: dict[str, Any], now: dict[str, Any], under: str = "") -> list[str]:
    """List the differences of two nested settings, as `name: before -> now`."""
    changes = []
    for name in sorted(before.keys() | now.keys()):
        a, b = before.get(name), now.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            changes += differences(a, b, f"{under}{name}.")
        elif a != b:
            changes.append(f"{under}{name}: {_short(a)} -> {_short(b)}")
    return changes


def _short(value: object) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 60 else text[:57] + "..."


def model_identity(where: str) -> dict[str, str]:
    """Return a model's identity: where it is and the SHA-256 of its weights, configuration and tokenizer.

    A file of weights is identified by its content and the tokenizer beside it, a name on the hub by its cached files.
    FileNotFoundError if there is no such model.
    """
    from blip.checkpoints.checkpoint import locate  # imports torch

    folder, is_downloaded = locate(where), not Path(where).expanduser().exists()
    names = ("config.json", "model.safetensors", "tokenizer.json")
    if folder.is_file():
        paths = [folder, *(folder.with_name(name) for name in ("tokenizer.json", "vocab.txt"))]
    elif is_downloaded and all((folder / name).is_file() for name in names):
        paths = [folder / name for name in names]
    elif folder.is_dir():
        paths = [folder / name for name in (*names, "pytorch_model.bin", "vocab.txt")]
        if not paths[0].is_file():
            raise FileNotFoundError(f"{where} has no {paths[0].name}, so it is not a model directory")
        if not (paths[1].is_file() or paths[3].is_file()):
            raise FileNotFoundError(f"{where} has no {paths[1].name}, so it is not a model directory")
    else:
        raise FileNotFoundError(f"{where} is not a model directory or a file of weights")
    h = hashlib.sha256()
    for path in paths:
        if path.is_file():
            with path.open("rb") as file:
                h.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return {"id": where, "sha256": h.hexdigest()}
