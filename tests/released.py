"""Checkpoints as the original writes them, with the recorded weights: stand-ins for released ones."""

from pathlib import Path

import goldens
import torch
from safetensors.torch import load_file

from blip.models.settings import NlvrModelConfig
from blip.nn.settings import TextConfig, VisionConfig

NAMES = ("pretraining", "captioning", "retrieval", "matching", "vqa", "nlvr")
HEADS = {32: 2, 24: 2, 16: 2}
"""Of the recorded models, whose widths were never released."""
NLVR = NlvrModelConfig(
    vision=VisionConfig("vit_tiny_patch16_224", image_size=32, patch_size=8, width=24, depth=2, heads=2),
    text=TextConfig(
        vocab_size=99, width=16, layers=12, heads=2, hidden=32, max_positions=32, dropout=0.0, attention_dropout=0.0,
        cls_id=2, sep_id=3, dec_id=97, enc_id=98,
    ),
)  # fmt: skip


def vocabulary(folder: Path) -> Path:
    """The 97 pieces of the recorded models as vocab.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(92))]) + "\n")
    return path


def state(name: str) -> dict[str, torch.Tensor]:
    """The state dict of the original's class, buffers and second names included."""
    whole = goldens.checkpoint()
    if name == "pretraining":
        return whole
    if name == "captioning":
        return {key: whole[key] for key in goldens.keys(name)}
    if name in ("retrieval", "matching"):
        whole |= {"idx_queue": torch.full((1, 24), -100), "ptr_queue": torch.zeros(1, dtype=torch.long)}
        tensors = {key: whole[key] for key in goldens.keys("retrieval")}
        training = ("_m.", "queue", "temp")
        return (
            tensors if name == "retrieval" else {k: v for k, v in tensors.items() if not any(t in k for t in training)}
        )
    if name == "vqa":
        tensors = {k: v for k, v in whole.items() if k.startswith(("visual_encoder.", "text_encoder."))}
        tensors |= {
            k: v for k, v in load_file(goldens.HERE / "vqa.safetensors").items() if k.startswith("text_decoder.")
        }
        decoder = "text_decoder.cls.predictions"
        tensors |= {
            f"{decoder}.decoder.weight": tensors["text_decoder.bert.embeddings.word_embeddings.weight"],
            f"{decoder}.decoder.bias": tensors[f"{decoder}.bias"],
            "text_decoder.bert.embeddings.position_ids": torch.arange(32)[None],
        }
        return tensors
    tensors = load_file(goldens.HERE / "nlvr.safetensors")
    tensors = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
    return tensors | {"text_encoder.embeddings.position_ids": torch.arange(32)[None]}


def pth(folder: Path, name: str, beside: bool = True, **more) -> Path:
    """A file as the original's training scripts save it; with the vocabulary beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pth"
    optimizer = {"state": {}, "param_groups": [{"lr": 1e-5, "params": [0, 1]}]}
    torch.save({"model": state(name), "optimizer": optimizer, "config": {"vit": "base"}, "epoch": 5, **more}, path)
    if beside:
        vocabulary(folder)
    return path
