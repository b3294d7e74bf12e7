"""Undo of what a command writes into a folder: each run keeps what was there, and a log of its changes.

FOLDER/.blip-undo/RUN/run.json        options, and whether the run has finished
                      log.jsonl       {"path", "action", "before", "after"} with SHA-256, one line before each rename
                      before/SHA256   former contents
                      captions.jsonl  captions whose file is written at the end
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from blip import files
from blip.app.answers import shown
from blip.data.paths import under
from blip.lock import RunLock, RunLocked

FOLDER = ".blip-undo"
_RECORD, _LOG, _CAPTIONS, _BEFORE = "run.json", "log.jsonl", "captions.jsonl", "before"
_FORMAT = "openblip undo"
_RUN = re.compile(r"(\d+)-\d{8}-\d{6}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NO_FILE = "link, folder or device"
"""Stands for the digest of what is not a regular file, which no run has written."""
_TRIES, _WAIT = 5, 0.2


def command(*roots: str) -> str:
    """The command that takes the last run in each folder back."""
    return f"blip caption {shown(shlex.join(roots))} --undo"


@contextmanager
def only_writer(roots: Iterable[str], inside: Iterable[str] = ()) -> Iterator[None]:
    """Hold folders against other runs: in them, in one above them, or in the folders `inside` them.

    ValueError if another process has one of them. A `.blip-undo` without runs is removed at the end.
    """
    own = {os.path.realpath(root): root for root in roots}
    above = {str(folder) for root in own for folder in Path(root).parents}
    others = sorted({*above, *map(os.path.realpath, inside)} - own.keys())
    with ExitStack() as stack:
        for root in own.values():
            home = Path(root) / FOLDER
            if home.is_symlink():
                raise ValueError(f"{home} is a link, and nothing is written through it: remove it")
            _try(stack, home, root)
            stack.callback(_remove_if_empty, home)
        for other in others:
            if (Path(other) / FOLDER / "run.lock").exists():
                # Only for a moment, as another of its folders may be written to at the same time.
                with contextlib.suppress(OSError), ExitStack() as moment:  # it may be another user's
                    _try(moment, Path(other) / FOLDER, other)
        yield


def _try(stack: ExitStack, home: Path, root: str) -> ExitStack:
    """Take a folder's lock, which others may have for a moment; ValueError if it remains taken."""
    for attempt in range(_TRIES):
        try:
            with ExitStack() as taken:
                taken.enter_context(RunLock(home)).check()
                return stack.push(taken.pop_all())
        except RunLocked as error:
            problem = error
        time.sleep(_WAIT * (attempt < _TRIES - 1))
    raise ValueError(f"another command is writing captions into {root}: wait for it, or stop it ({problem})")


def _remove_if_empty(home: Path) -> None:
    # A process that opened the lock before notices, by RunLock.check, that it holds the lock of a removed folder.
    files.sweep(home)
    with contextlib.suppress(OSError):
        if all(path.name.startswith("run.lock") for path in home.iterdir()):
            for path in home.iterdir():
                path.unlink()
            home.rmdir()


@dataclass
class Change:
    """What a run did to a file, which it may have begun to write more than once."""

    before: str | None
    """SHA-256 before the run; None if there was no file."""
    after: set[str] = field(default_factory=set)
    """SHA-256 of what the run wrote, or was about to write."""


