"""`blip doctor`: what is installed here, what will compute, and what to do about the rest."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from blip.app.exit import SOME_FAILED
from blip.options import option

EXAMPLE = """examples:
  blip doctor
  blip doctor --out /data/runs --json

One line for each thing: ok, missing (only some need it) or wrong (the core does not work), and what to do about it.
--json is one object for machines: {"works": ..., "findings": [{"name", "status", "said", "remedy"}, ...]}.
Nothing is installed, fetched or changed. Exit status: 0 if the core works, 1 if not, 2 for wrong use."""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Look at what this machine has: what is installed, what will compute, and what to do about the rest."""

    out: str = option("runs", metavar="DIR")
    """Folder that runs go into"""
    json: bool = False
    """Answer in one JSON object"""


def run(chosen: DoctorOptions) -> int:
    """Look, and say what was found; returns the exit status."""
    from blip.app.doctor import Finding, examine, works

    def seen(finding: Finding) -> Finding:
        if not chosen.json:
            print(f"{finding.status:<8} {finding.name:<12} {finding.said}", flush=True)
            if finding.remedy:
                print(f"{'':<21} -> {finding.remedy}", flush=True)
        return finding

    sys.stdout.reconfigure(errors="backslashreplace")
    findings = [seen(finding) for finding in examine(Path(chosen.out).expanduser())]
    good = works(findings)
    if chosen.json:
        print(json.dumps({"works": good, "findings": [dataclasses.asdict(finding) for finding in findings]}, indent=1))
    else:
        print("The core works." if good else "The core does not work; see what is wrong above.")
    return 0 if good else SOME_FAILED
