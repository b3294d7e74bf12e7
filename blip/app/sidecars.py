"""Captions in files beside their images, and in the metadata.jsonl of their folder."""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from blip import files
from blip.data.paths import under
from blip.options import option

if TYPE_CHECKING:
    from blip.app.undo import UndoRun
    from blip.data.image_files import InputImages

METADATA = "metadata.jsonl"
_FIELD = re.compile(r"\{(\w+)\}")
_LONGEST = 255
"""Most bytes of a file's name."""
_NAMED = 5
"""Most collisions that a message names."""
_BOM = b"\xef\xbb\xbf"
_Names = dict[str, list[str]]
"""Names in a folder, by what is left of them where case does not count."""


@dataclass(frozen=True, kw_only=True)
class SidecarOptions:
    """Captions beside their images."""

    sidecar: str | None = option(None, metavar="ENDING")
    """Write captions beside their images: with `.txt`, those of a.jpg to a.txt, one a line"""
    sidecar_name: Literal["stem", "full"] = "stem"
    """Name of the file: `stem` is a.txt for a.jpg, `full` is a.jpg.txt"""
    metadata: bool = False
    """Write captions to metadata.jsonl in the folder, the form of image folders; with --sidecar, the texts of those"""
    prefix: str = option("", metavar="TEXT")
    """Text before each caption; {stem} is the image's name without its ending, {folder} the name of its folder"""
    suffix: str = option("", metavar="TEXT")
    """Text after each caption, likewise"""
    replace: list[tuple[str, str]] = option(list, metavar="OLD NEW", repeat=True)
    """Replace a text in captions, before prefix and suffix are added; can be repeated"""
    skip_existing: bool = False
    """Keep the captions that are there, and caption the other images; this is the default"""
    overwrite: bool = False
    """Replace the captions that are there"""
    append: bool = False
    """Add to the captions that are there, after --separator"""
    separator: str = option(", ", metavar="TEXT")
    """Text between a caption that is there and an added one"""
    dry_run: bool = False
    """Print what would be done to each file, without using the model or writing anything"""
    undo: bool = False
    """Take back the last run that wrote captions into the folder"""

    @property
    def mode(self) -> Literal["skip", "overwrite", "append"]:
        """What is done about captions that are there."""
        return "overwrite" if self.overwrite else "append" if self.append else "skip"

    def check_sidecars(self) -> None:
        """Raise ValueError, naming the option, if the options do not fit together."""
        from blip.data.formats.tars import IMAGES

        switches = {"--skip-existing": self.skip_existing, "--overwrite": self.overwrite, "--append": self.append}
        modes = [name for name, is_given in switches.items() if is_given]
        writes = self.sidecar is not None or self.metadata
        if len(modes) > 1:
            raise ValueError(f"{' and '.join(modes)} contradict each other: give one of them")
        if self.undo and (writes or modes):
            raise ValueError("--undo takes back the last run, whatever it wrote: give only the folder with it")
        texts = ("prefix", "suffix", "replace", "separator", "sidecar_name")
        given = [f"--{name.replace('_', '-')}" for name in texts if getattr(self, name) != _default(name)]
        given += modes + ["--dry-run"] * (self.dry_run and not self.undo)
        if given and not writes:
            raise ValueError(f"{given[0]} is about captions beside images: give --sidecar .txt or --metadata, too")
        if self.sidecar is not None:
            if not re.fullmatch(r"\.[^/\\\x00-\x1f\x7f]*[^/\\\x00-\x1f\x7f. ]", self.sidecar):
                raise ValueError(f"--sidecar {self.sidecar!r}: give an ending that begins with a dot, such as .txt")
            if self.sidecar.rpartition(".")[2].lower() in IMAGES:
                raise ValueError(f"--sidecar {self.sidecar} is the ending of an image: give one such as .txt")
        for name in ("prefix", "suffix", "separator"):
            _check_text(f"--{name}", getattr(self, name), line_breaks=name == "separator")
        for old, new in self.replace:
            if not old:
                raise ValueError(f"--replace '' {new!r}: give the text to replace")
            _check_text("--replace", new)
        for name in ("prefix", "suffix"):
            if unknown := [field for field in _FIELD.findall(getattr(self, name)) if field not in ("stem", "folder")]:
                raise ValueError(f"--{name}: there is no {{{unknown[0]}}}; {{stem}} and {{folder}} are replaced")

    def record(self) -> dict[str, Any]:
        """The options by which a run that was stopped is recognized."""
        names = ("sidecar", "sidecar_name", "metadata", "mode", "prefix", "suffix", "replace", "separator")
        return {name: getattr(self, name) for name in names}

    def texts(self, image: str, captions: Iterable[str]) -> list[str]:
        """Captions as they are written for an image; those without words are left out."""
        folder = os.path.basename(os.path.dirname(os.path.abspath(image)))
        stem = os.path.splitext(os.path.basename(image))[0]
        values = {"stem": _as_text(stem), "folder": _as_text(folder)}
        prefix, suffix = (_FIELD.sub(lambda m: values[m[1]], text) for text in (self.prefix, self.suffix))
        replaced = []
        for text in captions:
            for old, new in self.replace:
                text = text.replace(old, new)
            replaced.append(" ".join(text.split()))
        return [prefix + text + suffix for text in replaced if text]


