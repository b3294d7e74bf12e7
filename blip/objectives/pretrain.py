"""What is learned: a batch in, named losses out. The training loop sums them.

B batch, C candidates for negatives (B, or the batches of all processes), T text tokens, P image tokens, E width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip import dist
from blip.models import families, protocols
from blip.models.blip import Blip, starting_with
from blip.nn.context import Context
from blip.nn.text import TextPass
from blip.objectives import losses
from blip.objectives.batch import Batch, DialogueBatch, QuestionBatch, SentenceBatch
from blip.objectives.losses import Embeddings, Similarities
from blip.objectives.teacher import IdQueue, Queue, Teacher
from blip.settings import check_rates, require


def _check_contrast(settings: PretrainConfig | RetrievalConfig) -> None:
    """What the contrastive parts of two objectives share."""
    require(settings.queue_size >= 0, f"queue_size must be 0 or more, got {settings.queue_size}")
    require(
        settings.queue_size <= _MOST_QUEUED, f"queue_size must be at most {_MOST_QUEUED:,}, got {settings.queue_size}"
    )
    require(0 <= settings.momentum <= 1, f"momentum must be in [0, 1], got {settings.momentum}")
    require(0 <= settings.alpha <= 1, f"alpha must be in [0, 1], got {settings.alpha}")
    check_rates(settings, "alpha_ramp_epochs", "negative_floor")
    low, high = settings.temperature_min, settings.temperature_max
    ordered = 0 < low <= high < float("inf")
    require(ordered, f"temperature_min {low} and temperature_max {high} must be positive, the first not the larger")


_MOST_QUEUED = 1 << 22
"""Features in a queue; beyond that it is memory that is queued."""


@dataclass(frozen=True)
class PretrainConfig:
    """The three pre-training losses (paper, section 3.2) and their momentum teacher."""

    queue_size: int = 57600
    """Momentum features kept per modality; any size, 0 for none."""
    momentum: float = 0.995
    """Decay of the teacher's moving average, per step."""
    alpha: float = 0.4
    """Weight of the teacher's soft targets in the contrastive loss."""
    alpha_ramp_epochs: float = 2.0
    """Epochs over which alpha rises linearly from 0."""
    temperature_min: float = 0.001
    """Lower clamp of the learned temperature."""
    temperature_max: float = 0.5
    """Upper clamp of the learned temperature."""
    label_smoothing: float = 0.1
    """Of the language-modelling loss."""
    negative_floor: float = 1e-4
    """Added to each hard-negative sampling weight, so that no row underflows."""
    negatives_all_ranks: bool = False
    """Draw hard negatives from the batches of all processes, not only the local one."""
    teacher_dropout: bool = False
    """Leave dropout on in the teacher (2022: true)."""

    def __post_init__(self) -> None:
        _check_contrast(self)
        require(0 <= self.label_smoothing < 1, f"label_smoothing must be in [0, 1), got {self.label_smoothing}")


@dataclass(frozen=True)
class RetrievalConfig:
    """The retrieval fine-tune, which also gives a filter: ITC and ITM (paper, section 5.1), with a momentum teacher."""

    queue_size: int = 57600
    """Momentum features kept per modality, with the ids of their images; any size, 0 for none."""
    momentum: float = 0.995
    """Decay of the teacher's moving average, per step."""
    alpha: float = 0.4
    """Weight of the teacher's soft targets in the contrastive loss."""
    alpha_ramp_epochs: float = 1.0
    """Epochs over which alpha rises linearly from 0."""
    temperature_min: float = 0.001
    """Lower clamp of the learned temperature."""
    temperature_max: float = 0.5
    """Upper clamp of the learned temperature."""
    negative_floor: float = 0.0
    """Added to each hard-negative sampling weight; without it a row that underflows draws evenly from other images."""
    negatives_all_ranks: bool = False
    """Draw hard negatives from the batches of all processes, not only the local one."""
    teacher_dropout: bool = False
    """Leave dropout on in the teacher (2022: true)."""

    def __post_init__(self) -> None:
        _check_contrast(self)


@dataclass(frozen=True)
class CaptionConfig:
    """The fine-tuning of a captioner (paper, section 5.2); the prompt is the data's."""

    label_smoothing: float = 0.1
    """Of the language-modelling loss."""

    def __post_init__(self) -> None:
        require(0 <= self.label_smoothing < 1, f"label_smoothing must be in [0, 1), got {self.label_smoothing}")


@dataclass(frozen=True)
class VqaConfig:
    """The fine-tuning of question answering (paper, section 5.3)."""

    label_smoothing: float = 0.1
    """Of the loss of an answer's words."""

    def __post_init__(self) -> None:
        require(0 <= self.label_smoothing < 1, f"label_smoothing must be in [0, 1), got {self.label_smoothing}")


