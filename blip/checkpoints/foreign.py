"""A model of another program, opened: which layout its keys are of, its sizes by its shapes, its weights as ours.

    found = open_file(Path("model_base_caption_capfilt_large.pth"))
    found.task, found.layout.name     # "blip", "captioning"

Released are the checkpoints of salesforce/BLIP (2022) and of LAVIS, which took its modules over, and the directories
of transformers. V vision width, D text width.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from blip.checkpoints import layouts
from blip.checkpoints.settings import Settings
from blip.checkpoints.table import State, Table, from_theirs, in_words, refuse_misfit, some_of
from blip.checkpoints.weights import Weights, read_file, read_weights, unwrapped
from blip.models.presets import BASE, LARGE
from blip.models.settings import BlipConfig, NlvrModelConfig
from blip.nn.settings import TextConfig, TrainingOptions, VisionConfig
from blip.origin import claimed
from blip.tokenizer import Tokenizer

TOKENIZER_VARIABLE = "OPENBLIP_TOKENIZER"
"""Environment variable with the tokenizer of checkpoints that have none."""
RELEASED_TOKENIZER = "bert-base-uncased"
"""The tokenizer of everything that was released."""
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16}
"""Attention heads by usual width of ViT and BERT; tensor shapes do not show them."""
_POSITIONS = "vision.vit.pos_embed"


@dataclass(frozen=True)
class ForeignLayout:
    """One supported kind of foreign checkpoint."""

    name: Literal["pretraining", "captioning", "matching", "vqa", "nlvr"]
    """Use of the model."""
    program: Literal["original", "transformers"]
    """Program whose tensor names it has; LAVIS has the original's."""
    table: Callable[[Any], Table]
    """Names, for a model of ours."""
    task: str = "blip"
    """Task that it has here, one of `blip.models.families.TASKS`."""
    parts: Literal["all", "writing", "matching"] = "all"
    """Value of `BlipConfig.parts`."""

    @property
    def stacks(self) -> tuple[str, ...]:
        """Prefixes of the tensors of its BERTs."""
        names = {"captioning": ("text_decoder.bert.",), "vqa": ("text_encoder.", "text_decoder.bert.")}
        return names.get(self.name, ("text_encoder.",))


LAYOUTS = (
    ForeignLayout("pretraining", "original", layouts.original_pretraining),
    ForeignLayout("captioning", "original", layouts.original_captioning, parts="writing"),
    ForeignLayout("matching", "original", layouts.original_matching, parts="matching"),
    ForeignLayout("vqa", "original", layouts.original_vqa, "vqa"),
    ForeignLayout("nlvr", "original", layouts.original_nlvr, "nlvr"),
    ForeignLayout("captioning", "transformers", layouts.transformers_captioning, parts="writing"),
    ForeignLayout("matching", "transformers", layouts.transformers_matching, parts="matching"),
    ForeignLayout("vqa", "transformers", layouts.transformers_vqa, "vqa"),
)
_BARE = ForeignLayout("matching", "original", layouts.original_bare_matching, parts="matching")
_OTHERS = {
    "vision.vit.": "weights of a model folder of openblip: give the folder, with its config.json",
    "query_tokens": "BLIP-2, which is another model",
    "Qformer.": "BLIP-2, which is another model",
    "qformer.": "BLIP-2, which is another model",
    "text_model.": "transformers' BlipModel, whose text side and projections no released checkpoint has: give a model "
    "for captioning, question answering or image-text retrieval",
    "cls_head_m.": "a classifier of LAVIS, a task that is not done here",
    "blocks.": "an image encoder alone: it goes where first weights do, --model.vision_weights of recipes.pretrain",
    "bert.": "a BERT alone: it goes where first weights do, --model.text_weights of recipes.pretrain",
}
"""Start of other programs' keys -> description of the checkpoint."""


