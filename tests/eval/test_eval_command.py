"""`blip-eval`: its help, what it refuses and how, and the files it leaves."""

import dataclasses
import json
import subprocess
import sys

import pytest
from test_captioning_eval import captioner, draw
from test_ptb import needs_java, no_java

from blip.checkpoints import checkpoint
from blip.errors import DataError
from blip.inference.settings import DECODE_PRESETS
from eval.__main__ import COMMANDS, main, read
from eval.options import CaptioningOptions
from eval.references import read_results
from eval.runner import ResultsFolder


def alone(program: str) -> str:
    """What a program prints in a process of its own."""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def test_help_is_quick_and_complete(capsys):
    program = "from eval.__main__ import main; main(['--help'])"
    stdout = alone(f"{program}; import sys; print(sorted({{'torch', 'yaml'}} & set(sys.modules)))")
    assert stdout.splitlines()[-1] == "[]", "a slow import"
    for name in COMMANDS:
        assert f"blip-eval {name} --" in stdout
    for name, wanted in (("captioning", ("--results", "--decode.top-p", "--allow-partial")), ("retrieval", ("--k",))):
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        stdout = capsys.readouterr().out
        assert f"usage: blip-eval {name}" in stdout
        assert all(option in stdout for option in wanted)


def test_options_need_no_torch():
    program = "from eval.__main__ import read; read('captioning', ['--results', 'a', '--references', 'b'])"
    assert alone(f"{program}; import sys; print('torch' in sys.modules)") == "False\n"


def refused(capsys, args: list[str]) -> str:
    """What is said of a command line that does not fit."""
    with pytest.raises(SystemExit) as stop:
        main(args)
    output = capsys.readouterr()
    assert stop.value.code == 2
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    return output.err


