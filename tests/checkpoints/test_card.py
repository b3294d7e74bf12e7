"""Model cards: the hub's own classes read them back, with scores by data set, and any name of a score is harmless."""

import json

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from huggingface_hub.repocard_data import model_index_to_eval_results
from test_checkpoint import SMALLEST, TOKENIZER

from blip.checkpoints import checkpoint
from blip.checkpoints.card import Facts, Measured, metric_of
from blip.models.blip import Blip, Captioner, Matcher
from blip.models.dialogue import Dialogue
from blip.models.nlvr import Nlvr
from blip.models.vqa import Vqa

NOTE = "trained on synthetic shapes; on photographs its answers mean nothing"


def saved(model, folder, *args, **options):
    checkpoint.save_pretrained(model, TOKENIZER, folder, *args, **options)
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize(
    ("kind", "pipeline", "line"),
    [
        (Blip, "image-to-text", 'model.caption("photo.jpg")'),
        (Captioner, "image-to-text", 'model.caption("photo.jpg")'),
        (Matcher, "zero-shot-image-classification", 'model.classify("photo.jpg", ["dog", "cat"])'),
        (Vqa, "visual-question-answering", 'model.answer("photo.jpg", "how many dogs are there?")'),
        (Nlvr, "visual-question-answering", "from_pretrained('path/to/this/folder', Nlvr)".replace("'", '"')),
        (Dialogue, "visual-question-answering", "Dialogue)"),
    ],
)
def test_every_kind_of_model_has_its_task_and_its_lines(kind, pipeline, line, tmp_path):
    blip = Blip(SMALLEST)
    model = blip if kind is Blip else kind(SMALLEST) if kind in (Captioner, Matcher) else kind.from_blip(blip)
    card = saved(model, tmp_path / "model")
    assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == ("openblip", pipeline, "apache-2.0")
    assert card.data.pipeline_tag in card.data.tags or pipeline == "zero-shot-image-classification"
    (code,) = [block.partition("```")[0] for block in card.text.split("```python\n")[1:]]
    compile(code, "card", "exec")
    assert line in code
    assert NOTE not in card.text


def test_scores_stand_by_data_set_and_split_under_the_names_of_the_field(tmp_path):
    scores = [
        Measured("coco/dataset_coco", "val", "cider", 133.25),
        Measured("coco/dataset_coco", "val", "bleu_4", 39.7),
        Measured("coco/dataset_coco", "test", "cider", 132.5),
        Measured("flickr 30k", "test", "tr@1_itc", 95.0),
    ]
    facts = Facts("Fine-tuned for 10 steps.", ["coco/dataset_coco.json (human)"], scores)
    card = saved(Blip(SMALLEST), tmp_path / "model", facts, trained_on=["other images"])
    read = {
        (one.dataset_type, one.dataset_name, one.dataset_split, one.metric_type, one.metric_name): one.metric_value
        for one in card.data.eval_results
    }
    assert read == {
        ("coco/dataset_coco", "coco/dataset_coco", "val", "cider", "CIDEr"): 133.25,
        ("coco/dataset_coco", "coco/dataset_coco", "val", "bleu", "BLEU-4"): 39.7,
        ("coco/dataset_coco", "coco/dataset_coco", "test", "cider", "CIDEr"): 132.5,
        ("flickr-30k", "flickr 30k", "test", "recall", "Image to text recall@1, by ITC alone"): 95.0,
    }
    assert {one.task_type for one in card.data.eval_results} == {"image-to-text"}
    assert "| coco/dataset_coco | test | CIDEr | 132.5 |" in card.text
    assert "- coco/dataset_coco.json (human)" in card.text
    assert "Images: other images." in card.text


HOSTILE = [
    "",
    "a: b\n- c",
    "---\nlicense: mit\n---",
    "naïve 分数",
    "| x |",
    "x" * 300,
    "{[",
    "'\"",
    "@",
    "null",
    "\x07",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_any_name_of_a_score_or_data_set_leaves_a_card_that_is_read(name, tmp_path):
    scores = [Measured(name, name, name, 1.5), Measured("d", "s", name, float("nan")),
              Measured("d", "s", name, float("inf")), Measured("d", "s", "cider", None)]  # fmt: skip
    card = saved(Blip(SMALLEST), tmp_path / "model", Facts("x", [], scores))
    (one,) = card.data.eval_results
    assert one.metric_value == 1.5
    assert one.metric_type
    assert one.metric_name
    assert card.data.license == "apache-2.0"
    front = (tmp_path / "model/README.md").read_text().split("---\n")[1]
    assert model_index_to_eval_results(yaml.safe_load(front)["model-index"])[1] == [one]
    assert ".nan" not in front
    assert ".inf" not in front


def test_names_of_metrics():
    assert metric_of("ir@10") == ("recall", "Text to image recall@10")
    assert metric_of("rouge_l") == ("rouge", "ROUGE-L")
    assert metric_of("yes/no") == ("yes_no", "yes/no")


def test_a_text_of_ones_own_stays_and_synthetic_shapes_are_still_said(tmp_path):
    card = saved(Blip(SMALLEST), tmp_path / "model", "# Mine\n\nMy words.", None, ["synthetic shapes"])
    assert card.text.strip() == f"# Mine\n\nMy words.\n\nNote: {NOTE}."
    assert card.data.license == "other"
    facts = saved(Blip(SMALLEST), tmp_path / "other", trained_on=["synthetic shapes"])
    assert f"Note: {NOTE}." in facts.text
    assert "Images: synthetic shapes." in facts.text


def test_the_card_on_the_hub_loads_the_model_by_its_name(monkeypatch):
    uploads = {}

    class Hub:
        def __init__(self, token=None): ...
        def create_repo(self, *args, **options): ...

        def upload_folder(self, *, repo_id, folder_path):
            uploads["card"] = ModelCard.load(folder_path / "README.md")
            uploads["config"] = json.loads((folder_path / "config.json").read_text())
            return "address"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    score = Measured("d", "test", "cider", 1.0)
    checkpoint.push_to_hub(
        Blip(SMALLEST), TOKENIZER, "me/mine", card=Facts("x", [], [score]), trained_on=("synthetic shapes",)
    )
    assert 'blip.load("me/mine")' in uploads["card"].text
    assert NOTE in uploads["card"].text
    assert uploads["card"].data.model_name == "mine"
    assert uploads["config"]["trained_on"] == ["synthetic shapes"]


def test_a_card_is_written_without_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    torch.manual_seed(0)
    assert saved(Blip(SMALLEST), tmp_path / "model").data.library_name == "openblip"
