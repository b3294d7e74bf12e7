"""The page of a captioning evaluation: the scores, and the best and the worst captions with their images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blip.app import page
from blip.errors import DataError
from eval.images import Images
from eval.references import ImageId

_SIDE = 448
"""Longer side in pixels of images kept for the page."""


def report(
    record: Mapping[str, Any],
    cider: Mapping[ImageId, float],
    references: Mapping[ImageId, Sequence[str]],
    captions: Mapping[ImageId, str],
    images: Images | None,
    shown: int,
) -> str:
    """Build a self-contained HTML page; half of the `shown` captions are the best by CIDEr, half the worst."""
    ordered = sorted(cider, key=cider.get, reverse=True)
    half = (min(shown, len(ordered)) + 1) // 2
    best, worst = ordered[:half], ordered[half:][::-1][: shown - half]

    def section(heading: str, intro: str, names: Sequence[ImageId]) -> tuple[str, str, str]:
        thumbnails = _thumbnails(images, names)
        items = [page.Captioned(str(n), thumbnails.get(n), captions[n], 100 * cider[n], references[n]) for n in names]
        return heading, intro, page.captioned(items)

    return page.page(
        "Captions and their scores",
        [
            ("Scores", "Times 100, with 95% bootstrap intervals over images.", page.table(*_scores(record))),
            ("How they came about", "", page.table(_facts(record), ["", ""])),
            section("Best by CIDEr", "The caption, its image with 100 times its CIDEr, and human captions.", best),
            section("Worst by CIDEr", "The same, from the worst on.", worst),
        ],
    )


def _scores(record: Mapping[str, Any]) -> tuple[list[list[str | float]], list[str]]:
    names = [n for n, value in record.items() if isinstance(value, float) and not n.endswith(("_low", "_high"))]
    with_ends = [n for n in names if f"{n}_low" in record]
    if not with_ends:
        return [[n, 100 * record[n]] for n in names], ["", "score"]
    rows = [[n, *(100 * record[n + end] for end in ("", "_low", "_high"))] for n in with_ends]
    return rows, ["", "score", "from", "to"]


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


def _thumbnails(images: Images | None, names: Sequence[ImageId]) -> dict[ImageId, Any]:
    """The images available; an unreadable one is not shown."""
    thumbnails = {}
    if images is not None:
        chosen = images.only(names)
        for row, entry in enumerate(chosen.entries):
            try:
                thumbnails[entry.id] = chosen.image(row)
                thumbnails[entry.id].thumbnail((_SIDE, _SIDE))
            except DataError:
                continue
    return thumbnails
