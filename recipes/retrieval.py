"""Fine-tune for retrieval, or as CapFilt's filter: ITC + ITM; keep the best epoch by recall (section 5.1).

    accelerate launch -m recipes.retrieval --config recipes/configs/filter_world.yaml        # 2 cores, minutes
    torchrun --nproc_per_node 8 -m recipes.retrieval --config recipes/configs/retrieval_coco.yaml --out runs/retrieval

Repeat the command to continue an interrupted run. Each config states machine, time and score.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from blip.data.settings import DataConfig
from blip.models.blip import Blip
from blip.objectives.retrieval import Retrieval, RetrievalConfig
from blip.tokenizer import Tokenizer
from blip.train.loop import Result
from eval.retrieval import Ranking, rank
from recipes import command
from recipes.building import WorldChoice, build_feed
from recipes.pretrain import HeldOutPairs, gallery
from recipes.run import BestModel, Evaluation, FineTuneRun, begin, fine_tune, open_evaluations


@dataclass(frozen=True)
class RetrievalRun(FineTuneRun):
    """A retrieval run. Every option can stand in the YAML file of `--config` or be given as `--any.option value`."""

    data: DataConfig = field(default_factory=lambda: DataConfig(max_tokens=35))
    objective: RetrievalConfig = field(default_factory=RetrievalConfig)
    """Settings of the two losses."""
    validation: HeldOutPairs | None = None
    """Held-out set of every evaluation; the model with the best mean recall is kept. If unset, the last one is kept."""
    test: HeldOutPairs | None = None
    world: WorldChoice | None = None


def retrieve(run: RetrievalRun) -> tuple[Result, Path]:
    """Fine-tune a retrieval model; returns what `fine_tune` does. ValueError for a prompt."""
    if run.data.prompt.strip():
        raise ValueError(f"data.prompt {run.data.prompt!r}: retrieval compares texts without a prompt; leave it out")
    model, tokenizer = begin(run)
    data = build_feed(run.data, model.vision.image_size, tokenizer, run.train.seed)
    held_out = open_evaluations(run, RetrievalEvaluation, run, model, tokenizer)
    about = f"For retrieval, and as a filter of image-text pairs; trained {run.model.origin} with `recipes.retrieval`."
    best = BestModel(run, tokenizer, held_out, by="mean_recall", about=about, shown="{:.2f}".format, use="classify")
    return fine_tune(run, Retrieval(model, run.objective), data, best)


class RetrievalEvaluation(Evaluation):
    """Recall of image-text retrieval, in percent."""

    def __init__(self, name: str, held_out: HeldOutPairs, run: RetrievalRun, model: Blip, tokenizer: Tokenizer) -> None:
        """Open the pairs; raises as `gallery` does."""
        self.gallery = gallery(name, held_out, model.vision.image_size, run.data.remote)
        self.tokenizer, self.k, self.max_tokens = tokenizer, held_out.k, run.data.max_tokens

    def answers(self, model: Blip) -> Ranking:
        return rank(model, self.tokenizer, *self.gallery, k=self.k, max_tokens=self.max_tokens)

    def scores(self, ranking: Ranking) -> dict[str, float]:
        return ranking.recalls(torch.as_tensor(self.gallery.image_of_text))


def main() -> None:
    retrieve(command.read(RetrievalRun))


if __name__ == "__main__":
    command.run(main)
