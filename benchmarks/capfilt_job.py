"""Measure CapFilt's cost besides its models: overhead of scoring, selecting and reporting a million rows, resuming.

    python -m benchmarks.capfilt_job                 # about five minutes on 2 cores; --rows 100000 for less

Scores are derived from hashes. Of the million rows one in thirty has a broken image, a third break a rule, and one
image in twenty is a copy. The overhead is the wall time of a whole job relative to the simulated time of its models.
Every verb runs in a separate process, start-up included, so that its peak memory can be measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from benchmarks import report as figures
from capfilt import plan
from capfilt.reading import MEMBERS
from capfilt.run import Run
from capfilt.schema import ANNOTATIONS
from capfilt.score.loop import ScoreOptions, score
from capfilt.score.scorer import FakeScorer
from capfilt.settings import ReadConfig, ScoreConfig
from capfilt.store import parts
from capfilt.store.identity import sample_id


def crawl(folder: Path, rows: int, side: int) -> Path:
    """Write a shard of noisy images of `side` pixels."""
    dice = np.random.default_rng(0)
    pixels = dice.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    folder.mkdir(parents=True)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i in range(rows):
            buffer = io.BytesIO()
            Image.fromarray(np.roll(pixels, i, 0)).resize((side, side)).save(buffer, "JPEG", quality=90)
            for suffix, content in (("jpg", buffer.getvalue()), ("txt", f"an image with number {i}".encode())):
                member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


def overhead(folder: Path, rows: int, seconds: float) -> dict[str, float]:
    """Wall time of a job relative to its models' time, without start-up, with decoding in another process."""
    run = plan.make(
        str(folder / "run"), ScoreConfig(scorer="fake"), ReadConfig([str(crawl(folder / "in", rows, 320))]), 64
    )
    scorer = FakeScorer(0, 1, "enc", seconds)
    first: list[float] = []

    class Timed(FakeScorer):
        def score(self, items):
            first.append(time.monotonic())
            return scorer.score(items)

    score(run, lambda _: Timed(0, 1, "enc"), ScoreOptions(batch=16, decode_workers=1), io.StringIO())
    wall = time.monotonic() - first[0]
    return {
        "overhead_percent": 100 * (wall / (rows * seconds) - 1),
        "job_seconds": wall,
        "model_seconds": rows * seconds,
    }


def annotated(folder: Path, rows: int, part_size: int) -> Run:
    """Make a scored run by writing its parts directly, with rows like those of scoring; 200 images are repeated."""
    crawl(folder / "in", 200, 400)
    run = plan.make(str(folder / "run"), ScoreConfig(scorer="fake"), ReadConfig([str(folder / "in")]), part_size)
    (source,) = run.sources.values()
    index = parts.decode(run.storage.read(source.index)).take(np.arange(rows) % 200)
    run.storage.write(source.index, parts.encode(index.cast(MEMBERS), {"source": source.relpath}, 1024))
    big = dataclasses.replace(source, rows=rows)
    job = {**run.job, "inputs": [dataclasses.asdict(big)]}
    plan.write_parts(run.storage, 0, [big], part_size, run.fingerprint)
    run.storage.write("job.json", json.dumps(job).encode())
    run = Run.open(run.where)
    dice = np.random.default_rng(0)
    for part in run.plan:
        run.storage.note(parts.name_of(part.pid), parts.encode(_table(part, dice), {"fingerprint": run.fingerprint}))
    return run


