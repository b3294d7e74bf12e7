"""The labelled audit: texts drawn from all scores, judged by a person who sees no scores, read back with intervals."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from blip.app import html
from blip.app.html.serve import PageServer
from blip.data.formats.csv_rows import csv_rows
from blip.errors import DataError
from capfilt.export_formats import MATCH, NO_MATCH
from capfilt.reading import Reader, shown_image
from capfilt.run import Run
from capfilt.select.choose import scored_parts
from capfilt.store.identity import text_id

PAGE, LABELS, KEY = "report/audit/page.html", "report/audit/labels.csv", "report/audit/key.parquet"
_STRATA = 10
_COLUMNS = ["id", "match"]
_STEPS = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_SIDES = ((384, 78), (288, 74), (224, 70), (160, 66), (112, 60))
"""Sides and JPEG qualities of the images on the page, the largest that fits into `_LIMIT` is used."""
_LIMIT = 4_700_000
"""Most bytes of images on the page, so that all of it stays under 5 MB unless it has thousands of texts."""
_LARGE = 5_000_000
"""Bytes beyond which a page is called large."""
_ANSWERS = {"y": True, "yes": True, "1": True, "n": False, "no": False, "0": False}
_UNANSWERED = ("", "s", "skip")
_SHORT = {answer: "y" if match else "n" for answer, match in _ANSWERS.items()} | {"skip": "s"}
"""Answers as the page knows them."""
_LONGEST = 500


@dataclass(frozen=True)
class Label:
    """A text with its human label."""

    id: str
    source: str
    score: float
    weight: float
    """Number of texts of the run that the label represents."""
    match: bool


def write(run: Run, count: int) -> list[str]:
    """Write the page, the sheet to fill in and the key with the scores into report/audit; returns instructions.

    Answers in a sheet that is there stay; ValueError if their texts are not drawn now, or if no text has a score.
    """
    drawn = draw(run, count)
    if not drawn:
        raise ValueError(
            f"{run.where}: no text has a score, so there is nothing to judge; run `{run.command('score')}` first"
        )
    kept = _answers(run)
    if lost := [i for i, answer in kept.items() if answer and i not in {entry["id"] for entry in drawn}]:
        raise ValueError(
            f"{run.storage.root}/{LABELS} has answers to {len(lost)} texts that are not drawn now ({lost[0]}, ...): "
            "give the --count of before or, if more has been scored since, move the folder report/audit away"
        )
    columns = {name: [entry[name] for entry in drawn] for name in ("id", "source", "score", "weight", "text")}
    key = pa.table(columns | {"pid": [entry["at"][0] for entry in drawn], "row": [entry["at"][1] for entry in drawn]})
    sink = io.BytesIO()
    pq.write_table(key.replace_schema_metadata({"fingerprint": run.fingerprint}), sink)
    run.storage.write(KEY, sink.getvalue())
    _write_labels(run, {entry["id"]: kept.get(entry["id"], "") for entry in drawn})
    page = _page(run, drawn, _images(run, drawn), {}, served=False).encode("utf-8", "replace")
    run.storage.write(PAGE, page)
    folder = f"{run.storage.root}/report/audit"
    large = (
        f"note: with so many texts page.html has {len(page) / 1e6:.1f} MB and small images; a lower --count mends it"
    )
    return [
        f"{len(drawn)} texts drawn from all scores. Judge them with the keys y and n:",
        f"  {run.command('calibrate', '--judge')}       # opens a page that saves each answer",
        f"or open {folder}/page.html and download labels.csv, or write y or n into the column match of",
        f"{folder}/labels.csv. Then run",
        f"  {_reading(run, f'{folder}/labels.csv')}",
        "Scores are in key.parquet alone: do not look at them before.",
        *([large] if len(page) > _LARGE else []),
    ]


def judge(run: Run, count: int, port: int) -> PageServer:
    """Return a server of the page that saves each answer in labels.csv, after drawing texts if none are drawn yet."""
    if not (run.storage.exists(KEY) and run.storage.exists(LABELS)):
        write(run, count)
    drawn = [entry | {"at": (entry["pid"], entry["row"])} for entry in _key(run).to_pylist()]
    images = functools.cache(lambda: _images(run, drawn))  # read when the page is first loaded

    def page(_: Mapping[str, Any]) -> str:
        return _page(run, drawn, images(), _answers(run), served=True)

    def save(given: Mapping[str, Any]) -> dict[str, Any]:
        answers = _answers(run)
        answers |= {entry["id"]: "" for entry in drawn if entry["id"] not in answers}
        if (
            not isinstance(given.get("id"), str)
            or given["id"] not in answers
            or given.get("match") not in ("y", "n", "s", "")
        ):
            raise ValueError("an answer has the id of a text and match, one of y, n, s and nothing")
        # The last answer stands last, so that it is the first to be undone after the page is loaded again.
        answered = {i: answer for i, answer in answers.items() if answer and i != given["id"]}
        answered |= {given["id"]: given["match"]} if given["match"] else {}
        _write_labels(run, answered | {i: "" for i in answers if i not in answered})
        return {"saved": given["id"]}

    return PageServer({"GET /": page, "POST /label": save}, port)


def _answers(run: Run) -> dict[str, str]:
    """Read what the sheet in the run says of each id: y, n, s or nothing. ValueError if it is no such sheet."""
    text = run.storage.read(LABELS).decode("utf-8-sig", "replace") if run.storage.exists(LABELS) else ""
    if not text.strip():
        return {}
    separator = next((mark for mark in ";\t" if mark in text.partition("\n")[0]), ",")  # as spreadsheets save it
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    if not set(_COLUMNS) <= set(rows.fieldnames or ()):
        raise ValueError(
            f"{run.storage.root}/{LABELS} has not the columns {', '.join(_COLUMNS)}: mend its first line, or move the "
            "folder report/audit away"
        )
    answers = {row["id"]: (row["match"] or "").strip().lower() for row in rows if row["id"]}
    return {i: _SHORT.get(answer, answer) for i, answer in answers.items()}


def _write_labels(run: Run, answers: Mapping[str, str]) -> None:
    sheet = io.StringIO()
    csv.writer(sheet).writerows([_COLUMNS, *answers.items()])
    run.storage.write(LABELS, sheet.getvalue().encode())


def _key(run: Run) -> pa.Table:
    """Read the drawn texts. ValueError if there are none, or if they are of another run."""
    if not run.storage.exists(KEY):
        raise ValueError(f"{run.where} has no {KEY}: draw texts with `{run.command('calibrate')}`")
    try:
        key = pq.read_table(io.BytesIO(run.storage.read(KEY)))
    except pa.ArrowException:
        raise ValueError(
            f"{run.where}/{KEY} is damaged: `capfilt calibrate` with the --count of before redoes it"
        ) from None
    if (key.schema.metadata or {}).get(b"fingerprint", b"").decode() != run.fingerprint:
        raise ValueError(f"{run.where}/{KEY} is of another run: move the folder report/audit away and draw again")
    return key


def draw(run: Run, count: int) -> list[dict]:
    """Draw texts by hash, equally many from each decile of each source's scores, with their weights."""
    candidates: dict[tuple[str, int], list[tuple[str, float, str, int, int]]] = {}
    sizes: dict[tuple[str, int], int] = {}
    each = max(1, count // (2 * _STRATA))
    for mark, kind, score, *at in _scored(run):
        key = kind, min(int(score * _STRATA), _STRATA - 1)
        sizes[key] = sizes.get(key, 0) + 1
        candidates.setdefault(key, []).append((mark, score, *at))
        if len(candidates[key]) > 4 * each:
            candidates[key] = sorted(candidates[key])[:each]
    drawn = []
    for (kind, tenth), some in candidates.items():
        chosen = sorted(some)[:each]
        for mark, score, pid, row, i in chosen:
            text = run.parts.read(pid, [f"{kind}_text"])[f"{kind}_text"][row].as_py()[i]
            weight = sizes[kind, tenth] / len(chosen)
            drawn.append({"id": mark, "source": kind, "score": score, "weight": weight, "text": text, "at": (pid, row)})
    return sorted(drawn, key=lambda entry: entry["id"])


def _scored(run: Run) -> Iterator[tuple[str, str, float, str, int, int]]:
    """Yield (id, source, score, part id, row, index) of every text with a score."""
    for part in scored_parts(run):
        table = run.parts.read(part.pid, ["sample_id", "itm_web", "itm_syn"])
        for row, note in enumerate(table.to_pylist()):
            for kind in ("web", "syn"):
                for i, score in enumerate(note[f"itm_{kind}"] or []):
                    if score is not None:
                        yield text_id(note["sample_id"], kind, i), kind, score, part.pid, row, i


def _page(
    run: Run, drawn: Sequence[dict], images: Mapping[tuple[str, int], str], answers: Mapping[str, str], *, served: bool
) -> str:
    items = [
        {"id": entry["id"], "text": html.cut(entry["text"], _LONGEST), "image": images.get(entry["at"], "")}
        for entry in drawn
    ]
    draw = hashlib.sha256("".join(entry["id"] for entry in drawn).encode()).hexdigest()[:16]
    sheet = f"{run.storage.root}/{LABELS}" if served else "labels.csv"
    return html.page(
        "judge.html", title="Does the text say what the image shows?", scripts=("judge.js",),
        allow={"connect-src": "'self'"} if served else None,
        lead="Judge each text by its image alone: y if all it says is true, n if anything is not.",
        items=items, draw=draw, served=served, command=_reading(run, sheet),
        labels=[[i, answer] for i, answer in answers.items() if answer],
    )  # fmt: skip


def _reading(run: Run, sheet: str) -> str:
    """Return the command that reads a sheet."""
    return run.command("calibrate", "--labels", sheet)


def _images(run: Run, drawn: Sequence[dict]) -> dict[tuple[str, int], str]:
    """Read the drawn rows' images, as large as the page can hold; those that cannot be read are left out."""
    parts, readers = {part.pid: part for part in run.plan}, {}
    shown: dict[tuple[int, int], dict[tuple[str, int], str]] = {size: {} for size in _SIDES}
    sizes = dict.fromkeys(_SIDES, 0)
    for pid, row in sorted({entry["at"] for entry in drawn}):
        part = parts[pid]
        if part.source not in readers:
            readers[part.source] = Reader(run.sources[part.source], run.reading, run.storage)
        image = shown_image(readers[part.source], part.lo + row, run.config.max_pixels, _SIDES[0][0])
        for size in list(shown) if image is not None else ():
            shown[size][pid, row] = html.thumbnail(image, *size)
            sizes[size] += len(shown[size][pid, row])
            if sizes[size] >= _LIMIT and size != _SIDES[-1]:
                del shown[size]  # so that memory is bounded, too
    return next(iter(shown.values()))


# Reading --------------------------------------------------------------------------------------------------------------


def read(run: Run, labels: str, target: float) -> list[str]:
    """Estimate precision and recall by threshold, for web and synthetic texts; returns lines to print."""
    if Path(labels).suffix.lower() == ".json":
        judged, lines = _exported(run, labels)
    else:
        judged, lines = joined(read_labels(Path(labels)), _key(run), labels), []
    lines = [f"{len(judged)} labels; intervals are 95% Wilson at the effective number of labels", *lines]
    for kind in ("web", "syn"):
        mine = [label for label in judged if label.source == kind]
        if not mine:
            continue
        lines.append(f"{kind}: {len(mine)} labels, {sum(label.match for label in mine)} match")
        for t in _STEPS:
            kept = [label for label in mine if label.score >= t]
            if kept:
                share, low, high = weighted_share(kept)
                recall = sum(x.weight for x in kept if x.match) / (sum(x.weight for x in mine if x.match) or 1)
                lines.append(f"  at {t:<5g} precision {share:.1%} ({low:.1%} to {high:.1%}), recall {recall:.1%}, "
                             f"{sum(x.weight for x in kept):,.0f} texts kept")  # fmt: skip
        lines.append(_advice(mine, target))
    return lines


def _advice(labels: Sequence[Label], target: float) -> str:
    """Choose a threshold on one half of the labels and estimate its precision on the other."""
    first = [label for label in labels if int(label.id[-1], 16) % 2]
    second = [label for label in labels if not int(label.id[-1], 16) % 2]
    for t in sorted({label.score for label in first}):
        if weighted_share([x for x in first if x.score >= t])[1] >= target:
            kept = [x for x in second if x.score >= t]
            if not kept:
                break
            share, low, high = weighted_share(kept)
            return (f"  {t:.3f}, chosen on half of the labels for a lower end of {target:g}; the other half says "
                    f"precision {share:.1%} ({low:.1%} to {high:.1%})")  # fmt: skip
    return f"  no threshold has a lower end of {target:g} with so few labels"


def read_labels(path: Path) -> dict[str, bool]:
    """Read the answers of a sheet: whether each id's text matches.

    ValueError names an invalid row, DataError a line that is not CSV.
    """
    answers: dict[str, bool] = {}
    for number, row in csv_rows(path):
        if "score" in row:
            raise ValueError(
                f"{path} is a sheet of an older version, which showed scores: copy its columns id and "
                "match into another file"
            )
        if not set(_COLUMNS) <= row.keys():
            raise ValueError(f"{path} has not the columns {', '.join(_COLUMNS)}: is it a labels.csv?")
        answer = (row["match"] or "").strip().lower()
        if answer in _UNANSWERED:
            continue
        if answer not in _ANSWERS:
            raise ValueError(f"{path}, line {number}: match must be y, n or s, got {row['match']!r}")
        if answers.setdefault(row["id"], _ANSWERS[answer]) != _ANSWERS[answer]:
            raise ValueError(f"{path}, line {number}: {row['id']} has another answer above")
    if not answers:
        raise ValueError(f"{path}: no row has y or n in the column match")
    return answers


def joined(answers: Mapping[str, bool], key: pa.Table, name: str) -> list[Label]:
    """Join answers with the scores of the drawn texts. ValueError if an id was not drawn."""
    drawn = {entry["id"]: entry for entry in key.select(["id", "source", "score", "weight"]).to_pylist()}
    if unknown := [i for i in answers if i not in drawn]:
        raise ValueError(
            f"{name}: {len(unknown)} of {len(answers)} ids were not drawn from this run (such as {unknown[0]!r}): is "
            "it the sheet of another run, or of another draw?"
        )
    return [Label(**drawn[i], match=match) for i, match in answers.items()]


# Label Studio ---------------------------------------------------------------------------------------------------------


def _exported(run: Run, labels: str) -> tuple[list[Label], list[str]]:
    """Join the answers of a Label Studio export with the scores of the run; returns what to say about them, too.

    The majority of a text's annotators counts. A text that was not drawn represents itself alone. ValueError if an id
    is of no text of the run.
    """
    votes = read_label_studio(Path(labels))
    answers = {i: 2 * sum(some) > len(some) for i, some in votes.items() if 2 * sum(some) != len(some)}
    if not answers:
        raise ValueError(f"{labels}: on every text as many annotations say {MATCH} as {NO_MATCH}")
    key = _key(run) if run.storage.exists(KEY) else None
    drawn = answers.keys() & (key["id"].to_pylist() if key else [])
    others = {i: match for i, match in answers.items() if i not in drawn}
    judged = joined({i: answers[i] for i in answers if i in drawn}, key, labels) if key else []
    alone = (
        [Label(i, kind, score, 1.0, others[i]) for i, kind, score, *_ in _scored(run) if i in others] if others else []
    )
    if unknown := sorted(others.keys() - {label.id for label in alone}):
        raise ValueError(
            f"{labels}: {len(unknown)} of {len(answers)} ids are of no text with a score in this run (such as "
            f"{unknown[0]!r}): is it the export of another run's tasks?"
        )
    notes = []
    if ties := len(votes) - len(answers):
        what = "text is" if ties == 1 else "texts are"
        notes.append(f"{ties} {what} left out: as many annotations say {MATCH} as {NO_MATCH}")
    if alone:
        notes.append(
            f"{len(alone)} of the labelled texts were not drawn by `capfilt calibrate`: each counts as one text, so "
            "precision and recall hold for the labelled texts alone, not for the run"
        )
    return [*judged, *alone], notes


def read_label_studio(path: Path) -> dict[str, list[bool]]:
    """Read a project that Label Studio exported as JSON: whether each annotator says that the text of each id matches.

    Skipped (cancelled) annotations, those without a choice, drafts and predictions do not count. DataError if it is not
    such an export, ValueError if it has no answer.
    """
    wanted = "expected Label Studio's export in the format JSON (not JSON-MIN) of tasks that CapFilt exported"
    try:
        tasks = json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path} is not JSON text in UTF-8; {wanted}") from None
    if not isinstance(tasks, list):
        raise DataError(f"{path} is not a list of tasks; {wanted}")
    votes: dict[str, list[bool]] = {}
    for number, task in enumerate(tasks, 1):
        try:
            mark, annotations = task["data"]["id"], task.get("annotations", [])
            choices = [
                result["value"]["choices"]
                for one in annotations
                if not one.get("was_cancelled")
                for result in one["result"]
                if (result.get("from_name"), result.get("type")) == ("match", "choices")
            ]
        except (TypeError, KeyError, AttributeError):
            raise DataError(f"{path}, task {number}, is not of the expected form; {wanted}") from None
        if not isinstance(mark, str):
            raise DataError(f"{path}, task {number}: data.id is {mark!r}; {wanted}")
        for choice in choices:
            if choice not in ([MATCH], [NO_MATCH]):
                raise DataError(f"{path}, task {number}: expected the choice {MATCH!r} or {NO_MATCH!r}, got {choice!r}")
            votes.setdefault(mark, []).append(choice == [MATCH])
    if not votes:
        raise ValueError(f"{path}: no task has an annotation with the choice {MATCH!r} or {NO_MATCH!r}")
    return votes


# Statistics -----------------------------------------------------------------------------------------------------------


def weighted_share(labels: Sequence[Label]) -> tuple[float, float, float]:
    """Return the weighted share of matches with its confidence interval."""
    weights = np.array([label.weight for label in labels])
    share = float((weights * [label.match for label in labels]).sum() / weights.sum())
    return share, *wilson(share, float(weights.sum() ** 2 / (weights**2).sum()))


def wilson(share: float, n: float, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95% Wilson interval of a share of n."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
