"""Outputs of the bootstrapping experiment: results.json, table.md, times.json, and a page that explains them.

The page is for readers who do not know the paper: what the crawl looked like, which texts were dropped and generated,
and what that changed.
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
"""Side of the images on the page in pixels."""
SHOWN_ROWS = ("neither", "both")
"""Rows whose captions are shown side by side."""


# Scores ---------------------------------------------------------------------------------------------------------------


def complete(plan: stages.Stages) -> list[str]:
    """Names, such as `seed-0/both`, of the rows that are finished."""
    names = dict.fromkeys(name.rpartition("/")[0] for name in plan.stages if name.endswith("/composition"))
    return [name for name in names if plan.done([f"{name}/{part}" for part in PARTS])]


def scores_of(plan: stages.Stages) -> dict[str, dict[int, dict[str, float]]]:
    """Scores of all finished rows, by row, seed and column."""
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
    """Rewrite all files from the finished stages; returns the contents of results.json, which has no times."""
    out, scores = Path(run.out), scores_of(plan)
    out.mkdir(parents=True, exist_ok=True)
    results = table.results(scores)
    seconds = {name: record["seconds"] for name in plan.stages if (record := plan.record(name))}
    files.replace_file(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    files.replace_file(out / "times.json", (json.dumps(seconds, indent=1) + "\n").encode())
    files.replace_file(out / "table.md", (table.markdown(scores) or "no row is finished yet\n").encode())
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
        "Images on the web come with texts, and most of these do not describe the image. A model trained on such pairs "
        "learns noise. The BLIP paper's answer: train a model on the noisy pairs all the same; fine-tune it, on a few "
        "images with human captions, into a captioner that generates a caption for every image of the crawl and a "
        "filter that rejects web texts and generated captions that do not match; and train a new model on the rest. Is "
        "the new model better, and which part makes the difference? Here the question is asked in a small synthetic "
        f"world, in which the truth about every text is known. The crawl has {world.crawl:,} images, and "
        f"{100 * world.noise:.0f}% of its texts are not right; {world.people:,} other images have human captions."
    )


def _crawl(plan: stages.Stages, run: BootstrapRun, seed: int) -> list[tuple[str, str, str]]:
    """Sections on the crawl and what became of its texts, with some images."""
    folder = Path(run.out) / f"seed-{seed}" / "capfilt" / "own"
    kept = plan.results(f"seed-{seed}/capfilt/own")["both"]
    kinds = {kind: Kind(**one) for kind, one in kept["kinds"].items() if one["texts"]}
    written = (
        f"The filter rejected {kept['synthetic_rejected']:.0f}% of the generated captions. "
        f"{kept['synthetic_wrong_before']:.0f}% of all generated captions say something false"
    )
    if "synthetic_wrong" in kept:
        written += (
            f", and {kept['synthetic_wrong']:.0f}% of those that were kept; in the latter, "
            f"{kept['synthetic_claims_wrong']:.0f}% of the single claims about shape, colour, size, place and number "
            "are false"
        )
    fates = list(_fates(Job.open(str(folder / "job")), run.shown))
    link = f"seed-{seed}/capfilt/own/job/report/both/report.html"
    return [
        (
            "What the crawl looked like, and which texts were dropped and generated",
            f"Images of the crawl of seed {seed}: the web text of each, the caption that the captioner generated, and "
            "whether the filter kept them. Ticks and crosses mark what is true, which neither captioner nor filter "
            "knew.",
            page.notes(fates, SIDE),
        ),
        (
            "What the filter did to the web texts",
            f"{written}. ROC AUC is the probability that the filter scores a right text above a wrong one of the kind.",
            page.table(world_capfilt.fates(kinds), world_capfilt.FATES)
            + f'<p><a href="{link}">CapFilt\'s report</a> accounts for every row and text.</p>',
        ),
    ]


def _fates(job: Job, count: int) -> Iterator[page.Note]:
    """Images of the crawl with both texts and whether they were kept; kinds of web texts take turns."""
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
        (f"web text, {'kept' if 'web' in kept else 'dropped'}", page.JudgedText(text, extra["kind"] == "right"))
        for text in row["web_text"]
    ] + [
        (f"generated, {'kept' if 'syn' in kept else 'dropped'}", page.JudgedText(text, judge(scene, text).true))
        for text in row["syn_text"]
    ]
    return page.Note(draw(scene, SIDE), lines)


def _changed(
    plan: stages.Stages, run: BootstrapRun, scores: table.Scores, seed: int | None
) -> list[tuple[str, str, str]]:
    """Sections with plots of the main columns, and captions and loss curves of two models."""
    plots = []
    for column in table.MAIN:
        by_row = {ROWS[row].title: table.means(scores, row, column.name) for row in ROWS if row in scores}
        spans = [(title, one.value, 2 * (one.error or 0.0)) for title, one in by_row.items() if one]
        plots.append(page.intervals(f"{column.title}, {column.group}", spans))
    sections = [
        (
            "What it changed",
            "Each dot is the mean over seeds of models of the same size, with two standard errors to either side. All "
            "were pre-trained for the same number of steps and images (except where the name says longer), on the "
            "texts that the name says, then fine-tuned in the same way on the images with human captions. The grey "
            "line marks the model trained on the crawl as it is. TR@1 and IR@1: how often the text ranked first for an "
            "image, or the image ranked first for a text, is the right one, in percent; zero-shot is before "
            "fine-tuning. CIDEr: how closely captions resemble human ones; zero-shot is on images of colours and "
            "shapes never seen together.",
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
                "Captions of images unlike any in training, by two captioners",
                "Both were fine-tuned in the same way, one from the model of the crawl as it is and one from the model "
                f"after captioning and filtering (seed {seed}; the first images, not selected). A tick means that "
                "nothing false is said.",
                page.notes(_side_by_side(captions, run.shown), SIDE),
            ),
            ("Loss curves", f"Two of the three losses of pre-training, seed {seed}.", page.curves(curves)),
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
            "Means over seeds ± their standard errors, in percent except ROC AUC. Claims true and claims made: of the "
            "claims that a caption makes about shape, colour, size, place, relation, number and background, the share "
            "that is true; of the claims possible, the share that is made. Noise kept: the share of wrong web texts "
            "that are kept. Synthetic wrong: the share of the generated captions kept that say something false.",
            table.main_table(scores),
        ),
        (
            "Differences from the crawl as it is",
            "Paired by seed, ± their standard errors; a triangle marks a difference of more than two standard errors.",
            table.difference_table(scores),
        ),
        (
            "The paper's findings, and the results here",
            "The difference between the two rows that each finding is about, and whether it agrees.",
            table.finding_table(scores),
        ),
    ]
    return [(heading, intro, page.table(rows, head)) for heading, intro, (head, rows) in tables if rows]


def _made(run: BootstrapRun, seconds: dict[str, float]) -> tuple[str, str, str]:
    hours = sum(seconds.values()) / 3600
    rows = [[name, f"{value:,.0f}"] for name, value in seconds.items()]
    settings = (
        f"Every row: {run.train.steps} steps of {run.train.batch_size} pairs, {100 * run.people_share:.0f}% of them "
        f"with human captions. The row trained longer takes {run.longer:g} times as many steps; the old model, as many "
        "again as it has had before. Before evaluation each model is fine-tuned for "
        f"{run.fine_tuning.captioner} steps on captions and {run.fine_tuning.retrieval} on retrieval; captioner and "
        f"filter were fine-tuned for {run.cleaners.captioner} and {run.cleaners.retrieval}. All stages together took "
        f"{hours:.1f} hours of process time."
    )
    listed = f"<details><summary>Seconds of each stage</summary>{page.table(rows, ['stage', 'seconds'])}</details>"
    return "How it was made", settings, listed