class UndoRun:
    """A run of a command in a folder. Nothing is on disk before its first write."""

    def __init__(self, root: str, folder: Path, options: Mapping[str, Any]) -> None:
        self.root, self.folder, self.options = Path(root), folder, dict(options)
        self.finished = False
        self.changes: dict[str, Change] = {}
        """By path relative to the root."""
        self.captions: dict[str, list[str]] = {}
        """Captions that `note` has kept, by path relative to the root."""

    @classmethod
    def last(cls, root: str) -> UndoRun | None:
        """The last run recorded in a folder. ValueError, naming file and line, if the record is not readable."""
        home = Path(root) / FOLDER
        names = [name for name in (os.listdir(home) if home.is_dir() else []) if _RUN.fullmatch(name)]
        for name in sorted(names, key=lambda name: (_number(name), name), reverse=True):
            folder = home / name
            if folder.is_symlink() or not (folder / _RECORD).is_file():
                continue
            run = cls(root, folder, {})
            run._read()
            return run
        return None

    @classmethod
    def above(cls, folder: str) -> UndoRun | None:
        """The last run in the nearest folder above this one whose last run wrote captions of what is in it."""
        real = os.path.realpath(folder)
        for parent in Path(real).parents:
            root = str(parent) if os.path.isabs(folder) else os.path.relpath(parent)
            with contextlib.suppress(ValueError, OSError):  # another's folder, and perhaps not ours to read
                run = cls.last(root)
                if run and any(under(str(parent / name), real) for name in (*run.changes, *run.captions)):
                    return run
        return None

    @classmethod
    def resumed(cls, root: str, options: Mapping[str, Any]) -> UndoRun:
        """The last run, if it was stopped and had these options, or else a new one."""
        last, options = cls.last(root), json.loads(json.dumps(options))
        if last and not last.finished and all(last.options.get(name) == value for name, value in options.items()):
            return last
        number = _number(last.folder.name) + 1 if last else 1
        return cls(root, Path(root) / FOLDER / f"{number:04}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}", options)

    def state(self, path: str) -> Literal["before", "after", "edited", None]:
        """Whether a file is as it was before the run, as the run left it, or neither; None if it has no change."""
        change = self.changes.get(path)
        if change is None:
            return None
        now = _digest(self.root / path)
        return "after" if now in change.after else "before" if now == change.before else "edited"

    def write(self, contents: Mapping[str, bytes], action: Literal["replaced", "appended"]) -> None:
        """Give files, named relative to the root, new contents, each in one rename; `action` is for files that exist.

        WriteError if the disk is full or a file cannot be written. The run can then be resumed or taken back.
        """
        self._begin()
        new: dict[Path, Path] = {}
        lines, advice = [], f"take back what was done: {command(str(self.root))}"
        try:
            for name, content in contents.items():
                path, after = self.root / name, hashlib.sha256(content).hexdigest()
                with files.explain_write(path, len(content), advice):
                    old, mode = _content(path)
                    before = None if old is None else hashlib.sha256(old).hexdigest()
                    if before != after:
                        if old is not None:
                            self._keep(before, old, mode)
                        new[path] = files.partial(path)
                        files.write_bytes(new[path], content)
                        if mode is not None:
                            new[path].chmod(mode)
                what = "created" if old is None else action
                lines.append({"path": name, "action": what, "before": before, "after": after})
            with files.explain_write(self.folder / _LOG, 1, advice):
                _append(self.folder / _LOG, lines)
            for path, unfinished in new.items():
                with files.explain_write(path, 1, advice):
                    files.checkpoint_event("before replace", path)
                    os.replace(unfinished, path)
            for folder in {path.parent for path in new}:
                files.sync(folder)
        finally:
            for unfinished in new.values():
                unfinished.unlink(missing_ok=True)
        for line in lines:
            self.changes.setdefault(line["path"], Change(line["before"])).after.add(line["after"])

    def remove(self, name: str) -> None:
        """Remove a file that this run created. ValueError if it was there before, or was changed since."""
        if self.state(name) != "after" or self.changes[name].before is not None:
            raise ValueError(f"{self.root / name} was edited since, and is left as it is")
        (self.root / name).unlink()
        files.sync((self.root / name).parent)

    def note(self, captions: Mapping[str, list[str]]) -> None:
        """Keep captions of images, named relative to the root, until the file that they belong to is written."""
        self._begin()
        path = self.folder / _CAPTIONS
        with files.explain_write(path, 1, f"take back what was done: {command(str(self.root))}"):
            _append(path, [{"path": name, "captions": texts} for name, texts in captions.items()])
        self.captions |= captions

    def finish(self) -> None:
        """Record that the run has finished, so that the same command begins another."""
        if self.folder.exists() and not self.finished:
            self.finished = True
            files.replace_file(self.folder / _RECORD, self._record())

    def take_back(self, *, dry: bool = False) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """Bring files back to what they were; with `dry` only say what would be done.

        Returns (path, `restored` or `removed`) of those brought back, and (path, reason) of those left as they are. The
        run's record is removed if none is left.
        """
        back, left, touched = [], [], set()
        if not dry:
            files.sweep(self.root, inside=True)
        for name, change in reversed(self.changes.items()):
            path = self.root / name
            now = _digest(path)
            if now not in {change.before, *change.after}:
                left.append((name, "was edited since" if now else "was removed since"))
            elif now != change.before:
                if change.before is None:
                    back.append((name, "removed"))
                    if not dry:
                        path.unlink()
                else:
                    kept = self.folder / _BEFORE / change.before
                    if _digest(kept) != change.before:
                        left.append((name, f"cannot be restored, as {kept} is missing or damaged"))
                        continue
                    back.append((name, "restored"))
                    if not dry:
                        self._restore(path, kept)
                touched.add(path.parent)
        if not dry:
            for folder in touched:
                files.sync(folder)
            if not left:
                done = files.partial(self.folder)  # a name that is swept, so that a kill leaves no half of a record
                self.folder.rename(done)
                shutil.rmtree(done)
        return back[::-1], left[::-1]

    def _restore(self, path: Path, kept: Path) -> None:
        unfinished = files.partial(path)
        try:
            with files.explain_write(path, kept.stat().st_size, "give the same command again"):
                files.write_bytes(unfinished, kept.read_bytes())
                unfinished.chmod(stat.S_IMODE(path.stat().st_mode))
                files.checkpoint_event("before replace", path)
                os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    def _begin(self) -> None:
        if not self.folder.exists():
            record = self._record()
            files.write_directory(self.folder, {_RECORD: (lambda path: files.write_bytes(path, record), len(record))})
            files.sync(self.folder.parent.parent)

    def _record(self) -> bytes:
        values = {"format": _FORMAT, "version": 1, "finished": self.finished, "options": self.options}
        return json.dumps(values, indent=1).encode() + b"\n"

    def _keep(self, digest: str, content: bytes, mode: int) -> None:
        kept = self.folder / _BEFORE / digest
        if not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            files.replace_file(kept, content)
            kept.chmod(mode)  # a private text stays private
            files.sync(kept.parent)

    def _read(self) -> None:
        path = self.folder / _RECORD
        try:
            record = json.loads(path.read_bytes())
            if record["format"] != _FORMAT or not isinstance(record["options"], dict):
                raise ValueError
            self.options, self.finished = record["options"], record["finished"] is True
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{path} is not the record of a run: move {self.folder} away") from None
        for number, line in _lines(self.folder / _LOG):
            name, before, after = (line.get(key) for key in ("path", "before", "after"))
            digests = [digest for digest in (before, after) if digest is not None]
            is_digest = all(isinstance(digest, str) and _DIGEST.fullmatch(digest) for digest in digests)
            if not isinstance(name, str) or not after or not is_digest or not self._inside(name):
                problem = f"line {number} of {self.folder / _LOG} is not a change of a file in {self.root}"
                raise ValueError(f"{problem}, so nothing is done: move {self.folder} away")
            self.changes.setdefault(name, Change(before)).after.add(after)
        for _, line in _lines(self.folder / _CAPTIONS):
            if isinstance(line.get("path"), str) and isinstance(line.get("captions"), list):
                self.captions[line["path"]] = [str(text) for text in line["captions"]]

    def _inside(self, name: str) -> bool:
        """Whether a name in the log, which may have come with the folder, is of a file in the folder."""
        path = Path(name)
        if "\0" in name or path.is_absolute() or ".." in path.parts or not path.name:
            return False
        return under(os.path.realpath((self.root / path).parent), os.path.realpath(self.root))


def _number(name: str) -> int:
    return int(_RUN.fullmatch(name)[1])


def _content(path: Path) -> tuple[bytes | None, int | None]:
    """Content and permissions of a file; None if there is none."""
    try:
        info = path.lstat()
    except FileNotFoundError:
        return None, None
    if not stat.S_ISREG(info.st_mode):
        raise OSError(f"{path} is not a regular file any more")
    return path.read_bytes(), stat.S_IMODE(info.st_mode)


def _digest(path: Path) -> str | None:
    try:
        return files.sha256(path) if stat.S_ISREG(path.lstat().st_mode) else _NO_FILE
    except (FileNotFoundError, NotADirectoryError):
        return None


def _append(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Add lines, so that they survive a power cut; a torn last line is removed first."""
    with path.open("a+b") as file:
        if size := file.seek(0, os.SEEK_END):
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and values of each complete line; {} for one that is not a JSON object."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        yield number, values if isinstance(values, dict) else {}
