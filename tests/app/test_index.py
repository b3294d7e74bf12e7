"""The index of a folder: what is looked at again and what is not, and what a stopped or damaged one says."""

import json
import os

import pytest
import torch
from test_cli import model as model_folder  # noqa: F401
from test_cli import png

import blip
from blip import files
from blip.app import index as index_module
from blip.app.index import Entry, Index, IndexOrigin
from blip.errors import DataError


@pytest.fixture(scope="module")
def features(model_folder):  # noqa: F811
    return blip.load(model_folder, batch=2)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deep").mkdir()
    for i, name in enumerate(("a.png", "b.png", "deep/c.png")):
        (tmp_path / name).write_bytes(png(i))
    (tmp_path / "broken.png").write_bytes(b"<html>")
    return tmp_path


@pytest.fixture
def update(folder, features, monkeypatch):
    """Bring the index up to date; returns it and how many images the model saw."""

    def update(names=("a.png", "b.png", "broken.png", "deep/c.png"), **options):
        seen = []
        embed = features.embed_image
        with monkeypatch.context() as patch:
            patch.setitem(features.__dict__, "embed_image", lambda images: (seen.append(len(images)), embed(images))[1])
            index = Index.read(folder, folder / "ix") or Index(
                folder, folder / "ix", IndexOrigin.of(features, "m", "float32")
            )
            paths = [str(folder / name) for name in names]
            return index.updated(paths, index.stale(paths), features, **options), sum(seen)

    return update


def test_embeddings_are_those_of_each_image(update, folder, features):
    index, seen = update()
    assert seen == 3
    assert [entry.path for entry in index.readable] == ["a.png", "b.png", "deep/c.png"]
    assert [entry.reason for entry in index.entries if entry.reason] == [
        "is an HTML page, not an image: the download failed"
    ]
    torch.testing.assert_close(index.embeddings, features.embed_image([folder / e.path for e in index.readable]))
    again = Index.read(folder, folder / "ix")
    assert again.entries == index.entries
    assert torch.equal(again.embeddings, index.embeddings)
    values, rows = again.nearest(index.embeddings[1:2], 10)
    assert rows[0, 0] == 1
    assert values.shape == (1, 3)
    assert again.paths([2]) == [folder / "deep/c.png"]


@pytest.mark.parametrize("count", range(1, 13))
def test_the_same_images_are_found_in_their_order(count, tmp_path):
    """Also where the last bit of their cosines differs, and as many are left out as do not fit."""
    draw = torch.Generator().manual_seed(count)
    one, other = torch.nn.functional.normalize(torch.randn(2, 48, generator=draw), dim=1)
    rows = [other, one, other, *[one] * 9]
    entries = [Entry(f"{i}.png", 1, 1, "") for i in range(12)]
    index = Index(tmp_path, tmp_path, IndexOrigin("m", "w", "float32"), entries, torch.stack(rows))
    expected = [1, *range(3, 12), 0, 2][:count]
    for queries in (one[None], torch.stack([one, other])):
        assert index.nearest(queries, count)[1][0].tolist() == expected
    assert index.nearest(queries[:0], count)[1].shape == (0, count)


def test_only_what_changed_is_looked_at_again(update, folder):
    before, _ = update()
    assert update()[1] == 0
    # Touched, with the same bytes: read, and not embedded again.
    os.utime(folder / "a.png", ns=(1, 1))
    index, seen = update()
    assert seen == 0
    assert index.entries[0].mtime_ns == 1
    assert torch.equal(index.embeddings, before.embeddings)
    # Other bytes of the same size at another time, and a new file.
    (folder / "b.png").write_bytes(png(7))
    os.utime(folder / "b.png", ns=(2, 2))
    (folder / "d.png").write_bytes(png(8))
    names = ("a.png", "b.png", "broken.png", "d.png", "deep/c.png")
    index, seen = update(names)
    assert seen == 2
    assert torch.equal(index.embeddings[[0, 3]], before.embeddings[[0, 2]])
    assert not torch.equal(index.embeddings[1], before.embeddings[1])
    # A file under a new name, one that is gone, and one that can be read now.
    (folder / "deep/c.png").rename(folder / "e.png")
    (folder / "broken.png").write_bytes(png(9))
    index, seen = update(("a.png", "broken.png", "e.png"))
    assert seen == 1
    assert [entry.path for entry in index.readable] == ["a.png", "broken.png", "e.png"]
    assert torch.equal(index.embeddings[2], before.embeddings[2])
    assert len(list((folder / "ix").iterdir())) == 2, "old embeddings stay behind"


