"""Three steps of the original pre-training, recorded; README.md says how."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from blip.models.settings import BlipConfig
from blip.nn.settings import TextConfig, VisionConfig
from blip.objectives.batch import Batch
from blip.objectives.pretrain import PretrainConfig

HERE = Path(__file__).parent
STEPS = 3
CONFIG = BlipConfig(
    vision=VisionConfig("vit_tiny_patch16_224", image_size=32, patch_size=8, width=32, depth=2, heads=2),
    text=TextConfig(
        vocab_size=99, width=24, layers=2, heads=2, hidden=48, max_positions=32, dropout=0.0, attention_dropout=0.0,
        pad_id=0, cls_id=2, sep_id=3, dec_id=97, enc_id=98,
    ),
    embed_dim=16,
)  # fmt: skip
PRETRAIN = PretrainConfig(queue_size=24, momentum=0.9, alpha=0.4, alpha_ramp_epochs=2.0)


def checkpoint() -> dict[str, torch.Tensor]:
    """The state dict of the original before step 0, with every second name and buffer that it lists."""
    state = load_file(HERE / "weights.safetensors")
    state |= {second: state[first] for second, first in json.loads((HERE / "shared.json").read_text())["same"].items()}
    positions = torch.arange(CONFIG.text.max_positions)[None]
    return (
        state
        | {f"{at}.embeddings.position_ids": positions for at in ("text_encoder", "text_encoder_m")}
        | {"text_decoder.bert.embeddings.position_ids": positions}
    )


def batch(step: int, trim: bool = False) -> Batch:
    """The 4 pairs of a step; texts padded to 30 tokens as in the original, or trimmed to the longest."""
    inputs = load_file(HERE / "inputs.safetensors")
    image, ids, keep = (inputs[f"{step}.{name}"] for name in ("image", "ids", "keep"))
    length = int(keep.sum(1).max()) if trim else keep.shape[1]
    return Batch(image, ids[:, :length].long(), keep[:, :length], [f"{step}:{i}" for i in range(len(ids))])


def results() -> dict[str, torch.Tensor]:
    """What the original answered; names in README.md."""
    return load_file(HERE / "results.safetensors")


def searched(name: str) -> list[list[int]]:
    """60 texts that the original's beam search found, ids behind the prompt; settings in README.md."""
    return json.loads((HERE / "search_2022.json").read_text())[name]


def keys(layout: str) -> dict[str, list[int]]:
    """Names and shapes in the state dict of the original's class for pretraining, captioning, retrieval or vqa."""
    return json.loads((HERE / "keys.json").read_text())[layout]


def released(program: str, name: str) -> dict[str, list[int]]:
    """Names and shapes of a class of the original, or of LAVIS, at its released size, such as "retrieval large"."""
    entry = json.loads((HERE / "released_keys.json").read_text())[program][name]
    if program == "lavis":
        own = released("original", entry["as"])
        return {key: shape for key, shape in own.items() if key not in entry["without"]} | entry["more"]
    whole: dict[str, list[int]] = {}
    for key, shape in entry.items():
        numbered = re.search(r"\.(\d+)-(\d+)\.", key)
        if not numbered:
            whole[key] = shape
            continue
        for i in range(int(numbered[1]), int(numbered[2]) + 1):
            whole[key.replace(numbered[0], f".{i}.")] = shape
    return whole
