"""The three losses as pure functions (paper, section 3.2).

B batch, C candidates (B, or the batches of all processes), E embedding width, Q queue, N tokens to predict.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Embeddings(NamedTuple):
    """Joint embeddings of a batch of pairs, each (B, E) of length 1."""

    image: Tensor
    text: Tensor


class Similarities(NamedTuple):
    """Cosines (B, B) of the batch with itself: student's images against teacher's texts, and texts against images."""

    image_to_text: Tensor
    text_to_image: Tensor


def contrastive(
    student: Embeddings,
    teacher: Embeddings,
    image_queue: Tensor,
    text_queue: Tensor,
    temperature: Tensor,
    alpha: float,
    same: Tensor | None = None,
) -> tuple[Tensor, Similarities]:
    """ITC: cross-entropy of both directions against the teacher's features and the queues (Q, E).

    The target is (1 - alpha) on the true pair plus alpha times the teacher's own softmax, which gets no gradient
    although it is divided by the same temperature. Where several candidates are of the same image, `same` (B, B + Q)
    says which, and they share the true pair's part evenly. Returns the scalar loss and the batch's cosines.
    """
    true = None if same is None else same / same.sum(1, keepdim=True)
    i2t, i2t_loss = _one_direction(student.image, teacher.image, teacher.text, text_queue, temperature, alpha, true)
    t2i, t2i_loss = _one_direction(student.text, teacher.text, teacher.image, image_queue, temperature, alpha, true)
    return (i2t_loss + t2i_loss) / 2, Similarities(i2t, t2i)


def _one_direction(
    query: Tensor,
    query_teacher: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: Tensor,
    alpha: float,
    true: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch = len(query)
    # One product reads the queue for student and teacher together, and the queue itself is never copied.
    both = torch.cat([query, query_teacher])
    cosines = torch.cat([both @ key.T, both @ queue.T], dim=1)
    student, teacher = cosines.split(batch)
    logits = student / temperature
    with torch.no_grad():
        soft = F.softmax(teacher / temperature, dim=1).mul_(alpha)
    own = logits.diagonal() if true is None else (true * logits).sum(1)
    expected = (1 - alpha) * own + (soft * logits).sum(1)
    # Targets sum to 1, so the cross-entropy is logsumexp minus the expected logit.
    return student[:, :batch], (logits.logsumexp(1) - expected).mean()


@torch.no_grad()
def hard_negatives(cosines: Tensor, temperature: Tensor, floor: float, own: Tensor) -> Tensor:
    """Draw for each row of cosines (B, C) one wrong candidate, the likelier the more similar it seems.

    `own` (B,) is each row's true candidate. `floor` is added to every weight so that no row is left without one.
    Returns (B,) indices into C; ValueError where C is 1 and nothing is wrong.
    """
    weights = _negative_weights(cosines, temperature, floor)
    weights.scatter_(1, own[:, None], 0)
    return torch.multinomial(weights, 1).squeeze(1)


@torch.no_grad()
def negatives_of_other_images(
    cosines: Tensor, temperature: Tensor, floor: float, same: Tensor
) -> tuple[Tensor, Tensor]:
    """As `hard_negatives`, where candidates that `same` (B, C) marks as of the row's own image are never drawn.

    A row whose other weights all underflow draws evenly from them. Returns (B,) indices into C, and (B,) bool: False
    where every candidate is of the same image, so that the index means nothing.
    """
    other = ~same
    weights = _negative_weights(cosines, temperature, floor).masked_fill_(same, 0)
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, other.float())
    found = other.any(1)
    weights = torch.where(found[:, None], weights, 1.0)
    return torch.multinomial(weights, 1).squeeze(1), found


def _negative_weights(cosines: Tensor, temperature: Tensor, floor: float) -> Tensor:
    if cosines.shape[1] < 2:
        raise ValueError(
            "matching draws negatives from the batch: it needs at least 2 pairs, set train.batch_size to 2 or more"
        )
    weights = F.softmax(cosines.float() / temperature, dim=1) + floor
    # There is no drawing by NaN. The losses of such a batch are NaN themselves, which is for the loop to notice.
    return weights.nan_to_num(nan=1.0)


def matching(logits: Tensor, positives: int, counted: Tensor | None = None) -> Tensor:
    """ITM: cross-entropy of logits (R, 2), of which the first `positives` rows are matches.

    The mean is over the rows that `counted` (R,) marks, over all when not given.
    """
    labels = match_labels(logits, positives)
    if counted is None:
        return F.cross_entropy(logits, labels)
    each = F.cross_entropy(logits, labels, reduction="none")
    return torch.where(counted, each, 0).sum() / counted.sum()


def match_labels(logits: Tensor, positives: int) -> Tensor:
    """(R,) int64: 1 for the first `positives` rows, else 0."""
    return (torch.arange(len(logits), device=logits.device) < positives).long()


def captioning(logits: Tensor, targets: Tensor, smoothing: float, ignore: int = -100) -> Tensor:
    """LM: label-smoothed cross-entropy of logits (N, vocabulary), mean over the targets (N,) that are not `ignore`."""
    return F.cross_entropy(logits, targets, ignore_index=ignore, label_smoothing=smoothing)


def answering(
    logits: Tensor, targets: Tensor, weights: Tensor, questions: int, smoothing: float, ignore: int = -100
) -> Tensor:
    """VQA: label-smoothed cross-entropy of logits (N, vocabulary), summed with weights (N,) over the words of answers.

    The sum is divided by the number of questions, as in the original, so that a long answer counts more than a short.
    """
    each = F.cross_entropy(logits, targets, ignore_index=ignore, label_smoothing=smoothing, reduction="none")
    return (weights * each).sum() / questions
