"""Files behind addresses: the same rows, batches and errors as those of this machine, whatever the server does."""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import shutil
import tarfile
import threading

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from range_server import RangeServer

from blip.data.draws import Draws
from blip.data.formats import remote
from blip.data.formats.finding import find
from blip.data.formats.remote import RemoteFile, SourceChanged, Unreachable
from blip.data.formats.sources import open_source
from blip.data.prepare.captions import PrepareCaptions, open_captions
from blip.data.settings import DataConfig, SourceConfig
from blip.data.stream import CaptionShards, Stream
from blip.data.transforms import TrainTransform
from blip.errors import BadSample, DataError, without_credentials
from eval.images import Images
from tests.data.test_stream import jpeg, write


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """No pauses between tries, and a cache of the test's own."""
    monkeypatch.setattr(remote, "_PAUSE", 0.001)
    monkeypatch.setattr(remote, "_down", set())
    monkeypatch.setenv("OPENBLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for kind in ("tar", "parquet", "jsonl"):
        write(folder, kind, 3, 8)
    return folder


@pytest.fixture
def server(shards):
    with RangeServer(shards) as running:
        yield running


def at(server, kind):
    root = {"image_root": str(server.folder)} if kind == "jsonl" else {}
    return SourceConfig(f"{server.address}/s-{{000..002}}.{kind}", **root)


def here(server, kind):
    return SourceConfig(str(server.folder / f"s-*.{kind}"))


def feed(tokenizer, source, workers=0, **changes):
    settings = {"workers": workers, "worker_timeout": 30.0, "shuffle_buffer": 8, "remote": True, **changes}
    config = DataConfig([source], **settings)
    kind = Stream if config.streaming else Draws
    return kind(open_captions(config), PrepareCaptions(TrainTransform(16, config), tokenizer, config), 0)


def digest(batches):
    """Everything of some batches: keys, pixels, texts, bad samples."""
    h = hashlib.sha256()
    for batch in batches:
        h.update(repr((batch.keys, batch.bad, batch.image_ids.tolist())).encode())
        h.update(batch.image.numpy().tobytes() + batch.ids.numpy().tobytes() + batch.keep.numpy().tobytes())
    return h.hexdigest()


# Rows and batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tar", "parquet", "jsonl"])
def test_rows_are_those_of_local_files(server, kind):
    a, b = open_source(here(server, kind)), open_source(at(server, kind), remote=True)
    assert len(a) == len(b) == 24
    for row in (0, 23, 7, 8, 15, 16):
        assert a.key(row) == b.key(row)
        assert a[row] == b[row]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["tar", "parquet", "jsonl"])
def test_batches_are_those_of_local_files_to_the_bit(server, tokenizer, kind, workers, streaming):
    batches = []
    for source in (here(server, kind), at(server, kind)):
        one = feed(tokenizer, source, workers, streaming=streaming)
        batches.append([len(one)] + [digest(one.batches(start, 5, rank, 2, 4)) for rank in (0, 1) for start in (0, 3)])
    assert batches[0] == batches[1]