SCORE = ["--results", "r.json", "--references", "g.json"]
WRONG = {
    "nothing": ([], "captioning, retrieval"),
    "no such command": (["caption"], "'caption'"),
    "neither": (["captioning"], "--results FILE"),
    "both": (["captioning", *SCORE, "--model", "m"], "either"),
    "no references": (["captioning", "--results", "r.json"], "--references FILE"),
    "no images": (["captioning", "--model", "m", "--out", "o"], "--source.path FILE"),
    "no out": (["captioning", "--model", "m", "--source.path", "s"], "--out DIR"),
    "no path": (["captioning", "--model", "m", "--out", "o", "--source.split", "test"], "--source.path is required"),
    "typo": (["captioning", "--modle", "m"], "did you mean --model?"),
    "typo inside": (["captioning", *SCORE, "--decode.beam", "3"], "did you mean --decode.beams?"),
    "preset": (["captioning", *SCORE, "--preset", "best"], "best"),
    "number": (["captioning", *SCORE, "--batch", "many"], "many"),
    "rule": (["captioning", *SCORE, "--batch", "0"], "batch must be more than 0, got 0"),
    "rule of decoding": (["captioning", *SCORE, "--decode.beams", "0"], "beams must be 1 or more"),
    "java_timeout": (["captioning", *SCORE, "--java_timeout", "0"], "java_timeout"),
    "no file": (["captioning", *SCORE], "g.json cannot be read: No such file"),
    "no model": (["retrieval", "--source.path", "x.json"], "model"),
    "not a model": (["retrieval", "--model", "./x", "--source.path", "x.json"], "./x is not a model directory"),
    "stray": (["captioning", *SCORE, "stray"], "stray"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_one_line_and_status_2(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    args, words = WRONG[name]
    assert words in refused(capsys, args)
    assert list(tmp_path.iterdir()) == []


def test_a_preset_and_what_changes_it(tmp_path):
    def decode(*args):
        return read("captioning", [*SCORE, *args]).decode

    assert decode() == DECODE_PRESETS["caption_2022"] == CaptioningOptions(results="r", references="g").decode
    for name, preset in DECODE_PRESETS.items():
        assert decode("--preset", name) == decode(f"--preset={name}") == preset
    changed = decode("--decode.top_k", "7", "--preset", "capfilt_2022")
    assert (changed.method, changed.top_k, changed.repetition_penalty) == ("nucleus", 7, 1.1)
    assert decode("--decode.length_rule", "generated").length_rule == "generated"
    for quoted in ("2022", "'2022'"):
        (tmp_path / "c.yaml").write_text(f"decode:\n  length_rule: {quoted}\n")
        given = decode("--preset", "greedy", "--config", str(tmp_path / "c.yaml"))
        assert given == decode("--preset", "greedy", "--decode.length_rule", "2022")
        assert given.length_rule == "2022"
    (tmp_path / "c.yaml").write_text("preset: capfilt_2022\ndecode: {top_k: 7}\n")
    given = decode("--decode.seed", "3", "--config", str(tmp_path / "c.yaml"))
    assert given == dataclasses.replace(DECODE_PRESETS["capfilt_2022"], top_k=7, seed=3)


CAPTIONS = {7: ["A dog runs on the beach.", "a dog by the sea"], 8: ["A red bird.", "the bird is red"], 9: ["two cats"]}
RESULTS = {7: "a dog runs on the beach", 8: "a blue bird", 9: "two cats sleep"}


def files(folder, results=RESULTS, domains=None) -> list[str]:
    """COCO's two files, and the options that name them."""
    images = [{"id": i, "file_name": f"{i}.jpg", **({"domain": domains[i]} if domains else {})} for i in CAPTIONS]
    notes = [
        {"id": n, "image_id": i, "caption": c}
        for n, (i, c) in enumerate((i, c) for i, cs in CAPTIONS.items() for c in cs)
    ]
    (folder / "g.json").write_text(json.dumps({"images": images, "annotations": notes}))
    (folder / "r.json").write_text(json.dumps([{"image_id": i, "caption": c} for i, c in results.items()]))
    return ["captioning", "--results", str(folder / "r.json"), "--references", str(folder / "g.json")]


def test_a_results_file_is_scored(tmp_path, capsys, monkeypatch):
    no_java(tmp_path, monkeypatch)
    out = tmp_path / "scores" / "deep"
    main([*files(tmp_path), "--out", str(out), "--resamples", "50"])
    stdout = capsys.readouterr().out
    assert "3 images, 5 reference captions; words by eval.ptb (Python)" in stdout
    assert "meteor not computed: there is no java on PATH" in stdout
    assert sorted(p.name for p in out.iterdir()) == ["captions.html", "results.json", "scores.json"]
    assert read_results(out / "results.json") == RESULTS
    scores = json.loads((out / "scores.json").read_text())
    for name in ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider", "rouge_l"):
        assert scores[f"{name}_low"] <= scores[name] <= scores[f"{name}_high"]
        assert f"{name} " in stdout
    assert (scores["images"], scores["references"], scores["missing"], scores["resamples"]) == (3, 5, 0, 50)
    assert scores["tokenizer"] == "eval.ptb (Python)"
    assert set(scores["not_computed"]) == {"java_tokenizer", "meteor", "spice"}
    assert scores["results_file"] == str(tmp_path / "r.json")
    assert scores["references_file"] == str(tmp_path / "g.json")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    main([*files(tmp_path), "--out", str(out), "--resamples", "50"])
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_without_out_nothing_is_written(tmp_path, capsys, monkeypatch):
    no_java(tmp_path, monkeypatch)
    args, before = files(tmp_path), sorted(tmp_path.iterdir())
    main([*args, "--resamples", "0", "--meteor", "false", "--spice", "false"])
    stdout = capsys.readouterr().out
    assert "95%" not in stdout
    assert "meteor" not in stdout
    assert sorted(tmp_path.iterdir()) == before


def test_a_partial_set_needs_to_be_allowed(tmp_path, capsys, monkeypatch):
    no_java(tmp_path, monkeypatch)
    args = files(tmp_path, {8: "a blue bird"})
    assert "no results for 2 images (7, 9) of 3" in refused(capsys, args)
    main([*args, "--allow_partial", "true", "--out", str(tmp_path / "out")])
    assert "left out for want of a result: 2 images" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["missing"] == 2
    assert "results for 1 image (5) without references" in refused(capsys, files(tmp_path, {**RESULTS, 5: "x"}))


def test_java_that_is_asked_for_and_absent_is_an_error(tmp_path, capsys, monkeypatch):
    no_java(tmp_path, monkeypatch)
    assert "tokenizer java: there is no java on PATH" in refused(capsys, [*files(tmp_path), "--tokenizer", "java"])


@needs_java
def test_the_java_tokenizer_is_taken_when_it_answers(tmp_path):
    main([*files(tmp_path), "--out", str(tmp_path / "out"), "--meteor", "false", "--spice", "false"])
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["tokenizer"] == "Stanford PTBTokenizer 3.4.1 (Java)"
    assert scores["not_computed"] == {}


def test_nocaps_is_scored_by_domain(tmp_path, capsys, monkeypatch):
    no_java(tmp_path, monkeypatch)
    args = files(tmp_path, domains={7: "in-domain", 8: "near-domain", 9: "near-domain"})
    main([*args, "--out", str(tmp_path / "out")])
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["groups"] == {"in": 1, "near": 2}
    assert {"in_cider", "near_cider", "near_cider_low", "cider"} <= scores.keys()
    assert "near_cider" in capsys.readouterr().out


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    checkpoint.save_pretrained(*captioner(), folder)
    return str(folder)


QUICK = ["--tokenizer", "python", "--meteor", "false", "--spice", "false"]
SHORT = [*QUICK, "--prompt", "", "--decode.max_length", "8", "--decode.min_length", "2", "--device", "cpu"]


def test_a_model_writes_and_is_scored(tmp_path, model, capsys):
    source = draw(tmp_path / "pictures")
    args = ["captioning", "--model", model, "--source.path", source.path, "--out", str(tmp_path / "out"), *SHORT]
    main(args)
    written = read_results(tmp_path / "out" / "results.json")
    assert list(written) == list(range(100, 107))
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (scores["images"], scores["references"]) == (7, 14)
    assert (scores["model"], scores["prompt"], scores["decode"]["max_length"]) == (model, "", 8)
    assert scores["decode"]["beams"] == 3
    page = (tmp_path / "out" / "captions.html").read_text()
    assert page.count("<img ") == 7
    # What was written can be scored again, with the images or with references from elsewhere.
    again = [
        "captioning",
        "--results",
        str(tmp_path / "out" / "results.json"),
        "--tokenizer",
        "python",
        "--meteor",
        "false",
    ]
    main([*again, "--source.path", source.path, "--out", str(tmp_path / "again")])
    rescored = json.loads((tmp_path / "again" / "scores.json").read_text())
    assert {n: v for n, v in scores.items() if isinstance(v, float)} == {
        n: v for n, v in rescored.items() if isinstance(v, float)
    }
    main([*args, "--limit", "2", "--references", source.path, "--allow_partial", "true"])
    assert len(read_results(tmp_path / "out" / "results.json")) == 2
    assert "left out for want of a result: 5" in capsys.readouterr().out


def test_images_without_references_are_captioned_only(tmp_path, model, capsys):
    draw(tmp_path, 3)
    images = [{"id": i, "file_name": f"{i}.png", "domain": "in-domain"} for i in range(3)]
    (tmp_path / "test.json").write_text(json.dumps({"images": images}))
    out = tmp_path / "out"
    main(["captioning", "--model", model, "--source.path", str(tmp_path / "test.json"), "--out", str(out), *SHORT])
    assert [p.name for p in out.iterdir()] == ["results.json"]
    assert list(read_results(out / "results.json")) == [0, 1, 2]
    assert "without references there is nothing to score" in capsys.readouterr().out


def test_a_image_that_is_not_there_stops_it_before_anything_is_written(tmp_path, model, capsys):
    source = draw(tmp_path, 3, broken=(2,))
    args = ["captioning", "--model", model, "--source.path", source.path, "--out", str(tmp_path / "out"), *SHORT]
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    assert "error: source" in (stderr := capsys.readouterr().err)
    assert "image 102 (2.png) cannot be evaluated: is an HTML page" in stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_retrieval(tmp_path, model, capsys):
    source = draw(tmp_path / "pictures")
    main(
        ["retrieval", "--model", model, "--source.path", source.path, "--device", "cpu", "--out", str(tmp_path / "out")]
    )
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (scores["images"], scores["texts"], scores["k"]) == (7, 14, 128)
    assert {"tr@1", "ir@10", "mean_recall", "tr@1_itc"} <= scores.keys()
    assert "mean_recall" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["image_id"] for row in written["texts_of_image"]] == list(range(100, 107))
    assert [row["image_id"] for row in written["images_of_text"]] == [100 + i // 2 for i in range(14)]
    first = written["images_of_text"][3]
    assert (first["text"], sorted(first["images"])) == ("a red square", list(range(100, 107)))
    assert first["scores"] == sorted(first["scores"], reverse=True)
    assert all(len(row["texts"]) == 10 for row in written["texts_of_image"])


def test_results_that_no_evaluation_wrote_are_not_written_over(tmp_path):
    mine = tmp_path / "results.json"
    mine.write_text("[]")
    with pytest.raises(DataError, match=r"results\.json would be overwritten"):
        ResultsFolder(tmp_path)
    assert mine.read_text() == "[]"
    (tmp_path / "scores.json").write_text("{}")  # an older evaluation, which the new one replaces
    ResultsFolder(tmp_path).write("results.json", "[1]")
    assert mine.read_text() == "[1]"
