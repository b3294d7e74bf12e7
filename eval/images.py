"""Images to caption, with their ids and references. S image side in pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from blip.data.ahead import read_ahead
from blip.data.formats.sources import format_of, open_source, record, root_of_list, shard_files, shown_config
from blip.data.images import model_input
from blip.data.settings import DataConfig, SourceConfig
from blip.data.transforms import EvalTransform
from blip.errors import BadSample, DataError
from eval.references import ImageCaptions, ImageId, read_references

T = TypeVar("T")


class Images:
    """Images by number. Nothing is left out silently: DataError that names what cannot be read."""

    def __init__(
        self, entries: Sequence[ImageCaptions], load: Callable[[int], bytes | Path | Image.Image], where: str
    ) -> None:
        self.entries, self._load, self.where = list(entries), load, where

    @classmethod
    def open(cls, config: SourceConfig, limit: int | None = None, remote: bool = False) -> Images:
        """The first `limit` images of a source, each once; with `remote`, it may be behind addresses.

        An image's id is the file's (`eval.references`), or in a source without ids, such as shards, the row's key.
        """
        if format_of(config, remote) != "json":
            return cls._of_rows(config, limit, remote)
        files = shard_files(config.path, "json", remote)
        config = shown_config(config)
        entries: list[ImageCaptions] = []
        roots: list[Path] = []
        for file in files:
            listed = read_references(file, config.split, config.image_column, config.caption_column)
            entries += listed
            roots += [root_of_list(config, file)] * len(listed)
        seen: set[ImageId] = set()
        for entry in entries:
            if entry.id in seen:
                raise DataError(f"source {config.path}: image {entry.id} is in more than one of its files")
            seen.add(entry.id)

        def load(row: int) -> bytes | Path | Image.Image:
            return record(str(entries[row].id), entries[row].image, "", roots[row]).image

        return cls(entries[:limit], load, config.path)

    @classmethod
    def _of_rows(cls, config: SourceConfig, limit: int | None, remote: bool) -> Images:
        source, config = open_source(config, remote), shown_config(config)
        count = len(source) if limit is None else min(limit, len(source))
        try:
            entries = [ImageCaptions(source.key(row), source[row].captions) for row in range(count)]
        except BadSample as error:
            raise DataError(f"source {config.path} cannot be evaluated: {error}") from None
        return cls(entries, lambda row: source[row].image, config.path)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def references(self) -> dict[ImageId, list[str]]:
        """Captions by image."""
        return {entry.id: entry.captions for entry in self.entries}

    def only(self, ids: Sequence[ImageId]) -> Images:
        """The images of some ids, in the order of `ids`; unknown ids are left out."""
        rows = {entry.id: row for row, entry in enumerate(self.entries)}
        chosen = [rows[name] for name in ids if name in rows]
        return Images([self.entries[row] for row in chosen], lambda i: self._load(chosen[i]), self.where)

    def image(self, row: int) -> Image.Image:
        """The stored image in RGB."""
        return self._made(row, lambda image: image)

    def _made(self, row: int, transform: Callable[[Image.Image], T]) -> T:
        entry = self.entries[row]
        try:
            return model_input(self._load(row), DataConfig.max_pixels, transform)
        except BadSample as error:
            at = f" ({entry.image})" if entry.image and entry.image != entry.id else ""
            raise DataError(f"source {self.where}: image {entry.id}{at} cannot be evaluated: {error}") from None

    def batches(
        self, rows: Sequence[int], size: int, image_size: int, threads: int = 2
    ) -> Iterator[tuple[list[ImageId], Tensor]]:
        """Ids and normalised images (up to `size`, 3, S, S) of some rows in order; threads decode a little ahead."""
        transform = EvalTransform(image_size)

        def read(row: int) -> tuple[ImageId, Tensor]:
            return self.entries[row].id, self._made(row, transform)

        for decoded in read_ahead(rows, size, read, threads):
            ids, images = zip(*decoded, strict=True)
            yield list(ids), torch.stack(images)
