"""Foreign weights <-> ours: nothing lost, nothing guessed, nothing executed."""

import dataclasses
import json
import random
import time

import goldens
import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM, BertModel

from blip import hub
from blip.checkpoints.initial import architecture, initial_text, initial_vision
from blip.checkpoints.layouts import (
    original_captioning,
    original_matching,
    original_pretraining,
    original_training,
    transformers_captioning,
    transformers_matching,
)
from blip.checkpoints.table import from_theirs, to_theirs
from blip.checkpoints.weights import load, read_weights
from blip.models.blip import Blip
from blip.models.presets import BASE
from blip.nn.settings import VisionConfig
from blip.nn.text import TextPass
from blip.nn.vision import VisionEncoder
from blip.objectives.pretrain import Pretrain
from blip.tokenizer import Tokenizer
from recipes import building
from recipes.building import ModelChoice

CONFIG = goldens.CONFIG


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Blip(CONFIG)


@pytest.fixture
def objective():
    torch.manual_seed(1)
    return Pretrain(Blip(CONFIG), goldens.PRETRAIN)


@pytest.fixture
def original():
    return goldens.checkpoint()


def captioner(original):
    return {name: original[name] for name in goldens.keys("captioning")}


def matcher(original):
    queue = {"idx_queue": torch.full((1, 24), -100), "ptr_queue": torch.zeros(1, dtype=torch.long)}
    return {name: (original | queue)[name] for name in goldens.keys("retrieval")}


def read(table, state, target):
    return from_theirs(table, state, target.state_dict(), "some.pth")


# Round trips ------------------------------------------------------------------------------------------------------


def test_training_state_round_trip(objective, original):
    table = original_training(objective)
    ours = read(table, original, objective)
    objective.load_state_dict(ours, strict=True)
    back = to_theirs(table, objective.state_dict())
    assert set(original) - set(back) == set(table.dropped) & set(original)
    assert all("position_ids" in k or "text_encoder_m" in k for k in set(original) - set(back))
    for name, tensor in back.items():
        assert torch.equal(tensor, original[name]), name
        assert tensor.dtype == original[name].dtype


@pytest.mark.parametrize(
    ("table", "part"),
    [
        (original_pretraining, dict),
        (original_captioning, captioner),
        (original_matching, matcher),
    ],
)
def test_model_round_trip(model, original, table, part):
    table, theirs = table(model), part(original)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ours = read(table, theirs, model)
    model.load_state_dict(ours, strict=False)
    after = model.state_dict()
    assert {k for k in after if k not in ours} == set(table.fresh)
    assert all(torch.equal(after[k], before[k]) for k in table.fresh)
    back = to_theirs(table, after)
    assert set(theirs) - set(back) <= set(table.dropped)
    assert all(torch.equal(back[k], theirs[k]) for k in back)
    assert all(table.dropped.values())
    assert all(table.fresh.values())


@pytest.mark.parametrize(
    ("layout", "table"),
    [
        ("pretraining", original_pretraining),
        ("captioning", original_captioning),
        ("retrieval", original_matching),
    ],
)
def test_the_original_classes(model, layout, table):
    """The state dicts that the original's own classes have, key by key, shape by shape."""
    theirs = {name: torch.zeros(shape) for name, shape in goldens.keys(layout).items()}
    table = table(model)
    read(table, theirs, model)
    assert {name for row in table.rows for name in row.theirs} | set(table.copies) <= set(theirs)


def test_every_tensor_has_its_own_place(objective):
    for table in (original_training(objective), original_pretraining(objective.model)):
        ours = [row.ours for row in table.rows]
        assert len(ours) == len(set(ours))
        theirs = [name for row in table.rows for name in row.theirs if name != "queue_ptr"]
        assert len(theirs) == len(set(theirs))


@pytest.mark.parametrize("make", [transformers_captioning, transformers_matching])
def test_transformers_round_trip(model, make):
    other = Blip(CONFIG)
    table = make(model)
    theirs = to_theirs(table, model.state_dict())
    ours = read(table, theirs, other)
    assert ours
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in ours.items())


# Refusals ---------------------------------------------------------------------------------------------------------


def refused(model, state, *expected):
    with pytest.raises(ValueError, match=r"^some\.pth: ") as error:
        read(original_pretraining(model), state, model)
    message = str(error.value)
    assert "\n" not in message
    for part in expected:
        assert part in message, message


def test_unknown_key(model, original):
    refused(model, original | {"text_encoder.surprise": torch.zeros(1)}, "text_encoder.surprise", "another task")


