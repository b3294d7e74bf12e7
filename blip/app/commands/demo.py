"""`blip demo`: a web page to try the model."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from blip.app.commands.shared import ModelOptions, at_least
from blip.inference.settings import CAPTION_PROMPT
from blip.options import option

EXAMPLE = """examples:
  blip demo --model runs/demo/model
  blip demo --model runs/retrieval/model --captioner runs/caption/model --vqa runs/vqa/model \\
            --folder photos --capfilt run

Describe an image, ask questions about it, match texts with it and see where the model looks; search a folder; view the
reports of a CapFilt run. Only this machine can open the page, unless --host admits others, and it sends no requests to
other machines. It needs Gradio, and says how to install it. Exit status: 2 for wrong use, 130 after Ctrl-C."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions(ModelOptions):
    """Serve a web page to try the model in a browser."""

    captioner: str | None = option(None, metavar="DIR")
    """Model for captions (default: --model)"""
    vqa: str | None = option(None, metavar="DIR")
    """Model for questions, trained by recipes.vqa"""
    folder: str | None = option(None, metavar="DIR")
    """Folder of images to search"""
    index: str | None = option(None, metavar="DIR")
    """Folder of its index (default: FOLDER/.blip-index, or the user's cache for a read-only folder)"""
    capfilt: str | None = option(None, metavar="RUN")
    """Folder of a CapFilt run whose reports to show"""
    prompt: str = CAPTION_PROMPT
    """Prompt that captions continue; '' for a model trained without a prompt"""
    host: str = "127.0.0.1"
    """Address to listen at; 127.0.0.1 can only be reached from this machine"""
    port: int | None = option(None, metavar="N")
    """Port (default: the first free one from 7860 on)"""

    def __post_init__(self) -> None:
        at_least(1, port=self.port)
        if self.index and not self.folder:
            raise ValueError("--index is of the images to search: give --folder, too")


def run(chosen: DemoOptions) -> int:
    """Load the models, update the index and serve the page until interrupted."""
    from blip.app.web import is_local, listening, model_name
    from blip.installed import require

    require("demo", "blip demo")
    if chosen.port is not None:
        listening(chosen.host, chosen.port).close()  # so that a port that is taken is known now
    if chosen.folder and not os.path.isdir(chosen.folder):
        raise ValueError(f"--folder {chosen.folder} is not a folder")
    from blip.data.image_files import find

    inputs = find([chosen.folder]) if chosen.folder else None

    # After the checks that need no torch, so that their errors come at once.
    from blip.app.demo import Demo
    from blip.app.demo_page import serve
    from blip.app.index import up_to_date
    from blip.app.loaded import load
    from blip.models.vqa import Vqa

    ways = {"device": chosen.device, "precision": chosen.precision, "tokenizer": chosen.tokenizer}
    matcher = load(chosen.model, **ways)
    captioner = load(chosen.captioner, **ways) if chosen.captioner else None
    vqa = load(chosen.vqa, kind=Vqa, **ways) if chosen.vqa else None
    if vqa:
        vqa.candidates()  # so that a list of answers that does not fit is refused now
    names = [model_name(chosen.model), *map(model_name, filter(None, (chosen.captioner, chosen.vqa)))]
    demo = Demo(matcher, captioner=captioner, vqa=vqa, prompt=chosen.prompt, run=chosen.capfilt, names=names)
    if inputs:
        with matcher.computing():
            demo.index, _ = up_to_date(Path(chosen.folder), inputs, matcher, chosen.model, where=chosen.index)
    if not is_local(chosen.host):
        _warn(f"anyone who can reach {chosen.host} can use the page: it has no password and no encryption")
    serve(demo, chosen.host, chosen.port, lambda line: print(line, flush=True))
    return 0


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
