"""`blip embed`: files in clip-retrieval's layout, read as its readers do."""

import json
import os
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_cli import model, photos, png  # noqa: F401
from test_recipes import the_recipe_zygote
from test_search import run  # noqa: F401

import blip
from blip.data import embeddings

TEXTS = {i: f"a red circle and {i} stars" for i in range(1, 12)}


def clip_retrieval(folder):
    """The rows of all files as embedding_reader and clip_back take them: each folder's files by name, row by row."""
    folders = {"img_emb": ".npy", "text_emb": ".npy", "metadata": ".parquet"}
    files = {
        name: sorted(path for path in (folder / name).glob("*") if path.suffix == suffix)
        for name, suffix in folders.items()
        if (folder / name).exists()
    }
    numbers = {name: [path.stem.rpartition("_")[2] for path in paths] for name, paths in files.items()}
    assert len({tuple(of) for of in numbers.values()}) == 1, numbers
    assert len({len(number) for number in numbers["metadata"]}) == 1
    read = {
        name: [np.load(p) if p.suffix == ".npy" else pq.read_table(p) for p in paths] for name, paths in files.items()
    }
    for parts in zip(*read.values(), strict=True):
        assert len({len(part) for part in parts}) == 1
    vectors = [np.concatenate(read[name]) if name in read else None for name in ("img_emb", "text_emb")]
    return *vectors, [row for table in read["metadata"] for row in table.to_pylist()]


@pytest.fixture
def texts(photos):  # noqa: F811
    lines = [json.dumps({"file_name": f"p{i}.png", "text": text}) for i, text in TEXTS.items()]
    (photos / "metadata.jsonl").write_text("\n".join(lines))
    return photos / "metadata.jsonl"


def test_embeddings_are_those_of_the_library(run, photos, model, texts, tmp_path):  # noqa: F811
    status, out, _ = run("embed", "photos", "--to", "out", "--texts", texts, "--shard", 3, "--batch", 2)
    assert (status, out) == (0, "out: 11 embeddings in 4 files\n")
    images, words, rows = clip_retrieval(tmp_path / "out")
    paths = [f"photos/p{i}.png" for i in range(1, 12)]
    assert [row["image_path"] for row in rows] == paths
    assert [row["caption"] for row in rows] == list(TEXTS.values())
    features = blip.load(model)
    for stored, computed in ((images, features.embed_image(paths)), (words, features.embed_text(list(TEXTS.values())))):
        assert stored.dtype == np.float16
        np.testing.assert_allclose(stored.astype(np.float32), computed.cpu().numpy(), atol=2e-3)
        np.testing.assert_allclose(np.linalg.norm(stored.astype(np.float32), axis=1), 1, atol=2e-3)
    assert not list((tmp_path / "out").rglob(".tmp*"))


def test_one_file_is_called_0_and_many_are_padded(run, photos, tmp_path):  # noqa: F811
    assert run("embed", "photos", "--to", "one")[0] == 0
    names = sorted(str(path.relative_to(tmp_path / "one")) for path in (tmp_path / "one").rglob("*_*.*"))
    assert names == ["img_emb/img_emb_0.npy", "metadata/metadata_0.parquet"]
    assert embeddings.names(7, 11).image == "img_emb/img_emb_07.npy"
    assert embeddings.names(8, 9).text == "text_emb/text_emb_8.npy"
    images, words, rows = clip_retrieval(tmp_path / "one")
    assert (len(images), words, list(rows[0])) == (11, None, ["image_path", "sha256"])


def test_images_that_cannot_be_used_are_left_out_and_named(run, photos, texts, tmp_path):  # noqa: F811
    (photos / "p4.png").write_bytes(b"<html>")
    texts.write_text(
        "\n".join(line for line in texts.read_text().splitlines() if "p5." not in line).replace(TEXTS[6], "...")
    )
    (photos / "p12.png").write_bytes(png(12))
    status, out, err = run("embed", "photos", "--to", "out", "--texts", texts, "--shard", 4)
    assert (status, out) == (1, "out: 8 embeddings in 3 files\n")
    assert "photos/p4.png: is an HTML page" in err
    assert "photos/p5.png: has no text in --texts" in err
    assert "photos/p6.png: its text '...' cannot be used" in err
    assert "4 of 12 images could not be used" in err
    images, words, rows = clip_retrieval(tmp_path / "out")
    assert [row["image_path"] for row in rows] == [f"photos/p{i}.png" for i in (1, 2, 3, 7, 8, 9, 10, 11)]
    assert len(images) == len(words) == 8
    status, out, err = run("embed", "photos", "--to", "out", "--texts", texts, "--shard", 4)  # nothing is left to do
    assert (status, out) == (1, "out: 8 embeddings in 3 files\n")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def die_at_rename(folder: str, number: int, args: list[str]) -> None:
    """Run a command that is killed instead of its `number`th rename; called in a process of its own."""
    from blip.app import cli

    os.chdir(folder)
    replace, count = os.replace, iter(range(9))

    def fatal(*paths):
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    os.replace = fatal
    cli.main(args)


def test_a_killed_command_is_continued_with_the_same_bytes(run, photos, model, tmp_path):  # noqa: F811
    args = ["embed", "photos", "--to", "out", "--shard", "2"]
    assert run(*args[:-3], "whole", "--shard", 2)[0] == 0
    for number in (2, 5):
        statuses = the_recipe_zygote().run(
            tmp_path / "log", module="test_embed", function="die_at_rename", environment={"OPENBLIP_MODEL": str(model)},
            folder=str(tmp_path), number=number, args=args,
        )  # fmt: skip
        assert statuses == [-signal.SIGKILL]
    done = (tmp_path / "out/metadata/metadata_0.parquet").stat().st_mtime_ns
    assert run(*args)[0] == 0
    assert (tmp_path / "out/metadata/metadata_0.parquet").stat().st_mtime_ns == done
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_other_images_models_and_folders_are_refused(run, photos, texts, tmp_path):  # noqa: F811
    args = ["embed", "photos", "--to", "out"]
    assert run(*args)[0] == 0
    before = contents(tmp_path / "out")
    for more, what in (
        (["--shard", 3], "shard"),
        (["--precision", "bfloat16"], "precision"),
        (["--texts", texts], "texts"),
    ):
        status, _, err = run(*args, *more)
        assert (status, f"made with other {what}" in err) == (2, True), err
    (photos / "p3.png").write_bytes(png(99))
    assert "made with other images" in run(*args)[2]
    assert contents(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    assert run("embed", "photos", "--to", "mine")[0] == 2
    assert run("embed", "photos", "--to", texts)[0] == 2
    status, _, err = run("embed", "photos", "--to", "new", "--texts", "gone.json")
    assert (status, err) == (2, "error: --texts gone.json: no such file\n")
    texts.write_text('{"file_name": "else.png", "text": "a star"}\n')
    assert "has no text of any of the 11 images" in run("embed", "photos", "--to", "new", "--texts", texts)[2]
    assert not (tmp_path / "new").exists()


def test_names_that_are_no_text_are_stored(run, photos, tmp_path):  # noqa: F811
    (photos / os.fsdecode(b"\xff.png")).write_bytes(png(1))
    (photos / "sch\u00f6n [1].png").write_bytes(png(2))
    assert run("embed", "photos", "--to", "out")[0] == 0
    paths = [row["image_path"] for row in clip_retrieval(tmp_path / "out")[2]]
    assert {"photos/\\udcff.png", "photos/sch\u00f6n [1].png"} <= set(paths)
