"""One row of nine is at fault, in every format: each way of reading it uses the other eight and counts one bad."""

import io
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from capfilt_crawl import planned, write_tar
from PIL import Image

from blip.data.draws import Draws
from blip.data.formats.sources import open_source
from blip.data.images import decode
from blip.data.prepare.captions import PrepareCaptions
from blip.data.settings import DataConfig, SourceConfig
from blip.data.stream import CaptionShards, Stream
from blip.data.transforms import EvalTransform
from blip.errors import BadSample, DataError
from blip.objectives.batch import Bad
from blip.text import clean_caption
from capfilt.reading import Reader

GOOD, AT = 8, 5


def png(value):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def rows(fault):
    """Eight good rows, and the faulty one as the sixth."""
    good = [{"image": f"images/{i}.png", "caption": f"image {i}"} for i in range(GOOD)]
    return [*good[:AT], fault, *good[AT:]]


IMAGE, CAPTION = "images/0.png", "an image"
FAULTS = {
    "null caption": {"image": IMAGE, "caption": None},
    "number as caption": {"image": IMAGE, "caption": 3},
    "object as caption": {"image": IMAGE, "caption": {"raw": "a"}},
    "list of no texts": {"image": IMAGE, "caption": [None, 3]},
    "no caption": {"image": IMAGE},
    "null image": {"image": None, "caption": CAPTION},
    "number as image": {"image": 3, "caption": CAPTION},
    "list as image": {"image": [IMAGE], "caption": CAPTION},
    "object as image": {"image": {"path": None}, "caption": CAPTION},
    "no image": {"caption": CAPTION},
    "nothing": {},
    "empty path": {"image": "", "caption": CAPTION},
    "missing file": {"image": "images/99.png", "caption": CAPTION},
    "no image file": {"image": "images/broken.png", "caption": CAPTION},
    "folder": {"image": "images", "caption": CAPTION},
    "outside": {"image": "../0.png", "caption": CAPTION},
    "absolute": {"image": "/etc/passwd", "caption": CAPTION},
    "address": {"image": "http://127.0.0.1:9/0.png", "caption": CAPTION},
    "zero byte": {"image": "images/\0.png", "caption": CAPTION},
    "half a character": {"image": "images/\ud800.png", "caption": CAPTION},
    "long name": {"image": "x" * 5000 + ".png", "caption": CAPTION},
    "null": None,
    "number": 3,
    "text": "images/0.png",
    "list": [IMAGE, CAPTION],
}
LINES = {
    "cut off": '{"image": "images/0.png", "capt',
    "cut off before a value": '{"image": "images/0.png", "caption":',
    "garbage": "<html>",
    "trailing comma": '{"image": "images/0.png", "caption": "a"},',
    "words behind": '{"image": "images/0.png", "caption": "a"} and more',
    "byte order mark": '\ufeff{"image": "images/0.png", "caption": "a"}',
    "zero bytes": "\0" * 700,
    "endless number": '{"image": ' + "1" * 10_000 + "}",
    "nested": '{"image": ' + "[" * 100_000,
    "latin-1": b'{"image": "images/0.png", "caption": "caf\xe9"}',
}
CSV = ["empty path", "missing file", "no image file", "folder", "outside", "absolute", "address", "long name"]
PARQUET = ["null caption", "null image", *CSV]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    for i in range(GOOD):
        (folder / f"images/{i}.png").write_bytes(png(i))
    (tmp_path / "0.png").write_bytes(png(0))
    (folder / "images/broken.png").write_bytes(b"<html>")
    return folder


def write(folder, kind, case):
    path = folder / f"a.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows(FAULTS[case])))
    elif kind == "jsonl":
        fault = FAULTS.get(case)
        lines = [json.dumps(row).encode() for row in rows(fault)]
        if case in LINES:
            lines[AT] = LINES[case] if isinstance(LINES[case], bytes) else LINES[case].encode()
        path.write_bytes(b"\n".join(lines) + b"\n")
    elif kind == "csv":
        path.write_text("image,caption\n" + "".join(f"{r['image']},{r['caption']}\n" for r in rows(FAULTS[case])))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows(FAULTS[case])), path)
    else:
        fault, members = FAULTS[case], []
        for i, row in enumerate(rows(fault)):
            if i != AT or "image" in row:
                members.append((f"{i}.png", png(i)))
            members.append((f"{i}.json", json.dumps({k: v for k, v in row.items() if k == "caption"}).encode()))
        write_tar(path, members)
    return SourceConfig(str(path))


def judged(read):
    """A caption, or None where the row cannot be used."""
    try:
        record = read()
        decode(record.image, 1000)
        return clean_caption(record.captions[0], 30)
    except BadSample:
        return None


def by_number(config):
    source = open_source(config)
    return [judged(lambda row=row: source[row]) for row in range(len(source))]


def refuse():
    raise BadSample("bad")


def in_sequence(config):
    shards = CaptionShards(config)
    rows = shards.read(shards.files[0])
    return [judged(refuse if isinstance(one, Bad) else lambda one=one: one) for one in rows]


def by_capfilt(config):
    run = planned(config.path, os.path.dirname(config.path) + "/run")
    ((_, source),) = run.sources.items()
    read = list(Reader(source, run.reading, run.storage).read(0, run.rows))
    return [row.texts[0] if row.texts and row.image and row.image != b"<html>" else None for row in read]


