import io
import json
import os
import re
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from capfilt_crawl import annotations, crawl, jpeg, planned, sample, scored, write_tar

from blip.data.formats.sources import open_source
from blip.data.settings import SourceConfig
from blip.data.stream import CaptionShards
from blip.errors import BadSample, DataError
from blip.objectives.batch import Bad
from capfilt.__main__ import main
from capfilt.export import export
from capfilt.reading import Reader
from capfilt.report.write import report
from capfilt.run import Run
from capfilt.select.choose import select
from capfilt.select.policies import SelectConfig


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def rows_of(run):
    readers = {s.relpath: Reader(s, run.reading, run.storage) for s in run.sources.values()}
    return [row for part in run.plan for row in readers[part.source].read(part.lo, part.hi)]


def check(run, n=5, text="image {}", keys=None):
    rows = rows_of(run)
    assert [row.image for row in rows] == [jpeg(i) for i in range(n)]
    assert [row.texts for row in rows] == [[text.format(i)] for i in range(n)]
    if keys:
        assert [row.key for row in rows] == keys
    return rows


# Tar shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tar_members_belong_together_wherever_they_are(tmp_path, form):
    """Fault 9: non-adjacent members, keys with dots, long and unicode names, upper case, folders."""
    keys = ["plain", "with.dots.v2", "n" * 180, "schön", "dir/inside", "UPPER"]
    images = [(f"{k}.JPG" if k == "UPPER" else f"{k}.jpg", jpeg(i)) for i, k in enumerate(keys)]
    texts = [(f"{k}.txt", f"text {i}".encode()) for i, k in enumerate(keys)]
    path = write_tar(tmp_path / "a.tar", [*images, ("README.md", b"no"), *reversed(texts)], form)
    check(planned(path, tmp_path / "run"), 6, "text {}", keys)


def test_hostile_names_are_keys_and_nothing_more(tmp_path):
    """Fault 7: NUL, quotes, commands and half characters in the names of members and in the keys of lists."""
    names = ["$(touch pwned)", "`id`", "a;b|c", "-rf", "'\"<b>", "pipe:x", "%s%n", "\udcff\udcfe", "a\nb"]
    members = [(f"{name}.jpg", jpeg(i)) for i, name in enumerate(names)]
    path = write_tar(tmp_path / "a.tar", members + [(f"{n}.txt", f"text {i}".encode()) for i, n in enumerate(names)])
    run = scored(path, tmp_path / "run")
    rows = annotations(run).to_pylist()
    assert [row["key"] for row in rows] == [*names[:7], "\\udcff\\udcfe", "a\nb"]
    assert {row["status"] for row in rows} == {"ok"}
    select(run, "all", SelectConfig(itm=0.0))
    account = export(run, "all", "wds", str(tmp_path / "out"))
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        assert all(re.fullmatch(r"\d{9}\.(jpg|txt|json)", name) for name in tar.getnames())
    assert account["pairs"] == 2 * len(names)
    with tarfile.open(tmp_path / "nul.tar", "w") as tar:
        member = tarfile.TarInfo("x.jpg")
        member.size, member.pax_headers = len(jpeg(0)), {"path": "a\0b.jpg"}
        tar.addfile(member, io.BytesIO(jpeg(0)))
    (tmp_path / "l.jpg").write_bytes(jpeg(1))
    (tmp_path / "l.json").write_text(json.dumps([{"image": "l.jpg", "caption": "x", "key": "a\0b"}]))
    for name in ("nul.tar", "l.json"):
        run = scored(tmp_path / name, tmp_path / f"run-{name}")
        (row,) = annotations(run).to_pylist()
        assert (row["key"], len(row["syn_text"])) == ("a\0b", 1)
        assert "\0" not in Path(report(run)).read_text()


def test_repeated_keys_are_different_samples(tmp_path, capsys):
    path = write_tar(tmp_path / "a.tar", [*sample("x", 0, "one"), *sample("x", 1, "two"), *sample("y", 2, "three")])
    run = planned(path, tmp_path / "run")
    assert [(r.key, r.texts) for r in rows_of(run)] == [("x", ["one"]), ("x#2", ["two"]), ("y", ["three"])]
    assert "KEY#2" in next(iter(run.sources.values())).notes[0]


