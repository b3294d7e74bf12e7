"""The images that a Python caller hands to a model: paths, bytes, PIL images, arrays and rows of `datasets`.

S side of the model's input in pixels.
"""

from __future__ import annotations

import hashlib
import os
import reprlib
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from PIL import Image
from torch import Tensor

from blip.data.ahead import read_ahead
from blip.data.download import download
from blip.data.image_header import check_size
from blip.data.images import model_input, own_fault, read
from blip.data.settings import DataConfig
from blip.data.transforms import EvalTransform
from blip.errors import DataError, UnreadableImage

ImageInput = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | np.ndarray | Mapping[str, Any]
"""One image: a path, the bytes of a file, a PIL image, a uint8 array (H, W) or (H, W, 3 or 4), or a mapping with
`bytes` or `path`, as in `datasets`."""
Images = Iterable[ImageInput] | Tensor
"""Several images: a sequence or a column of `datasets`, or a tensor (N, 3, S, S) made by `EvalTransform`."""

_LOADING = Lock()
"""A PIL image reads its file when it is first used, and must not do so in two threads."""


class InputImage(NamedTuple):
    """An image as given, ready for a model."""

    pixels: Tensor | None
    """(3, S, S) float32; None if it could not be read."""
    key: str
    """SHA-256 that sampling is keyed by: of the encoded bytes, or of mode, size and pixels; empty if not wanted."""


def is_one(images: ImageInput | Images) -> TypeGuard[ImageInput]:
    """Whether this is a single image rather than several. ValueError, with the remedy, if it is neither."""
    if isinstance(images, np.ndarray):
        if images.ndim not in (2, 3):
            raise ValueError(f"an array {_described(images)} is not one image: give a list of images, such as [*array]")
        return True
    if isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | Image.Image | Mapping):
        return True
    if hasattr(images, "read"):
        raise ValueError(f"expected an image or several, got an open file, {reprlib.repr(images)}: give file.read()")
    if isinstance(images, Tensor) or hasattr(images, "__iter__"):
        return False
    raise ValueError(f"expected an image or several, got {reprlib.repr(images)}: {_EXPECTED}")


_EXPECTED = (
    "give a path, the bytes of a file, a PIL image, a uint8 array (H, W) or (H, W, 3), or a list of these, or a "
    "tensor (N, 3, S, S)"
)


