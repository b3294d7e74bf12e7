"""What the bootstrapping experiment leaves: results.json, table.md, times.json, and the page that explains them.

The page is for someone who has read no paper: what the crawl looked like, what was dropped and written, and what that
changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip import files
from blip.app import page
from blip.world.judge import judge
from blip.world.scene import draw, scene_of
from capfilt.calibrate.grade import Kind
from capfilt.run import Run as Job
from capfilt.select.choose import kept_of, scored_parts
from recipes import world_capfilt
from recipes.bootstrap import stages, table
from recipes.bootstrap.rows import ROWS

if TYPE_CHECKING:
    from recipes.bootstrap.settings import BootstrapRun

PARTS = ("pretrain", "captioner", "retrieval", "composition")
SIDE = 160
"""Of the images on the page, pixels."""
SHOWN_ROWS = ("neither", "both")
"""Whose captions are set side by side."""


# Scores ---------------------------------------------------------------------------------------------------------------


def complete(plan: stages.Stages) -> list[str]:
    """`seed-0/both` and so on: what is done to the end."""
    names = dict.fromkeys(name.rpartition("/")[0] for name in plan.stages if name.endswith("/composition"))
    return [name for name in names if plan.done([f"{name}/{part}" for part in PARTS])]


def scores_of(plan: stages.Stages) -> dict[str, dict[int, dict[str, float]]]:
    """Scores by row, seed and column of all that is done to the end."""
    scores: dict[str, dict[int, dict[str, float]]] = {}
    for name in complete(plan):
        seed, row = name.removeprefix("seed-").split("/")
        scores.setdefault(row, {})[int(seed)] = _scores(plan, name.split("/")[0], row)
    return scores


def _scores(plan: stages.Stages, seed: str, row: str) -> dict[str, float]:
    trained, captioned, searched, composed = (plan.results(f"{seed}/{row}/{part}") for part in PARTS)
    scores = {**searched, **captioned}
    scores |= {f"{name}_zero_shot": trained[name] for name in trained if name.startswith(("tr@", "ir@"))}
    scores |= {f"{name}_composition": value for name, value in composed.items() if name != "captions"}
    scores |= {"steps": trained["steps"], "pairs": trained["pairs"], "noise_kept": 100.0}
    if cleaner := ROWS[row].cleaner:
        kept = dict(plan.results(f"{seed}/capfilt/{cleaner}")[ROWS[row].keep])
        del kept["kinds"]
        if ROWS[row].keep == "captioner":  # nothing was filtered
            kept = {name: value for name, value in kept.items() if not name.startswith("filter_auc")}
        scores |= kept
    return scores


# Files ----------------------------------------------------------------------------------------------------------------


def write(plan: stages.Stages, run: BootstrapRun) -> dict[str, Any]:
    """Write all files anew from the stages that are done; returns what results.json holds, in which is no time."""
    out, scores = Path(run.out), scores_of(plan)
    out.mkdir(parents=True, exist_ok=True)
    results = table.results(scores)
    seconds = {name: record["seconds"] for name in plan.stages if (record := plan.record(name))}
    files.replace_file(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    files.replace_file(out / "times.json", (json.dumps(seconds, indent=1) + "\n").encode())
    files.replace_file(out / "table.md", (table.markdown(scores) or "nothing is done to the end yet\n").encode())
    files.replace_file(out / "report.html", _page(plan, run, scores, seconds).encode())
    return results


# The page -------------------------------------------------------------------------------------------------------------


def _page(plan: stages.Stages, run: BootstrapRun, scores: table.Scores, seconds: dict[str, float]) -> str:
    sections = [("The question", _question(run), "")]
    seed = min(scores.get("both", {}), default=None)
    if seed is not None:
        sections += _crawl(plan, run, seed)
    if scores:
        sections += _changed(plan, run, scores, seed)
        sections += _tables(scores)
    sections.append(_made(run, seconds))
    return page.page("What captioning and filtering a noisy crawl are worth", sections)


def _question(run: BootstrapRun) -> str:
    world = run.world
    return (
        "Images on the web come with texts, and most of these do not say what the image shows. A model that learns "
        "from such pairs learns noise. The BLIP paper's answer: train a model on the noisy pairs all the same; make of "
        "it, with a few images that people have described, a captioner that writes a text for every image of the "
        "crawl and a filter that throws out texts, found or written, that do not match; and train a new model on what "
        "is left. Is the new model better, and which part does it? Here that is asked in a small world that draws "
        f"itself, so that the truth about every text is known. The crawl has {world.crawl:,} images, and "
        f"{100 * world.noise:.0f}% of its texts are not right; people have described {world.people:,} others."
    )


def _crawl(plan: stages.Stages, run: BootstrapRun, seed: int) -> list[tuple[str, str, str]]:
    """What the crawl looked like, and what became of its texts, with some images."""
    folder = Path(run.out) / f"seed-{seed}" / "capfilt" / "own"
    kept = plan.results(f"seed-{seed}/capfilt/own")["both"]
    kinds = {kind: Kind(**one) for kind, one in kept["kinds"].items() if one["texts"]}
    written = (
        f"Of the captioner's texts the filter threw out {kept['synthetic_rejected']:.0f}%; of all of them "
        f"{kept['synthetic_wrong_before']:.0f}% say something false"
    )
    if "synthetic_wrong" in kept:
        written += (
            f", of those that were kept {kept['synthetic_wrong']:.0f}%, where {kept['synthetic_claims_wrong']:.0f}% of "
            "the single claims about shape, colour, size, place and number are false"
        )
    fates = list(_fates(Job.open(str(folder / "job")), run.shown))
    link = f"seed-{seed}/capfilt/own/job/report/both/report.html"
    return [
        (
            "What the crawl looked like, and what was dropped and written",
            f"Images of the crawl of seed {seed}: the text that was found with each, the text that the captioner "
            "wrote, and what the filter made of both. Ticks and crosses say what is true, which neither captioner nor "
            "filter was ever told.",
            page.notes(fates, SIDE),
        ),
        (
            "What the filter made of the found texts",
            f"{written}. ROC AUC is the chance that the filter gives a right text more than a wrong one of that kind.",
            page.table(world_capfilt.fates(kinds), world_capfilt.FATES)
            + f'<p><a href="{link}">The job\'s own report</a> accounts for every row and text.</p>',
        ),
    ]


def _fates(job: Job, count: int) -> Iterator[page.Note]:
    """Images of the crawl with both texts and what became of them, the kinds of web texts in turn."""
    kept: dict[tuple[str, int], set[str]] = {}
    for part, texts in kept_of(job, "both"):
        for row in texts.to_pylist():
            kept.setdefault((part.pid, row["row"]), set()).add(row["text_source"])
    by_kind: dict[str, list[page.Note]] = {}
    for part in scored_parts(job):
        rows = job.parts.read(part.pid, ["status", "extra_json", "web_text", "syn_text"]).to_pylist()
        for number, row in enumerate(rows):
            extra = json.loads(row["extra_json"] or "{}")
            if row["status"] != "ok" or len(by_kind.setdefault(extra["kind"], [])) >= count:
                continue
            by_kind[extra["kind"]].append(_fate(extra, row, kept.get((part.pid, number), set())))
    kinds = [by_kind[kind] for kind in world_capfilt.KINDS if kind in by_kind]
    turns = [notes[turn] for turn in range(count) for notes in kinds if turn < len(notes)]
    yield from turns[:count]


def _fate(extra: dict[str, Any], row: dict[str, Any], kept: set[str]) -> page.Note:
    scene = scene_of(extra["image_id"])
    lines = [
        (f"found, {'kept' if 'web' in kept else 'dropped'}", page.JudgedText(text, extra["kind"] == "right"))
        for text in row["web_text"]
    ] + [
        (f"written, {'kept' if 'syn' in kept else 'dropped'}", page.JudgedText(text, judge(scene, text).true))
        for text in row["syn_text"]
    ]
    return page.Note(draw(scene, SIDE), lines)


def _changed(
    plan: stages.Stages, run: BootstrapRun, scores: table.Scores, seed: int | None
) -> list[tuple[str, str, str]]:
    """The main columns drawn, and what two models say and how they learned."""
    plots = []
    for column in table.MAIN:
        by_row = {ROWS[row].title: table.means(scores, row, column.name) for row in ROWS if row in scores}
        spans = [(title, one.value, 2 * (one.error or 0.0)) for title, one in by_row.items() if one]
        plots.append(page.intervals(f"{column.title}, {column.group}", spans))
    sections = [
        (
            "What it changed",
            "Each dot is a model of the same size, pre-trained on the crawl as the name says for as many steps and "
            "images (but where it says longer), then fine-tuned on the images with human captions in the same way: the "
            "mean over seeds, with two standard errors to either side. The grey line is the model of the crawl as it "
            "is. TR@1 and IR@1: how often the first of all texts for an image, or of all images for a text, is the "
            "right one, in percent; zero-shot is before fine-tuning. CIDEr: how much captions resemble human ones; "
            "zero-shot is on images of colours and shapes never seen together.",
            f'<div class="curves">{"".join(plots)}</div>',
        )
    ]
    if seed is not None and all(seed in scores.get(row, {}) for row in SHOWN_ROWS):
        captions = {row: plan.results(f"seed-{seed}/{row}/composition")["captions"] for row in SHOWN_ROWS}
        curves = {
            f"{loss}, {ROWS[row].title}": _curve(Path(run.out) / f"seed-{seed}" / row / "pretrain", name)
            for row in SHOWN_ROWS
            for name, loss in (("itc", "contrastive"), ("itm", "matching"))
        }
        sections += [
            (
                "What two captioners say of images unlike any that they have seen",
                "Made in the same way of the model of the crawl as it is, and of the one after captioning and "
                f"filtering (seed {seed}; the first images, not chosen). A tick: nothing false is said.",
                page.notes(_side_by_side(captions, run.shown), SIDE),
            ),
            ("How they learned", f"Two of the three losses of pre-training, seed {seed}.", page.curves(curves)),
        ]
    return sections


def _side_by_side(captions: dict[str, dict[str, str]], count: int) -> list[page.Note]:
    """The first images with the captions of each row."""
    notes = []
    for name in list(captions["both"])[:count]:
        scene = scene_of(name)
        lines = [
            (ROWS[row].title, page.JudgedText(words[name], judge(scene, words[name]).true))
            for row, words in captions.items()
        ]
        notes.append(page.Note(draw(scene, SIDE), lines))
    return notes


def _curve(folder: Path, name: str) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["losses"][name]) for line in lines if name in line.get("losses", {})]


def _tables(scores: table.Scores) -> list[tuple[str, str, str]]:
    tables = [
        (
            "All rows",
            "Means over seeds ± their standard errors, in percent but the ROC AUC. Claims true and claims made: of "
            "what a caption says of shape, colour, size, place, relation, number and background, how much is true, and "
            "how much of what there is it says. Noise kept: how many of the texts that are not right stay in. "
            "Synthetic wrong: how many of the written texts that were kept say something false.",
            table.main_table(scores),
        ),
        (
            "Differences to the crawl as it is",
            "Paired by seed, ± their standard errors; a triangle where a difference is beyond two of these.",
            table.difference_table(scores),
        ),
        (
            "What the paper found, and what is found here",
            "The difference of the two rows that each finding is about, whether it agrees or not.",
            table.finding_table(scores),
        ),
    ]
    return [(heading, intro, page.table(rows, head)) for heading, intro, (head, rows) in tables if rows]


def _made(run: BootstrapRun, seconds: dict[str, float]) -> tuple[str, str, str]:
    hours = sum(seconds.values()) / 3600
    rows = [[name, f"{value:,.0f}"] for name, value in seconds.items()]
    settings = (
        f"Every row: {run.train.steps} steps of {run.train.batch_size} pairs, {100 * run.people_share:.0f}% of them by "
        f"people; what is trained longer takes {run.longer:g} times as many, and the old model trained on has had as "
        f"many before. Before it is measured each is fine-tuned for {run.fine_tuning.captioner} steps on captions and "
        f"{run.fine_tuning.retrieval} on retrieval; captioner and filter were for {run.cleaners.captioner} and "
        f"{run.cleaners.retrieval}. All stages together took {hours:.1f} hours of processes' time."
    )
    listed = f"<details><summary>Seconds of each stage</summary>{page.table(rows, ['stage', 'seconds'])}</details>"
    return "How it was made", settings, listed
