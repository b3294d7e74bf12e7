"""A small crawl, runs on it with made-up scores, and processes that can be killed while they score.

As a program it starts such processes quickly: it imports once and forks for each line of its input.
"""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pyarrow as pa
from PIL import Image

from capfilt import plan
from capfilt.run import Run
from capfilt.schema import RUN_COLUMNS
from capfilt.score.loop import ScoreOptions, score
from capfilt.score.scorer import FakeScorer
from capfilt.settings import ReadConfig, ScoreConfig

HERE = ScoreOptions(decode_workers=0)


def jpeg(i, size=(24, 18), form="JPEG", mode="RGB"):
    image = Image.new("RGB", size, (i * 7 % 256, i * 13 % 256, i * 29 % 256))
    image.paste((255, 255, 255), (i % 8, i % 5, i % 8 + 9, i % 5 + 7))
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, form)
    return buffer.getvalue()


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sample(key, i, text=None, extra=None):
    members = [(f"{key}.jpg", jpeg(i)), (f"{key}.txt", (text or f"Image number {i}!").encode())]
    return members + ([(f"{key}.json", json.dumps(extra).encode())] if extra is not None else [])


def crawl(folder, shards=3, rows=40):
    for s in range(shards):
        members = [m for i in range(rows) for m in sample(f"{s}_{i:04d}", s * rows + i, extra={"url": f"http://x/{i}"})]
        write_tar(folder / f"{s:05d}.tar", members)
    return folder


def planned(inputs, out, part_size=16, reading=None, scorer="fake", **config):
    reading = {"inputs": [str(inputs)], **(reading or {})}
    return plan.make(str(out), ScoreConfig(scorer=scorer, **config), ReadConfig(**reading), part_size)


def make_fake(run):
    return FakeScorer(run.config.seed, run.config.captions, run.config.itm_token)


def scored(inputs, out, part_size=16, options=HERE, maker=make_fake, reading=None, status=0, **config):
    run = planned(inputs, out, part_size, reading, **config)
    assert score(run, maker, options, io.StringIO()) == status
    return run


def annotations(where):
    """All annotations of a run in the order of the plan, without how they came about."""
    run = where if isinstance(where, Run) else Run.open(str(where))
    tables = [run.parts.read(part.pid) for part in run.plan if run.parts.exists(part.pid)]
    return pa.concat_tables(tables).drop_columns(list(RUN_COLUMNS)).replace_schema_metadata(None)


def check_complete(where, baseline):
    """The oracle of every fault: all planned rows, each once, nothing else, equal to an uninterrupted run."""
    run = Run.open(str(where))
    assert run.parts.present().keys() == {part.pid for part in run.plan}
    table, wanted = annotations(run), annotations(baseline)
    ids = table["sample_id"].to_pylist()
    assert len(ids) == len(set(ids)) == run.rows
    assert table.equals(wanted)


class Starter:
    """Starts `capfilt` commands in processes that share one import."""

    def __init__(self, log):
        self.log = Path(log)
        root = str(Path(__file__).resolve().parents[1])
        env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, text=True, env=env)

    def _request(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, *args, **env):
        """The process id of a command; its output goes to the log."""
        return self._request({"args": [str(a) for a in args], "env": env, "log": str(self.log)})

    def wait(self, pid):
        """Its exit status, negative for a signal."""
        return os.waitstatus_to_exitcode(self._request({"wait": pid}))

    def run(self, *args, **env):
        return self.wait(self.start(*args, **env))

    def kill(self, pid, after, group=False):
        """Kill a process with -9 after some seconds; False if it was done before."""
        deadline = time.monotonic() + after
        while time.monotonic() < deadline:
            if self._request({"alive": pid}) is False:
                return False
            time.sleep(0.002)
        (os.killpg if group else os.kill)(pid, signal.SIGKILL)
        return self.wait(pid) == -signal.SIGKILL

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def _serve():
    from capfilt.__main__ import main
    from capfilt.commands import run  # noqa: F401

    done = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "args" in request:
            pid = os.fork()
            if pid == 0:
                os.setsid()
                os.environ.update(request["env"])
                log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1), os.dup2(log, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                status = 70
                try:
                    status = main(request["args"])
                except SystemExit as error:
                    status = error.code
                finally:
                    sys.stdout.flush()
                    os._exit(status)
            answer = pid
        else:
            pid = request.get("wait", request.get("alive"))
            if pid not in done:
                got, status = os.waitpid(pid, 0 if "wait" in request else os.WNOHANG)
                if got:
                    done[pid] = status
            answer = done[pid] if "wait" in request else pid not in done
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