def test_an_unchanged_index_is_not_written(update, folder):
    update()
    written = (folder / "ix/index.json").stat().st_mtime_ns
    update()
    assert (folder / "ix/index.json").stat().st_mtime_ns == written


def test_a_stopped_build_goes_on(update, folder):
    def stop(images):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        update(on_batch=stop)
    kept = Index.read(folder, folder / "ix")
    assert 0 < len(kept.readable) < 3
    index, seen = update()
    assert seen == 3 - len(kept.readable)
    assert len(index.readable) == 3


@pytest.mark.parametrize("event", ["tensors", "list"])
def test_a_failed_write_leaves_the_old_index(update, folder, monkeypatch, event):
    before, _ = update()
    (folder / "d.png").write_bytes(png(8))

    def full(path, *_):
        raise OSError(28, "No space left on device")

    owner, name = {"tensors": (index_module, "write_tensors"), "list": (files, "write_bytes")}[event]
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(files.WriteError, match="No space left"):
        update(("a.png", "d.png"))
    monkeypatch.undo()
    now = Index.read(folder, folder / "ix")
    assert now.entries == before.entries
    assert torch.equal(now.embeddings, before.embeddings)
    assert not list((folder / "ix").glob(".tmp-*"))


def test_the_model_is_known_by_its_image_encoder(features, model_folder):  # noqa: F811
    mine = IndexOrigin.of(features, "one name", "float32")
    other = blip.load(model_folder)
    assert mine.same(IndexOrigin.of(other, "another name", "float32"))
    assert not mine.same(IndexOrigin.of(other, "one name", "bfloat16"))
    with torch.no_grad():
        other.model.text_proj.weight.add_(1)
    assert mine.same(IndexOrigin.of(other, "m", "float32")), "texts are not in the index"
    with torch.no_grad():
        other.model.image_proj.bias[3] += 1e-3
    assert not mine.same(IndexOrigin.of(other, "m", "float32"))
    assert not mine.same(IndexOrigin.of(blip.load(model_folder, image_size=96), "m", "float32"))


def change(folder, **values):
    listing = json.loads((folder / "ix/index.json").read_text())
    (folder / "ix/index.json").write_text(json.dumps(listing | values))


DAMAGE = {
    "cut short": lambda f: (f / "ix/index.json").write_text('{"format": "openblip-index", '),
    "a list": lambda f: (f / "ix/index.json").write_text("[]"),
    "another format": lambda f: change(f, format="faiss"),
    "another version": lambda f: change(f, version=9),
    "no embeddings": lambda f: [p.unlink() for p in (f / "ix").glob("*.safetensors")],
    "other embeddings": lambda f: [p.write_bytes(b"x" * 100) for p in (f / "ix").glob("*.safetensors")],
    "rows that do not fit": lambda f: change(f, files=[]),
    "odd rows": lambda f: change(f, files=[["a.png"]]),
    "a way out": lambda f: change(f, embeddings="../../secret.safetensors"),
    "no name": lambda f: change(f, embeddings=None),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_index_is_one_line(update, folder, name):
    update()
    DAMAGE[name](folder)
    with pytest.raises(DataError, match=r"ix.* (is damaged|cannot be read) .*--rebuild") as error:
        Index.read(folder, folder / "ix")
    assert "\n" not in str(error.value)
