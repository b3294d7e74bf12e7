"""Greedy decoding, beam search and nucleus sampling with a key-value cache (paper, section 4.3).

R rows (prompts), K texts generated side by side for each (beams or samples), P prompt tokens, S tokens that may be
generated, N = R * K, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from blip.inference.settings import DecodeConfig
from blip.keyed import mix
from blip.models.protocols import Generates, require
from blip.nn import host
from blip.nn.context import Context
from blip.nn.settings import TextConfig
from blip.nn.stack import Cache
from blip.nn.text import TextTransformer

if TYPE_CHECKING:
    from blip.tokenizer import Tokenizer

HEAD = 128
"""Number of most likely tokens among which the nucleus is searched first."""
_SHRINK = 0.75
"""Drop finished rows once at most this share is unfinished; dropping copies the contexts."""
_CHECK = 8
"""Steps after which a device, which waits for the host for that, is asked whether all rows are finished."""


class GeneratedIds(NamedTuple):
    """Generated token ids, `num` texts of each row: beams best first, samples by their numbers. All on the CPU."""

    ids: Tensor
    """(R, num, T) int64, the prompt included; pads follow the end."""
    logprobs: Tensor
    """(R, num, T) float32 log-probability of each generated token under the model; 0 at prompt and pads."""
    scores: Tensor
    """(R, num) float32: sum of log-probabilities / length ** length_penalty, by which beams are ordered; what counts as
    length is `length_rule`."""
    finished: Tensor
    """(R, num) bool, True where [SEP] ended the text rather than max_length."""


class CaptionText(NamedTuple):
    """A generated text."""

    text: str
    """Words of the text without the prompt."""
    logprob: float
    """Natural logarithm of the text's probability, [SEP] included."""
    finished: bool
    """Whether [SEP] ended the text rather than max_length."""


@torch.no_grad()
def generate_texts(
    model: Generates,
    tokenizer: Tokenizer,
    images: Tensor | Context,
    config: DecodeConfig,
    *,
    prompt: str | Sequence[str] = "",
    keys: Sequence[str] | None = None,
) -> list[list[CaptionText]]:
    """Generate `config.num` texts for each of some images (B, 3, S, S), image tokens (B, P, V) or contexts.

    `prompt` is the beginning of every text, or one for each. The rest is as in `generate`.
    """
    require(model, Generates)
    text, weight = model.config.text, model.decoder.word.weight
    tokenizer.check(text)
    rows = len(images) if isinstance(images, Tensor) else len(images) * images.group_size
    beginnings = [prompt] * rows if isinstance(prompt, str) else list(prompt)
    # Without the [SEP] that ends an encoded text; a prompt too long for the model is not cut, so that it is refused.
    ids, keep = tokenizer.encode(beginnings, first="dec", max_length=text.max_positions + 2)
    ids, keep = ids[:, :-1], keep[:, 1:]
    if isinstance(images, Tensor):
        images = images.to(weight.device, weight.dtype, non_blocking=True)
        tokens = model.vision(images) if images.dim() == 4 else images
        images = model.context(tokens, queries=queries(config, ids.shape[1]))
    generated = generate(model, images, ids, keep, config, keys)
    lengths = keep.sum(1).tolist()
    word_ids = [ids[n:] for row, n in zip(generated.ids.tolist(), lengths, strict=True) for ids in row]
    logprobs, finished = generated.logprobs.sum(-1).flatten().tolist(), generated.finished.flatten().tolist()
    texts = [CaptionText(*values) for values in zip(tokenizer.decode(word_ids), logprobs, finished, strict=True)]
    return [texts[i : i + config.num] for i in range(0, len(texts), config.num)]


def queries(config: DecodeConfig, prompt: int) -> int:
    """Number of text tokens that will attend to each image, given the prompt's: an argument of `Stack.context`."""
    return prompt + _group_size(config) * (config.max_length - prompt - 1)


