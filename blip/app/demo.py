"""The functions behind the page of `blip demo`, which take and return Python values.

A `Demo` holds the models and serves one request at a time. An invalid request raises a ValueError or DataError with one
line for the user.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

from PIL import Image

from blip.app.commands import caption as caption_command
from blip.app.commands import explain as explain_command
from blip.app.commands import search as search_command
from blip.app.unknown import check_question, check_texts
from blip.app.web import MAX_BYTES, MAX_PIXELS, MOST_CAPTIONS, MOST_LETTERS, MOST_TEXTS
from blip.data import images
from blip.data.image_files import find
from blip.data.images import UnreadableImage
from blip.data.settings import DataConfig
from blip.data.transforms import EvalTransform
from blip.inference.generate import generate_texts
from blip.inference.settings import CAPTION_PROMPT
from blip.origin import NOTE, is_synthetic
from blip.text import clean_question

if TYPE_CHECKING:
    from blip.app.index import Index
    from blip.app.loaded import Loaded
    from blip.data.image_files import ImageFile
    from blip.inference.answering import Answer
    from blip.inference.generate import CaptionText

T = TypeVar("T")

MOST_HITS = 60
"""Most images that a search shows."""
_EXAMPLES = 4
_SIDE = 640
"""Longer side of the images shown, in pixels."""
_REPORT_BYTES = 20 << 20


@dataclass(frozen=True)
class FolderHit:
    """A search result: an image of the folder."""

    name: str
    """Path relative to the folder."""
    image: Image.Image
    """Thumbnail."""
    score: float
    """Score that ranks it: match logit plus cosine, or the cosine alone if not re-ranked."""
    itc: float
    itm: float | None
    """Probability that the text matches; None if not re-ranked."""


class Demo:
    """Models, an index of images and a CapFilt run, ready for requests; safe to call from several threads.

    Files on this machine are chosen when the page is started; its users cannot name any.
    """

    def __init__(
        self,
        matcher: Loaded,
        *,
        captioner: Loaded | None = None,
        vqa: Loaded | None = None,
        prompt: str = CAPTION_PROMPT,
        index: Index | None = None,
        run: str | None = None,
        names: Sequence[str] = (),
    ) -> None:
        """Captions come from `captioner`, by default `matcher`; `names` are those of the models, in this order.

        ValueError for a prompt with words unknown to the captioner, or a `run` that is not a CapFilt run's folder.
        """
        self.matcher, self.captioner, self.vqa = matcher, captioner or matcher, vqa
        self.prompt, self.index = prompt, index
        self.run = Path(run) if run else None
        self.names = tuple(names)
        self._lock = Lock()
        self._check_prompt(prompt)
        if self.run and not (self.run / "job.json").is_file():
            raise ValueError(f"{run} is not the folder of a CapFilt run: it has no job.json")

    def models(self) -> dict[str, str]:
        """Name of each model -> what it was trained on."""
        given = [self.matcher, self.captioner if self.captioner is not self.matcher else None, self.vqa]
        names = self.names or ("the model", "the captioner", "the model for questions")
        about = {name: _origin(one.trained_on) for name, one in zip(names, filter(None, given), strict=False)}
        return about

    def examples(self) -> list[Image.Image]:
        """Images to try, drawn by the synthetic world for a model trained on it alone; none for others."""
        if not all(is_synthetic(one.trained_on) for one in (self.matcher, self.captioner)):
            return []
        from blip.world.scene import draw, scene

        return [draw(scene(0, i, "test"), 256) for i in range(_EXAMPLES)]

    # One image --------------------------------------------------------------------------------------------------

    def caption(
        self,
        path: str | None,
        method: str = "beam",
        num: int = 3,
        *,
        top_p: float | None = None,
        seed: int = 0,
        prompt: str | None = None,
    ) -> list[CaptionText]:
        """Caption an image, with the same result as `blip caption --method beam|nucleus --num N`."""
        one = self.captioner
        pixels, digest = read_image(path, EvalTransform(one.model.config.vision.image_size))
        if not 1 <= num <= MOST_CAPTIONS:
            raise ValueError(f"the number of captions must be 1 to {MOST_CAPTIONS}, got {num}")
        begin = self.prompt if prompt is None else _short(prompt)
        self._check_prompt(begin)
        share = top_p if method == "nucleus" else None  # the page's slider is there for beams, too
        config = caption_command.CaptionOptions(images=[], method=method, num=num, top_p=share, seed=seed).decoding()
        with self._lock, one.computing():
            return generate_texts(
                one.model, one.tokenizer, pixels[None].to(one.device), config, prompt=begin, keys=[digest]
            )[0]

    def _check_prompt(self, prompt: str) -> None:
        if self.captioner.tokenizer.unknown_rate([prompt]):
            raise ValueError(f"the prompt {prompt!r} has words that the model does not know; leave it empty")

    def answer(self, path: str | None, question: str, top: int = 3) -> list[Answer]:
        """Answer a question about an image, with the same result as `blip vqa --top N`."""
        if self.vqa is None:
            raise ValueError("no VQA model is loaded: start the page with --vqa DIR, a model trained by recipes.vqa")
        one = self.vqa
        pixels, _ = read_image(path, EvalTransform(one.model.config.vision.image_size))
        if not clean_question(_short(question)):
            raise ValueError("type a question first")
        with self._lock:
            check_question(one.tokenizer, question)
            return one.answer(pixels[None], question, top=top, details=True)[0]

    def match(self, path: str | None, texts: str) -> list[tuple[str, float, float]]:
        """Score texts, one per line: each with its cosine (ITC) and match probability (ITM), in the order given."""
        image, _ = read_image(path, lambda decoded: decoded)
        lines = list(dict.fromkeys(line.strip() for line in _short(texts).splitlines() if line.strip()))
        if not lines:
            raise ValueError("type a text first, or several, one per line")
        if len(lines) > MOST_TEXTS:
            raise ValueError(f"at most {MOST_TEXTS} texts can be compared at once, got {len(lines)}")
        with self._lock, self.matcher.computing():
            check_texts(self.matcher.tokenizer, lines)
            matches = self.matcher.match(image, lines)
        return list(zip(lines, matches.itc[0].tolist(), matches.probability[0].tolist(), strict=True))

    def explain_match(self, path: str | None, text: str) -> tuple[float, list[tuple[str, Image.Image]]]:
        """Match probability of a text, and the image, also overlaid with the maps of the text and of each word."""
        image, _ = read_image(path, _small)
        if not text.strip():
            raise ValueError("type a text first")
        with self._lock, self.matcher.computing():
            check_texts(self.matcher.tokenizer, [_short(text)])
            explanation = self.matcher.explain(image, _short(text))
        return explanation.probability, explain_command.images(image, explanation)

    # A folder -----------------------------------------------------------------------------------------------------

    def refresh(self, report: Callable[[int, int], None] = lambda done, total: None) -> tuple[int, int]:
        """Update the index; returns the numbers of searchable and of unusable images.

        `report` is called with the number of new images done, and their total.
        """
        index = self._searched()
        paths = find([str(index.folder)]).paths
        with self._lock, self.matcher.computing():
            index = index.writable(paths)
            stale, done = index.stale(paths), 0

            def count(batch: list[ImageFile]) -> None:
                nonlocal done
                done += len(batch)
                report(done, len(stale))

            self.index = index.updated(paths, stale, self.matcher, count)
        return self.counts()

    def counts(self) -> tuple[int, int]:
        """The numbers of searchable and of unusable images in the folder."""
        index = self._searched()
        return len(index.readable), len(index.entries) - len(index.readable)

    def search(self, text: str, top: int = 12, rerank: int = 16) -> list[FolderHit]:
        """The images of the folder that match a text best, with the same result as `blip search --top N`."""
        index = self._searched()
        if not text.strip():
            raise ValueError("type a text to search for first")
        if not 1 <= top <= MOST_HITS:
            raise ValueError(f"the number of images must be 1 to {MOST_HITS}, got {top}")
        with self._lock, self.matcher.computing():
            check_texts(self.matcher.tokenizer, [_short(text)])
            embed = self.matcher.embed_text(text)
            hits = search_command.find_one(index, self.matcher, text, embed, top, rerank)
        hits_shown = []
        for hit in hits:
            try:
                image = images.model_input(hit.path, DataConfig.max_pixels, _small, _SIDE)
            except UnreadableImage:  # removed since it was indexed
                continue
            hits_shown.append(FolderHit(str(hit.path.relative_to(index.folder)), image, hit.score, hit.itc, hit.itm))
        return hits_shown

    def _searched(self) -> Index:
        if self.index is None:
            raise ValueError("no folder is indexed: start the page with --folder DIR")
        return self.index

    # A CapFilt run ------------------------------------------------------------------------------------------------

    def reports(self) -> list[str]:
        """Names of the run's reports, the newest first."""
        if self.run is None:
            return []
        pages = [path for path in self.run.glob("report/*/report.html") if path.is_file()]
        return [path.parent.name for path in sorted(pages, key=lambda path: (-path.stat().st_mtime, path))]

    def report(self, name: str | None) -> str:
        """A report of the run, as untrusted HTML."""
        if self.run is None:
            raise ValueError("no CapFilt run is open: start the page with --capfilt RUN")
        if name not in self.reports():
            raise ValueError(
                f"the run has no such report; write one with `{shlex.join(['capfilt', 'report', str(self.run)])}`"
            )
        path = self.run / "report" / name / "report.html"
        if path.stat().st_size > _REPORT_BYTES:
            raise ValueError(f"the report {name} is too large for this page; open {path} directly")
        return path.read_text("utf-8", "replace")


def _origin(trained_on: Sequence[str]) -> str:
    if is_synthetic(trained_on):
        return NOTE
    return f"trained on {', '.join(trained_on)}" if trained_on else "what it was trained on is not recorded"


def read_image(path: str | None, transform: Callable[[Image.Image], T]) -> tuple[T, str]:
    """Read an uploaded file; returns the transformed image, and the SHA-256 of its bytes.

    ValueError if it cannot be used.
    """
    if not path:
        raise ValueError("choose an image first")
    try:
        data = images.read(Path(path))
        if len(data) > MAX_BYTES:
            raise UnreadableImage("too_many_bytes", f"{len(data):,} bytes, more than the limit of {MAX_BYTES:,}")
        return images.model_input(data, MAX_PIXELS, transform), hashlib.sha256(data).hexdigest()
    except UnreadableImage as error:
        raise ValueError(f"this image cannot be used: {error.reason}") from None


def _small(image: Image.Image) -> Image.Image:
    return images.small(image, _SIDE)


def _short(text: str) -> str:
    if len(text) > MOST_LETTERS:
        raise ValueError(f"the text has {len(text):,} characters; the limit is {MOST_LETTERS:,}")
    return text
