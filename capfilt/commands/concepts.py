"""`capfilt concepts`: list the words and pairs of words of a run's texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from blip.options import argument, option
from capfilt.settings import DONE

EXAMPLE = """\
One concept per line, with the number of texts that have it after a tab. Edit the list, or take one of your own, and
select by it:

  capfilt concepts run --out concepts.txt --least 20
  capfilt select run --name balanced --concepts concepts.txt --per-concept 20000
"""


@dataclass(frozen=True, kw_only=True)
class ConceptsVerb:
    """List the words and pairs of words of a run's texts, with counts, for `select --concepts`."""

    run: str = argument("RUN")
    """Folder of a scored run"""
    out: str = option(metavar="FILE")
    """File to write, replaced if it exists"""
    least: int = 2
    """Fewest texts that have a concept"""
    texts: Literal["both", "web", "syn"] = "both"
    """Texts to count: the crawl's own, the synthetic ones, or both"""

    def __post_init__(self) -> None:
        if self.least < 1:
            raise ValueError(f"least must be 1 or more, got {self.least}")


def run(options: ConceptsVerb) -> int:
    """Write the list and print how long it is."""
    from pathlib import Path

    from blip.files import replace_file
    from capfilt.run import Run
    from capfilt.select.concepts import count_concepts

    sources = ("web", "syn") if options.texts == "both" else (options.texts,)
    concepts, texts = count_concepts(Run.open(options.run), sources, options.least)
    if not texts:
        kind = {"both": "text", "web": "web text", "syn": "synthetic text"}[options.texts]
        raise ValueError(
            f"{options.run}: no usable row that has been scored has a {kind}, so there is nothing to count"
        )
    lines = "".join(f"{concept}\t{count}\n" for concept, count in concepts)
    replace_file(Path(options.out).expanduser(), lines.encode())
    print(f"{options.out}: {len(concepts):,} words and pairs in at least {options.least:,} of {texts:,} texts")
    return DONE
