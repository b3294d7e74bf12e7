import contextlib
import csv
import io
import json
import os
import subprocess
import sys
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from capfilt_crawl import planned
from PIL import Image

from blip.data.formats import json_rows
from blip.data.formats.json_rows import read_rows
from blip.data.formats.sources import open_source, open_sources
from blip.data.formats.tars import Shard
from blip.data.images import decode
from blip.data.paths import alternatives, check_name, contained, matching
from blip.data.settings import SourceConfig
from blip.data.stream import CaptionShards
from blip.errors import BadSample, DataError
from capfilt.reading import index_tar


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def png(value):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def red(record):
    return decode(record.image, 1000).getpixel((0, 0))[0]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    for i in range(5):
        (folder / "images" / f"{i}.png").write_bytes(png(i * 10))
    return folder


def rows(n=5, captions=lambda i: f"image {i}"):
    return [{"image": f"images/{i}.png", "caption": captions(i)} for i in range(n)]


def check(source, key, captions=lambda i: [f"image {i}"], n=5):
    assert len(source) == n
    for i in range(n):
        record = source[i]
        assert red(record) == i * 10
        assert record.captions == captions(i)
        assert record.key == source.key(i) == key(i)


@pytest.mark.parametrize("indent", [None, 2])
def test_json_list(folder, indent):
    (folder / "a.json").write_text(json.dumps(rows(), indent=indent))
    check(open_source(SourceConfig(str(folder / "a.json"))), lambda i: f"a.json:{i}")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_lines(folder, name):
    (folder / name).write_text("\n".join(map(json.dumps, rows())) + "\n\n")
    check(open_source(SourceConfig(str(folder / name))), lambda i: f"{name}:{i}")


def test_several_captions_and_other_columns(folder):
    data = [{"file": f"{i}.png", "texts": [f"a {i}", f"b {i}"]} for i in range(5)]
    (folder / "a.json").write_text(json.dumps(data))
    config = SourceConfig(
        str(folder / "a.json"), image_root=str(folder / "images"), image_column="file", caption_column="texts"
    )
    check(open_source(config), lambda i: f"a.json:{i}", lambda i: [f"a {i}", f"b {i}"])


def karpathy():
    sentences = [[{"raw": f"A {i}.", "tokens": ["a"]}, {"raw": f"B {i}."}] for i in range(5)]
    splits = ["train", "restval", "train", "val", "test"]
    images = [
        {"filename": f"{i}.png", "filepath": "images", "sentences": sentences[i], "split": splits[i], "cocoid": i}
        for i in range(5)
    ]
    return {"images": images, "dataset": "coco"}


def test_karpathys_splits(folder):
    (folder / "k.json").write_text(json.dumps(karpathy()))
    everything = open_source(SourceConfig(str(folder / "k.json")))
    check(everything, lambda i: f"k.json:{i}", lambda i: [f"A {i}.", f"B {i}."])
    train = open_source(SourceConfig(str(folder / "k.json"), split="train+restval"))
    assert [train.key(i) for i in range(len(train))] == ["k.json:0", "k.json:1", "k.json:2"]
    with pytest.raises(DataError, match="no rows of split 'dev'"):
        open_source(SourceConfig(str(folder / "k.json"), split="dev"))


def test_cocos_captions(folder):
    coco = {
        "images": [{"id": 100 + i, "file_name": f"images/{i}.png"} for i in range(5)],
        "annotations": [{"image_id": 100 + i, "caption": f"{w} {i}"} for w in "ab" for i in range(5)],
    }
    (folder / "c.json").write_text(json.dumps(coco))
    check(open_source(SourceConfig(str(folder / "c.json"))), lambda i: f"c.json:{i}", lambda i: [f"a {i}", f"b {i}"])


def coco(folder, images=range(5), annotations=range(5), name=lambda i: 100 + i, name_there=lambda i: 100 + i):
    value = {
        "images": [{"id": name(i), "file_name": f"images/{i}.png"} for i in images],
        "annotations": [{"image_id": name_there(i), "caption": f"image {i}"} for i in annotations],
    }
    (folder / "c.json").write_text(json.dumps(value))
    return SourceConfig(str(folder / "c.json"))


@pytest.mark.parametrize(("name", "name_there"), [(str, int), (int, str), (str, str), ("{:03}".format, "{:03}".format)])
def test_cocos_ids_may_be_numbers_or_texts(folder, name, name_there):
    check(open_source(coco(folder, name=name, name_there=name_there)), lambda i: f"c.json:{i}")


def test_ids_that_are_written_otherwise_are_others(folder):
    source = open_source(coco(folder, annotations=[0, 10], name=int, name_there=lambda i: "007" if i else "0"))
    assert (len(source), source[0].captions) == (5, ["image 0"])
    for row in range(1, 5):
        with pytest.raises(BadSample, match="the row has no caption"):
            source[row]
    assert "1 of 2 annotations are of no image in the file, such as image_id '007'" in source.notes[0]


def test_annotations_of_images_that_were_taken_out_are_counted(folder):
    source = open_source(coco(folder, images=range(3)))
    check(source, lambda i: f"c.json:{i}", n=3)
    note = "2 of 5 annotations are of no image in the file, such as image_id 104; left out"
    assert source.notes == [f"{folder}/c.json: {note}"]
    (planned_source,) = planned(folder / "c.json", folder.parent / "run").sources.values()
    assert planned_source.notes == (note,)
    assert CaptionShards(SourceConfig(str(folder / "c.json"))).notes == source.notes


