"""Copies of images, images that must not be used, and texts that many images share."""

import hashlib
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from capfilt_crawl import annotations, jpeg, scored, write_tar
from PIL import Image

from blip.data.phash import phash as image_hash
from blip.errors import DataError
from capfilt.__main__ import main
from capfilt.report.counts import ReportOptions
from capfilt.report.write import report
from capfilt.score.scorer import BatchTooLarge, FakeScorer
from capfilt.select import phash
from capfilt.select.choose import select
from capfilt.select.policies import SelectConfig


def pattern(i):
    y, x = np.mgrid[:90, :120]
    channels = [(x * (i + 2) + y * y // (i + 3)) % 256, (x * y // (7 + i)) % 256, (y * 3 * (i % 4) + 40) % 256]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


GOLDEN = ["801f3e3833676c6d", "800f3c79634e5d5b", "802f3c636e6c59da", "801f7077664d5bd4", "813f31634c5b56b5"]
"""What imagehash 4.3.2 makes of the patterns."""


def encoded(image, form="PNG", **more):
    buffer = io.BytesIO()
    image.save(buffer, form, **more)
    return buffer.getvalue()


def test_hashes_are_those_of_imagehash():
    assert [image_hash(pattern(i)) for i in range(5)] == GOLDEN
    # An image of one colour has no waves but the first, and no noise in place of the others.
    assert image_hash(Image.new("RGB", (50, 40), (90, 80, 70))) == "8000000000000000"
    assert image_hash(Image.new("RGB", (50, 40))) == "0000000000000000"


def test_scaled_and_compressed_images_stay_near():
    for i in range(5):
        small = pattern(i).resize((40, 30), Image.Resampling.BICUBIC)
        for quality, most in ((20, 0), (8, 4)):
            other = image_hash(Image.open(io.BytesIO(encoded(small, "JPEG", quality=quality))))
            assert (int(other, 16) ^ int(GOLDEN[i], 16)).bit_count() <= most


@pytest.mark.parametrize("bits", range(phash.MOST + 1))
def test_near_ones_are_all_found(bits, monkeypatch):
    monkeypatch.setattr(phash, "_BLOCK", 50)  # so that groups are taken in pieces
    dice = np.random.default_rng(bits)
    hashes = dice.integers(0, 2**64, 400, dtype=np.uint64)
    for _ in range(200):  # neighbours at 0 to 9 bits
        flips = np.uint64(1) << dice.integers(0, 64, dice.integers(0, 10)).astype(np.uint64)
        hashes[dice.integers(400)] = hashes[dice.integers(400)] ^ np.bitwise_xor.reduce(flips, initial=np.uint64(0))
    apart = [[(int(a) ^ int(b)).bit_count() for b in hashes] for a in hashes]
    earlier = [any(apart[i][j] <= bits for j in range(i)) for i in range(400)]
    assert phash.later_ones(hashes, bits).tolist() == earlier
    assert 0 < sum(earlier) < 400
    near = [any(apart[i][j] <= bits for j in range(20, 90)) for i in range(400)]
    assert phash.near_any(hashes, hashes[20:90], bits).tolist() == near
    assert phash.near_any(hashes, hashes[:0], bits).sum() == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Images 0 to 4; 0 again as it is, 1 in another size, and a broken file of which there are two."""
    folder = tmp_path_factory.mktemp("copies")
    shrunk = encoded(pattern(1).resize((60, 45), Image.Resampling.BICUBIC), "JPEG", quality=8)  # 2 bits away
    images = [*(encoded(pattern(i)) for i in range(5)), encoded(pattern(0)), shrunk, b"<html>", b"<html>"]
    texts = ["one of five", "Stock photo!", "stock photo", "STOCK photo", "another", "the first again", "the second"]
    members = [(f"{i}.png", image) for i, image in enumerate(images)]
    members += [(f"{i}.txt", text.encode()) for i, text in enumerate([*texts, "lost", "lost"])]
    write_tar(folder / "in" / "a.tar", members)
    return scored(folder / "in" / "a.tar", folder / "run", part_size=4)


def dropped(run, name, **options):
    """Reasons of rules by key of the row, and the account of the selection."""
    import pyarrow.parquet as pq

    account = select(run, name, SelectConfig(itm=0.0, **options))
    texts = pq.read_table(run.storage.path(f"selections/{name}/texts.parquet")).to_pylist()
    keys = dict(zip(*(annotations(run)[c].to_pylist() for c in ("sample_id", "key")), strict=True))
    reasons = {}
    for text in texts:
        if text["reason"].startswith("rule "):
            reasons.setdefault(keys[text["sample_id"]], set()).add((text["text_source"], text["reason"]))
            assert not text["kept"]
    return reasons, account


def whole(reason):
    return {("web", reason), ("syn", reason)}


def test_hashes_are_annotated(run):
    rows = annotations(run).to_pylist()
    assert [row["phash64"] for row in rows[:5]] == GOLDEN
    assert rows[7]["phash64"] is None
    assert dropped(run, "none")[0] == {}  # and drop nothing by themselves


def test_duplicates(run):
    assert dropped(run, "bytes", duplicates="sha256")[0] == {"5": whole("rule duplicate")}
    assert dropped(run, "look", duplicates="phash64")[0] == {"5": whole("rule duplicate")}
    reasons, account = dropped(run, "near", duplicates="phash64", duplicate_bits=4)
    assert reasons == {"5": whole("rule duplicate"), "6": whole("rule duplicate")}
    assert account["reasons"]["dropped: rule duplicate"] == 4
    assert account["reasons"]["dropped: status decode_error"] == 2  # a copy of what is broken is no copy


class Small(FakeScorer):
    """A device on which one image does not fit."""

    def score(self, items):
        if any("heavy" in text for item in items for text in item.texts):
            raise BatchTooLarge
        return super().score(items)


@pytest.mark.parametrize("how", ["sha256", "phash64"])
def test_the_first_that_could_be_used_stays(tmp_path, how):
    images = [("a.png", encoded(pattern(0))), ("b.png", encoded(pattern(0))), ("c.png", encoded(pattern(0)))]
    texts = [("a.txt", b"a heavy one"), ("b.txt", b"the same"), ("c.txt", b"again")]
    maker = lambda run: Small(0, 1, "enc")  # noqa: E731
    run = scored(write_tar(tmp_path / "a.tar", images + texts), tmp_path / "run", maker=maker)
    assert annotations(run)["status"].to_pylist() == ["gpu_oom", "ok", "ok"]
    assert dropped(run, how, duplicates=how)[0] == {"c": whole("rule duplicate")}


def test_images_that_must_not_be_used(run, tmp_path):
    listed = tmp_path / "list.txt"
    sha = hashlib.sha256(encoded(pattern(3))).hexdigest()
    listed.write_text(f"# a test set\n{sha}  # by its bytes\n\n{GOLDEN[1].upper()}\n")
    assert dropped(run, "sha", contamination=str(listed))[0] == dict.fromkeys("31", whole("rule contaminated"))
    reasons, _ = dropped(run, "sha-near", contamination=str(listed), duplicate_bits=4, duplicates="sha256")
    assert reasons == dict.fromkeys("136", whole("rule contaminated")) | {"5": whole("rule duplicate")}
    listed.write_text(f"{GOLDEN[2]}\n")  # another list by the same name is another selection
    with pytest.raises(ValueError, match="exists with other settings"):
        select(run, "sha", SelectConfig(itm=0.0, contamination=str(listed)))


def test_a_run_on_a_test_set_is_a_list(run, tmp_path):
    test = scored(write_tar(tmp_path / "t.tar", [("x.png", encoded(pattern(4)))]), tmp_path / "test")
    assert dropped(run, "test", contamination=test.where)[0] == {"4": whole("rule contaminated")}


@pytest.mark.parametrize(("content", "error"), [("12345\n", "line 1: expected 64 hex"), ("# none\n", "no images")])
def test_a_wrong_list_is_said(run, tmp_path, content, error, capsys):
    (tmp_path / "list.txt").write_text(content)
    for where, message in ((tmp_path / "list.txt", error), (tmp_path / "gone.txt", "no such file")):
        with pytest.raises(DataError, match=message):
            select(run, "wrong", SelectConfig(contamination=str(where)))
    assert main(["select", run.where, "--name", "x", "--duplicate-bits", "9"]) == 2
    assert "duplicate_bits must be 0 to 6" in capsys.readouterr().err


def test_texts_that_many_images_share(run):
    only_web = {("web", "rule shared>2")}
    assert dropped(run, "shared", shared=2)[0] == {"1": only_web, "2": only_web, "3": only_web}
    assert dropped(run, "shared3", shared=3)[0] == {}


def test_a_text_that_one_image_has_often_is_not_shared(tmp_path):
    members = [("a.jpg", jpeg(0)), ("a.json", b'{"caption": ["one", "one", "one", "two"]}')]
    members += [("b.jpg", jpeg(1)), ("b.txt", b"two")]
    run = scored(write_tar(tmp_path / "a.tar", members), tmp_path / "run")
    assert dropped(run, "x", shared=1)[1]["reasons"]["dropped: rule shared>1"] == 2


def test_the_best_share_is_of_what_rules_leave(run):
    _, account = dropped(run, "best", policy="fraction", fraction=0.5, duplicates="sha256")
    counted = Counter(reason.partition(":")[0] for reason, n in account["reasons"].items() for _ in range(n))
    assert counted["kept"] == 6  # of 7 images with 2 texts each, 1 is a copy
    assert "rule duplicate" in Path(report(run, ReportOptions(select="best"))).read_text()
