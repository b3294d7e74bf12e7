"""Outputs of the bootstrapping experiment: results.json, table.md, times.json, and a page that explains them.

The page is for readers who do not know the paper: what the crawl looked like, which texts were dropped and generated,
and what that changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from blip import files
from blip.app import html
from blip.app.html import Card, Figure, Line, PageTable, Section, charts
from blip.app.html.charts import Estimate
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
_INTERVALS = "Means over seeds, with two standard errors to either side (none with one seed)."
_COLUMNS = (
    "TR@1 and IR@1: how often the text ranked first for an image, or the image ranked first for a text, is the right "
    "one, in percent; zero-shot is before fine-tuning. CIDEr: how closely captions resemble human ones; zero-shot is "
    "on images of colours and shapes never seen together."
)


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
    seed, changes, sections = _shown_seed(scores), _changes(scores), []
    if changes:
        intro = f"{_INTERVALS} {_COLUMNS}"
        sections.append(Section("Before and after", intro, _slopes(changes), is_narrow=True))
    if seed is not None:
        sections.append(_crawl(plan, run, seed))
    sections.append(Section("The question", _question(run)))
    if scores:
        sections += _changed(plan, run, scores, seed)
    sections.append(Section("How it was made", _made(run, seconds)))
    tables = [_kinds(plan, seed)] if seed is not None else []
    times = PageTable("Seconds of each stage", ["stage", "seconds"], [[n, f"{s:,.0f}"] for n, s in seconds.items()])
    tables += [*_tables(scores), times]
    return html.page(
        "sections.html",
        title=_finding(changes, scores),
        kind="Bootstrapping on the synthetic world: what captioning and filtering a noisy crawl are worth",
        lead="A model cleans the noisy crawl that it was trained on, and a new model is trained on the result.",
        figures=[
            Figure(f"{after.value:.1f}", f"{column.title}, {column.group}", f"{before.value:.1f} on the crawl as it is")
            for column, before, after in changes[:4]
        ],
        sections=sections,
        tables=[one for one in tables if one.rows],
    )


def _changes(scores: table.Scores) -> list[tuple[table.Column, Estimate, Estimate]]:
    """The main columns of the crawl as it is and after captioning and filtering, with two standard errors."""
    changes = []
    for column in table.MAIN:
        before, after = (table.means(scores, row, column.name) for row in SHOWN_ROWS)
        if before and after:
            changes.append((column, _estimate(before), _estimate(after)))
    return changes


def _estimate(mean: table.Mean) -> Estimate:
    half = table.ENOUGH * (mean.error or 0.0)
    return Estimate(mean.value, mean.value - half, mean.value + half)


def _finding(changes: list[tuple[table.Column, Estimate, Estimate]], scores: table.Scores) -> str:
    if not changes:
        return f"{len(scores)} of {len(ROWS)} rows are finished" if scores else "No row is finished yet"
    column, before, after = changes[0]
    return f"Captioning and filtering: {column.title} {before.value:.1f} → {after.value:.1f}"


def _slopes(changes: list[tuple[table.Column, Estimate, Estimate]]) -> list[Markup]:
    labels = ("crawl as it is", "after CapFilt")
    return [
        charts.slope(f"{column.title}, {column.group}", before, after, labels, digits=1, unit="",
                     high=None if "cider" in column.name else 100)
        for column, before, after in changes
    ]  # fmt: skip


def _shown_seed(scores: table.Scores) -> int | None:
    """The seed whose images and captions are shown; None if it has no crawl that both cleaned."""
    return min(scores.get("both", {}), default=None)


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


def _crawl(plan: stages.Stages, run: BootstrapRun, seed: int) -> Section:
    """Images of the crawl and what became of their texts."""
    folder = Path(run.out) / f"seed-{seed}" / "capfilt" / "own"
    kept = plan.results(f"seed-{seed}/capfilt/own")["both"]
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
    return Section(
        "What the crawl looked like, and which texts were dropped and generated",
        f"Images of the crawl of seed {seed}: the web text of each, the caption that the captioner generated, and "
        f"whether the filter kept them. Ticks and crosses mark what is true, which neither captioner nor filter knew. "
        f"{written}.",
        cards=list(_fates(Job.open(str(folder / "job")), run.shown)),
        link=("CapFilt's report accounts for every row and text",
              f"seed-{seed}/capfilt/own/job/report/both/report.html"),
    )  # fmt: skip


def _kinds(plan: stages.Stages, seed: int) -> PageTable:
    kept = plan.results(f"seed-{seed}/capfilt/own")["both"]
    kinds = {kind: Kind(**one) for kind, one in kept["kinds"].items() if one["texts"]}
    return PageTable(
        "What the filter did to the web texts", list(world_capfilt.FATES), world_capfilt.fates(kinds),
        "ROC AUC is the probability that the filter scores a right text above a wrong one of the kind.",
    )  # fmt: skip


def _fates(job: Job, count: int) -> Iterator[Card]:
    """Images of the crawl with both texts and whether they were kept; kinds of web texts take turns."""
    kept: dict[tuple[str, int], set[str]] = {}
    for part, texts in kept_of(job, "both"):
        for row in texts.to_pylist():
            kept.setdefault((part.pid, row["row"]), set()).add(row["text_source"])
    by_kind: dict[str, list[Card]] = {}
    for part in scored_parts(job):
        rows = job.parts.read(part.pid, ["status", "extra_json", "web_text", "syn_text"]).to_pylist()
        for number, row in enumerate(rows):
            extra = json.loads(row["extra_json"] or "{}")
            if row["status"] != "ok" or len(by_kind.setdefault(extra["kind"], [])) >= count:
                continue
            by_kind[extra["kind"]].append(_fate(extra, row, kept.get((part.pid, number), set())))
    kinds = [by_kind[kind] for kind in world_capfilt.KINDS if kind in by_kind]
    turns = [cards[turn] for turn in range(count) for cards in kinds if turn < len(cards)]
    yield from turns[:count]


def _fate(extra: dict[str, Any], row: dict[str, Any], kept: set[str]) -> Card:
    scene = scene_of(extra["image_id"])
    lines = [
        Line(text, f"web text, {'kept' if 'web' in kept else 'dropped'}", extra["kind"] == "right")
        for text in row["web_text"]
    ] + [
        Line(text, f"generated, {'kept' if 'syn' in kept else 'dropped'}", judge(scene, text).true)
        for text in row["syn_text"]
    ]
    return Card(html.thumbnail(draw(scene, SIDE), SIDE), extra["image_id"], lines)


def _changed(plan: stages.Stages, run: BootstrapRun, scores: table.Scores, seed: int | None) -> list[Section]:
    """Sections with plots of the main columns, and captions and loss curves of two models."""
    plots = []
    for column in table.MAIN:
        by_row = {ROWS[row].title: table.means(scores, row, column.name) for row in ROWS if row in scores}
        spans = [(title, _estimate(one)) for title, one in by_row.items() if one]
        plots.append(charts.intervals(f"{column.title}, {column.group}", spans))
    sections = [
        Section(
            "Every way to clean the crawl",
            f"{_INTERVALS} All models have the same size and were pre-trained for the same number of steps and "
            "images (except where the name says longer), on the texts that the name says, then fine-tuned in the same "
            "way on the images with human captions. The dashed line marks the model trained on the crawl as it is.",
            plots,
        )
    ]
    if seed is not None and all(seed in scores.get(row, {}) for row in SHOWN_ROWS):
        captions = {row: plan.results(f"seed-{seed}/{row}/composition")["captions"] for row in SHOWN_ROWS}
        curves = [
            charts.curves(
                f"The {loss} loss",
                {ROWS[row].title: _curve(Path(run.out) / f"seed-{seed}" / row / "pretrain", name)
                 for row in SHOWN_ROWS},
            )
            for name, loss in (("itc", "contrastive"), ("itm", "matching"))
        ]  # fmt: skip
        sections += [
            Section(
                "Captions of images unlike any in training, by two captioners",
                "Both were fine-tuned in the same way, one from the model of the crawl as it is and one from the model "
                f"after captioning and filtering (seed {seed}; the first images, not selected). A tick means that "
                "nothing false is said.",
                cards=_side_by_side(captions, run.shown),
            ),
            Section("Loss curves", f"Two of the three losses of pre-training, seed {seed}.", curves),
        ]
    return sections


def _side_by_side(captions: dict[str, dict[str, str]], count: int) -> list[Card]:
    """The first images with the captions of each row."""
    cards = []
    for name in list(captions["both"])[:count]:
        scene = scene_of(name)
        lines = [Line(words[name], ROWS[row].title, judge(scene, words[name]).true) for row, words in captions.items()]
        cards.append(Card(html.thumbnail(draw(scene, SIDE), SIDE), name, lines))
    return cards


def _curve(folder: Path, name: str) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["losses"][name]) for line in lines if name in line.get("losses", {})]


def _tables(scores: table.Scores) -> list[PageTable]:
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
    return [PageTable(heading, head, rows, intro) for heading, intro, (head, rows) in tables]


def _made(run: BootstrapRun, seconds: dict[str, float]) -> str:
    hours = sum(seconds.values()) / 3600
    return (
        f"Every row: {run.train.steps} steps of {run.train.batch_size} pairs, {100 * run.people_share:.0f}% of them "
        f"with human captions. The row trained longer takes {run.longer:g} times as many steps; the old model, as many "
        "again as it has had before. Before evaluation each model is fine-tuned for "
        f"{run.fine_tuning.captioner} steps on captions and {run.fine_tuning.retrieval} on retrieval; captioner and "
        f"filter were fine-tuned for {run.cleaners.captioner} and {run.cleaners.retrieval}. All stages together took "
        f"{hours:.1f} hours of process time."
    )
