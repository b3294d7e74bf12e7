"""Write the synthetic world in the formats of real data sets, so that the ordinary readers read it.

    python -m blip.world.files --out runs/world --format tar --count 20000 --web true
    python -m blip.world.files --out runs/world-human --format json --split test --count 200

The same settings give the same bytes. Files get their final names only once all of them are written.
"""

from __future__ import annotations

import inspect
import io
import json
import multiprocessing
import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet

from blip import options, origin
from blip.errors import DataError
from blip.progress import bar
from blip.world.scene import Dice, Split, draw, scene
from blip.world.text import NOISE, captions, description, web_text

JPEG_QUALITY = 92
BREAKS = ("truncated", "html", "empty")
"""How an image file is broken on purpose: cut in half, replaced by a web page, or empty."""
_PAGE = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body><h1>Not Found</h1></body></html>\n"

PRODUCTS = {
    "tar": ("{split}-*.tar",),
    "json": ("images/{split}", "{split}.json"),
    "imagefolder": ("{split}",),
    "parquet": ("data/{split}-*.parquet",),
}
"""Products of each format in the output folder, in the order in which they get their final names."""


@dataclass(frozen=True)
class EncodedImage:
    """One image as the bytes of its file, and its record: image_id, caption, and the truth if recorded."""

    image: bytes
    record: dict[str, Any]

    @property
    def file_name(self) -> str:
        return f"{self.record['image_id']}.jpg"


@dataclass(frozen=True)
class _Settings:
    split: str
    seed: int
    size: int
    web: bool
    noise: float
    broken: dict[int, str] = field(default_factory=dict)


