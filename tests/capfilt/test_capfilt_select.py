"""Selecting, verifying and exporting; the last as training reads it."""

import hashlib
import io
import json
import shutil
import tarfile

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from capfilt_crawl import HERE, Starter, annotations, crawl, jpeg, make_fake, planned, sample, scored, write_tar
from PIL import Image

from blip.data.formats.sources import open_source
from blip.data.settings import SourceConfig
from blip.errors import DataError
from capfilt.__main__ import main
from capfilt.export import export
from capfilt.run import Run
from capfilt.schema import USABLE
from capfilt.score.loop import score
from capfilt.select.choose import read_account, select
from capfilt.select.policies import SYN, WEB, SelectConfig, Texts, choose, cut_of
from capfilt.verify import verify


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A scored run with two captions an image, some without texts and some broken."""
    folder = tmp_path_factory.mktemp("select")
    members = [m for i in range(50) for m in sample(f"a{i:03d}", i, extra={"url": "u"})]
    members += [
        ("b0.jpg", b"<html>"),
        ("b0.txt", b"a lost page"),
        ("b1.jpg", jpeg(99)),
        ("b1.txt", b"..."),
        ("b2.txt", b"x"),
    ]
    write_tar(folder / "in" / "a.tar", members)
    crawl(folder / "in" / "more", shards=1, rows=20)
    return scored(folder / "in" / "**" / "*.tar", folder / "run", captions=2)


def texts_of(run, name):
    return pq.read_table(run.storage.path(f"selections/{name}/texts.parquet")).to_pylist()


def straightforward(run):
    """Every text with its scores, by hand: (sample_id, source, index, itm, itc, row)."""
    chosen = []
    for row in annotations(run).to_pylist():
        for kind in ("web", "syn"):
            scores = zip(row[f"itm_{kind}"], row[f"itc_{kind}"], strict=True)
            texts = row[f"{kind}_text"]
            padded = [*scores, *[(None, None)] * len(texts)][: len(texts)]
            chosen += [(row["sample_id"], kind, i, *padded[i], row) for i in range(len(texts))]
    return chosen


def test_blip_keeps_each_text_by_itself(run):
    account = select(run, "half", SelectConfig())
    wanted = {(s, kind, i): itm is not None and itm >= 0.5 and row["status"] in USABLE
              for s, kind, i, itm, _, row in straightforward(run)}  # fmt: skip
    texts = texts_of(run, "half")
    assert {(t["sample_id"], t["text_source"], t["text_index"]): t["kept"] for t in texts} == wanted
    assert len(texts) == len(wanted)
    reasons = {t["reason"] for t in texts}
    assert reasons == {"itm at least 0.5", "itm below 0.5", "status decode_error", "status no_image", "no words"}
    assert sum(account["kept"].values()) == sum(wanted.values())
    assert account["rows_in"] == {"decode_error": 1, "no_image": 1, "no_text": 1, "ok": 70}
    assert sum(account["texts_in"].values()) == len(wanted) == 73 + 2 * 71


def test_thresholds_by_source(run):
    select(run, "table", SelectConfig("threshold-table", itm_web=0.2, itm_syn=0.9))
    for text in texts_of(run, "table"):
        if text["score"] is not None:
            assert text["kept"] == (text["score"] >= {"web": 0.2, "syn": 0.9}[text["text_source"]])
    with pytest.raises(ValueError, match="needs --itm-web and --itm-syn"):
        SelectConfig("threshold-table")


def test_rank_k(run):
    select(run, "two", SelectConfig("rank-k", k=2))
    by_row = {}
    for sample_id, kind, i, _, itc, _ in straightforward(run):
        if itc is not None:
            by_row.setdefault(sample_id, []).append((-itc, kind != "web", i))
    wanted = {(s, "syn" if syn else "web", i) for s, texts in by_row.items() for _, syn, i in sorted(texts)[:2]}
    texts = texts_of(run, "two")
    assert {(t["sample_id"], t["text_source"], t["text_index"]) for t in texts if t["kept"]} == wanted
    assert {t["rank"] for t in texts if t["kept"]} == {0, 1}


def test_web_else_syn(run):
    select(run, "wes", SelectConfig("web-else-syn", itm=0.6))
    rows = {}
    for text in texts_of(run, "wes"):
        rows.setdefault(text["sample_id"], []).append(text)
    kinds = set()
    for texts in rows.values():
        passing = [t for t in texts if t["score"] is not None and t["score"] >= 0.6]
        web = [t for t in passing if t["text_source"] == "web"]
        best = sorted((t for t in passing if t["text_source"] == "syn"), key=lambda t: -t["score"])[:1]
        assert [t for t in texts if t["kept"]] == (web or best)
        kinds.add((bool(web), bool(best)))
    assert kinds == {(a, b) for a in (True, False) for b in (True, False)}


def test_fraction(run):
    account = select(run, "tenth", SelectConfig("fraction", fraction=0.1))
    scores = [itm for *_, itm, _, row in straightforward(run) if itm is not None]
    assert sum(account["kept"].values()) == int(0.1 * len(scores))
    kept = [t["score"] for t in texts_of(run, "tenth") if t["kept"]]
    assert sorted(kept) == pytest.approx(sorted(scores)[-len(kept) :])


def test_rules_drop_and_say_which(run):
    select(run, "junk", SelectConfig(itm=0.0, rules="datacomp-basic"), allow_empty=True)
    assert {t["reason"] for t in texts_of(run, "junk") if t["score"] is not None} == {"rule min_side<200"}
    account = select(run, "personal", SelectConfig(itm=0.0, rules="junk"))
    assert account["kept"] == {"syn": 142, "web": 70}


def test_texts_of_people_are_all_kept_and_alone(run):
    account = select(run, "human", SelectConfig(itm=0.5, human="more/*"))
    assert account["kept"]["human"] == 20
    assert account["reasons"]["dropped: a person's text is there"] == 40


def test_policies_on_arrays():
    texts = Texts(np.array([0, 0, 0, 1]), np.array([WEB, SYN, SYN, SYN]), np.array([0.4, 0.9, 0.7, 0.2], np.float32))
    assert choose(texts, SelectConfig("blip", itm=0.5), None).kept.tolist() == [False, True, True, False]
    assert choose(texts, SelectConfig("web-else-syn", itm=0.5), None).kept.tolist() == [False, True, False, False]
    assert choose(texts, SelectConfig("rank-k", k=1), None).rank.tolist() == [2, 0, 1, 0]
    assert cut_of(np.array([1.0, 5, 3, 2]), 0.5) == 3
    assert cut_of(np.array([1.0]), 0.5) is None
    none = Texts(np.zeros(0, int), np.zeros(0, int), np.zeros(0, np.float32))
    for policy in ("blip", "rank-k", "web-else-syn", "fraction"):
        assert len(choose(none, SelectConfig(policy), None).kept) == 0


def test_a_selection_is_never_quietly_another(run):
    first = select(run, "same", SelectConfig())
    path = run.storage.path("selections/same/texts.parquet")
    stamp = path.stat().st_mtime_ns
    assert select(run, "same", SelectConfig()) == first
    assert path.stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="exists with other settings"):
        select(run, "same", SelectConfig(itm=0.7))
    assert select(run, "same", SelectConfig(itm=0.7), replace=True)["settings"]["itm"] == 0.7
    with pytest.raises(ValueError, match=r"no selection 'nope' \(there are:"):
        read_account(run, "nope")
    with pytest.raises(ValueError, match="letters, digits"):
        select(run, "../x", SelectConfig())


# Verifying ------------------------------------------------------------------------------------------------------------


def test_verify_says_what_does_not_add_up(tmp_path):
    run = scored(crawl(tmp_path / "in", shards=1), tmp_path / "run")
    select(run, "half", SelectConfig())
    assert main(["verify", run.where]) == 0
    good = {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}

    def wrong(path, content):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        findings = verify(run.where)
        path.write_bytes(good[path]) if path in good else path.unlink()
        return findings

    part = run.storage.path(f"parts/{run.plan[0].pid[:2]}/{run.plan[0].pid}.parquet")
    other = run.storage.path(f"parts/{run.plan[1].pid[:2]}/{run.plan[1].pid}.parquet")
    problems = wrong(part, good[other])  # a whole file in the wrong place
    assert problems.status() == 4
    assert any("does not have each of the rows 0 to 16 once" in w for w in problems.problems)
    assert any("different ids" in w for w in problems.problems)
    assert (
        "not in the plan"
        in wrong(tmp_path / "run" / "parts" / "00" / "0000000000000000.parquet", good[part]).problems[0]
    )
    chosen = tmp_path / "run" / "selections" / "half" / "texts.parquet"
    assert "has changed since it was written" in wrong(chosen, good[chosen][:-1]).problems[0]
    account = chosen.parent / "_SUCCESS"
    record = json.loads(good[account])
    record["kept"]["web"] += 1
    assert "texts are not" in wrong(account, json.dumps(record).encode()).problems[0]
    record["dropped"]["web"] -= 1
    record["rows_in"]["ok"] += 1
    assert "counts 41 rows, the annotations 40" in wrong(account, json.dumps(record).encode()).problems[0]
    index = next((tmp_path / "run" / "plan" / "index").iterdir())
    assert wrong(index, good[index][:-50] + b"x" + good[index][-49:]).status() == 4
    for damage in (lambda: chosen.write_bytes(b"x"), chosen.unlink):
        damage()
        assert "select again" in verify(run.where).problems[0]
        select(run, "half", SelectConfig())  # does what verify asks for
        assert chosen.read_bytes() == good[chosen]
        assert verify(run.where).status() == 0
    part.unlink()
    assert verify(run.where).status() == 3
    assert main(["verify", run.where]) == 3


def test_verify_counts_the_texts_of_a_selection(tmp_path):
    """The table, with a digest that fits it, has other verdicts than its account."""
    run = scored(crawl(tmp_path / "in", shards=1), tmp_path / "run")
    select(run, "half", SelectConfig())
    table, account = (tmp_path / "run" / "selections" / "half" / name for name in ("texts.parquet", "_SUCCESS"))
    rows = pq.read_table(table)
    pq.write_table(rows.slice(1), table)
    record = json.loads(account.read_bytes())
    record["files"]["texts.parquet"] = hashlib.sha256(table.read_bytes()).hexdigest()
    account.write_text(json.dumps(record))
    source, kept = rows["text_source"][0].as_py(), rows["kept"][0].as_py()
    n = record["kept" if kept else "dropped"][source]
    findings = verify(run.where)
    assert findings.status() == 4
    assert f"selection half: {'kept' if kept else 'dropped'}.{source}: {n} -> {n - 1} in its table" in findings.problems


def test_verify_gives_no_all_clear_for_what_was_not_looked_at(tmp_path, capsys):
    run = planned(crawl(tmp_path / "in", shards=1), tmp_path / "run")
    assert main(["verify", run.where]) == 3
    assert capsys.readouterr().out == "3 parts are not scored yet\n"
    assert score(run, make_fake, HERE, io.StringIO()) == 0
    select(run, "half", SelectConfig(itm=0.0))
    export(run, "half", "wds", str(tmp_path / "out"), shard=30)
    assert main(["verify", str(tmp_path / "out")]) == 0
    stdout = capsys.readouterr().out
    assert stdout == f"export {tmp_path / 'out'}: 40 images, 80 pairs, 80 samples in 3 files\nnothing is wrong\n"


@pytest.mark.parametrize("column", ["itm", "itm_web", "itm_syn"])
@pytest.mark.parametrize(
    ("by", "bad", "good"),
    [
        ("itm", (50, 1.5, -0.01, "nan"), (0, 0.5, 1)),
        ("itc", (1.5, -2, "nan"), (-1, 0.3)),
        ("margin", ("inf", "nan"), (50, -3)),
    ],
)
def test_a_threshold_is_of_the_kind_that_is_compared(column, by, bad, good):
    for value in bad:
        with pytest.raises(ValueError, match=f"^{column} .*with --by {by} a threshold is a "):
            SelectConfig(by=by, **{column: float(value)})
    for value in good:
        SelectConfig(by=by, **{column: value})


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["select", "--itm", "50", "--name", "x"], "0 to 1"),
        (["score", "--max-error-rate", "1.5"], "0 to 1"),
        (["score", "--max-error-rate", "nan"], "--max-error-rate: expected a number"),
    ],
)
def test_a_share_out_of_range_is_refused_by_the_command(tmp_path, capsys, command, message):
    run = scored(crawl(tmp_path / "in", shards=1, rows=4), tmp_path / "run")
    assert main([command[0], run.where, *command[1:]]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("only", "other"), [("web", "syn"), ("syn", "web")])
def test_texts_of_one_source_only(run, only, other):
    """What is kept of the one source is what is kept of it where both may be."""
    select(run, "both", SelectConfig())
    account = select(run, f"only-{only}", SelectConfig(only=only))
    assert set(account["kept"]) == {only}
    wanted = [(t["sample_id"], t["text"]) for t in texts_of(run, "both") if t["kept"] and t["text_source"] == only]
    texts = texts_of(run, f"only-{only}")
    assert [(t["sample_id"], t["text"]) for t in texts if t["kept"]] == wanted != []
    assert {t["reason"] for t in texts if t["text_source"] == other and t["score"] is not None} == {
        f"only {only} texts"
    }


def test_a_selection_of_before_there_was_more_to_choose_is_the_same(run):
    select(run, "old", SelectConfig())
    account = run.storage.path("selections/old/_SUCCESS")
    record = json.loads(account.read_bytes())
    del record["settings"]["only"]
    account.write_text(json.dumps(record))
    assert select(run, "old", SelectConfig()) == record


def test_nothing_kept_is_an_error_unless_allowed(tmp_path, capsys):
    run = scored(crawl(tmp_path / "in", shards=1, rows=4), tmp_path / "run")
    args = [run.where, "--name", "none", "--itm", "1"]
    assert main(["select", *args]) == 2
    assert "selection none keeps none of 8 texts; dropped: itm below 1: 8." in capsys.readouterr().err
    assert not list((tmp_path / "run" / "selections").rglob("*.*"))
    assert main(["select", *args, "--allow-empty"]) == 0
    assert main(["select", *args]) == 2  # the one that is there is as empty
    to = ["export", run.where, "--select", "none", "--to", str(tmp_path / "out")]
    assert main(to) == 2
    assert not (tmp_path / "out").exists()
    assert main([*to, "--allow-empty"]) == 0
    assert json.loads((tmp_path / "out" / "_SUCCESS").read_bytes())["samples"] == 0


def test_a_job_of_which_nothing_worked_is_an_error_of_any_size(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps([{"image": f"gone\\{i}.jpg", "caption": "x"} for i in range(24)]))
    args = ["run", "--input", str(tmp_path / "a.json"), "--out", str(tmp_path / "run"), "--scorer", "fake"]
    for more in ([], [], ["--max-error-rate", "1"]):  # the same when it is said again, and nothing to export anyway
        assert main([*args, "--decode-workers", "0", "--to", str(tmp_path / "clean"), *more]) == 2
        output = capsys.readouterr()
        assert "nothing is wrong" not in output.out
        assert ("keeps none of 24 texts" if more else "none of 24 rows could be used (no_image 24)") in output.err
    assert not (tmp_path / "clean").exists()


# Exporting ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def half(run):
    select(run, "half", SelectConfig())
    pairs = [(t["sample_id"], t["text"]) for t in texts_of(run, "half") if t["kept"]]
    number = {f"a{i:03d}": i for i in range(50)} | {f"0_{i:04d}": i for i in range(20)} | {"b1": 99}
    rows = annotations(run).to_pylist()
    images = {r["sample_id"]: jpeg(number[r["key"]]) for r in rows if r["key"] in number}
    return [(images[s], text) for s, text in pairs]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("form", ["wds", "parquet", "json"])
@pytest.mark.parametrize("together", [False, True])
def test_training_reads_an_export_as_it_is(run, half, tmp_path, form, together):
    account = export(run, "half", form, str(tmp_path / "out"), shard=30, together=together)
    assert account["pairs"] == len(half)
    path = {"wds": "*.tar", "parquet": "*.parquet", "json": "captions.json"}[form]
    source = open_source(SourceConfig(str(tmp_path / "out" / path)))
    assert len(source) == account["samples"]
    read = []
    for i in range(len(source)):
        record = source[i]
        image = record.image if isinstance(record.image, bytes) else record.image.read_bytes()
        read += [(image, caption) for caption in record.captions]
    assert read == half
    assert account["images"] == len({s["sample_id"] for s in texts_of(run, "half") if s["kept"]})
    assert verify(str(tmp_path / "out")).status() == 0


@pytest.mark.parametrize("form", ["wds", "parquet", "json"])
@pytest.mark.parametrize("together", [False, True])
def test_every_kept_text_is_in_a_large_export(tmp_path_factory, large, form, together):
    """More samples than a file's buffers hold, in one file."""
    out = tmp_path_factory.mktemp("large") / "out"
    account = export(large, "all", form, str(out), together=together)
    assert (account["images"], account["pairs"], account["samples"]) == (600, 1200, 600 if together else 1200)
    if form == "wds":
        with tarfile.open(out / "00000.tar") as tar:
            notes = [json.load(tar.extractfile(name)) for name in tar.getnames() if name.endswith(".json")]
        captions = [note["captions"] for note in notes]
    elif form == "parquet":
        captions = pq.read_table(out / "00000.parquet")["caption"].to_pylist()
    else:
        listed = [entry["caption"] for entry in json.loads((out / "captions.json").read_bytes())]
        captions = listed if together else [[text] for text in listed]
    assert [text for some in captions for text in some] == [t["text"] for t in texts_of(large, "all") if t["kept"]]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """600 images with two texts each, all kept."""
    folder = tmp_path_factory.mktemp("large")
    run = scored(crawl(folder / "in", shards=1, rows=600), folder / "run", part_size=512)
    select(run, "all", SelectConfig(itm=0.0))
    return run


