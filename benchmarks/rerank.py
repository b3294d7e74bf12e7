"""Time matching of many texts with many images against transformers' BLIP with the same weights.

    python -m benchmarks.rerank      # BASE, 384 px, float32 and bfloat16; some 15 minutes on 2 cores
    python -m benchmarks.rerank --rounds 1 --sample 2                       # about 3 minutes

`image`: one image with 128 texts, from pixels to logits. `both`: re-ranking of 32 images and 160 texts in both
directions at k = 16; `--sample` of the images are timed, each with all texts that it is matched with. Both sides
include the image encoder. transformers' model is used in its most favourable way: its image encoder runs once per
image, the pairs of both directions are merged, and their texts are sorted by length and batched; it projects the image
again for every text. Both sides run in one process, in turn, at equal precision. Texts have the lengths of COCO's
captions.
"""

from __future__ import annotations

import argparse
import dataclasses
import warnings

import torch
import transformers
from torch import Tensor

from benchmarks import report
from benchmarks.pretrain_step import COCO_LENGTHS
from blip.checkpoints.layouts import transformers_matching
from blip.checkpoints.table import to_theirs
from blip.inference.matching import match
from blip.models.blip import Blip, starting_with
from blip.models.presets import BASE
from blip.models.settings import BlipConfig
from blip.train.memory import keep_freed_memory
from eval.retrieval import candidates

CONFIG = dataclasses.replace(BASE, vision=dataclasses.replace(BASE.vision, image_size=384))
IMAGES, TEXTS, K, TEXTS_OF_ONE = 32, 160, 16, 128


def texts(count: int, config: BlipConfig) -> tuple[Tensor, Tensor]:
    """Random word pieces with COCO's lengths, starting with [CLS]."""
    g = torch.Generator().manual_seed(1)
    lengths = torch.tensor([n for n, share in COCO_LENGTHS.items() for _ in range(share)])
    length = lengths[torch.randint(len(lengths), (count,), generator=g)]
    keep = torch.arange(int(length.max())) < length[:, None]
    ids = torch.randint(1000, 30000, keep.shape, generator=g)
    ids[:, 0] = config.text.cls_id
    ids[torch.arange(count), length - 1] = config.text.sep_id
    return ids.masked_fill(~keep, config.text.pad_id), keep


def theirs(model: Blip) -> transformers.BlipForImageTextRetrieval:
    """transformers' matching model with the model's weights."""
    config, side = model.config.text, model.config.vision.image_size
    text = {
        "vocab_size": config.vocab_size, "hidden_size": config.width, "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads, "intermediate_size": config.hidden, "layer_norm_eps": config.norm_eps,
        "bos_token_id": config.dec_id, "sep_token_id": config.sep_id, "eos_token_id": config.sep_id,
        "pad_token_id": config.pad_id, "encoder_hidden_size": model.vision.width,
        "max_position_embeddings": config.max_positions,
    }  # fmt: skip
    vit = model.vision.vit
    vision = {
        "image_size": side, "patch_size": vit.patch_embed.patch_size[0], "hidden_size": model.vision.width,
        "num_hidden_layers": len(vit.blocks), "num_attention_heads": vit.blocks[0].attn.num_heads,
        "intermediate_size": 4 * model.vision.width, "layer_norm_eps": 1e-6, "initializer_range": 0.02,
    }  # fmt: skip
    both = transformers.BlipConfig(
        text_config=text, vision_config=vision, image_text_hidden_size=model.config.embed_dim
    )
    other = transformers.BlipForImageTextRetrieval(both).eval()
    table = transformers_matching(model)
    other.load_state_dict(to_theirs(table, model.state_dict()), strict=True)
    return other


class Case:
    """Images with the texts that each is matched with, for both sides."""

    def __init__(
        self, model: Blip, other: transformers.BlipForImageTextRetrieval | None, images: Tensor, pairs: Tensor
    ) -> None:
        """`pairs` (B, M) bool marks which of M texts are matched with each of B images."""
        weight = model.temperature
        self.model, self.other, self.images = model, other, images.to(weight.device, weight.dtype)
        self.chosen = [row.nonzero().squeeze(1) for row in pairs]
        ids, self.keep = texts(pairs.shape[1], model.config)
        self.ids = starting_with(ids, model.config.text.enc_id)

    @torch.no_grad()
    def ours(self) -> Tensor:
        tokens = self.model.vision(self.images)
        return torch.cat(match(self.model, tokens, self.ids, self.keep, self.chosen))

    @torch.no_grad()
    def theirs(self, batch: int = 32) -> Tensor:
        by_image = []
        states = self.other.vision_model(self.images).last_hidden_state
        for rows, image in zip(self.chosen, states, strict=True):
            order = self.keep[rows].sum(1).argsort()
            logits = torch.empty(len(rows), 2)
            for part in order.split(batch):
                longest = int(self.keep[rows[part]].sum(1).max())
                ids, keep = self.ids[rows[part], :longest], self.keep[rows[part], :longest]
                shown = image.expand(len(part), -1, -1)
                state = self.other.text_encoder(ids, attention_mask=keep.long(), encoder_hidden_states=shown)
                logits[part] = self.other.itm_head(state.last_hidden_state[:, 0]).float()
            by_image.append(logits)
        return torch.cat(by_image)


def pairs_of(images: int, count: int, k: int) -> Tensor:
    """Mark which of `count` texts each image is matched with: its k best, and those that have it among their k best."""
    of_image, of_text = candidates(torch.randn(images, count, generator=torch.Generator().manual_seed(3)), k)
    return of_image | of_text


def main(config: BlipConfig = CONFIG) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timed runs per case (default 3)")
    parser.add_argument("--sample", type=int, default=4, help="number of the 32 images that are timed (default 4)")
    parser.add_argument("--precision", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    args = parser.parse_args()
    keep_freed_memory()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="transformers")
    torch.manual_seed(0)
    model = Blip(config).eval()
    other = theirs(model)
    side = config.vision.image_size
    images = torch.randn(IMAGES, 3, side, side, generator=torch.Generator().manual_seed(2))
    pairs = pairs_of(IMAGES, TEXTS, K)
    every = torch.linspace(0, IMAGES - 1, min(args.sample, IMAGES)).round().long()
    cases = {
        "image": (images[:1], torch.ones(1, TEXTS_OF_ONE, dtype=torch.bool)),
        "both": (images[every], pairs[every]),
    }
    figures: dict[str, float] = {"pairs_of_both": float(pairs.sum()), "sampled_images": float(len(every))}
    for precision in args.precision:
        model, other = model.to(getattr(torch, precision)), other.to(getattr(torch, precision))
        for name, (shown, chosen) in cases.items():
            case = Case(model, other, shown, chosen)
            if (precision, name) == ("float32", "image"):
                difference = (case.ours() - case.theirs()).abs().max().item()
                assert difference < 1e-3, f"the two sides' logits differ by {difference}"
                figures["largest_difference"] = difference
            seconds = report.interleaved({"ours": case.ours, "transformers": case.theirs}, args.rounds, warmup=0)
            figures |= {f"{key}_{name}_{precision}": value for key, value in report.medians(seconds).items()}
            figures[f"ratio_{name}_{precision}"] = report.ratio(seconds, "transformers", "ours")
            print(f"  {name:<8}{precision:<10}{figures[f'ratio_{name}_{precision}']:.2f}", flush=True)
    report.write("rerank", figures)


if __name__ == "__main__":
    main()