@pytest.mark.parametrize(("column", "texts"), [("caption", ["text"]), ("alt", ["other"]), ("none", [])])
def test_the_column_of_a_tar_is_honoured(tmp_path, column, texts):
    path = write_tar(tmp_path / "a.tar", sample("a", 0, "text", {"caption": "x", "alt": "other", "none": "y"}))
    (row,) = rows_of(planned(path, tmp_path / "run", reading={"caption_column": column}))
    assert row.texts == texts


@pytest.mark.parametrize(
    ("column", "text", "extra", "has"),
    [("captoin", True, {"TEXT": "x", "url": "u"}, "TEXT, url"), ("caption", False, {"TEXT": "x"}, "TEXT"),
     ("alt", True, None, "nothing")],
)  # fmt: skip
def test_a_column_that_no_sample_of_a_tar_has_is_refused(tmp_path, column, text, extra, has):
    members = [m for m in sample("a", 0, extra=extra) if text or not m[0].endswith(".txt")]
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=rf"none has no column '{column}' \(it has: {has}\); set caption_column"):
        planned(path, tmp_path / "run", reading={"caption_column": column})
    assert planned(path, tmp_path / "run", reading={"caption_column": "none"}).rows == 1


def test_json_members_give_texts_and_extra_columns(tmp_path):
    members = [("a.jpg", jpeg(0)), ("a.json", json.dumps({"caption": ["one", "two"], "n": 3}).encode())]
    members += [("b.jpg", jpeg(1)), ("b.json", b"not json"), ("c.txt", b"no image"), ("d.jpg", jpeg(3))]
    run = planned(write_tar(tmp_path / "a.tar", members), tmp_path / "run")
    a, b, c, d = rows_of(run)
    assert (a.texts, a.extra) == (["one", "two"], {"n": 3})
    assert (b.texts, b.extra) == ([], {"json": "not json"})
    assert c.problem[:2] == ("no_image", "no_image")
    assert (d.texts, d.problem) == ([], None)


@pytest.mark.parametrize("cut", ["in an image", "in a header", "end marker"])
def test_a_torn_tar_gives_what_comes_before_the_tear(tmp_path, cut):
    """Fault 9: the readable prefix is planned, the damage said with the declared count, exit status 2."""
    folder = crawl(tmp_path / "in", shards=2, rows=20)
    path, content = folder / "00001.tar", (folder / "00001.tar").read_bytes()
    with tarfile.open(path) as tar:
        member = tar.getmembers()[30]  # the image of sample 10
    end = {"in an image": member.offset_data + 5, "in a header": member.offset + 40, "end marker": -10240}[cut]
    path.write_bytes(content[:end].rstrip(b"\0") if cut == "end marker" else content[:end])
    (folder / "00001_stats.json").write_text(json.dumps({"successes": 20}))
    args = ["plan", "--input", str(folder), "--out", str(tmp_path / "run"), "--scorer", "fake", "--part-size", "16"]
    assert main(args) == 2
    assert main([*args, "--allow-damaged"]) == 0
    readable = 20 if cut == "end marker" else 10
    run = planned(folder, tmp_path / "run")
    assert run.rows == 20 + readable
    (source,) = run.damaged()
    assert source.relpath == "00001.tar"
    assert f"readable are {readable} samples" in source.damage
    assert ("declared 20" in source.damage) == (readable < 20)
    assert main(["score", run.where, "--decode-workers", "0"]) == 2
    assert main(["score", run.where, "--allow-damaged"]) == 0
    assert len(annotations(run)) == 20 + readable


def test_empty_tars(tmp_path):
    folder = crawl(tmp_path / "in", shards=1, rows=3)
    write_tar(folder / "empty.tar", [])
    (folder / "zero.tar").write_bytes(b"")
    run = planned(folder, tmp_path / "run")
    assert run.rows == 3
    assert [s.relpath for s in run.damaged()] == ["zero.tar"]
    with pytest.raises(DataError, match="no rows"):
        planned(folder / "empty.tar", tmp_path / "other")


@pytest.mark.parametrize("kind", ["absolute", "dotdot", "symlink", "hardlink", "device"])
def test_a_tar_that_reaches_out_is_refused_whole(tmp_path, kind):
    member = tarfile.TarInfo({"absolute": "/etc/x.jpg", "dotdot": "../x.jpg"}.get(kind, "x.jpg"))
    if kind in ("symlink", "hardlink", "device"):
        member.type = {"symlink": tarfile.SYMTYPE, "hardlink": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}[kind]
        member.linkname = "/etc/passwd"
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(member, io.BytesIO())
    with pytest.raises(DataError, match=r"points outside|link or device"):
        planned(tmp_path / "a.tar", tmp_path / "run")