def test_images_of_coco_that_lack_something_are_bad_rows(folder):
    value = json.loads((folder / "c.json").read_text()) if coco(folder) else None
    del value["images"][0]["file_name"], value["images"][1]["id"]
    value["images"][2], value["annotations"][3]["caption"] = None, None
    (folder / "c.json").write_text(json.dumps(value))
    source, reasons = open_source(SourceConfig(str(folder / "c.json"))), []
    for row in range(4):
        with pytest.raises(BadSample) as caught:
            source[row]
        reasons.append(caught.value.reason)
    assert reasons[:3] == ["the row has no image", "the row has no id", "the row is not an object but nothing (null)"]
    assert reasons[3].startswith("the row has no caption")
    assert source[4].captions == ["image 4"]


OTHER_COCO = {
    "of other images": ({"image_id": 7, "caption": "x"}, "none of its 1 annotations is of one of its images"),
    "boxes": ({"image_id": 100, "bbox": [1, 2, 3, 4]}, "none of its 1 annotations has a caption.*image_id, bbox"),
    "numbers": (3, "none of its 1 annotations is of one of its images; the first is 3"),
}


@pytest.mark.parametrize("case", OTHER_COCO)
def test_coco_files_that_hold_no_captions_are_refused(folder, case):
    annotation, message = OTHER_COCO[case]
    value = {"images": [{"id": 100, "file_name": "images/0.png"}], "annotations": [annotation]}
    (folder / "c.json").write_text(json.dumps(value))
    with pytest.raises(DataError, match=rf"c\.json is not COCO's caption format: {message}"):
        open_source(SourceConfig(str(folder / "c.json")))


@pytest.mark.parametrize("sentences", [None, 3, "text", [None, 3], [{"tokens": ["a"]}], [{"raw": None}]])
def test_an_image_of_karpathy_without_sentences_is_a_bad_row(folder, sentences):
    value = karpathy()
    value["images"][1]["sentences"], value["images"][2]["sentences"] = sentences, []  # both go to the ledger
    (folder / "k.json").write_text(json.dumps(value))
    source = open_source(SourceConfig(str(folder / "k.json")))
    assert [source.key(row) for row in range(len(source))] == [f"k.json:{i}" for i in range(5)]
    with pytest.raises(BadSample, match="the row has no caption: its list is empty"):
        source[2]
    if sentences == "text":
        assert source[1].captions == ["text"]
        return
    with pytest.raises(BadSample, match="the row has no caption"):
        source[1]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("column", ["caption", "text"])
def test_imagefolder(folder, kind, column):
    data = [{"file_name": f"{i}.png", column: f"image {i}"} for i in range(5)]
    with (folder / "images" / f"metadata.{kind}").open("w", newline="") as file:
        if kind == "jsonl":
            file.write("\n".join(map(json.dumps, data)))
        else:
            writer = csv.DictWriter(file, ["file_name", column])
            writer.writeheader()
            writer.writerows(data)
    for path in (folder / "images", folder):  # the folder itself, and one above
        check(open_source(SourceConfig(str(path))), lambda i: f"metadata.{kind}:{i}")
    split = open_source(SourceConfig(str(folder), format="imagefolder", split="images"))
    check(split, lambda i: f"metadata.{kind}:{i}")


def test_a_csv_file_as_spreadsheets_save_it(folder):
    lines = ["file_name,text", *(f"{i}.png,image {i}" for i in range(5))]
    (folder / "images" / "metadata.csv").write_text("\n".join(lines), encoding="utf-8-sig")  # begins with a mark
    check(open_source(SourceConfig(str(folder / "images"))), lambda i: f"metadata.csv:{i}")


def as_struct(i):
    return {"bytes": png(i * 10), "path": None}


@pytest.mark.parametrize("kind", ["bytes", "struct", "path", "hf"])
def test_parquet(folder, kind):
    value = {"bytes": lambda i: png(i * 10), "path": lambda i: f"images/{i}.png"}.get(kind, as_struct)
    columns = {"image": [value(i) for i in range(5)], "caption": [f"image {i}" for i in range(5)], "id": [0] * 5}
    if kind == "hf":
        data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        data.to_parquet(folder / "a.parquet")
    else:
        pq.write_table(pa.table(columns), folder / "a.parquet")
    check(open_source(SourceConfig(str(folder / "a.parquet"))), lambda i: f"a.parquet:{i}")


def test_parquet_shards_name_their_rows(folder):
    for shard, numbers in (("a", [0, 1]), ("b", [2, 3, 4])):
        columns = {"image": [png(i * 10) for i in numbers], "caption": [f"image {i}" for i in numbers]}
        pq.write_table(pa.table(columns), folder / f"{shard}.parquet")
    source = open_source(SourceConfig(str(folder / "*.parquet")))
    check(source, lambda i: f"a.parquet:{i}" if i < 2 else f"b.parquet:{i - 2}")


