"""Captions beside images, edited in the browser: one image at a time, each change saved at once."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blip.app import html
from blip.app.answers import shown
from blip.app.html.serve import PageServer
from blip.app.sidecars import Beside, lines_of
from blip.data import images
from blip.data.settings import DataConfig
from blip.errors import BadSample

_SIDE = 1024
"""Longer side of an image on the page, pixels."""


class Review:
    """Images whose captions can be edited, after `Beside.survey` and `begin`."""

    def __init__(self, beside: Beside, paths: list[str], problems: Mapping[str, str]) -> None:
        """`problems` says why a path's caption cannot be edited. ValueError if there are no images."""
        if not paths:
            raise ValueError("no image was found")
        self.beside, self.paths, self.problems = beside, paths, dict(problems)

    def page(self, _: Mapping[str, Any]) -> str:
        """Render the page, which asks for one image after the other."""
        return html.page(
            "review.html", title="Review captions",
            lead="One image at a time; each change is saved at once in the file beside the image.",
            scripts=("review.js",),
            allow={"connect-src": "'self'", "img-src": "'self' data:"}, count=len(self.paths),
        )  # fmt: skip

    def item(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Find an image and its caption.

        From number `from` on, in the direction of `step` (1 or -1) and around the end, the first whose caption or path
        contains `contains`, and with `missing` that has no caption. LookupError if there is none.
        """
        start, step = self._number(given.get("from", "0")), -1 if given.get("step") == "-1" else 1
        contains = str(given.get("contains", "")).casefold()
        for n in range(len(self.paths)):
            number = (start + step * n) % len(self.paths)
            item = self._item(number)
            if given.get("missing") and item["text"]:
                continue
            if contains in item["text"].casefold() or contains in item["name"].casefold():
                return item
        raise LookupError("no image fits")

    def image(self, given: Mapping[str, Any]) -> bytes:
        """Read an image as a JPEG. LookupError with the reason if it cannot be read."""
        path = self.paths[self._number(given.get("n", ""))]
        try:
            image = images.model_input(
                Path(path), DataConfig.max_pixels, lambda image: images.small(image, _SIDE), _SIDE
            )
        except BadSample as error:
            raise LookupError(str(error)) from None
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=85)
        return buffer.getvalue()

    def save(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Save the caption `text` of image `n`, or with null remove the one that was created here.

        ValueError if the caption is no longer the one of which the page knows the `digest`.
        """
        n, text = self._number(str(given.get("n", ""))), given.get("text")
        if not (text is None or isinstance(text, str)):
            raise ValueError("text is the caption, or null")
        now = self._item(n)
        if now["problem"]:
            raise ValueError(now["problem"])
        if now["digest"] != given.get("digest"):
            raise ValueError(f"{now['file']} was edited since: reload the page")
        self.beside.replace(self.paths[n], text)
        return self._item(n)

    def _item(self, number: int) -> dict[str, Any]:
        path = self.paths[number]
        item = {"n": number, "name": shown(path), "file": "", "text": "", "there": False, "digest": "", "problem": ""}
        if path in self.problems:
            return item | {"problem": self.problems[path]}
        if not os.path.lexists(path):
            return item | {"problem": "the image is not there any more"}
        target = Path(self.beside.target(path))
        item["file"] = shown(os.path.basename(target))
        if not target.is_file():
            return item
        lines = lines_of(target)
        digest = hashlib.sha256(target.read_bytes()).hexdigest()
        problem = "" if lines is not None else f"{item['file']} is not UTF-8 text"
        return item | {"text": "\n".join(lines or []), "there": True, "digest": digest, "problem": problem}

    def _number(self, text: str) -> int:
        if not (text.isdecimal() and len(text) < 10 and int(text) < len(self.paths)):
            raise ValueError(f"there is no image {text!r}")
        return int(text)


def serve(review: Review, port: int = 0) -> PageServer:
    """Return a server of the page. ValueError if the port is taken."""
    routes = {"GET /": review.page, "GET /item": review.item, "GET /image": review.image, "POST /save": review.save}
    return PageServer(routes, port)
