"""Measure training, captioning, matching and CapFilt on one GPU, and compare its results with the CPU's.

    python -m benchmarks.gpu                              # at most eight minutes on one card
    python -m benchmarks.gpu --only marks pretrain        # some parts
    python -m benchmarks.gpu --device cpu --tiny          # check that it runs, with narrow models, in seconds

Each figure is printed as a line of JSON when it is there, and all of them at the end and in runs/bench/gpu.json. A part
that takes too long is stopped, a case that needs too much memory fails; the others go on. `mfu` is the share of the
card's own matrix products (`marks`) that the counted operations of benchmarks/cost.py reach. All weights are random.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import io
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor

from benchmarks import capfilt, caption, cost, report, rerank
from benchmarks.pretrain_step import batches
from blip import files
from blip.data.images import model_input
from blip.data.settings import DataConfig, SourceConfig
from blip.errors import is_out_of_memory
from blip.inference.generate import generate, queries
from blip.inference.settings import DecodeConfig
from blip.models.blip import Blip
from blip.models.presets import BASE, LARGE, TINY, usual_options
from blip.models.settings import BlipConfig
from blip.objectives.batch import Batch
from blip.objectives.matching import Mismatches
from blip.objectives.objective import Clock
from blip.objectives.pretrain import Pretrain, PretrainConfig
from blip.train.loop import fit
from blip.train.settings import TrainConfig
from capfilt.settings import ScoreConfig
from recipes.building import build_feed

Figures = dict[str, Any]
START = "spawn"
"""How a process starts: one that was forked could not use CUDA."""


class Sizes(NamedTuple):
    """How large the cases are."""

    base: BlipConfig = BASE
    large: BlipConfig = LARGE
    small: BlipConfig = TINY
    side: int = 384
    """Side of the images that are captioned and matched, pixels."""
    queue: int = 57600
    batches: tuple[int, ...] = (32, 96)
    captioned: tuple[int, ...] = (1, 32, 256)
    scored: int = 256
    """Images that CapFilt scores at once."""
    compared: int = 8
    """Images of the comparison with the CPU."""
    steps: int = 15
    """Timed steps of a training case."""
    matrix: int = 8192
    photographs: int = 512
    narrow: bool = False
    """Whether the models are too small to be worth a figure."""


def _narrow(config: BlipConfig) -> BlipConfig:
    vision = dataclasses.replace(config.vision, image_size=32, width=64, depth=2, heads=2)
    return dataclasses.replace(config, vision=vision, text=dataclasses.replace(TINY.text, width=64, hidden=128))


NARROW = Sizes(*map(_narrow, (BASE, LARGE, TINY)), 32, 64, (4,), (1, 2), 4, 2, 2, 64, 16, narrow=True)


class Bench(NamedTuple):
    """What every case needs to know."""

    device: torch.device
    sizes: Sizes

    def wait(self) -> None:
        """Wait until the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any], rounds: int = 5) -> float:
        """Median time of a call."""
        return report.medians(report.interleaved({"": run}, rounds), "")[""]

    def seen(self, config: BlipConfig) -> BlipConfig:
        """A model for images to caption and match."""
        return dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=self.sizes.side))


Cases = Iterator[tuple[str, Callable[[], Figures]]]

# The card's own marks -------------------------------------------------------------------------------------------------


def marks(bench: Bench) -> Cases:
    yield "matrix product in bfloat16", partial(_product, bench)
    yield "training step of timm's ViT-B/16", partial(_plain_vit, bench)


def _product(bench: Bench) -> Figures:
    n = bench.sizes.matrix
    a, b = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    return {"tflops": 2 * n**3 / bench.seconds(lambda: a @ b, 20) / 1e12}


def _plain_vit(bench: Bench) -> Figures:
    """Autocast, fused AdamW, 1,000 classes."""
    size, narrow = bench.sizes.batches[-1], bench.sizes.narrow
    shape = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2} if narrow else {}
    vit = timm.create_model("vit_base_patch16_224", **shape).to(bench.device)
    optimizer = torch.optim.AdamW(vit.parameters(), lr=1e-4, fused=True)
    images = torch.randn(size, 3, *vit.patch_embed.img_size, device=bench.device)
    classes = torch.zeros(size, dtype=torch.long, device=bench.device)

    def step() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(vit(images).float(), classes)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = bench.seconds(step, 10)
    counted = 0 if narrow else 3 * cost.vision(cost.SHAPES["BASE, 224 px"])
    return {"seconds": seconds, "images_per_second": size / seconds, "tflops": size / seconds * counted / 1e12}