def _table(part, dice: np.random.Generator) -> pa.Table:
    n, numbers = part.rows, range(part.lo, part.hi)
    web, syn = dice.beta(0.5, 0.7, (2, n)).astype(np.float32)
    words = np.array(["red", "dog", "cat", "beach", "house", "with", "a", "the", "old", "tree"])
    texts = [" ".join(row) for row in words[dice.integers(0, len(words), (2 * n, 7))]]
    broken = dice.random(n) < 1 / 30
    copied = np.where(dice.random(n) < 1 / 20, dice.integers(0, part.hi, n), numbers)
    flags = [["image.bytes<5000", "web.address"] if rule else [] for rule in dice.random(n) < 1 / 3]

    def unless_broken(values: list, otherwise: object) -> list:
        return [otherwise if b else v for b, v in zip(broken.tolist(), values, strict=True)]

    one = {
        "sample_id": [sample_id(part.source, i, f"{i % 200:06d}") for i in numbers],
        "source_uri": [part.source] * n,
        "source_row": list(numbers),
        "key": [f"{i % 200:06d}" for i in numbers],
        "image_sha256": [hashlib.sha256(b"%d" % i).hexdigest() for i in copied],
        "phash64": unless_broken([hashlib.sha256(b"%d" % i).hexdigest()[:16] for i in copied], None),
        "status": unless_broken(["ok"] * n, "truncated"),
        "error_code": unless_broken([None] * n, "truncated"),
        "format": ["JPEG"] * n,
        "web_text": [[t] for t in texts[:n]],
        "web_text_norm": [[t] for t in texts[:n]],
        "syn_text": unless_broken([[t] for t in texts[n:]], []),
        "itm_web": unless_broken(web[:, None].tolist(), [None]),
        "itm_syn": unless_broken(syn[:, None].tolist(), []),
        "itc_web": unless_broken(web[:, None].tolist(), [None]),
        "itc_syn": unless_broken(syn[:, None].tolist(), []),
        "rule_flags": flags,
        "part_id": [part.pid] * n,
        "device": ["none"] * n,
        "seconds": [0.01] * n,
        "extra_json": ["{}"] * n,
    }
    empty = [None] * n
    return pa.table({f.name: pa.array(one.get(f.name, empty), f.type) for f in ANNOTATIONS}, schema=ANNOTATIONS)


_MEASURED = """
import sys
from capfilt.__main__ import main
status = main(sys.argv[1:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(status)
"""
"""Program that runs a verb and prints its peak memory; the kernel's figure for children includes this process's own."""


def verb(name: str, figures_by_name: dict[str, float], *args: str) -> None:
    """Run a verb, the first word of `name`, as a command; records wall seconds, CPU seconds and peak memory."""
    command = [sys.executable, "-c", _MEASURED, *name.split("_")[:1], *args]
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peak = int(done.stdout.splitlines()[-1]) / 1024
    figures_by_name |= {f"seconds_{name}": wall, f"cpu_seconds_{name}": used, f"peak_megabytes_{name}": peak}
    print(f"{name}: {wall:.2f} s, of processor {used:.2f}, {peak:.0f} MB", flush=True)


def timed(name: str, action, figures_by_name: dict[str, float]) -> None:
    """Record wall seconds, and CPU seconds of this process, which do not depend on the machine's load."""
    start, used = time.monotonic(), time.process_time()
    action()
    figures_by_name[name], figures_by_name[f"cpu_{name}"] = time.monotonic() - start, time.process_time() - used
    print(f"{name} {figures_by_name[name]:.2f}, of processor {figures_by_name[f'cpu_{name}']:.2f}", flush=True)


SELECTIONS = {
    "blip": (),
    "rank-k": ("--policy", "rank-k"),
    "web-else-syn": ("--policy", "web-else-syn"),
    "fraction": ("--policy", "fraction"),
    "rules": ("--rules", "junk", "--duplicates", "sha256", "--shared", "10"),
    "look": ("--rules", "laion", "--duplicates", "phash64", "--duplicate-bits", "4"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    given = parser.parse_args()
    figures_by_name: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        figures_by_name |= overhead(here / "job", 640, 0.02)
        print(f"overhead {figures_by_name['overhead_percent']:.2f}%", flush=True)
        run = annotated(here / "many", given.rows, 1024)
        for name, args in SELECTIONS.items():
            verb(f"select_{name}", figures_by_name, run.where, "--name", name, *args)
        verb("report", figures_by_name, run.where)
        verb("report_look", figures_by_name, run.where, "--select", "look")
        verb("verify", figures_by_name, run.where)
        figures_by_name["report_megabytes"] = Path(run.where, "report/at-half/report.html").stat().st_size / 1e6
        small = annotated(here / "small", 160_000, 16)
        timed("seconds_open_10000_parts", lambda: Run.open(small.where), figures_by_name)
        pids = [part.pid for part in small.plan]
        timed("seconds_resume_scan_10000_parts", lambda: small.parts.whole(pids), figures_by_name)
    figures_by_name["rows"] = given.rows
    figures.write("capfilt_job", figures_by_name)


if __name__ == "__main__":
    main()
