"""Weights of the 2022 release, of transformers and of timm <-> ours, by explicit tables of names.

A `Table` says for every tensor of a foreign layout what it is called here, that it is a second name of another tensor,
or why it is left out. A key that no table knows, a key that lacks and a shape that differs are errors, never skipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import timm
import torch
from torch import Tensor

from blip import atomic, hub
from blip.model import Blip
from blip.vision import resize_positions

if TYPE_CHECKING:
    from blip.objectives import Pretrain
    from blip.tasks.nlvr import Nlvr
    from blip.tasks.vqa import Vqa
    from blip.tokenizer import Tokenizer

State = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One tensor of ours and the tensors of theirs it is made of, stacked along the first dimension."""

    ours: str
    theirs: tuple[str, ...]
    change: Literal["transpose", "scalar"] | None = None
    """Theirs is the transpose of ours, or ours is a scalar and theirs a vector of length 1."""


@dataclass(frozen=True)
class Table:
    """What every key of one foreign layout is to us."""

    layout: str
    """What the layout is, for messages."""
    rows: list[Row]
    """The tensors that carry over."""
    copies: dict[str, str] = field(default_factory=dict)
    """Second names of a tensor in theirs -> its first name; must be equal where present."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Keys of theirs that are not read -> why; may be absent."""
    fresh: dict[str, str] = field(default_factory=dict)
    """Keys of ours that the layout does not have and that keep their initial values -> why."""

    def __add__(self, other: Table) -> Table:
        return Table(
            self.layout,
            self.rows + other.rows,
            self.copies | other.copies,
            self.dropped | other.dropped,
            self.fresh | other.fresh,
        )


# Reading and writing --------------------------------------------------------------------------------------------------


def from_theirs(table: Table, theirs: Mapping[str, Tensor], like: Mapping[str, Tensor], source: str) -> State:
    """Tensors of a foreign layout -> ours, with the shapes of `like` (our state dict).

    `source` names the file in messages. ValueError for an unknown key, a missing key, a second name that holds another
    tensor, a shape that differs, or a key of `like` that the table does not account for.
    """
    known = {name for row in table.rows for name in row.theirs} | set(table.copies) | set(table.dropped)
    _refuse(source, "does not know", sorted(set(theirs) - known), table, "is it a checkpoint of another task?")
    needed = list(dict.fromkeys(name for row in table.rows for name in row.theirs))
    _refuse(source, "needs", [name for name in needed if name not in theirs], table, "is the file complete?")
    for second, first in table.copies.items():
        if second in theirs and not torch.equal(theirs[second], theirs[first]):
            raise ValueError(
                f"{source}: {second} differs from {first}, but {table.layout} shares them: is it of another layout?"
            )
    unfilled = sorted(set(like) - {row.ours for row in table.rows} - set(table.fresh))
    if unfilled:
        raise ValueError(f"{table.layout} has nothing for the model's {_some(unfilled)}: build a model of its shape")
    return {row.ours: _read(row, theirs, like, source) for row in table.rows}


def _read(row: Row, theirs: Mapping[str, Tensor], like: Mapping[str, Tensor], source: str) -> Tensor:
    if row.ours not in like:
        raise ValueError(f"{source}: {row.theirs[0]} has no place {row.ours} in the model: build a model of its shape")
    parts = [theirs[name] for name in row.theirs]
    shape = list(_their_form(row, like[row.ours]).shape)
    if len(row.theirs) > 1:
        shape[0] //= len(row.theirs)
    for name, part in zip(row.theirs, parts, strict=True):
        if list(part.shape) != shape:
            raise ValueError(f"{source}: {name} is {_shape(part.shape)}, the model takes {_shape(shape)}: {_why(name)}")
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    if row.change == "transpose":
        return whole.t().contiguous()
    return whole.squeeze() if row.change == "scalar" else whole


