"""Clips with texts or questions, from the lists of MSR-VTT and MSVD. F frames, S image side in pixels."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blip.data.ahead import read_ahead
from blip.data.clips import SUFFIXES, read_frames
from blip.data.formats.json_rows import read_rows
from blip.data.images import own_fault
from blip.data.paths import check_name
from blip.data.settings import DataConfig
from blip.data.transforms import EvalTransform
from blip.errors import BadSample, DataError

_CAPTIONS = ("caption", "captions", "sentence", "sentences", "text")
_NAMES = ("clip_name", "video", "video_id", "image")
_EXPECTED = "expected rows of {video or clip_name or video_id, caption}, or MSR-VTT's {videos, sentences}"


@dataclass
class VideoClip:
    """A video with its human captions."""

    id: str | int
    """Name of the clip in the list."""
    file: Path
    captions: list[str] = field(default_factory=list)


class ClipQuestion(NamedTuple):
    """A question about clip `clip`, and the answer."""

    id: str | int
    clip: int
    question: str
    answer: str


def read_clips(path: Path, root: Path, split: str | None = None) -> list[VideoClip]:
    """The clips of a list, each once with all its captions, and the files that they are under `root`.

    Takes MSR-VTT's {videos, sentences} (`split` is that of its videos), and lists, lines or CSV of {video, clip_name or
    video_id, caption or sentence}. DataError names the file, the row, what was expected and a video that is not there.
    """
    clips: dict[str | int, VideoClip] = {}
    for where, name, captions in _rows(path, split):
        clip = clips.get(name) or VideoClip(name, find_file(name, root, where))
        clip.captions += captions
        clips[name] = clip
    if not clips:
        raise DataError(f"{path}: no clips" + (f" of split {split!r}" if split else ""))
    return list(clips.values())


def read_questions(path: Path, root: Path) -> tuple[list[VideoClip], list[ClipQuestion]]:
    """Questions as in MSR-VTT-QA and MSVD-QA: rows of {video_id or video, question, answer, id?}. Errors as above."""
    clips: dict[str | int, int] = {}
    files: list[VideoClip] = []
    questions: list[ClipQuestion] = []
    for number, row in read_rows(path):
        where = f"{path}: row {number}"
        name = _name(row, where)
        if not isinstance(row.get("question"), str) or not isinstance(row.get("answer"), str):
            raise DataError(f"{where} has no question and answer; expected {{video_id, question, answer}}")
        if name not in clips:
            clips[name] = len(files)
            files.append(VideoClip(name, find_file(name, root, where)))
        questions.append(ClipQuestion(row.get("id", number), clips[name], row["question"], row["answer"]))
    if not questions:
        raise DataError(f"{path}: no questions")
    return files, questions


def _rows(path: Path, split: str | None) -> Iterator[tuple[str, str | int, list[str]]]:
    """(where, clip, captions) of each row."""
    whole = _msrvtt(path)
    if whole is None:
        for number, row in read_rows(path):
            where = f"{path}: row {number}"
            if split is not None and row.get("split") != split:
                if "split" not in row:
                    raise DataError(f"{where} has no 'split', but split {split!r} was requested")
                continue
            given = next((row[key] for key in _CAPTIONS if row.get(key)), None)
            captions = [given] if isinstance(given, str) else given
            if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
                raise DataError(f"{where} has no caption; {_EXPECTED}")
            yield where, _name(row, where), captions
        return
    videos, sentences = whole
    wanted = [_name(video, f"{path}: videos[{i}]") for i, video in enumerate(videos) if _of_split(video, split)]
    known = set(wanted)
    for name in wanted:
        yield f"{path}: video {name}", name, []
    for i, sentence in enumerate(sentences):
        where = f"{path}: sentences[{i}]"
        name = _name(sentence, where)
        if not isinstance(sentence.get("caption"), str):
            raise DataError(f"{where} has no caption; {_EXPECTED}")
        if name in known:
            yield where, name, [sentence["caption"]]


def _msrvtt(path: Path) -> tuple[list, list] | None:
    """The two lists of MSR-VTT's own format; None for a file of another format."""
    try:
        whole = json.loads(path.read_bytes()) if path.suffix == ".json" else None
    except (OSError, ValueError, RecursionError):  # JSON lines, or an error that `read_rows` explains
        return None
    if isinstance(whole, dict) and isinstance(whole.get("videos"), list) and isinstance(whole.get("sentences"), list):
        return whole["videos"], whole["sentences"]
    return None


def _of_split(video: Any, split: str | None) -> bool:
    return split is None or (isinstance(video, dict) and video.get("split") == split)


def _name(row: Any, where: str) -> str | int:
    name = next((row[key] for key in _NAMES if key in row), None) if isinstance(row, dict) else None
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise DataError(f"{where} names no video; {_EXPECTED}")
    return name


def find_file(name: str | int, root: Path, where: str) -> Path:
    """The file of a clip under `root`: NAME or NAME.mp4 and the like; a number n is videoN (MSR-VTT) or vidN (MSVD)."""
    stems = [f"video{name}", f"vid{name}", str(name)] if isinstance(name, int) else [name]
    reason = check_name(stems[0], root)
    if reason:
        raise DataError(f"{where}: {reason.replace('image', 'video', 1)}")
    for stem in stems:
        for file in (root / stem, *(root / f"{stem}.{suffix}" for suffix in sorted(SUFFIXES))):
            if file.is_file():
                if not file.resolve().is_relative_to(root.resolve()):
                    raise DataError(f"{where}: video {name!r} is a link that leads outside {root}")
                return file
    expected = root / (f"{stems[0]}.mp4" if "." not in os.path.basename(stems[0]) else stems[0])
    raise DataError(
        f"{where}: video {name!r} does not exist; looked for {expected}. Set video_root to the videos' folder"
    )


def batches(
    clips: Sequence[VideoClip], rows: Sequence[int], size: int, frames: int, image_size: int, threads: int = 2
) -> Iterator[Tensor]:
    """Normalised frames (up to `size`, F, 3, S, S) of some clips in order; threads decode a little ahead.

    DataError that names a clip that cannot be read.
    """
    transform = EvalTransform(image_size)

    def read(row: int) -> Tensor:
        try:
            with own_fault():
                return torch.stack([transform(f) for f in read_frames(clips[row].file, frames, DataConfig.max_pixels)])
        except BadSample as error:
            raise DataError(f"{clips[row].file} cannot be evaluated: {error}") from None

    return map(torch.stack, read_ahead(rows, size, read, threads))
