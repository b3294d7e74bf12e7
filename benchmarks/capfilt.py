"""Time CapFilt's scoring, from images and web texts to scores, against transformers' BLIP with the same weights.

    python -m benchmarks.capfilt      # BASE, 384 px, batch 8, float32 and bfloat16; about 5 minutes on 2 cores

Ours is CapFilt's own scorer: it generates a caption by nucleus sampling, matches web text and caption with the image,
and also computes the cosines of the joint embeddings. The other side follows transformers' documentation:
`BlipForConditionalGeneration.generate`, then `BlipForImageTextRetrieval` once for the web texts and once for the
synthetic ones, each call encoding the images again. Captioner and filter have different weights. Both sides run in one
process, in turn, at equal precision and batch size, from decoded images to numbers. The weights are random, so every
caption has 20 tokens, with about the entropy of a trained captioner's (benchmarks/caption.py); web texts have the
lengths of COCO's captions. The job's overhead on top of its models is measured by benchmarks/capfilt_job.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import string
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor

from benchmarks import report
from benchmarks.caption import LENGTH, SHARPNESS
from benchmarks.pretrain_step import COCO_LENGTHS
from blip.checkpoints.layouts import transformers_captioning, transformers_matching
from blip.checkpoints.table import to_theirs
from blip.models.blip import Blip
from blip.models.presets import BASE
from blip.models.settings import BlipConfig
from blip.nn.pixels import MEAN, STD
from blip.tokenizer import Tokenizer
from blip.train.memory import keep_freed_memory
from capfilt.score.models import BlipScorer
from capfilt.score.scorer import Item, Scores
from capfilt.settings import ScoreConfig

PROMPT = "a picture of"
WORDS = ["".join(letters) for letters in itertools.islice(itertools.product(string.ascii_lowercase, repeat=4), 30000)]


def tokenizer() -> Tokenizer:
    """A tokenizer with BERT's vocabulary size and special tokens, in which each of WORDS is one piece."""
    vocabulary = [f"[unused{i}]" for i in range(30522)]
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    for at, word in [*special.items(), *enumerate([*PROMPT.split(), *WORDS], 200)]:
        vocabulary[at] = word
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.txt"
        path.write_text("\n".join(vocabulary))
        return Tokenizer.load(path)


def blip(config: BlipConfig, seed: int) -> Blip:
    """A model with random weights that generates with about a trained one's entropy."""
    torch.manual_seed(seed)
    model = Blip(config).eval()
    torch.nn.init.constant_(model.med.head_norm.weight, SHARPNESS)
    return model


def batch(side: int, size: int) -> list[Item]:
    """Decoded images, each with a web text."""
    dice = np.random.default_rng(1)
    lengths = [n - 2 for n, share in COCO_LENGTHS.items() for _ in range(share)]  # without [CLS] and [SEP]
    return [
        Item(
            f"{i:032x}",
            [dice.integers(0, 256, (side, side, 3), dtype=np.uint8)],
            [" ".join(dice.choice(WORDS, dice.choice(lengths)))],
        )
        for i in range(size)
    ]


