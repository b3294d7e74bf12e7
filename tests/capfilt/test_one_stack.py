"""The same files through training, in order and by number, and through CapFilt: the same rows, or the same refusal."""

import json
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from capfilt_crawl import jpeg, planned, sample, write_tar

from blip.data.formats.sources import open_source
from blip.data.settings import SourceConfig
from blip.data.stream import CaptionShards
from blip.errors import BadSample, DataError
from blip.objectives.batch import Bad
from capfilt.reading import Reader

THREE = [["a 0"], ["a 1"], ["a 2"]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def entries(image="image", caption="caption", count=3, **more):
    return [{image: f"{i}.jpg", caption: f"a {i}", **more} for i in range(count)]


def lines(rows):
    return "\n".join(map(json.dumps, rows))


def table(columns, name="a.parquet"):
    def write(folder):
        pq.write_table(pa.table(columns), folder / name)

    return write


def text(name, content):
    def write(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)

    return write


def both(*writers):
    def write(folder):
        for one in writers:
            one(folder)

    return write


def metadata(name, *files):
    """Images that are called by these names, with captions that are their letters."""
    return text(name, lines([{"file_name": file, "text": file.strip("./")[0]} for file in files]))


def photos(folder):
    """Side-cars of either kind, of several captions, none, named after the stem and the file, in a subfolder."""
    (folder / "0.txt").write_text("\ufeffa 0\r\n\n a second \n")
    (folder / "1.jpg.txt").write_text("a 1")
    (folder / "1.txt").write_text("of another program")
    (folder / "2.txt").write_text(" \n")
    (folder / "x" / "0.caption").write_text("x 0")
    (folder / "y" / "y.TXT").write_bytes(b"\xff\xfe")
    (folder / "notes.txt").write_text("no image is called so")
    (folder / ".hidden.jpg").write_bytes(jpeg(0))


def odd_sidecars(folder):
    """Side-cars with the line breaks of old Macs, and in UTF-16 without a mark, whose bytes are valid UTF-8."""
    (folder / "0.txt").write_bytes(b"a 0\r a second\r")
    (folder / "1.txt").write_bytes("a 1".encode("utf-16-le"))


def shards(folder):
    for k in range(3):
        (folder / f"{k:02}.jsonl").write_text(json.dumps(entries()[k]))


def img2dataset(folder):
    (folder / "00000").mkdir()
    for i in range(3):
        os.rename(folder / f"{i}.jpg", folder / "00000" / f"{i}.jpg")
    rows = [{"key": str(i), "status": "success", "caption": f"a {i}"} for i in range(3)]
    pq.write_table(
        pa.Table.from_pylist([*rows, {"key": "3", "status": "failed", "caption": "-"}]), folder / "00000.parquet"
    )


def saved(folder):
    columns = {"image": [jpeg(0), jpeg(1)], "text": ["a", "b"]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns)}).save_to_disk(folder / "saved")


def tar(*members):
    return lambda folder: write_tar(folder / "a.tar", [m for one in members for m in one])