def test_paths_in_parquet_start_at_the_folder_of_their_own_file(tmp_path, monkeypatch):
    for value, name in ((10, "a"), (20, "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1 (big).png").write_bytes(png(value))
        pq.write_table(pa.table({"image": ["1 (big).png"], "caption": [name]}), tmp_path / name / "x.parquet")
    monkeypatch.chdir(tmp_path)
    source = open_source(SourceConfig("*/x.parquet"))
    assert {source[i].captions[0]: red(source[i]) for i in range(2)} == {"a": 10, "b": 20}


@pytest.mark.parametrize("kind", ["parquet", "tar", "dataset"])
def test_a_split_that_a_source_does_not_have_is_refused(folder, kind):
    columns = {"image": [png(10)], "caption": ["a"], "split": ["test"]}
    if kind == "parquet":
        pq.write_table(pa.table(columns), folder / "x.parquet")
    elif kind == "tar":
        with tarfile.open(folder / "x.tar", "w") as tar:
            add(tar, "1.png", png(10))
            add(tar, "1.txt", b"a")
    else:
        datasets.Dataset.from_dict(columns).save_to_disk(folder / "x.dataset")
    path = str(folder / f"x.{kind}")
    assert len(open_source(SourceConfig(path))) == 1
    with pytest.raises(DataError, match=r"x\..*no splits; remove `split: train`"):
        open_source(SourceConfig(path, split="train"))


def test_saved_data_sets(folder):
    columns = {"image": [as_struct(i) for i in range(5)], "caption": [[f"x {i}", f"y {i}"] for i in range(5)]}
    data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    data.save_to_disk(folder / "plain")
    check(open_source(SourceConfig(str(folder / "plain"))), lambda i: f"plain:{i}", lambda i: [f"x {i}", f"y {i}"])
    datasets.DatasetDict({"train": data, "val": data.select([0])}).save_to_disk(folder / "split")
    assert len(open_source(SourceConfig(str(folder / "split"), split="val"))) == 1
    with pytest.raises(DataError, match="set split to one of train, val"):
        open_source(SourceConfig(str(folder / "split")))


def add(tar, name, data, **attributes):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for k, v in attributes.items():
        setattr(info, k, v)
    tar.addfile(info, io.BytesIO(data))


def write_tar(path, numbers, interleaved=False, kind="txt"):
    def caption(i):
        return f"image {i}".encode() if kind == "txt" else json.dumps({"caption": f"image {i}", "n": i}).encode()

    with tarfile.open(path, "w") as tar:
        members = [(f"d/{i:03}.png", png(i * 10)) for i in numbers], [(f"d/{i:03}.{kind}", caption(i)) for i in numbers]
        pairs = [*members[0], *members[1]] if interleaved else [m for pair in zip(*members, strict=True) for m in pair]
        for name, data in pairs:
            add(tar, name, data)


def test_a_folder_of_shards_with_other_files_beside_them(folder):
    write_tar(folder / "00000.tar", range(5))
    pq.write_table(pa.table({"url": ["http://x"]}), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text("{}")
    assert len(open_source(SourceConfig(str(folder)))) == 5  # as img2dataset writes both
    (folder / "00000.parquet").rename(folder / "other.parquet")
    with pytest.raises(DataError, match=r"files ending in \.parquet, \.tar"):
        open_source(SourceConfig(str(folder)))
    assert len(open_source(SourceConfig(str(folder), format="tar"))) == 5


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kind", ["txt", "json"])
def test_tars(folder, interleaved, kind):
    write_tar(folder / "s-000.tar", [0, 1, 2], interleaved, kind)
    write_tar(folder / "s-001.tar", [3, 4], interleaved, kind)
    for path in ("s-{000..001}.tar", "s-*.tar", "."):
        source = open_source(SourceConfig(str(folder / path), format="tar"))
        check(source, lambda i: f"s-00{i // 3}.tar/d/{i:03}")


def test_names_with_dots_and_copies_are_samples_of_their_own(folder):
    """As `capfilt` calls them; only what training cannot use is missing here."""
    with tarfile.open(folder / "s.tar", "w") as tar:
        for i, (name, text) in enumerate([("v1.0", "a"), ("v1.5", "b"), ("x", "c"), ("x", "d")]):
            add(tar, f"d.e/{name}.png", png(i)), add(tar, f"d.e/{name}.txt", text.encode())
        add(tar, "d.e/x.seg.png", png(5)), add(tar, "d.e/x.boxes.json", b"{}")
        add(tar, "lone.seg.png", png(5))
    source = open_source(SourceConfig(str(folder / "s.tar")))
    keys = ["d.e/v1.0", "d.e/v1.5", "d.e/x", "d.e/x#2", "lone.seg"]
    assert [source.key(i) for i in range(len(source))] == [f"s.tar/{key}" for key in keys]
    assert [(red(source[i]), source[i].captions) for i in range(4)] == [(i, [text]) for i, text in enumerate("abcd")]
    assert index_tar(str(folder / "s.tar"))[0]["key"].to_pylist() == [*keys[:4], "d.e/x.seg", "d.e/x.boxes", keys[4]]


def test_a_column_that_is_asked_for_is_that_of_the_json(folder):
    with tarfile.open(folder / "s.tar", "w") as tar:
        add(tar, "a.png", png(0)), add(tar, "a.txt", b"text"), add(tar, "a.json", b'{"alt": "other", "caption": "x"}')
        add(tar, "b.png", png(1)), add(tar, "b.txt", b"only text")
    named = [open_source(SourceConfig(str(folder / "s.tar"), **how)) for how in ({}, {"caption_column": "alt"})]
    assert [source[0].captions for source in named] == [["text"], ["other"]]
    with pytest.raises(BadSample, match="no caption member"):
        named[1][1]
    typo = open_source(SourceConfig(str(folder / "s.tar"), caption_column="alt_text"))
    with pytest.raises(BadSample, match=r"no caption: its .json member has no 'alt_text' \(it has: alt, caption\)"):
        typo[0]


@pytest.mark.parametrize(("content", "captions"), [(b'["one", "two"]', ["one", "two"]), (b'"one"', ["one"])])
def test_a_json_member_that_is_no_object_is_the_captions_unless_a_field_of_it_is_asked_for(folder, content, captions):
    with tarfile.open(folder / "s.tar", "w") as tar:
        add(tar, "a.png", png(0)), add(tar, "a.json", content)
    plain, alt = (SourceConfig(str(folder / "s.tar"), **how) for how in ({}, {"caption_column": "alt"}))
    assert open_source(plain)[0].captions == captions
    with pytest.raises(BadSample, match=r"no caption: its \.json member is a text or a list, without 'alt'"):
        open_source(alt)[0]


def test_a_sample_that_lacks_a_member_is_bad_but_not_fatal(folder):
    with tarfile.open(folder / "s.tar", "w") as tar:
        add(tar, "a.png", png(0)), add(tar, "a.txt", b"hello")
        add(tar, "b.png", png(0))
        add(tar, "c.txt", b"hello")
        add(tar, "d.jpg", png(0)), add(tar, "d.json", b"{not json")
        add(tar, "e.jpg", png(0)), add(tar, "e.json", b'{"text": "no caption"}')
        add(tar, "f.jpg", png(0)), add(tar, "f.json", b"[" * 100_000)
        add(tar, "notes.md", b"not a sample")
    source = open_source(SourceConfig(str(folder / "s.tar")))
    assert len(source) == 6
    assert source[0].captions == ["hello"]
    reasons = []
    for row in range(1, 6):
        with pytest.raises(BadSample) as caught:
            source[row]
        reasons.append(caught.value.reason)
    assert reasons[:2] == ["no caption member", "no image member"]
    assert "not valid JSON" in reasons[2]
    assert "no caption" in reasons[3]
    assert "not valid JSON" in reasons[4]


def cut(path, size):
    data = path.read_bytes()
    path.write_bytes(data[:size])


@pytest.mark.parametrize("size", [0, 300, 1000, 3072, 3500, 9 * 512])
def test_a_truncated_tar_is_named_and_its_readable_part_used_if_allowed(folder, size):
    path = folder / "s.tar"
    write_tar(path, range(5))  # each member is 1,024 bytes with its header
    cut(path, size)
    with pytest.raises(DataError, match=r"s\.tar is not a whole tar file"):
        open_source(SourceConfig(str(path)))
    allowed = SourceConfig(str(path), allow_truncated=True)
    if size < 1024:
        with pytest.raises(DataError, match=r"s\.tar is not a whole|s\.tar: no sample has a caption"):
            open_source(allowed)
        return
    source = open_source(allowed)
    assert len(source) == (size // 1024 + 1) // 2
    assert red(source[0]) == 0


def test_compressed_tars_are_refused(folder):
    with tarfile.open(folder / "s.tar", "w:gz") as tar:
        add(tar, "a.png", png(0))
    with pytest.raises(DataError, match="unpack it"):
        open_source(SourceConfig(str(folder / "s.tar")))


HOSTILE_MEMBERS = {
    "parent": ("../../evil.png", {}),
    "absolute": ("/etc/evil.png", {}),
    "symbolic link": ("a.png", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
    "hard link": ("a.png", {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"}),
    "device": ("a.png", {"type": tarfile.CHRTYPE}),
    "pipe": ("a.png", {"type": tarfile.FIFOTYPE}),
    "file with holes": ("a.png", {"type": tarfile.GNUTYPE_SPARSE}),
}


@pytest.mark.parametrize("case", HOSTILE_MEMBERS)
def test_hostile_tar_members_are_refused(folder, case):
    name, attributes = HOSTILE_MEMBERS[case]
    with tarfile.open(folder / "s.tar", "w") as tar:
        add(tar, name, b"" if attributes else png(0), **attributes)
    with pytest.raises(DataError, match=r"points outside|link or device"):
        Shard(folder / "s.tar")


def test_pickles_in_tars_are_not_looked_at(folder, tmp_path):
    import pickle

    class Canary:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/canary",))

    with tarfile.open(folder / "s.tar", "w") as tar:
        add(tar, "a.png", png(0)), add(tar, "a.txt", b"hello")
        for suffix in ("pyd", "pth", "pickle", "npy"):
            add(tar, f"a.{suffix}", pickle.dumps(Canary()))
    assert open_source(SourceConfig(str(folder / "s.tar")))[0].captions == ["hello"]
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "spec",
    [
        "pipe:touch CANARY",
        "http://x/a.tar",
        "ssh://x/a.tar",
        "s3://b/a.tar",
        "hf://b/a.tar",
        "${HOME}/a.tar",
        "|touch C",
    ],
)
@pytest.mark.parametrize("kind", ["auto", "tar", "json", "parquet", "imagefolder", "dataset"])
def test_only_local_files_are_sources(spec, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="only local files"):
        open_source(SourceConfig(spec, format=kind))
    assert not list(tmp_path.iterdir())


HOSTILE_PATHS = ["../outside.png", "images/../../outside.png", "/etc/passwd", "pipe:cat /etc/passwd", "http://x/y.png"]


@pytest.mark.parametrize("name", [*HOSTILE_PATHS, "file:///etc/passwd", "\\\\host\\share.png", ""])
def test_image_paths_stay_in_their_folder(folder, name):
    (folder.parent / "outside.png").write_bytes(png(0))
    (folder / "a.json").write_text(json.dumps([*rows(1), {"image": name, "caption": "x"}]))
    source = open_source(SourceConfig(str(folder / "a.json")))
    assert red(source[0]) == 0
    with pytest.raises(BadSample, match=r"image .*(outside|address|not a path)"):
        source[1]
    (folder / "a.json").write_text(json.dumps([{"image": name, "caption": "x"}] * 2))
    with pytest.raises(DataError, match=r"a\.json: row 0: image .*(outside|address|not a path).*no other row"):
        open_source(SourceConfig(str(folder / "a.json")))


@pytest.mark.parametrize("name", HOSTILE_PATHS)
def test_paths_in_parquet_stay_in_their_folder(folder, name):
    (folder.parent / "outside.png").write_bytes(png(0))
    pq.write_table(pa.table({"image": [name], "caption": ["x"]}), folder / "a.parquet")
    with pytest.raises(BadSample, match=r"outside|address"):
        open_source(SourceConfig(str(folder / "a.parquet")))[0]


def test_links_are_followed_only_inside(folder):
    (folder.parent / "outside.png").write_bytes(png(70))
    (folder / "images" / "out.png").symlink_to(folder.parent / "outside.png")
    (folder / "images" / "in.png").symlink_to(folder / "images" / "3.png")
    (folder / "a.json").write_text(json.dumps([{"image": f"images/{n}.png", "caption": "x"} for n in ("in", "out")]))
    source = open_source(SourceConfig(str(folder / "a.json")))
    assert red(source[0]) == 30
    with pytest.raises(BadSample, match="link that leads outside"):
        source[1]
    data = [{"image": f"set/images/{n}.png", "caption": "x"} for n in ("in", "out")]
    (folder / "b.json").write_text(json.dumps(data))
    assert red(open_source(SourceConfig(str(folder / "b.json"), image_root=str(folder.parent)))[1]) == 70


def test_absolute_paths_are_allowed_under_the_root_that_the_user_names(folder):
    data = [{"image": str(folder / r["image"]), "caption": r["caption"]} for r in rows()]
    (folder.parent / "elsewhere").mkdir()
    path = folder.parent / "elsewhere" / "a.json"
    path.write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"row 0: .*set image_root"):
        open_source(SourceConfig(str(path)))
    for root in (folder, "/"):
        check(open_source(SourceConfig(str(path), image_root=str(root))), lambda i: f"a.json:{i}")


STRUCTURE = {
    "no file": (None, r"no such file"),
    "empty": ("", r"is empty"),
    "cut off": (json.dumps(rows())[:-20], r"row 4 is not valid JSON.*cut off"),
    "not closed": (json.dumps(rows())[:-1], r"not closed after row 4"),
    "garbage": ("hello", r"row 0 is not an object"),
    "numbers": ("[1, 2]", r"row 0: the row is not an object but 1, and no other"),
    "after the end": (json.dumps(rows()) + " {}", r"row 5 is behind the end of the list"),
    "empty list": ("[]", r"no rows"),
    "no image": (json.dumps([{"caption": "x", "url": "y"}]), r"no column 'image' \(it has: caption, url\)"),
    "no caption": (json.dumps([{"image": "images/0.png"}]), r"no column 'caption' .*set caption_column"),
    "empty captions": (json.dumps([{"image": "images/0.png", "caption": []}]), r"row 0: the row has no caption"),
    "number as caption": (json.dumps([{"image": "images/0.png", "caption": 3}]), r"row 0: .*no caption.*found 3"),
    "null image": (json.dumps([{"image": None, "caption": "x"}]), r"row 0: the row has no image"),
    "all images missing": (json.dumps([{"image": "no/0.png", "caption": "x"}]), r"none of its images.*image_root"),
    "nested": ('[{"image": ' + "[" * 100_000, r"row 0 is not valid JSON"),
    "endless number": ('[{"image": ' + "1" * 10_000 + "}]", r"row 0 is not valid JSON"),
    "latin-1": (json.dumps(rows()).encode() + b'{"image": "\xe9"}', r"not UTF-8"),
}


@pytest.mark.parametrize("case", STRUCTURE)
def test_structure_errors_stop_at_the_start_in_one_line(folder, case):
    content, message = STRUCTURE[case]
    if content is not None:
        (folder / "a.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        open_source(SourceConfig(str(folder / "a.json")))
    assert "a.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_structure_errors(folder):
    for path, message in ((folder, "a folder without"), (folder / "x.zip", "no such file|cannot tell")):
        with pytest.raises(DataError, match=message):
            open_source(SourceConfig(str(path)))
    with pytest.raises(DataError, match=r"no metadata\.jsonl"):
        open_source(SourceConfig(str(folder), format="imagefolder"))
    (folder / "a.parquet").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"a\.parquet is not readable parquet"):
        open_source(SourceConfig(str(folder / "a.parquet")))
    pq.write_table(pa.table({"img": [b""], "caption": ["x"]}), folder / "b.parquet")
    with pytest.raises(DataError, match=r"no column 'image'.*caption, img.*image_column"):
        open_source(SourceConfig(str(folder / "b.parquet")))
    with pytest.raises(DataError, match="image_root /nowhere is not a folder"):
        open_source(SourceConfig(str(folder / "b.parquet"), image_root="/nowhere"))
    with pytest.raises(DataError, match="at least one source"):
        open_sources([])


def test_missing_images_and_odd_values_are_found_at_access(folder):
    (folder / "a.json").write_text(json.dumps([*rows(2), {"image": "images/gone.png", "caption": "x"}]))
    assert open_source(SourceConfig(str(folder / "a.json")))[2].image.name == "gone.png"
    table = pa.table({"image": [png(0), None], "caption": [None, "x"]})
    pq.write_table(table, folder / "a.parquet")
    source = open_source(SourceConfig(str(folder / "a.parquet")))
    for row, what in ((0, "caption"), (1, "image")):
        with pytest.raises(BadSample, match=what):
            source[row]


def test_rows_that_cross_the_reading_blocks(tmp_path):
    data = [{"image": f"{i}.png", "caption": "ü" * (i % 4000)} for i in range(3000)]  # about 6 MB
    for indent, name in ((None, "a.json"), (1, "b.json")):
        (tmp_path / name).write_text(json.dumps(data, indent=indent, ensure_ascii=False))
        assert [row for _, row in read_rows(tmp_path / name)] == data


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("kind", ["karpathy", "coco"])
def test_a_file_of_one_object_may_be_longer_than_a_row(folder, monkeypatch, indent, kind):
    monkeypatch.setattr(json_rows, "_LONGEST", 200)
    monkeypatch.setattr(json_rows, "_CHUNK", 64)
    if kind == "coco":
        coco(folder)
        value = json.loads((folder / "c.json").read_text())
    else:
        value = karpathy()
    (folder / "c.json").write_text(json.dumps(value, indent=indent, ensure_ascii=False), encoding="utf-8-sig")
    assert len(open_source(SourceConfig(str(folder / "c.json")))) == 5
    monkeypatch.setattr(json_rows, "_WHOLE", 300)
    with pytest.raises(DataError, match=r"c\.json: one object may have 300 bytes, the file has [0-9,]+: write one row"):
        open_source(SourceConfig(str(folder / "c.json")))


def test_a_row_that_is_too_long_is_said_to_be(folder, monkeypatch):
    data = [{**row, "more": "x" * (1000 * (i == 2))} for i, row in enumerate(rows())]
    monkeypatch.setattr(json_rows, "_LONGEST", 500)
    monkeypatch.setattr(json_rows, "_CHUNK", 64)
    (folder / "a.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"a\.json: row 2 is longer than 500 characters$"):
        open_source(SourceConfig(str(folder / "a.json")))
    for at in (2, 0):
        data.insert(at, data.pop(2))
        (folder / "a.jsonl").write_text("\n".join(map(json.dumps, data)))
        source = open_source(SourceConfig(str(folder / "a.jsonl")))
        with pytest.raises(BadSample, match="the row is longer than 500 characters"):
            source[at]
        assert sorted(source[row].captions[0] for row in range(5) if row != at) == [f"image {i}" for i in (0, 1, 3, 4)]


@pytest.mark.parametrize("text", [lambda d: "".join(json.dumps(r, indent=1) for r in d),
                                  lambda d: " ".join(map(json.dumps, d)),
                                  lambda d: "\r".join(map(json.dumps, d))])  # fmt: skip
def test_objects_one_after_another_are_rows(folder, text):
    (folder / "a.json").write_text(text(rows()), newline="")
    check(open_source(SourceConfig(str(folder / "a.json"))), lambda i: f"a.json:{i}")


def test_a_syntax_error_is_found_where_it_is(folder):
    """And not at the end of a file that was read in the hope that it goes on."""
    for text in (
        '[{"image": "a" "caption": "b"}, ' + " " * 3_000_000 + "]",
        '[{"image": nul}, ' + " " * 3_000_000 + "]",
    ):
        (folder / "a.json").write_text(text)
        with pytest.raises(DataError, match=r"row 0 is not valid JSON \(.*line 1 column 1\d.*\)$"):
            open_source(SourceConfig(str(folder / "a.json")))


def cocos_own(images=118_287, captions=591_753):
    """As captions_train2017.json is written, of 92 MB."""
    more = {"license": 3, "coco_url": "http://images.example.org/train2017/0.jpg", "height": 480, "width": 640}
    there = [{"file_name": f"{i:012d}.jpg", "id": i, **more, "date_captured": "2013-11-14"} for i in range(images)]
    annotations = [
        {"image_id": k % images, "id": k, "caption": f"A clock as the wheel {k}. " * 3} for k in range(captions)
    ]
    return {"info": {}, "images": there, "annotations": annotations}


def karpathys_own(images=123_287):
    """As dataset_coco.json is written, of 139 MB."""
    tokens = ["a", "clock", "as", "a", "wheel"] * 2
    sentences = [
        [{"tokens": tokens, "raw": f"A clock as a wheel {i} {k}." * 4, "imgid": i, "sentid": k} for k in range(5)]
        for i in range(images)
    ]
    named = [{"filepath": "val2014", "filename": f"{i:012d}.jpg", "cocoid": i, "split": "train"} for i in range(images)]
    return {"images": [{**image, "sentences": s} for image, s in zip(named, sentences, strict=True)], "dataset": "coco"}


READ = """
import resource, sys
from pathlib import Path
from blip.data.formats.json_rows import read_rows
rows = list(read_rows(Path(sys.argv[1])))
print(len(rows), len(rows[-1][1]["caption"]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("make", "images", "size"), [(cocos_own, 118_287, 92), (karpathys_own, 123_287, 139)])
def test_files_of_the_size_of_cocos_are_read(tmp_path, make, images, size):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(make()))
    assert path.stat().st_size > size * 10**6
    done = subprocess.run([sys.executable, "-c", READ, path], capture_output=True, text=True, check=True)
    count, captions, mebibytes = map(int, done.stdout.split())
    assert (count, captions) == (images, 5)
    assert mebibytes < 2048


def test_half_surrogates_do_not_stop_a_file(folder):
    (folder / "a.json").write_text('[{"image": "images/0.png", "caption": "a \\ud83d dog"}]')
    assert open_source(SourceConfig(str(folder / "a.json")))[0].captions == ["a  dog"]


def test_a_large_table_is_small(folder):
    n = 200_000
    with (folder / "a.jsonl").open("w") as file:
        for i in range(n):
            file.write(f'{{"image": "images/{i % 5}.png", "caption": "a picture of thing number {i} on a table"}}\n')
    before = pa.total_allocated_bytes()
    source = open_source(SourceConfig(str(folder / "a.jsonl")))
    assert len(source) == n
    assert source[n - 1].captions == [f"a picture of thing number {n - 1} on a table"]
    assert (pa.total_allocated_bytes() - before) / n < 120
    rows_of = [v for v in vars(source).values() if isinstance(v, list | dict)]
    assert sum(map(len, rows_of)) < 10


def test_identity_tells_data_apart(folder):
    (folder / "a.json").write_text(json.dumps(rows()))
    first = open_source(SourceConfig(str(folder / "a.json"))).identity()
    assert first == open_source(SourceConfig(str(folder / "a.json"))).identity()
    (folder / "a.json").write_text(json.dumps(rows(4)))
    assert first != open_source(SourceConfig(str(folder / "a.json"))).identity()


def test_images_without_captions_are_rows_for_the_ledger(folder):
    """Wherever in the file they are, and however many there are of them."""
    data = [{"image": "images/0.png", "caption": []}] * 99 + rows(5, lambda i: [f"x {i}"] if i % 2 else [])
    (folder / "a.json").write_text(json.dumps(data))
    source = open_source(SourceConfig(str(folder / "a.json")))
    assert len(source) == 104
    assert [(source.key(r), source[r].captions) for r in (100, 102)] == [
        ("a.json:100", ["x 1"]), ("a.json:102", ["x 3"]),
    ]  # fmt: skip
    for row in (0, 98, 99, 101, 103):
        with pytest.raises(BadSample, match="the row has no caption"):
            source[row]


def test_real_photographs_and_emoji(real_data):
    photos = open_source(SourceConfig(str(real_data / "photos" / "photos.json"), caption_column="captions"))
    assert len(photos) == 236
    rows = json.loads((real_data / "photos" / "photos.json").read_text())
    without = [number for number, row in enumerate(rows) if not row.get("captions")]
    assert len(without) == 29
    for row in range(236):
        with pytest.raises(BadSample, match="no caption") if row in without else contextlib.nullcontext():
            assert photos[row].captions
    assert len(photos[0].captions) == 5
    assert decode(photos[0].image, 10**8).size == (586, 640)
    names = str(real_data / "emoji" / "names.json")
    emoji = open_source(SourceConfig(names, image_column="file", caption_column="name"))
    assert len(emoji) == 3530
    assert emoji[2].captions == ["asterisk"]
    assert decode(emoji[2].image, 10**6).size == (128, 128)


# What a user's path means ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("{a,b}/{00..02}.tar", "a/00.tar a/01.tar a/02.tar b/00.tar b/01.tar b/02.tar"),
        ("x{08..11}", "x08 x09 x10 x11"),
        ("{0..6..3}{b..a}", "0b 0a 3b 3a 6b 6a"),
        ("{2..0}", "2 1 0"),
        ("{a,{b,c}}x{{0..1},7}", "ax0 ax1 ax7 bx0 bx1 bx7 cx0 cx1 cx7"),
        ("{a}{}{", "{a}{}{"),
        ("a.tar::b{1,2}.tar", "a.tar b1.tar b2.tar"),
        ("file:///d/{a,b}.tar::file://localhost/e::file:/f", "/d/a.tar /d/b.tar /e /f"),
        ("s3://b/{1,2}.tar", "s3://b/1.tar s3://b/2.tar"),
    ],
)
def test_ranges_lists_and_file_urls(tmp_path, monkeypatch, spec, names):
    """As a shell spells braces out, and webdataset joins names by ::."""
    monkeypatch.chdir(tmp_path)
    assert alternatives(spec) == names.split()


def test_a_name_that_exists_is_no_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("[2024] {a,b}/c*/1.tar", "[2024] {a,b}/c*/2.tar", "c/3.tar", "2/3.tar", "{x,y}.tar", "a::b.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a%20b.tar").touch()
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "1.tar").touch()

    def files_of(spec):
        return [path for name in alternatives(spec) for path in matching(name)]

    both = ["[2024] {a,b}/c*/1.tar", "[2024] {a,b}/c*/2.tar"]
    assert files_of("[2024] {a,b}/*/*.tar") == files_of("[2024] {a,b}/c*/{1,2}.tar") == both
    assert files_of("{x,y}.tar") == ["{x,y}.tar"]
    assert files_of("a::b.tar") == ["a::b.tar"]
    assert files_of("[2]/*.tar") == ["2/3.tar"]  # what is no folder is a pattern
    assert files_of(f"file://{tmp_path}/a%20b/*.tar") == [f"{tmp_path}/a b/1.tar"]
    assert files_of(f"file://{tmp_path}/a%20b.tar") == [f"{tmp_path}/a%20b.tar"]
    assert files_of("no\0/*") == files_of("no") == []


@pytest.mark.parametrize(
    "spec", ["file://host/x.tar", "file:x.tar", "a.tar::http://x/b.tar", "{pipe:cat,a}.tar", "{0..9999999}"]
)
def test_what_no_file_can_be_is_refused_by_name(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.tar").touch()
    with pytest.raises(DataError, match=r"not a file of this machine|only local files|more than 1,000,000 names"):
        open_source(SourceConfig(spec, format="tar"))


@pytest.mark.parametrize("place", ["[2024] {set}", "set"])
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_sources_by_lists_urls_and_globs(tmp_path, place, kind):
    folder = tmp_path / place
    folder.mkdir()
    for name, numbers in (("a", [0, 1]), ("b", [2, 3, 4])):
        if kind == "tar":
            write_tar(folder / f"{name}.tar", numbers)
        else:
            columns = {"image": [png(i * 10) for i in numbers], "caption": [f"image {i}" for i in numbers]}
            pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    specs = [f"{folder}/*.{kind}", f"{folder}/{{a,b}}.{kind}", f"{folder}/a.{kind}::{folder}/b.{kind}"]
    for spec in (*specs, f"file://{folder}/*.{kind}".replace(" ", "%20"), str(folder)):
        source = open_source(SourceConfig(spec))
        assert [red(source[i]) for i in range(len(source))] == [0, 10, 20, 30, 40]
    with pytest.raises(DataError, match=rf"c\.{kind}: no such file"):
        open_source(SourceConfig(f"{folder}/{{a,c}}.{kind}"))
    (folder / f"c.{kind}").symlink_to(folder / "gone")
    with pytest.raises(DataError, match=rf"c\.{kind}: no such file; it is a link to .*gone"):
        open_source(SourceConfig(f"{folder}/*.{kind}"))


# Image names that data gives ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("n" * 300 + ".png", "a name may have 255 bytes"),
        ("\u00fc" * 200, "a name may have 255 bytes"),
        ("d(1)/" * 1000, "more than 4,095 bytes"),
        ("a\0b", "is not a path"),
        ("\ud800.png", "is not a path"),
        ("data:image/png;base64," + "iVBORw0KGgo" * 1000, "looks like base64"),
        ("/9j/4AAQSkZJRg" * 9000, "looks like base64"),
        ("b'" + "iVBORw0KGgo" * 100 + "'", "looks like base64"),
        ("QUJD" * 1000, "looks like base64"),
        ("../" * 500 + "x.png", "is outside"),
        ("http://x/" + "y" * 5000, "is an address"),
    ],
)
def test_no_text_is_too_odd_for_a_reason(folder, name, why):
    reason = check_name(name, folder)
    assert why in reason
    assert len(reason) < 200 + len(str(folder))
    for place in (folder, "/") if why != "is outside" else (folder,):
        with pytest.raises(BadSample, match=why):
            contained(name, place)
    if why != "is outside":  # Arrow refuses half a character by itself
        pq.write_table(pa.table({"image": [name.replace("\ud800", "\0")], "caption": ["x"]}), folder / "a.parquet")
        with pytest.raises(BadSample, match=why):
            open_source(SourceConfig(str(folder / "a.parquet")))[0]


@pytest.mark.parametrize(
    "name", ["a" * 251 + ".png", "\u00fc" * 120, "9j/iVBORw0KGgo/R0lGOD.jpg", "x" * 200 + "/" + "y" * 200]
)
def test_long_names_are_names(folder, name):
    assert contained(name, folder) == folder / name


# Parquet --------------------------------------------------------------------------------------------------------------


def test_a_cache_that_cannot_be_written_is_called_so(folder, monkeypatch):
    pq.write_table(pa.table({"image": [png(0)], "caption": ["x"]}), folder / "a.parquet")
    (folder / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "file" / "cache")  # fails for root, too
    with pytest.raises(
        DataError, match=r"a\.parquet: the cache of .*file/cache, cannot be written .*HF_DATASETS_CACHE"
    ):
        open_source(SourceConfig(str(folder / "a.parquet")))


def test_parquet_files_whose_columns_differ(folder):
    """Nulls and other columns do not matter; bytes beside paths are not read as one another."""
    one = {"image": [png(0)], "caption": pa.array([None], pa.null()), "n": [1]}
    pq.write_table(pa.table(one), folder / "a.parquet")
    pq.write_table(pa.table({"caption": ["x"], "image": pa.array([png(10)], pa.large_binary())}), folder / "b.parquet")
    source = open_source(SourceConfig(str(folder / "*.parquet")))
    assert red(source[1]) == 10
    with pytest.raises(BadSample, match="no caption"):
        source[0]
    pq.write_table(pa.table({"image": ["images/1.png"], "caption": ["x"]}), folder / "c.parquet")
    with pytest.raises(DataError, match=r"c\.parquet: column 'image' holds string, but binary in .*a\.parquet"):
        open_source(SourceConfig(str(folder / "*.parquet")))


def test_an_image_folder_with_a_link_to_another(tmp_path):
    """Metadata of a linked folder is found, so its images are used; what they may not do is lead further out."""
    for name in ("photos/own", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
        rows = [{"file_name": file, "caption": f"in {name}"} for file in ("a.png", "out.png")]
        (tmp_path / name / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / name / "out.png").symlink_to(tmp_path / "secret.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "photos" / "more").symlink_to(tmp_path / "elsewhere")
    source = open_source(SourceConfig(str(tmp_path / "photos")))
    assert len(source) == 4
    image_of = {source[row].captions[0]: source[row].image for row in (0, 2)}
    assert image_of == {
        "in photos/own": tmp_path / "photos" / "own" / "a.png",
        "in elsewhere": tmp_path / "elsewhere" / "a.png",
    }
    for row in (1, 3):
        with pytest.raises(BadSample, match="leads outside"):
            source[row]
