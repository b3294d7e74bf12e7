"""The answers that a command chooses from."""

from __future__ import annotations

from pathlib import Path

from blip.data.prepare.questions import read_answers
from blip.inference.answering import ANSWERS, Candidates
from blip.tokenizer import Tokenizer


def load_candidates(given: str | None, model: str | Path, method: str, tokenizer: Tokenizer) -> Candidates | None:
    """Load the candidates that `--candidates` and `--method` (auto, rank, generate) choose; None to generate freely.

    Without a file, the model's own answers.json. DataError for a file that is none; ValueError where one is needed and
    not there, or given and not needed.
    """
    if method == "generate":
        if given:
            raise ValueError(f"--method generate chooses from no list: leave --candidates {given} out")
        return None
    beside = Path(model) / ANSWERS
    if given or beside.is_file():
        return Candidates(read_answers(Path(given) if given else beside), tokenizer)
    if method == "rank":
        raise ValueError(f"--method rank needs --candidates FILE: {model} has no {ANSWERS}")
    return None
