"""The whole method on the synthetic world: train on a noisy crawl, clean it with CapFilt, train on the result.

    blip-recipe demo            # `make demo`: 2 CPU cores, less than 10 minutes, no network

TINY is pre-trained on a crawl in which 60% of the texts are wrong and on a few images with human captions. Fine-tuned
on the latter, it becomes CapFilt's captioner and filter; another TINY is pre-trained from scratch on the data set that
CapFilt exports, for as many steps (paper, figure 3 and section 4.3). Options are those of `recipes.pretrain`. Writes
report.html and results.json into runs/demo. Run again, it continues, or prints the results again.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from blip import files
from blip.app import html
from blip.app.html import Figure, PageTable, Section, charts
from blip.app.html.charts import Estimate
from blip.checkpoints import checkpoint
from blip.data.settings import SourceConfig
from blip.world.judge import grade as grade_captions
from blip.world.judge import judge
from blip.world.scene import scene_of
from capfilt.calibrate.audit import wilson
from capfilt.calibrate.grade import Kind, grade
from capfilt.run import Run as Job
from eval.retrieval import Gallery, rank
from recipes import caption, command, retrieval, world_capfilt
from recipes.building import WorldChoice
from recipes.pretrain import PretrainRun, pretrain
from recipes.run import HeldOut

CONFIG = "recipes/configs/pretrain_demo.yaml"
SHARE = 0.3
"""Fine-tuning steps of the captioner and of the filter, as a share of the pre-training steps."""
HUMAN_SHARE = 0.15
"""Number of images with human captions, as a share of the crawl's images."""
DECODE, POLICY = "greedy", "web-else-syn"
"""Decoding and policy. The paper samples, and keeps every text that passes. A captioner this small is wrong too often
when it samples (12% of its texts are true in every word, 33% with greedy decoding), and its text is worse than a web
text that passes."""
SHOWN = 24
"""Number of images on the page."""
COMPARED = ("cider", "attribute_precision", "attribute_recall", "all_true")
"""Caption scores in the report."""
AGAIN = "_bootstrapped"
"""Suffix of the second model's scores."""
SELECTION, THRESHOLD = "kept", 0.5
"""Name of CapFilt's selection, and the lowest P(match) of the texts in it."""
TIMES = "times.json"
"""Seconds spent in each stage by all starts."""


def demo(run: PretrainRun) -> dict[str, Any]:
    """Run the demo and write the page; returns the contents of results.json, scores in percent except `filter_auc`."""
    out = Path(run.out)
    clock = Stopwatch(out / TIMES)
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
    files.write_bytes(out / "report.html", _page(out, scores, kinds, cards, run, len(captions)).encode())
    files.write_bytes(out / "results.json", (json.dumps(scores, indent=1) + "\n").encode())
    return scores


class Stopwatch:
    """Seconds spent in each stage, summed over all starts, in a file; a killed start loses those of its last stage."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_bytes()) if path.exists() else {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
            self.path.parent.mkdir(parents=True, exist_ok=True)
            files.replace_file(self.path, (json.dumps(self.seconds, indent=1) + "\n").encode())

    def total(self) -> float:
        return sum(self.seconds.values())


# Stages ---------------------------------------------------------------------------------------------------------------


def draw(world: WorldChoice) -> None:
    """Create the crawl (tar shards, some files broken) and images with human captions: a small training set, val, test.

    Existing files are left alone.
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
    """The run that fine-tunes a pre-training run's model into a captioner, on images with human captions."""
    out, batch = Path(run.out) / "captioner", run.train.batch_size
    validation = SourceConfig(str(Path(run.held_out.source.path).with_name("val.json")))
    return dataclasses.replace(
        world_capfilt.captioner(out, start_from, people, batch, _steps(run)),
        validation=HeldOut(validation, run.held_out.limit),
        test=HeldOut(run.held_out.source, run.held_out.limit),
    )


def filterer(run: PretrainRun, start_from: Path, people: list[SourceConfig]) -> retrieval.RetrievalRun:
    """The run that fine-tunes a pre-training run's model into a filter, on the same images."""
    return world_capfilt.filterer(Path(run.out) / "filter", start_from, people, run.train.batch_size, _steps(run))


