"""Export a model for other programs: a folder that transformers or the 2022 code loads, with a model card."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from blip import files
from blip.checkpoints.card import WEIGHTS, Provenance, card
from blip.checkpoints.foreign import HEADS_KEY, LAYOUTS, ForeignLayout
from blip.checkpoints.layouts import teacher_copies
from blip.checkpoints.table import State, to_theirs
from blip.models.blip import Blip, Captioner, Matcher
from blip.models.nlvr import Nlvr
from blip.models.vqa import Vqa
from blip.origin import KEY
from blip.tensors import tensor_bytes, write_tensors
from blip.tokenizer import Tokenizer

Use = Literal["pretraining", "captioning", "matching", "vqa", "nlvr"]
_USES: dict[type, tuple[str, ...]] = {
    Blip: ("pretraining", "captioning", "matching"),
    Captioner: ("captioning",),
    Matcher: ("matching",),
    Vqa: ("vqa",),
    Nlvr: ("nlvr",),
}


def layout_for(model: Any, to: Literal["transformers", "original"], use: Use | None = None) -> ForeignLayout:
    """The layout to export a model in. ValueError, listing the choices, if there is none or it must be chosen."""
    kind = type(model)
    there = {layout.name: layout for layout in LAYOUTS if layout.program == to and layout.name in _USES.get(kind, ())}
    if not there:
        raise ValueError(f"{to} has no model like {kind.__name__}: use --to openblip")
    if use is not None and use not in there:
        raise ValueError(f"this model cannot be written for {use} in {to}: it can be for {', '.join(there)}")
    if use is None and len(there) > 1 and "pretraining" not in there:
        raise ValueError(f"{to} has a model for each use: give --use {' or --use '.join(there)}")
    return there[use or next(iter(there))]


def _refuse_other_vit(model: Any, to: str) -> None:
    """Refuse towers other than the plain ViT of the original and transformers, which names and shapes may not show."""
    vit = model.vision.vit
    block = vit.blocks[0]
    act = getattr(block.mlp, "act", None)
    exact = type(act).__name__ == "GELU" and getattr(act, "approximate", "none") == "none"
    if not exact or getattr(vit, "pos_embed", None) is None or vit.num_prefix_tokens != 1:
        raise ValueError(
            f"the image encoder {model.config.vision.model} is not the plain ViT of BLIP, the only one that {to} has: "
            "use --to openblip"
        )


def write(
    model: Any,
    tokenizer: Tokenizer,
    target: Path,
    to: Literal["transformers", "original"],
    origin: Provenance,
    use: Use | None = None,
) -> ForeignLayout:
    """Export a model for another program into a new folder, all or nothing; returns its layout.

    ValueError for a model that the program does not support or another model's tokenizer, files.WriteError if writing
    fails.
    """
    layout = layout_for(model, to, use)
    tokenizer.check(model.config.text)
    _refuse_other_vit(model, to)
    if to == "transformers" and layout.name == "vqa" and model.vision.width != model.config.text.width:
        raise ValueError(
            "transformers cannot hold this model: its decoder would have to read questions as wide as images "
            f"({model.vision.width}), and they are {model.config.text.width} wide; use --to original or openblip"
        )
    if isinstance(model, Nlvr) and (model.config.images, model.config.text.layers) != (2, 12):
        raise ValueError(
            f"the code of 2022 reasons over 2 images with 12 layers, this model over {model.config.images} with "
            f"{model.config.text.layers}: use --to openblip"
        )
    state = to_theirs(layout.table(model), model.state_dict())
    if to == "original" and layout.name in ("pretraining", "matching"):
        state |= {second: state[first] for second, first in teacher_copies(model).items()}
    hidden = model.vision.vit.blocks[0].mlp.fc1.out_features
    if to == "original" and hidden != 4 * model.vision.width:
        raise ValueError(
            f"the image encoder's feed-forward is {hidden} wide, and the code of 2022 has 4 times "
            f"its width ({4 * model.vision.width}) and no setting for it: use --to transformers or openblip"
        )
    if to == "original" and model.vision.vit.norm.eps != 1e-6:
        raise ValueError(
            f"the image encoder's norms have epsilon {model.vision.vit.norm.eps}, and the code of 2022 has 1e-6 and no "
            "setting for it: use --to transformers or openblip"
        )
    with tempfile.TemporaryDirectory() as scratch:
        texts = _beside(Path(scratch), model, tokenizer, layout, origin)
    texts["README.md"] = card(layout, origin, model).encode()
    writers: dict[str, tuple[Callable[[Path], None], int]] = {
        name: (lambda path, content=content: files.write_bytes(path, content), len(content))
        for name, content in texts.items()
    }
    size = tensor_bytes(state)
    if to == "transformers":
        weights = {name: state[name] for name in state if name not in layout.table(model).copies}
        writers[WEIGHTS[to]] = (lambda path: write_tensors(path, weights), size)
    else:
        writers[WEIGHTS[to]] = (lambda path: _write_pth(path, state, model, layout, origin), size)
    files.write_directory(target, writers)
    return layout


def _beside(
    scratch: Path, model: Any, tokenizer: Tokenizer, layout: ForeignLayout, origin: Provenance
) -> dict[str, bytes]:
    """Names and contents of the files in addition to weights and card."""
    if layout.program == "transformers":
        from blip.checkpoints import hugging_face

        hugging_face.write(scratch, model, tokenizer, layout.name, origin.trained_on)
    else:
        tokenizer.save(scratch)
    return {path.name: path.read_bytes() for path in scratch.iterdir()}


def _write_pth(path: Path, state: State, model: Any, layout: ForeignLayout, origin: Provenance) -> None:
    """Write the original's checkpoint with torch.save, with position buffers and the head counts."""
    counted: dict[str, Tensor] = {}
    for name in layout.table(model).dropped:
        if name.endswith("position_ids"):
            counted[name] = torch.arange(model.config.text.max_positions)[None]
    heads = {"vision": model.vision.vit.blocks[0].attn.num_heads, "text": model.config.text.heads}
    origins = {KEY: list(origin.trained_on)} if origin.trained_on else {}
    torch.save({"model": state | counted, HEADS_KEY: heads, **origins}, path)