# Training -------------------------------------------------------------------------------------------------------------


def pretrain(bench: Bench) -> Cases:
    sizes = bench.sizes
    for size, precision in itertools.product(sizes.batches, ("bfloat16", "float32")):
        yield f"BASE {precision} batch {size}", partial(_train, bench, sizes.base, size, precision)
    yield f"TINY bfloat16 batch {sizes.batches[0]}", partial(_train, bench, sizes.small, sizes.batches[0], "bfloat16")


def pretrain_large(bench: Bench) -> Cases:
    for size in bench.sizes.batches:
        yield f"LARGE bfloat16 batch {size}", partial(_train, bench, bench.sizes.large, size, "bfloat16")


def pretrain_compiled(bench: Bench) -> Cases:
    """The narrow models are not compiled, which takes longer than all else together."""
    if not bench.sizes.narrow:
        for size in reversed(bench.sizes.batches):
            arguments = bench, bench.sizes.base, size, "bfloat16"
            yield f"BASE bfloat16 batch {size} compiled", partial(_train, *arguments, compile=True)


def loader(bench: Bench) -> Cases:
    yield f"BASE bfloat16 batch {bench.sizes.batches[-1]}, images from disk", partial(_train_from_disk, bench)


class _Measured(Exception):
    """The steps to time are over; raised instead of the checkpoint at the end of a run."""


class _Timed:
    """Training data that notes when each batch was wanted and when it was there, and ends the run after `steps`."""

    def __init__(self, source: Callable[[int], Iterator[Batch]], steps: int) -> None:
        self.source, self.steps = source, steps
        self.wanted: list[float] = []
        self.given: list[float] = []

    def __len__(self) -> int:
        return 1_000_000

    def leave_out(self, keys: frozenset[str]) -> None: ...

    def batches(self, start: int, count: int, rank: int, world: int, batch_size: int) -> Iterator[Batch]:
        source = self.source(batch_size)
        try:
            for _ in range(self.steps):
                self.wanted.append(time.perf_counter())
                batch = next(source)
                self.given.append(time.perf_counter())
                yield batch
            self.wanted.append(time.perf_counter())
            raise _Measured
        finally:
            if hasattr(source, "close"):  # data workers read files that are deleted
                source.close()


def _train(bench: Bench, config: BlipConfig, size: int, precision: str, compile: bool = False) -> Figures:
    """Steps of the training loop itself, on batches in memory with the lengths of COCO's captions."""
    made = batches(size, 4, config.vision.image_size)
    data = _Timed(lambda _: itertools.cycle(made), bench.sizes.steps + 5)
    return _steps(bench, config, data, size, precision, compile)


def _train_from_disk(bench: Bench) -> Figures:
    """Steps on JPEG files of 640 x 480 pixels, decoded and augmented by data workers."""
    sizes, words = bench.sizes, capfilt.tokenizer()
    workers = min(16, os.cpu_count() or 1) if bench.device.type == "cuda" else 0
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for i, content in zip(range(sizes.photographs), _photographs(8), strict=False):
            name = f"{i}.jpg"
            (Path(folder) / name).write_bytes(content)
            rows.append({"image": name, "caption": " ".join(capfilt.WORDS[i : i + 11])})
        listed = Path(folder) / "pairs.json"
        listed.write_text(json.dumps(rows))
        settings = DataConfig([SourceConfig(str(listed))], workers=workers)
        feed, _ = build_feed(settings, sizes.base.vision.image_size, words, seed=0)
        data = _Timed(lambda size: iter(feed.batches(0, sizes.steps + 5, 0, 1, size)), sizes.steps + 5)
        figures = _steps(bench, sizes.base, data, sizes.batches[-1], "bfloat16", compile=False)
    waits = [b - a for a, b in zip(data.wanted, data.given, strict=False)][5:]
    share = sum(waits) / (data.wanted[-1] - data.wanted[5])
    return {**figures, "data_wait": share, "workers": workers}


