"""Time the ranking of 3,000 candidate answers against the straightforward implementation of the 2022 release.

    python -m benchmarks.vqa_rank              # BASE, float32 and bfloat16; about 5 minutes on 2 cores

Both take the states of questions and give the best answer of each by the release's rule: the 128 candidates with the
most likely first tokens, each scored in full, by smoothed log-probabilities. The straightforward way has a row for
every candidate of every question, padded to the longest of the list, with the question's states repeated and projected
for each row (`tests/oracle.py`). Lengths of candidates, and how many share a first token, are those of the 3,000 most
common answers of VQA v2 in BERT's word pieces. Both sides run in one process, in turn, at equal precision (autocast for
bfloat16).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import report
from blip.inference.answering import Candidates, rank
from blip.inference.settings import AnswerConfig
from blip.models.presets import BASE
from blip.models.vqa import Vqa
from blip.nn.context import Context
from blip.train.memory import keep_freed_memory

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import oracle

LENGTHS = {1: 1651, 2: 784, 3: 481, 4: 60, 5: 15, 6: 5, 7: 3, 10: 1}
"""Number of the 3,000 answers by their length in word pieces."""
FIRSTS = 1982
"""Number of different first word pieces."""
QUESTION, K, SMOOTHING = 12, 128, 0.1
"""Word pieces per question; candidates scored in full; label smoothing of the scores."""


class Listed(Candidates):
    """Candidates of random word pieces."""

    def __init__(self) -> None:
        class Pieces:
            unk_id = 100

            def pieces(self, text: str, longest: int) -> list[int]:
                return [101, *map(int, text.split()), 102]

            def pad(self, rows: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
                width = max(map(len, rows))
                ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
                return ids, torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]

        super().__init__(_texts(), Pieces())


def _texts() -> list[str]:
    draw = torch.Generator().manual_seed(2)
    lengths = [length for length, count in LENGTHS.items() for _ in range(count)]
    firsts = torch.randperm(29000, generator=draw)[:FIRSTS] + 1000
    distinct: dict[str, None] = {}
    for i, length in enumerate(lengths):
        while True:
            # One-piece answers have distinct first pieces; longer answers begin with any of the first pieces.
            first = firsts[i] if length == 1 else firsts[torch.randint(FIRSTS, (1,), generator=draw)[0]]
            rest = torch.randint(1000, 30000, (length - 1,), generator=draw)
            text = " ".join(map(str, [int(first), *rest.tolist()]))
            if text not in distinct:
                distinct[text] = None
                break
    return list(distinct)


@torch.no_grad()
def straightforward(model: Vqa, states: Tensor, candidates: Candidates) -> Tensor:
    """Best candidate (R,) of each question from its states (R, T, D), by the straightforward implementation."""
    med, dec = model.answer, model.config.text.dec_id
    ids = F.pad(candidates.ids, (1, 0), value=dec)
    keep = F.pad(candidates.keep, (1, 0), value=True)
    rows = len(states)
    start = torch.full((rows, 1), dec)
    first = oracle.logits(med, oracle.text(med, start, start > 0, causal=True, tokens=states))[:, 0].softmax(1)
    chosen = first.index_select(1, ids[:, 1]).topk(K, dim=1).indices
    tiled = states.repeat_interleave(K, 0)
    ids, keep = ids[chosen].flatten(0, 1), keep[chosen].flatten(0, 1)
    words = oracle.logits(med, oracle.text(med, ids, keep, causal=True, tokens=tiled))
    targets = ids.masked_fill(~keep, -100)[:, 1:]
    loss = F.cross_entropy(
        words[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="none", label_smoothing=SMOOTHING
    )
    best = loss.view(rows, K, -1).sum(2).argmin(1)
    return chosen.gather(1, best[:, None])[:, 0]


@torch.no_grad()
def ours(model: Vqa, states: Tensor, candidates: Candidates) -> Tensor:
    """Best candidate (R,) of each question from its states (R, T, D), by this project's ranking."""
    context: Context = model.answer.context(states)
    return rank(model, context, candidates, AnswerConfig(k=K, smoothing=SMOOTHING)).index[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    small = dataclasses.replace(BASE, vision=dataclasses.replace(BASE.vision, depth=1))  # the image encoder is not used
    model, candidates = Vqa(small).eval(), Listed()
    figures: dict[str, float] = {}
    for name in ("float32", "bfloat16"):
        for questions in options.questions:
            given = model, torch.randn(questions, QUESTION, BASE.text.width), candidates
            with torch.autocast("cpu", torch.bfloat16, enabled=name == "bfloat16"):
                if name == "float32" and not torch.equal(ours(*given), straightforward(*given)):
                    raise SystemExit("the two sides disagree about the best answer")
                cases = {"ours": partial(ours, *given), "straightforward": partial(straightforward, *given)}
                seconds = report.interleaved(cases, options.rounds)
            figures |= report.medians(seconds, f"seconds_{name}_{questions}_")
            figures[f"ratio_{name}_{questions}"] = report.ratio(seconds, "straightforward", "ours")
    report.write("vqa_rank", figures)


if __name__ == "__main__":
    main()
