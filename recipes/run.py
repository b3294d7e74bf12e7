"""Shared by training recipes: how a run starts and trains, and which model is kept by held-out scores.

A fine-tuning recipe states its settings (`FineTuneRun`), what it measures (an `Evaluation`), and hands model, data and
objective to `fine_tune`. A run killed at any point resumes to the same result.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blip import dist, files
from blip.checkpoints import checkpoint
from blip.checkpoints.card import Facts, Measured, Use
from blip.data.ledger import Ledger
from blip.data.settings import DataConfig, SourceConfig
from blip.errors import without_credentials
from blip.models.blip import Blip
from blip.origin import union
from blip.tensors import read_tensors
from blip.tokenizer import Tokenizer
from blip.train import log
from blip.train.loop import Result, fit
from blip.train.settings import TrainConfig
from recipes.building import Model, ModelChoice, TrainingData, World, build_task

Scores = dict[str, float]
RESULTS = "results.json"


# Settings -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOut:
    """Held-out images with reference captions, or other data with right answers."""

    source: SourceConfig
    """Source of the data; rows of the same image are merged."""
    limit: int | None = None
    """Number of examples to use, from the first on; all by default."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be 1 or more, got {self.limit}")


@dataclass(frozen=True)
class FineTuneRun:
    """A fine-tuning run. Every option can stand in the YAML file of `--config` or be given as `--any.option value`."""

    out: str
    """Folder of the run: model/, results.json, held-out answers, metrics.jsonl, checkpoints/, config.yaml."""
    model: ModelChoice = field(default_factory=ModelChoice)
    """The model to fine-tune; `start_from` is usually a pre-training run's model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training data."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Schedule, optimizer and checkpoints."""
    validation: HeldOut | None = None
    """Held-out set of every evaluation; the best model is kept. If unset, the last model is kept."""
    test: HeldOut | None = None
    """Held-out set on which the kept model is measured once, at the end."""
    world: World | None = None
    """Synthetic world to create before the run."""


# Training -------------------------------------------------------------------------------------------------------------


def begin(run: Any, kind: type[Model] = Blip, **shape: Any) -> tuple[Model, Tokenizer]:
    """Start the processes, build the model and create the world of a run; `kind` and `shape` are as in `build_task`."""
    dist.start(run.train.timeout)
    built = build_task(kind, run.model, run.train.seed, **shape)
    if run.world:
        run.world.draw()
    return built


def train(
    run: Any, objective: nn.Module, data: TrainingData, evaluate: Callable[[nn.Module], Scores] | None = None
) -> Result:
    """Train by a run's settings, resuming from its newest checkpoint."""
    feed, fingerprint = data
    out = Path(run.out)
    return fit(
        objective,
        feed,
        run.train,
        out=out,
        evaluate=evaluate,
        settings=dataclasses.asdict(run),
        fingerprint=fingerprint,
        remote_files=feed.remote_files(),
        ledger=Ledger(out / f"bad_samples-{dist.rank()}.jsonl", run.data.max_bad_fraction),
    )


def card(about: str, sources: Sequence[Any], scores: Sequence[Measured], use: Use | None = None) -> Facts:
    """Facts for the card of a model: description, training data, scores."""
    lines = [f"{s.path} ({s.kind})" if isinstance(s, SourceConfig) else str(s.path) for s in sources]
    return Facts(about, list(map(without_credentials, lines)), scores, use)


def measured(split: str, held_out: Any, scores: Scores, shown: Callable[[float], str]) -> list[Measured]:
    """Scores on a held-out set, as the card shows them."""
    source = held_out.source
    path = Path(without_credentials(str(source.path)))
    name = "/".join(part for part in (path.parent.name, path.name.partition(".")[0]) if part)
    split = getattr(source, "split", None) or split
    return [Measured(name, split, metric, float(shown(value))) for metric, value in scores.items()]


def fine_tune(run: FineTuneRun, objective: nn.Module, data: TrainingData, best: BestModel) -> tuple[Result, Path]:
    """Train the model of an objective, keep the best one, and test it.

    Without a validation set the last model is kept. Returns how the run ended, with the kept model's scores, and that
    model's folder. The scores are those of results.json: validation scores under their own names, test scores as
    `test_...`.
    """
    best.trained_on = union(run.model.trained_on(), data[0].origins)
    validation = best.evaluations.get("validation")

    def evaluate(objective: nn.Module) -> Scores:
        answers = validation.answers(objective.model)
        return best.offer(objective.model, answers, validation.scores(answers))

    result = train(run, objective, data, evaluate if validation else None)
    if validation is None:
        best.write(objective.model)
    return best.conclude(result, objective.model), best.folder


# Held-out scores ------------------------------------------------------------------------------------------------------


class Evaluation:
    """A held-out set, and how a model answers and is scored on it.

    It is opened before training, so that unsuitable data is reported first.
    """

    def answers(self, model: Any) -> Any:
        """Compute the answers that are scored; all processes return the same."""
        raise NotImplementedError

    def scores(self, answers: Any) -> Scores:
        """Compute scores by name."""
        raise NotImplementedError

    def files(self, name: str, answers: Any) -> dict[str, str]:
        """Names and contents of the answer files of `name`, validation or test; none by default."""
        return {}


def open_evaluations(run: FineTuneRun, kind: Callable[..., Evaluation], *given: Any) -> dict[str, Evaluation]:
    """Open the held-out sets of a run, each as `kind(name, settings, *given)`; returns them by name."""
    return {name: kind(name, settings, *given) for name in ("validation", "test") if (settings := getattr(run, name))}


