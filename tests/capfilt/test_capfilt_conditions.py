"""Selections by further scores, by embeddings and by concepts."""

import io
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from capfilt_crawl import HERE, annotations, jpeg, make_fake, planned, scored, write_tar

from blip.data import near as comparison
from blip.errors import DataError
from blip.keyed import Purpose, mix
from capfilt.__main__ import main
from capfilt.extra.score import score_also
from capfilt.report.counts import ReportOptions
from capfilt.report.write import report
from capfilt.select import cosine
from capfilt.select.choose import select
from capfilt.select.concepts import Concepts, count_concepts
from capfilt.select.policies import SelectConfig
from capfilt.settings import DONE
from capfilt.verify import verify

NUMBERED = """
import numpy as np
import pyarrow as pa

class Numbered:
    name, side, identity = "numbered", 0, {}
    columns = {"score": pa.float32(), "web": pa.list_(pa.string()), "syn_words": pa.list_(pa.int64()),
               "odd": pa.bool_(), "tenth": pa.float32(), "web_tenth": pa.list_(pa.float16()),
               "pair": pa.list_(pa.float32())}

    def score(self, images, texts):
        number = [int(row.web[0].split()[-1]) for row in texts]
        return {
            "score": [None if n == 2 else float("nan") if n == 3 else n / 2 for n in number],
            "web": [["de" if n < 4 else "en", None][: len(row.web)] for n, row in zip(number, texts)],
            "syn_words": [[len(text.split()) for text in row.syn] for row in texts],
            "odd": [n % 2 == 1 for n in number],
            "tenth": [n / 10 for n in number],
            "web_tenth": [[np.float16(n / 10)] * len(row.web) for n, row in zip(number, texts)],
            "pair": [[0.0, 1.0] for _ in number],
        }
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Ten rows of which the scorer knows the number, one with two texts, and a broken one."""
    folder = tmp_path_factory.mktemp("conditions")
    (folder / "numbered.py").write_text(NUMBERED)
    members = [m for i in range(10) for m in ((f"{i}.jpg", jpeg(i)), (f"{i}.txt", f"image {i}".encode()))]
    members += [("broken.jpg", b"<html>"), ("broken.txt", b"image 99")]
    run = planned(write_tar(folder / "in" / "a.tar", members), folder / "run", part_size=4)
    also = [f"{folder}/numbered.py:Numbered", "embedding"]
    assert score_also(run, also, make_fake, HERE, out=io.StringIO()) == DONE
    return run


def kept(run, name, **options):
    """Kept (source, number of row), reasons, and account of a selection without a threshold."""
    account = select(run, name, SelectConfig(itm=0.0, **options), replace=True, allow_empty=True)
    keys = dict(zip(*(annotations(run)[c].to_pylist() for c in ("sample_id", "key")), strict=True))
    texts = pq.read_table(run.storage.path(f"selections/{name}/texts.parquet")).to_pylist()
    return {(t["text_source"], keys[t["sample_id"]]) for t in texts if t["kept"]}, account["reasons"], account


def cells(page, summary):
    """Texts of the cells of the table under a summary."""
    table = page.read_text().split(f"<summary>{summary}</summary>")[1].split("</details>")[0]
    return [re.sub("<.*?>", "", cell).strip() for cell in re.findall(r"<t[hd][ >].*?</t[hd]>", table, re.DOTALL)]


def test_a_least_score_of_a_row(run):
    pairs, reasons, _ = kept(run, "least", least=["numbered.score=2.5"])
    assert pairs == {(source, str(n)) for source in ("web", "syn") for n in range(5, 10)}  # half of 5 and more
    assert reasons == {
        "dropped: rule no numbered.score": 4,  # None of row 2, not a number of row 3
        "dropped: rule numbered.score below 2.5": 6,
        "dropped: status decode_error": 1,
        "kept: itm at least 0": 10,
    }


