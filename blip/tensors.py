"""Tensors in files, whose format is checked before they are trusted: safetensors and torch.save."""

from __future__ import annotations

import json
import math
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_ALIAS = "same_as:"
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""torch's types by safetensors' names."""
_HEADER_BYTES, _MOST_TENSORS = 1 << 21, 1 << 14
"""Limits of a header; a ViT-L with its teacher has 200 KB and 1,500 tensors."""


def tensor_bytes(tensors: dict[str, Tensor]) -> int:
    """Approximate bytes that `write_tensors` needs."""
    return sum(t.numel() * t.element_size() for t in tensors.values()) + 200 * len(tensors)


def add_to_digest(digest: Any, tensors: dict[str, Tensor], before: str = "") -> None:
    """Feed names, shapes, types and contents of tensors, sorted by name, to a hash; `before` precedes each name."""
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{before}{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy())


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a state dict as safetensors; a tensor under several names is stored once and the names are kept."""
    stored: dict[str, Tensor] = {}
    first_name: dict[tuple, str] = {}
    storages: set[int] = set()
    metadata = {"format": "pt"}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and place in first_name:
            metadata[_ALIAS + name] = first_name[place]
            continue
        first_name[place] = name
        storage = tensor.untyped_storage().data_ptr()
        # A view into a storage that another name uses has to be a tensor of its own in the file.
        shared = tensor.numel() and storage in storages
        stored[name] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
        storages.add(storage)
    save_file(stored, path, metadata)


def read_outline(path: Path) -> dict[str, Tensor]:
    """Names, shapes and types of what `read_tensors` reads, as tensors without content; the header alone is read.

    ValueError as in `read_tensors`, or if the header is longer, or names more tensors, than any model has.
    """
    _refuse_other_than_safetensors(path)
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > _HEADER_BYTES:
            raise ValueError(
                f"{path} has a header of {size:,} bytes, at most {_HEADER_BYTES:,} are read; save it again"
            )
        header = file.read(size)
    try:
        entries = json.loads(header)
        metadata = entries.pop("__metadata__", None) or {}
        if len(entries) + len(metadata) > _MOST_TENSORS:
            raise ValueError(f"it names {len(entries) + len(metadata):,} tensors, at most {_MOST_TENSORS:,} are read")
        outline = {name: _outline(name, one) for name, one in entries.items()}
        declared = max((one["data_offsets"][1] for one in entries.values()), default=0)
        there = path.stat().st_size - 8 - size
        if declared != there:
            raise ValueError(f"its header declares {declared:,} bytes of tensors, the file has {there:,}")
        aliases = {k.removeprefix(_ALIAS): v for k, v in metadata.items() if k.startswith(_ALIAS)}
        outline |= {alias: outline[name] for alias, name in aliases.items() if name in outline}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); fetch or save it again") from None
    return outline


def _outline(name: str, entry: dict[str, Any]) -> Tensor:
    shape, (start, end) = entry["shape"], entry["data_offsets"]
    if entry["dtype"] not in _TYPES:
        raise ValueError(f"{name[:80]} is of type {str(entry['dtype'])[:20]}, which is not read")
    dtype = _TYPES[entry["dtype"]]
    if math.prod(shape) * dtype.itemsize != end - start or not all(0 <= side < 1 << 48 for side in shape):
        raise ValueError(f"{name[:80]} of {str(shape)[:80]} does not have {end - start:,} bytes")
    return torch.empty(shape, dtype=dtype, device="meta")


def read_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Read a file of `write_tensors`. ValueError, with the file's actual format, if it is something else."""
    read_outline(path)
    try:
        with safe_open(path, framework="pt", device=device) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); fetch or save it again") from error
    for name, target in metadata.items():
        if name.startswith(_ALIAS):
            if target not in tensors:
                raise ValueError(f"{path} names {target} a second time but does not hold it; fetch or save it again")
            tensors[name.removeprefix(_ALIAS)] = tensors[target]
    return tensors


def refuse_impostor(path: Path) -> bytes:
    """The first 64 bytes of a weight file; ValueError if it is empty, a web page or a Git LFS pointer."""
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise ValueError(f"{path} is cut short to nothing, an empty file: fetch or save it again")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not weights: run `git lfs pull`, or download the file itself")
    if head.lstrip()[:1] == b"<" and 0 not in head[:8]:  # a length may begin with the same bytes
        raise ValueError(f"{path} is a web page, not weights: the download went wrong; fetch it again")
    return head


def _refuse_other_than_safetensors(path: Path) -> None:
    head, size = refuse_impostor(path), path.stat().st_size
    pickled = head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")) and head[8:9] != b"{"
    if pickled or head.startswith(b"PK\x03\x04"):  # a length, as of 640, may begin with the same bytes
        raise ValueError(f"{path} is a pickle and not safetensors, as its name says: give it the ending .pth")
    if size < 8 or struct.unpack("<Q", head[:8])[0] > size - 8:
        raise ValueError(f"{path} is cut short or not safetensors ({size:,} bytes): fetch or save it again")


def _refuse_inflation(path: Path) -> None:
    """Raise ValueError for an archive that unpacks to more than its own size, which torch.save never writes."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, UnicodeDecodeError):
        return  # damaged, as its reader will say
    if sum(part.file_size for part in parts) > path.stat().st_size:
        raise ValueError(f"{path} would unpack to more than its own size, as no weight file does: get another one")


def read_pickled_tensors(path: Path) -> Any:
    """Read what torch.save wrote of tensors and plain values; nothing in the file can run.

    ValueError, in a line, if it is something else, holds anything else, or is damaged.
    """
    if refuse_impostor(path).startswith(b"PK"):
        _refuse_inflation(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose text advises to try again without the guard
        raise ValueError(
            f"{path} holds more than tensors or is damaged; what it holds was not executed: "
            "get it again from who made it, weights as safetensors"
        ) from None
    except Exception as error:  # a damaged pickle makes its reader raise almost anything
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} cannot be read ({reason}): fetch or save it again") from None