def percent(score: float) -> str:
    """Format a fraction in percent."""
    return f"{100 * score:.2f}"


class BestModel:
    """The best model so far and its answers, in the run's folder; metrics.jsonl records which was best."""

    def __init__(
        self,
        run: FineTuneRun,
        tokenizer: Tokenizer,
        evaluations: Mapping[str, Evaluation],
        *,
        by: str,
        about: str,
        shown: Callable[[float], str] = percent,
        use: Use | None = None,
        beside: Mapping[str, str] | None = None,
    ) -> None:
        """`by` names the score of which the highest value is best.

        `about` begins the model's README.md, `shown` formats the scores there, `use` is what the model is for, if its
        class does not say; `beside` has names and contents of
        further files of the model's folder.
        """
        self.out = Path(run.out)
        self.folder = self.out / "model"
        self.run, self.tokenizer, self.evaluations = run, tokenizer, evaluations
        self.by, self.about, self.shown, self.use, self.beside = by, about, shown, use, beside or {}
        self.trained_on: tuple[str, ...] = ()
        """Origins of the images that the model has seen."""

    def offer(self, model: Any, answers: Any, scores: Scores) -> Scores:
        """Write a model if it beats all earlier ones; returns its scores with `best`, 1 or 0.

        The scores reach metrics.jsonl afterwards: a run killed in between evaluates this step again.
        """
        earlier = [line["eval"][self.by] for line in self._evaluated()]
        best = dist.from_main(all(scores[self.by] > value for value in earlier))
        if best:
            self.write(model, answers, scores)
        return {**scores, "best": float(best)}

    def write(self, model: Any, answers: Any = None, scores: Scores | None = None) -> None:
        """Publish a model as the run's, in the main process; all processes raise if it cannot be written."""

        def publish() -> None:
            results = self.out / RESULTS
            if results.exists() and not self._is_published(model):  # scores of the model that is being replaced
                results.unlink()
            if answers is not None:
                self._record("validation", answers)
            facts = self._facts({"validation": scores} if scores else {})
            checkpoint.save_pretrained(model, self.tokenizer, self.folder, facts, trained_on=self.trained_on)
            for file, content in self.beside.items():
                _replace(self.folder / file, content)

        _in_main(publish)

    def _facts(self, scores: Mapping[str, Scores]) -> Facts:
        """Facts for the card, with the scores on some of the held-out sets."""
        rows = [row for name, of in scores.items() for row in measured(name, getattr(self.run, name), of, self.shown)]
        return card(self.about, self.run.data.sources, rows, self.use)

    def _is_published(self, model: Any) -> bool:
        try:
            there = read_tensors(self.folder / checkpoint.WEIGHTS)
        except (OSError, ValueError):  # missing or incomplete
            return False
        return all(name in there and torch.equal(v.cpu(), there[name]) for name, v in model.state_dict().items())

    def conclude(self, result: Result, model: Any) -> Result:
        """Test the kept model, write results.json, and return the result with these scores.

        The kept model is loaded with the class and onto the device of `model`.
        """
        best = dist.from_main(next((line for line in reversed(self._evaluated()) if line["eval"]["best"]), None))
        results: dict[str, Any] = {"steps": result.steps, "kept": result.steps}
        if best:
            scores = {name: value for name, value in best["eval"].items() if name != "best"}
            results |= {"kept": best["step"], "epoch": best["epoch"], "validation": scores}
        if "test" in self.evaluations:
            results["test"] = self._tested(results) or self._test(model)
            facts = self._facts({name: results[name] for name in ("validation", "test") if name in results})
            _in_main(lambda: checkpoint.write_card(self.folder, model, facts, trained_on=self.trained_on))
        _in_main(lambda: _replace(self.out / RESULTS, json.dumps(results, indent=1) + "\n"))
        if dist.is_main():
            print(f"the model of step {results['kept']} is in {self.folder}, its scores in {self.out / RESULTS}")
        tested = {f"test_{name}": value for name, value in results.get("test", {}).items()}
        return dataclasses.replace(result, metrics=results.get("validation", {}) | tested)

    def _tested(self, results: dict[str, Any]) -> Scores | None:
        """Test scores of an earlier run that finished, if still valid."""
        try:
            before = json.loads((self.out / RESULTS).read_bytes())
        except (OSError, ValueError):  # missing or incomplete
            before = {}
        # If settings may change, so may the test set, or how it is answered.
        same = not self.run.train.allow_change and all(before.get(name) == results[name] for name in results)
        return dist.from_main(before.get("test") if same else None)

    def _test(self, model: Any) -> Scores:
        best, _ = checkpoint.from_pretrained(self.folder, type(model), device=next(model.parameters()).device)
        test = self.evaluations["test"]
        answers = test.answers(best)
        _in_main(lambda: self._record("test", answers))
        return test.scores(answers)

    def _record(self, name: str, answers: Any) -> None:
        for file, content in self.evaluations[name].files(name, answers).items():
            _replace(self.out / file, content)

    def _evaluated(self) -> list[dict[str, Any]]:
        return [line for line in log.read_metrics(self.out / "metrics.jsonl") if "eval" in line]


def _in_main(action: Callable[[], None]) -> None:
    """Run `action`, which writes files, in the main process; all processes raise if it fails."""
    failure = None
    if dist.is_main():
        try:
            action()
        except files.WriteError as error:
            failure = str(error)
    failure = dist.from_main(failure)
    if failure:
        raise files.WriteError(failure)


def _replace(path: Path, content: str) -> None:
    files.replace_file(path, content.encode("utf-8", "replace"))