def test_a_most_score_of_a_row(run):
    pairs, reasons, _ = kept(run, "most", most=["numbered.score=2.5"], least=["numbered.score=0.5"], only=["web"])
    assert pairs == {("web", n) for n in "145"}  # half of 1 to 5, but for rows 2 and 3, which have no score
    assert reasons["dropped: rule numbered.score above 2.5"] == 4
    assert reasons["dropped: rule numbered.score below 0.5"] == 1


def test_a_bound_is_rounded_as_the_scores_are(run):
    """As a float32, 0.7 is below 0.7 and 0.6 above 0.6; as a float16, 0.9 is below 0.9."""
    assert kept(run, "b", least=["numbered.tenth=0.7"], only=["web"])[0] == {("web", n) for n in "789"}
    assert kept(run, "b", most=["numbered.tenth=0.6"], only=["web"])[0] == {("web", n) for n in "0123456"}
    assert kept(run, "b", least=["numbered.web_tenth=0.9"], only=["web"])[0] == {("web", "9")}


def test_values_of_the_web_texts_decide_on_these_alone(run):
    pairs, reasons, _ = kept(run, "en", only=["numbered.web=en, fr"])
    assert pairs == {("syn", str(n)) for n in range(10)} | {("web", str(n)) for n in range(4, 10)}
    assert reasons["dropped: rule numbered.web not en,fr"] == 4
    both, _, _ = kept(run, "both", only=["web", "numbered.web=en,de"], least=["numbered.score=4"])
    assert both == {("web", "8"), ("web", "9")}
    odd, _, _ = kept(run, "odd", only=["numbered.odd=true", "syn"])
    assert odd == {("syn", n) for n in "13579"}
    words = {row["key"]: len(row["syn_text"][0].split()) for row in annotations(run).to_pylist() if row["syn_text"]}
    many, _, _ = kept(run, "words", least=["numbered.syn_words=6"], only=["syn"])
    assert many == {("syn", key) for key, n in words.items() if n >= 6}
    assert 0 < len(many) < 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--least", "numbered.score"], "least 'numbered.score': expected SCORER.COLUMN=NUMBER"),
        (["--least", "numbered.score=x"], "expected SCORER.COLUMN=NUMBER"),
        (["--least", "numbered.score=nan"], "expected SCORER.COLUMN=NUMBER"),
        (["--most", "numbered.score="], "most 'numbered.score=': expected SCORER.COLUMN=NUMBER"),
        (["--most", "numbered.web=5"], "cannot be put on a column of type list<item: string>"),
        (["--only", "both"], "expected web, syn or SCORER.COLUMN=VALUE"),
        (["--only", "a.b="], "expected web, syn or SCORER.COLUMN=VALUE"),
        (["--only", "web", "--only", "syn"], "together leave no text"),
        (
            ["--least", "aesthetic.score=5"],
            "has no scores of aesthetic (it has those of: embedding, numbered); add them",
        ),
        (["--least", "aesthetic.score=5"], " --also aesthetic=MODEL`"),  # `--also aesthetic` alone is refused
        (["--least", "brightness.mean=5"], " --also PATH.py:Class`"),
        (["--only", "language.web=en"], " --also language`"),
        (
            ["--least", "numbered.nothing=5"],
            "the scorer numbered has the columns score, web, syn_words, odd, tenth, web_tenth, pair",
        ),
        (["--least", "numbered.web=5"], "cannot be put on a column of type list<item: string>"),
        (["--only", "numbered.pair=1"], "cannot be put on a column of type list<item: float>"),
        (["--only", "embedding.x=1"], "the scorer embedding has the columns none"),
        (["--duplicate-cosine", "1.5"], "duplicate_cosine must be in (0, 1]"),
        (["--concepts", "x"], "--concepts and --per-concept belong together"),
        (["--concepts", "nothere", "--per-concept", "3"], "concepts nothere: there is no such file"),
        (["--per-concept", "0", "--concepts", "x"], "per_concept must be 1 or more"),
    ],
)
def test_wrong_conditions_are_refused(run, capsys, options, message):
    assert main(["select", run.where, "--name", "wrong", *options]) == 2
    assert message in capsys.readouterr().err
    assert not Path(run.where, "selections", "wrong").exists()


