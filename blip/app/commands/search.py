"""`blip search`: the images of a folder that match a text best."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from blip.app.commands.shared import MODEL_VARIABLE, AnswerOptions, ModelOptions, at_least
from blip.app.exit import SOME_FAILED
from blip.options import argument, option

if TYPE_CHECKING:
    from blip.app.index import Index
    from blip.app.loaded import Loaded
    from blip.data.image_files import InputImages

EXAMPLE = """examples:
  blip search photos/ "a dog on the beach" --model runs/retrieval/model
  blip search photos/ "a red bicycle" "a market" --top 20 --sheet found.html

The first search embeds every image and keeps the embeddings in FOLDER/.blip-index; later ones embed only new and
changed files. The --rerank nearest images by ITC are re-ranked by ITM. One line for each text and image, the best
first: text, path, score, ITC (cosine), ITM (probability). Without a TEXT only the index is updated. Exit status: 0, or
1 if some of the images read could not be used, or 2 for wrong use."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions(AnswerOptions, ModelOptions):
    """Find the images of a folder that match a text best."""

    folder: str = argument("FOLDER")
    """Folder of images, including its subfolders"""
    queries: list[str] = argument("TEXT", least=0)
    """Text to search for"""
    top: int = option(10, metavar="N")
    """Number of images to list"""
    rerank: int = option(16, metavar="N")
    """Number of nearest images by ITC to re-rank by ITM; 0 for a quick search"""
    sheet: str | None = option(None, metavar="FILE.html")
    """Write a page that shows the images found"""
    index: str | None = option(None, metavar="DIR")
    """Folder of the index (default: FOLDER/.blip-index)"""
    rebuild: bool = False
    """Discard the index and embed all images again"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, top=self.top)
        at_least(0, rerank=self.rerank)


class Hit(NamedTuple):
    """A search result."""

    path: Path
    score: float
    """Match logit plus cosine, or the cosine alone if not re-ranked."""
    itc: float
    itm: float | None
    """Probability of a match; None if not re-ranked."""


def run(chosen: SearchOptions) -> int:
    """Update the index and search for the texts; returns the exit status."""
    if not os.path.isdir(chosen.folder):
        raise ValueError(f"{chosen.folder} is not a folder")
    if chosen.sheet and not chosen.queries:
        raise ValueError("--sheet needs a TEXT to search for")
    if chosen.sheet and not chosen.sheet.endswith((".html", ".htm")):
        raise ValueError(f"--sheet {chosen.sheet}: give a name that ends in .html")
    from blip.data.image_files import find

    inputs = find([chosen.folder])

    # After the checks that need no torch, so that their errors come at once.
    from blip import files
    from blip.app.answers import Answers, Form, refuse_out, refuse_page, shown
    from blip.app.loaded import load
    from blip.app.unknown import check_texts

    refuse_out(chosen.out)
    if chosen.sheet:
        refuse_page("--sheet", chosen.sheet)
    loaded = load(chosen.model, chosen.device, chosen.precision, tokenizer=chosen.tokenizer, batch=chosen.batch)
    check_texts(loaded.tokenizer, chosen.queries)
    embeds = loaded.embed_text(chosen.queries)
    index, failed = up_to_date(chosen, inputs, loaded)
    answered: list[tuple[str, list[Hit]]] = []
    keys = ("text", "path", "score", "itc", "itm")
    ways = {"folder": chosen.folder, "texts": chosen.queries, "top": chosen.top, "rerank": chosen.rerank}
    form = Form("search", chosen.json, keys, "ttnnn", ways | loaded.options(chosen.model) if chosen.out else {})
    # Written as a whole, not continued, as the folder may have changed.
    with Answers(chosen.out, chosen.queries, "texts", form, whole=True) as answers:
        for number, query in enumerate(chosen.queries):
            embed = embeds[number : number + 1]
            hits = find_one(index, loaded, query, embed, chosen.top, chosen.rerank)
            answered.append((query, hits))
            for hit in hits:
                values = {"score": round(hit.score, 5), "itc": round(hit.itc, 5)}
                if chosen.json:
                    itm = None if hit.itm is None else round(hit.itm, 5)
                    answers.json({"text": query, "path": str(hit.path), **values, "itm": itm})
                else:
                    chance = "-" if hit.itm is None else f"{hit.itm:.4f}"
                    answers.text(query, shown(str(hit.path)), f"{hit.score:.4f}", f"{hit.itc:.4f}", chance)
            answers.advance(1)
    if chosen.sheet:
        content = sheet(answered, chosen.folder, len(index.readable))
        files.replace_file(Path(chosen.sheet), content.encode("utf-8", "replace"))
    return SOME_FAILED if failed else 0


def find_one(index: Index, loaded: Loaded, query: str, embed: object, top: int, rerank: int) -> list[Hit]:
    """The `top` images by score, with the `rerank` nearest by ITC re-ranked; fewer if fewer are indexed."""
    cosines, rows = (part[0].tolist() for part in index.nearest(embed, max(top, rerank)))
    paths = index.paths(rows)
    hits = [Hit(path, cosine, cosine, None) for path, cosine in zip(paths, cosines, strict=True)]
    if not rerank or not hits:
        return hits[:top]
    matches = loaded.match(paths[:rerank], query)
    closely = zip(hits, matches.score[:, 0].tolist(), matches.probability[:, 0].tolist(), strict=False)
    first = [hit._replace(score=score, itm=chance) for hit, score, chance in closely]
    return (sorted(first, key=lambda hit: -hit.score) + hits[rerank:])[:top]


def up_to_date(chosen: SearchOptions, inputs: InputImages, loaded: Loaded) -> tuple[Index, int]:
    """Update the folder's index; returns it and the number of unusable images. Progress goes to stderr."""
    from blip import files
    from blip.app.answers import Answers
    from blip.app.index import Index, IndexOrigin

    folder = Path(chosen.folder)
    where = Path(chosen.index) if chosen.index else folder / ".blip-index"
    origin = IndexOrigin.of(loaded, chosen.model or os.environ[MODEL_VARIABLE], _precision(chosen.precision))
    index = None if chosen.rebuild else Index.read(folder, where)
    if index and not index.origin.same(origin):
        raise ValueError(
            f"{where} was built with {index.origin}, but this is {origin}: search with that model and precision, give "
            "another --index DIR, or --rebuild"
        )
    index = index or Index(folder, where, origin)
    stale = index.stale(inputs.paths)
    if stale and not _writable(where):  # before all images are read
        raise ValueError(f"the index {where} cannot be written: give --index DIR to keep it elsewhere")
    with Answers(None, inputs._replace(paths=stale)) as answers:

        def report(images: list) -> None:
            answers.readable(images)
            answers.advance(len(images))

        try:
            index = index.updated(inputs.paths, stale, loaded, report)
        except files.WriteError as error:
            raise OSError(f"{error}; --index DIR keeps the index elsewhere") from None
    return index, answers.failed