def test_single_samples_are_read_and_not_whole_shards(shards, server):
    with tarfile.open(shards / "big.tar", "w") as tar:
        for i in range(4):
            for suffix, data in (("png", os.urandom(1 << 20)), ("txt", b"a text")):
                info = tarfile.TarInfo(f"{i}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    source = open_source(SourceConfig(f"{server.address}/big.tar"), remote=True)
    server.requests.clear()
    assert source[2].image == open_source(SourceConfig(str(shards / "big.tar")))[2].image
    assert [status for _, status, _ in server.requests] == [206]  # image and text in one request
    assert server.bytes_sent() < (1 << 20) + 4096


def test_an_index_is_kept_until_the_file_changes(server, monkeypatch):
    monkeypatch.setattr(remote, "_BUFFER", 512)  # a request a header
    source = at(server, "tar")
    first = open_source(source, remote=True)
    requests = len(server.requests)
    assert requests > 50
    server.requests.clear()
    again = open_source(source, remote=True)
    assert len(server.requests) == 3
    assert again.identity() == first.identity()
    assert [again[row] for row in range(24)] == [first[row] for row in range(24)]
    shutil.copy(server.folder / "s-000.tar", server.folder / "s-001.tar")
    changed = open_source(source, remote=True)
    assert changed.identity() != first.identity()
    assert changed[8].captions == ["image 0"]


def test_a_footer_is_kept_and_a_damaged_cache_does_not_matter(server, tmp_path):
    first = open_source(at(server, "parquet"), remote=True)
    kept = list((tmp_path / "cache").rglob("*.parquet"))
    assert len(kept) == 3
    server.requests.clear()
    open_source(at(server, "parquet"), remote=True)
    assert len(server.requests) == 3
    for file in kept:
        file.write_bytes(b"damaged")
    again = open_source(at(server, "parquet"), remote=True)
    assert [again[row] for row in range(24)] == [first[row] for row in range(24)]


def test_without_a_cache_folder_all_is_read_again(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPENBLIP_CACHE", str(tmp_path / "file"))
    assert len(open_source(at(server, "tar"), remote=True)) == 24


def test_an_evaluation_reads_the_same(server):
    for kind in ("tar", "parquet", "jsonl"):
        a, b = Images.open(here(server, kind)), Images.open(at(server, kind), remote=True)
        assert a.entries == b.entries
        (ids, x), (_, y) = (next(images.batches(range(20), 20, 16, threads=4)) for images in (a, b))
        assert len(ids) == 20
        assert torch.equal(x, y)


def test_threads_share_a_source(server):
    source = open_source(at(server, "parquet"), remote=True)
    expected = [source[row] for row in range(24)]
    results = {}
    threads = [
        threading.Thread(target=lambda n=n: results.update({n: [source[row] for row in range(n, 24)]}))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(rows == expected[n:] for n, rows in results.items())
    assert len(results) == 8


# Faults ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["500", "503", "429", "drop", "short"])
@pytest.mark.parametrize("kind", ["tar", "parquet", "jsonl"])
def test_passing_faults_change_nothing(server, tokenizer, kind, fault):
    expected = digest(feed(tokenizer, here(server, kind)).batches(0, 6, 0, 1, 4))
    if fault == "short" and kind != "tar":
        pytest.skip("one kind is enough")
    for name in ("s-000", "s-001", "s-002"):
        server.faults[f"{name}.{kind}"] = [fault, fault, "", fault, fault, fault, fault, ""] * 20
    assert digest(feed(tokenizer, at(server, kind)).batches(0, 6, 0, 1, 4)) == expected
    assert server.faults[f"s-000.{kind}"][:1] != []


def test_a_sample_that_stays_unreachable_is_a_bad_sample(server):
    source = open_source(at(server, "tar"), remote=True)
    server.faults["s-001.tar"] = ["500"] * 6
    with pytest.raises(
        BadSample, match=r"s-001.tar cannot be read: the server answered with status 500; tried 6 times"
    ):
        source[8]
    assert source[8].captions == ["image 8"]
    source = open_source(at(server, "parquet"), remote=True)
    server.faults["s-001.parquet"] = ["drop"] * 6
    with pytest.raises(BadSample, match="tried 6 times"):
        source[8]
    assert source[8].captions == ["image 8"]


def test_a_server_that_is_gone_is_not_waited_for_as_long_again(server):
    source = open_source(at(server, "tar"), remote=True)
    server.requests.clear()
    server.faults["*"] = "500"
    for row in range(16):
        with pytest.raises(BadSample):
            source[row]
    assert len(server.requests) == 6 + 15 * 2
    server.faults.clear()
    assert source[0].captions == ["image 0"]
    server.faults["s-000.tar"] = ["500"] * 5  # as patient as before
    assert source[0].captions == ["image 0"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_that_is_gone_stops_the_run_in_one_line(server, tokenizer, workers, streaming):
    one = feed(tokenizer, at(server, "tar"), workers, streaming=streaming)
    server.faults["*"] = "503"
    with pytest.raises(DataError, match=r"s-00\d.tar.*cannot be read: the server answered with status 503") as error:
        list(one.batches(0, 6, 0, 1, 4))
    assert "\n" not in str(error.value)


def test_a_shard_of_a_stream_that_is_gone_is_left_out(server, tokenizer):
    one = feed(tokenizer, at(server, "tar"), streaming=True)
    (server.folder / "s-002.tar").unlink()
    batches = list(one.batches(0, 6, 0, 1, 4))
    bad = {bad.key: bad.reason for batch in batches for bad in batch.bad}
    assert set(bad) == {"s-002.tar"}
    assert "no such file" in bad["s-002.tar"]
    assert {key.split("/")[0] for batch in batches for key in batch.keys} == {"s-000.tar", "s-001.tar"}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_changes_during_a_run_stops_it(server, tokenizer, workers, streaming):
    one = feed(tokenizer, at(server, "tar"), workers, streaming=streaming)
    for name in ("s-000.tar", "s-001.tar", "s-002.tar"):
        server.tags[name] = '"other"'
    with pytest.raises(
        DataError, match=r'tar has changed while it was read: it had 30,720 bytes and tag.*, and has 30,720 and "other"'
    ):
        list(one.batches(0, 6, 0, 1, 4))


REFUSED = {
    "whole": "the server ignores ranges",
    "gzip": r"sends it compressed \(gzip\)",
    "long": "sends more than the range",
    "redirect file:///etc/passwd": "is redirected to .*file:///etc/passwd.*refused",
    "redirect ftp://127.0.0.1/a.tar": "is redirected to .*refused",
    "redirect /s-000.tar": "redirected again and again",
    "404": "no such file",
    "403": "access is denied .*403.*environment",
    "401": "access is denied",
    "418": "status 418",
}


@pytest.mark.parametrize("fault", REFUSED)
@pytest.mark.parametrize("kind", ["tar", "parquet", "jsonl"])
def test_what_no_second_try_mends_is_refused_at_once(server, kind, fault):
    server.faults["*"] = fault
    with pytest.raises(DataError, match=REFUSED[fault]) as error:
        open_source(dataclasses.replace(at(server, kind), path=f"{server.address}/s-000.{kind}"), remote=True)
    assert len(server.requests) == (10 if fault == "redirect /s-000.tar" else 1)
    assert "\n" not in str(error.value)


def test_redirects_to_the_web_are_followed(server):
    server.faults["s-000.tar"] = ["redirect /s-001.tar"] * 100
    source = open_source(SourceConfig(f"{server.address}/s-000.tar"), remote=True)
    assert source[0].captions == ["image 8"]


def test_a_server_without_tags_is_read_and_nothing_is_kept(server, tmp_path):
    server.tags = dict.fromkeys(("s-000.tar", "s-001.tar", "s-002.tar"), "")
    assert open_source(at(server, "tar"), remote=True)[23].captions == ["image 23"]
    assert not list((tmp_path / "cache").rglob("*.json"))


@pytest.mark.parametrize("fault", ["", "whole"])
def test_files_that_are_empty_cut_off_or_of_another_kind(server, fault):
    (server.folder / "empty.tar").write_bytes(b"")
    server.faults["empty.tar"] = [fault] * 9
    (server.folder / "cut.tar").write_bytes((server.folder / "s-000.tar").read_bytes()[:4000])
    for name in ("empty.tar", "cut.tar"):
        local, far = str(server.folder / name), f"{server.address}/{name}"
        errors = []
        for spec in (local, far):
            with pytest.raises(DataError) as error:
                open_source(SourceConfig(spec), remote=True)
            errors.append(str(error.value).replace(spec, "FILE"))
        assert errors[0] == errors[1]
    cut = SourceConfig(f"{server.address}/cut.tar", allow_truncated=True)
    assert len(open_source(cut, remote=True)) == len(
        open_source(dataclasses.replace(cut, path=str(server.folder / "cut.tar")))
    )
    (server.folder / "cut.parquet").write_bytes((server.folder / "s-000.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match=r"cut.parquet is not readable parquet"):
        open_source(SourceConfig(f"{server.address}/cut.parquet"), remote=True)
    with pytest.raises(DataError, match=r"s-000.tar.gz is compressed"):
        open_source(SourceConfig(f"{server.address}/s-000.tar.gz"), remote=True)


# What may be read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["s3://b/a.tar", "https://h/{0..3}.tar", "HTTP://h/a.tar", "hf://o/n/a.parquet"])
@pytest.mark.parametrize("opened", [open_source, CaptionShards])
def test_without_the_option_addresses_are_refused_and_the_option_is_named(spec, opened):
    with pytest.raises(DataError, match=r"only local files are read.*data\.remote.*--remote true"):
        opened(SourceConfig(spec))


@pytest.mark.parametrize(
    "spec", ["ftp://h/a.tar", "ssh://h/a.tar", "pipe:cat x", "file://h/a.tar", "zip://a.tar::s3://b"]
)
def test_other_schemes_are_refused_with_it(spec):
    with pytest.raises(DataError, match=r"only local files|not a file of this machine"):
        open_source(SourceConfig(spec), remote=True)


def test_images_of_remote_lists_are_local(server, shards):
    bare = SourceConfig(f"{server.address}/s-000.jsonl")
    for read in (open_source, CaptionShards, lambda config, remote: Images.open(config, remote=remote)):
        with pytest.raises(DataError, match="set image_root"):
            read(bare, True)
        with pytest.raises(DataError, match="only local files"):
            read(dataclasses.replace(bare, image_root=server.address), True)
    pq.write_table(pa.table({"image": ["s0.jpg"], "caption": ["a"]}), shards / "paths.parquet")
    with pytest.raises(BadSample, match="set image_root"):
        open_source(SourceConfig(f"{server.address}/paths.parquet"), remote=True)[0]


def test_globs_and_folders_of_web_servers_are_refused(server):
    with pytest.raises(DataError, match=r"no listing.*00000\.\.00127"):
        open_source(SourceConfig(f"{server.address}/*.tar"), remote=True)
    for spec in (f"{server.address}/", server.address):
        with pytest.raises(DataError, match="is a folder"):
            open_source(SourceConfig(spec), remote=True)


def test_local_and_remote_shards_make_one_source(server):
    both = SourceConfig(f"{server.folder}/s-000.tar::{server.address}/s-001.tar")
    source = open_source(both, remote=True)
    assert [source[row].captions for row in (0, 15)] == [["image 0"], ["image 15"]]


# Credentials ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://h/a.tar?X-Amz-Signature=abc&x=1 is gone", "https://h/a.tar is gone"),
        ("https://user:pass@h/a.tar", "https://h/a.tar"),
        ('{"p": "https://h/{0}.tar?sig=a::s3://k:s@b/c?d=e", "n": 1}', '{"p": "https://h/{0}.tar::s3://b/c", "n": 1}'),
        ("hf://datasets/o/n@rev/a.parquet", "hf://datasets/o/n@rev/a.parquet"),
        ("why? no address", "why? no address"),
    ],
)  # fmt: skip
def test_credentials_are_taken_out_of_texts(text, clean):
    assert without_credentials(text) == clean


def test_a_password_in_an_address_is_refused_and_not_repeated(server):
    address = server.address.replace("http://", "http://anna:sesame@")
    for remote_allowed in (False, True):
        with pytest.raises(DataError) as error:
            open_source(SourceConfig(f"{address}/s-000.tar"), remote=remote_allowed)
        assert "sesame" not in str(error.value)
        assert "anna" not in str(error.value)


@pytest.mark.parametrize("fault", ["", "403", "500", "gzip", "404", "whole"])
@pytest.mark.parametrize("kind", ["tar", "parquet", "jsonl"])
def test_signatures_are_used_and_never_shown(server, tokenizer, tmp_path, kind, fault):
    signed = dataclasses.replace(at(server, kind), path=f"{server.address}/s-00{{0,1}}.{kind}?X-Amz-Signature=sesame")
    if fault:
        server.faults["*"] = fault
        for read in (open_source, CaptionShards):
            with pytest.raises(DataError) as error:
                read(signed, True)
            assert "sesame" not in str(error.value)
            assert f"s-000.{kind}" in str(error.value)
        return
    one = feed(tokenizer, signed)
    batches = list(one.batches(0, 4, 0, 1, 4))
    shown = repr([(batch.keys, batch.bad) for batch in batches]) + json.dumps(one.remote_files()) + one.fingerprint()
    shown += "".join(source.identity() + repr(getattr(source, "notes", "")) for source in one.sources)
    shown += repr(list(map(str, (tmp_path / "cache").rglob("*"))))
    assert "sesame" not in shown
    assert "s-000" in shown


# Object stores and the hub --------------------------------------------------------------------------------------------


class Hub(LocalFileSystem):
    """A stub of the hub: hf://datasets/... are files of a folder, with the blob ids that the hub states."""

    protocol = ("hf",)
    folder = ""
    listed = 0

    @classmethod
    def _strip_protocol(cls, path):
        path = str(path).removeprefix("hf://")
        return path if path.startswith("/") else f"{cls.folder}/{path}"

    def info(self, path, **options):
        path = self._strip_protocol(getattr(path, "path", path))
        info = super().info(path, **options)
        if info["type"] == "directory":
            return info
        with open(path, "rb") as file:
            blob = hashlib.sha1(file.read()).hexdigest()
        return {"name": path, "size": info["size"], "type": "file", "blob_id": blob}

    def glob(self, path, **options):
        Hub.listed += 1
        names = super().glob(path, **options)
        return [name.removeprefix(f"{self.folder}/") for name in sorted(names, reverse=True)]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(Hub, "folder", str(tmp_path / "hub"))
    fsspec.register_implementation("hf", Hub, clobber=True)
    monkeypatch.setattr(remote, "_stores", {})
    folder = tmp_path / "hub" / "datasets/o/n"
    folder.mkdir(parents=True)
    yield folder
    from huggingface_hub import HfFileSystem

    fsspec.register_implementation("hf", HfFileSystem, clobber=True)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_glob_on_the_hub_is_listed_in_order(hub, tokenizer, kind, workers, streaming):
    write(hub, kind, 3, 8)
    files = [one.path for one in find(f"hf://datasets/o/n/s-*.{kind}", remote=True)]
    assert [str(file) for file in files] == [f"hf://datasets/o/n/s-{i:03}.{kind}" for i in range(3)]
    local, far = (
        feed(tokenizer, SourceConfig(f"{where}/s-*.{kind}"), workers, streaming=streaming)
        for where in (hub, "hf://datasets/o/n")
    )
    assert digest(local.batches(0, 8, 0, 1, 4)) == digest(far.batches(0, 8, 0, 1, 4))


@pytest.mark.parametrize("name", ["a [1].tar", "a#1.tar", "a?1.tar", "100%25.tar", "[12].tar"])
def test_names_in_a_store_may_have_any_letters(hub, shards, name):
    for other in (name, "1.tar"):
        shutil.copy(shards / "s-000.tar", hub / other)
    shutil.copy(shards / "s-001.tar", hub / name)
    source = open_source(SourceConfig(f"hf://datasets/o/n/{name}"), remote=True)
    assert [source.files[0].name, source[0].captions] == [name, ["image 8"]]
    listed = remote.find_remote("hf://datasets/o/n/*.tar", "source")
    assert sorted(file.name for file in listed) == sorted([name, "1.tar"])
    assert {file.stat().st_size for file in listed} == {(hub / name).stat().st_size, (hub / "1.tar").stat().st_size}


def test_the_hub_states_what_its_files_are(hub):
    write(hub, "tar", 1, 8)
    source = open_source(SourceConfig("hf://datasets/o/n/s-000.tar"), remote=True)
    blob = hashlib.sha1((hub / "s-000.tar").read_bytes()).hexdigest()
    assert json.loads(source.identity())[1] == [["hf://datasets/o/n/s-000.tar", 30720, blob]]
    with pytest.raises(DataError, match=r"folder: write hf://datasets/o/n/\*.tar"):
        open_source(SourceConfig("hf://datasets/o/n", format="tar"), remote=True)
    with pytest.raises(DataError, match="no such file"):
        open_source(SourceConfig("hf://datasets/o/n/none-*.tar"), remote=True)
    with pytest.raises(DataError, match=r"gone.tar: no such file"):
        open_source(SourceConfig("hf://datasets/o/n/gone.tar"), remote=True)


def test_another_process_meets_a_change_at_its_first_read(hub, tokenizer):
    write(hub, "tar", 1, 8)
    one = feed(tokenizer, SourceConfig("hf://datasets/o/n/s-000.tar"), workers=1)
    (hub / "s-000.tar").write_bytes((hub / "s-000.tar").read_bytes() + bytes(512))
    with pytest.raises(DataError, match=r"s-000.tar has changed while it was read"):
        list(one.batches(0, 2, 0, 1, 4))


def test_a_store_that_fails_now_and_then(hub, monkeypatch):
    write(hub, "tar", 1, 8)
    count = itertools.count()
    real = Hub.open

    def sometimes(self, *args, **options):
        if next(count) % 3:
            raise ConnectionError("SlowDown at https://h/?X-Amz-Signature=sesame")
        return real(self, *args, **options)

    monkeypatch.setattr(Hub, "open", sometimes)
    source = open_source(SourceConfig("hf://datasets/o/n/s-000.tar"), remote=True)
    assert [source[row].captions for row in range(8)] == [[f"image {row}"] for row in range(8)]

    def never(self, *args, **options):
        raise ConnectionError("SlowDown at https://h/?X-Amz-Signature=sesame")

    monkeypatch.setattr(Hub, "open", never)
    with pytest.raises(BadSample, match=r"ConnectionError: SlowDown at https://h/; tried 6 times"):
        source[0]


def test_a_store_whose_package_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(remote, "_stores", {})

    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(DataError, match=r"s3://b/a.tar cannot be read: Install s3fs to access S3"):
        open_source(SourceConfig("s3://b/a.tar"), remote=True)


# Reading --------------------------------------------------------------------------------------------------------------


def test_reading_in_sequence_and_with_seeks(server):
    content = os.urandom(100_000)
    (server.folder / "x.bin").write_bytes(content)
    file = RemoteFile(f"{server.address}/x.bin")
    with file.open("rb") as opened:
        assert opened.read(10) == content[:10]
        opened.seek(99_990)
        assert opened.read() == content[-10:]
        assert opened.seek(0, os.SEEK_END) == 100_000
        assert opened.read(5) == b""
    assert file.read_bytes() == content
    assert file.read_range(99_999, 10) == content[-1:]
    assert file.read_range(200_000, 10) == b""
    (server.folder / "short name.txt").write_text("ä\r\nb\n", encoding="utf-8-sig")
    named = RemoteFile(f"{server.address}/short%20name.txt?a=b#c")
    assert named.name == "short name.txt"
    assert named.stem == "short name"
    assert named.suffix == ".txt"
    assert named.open(encoding="utf-8-sig", newline="").read() == "ä\r\nb\n"
    assert str(named) == f"{server.address}/short%20name.txt"
    assert issubclass(Unreachable, DataError)
    assert issubclass(SourceChanged, DataError)


def test_large_ranges_are_several_requests(server, monkeypatch):
    monkeypatch.setattr(remote, "_MOST", 1000)
    content = os.urandom(3500)
    (server.folder / "x.bin").write_bytes(content)
    assert RemoteFile(f"{server.address}/x.bin").read_bytes() == content
    assert [size for _, _, size in server.requests] == [1, 1000, 1000, 1000, 500]


def test_bytes_of_images_are_used(server):
    assert open_source(at(server, "tar"), remote=True)[5].image == jpeg(5)
