"""Clips of the world: one thing moves as the captions say, the others stay, splits and files keep what they promise."""

import json
from fractions import Fraction

import numpy as np
import pytest

from blip.tokenizer import Tokenizer
from blip.world.clips import ANSWERS, DIRECTIONS, captions, clip, frames, questions, write
from blip.world.scene import HELD_OUT

CLIPS = [clip(3, i, "train") for i in range(40)]


def test_a_clip_is_a_function_of_its_numbers():
    assert clip(3, 5, "train") == CLIPS[5]
    assert captions(CLIPS[5]) == captions(clip(3, 5, "train"))
    assert len({str(made.scene.things) for made in CLIPS}) == len(CLIPS)
    assert {made.direction for made in CLIPS} == set(DIRECTIONS)
    assert {len(made.scene.things) for made in CLIPS} == {1, 2, 3}


def test_one_thing_crosses_the_image_and_the_others_stay():
    for made in CLIPS:
        begun, ended = made.at(Fraction(0)).things, made.at(Fraction(1)).things
        across, down = DIRECTIONS[made.direction]
        for n, (a, b) in enumerate(zip(begun, ended, strict=True)):
            if n == made.moving:
                assert (np.sign(b.x - a.x), np.sign(b.y - a.y)) == (across, down)
                assert abs(b.x - a.x) + abs(b.y - a.y) >= 500, "a long way"
                assert min(a.x, a.y, b.x, b.y) > 0
                assert max(a.x, a.y, b.x, b.y) < 1000
                assert (b.column - a.column, b.row - a.row) == (2 * across, 2 * down)
            else:
                assert a == b
        # The image changes where the thing is and nowhere else.
        first, last = (np.asarray(frame).astype(int) for frame in frames(made, 2, 64))
        changed = np.argwhere(np.abs(first - last).sum(2) > 30)
        assert len(changed) > 20


def test_captions_and_questions_say_what_is_true():
    for made in CLIPS:
        thing, texts = made.scene.things[made.moving], captions(made)
        assert len(set(texts)) == 5
        others = [way for way in DIRECTIONS if way != made.direction]
        for text in texts:
            assert 4 <= len(text.split()) <= 20
            assert thing.colour in text.split("while")[0]
            ends = {"right": "to the right|left to right", "left": "to the left|right to left"}
            ends |= {"up": "up|bottom to top", "down": "down|top to bottom"}
            assert any(end in text for end in ends[made.direction].split("|"))
            assert not any(end in text for way in others for end in ends[way].split("|"))
        answers = dict(questions(made))
        assert answers[f"which way does the {thing.colour} {thing.shape} move"] == made.direction
        assert answers["what colour is the thing that moves"] == thing.colour
        assert answers["how many things are there"] == str(len(made.scene.things))
        assert set(answers.values()) <= set(ANSWERS)
        for question, answer in answers.items():
            if question.startswith("does something move"):
                assert (question.split()[-1] == made.direction) == (answer == "yes")
            elif question.startswith("does the"):
                assert (f"{thing.colour} {thing.shape}" in question) == (answer == "yes")
    tokenizer = Tokenizer.load("world")
    answer = [text for made in CLIPS for text in captions(made)] + [q for made in CLIPS for q, _ in questions(made)]
    assert tokenizer.unknown_rate([*answer, *ANSWERS]) == 0


def test_held_out_looks_stay_held_out():
    for made in CLIPS:
        assert not any((t.colour, t.shape) in HELD_OUT for t in made.scene.things)
    made = clip(0, 1, "composition")
    assert any((t.colour, t.shape) in HELD_OUT for t in made.scene.things)


def test_files(tmp_path):
    pytest.importorskip("av", reason="needs the extra `video`")
    from blip.data.clips import read_frames
    from eval.clips import read_clips, read_questions

    first, second = write(tmp_path / "a", count=3, length=9), write(tmp_path / "b", count=3, length=9)
    videos = sorted((tmp_path / "a/videos").iterdir())
    assert len(videos) == 3
    for path in videos:
        assert path.read_bytes() == (tmp_path / "b/videos" / path.name).read_bytes()
    for ours, again in zip(first, second, strict=True):
        assert ours.read_bytes() == again.read_bytes()
    clips = read_clips(first[0], tmp_path / "a/videos", "test")
    assert [item.id for item in clips] == [clip(0, i, "test").video_id for i in range(3)]
    assert clips[1].captions == captions(clip(0, 1, "test"))
    same, read_back = read_questions(first[1], tmp_path / "a/videos")
    assert [item.id for item in same] == [item.id for item in clips]
    assert [(q.question, q.answer) for q in read_back if q.clip == 2] == questions(clip(0, 2, "test"))
    drawn = frames(clip(0, 1, "test"), 9)
    for frame, wanted in zip(read_frames(clips[1].file, 9, 10**6), drawn, strict=True):
        assert np.abs(np.asarray(frame).astype(int) - np.asarray(wanted)).mean() < 6
    with pytest.raises(FileExistsError, match="--overwrite true"):
        write(tmp_path / "a", count=3)
    with pytest.raises(ValueError, match="even number"):
        write(tmp_path / "c", size=63)
    assert not list((tmp_path / "a").glob(".writing*"))
    assert json.loads(first[0].read_text())["sentences"][0]["sen_id"] == 0
