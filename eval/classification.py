"""Zero-shot classification of an imagefolder: top-1 and top-5 by the names of the classes. N pictures, C classes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from blip.data.image_files import find, read_images
from blip.data.transforms import EvalTransform
from blip.errors import DataError
from blip.inference.features import Features
from blip.inference.zero_shot import TEMPLATES, class_embeddings, probabilities
from eval.parallel import spread

RANKS = (1, 5)
_PART = 8
"""Batches that one process reads ahead of each other."""


@dataclass(frozen=True)
class ClassFolder:
    """Pictures that are sorted into one folder for each class."""

    where: Path
    names: list[str]
    """C names of classes, as texts speak of them."""
    paths: list[str]
    """N files."""
    labels: list[int]
    """Class of each."""
    left_out: Counter[str]
    """How many files are not named like pictures, by how their names end."""

    @classmethod
    def open(cls, where: str | Path, names: Mapping[str, str] | None = None) -> ClassFolder:
        """`FOLDER/CLASS/**/picture`; `names` says what a class's folder stands for, else it is its name, _ for a space.

        DataError if there is no class, a class has no pictures, or a folder is not among `names`.
        """
        root = Path(where).expanduser()
        if not root.is_dir():
            raise DataError(f"{root} is not a folder with a folder of pictures for each class")
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not folders:
            raise DataError(f"{root} has no folders; expected one for each class, with its pictures")
        unknown = [folder.name for folder in folders if names is not None and folder.name not in names]
        if unknown:
            raise DataError(
                f"{root / unknown[0]} is not among the names of the classes ({len(unknown)} folders are not)"
            )
        found = [find([str(folder)]) for folder in folders]
        for path, reason in (bad for one in found for bad in one.walk.unreadable):
            raise DataError(f"{path} cannot be evaluated: it {reason}")
        called = [names[f.name] if names is not None else f.name.replace("_", " ") for f in folders]
        labels = [label for label, one in enumerate(found) for _ in one.paths]
        left_out = sum((one.left_out for one in found), Counter())
        return cls(root, called, [path for one in found for path in one.paths], labels, left_out)


def read_names(path: Path) -> dict[str, str]:
    """{folder: name of the class} from JSON. DataError for anything else."""
    try:
        said = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(said, dict) or not all(isinstance(name, str) for name in said.values()):
        raise DataError(f'{path}: expected {{"folder": "name of the class", ...}}')
    return said


def read_templates(path: Path) -> list[str]:
    """Prompt templates, one a line. DataError if there is none."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if not lines:
        raise DataError(f"{path} has no templates; expected one a line, such as: a picture of a {{}}")
    return lines


def classify(features: Features, data: ClassFolder, templates: Sequence[str] = TEMPLATES) -> Tensor:
    """Probabilities (N, C) of the classes. All processes have to call it; they share the pictures.

    DataError, in every process, for a picture that cannot be read.
    """
    classes = class_embeddings(features, data.names, templates)

    def work(paths: Sequence[str]) -> list[Tensor]:
        found = []
        for pictures in read_images(paths, EvalTransform(features.image_size), features.batch):
            for picture in pictures:
                if picture.reason:
                    raise DataError(f"{picture.path} cannot be evaluated: {picture.reason}")
            embeds = features.embed_image(torch.stack([picture.pixels for picture in pictures]))
            found.append(probabilities(features, embeds, classes).cpu())
        return found

    size = _PART * features.batch
    parts = [data.paths[start : start + size] for start in range(0, len(data.paths), size)]
    return torch.cat(spread(parts, work, what="classify"))


def accuracy(chances: Tensor, labels: Sequence[int]) -> dict[str, float]:
    """Probabilities (N, C) -> `top@1`, `top@5` in percent, and `mean_class`, top-1 averaged over classes."""
    right = torch.as_tensor(labels)
    before = (chances > chances.gather(1, right[:, None])).sum(1)
    ties = (chances == chances.gather(1, right[:, None])).sum(1) - 1  # a tie counts against us
    rank = before + ties
    found = {f"top@{r}": 100 * (rank < r).double().mean().item() for r in RANKS}
    each = [(rank[right == label] < 1).double().mean() for label in right.unique()]
    return found | {"mean_class": 100 * torch.stack(each).mean().item()}
