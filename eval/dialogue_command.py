"""`blip-eval visdial`: from a model and dialogues, or from ranks that are there, to scores."""

from __future__ import annotations

from pathlib import Path

from blip import dist
from blip.app.loaded import load
from blip.data.prepare.dialogues import Conversations
from blip.models.dialogue import Dialogue
from eval.dialogue import evalai_json, ranks_of, read_ranks, score
from eval.options import Visdial
from eval.results_folder import ResultsFolder, settings_of


def run(options: Visdial) -> dict[str, float] | None:
    """Rank what is asked for, score it and leave files; returns the scores in the main process.

    None where no round has its right answer marked, as in the test set, and in the other processes.
    """
    dist.start()
    source = Conversations(options.source)
    out = ResultsFolder(options.out)
    if options.model:
        source.check_some_exist()
        loaded = load(options.model, options.device, options.precision, Dialogue)
        with loaded.computing():
            ways = {"limit": options.limit, "max_tokens": options.max_tokens, "batch": options.batch}
            ranked = ranks_of(loaded.model, loaded.tokenizer, source, **ways)
    else:
        ranked = read_ranks(Path(options.results))
    if not dist.is_main():
        return None
    if options.model:
        out.write("ranks.json", evalai_json(ranked))
    known = any(r.true is not None for d in source.dialogues[: options.limit] for r in d.rounds)
    if options.model and not known and not any(d.relevance for d in source.dialogues[: options.limit]):
        print(f"ranks of {len(ranked)} rounds are in {out / 'ranks.json'}; without answers there is nothing to score")
        return None
    scores = score(source, ranked, limit=options.limit, partial=options.allow_partial)
    for name, value in scores.items():
        print(f"{name:<12}{_for_people(name, value)}")
    out.write_scores(scores, settings_of(options, "model", "results", "limit", "max_tokens", "source"))
    return scores


def _for_people(name: str, value: float) -> str:
    """Shares times 100 as papers print them; ranks and counts as they are."""
    if name == "rounds":
        return f"{value:7.0f}"
    return f"{value:7.2f}" if name == "mean_rank" else f"{100 * value:7.2f}"
