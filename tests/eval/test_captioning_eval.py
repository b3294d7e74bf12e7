"""Caption metrics by hand, by the official code's numbers and by loops; files, images, two processes, the page."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocoevalcap.bleu.bleu import Bleu
from stub_run import the_zygote
from test_ptb import NORMAL, ODD, fake_java, needs_java, no_java, nothing_runs

from blip import dist
from blip.data.settings import SourceConfig
from blip.errors import DataError
from blip.inference.settings import DecodeConfig
from blip.models.blip import Blip
from blip.models.presets import TINY
from blip.tokenizer import Tokenizer
from eval.caption_page import report
from eval.captioning import CaptionScores, captions_of, coco_results, score
from eval.images import Images
from eval.metrics.captions import draws
from eval.metrics.java import NoJava, meteor_of, meteor_summable
from eval.metrics.ptb import NAMES
from eval.references import ImageCaptions, image_id, read_references, read_results

OFFICIAL = {
    "fakecap_x_val2017_126": {"bleu_4": 0.1982654, "cider": 0.6277219},
    "human_leaveoneout_val2017_5000": {"bleu_4": 0.1891044, "cider": 0.8649338},
}
THEIR_NAMES = {"bleu_1": "Bleu_1", "bleu_2": "Bleu_2", "bleu_3": "Bleu_3", "bleu_4": "Bleu_4", "rouge_l": "ROUGE_L",
               "cider": "CIDEr", "meteor": "METEOR"}  # fmt: skip


def quick(references, results, **options) -> CaptionScores:
    return score(references, results, **{"tokenizer": "python", "resamples": 0, **options})


# Numbers --------------------------------------------------------------------------------------------------------------


def official(real_data, name) -> tuple[dict, dict, dict, dict]:
    folder = real_data / "eval_references"
    cases = json.loads((folder / f"{name}.cases.json").read_text())
    expected = json.loads((folder / f"{name}.expected.json").read_text())["scores"]
    references = {case["image_id"]: case["references"] for case in cases}
    return references, {c["image_id"]: c["candidate"] for c in cases}, expected, {c["image_id"]: c for c in cases}


@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [
        ("fakecap_x_val2017_126", "python"),
        pytest.param("fakecap_x_val2017_126", "java", marks=needs_java),
        ("human_leaveoneout_val2017_5000", "python"),
        pytest.param("human_leaveoneout_val2017_5000", "java", marks=[needs_java, pytest.mark.slow]),
    ],
)
def test_official_scores(real_data, name, tokenizer):
    references, results, expected, cases = official(real_data, name)
    scores = quick(references, results, tokenizer=tokenizer)
    for ours, value in scores.values.items():
        assert value == pytest.approx(expected[THEIR_NAMES[ours]], abs=5e-7 if tokenizer == "java" else 5e-5), ours
    for ours, value in OFFICIAL[name].items():
        assert scores.values[ours] == pytest.approx(value, abs=5e-5)
    far = [i for i, value in scores.cider.items() if abs(value - cases[i]["scores"]["CIDEr"]) > 1e-3]
    assert len(far) <= (0 if tokenizer == "java" else 2), far
    assert (scores.images, scores.references) == (len(results), sum(map(len, references.values())))
    assert (scores.missing, scores.not_computed) == (0, {})


@needs_java
@pytest.mark.slow
@pytest.mark.parametrize("name", OFFICIAL)
def test_official_meteor(real_data, name):
    references, results, expected, _ = official(real_data, name)
    scores = quick(references, results, tokenizer="java", meteor=True)
    assert scores.not_computed == {}
    assert scores.values["meteor"] == pytest.approx(expected["METEOR"], abs=1e-9)


METEOR_EACH = [0.41388921016683433, 0.128, 1.0, 0.0]
METEOR_ALL = 0.27137762193157394


def test_meteor_of_statistics_that_the_program_gave():
    # What meteor-1.5.jar -stdio answers to SCORE for three captions, and then to EVAL: each one's score, and the set's.
    # fmt: off
    rows = np.array([
        [5, 6, 2, 3, 2, 2, 2, 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 5, 5],
        [2, 6, 1, 2, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2],
        [5, 5, 3, 3, 2, 2, 3, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 5, 5],
        [0, 6, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ], np.float64)
    # fmt: on
    rows = meteor_summable(rows)
    assert meteor_of(rows) == pytest.approx(METEOR_EACH, abs=1e-12)
    assert meteor_of(rows.sum(0)) == pytest.approx(METEOR_ALL, abs=1e-12)


def test_bleu_by_hand():
    values = quick({1: ["the cat sat down"]}, {1: "The cat sat."}).values
    short = math.exp(1 - 4 / 3)  # three words where four were wanted
    for n in (1, 2, 3):
        assert values[f"bleu_{n}"] == pytest.approx(short, abs=1e-6)
    assert values["bleu_4"] == pytest.approx(short * 1e-6**0.25, rel=1e-5)  # no 4-gram: pycocoevalcap's 1e-15 / 1e-9
    # The set's BLEU is of summed counts: words 4 of 5, pairs 2 of 3; the closest reference lengths are 3 and 2.
    values = quick({1: ["a b c", "a b c d e"], 2: ["x y"]}, {1: "a b c", 2: "x z"}).values
    assert values["bleu_1"] == pytest.approx(4 / 5, abs=1e-6)
    assert values["bleu_2"] == pytest.approx(math.sqrt(4 / 5 * 2 / 3), abs=1e-6)
    # Of references one word shorter and three longer, the closer counts; of two that are equally near, the shorter.
    assert quick({1: ["a b c", "a b c d e f g"]}, {1: "a b c d"}).values["bleu_1"] == pytest.approx(1, abs=1e-6)
    assert quick({1: ["a", "a b c d e"]}, {1: "a b c d"}).values["bleu_1"] == pytest.approx(math.exp(-1 / 4), abs=1e-6)
    assert quick({1: ["a b", "a b c d e f"]}, {1: "a b c d"}).values["bleu_1"] == pytest.approx(1, abs=1e-6)
    # A word that is said more often than in any reference counts no more often.
    assert quick({1: ["the cat"]}, {1: "the the the"}).values["bleu_1"] == pytest.approx(1 / 3, abs=1e-6)


def test_cider_and_rouge_by_hand():
    scores = quick({1: ["red bird"], 2: ["blue fish"]}, {1: "red bird", 2: "red fish"})
    # Image 1: words and pair are the same, 3- and 4-grams are none: 10 * (1 + 1) / 4. Image 2: one word of two.
    assert scores.cider == pytest.approx({1: 5.0, 2: 10 * 0.5 / 4})
    assert scores.values["cider"] == pytest.approx(3.125)
    # ROUGE-L, beta 1.2: precision and recall are equal, 1 and 1/2.
    assert scores.values["rouge_l"] == pytest.approx(0.75)
    # A word said twice counts once (1 of each, of lengths sqrt(5) and sqrt(2)), one pair of two is right, and for being
    # one pair longer there is exp(-1 / 72).
    longer = quick({1: ["red bird"], 2: ["blue fish"]}, {1: "red bird red", 2: "blue fish"})
    assert longer.cider[1] == pytest.approx(10 / 4 * (2 / math.sqrt(10) + 1 / math.sqrt(2)) * math.exp(-1 / 72))


def corpus(count=30, seed=0) -> tuple[dict, dict]:
    """Captions of a few words, some of them right."""
    generator = np.random.default_rng(seed)
    words = ["a", "the", "red", "blue", "big", "small", "dog", "cat", "bird", "man", "on", "in", "near", "sits", "runs"]
    references = {
        i: [" ".join(generator.choice(words, generator.integers(3, 9))) for _ in range(3)] for i in range(count)
    }
    results = {i: " ".join([*texts[0].split()[:4], *generator.choice(words, 2)]) for i, texts in references.items()}
    return references, results


def test_intervals_are_those_of_a_loop_over_draws(monkeypatch):
    monkeypatch.setattr("eval.metrics.captions._CELLS", 700)  # several blocks
    references, results = corpus()
    scores = quick(references, results, resamples=60, seed=3)
    ids = list(results)
    drawn = np.concatenate(list(draws(len(ids), 60, 3)))
    assert drawn.shape == (60, 30)
    assert (drawn.sum(1) == 30).all()
    assert len(np.unique(drawn)) > 3
    bleus, ciders = [], []
    for row in drawn.astype(int):
        chosen = [i for i, times in zip(ids, row, strict=True) for _ in range(times)]
        gts = {n: references[i] for n, i in enumerate(chosen)}
        bleus.append(Bleu(4).compute_score(gts, {n: [results[i]] for n, i in enumerate(chosen)}, verbose=0)[0])
        ciders.append(np.mean([scores.cider[i] for i in chosen]))
    for n in range(4):
        low, high = np.percentile([b[n] for b in bleus], [2.5, 97.5])
        assert scores.values[f"bleu_{n + 1}_low"] == pytest.approx(low, rel=1e-9)
        assert scores.values[f"bleu_{n + 1}_high"] == pytest.approx(high, rel=1e-9)
    assert [scores.values["cider_low"], scores.values["cider_high"]] == pytest.approx(
        np.percentile(ciders, [2.5, 97.5])
    )
    assert scores.values["cider_low"] < scores.values["cider"] < scores.values["cider_high"]


def test_intervals_are_a_function_of_the_seed_and_can_be_left_out():
    references, results = corpus()
    once, again, other = (quick(references, results, resamples=50, seed=seed).values for seed in (1, 1, 2))
    assert once == again
    assert once["cider_low"] != other["cider_low"]
    assert once["cider"] == other["cider"]
    assert not any(name.endswith(("_low", "_high")) for name in quick(references, results).values)


def test_the_order_of_images_changes_nothing():
    references, results = corpus()
    turned = dict(reversed(references.items())), dict(sorted(results.items(), key=lambda item: item[1]))
    assert quick(*turned).values == pytest.approx(quick(references, results).values)


def test_groups_are_scored_as_sets_of_their_own():
    references, results = corpus()
    groups = {i: "near" if i % 3 else "in" for i in range(20)}
    scores = quick(references, results, groups=groups, resamples=20)
    for group in ("in", "near"):
        ids = [i for i, name in groups.items() if name == group]
        alone = quick({i: references[i] for i in ids}, {i: results[i] for i in ids}, resamples=20).values
        assert {name: scores.values[f"{group}_{name}"] for name in alone} == pytest.approx(alone)
    assert scores.groups == {"in": 7, "near": 13}
    assert scores.values["cider"] == quick(references, results).values["cider"]


# Odd captions, and Java -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [pytest.param("java", marks=needs_java), "python"])
def test_an_odd_caption_changes_no_other_score(tokenizer):
    references, results = corpus(8)
    everywhere = {f"odd {name}": "a dog" for name in ODD}
    wanted = {**{name: [NORMAL[0]] for name in everywhere}, **references}
    before = quick(wanted, everywhere | results, tokenizer=tokenizer)
    odd = {f"odd {name}": text for name, text in ODD.items()}
    after = quick(wanted, odd | results, tokenizer=tokenizer)
    assert {i: after.cider[i] for i in results} == {i: before.cider[i] for i in results}
    assert all(math.isfinite(value) for value in after.values.values())
    assert before.cider != after.cider


def test_what_java_does_not_give_is_said(tmp_path, monkeypatch):
    no_java(tmp_path, monkeypatch)
    references, results = corpus(4)
    scores = quick(references, results, tokenizer="auto", meteor=True, spice=True)
    assert set(scores.not_computed) == {"java_tokenizer", "meteor", "spice"}
    assert scores.not_computed["meteor"] == "there is no java on PATH"
    assert scores.tokenizer == NAMES["python"]
    assert "meteor" not in scores.values
    with pytest.raises(NoJava, match="take python, or auto"):
        quick(references, results, tokenizer="java")


METEOR_ILL = {
    "hangs": ("sleep 400 & echo $! >> PIDS; wait", "did not end within 1 seconds"),
    "status": ("echo 'UnsupportedClassVersionError: 52' >&2; exit 1", "status 1: UnsupportedClassVersionError: 52"),
    "killed": ("kill -9 $$", "killed by signal 9"),
    "too few lines": ("echo 1 2 3", "answered 1 lines for 4"),
    "no numbers": ("sed 's/.*/what?/'", "something other than numbers"),
    "too few numbers": ("sed 's/.*/1 2 3/'", "answered 4 lines for 4"),
    "stops reading": ("head -c 1 >/dev/null; exit 0", "answered 0 lines for 4"),
}


@pytest.mark.parametrize("name", METEOR_ILL)
def test_meteor_that_does_not_behave(name, tmp_path, monkeypatch):
    script, reason = METEOR_ILL[name]
    pids = fake_java(tmp_path, monkeypatch, script)
    scores = quick(*corpus(4), meteor=True, seconds=1)
    assert reason in scores.not_computed["meteor"]
    assert "meteor" not in scores.values
    assert "cider" in scores.values
    assert nothing_runs(pids)


def test_meteor_is_told_each_caption_in_one_line(tmp_path, monkeypatch):
    numbers = " ".join(["5 5 3 3 2 2 3 3", *["0"] * 12, "1 5 5"])
    fake_java(tmp_path, monkeypatch, f"tee {tmp_path}/asked | sed 's/.*/{numbers}/'")
    references = {1: ["a ||| b\nc", "SCORE"], 2: ["x"]}
    scores = quick(references, {1: "<d ||| e|||>", 2: "..."}, meteor=True, resamples=10)
    assert (tmp_path / "asked").read_text() == "SCORE ||| a | | | b c ||| score ||| <d e >\nSCORE ||| x ||| \n"
    assert scores.values["meteor"] == scores.values["meteor_low"] == pytest.approx(1.0)


def spice_folder(tmp_path):
    (tmp_path / "spice" / "lib").mkdir(parents=True)
    for name in ("spice-1.0.jar", "lib/stanford-corenlp-3.6.0.jar", "lib/stanford-corenlp-3.6.0-models.jar"):
        (tmp_path / "spice" / name).touch()
    return str(tmp_path / "spice")


def test_spice_is_not_computed_without_its_parser_and_nothing_is_fetched(tmp_path, monkeypatch):
    pids = fake_java(tmp_path, monkeypatch, "exit 0")
    scores = quick(*corpus(4), spice=True)
    assert "lib/stanford-corenlp-3.6.0.jar" in scores.not_computed["spice"]
    assert "never fetched" in scores.not_computed["spice"]
    assert pids.read_text() == "", "no program was started"


def test_spice_is_asked_and_believed(tmp_path, monkeypatch):
    folder = spice_folder(tmp_path)
    report = json.dumps([{"image_id": i, "scores": {"All": {"f": f}}} for i, f in ((1, 0.5), (0, 0.25))])
    fake_java(tmp_path, monkeypatch, f"cp in.json {tmp_path}/asked; echo '{report}' > out.json")
    scores = quick({"x": ["a dog"], "y": ["a cat"]}, {"x": "a dog", "y": "cats"}, spice=True, spice_folder=folder)
    assert scores.values["spice"] == 0.375
    assert json.loads((tmp_path / "asked").read_text()) == [
        {"image_id": 0, "test": "a dog", "refs": ["a dog"]},
        {"image_id": 1, "test": "cats", "refs": ["a cat"]},
    ]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 0", "without writing its result"),
        ("echo '[]' > out.json", "no score for some"),
        ("echo '[{\"image_id\": 0}]' > out.json", "no score for some"),
        ("echo 'oops' > out.json", "no score for some"),
        ('echo \'[{"image_id": 0, "scores": {"All": {"f": NaN}}}]\' > out.json', "no number for 1"),
        ("sleep 401", "within 1 seconds"),
    ],
)
def test_spice_that_does_not_behave(tmp_path, monkeypatch, script, reason):
    folder, pids = spice_folder(tmp_path), fake_java(tmp_path, monkeypatch, script)
    scores = quick({0: ["a dog"]}, {0: "a dog"}, spice=True, spice_folder=folder, seconds=1)
    assert reason in scores.not_computed["spice"]
    assert nothing_runs(pids)


# Files ----------------------------------------------------------------------------------------------------------------

WANTED = [
    ImageCaptions(139, ["a room", "the room"], "v/COCO_val2014_000000000139.jpg"),
    ImageCaptions(285, ["a bear"], "v/b.jpg"),
]
FORMATS = {
    "coco": {
        "images": [{"id": 139, "file_name": WANTED[0].image}, {"id": 285, "file_name": "v/b.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 139, "caption": "a room"},
            {"id": 2, "image_id": 285, "caption": "a bear"},
            {"id": 3, "image_id": 139, "caption": "the room"},
        ],
    },
    "list": [
        {"image": WANTED[0].image, "image_id": 139, "caption": ["a room", "the room"]},
        {"image": "v/b.jpg", "image_id": "285", "captions": ["a bear"]},
    ],
    "a row a caption, id by the file's name": [
        {"image": WANTED[0].image, "caption": "a room"},
        {"image": "v/b.jpg", "img_id": 285, "caption": "a bear"},
        {"image": WANTED[0].image, "caption": "the room"},
    ],
    "karpathy": {
        "dataset": "coco",
        "images": [
            {"filepath": "v", "filename": "COCO_val2014_000000000139.jpg", "cocoid": 139, "imgid": 7, "split": "test",
             "sentences": [{"raw": "a room"}, {"raw": "the room"}]},
            {"filepath": "v", "filename": "b.jpg", "imgid": 285, "split": "val", "sentences": [{"raw": "a bear"}]},
        ],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_references(tmp_path, name):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(FORMATS[name]))
    assert read_references(path) == WANTED
    if name == "karpathy":
        assert read_references(path, "test") == WANTED[:1]
        assert read_references(path, "test+val") == WANTED
        with pytest.raises(DataError, match=r"no rows of split 'train'; there are: test \(1\), val \(1\)"):
            read_references(path, "train")


def test_plain_references_json_lines_and_domains(tmp_path):
    plain, lines, nocaps = tmp_path / "p.json", tmp_path / "l.jsonl", tmp_path / "n.json"
    plain.write_text('{"139": ["a room"], "x7": ["a bear", "bears"], "007": ["a spy"]}')
    assert read_references(plain) == [
        ImageCaptions(139, ["a room"]),
        ImageCaptions("x7", ["a bear", "bears"]),
        ImageCaptions("007", ["a spy"]),
    ]
    lines.write_text('{"image": "a.jpg", "caption": "A"}\n{"image": "b.jpg", "caption": ["B"]}\n')
    assert read_references(lines) == [ImageCaptions("a.jpg", ["A"], "a.jpg"), ImageCaptions("b.jpg", ["B"], "b.jpg")]
    images = [
        {"id": 0, "file_name": "a.jpg", "domain": "in-domain"},
        {"id": 1, "file_name": "b.jpg", "domain": "out-domain"},
    ]
    nocaps.write_text(json.dumps({"images": images}))
    assert [(e.id, e.domain, e.captions) for e in read_references(nocaps)] == [
        (0, "in-domain", []),
        (1, "out-domain", []),
    ]


def test_ids():
    assert [image_id(v, "") for v in (5, "5", "-5", "0", "05", "x", "9" * 30)] == [5, 5, -5, 0, "05", "x", "9" * 30]
    for wrong in (True, None, 1.0, "", [1]):
        with pytest.raises(DataError, match="for an image id"):
            image_id(wrong, "here")


BROKEN_REFERENCES = {
    "cut off": ('{"images": [{"id": 1}', "cut off"),
    "empty file": ("", "empty"),
    "a number": ("3", "row 0 is 3"),
    "nothing": ("[]", "no images"),
    "not text": ('{"1": ["a", 5]}', "image 1: a caption is 5, not a text"),
    "no list": ('{"1": "a dog"}', "image 1 has 'a dog'; expected a list"),
    "twice": ('{"1": ["a"], "1": ["b"]}', "'1' twice"),
    "no id": ('[{"caption": "a"}]', "row 0 has neither an image_id nor an image (it has: caption)"),
    "odd id": ('[{"image_id": 1.5, "caption": "a"}]', "row 0 has 1.5"),
    "an id of two images": ('[{"image": "a", "img_id": 1}, {"image": "b", "img_id": 1}]', "row 1: image id 1 is also"),
    "no caption text": ('[{"image": "a", "caption": [null]}]', "row 0: a caption is nothing (null)"),
    "image twice": ('{"images": [{"id": 1}, {"id": 1}], "annotations": []}', "images[1]: duplicate image 1"),
    "unknown image": (
        '{"images": [{"id": 1}], "annotations": [{"image_id": 2, "caption": "a"}]}',
        "annotations[0] is about",
    ),
    "no caption": (
        '{"images": [{"id": 1}], "annotations": [{"image_id": 1}]}',
        "annotations[0] is an object with image_id",
    ),
    "broken karpathy": (
        '{"images": [{"filename": "a", "sentences": [{}], "imgid": 1}]}',
        "images[0] is not an image of Kar",
    ),
}


@pytest.mark.parametrize("name", BROKEN_REFERENCES)
def test_broken_references_are_one_line_that_names_where(tmp_path, name):
    content, words = BROKEN_REFERENCES[name]
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(DataError) as error:
        read_references(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


BROKEN_RESULTS = {
    "an object": ('{"1": "a"}', "an object with 1"),
    "nothing": ("[]", "a list of 0"),
    "no caption": ('[{"image_id": 1}]', "row 0 is an object with image_id"),
    "not an object": ('[{"image_id": 1, "caption": "a"}, 7]', "row 1 is 7"),
    "null": ('[{"image_id": 1, "caption": null}]', "image 1: the caption is nothing (null)"),
    "a list": ('[{"image_id": 1, "caption": ["a"]}]', "the caption is a list of 1"),
    "twice": ('[{"image_id": 4, "caption": "a"}, {"image_id": "4", "caption": "a"}]', "1 image (4) more than once"),
    "odd id": ('[{"image_id": null, "caption": "a"}]', "None for an image id"),
}


@pytest.mark.parametrize("name", BROKEN_RESULTS)
def test_broken_results_are_one_line_that_names_where(tmp_path, name):
    content, words = BROKEN_RESULTS[name]
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(DataError) as error:
        read_results(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_results_as_they_are_written(tmp_path):
    path = tmp_path / "results.json"
    captions = {139: "a \u2028 \ud800 room\n", "x/y.jpg": "", 7: 'q"'}
    path.write_text(coco_results(captions))
    assert read_results(path) == captions
    assert json.loads(path.read_text())[0]["image_id"] == 139


def test_sets_that_do_not_match():
    references, results = {i: ["a dog"] for i in range(9)}, dict.fromkeys(range(9), "a cat")
    for wrong, words in (
        ((references, {}), "no results"),
        ((references, results | {77: "x", "y": "x"}), r"results for 2 images \(77, y\) without references"),
        ((references, {1: "a"}), r"no results for 8 images \(0, 2, 3, 4, 5, ...\) of 9"),
        ((references | {3: []}, results), r"no reference captions for 1 image \(3\)"),
        ((references | {3: "a dog"}, results), "references of image 3 are not a list of texts"),
        ((references | {3: [None]}, results), "references of image 3 are not a list of texts"),
        ((references, results | {4: ["a"]}), "result of image 4 is a list of 1, not a text"),
    ):
        with pytest.raises(DataError, match=words):
            quick(*wrong)
    scores = quick(references | {0: ["a cow"], 1: []}, {0: "a cow", 5: "a dog"}, allow_partial=True)
    assert (scores.images, scores.missing) == (2, 7)
    alone = quick({0: ["a cow"], 5: ["a dog"]}, {0: "a cow", 5: "a dog"})
    assert scores.values == alone.values, "as if the others were not there"
    with pytest.raises(DataError, match="without references"):
        quick(references, {99: "x"}, allow_partial=True)
    with pytest.raises(ValueError, match="no reference caption holds a word"):
        quick({1: ["..."]}, {1: "a"})


# Images and models --------------------------------------------------------------------------------------------------


def draw(folder, count=7, broken=()) -> SourceConfig:
    """Images of one colour each, with a list that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        name = f"{i}.png"
        Image.new("RGB", (20 + i, 30), (i * 35, 255 - i * 35, 90)).save(folder / name)
        if i in broken:
            (folder / name).write_bytes(b"<html>not found</html>")
        rows.append({"image": name, "image_id": 100 + i, "caption": [f"a star {i}", "a red square"]})
    (folder / "list.json").write_text(json.dumps(rows))
    return SourceConfig(str(folder / "list.json"))


