import io
import json
import math
import os
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from capfilt_crawl import (
    HERE,
    Starter,
    annotations,
    check_complete,
    crawl,
    jpeg,
    make_fake,
    planned,
    sample,
    scored,
    write_tar,
)
from PIL import Image

from blip import startup
from blip.errors import DataError
from capfilt.__main__ import main
from capfilt.run import Run
from capfilt.schema import ANNOTATIONS, ERROR_CODES, STATUSES
from capfilt.score import decoding, pool
from capfilt.score.loop import ScoreOptions, TooManyErrors, Worker, make_pool, score
from capfilt.score.progress import ScoringProgress, clock, line_of
from capfilt.score.scorer import BatchTooLarge, FakeScorer, Item
from capfilt.select.choose import select
from capfilt.select.policies import SelectConfig
from capfilt.settings import ScoreConfig
from capfilt.store.storage import Local
from capfilt.verify import verify

BOMB = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (20000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"


def with_crc(png):
    import zlib

    return png + zlib.crc32(png[12:]).to_bytes(4, "big") + b"\0\0\0\0IEND\xaeB`\x82"


def animation(form):
    frames = [Image.new("RGB", (20, 20), (v, 0, 0)) for v in (0, 200)]
    buffer = io.BytesIO()
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:], duration=100)
    return buffer.getvalue()


