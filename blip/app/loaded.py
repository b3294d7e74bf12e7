"""The model that a sub-command uses, ready to answer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from blip.app.commands.shared import MODEL_VARIABLE
from blip.checkpoints import checkpoint
from blip.data.image_files import reader
from blip.errors import is_out_of_memory
from blip.inference.features import Features
from blip.models.blip import Blip
from blip.origin import print_note
from blip.tensors import add_to_digest
from blip.tokenizer import Tokenizer


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer, device and precision."""

    model: Blip
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype
    trained_on: tuple[str, ...] = ()
    """Origins of the images that the model was trained on."""

    def options(self, where: str | None) -> dict[str, str]:
        """Options that answers depend on: the model's name, the SHA-256 of its weights, and the precision."""
        digest = hashlib.sha256(type(self.model).__name__.encode())
        add_to_digest(digest, self.model.state_dict())
        precision = str(self.dtype).removeprefix("torch.")
        name = where or os.environ.get(MODEL_VARIABLE, "")
        return {"model": name, "weights": digest.hexdigest()[:16], "precision": precision}

    def features(self, batch: int = 32) -> Features:
        """Features of files and texts, `batch` images at once; ValueError if the model cannot match texts."""
        return Features(self.model, self.tokenizer, reader(self.model.config.vision.image_size), batch=batch)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Context for every use of the model: its precision, and a one-line error if memory runs out."""
        try:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise ValueError(f"out of memory on {self.device}: give a smaller --batch, or --device cpu") from None


def load(where: str | None, device: str, precision: str, kind: type = Blip, *, tokenizer: str | None = None) -> Loaded:
    """Load the model that --model, --device, --precision and --tokenizer describe; `kind` is the expected class.

    One-line ValueError or OSError if the model, device or precision is not available.
    """
    where = where or os.environ.get(MODEL_VARIABLE)
    if not where:
        raise ValueError(
            "no model: give --model DIR, a folder that training wrote (such as runs/demo/model) or a name on the hub, "
            f"or set the environment variable {MODEL_VARIABLE} to one"
        )
    place = _device(device)
    if precision == "float16" and place.type == "cpu":
        raise ValueError("--precision float16 needs a GPU; use float32 or bfloat16")
    source = checkpoint.opened(where)
    model, words = checkpoint.from_pretrained(source, kind, device=place, tokenizer=tokenizer)
    print_note(source.trained_on, once=True)
    dtype = torch.float32 if precision == "auto" else getattr(torch, precision)
    return Loaded(model, words, place, dtype, source.trained_on)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # torch raises RuntimeError, AssertionError, NotImplementedError, ...
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"--device {name} cannot be used here ({reason}); try cpu") from None
    return device
