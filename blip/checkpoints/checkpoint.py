"""A model as a directory: config.json, model.safetensors, the tokenizer and a card. Loading is strict.

A directory holds one of `blip.models.families.TASKS`, named in config.json except for `Blip`. Checkpoints of other
programs (`blip.checkpoints.foreign`) are loaded here, too: every command and recipe gets its models from here.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from blip import files, hub
from blip.checkpoints import foreign
from blip.checkpoints.card import Facts, own_card
from blip.checkpoints.foreign import Foreign
from blip.checkpoints.naming import SUFFIXES, check_named, repository
from blip.checkpoints.table import NUMBERS, refuse_unsound, type_in_words
from blip.checkpoints.weights import Weights, read_file, read_json
from blip.models.blip import Blip
from blip.models.families import TASKS, kind_of, names_of
from blip.models.settings import BlipConfig, former_options
from blip.nn.settings import TrainingOptions
from blip.nn.vision import fit_positions
from blip.origin import KEY, check_origins, claimed
from blip.tensors import read_outline, read_tensors, tensor_bytes, write_tensors
from blip.tokenizer import Tokenizer

FORMAT, VERSION = "openblip", 2
_READABLE = (1, VERSION)
_CONFIG, WEIGHTS, _POSITIONS = "config.json", "model.safetensors", "vision.vit.pos_embed"
_CARD, _TEMPERATURE = "README.md", "temperature"
Model = TypeVar("Model")
"""One of the classes of `blip.models.families.TASKS`."""


def save_pretrained(
    model: Model,
    tokenizer: Tokenizer,
    directory: str | Path,
    card: str | Facts = "",
    licence: str | None = "apache-2.0",
    trained_on: Sequence[str] = (),
) -> None:
    """Write a model directory that `from_pretrained` reads; an existing one is replaced as a whole.

    `card` is the body of README.md (Markdown), or the facts to write it from, `licence` as the hub names it, None where
    it is not known; `trained_on` names the origins of its training images (`blip.origin`). Files in the directory that
    are not the model's stay. ValueError if the tokenizer does not fit the model, files.WriteError if the disk is full,
    when the old directory is left as it was.
    """
    tokenizer.check(model.config.text)
    target = Path(directory)
    state = model.state_dict()
    task, parts = names_of(type(model))
    header = {"format": FORMAT, "version": VERSION} | ({} if task == "blip" else {"task": task})
    origins = {KEY: list(check_origins(list(trained_on)))} if trained_on else {}
    config = json.dumps({**header, **origins, "model": model.config.to_dict() | {"parts": parts}}, indent=1).encode()
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save(scratch)
        texts = {path.name: path.read_bytes() for path in Path(scratch).iterdir()}
    texts |= {_CONFIG: config, _CARD: own_card(model, card, licence, trained_on).encode()}
    writers: dict[str, tuple[Callable[[Path], None], int]] = {
        name: (lambda path, content=content: files.write_bytes(path, content), len(content))
        for name, content in texts.items()
    }
    writers[WEIGHTS] = (lambda path: write_tensors(path, state), tensor_bytes(state))
    fresh = target.with_name(f".new-{target.name}")
    shutil.rmtree(fresh, ignore_errors=True)
    files.write_directory(fresh, writers)
    _swap(fresh, target)


def write_card(
    directory: str | Path,
    model: Model,
    card: str | Facts,
    licence: str | None = "apache-2.0",
    trained_on: Sequence[str] = (),
) -> None:
    """Replace the card of a model directory, as `save_pretrained` writes it, such as when it has new scores."""
    files.replace_file(Path(directory) / _CARD, own_card(model, card, licence, trained_on).encode())


def _swap(fresh: Path, target: Path) -> None:
    """Put a new directory in an old one's place, and the old one's other files into the new one."""
    if not target.exists():
        fresh.rename(target)
        return
    if not target.is_dir():
        shutil.rmtree(fresh)
        raise ValueError(f"{target} is a file; give the name of a directory")
    old = target.with_name(f".old-{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    fresh.rename(target)
    for path in old.iterdir():
        if not (target / path.name).exists():
            path.rename(target / path.name)
    shutil.rmtree(old)


@dataclass(frozen=True)
class Own:
    """A model directory of ours, opened."""

    config_path: Path
    weights: Weights
    tokenizer_at: Path
    """Folder of the tokenizer."""
    task: str
    """Name of the task, one of `TASKS`."""
    model_config: BlipConfig
    options: TrainingOptions | None
    """Training options, which only older versions saved."""
    trained_on: tuple[str, ...] = ()
    """Origins of its training images; empty if not recorded."""
    described = "a model folder of openblip"
    """Human-readable description."""

    @property
    def named(self) -> str:
        """File that says what model it is, for messages."""
        return str(self.config_path)

    @property
    def source(self) -> str:
        """The weights' file, for messages."""
        return str(self.weights.path)

    @property
    def licence(self) -> str | None:
        """Licence that its card names, if any."""
        card = self.config_path.with_name(_CARD)
        lines = card.read_text(encoding="utf-8", errors="replace").splitlines()[:20] if card.is_file() else []
        licences = [line.partition(":")[2].strip() for line in lines if line.startswith("license:")]
        return licences[0] if licences and licences[0] != "other" else None

    def tokenizer(self, given: str | Path | None = None) -> Tokenizer:
        """Tokenizer that it was saved with. ValueError if another one is given."""
        own = Tokenizer.load(self.tokenizer_at)
        if given and Tokenizer.load(given).digest() != own.digest():
            raise ValueError(f"{self.source} was trained with another tokenizer than {given}: leave that out")
        return own

    def config(self, tokenizer: Tokenizer) -> BlipConfig:
        """Configuration as saved. ValueError, before the model is built, if it has more layers than the weights."""
        names = self._outline()
        for field, count, stack in (
            ("vision.depth", self.model_config.vision.depth, r"vision\.vit\."),
            ("text.layers", self.model_config.text.layers, r"(?:med|question|answer)\."),
        ):
            layers = {match[1] for name in names if (match := re.match(stack + r"blocks\.(\d+)\.", name))}
            if count is not None and count > len(layers):
                raise ValueError(
                    f"{self.config_path}: {field} is {count}, {self.weights.path.name} has {len(layers)} layers"
                )
        return self.model_config

    def _outline(self) -> dict[str, Tensor]:
        return self.weights.read(read_outline)

    def fits(self, outline: nn.Module) -> None:
        """ValueError, naming what differs, unless a model of `config` takes the weights; it needs no content."""
        _refuse_misfit(self.source, self._outline(), outline.state_dict())

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights. ValueError as in `read_tensors`, and for NaN or infinity."""
        state = self.weights.read(read_tensors)
        refuse_unsound(state, self.source)
        return state

    def account(self, model: nn.Module) -> None:
        """No account: nothing is renamed or left out."""


def locate(where: str | Path, revision: str | None = None) -> Path:
    """The folder or file of a model, downloaded if `where` is the name of a repository on the hub.

    Such a name is `ORG/NAME` or `ORG/NAME@REVISION`, the revision being a branch, tag or commit; a folder of that name
    wins. FileNotFoundError if there is no such model; ValueError for a `revision` of anything but a repository.
    """
    if where is None or not str(where).strip():
        raise ValueError(f"no model: {_EXPECTED}")
    check_named(where)
    folder, parsed = Path(where).expanduser(), repository(str(where))
    if folder.exists() or parsed is None:
        if revision is not None:
            raise ValueError(f"revision {revision!r} is for a name on the hub, and {where} is a local path")
        return folder
    if revision is not None:
        if parsed[1] is not None and parsed[1] != revision:
            raise ValueError(f"revision {revision!r} contradicts {where}: give one of the two")
        if repository(f"{parsed[0]}@{revision}") is None:
            raise ValueError(f"revision {revision!r} is not a branch, tag or commit")
        parsed = parsed[0], revision
    return hub.folder(*parsed, _DOWNLOADED, _is_complete, "the model's path")


_FOREIGN_WEIGHTS = (WEIGHTS, "pytorch_model.bin")
_DOWNLOADED = (("*.json", "*.txt", "*.md", "model*.safetensors"), ("pytorch_model*.bin",))
"""Files of a repository: all that is small with safetensors, and without these pickled tensors."""
_EXPECTED = (
    f"give a model directory (one with {_CONFIG} and {WEIGHTS}), a .pth file or a name on the hub (ORG/NAME or "
    "ORG/NAME@REVISION)"
)


def _is_complete(folder: Path) -> bool:
    """Whether a folder has all that a model needs."""
    try:
        weights = Weights.find(lambda part: _in_folder(folder, part), *_FOREIGN_WEIGHTS)
    except (FileNotFoundError, ValueError):
        return False
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt"))
    return bool(weights.parts) and has_tokenizer and (folder / _CONFIG).is_file()


def opened(where: str | Path, revision: str | None = None) -> Own | Foreign:
    """Open the checkpoint at a path, or on the hub under a name; errors as in `from_pretrained`."""
    folder = locate(where, revision)
    if not folder.is_dir():
        return foreign.open_file(folder)
    config_path = _in_folder(folder, _CONFIG)
    settings = read_json(config_path)
    if settings.get("format") != FORMAT and "model_type" in settings:
        weights = Weights.find(lambda part: _in_folder(folder, part), *_FOREIGN_WEIGHTS)
        return foreign.open_directory(config_path, weights, folder, claimed(settings))
    task, config, options = _read_config(config_path, settings)
    weights = Weights.find(lambda part: _in_folder(folder, part), WEIGHTS)
    return Own(config_path, weights, folder, task, config, options, _origins(config_path, settings))


def trained_on(where: str | Path) -> tuple[str, ...]:
    """Origins of the images that a checkpoint was trained on, from its config.json; empty if not recorded there.

    Errors as in `from_pretrained`.
    """
    place = locate(where)
    if not place.is_dir():
        return claimed(read_file(place))
    path = _in_folder(place, _CONFIG)
    settings = read_json(path)
    return _origins(path, settings) if settings.get("format") == FORMAT else claimed(settings)


def _origins(path: Path, settings: dict[str, Any]) -> tuple[str, ...]:
    try:
        return check_origins(settings.get(KEY, []))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def built(
    source: Own | Foreign,
    *,
    image_size: int | None = None,
    device: str | torch.device = "cpu",
    tokenizer: str | Path | None = None,
    options: TrainingOptions | None = None,
) -> tuple[Any, Tokenizer]:
    """The model and tokenizer of what was opened, in evaluation mode; arguments and errors as in `from_pretrained`."""
    words = source.tokenizer(tokenizer)
    config = source.config(words)
    words.check(config.text)
    # Before anything is allocated, so that no configuration can ask for more memory than there are weights.
    source.fits(_outline(source, config))
    if image_size is not None and image_size != config.vision.image_size:
        config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=image_size))
    model = kind_of(source.task, config)(config, options or source.options or TrainingOptions())
    state = source.state(model)
    if _POSITIONS in state and state[_POSITIONS].ndim == 3:
        state[_POSITIONS] = fit_positions(model.vision.vit, state[_POSITIONS], config.vision.image_size)
    _refuse_misfit(source.source, state, model.state_dict())
    if _TEMPERATURE in state and (temperature := state[_TEMPERATURE].item()) <= 0:
        raise ValueError(f"{source.source}: {_TEMPERATURE} is {temperature:g}, it must be above 0")
    model.load_state_dict(state)
    return model.to(device).eval(), words


def _outline(source: Own | Foreign, config: BlipConfig) -> nn.Module:
    """A model's names, shapes and types without content. ValueError, naming the file, for one that cannot be."""
    # What does not change a shape may need content to be made.
    plain = dataclasses.replace(config, vision=dataclasses.replace(config.vision, init_gain=None))
    try:
        with torch.device("meta"):
            return kind_of(source.task, plain)(plain)
    except ValueError as error:
        raise ValueError(f"{source.named}: {error}") from error


