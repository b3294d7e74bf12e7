"""`blip search`: the images of a folder that match a text best, or are most like an image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from blip.app.commands.shared import AnswerOptions, IndexOptions, ModelOptions, at_least
from blip.app.exit import SOME_FAILED
from blip.options import argument, option

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from blip.app.index import Index
    from blip.app.loaded import Loaded

EXAMPLE = """examples:
  blip search photos/ "a dog on the beach" --model runs/retrieval/model
  blip search photos/ "a red bicycle" "a market" --top 20 --sheet found.html
  blip search photos/ --image bicycle.jpg --plus blue --minus red

The first search embeds every image and keeps the embeddings in FOLDER/.blip-index, or in the user's cache if FOLDER is
read-only; later ones embed only new and changed files. For a TEXT, the --rerank nearest images by ITC are re-ranked by
ITM. For an image the nearest by ITC count. One line for each query and image, the best first: query, path, score, ITC
(cosine), ITM (probability). The score ranks them: match logit plus cosine, or the cosine alone where there is no ITM.
Without a TEXT and --image only the index is updated. Exit status: 0, or 1 if some of the images read could not be used,
or 2 for wrong use."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions(AnswerOptions, IndexOptions, ModelOptions):
    """Find the images of a folder that match a text best, or are most like an image."""

    folder: str = argument("FOLDER")
    """Folder of images, including its subfolders"""
    queries: list[str] = argument("TEXT", least=0)
    """Text to search for"""
    image: str | None = option(None, metavar="FILE")
    """Image to search for, besides the texts"""
    plus: list[str] = option(list, metavar="WORDS", repeat=True)
    """Words that add to what is searched for by --image; may be repeated"""
    minus: list[str] = option(list, metavar="WORDS", repeat=True)
    """Words that are taken away from it; may be repeated"""
    top: int = option(10, metavar="N")
    """Number of images to list"""
    rerank: int = option(16, metavar="N")
    """Number of nearest images to a text by ITC to re-rank by ITM; 0 for a quick search"""
    sheet: str | None = option(None, metavar="FILE.html")
    """Write a page that shows the images found"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, top=self.top)
        at_least(0, rerank=self.rerank)
        if (self.plus or self.minus) and self.image is None:
            raise ValueError("--plus and --minus change what --image searches for: give --image FILE, too")
        if both := [words for words in self.plus if words in self.minus]:
            raise ValueError(f"{both[0]!r} is given both by --plus and by --minus: leave one of them out")
        if self.sheet and not (self.queries or self.image):
            raise ValueError("--sheet needs a TEXT to search for, or --image")


class Hit(NamedTuple):
    """A search result."""

    path: Path
    score: float
    """Match logit plus cosine, or the cosine alone if not re-ranked."""
    itc: float
    itm: float | None
    """Probability of a match; None if not re-ranked."""


class SearchResult(NamedTuple):
    """What was searched for, and the images that fit best."""

    query: str
    hits: list[Hit]
    image: Image.Image | None = None
    """The image searched for, if it was one."""
    file: str = ""
    """Its file."""


def run(chosen: SearchOptions) -> int:
    """Update the index and search for the texts and the image; returns the exit status."""
    if not os.path.isdir(chosen.folder):
        raise ValueError(f"{chosen.folder} is not a folder")
    if chosen.sheet and not chosen.sheet.endswith((".html", ".htm")):
        raise ValueError(f"--sheet {chosen.sheet}: give a name that ends in .html")
    from blip.data.image_files import find

    inputs = find([chosen.folder])
    image = _query_image(chosen.image) if chosen.image is not None else None

    # After the checks that need no torch, so that their errors come at once.
    from blip import files
    from blip.app.answers import Answers, Form, refuse_out, refuse_page, shown
    from blip.app.index import up_to_date
    from blip.app.loaded import load
    from blip.app.unknown import check_texts

    refuse_out(chosen.out)
    if chosen.sheet:
        refuse_page("--sheet", chosen.sheet)
    loaded = load(chosen.model, chosen.device, chosen.precision, tokenizer=chosen.tokenizer, batch=chosen.batch)
    check_texts(loaded.tokenizer, [*chosen.queries, *chosen.plus, *chosen.minus])
    embeds = loaded.embed_text(chosen.queries)
    changed = None if image is None else changed_image(loaded, image, chosen.plus, chosen.minus)
    index, failed = up_to_date(
        Path(chosen.folder), inputs, loaded, chosen.model, where=chosen.index, rebuild=chosen.rebuild
    )
    answered = []
    queries = [*chosen.queries, *([_written(chosen)] if image else [])]
    ranked_by = ("path", "score", "itc", "itm")
    ways = {"folder": chosen.folder, "texts": chosen.queries, "top": chosen.top, "rerank": chosen.rerank}
    if image:
        ways |= {"image": chosen.image, "plus": chosen.plus, "minus": chosen.minus}
    form = Form("search", chosen.json, ("text", *ranked_by), "ttnnn",
                ways | loaded.options(chosen.model) if chosen.out else {},
                other_keys=("image", "plus", "minus", *ranked_by))  # fmt: skip
    # Written as a whole, not continued, as the folder may have changed.
    with Answers(chosen.out, queries, "texts" if image is None else "queries", form, whole=True) as answers:
        for number, query in enumerate(queries):
            if number < len(chosen.queries):
                hits = find_one(index, loaded, query, embeds[number : number + 1], chosen.top, chosen.rerank)
                named = {"text": query}
                answered.append(SearchResult(query, hits))
            else:
                hits = nearest(index, changed, chosen.top)
                named = {"image": chosen.image, "plus": chosen.plus, "minus": chosen.minus}
                answered.append(SearchResult(query, hits, image, chosen.image))
            for hit in hits:
                values = {"score": round(hit.score, 5), "itc": round(hit.itc, 5)}
                if chosen.json:
                    itm = None if hit.itm is None else round(hit.itm, 5)
                    answers.json({**named, "path": str(hit.path), **values, "itm": itm})
                else:
                    chance = "-" if hit.itm is None else f"{hit.itm:.4f}"
                    answers.text(query, shown(str(hit.path)), f"{hit.score:.4f}", f"{hit.itc:.4f}", chance)
            answers.advance(1)
    if chosen.sheet:
        content = sheet(answered, chosen.folder, len(index.readable), loaded.trained_on)
        files.replace_file(Path(chosen.sheet), content.encode("utf-8", "replace"))
    return SOME_FAILED if failed else 0


def _query_image(name: str) -> Image.Image:
    from blip.data.images import UnreadableImage, decode
    from blip.data.settings import DataConfig
    from blip.errors import DataError

    if "://" in name:
        raise ValueError(f"--image {name}: images are not fetched, download it first")
    if os.path.isdir(name):
        raise ValueError(f"--image {name} is a folder; give one image")
    try:
        return decode(Path(name), DataConfig.max_pixels)
    except UnreadableImage as error:
        raise DataError(f"--image {name}: {error.reason}") from None


def _written(chosen: SearchOptions) -> str:
    """The image and words searched for, on one line."""
    return " ".join([chosen.image or "", *(f"+{one}" for one in chosen.plus), *(f"-{one}" for one in chosen.minus)])


def changed_image(loaded: Loaded, image: Image.Image, plus: list[str], minus: list[str]) -> Tensor:
    """Embed an image, add the embeddings of some texts and take away those of others -> (1, E) of length 1.

    ValueError if nothing is left.
    """
    sums = loaded.embed_image(image) + loaded.embed_text(plus).sum(0) - loaded.embed_text(minus).sum(0)
    length = sums.norm()
    if length < 1e-4:
        raise ValueError("--image, --plus and --minus cancel each other out: nothing is left to search for")
    return sums / length


def nearest(index: Index, embed: Tensor, count: int) -> list[Hit]:
    """The `count` images nearest to an embedding (1, E) by their cosine; fewer if fewer are indexed."""
    cosines, rows = (part[0].tolist() for part in index.nearest(embed, count))
    return [Hit(path, cosine, cosine, None) for path, cosine in zip(index.paths(rows), cosines, strict=True)]


def find_one(index: Index, loaded: Loaded, query: str, embed: Tensor, top: int, rerank: int) -> list[Hit]:
    """The `top` images by score, with the `rerank` nearest by ITC re-ranked; fewer if fewer are indexed."""
    hits = nearest(index, embed, max(top, rerank))
    if not rerank or not hits:
        return hits[:top]
    matches = loaded.match([hit.path for hit in hits[:rerank]], query)
    closely = zip(hits, matches.score[:, 0].tolist(), matches.probability[:, 0].tolist(), strict=False)
    first = [hit._replace(score=score, itm=chance) for hit, score, chance in closely]
    return (sorted(first, key=lambda hit: -round(hit.score, 5)) + hits[rerank:])[:top]


def sheet(answered: list[SearchResult], folder: str, images: int, trained_on: Sequence[str] = ()) -> str:
    """Build a page with what was searched for and the images found, each with the score that ranks it."""
    from blip.app import html
    from blip.data.images import UnreadableImage, model_input, small
    from blip.data.settings import DataConfig

    def card(rank: int, hit: Hit, cosine: str) -> html.Card:
        try:
            thumbnail = html.thumbnail(model_input(hit.path, DataConfig.max_pixels, lambda image: small(image, 2048)))
        except UnreadableImage:  # removed since it was indexed
            thumbnail = ""
        name = hit.path.name
        lines = [html.Line(f"{rank}. {name}", title=str(hit.path))]
        if hit.itm is None:
            lines.append(html.Line(f"{hit.itc:.3f}", cosine))
        else:
            lines.append(html.Line(f"{hit.score:.3f}", "match score, which ranks it"))
            lines.append(html.Line(f"{100 * hit.itm:.1f}%", "probability of a match"))
            lines.append(html.Line(f"{hit.itc:.3f}", "cosine"))
        return html.Card(thumbnail, name, lines)

    def section(result: SearchResult) -> html.Section:
        if result.image is not None:
            name = Path(result.file).name
            query = [html.Card(html.thumbnail(small(result.image, 2048)), name, [html.Line("searched for")])]
            cards = [card(n, hit, "cosine, which ranks it") for n, hit in enumerate(result.hits, 1)]
            order = "Ranked by the cosine with what was searched for."
            return html.Section(f"Like {_named(result)}", order, cards=query + cards, first=11)
        order = "Ranked by the cosine of image and text."
        if any(hit.itm is not None for hit in result.hits):
            order = "Ranked by the match score, the logit of a match plus the cosine."
            if result.hits[-1].itm is None:
                order += " Images that are not re-ranked follow, by their cosine."
        cards = [card(n, hit, "cosine, not re-ranked") for n, hit in enumerate(result.hits, 1)]
        return html.Section(result.query, order, cards=cards)

    reranked = sum(hit.itm is not None for result in answered for hit in result.hits)
    firsts = [hit for result in answered for hit in _others(result)[:1]]
    title = f"The best of {images:,} images for {len(answered)} queries"
    if len(answered) == 1:
        best = f"{firsts[0].path.name} is the best of {images:,} images" if firsts else "no image"
        title = f"“{html.cut(_named(answered[0]))}”: {best}"
    lead = "The nearest images by cosine."
    if reranked:
        lead = (
            "The nearest images by cosine; the first of them were compared with the text word by word and ranked again."
        )
    return html.page(
        "sections.html",
        title=title,
        kind=f"blip search · {folder}",
        lead=lead,
        figures=[
            html.Figure(f"{images:,}", "images searched"),
            html.Figure(f"{len(answered)}", "query" if len(answered) == 1 else "queries"),
            html.Figure(f"{sum(len(result.hits) for result in answered)}", "images shown"),
            html.Figure(f"{reranked}", "of them re-ranked")
            if reranked
            else html.Figure(max((f"{hit.itc:.3f}" for hit in firsts), default="-"), "highest cosine"),
        ],
        sections=[section(result) for result in answered],
        tables=[],
        trained_on=trained_on,
    )


def _named(result: SearchResult) -> str:
    """A query with its file's name instead of the whole path."""
    return Path(result.file).name + result.query.removeprefix(result.file) if result.file else result.query


def _others(result: SearchResult) -> list[Hit]:
    """The hits without the image that was searched for, unless there is nothing else."""
    itself = os.path.realpath(result.file)
    return [hit for hit in result.hits if os.path.realpath(hit.path) != itself] or result.hits
