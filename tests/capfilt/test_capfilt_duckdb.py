"""The ten queries of docs/duckdb.md, each on a small run, against the same counts by hand."""

import re
from collections import Counter, defaultdict
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from capfilt_crawl import annotations, jpeg, scored, write_tar

from capfilt.select.choose import read_account, select
from capfilt.select.policies import SelectConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "duckdb.md"
QUERIES = re.findall(r"^## \d+\. [^\n]*\n\n```sql\n(.*?)```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
WEB_TEXT = ("a dog", "click here for more", "one two three four five six", "word " * 12 + "end")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three shards with broken and repeated images, shared texts, rows without texts and with two."""
    folder = tmp_path_factory.mktemp("duckdb")
    for s in range(3):
        members = []
        for i in range(40):
            key, n = f"{s}_{i:02d}", (s * 40 + i) // 2 if i % 5 == 0 else s * 40 + i
            image = b"<html>" if i in (3, 7)[: s + 1] else jpeg(n, (100 + 10 * s, 60))
            members.append((f"{key}.jpg", image))
            if i % 7:
                members.append(
                    (f"{key}.txt", WEB_TEXT[i % 4].encode() if i % 3 else f"text {key} of an image".encode())
                )
        write_tar(folder / "in" / f"{s}.tar", members)
    texts = '{"caption": ["one of two texts", "the other of two texts"]}'
    write_tar(
        folder / "in" / "3.tar",
        [(f"{i}.{x}", jpeg(i) if x == "jpg" else texts.encode()) for i in range(9) for x in ("jpg", "json")],
    )
    run = scored(folder / "in", folder / "run", part_size=16, captions=2)
    select(run, "half", SelectConfig())
    select(run, "strict", SelectConfig(itm=0.8))
    return run


@pytest.fixture
def answers_of(run, monkeypatch):
    monkeypatch.chdir(run.where)
    return lambda number: duckdb.sql(QUERIES[number - 1]).fetchall()


@pytest.fixture
def rows(run):
    return annotations(run).to_pylist()


def texts_of(rows, kind):
    """(text, score, row) of each text of a kind."""
    return [
        (text, score, row)
        for row in rows
        for text, score in zip(
            row[f"{kind}_text"], row[f"itm_{kind}"] or [None] * len(row[f"{kind}_text"]), strict=True
        )
    ]


def first(values):
    return values[0] if values else None


def mean(values):
    return round(float(np.mean(values)), 3) if values else None


def test_there_are_ten():
    assert len(QUERIES) == 10


def test_1_rows_by_status(answers_of, rows):
    counts = Counter(row["status"] for row in rows)
    assert len(counts) > 2
    wanted = [
        (s, n, pytest.approx(100 * n / len(rows), abs=0.006))
        for s, n in sorted(counts.items(), key=lambda x: (-x[1], x[0]))
    ]
    assert answers_of(1) == wanted


def test_2_kept_by_threshold(answers_of, run):
    """The numbers of `select` itself."""
    answers = answers_of(2)
    assert [round(threshold, 3) for threshold, *_ in answers] == [0.1, 0.3, 0.5, 0.7, 0.8, 0.9]
    for threshold, web, syn in answers:
        kept = select(run, "any", SelectConfig(itm=round(threshold, 3)), replace=True, allow_empty=True)["kept"]
        assert (web, syn) == (kept.get("web", 0), kept.get("syn", 0))


def test_a_score_on_the_threshold_is_kept_as_select_keeps_it(tmp_path):
    """float32 0.7 is below 0.7: a parameter of Python misses it, and 0.7::FLOAT does not."""
    scores = [float(np.float32(0.7)), 0.5, 0.9]
    assert scores[0] < 0.7
    con = duckdb.connect()
    con.execute("CREATE TABLE t AS SELECT unnest(?)::FLOAT AS itm", [scores])
    assert con.execute("SELECT count(*) FROM t WHERE itm >= 0.7::FLOAT").fetchone() == (2,)
    assert con.execute("SELECT count(*) FROM t WHERE itm >= ?", [0.7]).fetchone() == (1,)


def test_3_worst_shards(answers_of, rows):
    shards = defaultdict(list)
    for row in rows:
        shards[row["source_uri"]].append(row)
    wanted = [
        (uri, len(some), sum(row["status"] not in ("ok", "no_text") for row in some),
         mean([s for s in (first(row["itm_web"]) for row in some) if s is not None]))
        for uri, some in shards.items()
    ]  # fmt: skip
    wanted.sort(key=lambda row: (-row[2], row[3], row[0]))
    assert [row[:3] for row in answers_of(3)] == [row[:3] for row in wanted[:5]]
    assert [row[3] for row in answers_of(3)] == pytest.approx([row[3] for row in wanted[:5]], abs=2e-3)


def test_4_same_bytes(answers_of, rows):
    copies = defaultdict(list)
    for row in rows:
        if row["image_sha256"]:
            copies[row["image_sha256"]].append(first(row["web_text"]))
    wanted = []
    for digest, texts in copies.items():
        there = {text for text in texts if text is not None}
        if len(texts) > 1:
            wanted.append((digest[:12], len(texts), len(there), min(there, default=None)))
    assert len(wanted) > 3
    assert answers_of(4) == sorted(wanted, key=lambda row: (-row[1], row[0]))[:5]


def test_5_commonest_texts(answers_of, rows):
    images, scores = defaultdict(set), defaultdict(list)
    for text, score, row in texts_of(rows, "web"):
        images[text].add(row["image_sha256"])
        scores[text] += [score] * (score is not None)
    wanted = sorted(images, key=lambda text: (-len(images[text]), text))[:5]
    assert [row[:2] for row in answers_of(5)] == [(text, len(images[text])) for text in wanted]
    assert [row[2] for row in answers_of(5)] == pytest.approx([mean(scores[text]) for text in wanted], abs=2e-3)


def test_6_web_wrong_and_caption_right(answers_of, rows):
    wanted = [
        row
        for row in rows
        if row["itm_web"]
        and row["itm_syn"]
        and (row["itm_web"][0] or 1) < np.float32(0.1)
        and row["itm_syn"][0] >= np.float32(0.9)
    ]
    wanted.sort(key=lambda row: (row["itm_web"][0] - row["itm_syn"][0], row["sample_id"]))
    assert wanted
    assert [(key, web, syn) for key, web, _, syn, _ in answers_of(6)] == [
        (row["key"], row["web_text"][0], row["syn_text"][0]) for row in wanted[:5]
    ]


def test_7_words_against_score(answers_of, rows):
    buckets = defaultdict(list)
    for text, score, _ in texts_of(rows, "web"):
        if score is not None:
            buckets[min(len(text.split()) // 5 * 5, 20)].append(score)
    assert len(buckets) > 2
    answers = answers_of(7)
    assert [row[:2] for row in answers] == [(words, len(scores)) for words, scores in sorted(buckets.items())]
    for words, _, average, percent in answers:
        assert average == pytest.approx(np.mean(buckets[words]), abs=6e-4)
        assert percent == pytest.approx(100 * np.mean(np.array(buckets[words]) >= 0.5), abs=0.06)


def test_8_what_a_rule_drops(answers_of, rows):
    flags = Counter(flag for row in rows for flag in row["rule_flags"])
    kept = Counter(flag for row in rows if (first(row["itm_web"]) or 0) >= 0.5 for flag in row["rule_flags"])
    wanted = [(flag, n, kept[flag]) for flag, n in sorted(flags.items(), key=lambda one: (-one[1], one[0]))]
    assert len(wanted) > 2
    assert [row[:3] for row in answers_of(8)] == wanted


def test_9_two_selections(answers_of, run):
    half, strict = (read_account(run, name) for name in ("half", "strict"))
    for source, both, only_half, only_strict, neither in answers_of(9):
        assert both + only_half == half["kept"][source] > 0
        assert both + only_strict == strict["kept"][source]
        assert both + only_half + only_strict + neither == half["texts_in"][source]
        assert only_strict == 0 < only_half


def test_10_kept_texts_with_their_rows(answers_of, run, rows):
    """Also the join itself, for every kept text."""
    kept = [t for t in pq.read_table(run.storage.path("selections/half/texts.parquet")).to_pylist() if t["kept"]]
    by_id = {row["sample_id"]: row for row in rows}
    shards = defaultdict(list)
    for text in kept:
        shards[by_id[text["sample_id"]]["source_uri"]].append(by_id[text["sample_id"]])
    wanted = [
        (
            uri,
            len(some),
            len({row["sample_id"] for row in some}),
            round(np.mean([min(row["width"], row["height"]) for row in some])),
        )
        for uri, some in shards.items()
    ]
    assert answers_of(10) == sorted(wanted, key=lambda row: (-row[1], row[0]))[:5]
    joined = QUERIES[9].partition("FROM")[2].partition("GROUP")[0]
    pairs = duckdb.sql(f"SELECT texts.sample_id, rows.sample_id FROM {joined}").fetchall()
    assert len(pairs) == len(kept)
    assert all(one == other for one, other in pairs)
