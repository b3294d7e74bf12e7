"""transformers' files of a BLIP: read its config.json, and write the files beside the weights."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any, Literal, NoReturn

from transformers import BlipConfig as TheirConfig
from transformers import BlipImageProcessor, BlipProcessor, GenerationConfig

from blip.checkpoints.settings import Settings
from blip.checkpoints.weights import read_json
from blip.inference.settings import DECODE_PRESETS, AnswerConfig
from blip.nn.pixels import MEAN, STD
from blip.nn.settings import TrainingOptions
from blip.origin import KEY
from blip.tokenizer import Tokenizer

CLASSES = {
    "captioning": "BlipForConditionalGeneration",
    "matching": "BlipForImageTextRetrieval",
    "vqa": "BlipForQuestionAnswering",
}
"""transformers' class by use of a model."""
DECODE = {"captioning": DECODE_PRESETS["caption_2022"], "vqa": AnswerConfig().decode()}
"""Decoding settings by use of a model."""
VISION_EPS = 1e-6
"""Epsilon of the image encoder's norms in the 2022 release, and in timm; transformers' own default is 1e-5."""


def read_settings(path: Path) -> Settings:
    """Read the settings of a config.json that shapes do not show; a missing one has transformers' default.

    Only the fields that are used are read: others may have any value, such as a billion class names. ValueError if it
    is not of a BLIP, or of a variant that computes differently, or if a field has the wrong type.
    """
    settings = read_json(path)
    if settings.get("model_type") != "blip":
        kind = str(settings.get("model_type"))[:60]
        raise ValueError(
            f"{path} is of a {kind} model, not of a BLIP (model_type blip); BLIP-2 and InstructBLIP are other models"
        )
    default = TheirConfig()
    text = _Part(path, settings, "text_config", default.text_config)
    vision = _Part(path, settings, "vision_config", default.vision_config)
    for part in (text, vision):
        if (act := part.get("hidden_act")) != "gelu":
            raise ValueError(f"{path}: {part.name}.hidden_act is {str(act)[:60]}, this program computes gelu")
    eps = vision.share("layer_norm_eps")
    return Settings(
        vision.whole("num_attention_heads", least=1),
        text.whole("num_attention_heads", least=1),
        None if eps == VISION_EPS else eps,
        {"norm_eps": text.share("layer_norm_eps")},
        TrainingOptions(
            dropout=text.share("hidden_dropout_prob"), attention_dropout=text.share("attention_probs_dropout_prob")
        ),
        {name: text.whole(theirs) for name, theirs in _IDS.items()},
        {
            f"{part.name}.{field}": part.whole(field, least=1)
            for part in (vision, text)
            for field in _SIZES[part.name]
            if field in part.values
        },
    )


_IDS = {"dec_id": "bos_token_id", "sep_id": "sep_token_id", "pad_id": "pad_token_id"}


class _Part:
    """Read a part of transformers' config.json field by field; missing fields have transformers' defaults."""

    def __init__(self, path: Path, settings: dict[str, Any], name: str, default: Any) -> None:
        values = settings.get(name)
        if not isinstance(values, dict | None):
            raise ValueError(f"{path}: {name} must be an object, got {reprlib.repr(values)}")
        self.path, self.name, self.values, self.default = path, name, values or {}, default

    def get(self, field: str) -> Any:
        return self.values.get(field, getattr(self.default, field))

    def whole(self, field: str, least: int = 0) -> int:
        value = self.get(field)
        if type(value) is not int or not least <= value < 1 << 24:
            self._refuse(field, f"an integer from {least} to {(1 << 24) - 1:,}", value)
        return value

    def share(self, field: str) -> float:
        value = self.get(field)
        if type(value) not in (int, float) or not 0 <= value <= 1:
            self._refuse(field, "a number from 0 to 1", value)
        return float(value)

    def _refuse(self, field: str, wanted: str, value: Any) -> NoReturn:
        raise ValueError(f"{self.path}: {self.name}.{field} must be {wanted}, got {reprlib.repr(value)}")


_SIZES = {
    "vision_config": ("hidden_size", "num_hidden_layers", "intermediate_size", "image_size", "patch_size"),
    "text_config": ("hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings"),
}
"""Fields that the shapes of the weights show, too."""


def write(
    folder: Path,
    model: Any,
    tokenizer: Tokenizer,
    name: Literal["captioning", "matching", "vqa"],
    trained_on: tuple[str, ...] = (),
) -> None:
    """Write the files beside the weights: config.json, generation_config.json, image processor and tokenizer.

    For matching and questions the tokenizer begins texts with [ENC], as in training.
    """
    config = their_config(model)
    config.architectures = [CLASSES[name]]
    config.dtype = "float32"
    if trained_on:
        setattr(config, KEY, list(trained_on))
    config.save_pretrained(folder)
    side = model.config.vision.image_size
    images = BlipImageProcessor(
        size={"height": side, "width": side}, image_mean=list(MEAN), image_std=list(STD), resample=3
    )
    BlipProcessor(images, tokenizer.for_transformers("cls" if name == "captioning" else "enc")).save_pretrained(folder)
    if name != "matching":
        decode, text = DECODE[name], model.config.text
        generation = GenerationConfig(
            num_beams=decode.beams,
            max_length=decode.max_length,
            min_length=decode.min_length,
            bos_token_id=text.dec_id,
            eos_token_id=text.sep_id,
            pad_token_id=text.pad_id,
        )
        generation.save_pretrained(folder)


def their_config(model: Any) -> TheirConfig:
    """transformers' configuration of a model of ours. ValueError for a model that it cannot describe."""
    text, vision, vit = model.config.text, model.config.vision, model.vision.vit
    shared = {"hidden_act": "gelu"}
    return TheirConfig(
        text_config=shared
        | {
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "encoder_hidden_size": model.vision.width,
            "intermediate_size": text.hidden,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "max_position_embeddings": text.max_positions,
            "layer_norm_eps": text.norm_eps,
            "hidden_dropout_prob": model.options.dropout,
            "attention_probs_dropout_prob": model.options.attention_dropout,
            "initializer_range": text.init_std,
            "bos_token_id": text.dec_id,
            "eos_token_id": text.sep_id,
            "sep_token_id": text.sep_id,
            "pad_token_id": text.pad_id,
        },
        vision_config=shared
        | {
            "hidden_size": model.vision.width,
            "intermediate_size": vit.blocks[0].mlp.fc1.out_features,
            "num_hidden_layers": len(vit.blocks),
            "num_attention_heads": vit.blocks[0].attn.num_heads,
            "image_size": vision.image_size,
            "patch_size": vit.patch_embed.patch_size[0],
            "layer_norm_eps": vit.norm.eps,
            "initializer_range": 0.02,
        },
        image_text_hidden_size=model.config.embed_dim,
    )
