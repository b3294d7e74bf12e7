"""Released weights in: every layout of the original, LAVIS and transformers known by its keys, and nothing else."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile

import goldens
import pytest
import released
import timm
import torch
from safetensors.torch import load_file, save_file
from test_parity import transformers_config
from transformers import (
    BertConfig,
    BertModel,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipModel,
    ViTConfig,
    ViTModel,
)

import blip
from blip import hub
from blip.checkpoints import checkpoint, foreign
from blip.checkpoints.foreign import Foreign, recognise
from blip.checkpoints.settings import Settings
from blip.checkpoints.table import to_theirs
from blip.inference.generate import generate, generate_texts
from blip.inference.settings import AnswerConfig, DecodeConfig
from blip.models.blip import Blip, starting_with
from blip.models.dialogue import Dialogue
from blip.models.families import TASKS
from blip.models.nlvr import Nlvr
from blip.models.presets import BASE, LARGE
from blip.models.video import embed_clip
from blip.models.vqa import Vqa
from blip.nn.settings import TrainingOptions, VisionConfig
from blip.objectives.caption import Caption, CaptionConfig
from blip.tokenizer import Tokenizer
from eval.retrieval import retrieval
from recipes.building import ModelChoice, build_model, build_task

TEXT = goldens.CONFIG.text
KINDS = {"vqa": Vqa, "nlvr": Nlvr}


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def heads(monkeypatch):
    """The recorded models are narrower than any that was released."""
    monkeypatch.setattr(foreign, "HEADS", foreign.HEADS | released.HEADS)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.delenv("OPENBLIP_TOKENIZER", raising=False)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)


def load(path, name):
    return blip.from_pretrained(path, KINDS.get(name, Blip))


# The original's files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", released.NAMES)
def test_every_kind_is_known_by_its_keys_and_read_whole(name, tmp_path):
    path = released.pth(tmp_path, name).rename(tmp_path / "renamed.pth")
    opened = checkpoint.opened(path)
    known = {"retrieval": "matching"}.get(name, name)
    assert (opened.layout.name, opened.layout.program) == (known, "original")
    assert TASKS[opened.task].model is KINDS.get(name, Blip)
    model, _ = load(path, name)
    wanted = released.NLVR if name == "nlvr" else goldens.CONFIG
    for size in ("image_size", "patch_size", "width", "depth", "heads"):
        assert getattr(model.config.vision, size) == getattr(wanted.vision, size), size
    assert model.config.text == wanted.text
    assert model.options == TrainingOptions(dropout=0.1, attention_dropout=0.1)  # the paper's, as no file tells it
    assert model.config.parts == opened.layout.parts
    assert not model.training
    table = opened.layout.table(model)
    back, theirs = to_theirs(table, model.state_dict()), released.state(name)
    assert set(theirs) - set(back) <= set(table.dropped)
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in back.items())
    account = opened.account(model)
    accounted = account.carried + account.copies + sum(len(names) for names in account.dropped.values())
    assert accounted == len(theirs), "every key is carried over, a second name, or left out with a reason"
    assert all(account.dropped)


@torch.no_grad()
def test_a_pretraining_file_computes_what_the_original_did(tmp_path):
    results, batch = goldens.results(), goldens.batch(0)
    model, _ = load(released.pth(tmp_path, "pretraining"), "pretraining")
    tokens = model.vision(batch.image)
    close(tokens, results["image_tokens"])
    logits = model.caption_logits(starting_with(batch.ids, TEXT.dec_id), batch.keep, model.context(tokens))
    close(logits[batch.keep], results["lm_logits"][batch.keep])
    captioner, _ = load(released.pth(tmp_path, "captioning"), "captioning")
    alone = captioner.caption_logits(starting_with(batch.ids, TEXT.dec_id), batch.keep, captioner.context(tokens))
    close(alone[batch.keep], results["lm_logits"][batch.keep])
    for name in ("retrieval", "matching"):
        matcher, _ = load(released.pth(tmp_path, name), name)
        match_logits = matcher.match(starting_with(batch.ids, TEXT.enc_id), batch.keep, matcher.context(tokens))
        close(match_logits, results["itm_logits"][: len(batch)])
        close(matcher.embed_text(batch.ids, batch.keep), model.embed_text(batch.ids, batch.keep))


@torch.no_grad()
def test_files_of_tasks_compute_what_the_original_did(tmp_path):
    golden = load_file(goldens.HERE / "nlvr.safetensors")
    model, _ = load(released.pth(tmp_path, "nlvr"), "nlvr")
    images = golden["image"].unflatten(0, (2, 4)).transpose(0, 1)
    close(model.judge(golden["ids"].long(), golden["keep"], model.contexts(images)), golden["logits"], 1e-4)

    golden = load_file(goldens.HERE / "vqa.safetensors")
    model, words = load(released.pth(tmp_path, "vqa"), "vqa")
    image = model.question.context(model.vision(goldens.batch(0).image))
    questions = model.context(golden["question.ids"].long(), golden["question.keep"], image)
    prompt = torch.full((4, 1), TEXT.dec_id)
    config = DecodeConfig(beams=3, max_length=10, min_length=1, length_penalty=0.0)
    for row in range(4):
        one = questions[torch.tensor([row])]
        ids = generate(model, one, prompt[:1], torch.ones_like(prompt[:1], dtype=torch.bool), config).ids[0, 0].tolist()
        assert words.decode([ids]) == words.decode([golden["generated.alone"][row].tolist()])


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("name", released.NAMES)
@pytest.mark.parametrize("program", ["original", "lavis"])
def test_the_released_sizes_by_their_keys_and_shapes(program, name, size, monkeypatch):
    """All keys and shapes at full size and depth, without the numbers: the tensors have no storage."""
    try:
        keys = goldens.released(program, f"{name} {size}")
    except KeyError:
        pytest.skip(f"{program} has none")
    monkeypatch.setattr(torch, "equal", lambda a, b: a.shape == b.shape)  # nothing to compare without numbers
    theirs = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    foreign = Foreign("some.pth", recognise(set(theirs), "some.pth"), theirs, Settings(), None)
    config = foreign.config(Pieces())
    preset = {"base": BASE, "large": LARGE}[size]
    side = {"pretraining": 224, "vqa": 480}.get(name, 384)
    assert config.vision == dataclasses.replace(preset.vision, image_size=side)
    assert config.text == preset.text
    assert config.embed_dim == 256
    linspace = torch.linspace
    monkeypatch.setattr(torch, "linspace", lambda *args, **o: linspace(*args, **{**o, "device": "cpu"}))
    with torch.device("meta"):
        model = TASKS[foreign.task].model(config)
    ours = foreign.state(model)
    assert {key: tensor.shape for key, tensor in ours.items()} == {k: t.shape for k, t in model.state_dict().items()}
    back = to_theirs(foreign.layout.table(model), ours)
    dropped = foreign.layout.table(model).dropped
    assert {key: list(tensor.shape) for key, tensor in back.items()} == {
        key: shape for key, shape in keys.items() if key not in dropped
    }


class Pieces:
    """What a tokenizer of bert-base-uncased says of itself."""

    where = "bert-base-uncased"

    def text_config(self, config):
        return dataclasses.replace(config, vocab_size=30524)


def test_a_file_of_lavis(tmp_path):
    """It saves no teacher, and calls the queue's pointer otherwise."""
    state = {key: value for key, value in released.state("retrieval").items() if "_m." not in key}
    state["queue_ptr"] = state.pop("ptr_queue")
    torch.save({"model": state, "epoch": 1, "scaler": None}, tmp_path / "checkpoint_best.pth")
    released.vocabulary(tmp_path)
    model, _ = blip.from_pretrained(tmp_path / "checkpoint_best.pth")
    assert torch.equal(model.match_head.bias, state["itm_head.bias"])


