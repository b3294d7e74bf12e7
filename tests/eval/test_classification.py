"""Classification: scores by hand, folders that will not do, the world's classes, and the command in two processes."""

import json

import pytest
import torch
from stub_run import the_zygote
from test_cli import model, png  # noqa: F401
from test_eval_command import refused

import blip
from blip import dist
from blip.errors import DataError
from blip.inference.zero_shot import class_embeddings, probabilities, texts_of
from blip.world.classes import CLASSES, TEMPLATES, single, write
from blip.world.scene import HELD_OUT, SHAPES, scene_of
from eval.__main__ import main
from eval.classification import ClassFolder, accuracy, classify, read_names


def test_accuracy_by_hand():
    chances = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5], [0.4, 0.4, 0.2], [0.1, 0.2, 0.7]])
    scores = accuracy(chances, [0, 1, 0, 2])
    # Rows 0 and 3 are right; in row 2 the right class ties with another, which counts against it.
    assert scores == {"top@1": 50.0, "top@5": 100.0, "mean_class": pytest.approx(100 * (0.5 + 0 + 1) / 3)}
    six = torch.eye(6)[[5, 4]] * 0.1 + torch.arange(6) * 0.01
    assert accuracy(six, [0, 5])["top@5"] == 50.0


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(("red_circle", "red_circle", "moon", "star", "star/deep")):
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name / f"{i}.png").write_bytes(png(i))
    return tmp_path / "data"


def test_folders_are_classes(folder, tmp_path):
    data = ClassFolder.open(folder)
    assert data.names == ["moon", "red circle", "star"]
    assert [path.split("data/")[1] for path in data.paths] == [
        "moon/2.png", "red_circle/0.png", "red_circle/1.png", "star/3.png", "star/deep/4.png",
    ]  # fmt: skip
    assert data.labels == [0, 1, 1, 2, 2]
    names = {"moon": "crescent", "red_circle": "disc", "star": "star", "more": "x"}
    assert ClassFolder.open(folder, names).names == ["crescent", "disc", "star"]
    with pytest.raises(DataError, match="moon is not among the names"):
        ClassFolder.open(folder, {"star": "star", "red_circle": "c"})
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="no images in"):
        ClassFolder.open(folder)
    with pytest.raises(DataError, match="no folders"):
        ClassFolder.open(folder / "moon")


def classified(model: str, data: str, out: str) -> None:  # noqa: F811
    """What each of two processes does."""
    dist.start(60)
    for batch in (1, 2, 9):
        chances = classify(blip.load(model, batch=batch), ClassFolder.open(data))
        with open(f"{out}-{batch}-{dist.rank()}", "w") as file:
            json.dump(chances.tolist(), file)


def test_two_processes_classify_as_one_does(folder, model, tmp_path):  # noqa: F811
    arguments = {"model": model, "data": str(folder)}
    zygote = the_zygote()
    pids = zygote.spawn(
        tmp_path / "log",
        world=2,
        module="test_classification",
        function="classified",
        out=str(tmp_path / "2"),
        **arguments,
    )
    assert [zygote.wait(pid, 240) for pid in pids] == [0, 0], (tmp_path / "log-0").read_text()
    classified(**arguments, out=str(tmp_path / "1"))
    features = blip.load(model)
    data = ClassFolder.open(folder)
    each = torch.cat([features.embed_image([path]) for path in data.paths])
    expected = probabilities(each, class_embeddings(features.embed_text, data.names), features.model.temperature)
    for batch in (1, 2, 9):
        alone = (tmp_path / f"1-{batch}-0").read_text()
        assert alone == (tmp_path / f"2-{batch}-0").read_text() == (tmp_path / f"2-{batch}-1").read_text()
        torch.testing.assert_close(torch.tensor(json.loads(alone)), expected)


def test_command(folder, model, tmp_path, capsys):  # noqa: F811
    args = ["classification", "--model", model, "--source", str(folder), "--device", "cpu"]
    (tmp_path / "t.txt").write_text("a {}\n\nthe {}\n", encoding="utf-8-sig")  # as some editors save it
    (folder / "moon/notes.md").write_text("no image")
    main([*args, "--out", str(tmp_path / "out"), "--templates", str(tmp_path / "t.txt")])
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert (scores["pictures"], scores["classes"], scores["templates"]) == (5, 3, ["a {}", "the {}"])
    rows = json.loads((tmp_path / "out/results.json").read_text())
    assert scores["top@1"] == pytest.approx(20 * sum(row["found"][0] == row["class"] for row in rows))
    assert scores["top@5"] == 100
    output = capsys.readouterr()
    assert "top@1" in output.out
    assert "left out 1 files that are not named like images (.md)" in output.err
    (folder / "moon/9.png").write_bytes(b"<html>")
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    assert "moon/9.png cannot be evaluated: is an HTML page" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "n.json").write_text('{"moon": "crescent"}', encoding="utf-8-sig")
    assert read_names(tmp_path / "n.json") == {"moon": "crescent"}
    for text, message in (("[]", "expected {"), ("{", "is not JSON"), ('{"moon": 3}', "expected {")):
        (tmp_path / "n.json").write_text(text)
        assert message in refused(capsys, [*args, "--names", str(tmp_path / "n.json")])
    assert "t2.txt cannot be read" in refused(capsys, [*args, "--templates", str(tmp_path / "t2.txt")])


def test_classes_of_the_world(tmp_path):
    folders = write(tmp_path / "shapes", by="shape", count=24)
    assert [path.name for path in folders] == list(SHAPES)
    images = [path for folder in folders for path in folder.iterdir()]
    assert len(images) == 24
    for path in images:
        (thing,) = scene_of(path.stem).things
        assert thing.shape == path.parent.name
        assert (thing.colour, thing.shape) not in HELD_OUT
    again = write(tmp_path / "again", by="shape", count=24)
    for path in images:
        assert (again[0].parent / path.relative_to(tmp_path / "shapes")).read_bytes() == path.read_bytes()
    write(tmp_path / "colours", by="colour", count=9, split="composition")
    assert all((made.things[0].colour, made.things[0].shape) in HELD_OUT for made in single(0, "composition", 9)), (
        "composition shows held-out pairs"
    )
    for by, templates in TEMPLATES.items():
        assert (tmp_path / f"{by}s/templates.txt").read_text().splitlines() == list(templates)
        assert all(texts_of(name, templates) for name in CLASSES[by])
    with pytest.raises(FileExistsError, match="shapes already exists"):
        write(tmp_path / "shapes")
    with pytest.raises(ValueError, match="1 or more"):
        write(tmp_path / "none", count=0)
    assert not list(tmp_path.glob(".writing*"))
