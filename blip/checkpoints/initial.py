"""First weights of a model that is yet to be trained: the image encoder's from a timm ViT, the text's from BERT."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from blip import hub
from blip.checkpoints.layouts import (
    cross_attention,
    embeddings,
    feed_forward,
    head,
    named,
    position_ids,
    self_attention,
)
from blip.checkpoints.table import State, Table, TensorRow, from_theirs
from blip.checkpoints.weights import is_local, read_weights
from blip.models.blip import Blip
from blip.nn.vision import fit_positions
from blip.tokenizer import Tokenizer

_POOLS = ("head", "pre_logits.fc", "fc_norm")
_PLAIN = re.compile(r"(?:vit|deit)_(tiny|small|base|large)_patch(8|16|32)_(?:224|384)")


def architecture(weights: str) -> str | None:
    """The timm architecture of named weights, for `VisionConfig.model`; None for a file.

    DeiT's plain ViTs, and those of other image sizes, get the name used in `blip.models.presets`.
    """
    if is_local(weights):
        return None
    name = weights.partition(".")[0]
    plain = _PLAIN.fullmatch(name)
    return f"vit_{plain[1]}_patch{plain[2]}_224" if plain else name


def initial_vision(model: Blip, where: str | Path, option: str = "where") -> None:
    """Initialize the image encoder from a timm ViT: a local safetensors or `.pth` file, or a name known to timm.

    The model must have its `architecture`. Position embeddings are interpolated to the model's image size; a
    classification head is left out. `option` names the setting that takes a path, for messages. FileNotFoundError if
    nothing is local and the hub is out of reach; ValueError for weights that do not fit.
    """
    vit, vision = model.vision.vit, model.config.vision
    theirs = read_weights(where) if is_local(where) else _timm_weights(str(where), option, vision.image_size)
    like = vit.state_dict()
    if "pos_embed" in like and "pos_embed" in theirs and theirs["pos_embed"].ndim == 3:
        theirs = theirs | {"pos_embed": fit_positions(vit, theirs["pos_embed"], vision.image_size)}
    rows = [TensorRow(name, (name,)) for name in like]
    dropped = {f"{at}.{part}": "pools and classifies" for at in _POOLS for part in ("weight", "bias")}
    table = Table(f"the image encoder {vision.model} of timm", rows, dropped=dropped)
    vit.load_state_dict(from_theirs(table, theirs, like, str(where)))


def _timm_weights(name: str, option: str, image_size: int) -> State:
    import timm

    try:
        config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:  # no such model, or no such weights of it
        config = None
    if config is None or not config.hf_hub_id:
        raise ValueError(f"{option}: {name} is neither a file nor a timm model with weights; see timm.list_pretrained")
    file = hub.file(config.hf_hub_id, config.hf_hub_filename or "model.safetensors", option)
    options = {"num_classes": 0, "global_pool": "", "pretrained_cfg_overlay": {"file": str(file), "custom_load": False}}
    if name.startswith("beit"):  # relative positions in every layer, which timm can interpolate
        options["img_size"] = image_size
    try:
        return timm.create_model(name, pretrained=True, **options).state_dict()
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{option}: timm cannot read the weights of {name} ({reason}): give the path of a file"
        ) from None


def initial_text(model: Blip, where: str | Path, tokenizer: Tokenizer, option: str = "where") -> None:
    """Initialize the text transformer from BERT: a local directory or weight file, or a name on the hub.

    Both self-attentions start from BERT's, and the head from its masked-language head if it has one; cross-attention
    and the rows of [DEC] and [ENC], which BERT lacks, keep their random values. As in the 2022 release BERT's
    token-type embedding is left out. `option` as in `initial_vision`. FileNotFoundError if nothing is local and the
    hub is out of reach; ValueError for weights, sizes or a vocabulary that do not fit.
    """
    tokenizer.check(model.config.text)
    weights, settings = _bert_files(where, option)
    if settings is not None:
        _check_bert(json.loads(settings.read_text()), model, str(settings))
    theirs = {_modern(name): tensor for name, tensor in read_weights(weights).items()}
    like = {f"med.{name}": tensor for name, tensor in model.med.state_dict().items()}
    table = _bert(model, theirs)
    theirs = _fit_bert(theirs, like, table, str(where))
    state = from_theirs(table, theirs, like, str(where))
    state = {name.removeprefix("med."): tensor for name, tensor in state.items()}
    model.med.load_state_dict(state, strict=False)  # from_theirs has accounted for every key


def _bert_files(where: str | Path, option: str) -> tuple[Path, Path | None]:
    """The weights and, if there is one, config.json."""
    if not is_local(where):
        return hub.file(str(where), "model.safetensors", option), hub.file(str(where), "config.json", option)
    path = Path(where)
    if path.is_file():
        return path, None
    names = ("model.safetensors", "pytorch_model.bin")
    files = [path / name for name in names if (path / name).is_file()]
    if not files:
        raise FileNotFoundError(f"{option}: no {' or '.join(names)} in {path}")
    settings = path / "config.json"
    return files[0], settings if settings.is_file() else None


def _check_bert(settings: dict, model: Blip, source: str) -> None:
    """Refuse settings of BERT that its shapes do not show and that would silently compute something else."""
    for key, ours in (("num_attention_heads", model.config.text.heads), ("hidden_act", "gelu")):
        if settings.get(key, ours) != ours:
            raise ValueError(f"{source}: {key} is {settings[key]}, the model has {ours}: change the model config")


def _modern(name: str) -> str:
    for old, new in ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")):
        name = name.removesuffix(old) + new if name.endswith(old) else name
    return name


def _bert(model: Blip, theirs: Mapping[str, Tensor]) -> Table:
    layers = len(model.med.blocks)
    bert = "bert." if any(name.startswith("bert.") for name in theirs) else ""
    rows = embeddings(bert) + feed_forward(bert, layers)
    rows += self_attention("text", bert, layers) + self_attention("causal", bert, layers)
    dropped = position_ids(bert) | {f"{bert}embeddings.token_type_embeddings.weight": "BLIP has one kind of segment"}
    for name in (f"{bert}pooler.dense", "cls.seq_relationship"):
        dropped |= {f"{name}.{part}": "sentence-level head" for part in ("weight", "bias")}
    fresh = dict.fromkeys(named(cross_attention(bert, layers)), "BERT has no cross-attention")
    last = head("cls.predictions", f"{bert}embeddings.word_embeddings.weight")
    if "cls.predictions.bias" in theirs:
        rows, copies = rows + last.rows, last.copies
    else:
        fresh, copies = fresh | dict.fromkeys(named(last.rows), "this BERT has no word-predicting head"), {}
    return Table("BERT", rows, copies, dropped, fresh)


def _fit_bert(theirs: State, like: Mapping[str, Tensor], table: Table, source: str) -> State:
    """Append rows for [DEC] and [ENC] with the model's own initial values, and leave out positions beyond its table."""
    fitted = {name: tensor for name, tensor in theirs.items() if name not in table.copies}
    for row in table.rows:
        name, ours = row.theirs[0], like.get(row.ours)
        if name not in theirs or ours is None:
            continue
        if row.ours in ("med.word.weight", "med.head_bias"):
            have, want = len(theirs[name]), len(ours)
            if want - have not in (0, 2):
                raise ValueError(
                    f"{source}: {name} has {have} word pieces and the model {want}, which is not [DEC] and [ENC] more: "
                    "use the tokenizer that belongs to this BERT"
                )
            fitted[name] = torch.cat([theirs[name], ours[have:].to(theirs[name].dtype)])
        elif row.ours == "med.position.weight":
            fitted[name] = theirs[name][: len(ours)]
    return fitted