def test_another_image_size(tmp_path):
    path = released.pth(tmp_path, "retrieval")
    model, _ = blip.from_pretrained(path, image_size=48)
    assert model.config.vision.image_size == 48
    close(model.vision.vit.pos_embed, goldens.results()["positions6"], 1e-6)
    features = blip.load(path, image_size=24)
    close(features.model.vision.vit.pos_embed, goldens.results()["positions3"], 1e-6)
    with pytest.raises(ValueError, match="50 is not a multiple of the patch size 8"):
        blip.load(path, image_size=50)


def test_a_part_does_not_do_what_it_was_not_trained_for(tmp_path):
    captioner, words = load(released.pth(tmp_path, "captioning"), "captioning")
    matcher, _ = load(released.pth(tmp_path, "retrieval"), "retrieval")
    image = goldens.batch(0).image
    ((text,),) = generate_texts(captioner, words, image[:1], DecodeConfig(beams=1, max_length=8), prompt="w4")
    assert text.text
    with pytest.raises(ValueError, match=r"a captioning model cannot match texts with images; load one of recipes\.re"):
        blip.load(tmp_path / "captioning.pth").match(torch.zeros(1, 3, 32, 32), "w3")
    for use in (
        lambda: embed_clip(captioner, captioner.vision(image), 1),
        lambda: retrieval(captioner, words, [image], ["w3"], [0]),
        lambda: blip.objectives.pretrain.Pretrain(captioner, goldens.PRETRAIN),
        lambda: Nlvr.from_blip(captioner),
        lambda: Vqa.from_blip(captioner),
        lambda: Dialogue.from_blip(captioner),
    ):
        with pytest.raises(ValueError, match="is a Captioner and cannot compare texts with images: give a pre-"):
            use()
    for use in (
        lambda: generate_texts(matcher, words, image[:1], DecodeConfig(beams=1, max_length=8)),
        lambda: blip.objectives.pretrain.Pretrain(matcher, goldens.PRETRAIN),
        lambda: Caption(matcher, CaptionConfig()),
        lambda: Vqa.from_blip(matcher),
    ):
        with pytest.raises(ValueError, match="is a Matcher and cannot generate texts: give a captioning or"):
            use()
    for model, lacks in ((captioner, ("embed_image", "embed_text", "match")), (matcher, ("decoder", "caption_logits"))):
        assert not any(hasattr(model, name) for name in lacks)
    judge = Nlvr.from_blip(matcher)
    assert torch.equal(judge.med.blocks[0].text.qkv.weight, matcher.med.blocks[0].text.qkv.weight)
    for model in (captioner, matcher):
        blip.save_pretrained(model, words, tmp_path / "kept")
        again, _ = blip.from_pretrained(tmp_path / "kept")
        assert type(again) is type(model)
        assert again.config.parts == model.config.parts
        assert again.state_dict().keys() == model.state_dict().keys()