def _one_less(path):
    """Take the last sample out of a file of an export."""
    if path.suffix == ".tar":
        with tarfile.open(path) as tar:
            members = [(name, tar.extractfile(name).read()) for name in tar.getnames()]
        last = members[-1][0].partition(".")[0]
        write_tar(path, [one for one in members if one[0].partition(".")[0] != last], tarfile.USTAR_FORMAT)
    elif path.suffix == ".parquet":
        table = pq.read_table(path)
        pq.write_table(table.slice(0, len(table) - 1), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(json.loads(path.read_bytes())[:-1]))
    else:
        np.save(path, np.load(path)[:-1])


@pytest.mark.parametrize("form", ["wds", "parquet", "json", "uids"])
@pytest.mark.parametrize("together", [False, True])
def test_verify_counts_what_the_files_of_an_export_hold(run, half, tmp_path, form, together):
    """Files whose digests fit, and which hold one sample less than the export says, or cannot be read."""
    out = tmp_path / "out"
    manifest = export(run, "half", form, str(out), shard=30, together=together)
    assert verify(str(out)).status() == 0
    whole = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    path = next(path for path in whole if path.suffix in (".tar", ".parquet", ".json", ".npy"))

    def verified(damage):
        damage(path)
        name = str(path.relative_to(out))
        files = manifest["files"] | {name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}}
        (out / "_SUCCESS").write_text(json.dumps(manifest | {"files": files}))
        findings = verify(str(out))
        for name, content in whole.items():
            name.write_bytes(content)
        return findings

    n, one_less = manifest["samples"], verified(_one_less)
    assert one_less.status() == 4
    assert any(f"samples: {n} -> {n - 1} in its files" in w for w in one_less.problems) or (
        form == "json" and "captions.json" in one_less.problems[0]
    )
    assert verified(lambda path: path.write_bytes(whole[path][: len(whole[path]) // 2])).status() == 4
    assert f"cannot be read as {form}" in verified(lambda path: path.write_bytes(b"x" * 600)).problems[0]
    (out / "00099.tar").write_bytes(b"")
    assert verify(str(out)).problems == [f"{out}/00099.tar is not part of this export, but training would read it"]


@pytest.mark.parametrize("form", ["wds", "parquet", "json", "uids"])
def test_an_export_is_the_same_to_the_byte_each_time(run, half, tmp_path, form):
    """Fault 25."""
    one = export(run, "half", form, str(tmp_path / "a"), shard=30)
    two = export(run, "half", form, str(tmp_path / "b"), shard=30)
    assert one["files"] == two["files"] != {}
    (tmp_path / "b" / "_SUCCESS").rename(tmp_path / "b" / "_BEGUN")
    assert export(run, "half", form, str(tmp_path / "b"), shard=30) == two
    with pytest.raises(ValueError, match=r"holds another export \(shard: 30 -> 31\)"):
        export(run, "half", form, str(tmp_path / "b"), shard=31)
    assert not (tmp_path / "b" / "_BEGUN").exists()


@pytest.mark.parametrize("form", ["wds", "uids"])
def test_a_folder_that_is_not_empty_is_refused(run, half, tmp_path, form, capsys):
    write_tar(tmp_path / "out" / "00007.tar", sample("somebody's", 0))  # training would read it as well
    before = (tmp_path / "out" / "00007.tar").read_bytes()
    args = ["export", run.where, "--select", "half", "--to", str(tmp_path / "out"), "--format", form]
    assert main(args) == 2
    assert "is not empty (00007.tar): give another --to" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["00007.tar"]
    assert (tmp_path / "out" / "00007.tar").read_bytes() == before
    (tmp_path / "file").write_text("")
    assert main([*args[:-3], str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["wds", "parquet", "json", "uids"])
def test_an_older_export_goes_when_that_is_asked_for(run, half, tmp_path, form):
    out = tmp_path / "out"
    export(run, "half", form, str(out), shard=7)
    (out / "_SUCCESS").rename(out / "_BEGUN")  # whether it was whole does not matter
    wanted = export(run, "half", form, str(tmp_path / "fresh"), shard=30)
    assert export(run, "half", form, str(out), shard=30, replace=True) == wanted
    names, fresh = (
        sorted(str(p.relative_to(w)) for p in w.rglob("*") if p.is_file()) for w in (out, tmp_path / "fresh")
    )
    assert names == fresh
    (out / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"notes\.txt, which no export wrote"):
        export(run, "half", form, str(out), shard=31, replace=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("form", ["wds", "parquet", "json"])
def test_images_of_telephones_are_exported(tmp_path, form):
    """A JPEG with more images behind it, which Pillow calls MPO."""
    buffer = io.BytesIO()
    first, second = (Image.open(io.BytesIO(jpeg(i, (64, 48)))) for i in (1, 2))
    first.save(buffer, "MPO", save_all=True, append_images=[second])
    tar = write_tar(tmp_path / "in" / "a.tar", [("0.jpg", buffer.getvalue()), ("0.txt", b"two images in one")])
    run = scored(tar, tmp_path / "run")
    assert annotations(run)["format"].to_pylist() == ["MPO"]
    select(run, "all", SelectConfig(itm=0))
    export(run, "all", form, str(tmp_path / "out"))
    source = {"wds": tmp_path / "out", "parquet": tmp_path / "out", "json": tmp_path / "out" / "captions.json"}[form]
    assert planned(source, tmp_path / "again").rows == 2


@pytest.mark.parametrize("shard", [0, -1])
def test_files_of_no_samples_are_refused(run, half, tmp_path, shard):
    with pytest.raises(ValueError, match="shard must be 1 or more"):
        export(run, "half", "wds", str(tmp_path / "out"), shard=shard)


def test_killed_while_exporting(run, half, tmp_path):
    """Fault 25: no _SUCCESS before everything is there, and the same bytes after."""
    starter = Starter(tmp_path / "log")
    args = ["export", run.where, "--select", "half", "--to", str(tmp_path / "out"), "--shard", "30"]
    assert starter.run(*args, CAPFILT_FAULT="export.after_file:2") == -9
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["00000.tar", "00001.tar", "_BEGUN"]
    assert starter.run(*args) == 0
    starter.close()
    whole = export(run, "half", "wds", str(tmp_path / "whole"), shard=30)
    assert json.loads((tmp_path / "out" / "_SUCCESS").read_bytes())["files"] == whole["files"]
    assert main(["verify", run.where]) == 0
    (tmp_path / "out" / "00000.tar").write_bytes(b"x")
    assert main(["verify", str(tmp_path / "out")]) == 4


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"nope", b"\xff", b'{"files": {"a": 1}}'])
def test_verify_names_damaged_records_of_exports(run, half, tmp_path, capsys, content):
    shutil.copytree(run.where, copy := tmp_path / "copy")
    shutil.rmtree(copy / "exports", ignore_errors=True)
    export(Run.open(str(copy)), "half", "json", str(tmp_path / "out"))
    note = copy / "exports/half-json.json"
    good = note.read_bytes()
    note.write_bytes(content)
    assert main(["verify", str(copy)]) == 4
    assert f"wrong: {note} is damaged; export again" in capsys.readouterr().out.splitlines()
    note.write_bytes(good)
    assert main(["verify", str(copy)]) == 0
    (tmp_path / "out/_SUCCESS").write_bytes(content)
    for where in (copy, tmp_path / "out"):
        assert main(["verify", str(where)]) == 4
        wrong = f"wrong: {tmp_path / 'out'} has no readable _SUCCESS: the export is not complete"
        assert wrong in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"nope", b"\xff"])
def test_verify_names_a_damaged_job(run, tmp_path, capsys, content):
    shutil.copytree(run.where, copy := tmp_path / "copy")
    (copy / "job.json").write_bytes(content)
    assert main(["verify", str(copy)]) == 4
    assert capsys.readouterr().out.startswith(f"wrong: {copy}/job.json cannot be read (")
    assert main(["verify", str(tmp_path)]) == 2
    assert "is not a planned run" in capsys.readouterr().err


def test_tars_hold_both_texts_and_all_scores(run, half, tmp_path):
    export(run, "half", "wds", str(tmp_path / "out"))
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        names = tar.getnames()
        note = json.load(tar.extractfile(names[2]))
    assert names[:3] == ["000000000.jpg", "000000000.txt", "000000000.json"]
    assert {"caption", "captions", "sources", "scores", "sample_id", "facts"} <= note.keys()
    assert {"web_text", "syn_text", "itm_web", "itm_syn", "kept", "extra"} <= json.loads(note["facts"]).keys()


def test_uids_are_those_of_datacomp(tmp_path):
    rows = [(f"{i:032x}", i) for i in (7, 3, 2**70)]
    members = [m for uid, i in rows for m in sample(f"k{i % 97}", i % 97, "a text", {"uid": uid})]
    run = scored(write_tar(tmp_path / "a.tar", members), tmp_path / "run")
    select(run, "all", SelectConfig(itm=0.0))
    export(run, "all", "uids", str(tmp_path / "out"))
    uids = np.load(tmp_path / "out" / "uids.npy", allow_pickle=False)
    assert uids.dtype == np.dtype("u8,u8")
    assert uids.tolist() == [(0, 3), (0, 7), (64, 0)]


def test_an_image_that_is_another_now_is_not_exported(tmp_path):
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    (tmp_path / "a.json").write_text(json.dumps([{"image": "0.jpg", "caption": "x"}]))
    run = scored(tmp_path / "a.json", tmp_path / "run")
    select(run, "all", SelectConfig(itm=0.0))
    (tmp_path / "0.jpg").write_bytes(jpeg(1))
    with pytest.raises(DataError, match="not the one that was scored"):
        export(run, "all", "json", str(tmp_path / "out"))


def test_a_partial_run_says_so(tmp_path, capsys):
    run = planned(crawl(tmp_path / "in"), tmp_path / "run")
    with pytest.raises(ValueError, match="nothing is scored yet"):
        select(run, "x", SelectConfig())
    assert main(["score", run.where, "--limit", "20", "--decode-workers", "0"]) == 0
    assert main(["select", run.where, "--name", "x"]) == 0
    assert "of 2 parts; 9 are planned" in capsys.readouterr().out
    assert main(["score", run.where, "--decode-workers", "0"]) == 0
    assert main(["select", run.where, "--name", "x"]) == 0  # the same selection, of all rows now
    assert read_account(Run.open(run.where), "x")["parts"] == 9


def test_help_of_every_verb(capsys):
    for verb in ("plan", "score", "select", "export", "report", "verify", "calibrate", "status", "retry-failed", "run"):
        assert main([verb, "--help"]) == 0
        assert "--" in capsys.readouterr().out
    assert main(["run", "--help"]) == 0
    stdout = capsys.readouterr().out
    assert "capfilt run --input cc --out try --scorer fake" in stdout  # something to begin with
    assert max(map(len, stdout.splitlines())) <= 120


def test_all_in_one_go_and_again_with_more(tmp_path, capsys, monkeypatch):
    crawl(tmp_path / "in")
    args = ["run", "--input", str(tmp_path / "in"), "--out", str(tmp_path / "run"), "--scorer", "fake"]
    args += ["--part-size", "16", "--decode-workers", "0"]
    assert main([*args, "--dry-run"]) == 0
    assert "120 rows to do" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    for launcher in ({"RANK": "0", "WORLD_SIZE": "2"}, {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}):
        with monkeypatch.context() as set_by:
            for name, value in launcher.items():
                set_by.setenv(name, value)
            assert main(args) == 2
        assert "run` is for one process" in capsys.readouterr().err
    for more in (["--limit", "20"], [], ["--itm", "0.9"]):  # each export takes the place of the one before
        assert main([*args, *more]) == 0
        assert "nothing is wrong" in capsys.readouterr().out
    out = tmp_path / "run" / "exports" / "default"
    kept = read_account(Run.open(str(tmp_path / "run")), "default")["kept"]
    assert len(open_source(SourceConfig(str(out / "*.tar")))) == sum(kept.values())
    assert [path.name for path in out.iterdir() if "BEGUN" in path.name] == []
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert verify(str(moved)).status() == 0
    next((moved / "exports/default").glob("*.tar")).unlink()
    assert "moved/exports/default/00000.tar is missing" in verify(str(moved)).problems[0]