def write(
    out: str | Path,
    format: Literal["tar", "json", "imagefolder", "parquet"] = "tar",
    split: Split = "train",
    count: int = 1000,
    seed: int = 0,
    size: int = 64,
    web: bool = False,
    noise: float = NOISE,
    broken: int = 0,
    shard: int = 1000,
    workers: int = 1,
    overwrite: bool = False,
) -> list[Path]:
    """Write images of the synthetic world with captions, or with noisy web texts whose truth is recorded.

    A record has `image_id` (which identifies the scene) and `caption`: five captions and a complete `description`, or
    one web text and its `kind` (right, mismatched, near_miss, vague or junk_around). If files are broken on purpose,
    `broken` says how; it is empty for intact ones. tar: shards of .jpg, .txt (one caption) and .json (the record).
    json: SPLIT.json beside images/SPLIT. imagefolder: SPLIT with a metadata.jsonl. parquet: `data/SPLIT-*.parquet` with
    the images inside.

    Args:
        out: Folder to write into; several splits may share one.
        format: tar shards, a json list, an imagefolder or parquet.
        split: train, val and test share no scene; composition shows colour-shape pairs that no other split has.
        count: Number of images.
        seed: Random seed of the scenes; another seed gives other images of the same splits.
        size: Side of the images in pixels.
        web: Give each image one noisy web text instead of five true captions.
        noise: Share of web texts that are not a right caption.
        broken: Number of images to break: cut short, replaced by a web page, or empty, in turn.
        shard: Images per tar or parquet file.
        workers: Number of processes that draw.
        overwrite: Replace what an earlier call wrote for this format and split.

    Returns:
        The files and folders written. ValueError for invalid settings, FileExistsError if a file exists.
    """
    out = Path(out)
    _check(count=count, size=size, shard=shard, workers=workers)
    if not 0 <= broken <= count:
        raise ValueError(f"broken must be 0 to count ({count}), got {broken}")
    if not 0 <= noise <= 1:
        raise ValueError(f"noise must be in [0, 1], got {noise}")
    settings = _Settings(split, seed, size, web, noise, _breaks(seed, split, count, broken))

    def fill(folder: Path) -> None:
        rows = progress(_rows(settings, count, workers), count, "images", f"{format} {split}")
        _WRITERS[format](folder, split, rows, -(-count // shard), shard)

    return publish(out, [pattern.format(split=split) for pattern in PRODUCTS[format]], fill, overwrite)


def _check(**least_one: int) -> None:
    for name, value in least_one.items():
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")


def progress(rows: Iterable[Any], total: int, unit: str, what: str) -> Iterator[Any]:
    """Yield the same rows, with a progress bar if they take more than a moment."""
    with bar(total, what, unit) as shown:
        for row in rows:
            yield row
            shown.update()


def publish(out: Path, products: Sequence[str], fill: Callable[[Path], None], overwrite: bool = False) -> list[Path]:
    """Have `fill` write into a temporary folder, then move what it wrote into `out`, in the order of `products`.

    `products` are globs of the files and folders. FileExistsError if any of them exists, unless `overwrite`.
    """

    def there(folder: Path) -> list[Path]:
        return [path for pattern in products for path in sorted(folder.glob(pattern))]

    old = there(out)
    if old and not overwrite:
        raise FileExistsError(f"{old[0]} already exists: give another --out, or --overwrite true to replace it")
    unfinished = out / f".writing-{os.getpid()}"
    unfinished.mkdir(parents=True)
    try:
        fill(unfinished)
        for path in old:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return [_publish(path, unfinished, out) for path in there(unfinished)]
    finally:
        shutil.rmtree(unfinished)


def _publish(path: Path, unfinished: Path, out: Path) -> Path:
    final = out / path.relative_to(unfinished)
    final.parent.mkdir(parents=True, exist_ok=True)
    return path.rename(final)


def _breaks(seed: int, split: str, count: int, broken: int) -> dict[int, str]:
    """Images to break, and how each is broken."""
    dice, chosen = Dice("broken", seed, split), {}
    while len(chosen) < broken:
        chosen.setdefault(dice.below(count), BREAKS[len(chosen) % len(BREAKS)])
    return chosen


# ---- rows


def _rows(settings: _Settings, count: int, workers: int) -> Iterator[EncodedImage]:
    make = partial(make_row, settings)
    if workers == 1:
        yield from map(make, range(count))
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        numbers = iter(range(count))
        # In portions: drawing must not run ahead of the disk by more than fits in memory.
        while portion := list(islice(numbers, 4096)):
            yield from pool.map(make, portion, chunksize=64)


def make_row(settings: _Settings, i: int) -> EncodedImage:
    """Image `i` with its record."""
    made = scene(settings.seed, i, settings.split)
    record: dict[str, Any] = {"image_id": made.image_id}
    if settings.web:
        record["caption"], record["kind"] = web_text(made, settings.noise)
    else:
        record["caption"] = captions(made)
        record["description"] = description(made)
    if settings.broken:
        record["broken"] = settings.broken.get(i, "")
    return EncodedImage(_break(jpeg(draw(made, settings.size)), record.get("broken", "")), record)


def jpeg(image: Any) -> bytes:
    """Encode an image as JPEG, with a comment by which training recognizes it."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0, **origin.marking("JPEG"))
    return buffer.getvalue()


def _break(image: bytes, how: str) -> bytes:
    return {"": image, "truncated": image[: len(image) // 2], "html": _PAGE, "empty": b""}[how]


# ---- formats


def _write_tar(folder: Path, split: str, rows: Iterable[EncodedImage], shards: int, shard: int) -> None:
    rows = iter(rows)
    for k in range(shards):
        with tarfile.open(folder / f"{split}-{k:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in islice(rows, shard):
                caption = row.record["caption"]
                text = caption if isinstance(caption, str) else caption[0]
                name = row.record["image_id"]
                _add(tar, f"{name}.jpg", row.image)
                _add(tar, f"{name}.txt", text.encode())
                _add(tar, f"{name}.json", json.dumps(row.record).encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _write_json(folder: Path, split: str, rows: Iterable[EncodedImage], shards: int, shard: int) -> None:
    images = folder / "images" / split
    images.mkdir(parents=True)
    records = []
    for row in rows:
        (images / row.file_name).write_bytes(row.image)
        records.append({"image": f"images/{split}/{row.file_name}", **row.record})
    lines = ",\n".join(map(json.dumps, records))
    (folder / f"{split}.json").write_text(f"[\n{lines}\n]\n")


def _write_imagefolder(folder: Path, split: str, rows: Iterable[EncodedImage], shards: int, shard: int) -> None:
    images = folder / split
    images.mkdir()
    with (images / "metadata.jsonl").open("w") as metadata:
        for row in rows:
            (images / row.file_name).write_bytes(row.image)
            metadata.write(json.dumps({"file_name": row.file_name, **row.record}) + "\n")


def _write_parquet(folder: Path, split: str, rows: Iterable[EncodedImage], shards: int, shard: int) -> None:
    (folder / "data").mkdir()
    rows = iter(rows)
    for k in range(shards):
        part = [{"image": {"bytes": row.image, "path": row.file_name}, **row.record} for row in islice(rows, shard)]
        table = pyarrow.Table.from_pylist(part, _schema(part[0]))
        pyarrow.parquet.write_table(table, folder / "data" / f"{split}-{k:05d}-of-{shards:05d}.parquet")


def _schema(row: dict[str, Any]) -> pyarrow.Schema:
    """Arrow types, with the metadata by which `datasets` recognizes the image column."""
    string = pyarrow.string()
    types = {name: string if isinstance(value, str) else pyarrow.list_(string) for name, value in row.items()}
    types["image"] = pyarrow.struct([("bytes", pyarrow.binary()), ("path", string)])
    text = {"dtype": "string", "_type": "Value"}
    features = {name: text if kind == string else {"feature": text, "_type": "List"} for name, kind in types.items()}
    features["image"] = {"_type": "Image"}
    return pyarrow.schema(list(types.items()), {"huggingface": json.dumps({"info": {"features": features}})})


_WRITERS: dict[str, Callable[[Path, str, Iterable[EncodedImage], int, int], None]] = {
    "tar": _write_tar,
    "json": _write_json,
    "imagefolder": _write_imagefolder,
    "parquet": _write_parquet,
}


def command_line(write: Callable[..., Iterable[Path]], args: list[str] | None = None) -> None:
    """Run a command whose options are the arguments of `write`; an invalid setting or folder is a one-line error."""
    program = f"python -m blip.world.{Path(inspect.getfile(write)).stem}"
    try:
        chosen = options.read(options.of_function(write), sys.argv[1:] if args is None else args, program)
        written = write(**vars(chosen))
    except (DataError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(*written, sep="\n")


def main(args: list[str] | None = None) -> None:
    """The command line."""
    command_line(write, args)


if __name__ == "__main__":
    main()
