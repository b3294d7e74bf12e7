"""What is learned: a batch in, named losses out. The training loop sums them.

B batch, C candidates for negatives (B, or the batches of all processes), T text tokens, P image tokens, E width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip import dist, losses
from blip.config import CaptionConfig, PretrainConfig
from blip.data.batch import Batch
from blip.losses import Embeddings, Similarities
from blip.med import Context, Pass
from blip.model import Blip, starting_with
from blip.momentum import Queue, Teacher


class Outcome(NamedTuple):
    """What an objective says of one batch."""

    losses: dict[str, Tensor]
    """Named scalars; the loop adds them up."""
    health: dict[str, Tensor]
    """Named detached scalars worth watching."""
    carry: Any = None
    """What `after_step` needs of this batch."""


class Pretrain(nn.Module):
    """ITC + ITM + LM with a momentum teacher and feature queues (paper, section 3.2).

    ITM and LM share one projection of the image and run side by side through the transformer's shared layers.
    `forward` changes nothing: the teacher and the queues move in `after_step`.
    """

    def __init__(self, model: Blip, config: PretrainConfig) -> None:
        super().__init__()
        self.config = config
        self.model = model
        self.teacher = Teacher(model)
        self.image_queue = Queue(config.queue_size, model.config.embed_dim)
        self.text_queue = Queue(config.queue_size, model.config.embed_dim)

    def train(self, mode: bool = True) -> Pretrain:
        super().train(mode)
        self.teacher.train(mode and self.config.teacher_dropout)
        return self

    def forward(self, batch: Batch, epoch: float) -> Outcome:
        """The three losses of a batch; `epoch` (passes over the data so far) sets the weight of soft targets."""
        model, config = self.model, self.config
        tokens = model.vision(batch.image)
        student = Embeddings(model.embed_image(tokens), model.embed_text(batch.ids, batch.keep))
        with torch.no_grad():
            towers = self.teacher.towers
            seen = towers.vision(batch.image)
            teacher = Embeddings(towers.embed_image(seen), towers.embed_text(batch.ids, batch.keep))

        alpha = config.alpha * min(1.0, epoch / config.alpha_ramp_epochs) if config.alpha_ramp_epochs else config.alpha
        with torch.autocast(tokens.device.type, enabled=False):
            itc, cosines = losses.contrastive(
                student, teacher, self.image_queue.features, self.text_queue.features, model.temperature, alpha
            )
        match_logits, word_logits, words = self._ground(batch, tokens, student, teacher, cosines)
        found = {
            "itc": itc,
            "itm": losses.matching(match_logits.float(), positives=len(batch)),
            "lm": losses.captioning(word_logits.float(), words, config.label_smoothing),
        }
        return Outcome(found, self._health(cosines, match_logits), teacher)

    def _ground(
        self, batch: Batch, tokens: Tensor, student: Embeddings, teacher: Embeddings, cosines: Similarities
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Match logits (3 B, 2), positives first; next-word logits (N, vocabulary) and the words themselves (N,)."""
        model, text = self.model, self.model.config.text
        context = model.context(tokens)
        ids, keep = starting_with(batch.ids, text.enc_id), batch.keep
        other_context, other_ids, other_keep = self._negatives(ids, keep, tokens, context, student, teacher, cosines)
        # Two texts look at each image in its own place: the right one and a wrong one.
        own = Pass(_pairwise(ids, other_ids), _pairwise(keep, other_keep), context=context.expand(2), first=True)
        other = Pass(ids, keep, context=other_context, first=True)
        write, words = _writing(batch, text.dec_id, context)
        own_states, other_states, write_states = model.med([own, other, write])
        right, wrong = own_states.view(len(ids), 2, -1).unbind(1)
        match_logits = model.match_head(torch.cat([right, other_states, wrong]))
        return match_logits, model.med.vocabulary(write_states), words

    def _negatives(
        self,
        ids: Tensor,
        keep: Tensor,
        tokens: Tensor,
        context: Context,
        student: Embeddings,
        teacher: Embeddings,
        cosines: Similarities,
    ) -> tuple[Context, Tensor, Tensor]:
        """For each text a wrong image as its context, and for each image a wrong text (ids, keep)."""
        t2i, i2t = cosines.text_to_image, cosines.image_to_text
        everywhere = self.config.negatives_all_ranks and dist.world() > 1
        own = torch.arange(len(ids), device=ids.device)
        if everywhere:
            with torch.no_grad():
                i2t = student.image @ dist.gather(teacher.text).T
                t2i = student.text @ dist.gather(teacher.image).T
            own = own + dist.rank() * len(ids)
        temperature, floor = self.model.temperature, self.config.negative_floor
        image_of_text = losses.hard_negatives(t2i, temperature, floor, own)
        text_of_image = losses.hard_negatives(i2t, temperature, floor, own)
        if not everywhere:
            return context[image_of_text], ids[text_of_image], keep[text_of_image]
        all_ids, all_keep = dist.gather_padded(ids), dist.gather_padded(keep)
        others = dist.gather_with_gradient(tokens).index_select(0, image_of_text)
        return self.model.context(others), all_ids[text_of_image], all_keep[text_of_image]

    @torch.no_grad()
    def _health(self, cosines: Similarities, match_logits: Tensor) -> dict[str, Tensor]:
        batch = len(cosines.image_to_text)
        own = torch.arange(batch, device=match_logits.device)
        correct = (match_logits.argmax(1) == losses.match_labels(match_logits, batch)).float()
        return {
            "itc_recall_i2t": (cosines.image_to_text.argmax(1) == own).float().mean(),
            "itc_recall_t2i": (cosines.text_to_image.argmax(1) == own).float().mean(),
            "itm_accuracy_match": correct[:batch].mean(),
            "itm_accuracy_mismatch": correct[batch:].mean(),
            "temperature": self.model.temperature.detach().clone(),
        }

    @torch.no_grad()
    def after_step(self, carries: list[Embeddings]) -> None:
        """Once per optimizer step: clamp the temperature, move the teacher, put the step's features in the queues."""
        config = self.config
        self.model.temperature.clamp_(config.temperature_min, config.temperature_max)
        self.teacher.update(self.model, config.momentum)
        for features in carries:
            self.image_queue.push(dist.gather(features.image))
            self.text_queue.push(dist.gather(features.text))


