"""The best model of a run by its scores on held-out data, kept exactly when the run is killed and goes on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from blip import atomic, checkpoint, dist, log
from blip.model import Blip
from blip.tokenizer import Tokenizer
from blip.train import Result

Scores = dict[str, float]


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

    def __init__(self, out: Path, tokenizer: Tokenizer, selected_by: str) -> None:
        self.out, self.folder = out, out / "model"
        self.tokenizer, self.selected_by = tokenizer, selected_by

    def card(self, scores: Scores) -> str:
        """What the model's README.md says."""
        raise NotImplementedError

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
            if answers is not None:
                self._record("validation", answers)
            checkpoint.save_pretrained(model, self.tokenizer, self.folder, card=self.card(scores or {}))
            for file, content in self.beside().items():
                _replace(self.folder / file, content)

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

    def _tested(self, found: dict[str, Any]) -> Scores | None:
        """The test's scores where a finished run has them already."""
        try:
            before = json.loads((self.out / "results.json").read_bytes())
        except (OSError, ValueError):  # not there yet, or not whole
            before = {}
        same = all(before.get(name) == found[name] for name in found)
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
