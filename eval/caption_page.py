"""The page of a captioning evaluation: the scores, and the best and the worst captions with their images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from blip.app import html
from blip.app.html import charts
from blip.app.html.charts import Estimate
from blip.errors import DataError
from eval.images import Images
from eval.references import ImageId

_SIDE = 448
"""Longer side in pixels of images decoded for the page."""
_REFERENCES = 5
"""Most human captions shown of an image."""


NAMES = {
    "bleu_1": "BLEU-1", "bleu_2": "BLEU-2", "bleu_3": "BLEU-3", "bleu_4": "BLEU-4", "cider": "CIDEr",
    "rouge_l": "ROUGE-L", "meteor": "METEOR", "spice": "SPICE",
}  # fmt: skip
"""Scores as papers name them."""
_FIRST = ("cider", "bleu_4", "spice", "meteor", "rouge_l")
"""Scores on top of the page, as far as they are there."""


def report(
    record: Mapping[str, Any],
    cider: Mapping[ImageId, float],
    references: Mapping[ImageId, Sequence[str]],
    captions: Mapping[ImageId, str],
    images: Images | None,
    shown: int,
    trained_on: Sequence[str] = (),
) -> str:
    """Build a self-contained HTML page; half of the `shown` captions are the best by CIDEr, half the worst."""
    ordered = sorted(cider, key=cider.get, reverse=True)
    half = (min(shown, len(ordered)) + 1) // 2
    best, worst = ordered[:half], ordered[half:][::-1][: shown - half]

    def cards(names: Sequence[ImageId]) -> list[html.Card]:
        thumbnails = _thumbnails(images, names)
        return [
            html.Card(
                thumbnails.get(name, ""),
                str(name),
                [html.Line(captions[name]), html.Line(f"{100 * cider[name]:.1f}", "CIDEr"), *human(name)],
                str(name),
            )
            for name in names
        ]

    def human(name: ImageId) -> list[html.Line]:
        texts = references[name][:_REFERENCES]
        return [html.Line(text, "" if i else "human captions") for i, text in enumerate(texts)]

    intro = "Each caption with its CIDEr and human captions of the image."
    scores = _scores(record)
    top = [row for name in _FIRST for row in scores.rows if row[0] == NAMES[name]][:3]
    count = f"{len(ordered):,} {'caption' if len(ordered) == 1 else 'captions'}"
    title = f"{top[0][0]} {top[0][1]:.1f} on {count}" if top else f"Scores of {count}"
    return html.page(
        "sections.html",
        title=title,
        kind="Evaluation of captions",
        trained_on=trained_on,
        lead="Each caption is compared with human captions of the same image; scores are times 100.",
        figures=[html.Figure(count.partition(" ")[0], "captions evaluated"), *(_figure(row) for row in top)],
        sections=[
            *([html.Section("How sure the scores are", "", [chart])] if (chart := _intervals(scores)) else []),
            *(
                html.Section(heading, intro, cards=cards(names))
                for heading, names in (("The best by CIDEr", best), ("The worst by CIDEr", worst))
                if names
            ),
        ],
        tables=[scores, html.PageTable("How they came about", ["setting", "value"], _facts(record))],
    )


def _scores(record: Mapping[str, Any]) -> html.PageTable:
    names = [n for n, value in record.items() if isinstance(value, float) and not n.endswith(("_low", "_high"))]
    with_ends = [n for n in names if f"{n}_low" in record]
    if not with_ends:
        rows = [[NAMES.get(n, n), 100 * record[n]] for n in names]
        return html.PageTable("All scores", ["score", "value"], rows)
    rows = [[NAMES.get(n, n), *(100 * record[n + end] for end in ("", "_low", "_high"))] for n in with_ends]
    return html.PageTable("All scores", ["score", "value", "95% interval: from", "to"], rows)


def _figure(row: Sequence[Any]) -> html.Figure:
    note = f"95% interval {row[2]:.1f} to {row[3]:.1f}" if len(row) > 2 else ""
    return html.Figure(f"{row[1]:.1f}", row[0], note)


def _intervals(scores: html.PageTable) -> Markup:
    """A chart of the scores with intervals up to 100; CIDEr has another scale."""
    spans = [(row[0], Estimate(*row[1:])) for row in scores.rows if len(row) > 2 and row[0] != NAMES["cider"]]
    return charts.intervals("Scores with 95% intervals over images", spans, is_compared=False)


def _facts(record: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name, value in record.items():
        if isinstance(value, dict):
            rows += [
                [f"{name.replace('_', ' ')}: {inner}", str(one)] for inner, one in value.items() if one is not None
            ]
        elif not isinstance(value, float):
            rows.append([name, str(value)])
    return rows


def _thumbnails(images: Images | None, names: Sequence[ImageId]) -> dict[ImageId, str]:
    """Data URLs of the images available; an unreadable one is not shown."""
    thumbnails = {}
    if images is not None:
        chosen = images.only(names)
        for row, entry in enumerate(chosen.entries):
            try:
                image = chosen.image(row)
            except DataError:
                continue
            image.thumbnail((_SIDE, _SIDE))
            thumbnails[entry.id] = html.thumbnail(image)
    return thumbnails