class Caption(nn.Module):
    """LM alone: what makes a captioner of a pre-trained model (paper, section 5.2).

    The prompt that the batch's texts begin with is read and not learned.
    """

    def __init__(self, model: Blip, config: CaptionConfig) -> None:
        super().__init__()
        self.config = config
        self.model = model

    def forward(self, batch: Batch, epoch: float) -> Outcome:
        """The language-modelling loss of a batch; `epoch` changes nothing."""
        model = self.model
        context = model.context(model.vision(batch.image))
        write, words = _writing(batch, model.config.text.dec_id, context)
        (states,) = model.med([write])
        logits = model.med.vocabulary(states).float()
        found = {"lm": losses.captioning(logits, words, self.config.label_smoothing)}
        return Outcome(found, {"word_accuracy": _accuracy(logits.detach(), words)})

    def after_step(self, carries: list[None]) -> None:
        """Nothing moves but the weights."""


def _writing(batch: Batch, dec_id: int, context: Context) -> tuple[Pass, Tensor]:
    """The decoder's pass over N tokens, and what each has to predict (N,): the next word, -100 within the prompt."""
    # Each kept token but the last predicts the next, so the last is not read.
    write = Pass(starting_with(batch.ids, dec_id)[:, :-1], batch.keep[:, 1:], causal=True, context=context)
    words = batch.ids[:, 1:].masked_fill(~batch.keep[:, 1:], -100)
    words[:, : batch.prompt] = -100
    return write, write.layout.pack_ids(words)


def _accuracy(logits: Tensor, words: Tensor) -> Tensor:
    """Share of the words (N,) that are the likeliest of their logits (N, vocabulary)."""
    return (logits.argmax(1) == words).sum() / (words != -100).sum()


def _pairwise(a: Tensor, b: Tensor) -> Tensor:
    """Rows a0 b0 a1 b1 ... of (B, T) and (B, U), U >= T: the texts of all processes may be longer than the own."""
    return torch.stack([F.pad(a, (0, b.shape[1] - a.shape[1])), b], 1).flatten(0, 1)
