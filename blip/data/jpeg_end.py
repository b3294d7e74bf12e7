"""JPEGs without their last bytes: told by decoding whether any pixel is missing."""

from __future__ import annotations

import re
from collections.abc import Callable

_RESTARTS = b"".join(bytes([0xFF, 0xD0 + n]) + b"\x55" * 64 for n in range(8))
_FILLS = (b"", b"\0" * 512, b"\x55" * 512, b"\xaa" * 512, _RESTARTS)
"""Bytes put in place of missing ones; each differs from the others in its first bits, or begins with a marker."""
_END = b"\xff\xd9"
_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")
"""Marker that is neither stuffing nor a restart."""
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_SCAN = 0xDA
_MOST_PARTS = 100_000


def with_end(data: bytes, pixels: Callable[[bytes], bytes]) -> bytes | None:
    """The JPEG with an end marker if only that is missing, else None.

    `pixels` decodes a file and returns its pixels or a hash of them. The last scan is whole if they do not depend on
    what follows it, and the image is if the last scan of every coefficient is there.
    """
    data = data.rstrip(b"\xff")  # half of a marker
    if not _all_scans(data):
        return None
    first, *others = (data + fill + _END for fill in _FILLS)
    try:
        expected = pixels(first)
        return first if all(pixels(other) == expected for other in others) else None
    except Exception:  # whatever the decoder raises, of which the first error has been reported
        return None


def _all_scans(data: bytes) -> bool:
    """Whether every coefficient of every component has a scan that gives its last bit."""
    missing: dict[int, set[int]] = {}
    at, progressive = 2, False
    for _ in range(_MOST_PARTS):
        mark = _MARKER.search(data, at)
        if mark is None or mark.end() + 2 > len(data):
            break
        kind, at = mark[1][0], mark.end()
        if kind in (0x01, 0xD8, 0xD9):
            continue
        body = data[at + 2 : at + int.from_bytes(data[at : at + 2], "big")]
        if kind in _FRAMES and len(body) >= 6:
            progressive = kind in _PROGRESSIVE
            missing = {component: set(range(64)) for component in body[6 : 6 + 3 * body[5] : 3]}
        elif kind == _SCAN and body and len(body) >= 4 + 2 * body[0]:
            first, last, bits = body[1 + 2 * body[0] : 4 + 2 * body[0]]
            if not progressive or not bits & 15:
                done = set(range(first, last + 1)) if progressive else set(range(64))
                for component in body[1 : 1 + 2 * body[0] : 2]:
                    missing[component] = missing.get(component, set()) - done
        at += 2 + len(body)
    return bool(missing) and not any(missing.values())
