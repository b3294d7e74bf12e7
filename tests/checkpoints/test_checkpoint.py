"""A model directory: what is saved is what is loaded, and what does not fit is refused by name."""

import dataclasses
import json
import os
import pickle
import shutil
import struct

import pytest
import torch
from torch import nn

from blip import files as atomic
from blip.checkpoints.checkpoint import from_pretrained, push_to_hub, save_pretrained
from blip.models.blip import Blip
from blip.models.presets import TINY
from blip.nn.settings import TextConfig, TrainingOptions, VisionConfig
from blip.tensors import read_tensors, write_tensors
from blip.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load("world")
SMALLEST = dataclasses.replace(
    TINY,
    vision=VisionConfig("vit_tiny_patch16_224", image_size=32, patch_size=8, width=24, depth=1, heads=2),
    text=TOKENIZER.text_config(TextConfig(width=16, layers=1, heads=2, hidden=32, max_positions=32)),
    embed_dim=8,
)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = Blip(SMALLEST)
    save_pretrained(model, TOKENIZER, tmp_path / "model", card="# Mine")
    return model, tmp_path / "model"


def test_what_is_saved_is_loaded(saved):
    model, where = saved
    loaded, tokenizer = from_pretrained(where)
    assert loaded.config == model.config
    assert not loaded.training
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert tokenizer.pieces("a red square", 9) == TOKENIZER.pieces("a red square", 9)
    readme = (where / "README.md").read_text()
    assert readme.startswith("---\nlibrary_name: openblip\n")
    assert "# Mine" in readme
    assert json.loads((where / "config.json").read_text())["format"] == "openblip"


def test_another_image_size_resizes_positions_only(saved):
    model, where = saved
    loaded, _ = from_pretrained(where, image_size=48)
    assert loaded.config.vision.image_size == 48
    assert loaded.vision.vit.pos_embed.shape == (1, 1 + 36, 24)
    assert torch.equal(loaded.vision.vit.pos_embed[:, 0], model.vision.vit.pos_embed[:, 0])
    # A straight interpolation by torch of the grid, corners not aligned.
    grid = model.vision.vit.pos_embed[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    wanted = nn.functional.interpolate(grid, (6, 6), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(loaded.vision.vit.pos_embed[:, 1:], wanted)
    assert loaded.vision(torch.zeros(1, 3, 48, 48)).shape == (1, 37, 24)
    with pytest.raises(ValueError, match="50 is not a multiple of the patch size 8"):
        from_pretrained(where, image_size=50)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "eva02_tiny_patch14_224", "deit_tiny_patch16_224"])
def test_towers_with_other_parts_come_back(tmp_path, name):
    """Rotary positions and register tokens, too, have shapes that are known without content."""
    side = 28 if "patch14" in name else 32
    vision = VisionConfig(name, image_size=side, depth=1)
    model = Blip(dataclasses.replace(SMALLEST, vision=vision), TrainingOptions(drop_path=0.1))
    save_pretrained(model, TOKENIZER, tmp_path / "model")
    loaded, _ = from_pretrained(tmp_path / "model")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


def test_training_options_are_not_saved_and_those_of_older_versions_are_read(tmp_path):
    where, options = tmp_path / "model", TrainingOptions(0.2, 0.5, True, 0.3, 0.4)
    model = Blip(dataclasses.replace(SMALLEST, vision=dataclasses.replace(SMALLEST.vision, depth=2)), options)
    save_pretrained(model, TOKENIZER, where)
    settings = json.loads((where / "config.json").read_text())
    for name, part in ("drop_path", "vision"), ("patch_drop", "vision"), ("checkpoint", "vision"), ("dropout", "text"):
        assert name not in settings["model"][part]
    assert from_pretrained(where)[0].options == TrainingOptions()
    assert from_pretrained(where, options=options)[0].options == options

    settings["version"] = 1  # which had them beside the shapes
    settings["model"]["vision"] |= {"drop_path": 0.2, "patch_drop": 0.5, "checkpoint": True}
    settings["model"]["text"] |= {"dropout": 0.3, "attention_dropout": 0.4}
    (where / "config.json").write_text(json.dumps(settings))
    older, _ = from_pretrained(where)
    assert older.config == model.config
    assert older.options == options
    assert older.vision.vit.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert (older.med.dropout.p, older.med.blocks[0].dropout.p, older.med.blocks[0].text.dropout) == (0.3, 0.3, 0.4)


def test_saving_again_replaces_the_model_and_keeps_other_files(saved):
    _, where = saved
    (where / "notes.txt").write_text("keep me")
    other = Blip(SMALLEST)
    save_pretrained(other, TOKENIZER, where)
    assert torch.equal(from_pretrained(where)[0].image_proj.weight, other.image_proj.weight)
    assert (where / "notes.txt").read_text() == "keep me"
    assert os.listdir(where.parent) == ["model"]


