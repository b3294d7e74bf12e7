"""Rows of the annotation table, from decoded rows and the models' scores."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from blip.data.formats.values import encodable
from capfilt.run import Part
from capfilt.schema import ANNOTATIONS
from capfilt.score.decoding import Decoded
from capfilt.score.scorer import Item, Matched, Scores
from capfilt.store.identity import sample_id


def item_of(row: Decoded, relpath: str) -> Item:
    """Return a row as the models' input."""
    texts = [text for text in row.norm if text is not None]
    return Item(sample_id(relpath, row.number, row.key), row.pixels, texts)


def out_of_memory(row: Decoded) -> None:
    row.facts |= {
        "status": "gpu_oom",
        "error_code": "out_of_memory",
        "error_detail": "does not fit into the device's memory even alone",
    }


def check_finite(row: Decoded, scores: Scores) -> None:
    """Mark a row invalid if any of its scores is not finite."""
    matches = [*scores.web, *(text.match for text in scores.syn)]
    numbers = [v for m in matches for v in (m.margin, m.itc)] + [text.logprob for text in scores.syn]
    if not all(map(math.isfinite, numbers)):
        row.facts |= {
            "status": "score_invalid",
            "error_code": "not_finite",
            "error_detail": "the models gave a score that is not a finite number",
        }


def annotation(row: Decoded, relpath: str, scores: Scores | None) -> dict[str, Any]:
    """Return a row of the table, without the columns of the run and with `left_out` for the progress line.

    `scores.web` is parallel to the texts that have words.
    """
    invalid = row.facts["status"] == "score_invalid"
    given = iter(scores.web if scores else [])
    web = [next(given) if text is not None and scores else None for text in row.norm]
    syn = scores.syn if scores else []
    url = row.extra.get("url")
    return {
        "sample_id": sample_id(relpath, row.number, row.key),
        "source_uri": relpath,
        "source_row": row.number,
        "key": row.key,
        "url": encodable(url) if isinstance(url, str) else None,
        "extra_json": json.dumps(row.extra, sort_keys=True),
        **row.facts,
        "web_text": row.texts,
        "web_text_norm": row.norm,
        "web_tokens": [m and m.tokens for m in web],
        "web_truncated": [m and m.truncated for m in web],
        "syn_text": [text.text for text in syn],
        "syn_logprob": [None if invalid else text.logprob for text in syn],
        "syn_tokens": [text.match.tokens for text in syn],
        "syn_finish": ["eos" if text.finished else "max_len" for text in syn],
        **_scores("web", web, invalid),
        **_scores("syn", [text.match for text in syn], invalid),
        "rule_flags": row.flags,
        "left_out": row.left_out,
    }


def _scores(kind: str, matches: Sequence[Matched | None], invalid: bool) -> dict[str, list[float | None]]:
    valid = [None if invalid else m for m in matches]
    return {
        f"itm_{kind}": [m and m.probability for m in valid],
        f"itm_margin_{kind}": [m and m.margin for m in valid],
        f"itc_{kind}": [m and m.itc for m in valid],
    }


def table_of(rows: list[dict[str, Any]], part: Part) -> pa.Table:
    """Return the annotations of a part as a table. AssertionError if they are not exactly its rows."""
    if [row["source_row"] for row in rows] != list(range(part.lo, part.hi)):
        raise AssertionError(f"part {part.pid} wants rows {part.lo} to {part.hi} and has {len(rows)} others")
    return pa.Table.from_pylist([{**row, "part_id": part.pid} for row in rows], ANNOTATIONS)