def _their_form(row: Row, ours: Tensor) -> Tensor:
    if row.change == "transpose":
        return ours.t()
    return ours.reshape(1) if row.change == "scalar" else ours


def to_theirs(table: Table, ours: Mapping[str, Tensor]) -> State:
    """Our tensors -> the foreign layout, second names included; keys listed as dropped are not written.

    ValueError if one of ours that the table needs is missing.
    """
    missing = [row.ours for row in table.rows if row.ours not in ours]
    if missing:
        raise ValueError(f"{table.layout} needs {_some(missing)}, which the model does not have")
    theirs: State = {}
    for row in table.rows:
        whole = _their_form(row, ours[row.ours])
        theirs.update(zip(row.theirs, whole.chunk(len(row.theirs)) if len(row.theirs) > 1 else [whole], strict=True))
    theirs.update({second: theirs[first] for second, first in table.copies.items()})
    return {name: tensor.contiguous() for name, tensor in theirs.items()}


def _refuse(source: str, verb: str, names: list[str], table: Table, remedy: str) -> None:
    if names:
        raise ValueError(f"{source}: {table.layout} {verb} {_some(names)}: {remedy}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _shape(shape: Iterable[int]) -> str:
    return " x ".join(str(n) for n in shape) or "a scalar"


def _why(name: str) -> str:
    if name.endswith(("pos_embed", "embeddings.position_embedding")):
        return "set vision.image_size (and patch_size) to those of the checkpoint, and resize afterwards"
    if name.endswith(("word_embeddings.weight", "predictions.bias")):
        return "set text.vocab_size to that of the checkpoint and use its tokenizer"
    if name.endswith("queue"):
        return "set queue_size and embed_dim to those of the checkpoint"
    return "set the sizes in the model config to those of the checkpoint"


# The pieces that the layouts are made of ------------------------------------------------------------------------------

# timm's names, which are also those of the 2022 release -> those of transformers
_VIT = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
_VIT_BLOCK = {
    "norm1": "layer_norm1",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def _linear(ours: str, *theirs: str) -> list[Row]:
    return [Row(f"{ours}.{part}", tuple(f"{name}.{part}" for name in theirs)) for part in ("weight", "bias")]


def _vit_names(model: Blip) -> dict[str, str]:
    names = dict(_VIT)
    for i in range(len(model.vision.vit.blocks)):
        for ours, theirs in _VIT_BLOCK.items():
            names |= {f"blocks.{i}.{ours}.{p}": f"encoder.layers.{i}.{theirs}.{p}" for p in ("weight", "bias")}
    return names


def _vision_original(prefix: str, model: Blip) -> list[Row]:
    return [Row(f"vision.vit.{name}", (f"{prefix}.{name}",)) for name in _vit_names(model)]


def _vision_transformers(model: Blip) -> list[Row]:
    return [Row(f"vision.vit.{ours}", (f"vision_model.{theirs}",)) for ours, theirs in _vit_names(model).items()]


def _embeddings(bert: str) -> list[Row]:
    at = f"{bert}embeddings"
    return [
        Row("med.word.weight", (f"{at}.word_embeddings.weight",)),
        Row("med.position.weight", (f"{at}.position_embeddings.weight",)),
        *_linear("med.norm", f"{at}.LayerNorm"),
    ]


def _self_attention(kind: str, bert: str, layers: int) -> list[Row]:
    rows = []
    for i in range(layers):
        ours, theirs = f"med.blocks.{i}.{kind}", f"{bert}encoder.layer.{i}.attention"
        rows += _linear(f"{ours}.qkv", *(f"{theirs}.self.{name}" for name in ("query", "key", "value")))
        rows += _linear(f"{ours}.out", f"{theirs}.output.dense")
        rows += _linear(f"{ours}_norm", f"{theirs}.output.LayerNorm")
    return rows


def _cross_attention(bert: str, layers: int) -> list[Row]:
    rows = []
    for i in range(layers):
        ours, theirs = f"med.blocks.{i}.cross", f"{bert}encoder.layer.{i}.crossattention"
        rows += _linear(f"{ours}.query", f"{theirs}.self.query")
        rows += _linear(f"{ours}.kv", f"{theirs}.self.key", f"{theirs}.self.value")
        rows += _linear(f"{ours}.out", f"{theirs}.output.dense")
        rows += _linear(f"{ours}_norm", f"{theirs}.output.LayerNorm")
    return rows


def _feed_forward(bert: str, layers: int) -> list[Row]:
    rows = []
    for i in range(layers):
        ours, theirs = f"med.blocks.{i}", f"{bert}encoder.layer.{i}"
        rows += _linear(f"{ours}.up", f"{theirs}.intermediate.dense")
        rows += _linear(f"{ours}.down", f"{theirs}.output.dense")
        rows += _linear(f"{ours}.ffn_norm", f"{theirs}.output.LayerNorm")
    return rows


def _shared(bert: str, layers: int) -> list[Row]:
    """What encoder and decoder have in common (paper, section 3.1)."""
    return _embeddings(bert) + _cross_attention(bert, layers) + _feed_forward(bert, layers)


def _head(predictions: str, word: str) -> Table:
    rows = _linear("med.head_dense", f"{predictions}.transform.dense")
    rows += _linear("med.head_norm", f"{predictions}.transform.LayerNorm")
    rows.append(Row("med.head_bias", (f"{predictions}.bias",)))
    copies = {f"{predictions}.decoder.bias": f"{predictions}.bias", f"{predictions}.decoder.weight": word}
    return Table("", rows, copies)


def _position_ids(*bert: str) -> dict[str, str]:
    return {f"{at}embeddings.position_ids": "counts 0, 1, 2, ...; not a weight" for at in bert}


def _named(rows: Iterable[Row]) -> list[str]:
    return [row.ours for row in rows]


# The layouts ----------------------------------------------------------------------------------------------------------

_UNIMODAL = "not part of this checkpoint, which only writes captions"
_WRITING = "not part of this checkpoint, which does not write captions"
_TRAINING = "the momentum teacher and its queues: only training needs them"


def original_pretraining(model: Blip) -> Table:
    """The student of a pre-training checkpoint of the 2022 release <-> `Blip`; its teacher and queues are dropped."""
    layers, encoder, decoder = len(model.med.blocks), "text_encoder.", "text_decoder.bert."
    rows = _vision_original("visual_encoder", model) + _shared(encoder, layers)
    rows += _self_attention("text", encoder, layers) + _self_attention("causal", decoder, layers)
    rows += _contrast("") + _linear("match_head", "itm_head") + [Row("temperature", ("temp",))]
    copies = {name.replace(encoder, decoder, 1): name for row in _shared(encoder, layers) for name in row.theirs}
    dropped = _position_ids(encoder, decoder) | dict.fromkeys(_training_names(model), _TRAINING)
    head = _head("text_decoder.cls.predictions", f"{encoder}embeddings.word_embeddings.weight")
    return Table("a pre-training checkpoint of the 2022 release", rows, copies, dropped) + head


def original_training(objective: Pretrain) -> Table:
    """A pre-training checkpoint of the 2022 release <-> the state of `Pretrain`: student, teacher and queues."""
    student = original_pretraining(objective.model)
    rows = _under("model", student.rows) + _under("teacher.towers", _teacher_rows(objective.model)) + _queues()
    kept = {name for row in rows for name in row.theirs}
    dropped = {name: why for name, why in student.dropped.items() if name not in kept}
    unused = "the teacher reads texts alone, so that this was averaged but never used"
    dropped |= {name: unused for row in _teacher_cross(objective.model) for name in row.theirs}
    return Table(student.layout, rows, student.copies, dropped)


def original_captioning(model: Blip) -> Table:
    """A captioning checkpoint of the 2022 release <-> `Blip`, whose text encoder and matching head stay as they are."""
    return _captioning("a captioning checkpoint of the 2022 release", _vision_original("visual_encoder", model), model)


def transformers_captioning(model: Blip) -> Table:
    """transformers' `BlipForConditionalGeneration` <-> `Blip`."""
    return _captioning("transformers' BlipForConditionalGeneration", _vision_transformers(model), model)


def _captioning(layout: str, vision: list[Row], model: Blip) -> Table:
    layers, bert = len(model.med.blocks), "text_decoder.bert."
    rows = vision + _shared(bert, layers) + _self_attention("causal", bert, layers)
    head = _head("text_decoder.cls.predictions", f"{bert}embeddings.word_embeddings.weight")
    return Table(layout, rows, {}, _position_ids(bert), _fresh_encoder(layers)) + head


def original_matching(model: Blip) -> Table:
    """A retrieval or matching checkpoint of the 2022 release <-> `Blip`, whose decoder stays as it is."""
    table = _matching("a retrieval checkpoint of the 2022 release", _vision_original("visual_encoder", model), model)
    training = dict.fromkeys(_training_names(model), _TRAINING)
    return table + Table("", [Row("temperature", ("temp",))], dropped=training)


def transformers_matching(model: Blip) -> Table:
    """transformers' `BlipForImageTextRetrieval` <-> `Blip`."""
    table = _matching("transformers' BlipForImageTextRetrieval", _vision_transformers(model), model)
    return table + Table("", [], fresh={"temperature": "transformers keeps none"})


def _matching(layout: str, vision: list[Row], model: Blip) -> Table:
    layers, bert = len(model.med.blocks), "text_encoder."
    rows = vision + _shared(bert, layers) + _self_attention("text", bert, layers)
    rows += _contrast("") + _linear("match_head", "itm_head")
    return Table(layout, rows, {}, _position_ids(bert), _fresh_decoder(layers))


def original_vqa(model: Vqa) -> Table:
    """A question-answering checkpoint of the 2022 release <-> `Vqa`."""
    return _answering("a VQA checkpoint of the 2022 release", _vision_original("visual_encoder", model), model)


def transformers_vqa(model: Vqa) -> Table:
    """transformers' `BlipForQuestionAnswering` <-> `Vqa`."""
    return _answering("transformers' BlipForQuestionAnswering", _vision_transformers(model), model)


def _answering(layout: str, vision: list[Row], model: Vqa) -> Table:
    layers, encoder, decoder = len(model.answer.blocks), "text_encoder.", "text_decoder.bert."
    head = _head("text_decoder.cls.predictions", f"{decoder}embeddings.word_embeddings.weight")
    question = _shared(encoder, layers) + _self_attention("text", encoder, layers)
    answer = _shared(decoder, layers) + _self_attention("causal", decoder, layers) + head.rows
    rows = vision + _in_place_of_med("question", question) + _in_place_of_med("answer", answer)
    return Table(layout, rows, head.copies, _position_ids(encoder, decoder))


def original_nlvr(model: Nlvr) -> Table:
    """An NLVR2 checkpoint of the 2022 release <-> `Nlvr` of two images."""
    bert, layers = "text_encoder.", len(model.med.blocks)
    rows = _vision_original("visual_encoder", model) + _embeddings(bert)
    rows += _self_attention("text", bert, layers) + _feed_forward(bert, layers)
    for i, block in enumerate(model.med.blocks):
        theirs = f"{bert}encoder.layer.{i}.crossattention"
        for k in range(len(block.cross.of_image)):
            ours = f"med.blocks.{i}.cross.of_image.{k}"
            rows += _linear(f"{ours}.query", f"{theirs}.self{k}.query")
            rows += _linear(f"{ours}.kv", f"{theirs}.self{k}.key", f"{theirs}.self{k}.value")
            rows += _linear(f"{ours}.out", f"{theirs}.output.dense{k}")
        if block.cross.merges:
            rows += _linear(f"med.blocks.{i}.cross.merge", f"{theirs}.output.merge_layer")
        rows += _linear(f"med.blocks.{i}.cross_norm", f"{theirs}.output.LayerNorm")
    rows += _linear("head_dense", "cls_head.0") + _linear("head", "cls_head.2")
    return Table("an NLVR2 checkpoint of the 2022 release", rows, {}, _position_ids(bert))


def _in_place_of_med(name: str, rows: Iterable[Row]) -> list[Row]:
    """The rows of a `Med` for one that the model holds under another name."""
    return [replace(row, ours=name + row.ours.removeprefix("med")) for row in rows]


def _under(prefix: str, rows: Iterable[Row]) -> list[Row]:
    return [replace(row, ours=f"{prefix}.{row.ours}") for row in rows]


def _queues() -> list[Row]:
    rows = []
    for kind in ("image", "text"):
        rows.append(Row(f"{kind}_queue.features", (f"{kind}_queue",), "transpose"))
        rows.append(Row(f"{kind}_queue.next", ("queue_ptr",), "scalar"))
    return rows


def _contrast(suffix: str) -> list[Row]:
    return _linear("image_proj", f"vision_proj{suffix}") + _linear("text_proj", f"text_proj{suffix}")


def _fresh_encoder(layers: int) -> dict[str, str]:
    rows = _self_attention("text", "", layers) + _contrast("") + _linear("match_head", "")
    return dict.fromkeys([*_named(rows), "temperature"], _UNIMODAL)


def _fresh_decoder(layers: int) -> dict[str, str]:
    rows = _self_attention("causal", "", layers) + _head("", "").rows
    return dict.fromkeys(_named(rows), _WRITING)


def _teacher_rows(model: Blip) -> list[Row]:
    """The momentum encoders as far as they are used."""
    layers, encoder = len(model.med.blocks), "text_encoder_m."
    rows = _vision_original("visual_encoder_m", model) + _contrast("_m") + _embeddings(encoder)
    return rows + _self_attention("text", encoder, layers) + _feed_forward(encoder, layers)


def _teacher_cross(model: Blip) -> list[Row]:
    return _cross_attention("text_encoder_m.", len(model.med.blocks))


_QUEUES = ("image_queue", "text_queue", "queue_ptr", "ptr_queue", "idx_queue")


def _training_names(model: Blip) -> list[str]:
    names = [name for row in _teacher_rows(model) + _teacher_cross(model) for name in row.theirs]
    return [*names, *_position_ids("text_encoder_m."), *_QUEUES]


# Files ----------------------------------------------------------------------------------------------------------------


def read_weights(path: str | Path) -> State:
    """The tensors of a safetensors or `.pth` file; nothing in it is ever executed.

    A `.pth` may wrap them as {"model": ...} (the 2022 release, DeiT) or {"state_dict": ...}. FileNotFoundError, or
    ValueError for a file that holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: give the path of a .safetensors or .pth file")
    read = atomic.read_tensors if path.suffix == ".safetensors" else atomic.read_pickled_tensors
    return _unwrapped(read(path), path)


def _unwrapped(found: object, path: Path) -> State:
    for name in ("model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds no state dict: expected names of tensors, alone or under 'model'")
    return found


def load(model: torch.nn.Module, table: Table, path: str | Path) -> None:
    """Fill `model` from a foreign file by `table`; what the table calls fresh keeps its values.

    ValueError as `from_theirs` and `read_weights`; the model is unchanged then.
    """
    state = from_theirs(table, read_weights(path), model.state_dict(), str(path))
    model.load_state_dict(state, strict=False)  # from_theirs has accounted for every key


# Initial weights ------------------------------------------------------------------------------------------------------


def initial_vision(model: Blip, where: str | Path, option: str = "where") -> None:
    """Start the image encoder from a timm ViT: a local safetensors or `.pth` file, or a name that timm knows.

    Position embeddings are resized to the model's image size; a classification head is left out. `option` names the
    setting that takes a path, for messages. FileNotFoundError if nothing is local and the hub is out of reach;
    ValueError for weights that do not fit.
    """
    vit = model.vision.vit
    theirs = read_weights(where) if _is_local(where) else _timm_weights(str(where), option)
    like = vit.state_dict()
    patch = vit.patch_embed.patch_size[0]
    if "pos_embed" in theirs and "pos_embed" in like and theirs["pos_embed"].shape[1] != like["pos_embed"].shape[1]:
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        theirs = theirs | {"pos_embed": resize_positions(theirs["pos_embed"], model.vision.image_size, patch, prefix)}
    rows = [Row(name, (name,)) for name in like]
    head = {f"{at}.{part}": "classification head" for at in ("head", "pre_logits.fc") for part in ("weight", "bias")}
    vit.load_state_dict(from_theirs(Table("a timm ViT", rows, dropped=head), theirs, like, str(where)))


def _timm_weights(name: str, option: str) -> State:
    try:
        config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:  # no such model, or no such weights of it
        config = None
    if config is None or not config.hf_hub_id:
        raise ValueError(f"{option}: {name} is neither a file nor a timm model with weights; see timm.list_pretrained")
    file = hub.file(config.hf_hub_id, config.hf_hub_filename or "model.safetensors", option)
    options = {"num_classes": 0, "global_pool": "", "pretrained_cfg_overlay": {"file": str(file), "custom_load": False}}
    return timm.create_model(name, pretrained=True, **options).state_dict()


def initial_text(model: Blip, where: str | Path, tokenizer: Tokenizer, option: str = "where") -> None:
    """Start the text transformer from BERT: a local directory or weight file, or a name on the hub.

    Both self-attentions start from BERT's; the head from its masked-language head where there is one; cross-attention
    keeps its random values, and so do the rows of [DEC] and [ENC], which BERT lacks. As in the 2022 release BERT's
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
    """The weights and, where there is one, config.json."""
    if not _is_local(where):
        return hub.file(str(where), "model.safetensors", option), hub.file(str(where), "config.json", option)
    path = Path(where)
    if path.is_file():
        return path, None
    names = ("model.safetensors", "pytorch_model.bin")
    found = [path / name for name in names if (path / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{option}: no {' or '.join(names)} in {path}")
    settings = path / "config.json"
    return found[0], settings if settings.is_file() else None


def _check_bert(settings: dict, model: Blip, source: str) -> None:
    """What BERT's shapes do not tell and would go wrong in silence."""
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
    rows = _embeddings(bert) + _feed_forward(bert, layers)
    rows += _self_attention("text", bert, layers) + _self_attention("causal", bert, layers)
    dropped = _position_ids(bert) | {f"{bert}embeddings.token_type_embeddings.weight": "BLIP has one kind of segment"}
    for name in (f"{bert}pooler.dense", "cls.seq_relationship"):
        dropped |= {f"{name}.{part}": "sentence-level head" for part in ("weight", "bias")}
    fresh = dict.fromkeys(_named(_cross_attention(bert, layers)), "BERT looks at nothing")
    head = _head("cls.predictions", f"{bert}embeddings.word_embeddings.weight")
    if "cls.predictions.bias" in theirs:
        rows, copies = rows + head.rows, head.copies
    else:
        fresh, copies = fresh | dict.fromkeys(_named(head.rows), "this BERT has no word-predicting head"), {}
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


_FILES = (".safetensors", ".pth", ".pt", ".bin")


def _is_local(where: str | Path) -> bool:
    text = str(where)
    return isinstance(where, Path) or Path(where).exists() or text.startswith((".", "/", "~")) or text.endswith(_FILES)
