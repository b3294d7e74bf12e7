"""What the CapFilt job costs beside the models: overhead of scoring, selecting and reporting a million rows, resuming.

    python -m benchmarks.capfilt_job                 # about ten minutes on 2 cores; --rows 100000 for less

Scores are made out of hashes. The overhead is the wall time of a whole job over the time its models pretend to work.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import resource
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from benchmarks import report as figures
from capfilt import parts, plan
from capfilt.identity import sample_id
from capfilt.policies import SelectConfig
from capfilt.report import report
from capfilt.run import Run
from capfilt.schema import ANNOTATIONS
from capfilt.score import ScoreOptions, score
from capfilt.scorer import FakeScorer
from capfilt.select import select
from capfilt.settings import ReadConfig, ScoreConfig
from capfilt.verify import verify


def crawl(folder: Path, rows: int, side: int) -> Path:
    """A shard of noisy photographs of that side."""
    dice = np.random.default_rng(0)
    pixels = dice.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    folder.mkdir(parents=True)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i in range(rows):
            buffer = io.BytesIO()
            Image.fromarray(np.roll(pixels, i, 0)).resize((side, side)).save(buffer, "JPEG", quality=90)
            for ending, content in (("jpg", buffer.getvalue()), ("txt", f"a picture with number {i}".encode())):
                member = tarfile.TarInfo(f"{i:06d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


def overhead(folder: Path, rows: int, seconds: float) -> dict[str, float]:
    """Wall time of a job over the time that its models take, start-up left out, decoding beside it."""
    run = plan.make(
        str(folder / "run"), ScoreConfig(scorer="fake"), ReadConfig([str(crawl(folder / "in", rows, 320))]), 64
    )
    scorer = FakeScorer(0, 1, "enc", seconds)
    first: list[float] = []

    class Timed(FakeScorer):
        def score(self, items):
            first.append(time.monotonic())
            return scorer.score(items)

    score(run, lambda _: Timed(0, 1, "enc"), ScoreOptions(batch_size=16, decode_workers=1), io.StringIO())
    wall = time.monotonic() - first[0]
    return {
        "overhead_percent": 100 * (wall / (rows * seconds) - 1),
        "job_seconds": wall,
        "model_seconds": rows * seconds,
    }


def annotated(folder: Path, rows: int, part_size: int) -> Run:
    """A run whose parts are written directly, row for row what scoring would write."""
    crawl(folder / "in", 2, 64)
    run = plan.make(str(folder / "run"), ScoreConfig(scorer="fake"), ReadConfig([str(folder / "in")]), part_size)
    (source,) = run.sources.values()

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
    one = {
        "sample_id": [sample_id(part.source, i, str(i)) for i in numbers],
        "source_uri": [part.source] * n,
        "source_row": list(numbers),
        "key": [str(i) for i in numbers],
        "status": ["ok"] * n,
        "format": ["JPEG"] * n,
        "web_text": [[t] for t in texts[:n]],
        "web_text_norm": [[t] for t in texts[:n]],
        "syn_text": [[t] for t in texts[n:]],
        "itm_web": web[:, None].tolist(),
        "itm_syn": syn[:, None].tolist(),
        "itc_web": web[:, None].tolist(),
        "itc_syn": syn[:, None].tolist(),
        "rule_flags": [[]] * n,
        "part_id": [part.pid] * n,
        "device": ["none"] * n,
        "seconds": [0.01] * n,
        "extra_json": ["{}"] * n,
    }
    empty = [None] * n
    return pa.table({f.name: pa.array(one.get(f.name, empty), f.type) for f in ANNOTATIONS}, schema=ANNOTATIONS)


def timed(name: str, action, found: dict[str, float]) -> None:
    """Wall seconds, and the seconds of processor that this process used, which a busy machine does not stretch."""
    start, used = time.monotonic(), time.process_time()
    action()
    found[name], found[f"cpu_{name}"] = time.monotonic() - start, time.process_time() - used
    print(f"{name} {found[name]:.2f}, of processor {found[f'cpu_{name}']:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    given = parser.parse_args()
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        found |= overhead(here / "job", 640, 0.02)
        run = annotated(here / "many", given.rows, 1024)
        for policy in ("blip", "rank-k", "web-else-syn", "fraction"):
            timed(f"seconds_select_{policy}", lambda policy=policy: select(run, policy, SelectConfig(policy)), found)
        timed("seconds_select_with_rules", lambda: select(run, "rules", SelectConfig(rules="junk")), found)
        timed("seconds_report", lambda: report(run), found)
        timed("seconds_verify", lambda: verify(run.where), found)
        found["report_megabytes"] = Path(run.where, "report/at-half/report.html").stat().st_size / 1e6
        found["peak_megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        small = annotated(here / "small", 160_000, 16)
        timed("seconds_open_10000_parts", lambda: Run.open(small.where), found)
        pids = [part.pid for part in small.plan]
        timed("seconds_resume_scan_10000_parts", lambda: small.parts.whole(pids), found)
    found["rows"] = given.rows
    figures.write("capfilt_job", found)


if __name__ == "__main__":
    main()
