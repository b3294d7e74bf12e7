"""Exports as other programs read them: `datasets`, clip-retrieval, Label Studio, FiftyOne, and training."""

import hashlib
import io
import itertools
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
from capfilt_crawl import Starter, annotations, jpeg, sample, scored, write_tar
from PIL import Image

from blip.data.formats.sources import open_source
from blip.data.settings import SourceConfig
from blip.data.stream import CaptionShards
from blip.errors import DataError
from blip.origin import marking, origins_of
from capfilt.__main__ import main
from capfilt.calibrate import audit
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
def few(tmp_path_factory):
    """40 rows of five formats."""
    folder = tmp_path_factory.mktemp("few")
    run = scored(mixed(folder, 40, KINDS), folder / "run")
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


# The synthetic world's mark -------------------------------------------------------------------------------------------


def test_images_of_the_synthetic_world_keep_their_mark_when_re_encoded(tmp_path):
    def shape(form, mark):
        buffer = io.BytesIO()
        Image.effect_noise((200, 150), 90).convert("RGB").save(buffer, form, **(marking(form) if mark else {}))
        return buffer.getvalue()

    rows = [
        (f"{i}.{SUFFIX[form]}", shape(form, mark))
        for i, (form, mark) in enumerate(itertools.product(KINDS[:3], (1, 0)))
    ]
    texts = [(f"{name[0]}.txt", b"a red circle of some size") for name, _ in rows]
    run = scored(write_tar(tmp_path / "a.tar", sorted(rows + texts)), tmp_path / "run")
    select(run, "all", SelectConfig(itm=0.0))
    for suffix in ("jpg", "webp"):
        export(run, "all", "wds", str(tmp_path / suffix), together=True, reencode=suffix)
        samples = members(*(tmp_path / suffix).glob("*.tar"))
        assert [origins_of([sample[suffix]]) for _, sample in sorted(samples.items())] == [
            ("synthetic shapes",), ("other images",),
        ] * 3  # fmt: skip


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


def test_an_image_that_a_format_cannot_hold_is_named(tmp_path, capsys):
    """A WEBP has at most 16,383 pixels a side."""
    members = [*sample("0", 0), ("1.png", jpeg(1, (17_000, 20), "PNG")), ("1.txt", b"a panorama")]
    run = scored(write_tar(tmp_path / "a.tar", members), tmp_path / "run")
    select(run, "all", SelectConfig(itm=0.0))
    args = ["export", run.where, "--select", "all", "--to", str(tmp_path / "out"), "--reencode"]
    assert main([*args, "webp"]) == 2
    stderr = capsys.readouterr().err
    assert "error: a.tar row 1: the image cannot be re-encoded as webp (" in stderr
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    assert main([*args, "jpg", "--replace"]) == 0
    assert verify(str(tmp_path / "out")).status() == 0


@pytest.mark.parametrize("form", ["json", "parquet", "labelstudio", "fiftyone"])
def test_other_formats_keep_bytes_unless_they_are_to_be_re_encoded(few, tmp_path, form):
    keep = export(few, "all", form, str(tmp_path / "keep"))
    jpg = export(few, "all", form, str(tmp_path / "jpg"), reencode="jpg")
    assert (keep["reencoded"], jpg["reencoded"]) == (0, 40 - keep["formats"]["jpg"])

    def images(folder):
        if form == "parquet":
            table = pq.read_table(folder / "00000.parquet").to_pylist()
            return {row["sample_id"]: row["image"]["bytes"] for row in table}.values()
        return [path.read_bytes() for path in sorted(folder.glob("images/*/*"))]

    originals = [jpeg(i, (40, 30), row["format"]) for i, row in enumerate(annotations(few).to_pylist())]
    assert list(images(tmp_path / "keep")) == originals
    assert {Image.open(io.BytesIO(image)).format for image in images(tmp_path / "jpg")} == {"JPEG"}
    assert verify(str(tmp_path / "jpg")).status() == 0


def test_all_steps_in_one_with_images_of_several_formats(tmp_path, capsys):
    """Nothing is scored again after the decision."""
    source = mixed(tmp_path, 30, KINDS)
    args = ["run", "--input", str(source), "--out", str(tmp_path / "run"), "--scorer", "fake", "--itm", "0.1",
            "--decode-workers", "0"]  # fmt: skip
    assert main(args) == 2
    assert "--reencode jpg (or webp), or --by-format" in capsys.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "parts").rglob("*.parquet")}
    assert main([*args, "--reencode", "jpg"]) == 0
    assert "re-encoded" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before


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


