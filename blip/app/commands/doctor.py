"""`blip doctor`: check this machine's packages, hardware, disk and network."""

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

One line per check: ok, untested (a version that the tests have not run on), missing (optional) or wrong (the core
does not work), and what to do about it.
--json prints one object: {"works": ..., "findings": [{"name", "status", "said", "remedy"}, ...]}.
Nothing is installed, downloaded or changed. Exit status: 0 if the core works, 1 if not, 2 for wrong use."""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Check this machine: installed packages, hardware, disk and network."""

    out: str = option("runs", metavar="DIR")
    """Folder in which runs will be written"""
    json: bool = False
    """Print one JSON object"""


def run(chosen: DoctorOptions) -> int:
    """Run the checks and print the findings; returns the exit status."""
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
