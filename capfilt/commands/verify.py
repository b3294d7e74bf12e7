"""`capfilt verify`: prove that every row is accounted for."""

from __future__ import annotations

from dataclasses import dataclass

from blip.options import argument

EXAMPLE = ""


@dataclass(frozen=True, kw_only=True)
class VerifyVerb:
    """Prove that every row is accounted for and every file is as written."""

    run: str = argument("RUN")
    """Folder of a run"""


def run(options: VerifyVerb) -> int:
    """Print what was checked; returns the exit status."""
    from capfilt.verify import lines, verify

    findings = verify(options.run)
    print(*lines(findings), sep="\n")
    return findings.status()
