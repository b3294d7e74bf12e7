"""`capfilt export`: write the texts of a selection as a data set."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from blip.options import argument, option
from capfilt.commands.select import EmptyOption
from capfilt.settings import DONE

EXAMPLE = """\
The original bytes of the images and the kept texts, as training reads them; the same selection gives the same bytes.
_SUCCESS comes last and lists every file with its SHA-256.

  capfilt export run --select half --format wds --to clean
  capfilt export run --select half --format wds --reencode jpg --to clean    # of images of several formats
  capfilt export run --select half --format labelstudio --blind --to tasks
"""


LAYOUT = ("shard", "together", "reencode", "by_format", "blind")
"""Options of the layout, beside the format."""


@dataclass(frozen=True, kw_only=True)
class FormatOptions:
    """Format of the data set."""

    format: Literal["wds", "parquet", "json", "embeddings", "labelstudio", "fiftyone", "uids"] = "wds"
    """Format: tar shards, parquet with images inside, JSON list with images, embeddings of the images, files for an
    annotation tool, or DataComp uids"""
    shard: int = 10_000
    """Samples per file"""
    together: bool = False
    """One sample per image with a list of texts, not one per text"""
    reencode: Literal["jpg", "webp"] | None = None
    """Convert images of other formats to this one, quality 95; tar shards need one format for all images"""
    by_format: bool = False
    """Write tar shards of each image format to a folder of its own"""
    blind: bool = False
    """Leave predictions out of Label Studio's tasks, so that they do not sway who judges"""


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

    ways = {name: getattr(options, name) for name in (*LAYOUT, "replace", "allow_empty")}
    manifest = export(Run.open(options.run), options.select, options.format, options.to, **ways)
    if manifest["scorer"] == "fake":
        print("note: the scores are of --scorer fake, so this export is a rehearsal, not clean data", file=sys.stderr)
    pairs, images, files = manifest["pairs"], manifest["images"], len(manifest["files"])
    more = f", {manifest['reencoded']:,} of them re-encoded" if manifest["reencoded"] else ""
    print(f"{options.to}: {pairs:,} texts on {images:,} images{more} in {files:,} files")
    return DONE
