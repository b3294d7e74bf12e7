"""Visual dialogue: the model, the rows it reads, VisDial's format, the metric against the official numbers."""

import dataclasses
import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stub_run import the_zygote
from test_checkpoint import SMALLEST, TOKENIZER

from blip import dist
from blip.data.draws import Draws
from blip.data.prepare.dialogues import (
    Conversation,
    Conversations,
    DialogueRows,
    PrepareDialogues,
    Round,
    Wording,
    open_dialogues,
)
from blip.data.settings import DataConfig, Dialogues
from blip.data.transforms import TrainTransform
from blip.errors import DataError
from blip.models.blip import Blip
from blip.models.dialogue import Dialogue
from blip.nn.text import TextPass
from blip.objectives.dialogue import DialogueObjective
from blip.objectives.objective import Clock
from blip.tokenizer import Tokenizer
from blip.train.settings import TrainConfig
from blip.world import dialogues
from blip.world.scene import relations_of, scene, scene_of
from eval.__main__ import main
from eval.dialogue import evalai_json, ndcg, ranks, ranks_of, read_ranks, score
from recipes import dialogue as recipe
from recipes.building import ModelChoice


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def random_model(sees=False, tokenizer=TOKENIZER, **vision):
    torch.manual_seed(3)
    text = dataclasses.replace(SMALLEST.text, layers=2, max_positions=48)
    text = tokenizer.text_config(text)
    vision_config = dataclasses.replace(SMALLEST.vision, **vision)
    model = Dialogue.from_blip(Blip(dataclasses.replace(SMALLEST, vision=vision_config, text=text)), sees)
    with torch.no_grad():  # the start is so even that a mistake would not be seen
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def random_inputs(model, count=3, rows=4, length=9):
    g = torch.Generator().manual_seed(0)
    side = model.config.vision.image_size
    image = torch.randn(count, 3, side, side, generator=g)
    captions = torch.randint(5, 20, (count, 6), generator=g)
    captions[:, 0] = model.config.text.cls_id
    caption_keep = torch.arange(6) < torch.tensor([6, 3, 5])[:count, None]
    ids = torch.randint(5, 20, (count * rows, length), generator=g)
    ids[:, 0] = model.config.text.enc_id
    keep = torch.arange(length) < torch.randint(3, length + 1, (count * rows, 1), generator=g)
    return image, captions, caption_keep, ids, keep


# The model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sees", [False, True])
@pytest.mark.parametrize("width", [16, 24])
@torch.no_grad()
def test_neither_padding_nor_batch_nor_order_change_a_score(sees, width):
    model = random_model(sees, width=width)
    assert hasattr(model, "caption_proj") == (width != model.config.text.width)
    image, captions, caption_keep, ids, keep = random_inputs(model)
    context = model.context(image, captions, caption_keep)
    together = model.match(ids, keep, context.expand(4))
    assert together.std() > 1e-3
    more = torch.cat([captions, torch.full((3, 2), 9)], 1)
    kept = torch.cat([caption_keep, torch.zeros(3, 2, dtype=torch.bool)], 1)
    padded = torch.cat([ids, torch.full((12, 3), 7)], 1), torch.cat([keep, torch.zeros(12, 3, dtype=torch.bool)], 1)
    close(model.match(*padded, model.context(image, more, kept).expand(4)), together)
    for row in range(12):
        b, length = row // 4, int(keep[row].sum())
        one = slice(b, b + 1)
        alone = model.context(image[one], captions[one], caption_keep[one], queries=length)
        close(model.match(ids[row : row + 1, :length], keep[row : row + 1, :length], alone)[0], together[row])
    order = torch.tensor([2, 0, 3, 1])
    turned = ids.view(3, 4, -1)[:, order].flatten(0, 1), keep.view(3, 4, -1)[:, order].flatten(0, 1)
    close(model.match(*turned, context.expand(4)).view(3, 4, 2), together.view(3, 4, 2)[:, order])


