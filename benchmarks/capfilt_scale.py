"""Measure how CapFilt's steps grow with the rows: a million of them in 1,000 parts, with processes killed at random.

    python -m benchmarks.capfilt_scale                        # some forty minutes on 2 cores
    python -m benchmarks.capfilt_scale --rows 100000 --kills 5

Scores are derived from hashes. Plan, score, select, report and verify run as commands; two processes score, and 20
times one of them, or they and their launcher, are killed and started again. Checked are that nothing is lost or
doubled, that a finished part is never scored again, and the bounds of the report; measured are the peak memory of each
step, how a scoring process grows, requests to an object store, and bytes on disk: the constants of docs/billions.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks import report as figures
from benchmarks.capfilt_job import timed, verb
from capfilt import plan
from capfilt.run import Run
from capfilt.score.loop import ScoreOptions, score
from capfilt.score.scorer import FakeScorer
from capfilt.settings import ReadConfig, ScoreConfig

PROCESSES = 2
_SHARD = 10_000
"""Rows of an input file."""
_REPORT = 5_000_000
"""Most bytes of report.html."""


def crawl(folder: Path, rows: int) -> Path:
    """Write parquet shards of small images, one in 50 broken, with texts whose last word is rare."""
    dice = np.random.default_rng(0)
    jpegs = []
    for pixels in dice.integers(0, 256, (256, 16, 16, 3), dtype=np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        jpegs.append(buffer.getvalue())
    words = np.array(["red", "dog", "cat", "beach", "house", "with", "a", "the", "old", "tree"])
    folder.mkdir(parents=True)
    for at in range(0, rows, _SHARD):
        n = min(_SHARD, rows - at)
        images = [jpegs[i] for i in dice.integers(0, len(jpegs), n)]
        images = [image[:200] if broken else image for image, broken in zip(images, dice.random(n) < 0.02, strict=True)]
        texts = [" ".join([*five, f"w{at + i}"]) for i, five in enumerate(words[dice.integers(0, len(words), (n, 5))])]
        table = pa.table({"image": images, "caption": texts})
        pq.write_table(table, folder / f"{at // _SHARD:05d}.parquet", row_group_size=1000)
    return folder


# Scoring with kills ---------------------------------------------------------------------------------------------------


class Watched:
    """Memory and open files of scoring processes, over time."""

    def __init__(self) -> None:
        self.samples: dict[int, list[tuple[int, int]]] = {}
        """(kilobytes, open files) by process."""

    def sample(self, pids: list[int]) -> None:
        for pid in pids:
            try:
                status = Path(f"/proc/{pid}/status").read_text()
                resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
                self.samples.setdefault(pid, []).append((resident, len(os.listdir(f"/proc/{pid}/fd"))))
            except (OSError, StopIteration):  # it is gone
                continue

    def peak(self) -> float:
        """Most megabytes of a process."""
        return max(kilobytes for some in self.samples.values() for kilobytes, _ in some) / 1024

    def growth(self, which: int) -> float:
        """Ratio of the last quarter to the second quarter of the longest-lived process's life, of its medians."""
        some = [sample[which] for sample in max(self.samples.values(), key=len)]
        quarter = len(some) // 4
        return statistics.median(some[-quarter:]) / statistics.median(some[quarter : 2 * quarter])


def _children(launcher: subprocess.Popen) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(launcher.pid).children()]
    except psutil.NoSuchProcess:
        return []


def tormented(run: Run, kills: int, watched: Watched) -> Counter[str]:
    """Score a run, killing a process, or all of them, at random moments; returns how often each was done."""
    dice, done, outcome = random.Random(0), {}, Counter[str]()
    command = [sys.executable, "-m", "capfilt", "launch", run.where, "--gpus", str(PROCESSES), "--device", "cpu"]
    aims = sorted(dice.sample(range(1, len(run.plan)), kills))
    while True:
        launcher = subprocess.Popen([*command, "--decode-workers", "0"], stderr=subprocess.DEVNULL)
        pids: list[int] = []
        while launcher.poll() is None and not (aims and len(run.parts.present()) >= aims[0]):
            time.sleep(0.25)
            pids = _children(launcher)
            watched.sample(pids)
        if launcher.poll() is not None and not aims:
            assert launcher.returncode == 0, launcher.returncode
            break
        time.sleep(dice.random())
        victims = [dice.choice(pids)] if dice.random() < 0.5 else [launcher.pid, *pids]
        for pid in victims:
            try:
                os.kill(pid, signal.SIGKILL)
                outcome["killed"] += 1
            except ProcessLookupError:
                outcome["gone before"] += 1
        launcher.send_signal(signal.SIGTERM)
        launcher.wait()
        present = run.parts.present()
        assert {pid: present[pid] for pid in done} == done, "a part that was done has been scored again"
        done = present
        aims = [aim for aim in aims if aim > len(present)]
        outcome["starts"] += 1
    outcome["begun in vain"] = sum(run.parts.read(p.pid, ["attempt"])["attempt"][0].as_py() - 1 for p in run.plan)
    return outcome


# Constants ------------------------------------------------------------------------------------------------------------

_OPENED = """
import sys
from capfilt.run import Run
def resident():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS")))
import json
before = resident()
run = Run.open(sys.argv[1])
share = run.share(0, 64)
print((resident() - before) * 1024)
"""


