"""`python -m eval visdial`: from a model and dialogues, or from ranks that are there, to scores."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from blip import atomic, dist
from blip.commands.loading import load
from blip.data.dialogue import Conversations
from blip.tasks.dialogue import Dialogue
from eval.dialogue import evalai_json, ranks_of, read_ranks, score
from eval.options import Visdial


def run(options: Visdial) -> dict[str, float] | None:
    """Rank what is asked for, score it and leave files; returns the scores in the main process.

    None where no round has its right answer marked, as in the test set, and in the other processes.
    """
    dist.start()
    source = Conversations(options.source)
    out = Path(options.out) if options.out else None
    if out:
        out.mkdir(parents=True, exist_ok=True)  # before hours of work
    if options.model:
        source.check_some_exist()
        loaded = load(options.model, options.device, options.precision, Dialogue)
        with loaded.computing():
            ways = {"limit": options.limit, "max_tokens": options.max_tokens, "batch": options.batch}
            ranked = ranks_of(loaded.model, loaded.tokenizer, source, **ways, progress=True)
    else:
        ranked = read_ranks(Path(options.results))
    if not dist.is_main():
        return None
    if out and options.model:
        _replace(out / "ranks.json", evalai_json(ranked))
    known = any(r.true is not None for d in source.dialogues[: options.limit] for r in d.rounds)
    if options.model and not known and not any(d.relevance for d in source.dialogues[: options.limit]):
        print(f"ranks of {len(ranked)} rounds are in {out / 'ranks.json'}; without answers there is nothing to score")
        return None
    scores = score(source, ranked, limit=options.limit, partial=options.allow_partial)
    for name, value in scores.items():
        print(f"{name:<12}{_for_people(name, value)}")
    if out:
        _replace(out / "scores.json", json.dumps(scores | _settings(options), indent=1) + "\n")
    return scores


def _for_people(name: str, value: float) -> str:
    """Shares times 100 as papers print them; ranks and counts as they are."""
    if name == "rounds":
        return f"{value:7.0f}"
    return f"{value:7.2f}" if name == "mean_rank" else f"{100 * value:7.2f}"


def _settings(options: Visdial) -> dict[str, object]:
    """What the scores depend on, for the record."""
    names = ("model", "results", "limit", "max_tokens")
    said = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return {**said, "source": dataclasses.asdict(options.source)}


def _replace(path: Path, content: str) -> None:
    atomic.replace_file(path, content.encode())
