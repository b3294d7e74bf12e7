"""Time captioning, from image to token ids, against transformers' BLIP with the same weights.

    python -m benchmarks.caption      # BASE, 384 px, batch 1 and 8, float32 and bfloat16; about 10 minutes on 2 cores

Both sides run in one process, in turn, at equal precision, and take the 16 steps from "[DEC] a picture of" to 20
tokens: the weights are random, so [SEP] is forbidden until then. The last layer's output is scaled so that the entropy
of the next token is about that of a trained captioner (2 nats), on which the cost of nucleus sampling depends.
"""

from __future__ import annotations

import argparse
import dataclasses
import warnings

import torch
import transformers
from torch import Tensor

from benchmarks import report
from blip.checkpoints.layouts import transformers_captioning
from blip.checkpoints.table import to_theirs
from blip.inference.generate import generate, queries
from blip.inference.settings import DecodeConfig
from blip.models.blip import Blip
from blip.models.presets import BASE
from blip.models.settings import BlipConfig
from blip.nn.context import Context
from blip.train.memory import keep_freed_memory

CONFIG = dataclasses.replace(BASE, vision=dataclasses.replace(BASE.vision, image_size=384))
PROMPT = [BASE.text.dec_id, 1037, 3861, 1997]
LENGTH = 20
METHODS = {
    "beam3": DecodeConfig(beams=3, max_length=LENGTH, min_length=LENGTH),
    "nucleus": DecodeConfig(method="nucleus", top_p=0.9, max_length=LENGTH, min_length=LENGTH),
}
SHARPNESS = 11.0


def ours(config: BlipConfig = CONFIG) -> Blip:
    torch.manual_seed(0)
    model = Blip(config).eval()
    torch.nn.init.constant_(model.med.head_norm.weight, SHARPNESS)
    return model


def theirs(model: Blip) -> transformers.BlipForConditionalGeneration:
    """transformers' captioner with the model's weights."""
    text = {
        "vocab_size": BASE.text.vocab_size, "num_attention_heads": BASE.text.heads, "bos_token_id": BASE.text.dec_id,
        "sep_token_id": BASE.text.sep_id, "eos_token_id": BASE.text.sep_id, "pad_token_id": BASE.text.pad_id,
        "layer_norm_eps": BASE.text.norm_eps, "encoder_hidden_size": model.vision.width,
    }  # fmt: skip
    vision = {"image_size": 384, "layer_norm_eps": 1e-6, "initializer_range": 0.02}
    config = transformers.BlipConfig(text_config=text, vision_config=vision)
    other = transformers.BlipForConditionalGeneration(config).eval()
    table = transformers_captioning(model)
    other.load_state_dict(to_theirs(table, model.state_dict()), strict=True)
    return other


class Case:
    """One decoding method on one batch, for both sides, and the parts of ours."""

    def __init__(
        self, model: Blip, other: transformers.BlipForConditionalGeneration | None, method: str, size: int
    ) -> None:
        self.model, self.other, self.config, self.size = model, other, METHODS[method], size
        side, weight = model.vision.image_size, model.med.word.weight
        self.images = torch.randn(size, 3, side, side, generator=torch.Generator().manual_seed(1))
        self.images = self.images.to(weight.device, weight.dtype)
        with torch.no_grad():
            self.tokens = model.vision(self.images)
            self.context = self.project()

    def prompts(self) -> Tensor:
        return torch.tensor([PROMPT] * self.size, device=self.images.device)

    @torch.no_grad()
    def vision(self) -> None:
        self.model.vision(self.images)

    @torch.no_grad()
    def project(self) -> Context:
        return self.model.med.context(self.tokens, queries=queries(self.config, len(PROMPT)))

    def steps(self) -> None:
        self._write(self.context)

    @torch.no_grad()
    def ours(self) -> Tensor:
        self.tokens = self.model.vision(self.images)
        return self._write(self.project())

    def _write(self, context: Context) -> Tensor:
        prompts, keys = self.prompts(), [str(i) for i in range(self.size)]
        ids = generate(self.model, context, prompts, torch.ones_like(prompts).bool(), self.config, keys).ids[:, 0]
        assert ids.shape[1] == LENGTH
        return ids

    def theirs(self) -> Tensor:
        config = self.config
        how = {"num_beams": config.beams} if config.method == "beam" else {"do_sample": True, "top_p": config.top_p}
        prompts = torch.cat([self.prompts(), torch.full((self.size, 1), BASE.text.sep_id)], dim=1)  # it drops [SEP]
        ids = self.other.generate(
            self.images, prompts, **how, top_k=0, max_length=config.max_length, min_length=config.min_length
        )
        assert ids.shape[1] == LENGTH
        return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each case (default 5)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes (default 1 8)")
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=METHODS, help="default: all")
    parser.add_argument("--precision", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    args = parser.parse_args()
    keep_freed_memory()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="transformers")
    figures: dict[str, float] = {}
    model = ours()
    other = theirs(model)
    for precision in args.precision:
        model, other = model.to(getattr(torch, precision)), other.to(getattr(torch, precision))
        for method in args.method:
            for size in args.batch:
                name, case = f"{precision}_{method}_batch{size}", Case(model, other, method, size)
                if (precision, method) == ("float32", "beam3"):
                    assert torch.equal(case.ours(), case.theirs()), "the two sides generate different captions"
                parts = {"ours": case.ours, "transformers": case.theirs}
                parts |= {"vision": case.vision, "context": case.project, "steps": case.steps}
                seconds = report.interleaved(parts, args.rounds)
                figures |= {f"{key}_{name}": value for key, value in report.medians(seconds).items()}
                figures[f"ratio_{name}"] = report.ratio(seconds, "transformers", "ours")
                print(f"  {name:<32} {figures[f'ratio_{name}']:.2f}", flush=True)
    report.write("caption", figures)


if __name__ == "__main__":
    main()