def recognise(keys: set[str], source: str) -> ForeignLayout:
    """The layout of a state dict by its keys. ValueError, saying what it is instead where that is known."""

    def has(*names: str) -> bool:
        return all(any(key.startswith(name) for key in keys) for name in names)

    program = "original" if has("visual_encoder.") else "transformers" if has("vision_model.") else None
    encoder, decoder, matches = has("text_encoder."), has("text_decoder."), has("itm_head.")
    if program is None or has("text_model.") or has("cls_head_m."):
        known = [what for start, what in _OTHERS.items() if has(start)]
        what = f"it is {known[0]}" if known else f"it has {some_of(sorted(keys))}"
        raise ValueError(f"{source} is not a known checkpoint of BLIP: {what}")
    if has("cls_head."):
        if not any(".crossattention.self0." in key for key in keys):
            raise ValueError(f"{source} is a classifier of LAVIS, a task that is not done here")
        name = "nlvr"
    elif encoder and decoder:
        name = "pretraining" if matches else "vqa"
    else:
        name = "captioning" if decoder else "matching"
    if name == "matching" and not matches:
        raise ValueError(
            f"{source} has an image and a text encoder and lacks the head that matches (itm_head): it is a feature "
            "extractor, of LAVIS or the original's blip_feature_extractor; give the pre-training or retrieval "
            "checkpoint that it was taken from, whose embed_image and embed_text give the same features"
        )
    if name == "matching" and program == "original" and "temp" not in keys:
        return _BARE
    matching = [layout for layout in LAYOUTS if (layout.name, layout.program) == (name, program)]
    if not matching:
        raise ValueError(f"{source} has the names of {program} for {name}, which that has no model for; was it edited?")
    return matching[0]


@dataclass(frozen=True)
class Account:
    """Account of every tensor of a foreign file."""

    carried: int
    """Tensors that were carried over."""
    copies: int
    """Second names of a tensor that was carried over."""
    dropped: dict[str, list[str]]
    """Reason -> the keys that were left out."""
    fresh: dict[str, str]
    """Tensors of the model that the file does not have -> why."""


