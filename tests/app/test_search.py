"""`blip match` and `blip search`: what they answer, against the library, and what they say when something is off."""

import json
import os
import re

import pytest
import torch
from test_cli import lines, model, photos, png  # noqa: F401

import blip
from blip.app import cli
from blip.app.commands import search
from blip.app.index import Entry, Index, IndexOrigin

TEXTS = ["a red circle", "two small stars"]


@pytest.fixture
def run(model, monkeypatch, capfd):  # noqa: F811
    """Run `blip ...` in this process; returns status, output and what was said on stderr."""
    monkeypatch.setenv("OPENBLIP_MODEL", model)

    def run(*args) -> tuple[int, str, str]:
        try:
            status = cli.main([*map(str, args)])
        except SystemExit as stop:
            status = stop.code
        output = capfd.readouterr()
        assert "Traceback" not in output.err
        return status, output.out, output.err

    return run


@pytest.fixture(scope="module")
def features(model):  # noqa: F811
    return blip.load(model)


def test_match_says_what_the_library_says(run, photos, features):  # noqa: F811
    paths = ["photos/p2.png", "photos/p3.png"]
    scores = features.match(paths, TEXTS)
    for path, itc, itm in zip(paths, scores.itc, scores.probability, strict=True):
        status, out, err = run("match", path, *TEXTS)
        assert (status, err) == (0, "")
        expected = [f"{path}\t{a:.4f}\t{b:.4f}\t{t}" for a, b, t in zip(itc, itm, TEXTS, strict=True)]
        assert out.splitlines() == expected
    _, out, _ = run("match", "photos", *TEXTS, "--json", "--batch", 3)
    answers = lines(out)
    assert [line["path"] for line in answers] == [f"photos/p{i}.png" for i in range(1, 12)]
    assert list(answers[0]) == ["path", "texts", "itc", "itm"]
    assert answers[1]["texts"] == TEXTS
    torch.testing.assert_close(torch.tensor(answers[1]["itc"]), scores.itc[0], atol=2e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(answers[2]["itm"]), scores.probability[1], atol=2e-5, rtol=0)


def test_match_names_what_it_cannot_use(run, photos):  # noqa: F811
    (photos / "p4.png").write_bytes(b"<html>")
    status, out, err = run("match", "photos", "a star")
    assert status == 1
    assert len(out.splitlines()) == 10
    assert "photos/p4.png: is an HTML page" in err
    status, out, err = run("match", "photos", "...")
    assert (status, out) == (2, "")
    assert "text '...' cannot be compared" in err
    assert run("match", "photos")[0] == 2
    assert "did you mean --json" in run("match", "photos", "a", "--jsn")[2]


def by_hand(features, query, rerank):
    """All images in order, one at a time."""
    paths = [f"photos/p{i}.png" for i in range(1, 12)]
    scores = features.match(paths, [query])
    order = scores.itc[:, 0].argsort(descending=True, stable=True).tolist()
    first = sorted(order[:rerank], key=lambda i: -scores.score[i, 0].item())
    return [(paths[i], scores.score[i, 0].item()) for i in first] + [
        (paths[i], scores.itc[i, 0].item()) for i in order[rerank:]
    ]


@pytest.mark.parametrize("rerank", [0, 1, 4, 50])
def test_search_ranks_as_scoring_everything_does(run, photos, features, rerank):  # noqa: F811
    status, out, _ = run("search", "photos", *TEXTS, "--rerank", rerank, "--top", 9, "--json", "--batch", 3)
    assert status == 0
    answers = lines(out)
    assert [line["text"] for line in answers] == [text for text in TEXTS for _ in range(9)]
    for text in TEXTS:
        mine = [line for line in answers if line["text"] == text]
        expected = by_hand(features, text, rerank)[:9]
        assert [line["path"] for line in mine] == [path for path, _ in expected]
        for line, (_, score) in zip(mine, expected, strict=True):
            assert line["score"] == pytest.approx(score, abs=2e-5)
        assert [line["itm"] is not None for line in mine] == [i < rerank for i in range(9)]


def test_as_many_are_named_as_are_asked_for(features, tmp_path):
    entries = [Entry(f"{i}.png", 1, 1, "") for i in range(1100)]
    embeddings = torch.nn.functional.normalize(torch.randn(1100, features.model.config.embed_dim), dim=1)
    index = Index(tmp_path, tmp_path, IndexOrigin("m", "w", "float32"), entries, embeddings)
    for top in (3, 1050, 2000):
        hits = search.find_one(index, features, "a star", embeddings[:1], top, rerank=0)
        assert len(hits) == min(top, 1100)
        assert hits[0].path.name == "0.png"


