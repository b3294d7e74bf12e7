"""The image encoder: any timm ViT as image -> tokens. B batch, P image tokens, V width, S image side in pixels.

timm, which is slow to import, is imported when an encoder is built: settings and `--help` need none.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from blip.nn.attention import plain_is_faster
from blip.nn.linear import adopt
from blip.nn.settings import TrainingOptions, VisionConfig

_EXPECTED = "expected a timm ViT with a class token, such as those of DeiT, MAE, BEiT, CLIP, DINO and EVA"


class VisionEncoder(nn.Module):
    """A timm ViT without pooling or head (paper, section 3.1). ValueError if the timm model is not such a ViT."""

    def __init__(self, config: VisionConfig, options: TrainingOptions) -> None:
        from timm.layers import LayerNorm

        super().__init__()
        shape = {"patch_size": config.patch_size, "embed_dim": config.width, "depth": config.depth}
        shape["num_heads"] = config.heads
        arguments = {name: value for name, value in shape.items() if value is not None}
        if config.hidden is not None:
            arguments["mlp_ratio"] = _ratio(config)
        if options.patch_drop:
            arguments["patch_drop_rate"] = options.patch_drop
        if config.norm_eps is not None:
            arguments["norm_layer"] = partial(LayerNorm, eps=config.norm_eps)
        self.vit = _build(config, arguments | {"drop_path_rate": options.drop_path})
        adopt(self.vit)
        if config.init_gain is not None:
            _start_narrow(self.vit, config.init_gain)
        if options.checkpoint:
            self.vit.set_grad_checkpointing(True)
        self.image_size = config.image_size
        self.width: int = self.vit.num_features

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) normalised -> (B, P, V), the class token first. ValueError if S is not `image_size`."""
        from timm.layers import Attention

        if image.shape[-2:] != (self.image_size, self.image_size):
            height, width = image.shape[-2:]
            raise ValueError(f"the image is {height} x {width}, the model takes {self.image_size} x {self.image_size}")
        fused = not plain_is_faster(image)
        for part in self.vit.modules():
            if isinstance(part, Attention):
                part.fused_attn = fused
        return self.vit.forward_features(image)


def _ratio(config: VisionConfig) -> float:
    """Ratio by which timm multiplies `width`, rounding down, to get `hidden`. ValueError without a width."""
    if config.width is None:
        raise ValueError(f"vision.hidden {config.hidden} needs vision.width beside it")
    return (config.hidden + 0.5) / config.width


def _build(config: VisionConfig, arguments: dict[str, Any]) -> nn.Module:
    """Build the timm model. ValueError for one without a class token and one token for each patch."""
    import timm
    from timm.models.beit import Beit
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    if not timm.is_model(config.model):
        reason = f"timm {timm.__version__} has no such architecture"
        raise ValueError(f"vision.model {config.model} cannot be an image encoder here ({reason}): {_EXPECTED}")
    fixed = {"img_size": config.image_size, "num_classes": 0, "global_pool": ""}
    try:
        vit = timm.create_model(config.model, **fixed, **arguments)
    except Exception as error:  # whose type depends on the kind of model
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise ValueError(
            f"vision.model {config.model} cannot be an image encoder here ({reason}): {_EXPECTED}"
        ) from None
    plain = isinstance(vit, VisionTransformer | Beit | Eva) and not hasattr(vit.patch_embed, "backbone")
    if not plain or getattr(vit, "cls_token", None) is None:
        lacks = "has no class token" if plain else f"is a {type(vit).__name__}, not a plain ViT"
        raise ValueError(f"vision.model {config.model} {lacks}: {_EXPECTED}")
    return vit


@torch.no_grad()
def _start_narrow(vit: nn.Module, gain: float) -> None:
    """Initialise a narrow ViT that learns from scratch: linear maps that preserve the scale of their inputs, and
    sinusoidal positions, large and of wavelengths short enough that neighbouring patches are far apart."""
    from timm.layers import build_sincos2d_pos_embed

    for module in vit.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=gain / module.in_features**0.5)
        elif isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=gain / module.weight[0].numel() ** 0.5)
    prefix, width = vit.num_prefix_tokens, vit.embed_dim
    grid = vit.patch_embed.grid_size
    vit.pos_embed[:, prefix:] = 2 * build_sincos2d_pos_embed(grid, width, max(4.0, *grid), interleave_sin_cos=True)
    vit.pos_embed[:, :prefix] = 0


def resize_positions(positions: Tensor, image_size: int, patch_size: int, prefix: int = 1) -> Tensor:
    """Resize position embeddings (1, prefix + N, V) of a square image, bicubic, without a change to the prefix.

    The interpolation is the original release's (no anti-aliasing, corners not aligned), so its results carry over.
    ValueError if `image_size` is not a multiple of `patch_size`; both in pixels.
    """
    from timm.layers import resample_abs_pos_embed

    if image_size % patch_size:
        raise ValueError(f"image size {image_size} is not a multiple of the patch size {patch_size}")
    grid = image_size // patch_size
    return resample_abs_pos_embed(positions, [grid, grid], num_prefix_tokens=prefix, antialias=False)


def fit_positions(vit: nn.Module, positions: Tensor, image_size: int) -> Tensor:
    """Resize position embeddings (1, prefix + N, V) for a timm ViT of `image_size` (pixels) unless they fit."""
    if positions.shape == vit.pos_embed.shape:
        return positions
    prefix = 0 if getattr(vit, "no_embed_class", False) else vit.num_prefix_tokens
    return resize_positions(positions, image_size, vit.patch_embed.patch_size[0], prefix)
