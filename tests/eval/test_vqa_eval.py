"""VQA's evaluator: the official accuracy to the last digit, what does not match, and the same from any processes."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from stub_run import the_zygote
from test_checkpoint import SMALLEST, TOKENIZER

from blip import dist
from blip.app import cli
from blip.checkpoints.checkpoint import from_pretrained, save_pretrained
from blip.data.prepare.questions import Question, Questions
from blip.data.settings import ImageQuestions
from blip.errors import DataError
from blip.inference.answering import ANSWERS, Candidates
from blip.inference.settings import AnswerConfig
from blip.models.blip import Blip
from blip.models.vqa import Vqa
from blip.world import questions as world_questions
from eval.__main__ import main
from eval.metrics.vqa import accuracy, normalise
from eval.vqa import QuestionSet, answers_of, evalai_results, read_results, score

CHOICES = ["yes", "no", "red", "blue", "star", "2", "1", "top left"]


# The measure ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def references(real_data) -> Path:
    return real_data / "eval_references"


def test_spelling_is_evened_out_as_officially(references):
    vectors = json.loads((references / "vqa_normalizer_vectors.json").read_text())
    assert len(vectors) > 400
    wrong = [v for v in vectors if normalise(v["input"]) != v["normalized"]]
    assert not wrong


def official(references) -> list[Question]:
    config = ImageQuestions(
        str(references / "vqa_q.json"), annotations=str(references / "vqa_a.json"), image_name="{image_id}.jpg"
    )
    source = Questions(config)
    return [source.question(row) for row in range(len(source))]


def test_the_official_numbers(references):
    questions = official(references)
    expected = json.loads((references / "vqa_expected_simple.json").read_text())
    scores = score(questions, read_results(references / "vqa_results.json"), resamples=0)
    assert round(100 * scores.accuracy, 4) == 53.8251
    rows = json.loads((references / "vqa_a.json").read_text())["annotations"]
    files = {
        "majority": read_results(references / "vqa_results_majority.json"),
        "annotator1": {row["question_id"]: row["answers"][0]["answer"] for row in rows},
        "yes": {row["question_id"]: "yes" for row in rows},
    }
    for name, results in files.items():
        scores = score(questions, results, resamples=0)
        assert round(100 * scores.accuracy, 4) == expected[name]["overall"], name
        kinds = {kind: round(100 * value, 4) for kind, value in scores.by_answer_type.items()}
        assert kinds == expected[name]["perAnswerType"], name
    assert len(scores.by_question_type) > 20
    assert sum(scores.counts.values()) == scores.questions == len(questions)


def test_arithmetic_of_the_measure():
    given = ["red"] * 2 + ["blue"] * 5 + ["green"] * 3
    # Left out in turn: two of red see 1 other, eight see 2.
    assert accuracy("red", given) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert accuracy("blue", given) == 1.0
    assert accuracy("green", given) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert accuracy("pink", given) == 0.0


def test_agreement_of_all_ten_is_compared_letter_by_letter_as_officially():
    assert accuracy("Yes.", ["yes"] * 10) == 0.0
    assert accuracy("Yes.", ["yes"] * 9 + ["no"]) == 1.0
    assert accuracy(" yes\n", ["yes"] * 10) == 1.0


def test_few_annotators():
    assert accuracy("The Heart", ["heart"]) == 1.0
    assert accuracy("two", ["3", "2"]) == 1.0
    assert accuracy("lung", ["heart"]) == 0.0


def questions_with(*answers):
    return [Question(i, "what?", "a.png", list(given), 1.0, "what", kind) for i, (kind, *given) in enumerate(answers)]


def test_groups_and_interval():
    questions = questions_with(("other", "a"), ("other", "b"), ("number", "1"))
    scores = score(questions, {0: "a", 1: "x", 2: "1"}, resamples=50, seed=1)
    assert scores.by_answer_type == {"number": 1.0, "other": 0.5}
    assert scores.by_question_type == {"what": pytest.approx(2 / 3)}
    assert scores.named() == {"accuracy": pytest.approx(2 / 3), "accuracy_number": 1.0, "accuracy_other": 0.5}
    assert 0 <= scores.accuracy_low < 2 / 3 < scores.accuracy_high <= 1
    json.dumps(asdict(score(questions, {0: "a", 1: "x", 2: "1"}, resamples=0)), allow_nan=False)


def test_ids_that_do_not_match():
    questions = questions_with(("other", "a"), ("other", "b"))
    with pytest.raises(DataError, match=r"no results for 1 question \(1\) of 2"):
        score(questions, {0: "a"})
    scores = score(questions, {0: "a"}, allow_partial=True)
    assert (scores.accuracy, scores.questions, scores.missing) == (1.0, 1, 1)
    with pytest.raises(DataError, match=r"results for 2 questions \(5, 6\) that are not among"):
        score(questions, {0: "a", 1: "b", 5: "", 6: ""}, allow_partial=True)
    with pytest.raises(DataError, match="no results to score"):
        score(questions, {})
    with pytest.raises(DataError, match=r"no annotators' answers to 1 question \(0\)"):
        score(questions_with(("other",)), {0: "a"})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            '[{"question_id": 1, "answer": "a"}, {"question_id": "1", "answer": "b"}]',
            r"1 question \(1\) more than once",
        ),
        ('[{"question_id": 1}]', "row 0 is"),
        ('[{"question_id": 1, "answer": 3}]', "row 0 is"),
        ('["a"]', "row 0 is"),
        ("[]", "is empty"),
        ("{}", "is not a list"),
        ("[{", "is not valid JSON"),
    ],
)
def test_results_that_are_none(tmp_path, rows, message):
    (tmp_path / "r.json").write_text(rows)
    with pytest.raises(DataError, match=message):
        read_results(tmp_path / "r.json")


def test_results_are_read_back(tmp_path):
    answers = {7: "a \u00e9", "x": "no"}
    (tmp_path / "r.json").write_text(evalai_results(answers))
    assert read_results(tmp_path / "r.json") == answers


# Answering ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with candidates, and questions about seven images."""
    folder = tmp_path_factory.mktemp("vqa")
    torch.manual_seed(5)
    model = Vqa.from_blip(Blip(SMALLEST)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (0.6 if "cross" in name else 0.1))
    save_pretrained(model, TOKENIZER, folder / "model")
    (folder / "model" / ANSWERS).write_text(json.dumps(CHOICES))
    world_questions.write(folder, "val", 7, size=32)
    return folder


