"""`blip demo`: a page on which the model can be tried out."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from blip.app.commands.shared import ModelOptions, at_least
from blip.inference.settings import CAPTION_PROMPT
from blip.options import option

EXAMPLE = """examples:
  blip demo --model runs/demo/model
  blip demo --model runs/retrieval/model --captioner runs/caption/model --vqa runs/vqa/model \\
            --folder photos --capfilt run

Describe an image, ask about it, match texts with it and see where the model looks; search a folder; look into a
CapFilt run. The page is for this machine alone, unless --host lets others in, and asks no other machine for anything.
It needs Gradio: pip install 'openblip[demo]'. Exit status: 2 for wrong use, 130 when a key press ended it."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions(ModelOptions):
    """Show a page in a browser on which the model can be tried out."""

    captioner: str | None = option(None, metavar="DIR")
    """Another model that captions"""
    vqa: str | None = option(None, metavar="DIR")
    """Model of recipes.vqa that answers questions"""
    folder: str | None = option(None, metavar="DIR")
    """Folder of images to search"""
    index: str | None = option(None, metavar="DIR")
    """Where its index is kept (default: FOLDER/.blip-index)"""
    capfilt: str | None = option(None, metavar="RUN")
    """Folder of a CapFilt run to look into"""
    prompt: str = CAPTION_PROMPT
    """Beginning that captions continue; '' for a model that was trained without"""
    host: str = "127.0.0.1"
    """Address to listen at; only this machine reaches 127.0.0.1"""
    port: int | None = option(None, metavar="N")
    """Port (default: the first free one from 7860 on)"""

    def __post_init__(self) -> None:
        at_least(1, port=self.port)


def run(chosen: DemoOptions) -> int:
    """Load the models, bring the index up to date and show the page until it is ended."""
    from blip.app.installed import require

    require("demo", "the page")
    if chosen.port is not None:
        _check_port(chosen.host, chosen.port)
    if chosen.folder and not os.path.isdir(chosen.folder):
        raise ValueError(f"{chosen.folder} is not a folder of images")
    from blip.data.image_files import find

    inputs = find([chosen.folder]) if chosen.folder else None

    # After the checks that need no torch, so that their errors come at once.
    from blip.app.candidates import load_candidates
    from blip.app.commands import search
    from blip.app.demo import Demo
    from blip.app.demo_page import is_local, serve
    from blip.app.loaded import load
    from blip.models.vqa import Vqa

    ways = {"device": chosen.device, "precision": chosen.precision, "tokenizer": chosen.tokenizer}
    matcher = load(chosen.model, **ways)
    captioner = load(chosen.captioner, **ways) if chosen.captioner else None
    vqa = candidates = None
    if chosen.vqa:
        vqa = load(chosen.vqa, kind=Vqa, **ways)
        candidates = load_candidates(None, chosen.vqa, "auto", vqa.tokenizer)
        if candidates:
            candidates.check(vqa.model.config.text)
            candidates.to(vqa.device)
    demo = Demo(
        matcher, captioner=captioner, vqa=vqa, candidates=candidates, prompt=chosen.prompt, run=chosen.capfilt
    )  # fmt: skip
    if inputs:
        with matcher.computing():
            same = {name: getattr(chosen, name) for name in ("folder", "index", "model", "precision")}
            demo.index, _ = search.up_to_date(search.SearchOptions(queries=[], **same), inputs, demo.features)
    if not is_local(chosen.host):
        _warn(f"anyone who reaches {chosen.host} can use the page: it has no password and no encryption")
    serve(demo, chosen.host, chosen.port, lambda line: print(line, flush=True))
    return 0


def _check_port(host: str, port: int) -> None:
    import socket

    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"cannot listen at {host} port {port} ({reason}): give another --port or --host") from None


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