@overload
def from_pretrained(
    where: str | Path | Own | Foreign,
    *,
    revision: str | None = None,
    image_size: int | None = None,
    device: str | torch.device = "cpu",
    tokenizer: str | Path | None = None,
    options: TrainingOptions | None = None,
) -> tuple[Blip, Tokenizer]: ...
@overload
def from_pretrained(
    where: str | Path | Own | Foreign,
    kind: type[Model],
    *,
    revision: str | None = None,
    image_size: int | None = None,
    device: str | torch.device = "cpu",
    tokenizer: str | Path | None = None,
    options: TrainingOptions | None = None,
) -> tuple[Model, Tokenizer]: ...
def from_pretrained(where, kind=Blip, *, revision=None, image_size=None, device="cpu", tokenizer=None, options=None):
    """Read a model; it is in evaluation mode.

    `where` is a model directory, a `.pth` of the 2022 release or LAVIS, a directory of transformers, the name of a
    repository with one on the hub (`ORG/NAME`, or with the branch, tag or commit that is also `revision`,
    `ORG/NAME@REVISION`), or the result of `opened`. `kind` is the expected class, `Blip` or a task model. For another
    `image_size` (pixels) the position embeddings are interpolated. `tokenizer`, as for `Tokenizer.load`, is for
    checkpoints without one, such as a `.pth`. `options` are for training; by default those that an older version or
    another program saved, else nothing is random. FileNotFoundError if `where` does not exist; ValueError, naming the
    file and the problem, if it is incomplete, of another format or kind, or if weights, configuration and tokenizer do
    not fit each other.
    """
    source = where if isinstance(where, Own | Foreign) else opened(where, revision)
    _refuse_kind(source, kind)
    return built(source, image_size=image_size, device=device, tokenizer=tokenizer, options=options)


