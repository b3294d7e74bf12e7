"""The whole story on the synthetic world: learn from a noisy crawl, clean it with CapFilt, learn from what is left.

    blip-recipe demo            # `make demo`: 2 CPU cores, less than 10 minutes, no network

TINY is pre-trained on a crawl of which 60% of the texts are wrong and a few images with human captions; fine-tuned on
the latter, it becomes the captioner and the filter of CapFilt, whose data set another TINY is pre-trained on from
scratch, for as many steps (paper, figure 3 and section 4.3). Options are those of `recipes.pretrain`. Writes
report.html and results.json into runs/demo. Started again, it continues, or says again what it found.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from blip import files
from blip.app import page
from blip.checkpoints import checkpoint
from blip.data.settings import SourceConfig
from blip.world.judge import grade as grade_captions
from blip.world.judge import judge
from blip.world.scene import scene_of
from capfilt.calibrate.grade import Kind, grade
from capfilt.run import Run as Job
from eval.retrieval import Gallery, rank
from recipes import caption, command, retrieval, world_capfilt
from recipes.building import WorldChoice
from recipes.pretrain import PretrainRun, pretrain
from recipes.run import HeldOut

CONFIG = "recipes/configs/pretrain_demo.yaml"
SHARE = 0.3
"""Steps of a captioner or a filter, in steps of pre-training."""
HUMAN_SHARE = 0.15
"""Images with human captions, in images of the crawl."""
DECODE, POLICY = "greedy", "web-else-syn"
"""The paper samples, and keeps every text that passes. So small a captioner is wrong too often when it samples (12% of
its texts are true in every word, 33% of the likeliest), and its text is worse than a web text that passes."""
SHOWN = 24
"""Images on the page."""
COMPARED = ("cider", "attribute_precision", "attribute_recall", "all_true")
"""Scores of captions."""
AGAIN = "_bootstrapped"
"""Ends the names of the second model's scores."""
SELECTION, THRESHOLD = "kept", 0.5
"""Of the texts with at least this P(match)."""


def demo(run: PretrainRun) -> dict[str, Any]:
    """Carry out the story and write the page; returns what results.json holds, scores in percent but `filter_auc`."""
    out, clock = Path(run.out), Stopwatch()
    with clock.part("pictures"):
        draw(run.world)
    run = dataclasses.replace(run, world=None)
    people = [source for source in run.data.sources if source.kind == "human"]
    noisy = dataclasses.replace(run, out=str(out / "noisy"))
    with clock.part("pretrain"):
        first, folder = pretrain(noisy)
    with clock.part("captioner"):
        captioning = captioner(noisy, folder, people)
        captioned, writer = caption.caption(captioning)
    with clock.part("filter"):
        _, filtering = retrieval.retrieve(filterer(noisy, folder, people))
    with clock.part("capfilt"):
        job = clean(run, writer, filtering, out)
    sources = world_capfilt.bootstrapped(out / "clean", people)
    again = dataclasses.replace(run, data=dataclasses.replace(run.data, sources=sources))
    with clock.part("pretrain_bootstrapped"):
        second, folder = pretrain(again)
    with clock.part("captioner_bootstrapped"):
        recaptioned, rewriter = caption.caption(captioner(again, folder, people))
    with clock.part("page"):
        kinds, synthetic = grade(job, SELECTION), truth_of_synthetic(job)
        rescored = second.metrics | world_capfilt.tested(recaptioned.metrics)
        scores = {
            **first.metrics, **world_capfilt.tested(captioned.metrics),
            **{f"{name}{AGAIN}": value for name, value in rescored.items()},
            **world_capfilt.aucs(kinds), **synthetic, "texts_kept": world_capfilt.kept(out / "clean"),
            "web_right": world_capfilt.web_right(kinds, 0), "web_right_kept": world_capfilt.web_right(kinds, 1),
            "steps": second.steps,
        }  # fmt: skip
        model, tokenizer = checkpoint.from_pretrained(folder)
        gallery = Gallery.open(run.held_out.source, model.vision.image_size)
        ranked = rank(model, tokenizer, *gallery, k=run.held_out.k).best_texts(3)
        captions = json.loads((rewriter.parent / "captions-test.json").read_text())
        cards = _cards(run, {one["image_id"]: one["caption"] for one in captions}, gallery, ranked)
    scores |= {f"seconds_{name}": seconds for name, seconds in clock.seconds.items()} | {"seconds": clock.total()}
    page.write(out / "report.html", _page(out, scores, kinds, cards, run))
    files.write_bytes(out / "results.json", (json.dumps(scores, indent=1) + "\n").encode())
    return scores


