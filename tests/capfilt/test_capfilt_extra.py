"""Further scorers: in the pass of captioner and filter or after it, killed, wrong, changed; and two real ones."""

import hashlib
import io
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from capfilt_crawl import HERE, Starter, annotations, check_complete, crawl, jpeg, make_fake, planned, scored, write_tar
from PIL import Image

from blip.errors import DataError
from capfilt.__main__ import main
from capfilt.extra.load import load_scorer
from capfilt.extra.score import score_also
from capfilt.extra.scorer import RowTexts, WrongScorer, check_scores
from capfilt.run import Run
from capfilt.score.loop import ScoreOptions
from capfilt.status import retry_failed, status
from capfilt.verify import verify

RED = """
import pyarrow as pa

class Red:
    name, side, identity = "red", 8, {"version": 1}
    columns = {"mean": pa.float32(), "web": pa.list_(pa.int32()), "syn_first": pa.list_(pa.string())}

    def score(self, images, texts):
        assert all(image.shape == (8, 8, 3) and image.dtype == "uint8" for image in images)
        return {
            "mean": [float(image[..., 0].mean()) for image in images],
            "web": [[len(text) for text in row.web] for row in texts],
            "syn_first": [[text[:1] for text in row.syn] for row in texts],
        }
"""


@pytest.fixture
def red(tmp_path):
    path = tmp_path / "own scorers (1)" / "red.py"
    path.parent.mkdir()
    path.write_text(RED)
    return f"{path}:Red"


def run_also(run, *also, maker=make_fake, options=HERE, status=0):
    out = io.StringIO()
    assert score_also(run, also, maker, options, out=out) == status, out.getvalue()
    return out.getvalue()


def extra_files(run):
    root = Path(run.where, "extra")
    files = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    return {name: content for name, content in files.items() if not name.startswith("failures/")}


def mixed_crawl(folder):
    """A crawl of 40 rows, of which one has no image, one a broken one, and one no text."""
    members = []
    for i in range(40):
        image = b"<html>" if i == 7 else jpeg(i, (40, 30))
        members += [(f"{i:04d}.jpg", image)] * (i != 3)
        members += [(f"{i:04d}.txt", "" if i == 5 else f"Image {i}".encode())] * (i != 5)
        members += [(f"{i:04d}.json", b"{}")] * (i == 3)
    return write_tar(folder / "a.tar", members)


def test_the_same_is_kept_in_one_pass_and_in_two(tmp_path, red):
    data = mixed_crawl(tmp_path / "in")
    together = planned(data, tmp_path / "together")
    run_also(together, red, "language", "embedding")
    plain = scored(data, tmp_path / "plain")
    check_complete(together.where, plain)  # the annotations are those without further scorers
    before = {name: time for name, (_, time) in plain.storage.listing("parts").items()}
    run_also(plain, "language", red)
    run_also(plain, "embedding", "language")
    assert {name: time for name, (_, time) in plain.storage.listing("parts").items()} == before
    files = extra_files(plain)
    assert files == extra_files(together)
    pids = [part.pid for part in plain.plan]
    assert {name for name in files if not name.endswith(".json")} == {
        f"{name}/{pid}.{suffix}"
        for name, suffix in (("red", "parquet"), ("language", "parquet"), ("embedding", "npy"))
        for pid in pids
    }


