"""Visual dialogue: where does a model rank the right answer among its candidates (paper, section 5.5)?

`ranks_of(model, tokenizer, source)` ranks the candidates of every round, `score(source, ranks)` computes MRR, recall,
mean rank and NDCG as the official code does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from blip import dist
from blip.data.prepare.dialogues import Conversation, Conversations, DialogueRows, read_image
from blip.data.settings import DataConfig
from blip.data.transforms import EvalTransform
from blip.errors import BadSample, DataError, counted
from blip.models import dialogue as task
from blip.nn import host
from blip.tokenizer import Tokenizer
from eval.options import VisdialOptions
from eval.runner import Runner, evaluating, in_parts, listed, spread

MAX_WORDS = 40
"""Most words of a caption, a question or an answer."""
RECALLS = (1, 5, 10)

Place = tuple[int | str, int]
"""An image and the number of a round, from 1."""
Ranks = dict[Place, list[int]]
"""For each round the rank, from 1, of each of its candidates in their order."""


def evaluate(options: VisdialOptions, runner: Runner) -> Iterator[tuple[str, float]]:
    """Evaluate ranks of a model or a file; writes ranks.json, the ranks of the model."""
    source = Conversations(options.source)
    if options.model:
        source.check_some_exist()
        with runner.model(task.Dialogue) as loaded:
            ways = {"limit": options.limit, "max_tokens": options.max_tokens, "batch": options.batch}
            ranked = ranks_of(loaded.model, loaded.tokenizer, source, **ways)
    else:
        ranked = read_ranks(Path(options.results))
    if not dist.is_main():
        return
    if options.model:
        runner.out.write("ranks.json", evalai_json(ranked))
        dialogues = source.dialogues[: options.limit]
        if not any(one.relevance or any(turn.true is not None for turn in one.rounds) for one in dialogues):
            return runner.unscored("ranks.json", "answers")
    runner.as_they_are = ("mean_rank", "rounds")
    runner.record("model", "results", "limit", "max_tokens", "source")
    yield from score(source, ranked, limit=options.limit, partial=options.allow_partial).items()


# Ranks ----------------------------------------------------------------------------------------------------------------


def ranks_of(
    model: task.Dialogue,
    tokenizer: Tokenizer,
    source: Conversations,
    *,
    limit: int | None = None,
    max_tokens: int | None = None,
    batch: int = 200,
) -> Ranks:
    """Rank the candidates of all rounds that have some, of the first `limit` dialogues; all processes share the work.

    `batch` rows go through the model at once; all rounds of a dialogue share the projection of its image.
    `max_tokens` of a row are read, as many as the model can when not given. Among equal scores the earlier candidate
    comes first. DataError, in every process, for an image that cannot be read.
    """
    longest = min(max_tokens or model.config.text.max_positions, model.config.text.max_positions)
    config = DataConfig(max_words=MAX_WORDS, max_tokens=longest)
    transform = EvalTransform(model.config.vision.image_size)

    def rank(one: Conversation) -> list[tuple[Place, list[int]]]:
        numbers = [number for number, turn in enumerate(one.rounds) if len(turn.options)]
        if not numbers:
            return []
        rows = DialogueRows(source, one, tokenizer, config)
        try:
            image = read_image(one, source.root, DataConfig.max_pixels, transform)
            caption = rows.caption()
        except BadSample as error:
            raise DataError(f"{one.where}, image {one.image_id}, cannot be evaluated: {error}") from None
        texts = [text for number in numbers for text in rows.round(number, one.rounds[number].options.tolist())]
        scores = _scores(model, tokenizer, image, caption, texts, batch)
        parts = scores.split([len(one.rounds[number].options) for number in numbers])
        return [((one.image_id, n + 1), ranks(part).tolist()) for n, part in zip(numbers, parts, strict=True)]

    with evaluating(model):
        return dict(spread(source.dialogues[:limit], rank, what="dialogues"))


def _scores(
    model: task.Dialogue, tokenizer: Tokenizer, image: Tensor, caption: list[int], texts: list[list[int]], batch: int
) -> Tensor:
    """Score each row of text (R) by the difference of the matching head's logits, (R,) on the CPU."""
    device = next(model.parameters()).device
    ids, keep = (x.to(device, non_blocking=True) for x in tokenizer.pad([caption]))
    context = model.context(image[None].to(device, non_blocking=True), ids, keep)
    differences = []
    for part in in_parts(texts, batch):
        ids, keep = (x.to(device, non_blocking=True) for x in tokenizer.pad(part))
        logits = model.match(ids, keep, context.expand(len(ids))).float()
        differences.append(logits[:, 1] - logits[:, 0])
    return host.read(torch.cat(differences))[0]


