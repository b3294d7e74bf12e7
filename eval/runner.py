"""Shared parts of evaluations: the model, dividing work among processes, files in `--out`, printing scores.

A task of `blip-eval` is a file with a function `evaluate(options, runner)`. All processes read, and answer with the
model, together; what the main process then yields as (name, number) is printed and written into scores.json.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from blip import dist, files
from blip.app.loaded import Loaded, load
from blip.errors import DataError, without_credentials
from blip.models.blip import Blip
from blip.progress import bar

Part = TypeVar("Part")
Made = TypeVar("Made")
_SCORES = "scores.json"
_BESIDE = ("results.json", "results.csv", "ranks.json", "captions.html")
"""Files that evaluations write beside the scores."""


class Runner:
    """The model, output folder and records of one evaluation."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.out = ResultsFolder(options.out)
        self.facts: dict[str, object] = {}
        """Entries of scores.json after the scores: counts, and the settings that they depend on."""
        self.times = 100.0
        """Factor of the printed scores, as papers print percent; 1 for scores in percent."""
        self.as_they_are: Collection[str] = ()
        """Names of scores that are not fractions, such as ranks and counts."""

    @contextmanager
    def model(self, kind: type = Blip) -> Iterator[Loaded]:
        """Load the model of `--model`, which must be of class `kind`, with its device and precision."""
        loaded = load(self.options.model, self.options.device, self.options.precision, kind)
        with loaded.computing():
            yield loaded

    def record(self, *names: str, **facts: object) -> None:
        """Add facts to scores.json, followed by the given options of these names."""
        self.facts |= facts
        for name in names:
            value = getattr(self.options, name)
            if value is not None:
                self.facts[name] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value

    def unscored(self, name: str, lacking: str) -> None:
        """Print that the answers are in a file and there are no references to score them."""
        print(f"{self.out.where}/{name} is written; without {lacking} there is nothing to score")


def measure(evaluate: Callable[[Any, Runner], Iterator[tuple[str, float | None]]], options: Any) -> None:
    """Run an evaluation; all processes share the work, the main one prints and writes. Passes on its errors."""
    dist.start()
    runner = Runner(options)
    scores = dict(evaluate(options, runner))
    if not scores:  # another process, or nothing to compare with
        return
    print(table(scores, runner.times, runner.as_they_are))
    if runner.out.where:
        runner.out.write(_SCORES, without_credentials(json.dumps(scores | runner.facts, indent=1)) + "\n")
        print(f"in {runner.out.where}: {', '.join(runner.out.written)}")


# Scores and files -----------------------------------------------------------------------------------------------------


def table(scores: Mapping[str, float | None], times: float = 100.0, as_they_are: Collection[str] = ()) -> str:
    """Format scores, one per line, with the 95% interval of those with a `name_low` and a `name_high`."""
    lines = []
    for name, value in scores.items():
        if name.endswith(("_low", "_high")):
            continue
        line = f"{name:<24}{value if name in as_they_are else times * value:7.2f}"
        low, high = (scores.get(name + end) for end in ("_low", "_high"))
        lines.append(line if low is None or high is None else f"{line}   95% {times * low:6.2f} to {times * high:6.2f}")
    return "\n".join(lines)


class ResultsFolder:
    """The folder of `--out`, created at once, before hours of work; None for no folder.

    OSError if it cannot be created; DataError if it holds result files without scores, which are not this program's.
    """

    def __init__(self, where: str | Path | None) -> None:
        self.where = Path(where) if where else None
        self.written: list[str] = []
        if self.where:
            self.where.mkdir(parents=True, exist_ok=True)
            others = [name for name in _BESIDE if (self.where / name).exists()]
            if others and not (self.where / _SCORES).exists():
                raise DataError(
                    f"{self.where / others[0]} would be overwritten, but was not made by an evaluation, as there is "
                    f"no {_SCORES} beside it: give another --out, or move the file"
                )

    def write(self, name: str, content: str) -> None:
        """Write a file atomically."""
        if self.where:
            files.replace_file(self.where / name, content.encode("utf-8", "replace"))
            self.written.append(name)


def listed(rows: Sequence[Mapping[str, object]]) -> str:
    """Format rows as a JSON list with one row per line."""
    return "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"


# Work shared by processes, with the same result for any number of them ------------------------------------------------


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context: the model in eval mode without gradients; restores its mode."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def in_parts(items: Sequence[Part], size: int) -> list[Sequence[Part]]:
    """Split `items` into parts of `size`; the last may be smaller."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def spread(parts: Sequence[Part], work: Callable[[Part], list[Made]], *, what: str = "") -> list[Made]:
    """Apply `work` to each part and concatenate the lists; all processes must call it, and each returns all results.

    The number of processes decides which process does a part, but not the parts, so results do not depend on it. A
    DataError or ValueError in one process is raised in all of them.
    """

    def mine() -> dict[int, list[Made]]:
        numbers, made = range(dist.rank(), len(parts), dist.world()), {}
        with bar(len(numbers), what, "parts", show=dist.is_main()) as progress:
            for number in numbers:
                made[number] = work(parts[number])
                progress.update()
        return made

    shares = together(mine)
    whole = {number: made for share in shares for number, made in share.items()}
    assert len(whole) == len(parts) == sum(map(len, shares)), "a part was done twice or not at all"
    return [one for number in range(len(parts)) for one in whole[number]]


def together(work: Callable[[], Made]) -> list[Made]:
    """Gather the results of `work` in each process; all must call it.

    A DataError or ValueError in one process is raised in all of them, so that none waits for it.
    """
    made = failure = None
    try:
        made = work()
    except (DataError, ValueError) as error:
        failure = error
    shares = dist.gather_objects((made, failure))
    for _, failure in shares:
        if failure:
            raise failure
    return [made for made, _ in shares]