def test_pickles_in_tars_are_not_even_read(tmp_path):
    members = [*sample("a", 0, "image 0"), ("a.pyd", b"cos\nsystem\n"), ("a.pth", b"x"), ("a.pkl", b"x")]
    check(planned(write_tar(tmp_path / "a.tar", members), tmp_path / "run"), 1)


# Tables and lists -----------------------------------------------------------------------------------------------------


def listing(column="image", caption="caption"):
    return [{column: f"images/{i}.jpg", caption: f"image {i}", "n": i} for i in range(5)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set" / "images").mkdir(parents=True)
    for i in range(5):
        (tmp_path / "set" / "images" / f"{i}.jpg").write_bytes(jpeg(i))
    return tmp_path / "set"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json(folder, tmp_path, name):
    rows = listing()
    (folder / name).write_text(json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows)))
    rows = check(planned(folder / name, tmp_path / "run", part_size=2))
    assert [r.extra for r in rows] == [{"n": i} for i in range(5)]


def test_image_folder(folder, tmp_path):
    text = "\n".join(json.dumps({"file_name": f"images/{i}.jpg", "text": f"image {i}"}) for i in range(5))
    (folder / "metadata.jsonl").write_text(text)
    check(planned(folder, tmp_path / "run"))


def test_a_wrong_column_is_said_with_those_there_are(folder, tmp_path):
    (folder / "a.json").write_text(json.dumps(listing("photo")))
    with pytest.raises(DataError, match=r"no column 'image' \(it has: caption, n, photo\); set image_column"):
        planned(folder / "a.json", tmp_path / "run")
    check(planned(folder / "a.json", tmp_path / "run", reading={"image_column": "photo"}))
    without = planned(folder / "a.json", tmp_path / "n", reading={"image_column": "photo", "caption_column": "none"})
    assert rows_of(without)[0].texts == []


@pytest.mark.parametrize("name", ["a.csv", "A.CSV"])
def test_csv_as_spreadsheets_write_it(folder, tmp_path, name):
    rows = [f"images/{i}.jpg,image {i}" for i in range(5)]
    (folder / name).write_text("\n".join(["image,caption", *rows]), encoding="utf-8-sig")
    check(planned(folder / name, tmp_path / "run"))


@pytest.mark.parametrize("row", ["images/0.jpg,image 0,more", "images/0.jpg", 'images/0.jpg,"image 0'])
def test_a_csv_row_that_is_not_as_wide_as_its_head_refuses_the_file(folder, tmp_path, row):
    (folder / "a.csv").write_text(f"image,caption\nimages/1.jpg,image 1\n{row}\n")
    with pytest.raises(DataError, match=r"a\.csv: line 3"):
        planned(folder / "a.csv", tmp_path / "run")


def test_the_image_root_is_the_same_from_every_folder(folder, tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "a.json").write_text(json.dumps(listing()))
    monkeypatch.chdir(tmp_path)
    run = planned("lists/a.json", tmp_path / "run", reading={"image_root": "set"})
    monkeypatch.chdir("/")
    check(Run.open(run.where))
    monkeypatch.chdir(tmp_path)
    assert planned("lists/a.json", tmp_path / "run", reading={"image_root": "set"}).rows == 5


@pytest.mark.parametrize("kind", ["list", "parquet", "img2dataset"])
def test_a_column_that_was_asked_for_is_not_replaced_by_another(tmp_path, kind):
    rows = [{"key": "0", "status": "success", "image": "0.jpg", "caption": "one", "text": "another"}]
    folder = tmp_path / "set"
    (folder / "00000").mkdir(parents=True)
    if kind == "list":
        path = folder / "a.json"
        path.write_text(json.dumps(rows))
    else:
        path = folder / ("00000.parquet" if kind == "img2dataset" else "a.parquet")
        pq.write_table(pa.Table.from_pylist(rows), path)
    where = folder if kind == "img2dataset" else path
    with pytest.raises(DataError, match=r"no column 'captoin' .*set caption_column"):
        planned(where, tmp_path / "run", reading={"caption_column": "captoin"})
    assert rows_of(planned(where, tmp_path / "text", reading={"caption_column": "text"}))[0].texts == ["another"]


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("/etc/hostname", "path_refused"),
        ("../secret.jpg", "path_refused"),
        ("http://x/y.jpg", "path_refused"),
        ("link.jpg", "path_refused"),
        ("a\0b", "path_refused"),
        ("gone.jpg", "missing_file"),
        ("images", "unreadable"),
        ("fifo", "unreadable"),
    ],
)
def test_image_paths_stay_inside(folder, tmp_path, name, code):
    (tmp_path / "secret.jpg").write_bytes(jpeg(0))
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    os.mkfifo(folder / "fifo")
    (folder / "a.json").write_text(json.dumps([{"image": name, "caption": "x"}, listing()[0]]))
    bad, good = rows_of(planned(folder / "a.json", tmp_path / "run"))
    assert bad.image is None
    assert bad.problem[1] == code
    assert good.image == jpeg(0)