def test_scores_are_those_of_the_row(tmp_path, red):
    run = scored(mixed_crawl(tmp_path / "in"), tmp_path / "run")
    run_also(run, red, "embedding")
    rows = annotations(run).to_pylist()
    scores = pa.concat_tables([pq.read_table(run.storage.path(f"extra/red/{part.pid}.parquet")) for part in run.plan])
    vectors = np.concatenate([np.load(run.storage.path(f"extra/embedding/{part.pid}.npy")) for part in run.plan])
    assert vectors.shape == (40, 48)
    assert vectors.dtype == np.float16
    for row, one, vector in zip(rows, scores.to_pylist(), vectors, strict=True):
        assert one["sample_id"] == row["sample_id"]
        assert one["error"] is None
        if row["status"] not in ("ok", "no_text"):
            assert (one["mean"], one["web"], one["syn_first"]) == (None, None, None)
            assert not vector.any()
            continue
        image = Image.open(io.BytesIO(jpeg(int(row["key"]), (40, 30)))).resize((8, 8), Image.Resampling.BICUBIC)
        assert one["mean"] == pytest.approx(np.asarray(image)[..., 0].mean(), abs=1e-4)
        assert one["web"] == [len(text) for text in row["web_text"]]
        assert one["syn_first"] == [text[0] for text in row["syn_text"]]
        assert np.linalg.norm(vector.astype(float)) == pytest.approx(1, abs=2e-3)
    assert {row["status"] for row in rows} == {"ok", "no_text", "no_image", "decode_error"}
    lines = verify(run.where)
    assert lines.status() == 0
    assert "extra red: rows 40 = with scores 38 + none 2 + raised an error 0" in lines.summary
    assert "extra embedding: rows 40 = with scores 38 + none 2 + raised an error 0" in lines.summary
    assert status(run)["extra"] == {"embedding": {"parts": 3}, "red": {"parts": 3}}


def test_a_later_pass_needs_no_models_and_for_texts_no_images(tmp_path):
    run = scored(crawl(tmp_path / "in", shards=1), tmp_path / "run")
    (tmp_path / "in" / "00000.tar").unlink()

    def none(run):
        raise AssertionError

    run_also(run, "language", maker=none)
    assert status(run)["extra"] == {"language": {"parts": 3}}
    before = extra_files(run)
    assert "3 of 3 parts are done; 0 to do" in run_also(run, "language", maker=none)
    assert extra_files(run) == before


def test_a_run_without_further_scores_is_as_before(tmp_path):
    run = scored(crawl(tmp_path / "in", shards=1), tmp_path / "run")
    assert not Path(run.where, "extra").exists()
    assert status(run)["extra"] == {}
    assert verify(run.where).summary == []


def own(tmp_path, body, **changes):
    """A scorer with another method `score`, and other attributes."""
    attributes = {"name": "'mine'", "side": "8", "identity": "{}", "columns": "{'a': pa.float32()}", **changes}
    lines = [f"    {name} = {value}" for name, value in attributes.items()]
    path = tmp_path / "mine.py"
    path.write_text("\n".join(["import pyarrow as pa", "import numpy as np", "class Mine:", *lines,
                               "    def score(self, images, texts):", f"        {body}", ""]))  # fmt: skip
    return f"{path}:Mine"


def test_a_row_for_which_a_scorer_raises_is_recorded_and_forgotten_on_request(tmp_path):
    run = scored(crawl(tmp_path / "in", shards=1), tmp_path / "run")
    flag = tmp_path / "mended"
    body = (
        f"assert {str(flag)!r} in __import__('glob').glob({str(flag)!r}) or not any('7!' in r.web[0] for r in texts), "
    )
    spec = own(tmp_path, body + "'no \\ud800'; return {'a': [1.0] * len(texts)}")
    line = run_also(run, spec)
    assert "mine raised an error for 4 of 40 rows (AssertionError: no \\ud800); `capfilt retry-failed`" in line
    table = pa.concat_tables([pq.read_table(run.storage.path(f"extra/mine/{part.pid}.parquet")) for part in run.plan])
    raised = [row for row in table.to_pylist() if row["error"]]
    assert len(raised) == 4  # 7, 17, 27 and 37
    assert all(row["a"] is None and row["error"] == "AssertionError: no \\ud800" for row in raised)
    summary = verify(run.where).summary
    assert "extra mine: rows 40 = with scores 36 + none 0 + raised an error 4" in summary
    run_also(run, spec)
    assert verify(run.where).summary == summary  # it is not tried again by itself
    flag.touch()
    assert retry_failed(run) == 3
    run_also(run, spec)
    assert "extra mine: rows 40 = with scores 40 + none 0 + raised an error 0" in verify(run.where).summary


