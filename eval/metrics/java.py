"""The Java programs of caption metrics, each in its own process group, which is killed when its time is up.

Nothing is written outside a temporary folder, nothing is fetched, and nothing waits for ever.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from blip.errors import DOCS
from blip.processes import kill_group
from blip.startup import program

_FLAGS = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8")
_SPICE_NEEDS = ("spice-1.0.jar", "lib/stanford-corenlp-3.6.0.jar", "lib/stanford-corenlp-3.6.0-models.jar")
METEOR_STATISTICS = 23
"""Numbers that METEOR keeps of a caption; `meteor_of` makes the score of them."""


class NoJava(OSError):
    """A Java program failed; the message is the reason, as half a sentence."""


def run_java(arguments: Sequence[str], seconds: float, files: dict[str, bytes], read: str = "stdout") -> str:
    """Run a Java program; returns the contents of the file `read` of its working folder, by default its output.

    `files` are put into that folder, and `stdin`, if it is one of them, is its input. NoJava if there is no Java, or it
    does not end with status 0 within `seconds`; all processes that it started are killed.
    """
    java = program("java")
    if java is None:
        raise NoJava("there is no java on PATH")
    # Files instead of pipes: a pipe could fill up, or stay open in a process left behind.
    with tempfile.TemporaryDirectory(prefix="openblip-java-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        for file, content in {"stdin": b"", **files}.items():
            (folder / file).write_bytes(content)
        status = _wait([java, *_FLAGS, *arguments], folder, seconds)
        if status:
            ended = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            raise NoJava(f"java {ended}{_last_words(folder / 'stderr')}")
        try:
            return (folder / read).read_bytes().decode("utf-8", "replace")
        except OSError:
            raise NoJava("java ended without writing its result") from None


def _wait(command: list[str], folder: Path, seconds: float) -> int:
    # _JAVA_OPTIONS would win over the encoding that is asked for.
    environment = {name: value for name, value in os.environ.items() if name != "_JAVA_OPTIONS"} | {"LC_ALL": "C.UTF-8"}
    with contextlib.ExitStack() as stack:
        streams = {
            stream: stack.enter_context((folder / stream).open("rb" if stream == "stdin" else "wb"))
            for stream in ("stdin", "stdout", "stderr")
        }
        try:
            process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **streams)
        except OSError as error:
            raise NoJava(f"java cannot be started: {error.strerror}") from None
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise NoJava(f"java did not end within {seconds:g} seconds") from None
        finally:
            kill_group(process)
            process.wait()


def _last_words(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return f": {lines[-1].strip()[:200]}" if lines else ""


def shipped(*parts: str) -> Path:
    """Path of a file in pycocoevalcap. NoJava if it is missing."""
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None:
        raise NoJava("pycocoevalcap is not installed")
    path = Path(next(iter(spec.submodule_search_locations))).joinpath(*parts)
    if not path.exists():
        raise NoJava(f"{path} is missing; install pycocoevalcap again")
    return path


def meteor_statistics(references: Sequence[Sequence[str]], captions: Sequence[str], seconds: float) -> np.ndarray:
    """METEOR 1.5's statistics (images, 23) of tokenized captions against tokenized references. NoJava if it fails."""
    # One line an image, and its separator cannot stand in a text: no line can be taken for another's.
    lines = [" ||| ".join(("SCORE", *map(_meteor_text, (*texts, caption))))
             for texts, caption in zip(references, captions, strict=True)]  # fmt: skip
    program = ("-Xmx2G", "-jar", str(shipped("meteor", "meteor-1.5.jar")), "-", "-", "-stdio", "-l", "en", "-norm")
    output = run_java(program, seconds, {"stdin": "".join(f"{line}\n" for line in lines).encode("utf-8", "ignore")})
    try:
        rows = [[float(number) for number in line.split()] for line in output.split("\n")[:-1]]
    except ValueError:
        raise NoJava(f"METEOR answered with something other than numbers: {output[:60]!r}") from None
    if len(rows) != len(lines) or any(len(row) != METEOR_STATISTICS for row in rows):
        raise NoJava(f"METEOR answered {len(rows)} lines for {len(lines)} captions")
    return np.array(rows)


def _meteor_text(text: str) -> str:
    return " ".join(text.replace("|||", " ").split())


def meteor_of(statistics: np.ndarray) -> np.ndarray:
    """Sums (..., 23) of statistics that `meteor_summable` has seen -> METEOR 1.5 for English, ranking task (...)."""
    alpha, beta, gamma, delta = 0.85, 0.2, 0.6, 0.75
    weights = np.array([1.0, 0.6, 0.8, 0.6])  # exact words, stems, synonyms, paraphrases
    length, reference_length, function, reference_function = np.moveaxis(statistics[..., :4], -1, 0)
    counts = statistics[..., 4:20].reshape(*statistics.shape[:-1], 4, 4)
    chunks, matched, reference_matched = np.moveaxis(statistics[..., 20:], -1, 0)

    def share(content: int, small: int, words: np.ndarray, function_words: np.ndarray) -> np.ndarray:
        right = (delta * counts[..., content] + (1 - delta) * counts[..., small]) @ weights
        return right / (delta * (words - function_words) + (1 - delta) * function_words)

    with np.errstate(divide="ignore", invalid="ignore"):
        precision = share(0, 2, length, function)
        recall = share(1, 3, reference_length, reference_function)
        mean = precision * recall / (alpha * precision + (1 - alpha) * recall)
        return np.nan_to_num(mean * (1 - gamma * (chunks / ((matched + reference_matched) / 2)) ** beta))


def meteor_summable(statistics: np.ndarray) -> np.ndarray:
    """Statistics (images, 23) as METEOR sums them: a caption that equals a reference is in no pieces."""
    equal = (statistics[:, 21] == statistics[:, 0]) & (statistics[:, 22] == statistics[:, 1]) & (statistics[:, 20] == 1)
    summable = statistics.copy()
    summable[equal, 20] = 0
    return summable


def spice_scores(
    references: Sequence[Sequence[str]], captions: Sequence[str], seconds: float, folder: str | None = None
) -> np.ndarray:
    """SPICE's F (images,) of tokenized captions. NoJava if it fails or its parser is missing.

    `folder` holds spice-1.0.jar and lib/; pycocoevalcap's when not given.
    """
    home = Path(folder).expanduser().resolve() if folder else shipped("spice")
    missing = [file for file in _SPICE_NEEDS if not (home / file).is_file()]
    if missing:
        raise NoJava(f'{", ".join(missing)} missing in {home} and never fetched; see "Evaluation" at {DOCS}')
    rows = [
        {"image_id": i, "test": caption, "refs": list(texts)}
        for i, (texts, caption) in enumerate(zip(references, captions, strict=True))
    ]
    program = ("-Xmx8G", "-jar", str(home / "spice-1.0.jar"), "in.json", "-out", "out.json", "-silent")
    output = run_java(program, seconds, {"in.json": json.dumps(rows).encode()}, read="out.json")
    try:
        scores = {row["image_id"]: float(row["scores"]["All"]["f"]) for row in json.loads(output)}
        values = np.array([scores[i] for i in range(len(rows))])
    except (ValueError, TypeError, KeyError):
        raise NoJava("SPICE gave no score for some of the captions") from None
    if not np.isfinite(values).all():
        raise NoJava(f"SPICE gave no number for {(~np.isfinite(values)).sum()} of the captions")
    return values
