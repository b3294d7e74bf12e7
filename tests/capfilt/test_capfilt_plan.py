import io
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from capfilt_crawl import HERE, annotations, check_complete, crawl, make_fake, planned, sample, scored, write_tar

from blip.errors import DataError
from capfilt import plan
from capfilt.__main__ import main
from capfilt.run import Run
from capfilt.score.loop import score
from capfilt.store import identity


def test_parts_cover_every_row_once(tmp_path):
    run = planned(crawl(tmp_path / "in", shards=2, rows=37), tmp_path / "run")
    spans = [(p.source, p.lo, p.hi) for p in run.plan]
    assert spans == [(f"{s:05d}.tar", lo, min(lo + 16, 37)) for s in range(2) for lo in (0, 16, 32)]
    assert run.rows == 74
    assert len({p.pid for p in run.plan}) == 6


def test_ids_are_fixed_by_what_they_name():
    assert identity.sample_id("a.tar", 1, "k") == identity.sample_id("a.tar", 1, "k")
    assert len({identity.sample_id(*a) for a in [("a.tar", 1, "k"), ("a.tar", 11, ""), ("b.tar", 1, "k")]}) == 3
    # Where one part ends and the next begins must not be ambiguous.
    assert identity.sample_id("a", 1, "1k") != identity.sample_id("a", 11, "k")
    assert len(identity.sample_id("\ud800", 0, "x")) == 32


def test_a_moved_input_keeps_its_ids(tmp_path):
    a = planned(crawl(tmp_path / "a"), tmp_path / "run-a")
    b = planned(crawl(tmp_path / "b"), tmp_path / "run-b")
    assert [p.pid for p in a.plan] == [p.pid for p in b.plan]


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"precision": "bfloat16"}, {"captions": 2}, {"max_length": 9}, {"lenient": True},
     {"itm_token": "cls"}, {"max_words": 9}],
)  # fmt: skip
def test_other_settings_are_refused_with_what_differs(tmp_path, change, capsys):
    """Fault 11."""
    scored(crawl(tmp_path / "in", shards=1), tmp_path / "run")
    before = {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}
    ((name, value),) = change.items()
    option = [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    for command in (
        ["score", str(tmp_path / "run"), *option],
        ["plan", "--input", str(tmp_path / "in"), "--out", str(tmp_path / "run"), "--scorer", "fake", *option],
    ):
        assert main(command) == 2
        stderr = capsys.readouterr().err
        assert stderr.startswith("error: ")
        assert stderr.count("\n") == 1
        assert name in stderr
        assert f"-> {str(value).lower() if value is True else value}" in stderr
    assert {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()} == before


def test_another_part_size_or_input_is_refused(tmp_path):
    folder = crawl(tmp_path / "in")
    planned(folder, tmp_path / "run")
    with pytest.raises(ValueError, match="part_size: 16 -> 8"):
        planned(folder, tmp_path / "run", part_size=8)
    (folder / "00003.tar").write_bytes((folder / "00000.tar").read_bytes())
    with pytest.raises(ValueError, match=r"00003\.tar is not in the plan"):
        planned(folder, tmp_path / "run")
    (folder / "00003.tar").unlink()
    assert planned(folder, tmp_path / "run").rows == 120  # the same again is nothing new


def test_extending_keeps_what_is_there(tmp_path):
    """Fault 13: new files are added, old ids and results stay."""
    folder = crawl(tmp_path / "in", shards=2)
    run = scored(folder, tmp_path / "run")
    before, table = [p.pid for p in run.plan], annotations(run)
    write_tar(folder / "later" / "00000.tar", sample("x", 500) + sample("y", 501))
    extended, new = plan.extend(str(tmp_path / "run"), [str(folder / "later")])
    assert [s.relpath for s in new] == ["later/00000.tar"]
    assert [p.pid for p in extended.plan][: len(before)] == before
    assert score(extended, make_fake, HERE, io.StringIO()) == 0
    assert annotations(extended).slice(0, 80).equals(table)
    assert len(annotations(extended)) == 82
    assert plan.extend(str(tmp_path / "run"), [str(folder / "later")])[1] == []
    write_tar(folder / "00002.tar", sample("z", 502))
    with pytest.raises(DataError, match=r"duplicate input .*00002\.tar"):
        plan.extend(str(tmp_path / "run"), [str(folder), str(folder / "00002.tar")])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--seed", "7"], "seed: 0 -> 7"),
        (["--part-size", "8"], "part_size: 16 -> 8"),
        (["--caption-column", "alt"], "reading.caption_column: caption -> alt"),
    ],
)
def test_an_extension_with_other_settings_is_refused(tmp_path, capsys, option, message):
    run = planned(crawl(tmp_path / "in", shards=1), tmp_path / "run")
    later = write_tar(tmp_path / "in" / "later.tar", sample("x", 500))
    extend = ["plan", "--extend", "--out", str(tmp_path / "run"), "--input", str(later)]
    assert main([*extend, *option]) == 2
    assert message in capsys.readouterr().err
    assert Run.open(run.where).rows == 40
    assert main([*extend, "--seed", "0", "--part-size", "16"]) == 0
    assert Run.open(run.where).rows == 41