def ranks(scores: Tensor) -> Tensor:
    """Scores (..., candidates) -> the rank of each, from 1 for the highest; equal ones in their order."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    places = torch.arange(1, scores.shape[-1] + 1, device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


# Scores ---------------------------------------------------------------------------------------------------------------


def score(
    source: Conversations, ranked: Mapping[Place, Sequence[int]], *, limit: int | None = None, partial: bool = False
) -> dict[str, float]:
    """Mean reciprocal rank, recall at 1, 5 and 10, mean rank, and NDCG where there are dense annotations.

    Ranks of other dialogues are left out. DataError if a round has no ranks, unless `partial`, or ranks that do not
    fit; or if no round has its right answer marked and none is annotated.
    """
    right, dense, missing = [], [], []
    for one in source.dialogues[:limit]:
        for number, turn in enumerate(one.rounds):
            annotated = one.relevance is not None and one.relevance[0] == number
            if not len(turn.options) or (turn.true is None and not annotated):
                continue
            place = (one.image_id, number + 1)
            if place not in ranked:
                missing.append(place)
                continue
            given = list(ranked[place])
            if sorted(given) != list(range(1, len(turn.options) + 1)):
                raise DataError(f"image {place[0]}, round {place[1]}: expected the ranks 1 to {len(turn.options)}")
            if turn.true is not None:
                right.append(given[turn.true])
            if annotated and any(one.relevance[1]):
                dense.append((given, one.relevance[1]))
    if missing and not (partial and (right or dense)):
        places = [f"image {image} round {number}" for image, number in missing]
        raise DataError(f"no ranks for {counted(places, 'round')}; give all, or allow_partial")
    if not right and not dense:
        raise DataError(f"{source.path}: no round has its right answer marked; ranks can be written, not scored")
    scores = _sparse(torch.tensor(right)) if right else {}
    return scores | ({"ndcg": ndcg(dense)} if dense else {})


def _sparse(right: Tensor) -> dict[str, float]:
    """MRR, recall and mean rank in float32 as in the official code, equal to the last digit."""
    right = right.float()
    scores = {"mrr": right.reciprocal().mean().item()}
    scores |= {f"r@{k}": (right <= k).float().mean().item() for k in RECALLS}
    return scores | {"mean_rank": right.mean().item(), "rounds": float(len(right))}


def ndcg(rounds: Sequence[tuple[Sequence[int], Sequence[float]]]) -> float:
    """Normalised discounted cumulative gain of (ranks, relevance) pairs, each cut off at its number of relevant."""
    total = torch.tensor(0.0)
    for given, relevance in rounds:
        gains = torch.tensor(relevance)
        count = int((gains != 0).sum())
        best = gains.sort(descending=True).values
        total = total + _dcg(gains[torch.tensor(given).argsort()][:count]) / _dcg(best[:count])
    return float(total / len(rounds))


def _dcg(gains: Tensor) -> Tensor:
    return (gains / torch.log2(torch.arange(len(gains)).float() + 2)).sum(-1)


# Files ----------------------------------------------------------------------------------------------------------------


def evalai_json(ranked: Mapping[Place, Sequence[int]]) -> str:
    """Format ranks as EvalAI's server expects them."""
    rows = [{"image_id": image, "round_id": number, "ranks": list(given)} for (image, number), given in ranked.items()]
    return listed(rows)


def read_ranks(path: Path) -> Ranks:
    """Read ranks from a file like that of `evalai_json`. DataError names the row at fault."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error})") from None
    expected = 'expected [{"image_id": ..., "round_id": ..., "ranks": [...]}, ...]'
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path}: {expected}")
    ranks_by_place: Ranks = {}
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not {"image_id", "round_id", "ranks"} <= row.keys():
            raise DataError(f"{path}: row {number} is {str(row)[:60]}; {expected}")
        place, given = (row["image_id"], row["round_id"]), row["ranks"]
        if not isinstance(place[0], int | str) or not isinstance(place[1], int) or not _whole(given):
            raise DataError(f"{path}: row {number} is {str(row)[:60]}; {expected}")
        if place in ranks_by_place:
            raise DataError(f"{path}: row {number}: duplicate image {place[0]}, round {place[1]}")
        ranks_by_place[place] = given
    return ranks_by_place


def _whole(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(v, int) and not isinstance(v, bool) for v in values)
