"""Exports as other programs read them: `datasets`, clip-retrieval, Label Studio, FiftyOne, and training."""

import hashlib
import io
import json
import random
import re
import runpy
import sys
import tarfile
import types
import xml.etree.ElementTree as ElementTree

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from capfilt_crawl import HERE, Starter, annotations, crawl, jpeg, sample, scored, write_tar
from PIL import Image

from blip.data.formats.sources import open_source
from blip.data.settings import SourceConfig
from blip.data.stream import CaptionShards
from blip.errors import DataError
from capfilt.__main__ import main
from capfilt.export import export
from capfilt.select.choose import select
from capfilt.select.policies import SelectConfig
from capfilt.verify import verify

KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
SUFFIX = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}


def mixed(folder, rows, kinds, transparent=False):
    """A crawl in which formats, missing texts and columns of changing types are anywhere but among the first rows."""
    rng, members = random.Random(0), []
    for i in range(rows):
        kind = kinds[0] if i < 8 else rng.choice(kinds)
        members.append((f"{i:04d}.{SUFFIX[kind]}", jpeg(i, (40, 30), kind)))
        extra = {"url": None if i < 8 else f"http://x/{i}", "n": i if i % 2 else f"{i}", "tags": [] if i < 8 else [i]}
        members.append((f"{i:04d}.json", json.dumps(extra).encode()))
        if i < 8 or i % 3:
            members.append((f"{i:04d}.txt", f"Image number {i}, as it was found".encode()))
    return write_tar(folder / "a.tar", members)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """400 rows of five formats, of which all texts are kept; a third have no web text."""
    folder = tmp_path_factory.mktemp("mixed")
    run = scored(mixed(folder, 400, KINDS), folder / "run", part_size=128)
    select(run, "all", SelectConfig(itm=0.0))
    return run


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """300 rows of JPEGs."""
    folder = tmp_path_factory.mktemp("jpegs")
    run = scored(mixed(folder, 300, KINDS[:1]), folder / "run", part_size=128)
    select(run, "all", SelectConfig(itm=0.0))
    return run


def expected(run):
    """(texts, format, sample id, url) of each image in order."""
    rows = annotations(run).to_pylist()
    return [([*row["web_text"], *row["syn_text"]], SUFFIX[row["format"]], row["sample_id"], row["url"]) for row in rows]


def members(path):
    """The members of a tar by sample, read by Python's own module."""
    samples = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            samples.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    return samples


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def load(name, **where):
        return datasets.load_dataset(name, split="train", cache_dir=str(tmp_path / "cache"), **where)

    return load


# Tar shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("reencode", ["jpg", "webp"])
def test_datasets_reads_tars_of_a_mixed_crawl(many, tmp_path, load, together, reencode):
    manifest = export(many, "all", "wds", str(tmp_path / "out"), shard=150, together=together, reencode=reencode)
    data = load("webdataset", data_files=sorted(map(str, (tmp_path / "out").glob("*.tar"))))
    assert len(data) == manifest["samples"] > 257
    wanted = expected(many)
    pairs = [(texts if together else [text], row) for texts, *row in wanted for text in ([0] if together else texts)]
    assert [row["txt"] for row in data] == [texts[0] for texts, _ in pairs]
    assert [row["json"]["captions"] for row in data] == [texts for texts, _ in pairs]
    assert [row["json"]["url"] for row in data] == [url or "" for _, (_, _, url) in pairs]
    assert all(row[reencode].size == (40, 30) for row in data)
    others = sum(suffix != reencode for _, suffix, *_ in wanted)
    assert (manifest["reencoded"], manifest["images"]) == (others, 400)
    facts = [json.loads(row["json"]["facts"]) for row in data]
    assert [fact.get("reencoded_from", reencode) for fact in facts] == [suffix for _, (suffix, *_) in pairs]
    assert facts[1]["extra"] == {"n": facts[1]["extra"]["n"], "tags": [], "url": None}
    assert verify(str(tmp_path / "out")).status() == 0


def test_types_of_json_members_are_the_same_in_all_samples(many, tmp_path):
    export(many, "all", "wds", str(tmp_path / "out"), together=True, reencode="jpg")
    shapes = set()
    for parts in members(tmp_path / "out" / "00000.tar").values():
        assert list(parts) == ["jpg", "txt", "json"]
        note = json.loads(parts["json"], parse_float=lambda text: 1.5)
        assert note["captions"]
        assert note["captions"][0] == note["caption"] == parts["txt"].decode()
        assert len(note["captions"]) == len(note["sources"]) == len(note["scores"])
        kinds = {k: [type(x) for x in v][:1] if isinstance(v, list) else type(v) for k, v in note.items()}
        shapes.add(str(kinds))
    assert shapes == {str({"caption": str, "captions": [str], "sources": [str], "scores": [float], "sample_id": str,
                           "key": str, "url": str, "width": int, "height": int, "facts": str})}  # fmt: skip


