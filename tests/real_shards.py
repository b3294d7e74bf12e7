"""Tar shards of real photographs, emoji and broken images, with wrong captions planted and the truth recorded.

    OPENBLIP_DATA=... python tests/real_shards.py OUT [--photos N] [--emoji N]
    python -m capfilt run --input OUT --out RUN --captioner MODEL --filter MODEL --to CLEAN

Every third caption is another image's. A sample's .json says its `kind`: right, planted or broken, and for a broken
image what Pillow makes of it (`outcome`). No test data is part of the project: OPENBLIP_DATA names its folder.
"""

import argparse
import json
import os
import random
from pathlib import Path

from capfilt_crawl import write_tar


def samples(data, photos, emoji):
    """(image bytes, ending, text, record) of each sample, mixed in an order that is always the same."""
    right = []
    for one in json.loads((data / "photos" / "photos.json").read_text()):
        if one["captions"]:
            right.append((data / "photos" / one["image"], random.Random(one["image_id"]).choice(one["captions"])))
    right = right[:photos]
    named = json.loads((data / "emoji" / "names.json").read_text())
    right += [
        (data / "emoji" / one["file"], f"an emoji of {one['name']}") for one in named[:: max(1, len(named) // emoji)]
    ][:emoji]
    rows = []
    for i, (path, text) in enumerate(right):
        planted = i % 3 == 2
        caption = right[(i * 7 + 5) % len(right)][1] if planted else text
        kind = "planted" if caption != text else "right"
        rows.append((path.read_bytes(), path.suffix, caption, {"kind": kind, "file": path.name}))
    for i, one in enumerate(json.loads((data / "broken_images" / "manifest.json").read_text())):
        record = {"kind": "broken", "file": one["file"], "outcome": one["outcome"]}
        content = (data / "broken_images" / one["file"]).read_bytes()
        # Whatever it is, the crawl has called it an image.
        rows.append((content, (".jpg", ".png")[i % 2], f"an image with number {i}", record))
    random.Random(0).shuffle(rows)
    return rows


def write(out, data, photos=207, emoji=600, shard=300):
    """Shards of so many samples; returns the samples in their order."""
    rows = samples(data, photos, emoji)
    for start in range(0, len(rows), shard):
        members = []
        for i, (image, suffix, text, record) in enumerate(rows[start : start + shard], start):
            contents = ((suffix, image), (".txt", text.encode()), (".json", json.dumps(record).encode()))
            members += [(f"{i:06d}{name}", content) for name, content in contents]
        write_tar(Path(out) / f"{start // shard:05d}.tar", members)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--photos", type=int, default=207)
    parser.add_argument("--emoji", type=int, default=600)
    given = parser.parse_args()
    written = write(given.out, Path(os.environ["OPENBLIP_DATA"]), given.photos, given.emoji)
    print(f"{len(written)} samples in {given.out}")