class Stopwatch:
    """Stopwatch: seconds by part of the story."""

    def __init__(self) -> None:
        self.start, self.seconds = time.monotonic(), {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start

    def total(self) -> float:
        return time.monotonic() - self.start


# The parts of the story -----------------------------------------------------------------------------------------------


def draw(world: WorldChoice) -> None:
    """The crawl as tar shards, some files broken, and images with human captions: few to learn from, two sets held out.

    What is there already is left alone.
    """
    folder, size, workers = Path(world.folder), world.image_size, world.workers
    world_capfilt.draw_crawl(folder / "crawl", world.train, world.noise, 0, size, workers)
    few = max(8, round(HUMAN_SHARE * world.train))
    for where, split, count, seed in (
        (folder / "human", "train", few, 1),
        (folder, "val", world.held_out, 0),
        (folder, "test", world.held_out, 0),
    ):
        world_capfilt.draw_people(where, split, count, seed, size, workers)


def captioner(run: PretrainRun, start_from: Path, people: list[SourceConfig]) -> caption.CaptionRun:
    """The captioning run that goes on from a pre-training run, on images with human captions."""
    out, batch = Path(run.out) / "captioner", run.train.batch_size
    validation = SourceConfig(str(Path(run.held_out.source.path).with_name("val.json")))
    return dataclasses.replace(
        world_capfilt.captioner(out, start_from, people, batch, _steps(run)),
        validation=HeldOut(validation, run.held_out.limit),
        test=HeldOut(run.held_out.source, run.held_out.limit),
    )


def filterer(run: PretrainRun, start_from: Path, people: list[SourceConfig]) -> retrieval.RetrievalRun:
    """The retrieval run that makes a filter of a pre-training run's model, on the same images."""
    return world_capfilt.filterer(Path(run.out) / "filter", start_from, people, run.train.batch_size, _steps(run))


def _steps(run: PretrainRun) -> int:
    return max(1, round(SHARE * run.train.steps))


def clean(run: PretrainRun, writer: Path, filtering: Path, out: Path) -> Job:
    """The job on the crawl, as `python -m capfilt run` does it: plan, score, select, export, report, verify.

    Raises Stopped if it fails; the job has printed why.
    """
    inputs = [word for source in run.data.sources if source.kind == "web" for word in ("--input", source.path)]
    args = ["run", *inputs, "--out", out / "capfilt", "--to", out / "clean", "--no-blur"]
    args += ["--name", SELECTION, "--itm", str(THRESHOLD), "--policy", POLICY, "--allow-empty"]
    args += world_capfilt.models(writer, filtering, DECODE, run.data.max_tokens)
    world_capfilt.carry_out(*args, "--part-size", "1024", "--batch", "128")
    return Job.open(str(out / "capfilt"))


def truth_of_synthetic(job: Job) -> dict[str, float]:
    """Percent of the synthetic texts that are true in every word, of all and of those that the filter kept."""
    every, kept = world_capfilt.synthetic(job, SELECTION)
    verdicts_by_name = {"synthetic_true": every, "synthetic_true_kept": kept}
    return {name: 100 * grade_captions(verdicts)["true"] for name, verdicts in verdicts_by_name.items() if verdicts}


# The page -------------------------------------------------------------------------------------------------------------


def _cards(run: PretrainRun, captions: dict[str, str], gallery: Gallery, ranked: list[list[int]]) -> list[page.Card]:
    path = Path(run.held_out.source.path)
    rows = json.loads(path.read_text())[: min(SHOWN, len(captions))]
    return [
        page.Card(
            Image.open(path.parent / row["image"]),
            page.JudgedText(
                captions[row["image_id"]], judge(scene_of(row["image_id"]), captions[row["image_id"]]).true
            ),
            [page.JudgedText(gallery.texts[t], gallery.image_of_text[t] == i) for t in ranked[i]],
            row["caption"][0],
        )
        for i, row in enumerate(rows)
    ]


SIDES = (("the crawl as it is", ""), ("after CapFilt", AGAIN))


def _recalls(scores: dict[str, Any]) -> list[list[str | float]]:
    return [
        [f"{direction}, {stage}, {side}", *(scores[f"{key}@{r}{suffix}{again}"] for r in (1, 5, 10))]
        for direction, key in (("image to text", "tr"), ("text to image", "ir"))
        for stage, suffix in (("ITC alone", "_itc"), ("re-ranked", ""))
        for side, again in SIDES
    ]


def _captions(scores: dict[str, Any]) -> list[list[str | float]]:
    return [[side, *(scores[f"{name}{again}"] for name in COMPARED)] for side, again in SIDES]


def _page(out: Path, scores: dict[str, Any], kinds: dict[str, Kind], items: list[page.Card], run: PretrainRun) -> str:
    def curves(folder: Path) -> str:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        logged = [line for line in lines if "losses" in line]
        names = {"itc": "ITC, contrastive", "itm": "ITM, matching", "lm": "LM, captioning"}
        return page.curves({t: [(one["step"], one["losses"][name]) for one in logged] for name, t in names.items()})

    synthetic = (
        f" Of the captioner's own texts {scores['synthetic_true']:.0f}% are true in every word, of those that the "
        f"filter keeps {scores['synthetic_true_kept']:.0f}%."
        if "synthetic_true_kept" in scores
        else ""
    )
    link = escape(f"capfilt/report/{SELECTION}/report.html")
    return page.page(
        "BLIP on the synthetic world",
        [
            (
                "What happened",
                f"A model of size {run.model.size} was pre-trained from random weights on a crawl of images with web "
                "texts, most of them wrong, and on some more with human captions. On the latter it was made a "
                "captioner and a filter. CapFilt had the captioner write a text for each image of the crawl, and "
                "kept the web text where the filter said that it matches, else the captioner's where it said so of "
                "that. A second model was pre-trained from the same random weights on what was kept and on the "
                f"images with human captions, for the same {scores['steps']} steps of "
                f"{run.train.batch_size} pairs. All in {scores['seconds']:.0f} seconds.",
                "",
            ),
            (
                "What CapFilt made of the crawl",
                f"Right were {scores['web_right']:.0f}% of the web texts, and {scores['web_right_kept']:.0f}% of those "
                f"that were kept.{synthetic} ROC AUC is the chance that the filter gives a right text more than a "
                "wrong one.",
                page.table(world_capfilt.fates(kinds), world_capfilt.FATES)
                + f'<p><a href="{link}">The job\'s own report</a>: every row and text accounted for, images with '
                "what was kept and why.</p>",
            ),
            (
                "Retrieval among held-out images, recall in percent",
                "The right one is among the first 1, 5 or 10, before and after the matching head looks at the best.",
                page.table(_recalls(scores), ["", "R@1", "R@5", "R@10"]),
            ),
            (
                "Captions of held-out images, greedy, percent",
                "By a captioner made of either model, on human captions for as many steps. CIDEr compares with five "
                "reference captions. Every claim about shape, colour, size, place, relation, count and background is "
                "checked against the scene: how many of those made are true, how many of those possible were made, and "
                "how many captions say nothing false.",
                page.table(_captions(scores), ["", "CIDEr", "claims true", "claims made", "captions true"]),
            ),
            ("The three losses on the crawl as it is", "Means over log windows.", curves(out / "noisy")),
            ("The three losses after CapFilt", "Another set of texts, so not to be compared.", curves(out)),
            (
                "What it says of images it has never seen",
                "The second captioner's text, and the three texts that the second model ranks first; a mark says what "
                "is right.",
                page.cards(items),
            ),
        ],
    )


def main() -> None:
    run = command.read(PretrainRun, ["--config", CONFIG, "--out", "runs/demo", *sys.argv[1:]])
    scores = demo(run)
    print(f"\n{'held-out retrieval, recall in percent':<56}  R@1    R@5   R@10")
    for name, *values in _recalls(scores):
        print(f"  {name:<52}", *(f"{value:6.1f}" for value in values))
    print(f"\n{'captions of held-out images, percent':<40}   CIDEr  claims true  claims made  captions true")
    for name, *values in _captions(scores):
        print(f"  {name:<38}", "{:7.1f} {:12.1f} {:12.1f} {:14.1f}".format(*values))
    right, kept, auc = scores["web_right"], scores["web_right_kept"], scores.get("filter_auc", float("nan"))
    print(f"\nright web texts: {right:.1f}% of the crawl, {kept:.1f}% of those kept; the filter's ROC AUC {auc:.3f}")
    print(f"{scores['seconds']:.0f} seconds; {run.out}/report.html, {run.out}/results.json, {run.out}/model")


if __name__ == "__main__":
    command.run(main)
