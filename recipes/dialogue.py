"""Fine-tune a model that ranks answers in a dialogue about an image, and keep the best epoch (section 5.5).

    accelerate launch -m recipes.dialogue --config recipes/configs/visdial_world.yaml       # 2 cores
    torchrun --nproc_per_node 8 -m recipes.dialogue --config recipes/configs/visdial.yaml --out runs/visdial

The same command again continues where the last one stopped. The configs say machine, time and score.
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
    """Words kept of a caption, a question or an answer."""
    max_tokens: int = 128
    """Word pieces kept of question, answer and history; the oldest rounds are left out."""
    rounds: int = 4
    """Rounds of each dialogue that are shown at once; they share the image's context."""
    negatives: int = option(2, was="data.wrong")
    """False answers shown beside each true one."""
    hard_negatives: int = option(0, was="data.alike")
    """Of these, how many are hard negatives: worded much like the true answer."""

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
    """Dialogues about images of the synthetic world, drawn to disk before a run unless they are there."""

    folder: str = "runs/world-dialogue"
    train: int = 10000
    """Training dialogues."""
    held_out: int = 100
    """Dialogues of each of val and test."""

    def write(self, split: str, count: int) -> object:
        return dialogues.write(self.folder, split, count, size=self.image_size)


@dataclass(frozen=True)
class DialogueRun(FineTuneRun):
    """A dialogue run. Every option can stand in the YAML file of `--config` or be given as `--any.option value`."""

    caption_sees_image: bool = False
    """Read captions over the image instead of alone."""
    data: DialogueData = field(default_factory=DialogueData)
    validation: HeldOutDialogues | None = None
    """Ranked at every evaluation; the model with the best MRR is kept. Without it the last model is."""
    test: HeldOutDialogues | None = None
    world: DialogueWorld | None = None


def converse(run: DialogueRun) -> tuple[Result, Path]:
    """Carry out a run; returns what `fine_tune` does. ValueError for settings that do not fit."""
    model, tokenizer = begin(run, Dialogue, caption_sees_image=run.caption_sees_image)
    data, longest = run.data, model.config.text.max_positions
    if max(data.max_tokens, data.max_words + 2) > longest:
        raise ValueError(f"data.max_tokens {data.max_tokens} is more than the {longest} positions of the model")
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
    """Dialogues with candidate answers: how far in front a model ranks the right ones."""

    def __init__(self, name: str, held_out: HeldOutDialogues, max_tokens: int, tokenizer: Tokenizer) -> None:
        """Raises DataError for images that are not there, or where no round has its right answer marked."""
        self.source, self.limit = Conversations(held_out.source), held_out.limit
        self.max_tokens, self.tokenizer = max_tokens, tokenizer
        self.source.check_some_exist()
        if not any(one.true is not None for d in self.source.dialogues[: self.limit] for one in d.rounds):
            raise DataError(f"{name}.source {held_out.source.path}: no round has its right answer marked")

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