def scans(count):
    """A progressive JPEG, its last scan again and again."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (9, 90, 9)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + data[-2:]


def rotated():
    image, buffer = Image.new("RGB", (30, 10)), io.BytesIO()
    exif = image.getexif()
    exif[274] = 6
    image.save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def lossless():
    buffer = io.BytesIO()
    Image.effect_noise((60, 60), 80).convert("RGB").save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def deep():
    buffer = io.BytesIO()
    Image.new("I;16", (8, 8), 40000).save(buffer, "PNG")
    return buffer.getvalue()


ODD = {
    "truncated": (jpeg(1, (200, 200))[:-300], "truncated", "truncated"),
    "cut_webp": (jpeg(1, (200, 200), "WEBP")[:-20], "truncated", "truncated"),
    "cut_lossless_webp": (lossless()[:-1], "truncated", "truncated"),
    "page": (b"<!DOCTYPE html><html></html>", "decode_error", "html_page"),
    "empty": (b"", "decode_error", "empty_file"),
    "svg": (b"<svg xmlns='x'/>", "decode_error", "xml_or_svg"),
    "noise": (b"\x01\x02\x03" * 50, "decode_error", "not_an_image"),
    "tiff": (b"II*\0" + b"\0" * 50, "decode_error", "not_an_image"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "decode_error", "git_lfs_pointer"),
    "bomb": (with_crc(BOMB), "too_large", "too_many_pixels"),
    "thin": (
        with_crc(BOMB[:16] + (1).to_bytes(4, "big") + (2000).to_bytes(4, "big") + BOMB[24:]),
        "too_large",
        "too_many_pixels",
    ),
    "scans": (scans(120), "too_large", "too_much_work"),
    "cmyk": (jpeg(3, mode="CMYK"), "ok", None),
    "deep": (deep(), "ok", None),
    "palette": (jpeg(4, form="PNG", mode="P"), "ok", None),
    "gif": (animation("GIF"), "ok", None),
    "webp": (animation("WEBP"), "ok", None),
    "avif": (animation("AVIF"), "ok", None),
    "pages": (animation("TIFF"), "ok", None),
    "turned": (rotated(), "ok", None),
}


def test_every_odd_image_has_its_status_and_harms_no_other(tmp_path):
    """Fault 7."""
    good = [m for i in range(60) for m in sample(f"good{i:03d}", i)]
    clean = scored(write_tar(tmp_path / "clean" / "a.tar", good), tmp_path / "run-clean")
    odd = [m for k, (data, *_) in ODD.items() for m in ((f"odd_{k}.jpg", data), (f"odd_{k}.txt", b"an odd one"))]
    mixed = good[:60] + odd + good[60:]
    run = scored(write_tar(tmp_path / "mixed" / "a.tar", mixed), tmp_path / "run")
    rows = {r["key"]: r for r in annotations(run).to_pylist()}
    for key, (data, status, code) in ODD.items():
        row = rows[f"odd_{key}"]
        assert (row["status"], row["error_code"]) == (status, code), key
        assert row["bytes"] == len(data)
        assert bool(row["syn_text"]) == (status == "ok")
        assert row["web_text"] == ["an odd one"]
    assert (rows["odd_turned"]["width"], rows["odd_turned"]["height"]) == (10, 30)
    assert rows["odd_gif"]["n_frames"] == rows["odd_webp"]["n_frames"] == 2
    assert rows["odd_avif"]["n_frames"] == rows["odd_pages"]["n_frames"] == 2
    assert (rows["odd_avif"]["format"], rows["odd_pages"]["format"]) == ("AVIF", "TIFF")
    assert "image.animated" in rows["odd_gif"]["rule_flags"]
    # The same image with the same id: only its row number in the file, and so its id, may be another.
    same = ["image_sha256", "width", "status", "web_text", "itm_web", "itc_web", "rule_flags"]
    for row in annotations(clean).to_pylist():
        assert {k: rows[row["key"]][k] for k in same} == {k: row[k] for k in same}
    assert all(r["status"] in STATUSES and r["error_code"] in (None, *ERROR_CODES) for r in rows.values())


@pytest.mark.slow
def test_broken_images_among_many_harm_no_neighbour(tmp_path):
    """Fault 7: 3.5% of 2,400; the rest is the same to the bit as where the broken ones are whole."""
    broken = [content for content, status, _ in ODD.values() if status != "ok"]
    runs = []
    for name in ("whole", "mixed"):
        images = [jpeg(i) if name == "whole" or i * 7919 % 200 >= 7 else broken[i % len(broken)] for i in range(2400)]
        members = [(f"{i:04d}.jpg", image) for i, image in enumerate(images)]
        members += [(f"{i:04d}.txt", f"image {i}".encode()) for i in range(2400)]
        options = replace(HERE, batch=32)
        runs.append(scored(write_tar(tmp_path / name / "a.tar", members), tmp_path / f"{name}-run", options=options))
    whole, mixed = (annotations(run).to_pylist() for run in runs)
    refused = [row["status"] for row in mixed if row["status"] != "ok"]
    assert len(refused) == 84
    assert set(refused) == {"truncated", "decode_error", "too_large"}
    # Parts have other ids, because the file is another.
    assert all(
        {**a, "part_id": 0} == {**b, "part_id": 0} for a, b in zip(whole, mixed, strict=True) if b["status"] == "ok"
    )


def test_lenient_decodes_and_flags_what_strict_refuses(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", ODD["truncated"][0]), ("a.txt", b"half an image")])
    (row,) = annotations(scored(path, tmp_path / "run", lenient=True)).to_pylist()
    assert row["status"] == "ok"
    assert "image.truncated" in row["rule_flags"]


def test_error_details_name_no_addresses(tmp_path, monkeypatch):
    from capfilt.score import decoding

    def refuse(*_):
        raise decoding.UnreadableImage(
            "decoder_error", "OSError: cannot identify <_io.BytesIO object at 0x7f00aa11bb22>"
        )

    monkeypatch.setattr(decoding, "model_input", refuse)
    (row,) = annotations(scored(write_tar(tmp_path / "a.tar", sample("a", 0)), tmp_path / "run", status=2)).to_pylist()
    assert row["error_detail"] == "OSError: cannot identify <_io.BytesIO object>"


@pytest.mark.parametrize("lenient", [False, True])
def test_what_fails_after_decoding_is_the_row_s_fault_as_well(tmp_path, monkeypatch, lenient):
    from capfilt.score import decoding

    ours = decoding.phash

    def hash_of(image):
        if image.size == (33, 33):
            raise MemoryError
        return ours(image)

    monkeypatch.setattr(decoding, "phash", hash_of)
    members = [m for i in range(4) for m in sample(f"good{i}", i)] + [("x.jpg", jpeg(1, (33, 33))), ("x.txt", b"an x")]
    run = scored(write_tar(tmp_path / "a.tar", members), tmp_path / "run", lenient=lenient)
    outcomes = {row["key"]: (row["status"], row["error_code"]) for row in annotations(run).to_pylist()}
    assert outcomes == {**{f"good{i}": ("ok", None) for i in range(4)}, "x": ("too_large", "too_much_memory")}


TEXTS = {
    "empty": b"",
    "long": b"word " * 20_000,
    "not utf-8": b"caf\xe9 \xff",
    "emoji": "\U0001f600\U0001f680".encode(),
    "right to left": "שלום עולם".encode(),
    "script": b"</script><script>alert(1)</script>",
    "lines": b"one\r\ntwo\x0bthree\xe2\x80\xa8four",
    "nul": b"a\0b",
    "punctuation": b"...!!!",
}


def test_every_text_is_kept_as_it_was_and_scored_as_training_sees_it(tmp_path):
    """Fault 10."""
    members = [m for i, t in enumerate(TEXTS.values()) for m in ((f"{i}.jpg", jpeg(i)), (f"{i}.txt", t))]
    rows = annotations(scored(write_tar(tmp_path / "a.tar", members), tmp_path / "run")).to_pylist()
    for row, (name, raw) in zip(rows, TEXTS.items(), strict=True):
        assert row["web_text"] == [raw.decode("utf-8", "replace")[:10_000]], name
        scorable = name not in ("empty", "punctuation")
        assert row["status"] == ("ok" if scorable else "no_text"), name
        assert (row["web_text_norm"][0] is not None) == scorable
        assert (row["itm_web"][0] is not None) == scorable
        assert len(row["syn_text"]) == 1
    norm = [row["web_text_norm"][0] for row in rows]
    assert norm[1] == " ".join(["word"] * 30)
    assert norm[5] == "</script><script>alert 1 </script>"
    assert norm[6] == "one two three four"
    assert [row["web_tokens"][0] for row in rows][1] == 32


def test_half_a_character_in_an_address_costs_nothing(tmp_path):
    """JSON can hold what no table can."""
    members = [m for i in range(3) for m in sample(str(i), i, extra={"url": "http://x/\ud800y" if i == 1 else "u"})]
    run = scored(write_tar(tmp_path / "a.tar", members), tmp_path / "run")
    assert annotations(run)["url"].to_pylist() == ["u", "http://x/y", "u"]


def test_rows_without_a_text_are_captioned_all_the_same(tmp_path):
    """Fault 10: null, and null among others."""
    captions = [None, [None, "a text"], [], ["a", None]]
    rows = [{"image": jpeg(i), "caption": c if isinstance(c, list) else c and [c]} for i, c in enumerate(captions)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    rows = annotations(scored(tmp_path / "a.parquet", tmp_path / "run")).to_pylist()
    assert [row["web_text"] for row in rows] == [[], ["a text"], [], ["a"]]
    assert [row["status"] for row in rows] == ["no_text", "ok", "no_text", "ok"]
    assert all(row["syn_text"] for row in rows)


def test_schema_and_provenance(tmp_path):
    run = scored(crawl(tmp_path / "in", shards=1, rows=3), tmp_path / "run", captions=2)
    table = run.parts.read(run.plan[0].pid)
    assert table.schema.equals(ANNOTATIONS)
    row = table.to_pylist()[1]
    assert row["url"] == "http://x/1"
    assert json.loads(row["extra_json"]) == {"url": "http://x/1"}
    assert len(row["syn_text"]) == len(row["itm_syn"]) == 2
    for p, margin in zip(row["itm_web"] + row["itm_syn"], row["itm_margin_web"] + row["itm_margin_syn"], strict=True):
        assert p == pytest.approx(1 / (1 + math.exp(-margin)), abs=1e-6)
    from capfilt.store.parts import facts_of, name_of

    facts = facts_of(run.storage.read(name_of(run.plan[0].pid)))
    assert facts["fingerprint"] == run.fingerprint
    assert facts["seed"] == "0"


def test_batches_order_and_processes_change_nothing(tmp_path):
    """Faults 12 and 21: batch sizes, decoding in or out of this process, 1, 3 and 5 ranks."""
    folder = crawl(tmp_path / "in")
    base = scored(folder, tmp_path / "base")
    for n, options in enumerate([ScoreOptions(batch=1, decode_workers=0), ScoreOptions(batch=7, decode_workers=2)]):
        check_complete(scored(folder, tmp_path / f"b{n}", options=options).where, base)
    run = planned(folder, tmp_path / "ranks")
    for world in (3, 1, 5):  # the number of processes changes while the run is under way
        for rank in range(world):
            if world == 3 and rank == 1:
                continue  # this one died
            limit = None if world == 5 else 40
            assert score(run, make_fake, replace(HERE, rank=rank, world=world, limit=limit), io.StringIO()) == 0
    check_complete(run.where, base)


def test_ranks_share_the_parts_without_overlap(tmp_path):
    run = planned(crawl(tmp_path / "in"), tmp_path / "run", part_size=4)
    shares = [{p.pid for p in run.share(r, 3)} for r in range(3)]
    assert sum(map(len, shares)) == len(set.union(*shares)) == len(run.plan)
    assert min(map(len, shares)) > 3


def test_a_launcher_says_which_share_is_whose(tmp_path, monkeypatch):
    """Fault 12: RANK and WORLD_SIZE, as torchrun, accelerate and a batch script set them."""
    folder = crawl(tmp_path / "in")
    run = planned(folder, tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        before = run.parts.present().keys()
        assert main(["score", run.where, "--decode-workers", "0"]) == 0
        assert run.parts.present().keys() - before == {part.pid for part in run.share(rank, 3)}
    check_complete(run.where, scored(folder, tmp_path / "base"))


def test_a_process_lists_the_parts_once(tmp_path, monkeypatch):
    """In an object store a list of a million parts is a thousand requests."""
    run, listed, listing = planned(crawl(tmp_path / "in"), tmp_path / "run"), [], Local.listing
    monkeypatch.setattr(Local, "listing", lambda self, folder: listed.append(folder) or listing(self, folder))
    assert score(run, make_fake, HERE, io.StringIO()) == 0
    assert listed.count("parts") == 1


def test_an_open_plan_is_kept_once(tmp_path):
    """A plan may have a million parts and as many files."""
    run = planned(crawl(tmp_path / "in"), tmp_path / "run")
    assert "inputs" not in run.job
    assert len({id(part.source) for part in run.plan}) == len(run.sources) == 3 < len(run.plan)
    assert not hasattr(run.plan[0], "__dict__")


def test_a_limited_run_is_reused_by_the_full_one(tmp_path):
    folder = crawl(tmp_path / "in", shards=4)
    run = planned(folder, tmp_path / "run")
    assert score(run, make_fake, replace(HERE, limit=40), io.StringIO()) == 0
    first = run.parts.present()
    assert 40 <= sum(p.rows for p in run.plan if p.pid in first) < 56
    assert len({p.source for p in run.plan if p.pid in first}) > 1
    out = io.StringIO()
    assert score(run, make_fake, HERE, out) == 0
    assert f"{len(first)} of 12 parts are done" in out.getvalue()
    assert {pid: run.parts.present()[pid] for pid in first} == first
    check_complete(run.where, scored(folder, tmp_path / "base"))


class Bad(FakeScorer):
    """Scores that are no numbers for some texts, memory that is too small for some batches, errors."""

    nan_for, fits, big, raises = "", 10**9, "", 0

    def score(self, items):
        if self.raises:
            Bad.raises -= 1
            raise RuntimeError("CUDA error: unspecified launch failure")
        if len(items) > self.fits or any(self.big and self.big in t for i in items for t in i.texts):
            raise BatchTooLarge
        return super().score(items)

    def _match(self, text, seen, shift):
        match = super()._match(text, seen, shift)
        return replace(match, margin=math.nan) if self.nan_for and self.nan_for in text.split() else match


def make_bad(monkeypatch, **faults):
    for name, value in faults.items():
        monkeypatch.setattr(Bad, name, value)
    return lambda run: Bad(run.config.seed, run.config.captions, run.config.itm_token)


def test_out_of_memory_halves_the_batch(tmp_path, monkeypatch):
    """Fault 20."""
    folder = crawl(tmp_path / "in", shards=1)
    base = scored(folder, tmp_path / "base")
    check_complete(scored(folder, tmp_path / "a", maker=make_bad(monkeypatch, fits=3)).where, base)
    run = scored(folder, tmp_path / "b", maker=make_bad(monkeypatch, fits=3, big="number 7"))
    rows = annotations(run).to_pylist()
    assert [r["key"] for r in rows if r["status"] == "gpu_oom"] == ["0_0007"]


class Counting(FakeScorer):
    """Notes how many items it is shown; room for so many texts at once."""

    batch_size = 16

    def __init__(self, room):
        super().__init__(0, 1, "enc")
        self.room, self.sizes = room, []

    def score(self, items):
        self.sizes.append(len(items))
        if sum(len(item.texts) for item in items) > self.room:
            raise BatchTooLarge
        return super().score(items)


class LookingAhead(FakeScorer):
    """Writes down what it gets, and when."""

    def __init__(self):
        super().__init__(0, 1, "enc")
        self.calls = []

    def ahead(self, items):
        self.calls.append(("ahead", [item.sample_id for item in items]))

    def score(self, items):
        self.calls.append(("score", [item.sample_id for item in items]))
        return super().score(items)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_scorer_may_begin_with_the_next_batch(tmp_path, workers):
    """It gets each batch before the one ahead of it is scored, so that its images are encoded beside other work."""
    folder, scorer = crawl(tmp_path / "in", shards=1, rows=41), LookingAhead()
    options = replace(HERE, batch=8, decode_workers=workers)
    run = scored(folder, tmp_path / "run", part_size=20, options=options, maker=lambda run: scorer)
    sizes = [(name, len(ids)) for name, ids in scorer.calls]
    parts = {20: [("ahead", 8), ("score", 8), ("ahead", 4), ("score", 8), ("score", 4)], 1: [("score", 1)]}
    assert sizes == [call for part in sorted(run.plan, key=lambda part: part.pid) for call in parts[part.rows]]
    begun = [ids for name, ids in scorer.calls if name == "ahead"]
    assert all(ids in [ids for name, ids in scorer.calls if name == "score"] for ids in begun)
    check_complete(run.where, scored(folder, tmp_path / "base", part_size=20))


def test_one_row_does_not_shrink_the_batch_of_the_others(tmp_path):
    """Two halves of which one is to blame leave the batch alone; a batch that is too large is tried again later."""
    many = [*sample("0_0003", 3)[:1], ("0_0003.json", json.dumps({"caption": ["a star"] * 60}).encode())]
    ones = [m for i in range(128) for m in (many if i == 3 else sample(f"0_{i:04d}", i))]
    write_tar(tmp_path / "in" / "a.tar", ones)
    scorer = Counting(room=40)
    run = scored(tmp_path / "in", tmp_path / "run", part_size=128, maker=lambda run: scorer)
    # 16 with the row of 60 texts: its halves of 8, 4, 2 and 1 until it is alone, each with its other half.
    assert scorer.sizes == [16, 8, 4, 2, 2, 1, 1, 4, 8, *[16] * 7]
    assert Counter(r["status"] for r in annotations(run).to_pylist()) == {"ok": 127, "gpu_oom": 1}
    worker = Worker(run, Counting(room=10), ScoreOptions(decode_workers=0))
    for k in range(12):
        worker.show([Item(f"{k}-{i}", [np.zeros((16, 16, 3), np.uint8)], ["x"]) for i in range(worker.batch)])
    # Halved when 16 do not fit; the two halves of 8 are enough the first time, later 4, 8, ... have to pass.
    assert worker.scorer.sizes == [16, 8, 8, 16, 8, 8, 8, 8, 16, *[8] * 8, 16, 8, 8]


def test_a_row_has_at_most_a_hundred_texts_of_ten_thousand_characters(tmp_path):
    texts = ["a red star", "long " * 4000, *(f"text {i}" for i in range(148))]
    members = [("a.jpg", jpeg(1)), ("a.json", json.dumps({"caption": texts}).encode())]
    write_tar(tmp_path / "in" / "a.tar", [*members, *sample("b", 2)])
    out = io.StringIO()
    run = planned(tmp_path / "in", tmp_path / "run")
    assert score(run, make_fake, HERE, out) == 0
    row, other = annotations(run).to_pylist()
    assert row["status"] == other["status"] == "ok"
    assert len(row["web_text"]) == len(row["itm_web"]) == 100
    assert row["web_text"][1] == ("long " * 4000)[:10_000]
    assert row["web_text_norm"][1] == " ".join(["long"] * 30)
    assert {"row.texts>100", "web1.chars>10000"} <= set(row["rule_flags"])
    assert row["error_detail"] == "texts beyond the first 100, left out: 50; texts cut at 10,000 characters: 1"
    assert other["error_detail"] is None
    assert '"texts_left_out": 50' in out.getvalue()


def test_scores_that_are_no_numbers_are_set_aside(tmp_path, monkeypatch):
    """Fault 22."""
    folder = crawl(tmp_path / "in", shards=1)
    rows = annotations(scored(folder, tmp_path / "run", maker=make_bad(monkeypatch, nan_for="7"))).to_pylist()
    (bad,) = [r for r in rows if r["status"] == "score_invalid"]
    assert bad["key"] == "0_0007"
    assert bad["itm_web"] == bad["itc_web"] == [None]
    assert bad["itm_syn"] == [None]
    account = select(Run.open(str(tmp_path / "run")), "all", SelectConfig(itm=0.0))
    assert account["reasons"]["dropped: status score_invalid"] == 2
    assert sum(account["kept"].values()) == 78


def test_a_filter_that_gives_no_numbers_is_noticed(tmp_path, monkeypatch):
    """Fault 22: the job stops before it has gone through the crawl."""
    run = planned(crawl(tmp_path / "in", rows=100), tmp_path / "run")
    with pytest.raises(TooManyErrors, match="score_invalid"):
        score(run, make_bad(monkeypatch, nan_for="image"), HERE, io.StringIO())


def test_an_error_is_tried_again_and_then_written_down(tmp_path, monkeypatch, capsys):
    folder = crawl(tmp_path / "in", shards=1)
    base = scored(folder, tmp_path / "base")
    check_complete(scored(folder, tmp_path / "a", maker=make_bad(monkeypatch, raises=2)).where, base)
    run = planned(folder, tmp_path / "b")
    assert score(run, make_bad(monkeypatch, raises=10**9), HERE, io.StringIO()) == 3
    assert not run.parts.present()
    note = json.loads(next((tmp_path / "b" / "failures").glob("*.5.json")).read_bytes())
    assert "unspecified launch failure" in note["traceback"]
    out = io.StringIO()
    assert score(run, make_fake, HERE, out) == 3  # failed parts stay failed ...
    assert "failed 5 times" in out.getvalue()
    assert main(["status", run.where]) == 0
    assert "failed 5 times" in capsys.readouterr().out
    assert main(["retry-failed", run.where]) == 0  # ... until somebody says so
    assert score(run, make_fake, HERE, io.StringIO()) == 0
    check_complete(run.where, base)


@pytest.mark.parametrize("what", ["abort", "hang"])
def test_a_image_that_kills_the_decoder_costs_one_row(tmp_path, monkeypatch, what):
    """Fault 8."""
    folder = crawl(tmp_path / "in", shards=1)
    base = {r["key"]: r for r in annotations(scored(folder, tmp_path / "base")).to_pylist()}
    monkeypatch.setenv("CAPFILT_FAULT", f"decode.{what}@0_0009")
    options = ScoreOptions(decode_workers=1, decode_timeout=1.5)
    rows = annotations(scored(folder, tmp_path / "run", options=options)).to_pylist()
    expected = {"abort": ("crash", "decoder_crashed"), "hang": ("timeout", "decoder_timeout")}[what]
    for row in rows:
        if row["key"] == "0_0009":
            assert (row["status"], row["error_code"]) == expected
            assert row["sample_id"] == base["0_0009"]["sample_id"]
            assert row["image_sha256"] == base["0_0009"]["image_sha256"]
        else:
            assert row == base[row["key"]]


BROKEN = {
    "no module": ("import openblip_of_another_planet", "No module named 'openblip_of_another_planet'"),
    "its own words": ("import sys; sys.exit('no room here')", "no room here"),
    "a signal": ("import os; os.abort()", "by signal 6"),
    "nothing": ("", "it ended at once"),
}


@pytest.mark.parametrize("how", [*BROKEN, "no program"])
def test_a_decoder_that_cannot_start_ends_the_job_and_blames_no_row(tmp_path, monkeypatch, capsys, how):
    folder = crawl(tmp_path / "in", shards=1)
    run = planned(folder, tmp_path / "run")
    code, message = BROKEN.get(how, ("", "No such file"))
    program = "/no/such/python" if how == "no program" else sys.executable
    with monkeypatch.context() as patch:
        patch.setattr(startup, "python", lambda *_: [program, "-c", code])
        assert main(["score", run.where, "--decode-workers", "2"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: decoding cannot start: ")
    assert message in last
    assert not run.parts.present()
    assert not list((tmp_path / "run" / "failures").glob("*")), "a part was blamed"
    if how == "no module":
        assert main(["score", run.where, "--decode-workers", "1"]) == 0
        check_complete(run.where, scored(folder, tmp_path / "base"))


def test_a_library_that_decodes_nothing_is_noticed_before_the_first_row(monkeypatch):
    monkeypatch.setattr(
        pool, "prepare", lambda row, sides, config: decoding.prepare(replace(row, image=b""), sides, config)
    )
    with pytest.raises(RuntimeError, match="a sound image is not decoded"):
        pool._try_out()


def test_what_reads_a_file_is_missing_and_no_row_is_to_blame(tmp_path, monkeypatch):
    run = planned(crawl(tmp_path / "in", shards=1), tmp_path / "run")

    class Reader:
        def read(self, lo, hi):
            raise ImportError("No module named 'av'")
            yield

    monkeypatch.setattr(pool, "Reader", lambda *_: Reader())
    with pytest.raises(pool.BrokenDecoder, match="No module named 'av'"):
        score(run, make_fake, HERE, io.StringIO())
    assert not run.parts.present()


def test_decoders_are_counted_where_the_system_binds_no_cores(monkeypatch):
    """macOS and Windows have no os.sched_getaffinity."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    made = make_pool(None, ScoreOptions(), 8)
    assert len(made._threads) == 4
    made.close()