# transformers' folders ------------------------------------------------------------------------------------------------


def hugging(folder, kind, **changed):
    """A folder as `save_pretrained` of transformers writes it, with random weights that are not tiny."""
    torch.manual_seed(2)
    config = transformers_config()
    for part, values in changed.items():
        for name, value in values.items():
            setattr(getattr(config, part), name, value)
    theirs = kind(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    theirs.save_pretrained(folder)
    released.vocabulary(folder)
    return theirs


CAPTIONER, MATCHER, ANSWERER = BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering


@torch.no_grad()
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_a_captioner_of_transformers(tmp_path, eps):
    """With the epsilon and heads that its config.json says, 1e-5 in what Salesforce released for transformers."""
    theirs = hugging(tmp_path, CAPTIONER, vision_config={"layer_norm_eps": eps}, text_config={"num_attention_heads": 4})
    model, words = blip.from_pretrained(tmp_path)
    assert model.config.text.heads == 4
    assert {part.eps for name, part in model.vision.named_modules() if "norm" in name and hasattr(part, "eps")} == {eps}
    batch = goldens.batch(0)
    ids = starting_with(batch.ids, TEXT.dec_id)
    tokens = model.vision(batch.image)
    close(tokens, theirs.vision_model(batch.image).last_hidden_state)
    logits = theirs(pixel_values=batch.image, input_ids=ids, attention_mask=batch.keep.long()).logits
    close(model.caption_logits(ids, batch.keep, model.context(tokens))[batch.keep], logits[batch.keep])
    prompt = torch.tensor([[2, 9, 12, 3]] * 4)
    theirs = theirs.generate(batch.image, prompt, num_beams=3, max_length=12, min_length=5)
    ours = generate_texts(model, words, batch.image, DecodeConfig(beams=3, max_length=12, min_length=5), prompt="w4 w7")
    assert [text.text for (text,) in ours] == [words.decode([row[3:].tolist()])[0] for row in theirs]


@torch.no_grad()
def test_a_matcher_and_an_answerer_of_transformers(tmp_path):
    batch = goldens.batch(0)
    theirs = hugging(tmp_path / "itm", MATCHER)
    model, _ = blip.from_pretrained(tmp_path / "itm")
    ids, tokens = starting_with(batch.ids, TEXT.enc_id), model.vision(batch.image)
    logits = theirs(input_ids=ids, pixel_values=batch.image, attention_mask=batch.keep.long()).itm_score
    close(model.match(ids, batch.keep, model.context(tokens)), logits)
    assert float(model.temperature) == pytest.approx(0.07)

    # Its decoder reads questions as wide as images, so that both have to be of one width.
    vision, text = {"hidden_size": 24, "intermediate_size": 96}, {"encoder_hidden_size": 24}
    theirs = hugging(tmp_path / "vqa", ANSWERER, vision_config=vision, text_config=text)
    model, words = blip.from_pretrained(tmp_path / "vqa", Vqa)
    image = model.question.context(model.vision(batch.image))
    for row in range(4):
        keep = batch.keep[row : row + 1]
        one, mask = ids[row : row + 1, : int(keep.sum())], keep[:, : int(keep.sum())]
        context = model.context(one, mask, image[torch.tensor([row])])
        config = AnswerConfig().decode()
        prompt = torch.tensor([[TEXT.dec_id]])
        ours = generate(model, context, prompt, torch.ones_like(prompt, dtype=torch.bool), config).ids[0, 0].tolist()
        answer_ids = theirs.generate(one, batch.image[row : row + 1], mask.long(), num_beams=3, max_length=10)[
            0
        ].tolist()
        assert words.decode([ours]) == words.decode([answer_ids[1:]])


def test_a_folder_with_a_pickle_and_a_name_on_the_hub(tmp_path, monkeypatch):
    """Older repositories have pytorch_model.bin alone; a repository is a folder that is downloaded."""
    theirs = hugging(tmp_path, CAPTIONER)
    weights = load_file(tmp_path / "model.safetensors")
    weights["text_decoder.bert.embeddings.position_ids"] = torch.arange(32)[None]
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    model, _ = blip.from_pretrained(tmp_path)
    assert torch.equal(model.med.head_bias, theirs.text_decoder.cls.predictions.bias)

    monkeypatch.setattr(hub, "folder", lambda repository, revision, *_: tmp_path)
    again, words = blip.from_pretrained("Salesforce/blip-image-captioning-base")
    assert torch.equal(again.med.head_bias, model.med.head_bias)
    assert (len(words), words.enc_id) == (99, 98)


@torch.no_grad()
def test_a_feed_forward_of_another_width(tmp_path):
    """As config.json says; 28 over 32 is a ratio that rounds to less."""
    for hidden in (28, 48, 131):
        theirs = hugging(tmp_path / str(hidden), CAPTIONER, vision_config={"intermediate_size": hidden})
        model, words = blip.from_pretrained(tmp_path / str(hidden))
        assert model.config.vision.hidden == hidden
        assert model.vision.vit.blocks[1].mlp.fc1.out_features == hidden
        image = goldens.batch(0).image
        close(model.vision(image), theirs.vision_model(image).last_hidden_state)
        checkpoint.save_pretrained(model, words, tmp_path / f"ours{hidden}")
        again, _ = blip.from_pretrained(tmp_path / f"ours{hidden}")
        assert torch.equal(again.vision(image), model.vision(image))


def in_parts(folder, count=3):
    """The weights as `save_pretrained` of transformers writes large ones."""
    whole = load_file(folder / "model.safetensors")
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    places = {key: names[i % count] for i, key in enumerate(whole)}
    for name in names:
        save_file({key: whole[key] for key in whole if places[key] == name}, folder / name, {"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in whole.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return index, names


@pytest.mark.parametrize("whose", ["transformers", "openblip"])
def test_weights_in_parts(tmp_path, whose):
    theirs = hugging(tmp_path / "transformers", CAPTIONER)
    whole, words = blip.from_pretrained(tmp_path / "transformers")
    checkpoint.save_pretrained(whole, words, tmp_path / "openblip")
    folder = tmp_path / whose
    index, names = in_parts(folder)
    model, _ = blip.from_pretrained(folder)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.med.head_bias, theirs.text_decoder.cls.predictions.bias)

    for place in (
        "../elsewhere.safetensors",
        "/etc/passwd",
        "https://x/a.safetensors",
        "a.py",
        ".safetensors",
        7,
        "a/b.bin",
    ):
        changed = {**index, "weight_map": {**index["weight_map"], "x": place}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"index\.json (names|is not an index)"):
            blip.from_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(folder / names[0], folder / names[1])
    with pytest.raises(ValueError, match=f"{names[1]}: .* is in another part of model.safetensors.index.json"):
        blip.from_pretrained(folder)
    (folder / names[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {names[1]}"):
        blip.from_pretrained(folder)


def test_a_feature_extractor_is_named_as_one(tmp_path):
    """LAVIS's has the projections and a temperature, the original's has none of them."""
    whole = released.state("retrieval")
    lavis = {k: v for k, v in whole.items() if not any(part in k for part in ("_m.", "queue", "itm_head"))}
    base = {k: v for k, v in lavis.items() if k.startswith(("visual_encoder.", "text_encoder."))}
    for state in (lavis, base):
        torch.save({"model": state}, tmp_path / "a.pth")
        with pytest.raises(
            ValueError, match=r"a\.pth .*lacks the head that matches \(itm_head\): it is a feature extractor"
        ):
            blip.from_pretrained(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "blip-2"}, "is of a blip-2 model, not of a BLIP"),
        ({"vision_config": {"hidden_act": "relu"}}, "vision_config.hidden_act is relu"),
        ({"text_config": {"num_attention_heads": "many"}}, r"config\.json: text_config\.num_attention_heads must be"),
        ({"text_config": {"num_attention_heads": 10**30}}, r"config\.json: text_config\.num_attention_heads must be"),
        ({"vision_config": {"num_attention_heads": 0}}, r"config\.json: vision_config\.num_attention_heads must be"),
        ({"vision_config": {"num_attention_heads": True}}, r"config\.json: vision_config\.num_attention_heads must be"),
        ({"vision_config": {"num_attention_heads": 5}}, r"vision\.width 32 is not a multiple of vision\.heads 5"),
        ({"vision_config": {"layer_norm_eps": float("nan")}}, r"config\.json: vision_config\.layer_norm_eps must be"),
        ({"text_config": {"hidden_dropout_prob": 5}}, r"config\.json: text_config\.hidden_dropout_prob must be"),
        ({"text_config": {"bos_token_id": None}}, r"config\.json: text_config\.bos_token_id must be"),
        ({"text_config": {"num_hidden_layers": 10**9}}, r"config\.json: text_config\.num_hidden_layers must be"),
        ({"text_config": {"num_hidden_layers": 99}}, r"text_config\.num_hidden_layers is 99, the weights have 2"),
        ({"vision_config": {"hidden_size": 1024}}, r"vision_config\.hidden_size is 1024, the weights have 32"),
        ({"vision_config": {"intermediate_size": 64}}, r"vision_config\.intermediate_size is 64, the weights have 128"),
        ({"vision_config": {"image_size": 384}}, r"vision_config\.image_size is 384, the weights have 32"),
        ({"vision_config": {"hidden_act": ["gelu"] * 10**4}}, r"vision_config\.hidden_act is \['gelu'"),
        ({"text_config": []}, r"config\.json: text_config must be an object"),
        ({"text_config": {"bos_token_id": 5}}, "dec_id 5.*give the one that it was trained with"),
        ({"text_config": {"num_attention_heads": 5}}, "text width 24 is not a multiple of 5 heads"),
    ],
)
def test_configurations_of_transformers_that_do_not_fit(tmp_path, change, message):
    hugging(tmp_path, CAPTIONER)
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value in change.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        blip.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_fields_that_are_not_used_are_not_carried_out(tmp_path, monkeypatch):
    """A billion classes would be named one by one; a class in a repository would be looked for."""
    hugging(tmp_path, CAPTIONER)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"num_labels": 10**9, "auto_map": {"AutoModel": "evil/repo--x.Y"}, "_name_or_path": "evil/repo"}
    config["vision_config"] |= {"num_labels": 10**9}
    (tmp_path / "config.json").write_text(json.dumps(config))
    mapped = {
        "tokenizer_class": "Evil",
        "auto_map": {"AutoTokenizer": ["evil/repo--x.Y", None]},
        "name_or_path": "evil/x",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(mapped))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked the network"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked the network"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    start = time.perf_counter()
    assert blip.from_pretrained(tmp_path)[0].config.text.heads == 2
    assert time.perf_counter() - start < 5


