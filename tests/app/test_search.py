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


def test_the_index_is_built_once_and_follows_the_folder(run, photos):  # noqa: F811
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


def test_an_image_finds_itself_first(run, photos, features):  # noqa: F811
    """Ranked by the cosines of the library, never re-ranked; a copy under another name is as near."""
    (photos / "p0 - копия [1].png").write_bytes(png(7))
    paths = [f"photos/{name}" for name in sorted(os.listdir(photos))]
    embeds = features.embed_image(paths)
    status, out, _ = run("search", "photos", "--image", "photos/p7.png", "--top", 12)
    assert status == 0
    rows = [line.split("\t") for line in out.splitlines()]
    assert {row[1] for row in rows[:2]} == {"photos/p0 - копия [1].png", "photos/p7.png"}
    cosines = dict(zip(paths, (embeds @ embeds[paths.index("photos/p7.png")]).tolist(), strict=True))
    assert [row[1] for row in rows[2:]] == sorted(paths, key=lambda path: -cosines[path])[2:]
    for query, path, score, itc, itm in rows:
        assert (query, itm) == ("photos/p7.png", "-")
        assert score == itc == f"{cosines[path]:.4f}"


def test_words_are_added_to_an_image_and_taken_away(run, photos, features):  # noqa: F811
    args = ("--image", "photos/p3.png", "--plus", "blue", "--plus", "a ring", "--minus", "red", "--top", 11)
    status, out, _ = run("search", "photos", "a star", *args, "--json", "--out", "found.jsonl")
    assert (status, out) == (0, "")
    words = features.embed_text(["blue", "a ring", "red"])
    query = features.embed_image("photos/p3.png")[0] + words[0] + words[1] - words[2]
    expected = features.embed_image([f"photos/p{i}.png" for i in range(1, 12)]) @ (query / query.norm())
    answers = lines((photos.parent / "found.jsonl").read_text())
    assert [line.get("text") for line in answers] == ["a star"] * 11 + [None] * 11
    assert list(answers[11]) == ["image", "plus", "minus", "path", "score", "itc", "itm"]
    for line, at in zip(answers[11:], expected.argsort(descending=True).tolist(), strict=True):
        named = {
            "image": "photos/p3.png",
            "plus": ["blue", "a ring"],
            "minus": ["red"],
            "path": f"photos/p{at + 1}.png",
        }
        assert {name: line[name] for name in named} == named
        assert line["score"] == line["itc"] == pytest.approx(expected[at].item(), abs=2e-5)
        assert line["itm"] is None
    # The file is one of this command, and another query's is not.
    assert run("search", "photos", "a star", *args, "--json", "--out", "found.jsonl")[0] == 0
    status, _, err = run("search", "photos", "--image", "photos/p3.png", "--json", "--out", "found.jsonl")
    assert (status, err.count("\n")) == (2, 1)
    assert "other options" in err


class Stub:
    """A model whose embeddings are given."""

    def embed_image(self, _):
        return torch.tensor([[0.6, 0.8, 0.0]])

    def embed_text(self, texts):
        given = {"blue": [0.0, 0.0, 1.0], "red": [0.0, 1.0, 0.0], "all of it": [0.6, 0.8, 0.0]}
        return torch.tensor([given[text] for text in texts]).reshape(-1, 3)


@pytest.mark.parametrize(
    ("plus", "minus", "expected"),
    [
        ([], [], [0.6, 0.8, 0.0]),
        (["blue"], [], [0.6 / 2**0.5, 0.8 / 2**0.5, 1 / 2**0.5]),
        (["blue"], ["red"], [0.6 / 1.4**0.5, -0.2 / 1.4**0.5, 1 / 1.4**0.5]),
    ],
)
def test_the_query_is_a_sum_of_length_one(plus, minus, expected):
    torch.testing.assert_close(search.changed_image(Stub(), None, plus, minus), torch.tensor([expected]))


def test_what_cancels_out_is_refused():
    with pytest.raises(ValueError, match="cancel each other out"):
        search.changed_image(Stub(), None, [], ["all of it"])


def test_the_sheet_shows_the_image_searched_for(run, photos):  # noqa: F811
    args = ("--image", "photos/p3.png", "--minus", "red <b>", "--top", 2, "--sheet", "found.html")
    status, out, _ = run("search", "photos", *args)
    assert status == 0
    page = (photos.parent / "found.html").read_text()
    assert page.count('src="data:image/jpeg') == 3
    assert "Like p3.png -red &lt;b&gt;</h2>" in page
    assert "“p3.png -red &lt;b&gt;”" in page  # the title names another image than itself
    assert "p3.png is the best" not in page
    assert "<b>" not in page
    assert page.count("cosine, which ranks it") == 2
    assert "probability" not in page
    best = out.splitlines()[0].split("\t")
    assert f"{float(best[2]):.3f}" in page


def test_search_says_what_is_wrong(run, photos):  # noqa: F811
    (photos.parent / "broken.png").write_bytes(b"<html>")
    wrong = {
        ("photos/p1.png", "a"): "photos/p1.png is not a folder",
        ("gone", "a"): "gone is not a folder",
        ("photos", "--sheet", "a.html"): "--sheet needs a TEXT",
        ("photos", "a", "--sheet", "a.pdf"): "ends in .html",
        ("photos", "a", "--index", "photos/p1.png"): "photos/p1.png is a file; give a folder",
        ("photos", "!"): "text '!' cannot be compared",
        ("photos", "a", "--top", "0"): "top must be 1 or more, got 0",
        ("photos", "a", "--plus", "blue"): "--plus and --minus change what --image searches for",
        ("photos", "--minus", "blue"): "--plus and --minus change what --image searches for",
        ("photos", "--image", "photos/p1.png", "--plus", "red", "--minus", "red"): "'red' is given both by --plus",
        ("photos", "--image", "photos/p1.png", "--plus", "!"): "text '!' cannot be compared",
        ("photos", "--image", "photos/p1.png", "--plus", "звезда"): "all word pieces of 'звезда' are unknown",
        ("photos", "--image", "gone.png"): "--image gone.png: ",
        ("photos", "--image", "photos"): "--image photos is a folder",
        ("photos", "--image", "broken.png"): "--image broken.png: is an HTML page",
        ("photos", "--image", "https://example.org/a.png"): "images are not fetched",
        ("photos", "a", "--model", "./gone"): "./gone is not a model directory",
    }
    for args, message in wrong.items():
        status, out, err = run("search", *args)
        assert (status, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
    assert json.dumps(sorted(os.listdir(photos))).count("index") == 0