def _group_size(config: DecodeConfig) -> int:
    """K."""
    return config.beams if config.method == "beam" else config.num


@torch.no_grad()
def generate(
    model: Generates,
    context: Context,
    prompts: Tensor,
    keep: Tensor,
    config: DecodeConfig,
    keys: Sequence[str] | None = None,
) -> GeneratedIds:
    """Continue prompts, ids (R, P) that start with [DEC], `keep` (R, P) bool a prefix of every row.

    Rows attend to `context` in order, `context.group_size` neighbours to each image; prompts may differ in length. A
    sample is a function of the seed, the row's key in `keys` (which only nucleus needs) and its number among the row's
    samples, so it depends neither on the other rows nor on their order. Beam search and the rules that change
    probabilities are those of transformers' `generate`. ValueError if the model is in training mode or sizes differ.
    """
    prompts, keep = host.read(prompts, keep)
    _check(model, context, prompts, keep, config, keys)
    text, device = model.config.text, context.kv[0].device
    steps, even = config.max_length - int(keep.sum(1).min()), bool(keep.all())
    seeds = _seeds(config, keys).to(device, non_blocking=True) if config.method == "nucleus" and keys else None
    prompts, keep = (grid.to(device, non_blocking=True) for grid in (prompts, keep))
    rows = _Rows(torch.arange(len(prompts), device=device), prompts.where(keep, text.dec_id), keep.sum(1), seeds)
    group_size = _group_size(config)
    search = (_Beams if config.method == "beam" and group_size > 1 else _Samples)(rows, steps, group_size, config, text)
    reader = _Reader(model.decoder, context, prompts, keep, group_size, steps, even)
    on_cpu, parts = device.type == "cpu", []
    states = reader.prompt()
    for step in range(steps):
        words, parents = search.step(model.decoder.vocabulary(states).float(), step)
        if step + 1 == steps:
            break
        if on_cpu or step % _CHECK == _CHECK - 1:
            going = host.read(search.going)[0].nonzero().squeeze(1)
            if not len(going):
                break
            if on_cpu and context.group_size == 1 and len(going) <= _SHRINK * len(words):
                parts.append((search.rows.number[~search.going], _at(search.results, ~search.going)))
                search.take(going)
                reader.take(going)
                words, parents = words[going], parents[going]
        states = reader.next(words, parents)
    parts.append((search.rows.number, search.results))
    return _assemble(parts, prompts, keep, config.num, text.pad_id)


def _check(
    model: Generates, context: Context, prompts: Tensor, keep: Tensor, config: DecodeConfig, keys: Sequence[str] | None
) -> None:
    text, rows = model.config.text, len(prompts)
    require(model, Generates)
    if model.training:
        raise ValueError("the model is in training mode, which would make its texts random; call model.eval() first")
    if prompts.shape != keep.shape or prompts.dim() != 2 or not prompts.numel():
        raise ValueError(
            f"prompts {list(prompts.shape)} and keep {list(keep.shape)} must be two equal grids of rows and tokens"
        )
    if rows != len(context) * context.group_size:
        raise ValueError(f"{rows} prompts for {len(context)} contexts with {context.group_size} texts each")
    lengths = keep.sum(1)
    prefix = torch.arange(keep.shape[1], device=keep.device) < lengths[:, None]
    if not bool((prefix == keep).all() & (prompts[:, 0] == text.dec_id).all() & keep[:, 0].all()):
        raise ValueError("every prompt must start with [DEC] and be padded on the right only")
    if bool(((prompts == text.sep_id) & keep).any()):
        raise ValueError("a prompt contains [SEP], which ends a text; remove it")
    longest = int(lengths.max())
    if longest > text.max_positions:
        raise ValueError(f"a prompt of {longest} tokens exceeds the model's {text.max_positions} positions")
    if config.max_length > text.max_positions:
        raise ValueError(f"max_length {config.max_length} exceeds the model's {text.max_positions} positions")
    if longest >= config.max_length:
        raise ValueError(f"a prompt of {longest} tokens leaves no room up to max_length {config.max_length}")
    if config.method == "beam" and 2 * config.beams >= text.vocab_size:
        raise ValueError(f"{config.beams} beams are too many for a vocabulary of {text.vocab_size}")
    if config.method == "nucleus":
        _check_keys(rows, keys)