def _steps(run: PretrainRun) -> int:
    return max(1, round(SHARE * run.train.steps))


def clean(run: PretrainRun, writer: Path, filtering: Path, out: Path) -> Job:
    """Run CapFilt on the crawl, as `python -m capfilt run` does: plan, score, select, export, report, verify.

    Raises Stopped if it fails; the job has printed why.
    """
    inputs = [word for source in run.data.sources if source.kind == "web" for word in ("--input", source.path)]
    args = ["run", *inputs, "--out", out / "capfilt", "--to", out / "clean", "--no-blur"]
    args += ["--name", SELECTION, "--itm", str(THRESHOLD), "--policy", POLICY, "--allow-empty"]
    args += world_capfilt.models(writer, filtering, DECODE, run.data.max_tokens)
    world_capfilt.carry_out(*args, "--part-size", "1024", "--batch", "128")
    return Job.open(str(out / "capfilt"))


def truth_of_synthetic(job: Job) -> dict[str, float]:
    """Percentage of synthetic texts that are true in every word, among all and among those that the filter kept."""
    every, kept = world_capfilt.synthetic(job, SELECTION)
    verdicts_by_name = {"synthetic_true": every, "synthetic_true_kept": kept}
    return {name: 100 * grade_captions(verdicts)["true"] for name, verdicts in verdicts_by_name.items() if verdicts}


# The page -------------------------------------------------------------------------------------------------------------


def _cards(run: PretrainRun, captions: dict[str, str], gallery: Gallery, ranked: list[list[int]]) -> list[html.Card]:
    path = Path(run.held_out.source.path)
    rows = json.loads(path.read_text())[: min(SHOWN, len(captions))]
    return [
        html.Card(
            html.thumbnail(Image.open(path.parent / row["image"])),
            row["image_id"],
            [
                html.Line(captions[row["image_id"]], "caption",
                          judge(scene_of(row["image_id"]), captions[row["image_id"]]).true),
                *(html.Line(gallery.texts[t], "" if n else "texts ranked first", gallery.image_of_text[t] == i)
                  for n, t in enumerate(ranked[i])),
            ],
        )
        for i, row in enumerate(rows)
    ]  # fmt: skip


BEFORE_AFTER = ("crawl as it is", "after CapFilt")
SIDES = (("the crawl as it is", ""), (BEFORE_AFTER[1], AGAIN))


def _recalls(scores: dict[str, Any]) -> list[list[str | float]]:
    return [
        [f"{direction}, {stage}, {side}", *(scores[f"{key}@{r}{suffix}{again}"] for r in (1, 5, 10))]
        for direction, key in (("image to text", "tr"), ("text to image", "ir"))
        for stage, suffix in (("ITC alone", "_itc"), ("re-ranked", ""))
        for side, again in SIDES
    ]


def _captions(scores: dict[str, Any]) -> list[list[str | float]]:
    return [[side, *(scores[f"{name}{again}"] for name in COMPARED)] for side, again in SIDES]