def check_kind(where: str | Path, kind: type[Any] = Blip) -> None:
    """Refuse a model of the wrong kind, as `from_pretrained` does, without building it."""
    _refuse_kind(opened(where), kind)


def _refuse_kind(source: Own | Foreign, kind: type[Any]) -> None:
    if TASKS[source.task].model is not kind:
        model = TASKS[source.task].model.__name__
        raise ValueError(f"{source.named} is of a {model} model, {_remedy(source.task, names_of(kind)[0])}")


def _remedy(actual: str, wanted: str) -> str:
    kind = TASKS[wanted].model.__name__
    if actual == "blip":
        return f"{kind} is expected: fine-tune it first with recipes.{wanted}, or give a model that this wrote"
    use = f"which is for {TASKS[actual].used_by} (in Python: from_pretrained(folder, {TASKS[actual].model.__name__}))"
    return f"{use}; {kind} is expected here"


def _in_folder(folder: Path, part: str) -> Path:
    if not (folder / part).is_file():
        weights = [path.name for path in sorted(folder.iterdir()) if path.name.endswith(SUFFIXES)]
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        give = f"; give the file itself, {folder / weights[0]}" if weights and part == _CONFIG else ""
        raise FileNotFoundError(f"{folder} has no {part}, so it is not a model directory; it holds {there}{give}")
    return folder / part


