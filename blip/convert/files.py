"""Weight files: read as tensors or refused, never executed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip import atomic
from blip.convert.table import State, Table, from_theirs

ENDINGS = (".safetensors", ".pth", ".pt", ".bin")
"""Of weight files."""
_JSON_BYTES = 1 << 24


def is_local(where: str | Path) -> bool:
    """Whether a name is meant as a path rather than as one on the hub."""
    text = str(where)
    return isinstance(where, Path) or Path(where).exists() or text.startswith((".", "/", "~")) or text.endswith(ENDINGS)


def read_weights(path: str | Path) -> State:
    """The tensors of a safetensors or `.pth` file; nothing in it is ever executed.

    A `.pth` may wrap them as {"model": ...} (the 2022 release, LAVIS, DeiT) or {"state_dict": ...}. FileNotFoundError,
    or ValueError for a file that holds something else.
    """
    return unwrapped(read_file(path), Path(path))


def read_file(path: str | Path) -> Any:
    """All that a weight file holds; errors as in `read_weights`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: give the path of a .safetensors or .pth file")
    read = atomic.read_tensors if path.suffix == ".safetensors" else atomic.read_pickled_tensors
    return read(path)


def read_json(path: Path) -> dict[str, Any]:
    """What a model's config.json says, nothing where it is not an object. ValueError, naming it, if it is not JSON."""
    if (size := path.stat().st_size) > _JSON_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, more than any configuration; fetch or save the model again")
    try:
        said = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch or save the model again") from error
    return said if isinstance(said, dict) else {}


def unwrapped(found: object, path: Path) -> State:
    """The state dict in what a file holds. ValueError if there is none, or one that claims more than the file holds."""
    for name in ("model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds no state dict: expected names of tensors, alone or under 'model'")
    for name, tensor in found.items():
        plain = isinstance(name, str) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_quantized or tensor.is_nested:
            raise ValueError(
                f"{path}: {str(name)[:100]} is not a named tensor of numbers; is it the weights of a BLIP?"
            )
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: {name} claims more numbers than the file holds; get the file again")
    return found


def load(model: torch.nn.Module, table: Table, path: str | Path) -> None:
    """Fill `model` from a foreign file by `table`; what the table calls fresh keeps its values.

    ValueError as `from_theirs` and `read_weights`; the model is unchanged then.
    """
    state = from_theirs(table, read_weights(path), model.state_dict(), str(path))
    model.load_state_dict(state, strict=False)  # from_theirs has accounted for every key