def test_missing_key(model, original):
    del original["itm_head.bias"]
    refused(model, original, "itm_head.bias", "complete")


def test_wrong_shape(model, original):
    original["text_proj.weight"] = original["text_proj.weight"][:, :20]
    refused(model, original, "text_proj.weight", "16 x 20", "16 x 24", "model config")


def test_other_image_size(model, original):
    original["visual_encoder.pos_embed"] = torch.zeros(1, 37, 32)
    refused(model, original, "visual_encoder.pos_embed", "1 x 37 x 32", "1 x 17 x 32", "vision.image_size")


def test_a_shared_tensor_that_is_not_shared(model, original):
    name = "text_decoder.cls.predictions.decoder.weight"
    original[name] = original[name] + 1
    refused(model, original, name, "text_encoder.embeddings.word_embeddings.weight")


def test_a_deeper_checkpoint(model, original):
    extra = {
        k.replace("blocks.1", "blocks.2"): v for k, v in original.items() if k.startswith("visual_encoder.blocks.1")
    }
    refused(model, original | extra, "visual_encoder.blocks.2", "and 9 more")


def test_a_model_with_more_than_the_checkpoint(original):
    vision = dataclasses.replace(CONFIG.vision, model="vit_small_patch16_dinov3")
    try:
        model = Blip(dataclasses.replace(CONFIG, vision=vision))
    except ValueError:
        pytest.skip("this timm has no such model")
    with pytest.raises(ValueError, match="nothing for the model's vision"):
        read(original_pretraining(model), original, model)


def test_load_leaves_the_model_alone_when_it_refuses(model, original, tmp_path):
    del original["itm_head.bias"]
    torch.save({"model": original, "epoch": 3}, tmp_path / "some.pth")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"itm_head\.bias"):
        load(model, original_pretraining(model), tmp_path / "some.pth")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_load_a_release_shaped_file(model, original, tmp_path):
    optimizer = torch.optim.AdamW(model.parameters())
    parts = {"model": original, "optimizer": optimizer.state_dict(), "config": {"init_lr": 3e-4}, "epoch": 19}
    torch.save(parts, tmp_path / "some.pth")
    load(model, original_pretraining(model), tmp_path / "some.pth")
    assert torch.equal(model.match_head.bias, original["itm_head.bias"])
    assert torch.equal(model.med.blocks[1].cross.kv.weight[24:], original[
        "text_encoder.encoder.layer.1.crossattention.self.value.weight"
    ])  # fmt: skip


# Files ------------------------------------------------------------------------------------------------------------


class Canary:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (self.mark, "w"))


@pytest.mark.parametrize("name", ["a.pth", "a.bin", "a.pt"])
def test_a_pickle_is_refused_and_not_run(tmp_path, name):
    mark = tmp_path / "executed"
    torch.save({"model": {"weight": torch.zeros(1), "x": Canary(str(mark))}}, tmp_path / name)
    with pytest.raises(ValueError, match="not executed") as error:
        read_weights(tmp_path / name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)  # no advice to lower the guard
    assert not mark.exists()