# What is refused ------------------------------------------------------------------------------------------------------


def vit_of_transformers():
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    return ViTModel(config).state_dict()


def others():
    yield "BLIP-2", {"query_tokens": torch.zeros(1, 32, 8), "Qformer.bert.x": torch.zeros(1)}
    yield "BlipModel", BlipModel(transformers_config()).state_dict()
    yield "image encoder alone", timm.create_model("vit_tiny_patch16_224", depth=1).state_dict()
    bert = BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    yield "BERT alone", {f"bert.{k}": v for k, v in BertModel(bert).state_dict().items()}
    yield "model folder of openblip", Blip(goldens.CONFIG).state_dict()
    yield "it has ", vit_of_transformers()
    yield (
        "classifier of LAVIS",
        released.state("matching") | {"cls_head.0.weight": torch.zeros(2, 2)},
    )


def test_what_is_no_checkpoint_of_blip_is_named(tmp_path):
    for message, state in others():
        with pytest.raises(ValueError, match=message) as error:
            recognise(set(state), "some.pth")
        assert str(error.value).startswith("some.pth")
        assert "\n" not in str(error.value)


WORDS_OF_CAPTIONS = "text_decoder.bert.embeddings.word_embeddings.weight"
POSITIONS_OF_CAPTIONS = "text_decoder.bert.embeddings.position_embeddings.weight"


