"""Decode untrusted video files to evenly spaced RGB frames, or raise one clear error. F frames.

Needs PyAV (extra `video`), which includes FFmpeg. FFmpeg gets an open file and a list of allowed
containers, so that a playlist cannot make it open other files.
"""

from __future__ import annotations

import os
import stat
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO

from PIL import Image

from blip.data.image_header import check_size
from blip.errors import BadSample, DataError, UnreadableImage
from blip.installed import remedy

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame

SUFFIXES = frozenset({"mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg", "ts", "flv", "3gp"})
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,flv"
MAX_FRAMES = 500_000
"""Most frames of a clip: some four hours."""
_JUMP = 60
"""Fewest frames between two wanted ones for which seeking a key frame pays off."""


class UnreadableClip(BadSample):
    """A video that cannot or must not be decoded."""


def read_frames(path: Path, count: int, max_pixels: int) -> list[Image.Image]:
    """`count` frames of a video: 0, n / count, 2 n / count, ... of its n frames, rounded down, as in the original.

    Upright RGB images. A clip with fewer frames shows some of them several times. `max_pixels` is checked against a
    frame's size before anything is decoded. Raises UnreadableClip, whatever the decoder raised; DataError without PyAV.
    """
    av = pyav()
    try:
        with _open(path) as file, av.open(file, options={"format_whitelist": _CONTAINERS}) as container:
            return _sampled(container, file, count, max_pixels)
    except UnreadableClip:
        raise
    except UnreadableImage as error:
        raise UnreadableClip(error.reason) from None
    except MemoryError:
        raise UnreadableClip("too little memory to decode it") from None
    except (FileNotFoundError, NotADirectoryError):
        raise UnreadableClip("no such file") from None
    except av.error.FFmpegError as error:
        raise UnreadableClip(f"cannot be decoded: {error.strerror}") from None
    except OSError as error:
        raise UnreadableClip(f"cannot be read: {error.strerror}") from None
    except Exception as error:  # PyAV raises ValueError, IndexError, ... of headers that make no sense
        raise UnreadableClip(f"{type(error).__name__}: {str(error)[:200]}") from None


def pyav() -> ModuleType:
    """Import PyAV, which reads and writes videos. DataError, with the command to install it, if it is missing."""
    try:
        return import_module("av")
    except ImportError as error:
        raise DataError(f"videos need PyAV ({error}): {remedy('video')}") from None


def wanted(frames: int, count: int) -> list[int]:
    """Indices of `count` evenly spaced frames out of `frames`, from the first on."""
    return [i * frames // count for i in range(count)]


def _open(path: Path) -> BinaryIO:
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")  # a named pipe must not block
    info = os.fstat(file.fileno())
    if stat.S_ISREG(info.st_mode) and info.st_size:
        return file
    file.close()
    raise UnreadableClip("is empty (0 bytes)" if stat.S_ISREG(info.st_mode) else "not a regular file")


def _sampled(container: InputContainer, file: BinaryIO, count: int, max_pixels: int) -> list[Image.Image]:
    if not container.streams.video:
        raise UnreadableClip("has no images: it is sound, or damaged")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    check_size(stream.codec_context.width, stream.codec_context.height, max_pixels)
    times, keys = _packets(container)
    if not times:
        raise UnreadableClip("has no frames")
    if stream.frames and len(times) < stream.frames:
        raise UnreadableClip(f"is cut short: {len(times)} of {stream.frames} frames")
    numbers = wanted(len(times), count)
    images: dict[int, Image.Image] = {}
    for number, frame in _decoded(container, sorted(set(numbers)), times, keys):
        check_size(frame.width, frame.height, max_pixels)  # which may not be that of the header
        images[number] = _upright(frame)
    lacking = [number for number in numbers if number not in images]
    if lacking:
        raise UnreadableClip(f"frame {lacking[0]} of {len(times)} cannot be decoded")
    return [images[number] for number in numbers]


def _packets(container: InputContainer) -> tuple[list[int], list[int]]:
    """Times of all frames, sorted, and the positions of key frames in that order, without decoding.

    No key frames are given, and so no seeking is done, if the container's times are not those of its frames.
    """
    packets = [p for p in container.demux(video=0) if p.size and not p.is_discard]
    if len(packets) > MAX_FRAMES:
        raise UnreadableClip(f"{len(packets):,} frames, more than the limit of {MAX_FRAMES:,}")
    times = [p.pts for p in packets]
    if container.format.name == "avi" or None in times or len(set(times)) < len(times):
        return list(range(len(packets))), []
    keys = {p.pts for p in packets if p.is_keyframe}
    times.sort()
    return times, [i for i, time in enumerate(times) if time in keys]


def _decoded(
    container: InputContainer, numbers: Sequence[int], times: Sequence[int], keys: Sequence[int]
) -> Iterator[tuple[int, VideoFrame]]:
    """Yield the frames of some numbers, in order, seeking over long gaps."""
    place = {time: i for i, time in enumerate(times)} if keys else {}
    stream = container.streams.video[0]
    container.seek(0 if not keys else times[0], stream=stream)
    frames = container.decode(stream)
    at, number = 0, 0  # of the next frame, and of the next wanted one
    while number < len(numbers):
        key = keys[bisect_right(keys, numbers[number]) - 1] if keys and keys[0] <= numbers[number] else 0
        if key > at + _JUMP:
            container.seek(times[key], stream=stream)
            frames, at = container.decode(stream), key
        frame = next(frames, None)
        if frame is None:
            return
        at = place.get(frame.pts, at)
        if at == numbers[number]:
            yield at, frame
            number += 1
        elif at > numbers[number]:  # that one was not decodable
            number += 1
            continue
        at += 1


def _upright(frame: VideoFrame) -> Image.Image:
    image = frame.to_image()
    turn = round(frame.rotation) % 360
    return image.rotate(turn, expand=True) if turn else image
