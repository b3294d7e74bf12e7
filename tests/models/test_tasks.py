"""Task models as directories: kept, loaded strictly by their class, started from a pre-trained one by an account."""

import dataclasses
import json

import pytest
import torch
from test_checkpoint import SMALLEST, TOKENIZER

from blip.checkpoints.checkpoint import from_pretrained, opened, save_pretrained
from blip.models.blip import Blip, Captioner, Matcher, Towers
from blip.models.dialogue import Dialogue
from blip.models.families import TASKS
from blip.models.inherit import copy
from blip.models.nlvr import Nlvr
from blip.models.protocols import Embeds, Generates, Matches, require
from blip.models.vqa import Vqa
from recipes.building import ModelChoice, build_task

KINDS = [task.model for task in TASKS.values() if task.model is not Blip]


@pytest.fixture
def blip():
    torch.manual_seed(1)
    return Blip(SMALLEST)


def same(ours, theirs):
    a, b = ours.state_dict(), theirs.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


CAN = {
    Towers: {Embeds}, Matcher: {Embeds, Matches}, Captioner: {Generates}, Blip: {Embeds, Matches, Generates},
    Vqa: {Generates}, Nlvr: set(), Dialogue: set(),
}  # fmt: skip


@pytest.mark.parametrize("kind", CAN)
def test_what_a_model_can_be_asked_for(kind, blip):
    model = kind.from_blip(blip) if kind in KINDS else kind(SMALLEST)
    assert {use for use in (Embeds, Matches, Generates) if isinstance(model, use)} == CAN[kind]
    for use in (Embeds, Matches, Generates):
        if use in CAN[kind]:
            require(model, use)
        else:
            with pytest.raises(ValueError, match=f"is a {kind.__name__} and cannot .*: give a .* checkpoint$"):
                require(model, use)


@pytest.mark.parametrize("kind", [Captioner, Matcher])
def test_a_part_is_kept_as_what_it_is(kind, tmp_path):
    """Its config.json names what it has, which earlier versions read as well; a whole one's parts are not there."""
    model = kind(SMALLEST)
    save_pretrained(model, TOKENIZER, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config.get("task"), config["model"]["parts"]) == (None, {Captioner: "writing", Matcher: "matching"}[kind])
    again, _ = from_pretrained(tmp_path)
    assert type(again) is kind
    assert same(again, model)
    assert set(again.state_dict()) < set(Blip(SMALLEST).state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_model_is_kept_whole(kind, blip, tmp_path):
    model = kind.from_blip(blip)
    save_pretrained(model, TOKENIZER, tmp_path / "model")
    loaded, _ = from_pretrained(tmp_path / "model", kind)
    assert type(loaded) is kind
    assert not loaded.training
    assert same(loaded, model)
    assert TASKS[opened(tmp_path / "model").task].model is kind
    larger, _ = from_pretrained(tmp_path / "model", kind, image_size=48)
    assert larger.vision.vit.pos_embed.shape[1] == 1 + 36


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_another_kind_is_refused_with_what_to_do(kind, blip, tmp_path):
    save_pretrained(kind.from_blip(blip), TOKENIZER, tmp_path / "task")
    save_pretrained(blip, TOKENIZER, tmp_path / "blip")
    name = next(name for name, task in TASKS.items() if task.model is kind)
    with pytest.raises(ValueError, match=rf"is of a {kind.__name__} model.*{name}"):
        from_pretrained(tmp_path / "task")
    with pytest.raises(ValueError, match=rf"is of a Blip model, {kind.__name__} is expected.*recipes.{name}"):
        from_pretrained(tmp_path / "blip", kind)


def test_a_task_from_the_future_is_named(blip, tmp_path):
    save_pretrained(blip, TOKENIZER, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert "task" not in config
    for task in ("smell", ["vqa"], None):
        (tmp_path / "model/config.json").write_text(json.dumps(config | {"task": task}))
        with pytest.raises(ValueError, match=r"config\.json is of task .* update openblip"):
            from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_has_an_origin(kind, blip):
    model = kind.from_blip(blip)
    origin, ours, theirs = model.origin(), model.state_dict(), blip.state_dict()
    assert set(origin.copied) | set(origin.fresh) == set(ours)
    assert set(origin.copied.values()) | set(origin.unused) == set(theirs)
    assert all(torch.equal(ours[name], theirs[source]) for name, source in origin.copied.items())
    lacking = dataclasses.replace(origin, unused={})
    with pytest.raises(ValueError, match="must be accounted for"):
        copy(model, blip, lacking)


def test_vqa_starts_from_both_stacks_and_says_what_is_new(blip):
    origin = Vqa.from_blip(blip).origin()
    # Images are 24 wide here and questions 16, as with ViT-L: the decoder's keys and values cannot be copied.
    assert set(origin.fresh) == {"answer.blocks.0.cross.kv.weight"}  # its bias fits, and the original keeps it
    assert origin.copied["answer.blocks.0.cross.kv.bias"] == "med.blocks.0.cross.kv.bias"
    assert origin.copied["question.blocks.0.cross.kv.weight"] == "med.blocks.0.cross.kv.weight"
    assert origin.copied["answer.blocks.0.up.weight"] == origin.copied["question.blocks.0.up.weight"]
    square = dataclasses.replace(SMALLEST, vision=dataclasses.replace(SMALLEST.vision, width=16))
    assert not Vqa(square).origin().fresh


def test_a_task_starts_from_a_folder_of_either_kind(blip, tmp_path):
    save_pretrained(blip, TOKENIZER, tmp_path / "blip")
    started, _ = build_task(Vqa, ModelChoice(start_from=str(tmp_path / "blip"), image_size=48), seed=3)
    assert torch.equal(started.question.word.weight, blip.med.word.weight)
    assert started.config.vision.image_size == 48
    save_pretrained(started, TOKENIZER, tmp_path / "vqa")
    assert same(build_task(Vqa, ModelChoice(start_from=str(tmp_path / "vqa")), seed=9)[0], started)


def test_a_recipe_builds_it_from_a_choice(blip, tmp_path):
    save_pretrained(blip, TOKENIZER, tmp_path / "blip")
    choice = ModelChoice(start_from=str(tmp_path / "blip"), drop_path=0.1)
    model, _ = build_task(Vqa, choice, seed=3)
    assert same(model, build_task(Vqa, choice, seed=3)[0])
    assert model.config.vision.drop_path == 0.1
    save_pretrained(model, TOKENIZER, tmp_path / "vqa")
    again, _ = build_task(Vqa, ModelChoice(start_from=str(tmp_path / "vqa")), seed=9)
    assert same(again, model)
    assert again.config.vision.drop_path == 0.1
    tiny, _ = build_task(Vqa, ModelChoice(size="tiny", tokenizer="world"), seed=0)
    assert tiny.config.text.width == 128
