"""Further scorers by what `--also` names: `language`, `aesthetic=MODEL`, or a class of one's own.

Code is imported only because a command line names it. Nothing of a run's folder is: it records who has scored, as data.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from blip.errors import DataError
from blip.files import sha256
from capfilt.extra.scorer import ExtraScorer, WrongScorer, check_scorer

EMBEDDING = "embedding"
_CLASS = re.compile(r"(?P<where>.+?):(?P<name>[A-Za-z_]\w*)(?:=(?P<argument>.*))?\Z", re.DOTALL)


def load_scorers(specs: Sequence[str], device: str | None) -> list[ExtraScorer]:
    """Make the scorers that `--also` names, without `embedding`, which is the filter's work.

    ValueError or DataError if there is no such scorer, if it cannot be made, or if two have one name.
    """
    scorers = [load_scorer(spec, device) for spec in specs if spec != EMBEDDING]
    names = [scorer.name for scorer in scorers] + [EMBEDDING] * specs.count(EMBEDDING)
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--also names {name} twice")
    return scorers


def load_scorer(spec: str, device: str | None) -> ExtraScorer:
    """Make one scorer."""
    kind, _, argument = spec.partition("=")
    if spec == "language":
        from capfilt.extra.language import Language

        return Language()
    if kind == "aesthetic":
        if not argument:
            raise ValueError("--also aesthetic needs a model: --also aesthetic=FOLDER or aesthetic=ORG/NAME@REVISION")
        from capfilt.extra.aesthetic import Aesthetic

        return Aesthetic(argument, device)
    match = _CLASS.match(spec)
    if not match:
        raise ValueError(
            f"--also {spec}: expected language, aesthetic=MODEL, embedding, package.module:Class or PATH.py:Class"
        )
    return _own(spec, *match.groups())


def _own(spec: str, where: str, name: str, argument: str | None) -> ExtraScorer:
    """Make a scorer of a class of one's own. The hash of its file is a part of its identity."""
    try:
        module = _of_file(where) if where.endswith(".py") else importlib.import_module(where)
        kind = getattr(module, name, None)
        if not isinstance(kind, type):
            raise ValueError(f"--also {spec}: {where} has no class {name}")
        scorer: Any = kind() if argument is None else kind(argument)
    except (ValueError, FileNotFoundError, DataError):
        raise
    except ModuleNotFoundError as error:
        hint = "" if where.endswith(".py") else "; a file is named by PATH.py:Class"
        raise ValueError(f"--also {spec}: {error}{hint}") from None
    except Exception as error:
        raise WrongScorer(f"--also {spec}: it cannot be made: {type(error).__name__}: {error}") from error
    check_scorer(scorer, spec)
    code = {"class": name, "sha256": sha256(Path(module.__file__))} if module.__file__ else {"class": name}
    return _Own(scorer, {**scorer.identity, "code": code})


class _Own:
    """A scorer of one's own, with its code in its identity."""

    def __init__(self, scorer: ExtraScorer, identity: dict[str, Any]) -> None:
        self.name, self.side, self.identity, self.columns = scorer.name, scorer.side, identity, dict(scorer.columns)
        self.score = scorer.score


def _of_file(where: str) -> ModuleType:
    path = Path(where).expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"--also: there is no file {where}")
    name = f"capfilt_scorer_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