def _check_keys(rows: int, keys: Sequence[str] | None) -> None:
    if keys is None or len(keys) != rows:
        raise ValueError(f"nucleus needs a key for each of {rows} rows, got {'none' if keys is None else len(keys)}")
    not_text = [key for key in keys if not isinstance(key, str)]
    if not_text:
        raise ValueError(f"a row's key is a str, got {type(not_text[0]).__name__} {not_text[0]!r}")


class _Reader:
    """The decoder with its cache, which has one slot for each prompt token and K for each step.

    Candidates share the prompt's slots; each sees only those of the beginning that it continues, so beams that fork
    copy nothing.
    """

    def __init__(
        self,
        decoder: TextTransformer,
        context: Context,
        prompts: Tensor,
        keep: Tensor,
        group_size: int,
        steps: int,
        even: bool,
    ) -> None:
        rows, length = prompts.shape
        self.decoder, self.context, self.prompts, self.keep = decoder, context, prompts, keep
        self.group_size = group_size
        self.at = keep.sum(1)
        self.cache = Cache(length + group_size * (steps - 1))
        everything = even and group_size == 1
        self.sees = None if everything else keep[:, None].expand(rows, group_size, length)  # (R, K, filled)

    def prompt(self) -> Tensor:
        """States (R, 1, D) at the last token of each prompt."""
        rows, length = self.prompts.shape
        positions = torch.arange(length, device=self.at.device)
        sees = (positions <= positions[:, None]) & self.keep[:, None] if length > 1 else None
        states = self.decoder.step(self.prompts, positions.expand(rows, -1), sees, self.cache, self.context)
        return states[torch.arange(rows, device=self.at.device), self.at - 1][:, None]

    def next(self, words: Tensor, parents: Tensor) -> Tensor:
        """States (R, K, D) after one more word (R, K) each, which continues candidate `parents` (R, K)."""
        if self.sees is not None:
            own = torch.eye(self.group_size, dtype=torch.bool, device=words.device).expand(len(words), -1, -1)
            self.sees = torch.cat([_pick(self.sees, parents), own], dim=2)
        # Finished rows may run past the last position; their states are not used.
        positions = self.at.clamp(max=self.decoder.config.max_positions - 1)[:, None].expand_as(words)
        self.at = self.at + 1
        return self.decoder.step(words, positions, self.sees, self.cache, self.context)

    def take(self, index: Tensor) -> None:
        """Keep only the rows at `index`."""
        self.cache.take(index)
        self.context, self.at = self.context[index], self.at[index]
        self.sees = None if self.sees is None else self.sees[index]


class _Rows(NamedTuple):
    """Inputs of some rows."""

    number: Tensor
    """(R,) index in the caller's batch."""
    prompts: Tensor
    """(R, P) with [DEC] in place of padding."""
    lengths: Tensor
    """(R,) prompt tokens."""
    noise: Tensor | None
    """(R, K) int64 seeds of the samples."""


class _Results(NamedTuple):
    """Texts of some rows."""

    words: Tensor
    """(R, K, S), pads after the end."""
    logprobs: Tensor
    """(R, K, S), 0 after the end."""
    count: Tensor
    """(R, K) words, [SEP] included."""
    scores: Tensor
    """(R, K), minus infinity where there is no text yet."""
    finished: Tensor
    """(R, K) bool."""


