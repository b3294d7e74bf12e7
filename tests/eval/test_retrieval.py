"""Retrieval metrics by hand, and re-ranking against scoring every pair one at a time."""

import json

import pytest
import torch
from stub_run import the_zygote
from test_captioning_eval import captioner, draw
from test_objectives import CONFIG

from blip import dist
from blip.data.settings import SourceConfig
from blip.errors import DataError
from blip.models.blip import Blip
from eval.retrieval import Gallery, candidates, rank, recall_of_images, recall_of_texts, results, retrieval


class Letters:
    """A tokenizer of three-letter texts that are padded to different lengths."""

    def encode(self, texts, *, first, max_length):
        assert first in ("cls", "enc")
        start = {"cls": 2, "enc": 119}[first]
        rows = [[start, *(10 + ord(c) % 90 for c in text), 3][:max_length] for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        return ids, torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])


TEXTS = ["a", "bcd", "efghi", "jk", "lmnopqr", "stu", "vw"]
OWNER = [0, 0, 1, 2, 4, 4, 4]  # image 3 has no text


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(7)
    model = Blip(CONFIG).train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


@pytest.fixture(scope="module")
def images():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_recalls_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.8, 0.2], [0.3, 0.2, 0.1, 0.9], [0.0, 0.5, 0.6, 0.7]])
    owner = torch.tensor([0, 0, 1, 1])
    # Image 0: text 0 first. Image 1: text 3 first. Image 2 has no text.
    assert recall_of_texts(scores, owner) == {"tr@1": 100.0, "tr@5": 100.0, "tr@10": 100.0}
    # Text 0: image 0 first. Text 1: images 2 and 1 before 0. Text 2: 0 and 2 before 1. Text 3: image 1 first.
    assert recall_of_images(scores, owner) == {"ir@1": 50.0, "ir@5": 100.0, "ir@10": 100.0}


def test_a_constant_score_finds_nothing():
    assert recall_of_texts(torch.zeros(20, 20), torch.arange(20))["tr@10"] == 0.0
    assert recall_of_images(torch.zeros(20, 20), torch.arange(20))["ir@10"] == 0.0


def test_candidates_are_the_best_of_each_row_and_each_column():
    of_image, of_text = candidates(torch.tensor([[3.0, 2.0, 1.0], [1.0, 4.0, 5.0]]), k=1)
    assert of_image.tolist() == [[True, False, False], [False, False, True]]
    assert of_text.tolist() == [[True, False, False], [False, True, True]]


def by_hand(model, images, k):
    """Every pair scored alone."""
    model.eval()
    with torch.no_grad():
        cosines, scores = torch.zeros(5, 7), torch.zeros(5, 7)
        for i, image in enumerate(images):
            tokens = model.vision(image[None])
            for j, text in enumerate(TEXTS):
                cosines[i, j] = (
                    model.embed_image(tokens)
                    @ model.embed_text(*Letters().encode([text], first="cls", max_length=35)).T
                )
                logits = model.match(*Letters().encode([text], first="enc", max_length=35), model.context(tokens))
                scores[i, j] = logits[0, 1] + cosines[i, j]
    owner = torch.tensor(OWNER)
    never = float("-inf")
    keep_text = torch.stack([row >= row.sort(descending=True).values[min(k, 7) - 1] for row in cosines])
    keep_image = torch.stack([col >= col.sort(descending=True).values[min(k, 5) - 1] for col in cosines.T], 1)
    return {
        **recall_of_texts(scores.masked_fill(~keep_text, never), owner),
        **recall_of_images(scores.masked_fill(~keep_image, never), owner),
    }


@pytest.mark.parametrize("k", [1, 3, 100])
@pytest.mark.parametrize("batch", [1, 4, 256])
def test_reranking_equals_scoring_every_pair_alone(model, images, k, batch):
    scores = retrieval(model.train(), Letters(), list(images.split(2)), TEXTS, OWNER, k=k, batch=batch)
    assert model.training
    for name, value in by_hand(model, images, k).items():
        assert scores[name] == pytest.approx(value), name


