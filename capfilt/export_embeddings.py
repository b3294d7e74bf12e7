"""Export of image embeddings, as scoring kept them, in the layout of clip-retrieval."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from blip.data import embeddings
from blip.errors import DataError
from capfilt.export_formats import Files, sharded
from capfilt.export_samples import ExportSample
from capfilt.extra.load import EMBEDDING
from capfilt.extra.results import ExtraParts
from capfilt.run import Part, Run
from capfilt.select.choose import kept_of

METADATA = pa.schema(
    [
        ("image_path", pa.string()),
        ("caption", pa.string()),
        ("texts", pa.int32()),  # kept texts of the image in this row, more than one only with --together
        ("source", pa.string()),
        ("score", pa.float32()),
        ("sample_id", pa.string()),
        ("source_uri", pa.string()),
        ("source_row", pa.int64()),
        ("key", pa.string()),
        ("url", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)
_FACTS = ("sample_id", "source_uri", "source_row", "key", "url", "width", "height")


def check_stored(run: Run, selection: str) -> None:
    """Raise DataError unless scoring has kept the embeddings of all parts of which texts are kept."""
    there = ExtraParts(run.storage, EMBEDDING).present()
    needed = [part.pid for part, table in kept_of(run, selection) if len(table)]
    missing = sum(pid not in there for pid in needed)
    if missing:
        raise DataError(
            f"{missing:,} of {len(needed):,} parts have no embeddings: make them with "
            f"`{run.command('score', '--also', EMBEDDING)}`"
        )


def count_samples(run: Run, selection: str, together: bool) -> int:
    """Count the samples of a selection, by which files are numbered."""
    return sum(len(set(t["row"].to_pylist())) if together else len(t) for _, t in kept_of(run, selection))


def write(run: Run, samples: Iterator[ExportSample], files: Files, size: int, total: int) -> None:
    """Write the embeddings and metadata of `total` samples, `size` a file."""
    stored = _Stored(run)
    for number, group in sharded(samples, size):
        rows = list(group)
        names = embeddings.names(number, -(-total // size))
        with files.writing(names.image) as file:
            file.write(embeddings.vectors(np.stack([stored.of(*row.at) for row in rows])))
        columns = {
            "image_path": [f"{row.facts['source_uri']}/{row.facts['key']}" for row in rows],
            "caption": [row.captions[0] for row in rows],
            "texts": [len(row.captions) for row in rows],
            "source": [row.sources[0] for row in rows],
            "score": [row.scores[0] for row in rows],
            **{name: [row.facts[name] for row in rows] for name in _FACTS},
        }
        with files.writing(names.metadata) as file:
            file.write(embeddings.table(columns, METADATA))


class _Stored:
    """Embeddings that scoring has kept; those of the last part stay in memory."""

    def __init__(self, run: Run) -> None:
        self.parts = ExtraParts(run.storage, EMBEDDING)
        self._last: tuple[str, np.ndarray] = ("", np.empty((0, 0)))

    def of(self, part: Part, row: int) -> np.ndarray:
        """Return the embedding of a row, (E,). DataError if there is none, or the file has changed."""
        if self._last[0] != part.pid:
            self._last = part.pid, self.parts.embeddings(part)
        vector = self._last[1][row]
        if not vector.any() or not np.isfinite(vector).all():
            name = f"{self.parts.storage.root}/{self.parts.name(part.pid)}"
            raise DataError(f"{name} has no embedding of row {row}, of which a text is kept: score it again")
        return vector
