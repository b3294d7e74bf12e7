"""A model as a directory: config.json, model.safetensors, the tokenizer and a card. Loading is strict.

A directory holds one of `blip.tasks.TASKS`; config.json says which, and nothing where it is a `Blip`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from huggingface_hub import HfApi
from torch import Tensor

from blip import atomic, hub
from blip.config import BlipConfig
from blip.model import Blip
from blip.tasks import TASKS
from blip.tokenizer import Tokenizer
from blip.vision import resize_positions

FORMAT, VERSION = "openblip", 1
_CONFIG, _WEIGHTS, _POSITIONS = "config.json", "model.safetensors", "vision.vit.pos_embed"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
Model = TypeVar("Model")
"""One of the classes of `blip.tasks.TASKS`."""


def save_pretrained(model: Model, tokenizer: Tokenizer, directory: str | Path, card: str = "") -> None:
    """Write a model directory that `from_pretrained` reads; one that is there already is replaced as a whole.

    `card` is the body of README.md (Markdown). Files in the directory that are not the model's stay. ValueError if the
    tokenizer does not fit the model, atomic.WriteError if the disk is full, when the old directory is left as it was.
    """
    tokenizer.check(model.config.text)
    target = Path(directory)
    state = model.state_dict()
    task = _name(type(model))
    said = {"format": FORMAT, "version": VERSION} | ({} if task == "blip" else {"task": task})
    config = json.dumps({**said, "model": model.config.to_dict()}, indent=1).encode()
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save(scratch)
        texts = {path.name: path.read_bytes() for path in Path(scratch).iterdir()}
    texts |= {_CONFIG: config, "README.md": _card(card, task).encode()}
    writers: dict[str, tuple[Callable[[Path], None], int]] = {
        name: (lambda path, content=content: atomic.write_bytes(path, content), len(content))
        for name, content in texts.items()
    }
    writers[_WEIGHTS] = (lambda path: atomic.write_tensors(path, state), atomic.tensor_bytes(state))
    fresh = target.with_name(f".new-{target.name}")
    shutil.rmtree(fresh, ignore_errors=True)
    atomic.write_directory(fresh, writers)
    _swap(fresh, target)


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


def _card(body: str, task: str) -> str:
    tags = "".join(f"- {tag}\n" for tag in TASKS[task].tags)
    front = f"---\nlibrary_name: openblip\nlicense: apache-2.0\ntags:\n{tags}---\n\n"
    return front + (body or "# A BLIP model\n\nLoad it with `blip.checkpoint.from_pretrained`.\n")


def _name(kind: type) -> str:
    return next(name for name, task in TASKS.items() if task.model is kind)


@overload
def from_pretrained(
    where: str | Path, *, image_size: int | None = None, device: str | torch.device = "cpu"
) -> tuple[Blip, Tokenizer]: ...
@overload
def from_pretrained(
    where: str | Path, kind: type[Model], *, image_size: int | None = None, device: str | torch.device = "cpu"
) -> tuple[Model, Tokenizer]: ...
def from_pretrained(where, kind=Blip, *, image_size=None, device="cpu"):
    """Read a model directory, or a repository of that name on the hub; the model is in evaluation mode.

    `kind` is the class that is expected there, `Blip` or a task model. With another `image_size` (pixels) the position
    embeddings are resized. FileNotFoundError if it is not there, ValueError, naming the file and what is wrong with it,
    if it is not whole, of another format or kind, or if weights, configuration and tokenizer do not fit each other.
    """
    config_path, weights_path, tokenizer_at = _find(where)
    config = _config_of(config_path, kind)
    state = atomic.read_tensors(weights_path)
    if image_size is not None and image_size != config.vision.image_size:
        config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=image_size))
    model = kind(config)
    if _POSITIONS in state:
        state[_POSITIONS] = _fit_positions(state[_POSITIONS], model)
    _refuse_misfit(weights_path, state, model.state_dict())
    model.load_state_dict(state)
    tokenizer = Tokenizer.load(tokenizer_at)
    tokenizer.check(config.text)
    return model.to(device).eval(), tokenizer


def check_kind(where: str | Path, kind: type[Any] = Blip) -> None:
    """Without reading its weights, refuse a model directory or repository that `from_pretrained` would refuse."""
    _config_of(_find(where)[0], kind)


def _config_of(path: Path, kind: type[Any]) -> Any:
    task, config = _read_config(path)
    if TASKS[task].model is not kind:
        raise ValueError(f"{path} is of a {TASKS[task].model.__name__} model, {_remedy(task, _name(kind))}")
    return config


def _remedy(found: str, wanted: str) -> str:
    kind = TASKS[wanted].model.__name__
    if found == "blip":
        return f"{kind} is expected: fine-tune it first with recipes.{wanted}, or give a model that this wrote"
    use = f"which is for {TASKS[found].used_by} (in Python: from_pretrained(folder, {TASKS[found].model.__name__}))"
    return f"{use}; {kind} is expected here"


def kind_of(where: str | Path) -> type[Any]:
    """The class of the model in a directory or repository; errors as in `from_pretrained`."""
    return TASKS[_read_config(_find(where)[0])[0]].model


def start_task(kind: type[Model], where: str | Path, *, image_size: int | None = None) -> tuple[Model, Tokenizer]:
    """A task model from a directory that holds one, or one that starts from the pre-trained `Blip` there.

    What the pre-trained model lacks is random (`Vqa.origin`). In evaluation mode; errors as in `from_pretrained`.
    """
    if kind_of(where) is not Blip:
        return from_pretrained(where, kind, image_size=image_size)
    blip, tokenizer = from_pretrained(where, image_size=image_size)
    return kind.from_blip(blip), tokenizer


def _find(where: str | Path) -> tuple[Path, Path, Path]:
    """Paths of config, weights and the tokenizer's folder."""
    folder = Path(where).expanduser()
    if not folder.is_dir():
        name = str(where)
        if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise FileNotFoundError(f"{where} is not a model directory (one with {_CONFIG} and {_WEIGHTS})")
        config, weights, *rest = (hub.file(name, part, "the model's path") for part in (_CONFIG, _WEIGHTS, *_TOKENIZER))
        return config, weights, rest[0].parent
    for part in (_CONFIG, _WEIGHTS):
        if not (folder / part).is_file():
            there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
            raise FileNotFoundError(f"{folder} has no {part}, so it is not a model directory; it holds {there}")
    return folder / _CONFIG, folder / _WEIGHTS, folder


