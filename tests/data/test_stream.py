import dataclasses
import io
import itertools
import json
import os
import tarfile
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from blip.data.prepare.captions import PrepareCaptions, open_captions
from blip.data.settings import DataConfig, SourceConfig
from blip.data.stream import CaptionShards, Stream
from blip.data.transforms import EvalTransform, TrainTransform
from blip.errors import DataError


def jpeg(i):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (i % 256, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def write(folder, kind, shards, each, name="s", bad=()):
    for s in range(shards):
        numbers = range(s * each, (s + 1) * each)
        path = folder / f"{name}-{s:03}.{kind}"
        images = [b"broken" if i in bad else jpeg(i) for i in numbers]
        if kind == "tar":
            with tarfile.open(path, "w") as tar:
                for i, image in zip(numbers, images, strict=True):
                    for suffix, data in (("jpg", image), ("txt", f"image {i}".encode())):
                        info = tarfile.TarInfo(f"{name}{i:05}.{suffix}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
        elif kind == "parquet":
            pq.write_table(pa.table({"image": images, "caption": [f"image {i}" for i in numbers]}), path)
        else:
            for i, image in zip(numbers, images, strict=True):
                (folder / f"{name}{i}.jpg").write_bytes(image)
            lines = [json.dumps({"image": f"{name}{i}.jpg", "caption": f"image {i}"}) for i in numbers]
            path.write_text("\n".join(lines) + "\n")
    return SourceConfig(str(folder / f"{name}-*.{kind}"))


def stream(tokenizer, *sources, train=False, seed=0, **changes):
    settings = {"workers": 0, "worker_timeout": 20.0, "shuffle_buffer": 8, "streaming": True, **changes}
    config = DataConfig(list(sources), **settings)
    transform = TrainTransform(16, config) if train else EvalTransform(16)
    return Stream(open_captions(config), PrepareCaptions(transform, tokenizer, config), seed)


def load(s, *, batch=4, rank=0, world=1, start=0, steps=6):
    return s.batches(start, steps - start, rank, world, batch)


def keys(loader):
    return [k for b in loader for k in b.keys]


def number(batch, tokenizer):
    return [t.removeprefix("image ").replace(" ", "") for t in tokenizer.decode(batch.ids)]


@pytest.mark.parametrize("kind", ["tar", "parquet", "jsonl"])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_kind_of_shard_is_read_endlessly_and_whole(tmp_path, tokenizer, kind, workers):
    s = stream(tokenizer, write(tmp_path, kind, shards=4, each=6), workers=workers)
    assert len(s) == pytest.approx(24, abs=3)
    batches = list(load(s, batch=6, steps=20))
    assert [len(b) for b in batches] == [6] * 20
    counts = Counter(k for b in batches for k in b.keys)
    assert len(counts) == 24
    assert max(counts.values()) - min(counts.values()) <= 3
    for b in batches[:3]:
        assert all(int(n) < 24 for n in number(b, tokenizer))
        assert not b.bad


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (2, 2), (4, 2)])
def test_no_two_readers_share_a_sample_within_an_epoch(tmp_path, tokenizer, world, workers):
    s = stream(tokenizer, write(tmp_path, "tar", shards=8, each=6), workers=workers, shuffle_buffer=1)
    shown = [k for r in range(world) for k in keys(load(s, batch=3, rank=r, world=world, steps=12 // world))]
    assert len(shown) == len(set(shown)) == 36


@pytest.mark.parametrize(("shards", "consumers"), [(1, 4), (3, 4), (3, 7), (8, 3), (5, 5)])
def test_few_shards_are_shared_out_by_parts(tmp_path, tokenizer, shards, consumers):
    s = stream(tokenizer, write(tmp_path, "tar", shards=shards, each=9))
    for epoch in range(3):
        seen = Counter(
            r.key
            for c in range(consumers)
            for file, part, parts in s._share(0, epoch, c, consumers, 0)
            for r in s.shards[0].read(file, part, parts)
        )
        assert len(seen) == shards * 9
        assert set(seen.values()) == {1}


def test_more_readers_than_samples_is_an_error(tmp_path, tokenizer):
    s = stream(tokenizer, write(tmp_path, "tar", shards=1, each=2))
    with pytest.raises(DataError, match=r"reader 3 of 4 has nothing to read in 1 shards; use fewer workers"):
        keys(load(s, rank=3, world=4))


def test_the_same_start_repeats_and_another_reshuffles(tmp_path, tokenizer):
    source = write(tmp_path, "tar", shards=6, each=8)
    s = stream(tokenizer, source, train=True)
    first, again = list(load(s)), list(load(stream(tokenizer, source, train=True)))
    assert all(a.keys == b.keys and torch.equal(a.image, b.image) for a, b in zip(first, again, strict=True))
    resumed = load(s, start=3, steps=9)
    assert len(resumed) == 6
    assert keys(resumed) != keys(first)
    assert keys(load(stream(tokenizer, source, train=True, seed=1))) != keys(first)


def test_samples_are_shuffled_beyond_their_shards(tmp_path, tokenizer):
    s = stream(tokenizer, write(tmp_path, "tar", shards=10, each=20), shuffle_buffer=100)
    shards = [k.split("/")[0] for k in keys(load(s, batch=10, steps=10))]
    runs = [len(list(g)) for _, g in itertools.groupby(shards)]
    assert max(runs) <= 6
    assert len(set(shards[:20])) >= 3


def test_sources_are_mixed_by_weight(tmp_path, tokenizer):
    a = write(tmp_path, "parquet", shards=2, each=40, name="a")
    b = write(tmp_path, "parquet", shards=2, each=40, name="b")
    s = stream(tokenizer, a, SourceConfig(b.path, weight=0.25))
    assert len(s) == 100
    counts = Counter(k[0] for k in keys(load(s, batch=20, steps=30)))
    assert counts["b"] / 600 == pytest.approx(0.2, abs=0.05)


def test_bad_samples_are_replaced_and_reported(tmp_path, tokenizer):
    bad = {3, 4, 11}
    s = stream(tokenizer, write(tmp_path, "tar", shards=2, each=10, bad=bad))
    batches = list(load(s, batch=5, steps=8))
    assert all(len(b) == 5 for b in batches)
    reported = {x.key.rsplit("s", 1)[1] for b in batches for x in b.bad}
    assert reported == {f"{i:05}" for i in bad}
    assert not {k.rsplit("s", 1)[1] for b in batches for k in b.keys} & reported


def test_nothing_but_bad_samples_stops(tmp_path, tokenizer):
    s = stream(tokenizer, write(tmp_path, "tar", shards=1, each=10, bad=range(10)))
    with pytest.raises(DataError, match=r"64 samples in a row are unreadable"):
        keys(load(s))


def link(path):
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("a.jpg")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)


FAULTS = {
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:9000]), "is not a whole tar file"),
    "empty": (lambda path: path.write_bytes(b""), "is not a whole tar file"),
    "no tar": (lambda path: path.write_bytes(b"<html>" * 1000), "is not a whole tar file"),
    "linked": (link, "is a link or device"),
    "gone": (lambda path: path.unlink(), "cannot be read"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_found_broken_on_the_way_is_left_out_and_the_run_goes_on(tmp_path, tokenizer, fault, workers):
    source = write(tmp_path, "tar", shards=3, each=10)
    s = stream(tokenizer, source, workers=workers)
    FAULTS[fault][0](tmp_path / "s-001.tar")
    for start in (0, 7):  # and when it is started again
        batches = list(load(s, start=start, steps=start + 20))
        assert [len(b) for b in batches] == [4] * 20
        assert {key.split("/")[0] for b in batches for key in b.keys} == {"s-000.tar", "s-002.tar"}
        (bad,) = {(x.key, x.reason) for b in batches for x in b.bad}
        assert bad[0] == "s-001.tar"
        assert "the shard, or the rest of it, is left out" in bad[1]
        assert FAULTS[fault][1] in bad[1]


def test_the_first_shard_is_looked_at_before_the_run(tmp_path, tokenizer):
    source = write(tmp_path, "tar", shards=3, each=10)
    path = tmp_path / "s-000.tar"
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(DataError, match=r"s-000\.tar is not a whole tar file"):
        stream(tokenizer, source)


def test_when_no_shard_can_be_read_any_more_the_run_stops(tmp_path, tokenizer):
    s = stream(tokenizer, write(tmp_path, "tar", shards=3, each=10))
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    with pytest.raises(DataError, match=r"no shard can be read; .*s-00\d\.tar cannot be read"):
        keys(load(s))


def test_the_readable_part_of_a_shard_that_is_cut_off_may_be_used(tmp_path, tokenizer):
    source = write(tmp_path, "tar", shards=3, each=10)
    path = tmp_path / "s-001.tar"
    path.write_bytes(path.read_bytes()[:9000])
    allowed = stream(tokenizer, SourceConfig(source.path, allow_truncated=True))
    assert len(keys(load(allowed, steps=20))) == 80


@pytest.mark.parametrize("spec", ["pipe:touch CANARY", "http://x/{000..009}.tar", "${HOME}/*.tar", "nowhere/*.tar"])
def test_only_local_shards_are_read(tmp_path, tokenizer, spec, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"only local files|no such file"):
        stream(tokenizer, SourceConfig(spec, format="tar"))
    assert not list(tmp_path.iterdir())


def test_other_formats_say_what_streams(tmp_path, tokenizer):
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(DataError, match="streaming reads tar, parquet and jsonl"):
        stream(tokenizer, SourceConfig(str(tmp_path)))
    with pytest.raises(DataError, match="at least one source"):
        stream(tokenizer)


@pytest.mark.parametrize("kind", ["tar", "parquet", "jsonl"])
def test_an_image_root_that_is_not_there_is_said_at_the_start(tmp_path, kind):
    source = dataclasses.replace(write(tmp_path, kind, 1, 3), image_root=str(tmp_path / "gone"))
    with pytest.raises(DataError, match="gone is not a folder"):
        CaptionShards(source)


def test_a_worker_that_dies_is_one_error(tmp_path, tokenizer):
    class Deadly(EvalTransform):
        main = os.getpid()

        def __call__(self, image, *key, sided=False):
            if os.getpid() != self.main and key[-1] > 8:
                os._exit(3)
            return super().__call__(image)

    config = DataConfig(workers=2, worker_timeout=20.0, shuffle_buffer=8)
    shards = CaptionShards(write(tmp_path, "tar", shards=2, each=10))
    s = Stream([shards], PrepareCaptions(Deadly(16), tokenizer, config), 0)
    with pytest.raises(DataError, match=r"worker \d exited with status 3, while it read step \d"):
        keys(load(s, steps=20))


def test_the_training_loop_is_fed(tmp_path, tokenizer):
    s = stream(tokenizer, write(tmp_path, "parquet", shards=4, each=6))
    assert len(s) == 24
    assert keys(s.batches(2, 3, rank=1, world=2, batch_size=4)) == keys(load(s, rank=1, world=2, start=2, steps=5))
    assert s.fingerprint() == stream(tokenizer, SourceConfig(str(tmp_path / "s-*.parquet"))).fingerprint()
    assert s.fingerprint() != stream(tokenizer, SourceConfig(str(tmp_path / "s-*.parquet")), seed=1).fingerprint()


def annotated(folder, rows):
    """A folder with a file of rows and a picture of its own under the name that all folders use."""
    folder.mkdir(parents=True)
    (folder / "1.jpg").write_bytes(jpeg(0))
    (folder / "list.jsonl").write_text("".join(json.dumps({"image": "1.jpg", **row}) + "\n" for row in rows))


def all_records(config):
    shards = CaptionShards(config)
    return [record for file in shards.files for record in shards.read(file)]


def test_paths_start_at_the_folder_of_their_own_file(tmp_path):
    for name in "ab":
        annotated(tmp_path / name, [{"caption": name}])
        pq.write_table(pa.table({"image": ["1.jpg"], "caption": [name]}), tmp_path / name / "list.parquet")
    for kind in ("jsonl", "parquet"):
        config = SourceConfig(str(tmp_path / "*" / f"list.{kind}"))
        image_of = {r.captions[0]: r.image for r in all_records(config)}
        assert image_of == {name: tmp_path / name / "1.jpg" for name in "ab"}


def test_only_the_split_asked_for_is_shown(tmp_path):
    splits = ["train", "test", "restval", "test"]
    annotated(tmp_path / "a", [{"caption": split, "split": split} for split in splits])
    config = SourceConfig(str(tmp_path / "a/list.jsonl"), split="train+restval")
    assert [(r.key, r.captions) for r in all_records(config)] == [
        ("list.jsonl:0", ["train"]),
        ("list.jsonl:2", ["restval"]),
    ]
    assert CaptionShards(config).rows == 2
    with pytest.raises(
        DataError, match=r"list\.jsonl: no rows of split 'dev'; there are: restval \(1\), test \(2\), train \(1\)$"
    ):
        CaptionShards(SourceConfig(config.path, split="dev"))


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_split_that_shards_do_not_have_is_refused(tmp_path, kind):
    source = write(tmp_path, kind, shards=1, each=4)
    with pytest.raises(DataError, match=rf"{kind} sources have no splits; remove `split: train`"):
        CaptionShards(SourceConfig(source.path, split="train"))


def test_rows_are_named_by_their_place_in_the_file(tmp_path):
    annotated(tmp_path / "a", [{"caption": []}, {"caption": "x", "image": "gone.jpg"}, {"caption": "y"}])
    records = all_records(SourceConfig(str(tmp_path / "a/list.jsonl")))
    assert [r.key for r in records] == ["list.jsonl:0", "list.jsonl:1", "list.jsonl:2"]
    assert records[0].reason == "the row has no caption: its list is empty"
