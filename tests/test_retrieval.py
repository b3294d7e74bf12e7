"""Retrieval metrics by hand, and re-ranking against scoring every pair one at a time."""

import pytest
import torch
from test_objectives import CONFIG

from blip.model import Blip
from eval.retrieval import candidates, recall_of_images, recall_of_texts, retrieval


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
def pictures():
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


def by_hand(model, pictures, k):
    """Every pair scored alone."""
    model.eval()
    with torch.no_grad():
        cosines, scores = torch.zeros(5, 7), torch.zeros(5, 7)
        for i, picture in enumerate(pictures):
            tokens = model.vision(picture[None])
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
def test_reranking_equals_scoring_every_pair_alone(model, pictures, k, batch):
    found = retrieval(model.train(), Letters(), list(pictures.split(2)), TEXTS, OWNER, k=k, batch=batch)
    assert model.training
    for name, value in by_hand(model, pictures, k).items():
        assert found[name] == pytest.approx(value), name


def test_a_gallery_that_does_not_fit_is_refused(model, pictures):
    with pytest.raises(ValueError, match="names image 7"):
        retrieval(model, Letters(), [pictures], ["a"], [7])
    with pytest.raises(ValueError, match="2 texts but 1"):
        retrieval(model, Letters(), [pictures], ["a", "b"], [0])
    with pytest.raises(ValueError, match="nothing to retrieve"):
        retrieval(model, Letters(), [pictures], [], [])
