"""The question-answering recipe: a whole run on the synthetic world, the model that is kept, and what it refuses."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from test_checkpoint import SMALLEST, TOKENIZER

from blip.checkpoints.checkpoint import from_pretrained, save_pretrained
from blip.data.prepare.questions import Questions
from blip.data.settings import ImageQuestions
from blip.errors import DataError
from blip.inference.answering import ANSWERS, Candidates
from blip.inference.settings import AnswerConfig
from blip.models.blip import Blip
from blip.models.vqa import Vqa
from blip.train.log import read_metrics
from eval.vqa import QuestionSet, answers_of, read_results, score
from recipes import command
from recipes import vqa as recipe


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    recipe.QuestionWorld(str(folder), train=12, held_out=4, image_size=32).draw()
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "model"
    torch.manual_seed(2)
    save_pretrained(Blip(SMALLEST), TOKENIZER, folder)
    return folder


def options(world, start, out, *more: str) -> list[str]:
    def files(split: str) -> dict[str, str]:
        return {"path": str(world / f"questions-{split}.json"), "annotations": str(world / f"annotations-{split}.json")}

    held_out = [f"--{name}.source.{k}" for name in ("validation", "test") for k in ("path", "annotations")]
    values = [files(split)[k] for split in ("val", "test") for k in ("path", "annotations")]
    train = {"steps": 4, "batch_size": 8, "warmup_steps": 1, "lr": 0.01, "eval_every": 2, "log_every": 1, "seed": 3}
    return [
        "--out", str(out), "--model.start_from", str(start), "--data.sources", json.dumps([files("train")]),
        "--data.workers", "0", *(part for pair in zip(held_out, values, strict=True) for part in pair),
        *(part for name, value in train.items() for part in (f"--train.{name}", str(value))), *more,
    ]  # fmt: skip


def run(args: list[str]):
    return recipe.answer(command.read(recipe.VqaRun, args))


def test_a_run_keeps_the_best_model_and_its_answers(world, start, tmp_path):
    result, folder = run(options(world, start, tmp_path / "out"))
    lines = read_metrics(tmp_path / "out/metrics.jsonl")
    evaluated = [line for line in lines if "eval" in line]
    accuracies = [line["eval"]["accuracy"] for line in evaluated]
    assert [line["step"] for line in evaluated] == [2, 4]
    assert "vqa" in next(line for line in lines if "losses" in line)["losses"]
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["kept"] == evaluated[accuracies.index(max(accuracies))]["step"]
    assert result.metrics["accuracy"] == max(accuracies)
    assert set(results["validation"]) == {"accuracy", "accuracy_yes/no", "accuracy_number", "accuracy_other"}

    model, tokenizer = from_pretrained(folder, Vqa)
    choices = json.loads((folder / ANSWERS).read_text())
    assert {"yes", "no", "1", "2"} <= set(choices)
    for name, split in (("validation", "val"), ("test", "test")):
        source = ImageQuestions(
            str(world / f"questions-{split}.json"), annotations=str(world / f"annotations-{split}.json")
        )
        question_set = QuestionSet(Questions(source))
        answers = answers_of(model, tokenizer, question_set, AnswerConfig(), Candidates(choices, tokenizer))
        words = {name: answer.text for name, answer in answers.items()}
        assert words == read_results(tmp_path / f"out/results-{name}.json")
        assert score(question_set.questions, words, resamples=0).named() == results[name]
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "visual-question-answering"
    assert {one.dataset_split for one in card.data.eval_results} == {"validation", "test"}
    assert "Accuracy" in {one.metric_name for one in card.data.eval_results}
    again, _ = run(options(world, start, tmp_path / "out"))
    assert again.metrics == result.metrics


def test_words_may_be_searched_and_a_task_model_gone_on_from(world, start, tmp_path):
    more = [
        "--common",
        "0",
        "--train.steps",
        "2",
        "--answers.max_length",
        "4",
        "--validation.limit",
        "3",
        "--test",
        "null",
    ]
    _, folder = run(options(world, start, tmp_path / "one", *more))
    assert not (folder / ANSWERS).exists()
    (tmp_path / "few.txt").write_text("yes\nno\n")
    more = [
        "--candidates",
        str(tmp_path / "few.txt"),
        "--train.steps",
        "1",
        "--train.lr",
        "0",
        "--train.eval_every",
        "1",
    ]
    _, second = run(options(world, folder, tmp_path / "two", *more, "--train.warmup_steps", "0"))
    assert json.loads((second / ANSWERS).read_text()) == ["no", "yes"]
    assert set(read_results(tmp_path / "two/results-validation.json").values()) <= {"yes", "no"}


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--common", "-1"], "common must be 0 or more, got -1"),
        (["--data.prompt", "a"], "data.prompt is not for questions"),
        (["--data.sources", "[]"], "no data"),
        (["--validation.source.path", "gone.json"], "gone.json"),
        (["--validation.limit", "0"], "limit must be 1 or more, got 0"),
        (["--candidates", "gone.txt"], "gone.txt"),
        (["--answers.k", "0"], "k must be 1 or more, got 0"),
        (["--common", "0", "--answers.max_length", "40"], "max_length 40 exceeds the model's 32 positions"),
        (["--model.start_from", "gone"], "model.start_from: gone"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_trained(capsys, tmp_path, world, start, more, named):
    with pytest.raises(SystemExit) as stop:
        command.run(lambda: run(options(world, start, tmp_path / "out", *more)))
    assert stop.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert named in errors[0]
    assert not (tmp_path / "out/metrics.jsonl").exists()


def test_held_out_questions_need_answers(world):
    held_out = recipe.HeldOutQuestions(ImageQuestions(str(world / "questions-val.json")))
    with pytest.raises(DataError, match=r"validation\.source .* no answers to 20 questions \(0, 1, 2, 3, 4, \.\.\.\)"):
        recipe.VqaEvaluation("validation", held_out, AnswerConfig(), None, Vqa(SMALLEST), TOKENIZER)
