"""Fine-tune a model that ranks answers in a dialogue about an image; keep the best epoch (section 5.5).

    accelerate launch -m recipes.dialogue --config recipes/configs/visdial_world.yaml       # 2 cores
    torchrun --nproc_per_node 8 -m recipes.dialogue --config recipes/configs/visdial.yaml --out runs/visdial

Repeat the command to continue an interrupted run. Each config states machine, time and score.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from blip.data.prepare.dialogues import Conversations, PrepareDialogues, open_dialogues
from blip.data.settings import Dialogues
from blip.data.transforms import TrainTransform
from blip.errors import DataError
from blip.models.dialogue import Dialogue
from blip.objectives.dialogue import DialogueObjective
from blip.options import option
from blip.tokenizer import Tokenizer
from blip.train.loop import Result
from blip.world import dialogues
from eval.dialogue import MAX_WORDS, Ranks, evalai_json, ranks_of, score
from recipes import command
from recipes.building import TaskData, World, feed_of
from recipes.run import BestModel, Evaluation, FineTuneRun, HeldOut, begin, fine_tune, open_evaluations


@dataclass(frozen=True)
class DialogueData(TaskData):
    """Training data of a dialogue model."""

    sources: list[Dialogues] = field(default_factory=list)
    max_words: int = MAX_WORDS
    """Most words of a caption, a question or an answer; the rest is cut off."""
    max_tokens: int = 128
    """Most word pieces of question, answer and history together; the oldest rounds are dropped."""
    rounds: int = 4
    """Rounds of one dialogue in a training sample; they share the image's context."""
    negatives: int = option(2, was="data.wrong")
    """Negatives per question: false answers beside the true one."""
    hard_negatives: int = option(0, was="data.alike")
    """Hard negatives among them, chosen by word overlap with the true answer ("yes" and "yes it is")."""

    samples = "dialogues"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1 or self.negatives < 1:
            raise ValueError(f"rounds and negatives must be 1 or more, got {self.rounds} and {self.negatives}")
        if not 0 <= self.hard_negatives <= self.negatives:
            raise ValueError(f"hard_negatives must be 0 to negatives ({self.negatives}), got {self.hard_negatives}")


@dataclass(frozen=True)
class HeldOutDialogues(HeldOut):
    """Dialogues that are not trained on."""

    source: Dialogues
    """Source of the dialogues."""


@dataclass(frozen=True)
class DialogueWorld(World):
    """Dialogues about images of the synthetic world, created before the run if missing."""

    folder: str = "runs/world-dialogue"
    train: int = 10000
    """Number of training dialogues."""
    held_out: int = 100
    """Number of dialogues in each of val and test."""

    def write(self, split: str, count: int) -> object:
        return dialogues.write(self.folder, split, count, size=self.image_size)


@dataclass(frozen=True)
class DialogueRun(FineTuneRun):
    """A dialogue run. Every option can stand in the YAML file of `--config` or be given as `--any.option value`."""

    caption_sees_image: bool = False
    """Read captions over the image instead of alone."""
    data: DialogueData = field(default_factory=DialogueData)
    validation: HeldOutDialogues | None = None
    """Held-out set of every evaluation; the model with the best MRR is kept. If unset, the last model is kept."""
    test: HeldOutDialogues | None = None
    world: DialogueWorld | None = None


def converse(run: DialogueRun) -> tuple[Result, Path]:
    """Fine-tune a dialogue model; returns what `fine_tune` does. ValueError for settings that do not fit."""
    model, tokenizer = begin(run, Dialogue, caption_sees_image=run.caption_sees_image)
    data, longest = run.data, model.config.text.max_positions
    if max(data.max_tokens, data.max_words + 2) > longest:
        raise ValueError(
            f"data.max_tokens {data.max_tokens} and data.max_words {data.max_words} + 2 special tokens must not exceed "
            f"the model's {longest} positions"
        )
    sources = open_dialogues(data)
    if not sources:
        raise DataError("no data: give at least one source")
    transform = TrainTransform(model.vision.image_size, data)
    prepare = PrepareDialogues(transform, tokenizer, data, data.rounds, data.negatives, data.hard_negatives)
    held_out = open_evaluations(run, DialogueEvaluation, data.max_tokens, tokenizer)
    about = f"Ranks answers in dialogues about images; trained {run.model.origin} with `recipes.dialogue`."
    best = BestModel(run, tokenizer, held_out, by="mrr", about=about, shown="{:.4f}".format)
    return fine_tune(run, DialogueObjective(model), feed_of(sources, prepare, run.train.seed), best)


class DialogueEvaluation(Evaluation):
    """Ranks of the right answers in dialogues with candidate answers."""

    def __init__(self, name: str, held_out: HeldOutDialogues, max_tokens: int, tokenizer: Tokenizer) -> None:
        """Open the dialogues. Raises DataError for missing images, or if no round has its right answer marked."""
        self.source, self.limit = Conversations(held_out.source), held_out.limit
        self.max_tokens, self.tokenizer = max_tokens, tokenizer
        self.source.check_some_exist()
        if not any(one.true is not None for d in self.source.dialogues[: self.limit] for one in d.rounds):
            raise DataError(f"{name}.source {held_out.source.path}: no round has its right answer marked (gt_index)")

    def answers(self, model: Dialogue) -> Ranks:
        return ranks_of(model, self.tokenizer, self.source, limit=self.limit, max_tokens=self.max_tokens)

    def scores(self, ranks: Ranks) -> dict[str, float]:
        return score(self.source, ranks, limit=self.limit)

    def files(self, name: str, ranks: Ranks) -> dict[str, str]:
        return {f"ranks-{name}.json": evalai_json(ranks)}


def main() -> None:
    converse(command.read(DialogueRun))


if __name__ == "__main__":
    command.run(main)