class Ours(BlipScorer):
    """CapFilt's scorer, with captions of equal length."""

    def __init__(
        self,
        captioner: Blip,
        filter: Blip,
        words: Tokenizer,
        config: ScoreConfig,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__((captioner, words), (filter, words), config, device)
        self.decode = dataclasses.replace(self.decode, max_length=LENGTH, min_length=LENGTH)


class Theirs:
    """transformers' captioner and filter with the same weights."""

    def __init__(self, captioner: Blip, filter: Blip, words: Tokenizer) -> None:
        self.words = words
        config = transformers_config(captioner.config)
        self.captioner = transformers.BlipForConditionalGeneration(config).eval()
        table = transformers_captioning(captioner)
        self.captioner.load_state_dict(to_theirs(table, captioner.state_dict()), strict=True)
        self.filter = transformers.BlipForImageTextRetrieval(config).eval()
        table = transformers_matching(filter)
        self.filter.load_state_dict(to_theirs(table, filter.state_dict()), strict=True)

    def to(self, dtype: torch.dtype) -> Theirs:
        self.captioner.to(dtype), self.filter.to(dtype)
        return self

    @torch.inference_mode()
    def score(self, items: list[Item]) -> tuple[list[str], Tensor, Tensor]:
        """Generate captions; returns them, and the match logits of web texts and of captions."""
        pixels = self._pixels(items)
        ids, _ = self.words.encode([PROMPT] * len(items), first="dec", max_length=LENGTH)  # it drops [SEP]
        how = {"do_sample": True, "top_p": 0.9, "top_k": 0, "max_length": LENGTH, "min_length": LENGTH}
        written = self.captioner.generate(pixels, ids, **how)
        assert written.shape[1] == LENGTH
        captions = [text.removeprefix(PROMPT) for text in self.words.decode(written)]
        web = self._match(pixels, [item.texts[0] for item in items])
        return captions, web, self._match(pixels, captions)

    def _pixels(self, items: list[Item]) -> Tensor:
        pixels = torch.from_numpy(np.stack([item.pixels[0] for item in items])).permute(0, 3, 1, 2).float().div(255)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        return pixels.sub(mean).div(std).to(self.filter.dtype)

    def _match(self, pixels: Tensor, texts: list[str]) -> Tensor:
        ids, keep = self.words.encode(texts, first="cls", max_length=ScoreConfig.max_tokens)
        return self.filter(input_ids=ids, pixel_values=pixels, attention_mask=keep.long()).itm_score


def transformers_config(config: BlipConfig) -> transformers.BlipConfig:
    text, vision = config.text, config.vision
    words = {
        "vocab_size": text.vocab_size, "hidden_size": text.width, "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads, "intermediate_size": text.hidden, "layer_norm_eps": text.norm_eps,
        "max_position_embeddings": text.max_positions, "bos_token_id": text.dec_id, "sep_token_id": text.sep_id,
        "eos_token_id": text.sep_id, "pad_token_id": text.pad_id, "encoder_hidden_size": vision.width or 768,
    }  # fmt: skip
    images = {
        "image_size": vision.image_size, "patch_size": vision.patch_size or 16, "hidden_size": vision.width or 768,
        "num_hidden_layers": vision.depth or 12, "num_attention_heads": vision.heads or 12,
        "intermediate_size": 4 * (vision.width or 768), "layer_norm_eps": 1e-6, "initializer_range": 0.02,
    }  # fmt: skip
    return transformers.BlipConfig(text_config=words, vision_config=images, image_text_hidden_size=config.embed_dim)


def check_equal(captioner: Blip, filter: Blip, words: Tokenizer, theirs: Theirs, items: list[Item]) -> None:
    """Check that both sides give the web texts the same logits, if both begin with [CLS]; AssertionError if not."""
    same = Ours(captioner, filter, words, ScoreConfig(filter="-", decode="nucleus", itm_token="cls"))
    ours: list[Scores] = same.score(items)
    _, web, _ = theirs.score(items)
    margins = torch.tensor([scores.web[0].margin for scores in ours])
    torch.testing.assert_close(margins, (web[:, 1] - web[:, 0]).clone(), rtol=1e-3, atol=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timed batches per side (default 3)")
    parser.add_argument("--batch", type=int, default=8, help="images per batch (default 8)")
    parser.add_argument("--precision", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--smoke", action="store_true", help="check that it runs, with two narrow layers at 64 px")
    given = parser.parse_args()
    keep_freed_memory()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="transformers")
    vision, text = dataclasses.replace(BASE.vision, image_size=384), BASE.text
    if given.smoke:
        vision = dataclasses.replace(vision, image_size=64, width=64, depth=2, heads=2)
        text = dataclasses.replace(text, width=64, layers=2, heads=2, hidden=128)
    config = dataclasses.replace(BASE, vision=vision, text=text)
    words, items = tokenizer(), batch(vision.image_size, given.batch)
    captioner, filter = blip(config, 0), blip(config, 1)
    theirs = Theirs(captioner, filter, words)
    check_equal(captioner, filter, words, theirs, items)
    figures: dict[str, float] = {}
    for precision in given.precision:
        scorer = Ours(captioner, filter, words, ScoreConfig(filter="-", decode="nucleus", precision=precision))
        theirs.to(getattr(torch, precision))
        cases = {"ours": lambda s=scorer: s.score(items), "transformers": lambda: theirs.score(items)}
        seconds = report.interleaved(cases, given.rounds)
        for side, middle in report.medians(seconds, prefix="").items():
            figures[f"images_per_second_{side}_{precision}"] = given.batch / middle
        figures[f"ratio_{precision}"] = report.ratio(seconds, "transformers", "ours")
        print(f"  {precision:<10} {figures[f'ratio_{precision}']:.2f}", flush=True)
    report.write("capfilt_smoke" if given.smoke else "capfilt", {**figures, "batch": given.batch})


if __name__ == "__main__":
    main()
