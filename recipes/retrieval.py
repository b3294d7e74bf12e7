"""Fine-tune for retrieval, which also gives CapFilt's filter: ITC + ITM, and the best epoch by recall (section 5.1).

    accelerate launch -m recipes.retrieval --config recipes/configs/filter_world.yaml        # 2 cores, minutes
    torchrun --nproc_per_node 8 -m recipes.retrieval --config recipes/configs/retrieval_coco.yaml --out runs/retrieval

The same command again continues where the last one stopped. The configs say machine, time and score.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from blip import dist
from blip.data.settings import DataConfig
from blip.models.blip import Blip
from blip.objectives.retrieval import Retrieval, RetrievalConfig
from blip.tokenizer import Tokenizer
from blip.train.loop import Result
from blip.train.settings import TrainConfig
from eval.retrieval import Ranking, rank
from recipes import command, keeping
from recipes.building import ModelChoice, WorldChoice, build_feed, build_model, draw_world
from recipes.pretrain import Held, gallery


@dataclass(frozen=True)
class Run:
    """A retrieval run. Every option can stand in the YAML file of `--config` or be given as `--any.option value`."""

    out: str
    """Folder of the run: model/, results.json, metrics.jsonl, checkpoints/, config.yaml."""
    model: ModelChoice = field(default_factory=ModelChoice)
    """The model to fine-tune, usually `start_from` a pre-training run's."""
    data: DataConfig = field(default_factory=lambda: DataConfig(max_tokens=35))
    """What it is shown."""
    objective: RetrievalConfig = field(default_factory=RetrievalConfig)
    """The two losses."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How long and how fast."""
    validation: Held | None = None
    """Searched at every evaluation; the model with the best mean recall is kept. Without it the last model is."""
    test: Held | None = None
    """Searched once, at the end, with the model that was kept."""
    world: WorldChoice | None = None
    """Draw the embedded world first."""


def retrieve(run: Run) -> tuple[Result, Path]:
    """Carry out a run; returns how it ended, with the scores of the model that was kept, and that model's folder.

    The scores are those of results.json: the validation's under their own names, the test's as `test_...`. ValueError
    for settings that do not fit.
    """
    if run.data.prompt.strip():
        raise ValueError(f"data.prompt {run.data.prompt!r}: texts are compared without a prompt, leave it out")
    dist.start(run.train.timeout)
    model, tokenizer = build_model(run.model, run.train.seed)
    if run.world:
        draw_world(run.world)
    feed, fingerprint = build_feed(run.data, model.vision.image_size, tokenizer, run.train.seed)
    validation = Exam("validation", run.validation, run, model, tokenizer) if run.validation else None
    test = Exam("test", run.test, run, model, tokenizer) if run.test else None
    kept = Kept(Path(run.out), tokenizer, run)
    return keeping.fine_tune(Retrieval(model, run.objective), feed, fingerprint, run, kept, validation, test)


class Exam:
    """A held-out set: how a model ranks its texts and pictures, and how often the right ones come first."""

    def __init__(self, name: str, held: Held, run: Run, model: Blip, tokenizer: Tokenizer) -> None:
        """Opens it; raises as `gallery` does."""
        self.gallery = gallery(name, held, model.vision.image_size)
        self.tokenizer, self.k, self.max_tokens = tokenizer, held.k, run.data.max_tokens

    def answers(self, model: Blip) -> Ranking:
        """The set's pictures and texts compared with each other; every process does all of it."""
        return rank(model, self.tokenizer, *self.gallery, k=self.k, max_tokens=self.max_tokens)

    def scores(self, answers: Ranking) -> dict[str, float]:
        """Recalls in percent."""
        return answers.recalls(torch.as_tensor(self.gallery.image_of_text))


class Kept(keeping.Kept):
    """The model with the best mean recall."""

    selected_by = "mean_recall"

    def about(self, start: str) -> str:
        return f"For retrieval, and as a filter of image-text pairs; trained {start} with `recipes.retrieval`."

    def told(self, score: float) -> str:
        return f"{score:.2f}"


def main() -> None:
    retrieve(command.read(Run))


if __name__ == "__main__":
    command.run(main)
