"""transformers' side of a BLIP: its config.json read, and the files beside the weights written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from transformers import BlipConfig as TheirConfig
from transformers import BlipImageProcessor, BlipProcessor, GenerationConfig

from blip.config import DECODE_PRESETS, AnswerConfig
from blip.convert.files import read_json
from blip.convert.foreign import Settings
from blip.data.transforms import MEAN, STD
from blip.tokenizer import Tokenizer

CLASSES = {
    "captioning": "BlipForConditionalGeneration",
    "matching": "BlipForImageTextRetrieval",
    "vqa": "BlipForQuestionAnswering",
}
"""What a model is for -> transformers' class."""
DECODE = {"captioning": DECODE_PRESETS["caption_2022"], "vqa": AnswerConfig().decode()}
"""What a model is for -> how it writes."""
VISION_EPS = 1e-6
"""Epsilon of the image encoder's norms in the 2022 release, and in timm; transformers' own default is 1e-5."""


def read_settings(path: Path) -> Settings:
    """What a config.json says that shapes do not; what it leaves out is transformers' default, as it is for them.

    ValueError if it is not of a BLIP, or of one that computes otherwise.
    """
    said = read_json(path)
    if said.get("model_type") != "blip":
        raise ValueError(
            f"{path} is of a {said.get('model_type')} model, not of a BLIP (model_type blip); BLIP-2 and InstructBLIP "
            "are other models"
        )
    try:
        found = TheirConfig.from_dict(said)
    except Exception as error:  # transformers checks types with errors of its own
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    text, vision = found.text_config, found.vision_config
    for part, values in (("text_config", text), ("vision_config", vision)):
        if values.hidden_act != "gelu":
            raise ValueError(f"{path}: {part}.hidden_act is {values.hidden_act}, this program computes gelu")
    return Settings(
        vision.num_attention_heads,
        text.num_attention_heads,
        None if vision.layer_norm_eps == VISION_EPS else vision.layer_norm_eps,
        {
            "norm_eps": text.layer_norm_eps,
            "dropout": float(text.hidden_dropout_prob),
            "attention_dropout": float(text.attention_probs_dropout_prob),
        },
        {"dec_id": text.bos_token_id, "sep_id": text.sep_token_id, "pad_id": text.pad_token_id},
    )


def write(folder: Path, model: Any, tokenizer: Tokenizer, name: Literal["captioning", "matching", "vqa"]) -> None:
    """Write what stands beside the weights: config.json, generation_config.json, image processor and tokenizer.

    Texts that are matched, and questions, begin with [ENC] as in training: the tokenizer that is written sees to it.
    """
    config = their_config(model)
    config.architectures = [CLASSES[name]]
    config.dtype = "float32"
    config.save_pretrained(folder)
    side = model.config.vision.image_size
    images = BlipImageProcessor(
        size={"height": side, "width": side}, image_mean=list(MEAN), image_std=list(STD), resample=3
    )
    BlipProcessor(images, tokenizer.for_transformers("cls" if name == "captioning" else "enc")).save_pretrained(folder)
    if name != "matching":
        decode, text = DECODE[name], model.config.text
        found = GenerationConfig(
            num_beams=decode.beams,
            max_length=decode.max_length,
            min_length=decode.min_length,
            bos_token_id=text.dec_id,
            eos_token_id=text.sep_id,
            pad_token_id=text.pad_id,
        )
        found.save_pretrained(folder)


def their_config(model: Any) -> TheirConfig:
    """transformers' configuration of a model of ours. ValueError for a model that it cannot say."""
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
            "hidden_dropout_prob": text.dropout,
            "attention_probs_dropout_prob": text.attention_dropout,
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