def _steps(bench: Bench, config: BlipConfig, data: _Timed, size: int, precision: str, compile: bool) -> Figures:
    with bench.device:  # which is faster at drawing random weights
        model = Blip(config, usual_options(config.text))
        objective = Pretrain(model, PretrainConfig(queue_size=bench.sizes.queue, alpha_ramp_epochs=0))
    settings = TrainConfig(steps=10**6, batch_size=size, precision=precision, compile=compile)
    with tempfile.TemporaryDirectory() as out, _tf32():
        try:
            fit(objective, data, settings, out=Path(out) / "run")
        except _Measured:
            bench.wait()
    times = [b - a for a, b in itertools.pairwise(data.wanted)]
    seconds = statistics.median(times[5:])
    figures = {"seconds": seconds, "slowest": max(times[5:]), "first_step": times[0], "second_step": times[1]}
    figures["pairs_per_second"] = size / seconds
    counted = {BASE: "BASE, 224 px", LARGE: "LARGE, 224 px"}
    if config in counted:
        figures["tflops"] = cost.pretraining(cost.SHAPES[counted[config]]) * size / seconds / 1e12
    return figures


@contextmanager
def _tf32() -> Iterator[None]:
    """Allow TF32 in float32, which is off otherwise."""
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def _photographs(count: int) -> Iterator[bytes]:
    """JPEG files of 640 x 480 pixels, the same `count` again and again."""
    dice, made = np.random.default_rng(0), []
    for _ in range(count):
        buffer = io.BytesIO()
        coarse = Image.fromarray(dice.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        made.append(buffer.getvalue())
    return itertools.cycle(made)


# Captioning and matching ----------------------------------------------------------------------------------------------


def captions(bench: Bench) -> Cases:
    model = caption.ours(bench.seen(bench.sizes.base)).to(bench.device, torch.bfloat16)
    for method, size in itertools.product(caption.METHODS, bench.sizes.captioned):
        yield f"{method} batch {size}", partial(_captions, bench, model, method, size)


def _captions(bench: Bench, model: Blip, method: str, size: int) -> Figures:
    """BASE in bfloat16, to 20 tokens, from normalised images on the device."""
    case = caption.Case(model, None, method, size)
    seconds, vision = bench.seconds(case.ours), bench.seconds(case.vision)
    return {"seconds": seconds, "images_per_second": size / seconds, "vision_share": vision / seconds}


def reranking(bench: Bench) -> Cases:
    model = caption.ours(bench.seen(bench.sizes.base)).to(bench.device, torch.bfloat16)
    g = torch.Generator().manual_seed(2)
    images = torch.randn(rerank.IMAGES, 3, bench.sizes.side, bench.sizes.side, generator=g)
    pairs = rerank.pairs_of(rerank.IMAGES, rerank.TEXTS, rerank.K)
    of_one = torch.ones(1, rerank.TEXTS_OF_ONE, dtype=torch.bool)
    yield "one image with 128 texts", partial(_rerank, bench, model, images[:1], of_one)
    yield "32 images and 160 texts, both directions, k = 16", partial(_rerank, bench, model, images, pairs)


def _rerank(bench: Bench, model: Blip, images: Tensor, pairs: Tensor) -> Figures:
    seconds = bench.seconds(rerank.Case(model, None, images, pairs).ours)
    return {"seconds": seconds, "pairs_per_second": int(pairs.sum()) / seconds}


def capfilt_scoring(bench: Bench) -> Cases:
    yield f"BASE bfloat16 batch {bench.sizes.scored}", partial(_capfilt, bench)


def _capfilt(bench: Bench) -> Figures:
    """CapFilt's scorer on decoded images, one web text each; then its stages one by one, each waited for."""
    sizes, config, words = bench.sizes, bench.seen(bench.sizes.base), capfilt.tokenizer()
    items = capfilt.batch(sizes.side, sizes.scored)
    settings = ScoreConfig(filter="-", decode="nucleus", precision="bfloat16")
    scorer = capfilt.Ours(capfilt.blip(config, 0), capfilt.blip(config, 1), words, settings, bench.device)
    seconds = bench.seconds(lambda: scorer.score(items), 3)
    figures = {"seconds": seconds, "images_per_second": len(items) / seconds}
    if config.vision == bench.seen(BASE).vision:
        counted = cost.capfilt(cost.SHAPES["BASE, 384 px"])[cost.ONCE]
        figures["tflops"] = counted * len(items) / seconds / 1e12
    images = [*itertools.islice(_photographs(8), 8)]
    start = time.perf_counter()
    for content in images:
        model_input(content, 10**8, lambda image: image.resize((sizes.side, sizes.side)), sizes.side)
    figures["decoding_seconds_per_image"] = (time.perf_counter() - start) / len(images)
    figures["cores_to_decode"] = figures["images_per_second"] * figures["decoding_seconds_per_image"]
    return figures | _stages(bench, scorer, items)


def _stages(bench: Bench, scorer: capfilt.Ours, items: list[Any]) -> Figures:
    """Share of a batch's time in each stage; what is left is preparation and bookkeeping on the host."""
    spent: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            bench.wait()
            start, inner = time.perf_counter(), sum(spent.values())
            result = function(*args, **options)
            bench.wait()
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - start - (sum(spent.values()) - inner)
            return result

        return run

    for name, method in (("to_device", "_images"), ("text", "_caption"), ("matching", "_match")):
        setattr(scorer, method, timed(name, getattr(scorer, method)))
    for model in (scorer.captioner, scorer.filter):
        model.vision.forward = timed("vision", model.vision.forward)
    start = time.perf_counter()
    scorer.score(items)
    bench.wait()
    whole = time.perf_counter() - start
    return {f"share_{name}": seconds / whole for name, seconds in spent.items()}


# The same as on a CPU -------------------------------------------------------------------------------------------------


def agreement(bench: Bench) -> Cases:
    yield "losses and image tokens, float32 without TF32", partial(_same_losses, bench)
    yield "captions", partial(_same_captions, bench)


def _same_losses(bench: Bench) -> Figures:
    """Largest differences from the CPU, relative to the largest value, with given hard negatives and no dropout."""
    sizes = bench.sizes
    torch.manual_seed(0)
    objective = Pretrain(Blip(sizes.base), PretrainConfig(queue_size=sizes.queue, alpha_ramp_epochs=0)).eval()
    (batch,) = batches(sizes.compared, 1, sizes.base.vision.image_size)
    results: dict[str, dict[str, Tensor]] = {}
    for device in ("cpu", bench.device):
        objective, here = objective.to(device), batch.to(torch.device(device))
        around = torch.arange(sizes.compared, device=device).roll(1)
        objective._mismatches = lambda *_, around=around: Mismatches(around, around)
        # With gradients, as training computes them.
        values = {**objective(here, Clock(epoch=1.0)).losses, "image_tokens": objective.model.vision(here.image)}
        results[str(device)] = {name: value.detach().double().cpu() for name, value in values.items()}
    ours, theirs = results[str(bench.device)], results["cpu"]
    differences = {name: float((ours[name] - value).abs().max() / value.abs().max()) for name, value in theirs.items()}
    return {**differences, "agrees": all(value < 1e-4 for value in differences.values())}


def _same_captions(bench: Bench) -> Figures:
    """Share of greedy captions that are the CPU's, in float32 without TF32 and in bfloat16."""
    model = caption.ours(bench.seen(bench.sizes.base))
    greedy = DecodeConfig(beams=1, max_length=caption.LENGTH, min_length=caption.LENGTH)
    count, side = bench.sizes.compared, bench.sizes.side
    images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))

    def ids(device: torch.device, dtype: torch.dtype) -> Tensor:
        model.to(device, dtype)
        with torch.no_grad():
            tokens = model.vision(images.to(device, dtype))
            context = model.context(tokens, queries=queries(greedy, len(caption.PROMPT)))
            prompts = torch.tensor([caption.PROMPT] * count, device=device)
            return generate(model, context, prompts, torch.ones_like(prompts).bool(), greedy).ids[:, 0].cpu()

    expected = ids(torch.device("cpu"), torch.float32)
    same = {
        f"equal_{dtype}": float((ids(bench.device, getattr(torch, dtype)) == expected).all(1).float().mean())
        for dtype in ("float32", "bfloat16")
    }
    return {**same, "agrees": same["equal_float32"] == 1}


