"""The synthetic world: the same everywhere, split without overlap, told truly, written in formats that others read."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from itertools import pairwise, product
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast

from blip.world import files
from blip.world import scene as world
from blip.world.judge import grade, judge, parse
from blip.world.scene import COLOURS, HELD_OUT, SHAPES, SPLITS, Background, Scene, Thing
from blip.world.text import KINDS, MIXTURE, captions, description, web_text

SHOW = """
import hashlib
from blip.world import scene as world
from blip.world.text import captions, web_text
for split, i, size in [("train", 0, 64), ("train", 5, 100), ("val", 7, 64), ("test", 1, 224), ("composition", 2, 64)]:
    print(split, i, size, hashlib.sha256(world.draw(world.scene(0, i, split), size).tobytes()).hexdigest()[:16])
texts = [t for i in range(50) for t in (*captions(world.scene(3, i, "val")), web_text(world.scene(3, i)).text)]
print("texts", hashlib.sha256("\\n".join(texts).encode()).hexdigest()[:16])
"""
SHOWN = """
train 0 64 3556ab5a8dfef1d0
train 5 100 5e8f0d41f579fe37
val 7 64 3b066db4e4d1c42d
test 1 224 0a70d94a8a6ac447
composition 2 64 bba7a9c00f16c18a
texts 18e8858d739bb202
"""


def thing(colour_and_shape: str, cell: int, size: str = "small") -> Thing:
    colour, shape = colour_and_shape.split()
    return Thing(shape, colour, size, cell, 200 + 300 * (cell % 3), 200 + 300 * (cell // 3), 120, 0, (0, 0, 0))


def make(*things: Thing, background: str = "plain") -> Scene:
    return Scene(0, "train", 0, Background(background, (128, 128, 128), 0, 0), things)


# ---- scenes


@pytest.mark.parametrize("hash_seed", ["0", "77"])
def test_the_same_in_every_process(hash_seed):
    """Pixels and words are pinned; Python's randomised string hash must not matter."""
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(root)}
    shown = subprocess.run([sys.executable, "-c", SHOW], env=env, capture_output=True, text=True, check=True).stdout
    assert shown.split("\n") == SHOWN.lstrip().split("\n")


def test_a_scene_does_not_depend_on_the_type_of_its_number_or_on_others():
    assert world.scene(np.int64(4), np.int32(9), "val") == world.scene(4, 9, "val")
    assert world.scene(4, 9, "val") != world.scene(5, 9, "val") != world.scene(5, 10, "val")
    assert world.scene_of(world.scene(4, 9, "val").image_id) == world.scene(4, 9, "val")


def test_unknown_split_and_name_are_refused():
    with pytest.raises(ValueError, match="no split 'dev'"):
        world.scene(0, 0, "dev")
    with pytest.raises(ValueError, match="does not name a scene"):
        world.scene_of("COCO_val2014_000000000042")


def test_splits_share_no_scene_whatever_the_seed():
    contents = {
        split: {world.content(world.scene(seed, i, split).things) for seed in (0, 1) for i in range(900)}
        for split in SPLITS
    }
    for split in SPLITS:
        others = set().union(*(contents[other] for other in SPLITS if other != split))
        assert len(contents[split]) > 500
        assert not contents[split] & others


def test_held_out_pairs_are_seen_in_composition_only():
    pairs = {
        split: [{(t.colour, t.shape) for t in world.scene(2, i, split).things} for i in range(800)] for split in SPLITS
    }
    for split in ("train", "val", "test"):
        assert not set().union(*pairs[split]) & HELD_OUT
    assert set().union(*pairs["train"]) == {(c, s) for c in COLOURS for s in SHAPES} - HELD_OUT
    assert all(scene_pairs & HELD_OUT for scene_pairs in pairs["composition"])
    assert set().union(*pairs["composition"]) >= HELD_OUT