@pytest.mark.parametrize("how", ["longer", "other bytes", "gone"])
def test_a_changed_source_fails_alone(tmp_path, how, capfd):
    """Fault 13: only the changed file's parts fail, and they are fine again when the file is."""
    folder = crawl(tmp_path / "in")
    run = planned(folder, tmp_path / "run")
    path, good = folder / "00001.tar", (folder / "00001.tar").read_bytes()
    stamp = path.stat().st_mtime_ns
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(good + b"\0" * 512 if how == "longer" else good[:600] + b"\xff" + good[601:])
    assert main(["score", run.where, "--decode-workers", "0"]) == 3
    assert "source_changed" in capfd.readouterr().err
    assert {p.source for p in run.plan if not run.parts.exists(p.pid)} == {"00001.tar"}
    notes = [json.loads(f.read_bytes()) for f in (tmp_path / "run" / "failures").iterdir()]
    assert {n["code"] for n in notes} == {"source_changed"}
    path.write_bytes(good)
    os.utime(path, ns=(stamp + 10**9, stamp + 10**9))  # a copy has another time and the same content
    assert main(["score", run.where, "--decode-workers", "0"]) == 0
    check_complete(run.where, scored(folder, tmp_path / "baseline"))


@pytest.mark.parametrize(
    "spec",
    ["pipe:cat x.tar", "http://x/y.tar", "https://x/{0..3}.tar", "ssh://h/x.tar", "| cat x.tar", "${HOME}/x.tar"],
)
def test_commands_and_addresses_are_refused(tmp_path, spec):
    with pytest.raises(DataError, match="only files of this machine"):
        planned(spec, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_wrong_use_is_said_in_a_line(tmp_path, capsys):
    crawl(tmp_path / "in", shards=1)
    (tmp_path / "in" / "x.tar.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "empty").mkdir()
    for args, message in (
        (["plan", "--input", str(tmp_path / "no.tar"), "--out", "o", "--scorer", "fake"], "no such file"),
        (["plan", "--input", str(tmp_path / "empty"), "--out", "o", "--scorer", "fake"], "without shards"),
        (["plan", "--input", str(tmp_path / "in" / "x.tar.gz"), "--out", "o", "--scorer", "fake"], "unpack it"),
        (["plan", "--input", str(tmp_path / "in"), "--out", "o"], "give --filter"),
        (["plan", "--input", str(tmp_path / "in"), "--out", "o", "--filter", "./none"], "not a model directory"),
        (["score", str(tmp_path)], "not a planned run"),
        (["score", str(tmp_path), "--workers", "2"], "--workers is for --engine ray, got --engine embedded"),
        (["select", str(tmp_path), "--name", "x"], "not a planned run"),
    ):
        assert main(args) == 2, args
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error, error
        assert error.count("\n") == 1


def test_suggested_commands_can_be_pasted(tmp_path, capsys):
    run = planned(crawl(tmp_path / "in", shards=1), tmp_path / "my [first] run")
    for args in (["report"], ["inspect"], ["select", "--name", "x"], ["calibrate"], ["calibrate", "--judge"]):
        assert main([args[0], run.where, *args[1:]]) == 2
        (command,) = re.findall("run `(.*)` first", capsys.readouterr().err)
        assert shlex.split(command) == ["capfilt", "score", run.where]
    assert main(["retry-failed", run.where]) == 0
    assert shlex.split(capsys.readouterr().out.split("`")[1]) == ["capfilt", "score", run.where]


@pytest.mark.parametrize(
    "args",
    [["plan"], ["nonsense"], ["score"], ["score", "x", "--batch", "many"], ["score", "x", "--precision", "int8"]],
)
def test_wrong_options_are_said_in_a_line(args, capsys):
    assert main(args) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "least"),
    [("--batch=-1", 1), ("--batch=0", 1), ("--decode-workers=-1", 0), ("--limit=0", 1), ("--limit=-5", 1)],
)
def test_numbers_that_cannot_be_are_refused_before_the_work(tmp_path, capsys, option, least):
    run = planned(crawl(tmp_path / "in", shards=1, rows=2), tmp_path / "run")
    assert main(["score", run.where, option]) == 2
    name = option[2:].partition("=")[0].replace("-", "_")
    assert f"{name} must be {least} or more" in capsys.readouterr().err
    assert main(["score", run.where, "--decode-timeout", "0"]) == 2
    assert "decode_timeout must be more than 0" in capsys.readouterr().err
    assert not run.parts.present()


def test_a_part_size_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="part_size must be 1 or more, got 0"):
        planned(crawl(tmp_path / "in", shards=1, rows=2), tmp_path / "run", part_size=0)


