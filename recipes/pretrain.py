"""Pre-train BLIP on image-text pairs: ITC + ITM + LM with a momentum teacher (paper, section 3.2), or CLIP's contrast.

    accelerate launch -m recipes.pretrain --config recipes/configs/pretrain_world.yaml        # 2 cores, minutes
    accelerate launch -m recipes.pretrain --config recipes/configs/clip_world.yaml            # CLIP, minutes
    torchrun --nproc_per_node 8 -m recipes.pretrain --config recipes/configs/pretrain_base.yaml --out runs/base

Repeat the command to continue an interrupted run. Each config states machine, time and score.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from blip import dist
from blip.checkpoints import checkpoint
from blip.data.settings import DataConfig, SourceConfig
from blip.errors import DataError
from blip.models.blip import Blip
from blip.objectives.clip import Clip, ClipConfig
from blip.objectives.objective import Objective
from blip.objectives.pretrain import Pretrain, PretrainConfig
from blip.origin import union
from blip.train.loop import Result
from blip.train.settings import TrainConfig
from eval.retrieval import Gallery, retrieval
from recipes import command
from recipes.building import ModelChoice, WorldChoice, build_feed
from recipes.run import begin, card, measured, train


@dataclass(frozen=True)
class HeldOutPairs:
    """Held-out pairs on which retrieval is measured."""

    source: SourceConfig
    """Source of the pairs."""
    limit: int | None = None
    """Number of images to use, from the first on; all by default."""
    k: int = 128
    """Candidates that the matching head re-ranks; unused with `clip`, which trains no matching head."""


@dataclass(frozen=True)
class PretrainRun:
    """A pre-training run. Every option can stand in the YAML file of `--config` or be given as `--any.option value`."""

    out: str
    """Folder of the run: model/, checkpoints/, metrics.jsonl, bad_samples-*.jsonl, config.yaml."""
    model: ModelChoice = field(default_factory=ModelChoice)
    """The model and its first weights."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training data."""
    objective: PretrainConfig = field(default_factory=PretrainConfig)
    """Settings of the three losses."""
    clip: ClipConfig | None = None
    """CLIP's in-batch contrastive loss instead of the three losses; `{}` for its defaults."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Schedule, optimizer and checkpoints."""
    held_out: HeldOutPairs | None = None
    """Held-out pairs, evaluated during and after the run."""
    world: WorldChoice | None = None
    """Synthetic world to create before the run."""


def gallery(name: str, held_out: HeldOutPairs, image_size: int, remote: bool = False) -> Gallery:
    """Open a held-out set, with `remote` also one behind addresses, so that its errors show before training.

    Raises DataError for unusable rows or if there are no captions, ValueError for a `k` or `limit` below 1.
    """
    for option, value in (("k", held_out.k), ("limit", held_out.limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name}.{option} must be 1 or more, got {value}")
    opened = Gallery.open(held_out.source, image_size, limit=held_out.limit, remote=remote)
    if not opened.texts:
        raise DataError(f"{name}.source {held_out.source.path}: no captions")
    next(iter(opened.images))
    return opened


def build_objective(run: PretrainRun, model: Blip) -> Objective:
    """The objective that a run's settings ask for."""
    return Clip(model, run.clip) if run.clip else Pretrain(model, run.objective)


def pretrain(run: PretrainRun) -> tuple[Result, Path]:
    """Pre-train a model; returns how the run ended, and the model's folder."""
    out = Path(run.out)
    model, tokenizer = begin(run)
    data = build_feed(run.data, model.vision.image_size, tokenizer, run.train.seed)
    trained_on = union(run.model.trained_on(), data[0].origins)
    objective = build_objective(run, model)
    evaluate = None
    if run.held_out:
        images_and_texts = gallery("held_out", run.held_out, model.vision.image_size, run.data.remote)
        k, length = 0 if run.clip else run.held_out.k, run.data.max_tokens

        def evaluate(objective: Objective) -> dict[str, float]:
            return retrieval(objective.model, tokenizer, *images_and_texts, k=k, max_tokens=length)

    result = train(run, objective, data, evaluate)
    if dist.is_main():
        about = f"Pre-trained for {result.steps} steps on {result.samples} pairs with `recipes.pretrain`."
        if run.clip:
            about += "\n\nCLIP's contrast trained the two towers only; match head and decoder keep their first weights."
        scores = measured("validation", run.held_out, result.metrics, "{:.2f}".format) if run.held_out else []
        facts = card(about, run.data.sources, scores, "classify" if run.clip else None)
        checkpoint.save_pretrained(model, tokenizer, out / "model", facts, trained_on=trained_on)
        print(f"model written to {out / 'model'}")
    return result, out / "model"


def main() -> None:
    pretrain(command.read(PretrainRun))


if __name__ == "__main__":
    command.run(main)