class _Search:
    """What both ways of decoding share: the rules that change probabilities, and dropping finished rows."""

    def __init__(self, rows: _Rows, steps: int, group_size: int, config: DecodeConfig, text: TextConfig) -> None:
        self.rows, self.group_size, self.config, self.text = rows, group_size, config, text
        self.shortest = config.max_length - steps
        self.going = torch.ones_like(rows.number, dtype=torch.bool)  # (R,) unfinished
        words = rows.number.new_full((len(rows.number), group_size, steps), text.pad_id)
        none = torch.zeros_like(words[..., 0])
        scores = torch.full_like(none, float("-inf"), dtype=torch.float32)
        self.results = _Results(words, torch.zeros_like(words, dtype=torch.float32), none, scores, none.bool())

    def ruled(self, scores: Tensor, words: Tensor) -> Tensor:
        """Apply transformers' rules, in its order, to scores (R, K, V) of words to follow `words` (R, K, written)."""
        config, rows, written = self.config, self.rows, words.shape[2]
        if config.repetition_penalty != 1:
            previous = torch.cat([rows.prompts[:, None].expand(-1, words.shape[1], -1), words], dim=2)
            old = scores.gather(2, previous)
            new = torch.where(old < 0, old * config.repetition_penalty, old / config.repetition_penalty)
            scores = scores.scatter(2, previous, new)
        if self.shortest + written < config.min_length:
            scores = scores.clone()
            short = (rows.lengths + written < config.min_length)[:, None]
            scores[..., self.text.sep_id].masked_fill_(short, float("-inf"))
        return scores

    def room(self, written: int) -> Tensor:
        """(R, 1) bool, whether a text of a row may have a word more than `written`."""
        return (self.rows.lengths + written < self.config.max_length)[:, None]

    def take(self, index: Tensor) -> None:
        """Keep only the rows at `index`."""
        self.rows, self.results, self.going = _at(self.rows, index), _at(self.results, index), self.going[index]