@dataclass(frozen=True)
class Foreign:
    """A checkpoint of another program; `open_file` and `open_directory` make one."""

    source: str
    """The weights' file, for messages."""
    layout: ForeignLayout
    theirs: State
    settings: Settings
    tokenizer_at: str | None
    """Path of its tokenizer, if it has one."""
    trained_on: tuple[str, ...] = ()
    """Origins of its training images, if the checkpoint was exported by openblip and they were known."""

    @property
    def task(self) -> str:
        return self.layout.task

    @property
    def named(self) -> str:
        """File that says what model it is, for messages."""
        return self.source

    @property
    def options(self) -> TrainingOptions:
        return self.settings.options

    @property
    def described(self) -> str:
        """Human-readable description."""
        whose = {"original": "the 2022 release and LAVIS", "transformers": "transformers"}[self.layout.program]
        return f"the layout of {whose} for {self.layout.name}"

    @property
    def licence(self) -> None:
        """None: a file of weights does not state one."""

    def tokenizer(self, given: str | Path | None = None) -> Tokenizer:
        """Load the tokenizer given, its own, the environment's or bert-base-uncased; errors as `Tokenizer.load`."""
        chosen = given or self.tokenizer_at or os.environ.get(TOKENIZER_VARIABLE)
        if chosen:
            return Tokenizer.load(chosen)
        try:
            return Tokenizer.load(RELEASED_TOKENIZER)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{self.source} has no tokenizer: put vocab.txt of {RELEASED_TOKENIZER} beside it, give its path "
                f"as --tokenizer (in Python: tokenizer=), or set {TOKENIZER_VARIABLE} to it. {error}"
            ) from None

    def config(self, tokenizer: Tokenizer) -> BlipConfig:
        """Configuration from shapes and settings. ValueError for unclear sizes or a tokenizer that does not fit.

        The image size is that of the position embeddings.
        """
        text = tokenizer.text_config(self._text())
        words = len(self._theirs(self.layout.stacks[0] + "embeddings.word_embeddings.weight", 2))
        ids = {name: getattr(text, name) for name in self.settings.ids}
        if words != text.vocab_size or ids != self.settings.ids:
            expected = "".join(f", {name} {value}" for name, value in self.settings.ids.items())
            raise ValueError(
                f"{self.source} has {words} word pieces{expected}, and tokenizer {tokenizer.where} {text.vocab_size}"
                f"{''.join(f', {name} {value}' for name, value in ids.items())}: give the one that it was trained with "
                f"as --tokenizer (in Python: tokenizer=); that of the released ones is {RELEASED_TOKENIZER}"
            )
        named = "vision_proj.weight"
        embed_dim = len(self._theirs(named, 2)) if named in self.theirs else BlipConfig.embed_dim
        config = self._sized(BlipConfig, self._vision(), text, embed_dim, parts=self.layout.parts)
        self._refuse_other_sizes(text)
        return NlvrModelConfig.of(config, images=2) if self.layout.name == "nlvr" else config

    def _refuse_other_sizes(self, text: TextConfig) -> None:
        """Raise ValueError if config.json gives other sizes than the weights have."""
        if not self.settings.sizes:
            return
        kernel, hidden = (self._theirs(self._vision_name(name)) for name in (_KERNEL, "blocks.0.mlp.fc1.weight"))
        side = isqrt(self._theirs(self._vision_name("pos_embed")).shape[1] - 1) * kernel.shape[2]
        has = {
            "vision_config.hidden_size": len(kernel),
            "vision_config.num_hidden_layers": self._count("vision_model.encoder.layers."),
            "vision_config.intermediate_size": len(hidden),
            "vision_config.image_size": side,
            "vision_config.patch_size": kernel.shape[2],
            "text_config.hidden_size": text.width,
            "text_config.num_hidden_layers": text.layers,
            "text_config.intermediate_size": text.hidden,
            "text_config.max_position_embeddings": text.max_positions,
        }
        for name, stated in self.settings.sizes.items():
            if stated != has[name]:
                raise ValueError(
                    f"{self.source} does not fit its config.json: {name} is {stated}, the weights have {has[name]}"
                )

    def fits(self, outline: Any) -> None:
        """ValueError, as in `refuse_misfit`, unless a model of `config` takes the weights; it needs no content."""
        refuse_misfit(self.layout.table(outline), self.theirs, self._like(outline), self.source)

    def _like(self, model: Any) -> State:
        return model.state_dict() | {_POSITIONS: self._theirs(self._vision_name("pos_embed"))}

    def state(self, model: Any) -> State:
        """The weights in our names, for a model of `config`; positions may be of another image size than the model.

        What the file does not have has the model's values. ValueError as in `from_theirs`.
        """
        like, table = self._like(model), self.layout.table(model)
        return from_theirs(table, self.theirs, like, self.source) | {n: like[n] for n in table.fresh if n in like}

    def account(self, model: Any) -> Account:
        """Account of every tensor; `state` must have succeeded before."""
        table, dropped = self.layout.table(model), {}
        for name in self.theirs:
            if name in table.dropped:
                dropped.setdefault(table.dropped[name], []).append(name)
        carried = {name for row in table.rows for name in row.theirs}
        ours = model.state_dict()
        fresh = {name: why for name, why in table.fresh.items() if name in ours}
        return Account(len(carried), len(set(self.theirs) & set(table.copies)), dropped, fresh)

    def _theirs(self, name: str, dimensions: int | None = None) -> Tensor:
        if name not in self.theirs:
            raise ValueError(f"{self.source}: {self.layout.name} needs {name}: is the file complete?")
        tensor = self.theirs[name]
        if dimensions not in (None, tensor.ndim):
            raise ValueError(f"{self.source}: {name} is {in_words(tensor.shape)}, not of {dimensions} dimensions")
        return tensor

    def _sized(self, kind: Callable[..., Any], *sizes: Any, **more: Any) -> Any:
        """A configuration by what was found. ValueError, naming the file, for sizes that no model has."""
        try:
            return kind(*sizes, **more)
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from None

    def _vision_name(self, ours: str) -> str:
        if self.layout.program == "original":
            return f"visual_encoder.{ours}"
        block, _, rest = ours.removeprefix("blocks.").partition(".")
        return f"vision_model.{layouts.VIT.get(ours) or f'encoder.layers.{block}.{rest}'}"

    def _vision(self) -> VisionConfig:
        patches, kernel = self._theirs(self._vision_name("pos_embed")), self._theirs(self._vision_name(_KERNEL))
        count = patches.shape[1] - 1 if patches.ndim == 3 and kernel.ndim == 4 else 0
        side = isqrt(max(count, 0))
        if count < 1 or side * side != count:
            raise ValueError(f"{self.source}: {self._vision_name('pos_embed')} is not of a square image")
        width, patch = kernel.shape[0], kernel.shape[2]
        blocks = "visual_encoder.blocks." if self.layout.program == "original" else "vision_model.encoder.layers."
        depth = self._count(blocks)
        heads = self.settings.vision_heads or self._heads(width, "image encoder")
        hidden = self._theirs(self._vision_name("blocks.0.mlp.fc1.weight"), 2).shape[0]
        more = {"norm_eps": self.settings.vision_eps, "hidden": None if hidden == 4 * width else hidden}
        for preset, shape in _RELEASED.items():
            if shape == (width, depth, heads, patch) and hidden == 4 * width:
                return self._sized(VisionConfig, preset, image_size=side * patch, **more)
        return self._sized(VisionConfig, BASE.vision.model, side * patch, patch, width, depth, heads, **more)

    def _text(self) -> TextConfig:
        bert = self.layout.stacks[0]
        positions = self._theirs(f"{bert}embeddings.position_embeddings.weight", 2)
        hidden = self._theirs(f"{bert}encoder.layer.0.intermediate.dense.weight", 2).shape[0]
        width = positions.shape[-1]
        return self._sized(
            replace,
            TextConfig(),
            width=width,
            layers=self._count(f"{bert}encoder.layer."),
            heads=self.settings.text_heads or self._heads(width, "text transformer"),
            hidden=hidden,
            max_positions=len(positions),
            **self.settings.text,
        )

    def _count(self, start: str) -> int:
        numbers = {int(match[1]) for key in self.theirs if (match := re.match(re.escape(start) + r"(\d{1,4})\.", key))}
        if numbers != set(range(len(numbers))) or not numbers:
            raise ValueError(f"{self.source}: the layers {start}N are not numbered from 0 without a gap")
        return len(numbers)

    def _heads(self, width: int, what: str) -> int:
        if width not in HEADS:
            raise ValueError(
                f"{self.source}: the number of attention heads of its {what} of width {width} is unknown "
                f"(known: {', '.join(f'{n} for {w}' for w, n in HEADS.items())}): convert it where it was made"
            )
        return HEADS[width]