def _default(name: str) -> Any:
    return getattr(SidecarOptions(), name)


def _check_text(name: str, text: str, line_breaks: bool = False) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}: the text is not UTF-8") from None
    if not line_breaks and re.search(r"[\r\n]", text):
        raise ValueError(f"{name}: there is a line break in {text!r}, but each line is a caption")


def _as_text(name: str) -> str:
    """A file's name as text in one line, whatever its bytes are."""
    return " ".join(os.fsencode(name).decode("utf-8", "replace").split())


class Beside:
    """Captions beside images: which images are to be captioned, and the files that are written."""

    def __init__(self, options: SidecarOptions, inputs: InputImages) -> None:
        """ValueError, naming them, for images that would share a file, and for folders that cannot be written to."""
        self.options, self.inputs = options, inputs
        self.to_do: list[str] = []
        """Images to caption, after `survey` and `begin`."""
        self.captioned: set[str] = set()
        self.kept: set[str] = set()
        """Images whose captions stay as they are."""
        self.problems: list[tuple[str, str]] = []
        """Images that get no captions, and why, after `survey`."""
        self.notes: list[str] = []
        self._real = cache(os.path.realpath)
        first: dict[str, str] = {}
        self._root = {path: first.setdefault(self._real(at), at) for path, at in inputs.folders.items()}
        self.roots = list(first.values())
        self._sidecar = {path: self._named(path) for path in inputs.paths} if options.sidecar is not None else {}
        self._runs: dict[str, UndoRun] = {}
        self._refuse_collisions()
        if options.metadata:  # which no image is missing from
            own = sum(os.path.isfile(os.path.join(root, METADATA)) for root in self.roots)
            self.inputs = inputs._replace(left_out=inputs.left_out - Counter({".jsonl": own}))

    @property
    def folders(self) -> set[str]:
        """All folders below a root that have images or lead to them."""
        every: set[str] = set()
        for path in self.inputs.paths:
            folder, root = os.path.dirname(path) or ".", self._root[path]
            while folder not in every and len(folder) > len(root):
                every.add(folder)
                folder = os.path.dirname(folder)
        return every

    def check_writable(self) -> None:
        """Raise ValueError for a folder that cannot be written to."""
        beside = (os.path.dirname(path) or "." for path in self.to_do if self._sidecar)
        for folder in dict.fromkeys([*self.roots, *beside]):
            if not os.access(folder, os.W_OK | os.X_OK):
                raise ValueError(
                    f"{folder} cannot be written to, so no captions can be put there: copy it, or write them elsewhere "
                    "with --out captions.jsonl --json"
                )

    def survey(self) -> None:
        """Find out which captions are there; ValueError for a metadata.jsonl that is not one of an image folder."""
        named = {root: _texts_by_name(read_metadata(root)) for root in self.roots} if self.options.metadata else {}
        names, targets = cache(_by_case), frozenset(self._sidecar.values())
        empty = 0
        for path in self.inputs.paths:
            if self.options.metadata and not _is_utf8(path):
                self.problems.append((path, f"its name is not UTF-8, so {METADATA} cannot hold it"))
                continue
            if not self._sidecar:
                is_there, problem = bool(named[self._root[path]].get(self._name(path))), ""
            else:
                is_there, problem = self._existing(path, names, targets)
            if problem:
                self.problems.append((path, problem))
            elif is_there and self.options.mode == "skip":
                self.kept.add(path)
                empty += bool(self._sidecar) and not os.path.getsize(self._sidecar[path])
            else:
                self.to_do.append(path)
        if empty:
            self.notes.append(f"{empty} of the captions that are there are empty; --overwrite replaces them")

    def actions(self) -> Iterator[tuple[str, str, str]]:
        """For each image, after `survey`: its path, what would be done, and the file."""
        problems, to_do = dict(self.problems), set(self.to_do)
        existing = {"overwrite": "replace", "append": "append", "skip": "create"}[self.options.mode]
        for path in self.inputs.paths:
            target = self._sidecar.get(path) or os.path.join(self._root[path], METADATA)
            if path in to_do:
                yield path, existing if os.path.lexists(target) else "create", target
            else:
                yield path, f"none: {problems[path]}" if path in problems else "keep", target

    def begin(self, options: Mapping[str, Any]) -> None:
        """Begin a run with these options, or continue the last one if it was stopped and had them."""
        from blip.app.undo import UndoRun

        self._runs = {root: UndoRun.resumed(root, options) for root in self.roots}
        for folder in {os.path.dirname(path) or "." for path in self.inputs.paths}:
            files.sweep(Path(folder))
        for path in [*self.to_do, *self.kept]:
            run = self._runs[self._root[path]]
            state = run.state(self._name_beside(path)) if self._sidecar else None
            if state == "after" or self._name(path) in run.captions:
                self.captioned.add(path)
                self.kept.discard(path)
            elif state == "edited":
                self.kept.add(path)
                self.notes.append(f"{self._sidecar[path]} was edited since the run was stopped, and is left as it is")
        self.to_do = [path for path in self.to_do if path not in self.captioned and path not in self.kept]

    def write(self, captions: Mapping[str, list[str]]) -> list[tuple[str, str]]:
        """Write the captions of images. Returns those that get none, with reasons."""
        contents: dict[str, dict[str, Any]] = defaultdict(dict)
        failures = []
        for path, texts in captions.items():
            lines = self.options.texts(path, texts)
            if not lines:
                failures.append((path, "the model has no words for it"))
            elif not self._sidecar:
                contents[self._root[path]][self._name(path)] = lines
                self.captioned.add(path)
            elif (content := self._content(self._sidecar[path], lines)) is None:
                self.kept.add(path)
            else:
                contents[self._root[path]][self._name_beside(path)] = content
                self.captioned.add(path)
        for root, of_root in contents.items():
            if self._sidecar:
                self._runs[root].write(of_root, "appended" if self.options.append else "replaced")
            else:
                self._runs[root].note(of_root)
        return failures

    def target(self, image: str) -> str:
        """The file beside an image."""
        return self._sidecar[image]

    def replace(self, image: str, text: str | None) -> None:
        """Give the file beside an image the lines of a text, or with None remove one that this run created."""
        run, name = self._runs[self._root[image]], self._name_beside(image)
        if text is None:
            run.remove(name)
        else:
            run.write({name: as_lines(text)}, "replaced")

    def finish(self) -> list[tuple[str, str]]:
        """Write the metadata and end the run. Returns images that get no row, with reasons."""
        failures: list[tuple[str, str]] = []
        for root, run in self._runs.items():
            if self.options.metadata:
                rows = read_metadata(root)
                texts = self._of_sidecars(root, failures) if self._sidecar else self._of_run(run, rows)
                if content := merged(rows, texts):
                    run.write({METADATA: content}, "replaced")
            run.finish()
        self.kept -= {path for path, _ in failures}
        return failures

    def summary(self, failed: int) -> str:
        """The last line of a run."""
        from blip.app.undo import command

        changed = [root for root, run in self._runs.items() if run.folder.exists()]
        undo = f"; undo: {command(*changed)}" if changed else ""
        return f"{len(self.captioned)} captioned, {len(self.kept)} kept, {failed} could not be used{undo}"

    def _named(self, path: str) -> str:
        return (path if self.options.sidecar_name == "full" else os.path.splitext(path)[0]) + self.options.sidecar

    def _name(self, image: str) -> str:
        """Path of an image relative to its root."""
        return os.path.relpath(image, self.inputs.folders[image]).replace(os.sep, "/")

    def _name_beside(self, image: str) -> str:
        """Path of the file beside an image, relative to its root."""
        return "/".join([*self._name(image).split("/")[:-1], os.path.basename(self._sidecar[image])])

    def _refuse_collisions(self) -> None:
        sharing: dict[tuple[str, str], list[str]] = defaultdict(list)
        for image, target in self._sidecar.items():
            sharing[self._real(os.path.dirname(image)), os.path.basename(target).casefold()].append(image)
        pairs = []
        for images in (images for images in sharing.values() if len(images) > 1):
            targets = Counter(os.path.basename(self._sidecar[image]) for image in images)
            if len(targets) < len(images) or _ignores_case(images[0]):
                shared = [i for i in images if targets[os.path.basename(self._sidecar[i])] > 1] or images
                pairs.append(f"{' and '.join(shared)} would share {self._sidecar[shared[0]]}")
        if pairs:
            more = f"; and {len(pairs) - _NAMED} more" if len(pairs) > _NAMED else ""
            full = self.options.sidecar_name == "stem"
            remedy = f"--sidecar-name full gives names such as a.jpg{self.options.sidecar}" if full else "rename one"
            raise ValueError(f"{'; '.join(pairs[:_NAMED])}{more}: {remedy}")
        taken = {*self.inputs.paths, *(os.path.join(root, METADATA) for root in self.roots if self.options.metadata)}
        for image, target in self._sidecar.items():
            if target in taken:
                raise ValueError(f"the captions of {image} would replace {target}: give another --sidecar")

    def _existing(self, image: str, names: Callable[[str], _Names], targets: Set[str]) -> tuple[bool, str]:
        """Whether there is a file beside an image, and the reason why none can be written."""
        target, root = self._sidecar[image], self._root[image]
        folder, name = os.path.split(target)
        if not under(self._real(folder), self._real(root)):
            return False, f"{folder} leads outside {root}, and nothing is written through links: caption it by itself"
        if len(os.fsencode(name)) > _LONGEST:
            return False, f"the name of {target} would have more than {_LONGEST} bytes"
        same = names(folder or ".").get(name.casefold(), [])
        try:
            info = os.lstat(target)
        except FileNotFoundError:
            other = next((one for one in same if os.path.join(folder, one) not in targets), None)
            problem = f"{other} is there, whose name differs from {name} only in case: rename it"
            return False, problem if other else ""
        if stat.S_ISLNK(info.st_mode):
            if self.options.mode == "skip" and os.path.isfile(target):
                return True, ""
            return False, f"{target} is a link, and nothing is written through links"
        if not stat.S_ISREG(info.st_mode):
            return False, f"{target} is {'a folder' if stat.S_ISDIR(info.st_mode) else 'not a regular file'}"
        if self.options.append and lines_of(Path(target)) is None:
            return False, f"{target} is not UTF-8 text, so nothing is added to it"
        return True, ""

    def _content(self, target: str, lines: list[str]) -> bytes | None:
        """New content of a file beside an image; None if it is to be kept."""
        content = "\n".join(lines).encode() + b"\n"
        if self.options.mode == "overwrite" or not os.path.lexists(target):
            return content
        if self.options.mode == "skip":
            return None
        before = Path(target).read_bytes().rstrip()
        return before + (self.options.separator.encode() if before.removeprefix(_BOM) else b"") + content

    def _of_sidecars(self, root: str, failures: list[tuple[str, str]]) -> dict[str, list[str]]:
        """Captions in the files beside images, by the images' names."""
        texts = {}
        for path in self.captioned | self.kept:
            if self._root[path] == root:
                lines = lines_of(Path(self._sidecar[path]))
                if lines is None:
                    failures.append((path, f"{self._sidecar[path]} is not UTF-8 text, so it is not in {METADATA}"))
                elif lines:
                    texts[self._name(path)] = lines
        return texts

    def _of_run(self, run: UndoRun, rows: list[Row]) -> dict[str, list[str]]:
        """Captions of a run for the rows of images, by the images' names."""
        if not self.options.append:
            return run.captions
        if run.state(METADATA) is not None and run.state(METADATA) != "before":
            return {}  # added already
        before = _texts_by_name(rows)
        between = self.options.separator
        return {name: _joined(before.get(name, []), texts, between) for name, texts in run.captions.items()}