class _Samples(_Search):
    """Greedy decoding, or independent samples."""

    def step(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Add a word to each text by logits (R, 1 or K, V) -> the words (R, K), and which text each continues."""
        words, logprobs, count, _, ended = self.results
        logits = logits.expand(-1, self.group_size, -1)
        scores = self.ruled(logits, words[..., :step])
        if self.rows.noise is None:
            chosen = scores.argmax(2)
        else:
            noise = _mixed(self.rows.noise + _signed(_GOLDEN * (step + 1)))
            chosen = _draw(scores.flatten(0, 1), noise.flatten(), self.config).view_as(count)
        sure = logits.gather(2, chosen[..., None]).squeeze(2) - logits.logsumexp(2)
        going = ~ended & self.room(step)
        words[..., step] = chosen.where(going, self.text.pad_id)
        logprobs[..., step] = sure.where(going, 0.0)
        count, ended = count + going, ended | (going & (chosen == self.text.sep_id))
        length = count if self.config.length_rule == "generated" else self.rows.lengths[:, None] + count - ended.long()
        self.results = _Results(words, logprobs, count, logprobs.sum(2) / length**self.config.length_penalty, ended)
        self.going = (~ended & self.room(step + 1)).any(1)
        return words[..., step], torch.arange(self.group_size, device=words.device).expand_as(count)


class _Beams(_Search):
    """Beam search as in transformers: a row is over when its best beginning scores below its worst finished text.

    The length rule `2022` follows transformers 4.15, which differs in three things. A text's length counts the prompt
    and not [SEP]. Whether a row is over depends on its best candidate, even one that ends. At the last step the texts
    that end come first, and only then, if the row is not over, all K beginnings.
    """

    def __init__(self, rows: _Rows, steps: int, group_size: int, config: DecodeConfig, text: TextConfig) -> None:
        super().__init__(rows, steps, group_size, config, text)
        self.words, self.logprobs = self.results.words.clone(), self.results.logprobs.clone()
        self.totals = self.logprobs[:, :1, 0]  # (R, 1, then K) sums of ruled log-probabilities, best first
        self.norms: Tensor | None = None  # (R, S + 1) length ** length_penalty of a prompt and so many words
        if config.length_rule == "2022":
            lengths = rows.lengths[:, None] + torch.arange(steps + 1, device=rows.lengths.device)
            self.norms = (lengths.double() ** config.length_penalty).float()

    def step(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Extend the beginnings by logits (R, 1 or K, V) -> the words (R, K), and which beginning each continues."""
        sure = logits.log_softmax(2)
        scores = self.totals[..., None] + self.ruled(sure, self.words[:, : logits.shape[1], :step])
        # A beginning ends with [SEP] in one way only, so at least K of 2 K candidates continue.
        totals, place = scores.flatten(1).topk(2 * self.group_size)
        parents, chosen = place // logits.shape[2], place % logits.shape[2]
        words, logprobs = _pick(self.words, parents), _pick(self.logprobs, parents)
        words[..., step], logprobs[..., step] = chosen, sure.flatten(1).gather(1, place)
        ended = chosen == self.text.sep_id
        if self.norms is None:
            over, norm = ended | ~self.room(step + 1), (step + 1) ** self.config.length_penalty
        else:
            over, norm = ended, self.norms[:, step : step + 1]

        new = slice(self.group_size)
        self._keep(words[:, new], logprobs[:, new], totals[:, new] / norm, over[:, new], ended[:, new], step)
        best = totals[:, 0]
        self.totals, continued = totals.masked_fill(over, float("-inf")).topk(self.group_size)
        self.words, self.logprobs = _pick(words, continued), _pick(logprobs, continued)
        if self.norms is None:
            best = self.totals[:, 0]
        self.going = self.going & (best[:, None] / norm > self.results.scores.amin(1, keepdim=True)).squeeze(1)
        if self.norms is not None and self.rows.prompts.shape[1] + step + 1 >= self.config.max_length:
            last = ~self.room(step + 1)
            scores = self.totals / self.norms[:, step + 1 : step + 2]
            over, ended = last.expand_as(continued), torch.zeros_like(continued).bool()
            self._keep(self.words, self.logprobs, scores, over, ended, step)
            self.going = self.going & ~last.squeeze(1)
        return _pick(chosen, continued), _pick(parents, continued)

    def _keep(self, words: Tensor, logprobs: Tensor, scores: Tensor, over: Tensor, ended: Tensor, step: int) -> None:
        """Keep the best K by score of the finished texts and the new ones (R, K, S) that are `over` (R, K)."""
        scores = scores.where(over & self.going[:, None], float("-inf"))
        new = _Results(words, logprobs, torch.full_like(self.results.count, step + 1), scores, ended)
        both = _Results(*(torch.cat(pair, dim=1) for pair in zip(self.results, new, strict=True)))
        best = both.scores.topk(self.group_size).indices
        self.results = _Results(*(_pick(part, best) for part in both))

    def take(self, index: Tensor) -> None:
        super().take(index)
        self.words, self.logprobs, self.totals = self.words[index], self.logprobs[index], self.totals[index]
        self.norms = None if self.norms is None else self.norms[index]


def _draw(scores: Tensor, noise: Tensor, config: DecodeConfig) -> Tensor:
    """Draw a word (N,) for each row of scores (N, V): temperature, top-k, top-p, then by noise (N,) int64."""
    if config.temperature != 1:
        scores = scores / config.temperature
    if config.top_k:
        scores, words = scores.topk(min(config.top_k, scores.shape[1]))
        return _from_nucleus(scores, words, scores.logsumexp(1), noise, config.top_p)
    width = HEAD if scores.device.type == "cpu" and config.top_p < 1 else scores.shape[1]
    return _from_head(scores, scores.logsumexp(1), noise, config.top_p, width)


def _from_head(scores: Tensor, total: Tensor, noise: Tensor, top_p: float, width: int) -> Tensor:
    """Draw from the nucleus, sorting only the `width` most likely tokens if these reach top_p, else more."""
    head, words = scores.topk(min(width, scores.shape[1]))
    drawn = _from_nucleus(head, words, total, noise, top_p)
    if width < scores.shape[1]:
        reached = (head.double() - total[:, None]).exp().sum(1)
        more = (reached < top_p).nonzero().squeeze(1)
        if len(more):
            drawn[more] = _from_head(scores[more], total[more], noise[more], top_p, 16 * width)
    return drawn


def _from_nucleus(scores: Tensor, words: Tensor, total: Tensor, noise: Tensor, top_p: float) -> Tensor:
    """Draw among words (N, n) with scores (N, n) in falling order, of whose exponentials `total` (N,) is the log sum.

    The largest of score + Gumbel noise is drawn, the noise being a function of the word: the same distribution as by
    inverting the cumulative one, but scores that differ in the last bit, as between batch sizes, change the outcome
    only where the two largest are that close, however the words in between are ordered.
    """
    scores = scores.double()
    probs = (scores - total[:, None]).exp()
    outside = probs.cumsum(1) - probs >= top_p
    bits = _mixed(noise[:, None] + _GOLDEN * (words + 1))
    uniform = ((bits >> 12 & (1 << 52) - 1).double() + 0.5) * 2.0**-52  # all exact, neither 0 nor 1
    gumbel = -(-uniform.log()).log()
    return words.gather(1, (scores + gumbel).masked_fill(outside, float("-inf")).argmax(1, keepdim=True)).squeeze(1)


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64: every bit of x flips about half of the result's."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _FIRST
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _SECOND
    return x ^ (x >> 31 & (1 << 33) - 1)


def _seeds(config: DecodeConfig, keys: Sequence[str]) -> Tensor:
    """Mix the seed, the rows' keys and the samples' numbers to seeds (R, num) int64."""
    hashes = [int.from_bytes(hashlib.blake2b(k.encode("utf-8", "surrogatepass"), digest_size=8).digest()) for k in keys]
    seeds = [[mix(config.seed, h, number) for number in range(config.num)] for h in hashes]
    return torch.tensor([[_signed(s) for s in row] for row in seeds])


def _assemble(
    parts: list[tuple[Tensor, _Results]], prompts: Tensor, keep: Tensor, num: int, pad_id: int
) -> GeneratedIds:
    """Join the texts of all rows in the caller's order, behind their prompts."""
    order = torch.cat([number for number, _ in parts]).argsort()
    results = _Results(*(torch.cat(part)[order, :num] for part in zip(*(results for _, results in parts), strict=True)))
    rows, _, steps = results.words.shape
    lengths = keep.sum(1)[:, None, None]
    place = (lengths + torch.arange(steps, device=keep.device)).expand_as(results.words)
    ids = prompts.where(keep, pad_id)[:, None].expand(rows, num, -1)
    ids = torch.nn.functional.pad(ids, (0, steps), value=pad_id).scatter(2, place, results.words)
    logprobs = torch.zeros_like(ids, dtype=torch.float32).scatter(2, place, results.logprobs)
    ends = lengths.squeeze(2) + results.count
    ids, logprobs, scores, finished, ends = host.read(ids, logprobs, results.scores, results.finished, ends)
    return GeneratedIds(ids[..., : int(ends.max())], logprobs[..., : int(ends.max())], scores, finished)


def _signed(x: int) -> int:
    """The low 64 bits of x as torch holds them."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


_GOLDEN, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))  # splitmix64's
Group = TypeVar("Group", bound=NamedTuple)


def _at(group: Group, index: Tensor) -> Group:
    """The rows at `index` of every tensor."""
    return type(group)(*(None if part is None else part[index] for part in group))


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """(R, K, ...) and (R, M) -> (R, M, ...): in each row the entries at `index`."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]
