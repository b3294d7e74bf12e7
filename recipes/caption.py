"""Fine-tune a captioner: the LM loss behind a prompt, and the best epoch by CIDEr (paper, section 5.2).

    accelerate launch -m recipes.caption --config recipes/configs/caption_world.yaml          # 2 cores, minutes
    torchrun --nproc_per_node 8 -m recipes.caption --config recipes/configs/caption_coco.yaml --out runs/captioner

The same command again continues where the last one stopped. The configs say machine, time and score.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blip import atomic, checkpoint, dist, log
from blip.config import CaptionConfig, DataConfig, DecodeConfig, SourceConfig, TrainConfig
from blip.data.errors import DataError
from blip.data.ledger import Ledger
from blip.data.world import scene_of
from blip.data.world_judge import grade, judge
from blip.generate import write
from blip.model import Blip
from blip.objectives import Caption
from blip.tokenizer import Tokenizer
from blip.train import Result, fit
from eval.captioning import captions_of, coco_results, score
from eval.pictures import Pictures
from eval.references import Id, listed
from recipes import command
from recipes.building import ModelChoice, WorldChoice, build_feed, build_model, draw_world

Captions = dict[Id, str]
"""What was written, by image."""
References = Mapping[Id, Sequence[str]]
Grader = Callable[[Captions], dict[str, float]]
"""Captions of all images of a held-out set -> named scores."""
SELECTED_BY = "cider"


@dataclass(frozen=True)
class HeldOut:
    """Pictures with reference captions, which are not trained on."""

    source: SourceConfig
    """Where they are; rows of one image are taken together."""
    limit: int | None = None
    """Images to use, from the first on; all when not given."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be 1 or more, got {self.limit}")


@dataclass(frozen=True)
class Run:
    """A captioning run. Every option can stand in the YAML file of `--config` or be given as `--any.option value`."""

    out: str
    """Folder of the run: model/, results.json, captions-*.json, metrics.jsonl, checkpoints/, config.yaml."""
    model: ModelChoice = field(default_factory=ModelChoice)
    """The model to fine-tune, usually `start_from` a pre-training run's."""
    data: DataConfig = field(default_factory=DataConfig)
    """What it is shown, and the prompt."""
    objective: CaptionConfig = field(default_factory=CaptionConfig)
    """The loss."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How long and how fast."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """How captions of held-out pictures are written."""
    validation: HeldOut | None = None
    """Captioned at every evaluation; the model with the best CIDEr is kept. Without it the last model is."""
    test: HeldOut | None = None
    """Captioned once, at the end, by the model that was kept."""
    world: WorldChoice | None = None
    """Draw the embedded world first."""


def caption(run: Run) -> tuple[Result, Path]:
    """Carry out a run; returns how it ended, with the scores of the model that was kept, and that model's folder.

    The scores are those of results.json: the validation's under their own names, the test's as `test_...`.
    """
    out = Path(run.out)
    dist.start(run.train.timeout)
    model, tokenizer = build_model(run.model, run.train.seed)
    if run.world:
        draw_world(run.world)
    feed, fingerprint = build_feed(run.data, model.vision.image_size, tokenizer, run.train.seed)
    validation = Exam("validation", run.validation, run, model, tokenizer) if run.validation else None
    test = Exam("test", run.test, run, model, tokenizer) if run.test else None
    kept = Kept(out, tokenizer, run)

    def evaluate(objective: nn.Module) -> dict[str, float]:
        captions = validation.captions(objective.model)
        return kept.offer(objective.model, captions, validation.scores(captions))

    result = fit(
        Caption(model, run.objective),
        feed,
        run.train,
        out=out,
        evaluate=evaluate if validation else None,
        settings=dataclasses.asdict(run),
        fingerprint=fingerprint,
        ledger=Ledger(out / f"bad_samples-{dist.rank()}.jsonl", run.data.max_bad_fraction),
    )
    if validation is None:
        kept.write(model)
    return kept.conclude(result, test, next(model.parameters()).device), kept.folder


# Scores ---------------------------------------------------------------------------------------------------------------


class Exam:
    """A held-out set: what a model writes about its pictures, and how good that is."""

    def __init__(self, name: str, held: HeldOut, run: Run, model: Blip, tokenizer: Tokenizer) -> None:
        """Opens it, and tries the first picture, so that what does not fit is said before the training.

        Raises DataError for a picture without references or that is not there, ValueError for a length of captions that
        does not fit the model or the prompt.
        """
        self.pictures = Pictures.open(held.source, held.limit)
        self.tokenizer, self.decode, self.prompt = tokenizer, run.decode, run.data.prompt
        references = self.pictures.references
        if bare := [image for image, captions in references.items() if not captions]:
            raise DataError(f"{name}.source {held.source.path}: no reference captions for {listed(bare)}")
        self.graders = graders(references)
        self.pictures.picture(0)
        side = model.vision.image_size
        write(model.eval(), tokenizer, torch.zeros(1, 3, side, side), run.decode, prompt=self.prompt, keys=[""])

    def captions(self, model: Blip) -> Captions:
        """One caption of each picture; all processes share the work and each returns all."""
        return captions_of(model, self.tokenizer, self.pictures, self.decode, prompt=self.prompt)

    def scores(self, captions: Captions) -> dict[str, float]:
        """What the graders say, as fractions."""
        return {name: value for grader in self.graders for name, value in grader(captions).items()}


def graders(references: References) -> list[Grader]:
    """By what captions of these images are scored: people's captions, and the truth where it is known."""
    return [agreement(references), *truth(references)]