@pytest.mark.parametrize("kind", ["struct", "bytes", "path"])
def test_parquet(folder, tmp_path, kind):
    image = {
        "struct": lambda i: {"bytes": jpeg(i), "path": "x.jpg"},
        "bytes": jpeg,
        "path": lambda i: f"images/{i}.jpg",
    }[kind]
    rows = [{"image": image(i), "caption": f"image {i}", "n": i} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=2)
    rows = check(planned(folder / "a.parquet", tmp_path / "run", part_size=3))
    assert [r.extra for r in rows] == [{"n": i} for i in range(5)]


def test_saved_datasets(tmp_path):
    rows = [{"image": {"bytes": jpeg(i), "path": None}, "caption": f"image {i}", "n": i} for i in range(5)]
    data = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(tmp_path / "set"))
    check(planned(tmp_path / "set", tmp_path / "run", part_size=2, reading={"split": "train"}))
    with pytest.raises(DataError, match="set split to one of train, test"):
        planned(tmp_path / "set", tmp_path / "other")


# img2dataset ----------------------------------------------------------------------------------------------------------


def img2dataset_rows():
    good = [{"key": f"{i:09d}", "status": "success", "caption": f"image {i}", "url": f"http://x/{i}"} for i in range(5)]
    return [*good, {"key": "000000005", "status": "failed_to_download", "caption": "gone", "url": "http://x/5"}]


def test_img2dataset_files(tmp_path):
    folder = tmp_path / "set" / "00000"
    folder.mkdir(parents=True)
    for i in range(5):
        (folder / f"{i:09d}.jpg").write_bytes(jpeg(i))
    pq.write_table(pa.Table.from_pylist(img2dataset_rows()), tmp_path / "set" / "00000.parquet")
    (tmp_path / "set" / "00000_stats.json").write_text('{"count": 6, "successes": 5}')
    run = planned(tmp_path / "set", tmp_path / "run")
    rows = check(run)
    assert rows[3].extra["url"] == "http://x/3"
    assert "1 rows were never downloaded" in run.sources["00000.parquet"].notes[0]
    folder.rename(tmp_path / "elsewhere")  # on another disk, say
    folder.symlink_to(tmp_path / "elsewhere")
    assert all(row.image for row in check(planned(tmp_path / "set", tmp_path / "linked")))
    alt = {"caption_column": "url"}
    assert rows_of(planned(tmp_path / "set", tmp_path / "alt", reading=alt))[3].texts == ["http://x/3"]
    assert rows_of(planned(tmp_path / "set", tmp_path / "none", reading={"caption_column": "none"}))[3].texts == []
    (folder / "000000002.jpg").unlink()
    assert "1 images" in planned(tmp_path / "set", tmp_path / "other").damaged()[0].damage


def test_img2dataset_tars_and_parquet(tmp_path):
    folder = tmp_path / "set"
    write_tar(folder / "00000.tar", [m for i in range(5) for m in sample(f"{i:09d}", i, f"image {i}", {"url": "u"})])
    pq.write_table(pa.Table.from_pylist(img2dataset_rows()), folder / "00000.parquet")
    run = planned(folder, tmp_path / "run")  # the parquet beside the tar is a description, not an input
    check(run)
    assert len(run.sources) == 1
    rows = [{**row, "jpg": jpeg(i)} for i, row in enumerate(img2dataset_rows()[:5])]
    (tmp_path / "p").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p" / "00000.parquet")
    check(planned(tmp_path / "p", tmp_path / "run-p"))