def test_the_canary_does_sing(tmp_path):
    mark = tmp_path / "executed"
    torch.save(Canary(str(mark)), tmp_path / "a.pth")
    torch.load(tmp_path / "a.pth", weights_only=False).close()  # what must never be done
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "LFS pointer"),
        (b"PK\x03\x04 torn", "torn"),
        (b"\x80\x02 torn", "torn"),
    ],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_files_that_are_no_weights(tmp_path, content, expected, suffix):
    path = tmp_path / f"torn.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=expected) as error:
        read_weights(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_truncated_files(tmp_path, original):
    torch.save({"model": original}, tmp_path / "a.pth")
    save_file({k: v.clone() for k, v in original.items()}, tmp_path / "a.safetensors")
    for path in (tmp_path / "a.pth", tmp_path / "a.safetensors"):
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(ValueError, match=str(path)) as error:
            read_weights(path)
        assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_damaged_files_are_read_or_refused(tmp_path, kind):
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pth")
    if kind == "safetensors":
        save_file({"a": torch.zeros(3)}, path)
    else:
        torch.save({"model": {"a": torch.zeros(3)}}, path, _use_new_zipfile_serialization=kind == "zip")
    whole, draw = path.read_bytes(), random.Random(0)
    refused = []
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[draw.randrange(min(len(whole), 500))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            read_weights(path)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 50
    assert all(message.startswith(str(path)) and "\n" not in message for message in refused)


def test_no_state_dict(tmp_path):
    torch.save({"model": [1, 2]}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="no state dict"):
        read_weights(tmp_path / "a.pth")
    with pytest.raises(FileNotFoundError, match=r"b\.pth"):
        read_weights(tmp_path / "b.pth")


# Initial weights of the image encoder -----------------------------------------------------------------------------


def timm_vit(image_size=32, classes=10):
    torch.manual_seed(5)
    shape = {"img_size": image_size, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=classes, **shape)
    torch.nn.init.normal_(vit.pos_embed)
    return vit


@pytest.mark.parametrize("wrapped", [False, True])
def test_initial_vision_from_a_file(model, tmp_path, wrapped):
    vit = timm_vit()
    if wrapped:
        torch.save({"model": vit.state_dict()}, path := tmp_path / "deit.pth")
    else:
        save_file(vit.state_dict(), path := tmp_path / "vit.safetensors")
    initial_vision(model, path)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.vision(image), vit.forward_features(image))


def test_initial_vision_resizes_positions(model, tmp_path):
    vit = timm_vit(image_size=48)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    initial_vision(model, str(tmp_path / "vit.safetensors"))
    ours = model.vision.vit.pos_embed
    assert ours.shape == (1, 17, 32)
    assert torch.equal(ours[:, 0], vit.pos_embed[:, 0])
    expected = torch.nn.functional.interpolate(
        vit.pos_embed[:, 1:].reshape(1, 6, 6, 32).permute(0, 3, 1, 2), size=(4, 4), mode="bicubic", align_corners=False
    )
    torch.testing.assert_close(ours[:, 1:], expected.permute(0, 2, 3, 1).flatten(1, 2))


def test_initial_vision_refuses_another_vit(model, tmp_path):
    state = timm_vit().state_dict()
    save_file(state | {"blocks.0.ls1.gamma": torch.ones(32)}, tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match=r"blocks\.0\.ls1\.gamma"):
        initial_vision(model, tmp_path / "vit.safetensors")
    del state["norm.bias"]
    save_file(state, tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match=r"norm\.bias"):
        initial_vision(model, tmp_path / "vit.safetensors")


def test_initial_vision_by_name(monkeypatch, tmp_path):
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    torch.manual_seed(6)
    vit = timm.create_model("vit_tiny_patch16_224")
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    requests = []
    monkeypatch.setattr(hub, "file", lambda *args: requests.append(args) or tmp_path / "model.safetensors")
    vision = VisionConfig("vit_tiny_patch16_224", image_size=64)
    model = Blip(dataclasses.replace(CONFIG, vision=vision))
    initial_vision(model, name, "--init-vision")
    assert requests == [(f"timm/{name}", "model.safetensors", "--init-vision")]
    assert torch.equal(model.vision.vit.blocks[3].attn.qkv.weight, vit.blocks[3].attn.qkv.weight)
    assert model.vision.vit.pos_embed.shape == (1, 17, 192)


def of_family(name, image_size, **shape):
    """A tower of timm with random weights of the shapes that the released ones of that name have."""
    torch.manual_seed(7)
    options = {} if image_size is None else {"img_size": image_size}
    vit = timm.create_model(name, num_classes=0, global_pool="", **options, **shape).eval()
    for parameter in vit.parameters():
        if parameter.ndim == 1 or parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, mean=0.1, std=0.1)
    return vit


FAMILIES = {
    "DeiT": "deit_base_patch16_224",
    "ImageNet-21k": "vit_large_patch16_224",
    "MAE": "vit_base_patch16_224",
    "BEiT": "beit_base_patch16_224",
    "BEiT v2": "beitv2_base_patch16_224",
    "CLIP": "vit_base_patch16_clip_quickgelu_224",
    "OpenCLIP": "vit_base_patch16_clip_224",
    "DINO": "vit_small_patch16_224",
    "DINOv2": "vit_small_patch14_dinov2",
    "DINOv2 with registers": "vit_small_patch14_reg4_dinov2",
    "DINOv3": "vit_small_patch16_dinov3",
    "EVA-02": "eva02_tiny_patch14_224",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tower_of_each_family_computes_what_timm_does(tmp_path, family):
    """At real widths and a depth of 1: file of random weights in, the same image tokens out."""
    name = FAMILIES[family]
    side = 4 * (14 if "patch14" in name else 16)
    theirs = of_family(name, side, depth=1)
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, tmp_path / "vit.safetensors")
    model = Blip(dataclasses.replace(CONFIG, vision=VisionConfig(name, image_size=side, depth=1))).eval()
    initial_vision(model, tmp_path / "vit.safetensors")
    image = torch.randn(2, 3, side, side)
    with torch.no_grad():
        ours, expected = model.vision(image), theirs.forward_features(image)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        assert model.embed_image(ours).shape == (2, 16)
        assert ours.shape[1] == theirs.num_prefix_tokens + 16
        assert ours.std() > 0.01