def test_bytes_stay_where_images_are_of_one_format(jpegs, tmp_path):
    manifest = export(jpegs, "all", "wds", str(tmp_path / "out"), together=True)
    assert (manifest["reencoded"], manifest["formats"]) == (0, {"jpg": 300})
    images = [parts["jpg"] for parts in members(tmp_path / "out" / "00000.tar").values()]
    assert images == [jpeg(i, (40, 30)) for i in range(300)]


def test_images_of_several_formats_need_a_decision(many, tmp_path, capsys):
    args = ["export", many.where, "--select", "all", "--to", str(tmp_path / "out")]
    assert main(args) == 2
    stderr = capsys.readouterr().err
    counts = {suffix: sum(row[1] == suffix for row in expected(many)) for suffix in sorted(SUFFIX.values())}
    assert f"the kept images are {', '.join(f'{n} {suffix}' for suffix, n in counts.items())}, but" in stderr
    assert "--reencode jpg (or webp), or --by-format" in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert main([*args, "--reencode", "jpg", "--by-format"]) == 2
    assert "give --reencode or --by-format" in capsys.readouterr().err
    assert main([*args, "--by-format", "--format", "json"]) == 2
    assert "--by-format is for tar shards" in capsys.readouterr().err
    assert main([*args, "--reencode", "webp"]) == 0
    stdout = capsys.readouterr().out
    assert f"{400 - counts['webp']} of them re-encoded" in stdout


@pytest.mark.parametrize("kind", ["GIF", "BMP"])
def test_images_that_readers_skip_need_a_decision_even_if_all_are_alike(tmp_path, kind):
    run = scored(mixed(tmp_path, 9, (kind,)), tmp_path / "run")
    select(run, "all", SelectConfig(itm=0.0))
    with pytest.raises(ValueError, match=rf"the kept images are 9 {SUFFIX[kind]}, but readers of tar shards"):
        export(run, "all", "wds", str(tmp_path / "out"))


def test_each_format_in_a_folder_of_its_own(many, tmp_path, load):
    out = tmp_path / "out"
    manifest = export(many, "all", "wds", str(out), shard=50, by_format=True)
    wanted = expected(many)
    assert sorted(path.name for path in out.iterdir()) == ["_SUCCESS", *sorted(SUFFIX.values())]
    for suffix in ("jpg", "png", "webp"):
        data = load("webdataset", data_files=sorted(map(str, (out / suffix).glob("*.tar"))))
        assert [row["txt"] for row in data] == [text for texts, s, *_ in wanted if s == suffix for text in texts]
        assert all(row[suffix].size == (40, 30) for row in data)
    assert verify(str(out)).status() == 0
    source = open_source(SourceConfig(str(out / "*/*.tar")))
    assert len(source) == manifest["pairs"] == sum(len(texts) for texts, *_ in wanted)
    (out / "png" / "00099.tar").write_bytes(b"")
    assert "png/00099.tar is not part of this export" in verify(str(out)).problems[0]
    (out / "png" / "00099.tar").unlink()
    assert export(many, "all", "wds", str(out), reencode="jpg", replace=True)["formats"] == manifest["formats"]
    assert sorted(path.name for path in out.rglob("*.tar")) == ["00000.tar"]


def test_images_are_encoded_upright_over_white_and_to_the_same_bytes_each_time(tmp_path):
    """The EXIF tag, transparency and frames of an animation would otherwise be lost without a word."""
    red, clear = Image.new("RGB", (40, 20), "red"), Image.new("RGBA", (20, 20), (0, 0, 255, 0))
    exif = Image.Exif()
    exif[274] = 6
    pngs = []
    for image, how in ((red, {"exif": exif}), (clear, {})):
        buffer = io.BytesIO()
        image.save(buffer, "PNG", **how)
        pngs.append(buffer.getvalue())
    parts = [("0.png", pngs[0]), ("0.txt", b"a red one"), ("1.png", pngs[1]), ("1.txt", b"a clear one")]
    run = scored(write_tar(tmp_path / "a.tar", [*parts, *sample("2", 2)]), tmp_path / "run")
    select(run, "web", SelectConfig(itm=0.0, only="web"))
    one = export(run, "web", "wds", str(tmp_path / "out"), reencode="jpg")
    images = [parts["jpg"] for parts in members(tmp_path / "out" / "00000.tar").values()]
    turned, white = (Image.open(io.BytesIO(image)) for image in images[:2])
    assert (turned.format, turned.size, white.size) == ("JPEG", (20, 40), (20, 20))
    assert min(white.getpixel((10, 10))) > 250
    assert images[2] == jpeg(2)
    assert export(run, "web", "wds", str(tmp_path / "again"), reencode="jpg")["files"] == one["files"]