def test_a_part_without_scores_is_named(run, tmp_path):
    copy = scored(run.job["root"], tmp_path / "copy", part_size=4)
    with pytest.raises(DataError, match=r"has no scores of numbered .it has those of: none"):
        select(copy, "x", SelectConfig(least=["numbered.score=1"]))
    for name in run.storage.listing("extra"):
        if run.plan[-1].pid not in name:
            copy.storage.write(name, run.storage.read(name))
    for options in ({"least": ["numbered.score=1"]}, {"duplicates": "embedding"}):
        with pytest.raises(DataError, match=f"part {run.plan[-1].pid} has no scores of"):
            select(copy, "x", SelectConfig(**options))


def test_a_selection_is_made_again_when_its_scores_have_changed(run):
    _, _, first = kept(run, "again", least=["numbered.score=2.5"])
    assert select(run, "again", SelectConfig(itm=0.0, least=["numbered.score=2.5"])) == first
    record = run.storage.read("extra/numbered/scorer.json")
    run.storage.write("extra/numbered/scorer.json", json.dumps({**json.loads(record), "fingerprint": "1"}).encode())
    with pytest.raises(ValueError, match="exists with other settings"):
        select(run, "again", SelectConfig(itm=0.0, least=["numbered.score=2.5"]))
    run.storage.write("extra/numbered/scorer.json", record)


def test_a_selection_of_when_there_was_one_source_to_choose_is_the_same(run):
    _, _, account = kept(run, "web", only=["web"])
    for before, now in (("web", ["web"]), (None, [])):
        old = {**account["settings"], "only": before}
        assert SelectConfig(**old) == SelectConfig(itm=0.0, only=now)


def test_the_report_counts_further_scores(run):
    kept(run, "reported", least=["numbered.score=2.5"])
    page = Path(report(run, ReportOptions(select="reported")))
    content = json.loads((page.parent / "report.json").read_bytes())
    counts = {"parts": 3, "rows": 11, "scored": 10, "raised": 0, "not_scored": 1}
    assert content["extra"] == {"embedding": counts, "numbered": counts}
    assert "numbered.score=2.5" in page.read_text()
    table = cells(page, "Scores of further scorers")
    assert table[:5] == ["scorer", "rows", "of these with scores", "not shown to it", "errors"]
    assert table[5:] == ["embedding", "11", "10", "1", "0", "numbered", "11", "10", "1", "0"]
    assert verify(run.where).status() == 0


# Embeddings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("least", [0.9, 0.995, 1.0])
def test_near_ones_are_all_found(least, monkeypatch):
    monkeypatch.setattr(comparison, "_BLOCK", 32)
    dice = np.random.default_rng(0)
    vectors = dice.standard_normal((500, 12)).astype(np.float32)
    for _ in range(250):  # neighbours, some of them of neighbours
        vectors[dice.integers(500)] = vectors[dice.integers(500)] + dice.choice([0, 0.03, 0.1]) * dice.standard_normal(
            12
        )
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    exact = vectors.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    cosines = exact @ exact.T
    assert not (np.abs(cosines - least)[~np.eye(500, dtype=bool)] < 1e-6).any() or least == 1.0
    wanted = [any(cosines[i, j] >= min(least, 1 - 1e-7) for j in range(i)) for i in range(500)]
    least = min(least, 1 - 1e-6)
    assert cosine.later_ones(vectors, least).tolist() == wanted
    assert 0 < sum(wanted) < 400
    assert cosine.later_ones(vectors[:0], least).tolist() == []


