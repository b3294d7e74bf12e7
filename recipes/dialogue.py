"""Fine-tune a model that ranks answers in a dialogue about a picture, and keep the best epoch (section 5.5).

    accelerate launch -m recipes.dialogue --config recipes/configs/visdial_world.yaml       # 2 cores
    torchrun --nproc_per_node 8 -m recipes.dialogue --config recipes/configs/visdial.yaml --out runs/visdial

The same command again continues where the last one stopped. The configs say machine, time and score.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from blip import dist
from blip.data.loader import Feed
from blip.data.prepare.dialogues import Conversations, DialoguePairs
from blip.data.settings import DataConfig, Dialogues
from blip.data.transforms import TrainTransform
from blip.errors import DataError
from blip.models.dialogue import Dialogue
from blip.objectives.dialogue import Dialogue as Objective
from blip.tokenizer import Tokenizer
from blip.train.loop import Result
from blip.train.settings import TrainConfig
from blip.world import dialogues
from eval.dialogue import MAX_WORDS, Ranks, evalai_json, ranks_of, score
from recipes import command, keeping
from recipes.building import ModelChoice, build_task, draw_splits


@dataclass(frozen=True)
class Data(DataConfig):
    """What the model is shown."""

    sources: list[Dialogues] = field(default_factory=list)
    """The sources of a run, mixed by weight."""
    max_words: int = MAX_WORDS
    """Words kept of a caption, a question or an answer."""
    max_tokens: int = 128
    """Word pieces that are read of question, answer and history; the oldest rounds are left out."""
    crop_scale_min: float = 0.5
    """Smallest share of the picture that a random crop shows; 1 shows the whole picture."""
    rounds: int = 4
    """Rounds of each dialogue that are shown at once; they share the picture's context."""
    wrong: int = 2
    """False answers shown beside each true one."""
    alike: int = 0
    """How many of the false answers are worded much like the true one, as "yes" and "yes it is"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streaming or self.prompt.strip():
            raise ValueError("data.streaming and data.prompt are not for dialogues")
        if self.rounds < 1 or self.wrong < 1:
            raise ValueError(f"rounds and wrong must be 1 or more, got {self.rounds} and {self.wrong}")
        if not 0 <= self.alike <= self.wrong:
            raise ValueError(f"alike must be 0 to wrong ({self.wrong}), got {self.alike}")


@dataclass(frozen=True)
class Held:
    """Dialogues that are not trained on."""

    source: Dialogues
    """Where they are."""
    limit: int | None = None
    """Dialogues to use, from the first on; all when not given."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be 1 or more, got {self.limit}")


@dataclass(frozen=True)
class World:
    """Dialogues about the embedded world, drawn to disk before a run unless they are there."""

    folder: str = "runs/world-dialogue"
    """Where they go: FOLDER/train.json, FOLDER/val.json and FOLDER/test.json with their pictures."""
    train: int = 10000
    """Training dialogues."""
    held_out: int = 100
    """Dialogues of each of val and test."""
    image_size: int = 64
    """Side, pixels."""


@dataclass(frozen=True)
class Run:
    """A run. Every option can stand in the YAML file of `--config` or be given as `--any.option value`."""

    out: str
    """Folder of the run: model/, results.json, ranks-*.json, metrics.jsonl, checkpoints/, config.yaml."""
    model: ModelChoice = field(default_factory=ModelChoice)
    """The model to fine-tune, usually `start_from` a pre-training run's."""
    caption_sees_image: bool = False
    """Read captions over the image instead of alone."""
    data: Data = field(default_factory=Data)
    """What it is shown."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How long and how fast."""
    validation: Held | None = None
    """Ranked at every evaluation; the model with the best MRR is kept. Without it the last model is."""
    test: Held | None = None
    """Ranked once, at the end, by the model that was kept."""
    world: World | None = None
    """Draw the embedded world first."""


def converse(run: Run) -> tuple[Result, Path]:
    """Carry out a run; returns how it ended, with the scores of the model that was kept, and that model's folder.

    The scores are those of results.json: the validation's under their own names, the test's as `test_...`. ValueError
    for settings that do not fit.
    """
    dist.start(run.train.timeout)
    model, tokenizer = build_task(Dialogue, run.model, run.train.seed, caption_sees_image=run.caption_sees_image)
    longest = model.config.text.max_positions
    if max(run.data.max_tokens, run.data.max_words + 2) > longest:
        raise ValueError(f"data.max_tokens {run.data.max_tokens} is more than the {longest} positions of the model")
    if run.world:
        draw_splits(run.world, partial(dialogues.write, run.world.folder, size=run.world.image_size))
    sources = [Conversations(source) for source in run.data.sources]
    if not sources:
        raise DataError("no data: give at least one source")
    transform, data = TrainTransform(model.vision.image_size, run.data), run.data
    pairs = DialoguePairs(sources, transform, tokenizer, data, run.train.seed, data.rounds, data.wrong, data.alike)
    validation = Exam("validation", run.validation, run, tokenizer) if run.validation else None
    test = Exam("test", run.test, run, tokenizer) if run.test else None
    kept = Kept(Path(run.out), tokenizer, run)
    return keeping.fine_tune(Objective(model), Feed(pairs), pairs.fingerprint(), run, kept, validation, test)


class Exam:
    """A held-out set: how a model ranks the candidate answers, and where the right ones come."""

    def __init__(self, name: str, held: Held, run: Run, tokenizer: Tokenizer) -> None:
        """Opens it, so that what does not fit is said before the training.

        Raises DataError for pictures that are not there, or where no round has its right answer marked.
        """
        self.source, self.limit, self.tokenizer = Conversations(held.source), held.limit, tokenizer
        self.max_tokens = run.data.max_tokens
        self.source.check_some_exist()
        if not any(one.true is not None for d in self.source.dialogues[: self.limit] for one in d.rounds):
            raise DataError(f"{name}.source {held.source.path}: no round has its right answer marked")

    def answers(self, model: Dialogue) -> Ranks:
        """The ranks of all candidates; all processes share the work and each returns all."""
        return ranks_of(model, self.tokenizer, self.source, limit=self.limit, max_tokens=self.max_tokens)

    def scores(self, answers: Ranks) -> dict[str, float]:
        """MRR, recalls and NDCG as fractions, and the mean rank."""
        return score(self.source, answers, limit=self.limit)


class Kept(keeping.Kept):
    """The model with the best mean reciprocal rank, and how it ranked."""

    kind = Dialogue
    selected_by = "mrr"

    def about(self, start: str) -> str:
        return f"Ranks answers in dialogues about pictures; trained {start} with `recipes.dialogue`."

    def told(self, score: float) -> str:
        return f"{score:.4f}"

    def written(self, name: str, answers: Ranks) -> dict[str, str]:
        return {f"ranks-{name}.json": evalai_json(answers)}


def main() -> None:
    converse(command.read(Run))


if __name__ == "__main__":
    command.run(main)
