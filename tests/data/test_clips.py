"""Frames of videos against decoding everything, videos that nobody vouches for, and lists of clips."""

import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

av = pytest.importorskip("av", reason="needs the extra `video`")

from blip.data.clips import UnreadableClip, read_frames, wanted  # noqa: E402
from blip.errors import DataError  # noqa: E402
from eval.clips import batches, read_clips, read_questions  # noqa: E402

LIMIT = 10**8


def encode(path, count=20, size=(32, 24), codec="mpeg4", gap=1000, **options):
    """A clip whose frame n is of grey 10 n."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = size
        stream.pix_fmt, stream.gop_size, stream.bit_rate = "yuv420p", gap, 10**6
        for n in range(count):
            frame = av.VideoFrame.from_image(Image.new("RGB", size, (10 * n % 256,) * 3))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def greys(frames):
    return [round(float(np.asarray(frame).mean())) for frame in frames]


def test_which_frames():
    assert wanted(8, 8) == list(range(8))
    assert wanted(100, 8) == [0, 12, 25, 37, 50, 62, 75, 87]
    # As numpy.arange(0, 100, 100 / 8) of the original, rounded down.
    assert wanted(100, 8) == np.arange(0, 100, 100 / 8).astype(int).tolist()
    assert wanted(3, 8) == [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "mov"])
def test_evenly_spaced_frames(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    encode(path)
    frames = read_frames(path, 5, LIMIT)
    assert [frame.size for frame in frames] == [(32, 24)] * 5
    assert greys(frames) == pytest.approx([0, 40, 80, 120, 160], abs=4)
    assert greys(read_frames(path, 40, LIMIT))[:4] == pytest.approx([0, 0, 10, 10], abs=4)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_far_frames_are_sought_and_are_the_same(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"a.{suffix}"
    encode(path, 400, gap=10)
    frames = read_frames(path, 3, LIMIT)
    with av.open(str(path)) as container:
        every = [frame.to_image() for frame in container.decode(video=0)]
    for frame, number in zip(frames, wanted(400, 3), strict=True):
        assert np.array_equal(np.asarray(frame), np.asarray(every[number]))
    monkeypatch.setattr("blip.data.clips._JUMP", 10**9)
    assert [np.asarray(frame).tobytes() for frame in read_frames(path, 3, LIMIT)] == [
        np.asarray(frame).tobytes() for frame in frames
    ]


def test_real_clips(real_data):
    """All codecs; those with a rotation are turned upright."""
    folder = real_data / "clips"
    sizes = {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".mp4", ".mov", ".mkv", ".avi")):
        if path.name == "corrupted.mp4":
            with pytest.raises(UnreadableClip, match="cannot be decoded: Invalid data"):
                read_frames(path, 8, LIMIT)
            continue
        frames = read_frames(path, 4, LIMIT)
        sizes[path.name] = frames[0].size
        with av.open(str(path)) as container:
            every = [frame.to_image() for frame in container.decode(video=0)]
        turned = {"video_90.mov": -90, "video_180.mov": 180, "video_270.mov": 90}.get(path.name, 0)
        for frame, number in zip(frames, wanted(len(every), 4), strict=True):
            assert np.array_equal(np.asarray(frame), np.asarray(every[number].rotate(turned, expand=True))), path.name
    assert len(sizes) == 21
    assert sizes["video_0.mov"] == sizes["video_180.mov"] == sizes["video_90.mov"][::-1] == sizes["video_270.mov"][::-1]


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def sound(path):
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


BROKEN = {
    "gone": (lambda p: p.unlink(), "no such file"),
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "a page": (lambda p: p.write_bytes(b"<html>not found</html>" * 50), "cannot be decoded"),
    "cut in its table": (lambda p: cut(p, 0.5), "cannot be decoded|has no images"),
    "sound": (sound, "has no images: it is sound"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "Is a directory|not a regular file"),
    "a pipe": (lambda p: (p.unlink(), os.mkfifo(p)), "not a regular file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_says_why(tmp_path, name):
    path = tmp_path / "a.mp4"
    encode(path)
    spoil, message = BROKEN[name]
    spoil(path)
    with pytest.raises(UnreadableClip, match=message):
        read_frames(path, 4, LIMIT)


LEADING_ON = {
    "a.mp4": "ffconcat version 1.0\nfile 'other.mkv'\n",
    "a.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nother.ts\n#EXT-X-ENDLIST\n",
}


@pytest.mark.parametrize("name", LEADING_ON)
def test_a_file_cannot_make_another_be_opened(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for other in ("other.mkv", "other.ts"):
        encode(tmp_path / other)
    (tmp_path / name).write_text(LEADING_ON[name])
    with av.open((tmp_path / name).open("rb")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 20, "the test needs lists that FFmpeg would follow"
    with pytest.raises(UnreadableClip, match="cannot be decoded"):
        read_frames(tmp_path / name, 4, LIMIT)


def test_a_clip_that_is_cut_short_is_refused(tmp_path):
    """Where the table stands before the images, so that it can be opened."""
    path = tmp_path / "a.avi"
    encode(path)
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"movi") + 400])
    with pytest.raises(UnreadableClip, match=r"is cut short|cannot be decoded|has no frames"):
        read_frames(path, 4, LIMIT)


def test_large_frames_are_refused_unread(tmp_path):
    encode(tmp_path / "a.mp4", 3, size=(64, 64))
    with pytest.raises(UnreadableClip, match="64 x 64 pixels by its header, more than the limit of 4,000"):
        read_frames(tmp_path / "a.mp4", 4, 4000)


def test_without_pyav_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"videos need PyAV .*pip install 'av>=14'"):
        read_frames(tmp_path / "a.mp4", 4, LIMIT)


# Lists


@pytest.fixture
def root(tmp_path):
    (tmp_path / "videos").mkdir()
    for n in (1, 2, 7):
        encode(tmp_path / f"videos/video{n}.mp4", 3)
    return tmp_path


MSRVTT = {
    "info": {},
    "videos": [
        {"video_id": "video1", "split": "train", "id": 1},
        {"video_id": "video2", "split": "test", "id": 2},
        {"video_id": "video7", "split": "test", "id": 7},
    ],
    "sentences": [
        {"video_id": "video7", "caption": "a cat", "sen_id": 0},
        {"video_id": "video2", "caption": "a dog", "sen_id": 1},
        {"video_id": "video1", "caption": "a bird", "sen_id": 2},
        {"video_id": "video7", "caption": "the cat", "sen_id": 3},
    ],
}
LISTS = {
    "msrvtt.json": (json.dumps(MSRVTT), "test", {"video2": ["a dog"], "video7": ["a cat", "the cat"]}),
    "blip.jsonl": (
        '{"clip_name": "video7.mp4", "retrieval_key": "ret0", "caption": "a cat"}\n'
        '{"clip_name": "video2", "caption": "a dog"}\n{"clip_name": "video7.mp4", "caption": "the cat"}\n',
        None,
        {"video7.mp4": ["a cat", "the cat"], "video2": ["a dog"]},
    ),
    "msvd.json": (
        '[{"video": "video1.mp4", "caption": ["a", "b"]}, {"video": "video2.mp4", "caption": "c"}]',
        None,
        {"video1.mp4": ["a", "b"], "video2.mp4": ["c"]},
    ),
    "jsfusion.csv": ("key,vid_key,video_id,sentence\nret0,msr7,video7,a cat\n", None, {"video7": ["a cat"]}),
    "of a table program.csv": ("\ufeffvideo_id,sentence\nvideo7,a cat\n", None, {"video7": ["a cat"]}),
    "numbers.json": ('[{"video_id": 7, "caption": "a cat"}]', None, {7: ["a cat"]}),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists(root, name):
    content, split, expected = LISTS[name]
    (root / name).write_text(content)
    clips = read_clips(root / name, root / "videos", split)
    assert {clip.id: clip.captions for clip in clips} == expected
    assert all(clip.file.is_file() for clip in clips)


WRONG = {
    "no video": ('[{"caption": "x"}]', None, "row 0 names no video"),
    "no caption": ('[{"video": "video1.mp4"}]', None, "row 0 has no caption"),
    "not there": (
        '[{"video": "video3", "caption": "x"}]',
        None,
        "video 'video3' does not exist; looked for .*video3.mp4",
    ),
    "a way out": ('[{"video": "../../etc/passwd", "caption": "x"}]', None, "video '../../etc/passwd' is outside"),
    "an address": ('[{"video": "http://x/a.mp4", "caption": "x"}]', None, "is an address"),
    "no such split": (json.dumps(MSRVTT), "val", "no clips of split 'val'"),
    "no splits": ('[{"video": "video1", "caption": "x"}]', "val", "has no 'split'"),
    "sentence": ('{"videos": [{"video_id": "video1"}], "sentences": [{"video_id": "video1"}]}', None, "no caption"),
    "not JSON": ("{", None, "list.json"),
    "empty": ("[]", None, "no clips"),
}


@pytest.mark.parametrize("name", WRONG)
def test_lists_that_will_not_do_are_one_line(root, name):
    content, split, message = WRONG[name]
    (root / "list.json").write_text(content)
    with pytest.raises(DataError, match=message) as error:
        read_clips(root / "list.json", root / "videos", split)
    assert "\n" not in str(error.value)


def test_a_link_may_not_lead_out(root):
    (root / "secret.mp4").write_bytes(b"x")
    (root / "videos/link.mp4").symlink_to(root / "secret.mp4")
    (root / "list.json").write_text('[{"video": "link", "caption": "x"}]')
    with pytest.raises(DataError, match="is a link that leads outside"):
        read_clips(root / "list.json", root / "videos")


def test_questions(root):
    rows = [{"video_id": v, "question": f"what {i}?", "answer": "cat", "id": 9 - i} for i, v in enumerate((7, 2, 7))]
    (root / "qa.json").write_text(json.dumps(rows))
    clips, questions = read_questions(root / "qa.json", root / "videos")
    assert [clip.id for clip in clips] == [7, 2]
    assert [(q.id, q.clip, q.question, q.answer) for q in questions] == [
        (9, 0, "what 0?", "cat"),
        (8, 1, "what 1?", "cat"),
        (7, 0, "what 2?", "cat"),
    ]
    (root / "qa.json").write_text('[{"video_id": 7, "question": "x"}]')
    with pytest.raises(DataError, match="row 0 has no question and answer"):
        read_questions(root / "qa.json", root / "videos")


def test_batches_are_in_order_and_name_what_fails(root):
    (root / "list.json").write_text(json.dumps([{"video": f"video{n}", "caption": "x"} for n in (1, 2, 7)]))
    clips = read_clips(root / "list.json", root / "videos")
    parts = list(batches(clips, [2, 0, 1], 2, 2, 16))
    assert [tuple(part.shape) for part in parts] == [(2, 2, 3, 16, 16), (1, 2, 3, 16, 16)]
    (root / "videos/video2.mp4").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match=r"video2.mp4 cannot be evaluated: cannot be decoded"):
        list(batches(clips, [0, 1, 2], 1, 2, 16))
