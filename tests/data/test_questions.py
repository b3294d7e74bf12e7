"""Questions in every format they come in; what does not fit is named, and each answer gets its weight."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

from blip.data.draws import Draws
from blip.data.prepare.questions import PrepareQuestions, Questions, open_questions, read_answers, weighed
from blip.data.settings import DataConfig, ImageQuestions
from blip.data.stream import Stream
from blip.data.transforms import EvalTransform
from blip.errors import DataError
from blip.nn.pixels import normalise
from blip.tokenizer import Tokenizer

WORLD = Tokenizer.load("world")


@pytest.fixture
def folder(tmp_path):
    """Two images under the names that VQA v2 and others use."""
    for name in ("val2014/COCO_val2014_000000000007.png", "a.png", "images/0.png", "images/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    return tmp_path


def write(folder, name, value):
    (folder / name).write_text(json.dumps(value))
    return str(folder / name)


def official(folder, answers=("red", "red", "orange"), **more):
    questions = {
        "data_subtype": "val2014",
        "questions": [{"image_id": 7, "question": "What colour?", "question_id": 70}],
    }
    rows = [{"answer": answer, "answer_confidence": "yes", "answer_id": i} for i, answer in enumerate(answers)]
    kinds = {"question_type": "what colour", "answer_type": "other", "multiple_choice_answer": "red"}
    annotations = {"annotations": [{"question_id": 70, "image_id": 7, **kinds, "answers": rows}]}
    paths = write(folder, "q.json", questions), write(folder, "a.json", annotations)
    name = "val2014/COCO_val2014_{image_id:012d}.png"
    return ImageQuestions(paths[0], annotations=paths[1], image_name=name, **more)


def pairs(*configs, **options):
    data = DataConfig(list(configs), max_words=50, max_tokens=35, max_unknown=1.0, **options)
    return Draws(open_questions(data), PrepareQuestions(EvalTransform(8), WORLD, data), seed=0)


def test_the_official_files(folder):
    source = Questions(official(folder))
    question = source.question(0)
    assert (question.id, question.text, question.answers) == (70, "What colour?", ["red", "red", "orange"])
    assert question.image == "val2014/COCO_val2014_000000000007.png"
    assert (question.question_type, question.answer_type) == ("what colour", "other")
    assert source.key(0) == "q.json:0 question 70"
    assert source.answers() == {"red": 2, "orange": 1}
    without = dataclasses.replace(source.config, annotations=None)
    assert Questions(without).question(0).answers == []
    by_subset = dataclasses.replace(without, image_name=None)
    assert Questions(by_subset).question(0).image == "val2014/COCO_val2014_000000000007.jpg"


def test_the_releases_files(folder):
    given = ["yes"] * 7 + ["no"] * 3
    rows = [
        {"dataset": "vqa", "image": "a.png", "question": "Is it red?", "question_id": "5", "answer": given},
        {"dataset": "vg", "image": "a.png", "question": "What?", "answer": "red"},
    ]
    source = Questions(ImageQuestions(write(folder, "vqa_train.json", rows)))
    assert [source.question(row).id for row in range(2)] == [5, 1]
    assert [source.question(row).weight for row in range(2)] == pytest.approx([1.0, 0.2])
    draws = pairs(source.config)
    batch = draws.prepare.collate([draws[(0, row)] for row in range(2)])
    assert batch.question.tolist() == [0, 0, 1]
    assert batch.weights.tolist() == pytest.approx([0.7, 0.3, 0.2])
    assert WORLD.decode(batch.answer_ids) == ["yes", "no", "red"]
    assert WORLD.decode(batch.ids) == ["is it red?", "what?"]
    assert batch.image.shape == (2, 3, 8, 8)


def test_easy_vqa_and_lists_by_their_columns(folder):
    easy = Questions(
        ImageQuestions(write(folder, "easy.json", [["is it red?", "yes", 1], ["which colour?", "red", 0]]))
    )
    assert [easy.question(row).image for row in range(2)] == ["images/1.png", "images/0.png"]
    assert [easy.question(row).answer_type for row in range(2)] == ["yes/no", "other"]
    rows = [{"qid": 9, "image_name": "0.png", "question": "How many?", "answer": 3, "answer_type": "OPEN"}]
    config = ImageQuestions(
        write(folder, "rad.json", rows), image_root=str(folder / "images"), image_column="image_name", id_column="qid"
    )
    assert Questions(config).question(0)[:4] == (9, "How many?", "0.png", ["3"])
    lines = folder / "some.jsonl"
    lines.write_text('{"image": "a.png", "question": "What?", "answers": [{"answer": "red"}, {"answer": "blue"}]}\n')
    assert Questions(ImageQuestions(str(lines))).question(0).answers == ["red", "blue"]


def test_real_files(real_data):
    photos = Questions(
        ImageQuestions(
            str(real_data / "photos/vqa_v2.json"), image_column="file_name", image_root=str(real_data / "photos/images")
        )
    )
    assert len(photos) == 17
    assert all(len(photos.question(row).answers) == 10 for row in range(17))
    rad = ImageQuestions(
        str(real_data / "vqa_rad/questions.json"), image_root=str(real_data / "vqa_rad/images"),
        image_column="image_name", id_column="qid",
    )  # fmt: skip
    questions = Questions(rad)
    questions.check_some_exist()
    assert (len(questions), questions.question(0).answers) == (2283, ["Yes"])
    easy = Questions(ImageQuestions(str(real_data / "easy_vqa/test/questions.json")))
    easy.check_some_exist()
    assert len(easy.answers()) == 13
    assert set(easy.answers()) == set(read_answers(real_data / "easy_vqa/answers.txt"))


ROW = {"image": "a.png", "question": "a", "answer": "b"}
BROKEN = {
    "no questions": ("q.json", {"annotations": []}, r"q\.json has no questions \(it has annotations"),
    "a text for a question": ("q.json", {"questions": ["what"]}, r"row 0 has no id in 'question_id'"),
    "no id": ("q.json", {"questions": [{"question": "a", "image": "a.png"}]}, "row 0 has no id in 'question_id'"),
    "an empty question": ("q.json", [{**ROW, "question": " "}], "row 0 has no text in 'question'"),
    "no image": ("q.json", [{"question": "a", "answer": "b"}], "row 0 has no text in 'image'"),
    "an answer that is none": ("q.json", [{**ROW, "answer": [None]}], "an answer is None"),
    "an id twice": ("q.json", [{**ROW, "question_id": 1}] * 2, r"1 duplicate question ids .*\(1\)"),
    "an address": ("q.json", [{**ROW, "image": "http://x/a.png"}], "is an address"),
    "a way out": ("q.json", [{**ROW, "image": "../a.png"}], "is outside"),
    "numbers alone": ("q.json", {"questions": [{"image_id": 1, "question": "a", "question_id": 1}]}, "set image_name"),
    "an odd row": ("q.json", [["a", "b"]], r"row 0 is .* expected \[question, answer, image number\]"),
    "cut off": ("q.json", None, "is not valid JSON"),
    "nothing": ("q.json", [], "q.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_is_named(name, folder):
    file, value, message = BROKEN[name]
    path = write(folder, file, value)
    if value is None:
        (folder / file).write_text('{"questions": [{"image_id"')
    with pytest.raises(DataError, match=message):
        Questions(ImageQuestions(path))


def test_questions_and_annotations_of_two_splits(folder):
    config = official(folder)
    other = {"annotations": [{"question_id": 71, "answers": [{"answer": "no"}]}]}
    with pytest.raises(
        DataError, match=r"1 questions of q.json without answers \(70\) and 1 answers to other questions"
    ):
        Questions(dataclasses.replace(config, annotations=write(folder, "b.json", other)))
    other["annotations"] *= 2
    with pytest.raises(DataError, match="duplicate question 71"):
        Questions(dataclasses.replace(config, annotations=write(folder, "b.json", other)))
    with pytest.raises(DataError, match=r"image_name .* does not go with 7"):
        Questions(dataclasses.replace(config, image_name="{picture}.jpg"))
    (folder / "list.json").write_text('[{"image": "a.png", "question": "a", "answer": "b"}]')
    with pytest.raises(DataError, match="leave annotations"):
        Questions(dataclasses.replace(config, path=str(folder / "list.json")))


def test_nothing_is_learned_from_questions_without_answers_or_images(folder):
    config = official(folder)
    with pytest.raises(DataError, match="question 70 and 0 others have no answers to learn from"):
        pairs(dataclasses.replace(config, annotations=None))
    with pytest.raises(DataError, match="none of its images exists"):
        pairs(dataclasses.replace(config, image_name="{image_id}.png"))


def test_answers_with_the_same_pieces_are_one_and_weights_add_up():
    weights = weighed(["Red", "red ", "blue", "star " * 40], 0.5, WORLD)
    assert {WORLD.decode([list(pieces)])[0]: weight for pieces, weight in weights.items()} == {
        "red": 0.25,
        "blue": 0.125,
    }


def test_a_question_with_sides_is_not_mirrored(folder):
    image = Image.new("RGB", (8, 8), "red")
    image.paste("blue", (0, 0, 4, 8))
    image.save(folder / "a.png")
    rows = [
        {"image": "a.png", "question": q, "answer": a}
        for q, a in (("what is left?", "b"), ("where?", "right"), ("what?", "b"))
    ]
    from blip.data.transforms import TrainTransform

    data = DataConfig(max_unknown=1.0, flip=1.0, crop_scale_min=1.0, augment_ops=0)
    source = Questions(ImageQuestions(write(folder, "s.json", rows)))
    draws = Draws([source], PrepareQuestions(TrainTransform(8, data), WORLD, data), seed=0)
    plain = EvalTransform(8)(image)
    mirrored = [not torch.equal(normalise(draws[(0, row)].images), plain) for row in range(3)]
    assert mirrored == [False, False, True]


def test_a_image_that_cannot_be_read_is_replaced(folder):
    (folder / "b.png").write_bytes(b"<html>")
    rows = [{"image": name, "question": "what?", "answer": "red"} for name in ("b.png", "a.png")]
    sample = pairs(ImageQuestions(write(folder, "s.json", rows)))[(0, 0)]
    assert sample.bad[0].key == "s.json:0 question 0"
    assert sample.key == "s.json:1 question 1"


def test_lists_are_streamed_and_a_row_that_does_not_fit_is_one_bad_sample(folder):
    rows = [{"image": "a.png", "question": f"what {n}?", "answer": ["red", "red", "blue"]} for n in range(8)]
    rows[2] = {"image": "a.png", "question": "what 2?"}
    rows[5] = {"image": "../a.png", "question": "what 5?", "answer": "red"}
    for s in range(2):
        lines = [json.dumps(row) for row in rows[4 * s : 4 * s + 4]]
        (folder / f"s-{s}.jsonl").write_text("\n".join([*lines, "[}"] if s else lines) + "\n")
    config = DataConfig([ImageQuestions(str(folder / "s-*.jsonl"), weight=0.5)], streaming=True, shuffle_buffer=3)
    config = dataclasses.replace(config, max_unknown=1.0, workers=0)
    (shards,) = sources = open_questions(config)
    prepare = PrepareQuestions(EvalTransform(8), WORLD, config)
    stream = Stream(sources, prepare, seed=0)
    assert (shards.rows, len(stream)) == (pytest.approx(9, abs=1), round(shards.rows / 2))
    assert shards.answers() == {"red": 12, "blue": 6}, "six rows have an image and answers"
    batches = list(stream.batches(0, 6, rank=0, world=1, batch_size=4))
    expected = {f"s-{n // 4}.jsonl:{n % 4} question {n % 4}" for n in (0, 1, 3, 4, 6, 7)}
    assert {key for batch in batches for key in batch.keys} == expected
    assert batches[0].weights.tolist() == pytest.approx([2 / 3, 1 / 3] * 4)
    assert batches[0].question.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    bad = {one.key: one.reason for batch in batches for one in batch.bad}
    assert sorted(bad) == ["s-0.jsonl:2 question 2", "s-1.jsonl:1", "s-1.jsonl:4"]
    assert bad["s-0.jsonl:2 question 2"] == "the question has no answer to learn from"
    assert "is outside" in bad["s-1.jsonl:1"]
    assert "starts with '[}'" in bad["s-1.jsonl:4"]
    changed = dataclasses.replace(config.sources[0], answer_weight=0.5)
    others = open_questions(dataclasses.replace(config, sources=[changed]))
    assert Stream(others, prepare, seed=0).fingerprint() != stream.fingerprint()


def test_what_cannot_be_streamed_says_so(folder):
    easy = ImageQuestions(write(folder, "easy.json", [["is it red?", "yes", 1]]))
    without_answers = dataclasses.replace(official(folder), annotations=None)
    for config, named in ((official(folder), "q.json"), (without_answers, "q.json"), (easy, "easy.json")):
        with pytest.raises(DataError, match=f"data.streaming reads lists of rows .*, and {named} is VQA v2's or easy"):
            open_questions(DataConfig([config], streaming=True))


def test_lists_of_answers(tmp_path):
    (tmp_path / "a.txt").write_text("yes\n\n no \n")
    assert read_answers(tmp_path / "a.txt") == ["yes", "no"]
    (tmp_path / "marked.txt").write_text("yes\nno\n", encoding="utf-8-sig")
    assert read_answers(tmp_path / "marked.txt") == ["yes", "no"], "as some editors save it"
    (tmp_path / "a.json").write_text('["yes", 3]')
    with pytest.raises(DataError, match="is not a list of texts"):
        read_answers(tmp_path / "a.json")
    (tmp_path / "b.txt").write_text("\n")
    with pytest.raises(DataError, match="has no answers"):
        read_answers(tmp_path / "b.txt")
    with pytest.raises(DataError, match="cannot be read"):
        read_answers(tmp_path / "c.txt")