BY_NAME = [
    ("deit_tiny_patch16_224.fb_in1k", "vit_tiny_patch16_224"),
    ("vit_small_patch16_224.dino", "vit_small_patch16_224"),
    ("vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_dinov2"),
    pytest.param("vit_base_patch16_224.mae", "vit_base_patch16_224", marks=pytest.mark.slow),
    pytest.param("beit_base_patch16_224.in22k_ft_in22k", "beit_base_patch16_224", marks=pytest.mark.slow),
    pytest.param("vit_base_patch16_clip_224.laion2b", "vit_base_patch16_clip_224", marks=pytest.mark.slow),
    pytest.param("deit_base_patch16_224.fb_in1k", "vit_base_patch16_224", marks=pytest.mark.slow),
    pytest.param("vit_large_patch16_224.augreg_in21k", "vit_large_patch16_224", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "expected"), BY_NAME)
def test_initial_vision_of_a_family_by_name(monkeypatch, tmp_path, name, expected):
    """At full depth, resized to another image; the file of random weights stands for the hub's."""
    assert architecture(name) == expected
    vit = of_family(name.partition(".")[0], None)
    side = 8 * vit.patch_embed.patch_size[0]
    save_file({k: v.contiguous() for k, v in vit.state_dict().items()}, tmp_path / "model.safetensors")
    monkeypatch.setattr(hub, "file", lambda *_: tmp_path / "model.safetensors")
    model = Blip(dataclasses.replace(CONFIG, vision=VisionConfig(expected, image_size=side)))
    initial_vision(model, name, "--model.vision_weights")
    kernel = "blocks.0.attn.qkv.weight"
    assert torch.equal(model.vision.vit.state_dict()[kernel], vit.state_dict()[kernel])
    assert model.vision(torch.randn(1, 3, side, side)).shape[1] == vit.num_prefix_tokens + 64


def test_a_recipe_takes_the_architecture_that_weights_are_named_by():
    choice = ModelChoice(size="base", vision_weights="vit_base_patch16_clip_224.openai", drop_path=0.1)
    vision = building._vision(choice, BASE.vision)
    assert vision == VisionConfig("vit_base_patch16_clip_224", drop_path=0.1)
    for name in ("deit_base_patch16_224.fb_in1k", "vit_base_patch16_384.augreg_in21k_ft_in1k", "./vit.pth"):
        assert building._vision(ModelChoice(vision_weights=name), BASE.vision) == BASE.vision


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swin_tiny_patch4_window7_224", "is a SwinTransformer, not a plain ViT"),
        ("resnet18", "cannot be an image encoder here"),
        ("vit_base_patch16_siglip_224", "has no class token"),
        ("deit_tiny_distilled_patch16_224", "cannot be an image encoder here"),
        ("vit_tiny_r_s16_p8_224", "not a plain ViT"),
        ("vit_of_nobody", "cannot be an image encoder here"),
    ],
)
def test_models_of_timm_that_cannot_be_the_tower(name, message):
    with pytest.raises(ValueError, match=message) as error:
        VisionEncoder(VisionConfig(name, image_size=224))
    assert name in str(error.value)
    assert "DeiT, MAE, BEiT, CLIP, DINO" in str(error.value)


@pytest.mark.parametrize("name", ["vit_of_nobody", "vit_tiny_patch16_224.nothing"])
def test_an_unknown_name(model, name):
    with pytest.raises(ValueError, match=name.split(".")[-1]) as error:
        initial_vision(model, name, "--init-vision")
    assert "timm" in str(error.value)
    assert "--init-vision" in str(error.value)


@pytest.mark.parametrize("how", ["offline", "unreachable"])
def test_out_of_reach_is_said_at_once(model, monkeypatch, tokenizer, tmp_path, how):
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", how == "offline")
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: None)
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError, match="hf download timm/vit_tiny") as error:
        initial_vision(model, "vit_tiny_patch16_224.augreg_in21k_ft_in1k", "--init-vision")
    assert "local path as --init-vision" in str(error.value)
    with pytest.raises(FileNotFoundError, match="hf download bert-base-uncased"):
        initial_text(model, "bert-base-uncased", tokenizer, "--init-text")
    with pytest.raises(FileNotFoundError, match="no_such"):
        initial_text(model, "./no_such", tokenizer)
    assert time.perf_counter() - start < 2


