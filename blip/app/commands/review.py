"""`blip review`: edit captions beside images in the browser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from blip.options import argument, option

EXAMPLE = """\
  blip review photos/ --sidecar .txt       # Enter saves and goes on, Esc cancels, Ctrl-Z takes back
  blip caption photos/ --undo              # takes the whole review back
"""


@dataclass(frozen=True, kw_only=True)
class ReviewOptions:
    """Edit captions beside images in the browser, one image at a time; each change is saved at once."""

    images: list[str] = argument("IMAGE")
    """Images, folders or globs"""
    sidecar: str = option(".txt", metavar="ENDING")
    """Ending of the files with captions: those of a.jpg are in a.txt, one a line"""
    sidecar_name: Literal["stem", "full"] = "stem"
    """Name of the file: `stem` is a.txt for a.jpg, `full` is a.jpg.txt"""
    recursive: bool = True
    """Look for images in subfolders, too"""
    port: int = option(0, metavar="N")
    """Port of the page (default: any that is free)"""


def run(chosen: ReviewOptions) -> int:
    """Serve the page until Ctrl-C."""
    from blip.app import undo
    from blip.app.review import Review, serve
    from blip.app.sidecars import Beside, SidecarOptions
    from blip.data.image_files import find

    inputs = find(chosen.images, recursive=chosen.recursive, beside=[chosen.sidecar])
    options = SidecarOptions(sidecar=chosen.sidecar, sidecar_name=chosen.sidecar_name, overwrite=True)
    options.check_sidecars()
    beside = Beside(options, inputs)
    with undo.only_writer(beside.roots, beside.folders):
        beside.survey()
        beside.check_writable()
        beside.begin({"review": chosen.sidecar, "sidecar_name": chosen.sidecar_name})
        server = serve(Review(beside, inputs.paths, dict(beside.problems)), chosen.port)
        print(f"Review at {server.address} (Ctrl-C stops; changes are saved)", flush=True)
        server.until_interrupted()
        beside.finish()
    return 0