_KERNEL = "patch_embed.proj.weight"
_RELEASED = {BASE.vision.model: (768, 12, 12, 16), LARGE.vision.model: (1024, 24, 16, 16)}
"""Width, depth, heads and patch size of image encoders that are configured by name alone."""


def open_file(path: Path) -> Foreign:
    """Open a weight file of the 2022 release or LAVIS. FileNotFoundError or ValueError for anything else."""
    whole = read_file(path)
    theirs = unwrapped(whole, path)
    layout = recognise(set(theirs), str(path))
    if layout.program == "transformers":
        raise ValueError(f"{path} holds a transformers model: give its folder, with config.json and tokenizer")
    stored = whole.get(HEADS_KEY) if isinstance(whole, dict) else None
    heads = stored if isinstance(stored, dict) else {}
    sizes = [heads.get(name) for name in ("vision", "text")]
    vision, text = (value if isinstance(value, int) and value > 0 else None for value in sizes)
    return Foreign(str(path), layout, theirs, Settings(vision, text), _beside(path.parent), claimed(whole))


HEADS_KEY = "attention_heads"
"""Key next to "model" in a `.pth` exported by openblip: {"vision": heads, "text": heads}."""


def open_directory(config: Path, weights: Weights, tokenizer_at: Path, trained_on: tuple[str, ...] = ()) -> Foreign:
    """Open a transformers model by config.json, weights and its tokenizer's folder; errors as in `open_file`."""
    from blip.checkpoints.hugging_face import read_settings  # here, because transformers is slow to import

    settings = read_settings(config)
    theirs = weights.read(read_weights)
    layout = recognise(set(theirs), str(weights.path))
    if layout.program != "transformers":
        raise ValueError(f"{weights.path} does not hold a transformers model, as {config} claims: give the file itself")
    return Foreign(str(weights.path), layout, theirs, settings, _beside(tokenizer_at), trained_on)


def _beside(folder: Path) -> str | None:
    """The tokenizer in a folder, if there is one."""
    there = [folder / name for name in ("tokenizer.json", "vocab.txt") if (folder / name).is_file()]
    return str(there[0]) if there else None
