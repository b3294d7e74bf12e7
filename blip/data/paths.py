"""Checks of paths given by users and of image names in data: which may be opened. Imports nothing heavy."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote_to_bytes

from blip.data import folders
from blip.data.folders import Walk
from blip.errors import BadSample, DataError, shown, without_credentials

_ADDRESS = re.compile(r"^(?:[a-z][a-z0-9+.\-]*:/|(?:pipe|data|file|ssh|s3|gs|hf):)", re.IGNORECASE)
_PLAIN = re.compile(r"^[\w\-][\w\-./ ]*\Z")
"""Matches nearly all image paths; others are checked more closely."""
_FILE_URL = re.compile(r"file:(?://(?:localhost)?(?=/)|(?=/(?!/)))", re.IGNORECASE)
_BASE64 = r"[A-Za-z0-9+/=\-_\r\n]"
_ENCODED = re.compile(
    rf"(?i:data:[^,]{{0,200}},)|(?:b?['\"])?(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR){_BASE64}{{40,}}['\"]?\Z|{_BASE64}{{1024,}}\Z"
)
"""A data URI, how JPEG, PNG, GIF and WEBP begin in base64, or a long text of nothing but its characters."""
_NAME_MAX, _PATH_MAX = 255, 4095
"""Most bytes of a name and of a path on Linux and macOS."""
_LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])\Z")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\Z")
_MOST = 1_000_000
"""Most names that a pattern may expand to."""


# What a user gave -----------------------------------------------------------------------------------------------------


def is_plain_path(path: str) -> bool:
    """Whether a user's argument is a plain path and not a command, address or variable."""
    return not (_ADDRESS.match(path) or "${" in path or path.lstrip().startswith("|"))


def check_spec(path: str) -> str:
    """A path that a user gave for a source, with ~ expanded and file:// taken off.

    Raises DataError for commands, addresses and variables.
    """
    path = local(path)
    if not is_plain_path(path):
        raise DataError(
            f"source {without_credentials(path)!r}: only local files are read; download it first, or mount it"
        )
    return os.path.expanduser(path)


def local(spec: str) -> str:
    """Convert a file URL (file:///a%20b, file://localhost/a, file:/a) to its path; anything else is returned unchanged.

    Raises DataError for a file URL of another machine or without an absolute path.
    """
    if spec[:5].lower() != "file:" or os.path.lexists(spec):
        return spec
    start = _FILE_URL.match(spec)
    if not start:
        raise DataError(f"{spec!r} is not a file of this machine: write file:///absolute/path, or the path itself")
    path = spec[start.end() :]
    decoded = os.fsdecode(unquote_to_bytes(path))
    return path if os.path.lexists(path) and not os.path.lexists(decoded) else decoded


def alternatives(spec: str) -> list[str]:
    """Expand a user's path, range {000..012}, list {a,b} or joined list a::b to paths and globs, in order.

    A file, or leading folders, that exist literally are not treated as patterns. Raises DataError for a pattern of more
    than a million names, and as `local` does.
    """
    whole = os.path.lexists(os.path.expanduser(spec))
    names: list[str] = []
    for part in [spec] if whole else filter(None, spec.split("::")):
        path = os.path.expanduser(local(part))
        head, rest = (path, "") if os.path.lexists(path) else _existing(path)
        names += (head + one for one in itertools.islice(_braces(rest), _MOST + 1 - len(names)))
        if len(names) > _MOST:
            raise DataError(f"{spec!r} expands to more than {_MOST:,} names")
    return list(dict.fromkeys(names)) or [spec]


def matching(name: str, walk: Walk | None = None) -> list[str]:
    """The files and folders that match one path or glob of `alternatives`, sorted; empty if there are none.

    `**` passes through folders as `folders.files` does; problems are recorded in `walk`.
    """
    if os.path.lexists(name):
        return [name]
    head, rest = _existing(name)
    if not glob.has_magic(rest):
        return []
    try:
        return folders.matching(glob.escape(head) + rest, walk)
    except ValueError:  # a zero byte or half a surrogate pair, which no file has in its name
        return []


def present(name: str, what: str) -> list[str]:
    """Files that match a path; DataError if there are none, calling the path a `what` (source, input)."""
    paths = matching(name)
    if not paths:
        raise DataError(f"{what} {name}: no such file")
    gone = next((path for path in paths if not os.path.exists(path)), None)
    if gone is not None:
        raise DataError(f"{what} {gone}: no such file; it is a link to {os.path.realpath(gone)}")
    return paths


