"""Zero-shot classification of an imagefolder: top-1 and top-5 by the names of the classes. N images, C classes."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from blip import dist
from blip.app.loaded import Loaded
from blip.data.image_files import find, not_images, read_images
from blip.errors import DataError
from blip.inference.zero_shot import TEMPLATES, class_embeddings, probabilities
from blip.nn import host
from eval.options import ClassificationOptions
from eval.runner import Runner, in_parts, listed, spread

RANKS = (1, 5)
_PART = 8
"""Batches that one process reads ahead of each other."""


def evaluate(options: ClassificationOptions, runner: Runner) -> Iterator[tuple[str, float]]:
    """Evaluate a model; writes results.json, the most likely classes of each image."""
    data = ClassFolder.open(options.source, read_names(Path(options.names)) if options.names else None)
    templates = read_templates(Path(options.templates)) if options.templates else list(TEMPLATES)
    with runner.model() as loaded:
        chances = classify(replace(loaded, batch=options.batch), data, templates)
    if not dist.is_main():
        return
    if left_out := not_images(data.left_out):
        print(left_out, file=sys.stderr)
    runner.out.write("results.json", results(data, chances))
    counts = {"pictures": len(data.paths), "classes": len(data.names)}  # names of fields in files stay
    runner.record("model", "source", **counts)
    runner.record(templates=templates)
    runner.times = 1
    yield from accuracy(chances, data.labels).items()


# Images and classes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassFolder:
    """Images sorted into one folder per class."""

    where: Path
    names: list[str]
    """Names of the C classes, as prompts use them."""
    paths: list[str]
    """Paths of the N images."""
    labels: list[int]
    """Class of each image."""
    left_out: Counter[str]
    """Number of files left out as not images, by extension."""

    @classmethod
    def open(cls, where: str | Path, names: Mapping[str, str] | None = None) -> ClassFolder:
        """Open `FOLDER/CLASS/**/image`; `names` maps folders to class names, by default the folder's, _ for a space.

        DataError if there are no classes, a class has no images, or a folder is not among `names`.
        """
        root = Path(where).expanduser()
        if not root.is_dir():
            raise DataError(f"{root} is not a folder with a folder of images for each class")
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not folders:
            raise DataError(f"{root} has no folders; expected one for each class, with its images")
        unknown = [folder.name for folder in folders if names is not None and folder.name not in names]
        if unknown:
            raise DataError(
                f"{root / unknown[0]} is not among the names of the classes ({len(unknown)} folders are not)"
            )
        by_folder = [find([str(folder)]) for folder in folders]
        for path, reason in (bad for one in by_folder for bad in one.walk.unreadable):
            raise DataError(f"{path} cannot be evaluated: it {reason}")
        called = [names[f.name] if names is not None else f.name.replace("_", " ") for f in folders]
        labels = [label for label, one in enumerate(by_folder) for _ in one.paths]
        left_out = sum((one.left_out for one in by_folder), Counter())
        return cls(root, called, [path for one in by_folder for path in one.paths], labels, left_out)


def read_names(path: Path) -> dict[str, str]:
    """Read {folder: class name} from JSON. DataError for anything else."""
    try:
        names = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise DataError(f'{path}: expected {{"folder": "name of the class", ...}}')
    return names


def read_templates(path: Path) -> list[str]:
    """Read prompt templates, one per line. DataError if there are none."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if not lines:
        raise DataError(f"{path} has no templates; expected one per line, such as: a picture of a {{}}")
    return lines


# Answers --------------------------------------------------------------------------------------------------------------


def classify(model: Loaded, data: ClassFolder, templates: Sequence[str] = TEMPLATES) -> Tensor:
    """Probabilities (N, C) of the classes. All processes have to call it; they share the images.

    DataError, in every process, for an image that cannot be read.
    """
    classes = class_embeddings(model.embed_text, data.names, templates)

    def work(paths: Sequence[str]) -> list[Tensor]:
        parts = []
        for images in read_images(paths, model.transform, model.batch):
            for image in images:
                if image.reason:
                    raise DataError(f"{image.path} cannot be evaluated: {image.reason}")
            embeds = model.embed_image(torch.stack([image.pixels for image in images]))
            parts += host.read(probabilities(embeds, classes, model.model.temperature))
        return parts

    return torch.cat(spread(in_parts(data.paths, _PART * model.batch), work, what="classify"))


def results(data: ClassFolder, chances: Tensor) -> str:
    """Format probabilities (N, C) as JSON: for each image its class, and up to five predictions, most likely first."""
    best = chances.topk(min(max(RANKS), len(data.names)), dim=1)
    rows = zip(data.paths, data.labels, best.indices.tolist(), best.values.tolist(), strict=True)
    return listed(
        [
            {
                "picture": Path(path).relative_to(data.where).as_posix(),
                "class": data.names[label],
                "found": [data.names[i] for i in numbers],
                "probability": [round(value, 5) for value in values],
            }
            for path, label, numbers, values in rows
        ]
    )


def accuracy(chances: Tensor, labels: Sequence[int]) -> dict[str, float]:
    """Probabilities (N, C) -> `top@1`, `top@5` in percent, and `mean_class`, top-1 averaged over classes."""
    right = torch.as_tensor(labels)
    before = (chances > chances.gather(1, right[:, None])).sum(1)
    ties = (chances == chances.gather(1, right[:, None])).sum(1) - 1  # a tie counts against us
    rank = before + ties
    scores = {f"top@{r}": 100 * (rank < r).double().mean().item() for r in RANKS}
    each = [(rank[right == label] < 1).double().mean() for label in right.unique()]
    return scores | {"mean_class": 100 * torch.stack(each).mean().item()}