def test_a_plan_that_lost_a_file_is_not_a_small_one(tmp_path, capsys):
    run = planned(crawl(tmp_path / "in", shards=1, rows=4), tmp_path / "run")
    rows = tmp_path / "run" / "plan" / "00000.parquet"
    good = rows.read_bytes()
    rows.write_bytes(good[:-9])
    assert main(["score", run.where]) == 2
    assert "plan/00000.parquet cannot be read" in capsys.readouterr().err
    rows.unlink()
    for verb in ("score", "status"):
        assert main([verb, run.where]) == 2
        assert "plan has 0 of 4 rows" in capsys.readouterr().err
    assert main(["verify", run.where]) == 4
    assert f"wrong: {run.where}/plan has 0 of 4 rows" in capsys.readouterr().out
    rows.write_bytes(good)
    assert Run.open(run.where).rows == 4


def test_planning_and_helping_need_no_torch(tmp_path):
    crawl(tmp_path / "in", shards=1, rows=2)
    run = f"{tmp_path}/run"
    code = f"""
import sys
from capfilt.__main__ import main
assert main(["plan", "--input", {str(tmp_path / "in")!r}, "--out", {run!r}, "--scorer", "fake"]) == 0
assert main(["score", {run!r}, "--decode-workers", "0"]) == 0
assert main(["select", {run!r}, "--name", "half"]) == 0
assert main(["verify", {run!r}]) == 0
assert not {{"torch", "transformers", "datasets", "ray"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_folder_that_is_not_empty_is_refused(tmp_path, capsys):
    folder = crawl(tmp_path / "in", shards=1)
    assert main(["plan", "--input", str(folder), "--out", str(folder), "--scorer", "fake"]) == 2
    assert "is not empty (00000.tar) and holds no run" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["00000.tar"]


def test_a_killed_plan_is_made_again(tmp_path):
    folder = crawl(tmp_path / "in")
    run = planned(folder, tmp_path / "run")
    pids = [p.pid for p in run.plan]
    (tmp_path / "run" / "job.json").unlink()  # it is written last
    assert [p.pid for p in planned(folder, tmp_path / "run").plan] == pids
    (tmp_path / "run" / "job.json").write_text("{}")
    with pytest.raises(DataError, match="was it edited"):
        Run.open(str(tmp_path / "run"))


@pytest.mark.parametrize("place", ["[2024] {set}", "set"])
def test_inputs_by_lists_urls_and_globs(tmp_path, tmp_path_factory, place):
    """A folder's literal name is no pattern; lists, joined names and file URLs mean what they do in training."""
    folder, runs = crawl(tmp_path / place, shards=3, rows=2), tmp_path_factory.mktemp("runs")
    both = ["00000.tar", "00002.tar"]
    for i, (spec, names) in enumerate(
        {
            f"{folder}/*.tar": ["00000.tar", "00001.tar", "00002.tar"],
            f"{folder}/{{00000..00002..2}}.tar": both,
            f"{folder}/{{00000,00002}}.tar": both,
            f"{folder}/00000.tar::{folder}/00002.tar": both,
            f"file://{folder}/{{00000,00002}}.tar".replace(" ", "%20"): both,
            f"{tmp_path}/*": ["00000.tar", "00001.tar", "00002.tar"],
        }.items()
    ):
        assert list(planned(spec, runs / str(i)).sources) == names, spec
    for spec, message in (
        (f"{folder}/{{00000,00009}}.tar", r"input .*00009\.tar: no such file"),
        ("{http://x/a.tar,pipe:cat}", "only files of this machine"),
        (f"{folder}/00000.tar::http://x/a.tar", "only files of this machine"),
        ("file://elsewhere/a.tar", "not a file of this machine"),
    ):
        with pytest.raises(DataError, match=message):
            planned(spec, runs / "none")
    (folder / "00003.tar").symlink_to(folder / "gone")
    with pytest.raises(DataError, match=r"00003\.tar: no such file; it is a link to .*gone"):
        planned(f"{folder}/*.tar", runs / "none")


def test_the_split_of_a_plan_is_that_of_its_extensions(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    for name, splits in (("a", ["train", "val"]), ("b", ["train"]), ("c", ["val", "val"])):
        rows = [{"image": "a.jpg", "caption": "x", "split": split} for split in splits]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = planned(tmp_path / "{a,b}.jsonl", tmp_path / "run", reading={"split": "val"})
    assert [s.rows for s in run.sources.values()] == [1, 0]
    run, new = plan.extend(str(tmp_path / "run"), [str(tmp_path / "*.jsonl")])
    assert ([s.relpath for s in new], run.rows) == (["c.jsonl"], 3)
    (tmp_path / "d.jsonl").write_text(json.dumps({"image": "a.jpg", "caption": "x"}))
    with pytest.raises(DataError, match=r"d\.jsonl: its rows have no splits"):
        plan.extend(str(tmp_path / "run"), [str(tmp_path / "d.jsonl")])