class Outcome(NamedTuple):
    """What an objective says of one batch."""

    losses: dict[str, Tensor]
    """Named scalars; the loop adds them up."""
    health: dict[str, Tensor]
    """Named detached scalars worth watching."""
    carry: Any = None
    """What `after_step` needs of this batch."""


class _Aligned(nn.Module):
    """What ITC and ITM need: a momentum teacher, feature queues, and passes of texts over right and wrong images.

    `forward` changes nothing: the teacher and the queues move in `after_step`.
    """

    def __init__(self, model: Blip, config: PretrainConfig | RetrievalConfig) -> None:
        super().__init__()
        protocols.require(model, protocols.Embeds, protocols.Matches)
        self.config = config
        self.model = model
        self.teacher = Teacher(model)
        self.image_queue = Queue(config.queue_size, model.config.embed_dim)
        self.text_queue = Queue(config.queue_size, model.config.embed_dim)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.teacher.train(mode and self.config.teacher_dropout)
        return self

    def _embed(self, batch: Batch) -> tuple[Tensor, Embeddings, Embeddings]:
        """The student's image tokens (B, P, V), its embeddings and the teacher's."""
        model = self.model
        tokens = model.vision(batch.image)
        student = Embeddings(model.embed_image(tokens), model.embed_text(batch.ids, batch.keep))
        with torch.no_grad():
            towers = self.teacher.towers
            seen = towers.vision(batch.image)
            teacher = Embeddings(towers.embed_image(seen), towers.embed_text(batch.ids, batch.keep))
        return tokens, student, teacher

    def _contrast(
        self, student: Embeddings, teacher: Embeddings, epoch: float, *same: Tensor
    ) -> tuple[Tensor, Similarities]:
        """ITC and the batch's cosines; `epoch` sets the weight of soft targets."""
        config = self.config
        alpha = config.alpha * min(1.0, epoch / config.alpha_ramp_epochs) if config.alpha_ramp_epochs else config.alpha
        queues = self.image_queue.features, self.text_queue.features
        with torch.autocast(student.image.device.type, enabled=False):
            return losses.contrastive(student, teacher, *queues, self.model.temperature, alpha, *same)

    @property
    def _everywhere(self) -> bool:
        """Whether negatives come from other processes, too."""
        return self.config.negatives_all_ranks and dist.world() > 1

    def _passes(
        self, batch: Batch, tokens: Tensor, context: Context, image_of_text: Tensor, text_of_image: Tensor
    ) -> tuple[TextPass, TextPass]:
        """Each image with its text and a wrong one, each text with a wrong image; for `_match`."""
        ids, keep = starting_with(batch.ids, self.model.config.text.enc_id), batch.keep
        if self._everywhere:
            all_ids, all_keep = dist.gather_padded(ids), dist.gather_padded(keep)
            others = dist.gather_with_gradient(tokens).index_select(0, image_of_text)
            other_context = self.model.context(others)
            other_ids, other_keep = all_ids[text_of_image], all_keep[text_of_image]
        else:
            other_context, other_ids, other_keep = context[image_of_text], ids[text_of_image], keep[text_of_image]
        # Two texts look at each image in its own place: the right one and a wrong one.
        own = TextPass(_pairwise(ids, other_ids), _pairwise(keep, other_keep), context=context.expand(2), first=True)
        return own, TextPass(ids, keep, context=other_context, first=True)

    def _match(self, own_states: Tensor, other_states: Tensor) -> Tensor:
        """Match logits (3 B, 2): right pairs, texts with a wrong image, images with a wrong text."""
        right, wrong = own_states.view(len(other_states), 2, -1).unbind(1)
        return self.model.match_head(torch.cat([right, other_states, wrong]))

    @torch.no_grad()
    def _health(
        self, cosines: Similarities, match_logits: Tensor, same: Tensor, counted: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`same` (B, B): which pairs are of one image; `counted` (3 B,): which match logits count, or all."""
        batch = len(same)
        correct = (match_logits.argmax(1) == losses.match_labels(match_logits, batch)).float()
        wrong = correct[batch:].mean() if counted is None else _mean(correct[batch:], counted[batch:])
        return {
            "itc_recall_i2t": same.gather(1, cosines.image_to_text.argmax(1)[:, None]).float().mean(),
            "itc_recall_t2i": same.gather(1, cosines.text_to_image.argmax(1)[:, None]).float().mean(),
            "itm_accuracy_match": correct[:batch].mean(),
            "itm_accuracy_mismatch": wrong,
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


class Pretrain(_Aligned):
    """ITC + ITM + LM with a momentum teacher and feature queues (paper, section 3.2).

    ITM and LM share one projection of the image and run side by side through the transformer's shared layers.
    """

    config: PretrainConfig

    def __init__(self, model: Blip, config: PretrainConfig) -> None:
        super().__init__(model, config)
        protocols.require(model, protocols.Generates)

    def forward(self, batch: Batch, epoch: float) -> Outcome:
        """The three losses of a batch; `epoch` (passes over the data so far) sets the weight of soft targets."""
        model, config = self.model, self.config
        tokens, student, teacher = self._embed(batch)
        itc, cosines = self._contrast(student, teacher, epoch)
        context = model.context(tokens)
        own, other = self._passes(batch, tokens, context, *self._negatives(student, teacher, cosines))
        write, words = _writing(batch, model.config.text.dec_id, context)
        own_states, other_states, write_states = model.med([own, other, write])
        match_logits = self._match(own_states, other_states)
        word_logits = model.med.vocabulary(write_states)
        found = {
            "itc": itc,
            "itm": losses.matching(match_logits.float(), positives=len(batch)),
            "lm": losses.captioning(word_logits.float(), words, config.label_smoothing),
        }
        same = torch.eye(len(batch), dtype=torch.bool, device=tokens.device)
        return Outcome(found, self._health(cosines, match_logits, same), teacher)

    def _negatives(self, student: Embeddings, teacher: Embeddings, cosines: Similarities) -> tuple[Tensor, Tensor]:
        """For each text a wrong image, and for each image a wrong text (B,)."""
        t2i, i2t = cosines.text_to_image, cosines.image_to_text
        own = torch.arange(len(t2i), device=t2i.device)
        if self._everywhere:
            with torch.no_grad():
                i2t = student.image @ dist.gather(teacher.text).T
                t2i = student.text @ dist.gather(teacher.image).T
            own = own + dist.rank() * len(t2i)
        temperature, floor = self.model.temperature, self.config.negative_floor
        image_of_text = losses.hard_negatives(t2i, temperature, floor, own)
        return image_of_text, losses.hard_negatives(i2t, temperature, floor, own)


class Seen(NamedTuple):
    """What the retrieval objective's queues take of a batch."""

    features: Embeddings
    """The teacher's."""
    image_ids: Tensor
    """(B,)"""


class Retrieval(_Aligned):
    """ITC + ITM where pairs of one image are all right: fine-tuning for retrieval, and CapFilt's filter (section 5.1).

    `Batch.image_ids` says which pairs are of one image. They share the contrastive target, over batch and queue, and
    are not drawn as negatives. Where all pairs are of one image there is none, and the matching loss does without.
    """

    config: RetrievalConfig

    def __init__(self, model: Blip, config: RetrievalConfig) -> None:
        super().__init__(model, config)
        self.id_queue = IdQueue(config.queue_size)

    def forward(self, batch: Batch, epoch: float) -> Outcome:
        """The two losses of a batch; `epoch` sets the weight of soft targets. ValueError for a batch without ids."""
        if batch.image_ids is None:
            raise ValueError("the retrieval objective needs Batch.image_ids: which pairs are of one image")
        model, ids = self.model, batch.image_ids
        tokens, student, teacher = self._embed(batch)
        same = ids[:, None] == torch.cat([ids, self.id_queue.features])
        itc, cosines = self._contrast(student, teacher, epoch, same)
        context = model.context(tokens)
        image_of_text, image_found, text_of_image, text_found = self._negatives(ids, student)
        own_states, other_states = model.med(self._passes(batch, tokens, context, image_of_text, text_of_image))
        match_logits = self._match(own_states, other_states)
        counted = torch.cat([torch.ones_like(image_found), image_found, text_found])
        found = {"itc": itc, "itm": losses.matching(match_logits.float(), len(batch), counted)}
        health = self._health(cosines, match_logits, same[:, : len(batch)], counted)
        health["itm_without_negative"] = 1 - counted[len(batch) :].float().mean()
        return Outcome(found, health, Seen(teacher, ids))

    @torch.no_grad()
    def _negatives(self, ids: Tensor, student: Embeddings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For each text a wrong image and whether there is one (B,), and for each image a wrong text likewise."""
        # Drawn by what the student itself finds alike, as in the original; in pre-training it is student and teacher.
        images, texts, others = student.image, student.text, ids
        if self._everywhere:
            images, texts, others = dist.gather(images), dist.gather(texts), dist.gather(ids)
        same, temperature, floor = ids[:, None] == others, self.model.temperature, self.config.negative_floor
        image_of_text = losses.negatives_of_other_images(student.text @ images.T, temperature, floor, same)
        return *image_of_text, *losses.negatives_of_other_images(student.image @ texts.T, temperature, floor, same)

    @torch.no_grad()
    def after_step(self, carries: list[Seen]) -> None:
        """As in pre-training; the ids enter their queue together with the features."""
        super().after_step([seen.features for seen in carries])
        for seen in carries:
            self.id_queue.push(dist.gather(seen.image_ids))


class Caption(nn.Module):
    """LM alone: what makes a captioner of a pre-trained model (paper, section 5.2).

    The prompt that the batch's texts begin with is read and not learned.
    """

    def __init__(self, model: Blip, config: CaptionConfig) -> None:
        super().__init__()
        protocols.require(model, protocols.Generates)
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


class Vqa(nn.Module):
    """The words of people's answers, each answer by its weight: what fine-tunes question answering (section 5.3)."""

    def __init__(self, model: families.vqa.Vqa, config: VqaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = model

    def forward(self, batch: QuestionBatch, epoch: float) -> Outcome:
        """The loss of a batch, per question; `epoch` changes nothing."""
        model, text = self.model, self.model.config.text
        image = model.question.context(model.vision(batch.image))
        questions = model.context(starting_with(batch.ids, text.enc_id), batch.keep, image)
        write = _reading(batch.answer_ids, batch.answer_keep, text.dec_id, questions[batch.question])
        words = batch.answer_ids[:, 1:].masked_fill(~batch.answer_keep[:, 1:], -100)
        weights = write.layout.pack_ids(batch.weights[:, None].expand_as(words))
        words = write.layout.pack_ids(words)
        (states,) = model.answer([write])
        logits = model.answer.vocabulary(states).float()
        found = {"vqa": losses.answering(logits, words, weights, len(batch), self.config.label_smoothing)}
        return Outcome(found, {"word_accuracy": _accuracy(logits.detach(), words)})

    def after_step(self, carries: list[None]) -> None:
        """Nothing moves but the weights."""


class Nlvr(nn.Module):
    """True or false of several pictures: what makes a model for NLVR2 of a pre-trained one (paper, section 5.4)."""

    def __init__(self, model: families.nlvr.Nlvr) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: SentenceBatch, epoch: float) -> Outcome:
        """The cross-entropy of a batch; `epoch` changes nothing."""
        model = self.model
        ids = starting_with(batch.ids, model.config.text.enc_id)
        logits = model.judge(ids, batch.keep, model.contexts(batch.image)).float()
        accuracy = (logits.detach().argmax(1) == batch.labels).float().mean()
        return Outcome({"nlvr": F.cross_entropy(logits, batch.labels)}, {"accuracy": accuracy})

    def after_step(self, carries: list[None]) -> None:
        """Nothing moves but the weights."""


class Dialogue(nn.Module):
    """True answers told from false ones, as ITM tells right texts from wrong ones (paper, section 5.5)."""

    def __init__(self, model: families.dialogue.Dialogue) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: DialogueBatch, epoch: float) -> Outcome:
        """The matching loss of a batch; `epoch` changes nothing."""
        model, choices = self.model, batch.choices
        context = model.context(batch.image, batch.caption_ids, batch.caption_keep)
        logits = model.match(batch.ids, batch.keep, context.expand(len(batch.ids) // len(batch))).float()
        rounds = logits.view(-1, choices, 2)
        found = losses.matching(torch.cat([rounds[:, 0], rounds[:, 1:].flatten(0, 1)]), positives=len(rounds))
        with torch.no_grad():
            best = (rounds[..., 1] - rounds[..., 0]).argmax(1)
            health = {"answer_accuracy": (best == 0).float().mean()}
        return Outcome({"itm": found}, health)

    def after_step(self, carries: list[None]) -> None:
        """Nothing moves but the weights."""


def _writing(batch: Batch, dec_id: int, context: Context) -> tuple[TextPass, Tensor]:
    """The decoder's pass over N tokens, and what each has to predict (N,): the next word, -100 within the prompt."""
    write = _reading(batch.ids, batch.keep, dec_id, context)
    words = batch.ids[:, 1:].masked_fill(~batch.keep[:, 1:], -100)
    words[:, : batch.prompt] = -100
    return write, write.layout.pack_ids(words)


def _reading(ids: Tensor, keep: Tensor, dec_id: int, context: Context) -> TextPass:
    # Each kept token but the last predicts the next, so the last is not read.
    return TextPass(starting_with(ids, dec_id)[:, :-1], keep[:, 1:], causal=True, context=context)


def _accuracy(logits: Tensor, words: Tensor) -> Tensor:
    """Share of the words (N,) that are the likeliest of their logits (N, vocabulary)."""
    return (logits.argmax(1) == words).sum() / (words != -100).sum()


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of the values (N,) that are counted; 0 when none is."""
    return torch.where(counted, values, 0).sum() / counted.sum().clamp(min=1)


def _pairwise(a: Tensor, b: Tensor) -> Tensor:
    """Rows a0 b0 a1 b1 ... of (B, T) and (B, U), U >= T: the texts of all processes may be longer than the own."""
    return torch.stack([F.pad(a, (0, b.shape[1] - a.shape[1])), b], 1).flatten(0, 1)
