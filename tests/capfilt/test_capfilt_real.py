"""The job on real photographs, emoji and broken images in tar shards, with wrong captions planted."""

import dataclasses
import hashlib
import json
from collections import Counter

import pytest
import real_shards
from capfilt_crawl import HERE, annotations, scored

from capfilt.calibrate.grade import grade
from capfilt.export import export
from capfilt.report.write import report
from capfilt.score.scorer import FakeScorer, Matched, Scores
from capfilt.select.choose import read_account, select
from capfilt.select.policies import SelectConfig
from capfilt.store.identity import sample_id
from capfilt.verify import verify

READ_ALL_THE_SAME = {
    "pillow_ded2d7_png_decompression_dos.png",  # its metadata is not unpacked
    "pillow_e3f68b_truncated_jpeg.jpg",  # it lacks nothing but its end marker
}


class Planted(FakeScorer):
    """A filter that knows where captions were planted."""

    wrong: frozenset = frozenset()

    def _score(self, item):
        margin = -4.0 if item.sample_id in self.wrong else 4.0
        return Scores([Matched(margin, 0.5, 9) for _ in item.texts], super()._score(item).syn)


@pytest.fixture(scope="module")
def whole(real_data, tmp_path_factory):
    """The samples, and a run on them with a selection and an export."""
    folder = tmp_path_factory.mktemp("real")
    samples = real_shards.write(folder / "in", real_data, photos=12, emoji=24, shard=150)
    Planted.wrong = frozenset(
        sample_id(f"{i // 150:05d}.tar", i % 150, f"{i:06d}")
        for i, (*_, record) in enumerate(samples)
        if record["kind"] == "planted"
    )
    many = dataclasses.replace(HERE, max_error_rate=1.0)  # two thirds of them are broken
    run = scored(folder / "in", folder / "run", 64, many, lambda run: Planted(0, 1, "enc"))
    select(run, "half", SelectConfig())
    export(run, "half", "wds", str(folder / "out"), by_format=True)
    return samples, run, folder / "out"


def test_every_image_is_used_or_refused_with_its_reason(whole):
    samples, run, _ = whole
    rows = annotations(run).to_pylist()
    assert len(rows) == len(samples) == 12 + 24 + 355
    refused = Counter()
    for (image, _, text, record), row in zip(samples, rows, strict=True):
        assert row["web_text"] == [text]
        assert row["image_sha256"] in (hashlib.sha256(image).hexdigest(), None)
        if record["kind"] != "broken":
            assert row["status"] == "ok", record
        elif row["status"] != "ok":
            refused[row["status"]] += 1
            assert row["error_code"], record
            assert row["syn_text"] == []
        elif record["file"] not in READ_ALL_THE_SAME:
            assert record["outcome"].startswith("ok"), record
    assert refused["decode_error"] > 100
    assert refused["truncated"] > 5


def test_planted_captions_are_dropped(whole):
    samples, run, _ = whole
    grades = grade(run, "half")
    planted = sum(record["kind"] == "planted" for *_, record in samples)
    assert grades["planted"].texts == planted > 8
    assert grades["planted"].kept == 0
    assert grades["right"].kept == grades["right"].texts == 36 - planted


def test_the_account_and_the_report_add_up(whole):
    samples, run, _ = whole
    account = read_account(run, "half")
    assert sum(account["rows_in"].values()) == len(samples)
    with open(report(run, None)) as file:
        page = file.read()
    assert len(page) < 5_000_000
    assert page.count("<img ") > 30
    for _, _, _, record in samples[:5]:
        assert record["file"] not in page or record["kind"] != "broken"


def test_verify_notices_any_changed_byte(whole):
    _, run, out = whole
    assert verify(run.where).status() == 0
    part = run.storage.path(f"parts/{run.plan[0].pid[:2]}/{run.plan[0].pid}.parquet")
    for path in (part, out / "png/00000.tar", run.storage.path("selections/half/texts.parquet")):
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        problems = verify(run.where)
        path.write_bytes(content)
        assert problems.status() == 4, path
        assert path.name in problems.problems[0]
    assert verify(run.where).status() == 0
    assert json.loads((out / "_SUCCESS").read_bytes())["pairs"] > 0
