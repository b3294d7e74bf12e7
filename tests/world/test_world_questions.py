"""Questions about the synthetic world: true, answered by the image, in VQA v2's format, the same everywhere."""

import hashlib
import json
from collections import Counter

import pytest

from blip.data.prepare.questions import Questions
from blip.data.settings import ImageQuestions
from blip.tokenizer import Tokenizer
from blip.world.questions import ANNOTATORS, KINDS, questions, write
from blip.world.scene import HELD_OUT, relations_of, scene

SCENES = [scene(0, i, split) for split in ("train", "composition") for i in range(250)]


def named(things, words):
    """The things that 'red star', 'star' or 'red thing', perhaps 'at the PLACE', can mean."""
    name, _, place = words.partition(" at the ")
    *colour, shape = name.split()
    return [
        thing for thing in things
        if shape in ("thing", thing.shape) and (not colour or colour == [thing.colour]) and place in ("", thing.place)
    ]  # fmt: skip


RELATIONS = {" to the left of ": "left of", " to the right of ": "right of", " above ": "above", " below ": "below"}


def related(things, words):
    """The things that 'thing above the ring' and 'above the ring' can mean."""
    for phrase, relation in RELATIONS.items():
        if phrase in f" {words}":
            (one,) = named(things, f" {words}".split(phrase)[1].removeprefix("the "))
            return [thing for thing in things if thing is not one and relation in relations_of(thing, one)]
    return named(things, words.removeprefix("the "))


def answered(made, question):
    """The answer read off the scene by the question's words alone."""
    words, things = question.removesuffix("?"), made.things
    if words.startswith(("what colour is the ", "what shape is ")):
        attribute = words.split()[1]
        (thing,) = related(things, words.split(" is ", 1)[1].removeprefix("the thing "))
        return getattr(thing, attribute)
    if words.startswith("where is the "):
        (thing,) = named(things, words.removeprefix("where is the "))
        return thing.place
    if words.startswith("how many "):
        what = words.removeprefix("how many ").removesuffix(" are there").split()
        if what[-1] == "shapes":
            return str(sum(what[:-1] in ([], [thing.colour]) for thing in things))
        shape = {"crosses": "cross"}.get(what[0], what[0].removesuffix("s"))
        return str(sum(thing.shape == shape for thing in things))
    if words.startswith("is there "):
        return "yes" if named(things, words.split(" ", 3)[3]) else "no"
    for phrase, relation in RELATIONS.items():
        if phrase in words:
            left, right = words.removeprefix("is the ").split(phrase)
            (a,), (b,) = named(things, left), named(things, right.removeprefix("the "))
            return "yes" if relation in relations_of(a, b) else "no"
    raise AssertionError(question)


def test_every_question_has_one_answer_and_it_is_true():
    kinds = Counter()
    for made in SCENES:
        scene_questions = questions(made)
        assert [one.kind for one in scene_questions] == list(KINDS)
        for one in scene_questions:
            assert answered(made, one.question) == one.answer, (made.image_id, one.question)
            kinds[one.answer_type] += 1
    assert set(kinds) == {"yes/no", "number", "other"}


def test_annotators_disagree_a_little():
    scene_questions = [one for made in SCENES for one in questions(made)]
    assert all(len(one.answers) == ANNOTATORS for one in scene_questions)
    # Three annotators beside the one left out make an answer count in full.
    assert min(one.answers.count(one.answer) for one in scene_questions) >= 4
    divided = sum(len(set(one.answers)) > 1 for one in scene_questions) / len(scene_questions)
    assert 0.15 < divided < 0.5


def test_words_are_known_and_answers_balanced():
    tokenizer = Tokenizer.load("world")
    scene_questions = [one for made in SCENES for one in questions(made)]
    texts = [text for one in scene_questions for text in (one.question, *one.answers)]
    assert tokenizer.unknown_rate(texts) == 0
    yes = [one.answer == "yes" for one in scene_questions if one.kind == "yes/no"]
    assert 0.4 < sum(yes) / len(yes) < 0.6


def test_held_out_looks_are_only_asked_about_in_composition():
    for made in SCENES:
        colours_and_shapes = {tuple(one.question.removesuffix("?").split()[-2:]) for one in questions(made)}
        assert made.split == "composition" or not colours_and_shapes & HELD_OUT


def test_files_are_read_back_and_the_same_every_time(tmp_path):
    paths = write(tmp_path, "val", 6, size=32)
    assert [path.name for path in paths] == ["questions-val.json", "annotations-val.json"]
    source = Questions(ImageQuestions(str(paths[0]), annotations=str(paths[1])))
    source.check_some_exist()
    assert len(source) == 6 * len(KINDS)
    expected = questions(scene(0, 2, "val"))
    rows = [source.question(row) for row in range(10, 15)]
    assert [(row.id, row.text, row.answers) for row in rows] == [
        (2000 + n, one.question, one.answers) for n, one in enumerate(expected)
    ]
    assert rows[0].image == "images/val/world-0-val-000002.jpg"
    with pytest.raises(FileExistsError, match="questions-val"):
        write(tmp_path, "val", 6, size=32)
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write(tmp_path, "val", 6, overwrite=True)] == before
    assert json.loads(before[1])["annotations"][0]["answers"][0].keys() == {"answer", "answer_confidence", "answer_id"}
    with pytest.raises(ValueError, match=r"does not hold .* is missing"):
        write(tmp_path, "val", 7, overwrite=True)


def test_questions_are_pinned():
    """What is asked must not change between versions: models and scores depend on it."""
    texts = [f"{q.question} {q.answers}" for i in range(50) for q in questions(scene(0, i, "test"))]
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16] == "fe8b853d00427be0"
