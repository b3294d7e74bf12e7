"""A small run for the tests of the loop: an objective with dropout, a moving average and a queue; data by position.

As a program it plays the faults that need processes of their own: `python stub_run.py OUT '{"steps": 20, ...}'`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip import dist
from blip.objectives.batch import Batch
from blip.objectives.objective import Clock, Objective, Outcome
from blip.train.loop import NonFinite, fit
from blip.train.settings import TrainConfig

HERE = Path(__file__).parent
SEARCHED = os.pathsep.join(map(str, [HERE.parent, HERE, *sorted(path for path in HERE.iterdir() if path.is_dir())]))
"""PYTHONPATH of a child that imports the project and test modules."""

WIDTH = 8
QUICK = {"batch_size": 4, "lr": 1e-2, "warmup_steps": 3, "log_every": 1, "precision": "float32", "timeout": 60.0}


class Numbers:
    """An endless stream over `size` pairs: position p is pair p % size; a pair's image is a function of its index."""

    def __init__(self, size: int = 32, delay: float = 0.0):
        self.size, self.delay = size, delay
        self.seen: list[list[str]] = []

    def __len__(self) -> int:
        return self.size

    def batches(self, start, count, rank, world, batch_size):
        for step in range(start, start + count):
            time.sleep(self.delay)
            first = (step * world + rank) * batch_size
            batch = self.batch([p % self.size for p in range(first, first + batch_size)])
            self.seen.append(batch.keys)
            yield batch

    def batch(self, indices: list[int]) -> Batch:
        images = torch.stack([self._image(i) for i in indices])
        ids = torch.ones(len(indices), 3, dtype=torch.long)
        return Batch(images, ids, ids.bool(), [f"pair:{i}" for i in indices])

    def _image(self, index: int) -> Tensor:
        return torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(index))


@dataclass
class Fault:
    """What goes wrong, in which process and at which step."""

    kind: str = ""
    rank: int = 0
    step: int = -1
    seen: dict[str, Tensor] = field(default_factory=dict)


class Stub(Objective):
    """Dropout, negatives drawn at random, a slow teacher and a queue: everything a resumed run could get wrong."""

    def __init__(self, dropout: float = 0.2, fault: Fault | None = None):
        super().__init__()
        torch.manual_seed(1)
        self.student = nn.Sequential(nn.Linear(12, WIDTH), nn.Dropout(dropout), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.teacher = nn.Linear(12, WIDTH).requires_grad_(False)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.student[3].weight
        self.register_buffer("queue", torch.zeros(10, WIDTH))
        self.register_buffer("next", torch.zeros((), dtype=torch.long))
        self.fault = fault or Fault()
        self.calls = 0

    def forward(self, batch: Batch, clock: Clock) -> Outcome:
        flat = batch.image.flatten(1)
        states = self.head(self.student(flat))
        target = self.teacher(flat)
        wrong = target[torch.randint(len(target), (len(target),), device=target.device)]
        near, far = F.mse_loss(states, target), F.mse_loss(states, wrong)
        itc = near - 0.1 * far + 0.01 * (states @ self.queue.T).square().mean()
        lm = F.mse_loss(states.sum(1), flat.sum(1)) * (1 + 0.1 * min(1.0, clock.epoch))
        lm = self._break(lm)
        self.calls += 1
        return Outcome({"itc": itc, "lm": lm}, {"spread": states.detach().std()}, target.detach())

    def _break(self, loss: Tensor) -> Tensor:
        fault = self.fault
        if fault.step == self.calls:
            fault.seen = {name: value.clone() for name, value in self.state_dict().items()}
        if fault.rank != dist.rank() or fault.step != self.calls:
            return loss
        if fault.kind == "loss":
            return loss * float("nan")
        if fault.kind == "gradient":
            return _poisoned(loss)
        if fault.kind == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        if fault.kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.kind == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    @torch.no_grad()
    def after_step(self, carries: list[Tensor]) -> None:
        self.teacher.weight.lerp_(self.student[0].weight, 0.1)
        rows = torch.cat([dist.gather(carry) for carry in carries])
        places = (self.next + torch.arange(len(rows), device=rows.device)) % len(self.queue)
        self.queue[places[-10:]] = rows[-10:]
        self.next.copy_((self.next + len(rows)) % len(self.queue))


class _Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


def _poisoned(loss: Tensor) -> Tensor:
    return _Poison.apply(loss)


def quick(**options) -> TrainConfig:
    return TrainConfig(**{**QUICK, **options})


def curve(out: Path) -> dict[int, dict[str, float]]:
    """Losses by step of a run's metrics.jsonl; every step must be there once."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "losses" in line]
    assert steps == list(range(1, len(steps) + 1)), "a step is missing or repeated"
    return {line["step"]: line["losses"] for line in lines if "losses" in line}


def run(out: str, *, size: int = 32, delay: float = 0.0, fault: dict | None = None, **options) -> None:
    """A whole run, as the processes of the tests do it."""
    stub = Stub(fault=Fault(**(fault or {})))
    try:
        fit(stub, Numbers(size, delay), quick(**options), out=out)
    except NonFinite:
        same = all(torch.equal(value, stub.fault.seen[name]) for name, value in stub.state_dict().items())
        (Path(out) / f"weights-{dist.rank()}").write_text("unchanged" if same else "changed")
        raise
    (Path(out) / f"finished-{dist.rank()}").write_text("yes")


class Zygote:
    """A process that has imported everything and forks: a fresh process without the seconds of importing torch."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = SEARCHED
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def _request(self, **request) -> Any:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def spawn(
        self,
        log: Path,
        function: str = "run",
        world: int = 1,
        module: str = "stub_run",
        environment: dict[str, str] | None = None,
        **arguments,
    ) -> list[int]:
        """Start `world` processes that call a function; returns their ids. What they print goes to files `log`-rank."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = environment or {}
        places = [shared]
        if world > 1:
            shared = {**shared, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            places = [{**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world)]
        request = {"module": module, "function": function, "arguments": arguments}
        return [self._request(**request, place=place, log=f"{log}-{r}") for r, place in enumerate(places)]

    def wait(self, pid: int, seconds: float = 60.0) -> int:
        """Exit status, negative for a signal. TimeoutError, and the process is killed, when it takes too long."""
        end = time.monotonic() + seconds
        while (status := self._request(wait=pid)) is None:
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                raise TimeoutError(f"process {pid} still runs after {seconds} s")
            time.sleep(0.01)
        return status

    def run(self, log: Path, **arguments) -> list[int]:
        """Start and wait; exit statuses."""
        return [self.wait(pid) for pid in self.spawn(log, **arguments)]


@cache
def the_zygote() -> Zygote:
    """One for all tests of this process; it ends when its standard input does."""
    return Zygote()


def serve() -> None:
    """The zygote's side: fork or wait as told on standard input."""
    import torch._dynamo  # which optimizers import when the first is made

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            pid, status = os.waitpid(request["wait"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork() or _child(request)
        print(json.dumps(answer), flush=True)


def _child(request: dict) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.update(request["place"])
    status = 0
    try:
        module = sys.modules["__main__"] if request["module"] == "stub_run" else import_module(request["module"])
        getattr(module, request["function"])(**request["arguments"])
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        torch.set_num_threads(1)
        run(sys.argv[1], **json.loads(sys.argv[2]))
    else:
        serve()