class InputReader:
    """Read a caller's images for a model, in order and ahead of it; use it for one call."""

    def __init__(self, transform: EvalTransform, *, urls: bool = False, keyed: bool = False) -> None:
        """`urls` allows addresses to be downloaded; `keyed` asks for the keys of sampling."""
        self.transform, self.urls, self.keyed = transform, urls, keyed

    def read(self, images: ImageInput | Images, batch: int, *, skip: bool = False) -> Iterator[list[InputImage]]:
        """Yield the images in order, `batch` at a time.

        DataError names an image that cannot be read, or with `skip` its pixels are None; an address that is not allowed
        and a folder are the caller's mistakes, and raise it always. ValueError, with the remedy, for what is no image.
        """
        if isinstance(images, Tensor):
            yield from self._of_tensor(images, batch)
            return
        one = is_one(images)
        items = [images] if one else images
        count = len(items) if hasattr(items, "__len__") else None
        named = (("the image" if one else _place(number, count), item) for number, item in enumerate(items, 1))

        def read(pair: tuple[str, ImageInput]) -> InputImage:
            place, item = pair
            try:
                return self._one(item, place)
            except UnreadableImage as error:
                if skip:
                    return InputImage(None, "")
                raise DataError(f"{_name(item) or place} cannot be used: {error.reason}") from None

        yield from read_ahead(named, batch, read)

    def _of_tensor(self, images: Tensor, batch: int) -> Iterator[list[InputImage]]:
        side = self.transform.image_size
        if images.dim() != 4 or images.shape[1:] != (3, side, side) or not images.is_floating_point():
            raise ValueError(
                f"a tensor of images must be floating-point (N, 3, {side}, {side}), made by EvalTransform({side}), got "
                f"{images.dtype} {tuple(images.shape)}"
            )
        for part in images.split(batch) if len(images) else ():
            yield [InputImage(pixels, _digest("", pixels.float().cpu()) if self.keyed else "") for pixels in part]

    def _one(self, item: ImageInput, place: str) -> InputImage:
        """Read one image.

        UnreadableImage if its content cannot be used, DataError if it is none that may be given by its name, and
        ValueError if it is no image at all.
        """
        if isinstance(item, Mapping):
            item = _of_row(item, place)
        if isinstance(item, np.ndarray):
            item = _of_array(item, place)
        if isinstance(item, str | os.PathLike):
            item = self._file(os.fspath(item))
        elif isinstance(item, bytearray | memoryview):
            item = bytes(item)
        if isinstance(item, bytes):
            key = hashlib.sha256(item).hexdigest() if self.keyed else ""
        elif isinstance(item, Image.Image):
            with own_fault(), _LOADING:
                check_size(*item.size, DataConfig.max_pixels)
                item.load()
            key = _digest(f"{item.mode} {item.size}", item) if self.keyed else ""
        else:
            raise ValueError(f"{place} is {reprlib.repr(item)}: {_EXPECTED}")
        return InputImage(model_input(item, DataConfig.max_pixels, self.transform), key)

    def _file(self, path: str) -> bytes:
        if not path:
            raise UnreadableImage("missing_file", "its path is empty")
        if "://" in path:
            if not self.urls:
                remedy = "download it first, or allow it with blip.load(..., urls=True)"
                raise DataError(f"{path} cannot be used: is an address: {remedy}")
            return download(path)
        if os.path.isdir(path):
            remedy = f"give a list of its images, or run `blip caption {shlex.quote(path)}`"
            raise DataError(f"{path} cannot be used: is a folder: {remedy}")
        return read(Path(path).expanduser())


def _place(number: int, count: int | None) -> str:
    return f"image {number}" if count is None else f"image {number} of {count}"


def _name(item: ImageInput) -> str:
    """Name of an image for messages, if it has one."""
    if isinstance(item, Mapping):
        item = item.get("path") or ""
    return os.fspath(item) if isinstance(item, str | os.PathLike) else ""


def _of_row(row: Mapping[str, Any], place: str) -> bytes | str:
    """The bytes or the path of an image of `datasets` that is not decoded."""
    if not {"bytes", "path"} & set(row):
        keys = ", ".join(map(str, list(row)[:5])) or "none"
        raise ValueError(f"{place} is a mapping with the keys {keys}: give the image in it, or the column of images")
    content, path = row.get("bytes"), row.get("path")
    if content is not None and not isinstance(content, bytes | bytearray | memoryview):
        raise ValueError(f"the bytes of {place} are {reprlib.repr(content)}: give the bytes of a file")
    if content is None and not isinstance(path, str | os.PathLike):
        raise UnreadableImage("empty_file", "it has neither bytes nor a path")
    return os.fspath(path) if content is None else bytes(content)


def _of_array(array: np.ndarray, place: str) -> Image.Image:
    if array.dtype != np.uint8:
        raise ValueError(f"{place} is an array {_described(array)}: give uint8, 0 to 255")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(f"{place} is an array {_described(array)}: give (height, width) or (height, width, 3 or 4)")
    if not array.size:
        raise UnreadableImage("not_an_image", f"an array {_described(array)} has no pixels")
    return Image.fromarray(array)


def _described(array: np.ndarray) -> str:
    return f"of {array.dtype} {array.shape}"


def _digest(described: str, pixels: Image.Image | Tensor) -> str:
    content = pixels.numpy() if isinstance(pixels, Tensor) else pixels
    return hashlib.sha256(described.encode() + b"\0" + content.tobytes()).hexdigest()
