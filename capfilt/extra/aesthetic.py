"""How much people would like an image: a linear layer on CLIP's image embedding, as LAION's aesthetic predictors are.

Reads folders as `transformers` saves them: CLIP's image tower under its own names, and the layers on top of it as
`predictor` (one layer) or `layers.N` (several without activations between them, as in the improved predictor).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from blip import dist, hub
from blip.checkpoints.naming import repository
from blip.errors import DataError
from blip.files import sha256
from capfilt.extra.scorer import RowTexts

_FILES = ("config.json", "model.safetensors", "preprocessor_config.json")
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's own, where there is no preprocessor_config.json."""
_DROPPED = ("vision_model.embeddings.position_ids",)
"""Weights of older files that are numbers from 0."""


class Aesthetic:
    """Score of an image, in LAION's predictors about 1 to 10. Images are scaled to a square, not cropped."""

    name = "aesthetic"
    columns = {"score": pa.float32()}  # noqa: RUF012

    def __init__(self, where: str, device: str | None = None) -> None:
        """Load the model of a folder or of the hub (ORG/NAME or ORG/NAME@REVISION), in float32.

        FileNotFoundError if there is none; DataError if it is no such model or lacks a tensor.
        """
        folder = _folder(where)
        self._device = torch.device(str(dist.own_device()) if device in (None, "auto", "cuda") else device)
        self._tower, self._head = (part.to(self._device).eval().requires_grad_(False) for part in _load(folder))
        self.side = self._tower.config.image_size
        given = json.loads((folder / _FILES[2]).read_bytes()) if (folder / _FILES[2]).is_file() else {}
        mean, std = given.get("image_mean", _MEAN), given.get("image_std", _STD)
        self._mean, self._std = (torch.tensor(v, device=self._device).view(3, 1, 1) for v in (mean, std))
        hashes = {name: sha256(folder / name) for name in _FILES if (folder / name).is_file()}
        self.identity = {"model": where, "files": hashes}

    @torch.inference_mode()
    def score(self, images: Sequence[np.ndarray], texts: Sequence[RowTexts]) -> dict[str, list]:
        """Score images (B, S, S, 3)."""
        pixels = torch.from_numpy(np.stack(images)).to(self._device).permute(0, 3, 1, 2).float().div(255)
        embedded = self._tower(pixels.sub(self._mean).div(self._std)).image_embeds
        return {"score": self._head(F.normalize(embedded, dim=-1)).squeeze(-1).tolist()}


def _load(folder: Path) -> tuple[CLIPVisionModelWithProjection, nn.Module]:
    """Build tower and head; every tensor of the file must be used, and none be missing."""
    config = json.loads((folder / _FILES[0]).read_bytes())
    architecture = ", ".join(config.get("architectures") or [])
    if config.get("model_type") not in ("clip", "clip_vision_model") or "ReLU" in architecture:
        raise DataError(
            f"{folder} is no aesthetic model: expected a CLIP image tower with linear layers on top, got "
            f"{config.get('model_type')} {architecture}"
        )
    try:
        weights = load_file(folder / _FILES[1])
    except SafetensorError as error:
        raise DataError(f"{folder / _FILES[1]} cannot be read: {error}") from None
    weights = {name: weight.float() for name, weight in weights.items() if name not in _DROPPED}
    of_head = {name: weights.pop(name) for name in list(weights) if name.startswith(("predictor.", "layers."))}
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(config.get("vision_config", config)))
    try:
        tower.load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(f"{folder}: {' '.join(str(error).split())[:300]}") from None
    return tower, _head(of_head, tower.config.projection_dim, folder)


def _head(weights: dict[str, Tensor], width: int, folder: Path) -> nn.Module:
    """Build linear layers in the order of their numbers, from the embedding's width to one score."""
    numbers = {name.rpartition(".")[0]: int("0" + name.split(".")[1]) if "layers." in name else 0 for name in weights}
    layers: list[nn.Module] = []
    try:
        for name in sorted(numbers, key=numbers.get):
            weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
            if weight.ndim != 2 or weight.shape[1] != width:
                raise ValueError(f"{name}.weight is {tuple(weight.shape)}, after a width of {width}")
            layer = nn.Linear(width, len(weight))
            layer.load_state_dict({"weight": weight, "bias": bias})
            layers, width = [*layers, layer], len(weight)
    except (KeyError, ValueError, RuntimeError) as error:
        raise DataError(f"{folder}: its layers on top of CLIP do not fit: {error}") from None
    if not layers or width != 1:
        raise DataError(f"{folder}: expected linear layers (predictor or layers.N) that end in one score")
    return nn.Sequential(*layers)


def _folder(where: str) -> Path:
    """Return the folder of a model, downloaded if it is one of the hub."""
    folder = Path(where).expanduser()
    if not folder.is_dir():
        named = repository(where)
        if named is None:
            raise FileNotFoundError(
                f"--also aesthetic={where}: there is no such folder, and it is no ORG/NAME of the hub"
            )
        folder = hub.folder(*named, (_FILES,), _is_complete, "aesthetic=FOLDER")
    for name in _FILES[:2]:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"--also aesthetic={where}: it has no {name}")
    return folder


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES[:2])
