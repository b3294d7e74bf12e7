"""Candidate answers of VQA commands."""

from __future__ import annotations

from pathlib import Path

from blip.data.prepare.questions import read_answers
from blip.inference.answering import ANSWERS, Candidates
from blip.tokenizer import Tokenizer


def load_candidates(given: str | None, model: str | Path, method: str, tokenizer: Tokenizer) -> Candidates | None:
    """Load the candidates for `--candidates` and `--method` (auto, rank, generate); None to generate freely.

    The default is the model's answers.json. DataError for an invalid file; ValueError if one is needed and missing, or
    given with --method generate.
    """
    if method == "generate":
        if given:
            raise ValueError(f"--candidates {given} does not apply to --method generate: leave it out")
        return None
    beside = Path(model) / ANSWERS
    if given or beside.is_file():
        return Candidates(read_answers(Path(given) if given else beside), tokenizer)
    if method == "rank":
        raise ValueError(f"--method rank needs --candidates FILE: {model} has no {ANSWERS}")
    return None
