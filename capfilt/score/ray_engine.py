"""Scoring on several GPUs and machines: Ray places the workers, files record what is done.

An actor is never restarted by Ray and a part never bound to one: when an actor dies, its part goes back into the queue
and a replacement starts in the background. With Ray's own retries a part stays with an actor that cannot be
placed any more when its node is gone, and the job hangs.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque
from typing import Any, TextIO

from blip import startup
from blip.installed import remedy
from capfilt.run import Part, Run
from capfilt.score.claims import MOST, Claims
from capfilt.score.loop import ScoreOptions, Work, Worker, describe_work, exit_status, find_work, judge
from capfilt.score.pool import BrokenDecoder
from capfilt.score.progress import ScoringProgress
from capfilt.settings import INTERRUPTED
from capfilt.store.parts import failure_name

_PATIENCE = 30.0
"""Seconds without a worker after which a warning is printed."""


class PartScorer:
    """A Ray actor: loads the models once, scores and commits parts."""

    def __init__(self, folder: str, where: str, device: str | None, options: ScoreOptions) -> None:
        """Load the models. `folder` is the base of relative paths, where this machine has it."""
        from capfilt.score.make import scorer_maker

        if os.path.isdir(folder):
            os.chdir(folder)
        run = Run.open(where)
        self.worker = Worker(run, scorer_maker(device)(run), options)
        self.parts = {part.pid: part for part in run.plan}

    def ready(self) -> str:
        return self.worker.scorer.device

    def score(self, pid: str, attempt: int) -> list[dict[str, Any]]:
        """Score and commit a part; returns what the progress line needs. Failures are recorded and raised."""
        part = self.parts[pid]
        tasks = self.worker.begin(part, attempt)
        try:
            rows = self.worker.annotate(part, tasks, attempt)
            self.worker.commit(part, rows)
        except BrokenDecoder:
            self.worker.discard(tasks)
            self.worker.claims.release()
            raise
        except Exception as error:
            self.worker.discard(tasks)
            self.worker.claims.fail(part, "exception", f"{type(error).__name__}: {error}", error)
            raise RuntimeError(f"{type(error).__name__}: {error}") from None
        return [{key: row[key] for key in ("status", "itm_web", "itm_syn", "left_out")} for row in rows]


class _Crew:
    """Actors, which of them are ready, and what each is working on."""

    def __init__(self, ray: Any, run: Run, device: str | None, options: ScoreOptions, workers: int | None) -> None:
        self.ray = ray
        gpus = int(ray.cluster_resources().get("GPU", 0))
        self.size = workers or max(1, gpus or int(ray.cluster_resources().get("CPU", 1)))
        share = {"num_gpus": 1} if gpus and not (device or "").startswith("cpu") else {"num_cpus": 1}
        self._actor = ray.remote(max_restarts=0, max_task_retries=0, **share)(PartScorer)
        self._arguments = (os.getcwd(), run.where, device, options)
        self.waiting: dict[Any, Any] = {}  # answer to `ready` -> actor
        self.working: dict[Any, tuple[Any, Part, int]] = {}  # answer to `score` -> actor, part, attempt
        self.idle: deque[Any] = deque()
        for _ in range(self.size):
            self.hire()

    def hire(self) -> None:
        actor = self._actor.remote(*self._arguments)
        self.waiting[actor.ready.remote()] = actor

    def give(self, part: Part, attempt: int) -> None:
        actor = self.idle.popleft()
        self.working[actor.score.remote(part.pid, attempt)] = (actor, part, attempt)

    def answers(self, seconds: float) -> list[Any]:
        ready, _ = self.ray.wait([*self.waiting, *self.working], num_returns=1, timeout=seconds)
        return ready

    def dismiss(self) -> None:
        for actor in [*self.idle, *self.waiting.values(), *(one[0] for one in self.working.values())]:
            self.ray.kill(actor)


def import_ray() -> Any:
    """Import ray; ValueError, with the command to install it, if it is missing."""
    try:
        import ray
    except ImportError:
        raise ValueError(f"--engine ray needs the package ray: {remedy('ray')}") from None
    return ray


def score_with_ray(
    run: Run, device: str | None, options: ScoreOptions, workers: int | None = None, out: TextIO | None = None
) -> int:
    """Score what is left of a run with `workers` actors (default: one per GPU, or per core); returns the exit status.

    Uses the cluster of RAY_ADDRESS, or starts one on this machine.
    """
    ray, out = import_ray(), out or sys.stderr
    run.storage.sweep()
    claims = Claims(run.storage)
    work = find_work(run, options, claims)
    out.write(describe_work(run, work, options) + "\n")
    rows = sum(part.rows for part in work.share)
    inherited = sum(part.rows for part in work.share if part.pid in work.done)
    progress = ScoringProgress(rows, inherited, len(work.share), len(work.done), out)
    progress.failed = len(work.failed)
    if work.todo:
        if not ray.is_initialized():
            around = startup.environment()
            path = os.pathsep.join(filter(None, (startup.HOME, around.get("PYTHONPATH"))))
            names = {"PYTHONPATH": path, "PYTHONSAFEPATH": around["PYTHONSAFEPATH"]}
            with contextlib.chdir(startup.HOME):  # Ray puts the current folder first on its workers' path
                ray.init(log_to_driver=False, runtime_env={"env_vars": names})
        crew = _Crew(ray, run, device, options, workers)
        try:
            _drive(ray, crew, run, work, progress, options)
        except KeyboardInterrupt:
            for _, part, attempt in crew.working.values():
                run.storage.remove(failure_name(part.pid, attempt))  # does not count as a failed attempt
            out.write("\ninterrupted; the same command continues\n")
            return INTERRUPTED
        finally:
            crew.dismiss()
        progress.say(always=True)
    return exit_status(run, options, progress.failed, out)


def _drive(ray: Any, crew: _Crew, run: Run, work: Work, progress: ScoringProgress, options: ScoreOptions) -> None:
    """Assign parts until none is left or in progress."""
    judged = min(2000, sum(part.rows for part, _ in work.todo))
    alone = time.monotonic()
    while work.todo or crew.working:
        while work.todo and crew.idle:
            part, attempt = work.todo.popleft()
            if part.pid not in work.damaged and run.parts.exists(part.pid):
                progress.inherit(part.rows)
                continue
            crew.give(part, attempt)
        if crew.working:
            alone = time.monotonic()
        elif time.monotonic() - alone > _PATIENCE:
            alone = time.monotonic()
            progress.out.write(f"no worker for {_PATIENCE:.0f} s: check that the cluster has free GPUs or CPUs\n")
        for answer in crew.answers(5.0) if crew.working or crew.waiting else ():
            if answer in crew.waiting:
                _arrived(ray, crew, answer)
            else:
                _finished(ray, crew, answer, work, progress)
                judge(progress, judged, options)
        progress.say()


def _arrived(ray: Any, crew: _Crew, answer: Any) -> None:
    """Handle an actor that is ready or died while starting. RuntimeError if it cannot load its models."""
    actor = crew.waiting.pop(answer)
    try:
        ray.get(answer)
    except ray.exceptions.RayTaskError as error:
        raise RuntimeError(str(error.cause or error)) from None
    except ray.exceptions.RayActorError as error:
        if getattr(error, "actor_init_failed", False):
            raise RuntimeError(str(error)) from None
        crew.hire()
        return
    crew.idle.append(actor)


def _finished(ray: Any, crew: _Crew, answer: Any, work: Work, progress: ScoringProgress) -> None:
    """Handle a part that is done, has failed, or whose actor has died."""
    actor, part, attempt = crew.working.pop(answer)
    try:
        rows = ray.get(answer)
    except ray.exceptions.RayActorError:
        crew.hire()
        progress.retried += 1
        work.todo.append((part, attempt))
        return
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, BrokenDecoder):
            raise error.cause from None
        crew.idle.append(actor)
        changed = "source_changed" in str(error)
        if changed or attempt >= MOST:
            progress.failed += 1
            progress.out.write(f"part {part.pid} ({part.source}) failed: {str(error).splitlines()[-1]}\n")
        else:
            progress.retried += 1
            work.todo.append((part, attempt + 1))
        return
    crew.idle.append(actor)
    progress.add(rows)