def captioner() -> tuple[Blip, Tokenizer]:
    """Small, random, and of the same weights each time."""
    torch.manual_seed(2)
    tokenizer = Tokenizer.load("world")
    model = Blip(dataclasses.replace(TINY, text=tokenizer.text_config(TINY.text)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model.train(), tokenizer


DECODE = DecodeConfig(beams=2, max_length=9, min_length=3)


def test_images_of_a_source(tmp_path):
    config = draw(tmp_path)
    images = Images.open(config)
    assert list(images.references) == list(range(100, 107))
    assert images.references[103] == ["a star 3", "a red square"]
    assert images.image(3).size == (23, 30)
    parts = list(images.batches([0, 2, 4, 6, 5], 2, 16))
    assert [ids for ids, _ in parts] == [[100, 102], [104, 106], [105]]
    assert parts[0][1].shape == (2, 3, 16, 16)
    assert not torch.equal(parts[0][1][0], parts[0][1][1])
    assert list(Images.open(config, limit=2).references) == [100, 101]
    only = images.only([105, 1, 101])
    assert [e.id for e in only.entries] == [105, 101]
    assert only.image(0).size == (25, 30)


def test_images_of_other_formats(tmp_path):
    draw(tmp_path)
    rows = json.loads((tmp_path / "list.json").read_text())
    lines = [json.dumps({"file_name": row["image"], "text": row["caption"][0]}) for row in rows]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    images = Images.open(SourceConfig(str(tmp_path)), limit=3)
    assert images.references["metadata.jsonl:2"] == ["a star 2"]
    assert images.image(2).size == (22, 30)


def test_a_image_that_is_too_much_for_the_transform_is_named(tmp_path, monkeypatch):
    def fail(self, image, *key):
        raise MemoryError

    monkeypatch.setattr("blip.data.transforms.EvalTransform.__call__", fail)
    with pytest.raises(DataError, match=r"image 100 .*cannot be evaluated: too little memory"):
        list(Images.open(draw(tmp_path)).batches(range(3), 2, 16))


def test_images_that_cannot_be_used_are_named(tmp_path):
    images = Images.open(draw(tmp_path, broken=(4,)))
    with pytest.raises(DataError, match=r"image 104 \(4.png\) cannot be evaluated: is an HTML page"):
        images.image(4)
    with pytest.raises(DataError, match="image 104"):
        list(images.batches(range(7), 3, 16))
    (tmp_path / "5.png").unlink()
    with pytest.raises(DataError, match=r"image 105 \(5.png\) cannot be evaluated: no such file"):
        images.image(5)
    (tmp_path / "bad.json").write_text(
        '[{"image": "../../etc/passwd", "image_id": 1, "caption": "a"}, {"image_id": 2}]'
    )
    outside = Images.open(SourceConfig(str(tmp_path / "bad.json")))
    with pytest.raises(DataError, match="outside"):
        outside.image(0)
    with pytest.raises(DataError, match="the row has no image"):
        outside.image(1)


def test_captions_are_those_of_each_image_alone(tmp_path):
    model, tokenizer = captioner()
    images = Images.open(draw(tmp_path))
    captions = captions_of(model, tokenizer, images, DECODE, prompt="a ", batch=3)
    assert model.training, "left as it was"
    assert list(captions) == list(range(100, 107))
    assert len(set(captions.values())) > 1
    for batch in (1, 50):
        assert captions_of(model, tokenizer, images, DECODE, prompt="a ", batch=batch) == captions
    assert captions_of(model, tokenizer, images, dataclasses.replace(DECODE, num=2), prompt="a ") == captions
    drawn = DecodeConfig(method="nucleus", max_length=9, min_length=3, seed=4)
    once = captions_of(model, tokenizer, images, drawn)
    assert captions_of(model, tokenizer, images, drawn, batch=2) == once
    assert captions_of(model, tokenizer, images.only([104, 101]), drawn) == {i: once[i] for i in (104, 101)}
    scores = quick(images.references, captions)
    assert scores.images == 7


COUNTS = (1, 2, 5, 7)


def write_captions(whole: str, broken: str, out: str) -> None:
    """What each of two processes does: sets of several sizes, then one with an image that only the second is given."""
    dist.start(60)
    model, tokenizer = captioner()
    for count in COUNTS:
        captions = captions_of(model, tokenizer, Images.open(SourceConfig(whole), count), DECODE, prompt="a ", batch=2)
        Path(f"{out}-{count}-{dist.rank()}").write_text(coco_results(captions))
    with pytest.raises(DataError, match=r"image 103 \(3.png\) cannot be evaluated"):
        captions_of(model, tokenizer, Images.open(SourceConfig(broken)), DECODE, batch=2)
    with pytest.raises(ValueError, match="max_length"):
        captions_of(model, tokenizer, Images.open(SourceConfig(whole), 1), dataclasses.replace(DECODE, max_length=99))


def test_two_processes_write_each_caption_once_and_fail_together(tmp_path):
    whole, broken = draw(tmp_path / "whole").path, draw(tmp_path / "broken", broken=(3,)).path
    arguments = {"whole": whole, "broken": broken, "out": str(tmp_path / "two")}
    zygote, this = the_zygote(), "test_captioning_eval"
    pids = zygote.spawn(tmp_path / "log", world=2, module=this, function="write_captions", **arguments)
    statuses = [zygote.wait(pid, 240) for pid in pids]  # most of it is importing transformers
    assert statuses == [0, 0], (tmp_path / "log-0").read_text() + (tmp_path / "log-1").read_text()
    model, tokenizer = captioner()
    for count in COUNTS:
        alone = captions_of(model, tokenizer, Images.open(SourceConfig(whole), count), DECODE, prompt="a ", batch=2)
        for rank in (0, 1):
            assert (tmp_path / f"two-{count}-{rank}").read_text() == coco_results(alone)


def test_a_length_that_does_not_fit_is_refused(tmp_path):
    images = Images.open(draw(tmp_path, 2))
    with pytest.raises(ValueError, match="max_length"):
        captions_of(*captioner(), images, dataclasses.replace(DECODE, max_length=500))


# The page -------------------------------------------------------------------------------------------------------------


def test_the_page_shows_the_best_and_the_worst_and_asks_nobody(tmp_path):
    images = Images.open(draw(tmp_path, broken=(6,)))
    references = images.references | {100: ['<script src="http://x.example/a.js"></script>', "b" * 5000]}
    captions = {i: f"a star {i}" for i in references} | {101: "<b>zebra</b> & co", 106: "nothing known"}
    scores = score(references, captions, tokenizer="python", resamples=10)
    record = scores.values | scores.facts()
    html = report(record | {"prompt": "a "}, scores.cider, references, captions, images, shown=4)
    best, worst = html.split("<h2>The worst by CIDEr</h2>")
    assert (best.count('class="card"'), worst.count('class="card"')) == (2, 2)
    ordered = sorted(scores.cider, key=scores.cider.get, reverse=True)
    for part, names in ((best, ordered[:2]), (worst, ordered[:-3:-1])):
        assert re.findall(r'<p class="dim">(\d+)</p>', part) == list(map(str, names))
        shown = re.findall(r'>CIDEr</span> <span dir="auto">([\d.]+)<', part)
        assert shown == [f"{100 * scores.cider[name]:.1f}" for name in names]
    assert re.search(r"<h1>CIDEr [\d.]+ on 7 captions</h1>", html)
    assert '<th scope="row">BLEU-1</th>' in html
    assert "bleu_1" not in html
    assert "95% interval: from" in html
    everything = report(record, scores.cider, references, captions, images, shown=60)
    assert everything.count('class="card"') == 7
    assert everything.count("<img ") == 6, "an unreadable image is only not shown"
    assert everything.count('src="data:image/jpeg;base64,') == 6
    assert "<script" not in everything
    assert "&lt;b&gt;zebra&lt;/b&gt; &amp; co" in everything
    assert "b" * 301 not in everything
    assert len(report(record, scores.cider, references, captions, None, shown=1)) < 20_000
    assert report(record, scores.cider, references, captions, None, shown=0).count('class="card"') == 0


def test_lists_have_the_columns_that_training_takes(tmp_path):
    rows = [{"file_name": f"{i}.jpg", "text": [f"a {i}", "b"]} for i in range(2)]
    (tmp_path / "a.ndjson").write_text("\n".join(map(json.dumps, rows)))
    references = read_references(tmp_path / "a.ndjson")
    assert [(entry.image, entry.captions) for entry in references] == [("0.jpg", ["a 0", "b"]), ("1.jpg", ["a 1", "b"])]