def _read_config(path: Path) -> tuple[str, BlipConfig]:
    """Which of `TASKS` it is, and its configuration."""
    try:
        said = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch or save the model again") from error
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        foreign = isinstance(said, dict) and "model_type" in said
        remedy = "it is transformers' format: convert it with `blip convert`" if foreign else "is it another model's?"
        raise ValueError(f"{path} does not say format {FORMAT!r}; {remedy}")
    if said.get("version") != VERSION:
        raise ValueError(f"{path} is version {said.get('version')!r}, this program reads {VERSION}: update openblip")
    task = said.get("task", "blip")
    if not isinstance(task, str) or task not in TASKS:
        raise ValueError(f"{path} is of task {task!r}, this program knows {', '.join(TASKS)}: update openblip")
    try:
        return task, TASKS[task].config.from_dict(said.get("model"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _fit_positions(positions: Tensor, model: Any) -> Tensor:
    vit = model.vision.vit
    if positions.ndim != 3 or positions.shape == vit.pos_embed.shape:
        return positions
    (patch, _), prefix = vit.patch_embed.patch_size, vit.num_prefix_tokens
    return resize_positions(positions, model.config.vision.image_size, patch, prefix)


def _refuse_misfit(path: Path, state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """One error for all that is missing, unexpected or of another shape."""
    both = state.keys() & wanted.keys()
    shapes = [f"{k} {tuple(state[k].shape)} for {tuple(wanted[k].shape)}" for k in sorted(both)
              if state[k].shape != wanted[k].shape]  # fmt: skip
    found = {
        "missing": sorted(wanted.keys() - state.keys()),
        "unexpected": sorted(state.keys() - wanted.keys()),
        "of another shape": shapes,
    }
    lines = [f"{len(names)} {kind}: {', '.join(names[:3])}{', ...' * (len(names) > 3)}" for kind, names in found.items()
             if names]  # fmt: skip
    if lines:
        raise ValueError(
            f"{path} does not fit its {_CONFIG}: {'; '.join(lines)}. Weights and configuration must come from the "
            "same model; files of other programs go through `blip convert`"
        )


def push_to_hub(model: Model, tokenizer: Tokenizer, repo_id: str, *, card: str = "", **options: Any) -> str:
    """Upload a model directory to the hub and return its address.

    `options`: `private`, `token`, and what huggingface_hub's `upload_folder` takes (`commit_message`, `revision`...).
    """
    token, private = options.pop("token", None), options.pop("private", None)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_pretrained(model, tokenizer, folder, card)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options))