def _read_config(path: Path, settings: dict[str, Any]) -> tuple[str, BlipConfig, TrainingOptions | None]:
    """Read the task, one of `TASKS`, the configuration and older versions' training options from config.json."""
    if settings.get("format") != FORMAT:
        raise ValueError(f"{path} does not say format {FORMAT!r}, nor transformers' model_type: is it another model's?")
    if settings.get("version") not in _READABLE:
        version = settings.get("version")
        raise ValueError(f"{path} is version {version!r}, this program reads up to {VERSION}: update openblip")
    task = settings.get("task", "blip")
    if not isinstance(task, str) or task not in TASKS:
        raise ValueError(f"{path} is of task {task!r}, this program knows {', '.join(TASKS)}: update openblip")
    try:
        values = settings.get("model")
        return task, TASKS[task].config.from_dict(values), former_options(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _refuse_misfit(source: str, state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Raise one error for all that is missing, unexpected or of another shape."""
    both = sorted(state.keys() & wanted.keys())
    shapes = [f"{k} {tuple(state[k].shape)} for {tuple(wanted[k].shape)}" for k in both
              if state[k].shape != wanted[k].shape]  # fmt: skip
    types = [f"{k} {type_in_words(state[k].dtype)} for {type_in_words(wanted[k].dtype)}" for k in both
             if state[k].dtype not in NUMBERS]  # fmt: skip
    misfits = {
        "missing": sorted(wanted.keys() - state.keys()),
        "unexpected": sorted(name[:100] for name in state.keys() - wanted.keys()),
        "of another shape": shapes,
        "of another type": types,
    }
    lines = [
        f"{len(names)} {kind}: {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
        for kind, names in misfits.items()
        if names
    ]
    if lines:
        raise ValueError(
            f"{source} does not fit its {_CONFIG}: {'; '.join(lines)}. Weights and configuration must come from the "
            "same model"
        )


def push_to_hub(
    model: Model,
    tokenizer: Tokenizer,
    repo_id: str,
    *,
    card: str | Facts = "",
    licence: str | None = "apache-2.0",
    trained_on: Sequence[str] = (),
    **options: Any,
) -> str:
    """Upload a model directory to the hub and return its address.

    `card`, `licence` and `trained_on` are as in `save_pretrained`; the last is `opened(where).trained_on` of a model
    that was loaded.
    `options`: `private`, `token`, and what huggingface_hub's `upload_folder` takes (`commit_message`, `revision`...).
    """
    from huggingface_hub import HfApi

    token, private = options.pop("token", None), options.pop("private", None)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_pretrained(model, tokenizer, folder, card, licence, trained_on)
        (folder / _CARD).write_bytes(own_card(model, card, licence, trained_on, repo_id).encode())
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options))