def is_pattern(spec: str) -> bool:
    """Whether a user's path is a range, a list or a glob, and not one name."""
    names = alternatives(spec)
    return len(names) > 1 or (glob.has_magic(names[0]) and not os.path.lexists(names[0]))


def _existing(path: str) -> tuple[str, str]:
    """The longest folder at the beginning of a path that exists, with its slash, and the rest."""
    at = len(path)
    while (at := path.rfind("/", 0, at)) >= 0:
        if os.path.isdir(path[: at + 1]):
            return path[: at + 1], path[at + 1 :]
    return "", path


def _braces(text: str) -> Iterator[str]:
    """Expand {a,b} and {1..3} as a shell does, nested ones too; other braces stay as they are."""
    for start, end in _pairs(text):
        choices = _choices(text[start + 1 : end])
        if choices is not None:
            for middle in choices:
                yield from (text[:start] + middle + rest for rest in _braces(text[end + 1 :]))
            return
    yield text


def _pairs(text: str) -> Iterator[tuple[int, int]]:
    """Positions of opening and closing braces, in the order in which they open."""
    for start in (at for at, c in enumerate(text) if c == "{"):
        depth = 0
        for at in range(start, len(text)):
            depth += (text[at] == "{") - (text[at] == "}")
            if not depth:
                yield start, at
                break


def _choices(inside: str) -> Iterator[str] | None:
    """Expansions of the text inside a pair of braces; None if it is neither a range nor a list."""
    span = _RANGE.match(inside)
    if span:
        low, high, step = int(span[1]), int(span[2]), max(1, int(span[3] or 1))
        padded = any(re.match(r"-?0\d", end) for end in span.group(1, 2))
        width = max(len(span[1]), len(span[2])) if padded else 0
        numbers = range(low, high + 1, step) if low <= high else range(low, high - 1, -step)
        return (str(n).zfill(width) for n in numbers)
    letters = _LETTERS.match(inside)
    if letters:
        low, high = map(ord, letters.groups())
        return map(chr, range(low, high + 1) if low <= high else range(low, high - 1, -1))
    parts, depth = [""], 0
    for c in inside:
        depth += (c == "{") - (c == "}")
        if c == "," and not depth:
            parts.append("")
        else:
            parts[-1] += c
    return (choice for part in parts for choice in _braces(part)) if len(parts) > 1 else None


# What data names ------------------------------------------------------------------------------------------------------


def check_name(name: str, root: str | Path) -> str | None:
    """Reason why an image path in data may not be opened under `root`, by its text alone; None if it may.

    Never raises, whatever the text is.
    """
    if len(name) <= (_NAME_MAX if name.isascii() else _NAME_MAX // 4) and _PLAIN.match(name) and ".." not in name:
        return None
    if _ENCODED.match(name):
        return f"image {shown(name)} looks like base64 text, not a path: store the decoded bytes in its place"
    if _ADDRESS.match(name) or name.startswith("\\\\"):
        return f"image {shown(name)} is an address, and data is never fetched: download the images first"
    try:
        size = len(os.fsencode(name))
    except UnicodeEncodeError:  # half a surrogate pair, which JSON may hold
        return f"image {shown(name)} is not a path"
    if "\0" in name or not name:
        return f"image {shown(name)} is not a path"
    inside = os.path.normpath(os.path.join(root, name))
    if size > _NAME_MAX and max(len(os.fsencode(part)) for part in name.split("/")) > _NAME_MAX:
        return f"image {shown(name)} is not a path: a name may have {_NAME_MAX} bytes"
    if len(os.fsencode(inside)) > _PATH_MAX:
        return f"image {shown(name)} is not a path: it would have more than {_PATH_MAX:,} bytes"
    if not under(inside, str(root)):
        return f"image {shown(name)} is outside {root}: set image_root to a folder that holds all images (/ allows any)"
    return None


def under(path: str, root: str) -> bool:
    """Whether a path is a folder or leads into it, by its text."""
    return path == root or path.startswith(root.rstrip("/") + "/")


def contained(name: str, root: str | Path, linked: Sequence[str] = ()) -> Path:
    """The file that a name in data means, links followed. Raises BadSample if that is not under `root`.

    Folders that a user's own folder links to may be `linked`, by their real paths.
    """
    reason = check_name(name, root)
    if reason:
        raise BadSample(reason, "path_refused")
    path = os.path.realpath(os.path.join(root, name))
    if not any(under(path, top) for top in (os.path.realpath(root), *linked)):
        reason = f"image {shown(name)} is a link that leads outside {root}: set image_root to / to allow it"
        raise BadSample(reason, "path_refused")
    return Path(path)