def source_of(folder: Path, **more) -> ImageQuestions:
    return ImageQuestions(str(folder / "questions-val.json"), annotations=str(folder / "annotations-val.json"), **more)


def test_each_question_is_answered_whatever_the_batch(folder):
    model, tokenizer = from_pretrained(folder / "model", Vqa)
    questions = QuestionSet(Questions(source_of(folder)))
    candidates = Candidates(CHOICES, tokenizer)
    answers = [answers_of(model, tokenizer, questions, AnswerConfig(), candidates, batch=batch) for batch in (1, 3, 50)]
    assert list(answers[0]) == [question.id for question in questions.questions]
    words = [[answer.text for answer in one.values()] for one in answers]
    assert words[0] == words[1] == words[2]
    assert len(set(words[0])) > 1, "the test needs answers that depend on images and questions"
    for other in answers[1:]:
        assert [a.logprob for a in other.values()] == pytest.approx([a.logprob for a in answers[0].values()], abs=1e-4)
    free = answers_of(model, tokenizer, questions, AnswerConfig(max_length=5))
    assert len(free) == 35
    assert all(answer.logprob <= 0 for answer in free.values())


def answer_all(folder: str, out: str) -> None:
    """What each process of two does: the command, and questions of which an image cannot be read."""
    folder = Path(folder)
    dist.start(60)
    source = source_of(folder)
    args = ["vqa", "--model", str(folder / "model"), "--source.path", source.path, "--batch", "2", "--out", out]
    main([*args, "--source.annotations", source.annotations])
    model, tokenizer = from_pretrained(folder / "model", Vqa)
    broken = QuestionSet(Questions(source_of(folder, image_root=str(folder / "broken"))))
    with pytest.raises(DataError, match="cannot be evaluated"):
        answers_of(model, tokenizer, broken, AnswerConfig(), Candidates(["yes"], tokenizer), batch=1)