# Running the parts ----------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Some cases that share a time limit, seconds."""

    cases: Callable[[Bench], Cases]
    limit: float


PARTS = {
    "marks": Part(marks, 30),
    "pretrain": Part(pretrain, 90),
    "pretrain_compiled": Part(pretrain_compiled, 80),
    "pretrain_large": Part(pretrain_large, 50),
    "loader": Part(loader, 40),
    "captions": Part(captions, 60),
    "reranking": Part(reranking, 20),
    "capfilt": Part(capfilt_scoring, 40),
    "agreement": Part(agreement, 50),
}


def run(part: str, bench: Bench) -> Iterator[Figures]:
    """Yield the result of each case of a part; a case that fails says why and does not end the others."""
    on_gpu, cases = bench.device.type == "cuda", PARTS[part].cases(bench)
    while True:
        result: Figures = {"part": part}
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            case = next(cases, None)
            if case is None:
                return
            result["case"], measure = case
            result |= measure()
        except Exception as error:
            result["failed"] = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
        if on_gpu:
            result["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        yield result
        if "case" not in result:
            return  # what the cases have in common failed
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()


def _work(link: Connection, device: str, sizes: Sizes) -> None:
    """Run the parts that the parent names; send their results, and None at the end of each."""
    bench = Bench(torch.device(device), sizes)
    link.send(None)
    while part := link.recv():
        for result in run(part, bench):
            link.send(result)
        link.send(None)


class _Worker:
    """A process that runs parts, and is replaced when one of them takes too long."""

    def __init__(self, device: str, sizes: Sizes) -> None:
        context = multiprocessing.get_context(START)
        self.link, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, device, sizes))
        self.process.start()
        theirs.close()
        self.link.recv()  # once it has imported everything

    def results(self, part: str, limit: float) -> Iterator[Figures]:
        """Yield the results of a part, the last one a failure if it takes longer than `limit` seconds or dies."""
        end = time.monotonic() + limit
        self.link.send(part)
        try:
            while self.link.poll(max(0.0, end - time.monotonic())):
                if (result := self.link.recv()) is None:
                    return
                yield result
            failure = f"stopped after {limit:.0f} s"
        except EOFError:
            failure = "the process died"
        self.close()
        yield {"part": part, "failed": failure}

    @property
    def alive(self) -> bool:
        return not self.link.closed

    def close(self) -> None:
        """End the process."""
        self.link.close()
        self.process.kill()
        self.process.join()


