"""`blip convert`: import released weights into a model folder, or export a model folder for other programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from blip.app.commands.shared import TokenizerOption, at_least
from blip.options import argument, option

if TYPE_CHECKING:
    from blip.checkpoints.foreign import Account

EXAMPLE = """examples:
  blip convert model_base_caption_capfilt_large.pth models/captioner --tokenizer vocab.txt
  blip convert Salesforce/blip-itm-base-coco models/matcher --to openblip --image-size 224
  blip convert runs/pretrain/model exported --to transformers --use captioning
  blip convert runs/vqa/model exported-2022 --to original

SRC is a model folder, a .pth of the 2022 release or LAVIS, a transformers model folder, or a name on the hub. DST must
not exist, or be empty. Every tensor is converted, or listed with the reason why it is not.
Exit status: 0, 1 if DST could not be written, or 2 for wrong use."""


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(TokenizerOption):
    """Import released weights into a model folder, or export a model folder for other programs."""

    source: str = argument("SRC")
    """Model folder, .pth file, transformers model folder or name on the hub, ORG/NAME or ORG/NAME@REVISION"""
    folder: str = argument("DST")
    """New folder"""
    to: Literal["openblip", "transformers", "original"] = "openblip"
    """Layout to write"""
    use: Literal["pretraining", "captioning", "matching", "vqa", "nlvr"] | None = None
    """Model class of the other layout, if several can hold the model (default: the only one, or pretraining)"""
    image_size: int | None = option(None, metavar="PIXELS")
    """Interpolate the position embeddings for images of this side (default: no change)"""

    def __post_init__(self) -> None:
        at_least(1, image_size=self.image_size)


def run(chosen: ConvertOptions) -> int:
    """Convert what the options name; returns the exit status."""
    target = Path(chosen.folder).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} already exists: give a new or empty folder")
    if chosen.to == "openblip" and chosen.use:
        raise ValueError("--use chooses a model class of another layout: leave it out with --to openblip")

    # After the checks that need no torch, so that their errors come at once.
    from blip.app.exit import SOME_FAILED, fail, one_line
    from blip.checkpoints import card, checkpoint, export
    from blip.errors import Stopped
    from blip.origin import print_note

    source = checkpoint.opened(chosen.source)
    model, tokenizer = checkpoint.built(source, image_size=chosen.image_size, tokenizer=chosen.tokenizer)
    path = Path(chosen.source).expanduser()
    name = path.resolve().name if path.exists() else chosen.source
    licence = "bsd-3-clause" if name.startswith("Salesforce/") else source.licence
    origin = card.Provenance(name, source.described, licence, source.trained_on)
    print(f"read {name}: {source.described}, {sum(tensor.numel() for tensor in model.state_dict().values()):,} numbers")
    print_note(source.trained_on)
    if account := source.account(model):
        _print_account(account)
    try:
        if chosen.to == "openblip":
            facts = card.Facts(card.plain_card(origin))
            checkpoint.save_pretrained(model, tokenizer, target, facts, origin.licence, origin.trained_on)
        else:
            layout = export.write(model, tokenizer, target, chosen.to, origin, chosen.use)
            print(f"written for {layout.name}")
    except Stopped as error:
        fail(one_line(error), SOME_FAILED)
    for path in sorted(target.iterdir()):
        print(f"wrote {path}  {path.stat().st_size:,} bytes")
    return 0


def _print_account(account: Account) -> None:
    """Print how every tensor was handled."""
    print(f"  {account.carried} tensors carried over, {account.copies} more are duplicates of these")
    for why, names in account.dropped.items():
        print(f"  {len(names)} left out ({names[0]}{', ...' * (len(names) > 1)}): {why}")
    for name, why in account.fresh.items():
        print(f"  {name} keeps its initial value: {why}")