@torch.no_grad()
def test_what_answers_look_at_is_the_image_and_the_caption():
    for sees in (False, True):
        model = random_model(sees)
        image, captions, caption_keep, ids, keep = random_inputs(model)
        whole = model.match(ids, keep, model.context(image, captions, caption_keep).expand(4))
        other_image = model.match(ids, keep, model.context(image.flip(0), captions, caption_keep).expand(4))
        other_caption = model.match(ids, keep, model.context(image, captions.roll(1, 1), caption_keep).expand(4))
        assert (whole - other_image).abs().max() > 1e-3
        assert (whole - other_caption).abs().max() > 1e-3


@torch.no_grad()
def test_the_context_is_the_tokens_and_the_states_side_by_side():
    model = random_model()
    image, captions, caption_keep, ids, keep = random_inputs(model, count=1)
    (states,) = model.med([TextPass(captions, caption_keep)])
    tokens = torch.cat([model.vision(image), model.caption_proj(states)[None]], 1)
    context = model.med.context(tokens)
    assert context.kv[0].shape[-2] == 6 + model.vision(image).shape[1]
    close(
        model.match(ids, keep, context.expand(4)),
        model.match(ids, keep, model.context(image, captions, caption_keep).expand(4)),
    )


def test_the_matching_head_carries_over():
    torch.manual_seed(0)
    blip = Blip(SMALLEST)
    model = Dialogue.from_blip(blip)
    assert torch.equal(model.match_head.weight, blip.match_head.weight)
    assert set(model.origin().fresh) == {"caption_proj.weight", "caption_proj.bias"}


# VisDial's format -----------------------------------------------------------------------------------------------------


def talk(**changes):
    """Two rounds of one dialogue, and a third with no answers to choose from."""
    rounds = [
        {"question": 0, "answer": 1, "answer_options": [0, 1, 2], "gt_index": 1},
        {"question": 1, "answer": 0, "answer_options": [2, 1, 0], "gt_index": 2},
    ]
    row = {"image_id": 7, "image": "a.png", "caption": "a red thing", "dialog": rounds}
    data = {"questions": ["what is it?", "is it red?"], "answers": ["yes", "a star", "no"], "dialogs": [row]}
    value = {"version": "1.0", "split": "val2018", "data": data}
    for path, change in changes.items():
        place = value
        *names, last = path.split("__")
        for name in names:
            place = place[int(name) if name.isdigit() else name]
        place[int(last) if last.isdigit() else last] = change
    return value