def test_beyond_the_limit_clusters_find_nearly_all_and_nothing_else(monkeypatch):
    dice = np.random.default_rng(1)
    centres = dice.standard_normal((60, 16))
    vectors = centres[dice.integers(60, size=4000)] + 0.4 * dice.standard_normal((4000, 16))
    vectors[2000:3000] = vectors[:1000] + 0.02 * dice.standard_normal((1000, 16))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    exact = cosine.later_ones(vectors, 0.99)
    monkeypatch.setattr(cosine, "EXACT", 100)
    monkeypatch.setattr(cosine, "_PER_CLUSTER", 300)
    near = cosine.later_ones(vectors, 0.99)
    assert not (near & ~exact).any()
    assert near.sum() >= 0.98 * exact.sum() >= 980
    same = np.repeat(vectors[:1], 500, axis=0)  # nothing to divide
    assert cosine.later_ones(same, 0.99).tolist() == [False] + [True] * 499


def test_near_embeddings_are_duplicates(tmp_path):
    """The first in the plan is kept, if it could be read; another encoding of it is a copy."""
    images = [b"<html>", jpeg(9), jpeg(1), jpeg(1, form="PNG"), jpeg(120), b"<html>"]
    members = [m for i, image in enumerate(images) for m in ((f"{i}.jpg", image), (f"{i}.txt", b"text"))]
    run = planned(write_tar(tmp_path / "in" / "a.tar", members), tmp_path / "run", part_size=2)
    assert score_also(run, ["embedding"], make_fake, HERE, out=io.StringIO()) == DONE
    pairs, reasons, _ = kept(run, "some", duplicates="embedding", duplicate_cosine=0.999)
    assert {key for _, key in pairs} == {"1", "2", "4"}
    assert reasons["dropped: rule duplicate"] == 2  # the web text of 3 and its synthetic one
    assert reasons["dropped: status decode_error"] == 2  # what has no embedding is no copy
    assert len(kept(run, "all", duplicates="embedding", duplicate_cosine=0.9999999)[0]) == 8


# Concepts -------------------------------------------------------------------------------------------------------------


