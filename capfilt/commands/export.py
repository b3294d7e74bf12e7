"""`capfilt export`: write the texts of a selection as a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from blip.options import argument, option
from capfilt.commands.select import EmptyOption
from capfilt.settings import DONE

EXAMPLE = """\
The original bytes of the images and the kept texts, as training reads them; the same selection gives the same bytes.
_SUCCESS comes last and lists every file with its SHA-256.

  capfilt export run --select half --format wds --to clean
"""


@dataclass(frozen=True, kw_only=True)
class FormatOptions:
    """Format of the data set."""

    format: Literal["wds", "parquet", "json", "uids"] = "wds"
    """Format: tar shards, parquet with images inside, JSON list with images, or DataComp uids"""
    shard: int = 10_000
    """Samples per file"""
    together: bool = False
    """One sample per image with a list of texts, not one per text"""


@dataclass(frozen=True, kw_only=True)
class ExportVerb(FormatOptions, EmptyOption):
    """Write the texts of a selection as a data set."""

    run: str = argument("RUN")
    """Folder of a scored run"""
    select: str = option(metavar="NAME")
    """Name of the selection"""
    to: str = option(metavar="FOLDER")
    """Folder to export to: empty, or holding the same export"""
    replace: bool = False
    """Remove an older export there"""


def run(options: ExportVerb) -> int:
    """Write the data set and print a summary."""
    from capfilt.export import export
    from capfilt.run import Run

    ways = {name: getattr(options, name) for name in ("shard", "together", "replace", "allow_empty")}
    manifest = export(Run.open(options.run), options.select, options.format, options.to, **ways)
    pairs, images, files = manifest["pairs"], manifest["images"], len(manifest["files"])
    print(f"{options.to}: {pairs:,} texts on {images:,} images in {files:,} files")
    return DONE