def test_captions_before_the_damage_of_an_export(few, tmp_path):
    """Cut off between the members of a sample."""
    export(few, "all", "wds", str(tmp_path / "out"), together=True, reencode="jpg")
    content = (tmp_path / "out" / "00000.tar").read_bytes()
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        (tmp_path / "cut.tar").write_bytes(content[: tar.getmember("000000020.json").offset])
    source = open_source(SourceConfig(str(tmp_path / "cut.tar"), allow_truncated=True))
    wanted = [texts for texts, *_ in expected(few)][:21]
    assert [source[i].captions for i in range(len(source))] == [*wanted[:20], wanted[20][:1]]


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


# Embeddings -----------------------------------------------------------------------------------------------------------


def sealed(values):
    """An array's file with its digest, as scoring writes it."""
    buffer = io.BytesIO()
    np.save(buffer, values)
    digest = hashlib.sha256(buffer.getvalue()).digest()
    return buffer.getvalue() + b"sha256::" + digest


def with_embeddings(run):
    """Write extra/embedding as scoring does, by hand; returns each row's vector by sample id."""
    rng, vectors = np.random.default_rng(0), {}
    for part in run.plan:
        rows = run.parts.read(part.pid, ["sample_id", "status"]).to_pylist()
        values = rng.standard_normal((len(rows), 16)).astype(np.float32)
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        values[[row["status"] not in ("ok", "no_text") for row in rows]] = 0
        vectors |= {row["sample_id"]: value for row, value in zip(rows, values, strict=True)}
        run.storage.write(f"extra/embedding/{part.pid}.npy", sealed(values.astype(np.float16)))
    return vectors


@pytest.fixture
def embedded(tmp_path):
    """100 images and 10 broken ones, with embeddings in several parts."""
    members = [m for i in range(100) for m in sample(f"{i:03d}", i)]
    broken = [m for i in range(10) for m in ((f"b{i}.jpg", b"<html>"), (f"b{i}.txt", b"text"))]
    run = scored(write_tar(tmp_path / "in.tar", broken + members), tmp_path / "run", part_size=32)
    select(run, "all", SelectConfig(itm=0.0))
    return run