def test_a_failed_save_leaves_the_old_model(saved, monkeypatch):
    model, where = saved
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(atomic.WriteError, match="10 bytes are free"):
        save_pretrained(Blip(SMALLEST), TOKENIZER, where)
    assert torch.equal(from_pretrained(where)[0].image_proj.weight, model.image_proj.weight)
    assert os.listdir(where.parent) == ["model"]


def edit(where, change):
    path = where / "model.safetensors"
    state = read_tensors(path)
    change(state)
    write_tensors(path, state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("image_proj.bias"), "1 missing: image_proj.bias"),
        (lambda state: state.update(more=torch.ones(1)), "1 unexpected: more"),
        (
            lambda state: state.update({"image_proj.bias": torch.ones(9)}),
            r"1 of another shape: image_proj.bias \(9,\) for \(8,\)",
        ),
        (
            lambda state: state.update({"vision.vit.pos_embed": torch.ones(3)}),
            "1 of another shape: vision.vit.pos_embed",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(saved, change, message):
    _, where = saved
    edit(where, change)
    with pytest.raises(ValueError, match=f"model.safetensors does not fit its config.json: {message}"):
        from_pretrained(where)


class Canary:
    def __reduce__(self):
        return (os.mkdir, (os.environ["CANARY"],))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>404</html>", "web page"),
        (b"", "cut short"),
        (struct.pack("<Q", 10**6) + b"{}", "cut short"),
        (struct.pack("<Q", 2) + b"{}" + b"x" * 9, "not a readable safetensors"),
        ("pickle", "pickle"),
        ("half", "not a readable safetensors"),
    ],
)
def test_files_that_are_not_weights_are_recognised_and_not_run(saved, content, message, tmp_path, monkeypatch):
    _, where = saved
    path = where / "model.safetensors"
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    if content == "pickle":
        content = pickle.dumps(Canary())
    elif content == "half":
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"model.safetensors.*{message}"):
        from_pretrained(where)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ('{"model_type": "vit"}', "is of a vit model, not of a BLIP"),
        ('{"name": "x"}', "does not say format 'openblip', nor transformers'"),
        ('{"format": "openblip", "version": 99}', "update openblip"),
        ('{"format": "openblip", "version": 1, "model": {"vision": {}}}', "lacks keys: embed_dim"),
        ('{"format": "openblip", "version": 1}', "must be a mapping"),
    ],
)
def test_configurations_that_cannot_be_read_are_named(saved, content, message):
    _, where = saved
    (where / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
        from_pretrained(where)


def test_places_without_a_model(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/vocab.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"no config\.json.*holds vocab\.txt"):
        from_pretrained(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="not a model directory"):
        from_pretrained(tmp_path / "nowhere")


def test_a_tokenizer_that_does_not_fit_is_refused_on_both_ways(saved):
    _, where = saved
    with pytest.raises(ValueError, match="does not fit the model"):
        save_pretrained(
            Blip(dataclasses.replace(SMALLEST, text=TextConfig(width=16, layers=1, heads=2))), TOKENIZER, where
        )
    config = json.loads((where / "config.json").read_text())
    config["model"]["text"]["sep_id"] = 1
    (where / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not fit the model"):
        from_pretrained(where)


def test_the_hub_is_given_the_same_directory(monkeypatch):
    calls = {}

    class Hub:
        def __init__(self, token=None):
            calls["token"] = token

        def create_repo(self, repo_id, **options):
            calls["create"] = repo_id, options

        def upload_folder(self, *, repo_id, folder_path, **options):
            calls["upload"] = repo_id, sorted(os.listdir(folder_path)), options
            return "address"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert push_to_hub(Blip(SMALLEST), TOKENIZER, "me/mine", private=True, token="t", commit_message="x") == "address"
    assert calls["token"] == "t"
    assert calls["create"] == ("me/mine", {"private": True, "exist_ok": True})
    files = ["README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert calls["upload"] == ("me/mine", files, {"commit_message": "x"})


def test_shared_tensors_and_views_are_stored_once_and_come_back(tmp_path):
    base = torch.arange(6.0)
    tensors = {
        "a": base,
        "b": base,
        "part": base[2:4],
        "turned": base.view(2, 3).t(),
        "none": torch.empty(0),
        "no": torch.empty(0),
    }
    write_tensors(tmp_path / "x", tensors)
    back = read_tensors(tmp_path / "x")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert back["a"].data_ptr() == back["b"].data_ptr()
