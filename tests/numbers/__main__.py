"""Record the numbers of another checkout and of this one, and compare them to the bit.

    python -m tests.numbers BASE_TREE                     # records in a temporary folder
    python -m tests.numbers BASE_TREE --folder numbers    # kept there; base.json is used again if it is there already

The models that BASE_TREE has trained are opened by this checkout, too. A record takes some minutes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.numbers import compare

RECORD = Path(__file__).with_name("record.py")


def main() -> None:
    parser = argparse.ArgumentParser("tests.numbers", description=__doc__.split("\n")[0])
    parser.add_argument("base", type=Path, help="checkout of the commit to compare with")
    parser.add_argument("--folder", type=Path, help="where records and runs are kept")
    parser.add_argument("--only", nargs="+", default=[], help="sections to record and compare")
    parser.add_argument("--renamed", type=Path, help="as of tests.numbers.compare")
    parser.add_argument("--any-name", action="store_true", help="as of tests.numbers.compare")
    given = parser.parse_args()
    only = ["--only", *given.only] if given.only else []
    with tempfile.TemporaryDirectory() as scratch:
        folder = (given.folder or Path(scratch)).resolve()
        before, after = folder / "base.json", folder / "now.json"
        trees = [(after, RECORD.parents[2], ["--models", str(folder / "base")])]
        if not before.exists():
            trees.insert(0, (before, given.base.resolve(), []))
        for out, tree, more in trees:
            began = time.monotonic()
            line = [sys.executable, "-P", str(RECORD), str(out), "--tree", str(tree)]
            done = subprocess.run([*line, "--folder", str(out.with_suffix("")), *more, *only])
            if done.returncode:
                raise SystemExit(done.returncode)
            print(f"{tree} recorded in {time.monotonic() - began:.0f} s", flush=True)
        names = [*(["--renamed", str(given.renamed)] if given.renamed else []), *["--any-name"] * given.any_name]
        compare.main([str(before), str(after), *names, *only])


if __name__ == "__main__":
    main()