def test_a_parquet_file_damaged_inside_gives_rows_that_say_so(tmp_path):
    rows = [{"image": jpeg(i), "caption": f"image {i}"} for i in range(6)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3, compression="zstd", use_dictionary=False)
    content = bytearray(path.read_bytes())
    at = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content[at : at + 60] = b"\xff" * 60
    path.write_bytes(content)
    table = annotations(scored(path, tmp_path / "run"))
    assert table["status"].to_pylist() == ["ok"] * 3 + ["source_error"] * 3


# All stacks alike -----------------------------------------------------------------------------------------------------


def by_number(path, out, split=None):
    """The captions of a row, or None for a bad one, as training reads them."""
    source, rows = open_source(SourceConfig(str(path), split=split)), []
    for row in range(len(source)):
        try:
            rows.append(source[row].captions)
        except BadSample:
            rows.append(None)
    return rows


def by_stream(path, out, split=None):
    shards = CaptionShards(SourceConfig(str(path), split=split))
    records = [r for file in shards.files for r in shards.read(file)]
    return [None if isinstance(r, Bad) else r.captions for r in records]


def by_capfilt(path, out, split=None):
    rows = rows_of(planned(path, out, reading={"split": split}))
    return [None if row.problem else row.texts for row in rows]


STACKS = pytest.mark.parametrize("read", [by_number, by_stream, by_capfilt])
WITH_SAVED = [(by_number, "dataset"), (by_capfilt, "dataset")]  # saved data sets are not streamed


def not_utf8(count, bad):
    """Strings a, b, c, ..., one of them a byte that begins no character."""
    data = bytes(0xFF if i == bad else ord("a") + i % 20 for i in range(count))
    offsets = pa.array(range(count + 1), pa.int32()).buffers()[1]
    return pa.StringArray.from_buffers(count, offsets, pa.py_buffer(data))


@STACKS
@pytest.mark.parametrize("column", ["caption", "list", "path", "struct", "other", "key"])
def test_a_value_that_is_not_utf8_costs_its_own_row_only(tmp_path, read, column):
    bad, images, letters = not_utf8(20, 7), pa.array([jpeg(i) for i in range(20)]), list("abcdefghijklmnopqrst")
    for letter in letters:
        (tmp_path / letter).write_bytes(jpeg(0))
    columns = {"image": images, "caption": letters} | {
        "caption": {"caption": bad},
        "list": {"caption": pa.ListArray.from_arrays(pa.array(range(21), pa.int32()), bad)},
        "path": {"image": bad},
        "struct": {"image": pa.StructArray.from_arrays([images, bad], ["bytes", "path"])},
        "other": {"other": bad},
        "key": {"key": bad},
    }[column]
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    lost = [] if column in ("other", "key") else [7]
    wanted = [None if i in lost else [letter] for i, letter in enumerate(letters)]
    assert read(tmp_path / "a.parquet", tmp_path / "run") == wanted


def test_a_value_that_is_not_utf8_is_said_of_its_row(tmp_path):
    table = pa.table({"image": [jpeg(i) for i in range(40)], "caption": not_utf8(40, 20), "n": list(range(40))})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(BadSample, match="column 'caption' is not UTF-8"):
        open_source(SourceConfig(str(tmp_path / "a.parquet")))[20]
    shards = CaptionShards(SourceConfig(str(tmp_path / "a.parquet")))
    (bad,) = (r for r in shards.read(shards.files[0]) if isinstance(r, Bad))
    assert (bad.key, bad.reason) == ("a.parquet:20", "column 'caption' is not UTF-8 text: invalid start byte")
    rows = annotations(scored(tmp_path / "a.parquet", tmp_path / "run")).to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * 20 + ["source_error"] + ["ok"] * 19
    assert rows[20]["error_detail"] == bad.reason
    assert json.loads(rows[20]["extra_json"]) == {"n": 20}


