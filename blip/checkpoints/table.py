"""Tables of tensor names between a foreign layout and ours, and strict conversion by them.

A `Table` gives for every tensor of a foreign layout its name here, the tensor that it is a second name of, or the
reason why it is left out. Unknown keys, missing keys and differing shapes are errors, never skipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

State = dict[str, Tensor]
NUMBERS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Types that weights are taken in; others would be cast in silence."""


@dataclass(frozen=True)
class TensorRow:
    """One tensor of ours and the tensors of theirs it is made of, stacked along the first dimension."""

    ours: str
    theirs: tuple[str, ...]
    change: Literal["transpose", "scalar"] | None = None
    """Theirs is the transpose of ours, or ours is a scalar and theirs a vector of length 1."""


@dataclass(frozen=True)
class Table:
    """Mapping of every key of one foreign layout to ours."""

    layout: str
    """Description of the layout, for messages."""
    rows: list[TensorRow]
    """The tensors that carry over."""
    copies: dict[str, str] = field(default_factory=dict)
    """Second names of a tensor in theirs -> its first name; must be equal where present."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Keys of theirs that are not read -> why; may be absent."""
    fresh: dict[str, str] = field(default_factory=dict)
    """Keys that a model of ours may have and the layout does not -> why; they keep their values, or are not written."""

    def __add__(self, other: Table) -> Table:
        return Table(
            self.layout,
            self.rows + other.rows,
            self.copies | other.copies,
            self.dropped | other.dropped,
            self.fresh | other.fresh,
        )


def from_theirs(table: Table, theirs: Mapping[str, Tensor], like: Mapping[str, Tensor], source: str) -> State:
    """Convert tensors of a foreign layout to ours, with the shapes of `like` (our state dict).

    `source` names the file in messages. ValueError as in `refuse_misfit` and `refuse_unsound`, or if a second name
    holds another tensor than the first.
    """
    refuse_misfit(table, theirs, like, source)
    refuse_unsound({name: theirs[name] for row in table.rows for name in row.theirs}, source)
    for second, first in table.copies.items():
        if second in theirs and not torch.equal(theirs[second], theirs[first]):
            raise ValueError(
                f"{source}: {second} differs from {first}, but {table.layout} shares them: is it of another layout?"
            )
    return {row.ours: _read(row, theirs) for row in table.rows}


def refuse_misfit(table: Table, theirs: Mapping[str, Tensor], like: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError for an unknown or missing key, a shape or type that differs, or a key of `like` not filled.

    Only names, shapes and types are compared, so `like` may be on the meta device.
    """
    known = {name for row in table.rows for name in row.theirs} | set(table.copies) | set(table.dropped)
    _refuse(source, "does not know", sorted(set(theirs) - known), table, "is it a checkpoint of another task?")
    needed = list(dict.fromkeys(name for row in table.rows for name in row.theirs))
    _refuse(source, "needs", [name for name in needed if name not in theirs], table, "is the file complete?")
    unfilled = sorted(set(like) - {row.ours for row in table.rows} - set(table.fresh))
    if unfilled:
        raise ValueError(f"{table.layout} has nothing for the model's {some_of(unfilled)}: build a model of its shape")
    for row in table.rows:
        _refuse_row(row, theirs, like, source)


def refuse_type(name: str, actual: Tensor, like: Tensor, source: str) -> None:
    """Raise ValueError if a tensor would have to be cast to the type of `like` other than from number to number."""
    numbers = like.dtype in NUMBERS
    if actual.dtype not in NUMBERS if numbers else actual.dtype != like.dtype:
        wanted = "numbers of 16, 32 or 64 bits" if numbers else type_in_words(like.dtype)
        raise ValueError(f"{source}: {name} is {type_in_words(actual.dtype)}, the model takes {wanted}")


def refuse_unsound(state: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError, naming the first, if a tensor holds NaN or infinity; every number is read once."""
    for name, tensor in state.items():
        # Minimum and maximum, which NaN makes NaN: 15 times as fast as a mask of finite values.
        counts = tensor.is_floating_point() and tensor.numel() and not tensor.is_meta
        if counts and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise ValueError(
                f"{source}: {name} holds NaN or infinity, so the model is unusable: its training diverged, use an "
                "earlier checkpoint"
            )


def type_in_words(dtype: torch.dtype) -> str:
    """Readable name of a type."""
    return str(dtype).removeprefix("torch.")


def _refuse_row(row: TensorRow, theirs: Mapping[str, Tensor], like: Mapping[str, Tensor], source: str) -> None:
    if row.ours not in like:
        raise ValueError(f"{source}: {row.theirs[0]} has no place {row.ours} in the model: build a model of its shape")
    shape = list(_their_form(row, like[row.ours]).shape)
    if len(row.theirs) > 1:
        shape[0] //= len(row.theirs)
    for name in row.theirs:
        if list(theirs[name].shape) != shape:
            raise ValueError(
                f"{source}: {name} is {in_words(theirs[name].shape)}, the model takes {in_words(shape)}: {_why(name)}"
            )
        refuse_type(name, theirs[name], like[row.ours], source)


def _read(row: TensorRow, theirs: Mapping[str, Tensor]) -> Tensor:
    parts = [theirs[name] for name in row.theirs]
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    if row.change == "transpose":
        return whole.t().contiguous()
    return whole.squeeze() if row.change == "scalar" else whole


def _their_form(row: TensorRow, ours: Tensor) -> Tensor:
    if row.change == "transpose":
        return ours.t()
    return ours.reshape(1) if row.change == "scalar" else ours


def to_theirs(table: Table, ours: Mapping[str, Tensor]) -> State:
    """Our tensors -> the foreign layout, second names included; keys listed as dropped are not written.

    ValueError if one of ours that the table needs is missing, or if the layout has no place for one of ours.
    """
    missing = [row.ours for row in table.rows if row.ours not in ours]
    if missing:
        raise ValueError(f"{table.layout} needs {some_of(missing)}, which the model does not have")
    homeless = sorted(set(ours) - {row.ours for row in table.rows} - set(table.fresh))
    if homeless:
        raise ValueError(f"{table.layout} has no place for the model's {some_of(homeless)}: it cannot hold this model")
    theirs: State = {}
    for row in table.rows:
        whole = _their_form(row, ours[row.ours])
        theirs.update(zip(row.theirs, whole.chunk(len(row.theirs)) if len(row.theirs) > 1 else [whole], strict=True))
    theirs.update({second: theirs[first] for second, first in table.copies.items()})
    return {name: tensor.contiguous() for name, tensor in theirs.items()}


def _refuse(source: str, verb: str, names: list[str], table: Table, remedy: str) -> None:
    if names:
        raise ValueError(f"{source}: {table.layout} {verb} {some_of(names)}: {remedy}")


def some_of(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(name[:100] for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def in_words(shape: Iterable[int]) -> str:
    """Readable form of a shape."""
    return " x ".join(str(n) for n in shape) or "a scalar"


def _why(name: str) -> str:
    if name.endswith(("pos_embed", "embeddings.position_embedding")):
        return "set vision.image_size (and patch_size) to those of the checkpoint, and resize afterwards"
    if name.endswith(("word_embeddings.weight", "predictions.bias")):
        return "set text.vocab_size to that of the checkpoint and use its tokenizer"
    if name.endswith("queue"):
        return "set queue_size and embed_dim to those of the checkpoint"
    return "set the sizes in the model config to those of the checkpoint"