def put(name, change):
    return lambda state: state.update({name: change(state[name].clone())})


def damaged(name, change):
    state = released.state(name)
    change(state)
    return state


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("captioning", lambda s: s.pop("text_decoder.cls.predictions.bias"), "needs text_decoder.cls.predictions.bias"),
        ("captioning", lambda s: s.pop("visual_encoder.pos_embed"), "needs visual_encoder.pos_embed"),
        ("retrieval", lambda s: s.update(surprise=torch.ones(1)), "does not know surprise"),
        ("vqa", lambda s: s.pop("text_decoder.bert.encoder.layer.1.output.dense.bias"), "output.dense.bias"),
        (
            "nlvr",
            lambda s: s.update({"cls_head.2.weight": torch.ones(3, 16), "cls_head.2.bias": torch.ones(3)}),
            "cls_head.2.weight is 3 x 16, the model takes 2 x 16",
        ),
        (
            "pretraining",
            lambda s: s.update({"visual_encoder.pos_embed": torch.zeros(1, 18, 32)}),
            "not of a square image",
        ),
        (
            "pretraining",
            lambda s: [s.pop(k) for k in list(s) if k.startswith("visual_encoder.blocks.0.")],
            "not numbered from 0",
        ),
        (
            "captioning",
            lambda s: s.update({"visual_encoder.pos_embed": torch.zeros(1).expand(1, 10**12 + 1, 32)}),
            "claims more numbers than the file holds",
        ),
        ("captioning", put(WORDS_OF_CAPTIONS, lambda t: t.mul(float("nan"))), "word_embeddings.weight holds NaN"),
        (
            "vqa",
            put("text_encoder.embeddings.LayerNorm.bias", lambda t: t.fill_(float("inf"))),
            "LayerNorm.bias holds NaN",
        ),
        ("retrieval", put("temp", lambda t: t * 0 - 1), "a.pth: temperature is -1"),
        (
            "pretraining",
            put("itm_head.weight", lambda t: t.long()),
            "itm_head.weight is int64, the model takes numbers",
        ),
        ("pretraining", put("itm_head.weight", lambda t: t.bool()), "itm_head.weight is bool"),
        ("pretraining", put("itm_head.weight", lambda t: t.to(torch.complex64)), "itm_head.weight is complex64"),
        (
            "pretraining",
            put("itm_head.weight", lambda t: t.to(torch.float8_e4m3fn)),
            "itm_head.weight is float8_e4m3fn",
        ),
        (
            "pretraining",
            put("itm_head.weight", lambda t: t.to("meta")),
            "itm_head.weight is not a named tensor of numbers",
        ),
        ("pretraining", put("itm_head.weight", lambda t: t.to_sparse()), "itm_head.weight is not a named tensor"),
        (
            "pretraining",
            put("vision_proj.weight", lambda t: t[0, 0]),
            "vision_proj.weight is a scalar, not of 2 dimensions",
        ),
        ("captioning", put(WORDS_OF_CAPTIONS, lambda t: t[0, 0]), "word_embeddings.weight is a scalar"),
        (
            "captioning",
            put(POSITIONS_OF_CAPTIONS, lambda t: torch.zeros(0, 10**12)),
            "a.pth: the number of attention heads of its text transformer of width 1000000000000",
        ),
        ("captioning", put(POSITIONS_OF_CAPTIONS, lambda t: torch.zeros(10**12, 0)), "a.pth: "),
        ("captioning", put(POSITIONS_OF_CAPTIONS, lambda t: torch.zeros(0, 24)), "a.pth: text.max_positions must be"),
        ("captioning", put("visual_encoder.pos_embed", lambda t: t[:, :1]), "not of a square image"),
        ("captioning", put("visual_encoder.pos_embed", lambda t: t[:, :0]), "not of a square image"),
        ("captioning", put("visual_encoder.patch_embed.proj.weight", lambda t: torch.zeros(0, 3, 8, 8)), "a.pth: "),
        (
            "captioning",
            put("text_decoder.bert.encoder.layer.0.intermediate.dense.weight", lambda t: torch.zeros(1 << 17, 0)),
            "the model takes 131072 x 24",
        ),
        (
            "captioning",
            lambda s: s.update({f"visual_encoder.blocks.{i}.x": torch.zeros(0) for i in range(2, 300)}),
            "a.pth: vision.depth must be an integer from 1 to 128, got 300",
        ),
        (
            "captioning",
            lambda s: s.update({f"text_decoder.bert.encoder.layer.{i}.x": torch.zeros(0) for i in range(2, 100)}),
            "does not know text_decoder.bert.encoder.layer.10.x",
        ),
    ],
)
def test_a_checkpoint_that_is_not_whole(tmp_path, name, change, message):
    path = tmp_path / "a.pth"
    torch.save({"model": damaged(name, change)}, path)
    released.vocabulary(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load(path, name)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"PK\x03\x04 torn", "fetch or save it again|ending .pth"),
    ],
)
def test_files_that_are_no_weights(tmp_path, content, message):
    for name in ("a.pth", "a.bin", "a.pt", "a.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            blip.load(tmp_path / name)
    hugging(tmp_path / "folder", CAPTIONER)
    (tmp_path / "folder/model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        blip.from_pretrained(tmp_path / "folder")


def test_a_bomb_is_not_unpacked(tmp_path):
    """torch.save compresses nothing, and its reader would unpack what is compressed."""
    path = tmp_path / "bomb.pth"
    whole = tmp_path / "whole.pth"
    torch.save({"model": {"a": torch.zeros(4 * 10**6)}}, whole)
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for part in archive.infolist():
            packed.writestr(part.filename, archive.read(part))
    assert path.stat().st_size < 10**5
    with pytest.raises(ValueError, match=r"bomb\.pth would unpack to more than its own size"):
        blip.load(path)


class Canary:
    def __reduce__(self):
        return (os.mkdir, (os.environ["CANARY"],))


def test_nothing_in_a_checkpoint_is_executed(tmp_path, monkeypatch):
    monkeypatch.setenv("CANARY", str(tmp_path / "it sang"))
    path = released.pth(tmp_path, "captioning", args=Canary())
    hugging(tmp_path / "folder", CAPTIONER)
    (tmp_path / "folder/model.safetensors").unlink()
    torch.save({"x": Canary()}, tmp_path / "folder/pytorch_model.bin")
    for where in (path, tmp_path / "folder"):
        for use in (blip.from_pretrained, blip.load, checkpoint.opened):
            with pytest.raises(ValueError, match="not executed"):
                use(where)
    assert not (tmp_path / "it sang").exists()
    torch.load(path, weights_only=False)  # what must never be done
    assert (tmp_path / "it sang").exists(), "the canary can sing"


def test_heads_that_nothing_tells(tmp_path, monkeypatch):
    monkeypatch.undo()
    path = released.pth(tmp_path, "captioning")
    with pytest.raises(ValueError, match=r"attention heads of its .* of width 24 is unknown"):
        blip.from_pretrained(path)
    explicit = released.pth(tmp_path, "captioning", attention_heads={"vision": 2, "text": 2})
    assert blip.from_pretrained(explicit)[0].config.text.heads == 2


def test_places_without_a_model(tmp_path):
    released.pth(tmp_path / "folder", "captioning")
    for where, message in (
        (tmp_path / "none.pth", r"no weights at .*none\.pth"),
        (tmp_path / "folder", r"no config\.json.*give the file itself, .*captioning\.pth"),
        ("https://example.org/model_base.pth", "is an address: download the file first"),
        ("ssh://host/model", "is an address"),
        ("${HOME}/model", "is not a model directory"),
        ("nobody/nothing", "is not in the local cache"),
        ("../outside", "is not a model directory"),
    ):
        start = time.perf_counter()
        with pytest.raises(FileNotFoundError, match=message):
            blip.from_pretrained(where)
        assert time.perf_counter() - start < 2


# Tokenizers -----------------------------------------------------------------------------------------------------------


def test_a_pth_brings_no_tokenizer(tmp_path, monkeypatch):
    path = released.pth(tmp_path / "alone", "captioning", beside=False)
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError, match=r"captioning\.pth has no tokenizer.*--tokenizer.*OPENBLIP_TOKENIZER"):
        blip.from_pretrained(path)
    assert time.perf_counter() - start < 2
    words = released.vocabulary(tmp_path / "words")
    assert len(blip.from_pretrained(path, tokenizer=words)[1]) == 99
    assert len(blip.from_pretrained(path, tokenizer=words.parent)[1]) == 99
    monkeypatch.setenv("OPENBLIP_TOKENIZER", str(words))
    assert len(blip.from_pretrained(path)[1]) == 99
    with pytest.raises(ValueError, match=r"has 99 word pieces, and tokenizer world .*give the one that it was trained"):
        blip.from_pretrained(path, tokenizer="world")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        blip.from_pretrained(path, tokenizer=tmp_path / "nowhere/vocab.txt")


def test_a_model_of_ours_keeps_its_tokenizer(tmp_path):
    model, words = load(released.pth(tmp_path, "pretraining"), "pretraining")
    blip.save_pretrained(model, words, tmp_path / "model")
    assert len(blip.from_pretrained(tmp_path / "model", tokenizer=tmp_path / "vocab.txt")[1]) == 99
    with pytest.raises(ValueError, match="another tokenizer than world"):
        blip.from_pretrained(tmp_path / "model", tokenizer="world")


# One front for all ----------------------------------------------------------------------------------------------------


def test_recipes_start_from_a_released_file(tmp_path):
    path = released.pth(tmp_path / "a", "pretraining", beside=False)
    words = str(released.vocabulary(tmp_path / "b"))
    model, _ = build_model(ModelChoice(start_from=str(path), tokenizer=words, image_size=48, drop_path=0.1), seed=0)
    assert model.config.vision.image_size == 48
    assert torch.equal(model.match_head.bias, released.state("pretraining")["itm_head.bias"])
    answerer, _ = build_task(Vqa, ModelChoice(start_from=str(path), tokenizer=words), seed=0)
    assert torch.equal(answerer.question.word.weight, model.med.word.weight)
    going_on, _ = build_task(Vqa, ModelChoice(start_from=str(released.pth(tmp_path / "b", "vqa"))), seed=0)
    assert torch.equal(going_on.answer.head_bias, released.state("vqa")["text_decoder.cls.predictions.bias"])
    with pytest.raises(FileNotFoundError, match=r"model\.start_from: no weights at .*none\.pth"):
        build_model(ModelChoice(start_from=str(tmp_path / "none.pth")), seed=0)


def test_a_kind_that_is_not_wanted(tmp_path):
    path = released.pth(tmp_path, "vqa")
    with pytest.raises(ValueError, match=r"vqa\.pth is of a Vqa model, which is for `blip vqa`"):
        blip.from_pretrained(path)
    path = released.pth(tmp_path, "captioning")
    with pytest.raises(ValueError, match=r"captioning\.pth is of a Blip model, Vqa is expected"):
        blip.from_pretrained(path, Vqa)


def test_a_layout_of_ours_from_before_there_were_parts(tmp_path):
    model, words = load(released.pth(tmp_path, "pretraining"), "pretraining")
    blip.save_pretrained(model, words, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    del config["model"]["parts"], config["model"]["vision"]["norm_eps"]
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    assert blip.from_pretrained(tmp_path / "model")[0].config == model.config


def test_capfilt_tells_foreign_models_apart(tmp_path):
    from capfilt.store.identity import model_identity

    path = released.pth(tmp_path / "a", "captioning")
    first = model_identity(str(path))
    assert first == model_identity(str(path))
    torch.save({"model": released.state("captioning")}, path)
    assert model_identity(str(path))["sha256"] != first["sha256"]
    hugging(tmp_path / "b", CAPTIONER)
    assert model_identity(str(tmp_path / "b"))["sha256"] != first["sha256"]
    with pytest.raises(FileNotFoundError, match=r"no weights at .*none.pth"):
        model_identity(str(tmp_path / "none.pth"))


# Real widths ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("width", "heads"), [(768, 12), pytest.param(1024, 16, marks=pytest.mark.slow)])
def test_released_widths_at_two_layers_against_transformers(tmp_path, width, heads):
    """The widths, heads, patches and vocabulary of ViT-B and ViT-L with the recorded numbers' depth, 2 layers each."""
    from transformers import BlipConfig as TheirConfig

    torch.manual_seed(4)
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2, "image_size": 32}
    vision |= {"num_attention_heads": heads, "layer_norm_eps": 1e-6, "initializer_range": 0.02}
    text = {"num_hidden_layers": 2, "num_attention_heads": 12}
    theirs = BlipForConditionalGeneration(TheirConfig(vision_config=vision, text_config=text)).eval()
    theirs.save_pretrained(tmp_path)
    pieces = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join([*pieces, *(f"p{i}" for i in range(30522 - len(pieces)))]) + "\n")
    model, _ = blip.from_pretrained(tmp_path)
    assert model.config.vision == VisionConfig("vit_base_patch16_224", 32, 16, width, 2, heads)
    image, ids = torch.randn(2, 3, 32, 32), torch.randint(999, 30000, (2, 7))
    ids[:, 0] = 30522
    keep = torch.ones_like(ids, dtype=torch.bool)
    ours = model.caption_logits(ids, keep, model.context(model.vision(image)))
    close(ours, theirs(pixel_values=image, input_ids=ids, attention_mask=keep.long()).logits)


def test_importing_it_brings_no_transformers():
    """config.json of a foreign folder is what needs it; the help must not wait."""
    code = "import sys; from blip.app import cli; from blip.app.commands import convert; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_tokenizer_that_begins_with_enc_is_the_same_tokenizer(tmp_path):
    words = Tokenizer.load(released.vocabulary(tmp_path))
    theirs = words.for_transformers("enc")
    assert theirs("w1 w2")["input_ids"] == [98, 6, 7, 3]
    assert words.for_transformers("cls")("w1 w2")["input_ids"] == [2, 6, 7, 3]
    theirs.save_pretrained(tmp_path / "enc")
    assert Tokenizer.load(tmp_path / "enc").digest() == words.digest()
