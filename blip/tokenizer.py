"""Word pieces plus [DEC] and [ENC]: the one place where text becomes ids.

transformers' BertTokenizer is not used: given a folder without a vocabulary, or no network, it silently answers
with five tokens and reads every word as [UNK].
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from blip import hub
from blip.nn.settings import TextConfig
from blip.text import LONGEST

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, UNK, CLS, SEP, MASK, DEC, ENC = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"
_WORLD = Path(__file__).parent / "world" / "tokenizer"
_CONTRACTION = re.compile(r" ' (s|t|re|ve|ll|d|m)\b")
_FEWEST_PIECES = 32
"""Fewest pieces, besides special ones, of a vocabulary; fewer mean that loading failed."""
_FILE_BYTES, _MOST_PARTS, _LONGEST_PIECE = 1 << 25, 32, 1000
"""Most bytes of a vocabulary's file, parts of a pipeline step, and characters of a piece."""
_STEPS = {
    "normalizer": {"BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "StripAccents", "Strip", "Sequence"},
    "pre_tokenizer": {"BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Punctuation", "Digits", "Sequence"},
    "post_processor": {"BertProcessing", "TemplateProcessing"},
    "decoder": {"WordPiece"},
}
"""Allowed steps of a pipeline. Others can blow up a text (Replace), search for hours (regular expressions), or
make the library panic (Precompiled), and no vocabulary of BERT's kind has them."""


class Tokenizer:
    """A lower-case WordPiece tokenizer whose last two pieces are [DEC] and [ENC] (paper, section 3.1)."""

    def __init__(self, pieces: tokenizers.Tokenizer, where: str = "tokenizer"):
        """Take a WordPiece tokenizer; [DEC] and then [ENC] are added unless it has them. Raises ValueError."""
        from transformers import PreTrainedTokenizerFast  # here, because transformers is slow to import

        self.where = where
        self._check_vocabulary(pieces)
        # Lengths are an argument of every call; what a file says of them could be contradictory.
        pieces.no_truncation()
        pieces.no_padding()
        _begin_with_cls(pieces)
        pieces.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (DEC, ENC)])
        self._fast = PreTrainedTokenizerFast(
            tokenizer_object=pieces,
            pad_token=PAD,
            unk_token=UNK,
            cls_token=CLS,
            sep_token=SEP,
            bos_token=DEC,
            extra_special_tokens=[ENC],
            model_input_names=["input_ids", "attention_mask"],
            **({"mask_token": MASK} if pieces.token_to_id(MASK) is not None else {}),
        )
        self._pieces = tokenizers.Tokenizer.from_str(pieces.to_str())
        self._pieces.no_padding()
        self._pieces.no_truncation()
        self._pieces.encode_special_tokens = True  # "[SEP]" written in a caption is text, not an end
        id_of = self._pieces.token_to_id
        self.pad_id, self.unk_id, self.cls_id, self.sep_id = (id_of(t) for t in (PAD, UNK, CLS, SEP))
        self.dec_id, self.enc_id = id_of(DEC), id_of(ENC)
        self._first = {"cls": self.cls_id, "dec": self.dec_id, "enc": self.enc_id}

    def __getstate__(self) -> dict:
        return {"pieces": self._pieces.to_str(), "where": self.where}

    def __setstate__(self, state: dict) -> None:
        self.__init__(tokenizers.Tokenizer.from_str(state["pieces"]), state["where"])

    def _check_vocabulary(self, pieces: tokenizers.Tokenizer) -> None:
        if not isinstance(pieces.model, models.WordPiece):
            raise ValueError(f"{self.where}: holds a {type(pieces.model).__name__} model, BLIP's text is WordPiece")
        missing = [t for t in (PAD, UNK, CLS, SEP) if pieces.token_to_id(t) is None]
        if missing:
            raise ValueError(f"{self.where}: the vocabulary lacks {', '.join(missing)}; is it one of BERT's kind?")
        special = {PAD, UNK, CLS, SEP, MASK, DEC, ENC}
        vocab = pieces.get_vocab(with_added_tokens=True)
        if pieces.model.unk_token != UNK or UNK not in pieces.get_vocab(with_added_tokens=False):
            raise ValueError(f"{self.where}: its unknown piece must be {UNK}, got {pieces.model.unk_token[:40]!r}")
        if len(set(vocab.values())) != len(vocab) or max(vocab.values()) != len(vocab) - 1:
            raise ValueError(
                f"{self.where}: the ids of its {len(vocab):,} pieces must be 0 to {len(vocab) - 1:,}, each once, "
                f"and the largest is {max(vocab.values()):,}; is the file edited?"
            )
        n = sum(t not in special for t in vocab)
        if n < _FEWEST_PIECES:
            raise ValueError(f"{self.where}: only {n} word pieces; the vocabulary is missing or was not read")

    def __len__(self) -> int:
        return self._pieces.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, where: str | Path) -> Tokenizer:
        """Read a vocab.txt, a tokenizer.json, a folder with either, a hub name, or "world" for the embedded one.

        Raises FileNotFoundError, with the remedy, if it does not exist or the hub cannot be reached; ValueError if it
        is not such a vocabulary.
        """
        if str(where) == "world":
            return cls(_read(_WORLD), "world")
        path = Path(where).expanduser()
        if path.exists():
            return cls(_read(path), str(path))
        if _names_a_file(str(where)):
            raise FileNotFoundError(
                f"tokenizer {where} not found; expected a vocab.txt, a tokenizer.json or a folder with one of them"
            )
        return cls(_from_hub(str(where)), str(where))

    def pieces(self, text: str, max_length: int) -> list[int]:
        """[CLS] pieces [SEP], at most `max_length` (>= 2) ids; a long text loses its end and keeps [SEP]."""
        ids = self._pieces.encode(text[:LONGEST], add_special_tokens=False).ids
        return self._wrap(ids, self.cls_id, max_length)

    def _wrap(self, ids: list[int], first: int, max_length: int) -> list[int]:
        if max_length < 2:
            raise ValueError(f"max_length must leave room for two special tokens, got {max_length}")
        return [first, *ids[: max_length - 2], self.sep_id]

    def encode(
        self, texts: Sequence[str], *, first: Literal["cls", "dec", "enc"], max_length: int
    ) -> tuple[Tensor, Tensor]:
        """B texts -> ids (B, T) int64 and keep (B, T) bool, right-padded to the longest, T <= max_length.

        `first` is the first token by use: "cls" for embedding, "dec" for generation, "enc" for matching.
        """
        start = self._first[first]
        return self.pad([self._wrap(ids, start, max_length) for ids in self._ids_of(texts)])

    def _ids_of(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """The word pieces of texts, of at most LONGEST characters of each."""
        limited = [text[:LONGEST] for text in texts]
        return (encoded.ids for encoded in self._pieces.encode_batch(limited, add_special_tokens=False))

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """B id lists -> ids (B, T) int64 and keep (B, T) bool, right-padded to the longest."""
        length = max((len(r) for r in rows), default=0)
        ids = torch.full((len(rows), length), self.pad_id, dtype=torch.int64)
        keep = torch.zeros((len(rows), length), dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
            keep[i, : len(row)] = True
        return ids, keep

    def decode(self, ids: Tensor | list) -> list[str]:
        """(B, T) ids, or B lists of them -> B texts without special tokens."""
        rows = ids.tolist() if isinstance(ids, Tensor) else [r.tolist() if isinstance(r, Tensor) else r for r in ids]
        return [_CONTRACTION.sub(r"'\1", t) for t in self._pieces.decode_batch(rows, skip_special_tokens=True)]

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer reads too."""
        self._fast.save_pretrained(str(directory))

    def for_transformers(self, first: Literal["cls", "enc"]) -> PreTrainedTokenizerFast:
        """transformers' tokenizer of the same pieces, whose texts begin with [CLS] or [ENC] and end with [SEP]."""
        fast = copy.deepcopy(self._fast)
        pieces, start = fast.backend_tokenizer, {"cls": CLS, "enc": ENC}[first]
        if first == "enc" or pieces.post_processor is None:
            ends = [(start, self._first[first]), (SEP, self.sep_id)]
            pieces.post_processor = processors.TemplateProcessing(single=f"{start} $A {SEP}", special_tokens=ends)
        return fast

    def _ids(self) -> dict[str, int]:
        names = ("pad_id", "cls_id", "sep_id", "dec_id", "enc_id")
        return {"vocab_size": len(self), **{name: getattr(self, name) for name in names}}

    def check(self, config: TextConfig) -> None:
        """Raise ValueError unless vocabulary size and special ids are those that the model was made for."""
        problems = [
            f"{k} {v}, the model has {getattr(config, k)}" for k, v in self._ids().items() if v != getattr(config, k)
        ]
        if problems:
            raise ValueError(
                f"tokenizer {self.where} does not fit the model: {'; '.join(problems)}. "
                "Load the tokenizer that was saved with the model"
            )

    def text_config(self, config: TextConfig) -> TextConfig:
        """`config` with the vocabulary size and special ids of this tokenizer."""
        return dataclasses.replace(config, **self._ids())

    def unknown_rate(self, texts: Sequence[str]) -> float:
        """Share of word pieces of some texts that are [UNK]."""
        ids = [i for piece_ids in self._ids_of(texts) for i in piece_ids]
        return sum(i == self.unk_id for i in ids) / max(1, len(ids))

    def unknown_pieces(self, text: str) -> tuple[int, int]:
        """Numbers of unknown and of all word pieces of a text; punctuation is no word, a symbol such as an emoji is."""
        text = text[:LONGEST]
        encoded = self._pieces.encode(text, add_special_tokens=False)
        words = [i for i, (start, end) in zip(encoded.ids, encoded.offsets, strict=True) if _is_word(text[start:end])]
        return words.count(self.unk_id), len(words)

    def digest(self) -> str:
        """The tokenizer as JSON text, for fingerprints."""
        return self._pieces.to_str()


def _is_word(piece: str) -> bool:
    return any(unicodedata.category(letter)[0] in "LMN" or unicodedata.category(letter) == "So" for letter in piece)


def _begin_with_cls(pieces: tokenizers.Tokenizer) -> None:
    """Undo what `Tokenizer.for_transformers` does for models that read [ENC] first: it is the same tokenizer."""
    if ENC in json.dumps(json.loads(pieces.to_str())["post_processor"]):
        cls, sep = (pieces.token_to_id(token) for token in (CLS, SEP))
        pieces.post_processor = processors.BertProcessing((SEP, sep), (CLS, cls))


def _read(path: Path) -> tokenizers.Tokenizer:
    if path.is_dir():
        for name in ("tokenizer.json", "vocab.txt"):
            if (path / name).is_file():
                return _read(path / name)
        raise FileNotFoundError(f"tokenizer: {path} holds neither tokenizer.json nor vocab.txt")
    if (size := path.stat().st_size) > _FILE_BYTES:
        raise ValueError(f"tokenizer {path} has {size:,} bytes, more than any vocabulary of word pieces")
    if path.suffix == ".json":
        try:
            return _parsed(path.read_text(encoding="utf-8"), str(path))
        except UnicodeDecodeError as error:
            raise ValueError(f"tokenizer {path} is not a tokenizer.json: {error}") from None
    return _from_vocab(path)


def _parsed(text: str, where: str) -> tokenizers.Tokenizer:
    """Read a tokenizer.json. ValueError for anything else, or for steps that BERT's tokenizers do not have."""
    try:
        settings = json.loads(text)
        _check_steps(settings, where)
        _check_model(settings, where)
    except (TypeError, KeyError, AttributeError, RecursionError, json.JSONDecodeError) as error:
        reason = f"{type(error).__name__} {error}" if not isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"tokenizer {where} is not a tokenizer.json: {reason}") from None
    return _guarded(lambda: tokenizers.Tokenizer.from_str(text), f"tokenizer {where} is not a tokenizer.json")


def _guarded(make: Callable[[], tokenizers.Tokenizer], complaint: str) -> tokenizers.Tokenizer:
    """Call `make`; ValueError with the library's message if it refuses or panics."""
    try:
        return make()
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{complaint}: {str(error)[:200]}") from None
    except BaseException as error:
        # A panic of Rust code is no Exception, and its class cannot be imported.
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{complaint}: {str(error)[:200]}") from None


def _check_steps(settings: dict[str, Any], where: str) -> None:
    for step, known in _STEPS.items():
        parts = list(_parts(settings.get(step)))
        if len(parts) > _MOST_PARTS:
            raise ValueError(f"tokenizer {where}: its {step} has {len(parts):,} parts, more than BERT's kind has")
        for part in parts:
            if part["type"] not in known:
                raise ValueError(
                    f"tokenizer {where}: its {step} has a part of type {str(part['type'])[:40]!r}, which a vocabulary "
                    f"of BERT's kind has not; known are {', '.join(sorted(known))}"
                )
            for pieces in (part.get("single", []), part.get("pair", []), part.get("special_tokens", [])):
                if len(pieces) > _MOST_PARTS:
                    raise ValueError(f"tokenizer {where}: its {step} adds {len(pieces):,} pieces to a text")


def _parts(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield a pipeline step and, of a sequence, its parts."""
    if step is None:
        return
    yield step
    for name in ("normalizers", "pretokenizers"):
        for part in step.get(name, []):
            yield from _parts(part)


def _check_model(settings: dict[str, Any], where: str) -> None:
    model, added = settings["model"], settings.get("added_tokens") or []
    if model.get("type", "WordPiece") != "WordPiece":  # which the oldest files leave out
        raise ValueError(f"{where}: holds a {str(model.get('type'))[:40]} model, BLIP's text is WordPiece")
    vocab, longest = model["vocab"], model.get("max_input_chars_per_word", 100)
    ids = [*vocab.values(), *(token["id"] for token in added)]
    misnumbered = [i for i in ids if type(i) is not int or not 0 <= i < len(ids)]
    if misnumbered:
        raise ValueError(f"tokenizer {where}: {len(ids):,} pieces cannot have the id {str(misnumbered[0])[:40]}")
    if type(longest) is not int or not 1 <= longest <= _LONGEST_PIECE:
        raise ValueError(
            f"tokenizer {where}: max_input_chars_per_word must be 1 to {_LONGEST_PIECE}, got {str(longest)[:40]}"
        )
    bad = [token["content"] for token in added if not 1 <= len(token["content"]) <= _LONGEST_PIECE]
    if bad:
        raise ValueError(f"tokenizer {where}: {bad[0][:40]!r} among its added_tokens has {len(bad[0]):,} characters")


def _from_vocab(path: Path) -> tokenizers.Tokenizer:
    """BERT's uncased pipeline over a vocab.txt: one piece per line, its id the line number from 0."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"tokenizer {path} is not UTF-8 text; expected one word piece per line") from None
    lines = [line.rstrip("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
    vocab = {piece: i for i, piece in enumerate(lines)}
    if len(vocab) != len(lines):
        raise ValueError(f"tokenizer {path}: {len(lines) - len(vocab)} lines are repeated; ids would be ambiguous")
    missing = [t for t in (PAD, UNK, CLS, SEP) if t not in vocab]
    if missing:
        raise ValueError(f"tokenizer {path}: the vocabulary lacks {', '.join(missing)}; expected one piece per line")
    pieces = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=UNK, max_input_chars_per_word=100))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=True)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.post_processor = processors.BertProcessing((SEP, vocab[SEP]), (CLS, vocab[CLS]))
    pieces.decoder = decoders.WordPiece()
    pieces.add_special_tokens([t for t in (PAD, UNK, CLS, SEP, MASK) if t in vocab])
    return pieces


def _names_a_file(where: str) -> bool:
    return where.startswith((".", "/", "~")) or where.endswith((".txt", ".json")) or where.count("/") > 1 or not where


def _from_hub(name: str) -> tokenizers.Tokenizer:
    how = f"download it with `hf download {name} tokenizer.json vocab.txt`, or give the path of a vocab.txt"
    try:
        return _auto(name, local_files_only=True)
    except (OSError, ValueError):  # not in the cache
        pass
    if not hub.in_reach():
        raise FileNotFoundError(
            f"tokenizer {name} is neither a path nor in the hub's cache, and {hub.OUT_OF_REACH}: {how}"
        )
    try:
        return _auto(name, local_files_only=False)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"tokenizer {name} could not be downloaded from the hub ({str(error).splitlines()[0]}): {how}"
        ) from None


def _auto(name: str, *, local_files_only: bool) -> tokenizers.Tokenizer:
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(name, local_files_only=local_files_only, trust_remote_code=False)
    return _parsed(fast.backend_tokenizer.to_str(), name)