def opened(where: str) -> int:
    """Return the bytes that a process needs for an open run and its share of the parts."""
    done = subprocess.run([sys.executable, "-c", _OPENED, where], check=True, capture_output=True, text=True)
    return int(done.stdout)


def memory_of_plans(folder: Path) -> dict[str, float]:
    """Bytes of memory for each part and for each source of an open run."""
    (folder / "in").mkdir(parents=True)
    pq.write_table(pa.table({"image": [b"x"], "caption": ["x"]}), folder / "in" / "0.parquet")
    sizes = {}
    for name, sources, parts_each in (("few", 100, 100), ("parts", 100, 3000), ("sources", 10_000, 1)):
        run = plan.make(str(folder / name), ScoreConfig(scorer="fake"), ReadConfig([str(folder / "in")]), 1)
        (source,) = run.sources.values()
        many = [
            {**dataclasses.asdict(source), "relpath": f"{i:07d}.parquet", "rows": parts_each} for i in range(sources)
        ]
        planned = [plan.PlannedSource(**{**one, "notes": ()}) for one in many]
        plan.write_parts(run.storage, 0, planned, 1, run.fingerprint)
        run.storage.write("job.json", json.dumps({**run.job, "inputs": many}).encode())
        sizes[name] = opened(run.where)
    per_part = (sizes["parts"] - sizes["few"]) / (100 * 2900)
    return {
        "bytes_open_per_part": per_part,
        "bytes_open_per_source": (sizes["sources"] - sizes["few"]) / 9900,
        "bytes_job_json_per_source": (folder / "sources/job.json").stat().st_size / 10_000,
        "bytes_plan_per_part": (folder / "parts/plan/00000.parquet").stat().st_size / 300_000,
    }


def requests() -> dict[str, float]:
    """Requests to an object store: for each part that is scored, and for a process that starts and ends."""
    files = fsspec.filesystem("memory")
    counts: Counter[str] = Counter()
    table = pa.table({"image": [b"x"] * 640, "caption": ["x"] * 640})
    with files.open("/in/0.parquet", "wb") as file:
        pq.write_table(table, file)
    of, names = {}, ("cat_file", "exists", "find", "info", "open", "rm_file")
    for part_size in (8, 16):
        run = plan.make(
            f"memory://run{part_size}", ScoreConfig(scorer="fake"), ReadConfig(["memory://in/0.parquet"]), part_size
        )
        counts.clear()
        for name in names:
            _count(files, name, counts)
        how = ScoreOptions(decode_workers=0, max_error_rate=1.0)
        score(run, lambda _: FakeScorer(0, 1, "enc"), how, io.StringIO())
        for name in names:
            del files.__dict__[name]
        of[part_size] = Counter(counts)
    more = 640 // 8 - 640 // 16
    return {f"requests_{name}_per_part": (of[8][name] - of[16][name]) / more for name in sorted(of[8])}


def _count(files, name: str, counts: Counter[str]) -> None:
    original = getattr(files, name)

    def counted(path, *args, **how):
        mode = [*args, how.get("mode", "rb")][0] if name == "open" else ""
        counts[{"wb": "put", "rb": "open"}.get(mode, name)] += 1
        return original(path, *args, **how)

    setattr(files, name, counted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--part-size", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=20)
    given = parser.parse_args()
    measured: dict[str, float] = {"rows": given.rows}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured |= requests()
        measured |= memory_of_plans(folder / "plans")
        timed("seconds_crawl", lambda: crawl(folder / "in", given.rows), measured)
        where = str(folder / "run")
        job = ["--input", str(folder / "in"), "--out", where, "--scorer", "fake", "--part-size", str(given.part_size)]
        verb("plan", measured, *job)
        run, watched = Run.open(where), Watched()
        start = time.monotonic()
        outcome = tormented(run, given.kills, watched)
        measured |= {"seconds_score": time.monotonic() - start, **{f"score_{k}": n for k, n in outcome.items()}}
        measured |= {"peak_megabytes_score": watched.peak()}
        measured |= {"growth_of_memory": watched.growth(0), "growth_of_open_files": watched.growth(1)}
        print(f"score: {measured['seconds_score']:.0f} s, {dict(outcome)}", flush=True)
        verb("select_blip", measured, where, "--name", "blip")
        verb(
            "select_rules",
            measured,
            where,
            "--name",
            "rules",
            "--rules",
            "junk",
            "--duplicates",
            "sha256",
            "--shared",
            "9",
        )
        verb("report", measured, where, "--select", "blip")
        verb("verify", measured, where)
        rows = sum(json.loads(Path(where, "selections/blip/_SUCCESS").read_text())["rows_in"].values())
        assert rows == given.rows, (rows, given.rows)
        page = Path(where, "report/blip/report.html").stat().st_size
        assert page < _REPORT, page
        measured["megabytes_report_html"] = page / 1e6
        measured["megabytes_report_json"] = Path(where, "report/blip/report.json").stat().st_size / 1e6
        measured["bytes_annotations_per_row"] = sum(size for size, _ in run.parts.present().values()) / given.rows
        measured["bytes_selection_per_row"] = Path(where, "selections/blip/texts.parquet").stat().st_size / given.rows
        footer = pq.read_metadata(Path(where, "selections/blip/texts.parquet")).serialized_size
        measured["bytes_selection_footer_per_part"] = footer / len(run.plan)
        timed("seconds_resume_scan", lambda: run.parts.whole(part.pid for part in run.plan), measured)
    figures.write("capfilt_scale", measured)


if __name__ == "__main__":
    main()