def measure(parts: list[str], device: str, sizes: Sizes, out: Path) -> list[Figures]:
    """Run parts, print their results as they come, and save them."""
    results: list[Figures] = []
    product, worker = None, None
    for part in parts:
        if worker is None or not worker.alive:
            worker = _Worker(device, sizes)
        for result in worker.results(part, PARTS[part].limit):
            if "tflops" in result:
                product = product or result["tflops"]  # the first mark
                result["mfu"] = result["tflops"] / product if "marks" in parts else None
            result = {key: _short(value) for key, value in result.items()}
            results.append(result)
            print(json.dumps(result), flush=True)
    if worker is not None and worker.alive:
        worker.close()
    everything = {"machine": report.machine(), "results": results}
    out.parent.mkdir(parents=True, exist_ok=True)
    files.replace_file(out, (json.dumps(everything, indent=1) + "\n").encode())
    print(json.dumps(everything))
    return results


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS, help="parts to run (default: all)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... or cpu (default cuda)")
    parser.add_argument(
        "--tiny", action="store_true", help="narrow models and small batches, whose figures say nothing"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench/gpu.json"), help="default runs/bench/gpu.json")
    given = parser.parse_args(arguments)
    if given.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # inherited by the worker, for the training loop
    elif not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: this machine has no CUDA device; use --device cpu --tiny to check that it runs")
    measure(given.only, given.device, NARROW if given.tiny else Sizes(), given.out)


if __name__ == "__main__":
    main()