def as_lines(text: str) -> bytes:
    """Content of a file beside an image. ValueError if the text cannot be in a text file."""
    lines = [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    try:
        content = "".join(f"{line}\n" for line in lines if line).encode()
    except UnicodeEncodeError:
        raise ValueError("the text is not UTF-8") from None
    if b"\0" in content:
        raise ValueError("the text has a null character")
    return content


def _joined(before: list[str], texts: list[str], separator: str) -> list[str]:
    return [*before[:-1], before[-1] + separator + texts[0], *texts[1:]] if before else texts


def lines_of(path: Path) -> list[str] | None:
    """Captions in a file beside an image, as training reads them; None if it is not UTF-8 text."""
    from blip.data.formats.folder import captions_of

    return captions_of(path.read_bytes())


def _is_utf8(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def _by_case(folder: str) -> _Names:
    """Names in a folder, by what is left of them where case does not count."""
    names: dict[str, list[str]] = defaultdict(list)
    for name in os.listdir(folder):
        names[name.casefold()].append(name)
    return names


def _ignores_case(path: str) -> bool:
    """Whether a file's folder is on a file system that takes names in other case for the same."""
    folder, name = os.path.split(path)
    other = os.path.join(folder, name.swapcase())
    try:
        return other != path and os.path.samestat(os.lstat(path), os.lstat(other))
    except OSError:
        return False


class Row(NamedTuple):
    """A row of metadata.jsonl."""

    values: dict[str, Any]
    line: str

    @property
    def name(self) -> str:
        """Path of the image relative to the folder."""
        return os.path.normpath(self.values["file_name"])


def read_metadata(root: str) -> list[Row]:
    """Rows of the metadata.jsonl in a folder; none if there is no such file.

    ValueError, naming file and line, for one that is not of the form of image folders, or if there is a metadata.csv.
    """
    path = Path(root) / METADATA
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"{path} is not a regular file, and nothing is written through links: move it away")
    if not path.exists():
        if (Path(root) / "metadata.csv").exists():
            csv = os.path.join(root, "metadata.csv")
            raise ValueError(f"readers would ignore {csv} beside a {METADATA}: convert it, or move it away")
        return []
    try:
        text = path.read_bytes().removeprefix(_BOM).decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: mend it, or move it away") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict) or not isinstance(values.get("file_name"), str):
            raise ValueError(f'line {number} of {path} is not {{"file_name": ...}}: mend it, or move the file away')
        if not isinstance(values.get("text", ""), str | None):
            raise ValueError(f"line {number} of {path}: `text` is not a text: mend it, or move the file away")
        rows.append(Row(values, line))
    return rows


def _texts_by_name(rows: list[Row]) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if text := (row.values.get("text") or "").strip():
            texts[row.name].append(text)
    return texts


def merged(rows: list[Row], texts: Mapping[str, list[str]]) -> bytes | None:
    """Content of metadata.jsonl with a row for each of the texts of images; None if nothing changes.

    Rows are in natural order. Other rows, and other columns of an image's rows, are kept.
    """
    from blip.data.image_files import natural

    by_name: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_name[row.name].append(row)
    changed = False
    for name, lines in texts.items():
        before = by_name[name] or [Row({"file_name": name}, "")]
        if [row.values.get("text") for row in before] != lines:
            values = [before[min(i, len(before) - 1)].values | {"text": line} for i, line in enumerate(lines)]
            by_name[name] = [Row(of_row, json.dumps(of_row, ensure_ascii=False)) for of_row in values]
            changed = True
    if not changed:
        return None
    ordered = [row.line for name in sorted(by_name, key=natural) for row in by_name[name]]
    return "".join(line + "\n" for line in ordered).encode("utf-8", "backslashreplace")