def _writable(folder: Path) -> bool:
    while not folder.exists():
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _precision(name: str) -> str:
    return "float32" if name == "auto" else name


def sheet(answered: list[tuple[str, list[Hit]]], folder: str, images: int) -> str:
    """Build a page with the images found, each with the score that ranks it."""
    from blip.app import html
    from blip.data.images import UnreadableImage, model_input, small
    from blip.data.settings import DataConfig

    def card(rank: int, hit: Hit) -> html.Card:
        try:
            thumbnail = html.thumbnail(model_input(hit.path, DataConfig.max_pixels, lambda image: small(image, 2048)))
        except UnreadableImage:  # removed since it was indexed
            thumbnail = ""
        name = hit.path.name
        lines = [html.Line(f"{rank}. {name}", title=str(hit.path))]
        if hit.itm is None:
            lines.append(html.Line(f"{hit.itc:.3f}", "cosine, not re-ranked"))
        else:
            lines.append(html.Line(f"{hit.score:.3f}", "match score, which ranks it"))
            lines.append(html.Line(f"{100 * hit.itm:.1f}%", "probability of a match"))
            lines.append(html.Line(f"{hit.itc:.3f}", "cosine"))
        return html.Card(thumbnail, name, lines)

    reranked = sum(hit.itm is not None for _, hits in answered for hit in hits)
    firsts = [hits[0] for _, hits in answered if hits]
    title = f"{len(answered)} texts searched for in {images:,} images"
    if len(answered) == 1:
        best = f"{firsts[0].path.name} is the best of {images:,} images" if firsts else "no image"
        title = f"“{html.cut(answered[0][0])}”: {best}"
    order = "Ranked by the cosine of image and text."
    if reranked:
        order = "Ranked by the match score, the logit of a match plus the cosine. "
        order += "Images that are not re-ranked follow, by their cosine."
    return html.page(
        "sections.html",
        title=title,
        kind=f"blip search · {folder}",
        lead="The nearest images by cosine; the first of them were compared word by word and ranked again.",
        figures=[
            html.Figure(f"{images:,}", "images searched"),
            html.Figure(f"{len(answered)}", "text" if len(answered) == 1 else "texts"),
            html.Figure(f"{sum(len(hits) for _, hits in answered)}", "images shown", f"{reranked} of them re-ranked"),
            html.Figure(f"{max((hit.score for hit in firsts), default=0):.2f}", "best score"),
        ],
        sections=[
            html.Section(query, order, cards=[card(n, hit) for n, hit in enumerate(hits, 1)])
            for query, hits in answered
        ],
        tables=[],
    )
