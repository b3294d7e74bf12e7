"""What fine-tuning recipes share: a run that keeps its best model by held-out scores, exactly so when it is killed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from blip import dist, files
from blip.checkpoints import checkpoint
from blip.data.draws import Draws
from blip.data.ledger import Ledger
from blip.data.settings import SourceConfig
from blip.data.stream import Stream
from blip.models.blip import Blip
from blip.tensors import read_tensors
from blip.tokenizer import Tokenizer
from blip.train import log
from blip.train.loop import Result, fit

Scores = dict[str, float]
RESULTS = "results.json"


class Exam(Protocol):
    """A held-out set: what a model answers, and how good that is."""

    def answers(self, model: Blip) -> Any:
        """All that the scores are computed of; all processes return the same."""

    def scores(self, answers: Any) -> Scores:
        """Named scores."""


class Kept:
    """The best model so far and what it answered, in the run's folder; metrics.jsonl is the record of what was best."""

    kind: type = Blip
    """The class of the model."""
    selected_by: str
    """Name of the score whose highest value is the best."""

    def __init__(self, out: Path, tokenizer: Tokenizer, run: Any) -> None:
        self.out, self.folder = out, out / "model"
        self.tokenizer, self.run = tokenizer, run

    def about(self, start: str) -> str:
        """What the model is, in a line; `start` says from what it was trained."""
        raise NotImplementedError

    def told(self, score: float) -> str:
        """A score as the model's README.md says it: a fraction in percent, unless overridden."""
        return f"{100 * score:.2f}"

    def card(self, scores: Scores) -> str:
        """What the model's README.md says."""
        start = self.run.model.start_from
        lines = [self.about(f"from {start}" if start else "from first weights"), ""]
        for source in self.run.data.sources:
            lines.append(f"- {source.path} ({source.kind})" if isinstance(source, SourceConfig) else f"- {source.path}")
        return "\n".join([*lines, "", *(f"- {name}: {self.told(value)}" for name, value in scores.items())])

    def written(self, name: str, answers: Any) -> dict[str, str]:
        """File names and contents that keep the answers on `name`, validation or test; none unless overridden."""
        return {}

    def beside(self) -> dict[str, str]:
        """File names and contents that belong into the model's folder; none unless overridden."""
        return {}

    def offer(self, model: Blip, answers: Any, scores: Scores) -> Scores:
        """Write a model that no earlier one equals; returns its scores with `best`, 1 or 0.

        The scores get into metrics.jsonl afterwards: a run that is killed in between evaluates this step again.
        """
        earlier = [line["eval"][self.selected_by] for line in self._evaluations()]
        best = dist.from_main(all(scores[self.selected_by] > value for value in earlier))
        if best:
            self.write(model, answers, scores)
        return {**scores, "best": float(best)}

    def write(self, model: Blip, answers: Any = None, scores: Scores | None = None) -> None:
        """Publish a model as the run's, from the main process; all raise if it could not be written."""

        def publish() -> None:
            said = self.out / RESULTS
            if said.exists() and not self._is_published(model):  # then what was said of the model there does not hold
                said.unlink()
            if answers is not None:
                self._record("validation", answers)
            checkpoint.save_pretrained(model, self.tokenizer, self.folder, card=self.card(scores or {}))
            for file, content in self.beside().items():
                _replace(self.folder / file, content)

        _in_main(publish)

    def _is_published(self, model: Blip) -> bool:
        try:
            there = read_tensors(self.folder / checkpoint.WEIGHTS)
        except (OSError, ValueError):  # not there yet, or not whole
            return False
        return all(name in there and torch.equal(v.cpu(), there[name]) for name, v in model.state_dict().items())

    def conclude(self, result: Result, test: Exam | None, device: torch.device) -> Result:
        """Put the test set to the model that was kept, write results.json, and give the result those scores."""
        best = dist.from_main(next((line for line in reversed(self._evaluations()) if line["eval"]["best"]), None))
        found: dict[str, Any] = {"steps": result.steps, "kept": result.steps}
        if best:
            scores = {name: value for name, value in best["eval"].items() if name != "best"}
            found |= {"kept": best["step"], "epoch": best["epoch"], "validation": scores}
        if test:
            found["test"] = self._tested(found) or self._test(test, device)
        _in_main(lambda: _replace(self.out / RESULTS, json.dumps(found, indent=1) + "\n"))
        if dist.is_main():
            print(f"the model of step {found['kept']} is in {self.folder}, its scores in {self.out / RESULTS}")
        tested = {f"test_{name}": value for name, value in found.get("test", {}).items()}
        return dataclasses.replace(result, metrics=found.get("validation", {}) | tested)

    def _tested(self, found: dict[str, Any]) -> Scores | None:
        """The test's scores where a finished run has them already."""
        try:
            before = json.loads((self.out / RESULTS).read_bytes())
        except (OSError, ValueError):  # not there yet, or not whole
            before = {}
        # Where settings may change, the test set may be another, or be answered in another way.
        same = not self.run.train.allow_change and all(before.get(name) == found[name] for name in found)
        return dist.from_main(before.get("test") if same else None)

    def _test(self, test: Exam, device: torch.device) -> Scores:
        model, _ = checkpoint.from_pretrained(self.folder, self.kind, device=device)
        answers = test.answers(model)
        _in_main(lambda: self._record("test", answers))
        return test.scores(answers)

    def _record(self, name: str, answers: Any) -> None:
        for file, content in self.written(name, answers).items():
            _replace(self.out / file, content)

    def _evaluations(self) -> list[dict[str, Any]]:
        return [line for line in log.read_metrics(self.out / "metrics.jsonl") if "eval" in line]


def fine_tune(
    objective: nn.Module,
    feed: Draws | Stream,
    fingerprint: str,
    run: Any,
    kept: Kept,
    validation: Exam | None,
    test: Exam | None,
) -> tuple[Result, Path]:
    """Train the model of an objective by a recipe's settings, keep the best one and put the test set to it.

    Without a validation set the last model is kept. Returns how the run ended, with the scores of the model that was
    kept, and that model's folder. The scores are those of results.json: the validation's under their own names, the
    test's as `test_...`.
    """
    model = objective.model

    def evaluate(objective: nn.Module) -> Scores:
        answers = validation.answers(objective.model)
        return kept.offer(objective.model, answers, validation.scores(answers))

    result = fit(
        objective,
        feed,
        run.train,
        out=kept.out,
        evaluate=evaluate if validation else None,
        settings=dataclasses.asdict(run),
        fingerprint=fingerprint,
        ledger=Ledger(kept.out / f"bad_samples-{dist.rank()}.jsonl", run.data.max_bad_fraction),
    )
    if validation is None:
        kept.write(model)
    return kept.conclude(result, test, next(model.parameters()).device), kept.folder


def _in_main(action: Callable[[], None]) -> None:
    """Write something in the main process; all raise if it could not."""
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