CASES = [(kind, case) for kind in ("json", "jsonl") for case in FAULTS]
CASES += [("jsonl", case) for case in LINES] + [("csv", case) for case in CSV]
CASES += [("parquet", case) for case in PARQUET]
CASES += [("tar", c) for c in ("null caption", "number as caption", "object as caption", "no caption", "no image")]


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_one_faulty_row_costs_one_row(folder, kind, case):
    expected = [f"image {i}" for i in range(GOOD)]
    expected.insert(AT, None)
    config = write(folder, kind, case)
    assert by_number(config) == expected
    assert in_sequence(config) == expected
    assert by_capfilt(config) == expected


@pytest.mark.parametrize("case", ["null caption", "no caption", "null image", "nothing", "number", "half a character"])
def test_the_first_row_may_be_the_faulty_one(folder, case):
    good = [{"image": f"images/{i}.png", "caption": f"image {i}"} for i in range(3)]
    for path, text in (("a.json", json.dumps([FAULTS[case], *good])),
                       ("a.jsonl", "\n".join(map(json.dumps, [FAULTS[case], *good])))):  # fmt: skip
        (folder / path).write_text(text)
        config = SourceConfig(str(folder / path))
        expected = [None, "image 0", "image 1", "image 2"]
        assert by_number(config) == in_sequence(config) == by_capfilt(config) == expected
        os.rename(folder / "run", folder / f"run-{path}")


@pytest.mark.parametrize("case", LINES)
def test_the_first_line_may_be_the_broken_one(folder, case):
    line = LINES[case] if isinstance(LINES[case], bytes) else LINES[case].encode()
    good = [json.dumps({"image": f"images/{i}.png", "caption": f"image {i}"}).encode() for i in range(3)]
    (folder / "a.jsonl").write_bytes(b"\n".join([line, *good]))
    config = SourceConfig(str(folder / "a.jsonl"))
    expected = ["a"] if case == "byte order mark" else [None]  # which is where one may be
    expected += ["image 0", "image 1", "image 2"]
    assert by_number(config) == in_sequence(config) == by_capfilt(config) == expected


WRONG = {
    "image column": (
        [{"photo": "images/0.png", "caption": "a"}] * 70,
        r"no column 'image' \(it has: caption, photo\); set image_column",
    ),
    "caption column": (
        [{"image": "images/0.png", "title": "a"}] * 70,
        r"no column 'caption' \(it has: image, title\); set caption_column",
    ),
    "root": (
        [{"image": "/data/0.png", "caption": "a"}] * 70,
        r"outside .*set image_root.*; set image_column, caption_column or image_root",
    ),
    "of one row": ([{"image": "images/0.png"}], r"no column 'caption'.*; set caption_column"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_all_rows_is_said_at_the_start(folder, case, tokenizer):
    data, message = WRONG[case]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, data)))
    config = SourceConfig(str(folder / "a.jsonl"))
    with pytest.raises(DataError, match=rf"a\.jsonl.*{message}"):
        open_source(config)
    with pytest.raises(DataError, match=rf"a\.jsonl.*{message}"):
        Stream([CaptionShards(config)], PrepareCaptions(EvalTransform(16), tokenizer, DataConfig(workers=0)), 0)


def test_a_list_whose_rows_are_bad_from_some_row_on_is_left_to_the_limit(folder):
    data = [*rows({"image": IMAGE}), *[{"image": IMAGE}] * 200]
    (folder / "a.json").write_text(json.dumps(data))
    source = open_source(SourceConfig(str(folder / "a.json")))
    assert len(source) == 209
    assert source.notes == [
        f"source {folder}/a.json: 201 of 209 rows cannot be used; the first is {folder}/a.json: row 5: the row has no "
        "'caption' (it has: image)"
    ]


def test_training_replaces_such_rows_and_writes_them_down(folder, tokenizer):
    source = open_source(write(folder, "json", "null caption"))
    pairs = Draws([source], PrepareCaptions(EvalTransform(16), tokenizer, DataConfig(workers=0, max_unknown=1)), 0)
    sample = pairs[0, AT]
    assert sample.key != f"a.json:{AT}"
    assert [(bad.key, bad.reason) for bad in sample.bad] == [(f"a.json:{AT}", "the row has no caption")]


def test_a_stream_goes_on_and_says_the_same_when_it_is_started_again(folder, tokenizer):
    config, faults = write(folder, "jsonl", "cut off"), []
    for start in (0, 0, 4):
        settings = DataConfig(workers=0, max_unknown=1, shuffle_buffer=4)
        stream = Stream([CaptionShards(config)], PrepareCaptions(EvalTransform(16), tokenizer, settings), 0)
        batches = list(stream.batches(start, 8, rank=0, world=1, batch_size=4))
        assert [len(batch) for batch in batches] == [4] * 8
        faults.append({(bad.key, bad.reason) for batch in batches for bad in batch.bad})
    assert faults[0] == faults[1] == faults[2]
    assert [key for key, _ in faults[0]] == [f"a.jsonl:{AT}"]


@pytest.mark.parametrize("text", ['[{"image": "images/0.png", "caption": "a"}, {"image": ', "["])
def test_a_broken_list_is_the_fault_of_the_file(folder, text):
    (folder / "a.json").write_text(text)
    config = SourceConfig(str(folder / "a.json"))
    for read in (by_number, in_sequence, by_capfilt):
        with pytest.raises(DataError, match=r"a\.json: .*cut off"):
            read(config)