@pytest.mark.parametrize("together", [False, True])
def test_embeddings_are_in_the_layout_of_clip_retrieval(embedded, tmp_path, together):
    vectors, out = with_embeddings(embedded), tmp_path / "out"
    (tmp_path / "in.tar").unlink()  # no image is read
    manifest = export(embedded, "all", "embeddings", str(out), shard=13, together=together)
    n = 100 if together else 200
    assert (manifest["samples"], manifest["images"], manifest["pairs"]) == (n, 100, 200)
    assert "text_emb" not in [path.name for path in out.iterdir()]
    at = 0
    for number, size in enumerate([13] * (n // 13) + [n % 13]):
        name = f"{number}".zfill(len(str(-(-n // 13))))
        stored = np.load(out / f"img_emb/img_emb_{name}.npy", allow_pickle=False)
        rows = pq.read_table(out / f"metadata/metadata_{name}.parquet").to_pylist()
        assert (stored.dtype, stored.shape, len(rows)) == (np.float16, (size, 16), size)
        np.testing.assert_allclose(stored, [vectors[row["sample_id"]] for row in rows], atol=2e-3)
        np.testing.assert_allclose(np.linalg.norm(stored.astype(np.float32), axis=1), 1, atol=2e-3)
        for row in rows:
            i = at if together else at // 2
            assert row["image_path"] == f"in.tar/{i:03d}"
            assert row["texts"] == (2 if together else 1)
            assert not any(isinstance(value, list) for value in row.values())
            if together or at % 2 == 0:
                assert (row["caption"], row["source"]) == (f"Image number {i}!", "web")
            at += 1
    assert at == n
    assert verify(str(out)).status() == 0
    assert verify(embedded.where).status() == 0
    np.save(out / f"img_emb/img_emb_{name}.npy", stored[:-1])
    digest = hashlib.sha256((out / f"img_emb/img_emb_{name}.npy").read_bytes()).hexdigest()
    manifest["files"][f"img_emb/img_emb_{name}.npy"] = {"sha256": digest}
    (out / "_SUCCESS").write_text(json.dumps(manifest))
    assert (
        f"img_emb_{name}.npy has {n % 13 - 1} rows, metadata/metadata_{name}.parquet {n % 13}"
        in (verify(str(out)).problems[0])
    )


def test_embeddings_that_scoring_did_not_keep(embedded, tmp_path, capsys):
    args = ["export", embedded.where, "--select", "all", "--to", str(tmp_path / "out"), "--format", "embeddings"]
    assert main(args) == 2
    remedy = f"4 of 4 parts have no embeddings: make them with `capfilt score {embedded.where} --also embedding`"
    assert capsys.readouterr().err == f"error: {remedy}\n"
    assert not (tmp_path / "out").exists()
    with_embeddings(embedded)
    first = embedded.plan[0].pid
    values = np.load(embedded.storage.path(f"extra/embedding/{first}.npy"))
    for bad, message in (
        (values[:-1], rf"{first}\.npy is float16 \(31, 16\), not float16 \(32, E\)"),
        (values.astype(np.float32), r"is float32 \(32, 16\)"),
        (values * 0, "has no embedding of row 10, of which a text is kept"),
        (np.array([{}], object), "it is no array"),
    ):
        embedded.storage.write(f"extra/embedding/{first}.npy", sealed(bad))
        with pytest.raises(DataError, match=message):
            export(embedded, "all", "embeddings", str(tmp_path / "bad"))
    changed = bytearray(sealed(values))
    changed[200] ^= 1
    for content in (bytes(changed), sealed(values)[:-40], b""):
        embedded.storage.write(f"extra/embedding/{first}.npy", content)
        with pytest.raises(DataError, match=rf"{first}\.npy: .*`score --also` again redoes it"):
            export(embedded, "all", "embeddings", str(tmp_path / "bad"))
    embedded.storage.write(f"extra/embedding/{first}.npy", sealed(values))
    starter = Starter(tmp_path / "log")
    assert starter.run(*args, "--shard", "20", CAPFILT_FAULT="export.after_file:5") == -9
    assert starter.run(*args, "--shard", "20") == 0
    starter.close()
    whole = export(embedded, "all", "embeddings", str(tmp_path / "whole"), shard=20)
    assert json.loads((tmp_path / "out" / "_SUCCESS").read_bytes())["files"] == whole["files"]
    assert main([*args, "--reencode", "jpg"]) == 2


# Annotation tools -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blind", [False, True])
def test_tasks_of_label_studio(jpegs, tmp_path, blind):
    """By the rules of its guide to pre-annotations, and of its labelling configuration."""
    export(jpegs, "all", "labelstudio", str(tmp_path / "out"), blind=blind)
    tasks = json.loads((tmp_path / "out" / "tasks.json").read_bytes())
    config = ElementTree.parse(tmp_path / "out" / "config.xml").getroot()
    objects = {tag.get("name"): tag for tag in config if (tag.get("value") or "").startswith("$")}
    (choices,) = config.iter("Choices")
    allowed = [choice.get("value") for choice in choices]
    assert config.tag == "View"
    assert {tag.tag for tag in objects.values()} == {"Image", "Text"}
    assert choices.get("toName") in objects
    pairs = [(i, text) for i, (texts, *_) in enumerate(expected(jpegs)) for text in texts]
    assert [task["data"]["text"] for task in tasks] == [text for _, text in pairs]
    for task, (i, _) in zip(tasks, pairs, strict=True):
        assert task.keys() == ({"data"} if blind else {"data", "predictions"})
        assert {tag.get("value").removeprefix("$") for tag in objects.values()} <= task["data"].keys()
        path = task["data"]["image"].removeprefix("/data/local-files/?d=")
        assert (tmp_path / "out" / path).read_bytes() == jpeg(i, (40, 30))
        for prediction in task.get("predictions", []):
            assert prediction.keys() == {"model_version", "score", "result"}
            assert 0 <= prediction["score"] <= 1
            (result,) = prediction["result"]
            assert objects[result["to_name"]].tag == "Image"
            assert (result["from_name"], result["type"]) == (choices.get("name"), choices.tag.lower())
            assert result["value"]["choices"][0] in allowed
    ids = [task["data"]["id"] for task in tasks]
    assert len(set(ids)) == len(ids)
    drawn = {entry["id"]: entry["text"] for entry in audit.draw(jpegs, 40)}  # the ids of the audit's sheet
    assert drawn.items() <= {task["data"]["id"]: task["data"]["text"] for task in tasks}.items()
    if blind:
        assert not re.search(r"\b(web|syn|score)\b", json.dumps([task["data"] | {"text": ""} for task in tasks]))
    assert verify(str(tmp_path / "out")).status() == 0


def test_options_of_other_formats_are_refused(jpegs, tmp_path):
    for form, options, message in (
        ("labelstudio", {"together": True}, "a task for each text"),
        ("wds", {"blind": True}, "--blind is for --format labelstudio"),
        ("uids", {"reencode": "jpg"}, "uids has none"),
        ("wds", {"reencode": "png"}, "re-encoded to jpg or webp"),
    ):
        with pytest.raises(ValueError, match=message):
            export(jpegs, "all", form, str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


class Field(dict):
    """What the loader uses of a FiftyOne sample: a field is set by name, and has one type in the whole data set."""

    RESERVED = ("id", "metadata", "created_at", "last_modified_at", "frames")

    def __init__(self, filepath, tags):
        super().__init__()
        self.filepath, self.tags = filepath, tags

    def __setitem__(self, name, value):
        assert name.isidentifier()
        assert name not in self.RESERVED
        super().__setitem__(name, value)


@pytest.mark.parametrize("together", [False, True])
def test_the_loader_makes_a_data_set_of_fiftyone(many, tmp_path, monkeypatch, capsys, together):
    manifest = export(many, "all", "fiftyone", str(tmp_path / "out"), together=together, shard=100)
    added = {}

    class Dataset:
        def __init__(self, name, persistent):
            self.name, added[name] = name, []

        def add_samples(self, samples):
            added[self.name] += samples

    stub = types.ModuleType("fiftyone")
    stub.Sample, stub.Dataset = Field, Dataset
    stub.Classification = lambda label, confidence: ("classification", label, confidence)
    monkeypatch.setitem(sys.modules, "fiftyone", stub)
    monkeypatch.setattr(sys, "argv", ["load.py", "crawl"])
    loader = tmp_path / "out" / "load.py"
    assert len(loader.read_text().splitlines()) <= 22
    runpy.run_path(str(loader), run_name="__main__")
    samples = added["crawl"]
    assert capsys.readouterr().out == f"{manifest['samples']} samples: fiftyone app launch crawl\n"
    wanted = [texts for texts, *_ in expected(many)]
    assert [s["captions"] for s in samples] == (wanted if together else [[t] for texts in wanted for t in texts])
    types_of = {str({name: type(value) for name, value in sample.items()}) for sample in samples}
    assert len(types_of) == 1
    assert samples[0]["text"] == ("classification", samples[0]["caption"], samples[0]["score"])
    assert samples[0].tags == (["syn", "web"] if together else ["web"])
    for of_image in {s.filepath: s for s in samples}.values():
        assert Image.open(of_image.filepath).size == (40, 30)
    assert verify(str(tmp_path / "out")).status() == 0


# Readers of other projects --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jpg", "webp"])
def test_open_clip_reads_every_sample(many, tmp_path, form):
    """Its own reading of shards, grouping and filter, and webdataset's decoder, over more than one shard."""
    wds = pytest.importorskip("webdataset", reason="open_clip's reader needs webdataset: pip install webdataset")
    if wds.__version__ > "0.2.86":
        pytest.skip("open_clip reads shards with webdataset up to 0.2.86: pip install webdataset==0.2.86")
    data = pytest.importorskip("open_clip_train.data", reason="pip install 'open_clip_torch' braceexpand pandas")
    export(many, "all", "wds", str(tmp_path / "out"), shard=300, together=True, reencode=form)
    shards = [{"url": str(path)} for path in sorted((tmp_path / "out").glob("*.tar"))]
    read = data.tarfile_to_samples_nothrow(iter(shards))
    kept = [sample for sample in read if data.filter_no_caption_or_no_image(sample)]
    assert [sample["txt"].decode() for sample in kept] == [texts[0] for texts, *_ in expected(many)]
    pipeline = wds.DataPipeline(
        wds.SimpleShardList([shard["url"] for shard in shards]),
        data.tarfile_to_samples_nothrow,
        wds.select(data.filter_no_caption_or_no_image),
        wds.decode("pilrgb", handler=data.log_and_continue),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.to_tuple("image", "text"),
    )
    assert [(image.size, text) for image, text in pipeline] == [((40, 30), texts[0]) for texts, *_ in expected(many)]


def test_clip_retrieval_reads_every_sample(many, tmp_path):
    """Members called jpg, txt and json in each sample, the next to each other, and JSON that flattens to columns."""
    export(many, "all", "wds", str(tmp_path / "out"), shard=300, reencode="jpg")
    rows, columns = [], set()
    for path in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(path) as tar:
            names = tar.getnames()
            for at in range(0, len(names), 3):
                three = names[at : at + 3]
                assert {name.partition(".")[2] for name in three} == {"jpg", "txt", "json"}
                assert len({name.partition(".")[0] for name in three}) == 1
                columns.add(tuple(json.loads(tar.extractfile(three[2]).read())))
                rows.append(tar.extractfile(three[1]).read().decode())
    assert rows == [text for texts, *_ in expected(many) for text in texts]
    assert len(columns) == 1