# Initial weights of the text transformer --------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(92))])
    )
    return Tokenizer.load(tmp_path / "vocab.txt")


@pytest.fixture
def bert():
    torch.manual_seed(9)
    config = BertConfig(
        vocab_size=97, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=40, initializer_range=0.3, hidden_dropout_prob=0.0,
    )  # fmt: skip
    bert = BertForMaskedLM(config).eval()
    torch.nn.init.normal_(bert.cls.predictions.bias)
    return bert


def states_of(model, ids):
    (states,) = model.med([one := TextPass(ids, torch.ones_like(ids, dtype=torch.bool))])
    return one.layout.unpack(states)


@torch.no_grad()
def check_bert(model, bert, before, head=True):
    """Our encoder is that BERT without token types; the rest is as it must be."""
    med, ids = model.med, torch.arange(2, 22).view(2, 10)
    bert.bert.embeddings.token_type_embeddings.weight.zero_()
    torch.testing.assert_close(states_of(model, ids), bert.bert(ids).last_hidden_state, rtol=1e-5, atol=1e-5)
    for block, old in zip(med.blocks, before.med.blocks, strict=True):
        assert torch.equal(block.causal.qkv.weight, block.text.qkv.weight)
        assert torch.equal(block.causal_norm.weight, block.text_norm.weight)
        assert torch.equal(block.cross.kv.weight, old.cross.kv.weight)
    assert torch.equal(med.word.weight[97:], before.med.word.weight[97:])
    if head:
        logits = med.vocabulary(states_of(model, ids))
        torch.testing.assert_close(logits[..., :97], bert(ids).logits, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(med.head_dense.weight, before.med.head_dense.weight)


def copy_of(model):
    other = Blip(CONFIG)
    other.load_state_dict(model.state_dict())
    return other


def test_initial_text_from_a_directory(model, bert, tokenizer, tmp_path):
    bert.save_pretrained(tmp_path / "bert")
    before = copy_of(model)
    initial_text(model, tmp_path / "bert", tokenizer)
    check_bert(model, bert, before)


@pytest.mark.parametrize("unprefixed", [False, True])
def test_initial_text_from_an_old_file(model, bert, tokenizer, tmp_path, unprefixed):
    """Files of 2018 say gamma and beta, have a pooler and next-sentence head; some are of the bare model."""
    state = bert.state_dict()
    state |= {"bert.pooler.dense.weight": torch.zeros(24, 24), "bert.pooler.dense.bias": torch.zeros(24)}
    state |= {"bert.embeddings.position_ids": torch.arange(40)[None]}
    if unprefixed:
        state = {k.removeprefix("bert."): v for k, v in state.items() if k.startswith("bert.")}
    else:
        state |= {"cls.seq_relationship.weight": torch.zeros(2, 24), "cls.seq_relationship.bias": torch.zeros(2)}
    state = {k.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v for k, v in state.items()}
    (tmp_path / "old").mkdir()
    torch.save(state, tmp_path / "old" / "pytorch_model.bin")
    before = copy_of(model)
    initial_text(model, str(tmp_path / "old"), tokenizer)
    check_bert(model, bert, before, head=not unprefixed)


def test_initial_text_from_the_bare_model(model, bert, tokenizer, tmp_path):
    BertModel.save_pretrained(bert.bert, tmp_path / "bare")
    before = copy_of(model)
    initial_text(model, tmp_path / "bare", tokenizer)
    check_bert(model, bert, before, head=False)


def test_initial_text_refuses_what_does_not_fit(model, bert, tokenizer, tmp_path):
    where = tmp_path / "bert"
    bert.save_pretrained(where)
    settings = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps(settings | {"num_attention_heads": 4}))
    with pytest.raises(ValueError, match="num_attention_heads is 4, the model has 2"):
        initial_text(model, where, tokenizer)
    (where / "config.json").write_text(json.dumps(settings))

    bert.resize_token_embeddings(90)
    bert.save_pretrained(where)
    with pytest.raises(ValueError, match="90 word pieces and the model 99"):
        initial_text(model, where, tokenizer)

    (tmp_path / "other.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(50))]))
    with pytest.raises(ValueError, match="does not fit"):
        initial_text(model, where, Tokenizer.load(tmp_path / "other.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin"):
        initial_text(model, tmp_path / "empty", tokenizer)


def test_initial_text_does_not_run_a_pickle(model, tokenizer, tmp_path):
    torch.save({"bert.x": Canary(str(tmp_path / "executed"))}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not executed"):
        initial_text(model, tmp_path, tokenizer)
    assert not (tmp_path / "executed").exists()