def test_things_keep_apart_and_inside():
    for i in range(500):
        made = world.scene(6, i)
        assert 1 <= len(made.things) <= 3
        assert len({(t.colour, t.shape) for t in made.things}) == len(made.things)
        for t in made.things:
            assert t.radius <= min(t.x, t.y)
            assert max(t.x, t.y) <= 1000 - t.radius
            assert (t.x // 334, t.y // 334) == (t.column, t.row)
        for n, a in enumerate(made.things):
            for b in made.things[:n]:
                assert np.hypot(a.x - b.x, a.y - b.y) >= 0.9 * (a.radius + b.radius)


@pytest.mark.parametrize("size", [64, 224])
def test_things_have_their_colours_and_backgrounds_none_of_them(size):
    """The pixel at a filled thing's centre is nearest to its own colour; the background is darker than any thing."""
    names, levels = list(COLOURS), np.array(list(COLOURS.values()), dtype=float)
    for i in range(60):
        made = world.scene(8, i)
        pixels = np.asarray(world.draw(made, size), dtype=float)
        assert pixels.shape == (size, size, 3)
        for t in made.things:
            if t.shape in ("circle", "square", "cross", "star", "heart"):
                pixel = pixels[t.y * size // 1000, t.x * size // 1000]
                assert names[np.abs(levels - pixel).sum(1).argmin()] == t.colour
        empty = np.asarray(world.draw(Scene(0, "train", i, made.background, ()), size), dtype=float).reshape(-1, 3)
        assert min(np.abs(level - empty).max(1).min() for level in levels) > 50


def test_sizes_at_64_pixels():
    for colour_and_shape, size, low, high in (("white square", "small", 14, 19), ("white circle", "large", 26, 30)):
        things = [
            t for i in range(900) for t in world.scene(9, i).things if f"{t.colour} {t.shape}" == colour_and_shape
        ]
        things = [t for t in things if t.size == size]
        assert len(things) > 3
        for t in things:
            pixels = np.asarray(world.draw(make(t), 64)).sum(2) > 420
            assert low <= pixels.any(0).sum() <= high
            assert low <= pixels.any(1).sum() <= high


def test_a_larger_image_shows_the_same():
    for i in range(30):
        made = world.scene(10, i)
        if made.background.kind != "speckled":
            small = np.asarray(world.draw(made, 64), dtype=float)
            large = np.asarray(world.draw(made, 256).reduce(4), dtype=float)
            assert np.abs(small - large).mean() < 2.5


def test_facts():
    made = make(thing("red star", 0), thing("blue ring", 4, "large"), background="speckled")
    assert world.facts(made) == {
        "count": 2,
        "background": "speckled",
        "things": [
            {"shape": "star", "colour": "red", "size": "small", "place": "top left"},
            {"shape": "ring", "colour": "blue", "size": "large", "place": "middle"},
        ],
        "relations": [[0, "left of", 1], [0, "above", 1]],
    }


# ---- captions, against a reader of their words that shares no code with the judge

COLOUR = "|".join(COLOURS)
SHAPE = "|".join([*SHAPES, "disc", "crescent"])
NAME = rf"(?:an?|the) (?:(small|little|tiny|large|big) )?(?:({COLOUR}) )?({SHAPE})"


BEYOND = {
    "left of": (1, 0),
    "right of": (-1, 0),
    "above": (0, 1),
    "below": (0, -1),
    "under": (0, -1),
    "beneath": (0, -1),
}
"""Direction, x to the right and y down, from a thing to the one that it is said to be left of and so on."""

PLACED = r"<(\d)> (?:at|in|on|near) the ((?:top |bottom )?(?:left|right)|top|bottom|middle|centre)\b"
RELATED = rf"<(\d)>(?: is| that is|, which is)? (?:to the )?({'|'.join(BEYOND)}) (?=<(\d)>)"


def meant(made: Scene, size: str | None, colour: str | None, shape: str) -> list[Thing]:
    shape = {"disc": "circle", "crescent": "moon"}.get(shape, shape)
    size = {"little": "small", "tiny": "small", "big": "large"}.get(size, size)
    return [t for t in made.things if t.shape == shape and colour in (None, t.colour) and size in (None, t.size)]


def lies(t: Thing, place: str) -> bool:
    row = "top" if t.y < 334 else "bottom" if t.y > 666 else ""
    column = "left" if t.x < 334 else "right" if t.x > 666 else ""
    return place.replace("centre", "middle") == (f"{row} {column}".strip() or "middle")


def holds(made: Scene, text: str) -> bool:
    """Whether names, places, relations, number and background of a text fit the geometry of the scene."""
    meanings: list[list[Thing]] = []

    def number_names(match: re.Match) -> str:
        meanings.append(meant(made, *match.groups()))
        return f"<{len(meanings) - 1}>"

    text = re.sub(NAME, number_names, text)
    number = re.match(r"(one|a single|two|three) (?:shape|thing)s?\b", text)
    if number and {"one": 1, "a single": 1, "two": 2, "three": 3}[number[1]] != len(made.things):
        return False
    background = re.search(r"on a (\w+) background", text)
    if background and background[1] != made.background.kind:
        return False
    choices = [things for things in product(*meanings) if len(set(things)) == len(things)]
    return any(fits(things, text) for things in choices)


def fits(things: tuple[Thing, ...], text: str) -> bool:
    """Whether places and relations are right when <0>, <1>, ... in the text mean these things."""
    true = True
    for k, place in re.findall(PLACED, text):
        true &= lies(things[int(k)], place)
    for a, name, b in re.findall(RELATED, text):
        (x, y), t, u = BEYOND[name], things[int(a)], things[int(b)]
        true &= x * (u.x - t.x) + y * (u.y - t.y) > 200
    for parts in re.findall(r"<(\d)> between <(\d)> and <(\d)>", text):
        t, u, v = (things[int(k)] for k in parts)
        true &= max(abs(u.x + v.x - 2 * t.x), abs(u.y + v.y - 2 * t.y)) < 250
    return true


@pytest.mark.parametrize("split", ["train", "test", "composition"])
def test_captions_are_true_varied_and_mostly_specific(split):
    verdicts, words = [], Counter()
    for i in range(300):
        made = world.scene(11, i, split)
        texts = captions(made)
        assert texts == captions(made)
        assert len(set(texts)) == 5
        full = 0
        for text in texts:
            assert text == text.lower()
            assert 4 <= len(text.split()) <= 27
            assert holds(made, text), (text, world.facts(made))
            verdicts.append(judge(made, text))
            full += verdicts[-1].recalled["shape"] == verdicts[-1].recalled["colour"] == len(made.things)
            words.update(set(re.findall(r"\w+", text)))
        assert full >= 4
    assert all(verdict.true for verdict in verdicts)
    assert {*COLOURS, *SHAPES, "small", "big", "above", "between", "left", "three", "speckled", "corner"} <= set(words)
    for name in ("size", "place", "relation", "count", "background"):
        assert 0.1 < grade(verdicts)[f"recall/{name}"] < 0.6


def test_judge_agrees_with_the_geometry():
    """Captions are true or false alike for both readers, also of a scene whose last thing became another."""
    agree = Counter()
    for i in range(400):
        made = world.scene(12, i)
        altered = make(*made.things[:-1], thing(f"{made.things[-1].colour} moon", 4), background="plain")
        for text in captions(made):
            for judged in (made, altered):
                agree[holds(judged, text), judge(judged, text).true] += 1
    assert agree[True, False] + agree[False, True] == 0
    assert min(agree[True, True], agree[False, False]) > 500


def test_captions_name_their_scene_among_200():
    """What a perfect reader would retrieve, ties broken by chance: room to tell models apart, little of it lost."""
    scenes = [world.scene(0, i, "test") for i in range(200)]
    texts = [captions(made)[i % 5] for i, made in enumerate(scenes)]
    share = sum(1 / sum(judge(made, text).true for made in scenes) for text in texts) / 200
    assert share > 0.85


# ---- reading texts that nobody's template wrote

STAR, RING, MOON = thing("red star", 0), thing("blue ring", 4, "large"), thing("green moon", 8)


@pytest.mark.parametrize(
    ("text", "right", "claimed"),
    [
        ("A red star.", {"shape": 1, "colour": 1}, {"shape": 1, "colour": 1}),
        ("a red star a blue ring", {"shape": 2, "colour": 2}, {"shape": 2, "colour": 2}),
        ("a red star and a red star", {"shape": 1, "colour": 1}, {"shape": 2, "colour": 2}),
        ("a red red star star", {"shape": 1, "colour": 1}, {"shape": 2, "colour": 1}),
        ("two red stars", {"shape": 1, "colour": 1}, {"shape": 2, "colour": 2}),
        ("a blue star", {"shape": 1}, {"shape": 1, "colour": 1}),
        ("a red shape", {"colour": 1}, {"colour": 1}),
        ("three shapes", {"count": 1}, {"count": 1}),
        ("two things", {}, {"count": 1}),
        ("stars and shapes", {"shape": 1}, {"shape": 1}),
        ("the star is left of the ring", {"shape": 2, "relation": 1}, {"shape": 2, "relation": 1}),
        ("the ring is left of the star", {"shape": 2}, {"shape": 2, "relation": 1}),
        ("a ring between a moon and a star", {"shape": 3, "relation": 1}, {"shape": 3, "relation": 1}),
        ("a star between a moon and a ring", {"shape": 3}, {"shape": 3, "relation": 1}),
        ("a red star. the red star is above a ring", {"shape": 2, "colour": 1, "relation": 1}, None),
        ("a star on the left of the picture", {"shape": 1}, {"shape": 1, "place": 1}),
        ("a star in the upper left corner", {"shape": 1, "place": 1}, {"shape": 1, "place": 1}),
        ("the bottom right moon", {"shape": 1, "place": 1}, {"shape": 1, "place": 1}),
        ("a star on a plain background", {"shape": 1, "background": 1}, None),
        ("a star on a speckled background", {"shape": 1}, {"shape": 1, "background": 1}),
        ("left of above between", {}, {}),
        ("a star above", {"shape": 1}, {"shape": 1}),
        ("", {}, {}),
        ("black friday, top offers, number one! \u661f \u0000", {}, {}),
        ("star " * 300, {"shape": 1}, {"shape": 300}),
    ],
)
def test_judge_reads_imperfect_texts(text, right, claimed):
    verdict = judge(make(STAR, RING, MOON), text)
    assert dict(verdict.right) == right
    assert dict(verdict.claimed) == (right if claimed is None else claimed)
    assert verdict.true == (verdict.right == verdict.claimed and bool(verdict.claimed))


def test_precision_and_recall():
    made = make(STAR, RING, MOON)
    verdict = judge(made, "a red star left of a blue moon")
    assert verdict.precision == pytest.approx(4 / 5)
    assert verdict.recall == pytest.approx(4 / (4 * 3 + 3 + 1 + 1))
    result = grade([verdict, judge(made, "click here")])
    assert result["precision/colour"] == 0.5
    assert result["recall/shape"] == pytest.approx(2 / 6)
    assert result["true"] == 0


def test_a_relation_is_told_by_two_places():
    scene = world.scene(0, next(i for i in range(50) if len(world.scene(0, i).things) == 2))
    a, b = scene.things
    places = [f"a {t.colour} {t.shape} at the {t.place}" for t in (a, b)]
    assert judge(scene, " and ".join(places)).recalled["relation"] == 1
    assert judge(scene, f"{places[0]} and a {b.colour} {b.shape}").recalled["relation"] == 0
    wrong = next(place for place in world.PLACES if place not in (a.place, b.place))
    text = f"{places[0]} and a {b.colour} {b.shape} at the {wrong}"
    assert judge(scene, text).recalled["relation"] == 0


@pytest.mark.parametrize("split", ["train", "composition"])
def test_a_description_tells_everything(split):
    for i in range(100):
        made = world.scene(1, i, split)
        verdict = judge(made, description(made))
        assert (verdict.precision, verdict.recall) == (1, 1), description(made)


def test_a_colour_left_out_is_matched_by_what_else_is_said():
    made = make(thing("red star", 0), thing("blue star", 8))
    assert judge(made, "a star at the bottom right and a red star").true
    assert judge(made, "a star below a star").true
    assert not judge(made, "a red star below a star").true


def test_parse_keeps_who_is_related_to_whom():
    claims = parse("a red star above a blue ring, which is left of a moon")
    assert [(r.subject, r.name, r.objects) for r in claims.relations] == [(0, "above", [1]), (1, "left of", [2])]


# ---- web text


def test_web_text_is_what_its_kind_says():
    for i in range(800):
        made = world.scene(13, i)
        text, kind = web_text(made, noise=0.8)
        verdict = judge(made, text)
        if kind == "right":
            assert text in captions(made)
        elif kind == "junk_around":
            assert verdict.true
            assert text not in captions(made)
            assert len(text.split()) > 4
        elif kind == "vague":
            assert not verdict.claimed
        elif kind == "mismatched":
            assert not verdict.true
        else:
            assert kind == "near_miss"
            assert not verdict.true
            assert min(len(difference(text, caption)) for caption in captions(made)) == 1
            assert not holds(made, text), (text, world.facts(made))
        assert not any(f"{colour} {shape}" in text for colour, shape in HELD_OUT)


def test_a_mismatched_text_is_not_true_by_accident(monkeypatch):
    """Another scene may look the same: then its caption is no noise, and another is taken."""
    number = next(i for i in range(99) if web_text(world.scene(13, i), 1.0).kind == "mismatched")
    made, other, drawn = world.scene(13, number), world.scene(13, 1000), []

    def fake(seed: int, i: int, split: str) -> Scene:
        drawn.append(i)
        return made if len(drawn) < 4 else other

    monkeypatch.setattr(world, "scene", fake)
    text, kind = web_text(made, 1.0)
    assert kind == "mismatched"
    assert len(set(drawn)) == 4
    assert text in captions(other)


def difference(text: str, other: str) -> list[str]:
    a, b = (re.sub(r"\ban\b", "a", t).split() for t in (text, other))
    return [x for x, y in zip(a, b, strict=True) if x != y] if len(a) == len(b) else [text, other]


@pytest.mark.parametrize("noise", [0.0, 0.6, 1.0])
def test_noise_rate_and_mixture(noise):
    n = 1500
    kinds = Counter(web_text(world.scene(14, i), noise).kind for i in range(n))
    shares = {"right": 1 - noise, **{kind: noise * share for kind, share in MIXTURE.items()}}
    assert set(kinds) <= set(KINDS) == set(shares)
    for kind, share in shares.items():
        assert abs(kinds[kind] - n * share) <= 4 * (n * share * (1 - share)) ** 0.5


def test_noise_outside_0_to_1_is_refused():
    with pytest.raises(ValueError, match="noise rate"):
        web_text(world.scene(0, 0), 1.5)


# ---- files


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read_tar(folder: Path) -> list[dict]:
    rows = []
    for path in sorted(folder.glob("train-*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name in (name for name in members if name.endswith(".json")):
            record = json.loads(members[name])
            first = record["caption"] if isinstance(record["caption"], str) else record["caption"][0]
            assert members[name.replace(".json", ".txt")].decode() == first
            rows.append({**record, "image": members[name.replace(".json", ".jpg")]})
    return rows


def read_json(folder: Path) -> list[dict]:
    rows = json.loads((folder / "train.json").read_text())
    return [{**row, "image": (folder / row["image"]).read_bytes()} for row in rows]


def read_hub(folder: Path, builder: str, **where) -> list[dict]:
    loaded = datasets.load_dataset(builder, split="train", cache_dir=str(folder / ".cache"), **where)
    assert isinstance(loaded.features["image"], datasets.Image)
    rows = []
    for row in loaded.cast_column("image", datasets.Image(decode=False)):
        image = row["image"]
        rows.append({**row, "image": Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]})
    return sorted(rows, key=lambda row: row["image_id"])


READERS = {
    "tar": read_tar,
    "json": read_json,
    "imagefolder": lambda folder: read_hub(folder, "imagefolder", data_dir=str(folder)),
    "parquet": lambda folder: read_hub(folder, str(folder)),
}


@pytest.mark.parametrize("web", [False, True])
@pytest.mark.parametrize("format", READERS)
def test_written_formats_are_read_back(tmp_path, format, web):
    files.write(tmp_path, format, count=25, seed=5, size=48, web=web, shard=10)
    rows = READERS[format](tmp_path)
    assert len(rows) == 25
    for i, row in enumerate(rows):
        made = world.scene(5, i)
        assert row["image_id"] == made.image_id
        if web:
            assert (row["caption"], row["kind"]) == web_text(made)
        else:
            assert row["caption"] == captions(made)
        with Image.open(io.BytesIO(row["image"])) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (48, 48), "RGB")
            off = np.abs(np.asarray(image, dtype=float) - np.asarray(world.draw(made, 48), dtype=float))
        assert off.mean() < 5


@pytest.mark.parametrize("format", READERS)
def test_broken_files_are_counted_and_recorded(tmp_path, format):
    files.write(tmp_path, format, count=30, web=True, broken=7, shard=10)
    rows = READERS[format](tmp_path)
    assert Counter(row["broken"] for row in rows) == {"": 23, "truncated": 3, "html": 2, "empty": 2}
    for row in rows:
        try:
            Image.open(io.BytesIO(row["image"])).load()
            readable = True
        except OSError:
            readable = False
        assert readable == (row["broken"] == "")


@pytest.mark.parametrize("format", READERS)
def test_writing_again_gives_the_same_bytes(tmp_path, format):
    for name in ("a", "b"):
        files.write(tmp_path / name, format, "val", count=12, broken=2, web=True, shard=5)
    first = contents(tmp_path / "a")
    assert first == contents(tmp_path / "b")
    files.write(tmp_path / "a", format, "val", count=4, shard=5, overwrite=True)
    files.write(tmp_path / "a", format, "val", count=12, broken=2, web=True, shard=5, overwrite=True)
    assert first == contents(tmp_path / "a")


def test_workers_do_not_change_the_bytes(tmp_path):
    for workers in (1, 2):
        files.write(tmp_path / str(workers), count=70, shard=50, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def make_row(settings, i):
        if i == 15:
            raise KeyboardInterrupt
        return real(settings, i)

    real = files.make_row
    monkeypatch.setattr(files, "make_row", make_row)
    for format in READERS:
        with pytest.raises(KeyboardInterrupt):
            files.write(tmp_path, format, count=20, shard=10)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_unasked(tmp_path):
    files.write(tmp_path, count=3)
    files.write(tmp_path, split="val", count=3)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"train-00000.tar already exists.*--overwrite"):
        files.write(tmp_path, count=4)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"count": 0}, "count must be 1"),
        ({"shard": 0}, "shard must be 1"),
        ({"broken": 4}, r"0 to count \(3\)"),
        ({"noise": -1}, "noise must be"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        files.write(tmp_path / "new", **{"count": 3, **wrong})
    assert not (tmp_path / "new").exists()


def test_command_line(tmp_path, capsys):
    command = ["--out", str(tmp_path), "--format", "json", "--split", "test", "--count", "3", "--web", "true"]
    files.main(command)
    assert capsys.readouterr().out.split() == [str(tmp_path / "images" / "test"), str(tmp_path / "test.json")]
    assert {row["kind"] for row in json.loads((tmp_path / "test.json").read_text())} <= set(KINDS)
    with pytest.raises(SystemExit, match="already exists"):
        files.main(command)


# ---- word pieces


@pytest.fixture(scope="module")
def pieces() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(Path(world.__file__).parent / "tokenizer/tokenizer.json"))