def test_after_a_death_decoding_moves_out_of_the_process(tmp_path):
    """Fault 8, where decoding in the process itself kills it: the second attempt finds the row."""
    folder = crawl(tmp_path / "in", shards=1)
    run, starter = planned(folder, tmp_path / "run"), Starter(tmp_path / "log")
    fault = {"CAPFILT_FAULT": "decode.abort@0_0009"}
    assert starter.run("score", run.where, "--decode-workers", "0", **fault) < 0
    assert starter.run("score", run.where, "--decode-workers", "0", **fault) == 0
    starter.close()
    statuses = {r["key"]: r["status"] for r in annotations(run).to_pylist()}
    assert [k for k, s in statuses.items() if s != "ok"] == ["0_0009"]
    assert verify(run.where).status() == 0


def test_a_wrong_column_is_noticed_before_much_is_done(tmp_path):
    rows = [{"image": f"gone/{i}.jpg", "caption": "x"} for i in range(3000)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    run = planned(tmp_path / "a.json", tmp_path / "run", part_size=500)
    with pytest.raises(DataError, match=r"100% of the first 2000 rows cannot be used \(no_image 2000\)"):
        score(run, make_fake, HERE, io.StringIO())
    assert score(run, make_fake, replace(HERE, max_error_rate=1.0), io.StringIO()) == 0


@pytest.mark.parametrize("name", ["aling", "junk"])
def test_rules_first_are_those_of_image_files(name):
    with pytest.raises(ValueError, match=f"rules_first '{name}': expected one of align, datacomp-basic, laion"):
        ScoreConfig(scorer="fake", rules_first=name)


def test_rules_first_leaves_out_before_the_models(tmp_path):
    big = io.BytesIO()
    Image.effect_noise((300, 300), 90).convert("RGB").save(big, "JPEG")
    members = [
        ("small.jpg", jpeg(0)),
        ("small.txt", b"a"),
        ("big.jpg", big.getvalue()),
        ("big.txt", b"a dog in a park"),
    ]
    run = scored(write_tar(tmp_path / "a.tar", members), tmp_path / "run", rules_first="align")
    small, large = annotations(run).to_pylist()
    assert (small["status"], small["error_detail"], small["syn_text"]) == ("rule", "image.min_side<200", [])
    assert (large["status"], large["rule_flags"]) == ("ok", [])
    assert "web.words<3" in small["rule_flags"]


def test_dry_run_writes_nothing(tmp_path, capsys):
    run = planned(crawl(tmp_path / "in"), tmp_path / "run")
    before = set((tmp_path / "run").rglob("*"))
    assert main(["score", run.where, "--dry-run", "--decode-workers", "0"]) == 0
    assert set((tmp_path / "run").rglob("*")) == before
    stdout = capsys.readouterr().out
    assert "120 rows in 9 parts, 120 rows to do" in stdout
    assert "images/s" in stdout


def test_progress_says_what_is_left():
    out = io.StringIO()
    progress = ScoringProgress(100, 20, 10, 2, out)
    progress._begun -= 10
    progress._marks[0] = (progress._begun, 20)
    progress.stages = {"models": 3.0, "decode": 1.0}
    row = {"status": "ok", "itm_web": [0.9], "itm_syn": [0.2, None]}
    progress.add([row] * 18 + [{**row, "status": "truncated"}] * 2)
    assert progress.rate() == pytest.approx(2.0, rel=0.05)  # what was inherited is not part of it
    assert progress.seconds_left()[0] == pytest.approx(30, rel=0.05)
    line = line_of(progress.report())
    for part in ("rows 40/100 40.0%", "web 100.0% syn 0.0%", "truncated 10.00%", "models busy 75%, wait decode 25%"):
        assert part in line
    progress.say(always=True)
    assert json.loads(out.getvalue())["rows"] == 40
    assert [clock(s) for s in (5, 65, 7500)] == ["5s", "1m05", "2h05"]
