"""Weight files: read as tensors or refused, never executed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from blip.checkpoints.naming import SUFFIXES
from blip.checkpoints.table import State, Table, from_theirs, some_of
from blip.tensors import read_pickled_tensors, read_tensors

_JSON_BYTES = 1 << 24
_INDEX, _MOST_PARTS = ".index.json", 1000


def is_local(where: str | Path) -> bool:
    """Whether a name is meant as a path rather than as one on the hub."""
    text = str(where)
    return (
        isinstance(where, Path) or Path(where).exists() or text.startswith((".", "/", "~")) or text.endswith(SUFFIXES)
    )


def read_weights(path: str | Path) -> State:
    """The tensors of a safetensors or `.pth` file; nothing in it is ever executed.

    A `.pth` may wrap them as {"model": ...} (the 2022 release, LAVIS, DeiT) or {"state_dict": ...}. FileNotFoundError,
    or ValueError for a file that holds something else.
    """
    return unwrapped(read_file(path), Path(path))


def read_file(path: str | Path) -> Any:
    """Read all that a weight file holds; errors as in `read_weights`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: give the path of a .safetensors or .pth file")
    read = read_tensors if path.suffix == ".safetensors" else read_pickled_tensors
    return read(path)


@dataclass(frozen=True)
class Weights:
    """The weights of a model folder: one file, or the parts listed by an index in the same folder."""

    path: Path
    """Path of the file or the index, for messages."""
    parts: tuple[Path, ...]

    @classmethod
    def find(cls, part: Callable[[str], Path], *names: str) -> Self:
        """Find the first of some names with `part`, as a file or an index of parts. FileNotFoundError if none exists.

        ValueError for an index that names anything but files in its folder.
        """
        missing: FileNotFoundError | None = None
        for name in (*names, *(f"{name}{_INDEX}" for name in names)):
            try:
                path = part(name)
            except FileNotFoundError as error:
                missing = missing or error
                continue
            return cls(path, _listed(path, part) if name.endswith(_INDEX) else (path,))
        raise missing

    def read(self, read: Callable[[Path], State]) -> State:
        """Read each part with `read` and merge them. ValueError if two have a name in common."""
        whole: State = {}
        for path in self.parts:
            part = read(path)
            if twice := whole.keys() & part.keys():
                raise ValueError(f"{path}: {some_of(sorted(twice))} is in another part of {self.path.name}, too")
            whole |= part
        return whole


def _listed(index: Path, part: Callable[[str], Path]) -> tuple[Path, ...]:
    """The files listed by an index of parts."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index} is not an index of weights: it has no weight_map from tensors to files")
    names = sorted(set(places.values()))
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}", name) or not name.endswith(SUFFIXES):
            raise ValueError(f"{index} names {name[:100]!r}, which is not a weight file in its folder")
    if len(names) > _MOST_PARTS:
        raise ValueError(f"{index} names {len(names):,} files; the limit is {_MOST_PARTS}")
    return tuple(part(name) for name in names)


def read_json(path: Path) -> dict[str, Any]:
    """Read a model's config.json; empty if it is not an object. ValueError, naming it, if it is not JSON."""
    if (size := path.stat().st_size) > _JSON_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, more than any configuration; fetch or save the model again")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch or save the model again") from error
    return value if isinstance(value, dict) else {}


def unwrapped(content: object, path: Path) -> State:
    """The state dict in a file's content. ValueError if there is none, or it claims more data than the file holds."""
    for name in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict: expected names of tensors, alone or under 'model'")
    for name, tensor in content.items():
        plain = isinstance(name, str) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_quantized or tensor.is_nested:
            raise ValueError(
                f"{path}: {str(name)[:100]} is not a named tensor of numbers; is it the weights of a BLIP?"
            )
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: {name} claims more numbers than the file holds; get the file again")
    return content


def load(model: torch.nn.Module, table: Table, path: str | Path) -> None:
    """Fill `model` from a foreign file by `table`; tensors that the table lists as fresh keep their values.

    ValueError as in `from_theirs` and `read_weights`; the model is then unchanged.
    """
    state = from_theirs(table, read_weights(path), model.state_dict(), str(path))
    model.load_state_dict(state, strict=False)  # from_theirs has accounted for every key