def test_two_processes_leave_the_files_that_one_leaves_and_fail_together(folder, tmp_path):
    images = folder / "broken/images/val"
    images.mkdir(parents=True)
    for path in sorted((folder / "images/val").iterdir()):
        (images / path.name).write_bytes(path.read_bytes())
    (images / "world-0-val-000003.jpg").write_bytes(b"")
    zygote = the_zygote()
    arguments = {"folder": str(folder), "out": str(tmp_path / "two")}
    pids = zygote.spawn(tmp_path / "log", world=2, module="test_vqa_eval", function="answer_all", **arguments)
    assert [zygote.wait(pid, 240) for pid in pids] == [0, 0], (tmp_path / "log-0").read_text()
    answer_all(str(folder), str(tmp_path / "one"))
    for name in ("results.json", "scores.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert len(read_results(tmp_path / "one/results.json")) == 35
    scores = json.loads((tmp_path / "one/scores.json").read_text())
    assert scores["questions"] == 35
    assert set(scores["by_answer_type"]) == {"number", "other", "yes/no"}


def refused(capsys, args: list[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(args)
    output = capsys.readouterr()
    assert stop.value.code == 2
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    return output.err


def test_the_command(folder, tmp_path, capsys):
    source = ["--source.path", str(folder / "questions-val.json")]
    known = [*source, "--source.annotations", str(folder / "annotations-val.json")]
    model = ["--model", str(folder / "model"), "--out", str(tmp_path)]
    main(["vqa", *model, *known, "--limit", "10", "--method", "generate", "--answers.max_length", "4"])
    assert "10 questions" in capsys.readouterr().out
    main(["vqa", *source, *model, "--limit", "5"])
    assert "without human answers there is nothing to score" in capsys.readouterr().out
    main(["vqa", "--results", str(tmp_path / "results.json"), *known, "--allow_partial", "true"])
    assert "5 questions; 30 without a result are left out" in capsys.readouterr().out
    assert "no results for 30 questions" in refused(
        capsys, ["vqa", "--results", str(tmp_path / "results.json"), *known]
    )
    assert "--candidates a.txt does not apply to --method generate" in refused(
        capsys, ["vqa", *model, *known, "--method", "generate", "--candidates", "a.txt"]
    )
    assert "a.txt cannot be read" in refused(capsys, ["vqa", *model, *known, "--candidates", "a.txt"])
    assert "--model DIR" in refused(capsys, ["vqa", *known])
    save_pretrained(Blip(SMALLEST), TOKENIZER, tmp_path / "blip")
    message = refused(capsys, ["vqa", "--model", str(tmp_path / "blip"), "--out", "x", *known])
    assert "is of a Blip model, Vqa is expected: fine-tune it first with recipes.vqa" in message


# blip vqa -------------------------------------------------------------------------------------------------------------


def command(capfd, *args: str) -> tuple[int, str, str]:
    try:
        status = cli.main(["vqa", *map(str, args)])
    except SystemExit as stop:
        status = stop.code
    output = capfd.readouterr()
    assert "Traceback" not in output.err
    return status, output.out, output.err


def test_a_question_about_images(folder, capfd):
    images, model = folder / "images/val", ["--model", folder / "model"]
    status, out, _ = command(capfd, images, "What colour is the star?", *model)
    assert status == 0
    rows = [line.split("\t") for line in out.splitlines()]
    assert [row[0] for row in rows] == [str(path) for path in sorted(images.iterdir())]
    assert all(row[1] in CHOICES and 0 <= float(row[2]) <= 1 for row in rows)
    status, out, _ = command(
        capfd, images / "world-0-val-000002.jpg", "What colour is the star?", *model, "--top", 3, "--json"
    )
    (answer,) = map(json.loads, out.splitlines())
    assert (status, answer["question"], len(answer["answers"])) == (0, "What colour is the star?", 3)
    assert answer["answers"][0] == rows[2][1]
    assert answer["probability"] == sorted(answer["probability"], reverse=True)
    status, out, _ = command(capfd, images, "what is it?", *model, "--method", "generate", "--top", 4)
    assert (status, len(out.splitlines())) == (0, 28)


def test_what_is_off_is_said_in_a_line(folder, tmp_path, capfd):
    images, model = folder / "images/val", ["--model", folder / "model"]
    for args, wanted in (
        ((images, "?!", *model), None),
        ((images, "!", *model), "the question '!' has no words"),
        ((tmp_path / "gone.jpg", "what?", *model), "gone.jpg"),
        ((images, *model), "QUESTION"),
        ((images, "what?", *model, "--candidates", tmp_path / "gone.txt"), "gone.txt cannot be read"),
        ((images, "what?", *model, "--tpo", "3"), "--tpo; did you mean --top?"),
    ):
        status, out, err = command(capfd, *args)
        if wanted:
            assert (status, out) == (2, "")
            assert wanted in err.splitlines()[-1]
    (tmp_path / "broken.png").write_bytes(b"")
    status, out, err = command(capfd, tmp_path / "broken.png", images, "what?", *model)
    assert (status, len(out.splitlines())) == (1, 7)
    assert "is empty (0 bytes)" in err