def test_killed_while_re_encoding(many, tmp_path):
    starter = Starter(tmp_path / "log")
    args = ["export", many.where, "--select", "all", "--to", str(tmp_path / "out"), "--shard", "100", "--by-format"]
    for times in ("1", "3", "5"):
        assert starter.run(*args, CAPFILT_FAULT=f"export.after_file:{times}") == -9
    assert starter.run(*args) == 0
    starter.close()
    whole = export(many, "all", "wds", str(tmp_path / "whole"), shard=100, by_format=True)
    assert json.loads((tmp_path / "out" / "_SUCCESS").read_bytes())["files"] == whole["files"]


# Back into training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [False, True])
def test_training_sees_all_captions_of_an_export(jpegs, tmp_path, together):
    """Their .txt has the first only."""
    export(jpegs, "all", "wds", str(tmp_path / "out"), shard=70, together=together)
    wanted = [texts for texts, *_ in expected(jpegs)]
    if not together:
        wanted = [[text] for texts in wanted for text in texts]
    path = str(tmp_path / "out" / "*.tar")
    source = open_source(SourceConfig(path))
    assert [source[i].captions for i in range(len(source))] == wanted
    shards = CaptionShards(SourceConfig(path))
    assert [record.captions for file in shards.files for record in shards.read(file)] == wanted
    again = scored(path, tmp_path / "again")
    assert annotations(again)["web_text"].to_pylist() == wanted
    other = open_source(SourceConfig(path, caption_column="sources"))
    assert other[0].captions == (["web", "syn"] if together else ["web"])


@pytest.mark.parametrize("where", ["alone", "first", "last"])
def test_captions_of_other_json_members_do_not_replace_texts(jpegs, tmp_path, where):
    """Members that look like an export's but are of another program, and a shard joined from both."""
    export(jpegs, "all", "wds", str(tmp_path / "out"), together=True)
    ours = (tmp_path / "out" / "00000.tar").read_bytes()
    other = write_tar(tmp_path / "b.tar", sample("other", 1, "the text", {"captions": ["x", "y"], "facts": "z"}))
    joined = {"alone": [other.read_bytes()], "first": [other.read_bytes(), ours], "last": [ours, other.read_bytes()]}
    (tmp_path / "c.tar").write_bytes(b"".join(joined[where]))
    source = open_source(SourceConfig(str(tmp_path / "c.tar")))
    at = 0 if where != "last" else len(source) - 1
    assert source[at].captions == ["the text"]
    row = annotations(scored(tmp_path / "c.tar", tmp_path / "run"))["web_text"].to_pylist()[at]
    assert row == ["the text"]


# JSON lists, parquet --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [False, True])
def test_datasets_reads_an_export_as_an_image_folder(many, tmp_path, load, together):
    export(many, "all", "json", str(tmp_path / "out"), shard=150, together=together)
    data = load("imagefolder", data_dir=str(tmp_path / "out"))
    wanted = [texts for texts, *_ in expected(many)]
    texts = wanted if together else [text for some in wanted for text in some]
    assert data["text"] == texts
    assert len(data) > 257
    assert all(row["image"].size == (40, 30) for row in data)
    source = open_source(SourceConfig(str(tmp_path / "out")))  # as a folder, too
    assert [source[i].captions for i in range(len(source))] == [t if together else [t] for t in texts]
    (tmp_path / "out" / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "b"}\n')
    assert verify(str(tmp_path / "out")).status() == 4


def test_datasets_reads_parquet(many, tmp_path, load):
    export(many, "all", "parquet", str(tmp_path / "out"), shard=150)
    data = load("parquet", data_files=sorted(map(str, (tmp_path / "out").glob("*.parquet"))))
    assert [row["caption"][0] for row in data] == [text for texts, *_ in expected(many) for text in texts]
    assert all(row["image"].size == (40, 30) for row in data)


# Rehearsals -----------------------------------------------------------------------------------------------------------


def test_an_export_of_fake_scores_says_so(jpegs, tmp_path, capsys):
    assert main(["export", jpegs.where, "--select", "all", "--to", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == (
        "note: the scores are of --scorer fake, so this export is a rehearsal, not clean data\n"
    )
    assert json.loads((tmp_path / "out" / "_SUCCESS").read_bytes())["scorer"] == "fake"
