"""Candidate answers of VQA commands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from blip.data.prepare.questions import read_answers
from blip.inference.answering import ANSWERS, Candidates
from blip.tokenizer import Tokenizer


def load_candidates(
    given: str | Path | Sequence[str] | None, model: str | Path | None, method: str, tokenizer: Tokenizer
) -> Candidates | None:
    """Load the candidates, a file or a list, for a `method` (auto, rank, generate); None to generate freely.

    The default is answers.json in the folder `model`. DataError for an invalid file; ValueError if one is needed and
    missing, or given with `generate`.
    """
    if method == "generate":
        if given is not None:
            raise ValueError(f"--candidates {given} does not apply to --method generate: leave it out")
        return None
    if method not in ("auto", "rank"):
        raise ValueError(f"method must be auto, rank or generate, got {method!r}")
    if given is not None and not isinstance(given, str | Path):
        return Candidates(list(given), tokenizer)
    beside = Path(model, ANSWERS) if model is not None else None
    if given or (beside and beside.is_file()):
        return Candidates(read_answers(Path(given) if given else beside), tokenizer)
    if method == "rank":
        raise ValueError(f"--method rank needs --candidates FILE: {model} has no {ANSWERS}")
    return None