SPLITS = [
    {"filename": f"{i}.jpg", "sentences": [{"raw": f"a {i}"}], "split": "train" if i else "test"} for i in range(3)
]
BYTES = [jpeg(0), jpeg(1)]
NO_SPLIT = "have no splits; remove `split: train` and list only the files to use"
# What is written, the path below the folder, the split asked for, and the rows (None: a bad one) or the refusal.
CASES = {
    "image folder": (text("metadata.csv", "file_name,text\n" + "0.jpg,a 0\n1.jpg,a 1\n2.jpg,a 2\n"), "", None, THREE),
    "captions": (
        text("a.json", json.dumps([{"image": "0.jpg", "captions": ["a"]}])),
        "a.json",
        None,
        "a.json has no column 'caption' (it has: captions, image); set caption_column",
    ),
    "text": (text("a.jsonl", lines(entries(caption="text"))), "a.jsonl", None, THREE),
    "file_name": (text("a.jsonl", lines(entries("file_name"))), "a.jsonl", None, THREE),
    "karpathy": (text("d.json", json.dumps({"images": SPLITS})), "d.json", "train", THREE[1:]),
    "karpathy, two": (text("d.json", json.dumps({"images": SPLITS})), "d.json", "train+test", THREE),
    "no captions": (
        text("a.json", json.dumps([{"image": "0.jpg", "caption": []}, *entries()[1:2], {"image": "2.jpg"}])),
        "a.json",
        None,
        [None, ["a 1"], None],
    ),
    "parquet, text": (table({"image": BYTES, "text": ["a", "b"]}), "a.parquet", None, [["a"], ["b"]]),
    "parquet, split": (
        table({"image": BYTES, "caption": ["a", "b"], "split": ["train", "val"]}),
        "a.parquet",
        "train",
        f"a.parquet: parquet sources {NO_SPLIT}",
    ),
    "ndjson": (text("a.ndjson", lines(entries())), "", None, THREE),
    "range": (shards, "{00..02}.jsonl", None, THREE),
    "out of the root": (
        metadata("x/metadata.jsonl", "../0.jpg", "y.jpg"),
        "",
        None,
        [None, ["y"]],
    ),
    # Variants
    "jpg and TEXT": (table({"jpg": BYTES, "TEXT": ["a", "b"]}), "a.parquet", None, [["a"], ["b"]]),
    "json lines of two kinds": (
        text("a.jsonl", lines([*entries(count=1), {"file_name": "1.jpg", "text": "a 1"}, entries()[2]])),
        "a.jsonl",
        None,
        [["a 0"], None, ["a 2"]],
    ),
    "capitals": (text("A.JSONL", lines(entries())), "A.JSONL", None, THREE),
    "ndjson beside jsonl": (
        both(text("b.jsonl", lines(entries()[1:])), text("a.ndjson", lines(entries()[:1]))),
        "",
        None,
        THREE,
    ),
    "null captions first": (
        text("a.jsonl", lines([*[{"image": "0.jpg", "caption": None}] * 70, *entries(count=1)])),
        "a.jsonl",
        None,
        [None] * 70 + [["a 0"]],
    ),
    "tar, split": (tar(sample("a", 0, "a")), "a.tar", "train", f"a.tar: tar sources {NO_SPLIT}"),
    "list, split": (text("a.json", json.dumps(entries())), "a.json", "train", f"a.json: its rows {NO_SPLIT}"),
    "out of the root, list": (
        both(metadata("x/a.jsonl", "0.jpg"), metadata("y/a.jsonl", "../0.jpg", "y.jpg")),
        "{y,x}/a.jsonl",
        None,
        [None, ["y"], ["0"]],
    ),
    "metadata in either form": (
        both(text("x/metadata.csv", "file_name,text\n0.jpg,a 0\n"), metadata("y/metadata.jsonl", "y.jpg")),
        "",
        None,
        [["a 0"], ["y"]],
    ),
    "split in a folder": (text("train/metadata.csv", "file_name,text\ny.jpg,a\n"), "", "train", [["a"]]),
    "tar beside its parquet": (
        both(tar(sample("a", 0, "a")), table({"key": ["a"], "url": ["x"]})),
        "",
        None,
        [["a"]],
    ),
    "tar beside another parquet": (
        both(tar(sample("a", 0, "a")), table({"key": ["a"]}, "b.parquet")),
        "",
        None,
        "cannot tell its format (files ending in .parquet, .tar)",
    ),
    "tar, caption alone in JSON": (
        tar(
            [("a.jpg", jpeg(0)), ("a.json", b'"a dog"')],
            [("b.jpg", jpeg(1)), ("b.json", b'{"caption": ["b", "c"]}')],
            [("c.jpg", jpeg(1)), ("c.json", b"{")],
        ),
        "a.tar",
        None,
        [["a dog"], ["b", "c"], None],
    ),
    "tar, lists alone in JSON": (
        tar(
            [("a.jpg", jpeg(0)), ("a.json", b'["a dog", "a cat"]')],
            [("b.jpg", jpeg(1)), ("b.json", b'["one", null]')],
            [("c.jpg", jpeg(0)), ("c.json", b"[]")],
            [("d.jpg", jpeg(1)), ("d.json", b"[1, 2]")],
            [("e.jpg", jpeg(0)), ("e.json", b'[{"caption": "a cat"}]')],
            [("f.jpg", jpeg(1)), ("f.json", b'["of the list"]'), ("f.txt", b"of the text")],
        ),
        "a.tar",
        None,
        [["a dog", "a cat"], ["one"], None, None, None, ["of the text"]],
    ),
    "img2dataset": (img2dataset, "", None, THREE),
    "img2dataset, split": (img2dataset, "", "train", f"parquet sources {NO_SPLIT}"),
    "data set": (saved, "saved", "train", [["a"], ["b"]]),
    "data set, no split": (saved, "saved", None, "saved: set split to one of train, got None"),
    "compressed": (text("a.tar.gz", "x"), "a.tar.gz", None, "a.tar.gz is compressed"),
    "side-cars": (photos, "", None, [["a 0", "a second"], ["a 1"], None, None, ["x 0"], None, None]),
    "side-cars, odd": (odd_sidecars, "", None, [["a 0", "a second"], *[None] * 6]),
    "side-cars of a split": (text("train/y.txt", "a y"), "", "train", [["a y"]]),
    "side-cars, no split": (text("0.txt", "a"), "", "dev", "have no splits"),
    "side-cars, shared": (
        both(text("0.txt", "a"), text("0.png", "")),
        "",
        None,
        "1 side-car (0.jpg and 0.png share 0.txt): name each after its image, as 0.jpg.txt",
    ),
    "side-cars of two images": (
        both(text("0.txt", "of the other"), text("0.jpg.txt", "a 0"), text("0.png", "")),
        "",
        None,
        [["a 0"], ["of the other"], None, None, None, None, None, None],
    ),
    "side-cars beside metadata": (both(text("0.txt", "a"), metadata("metadata.jsonl", "1.jpg")), "", None, [["1"]]),
    "nothing to read": (text("a.txt", "x"), "", None, "a folder without shards"),
}


