"""model_large_caption.pth of the 2022 release, which trainers of image generators download: ViT-L at 384 pixels.

The names and shapes are written by hand, after the release's `BLIP_Decoder`; the weights are random.
"""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from blip.app import cli

TEXT, HIDDEN, SIDE = 768, 3072, 384
LARGE = {"width": 1024, "depth": 24, "layers": 12, "words": 30_524}
SMALL = {"width": 192, "depth": 2, "layers": 1, "words": 99}


def linear(name, out, into):
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def shapes(width, depth, layers, words):
    at = "visual_encoder"
    made = {f"{at}.cls_token": (1, 1, width), f"{at}.pos_embed": (1, (SIDE // 16) ** 2 + 1, width)}
    made |= {f"{at}.patch_embed.proj.weight": (width, 3, 16, 16), f"{at}.patch_embed.proj.bias": (width,)}
    made |= norm(f"{at}.norm", width)
    for i in range(depth):
        block = f"{at}.blocks.{i}"
        made |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
        made |= linear(f"{block}.attn.qkv", 3 * width, width) | linear(f"{block}.attn.proj", width, width)
        made |= linear(f"{block}.mlp.fc1", 4 * width, width) | linear(f"{block}.mlp.fc2", width, 4 * width)
    at = "text_decoder.bert.embeddings"
    made |= {f"{at}.word_embeddings.weight": (words, TEXT), f"{at}.position_embeddings.weight": (512, TEXT)}
    made |= norm(f"{at}.LayerNorm", TEXT)
    for i in range(layers):
        layer = f"text_decoder.bert.encoder.layer.{i}"
        for attention, into in (("attention", TEXT), ("crossattention", width)):
            made |= linear(f"{layer}.{attention}.self.query", TEXT, TEXT)
            made |= linear(f"{layer}.{attention}.self.key", TEXT, into)
            made |= linear(f"{layer}.{attention}.self.value", TEXT, into)
            made |= linear(f"{layer}.{attention}.output.dense", TEXT, TEXT)
            made |= norm(f"{layer}.{attention}.output.LayerNorm", TEXT)
        made |= linear(f"{layer}.intermediate.dense", HIDDEN, TEXT) | linear(f"{layer}.output.dense", TEXT, HIDDEN)
        made |= norm(f"{layer}.output.LayerNorm", TEXT)
    at = "text_decoder.cls.predictions"
    made |= {f"{at}.bias": (words,)} | linear(f"{at}.transform.dense", TEXT, TEXT)
    return made | norm(f"{at}.transform.LayerNorm", TEXT)


def write(path, sizes):
    state = {name: torch.empty(shape).normal_(0, 0.02) for name, shape in shapes(**sizes).items()}
    state["text_decoder.bert.embeddings.position_ids"] = torch.arange(512)[None]
    head = "text_decoder.cls.predictions"
    state[f"{head}.decoder.weight"] = state["text_decoder.bert.embeddings.word_embeddings.weight"]
    state[f"{head}.decoder.bias"] = state[f"{head}.bias"]
    torch.save({"model": state}, path)
    return state


@pytest.mark.parametrize("sizes", [SMALL, pytest.param(LARGE, marks=pytest.mark.slow)], ids=["small", "large"])
def test_the_large_captioner_is_converted_and_captions(tmp_path, sizes, capsys):
    torch.manual_seed(0)
    file = tmp_path / "model_large_caption.pth"
    state = write(file, sizes)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(sizes["words"] - 7))]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    out = tmp_path / "model"
    assert cli.main(["convert", str(file), str(out), "--tokenizer", str(tmp_path / "vocab.txt")]) == 0
    config = json.dumps(json.loads((out / "config.json").read_text()))
    assert f'"image_size": {SIDE}' in config
    saved = load_file(out / "model.safetensors")
    parts = [state[f"text_decoder.bert.encoder.layer.0.crossattention.self.{name}.weight"] for name in ("key", "value")]
    assert torch.equal(saved["med.blocks.0.cross.kv.weight"], torch.cat(parts))
    last = f"blocks.{sizes['depth'] - 1}.attn.qkv.weight"
    assert torch.equal(saved[f"vision.vit.{last}"], state[f"visual_encoder.{last}"])
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    capsys.readouterr()
    assert cli.main(["caption", str(tmp_path / "a.png"), "--model", str(out), "--prompt", "", "--max-length", "6"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'a.png'}\t")
