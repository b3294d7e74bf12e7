"""Time one optimizer step of pre-training against the straightforward implementation (`tests/oracle.py`).

    python -m benchmarks.pretrain_step      # BASE, 224 px, queue 57,600, batch 4 and 8; about 5 minutes on 2 cores

Both sides run in one process, in turn, on the same batches: dropout on, forward, backward, AdamW, moving average,
queue. The C allocator keeps freed memory for both. Peak memory is that of a process that runs one side only.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
from pathlib import Path

import torch

from benchmarks import report
from blip.models.blip import Blip
from blip.models.presets import BASE, usual_options
from blip.objectives.batch import Batch
from blip.objectives.objective import Clock
from blip.objectives.pretrain import Pretrain, PretrainConfig
from blip.train.memory import keep_freed_memory

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import oracle

# Word pieces per 1,000 captions of COCO val2014 (bert-base-uncased, [CLS] and [SEP] counted): mean 13.8.
COCO_LENGTHS = {
    9: 3, 10: 36, 11: 128, 12: 183, 13: 188, 14: 156, 15: 110, 16: 72, 17: 44, 18: 26, 19: 18, 20: 10, 21: 7, 22: 5,
    23: 4, 24: 2, 25: 1, 26: 1, 27: 1, 28: 1,
}  # fmt: skip
CONFIG = PretrainConfig(alpha_ramp_epochs=0)


def batches(size: int, count: int, image_size: int = 224) -> list[Batch]:
    """Random images and word pieces with COCO's lengths."""
    g = torch.Generator().manual_seed(size)
    lengths = torch.tensor([n for n, share in COCO_LENGTHS.items() for _ in range(share)])
    made = []
    for _ in range(count):
        length = lengths[torch.randint(len(lengths), (size,), generator=g)]
        keep = torch.arange(int(length.max())) < length[:, None]
        ids = torch.randint(1000, 30000, keep.shape, generator=g)
        ids[:, 0] = 101
        ids[torch.arange(size), length - 1] = 102
        image = torch.randn(size, 3, image_size, image_size, generator=g)
        made.append(Batch(image, ids.masked_fill(~keep, 0), keep, [""] * size))
    return made


class Side:
    """A pre-training run that takes one step when called."""

    def __init__(self, data: list[Batch]) -> None:
        torch.manual_seed(0)
        self.pretrain = Pretrain(Blip(BASE, usual_options(BASE.text)), CONFIG).train()
        self.data, self.at = data, 0
        self.optimizer = torch.optim.AdamW(self.pretrain.model.parameters(), lr=1e-5, fused=self.fused)

    def next(self) -> Batch:
        self.at += 1
        return self.data[self.at % len(self.data)]


class Ours(Side):
    fused = True

    def step(self, bfloat16: bool = False) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            outcome = self.pretrain(self.next(), Clock(epoch=1.0))
        sum(outcome.losses.values()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.pretrain.after_step([outcome.carry])


class Straightforward(Side):
    fused = None

    def step(self) -> None:
        batch, pretrain = self.next(), self.pretrain
        with torch.no_grad():
            pretrain.model.temperature.clamp_(0.001, 0.5)
        oracle.move_teacher(pretrain, CONFIG.momentum)
        losses, (image, text) = oracle.losses(pretrain, batch.image, batch.ids, batch.keep, CONFIG.alpha)
        oracle.push(pretrain.image_queue, image)
        oracle.push(pretrain.text_queue, text)
        self.optimizer.zero_grad()
        sum(losses).backward()
        self.optimizer.step()


def peak_memory(side: type[Side], size: int, options: dict) -> float:
    """Peak memory in GB, measured in a separate process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (side, size, options))


def _peak(side: type[Side], size: int, options: dict) -> float:
    keep_freed_memory()
    run = side(batches(size, 2))
    for _ in range(3):
        run.step(**options)
    # Not getrusage: its maximum is inherited from the parent process.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps per case (default 5)")
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 8], help="batch sizes (default 4 8)")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak-memory runs")
    args = parser.parse_args()
    keep_freed_memory()
    figures: dict[str, float] = {}
    for size in args.batch:
        data = batches(size, 4)
        ours, plain = Ours(data), Straightforward(data)
        cases = {
            "straightforward": plain.step,
            "float32": ours.step,
            "bfloat16": lambda run=ours: run.step(bfloat16=True),
        }
        seconds = report.interleaved(cases, args.rounds)
        figures |= {f"{key}_batch{size}": value for key, value in report.medians(seconds).items()}
        for precision in ("float32", "bfloat16"):
            figures[f"ratio_{precision}_batch{size}"] = report.ratio(seconds, "straightforward", precision)
        del ours, plain, cases
        if not args.no_memory:
            figures[f"peak_gb_straightforward_batch{size}"] = peak_memory(Straightforward, size, {})
            figures[f"peak_gb_float32_batch{size}"] = peak_memory(Ours, size, {})
            figures[f"peak_gb_bfloat16_batch{size}"] = peak_memory(Ours, size, {"bfloat16": True})
    report.write("pretrain_step", figures)


if __name__ == "__main__":
    main()
