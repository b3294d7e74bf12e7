"""CapFilt on the synthetic world in steps, which `recipes.demo` runs once and `recipes.bootstrap` many times.

Create the images, fine-tune a pre-trained model into a captioner and a filter, run CapFilt on the crawl, take the data
set it exports, and measure how much of what was kept is true.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blip.data.settings import SourceConfig
from blip.errors import Stopped
from blip.world import files
from blip.world.judge import Verdict, judge
from blip.world.scene import scene_of
from capfilt.__main__ import main as capfilt
from capfilt.calibrate.grade import Kind
from capfilt.run import Run as Job
from capfilt.select.choose import kept_of, scored_parts
from recipes import caption, command, retrieval
from recipes.building import ModelChoice

CONFIGS = Path(__file__).parent / "configs"
CAPTIONER, FILTER = str(CONFIGS / "caption_world.yaml"), str(CONFIGS / "filter_world.yaml")
BROKEN = 0.0025
"""Share of the crawl's image files that are broken."""
LONGEST = 40
"""Most word pieces of a synthetic text, the prompt included."""
KINDS = {
    "right": "right",
    "mismatched": "of another image",
    "near_miss": "one word wrong",
    "vague": "says nothing",
    "junk_around": "true, surrounded by junk",
    "wrong": "all that are not right",
}
"""Descriptions of the kinds of web texts."""


# Images ---------------------------------------------------------------------------------------------------------------


def draw_crawl(folder: Path, count: int, noise: float, seed: int, size: int, workers: int) -> None:
    """Create tar shards of web texts whose truth is recorded, a few files broken; an existing folder is left alone."""
    if not folder.exists():
        salted = {"web": True, "noise": noise, "broken": round(BROKEN * count)}
        files.write(folder, "tar", count=count, seed=seed, size=size, workers=workers, **salted)


def draw_people(folder: Path, split: str, count: int, seed: int, size: int, workers: int) -> None:
    """Create images with human captions, as a JSON list; an existing list is left alone."""
    if not (folder / f"{split}.json").exists():
        files.write(folder, "json", split, count, seed, size, workers=workers)


# The captioner and the filter -----------------------------------------------------------------------------------------


def captioner(out: Path, start_from: Path, people: list[SourceConfig], batch: int, steps: int) -> caption.CaptionRun:
    """The run that fine-tunes a pre-trained model into a captioner, on images with human captions."""
    settings = command.read(caption.CaptionRun, ["--config", CAPTIONER, "--out", str(out)])
    return _going_on(settings, start_from, people, batch, steps)


def filterer(out: Path, start_from: Path, people: list[SourceConfig], batch: int, steps: int) -> retrieval.RetrievalRun:
    """The run that fine-tunes a pre-trained model into a filter, on the same images."""
    settings = command.read(retrieval.RetrievalRun, ["--config", FILTER, "--out", str(out)])
    return _going_on(settings, start_from, people, batch, steps)


def _going_on(settings: Any, start_from: Path, people: list[SourceConfig], batch: int, steps: int) -> Any:
    """A fine-tuning run's settings with model, sources, batch and steps; the caller adds the held-out sets."""
    return dataclasses.replace(
        settings,
        model=ModelChoice(start_from=str(start_from)),
        data=dataclasses.replace(settings.data, sources=people),
        train=dataclasses.replace(settings.train, steps=steps, batch_size=batch, eval_each_epoch=False),
        validation=None,
        test=None,
        world=None,
    )


# The job --------------------------------------------------------------------------------------------------------------


def carry_out(*args: str | Path) -> None:
    """Run a command line of `python -m capfilt`. Raises Stopped if it fails; capfilt has printed why."""
    status = capfilt([str(arg) for arg in args])
    if status:
        raise Stopped(f"capfilt {args[0]} ended with status {status}; see its message above")


def models(writer: Path, reader: Path, decode: str, max_tokens: int) -> list[str]:
    """The options of a CapFilt plan about captioner and filter."""
    args = ["--captioner", str(writer), "--filter", str(reader), "--decode", decode, "--max-length", str(LONGEST)]
    return [*args, "--max-tokens", str(max_tokens)]


def kept(clean: Path) -> int:
    """Number of texts in an export."""
    return json.loads((clean / "_SUCCESS").read_bytes())["pairs"]


def bootstrapped(clean: Path, people: list[SourceConfig]) -> list[SourceConfig]:
    """Training data of the next model: the texts that were kept, if any, and the human captions."""
    return [*([SourceConfig(str(clean / "*.tar"), kind="web")] if kept(clean) else []), *people]


# The truth ------------------------------------------------------------------------------------------------------------


def synthetic(job: Job, selection: str) -> tuple[list[Verdict], list[Verdict]]:
    """Verdicts on the synthetic texts of a job: on all of them, and on those that a selection keeps."""
    scenes: dict[str, list] = {}
    for part in scored_parts(job):
        rows = job.parts.read(part.pid, ["extra_json", "syn_text"]).to_pylist()
        scenes[part.pid] = [(json.loads(row["extra_json"])["image_id"], row["syn_text"]) for row in rows]
    every = [judge(scene_of(name), text) for rows in scenes.values() for name, texts in rows for text in texts or ()]
    kept = [
        judge(scene_of(scenes[part.pid][row["row"]][0]), row["text"])
        for part, texts in kept_of(job, selection)
        for row in texts.to_pylist()
        if row["text_source"] == "syn"
    ]
    return every, kept


def web_right(kinds: dict[str, Kind], which: int) -> float:
    """Percentage of right texts among all web texts (`which` 0), or among those kept (1)."""
    right, wrong = (kinds[name][which] if name in kinds else 0 for name in ("right", "wrong"))
    return 100 * right / max(1, right + wrong)


def aucs(kinds: dict[str, Kind]) -> dict[str, float]:
    """The filter's ROC AUC on right texts against all wrong web texts, and against each kind of them."""
    by_kind = {"filter_auc" if kind == "wrong" else f"filter_auc_{kind}": k.auc for kind, k in kinds.items()}
    return {name: value for name, value in by_kind.items() if value is not None}


def fates(kinds: dict[str, Kind]) -> list[Sequence[str | float]]:
    """A row for each kind of web text: number, number kept, percentage kept, ROC AUC."""
    return [
        [KINDS.get(kind, kind), f"{k.texts:,}", f"{k.kept:,}", 100 * k.kept / max(1, k.texts),
         "" if k.auc is None else f"{k.auc:.3f}"]
        for kind, k in sorted(kinds.items(), key=lambda one: [*KINDS, one[0]].index(one[0]))
    ]  # fmt: skip


FATES = ("web texts", "number", "kept", "percent", "ROC AUC")


def tested(metrics: dict[str, float]) -> dict[str, float]:
    """A captioner's test scores in percent, without the prefix `test_`."""
    return {n.removeprefix("test_"): 100 * value for n, value in metrics.items() if n.startswith("test_")}
