"""`blip duplicates`: planted copies are found and near misses are not; a group begins with what CapFilt keeps."""

import io
import json
import os
import sys

import numpy as np
import pytest
from PIL import Image
from test_cli import model, photos, png  # noqa: F401
from test_search import run  # noqa: F401

import blip
from blip.app.commands.duplicates import Features, cosines, differing_bits, groups
from blip.data import near as comparison
from blip.data.near import earliest_near
from capfilt.select import phash as capfilt_phash


def scene(seed: int, side: int = 96) -> Image.Image:
    """Smooth random colours, as in a photograph."""
    rough = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((side, side), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def album(tmp_path, monkeypatch):
    """Six scenes, with copies of two of them."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "album"
    (folder / "sub folder").mkdir(parents=True)
    for seed in range(6):
        (folder / f"s{seed}.png").write_bytes(encoded(scene(seed), "PNG"))
    (folder / "s10 копия.jpg").write_bytes(encoded(scene(1).resize((48, 48)), "JPEG", quality=85))
    (folder / "sub folder/same [1].png").write_bytes((folder / "s1.png").read_bytes())
    (folder / "s3 again.jpg").write_bytes(encoded(scene(3), "JPEG", quality=60))
    return folder


GROUPS = ["album/s1.png\talbum/s10 копия.jpg\talbum/sub folder/same [1].png", "album/s3 again.jpg\talbum/s3.png"]


def test_planted_copies_are_found_by_their_hashes_without_a_model(run, album, monkeypatch):  # noqa: F811
    monkeypatch.delenv("OPENBLIP_MODEL")
    before = sorted(album.rglob("*"))
    status, out, err = run("duplicates", "album", "--bits", 6)
    assert (status, out.splitlines()) == (0, GROUPS)
    assert err.splitlines()[-1] == "9 images: 3 are copies of 2 others"
    assert sorted(album.rglob("*")) == before
    _, out, _ = run("duplicates", "album", "--bits", 6, "--json")
    first, second = map(json.loads, out.splitlines())
    assert list(first) == ["path", "copies", "bits", "same_bytes"]
    assert (first["path"], first["copies"]) == (GROUPS[0].split("\t")[0], GROUPS[0].split("\t")[1:])
    assert first["same_bytes"] == [False, True]
    assert first["bits"][1] == 0
    assert second["same_bytes"] == [False]


def test_copies_are_found_by_embeddings_and_the_index_is_that_of_search(run, photos, model):  # noqa: F811
    (photos / "p12.png").write_bytes(png(5))
    (photos / "p13.png").write_bytes(png(5, level=0))  # the same pixels in other bytes
    paths = [f"photos/p{number}.png" for number in range(1, 14)]
    embeds = blip.load(model).embed_image(paths).numpy()
    near = np.triu(embeds @ embeds.T, 1)
    assert np.sort(near.ravel())[-4] < 0.9999 < np.sort(near.ravel())[-3], "the test needs scenes that are not alike"
    status, out, _ = run("duplicates", "photos", "--cosine", 0.9999)
    assert (status, out) == (0, "photos/p5.png\tphotos/p12.png\tphotos/p13.png\n")
    assert "13/13 images" not in run("duplicates", "photos", "--cosine", 0.9999)[2], "they are indexed already"
    assert "images  " not in run("search", "photos", "a star")[2]
    _, out, _ = run("duplicates", "photos", "--cosine", 1, "--json")
    answer = json.loads(out.splitlines()[0])
    assert (answer["path"], answer["copies"][0], answer["same_bytes"][0]) == ("photos/p5.png", "photos/p12.png", True)
    # A low threshold makes one group of what is near: the library's cosines say which.
    least = float(np.sort(near.ravel())[-8])
    _, out, _ = run("duplicates", "photos", "--cosine", least)
    listed = {path for line in out.splitlines() for path in line.split("\t")}
    close = np.argwhere(near >= least - 1e-6).ravel()
    assert listed == {paths[one] for one in close}


def test_links_are_no_copies(run, photos):  # noqa: F811
    (photos / "a link.png").symlink_to("p5.png")
    (photos / "z link.png").symlink_to(photos / "p5.png")
    status, out, err = run("duplicates", "photos", "--bits", 0)
    assert (status, out) == (0, "")
    run("search", "photos")
    assert "images  " not in run("duplicates", "photos")[2], "the index of search keeps the links"
    assert "note: left out 2 links to images that are in the folder as well" in err


def test_what_cannot_be_read_is_named(run, photos):  # noqa: F811
    for name in ("b1.png", "b2.png"):
        (photos / name).write_bytes(b"<html>")
    (photos / "p1\n.png").write_bytes(png(1))
    status, out, err = run("duplicates", "photos", "--bits", 0)
    assert (status, out) == (1, "photos/p1\\n.png\tphotos/p1.png\n")
    assert "photos/b2.png: is an HTML page" in err
    assert err.splitlines()[-1] == "12 images: 1 are copies of 1 others; 2 could not be used"


def test_what_cannot_be_read_counts_every_time(run, photos):  # noqa: F811
    (photos / "b1.png").write_bytes(b"<html>")
    (photos / "nowhere.png").symlink_to("gone.png")
    first, again = (run("duplicates", "photos", "--cosine", 0.9999) for _ in range(2))
    assert "photos/nowhere.png: no such file" in first[2]
    assert first[0] == again[0] == 1
    assert (
        first[2].splitlines()[-1]
        == again[2].splitlines()[-1]
        == ("11 images: 0 are copies of 0 others; 2 could not be used")
    )
    (photos / "gone.png").write_bytes(png(77))
    assert run("duplicates", "photos", "--cosine", 0.9999)[2].splitlines()[-1].endswith("; 1 could not be used")


def test_wrong_use_is_one_line(run, photos, monkeypatch):  # noqa: F811
    os.mkdir("empty")
    wrong = {
        ("photos", "--cosine", "0.9", "--bits", "4"): "give either --cosine C or --bits N",
        ("photos", "--cosine", "1.5"): "cosine must be above 0 and at most 1, got 1.5",
        ("photos", "--cosine", "nan"): "cosine",
        ("photos", "--bits", "17"): "bits must be 0 to 16, got 17",
        ("photos", "--bits", "-1"): "bits must be 0 to 16, got -1",
        ("photos", "--bits", "4", "--index", "ix"): "--bits needs none",
        ("photos", "--bits", "4", "--model", "m"): "--bits needs none",
        ("photos/p1.png", "--bits", "4"): "photos/p1.png is not a folder",
        ("empty", "--bits", "4"): "no images in empty",
    }
    for args, message in wrong.items():
        status, out, err = run("duplicates", *args)
        assert (status, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
    monkeypatch.delenv("OPENBLIP_MODEL")
    status, _, err = run("duplicates", "photos")
    assert status == 2
    assert "or --bits 8 to compare perceptual hashes without a model" in err


def test_a_chain_is_one_group_and_a_bridge_joins_the_first():
    """By hand: 0-2 and 1-2 are near, 2-3 too; 4 is alone; 5 has the bytes of 1."""
    pairs = {(0, 2), (1, 2), (2, 3)}
    near = np.array([[(min(i, j), max(i, j)) in pairs for j in range(6)] for i in range(6)])
    values = np.arange(6)
    grouped = groups(
        Features([""] * 6, ["a", "b", "c", "d", "e", "b"], values), lambda some, others: near[np.ix_(some, others)]
    )
    assert grouped == [[0, 2, 3], [1, 5]]
    assert groups(Features([], [], np.empty(0)), lambda some, others: near[:0]) == []


@pytest.mark.parametrize("block", [7, 64, 2048])
def test_what_starts_a_group_is_what_capfilt_keeps(monkeypatch, block):
    monkeypatch.setattr(comparison, "_BLOCK", block)
    draw = np.random.default_rng(4)
    hashes = draw.integers(0, 2**63, 40, dtype=np.uint64).repeat(5) ^ (
        np.uint64(1) << draw.integers(0, 64, 200, dtype=np.uint64)
    )
    draw.shuffle(hashes)
    for bits in (0, 1, 2, 4):
        earliest = earliest_near(hashes, lambda some, others, bits=bits: differing_bits(some, others) <= bits)
        assert ((earliest < np.arange(200)) == capfilt_phash.later_ones(hashes, bits)).all()
        apart = [[bin(int(a) ^ int(b)).count("1") <= bits for b in hashes] for a in hashes]
        assert earliest.tolist() == [min(j for j in range(i + 1) if apart[i][j] or i == j) for i in range(200)]


def test_memory_does_not_grow_with_the_square(monkeypatch):
    sizes = []

    def near(some, others):
        sizes.append(len(some) * len(others))
        return cosines(some, others) >= 0.99

    monkeypatch.setattr(comparison, "_BLOCK", 32)
    values = np.random.default_rng(1).normal(size=(500, 8)).astype(np.float32)
    earliest_near(values / np.linalg.norm(values, axis=1, keepdims=True), near)
    assert max(sizes) <= 32 * 32


def test_hashes_need_no_torch(photos):  # noqa: F811
    import subprocess

    program = (
        "import sys; from blip.app import cli; status = cli.main(['duplicates', 'photos', '--bits', '2']); "
        "sys.exit(status or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