def test_the_index_is_built_once_and_follows_the_folder(run, photos, monkeypatch):  # noqa: F811
    monkeypatch.setattr(search, "MODEL_VARIABLE", "OPENBLIP_MODEL")
    status, out, err = run("search", "photos")
    assert (status, out) == (0, "")
    assert "11/11 images" in err
    assert sorted(p.name.partition("-")[0] for p in (photos / ".blip-index").iterdir()) == ["embeddings", "index.json"]
    _, first, err = run("search", "photos", "a star", "--top", 11, "--rerank", 0)
    assert err == ""
    assert len(first.splitlines()) == 11
    fields = first.splitlines()[0].split("\t")
    assert (fields[0], fields[4], fields[2]) == ("a star", "-", fields[3])
    (photos / "p12.png").write_bytes(png(12))
    (photos / "p1.png").unlink()
    (photos / "p2.png").write_bytes(b"<html>")
    status, out, err = run("search", "photos", "a star", "--top", 20, "--rerank", 0)
    assert status == 1
    assert "photos/p2.png: is an HTML page" in err
    names = {line.split("\t")[1] for line in out.splitlines()}
    assert names == {f"photos/p{i}.png" for i in range(3, 13)}
    status, again, err = run("search", "photos", "a star", "--top", 20, "--rerank", 0)
    assert (status, again, err) == (0, out, ""), "an image that is known to be broken is not complained about again"


def test_an_index_of_another_model_is_refused_by_both_names(run, photos, model, tmp_path):  # noqa: F811
    assert run("search", "photos", "--index", "ix")[0] == 0
    assert os.listdir(photos).count(".blip-index") == 0
    other, tokenizer = blip.from_pretrained(model)
    with torch.no_grad():
        other.image_proj.weight.add_(0.1)
    blip.save_pretrained(other, tokenizer, tmp_path / "other")
    before = (tmp_path / "ix/index.json").read_bytes()
    status, out, err = run("search", "photos", "a star", "--index", "ix", "--model", tmp_path / "other")
    assert (status, out) == (2, "")
    assert f"was built with {model} (image encoder " in err
    assert f"this is {tmp_path / 'other'} (image encoder " in err
    assert err.count("\n") == 1
    status, _, err = run("search", "photos", "a star", "--index", "ix", "--precision", "bfloat16")
    assert status == 2
    assert "float32)" in err
    assert "bfloat16)" in err
    assert (tmp_path / "ix/index.json").read_bytes() == before
    args = ("search", "photos", "a star", "--index", "ix", "--model", tmp_path / "other")
    assert run(*args, "--rebuild")[0] == 0
    assert run(*args)[0] == 0


def test_the_sheet_shows_what_was_found_and_asks_nobody(run, photos):  # noqa: F811
    status, out, _ = run("search", "photos", "a <b> star", "a ring", "--top", 3, "--sheet", "found.html")
    assert status == 0
    page = (photos.parent / "found.html").read_text()
    assert page.count('src="data:image/jpeg') == 6
    assert "a &lt;b&gt; star" in page
    assert "<b>" not in page
    assert "http:" not in page
    assert "https:" not in page
    score, chance = r'ranks it</span> <span dir="auto">([-\d.]+)<', r'a match</span> <span dir="auto">([\d.]+)%<'
    name = r'title="([^"]*)"><span dir="auto">(\d+)\. (.*?)</span>'
    cards = re.findall(f"{name}.*?{score}.*?{chance}", page, re.DOTALL)
    shown = [line.split("\t") for line in out.splitlines()]
    assert [(path, name) for path, _, name, _, _ in cards] == [(path, os.path.basename(path)) for _, path, *_ in shown]
    assert [int(rank) for _, rank, *_ in cards] == [1, 2, 3, 1, 2, 3]
    assert [float(one[3]) for one in cards] == pytest.approx([float(one[2]) for one in shown], abs=6e-4)
    assert [float(one[4]) for one in cards] == pytest.approx([100 * float(one[4]) for one in shown], abs=0.06)
    status, _, err = run("search", "photos", "a ring", "--sheet", "gone/found.html")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("error: could not write gone/found.html")


def test_search_says_what_is_wrong(run, photos):  # noqa: F811
    wrong = {
        ("photos/p1.png", "a"): "photos/p1.png is not a folder",
        ("gone", "a"): "gone is not a folder",
        ("photos", "--sheet", "a.html"): "--sheet needs a TEXT",
        ("photos", "a", "--sheet", "a.pdf"): "ends in .html",
        ("photos", "!"): "text '!' cannot be compared",
        ("photos", "a", "--top", "0"): "top must be 1 or more, got 0",
        ("photos", "a", "--model", "./gone"): "./gone is not a model directory",
    }
    for args, message in wrong.items():
        status, out, err = run("search", *args)
        assert (status, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
    assert json.dumps(sorted(os.listdir(photos))).count("index") == 0