def outcome(read, path, split):
    try:
        return read(path, split)
    except DataError as error:
        return str(error)


def by_number(path, split):
    source, rows = open_source(SourceConfig(path, split=split)), []
    for row in range(len(source)):
        try:
            rows.append(source[row].captions)
        except BadSample:
            rows.append(None)
    return rows


def in_order(path, split):
    opened = CaptionShards(SourceConfig(path, split=split))
    records = [record for file in opened.files for record in opened.read(file)]
    return [None if isinstance(record, Bad) else record.captions for record in records]


def by_capfilt(path, split):
    run = planned(path, f"{path.rstrip('/')}.run".replace("*", "").replace("{", ""), reading={"split": split})
    readers = {source.relpath: Reader(source, run.reading, run.storage) for source in run.sources.values()}
    rows = [row for part in run.plan for row in readers[part.source].read(part.lo, part.hi)]
    return [row.texts if row.texts and not row.problem else None for row in rows]


@pytest.mark.parametrize("case", CASES)
def test_one_outcome(tmp_path, case):
    write, below, split, expected = CASES[case]
    folder = tmp_path / "in"
    for place in (".", "x", "y", "train"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(jpeg(i))
    (folder / "x" / "0.jpg").write_bytes(jpeg(0))
    for place in ("x", "y", "train"):
        (folder / place / "y.jpg").write_bytes(jpeg(0))
    write(folder)
    path = str(folder / below) if below else str(folder)
    outcomes = {read.__name__: outcome(read, path, split) for read in (by_number, by_capfilt)}
    streamed = outcome(in_order, path, split)
    if isinstance(streamed, list) or "streaming reads tar, parquet and jsonl shards" not in streamed:
        outcomes["in_order"] = streamed
    for name, got in outcomes.items():
        assert (expected in got) if isinstance(expected, str) else got == expected, name
    if isinstance(expected, str):  # the same words but for what the path is called
        assert len({got.replace("source ", "").replace("input ", "").split(": ")[-1] for got in outcomes.values()}) == 1