def written(folder, value, relevance=None):
    (folder / "val.json").write_text(json.dumps(value))
    Image.new("RGB", (20, 10), "red").save(folder / "a.png")
    if relevance is not None:
        (folder / "dense.json").write_text(json.dumps(relevance))
    return Dialogues(str(folder / "val.json"), relevance=str(folder / "dense.json") if relevance is not None else None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__questions": None}, r"expected VisDial v1.0, an object with data.questions"),
        ({"data__answers__1": 3}, r"answers\[1\] is 3, not a text"),
        ({"data__dialogs": []}, r"no dialogues"),
        ({"data__dialogs__0": {"image_id": 1}}, r"dialogs\[0\] lacks one of image_id, caption, dialog"),
        ({"data__dialogs__0__caption": 3}, r"dialogs\[0\]: expected a number for image_id and a text"),
        ({"data__dialogs__0__image": "../x"}, r"image '../x' is outside"),
        ({"data__dialogs__0__dialog": []}, r"image 7: expected a list of rounds"),
        ({"data__dialogs__0__dialog__1": {}}, r"image 7, round 2 has no question"),
        ({"data__dialogs__0__dialog__1__question": 9}, r"round 2: question has 9; expected a number from 0 to 1"),
        ({"data__dialogs__0__dialog__0__gt_index": 3}, r"round 1: gt_index has 3; expected a number from 0 to 2"),
        ({"data__dialogs__0__dialog__0__answer_options": [0, -1]}, r"answer_options has -1"),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        Conversations(written(tmp_path, talk(**changes)))


def test_one_dialogue_an_image(tmp_path):
    twice = talk()
    twice["data"]["dialogs"] *= 2
    with pytest.raises(DataError, match=r"duplicate image 7, in val.json:0 and val.json:1"):
        Conversations(written(tmp_path, twice))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, "expected a list of"),
        ([{"image_id": 7}], r"row 0: expected image_id, round_id and gt_relevance"),
        ([{"image_id": 7, "round_id": 1, "gt_relevance": [0, 1]}], r"2 values for round 1 of image 7"),
        ([{"image_id": 7, "round_id": 3, "gt_relevance": [0, 1, 0]}], r"3 values for round 3 of image 7"),
        ([{"image_id": 7, "round_id": 1, "gt_relevance": [0, 2, 0]}], r"expected numbers from 0 to 1"),
        ([{"image_id": 8, "round_id": 1, "gt_relevance": [0, 1, 0]}], r"none of its images is in the dialogues"),
    ],
)
def test_dense_annotations_that_do_not_fit_are_named(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        Conversations(written(tmp_path, talk(), rows))


@pytest.mark.parametrize(
    ("split", "name"),
    [
        ("val2018", "VisualDialog_val2018_000000000007.jpg"),
        ("val2018", "VisualDialog_val2018/VisualDialog_val2018_000000000007.jpg"),
        ("train", "COCO_val2014_000000000007.jpg"),
        ("train", "train2014/COCO_train2014_000000000007.jpg"),
    ],
)
def test_images_are_found_by_their_number(tmp_path, split, name):
    value = talk(split=split)
    del value["data"]["dialogs"][0]["image"]
    config = written(tmp_path, value)
    with pytest.raises(DataError, match="none of its images exists"):
        Conversations(config).check_some_exist()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    Image.new("RGB", (4, 4)).save(tmp_path / name)
    source = Conversations(config)
    assert source.dialogues[0].image == tmp_path / name
    source.check_some_exist()


# Rows of text ---------------------------------------------------------------------------------------------------------


def pieces(text):
    return TOKENIZER.pieces(text, 99)[1:-1]


def test_a_row_is_question_answer_and_history_latest_first(tmp_path):
    source = Conversations(written(tmp_path, talk()))
    sep = TOKENIZER.sep_id
    rows = DialogueRows(source, source.dialogues[0], TOKENIZER, DataConfig(max_tokens=99))
    (row,) = rows.round(1, [2])
    own = [TOKENIZER.enc_id, *pieces("is it red?"), sep, *pieces("no"), sep]
    before = [*pieces("what is it?"), *pieces("a star"), sep]
    assert row == own + before
    assert rows.round(0, [1])[0] == [TOKENIZER.enc_id, *pieces("what is it?"), sep, *pieces("a star"), sep]
    short = DialogueRows(source, source.dialogues[0], TOKENIZER, DataConfig(max_tokens=len(own) + len(before) - 1))
    assert short.round(1, [2])[0] == own, "a round that does not fit is left out whole"
    tight = DialogueRows(source, source.dialogues[0], TOKENIZER, DataConfig(max_tokens=8)).round(1, [1])[0]
    assert len(tight) == 8
    assert tight[-1 - len(pieces("a star")) :] == [*pieces("a star"), sep], "the answer is kept, the question is cut"


@pytest.fixture
def pairs(tmp_path):
    config = DataConfig(crop_scale_min=1.0, augment_ops=0, max_tokens=40, max_unknown=1, workers=0)
    source = Conversations(written(tmp_path, talk()))
    return Draws([source], PrepareDialogues(TrainTransform(8, config), TOKENIZER, config, 2, 2), 0)


def test_false_answers_may_be_those_that_are_worded_like_the_true_one(tmp_path):
    answers = ["it is red", "red", "the colour is red", "it is blue", "blue", "it is large", "yes", "no it is not"]
    content = talk()
    content["data"]["answers"] = answers
    for one in content["data"]["dialogs"][0]["dialog"]:
        one |= {"answer": 0, "answer_options": [4, 1, 6, 0, 5, 2, 3, 7], "gt_index": 3}
    source = Conversations(written(tmp_path, content))
    config = DataConfig(crop_scale_min=1.0, augment_ops=0, max_tokens=40, max_unknown=1, workers=0)

    def shown(hard_negatives):
        pairs = Draws([source], PrepareDialogues(TrainTransform(8, config), TOKENIZER, config, 1, 3, hard_negatives), 0)
        pairs = pickle.loads(pickle.dumps(pairs))  # as a spawned worker gets them
        record = pairs.sources[0][0]
        rows = [row for draw in range(20) for row in pairs.prepare(record, (draw,)).texts[1:]]
        return [row[row.index(TOKENIZER.sep_id) + 1 :] for row in rows], pairs.fingerprint()

    # 8 answers; "it" is in 4 of them, "is" in 5, "red" in 3, "blue" in 2: log(1 + 8 / n) is 1.10, 0.96, 1.30 and 1.61.
    # Shared with "it is red" over all: "it is blue" 2.05 of 4.96, "red" 1.30 of 3.35, "it is large" 2.05 of 5.55.
    near = [[*pieces(answers[n]), TOKENIZER.sep_id] for n in (3, 1)]
    rows, fingerprint = shown(1)
    for n in range(0, len(rows), 4):
        first, *rest = rows[n + 1 : n + 4]
        assert any(first[: len(one)] == one for one in near)
        assert len({*map(tuple, (first, *rest))}) == 3, "each false answer once"
    assert {tuple(row[:2]) for row in rows[1::4]} == {tuple(one[:2]) for one in near}, "both are drawn"
    assert fingerprint != shown(0)[1]


def test_likeness_does_not_depend_on_the_order_in_which_words_are_added_up():
    wording = Wording([])
    wording.weights = {"a": 0.1, "b": 0.2, "c": 0.3}
    assert {wording._weight(order) for order in itertools.permutations("abc")} == {0.6}


def test_batches_hold_the_true_answer_first_and_false_ones_after(pairs):
    (batch,) = pairs.batches(0, 1, 0, 1, 3)
    assert (len(batch), batch.choices, batch.ids.shape[0], batch.image.shape) == (3, 3, 18, (3, 3, 8, 8))
    seen = set()
    for rows in batch.ids.view(3, 2, 3, -1):
        for one in rows:
            texts = [TOKENIZER.decode([row])[0].replace(" ", "") for row in one]
            number = "isitred" in texts[0]
            seen.add(number)
            assert texts[0].replace("?", "").startswith(("whatisitastar", "isitredyes")[number])
            assert len(set(texts)) == 3
    assert seen == {True, False}
    assert batch.ids[:, 0].eq(TOKENIZER.enc_id).all()
    assert batch.caption_ids[:, 0].eq(TOKENIZER.cls_id).all()
    assert {t.device.type for t in (batch.to("meta").ids, batch.to("meta").caption_keep)} == {"meta"}


def test_what_cannot_be_learned_from_or_streamed_is_refused(tmp_path):
    rounds = [{"question": 0, "answer_options": [0, 1]}]
    config = written(tmp_path, talk(data__dialogs__0__dialog=rounds))
    with pytest.raises(DataError, match="image 7: no round has its right answer marked"):
        open_dialogues(DataConfig([config]))
    with pytest.raises(DataError, match=r"data\.streaming does not read dialogues"):
        open_dialogues(DataConfig([config], streaming=True))


def test_the_loss_is_matching_over_all_rows(pairs):
    model = random_model(image_size=16, patch_size=8)
    pairs.prepare.transform = TrainTransform(16, pairs.prepare.config)
    (batch,) = pairs.batches(0, 1, 0, 1, 2)
    batch = batch.to(torch.device("cpu"))
    outcome = DialogueObjective(model)(batch, Clock())
    logits = torch.stack(
        [
            model.match(
                batch.ids[r : r + 1],
                batch.keep[r : r + 1],
                model.context(*(t[r // 6 : r // 6 + 1] for t in (batch.image, batch.caption_ids, batch.caption_keep))),
            )[0]
            for r in range(12)
        ]
    )
    labels = torch.tensor([1, 0, 0] * 4)
    close(outcome.losses["itm"], torch.nn.functional.cross_entropy(logits, labels), 1e-4)
    best = (logits[:, 1] - logits[:, 0]).view(4, 3).argmax(1)
    assert outcome.health["answer_accuracy"] == (best == 0).float().mean()


# Scores ---------------------------------------------------------------------------------------------------------------


class Given:
    """Dialogues made of the reference's right answers and relevance."""

    path = Path("given")

    def __init__(self, reference):
        options = np.arange(100, dtype=np.int32)
        self.dialogues = [
            Conversation(i, Path(), "", tuple(Round(0, g, options, g) for g in gts), f"{i}", (0, tuple(relevance)))
            for i, (gts, relevance) in enumerate(zip(reference["gt_index"], reference["relevance_round0"], strict=True))
        ]


def test_scores_are_the_official_ones_to_the_last_digit(real_data):
    reference = json.loads((real_data / "eval_references/visdial_metrics.json").read_text())
    places = ranks(torch.tensor(reference["scores"])).tolist()
    ranked = {(i, n + 1): row for i, rounds in enumerate(places) for n, row in enumerate(rounds)}
    scores, wanted = score(Given(reference), ranked), reference["expected"]
    assert scores["ndcg"] == wanted["ndcg"]
    assert scores["mean_rank"] == wanted["mean"]
    assert {name: scores[name] for name in ("mrr", "r@1", "r@5", "r@10")} == {
        name: wanted[name] for name in ("mrr", "r@1", "r@5", "r@10")
    }
    assert scores["rounds"] == 60


def test_ranks_by_hand():
    assert ranks(torch.tensor([0.1, 0.9, 0.5])).tolist() == [3, 1, 2]
    assert ranks(torch.tensor([[1.0, 1.0, 2.0, 1.0]])).tolist() == [[2, 3, 1, 4]], "equal ones in their order"
    # Relevant: 1.0 at rank 2, 0.5 at rank 1; cut at two.
    best = 1 + 0.5 / np.log2(3)
    assert ndcg([([2, 1, 3], [1.0, 0.5, 0.0])]) == pytest.approx((0.5 + 1 / np.log2(3)) / best, rel=1e-6)
    assert ndcg([([3, 1, 2], [1.0, 0.0, 0.0])]) == 0
    assert ndcg([([2, 1, 3], [1.0, 0.0, 0.0])]) == 0, "one is relevant, so the first rank alone counts"


def test_ranks_that_do_not_fit_are_named(tmp_path):
    source = Conversations(written(tmp_path, talk()))
    both = {(7, 1): [3, 1, 2], (7, 2): [1, 2, 3]}
    scores = score(source, both)
    assert (scores["mrr"], scores["r@1"], scores["mean_rank"]) == (pytest.approx(2 / 3), 0.5, 2)
    assert "ndcg" not in scores
    with pytest.raises(DataError, match=r"no ranks for 1 round \(image 7 round 2\); give all, or allow_partial"):
        score(source, {(7, 1): [3, 1, 2]})
    assert score(source, {(7, 1): [3, 1, 2]}, partial=True)["mrr"] == 1
    with pytest.raises(DataError, match=r"image 7, round 2: expected the ranks 1 to 3"):
        score(source, {**both, (7, 2): [1, 1, 3]})
    (tmp_path / "r.json").write_text(evalai_json(both))
    assert read_ranks(tmp_path / "r.json") == both
    assert json.loads(evalai_json(both))[0] == {"image_id": 7, "round_id": 1, "ranks": [3, 1, 2]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", r'expected \[\{"image_id"'),
        ('[{"image_id": 1}]', r"row 0 is .*; expected"),
        ('[{"image_id": 1, "round_id": 1, "ranks": [1.5]}]', r"row 0 is .*; expected"),
        (
            '[{"image_id": 1, "round_id": 1, "ranks": [1]}, {"image_id": 1, "round_id": 1, "ranks": [1]}]',
            "duplicate image 1, round 1",
        ),
    ],
)
def test_a_file_of_ranks_that_does_not_fit_is_named(tmp_path, content, message):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_ranks(tmp_path / "r.json")


def test_a_missing_image_is_named(tmp_path):
    source = Conversations(written(tmp_path, talk(data__dialogs__0__image="gone.png")))
    with pytest.raises(DataError, match=r"val.json:0, image 7, cannot be evaluated: gone.png: no such file"):
        ranks_of(random_model(), TOKENIZER, source)


def test_without_right_answers_ranks_are_made_and_not_scored(tmp_path):
    rounds = [{"question": 0, "answer": 1}, {"question": 1, "answer_options": [2, 1, 0]}]
    source = Conversations(written(tmp_path, talk(data__dialogs__0__dialog=rounds)))
    ranked = ranks_of(random_model(), TOKENIZER, source)
    assert list(ranked) == [(7, 2)], "the test set asks for the last round only"
    with pytest.raises(DataError, match="ranks can be written, not scored"):
        score(source, ranked)


# The synthetic world -------------------------------------------------------------------------------------------------


def test_dialogues_of_the_world_are_fixed_and_true():
    kinds = set()
    for i in range(60):
        one = scene(0, i, "val")
        made = dialogues.dialogue(one)
        assert made == dialogues.dialogue(one)
        assert len(made.turns) == 10
        for turn in made.turns:
            assert len({option.text for option in turn.options}) == 100
            assert turn.relevance[turn.options.index(turn.answer)] == 1
            kinds.add(turn.kind)
            check(one, turn)
    assert kinds == set(dialogues._OF_SCENE) | set(dialogues._OF_IT)


def check(one, turn):
    """Read a question by hand-made rules, and say whether its answer is right."""
    words, answer = turn.question.removesuffix(" ?").split(), turn.answer
    named = [t for t in one.things if t.colour in words and t.shape in words]
    if words[:2] == ["how", "many"]:
        assert answer.value == ("zero", "one", "two", "three")[len(one.things)]
    elif words[:2] == ["is", "there"]:
        shape, colour = words[-1], words[-2]
        fits = [t for t in one.things if shape in (t.shape, "thing") and colour in (t.colour, "a", "an")]
        assert answer.kind == ("yes" if fits else "no")
    elif "it" not in words and named:
        wanted = {"where": named[0].place, "what": named[0].size}[words[0]]
        assert answer.value == wanted
    elif words[:2] == ["is", "it"]:
        (other,) = named
        relation = next(r for r in ("left of", "right of", "above", "below") if r in turn.question)
        holds = [relation in relations_of(t, other) for t in one.things if t is not other]
        assert (answer.kind == "yes") in holds


def test_it_is_what_was_spoken_of_last():
    count = 0
    for i in range(80):
        one = scene(1, i)
        turns = dialogues.dialogue(one).turns
        for before, turn in itertools.pairwise(turns):
            named = [t for t in one.things if t.colour in before.question and t.shape in before.question]
            if (
                turn.question == "where is it ?"
                and before.kind in ("place", "size")
                and named
                and not before.by_history
            ):
                assert turn.answer.value == named[0].place
                count += 1
            assert not (turn.by_history and turn.kind == before.kind)
    assert count > 3


def test_the_world_is_written_as_visdial_and_read_back(tmp_path):
    dialogues.write(tmp_path, "val", 4, size=16)
    source = Conversations(Dialogues(str(tmp_path / "val.json"), relevance=str(tmp_path / "val-dense.json")))
    assert len(source) == 4
    source.check_some_exist()
    for i, one in enumerate(source.dialogues):
        talked = dialogues.dialogue(scene(0, i, "val"))
        assert one.caption == talked.caption
        assert scene_of(one.image.stem) == talked.scene
        index, values = one.relevance
        assert values == talked.turns[index].relevance
        for turn, row in zip(talked.turns, one.rounds, strict=True):
            assert source.questions[row.question] == turn.question
            assert [source.answers[option] for option in row.options] == [option.text for option in turn.options]
            assert source.answers[row.options[row.true]] == turn.answer.text == source.answers[row.answer]
    words = Tokenizer.load("world")
    assert words.unknown_rate([*source.questions, *source.answers]) == 0


# The whole ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of a few steps on the world."""
    folder = tmp_path_factory.mktemp("run")
    held_out = {
        name: recipe.HeldOutDialogues(
            Dialogues(str(folder / f"world/{name}.json"), relevance=str(folder / f"world/{name}-dense.json")), 1
        )
        for name in ("val", "test")
    }
    run = recipe.DialogueRun(
        out=str(folder / "out"),
        model=ModelChoice(size="tiny", tokenizer="world"),
        data=recipe.DialogueData(
            sources=[Dialogues(str(folder / "world/train.json"))], workers=0, max_tokens=30, max_words=20
        ),
        train=dataclasses.replace(TrainConfig(), steps=2, batch_size=2, warmup_steps=0, lr=1e-3),
        validation=held_out["val"],
        test=held_out["test"],
        world=recipe.DialogueWorld(str(folder / "world"), train=4, held_out=1),
    )
    return run, recipe.converse(run)


def test_a_run_leaves_a_model_with_its_scores(finished):
    run, (result, model) = finished
    assert {"mrr", "ndcg", "test_mrr", "test_r@10"} <= set(result.metrics)
    assert json.loads((model / "config.json").read_text())["task"] == "dialogue"
    assert len(read_ranks(Path(run.out) / "ranks-validation.json")) == 10


def test_the_command_measures_what_the_run_measured(finished, tmp_path, capsys):
    run, (result, model) = finished
    source = ["--source.path", run.test.source.path, "--source.relevance", run.test.source.relevance]
    ways = ["--out", str(tmp_path / "a"), "--batch", "200", "--max_tokens", "30", "--device", "cpu"]
    main(["visdial", "--model", str(model), *source, *ways])
    scores = json.loads((tmp_path / "a/scores.json").read_text())
    assert scores["mrr"] == result.metrics["test_mrr"]
    assert (tmp_path / "a/ranks.json").read_text() == (Path(run.out) / "ranks-test.json").read_text()
    main(["visdial", "--results", str(tmp_path / "a/ranks.json"), *source])
    assert "ndcg" in capsys.readouterr().out


def rank_all(model: str, path: str, out: str) -> None:
    """What each process of two does."""
    dist.start(60)
    ways = ["--max_tokens", "20", "--out", out, "--device", "cpu"]
    main(["visdial", "--model", model, "--source.path", path, *ways])


def test_two_processes_leave_the_files_that_one_leaves(finished, tmp_path):
    dialogues.write(tmp_path, "val", 3, size=16)
    value = json.loads((tmp_path / "val.json").read_text())
    for row in value["data"]["dialogs"]:
        row["dialog"] = row["dialog"][:2]
    (tmp_path / "val.json").write_text(json.dumps(value))
    zygote, given = the_zygote(), {"model": str(finished[1][1]), "path": str(tmp_path / "val.json")}
    there = {"module": "test_dialogue", "function": "rank_all", "out": str(tmp_path / "two")}
    pids = zygote.spawn(tmp_path / "log", world=2, **there, **given)
    assert [zygote.wait(pid, 240) for pid in pids] == [0, 0], (tmp_path / "log-0").read_text()
    rank_all(**given, out=str(tmp_path / "one"))
    for name in ("ranks.json", "scores.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert len(read_ranks(tmp_path / "two/ranks.json")) == 6


def test_rows_longer_than_the_model_are_refused(finished, tmp_path):
    run, _ = finished
    data = dataclasses.replace(run.data, max_tokens=65)
    with pytest.raises(ValueError, match=r"data.max_tokens 65 and .* must not exceed the model's 64 positions"):
        recipe.converse(dataclasses.replace(run, out=str(tmp_path), data=data))


def test_ranks_do_not_depend_on_how_many_rows_go_together(tmp_path):
    source = Conversations(written(tmp_path, talk()))
    model = random_model(image_size=16, patch_size=8).train()
    ranks = ranks_of(model, TOKENIZER, source, batch=200)
    assert model.training
    assert ranks_of(model, TOKENIZER, source, batch=1) == ranks