def test_a_gallery_that_does_not_fit_is_refused(model, images):
    with pytest.raises(ValueError, match="names image 7"):
        retrieval(model, Letters(), [images], ["a"], [7])
    with pytest.raises(ValueError, match="2 texts but 1"):
        retrieval(model, Letters(), [images], ["a", "b"], [0])
    with pytest.raises(ValueError, match="nothing to retrieve"):
        retrieval(model, Letters(), [images], [], [])


@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_each_image_is_looked_at_once_if_there_is_room_and_projected_once(model, images, monkeypatch, kept):
    monkeypatch.setattr("eval.retrieval.KEPT_BYTES", kept)
    seen, projected = [], []
    model.vision.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    context = model.med.context
    monkeypatch.setattr(model.med, "context", lambda x, **how: (projected.append(len(x)), context(x, **how))[1])
    rank(model, Letters(), list(images.split(2)), TEXTS, OWNER, k=3, batch=2)
    assert sum(seen) == (5 if kept else 10)
    assert sum(projected) == 5


def ranked(source: str, broken: str, out: str) -> None:
    """What each of two processes does: a ranking with batches for both, for one, and with one that cannot be read."""
    dist.start(60)
    model, tokenizer = captioner()
    for batch in (1, 2, 50):
        gallery = Gallery.open(SourceConfig(source), 64, batch=batch)
        ranking = rank(model, tokenizer, *gallery, k=4, batch=3)
        with open(f"{out}-{batch}-{dist.rank()}", "w") as file:
            file.write(
                results(gallery.ids, gallery.texts, gallery.image_of_text, ranking)
                + json.dumps(ranking.cosines.tolist())
            )
    with pytest.raises(DataError, match=r"image 103 \(3.png\) cannot be evaluated"):
        rank(model, tokenizer, *Gallery.open(SourceConfig(broken), 64, batch=1), k=4)


@pytest.fixture
def one_thread():
    """As in the processes that a test starts: with more threads sums round otherwise, and near ties change places."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_processes_rank_as_one_does_and_fail_together(tmp_path, one_thread):
    source, broken = draw(tmp_path / "whole").path, draw(tmp_path / "broken", broken=(3,)).path
    arguments = {"source": source, "broken": broken, "out": str(tmp_path / "two")}
    zygote = the_zygote()
    pids = zygote.spawn(tmp_path / "log", world=2, module="test_retrieval", function="ranked", **arguments)
    statuses = [zygote.wait(pid, 240) for pid in pids]
    assert statuses == [0, 0], (tmp_path / "log-0").read_text() + (tmp_path / "log-1").read_text()
    ranked(source, broken, str(tmp_path / "one"))
    for batch in (1, 2, 50):
        alone = (tmp_path / f"one-{batch}-0").read_text()
        assert alone.count("image_id") == 7 + 14
        for process in (0, 1):
            assert (tmp_path / f"two-{batch}-{process}").read_text() == alone


def test_images_are_taken_once_by_their_id(tmp_path):
    draw(tmp_path, 3)
    names = ["0.png", "1.png", "0.png", "2.png"]
    rows = [{"image": name, "image_id": 9 - int(name[0]), "caption": f"text {i}."} for i, name in enumerate(names)]
    (tmp_path / "list.json").write_text(json.dumps([*rows, {"image": "1.png", "image_id": 8, "caption": []}]))
    gallery = Gallery.open(SourceConfig(str(tmp_path / "list.json")), 32)
    assert gallery.ids == [9, 8, 7]
    assert (gallery.texts, gallery.image_of_text) == (["text 0", "text 2", "text 1", "text 3"], [0, 0, 1, 2])
    assert [len(x) for x in Gallery.open(SourceConfig(str(tmp_path / "list.json")), 32, limit=2).images] == [2]
    (tmp_path / "list.json").write_text(json.dumps([{"image": "1.png", "caption": "..."}]))
    with pytest.raises(DataError, match=r"image 1.png cannot be evaluated: the caption has no words"):
        Gallery.open(SourceConfig(str(tmp_path / "list.json")), 32)