def test_concepts_are_whole_words():
    concepts = Concepts(["Dog", "red dog", "cat", "black and white", "T-shirt", "中国", "dog ", "...", "men's"])
    assert concepts.names == ["dog", "red dog", "cat", "black and white", "t shirt", "中国", "men's"]

    def names(text):
        return {concepts.names[i] for i in concepts.of(text)}

    assert names("A RED dog, and a concatenation") == {"dog", "red dog"}  # no cat in it
    assert names("red, dog") == {"dog", "red dog"}  # punctuation does not count, as in lists of words
    assert names("a black-and-white t-shirt; hotdogs") == {"black and white", "t shirt"}
    assert names("black and") == set()
    assert names("我爱中国茶") == {"中国"}
    assert names("国中") == set()
    assert names("Men\u2019s dog dog") == {"men's", "dog"}
    assert names("") == set()


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Rows with one common concept, one in ten with another, one in a hundred with a rare one; the rest with none."""
    folder = tmp_path_factory.mktemp("concepts")
    for shard in range(2):
        members = []
        for i in range(shard * 300, shard * 300 + 300):
            text = "a zebra" if i % 100 == 0 else "a blue bird" if i % 10 == 0 else "a bird" if i % 3 else "something"
            members += [(f"{i:04d}.jpg", jpeg(i)), (f"{i:04d}.txt", text.encode())]
        write_tar(folder / "in" / f"{shard}.tar", members)
    return scored(folder / "in", folder / "run", part_size=100)


def test_a_balanced_selection(many, tmp_path):
    listed = tmp_path / "my concepts.txt"
    listed.write_text("bird\t999\nblue bird\nzebra\nunicorn\n", "utf-8")
    config = SelectConfig(itm=0.0, only=["web"], concepts=str(listed), per_concept=30)
    account = select(many, "balanced", config)
    rows = {row["sample_id"]: row["web_text"][0] for row in annotations(many).to_pylist()}
    counts = Counter(rows.values())
    birds, blue = counts["a bird"] + counts["a blue bird"], counts["a blue bird"]
    wanted = set()
    for sample, text in rows.items():
        rarest = {"a zebra": counts[text], "a blue bird": min(blue, birds), "a bird": birds}.get(text)
        draw = mix(Purpose.CONCEPTS, int(sample[:16], 16), int(sample[16:], 16)) / 2**64
        if rarest and draw < min(1, 30 / rarest):
            wanted.add(sample)
    texts = pq.read_table(many.storage.path("selections/balanced/texts.parquet")).to_pylist()
    assert {t["sample_id"] for t in texts if t["kept"]} == wanted
    per_text = Counter(rows[sample] for sample in wanted)
    assert per_text["a zebra"] == counts["a zebra"] == 6
    assert 15 < per_text["a bird"] < 50  # about 30 of 400
    assert 20 < per_text["a blue bird"] < 45  # of 54
    assert account["reasons"]["dropped: rule no concept"] == counts["something"] > 100
    assert account["reasons"]["dropped: rule above 30 per concept"] == birds + 6 - len(wanted)
    kept_birds = per_text["a bird"] + per_text["a blue bird"]
    assert account["concepts"] == {
        "listed": 4,
        "present": 3,
        "over": 2,
        "most": [["bird", birds, kept_birds], ["blue bird", blue, per_text["a blue bird"]], ["zebra", 6, 6]],
    }
    assert verify(many.where).status() == 0
    page = Path(report(many, ReportOptions(select="balanced")))
    assert json.loads((page.parent / "report.json").read_bytes())["concepts"] == account["concepts"]
    table = cells(page, "The most frequent concepts (3 of 4 are in some text)")
    assert table == ["concept", "texts", "kept", *(str(value) for row in account["concepts"]["most"] for value in row)]
    assert select(many, "balanced", config) == account
    listed.write_text("bird\n")
    with pytest.raises(ValueError, match="exists with other settings"):
        select(many, "balanced", config)


def test_a_balance_does_not_depend_on_parts(many, tmp_path):
    listed = tmp_path / "concepts.txt"
    listed.write_text("\ufeffbird\r\nzebra\r\n", "utf-8")
    other = scored(many.job["root"], tmp_path / "run", part_size=37)
    config = SelectConfig(itm=0.3, concepts=str(listed), per_concept=50)
    chosen = []
    for run in (many, other):
        select(run, "same", config, replace=True)
        texts = pq.read_table(run.storage.path("selections/same/texts.parquet")).to_pylist()
        chosen.append({(t["sample_id"], t["text_source"], t["kept"], t["reason"]) for t in texts})
    assert chosen[0] == chosen[1]
    assert len({kept for *_, kept, _ in chosen[0]}) == 2


def test_human_captions_are_not_balanced(many, tmp_path):
    listed = tmp_path / "concepts.txt"
    listed.write_text("zebra\n")
    config = SelectConfig(itm=0.0, only=["web"], concepts=str(listed), per_concept=1, human="0.tar")
    account = select(many, "human", config)
    assert account["kept"]["human"] == 300
    assert account["concepts"]["most"][0][:2] == ["zebra", 3]


def test_the_list_of_a_runs_concepts(many, tmp_path, capsys):
    rows = annotations(many).to_pylist()
    counts = Counter()
    for text in (row["web_text"][0] for row in rows):
        counts.update({*text.split(), *(" ".join(pair) for pair in zip(text.split(), text.split()[1:], strict=False))})
    assert counts["a bird"] > counts["blue bird"] > counts["a zebra"] == 6
    wanted = sorted(((c, n) for c, n in counts.items() if n >= 7), key=lambda one: (-one[1], one[0]))
    assert count_concepts(many, ["web"], 7) == (wanted, 600)
    out = tmp_path / "folder with spaces" / "c [1].txt"
    out.parent.mkdir()
    assert main(["concepts", many.where, "--out", str(out), "--texts", "web", "--least", "7"]) == 0
    assert [line.split("\t") for line in out.read_text().splitlines()] == [[c, str(n)] for c, n in wanted]
    assert f"{len(wanted)} words and pairs in at least 7 of 600 texts" in capsys.readouterr().out
    args = ["select", many.where, "--name", "listed", "--concepts", str(out), "--per-concept", "20", "--itm", "0"]
    assert main([*args, "--only", "web"]) == 0
    assert f"concepts: {len(wanted)} of {len(wanted)} are there; most frequent: a " in capsys.readouterr().out
    assert main(["concepts", many.where, "--out", str(out), "--least", "0"]) == 2
    (tmp_path / "empty").write_text("...\n\n")
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    for name, message in (("empty", "no line has a word"), ("latin", "it is not UTF-8 text"), (".", "Is a directory")):
        assert main([*args[:5], str(tmp_path / name), *args[6:]]) == 2
        assert message in capsys.readouterr().err


def test_many_concepts_are_looked_up_at_once():
    """The work of a text does not grow with the list: words are looked up, concepts not tried one by one."""
    names = [f"word{i} thing{j}" for i in range(600) for j in range(600)]
    concepts = Concepts([*names, "word7"])
    assert len(concepts.names) == 360_001
    import time

    start = time.process_time()
    for _ in range(2000):
        assert len(concepts.of("a word7 thing599 and word8 with word9 thing1")) == 3
    assert time.process_time() - start < 5  # ten thousand times this if each concept were tried


def test_a_run_without_captions_has_none_to_count(tmp_path, capsys):
    run = scored(
        write_tar(tmp_path / "a.tar", [("1.jpg", jpeg(1)), ("1.txt", b"a bird")]), tmp_path / "run", captions=1
    )
    table = run.parts.read(run.plan[0].pid)
    at = table.column_names.index("syn_text")
    run.parts.commit(run.plan[0].pid, table.set_column(at, "syn_text", pa.array([[]], table["syn_text"].type)), {})
    assert main(["concepts", run.where, "--out", str(tmp_path / "c.txt"), "--texts", "syn"]) == 2
    assert "no usable row that has been scored has a synthetic text" in capsys.readouterr().err
    assert not (tmp_path / "c.txt").exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"nope", b"\xff"])
def test_damaged_records_are_named(run, tmp_path, capsys, content):
    kept(run, "damaged", least=["numbered.score=1"])
    shutil.copytree(run.where, tmp_path / "run")
    copy = str(tmp_path / "run")
    (tmp_path / "run/extra/numbered/scorer.json").write_bytes(content)
    for args in (["report", copy], ["select", copy, "--name", "x", "--least", "numbered.score=1"]):
        assert main(args) == 2
        assert "extra/numbered/scorer.json is damaged; remove that folder" in capsys.readouterr().err
    assert main(["verify", copy]) == 4
    output = capsys.readouterr().out.splitlines()
    assert [line for line in output if line.startswith("wrong: ")] == [
        f"wrong: {copy}/extra/numbered/scorer.json is damaged; remove that folder to score anew"
    ]
    assert any(line.startswith("selection damaged: ") for line in output), "the rest is checked as well"
    (tmp_path / "run/selections/damaged/_SUCCESS").write_bytes(content)
    for args in (["report", copy, "--select", "damaged"], ["export", copy, "--select", "damaged", "--to", "x"]):
        assert main(args) == 2
        assert "selections/damaged/_SUCCESS is damaged; remove that folder" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run/extra/numbered")
    assert main(["verify", copy]) == 4
    assert "selections/damaged/_SUCCESS is damaged" in capsys.readouterr().out
    (tmp_path / "run/report").mkdir(exist_ok=True)
    (tmp_path / "run/report/null.json").write_bytes(content)
    assert main(["report", copy]) == 2
    assert f"report/null.json is damaged; `capfilt calibrate {copy} --method null` writes" in capsys.readouterr().err
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "_SUCCESS").write_bytes(content)
    assert main(["export", run.where, "--select", "damaged", "--to", str(tmp_path / "to"), "--replace"]) == 2
    assert "holds a _SUCCESS that no export wrote: give another --to" in capsys.readouterr().err
    assert (tmp_path / "to" / "_SUCCESS").read_bytes() == content