def agreement(references: References) -> Grader:
    """CIDEr, BLEU and ROUGE-L against the references. Words are split without Java: the same on every machine."""
    return lambda captions: score(references, captions, tokenizer="python", resamples=0).values


def truth(images: Iterable[Id]) -> list[Grader]:
    """How much of what is said of the picture world is true; no grader for other pictures."""
    try:
        scenes = {image: scene_of(str(image)) for image in images}
    except ValueError:
        return []

    def told(captions: Captions) -> dict[str, float]:
        found = grade(judge(scene, captions[image]) for image, scene in scenes.items())
        return {f"attribute_{name}": found[name] for name in ("precision", "recall")} | {"all_true": found["true"]}

    return [told]


# The model that is kept -----------------------------------------------------------------------------------------------


class Kept:
    """The best model so far and what it wrote, in the run's folder; metrics.jsonl is the record of what was best."""

    def __init__(self, out: Path, tokenizer: Tokenizer, run: Run) -> None:
        self.out, self.folder = out, out / "model"
        self.tokenizer, self.run = tokenizer, run

    def offer(self, model: Blip, captions: Captions, scores: dict[str, float]) -> dict[str, float]:
        """Write a model that no earlier one equals; returns its scores with `best`, 1 or 0.

        The scores get into metrics.jsonl afterwards: a run that is killed in between evaluates this step again.
        """
        earlier = [line["eval"][SELECTED_BY] for line in self._evaluations()]
        best = dist.from_main(all(scores[SELECTED_BY] > value for value in earlier))
        if best:
            self.write(model, captions, scores)
        return {**scores, "best": float(best)}

    def write(self, model: Blip, captions: Captions | None = None, scores: dict[str, float] | None = None) -> None:
        """Publish a model as the run's, from the main process; all raise if it could not be written."""

        def publish() -> None:
            if captions is not None:
                _replace(self.out / "captions-validation.json", coco_results(captions))
            checkpoint.save_pretrained(model, self.tokenizer, self.folder, card=_card(self.run, scores or {}))

        _in_main(publish)

    def conclude(self, result: Result, test: Exam | None, device: torch.device) -> Result:
        """Put the test set to the model that was kept, write results.json, and give the result those scores."""
        best = dist.from_main(next((line for line in reversed(self._evaluations()) if line["eval"]["best"]), None))
        found: dict[str, Any] = {"steps": result.steps, "kept": result.steps}
        if best:
            scores = {name: value for name, value in best["eval"].items() if name != "best"}
            found |= {"kept": best["step"], "epoch": best["epoch"], "validation": scores}
        if test:
            found["test"] = self._tested(found) or self._test(test, device)
        _in_main(lambda: _replace(self.out / "results.json", json.dumps(found, indent=1) + "\n"))
        if dist.is_main():
            print(f"the model of step {found['kept']} is in {self.folder}, its scores in {self.out / 'results.json'}")
        tested = {f"test_{name}": value for name, value in found.get("test", {}).items()}
        return dataclasses.replace(result, metrics=found.get("validation", {}) | tested)

    def _tested(self, found: dict[str, Any]) -> dict[str, float] | None:
        """The test's scores where a finished run has them already."""
        try:
            before = json.loads((self.out / "results.json").read_bytes())
        except (OSError, ValueError):  # not there yet, or not whole
            before = {}
        same = all(before.get(name) == found[name] for name in found)
        return dist.from_main(before.get("test") if same else None)

    def _test(self, test: Exam, device: torch.device) -> dict[str, float]:
        model, _ = checkpoint.from_pretrained(self.folder, device=device)
        captions = test.captions(model)
        _in_main(lambda: _replace(self.out / "captions-test.json", coco_results(captions)))
        return test.scores(captions)

    def _evaluations(self) -> list[dict[str, Any]]:
        return [line for line in log.read_metrics(self.out / "metrics.jsonl") if "eval" in line]


def _in_main(action: Callable[[], None]) -> None:
    """Write something in the main process; all raise if it could not."""
    failure = None
    if dist.is_main():
        try:
            action()
        except atomic.WriteError as error:
            failure = str(error)
    failure = dist.from_main(failure)
    if failure:
        raise atomic.WriteError(failure)


def _replace(path: Path, content: str) -> None:
    atomic.replace_file(path, content.encode("utf-8", "replace"))


def _card(run: Run, scores: dict[str, float]) -> str:
    start = f"from {run.model.start_from}" if run.model.start_from else "from first weights"
    lines = [f"A captioner, trained {start} with `recipes.caption`; its texts go on from {run.data.prompt!r}.", ""]
    lines += [f"- {source.path} ({source.kind})" for source in run.data.sources]
    lines += [""] + [f"- {name}: {100 * value:.2f}" for name, value in scores.items()]
    return "\n".join(lines)


def main() -> None:
    caption(command.read(Run))


if __name__ == "__main__":
    command.run(main)