def test_other_columns_that_nothing_can_hold(tmp_path):
    """Dates beyond the year 9999, zones that do not exist, numbers that are none, bytes within."""
    columns = {
        "image": [jpeg(0), jpeg(1)],
        "caption": ["a", "b"],
        "late": pa.array([0, 2**62], pa.timestamp("us")),
        "zone": pa.array([0, 0], pa.timestamp("s", "Nowhere/Land")),
        "number": [1.5, float("nan")],
        "within": [{"b": b"x" * 99, "f": [float("inf")]}] * 2,
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    one, two = rows_of(planned(tmp_path / "a.parquet", tmp_path / "run"))
    within = {"b": None, "f": [None]}
    assert one.extra == {"late": "1970-01-01 00:00:00", "number": 1.5, "within": within}
    assert two.extra == {"number": None, "within": within}


def typed(column, values, kind=None):
    columns = {"image": [jpeg(i) for i in range(3)], "caption": ["a", "b", "c"], "text": ["a", "b", "c"]}
    return pa.table(columns | {column: pa.array(values, kind)})


REFUSED = {
    "images in lists": (typed("image", [[jpeg(0)]] * 3), r"'image' holds list<.*expected image bytes"),
    "numbers as images": (typed("image", [[1, 2]] * 3), "'image' holds list<.*expected image bytes"),
    "base64 in a struct": (typed("image", [{"bytes": "/9j/"}] * 3), "'image' holds struct<bytes: string>"),
    "addresses in a struct": (typed("image", [{"url": "http://x"}] * 3), "'image' holds struct<url: string>"),
    "labels": (typed("caption", [0, 1, 2]), r"'caption' holds int64; expected a string .* another column \(text\)"),
    "sentences": (
        typed("caption", [[{"raw": "a"}]] * 3),
        "'caption' holds list<.*struct<raw: string>>; expected a str",
    ),
    "languages": (typed("caption", [{"en": "a"}] * 3), "'caption' holds struct<en: string>"),
    "bytes as captions": (typed("caption", [b"a"] * 3), "'caption' holds binary"),
    "lists of lists": (typed("caption", [[["a"]]] * 3), "'caption' holds list<"),
    "dates": (typed("caption", [0] * 3, pa.timestamp("s")), "'caption' holds timestamp"),
    "wide": (
        typed("caption", [{f"c{i}": 1 for i in range(999)}] * 3),
        r"'caption' holds struct<.{70,80}\.\.\.; expected",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize(
    ("read", "kind"), [(read, "parquet") for read in (by_number, by_stream, by_capfilt)] + WITH_SAVED
)
def test_columns_of_other_types_are_refused_at_the_start(tmp_path, read, case, kind):
    table, message = REFUSED[case]
    if kind == "dataset":
        datasets.Dataset(table).save_to_disk(str(tmp_path / "a.dataset"))
    else:
        pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=rf"a\.{kind}: column {message}") as caught:
        read(tmp_path / f"a.{kind}", tmp_path / "run")
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


@STACKS
def test_a_feature_that_is_no_image_and_a_column_that_is_repeated(tmp_path, read):
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.ClassLabel(names=["cat", "dog"])})
    data = datasets.Dataset.from_dict({"image": [{"bytes": jpeg(0), "path": None}], "caption": [0]}, features)
    data.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: column 'caption' holds ClassLabel \(int64\)"):
        read(tmp_path / "a.parquet", tmp_path / "run")
    names = {"info": {"features": {"image": {"_type": "Audio"}, "caption": {"_type": "Value", "dtype": "string"}}}}
    sound = pa.table({"image": [{"bytes": b"RIFF", "path": "a.wav"}], "caption": ["a"]})
    sound = sound.replace_schema_metadata({"huggingface": json.dumps(names)})
    pq.write_table(sound, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: column 'image' holds Audio \(struct<"):
        read(tmp_path / "a.parquet", tmp_path / "run")
    twice = pa.table([[jpeg(0)], [jpeg(1)], ["a"]], ["image", "image", "caption"])
    pq.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet has 2 columns 'image': rename all but one"):
        read(tmp_path / "a.parquet", tmp_path / "run")


@STACKS
@pytest.mark.parametrize("packed", ["plain", "large", "views", "dictionary", "lists", "fixed", "struct"])
def test_all_ways_to_pack_images_and_captions(tmp_path, read, packed):
    images, texts = pa.array([jpeg(i) for i in range(3)]), pa.array(["a", "b", "c"])
    starts = pa.array(range(4), pa.int32())
    columns = {
        "plain": (images, texts),
        "large": (images.cast(pa.large_binary()), texts.cast(pa.large_string())),
        "views": (images.cast(pa.binary_view()), texts.cast(pa.string_view())),
        "dictionary": (images.dictionary_encode(), texts.dictionary_encode()),
        "lists": (images, pa.ListArray.from_arrays(starts, texts.dictionary_encode())),
        "fixed": (images, pa.FixedSizeListArray.from_arrays(texts, 1)),
        "struct": (pa.StructArray.from_arrays([images, texts.dictionary_encode()], ["bytes", "path"]), texts),
    }[packed]
    pq.write_table(pa.table(list(columns), ["image", "caption"]), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", tmp_path / "run") == [["a"], ["b"], ["c"]]


# Splits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "kind"),
    [(read, kind) for read in (by_number, by_stream, by_capfilt) for kind in ("parquet", "tar", "json")] + WITH_SAVED,
)
def test_a_split_is_refused_where_there_is_none(tmp_path, read, kind):
    """Also where a column has that name, which would be honoured by some formats and not by others."""
    path = tmp_path / f"a.{kind}"
    columns = {"image": [jpeg(0)], "caption": ["a"], "split": ["train"]}
    if kind == "tar":
        write_tar(path, sample("a", 0, "a", {"split": "train"}))
    elif kind == "parquet":
        pq.write_table(pa.table(columns), path)
    elif kind == "dataset":
        datasets.Dataset.from_dict(columns).save_to_disk(str(path))
    else:
        (tmp_path / "a.jpg").write_bytes(jpeg(0))
        path.write_text(json.dumps([{"image": "a.jpg", "caption": "a"}]))
    assert read(path, tmp_path / "all") == [["a"]]
    with pytest.raises(DataError, match=rf"a\.{kind}.* no splits; remove `split: train` and list only the files"):
        read(path, tmp_path / "run", "train")


@STACKS
@pytest.mark.parametrize("name", ["a.json", "*.jsonl", "a.csv"])
def test_lists_give_the_split_asked_for_and_name_those_there_are(tmp_path, read, name):
    splits = ["train", "val", "train", "test", "val"]
    rows = [{"image": "a.jpg", "caption": f"{split} {i}", "split": split} for i, split in enumerate(splits)]
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    if name == "a.json":
        rows.insert(0, {"image": "a.jpg", "caption": "of none"})  # a row without a split is of none
        (tmp_path / name).write_text(json.dumps(rows))
    elif name == "a.csv":
        lines = ["image,caption,split", *(",".join(row.values()) for row in rows)]
        (tmp_path / name).write_text("\n".join(lines))
    else:
        for shard, some in (("a", rows[:3]), ("b", rows[3:])):
            (tmp_path / f"{shard}.jsonl").write_text("\n".join(map(json.dumps, some)))
    path = tmp_path / name
    assert read(path, tmp_path / "val", "val") == [["val 1"], ["val 4"]]
    assert read(path, tmp_path / "two", "test+train") == [["train 0"], ["train 2"], ["test 3"]]
    for requested, missing in (("valid", "'valid'"), ("train+dev", "'dev'"), ("dev+x", "'dev' or 'x'")):
        with pytest.raises(
            DataError, match=rf"no rows of split {missing}; there are: test \(1\), train \(2\), val \(2\)"
        ):
            read(path, tmp_path / "run", requested)


@pytest.mark.parametrize("read", [by_number, by_capfilt])
def test_splits_of_saved_data_sets_and_image_folders(tmp_path, read):
    data = datasets.Dataset.from_dict({"image": [{"bytes": jpeg(0), "path": None}], "caption": ["a"]})
    data.cast_column("image", datasets.Image())
    other = datasets.Dataset.from_dict({"image": [{"bytes": jpeg(1), "path": None}], "caption": ["b"]})
    datasets.DatasetDict({"train": data, "val": other}).save_to_disk(str(tmp_path / "saved"))
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
        (tmp_path / "images" / split / "1.jpg").write_bytes(jpeg(0))
        text = "a" if split == "train" else "b"
        (tmp_path / "images" / split / "metadata.csv").write_text(f"file_name,text\n1.jpg,{text}\n")
    for name in ("saved", "images"):
        assert read(tmp_path / name, tmp_path / f"{name}-val", "val") == [["b"]]
    assert read(tmp_path / "saved", tmp_path / "two", "val+train") == [["b"], ["a"]]
    with pytest.raises(DataError, match=r"to one of train, val, got 'dev'"):
        read(tmp_path / "saved", tmp_path / "run", "dev")
    with pytest.raises(DataError, match="no splits"):
        read(tmp_path / "images", tmp_path / "run", "dev")
