"""`blip caption`: caption images."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from blip.app.commands.shared import ImageOptions, ModelOptions
from blip.app.exit import SOME_FAILED
from blip.app.sidecars import Beside, SidecarOptions
from blip.inference.settings import CAPTION_PROMPT, DECODE_PRESETS, DecodeConfig
from blip.options import option

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from blip.app.answers import Answers
    from blip.app.loaded import Loaded
    from blip.data.image_files import ImageFile, InputImages
    from blip.inference.generate import CaptionText

EXAMPLE = """examples:
  blip caption photo.jpg --model runs/caption/model
  blip caption photos/ 'more/*.png' --num 3 --method nucleus --json --out captions.jsonl
  blip caption photos/ --sidecar .txt --prefix "a photo of sks, "
  blip caption photos/ --undo

With --sidecar or --metadata captions go into files beside the images, and the same command continues what was stopped.
A caption depends on the bytes of its image, the model and these options; not on the other images, their order, the
file's name or --batch. Exit status: 0, or 1 if some images could not be used, or 2 for wrong use."""


@dataclass(frozen=True, kw_only=True)
class CaptionOptions(ImageOptions, ModelOptions, SidecarOptions):
    """Caption images."""

    recursive: bool = True
    """Use the images of subfolders, too; --no-recursive uses only those of the folder itself"""

    preset: Literal["greedy", "caption_2022", "nucleus", "capfilt_2022"] = "caption_2022"
    """Decoding preset, adjusted by the options below; caption_2022 is the paper's captioner"""
    method: Literal["beam", "greedy", "nucleus"] | None = None
    """Beam search, greedy decoding or nucleus sampling (default: the preset's)"""
    num: int | None = option(None, metavar="N")
    """Captions per image (default: 1)"""
    beams: int | None = option(None, metavar="N")
    """Number of beams in beam search"""
    length_rule: Literal["generated", "2022"] | None = None
    """Length by which beams are compared: `generated` counts generated tokens and [SEP], as today's transformers does;
    `2022` counts the prompt too, but not [SEP], as the original does (default: the preset's; 2022 for caption_2022)"""
    top_p: float | None = option(None, metavar="P")
    """Probability mass that nucleus sampling draws from"""
    min_length: int | None = option(None, metavar="N")
    """Minimum number of tokens, prompt included"""
    max_length: int | None = option(None, metavar="N")
    """Maximum number of tokens, prompt included"""
    prompt: str = CAPTION_PROMPT
    """Prompt that captions continue, not part of the answer; '' for a model trained without a prompt"""
    seed: int = option(0, metavar="N")
    """Random seed of sampling"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_sidecars()
        if (self.sidecar is not None or self.metadata or self.undo) and (self.out or self.json):
            raise ValueError("--out and --json are for captions that are not put beside their images: leave them out")

    def decoding(self) -> DecodeConfig:
        """The decoding settings that the options describe. ValueError if they contradict each other."""
        names = ("num", "beams", "top_p", "min_length", "max_length", "length_rule", "seed")
        values = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        preset = DECODE_PRESETS[self.preset]
        if self.method == "greedy":
            if self.beams not in (None, 1):
                raise ValueError(f"--method greedy has one beam, but --beams is {self.beams}: leave it out")
            if values.get("num", 1) > 1:
                raise ValueError(f"--method greedy gives one caption, but --num is {self.num}: use beam or nucleus")
            values |= {"method": "beam", "beams": 1, "num": 1}
        elif self.method:
            values["method"] = self.method
        if values.get("method", preset.method) == "beam" and preset.beams > 1:
            values.setdefault("beams", max(preset.beams, values.get("num", 1)))
        samples = values.get("method", preset.method) == "nucleus"
        if samples and self.beams is not None:
            raise ValueError("--beams is of beam search, not of nucleus sampling: leave it out, or give --method beam")
        if not samples and self.top_p is not None:
            raise ValueError(
                "--top-p is of nucleus sampling, not of beam search: leave it out, or give --method nucleus"
            )
        return dataclasses.replace(preset, **values)


def run(chosen: CaptionOptions) -> int:
    """Caption the images that the options name; returns the exit status."""
    config = chosen.decoding()
    if chosen.undo:
        return _undo(chosen)
    from blip.data.image_files import find

    inputs = find(chosen.images, recursive=chosen.recursive, beside=[chosen.sidecar] if chosen.sidecar else [])
    if chosen.sidecar is not None or chosen.metadata:
        return _put_beside(chosen, config, inputs)

    # After the checks that need no torch, so that their errors come at once.
    from blip.app.answers import Answers, Form, refuse_out

    refuse_out(chosen.out)
    loaded, describe = _captioner(chosen, config)
    keys = ("path", "captions", "logprob", "finished")
    form = Form("caption", chosen.json, keys, "tt", _ways(chosen, config, loaded) if chosen.out else {}, config.num)
    with Answers(chosen.out, inputs, form=form) as answers:
        for files in _read(answers.to_do, loaded, chosen.batch):
            if read := answers.readable(files):
                for image, texts in zip(read, describe(read), strict=True):
                    _answer(answers, image.path, texts, chosen.json)
            answers.advance(len(files))
    return SOME_FAILED if answers.failed else 0


def _answer(answers: Answers, path: str, texts: list[CaptionText], as_json: bool) -> None:
    if as_json:
        values = {"captions": [text.text for text in texts], "logprob": [round(text.logprob, 3) for text in texts]}
        answers.json({"path": path, **values, "finished": [text.finished for text in texts]})
    else:
        for text in texts:
            answers.text(path, text.text)


def _ways(chosen: CaptionOptions, config: DecodeConfig, loaded: Loaded) -> dict[str, object]:
    """Options that captions depend on."""
    return {**dataclasses.asdict(config), "prompt": chosen.prompt, **loaded.options(chosen.model)}


def _captioner(
    chosen: CaptionOptions, config: DecodeConfig
) -> tuple[Loaded, Callable[[list[ImageFile]], list[list[CaptionText]]]]:
    """Load the model; returns it, and a function that captions images. ValueError for settings that do not fit it."""
    import torch

    from blip.app.loaded import load
    from blip.inference.generate import generate_texts

    loaded = load(chosen.model, chosen.device, chosen.precision, tokenizer=chosen.tokenizer)
    model, tokenizer, side = loaded.model, loaded.tokenizer, loaded.model.config.vision.image_size
    if tokenizer.unknown_rate([chosen.prompt]):
        raise ValueError(f"--prompt {chosen.prompt!r} has words that the model's tokenizer does not know; try ''")

    def describe(images: Tensor, keys: list[str]) -> list[list[CaptionText]]:
        with loaded.computing():
            return generate_texts(model, tokenizer, images.to(loaded.device), config, prompt=chosen.prompt, keys=keys)

    describe(torch.zeros(1, 3, side, side), [""])  # so that settings that do not fit fail before a file is opened
    return loaded, lambda read: describe(torch.stack([one.pixels for one in read]), [one.digest for one in read])


def _read(paths: list[str], loaded: Loaded, batch: int) -> Iterator[list[ImageFile]]:
    from blip.data.image_files import read_images
    from blip.data.transforms import EvalTransform

    return read_images(paths, EvalTransform(loaded.model.config.vision.image_size), batch)


def _put_beside(chosen: CaptionOptions, config: DecodeConfig, inputs: InputImages) -> int:
    """Write captions into files beside the images, or into metadata.jsonl; returns the exit status."""
    from blip.app import undo
    from blip.app.answers import Answers, shown

    beside = Beside(chosen, inputs)
    if chosen.dry_run:
        return _print_actions(beside)
    beside.check_writable()
    with undo.only_writer(beside.roots, beside.folders):
        beside.survey()
        beside.check_writable()
        options = chosen.record()
        if beside.to_do:  # if all is there, no model is needed
            loaded, describe = _captioner(chosen, config)
            options |= _ways(chosen, config, loaded)
        beside.begin(options)
        with Answers(None, beside.inputs._replace(paths=beside.to_do)) as answers:
            answers.remedy = f"; the same command continues; undo: {undo.command(*beside.roots)}"
            for line in beside.notes:
                print(shown(line), file=sys.stderr)
            for path, reason in beside.problems:
                answers.failure(path, reason)
            for files in _read(beside.to_do, loaded, chosen.batch) if beside.to_do else ():
                if read := answers.readable(files):
                    words = [[text.text for text in texts] for texts in describe(read)]
                    for path, reason in beside.write(dict(zip([one.path for one in read], words, strict=True))):
                        answers.failure(path, reason)
                answers.advance(len(files))
            for path, reason in beside.finish():
                answers.failure(path, reason)
            answers.closing = beside.summary(answers.failed)
    return SOME_FAILED if answers.failed else 0


def _print_actions(beside: Beside) -> int:
    from blip.app.answers import Answers, shown

    beside.survey()
    with Answers(None, beside.inputs._replace(paths=[])) as answers:
        for path, action, target in beside.actions():
            answers.text(path, action, shown(target))
        for path, reason in beside.problems:
            answers.failure(path, reason)
        counts = f"{len(beside.to_do)} to caption, {len(beside.kept)} to keep, {answers.failed} that cannot be used"
        answers.closing = f"{counts}; nothing was written"
    return SOME_FAILED if answers.failed else 0


def _undo(chosen: CaptionOptions) -> int:
    """Take back the last run in each folder; returns the exit status."""
    from blip.app import undo
    from blip.app.answers import shown
    from blip.data.paths import alternatives

    names = [path for name in chosen.images for path in alternatives(name)]
    if missing := [name for name in names if not os.path.lexists(name)]:
        raise ValueError(f"no such file or folder: {missing[0]}")
    folders = [name if os.path.isdir(name) else os.path.dirname(name) or "." for name in names]
    roots = {os.path.realpath(folder): folder for folder in folders}.values()
    for root in roots:
        if undo.UndoRun.last(root) is None:
            if os.path.isdir(os.path.join(root, undo.FOLDER)) and not chosen.dry_run:
                with undo.only_writer([root]):
                    pass  # which removes what an undo that was killed at its end has left
            problem = f"nothing to undo in {shown(root)}: no run of `blip caption` is recorded there"
            if run := undo.UndoRun.above(root):
                above = str(run.root)
                problem += (
                    f". Its captions are of a run in {shown(above)}; to take back all of that: {undo.command(above)}"
                )
            raise ValueError(problem)
    counts: Counter[str] = Counter()
    with contextlib.nullcontext() if chosen.dry_run else undo.only_writer(roots):
        for run in filter(None, map(undo.UndoRun.last, roots)):
            back, left = run.take_back(dry=chosen.dry_run)
            counts.update([action for _, action in back] + ["left"] * len(left))
            for name, action in back if chosen.dry_run else ():
                print(f"{shown(str(run.root / name))}\twould be {action}")
            for name, reason in left:
                print(f"{shown(str(run.root / name))} {reason}, and is left as it is", file=sys.stderr)
            if left:
                print(f"what was there before is in {run.folder}; delete that folder to settle it", file=sys.stderr)
    done = f"{counts['removed']} removed, {counts['restored']} restored, {counts['left']} left as they are"
    print(f"{done}{'; nothing was changed' * chosen.dry_run}", file=sys.stderr)
    return SOME_FAILED if counts["left"] else 0