def test_tokenizer_ids_are_pinned(pieces):
    vocabulary = pieces.get_vocab()
    assert len(vocabulary) <= 1000
    assert [vocabulary[name] for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")] == [0, 1, 2, 3]
    assert [vocabulary[name] for name in ("[DEC]", "[ENC]")] == [len(vocabulary) - 2, len(vocabulary) - 1]
    listed = "\n".join(sorted(vocabulary, key=vocabulary.get))
    assert hashlib.sha256(listed.encode()).hexdigest()[:16] == "b4b2f91dd3286a9c"


def test_world_words_are_one_piece_and_nothing_is_unknown(pieces):
    for split in ("train", "composition"):
        for i in range(300):
            made = world.scene(15, i, split)
            for text in captions(made):
                assert pieces.tokenize(text) == re.findall(r"\w+|[^\w\s]", text)
            assert "[UNK]" not in pieces.tokenize(web_text(made, 1.0).text)
    every = "".join(map(chr, range(32, 127)))
    assert "[UNK]" not in pieces.tokenize(every + "".join(a + b for a, b in pairwise(every)))
    question = "how many large shapes are there? is the blue ring bigger than both moons? yes, no"
    assert pieces.tokenize(question) == re.findall(r"\w+|[^\w\s]", question)
    assert pieces.decode(pieces("A small red star.")["input_ids"], skip_special_tokens=True) == "a small red star."