def test_a_scorer_that_always_raises_ends_with_status_2(tmp_path):
    run = scored(crawl(tmp_path / "in", shards=1), tmp_path / "run")
    line = run_also(run, own(tmp_path, "raise OSError('gone')"), status=2)
    assert "mine raised an error for 40 of 40 rows (OSError: gone)" in line
    many = scored(crawl(tmp_path / "more", shards=6, rows=48), tmp_path / "many")
    with pytest.raises(WrongScorer, match=r"mine raised an error for \d+ of \d+ rows \(OSError: gone\); mend it"):
        run_also(many, own(tmp_path, "raise OSError('gone')"))


@pytest.mark.parametrize(
    ("body", "changes", "message"),
    [
        ("return {'a': [1.0]}", {}, "scorer mine: column a has 1 values for 16 rows"),
        ("return {'b': [1.0] * len(texts)}", {}, "scorer mine: score() must return the columns a, got b"),
        ("return [1.0] * len(texts)", {}, "scorer mine: score() must return a dictionary of columns, got list"),
        ("return {'a': 1.0}", {}, "scorer mine: column a must be a list, got float"),
        ("return {'a': ['1'] * len(texts)}", {}, "scorer mine: column a must be float, got '1'"),
        ("return {'a': [True] * len(texts)}", {}, "scorer mine: column a must be float, got True"),
        ("return {'a': [1.5] * len(texts)}", {"columns": "{'a': pa.int8()}"}, "column a must be int8, got 1.5"),
        ("return {'a': [300] * len(texts)}", {"columns": "{'a': pa.int8()}"}, "scorer mine: column a must be int8"),
        ("return {'a': [b'x'] * len(texts)}", {"columns": "{'a': pa.string()}"}, "column a must be string, got b'x'"),
        ("return {'web': [[1, 2]] * len(texts)}", {"columns": "{'web': pa.list_(pa.int8())}"},
         "scorer mine: column web has 2 values for the 1 web texts"),
        ("", {"name": "'../x'"}, "its name '../x' must be letters, digits and _"),
        ("", {"name": "'embedding'"}, "its name 'embedding' must be"),
        ("", {"side": "'8'"}, "its side must be of type int, got '8'"),
        ("", {"side": "-1"}, "its side must be 0 to 4096 pixels"),
        ("", {"columns": "{}"}, "it has no columns"),
        ("", {"columns": "{'error': pa.int8()}"}, "column 'error' must be"),
        ("", {"columns": "{'a': float}"}, "the type of column a must be of pyarrow"),
    ],
)  # fmt: skip
def test_a_wrong_scorer_is_named_with_its_fault(tmp_path, capsys, body, changes, message):
    run = scored(crawl(tmp_path / "in", shards=1), tmp_path / "run")
    spec = own(tmp_path, body or "return {}", **changes)
    assert main(["score", run.where, "--also", spec, "--decode-workers", "0"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not list(Path(run.where, "extra").rglob("*.parquet"))
    assert not Path(run.where, "extra", "failures").exists() or not list(Path(run.where, "extra", "failures").iterdir())
    new = planned(tmp_path / "in", tmp_path / "new")
    assert main(["score", new.where, "--also", spec, "--decode-workers", "0"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("aesthetics", "expected language, aesthetic=MODEL, embedding, package.module:Class or PATH.py:Class"),
        ("aesthetic", "aesthetic needs a model"),
        ("aesthetic=./nothere", "there is no such folder"),
        ("nothere.py:A", "there is no file nothere.py"),
        ("no_such_package.x:A", "No module named 'no_such_package'; a file is named by PATH.py:Class"),
        ("json:Nothing", "json has no class Nothing"),
        ("json:JSONDecoder", "its name must be of type str"),
        ("{tmp}/broken.py:A", "it cannot be made: SyntaxError"),
        ("{tmp}/raises.py:A", "it cannot be made: ZeroDivisionError"),
    ],
)
def test_scorers_that_cannot_be_made(tmp_path, capsys, spec, message):
    (tmp_path / "broken.py").write_text("class A(:")
    (tmp_path / "raises.py").write_text("class A:\n    def __init__(self):\n        1 / 0\n")
    run = scored(crawl(tmp_path / "in", shards=1, rows=4), tmp_path / "run")
    assert main(["score", run.where, "--also", spec.format(tmp=tmp_path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not Path(run.where, "extra").exists()


def test_a_name_twice_or_ray_is_refused(tmp_path, capsys):
    run = scored(crawl(tmp_path / "in", shards=1, rows=4), tmp_path / "run")
    assert main(["score", run.where, "--also", "language", "--also", "language"]) == 2
    assert "--also names language twice" in capsys.readouterr().err
    assert main(["score", run.where, "--also", "language", "--engine", "ray"]) == 2
    assert "--also is not for --engine ray" in capsys.readouterr().err


def test_a_class_takes_what_follows_the_equals_sign(tmp_path):
    path = tmp_path / "with.py"
    path.write_text(RED.replace('name, side, identity = "red", 8, {"version": 1}', 'name, side = "red", 8\n'
                    "    def __init__(self, what): self.identity = {'what': what}"))  # fmt: skip
    scorer = load_scorer(f"{path}:Red=a=b:C", "cpu")
    code = {"class": "Red", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert scorer.identity == {"what": "a=b:C", "code": code}


def test_the_scorer_of_the_documentation_works(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "capfilt.md").read_text()
    (code,) = [block for block in page.split("```python\n")[1:] if "class Brightness" in block]
    (tmp_path / "brightness.py").write_text(code.partition("```")[0])
    run = scored(crawl(tmp_path / "in", shards=1, rows=4), tmp_path / "run")
    run_also(run, f"{tmp_path}/brightness.py:Brightness")
    assert "extra brightness: rows 4 = with scores 4 + none 0 + raised an error 0" in verify(run.where).summary


def test_another_identity_is_refused_and_never_mixed(tmp_path, red):
    run = scored(crawl(tmp_path / "in", shards=1), tmp_path / "run")
    run_also(run, red)
    run.storage.remove(f"extra/red/{run.plan[0].pid}.parquet")
    before = extra_files(run)
    path = Path(red.rpartition(":")[0])
    path.write_text(RED.replace('"version": 1', '"version": 2'))
    with pytest.raises(DataError, match=r"extra/red has the scores of another scorer \(identity.code.sha256: .* -> "):
        run_also(run, red)
    assert extra_files(run) == before
    path.write_text(RED)
    run_also(run, red)
    assert verify(run.where).status() == 0
    other = next(iter(run.storage.listing("extra/red")))
    record = json.loads(run.storage.read("extra/red/scorer.json"))
    run.storage.write("extra/red/scorer.json", json.dumps({**record, "fingerprint": "0" * 16}).encode())
    assert any("was made by another scorer" in problem for problem in verify(run.where).problems), other


def test_a_changed_byte_is_noticed_and_scored_again(tmp_path, red):
    run = scored(crawl(tmp_path / "in", shards=1), tmp_path / "run")
    run_also(run, red, "embedding")
    before = extra_files(run)
    dice = np.random.default_rng(0)
    for name in (f"embedding/{run.plan[0].pid}.npy", f"red/{run.plan[1].pid}.parquet"):
        path = Path(run.where, "extra", name)
        for at in [0, len(before[name]) - 1, *dice.integers(0, len(before[name]), 12)]:
            content = bytearray(before[name])
            content[at] ^= 1
            path.write_bytes(content)
            problems = verify(run.where).problems
            assert len(problems) == 1
            assert name in problems[0]
        path.write_bytes(before[name][:-5])
        assert name in verify(run.where).problems[0]
        path.write_bytes(before[name])
    path.write_bytes(before[name][:100])
    run_also(run, red, "embedding")
    assert extra_files(run) == before
    Path(run.where, "extra", "red", "0123456789abcdef.parquet").write_bytes(b"x")
    assert "extra/red has 0123456789abcdef, which is not in the plan" in verify(run.where).problems


def test_nothing_of_the_run_is_imported(tmp_path, monkeypatch):
    """What a run's folder says is data: a scorer that it names, or a module that lies there, is not run."""
    run = scored(crawl(tmp_path / "in", shards=1, rows=8), tmp_path / "run")
    trap = "import os; os.abort()"
    for name in ("language.py", "red.py", "extra/red/red.py", "extra/red/scorer.py"):
        run.storage.write(name, trap.encode())
    record = {"name": "red", "identity": {"class": "red:Red"}, "columns": {}, "side": 8, "fingerprint": "0"}
    run.storage.write("extra/red/scorer.json", json.dumps(record).encode())
    monkeypatch.chdir(run.where)
    run_also(run, "language")
    assert {"embedding", "language", "red"} >= set(status(run)["extra"])
    assert main(["score", run.where, "--also", "red:Red"]) == 2  # not from the current folder either


@pytest.mark.parametrize("point", ["commit.before_fsync", "commit.after_tmp", "commit.after_replace"])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_killed_pass_goes_on(tmp_path, red, point, passes):
    data = crawl(tmp_path / "in", shards=2)
    whole = scored(data, tmp_path / "whole")
    run_also(whole, red, "language", "embedding")
    run = planned(data, tmp_path / "run")
    if passes == 2:
        scored(data, run.where)
    args = ["score", run.where, "--decode-workers", "0", "--also", red, "--also", "language", "--also", "embedding"]
    starter = Starter(tmp_path / "log")
    try:
        assert starter.run(*args, CAPFILT_FAULT=f"{point}:5") == -9
        assert starter.run(*args, CAPFILT_FAULT=f"{point}:9") == -9
        assert starter.run(*args) == 0, (tmp_path / "log").read_text()
    finally:
        starter.close()
    assert extra_files(run) == extra_files(whole)
    assert verify(run.where).status() == 0


def test_two_processes_share_the_work(tmp_path, red):
    data = crawl(tmp_path / "in", shards=3)
    whole = scored(data, tmp_path / "whole", part_size=4)
    run = scored(data, tmp_path / "run", part_size=4)
    run_also(whole, red)
    slow = Path(red.rpartition(":")[0])
    args = ["score", run.where, "--decode-workers", "0", "--also", red]
    starter = Starter(tmp_path / "log")
    try:
        both = [starter.start(*args), starter.start(*args)]
        assert [starter.wait(pid) for pid in both] == [0, 0], (tmp_path / "log").read_text()
    finally:
        starter.close()
    assert slow.read_text() == RED
    assert extra_files(run) == extra_files(whole)
    reports = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")]
    assert sum(one["inherited"] for one in reports if one["rows"] == one["of"]) > 0  # each left the other's parts alone


def test_a_limit_and_a_share_of_a_launcher(tmp_path, red):
    run = scored(crawl(tmp_path / "in", shards=1), tmp_path / "run", part_size=4)
    run_also(run, red, options=ScoreOptions(decode_workers=0, limit=8))
    assert status(run)["extra"]["red"]["parts"] == 2
    for rank in range(3):
        run_also(run, red, options=ScoreOptions(decode_workers=0, rank=rank, world=3))
    assert status(run)["extra"]["red"]["parts"] == 10


def test_two_scorers_of_one_name_at_once_are_not_mixed(tmp_path, red):
    """Both find nothing yet; the one that was overtaken stops before it writes."""
    data = crawl(tmp_path / "in", shards=1)
    run = scored(data, tmp_path / "run")
    body = f"import json, pathlib; p = pathlib.Path({run.where!r}, 'extra/mine/scorer.json'); "
    body += "p.write_text(json.dumps({**json.loads(p.read_text()), 'fingerprint': 'other'})); "
    body += "return {'a': [1.0] * len(texts)}"
    with pytest.raises(WrongScorer, match="extra/mine is now another scorer's"):
        run_also(run, own(tmp_path, body))
    assert not list(Path(run.where, "extra").rglob("*.parquet"))


def test_a_run_in_an_object_store(tmp_path, red):
    data = crawl(tmp_path / "in", shards=1)
    here, there = scored(data, tmp_path / "run"), planned(data, "memory://extra-scores/run")
    for run in (here, there):
        run_also(run, red, "embedding")
    for name, content in extra_files(here).items():
        assert there.storage.read(f"extra/{name}") == content
    assert verify(there.where).status() == 0


def test_drafts_do_not_depend_on_other_scorers(tmp_path):
    """With --draft a large JPEG is decoded small for the models; another scorer's size changes nothing about that."""
    members = [(f"{i}.jpg", jpeg(i, (640, 480))) for i in range(4)]
    data = write_tar(tmp_path / "in" / "a.tar", members)
    plain = scored(data, tmp_path / "plain", draft=True)
    body = "return {'a': [float(image.mean()) for image in images]}"
    spec = own(tmp_path, body, side="200")
    together = planned(data, tmp_path / "together", draft=True)
    run_also(together, spec)
    check_complete(together.where, plain)
    run_also(plain, spec)
    assert extra_files(plain) == extra_files(together)
    (part,) = plain.plan
    values = pq.read_table(plain.storage.path(f"extra/mine/{part.pid}.parquet"))["a"].to_pylist()
    whole = [Image.open(io.BytesIO(image)).resize((200, 200), Image.Resampling.BICUBIC) for _, image in members]
    assert values == pytest.approx([np.asarray(image).mean() for image in whole], abs=1e-3)


# The scorers ----------------------------------------------------------------------------------------------------------


def test_language_of_captions():
    pytest.importorskip("py3langid")
    language = load_scorer("language", None)
    rows = [
        RowTexts(["ein roter Hund läuft über die Wiese", "12345 !", ""], ["a red dog is running on the grass"]),
        RowTexts([], []),
        RowTexts(
            ["un chien rouge court dans l'herbe", "一只红色的狗在草地上"],
            ["Большая чёрная собака бежит по зелёной траве"],
        ),
    ]
    first = check_scores(language, language.score([], rows), rows)
    assert [row["web"] for row in first] == [["de", None, None], [], ["fr", "zh"]]
    assert [row["syn"] for row in first] == [["en"], [], ["ru"]]
    assert all(0.5 < p <= 1 for row in first for p in [*row["web_probability"], *row["syn_probability"]] if p)
    assert first[0]["web_probability"][1:] == [None, None]
    alone = [check_scores(language, language.score([], [row]), [row])[0] for row in rows]
    assert alone == first == check_scores(load_scorer("language", None), language.score([], rows), rows)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(ValueError, match=r"--also language needs a package: run `pip install 'py3langid>=0\.4'`"):
        load_scorer("language", None)


@pytest.fixture
def clip(tmp_path):
    """A folder as transformers saves it: a tiny image tower of CLIP with random weights, and layers on top."""
    import torch
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**shape, image_size=32, patch_size=8, projection_dim=16))

    def save(head, architecture="AestheticsPredictorV1", **changes):
        folder = tmp_path / "aesthetic"
        folder.mkdir(exist_ok=True)
        weights = {name: weight.contiguous() for name, weight in tower.state_dict().items()} | head
        save_file({k: v for k, v in (weights | changes).items() if v is not None}, folder / "model.safetensors")
        config = {**tower.config.to_dict(), "architectures": [architecture]}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return tower.eval(), save


def test_aesthetic_score_is_clips_embedding_times_a_layer(clip):
    import torch

    tower, save = clip
    layer = torch.nn.Linear(16, 1)
    several = torch.nn.Sequential(
        torch.nn.Linear(16, 8), torch.nn.Dropout(), torch.nn.Linear(8, 4), torch.nn.Linear(4, 1)
    )
    dice = np.random.default_rng(0)
    images = [dice.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(3)]
    mean, std = (np.array(v) for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    with torch.no_grad():
        pixels = torch.tensor(np.stack([(image / 255 - mean) / std for image in images]).transpose(0, 3, 1, 2))
        embedded = tower(pixels.float()).image_embeds
        embedded = embedded / embedded.norm(dim=1, keepdim=True)
        wanted = layer(embedded)[:, 0].tolist(), several.eval()(embedded)[:, 0].tolist()
    heads = (
        {f"predictor.{name}": value.detach() for name, value in layer.state_dict().items()},
        {f"layers.{name}": value.detach() for name, value in several.state_dict().items()},
    )
    identities = []
    for head, scores in zip(heads, wanted, strict=True):
        folder = save(head, **{"vision_model.embeddings.position_ids": torch.arange(17)[None]})
        scorer = load_scorer(f"aesthetic={folder}", "cpu")
        assert scorer.side == 32
        rows = [RowTexts([], [])] * 3
        values = [row["score"] for row in check_scores(scorer, scorer.score(images, rows), rows)]
        assert values == pytest.approx(scores, abs=1e-5)
        identities.append(scorer.identity["files"]["model.safetensors"])
        assert identities[-1] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert len(set(identities)) == 2


def test_wrong_aesthetic_models_are_refused(clip, capsys):
    import torch

    _, save = clip
    layer = {"predictor.weight": torch.ones(1, 16), "predictor.bias": torch.zeros(1)}
    for head, changes, message in (
        ({}, {}, "expected linear layers"),
        (
            {"predictor.weight": torch.ones(1, 9), "predictor.bias": torch.zeros(1)},
            {},
            "do not fit: predictor.weight is",
        ),
        ({"predictor.weight": torch.ones(2, 16), "predictor.bias": torch.zeros(2)}, {}, "that end in one score"),
        ({"predictor.weight": torch.ones(1, 16)}, {}, "do not fit: 'predictor.bias'"),
        (layer, {"visual_projection.weight": None}, "Missing key"),
        (layer, {"text.weight": torch.ones(1)}, "Unexpected key"),
        (layer, {"architecture": "AestheticsPredictorV2ReLU"}, "with linear layers on top, got clip_vision_model"),
    ):
        with pytest.raises(DataError, match=message):
            load_scorer(f"aesthetic={save(head, **changes)}", "cpu")
    folder = save(layer)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")  # a pickle is never read
    with pytest.raises(FileNotFoundError, match=r"it has no model\.safetensors"):
        load_scorer(f"aesthetic={folder}", "cpu")


def test_a_model_that_is_not_there_is_said_within_seconds(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    start = time.monotonic()
    with pytest.raises(
        FileNotFoundError, match=r"not in the local cache .* run `hf download some/model --revision v1`"
    ):
        load_scorer("aesthetic=some/model@v1", "cpu")
    assert time.monotonic() - start < 20
    assert "some" not in os.listdir(tmp_path)


def test_embeddings_are_the_filters(tmp_path):
    """In one pass or two, as the model embeds the image by itself."""
    import torch
    from test_capfilt_models import photos, tiny

    from blip.data.transforms import EvalTransform
    from capfilt.score.models import BlipScorer
    from capfilt.settings import ScoreConfig

    captioner, filter = tiny(0, 48), tiny(1)
    config = ScoreConfig(filter="x", max_words=12)
    members = []
    for i, photo in enumerate(photos(5)):
        file = io.BytesIO()
        photo.save(file, "PNG")
        members += [(f"{i}.png", file.getvalue()), (f"{i}.txt", b"a red star")]
    data = write_tar(tmp_path / "in" / "a.tar", members)

    def maker(run):
        return BlipScorer(captioner, filter, config)

    together, later = planned(data, tmp_path / "a"), scored(data, tmp_path / "b", maker=maker)
    run_also(together, "embedding", maker=maker)
    run_also(later, "embedding", maker=maker)
    with torch.no_grad():
        model = filter[0]
        wanted = [model.embed_image(model.vision(EvalTransform(32)(photo)[None]))[0].numpy() for photo in photos(5)]
    for run in (together, later):
        (part,) = run.plan
        vectors = np.load(run.storage.path(f"extra/embedding/{part.pid}.npy")).astype(np.float32)
        np.testing.assert_allclose(vectors, np.stack(wanted), atol=1e-3)
    assert annotations(Run.open(together.where)).equals(annotations(later))