def _page(out: Path, scores: dict[str, Any], kinds: dict[str, Kind], items: list[html.Card], run: PretrainRun,
          tested: int) -> str:  # fmt: skip
    def curves(name: str, folder: Path) -> Markup:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        logged = [line for line in lines if "losses" in line]
        names = {"itc": "ITC, contrastive", "itm": "ITM, matching", "lm": "LM, captioning"}
        return charts.curves(name, {t: [(one["step"], one["losses"][n]) for one in logged] for n, t in names.items()})

    changes = _changes(scores, kinds, tested)
    (right, kept), *_ = changes.values()
    synthetic = (
        f" Of the synthetic texts, {scores['synthetic_true']:.0f}% are true in every word; of those that the filter "
        f"keeps, {scores['synthetic_true_kept']:.0f}%."
        if "synthetic_true_kept" in scores
        else ""
    )
    return html.page(
        "sections.html",
        title=f"Right web texts {right.value:.0f}% → {kept.value:.0f}%",
        kind="BLIP on the synthetic world",
        lead="A model learned from a noisy crawl, became a captioner and a filter and cleaned the crawl with CapFilt; "
        "a new model learned from the result.",
        figures=[Figure(f"{after.value:.1f}%", name, f"{before.value:.1f}% with the crawl as it is")
                 for name, (before, after) in changes.items()],
        sections=[
            Section(
                "Before and after",
                f"With 95% intervals. {scores['web_right']:.0f}% of the web texts were right, and "
                f"{scores['web_right_kept']:.0f}% of those that were kept.{synthetic} Recall is how often, among "
                "held-out images, the text ranked first for an image, or the image ranked first for a text, is right.",
                [charts.slope(name, *ends, BEFORE_AFTER, high=100, digits=1) for name, ends in changes.items()],
                is_narrow=True,
            ),
            Section(
                "Captions and retrieval on unseen images",
                "The second captioner's text, and the three texts that the second model ranks first, each marked right "
                "or wrong.",
                cards=items,
            ),
            Section(
                "What was done",
                f"A model of size {run.model.size} was pre-trained from random weights on a crawl of images with web "
                "texts, most of them wrong, and on some images with human captions. On the latter it was fine-tuned "
                "into a captioner and a filter. For each image of the crawl, CapFilt generated a synthetic caption, "
                "kept the web text if the filter accepted it, and otherwise the synthetic caption if the filter "
                "accepted that. A second model was pre-trained from the same random weights on the texts kept and on "
                f"the images with human captions, for the same {scores['steps']} steps of "
                f"{run.train.batch_size} pairs. All starts together took {scores['seconds']:,.0f} seconds.",
                link=("CapFilt's report: every row and text accounted for, and images with the texts kept and why",
                      f"capfilt/report/{SELECTION}/report.html"),
            ),
            Section(
                "The three losses",
                "Means over log windows. The two charts cannot be compared: the texts differ.",
                [curves("On the crawl as it is", out / "noisy"), curves("After CapFilt", out)],
            ),
        ],
        tables=[
            PageTable(
                "Web texts by kind", list(world_capfilt.FATES), world_capfilt.fates(kinds),
                "ROC AUC is the probability that the filter scores a right text above a wrong one.",
            ),
            PageTable(
                "Retrieval among held-out images, recall in percent", ["direction", "R@1", "R@5", "R@10"],
                _recalls(scores),
                "How often a right one is among the first 1, 5 or 10, before and after the matching head re-ranks.",
            ),
            PageTable(
                "Captions of held-out images, greedy, percent",
                ["captioner", "CIDEr", "claims true", "claims made", "captions true"], _captions(scores),
                "By a captioner fine-tuned from each model, on human captions for the same number of steps. CIDEr "
                "compares with five reference captions. Every claim about shape, colour, size, place, relation, count "
                "and background is checked against the scene: the share of claims made that are true, the share of "
                "possible claims that were made, and the share of captions that say nothing false.",
            ),
        ],
    )  # fmt: skip


def _changes(scores: dict[str, Any], kinds: dict[str, Kind], tested: int) -> dict[str, tuple[Estimate, Estimate]]:
    """Shares in percent before and after CapFilt, with 95% intervals; `tested` is the number of held-out images.

    The intervals count each image once, so that of text-to-image recall, with several texts of an image, is wide.
    """
    texts = [sum(kinds[name][which] for name in ("right", "wrong") if name in kinds) for which in (0, 1)]
    changes = {
        "Right web texts": (_estimate(scores["web_right"], texts[0]), _estimate(scores["web_right_kept"], texts[1]))
    }
    for name, column in (("Recall, image to text", "tr@1"), ("Recall, text to image", "ir@1"),
                         ("Captions without a false claim", "all_true")):  # fmt: skip
        changes[name] = (_estimate(scores[column], tested), _estimate(scores[f"{column}{AGAIN}"], tested))
    return changes


def _estimate(percent: float, count: int) -> Estimate:
    low, high = wilson(percent / 100, max(1, count))
    return Estimate(percent, 100 * low, 100 * high)


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
