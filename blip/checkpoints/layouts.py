"""The layouts: tables of names for the checkpoints of the 2022 release (and LAVIS) and of transformers.

LAVIS took its modules and their names over from the release; what differs, the name of a queue's pointer and a teacher
that is not saved, stands in the same tables.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from blip.checkpoints.table import Table, TensorRow
from blip.models.blip import Blip

if TYPE_CHECKING:
    from blip.models.nlvr import Nlvr
    from blip.models.vqa import Vqa
    from blip.objectives.pretrain import Pretrain

# The pieces that the layouts are made of ------------------------------------------------------------------------------

# timm's names of the image encoder, which are also those of the 2022 release -> those of transformers
VIT = {
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


def linear(ours: str, *theirs: str) -> list[TensorRow]:
    """Weight and bias of ours, and of the one or several of theirs that are stacked in it."""
    return [TensorRow(f"{ours}.{part}", tuple(f"{name}.{part}" for name in theirs)) for part in ("weight", "bias")]


def vit_names(model: Blip) -> dict[str, str]:
    """timm's names of the image encoder's tensors -> transformers'."""
    names = dict(VIT)
    for i in range(len(model.vision.vit.blocks)):
        for ours, theirs in _VIT_BLOCK.items():
            names |= {f"blocks.{i}.{ours}.{p}": f"encoder.layers.{i}.{theirs}.{p}" for p in ("weight", "bias")}
    return names


def vision_original(prefix: str, model: Blip) -> list[TensorRow]:
    """The image encoder in the names of the 2022 release."""
    return [TensorRow(f"vision.vit.{name}", (f"{prefix}.{name}",)) for name in vit_names(model)]


def vision_transformers(model: Blip) -> list[TensorRow]:
    """The image encoder in transformers' names."""
    return [TensorRow(f"vision.vit.{ours}", (f"vision_model.{theirs}",)) for ours, theirs in vit_names(model).items()]


def embeddings(bert: str) -> list[TensorRow]:
    """The embeddings of words and positions; `bert` is what BERT's names stand under, here and below."""
    at = f"{bert}embeddings"
    return [
        TensorRow("med.word.weight", (f"{at}.word_embeddings.weight",)),
        TensorRow("med.position.weight", (f"{at}.position_embeddings.weight",)),
        *linear("med.norm", f"{at}.LayerNorm"),
    ]


def self_attention(kind: str, bert: str, layers: int) -> list[TensorRow]:
    """One of the two self-attentions, `text` or `causal`."""
    rows = []
    for i in range(layers):
        ours, theirs = f"med.blocks.{i}.{kind}", f"{bert}encoder.layer.{i}.attention"
        rows += linear(f"{ours}.qkv", *(f"{theirs}.self.{name}" for name in ("query", "key", "value")))
        rows += linear(f"{ours}.out", f"{theirs}.output.dense")
        rows += linear(f"{ours}_norm", f"{theirs}.output.LayerNorm")
    return rows


def cross_attention(bert: str, layers: int) -> list[TensorRow]:
    """Cross-attention of the text layers, to images or to questions."""
    rows = []
    for i in range(layers):
        ours, theirs = f"med.blocks.{i}.cross", f"{bert}encoder.layer.{i}.crossattention"
        rows += linear(f"{ours}.query", f"{theirs}.self.query")
        rows += linear(f"{ours}.kv", f"{theirs}.self.key", f"{theirs}.self.value")
        rows += linear(f"{ours}.out", f"{theirs}.output.dense")
        rows += linear(f"{ours}_norm", f"{theirs}.output.LayerNorm")
    return rows


def feed_forward(bert: str, layers: int) -> list[TensorRow]:
    """The feed-forward of every layer."""
    rows = []
    for i in range(layers):
        ours, theirs = f"med.blocks.{i}", f"{bert}encoder.layer.{i}"
        rows += linear(f"{ours}.up", f"{theirs}.intermediate.dense")
        rows += linear(f"{ours}.down", f"{theirs}.output.dense")
        rows += linear(f"{ours}.ffn_norm", f"{theirs}.output.LayerNorm")
    return rows


def shared(bert: str, layers: int) -> list[TensorRow]:
    """Layers that encoder and decoder share (paper, section 3.1)."""
    return embeddings(bert) + cross_attention(bert, layers) + feed_forward(bert, layers)


def head(predictions: str, word: str) -> Table:
    """Prediction head; its last matrix is the word embedding, which is called `word`."""
    rows = linear("med.head_dense", f"{predictions}.transform.dense")
    rows += linear("med.head_norm", f"{predictions}.transform.LayerNorm")
    rows.append(TensorRow("med.head_bias", (f"{predictions}.bias",)))
    copies = {f"{predictions}.decoder.bias": f"{predictions}.bias", f"{predictions}.decoder.weight": word}
    return Table("", rows, copies)


def position_ids(*bert: str) -> dict[str, str]:
    """The buffers that count positions."""
    return {f"{at}embeddings.position_ids": "counts 0, 1, 2, ...; not a weight" for at in bert}


def named(rows: Iterable[TensorRow]) -> list[str]:
    """Our names."""
    return [row.ours for row in rows]


# The layouts ----------------------------------------------------------------------------------------------------------

_UNIMODAL = "not part of this checkpoint, which only writes captions"
_WRITING = "not part of this checkpoint, which does not write captions"
_TRAINING = "the momentum teacher and its queues: only training needs them"


def original_pretraining(model: Blip) -> Table:
    """The student of a pre-training checkpoint of the 2022 release <-> `Blip`; its teacher and queues are dropped."""
    layers, encoder, decoder = len(model.med.blocks), "text_encoder.", "text_decoder.bert."
    rows = vision_original("visual_encoder", model) + shared(encoder, layers)
    rows += self_attention("text", encoder, layers) + self_attention("causal", decoder, layers)
    rows += _contrast("") + linear("match_head", "itm_head") + [TensorRow("temperature", ("temp",))]
    copies = {name.replace(encoder, decoder, 1): name for row in shared(encoder, layers) for name in row.theirs}
    dropped = position_ids(encoder, decoder) | dict.fromkeys(_training_names(model), _TRAINING)
    last = head("text_decoder.cls.predictions", f"{encoder}embeddings.word_embeddings.weight")
    return Table("a pre-training checkpoint of the 2022 release", rows, copies, dropped) + last


def original_training(objective: Pretrain) -> Table:
    """A pre-training checkpoint of the 2022 release <-> the state of `Pretrain`: student, teacher and queues."""
    student = original_pretraining(objective.model)
    rows = _under("model", student.rows) + _under("teacher.towers", _teacher_rows(objective.model)) + _queues()
    used = {name for row in rows for name in row.theirs}
    dropped = {name: why for name, why in student.dropped.items() if name not in used}
    unused = "the teacher reads texts alone, so that this was averaged but never used"
    dropped |= {name: unused for row in _teacher_cross(objective.model) for name in row.theirs}
    return Table(student.layout, rows, student.copies, dropped)


def original_captioning(model: Blip) -> Table:
    """A captioning checkpoint of the 2022 release <-> `Blip`, whose text encoder and matching head stay as they are."""
    return _captioning("a captioning checkpoint of the 2022 release", vision_original("visual_encoder", model), model)


def transformers_captioning(model: Blip) -> Table:
    """transformers' `BlipForConditionalGeneration` <-> `Blip`."""
    return _captioning("transformers' BlipForConditionalGeneration", vision_transformers(model), model)


def _captioning(layout: str, vision: list[TensorRow], model: Blip) -> Table:
    layers, bert = len(model.med.blocks), "text_decoder.bert."
    rows = vision + shared(bert, layers) + self_attention("causal", bert, layers)
    last = head("text_decoder.cls.predictions", f"{bert}embeddings.word_embeddings.weight")
    return Table(layout, rows, {}, position_ids(bert), _fresh_encoder(layers)) + last


def original_matching(model: Blip) -> Table:
    """A retrieval checkpoint of the 2022 release <-> `Blip`, whose decoder stays as it is."""
    table = _matching("a retrieval checkpoint of the 2022 release", vision_original("visual_encoder", model), model)
    training = dict.fromkeys(_training_names(model), _TRAINING)
    return table + Table("", [TensorRow("temperature", ("temp",))], dropped=training)


def original_bare_matching(model: Blip) -> Table:
    """The state dict of the release's or LAVIS's class for matching, without temperature and queues <-> `Blip`."""
    table = _matching("a matching checkpoint of the 2022 release", vision_original("visual_encoder", model), model)
    return table + Table("", [], fresh={"temperature": "not part of this checkpoint; no rank depends on it"})


def transformers_matching(model: Blip) -> Table:
    """transformers' `BlipForImageTextRetrieval` <-> `Blip`."""
    table = _matching("transformers' BlipForImageTextRetrieval", vision_transformers(model), model)
    return table + Table("", [], fresh={"temperature": "transformers keeps none; no rank depends on it"})


def _matching(layout: str, vision: list[TensorRow], model: Blip) -> Table:
    layers, bert = len(model.med.blocks), "text_encoder."
    rows = vision + shared(bert, layers) + self_attention("text", bert, layers)
    rows += _contrast("") + linear("match_head", "itm_head")
    return Table(layout, rows, {}, position_ids(bert), _fresh_decoder(layers))


def original_vqa(model: Vqa) -> Table:
    """A question-answering checkpoint of the 2022 release <-> `Vqa`."""
    return _answering("a VQA checkpoint of the 2022 release", vision_original("visual_encoder", model), model)


def transformers_vqa(model: Vqa) -> Table:
    """transformers' `BlipForQuestionAnswering` <-> `Vqa`."""
    return _answering("transformers' BlipForQuestionAnswering", vision_transformers(model), model)


def _answering(layout: str, vision: list[TensorRow], model: Vqa) -> Table:
    layers, encoder, decoder = len(model.answer.blocks), "text_encoder.", "text_decoder.bert."
    last = head("text_decoder.cls.predictions", f"{decoder}embeddings.word_embeddings.weight")
    question = shared(encoder, layers) + self_attention("text", encoder, layers)
    answer = shared(decoder, layers) + self_attention("causal", decoder, layers) + last.rows
    rows = vision + _in_place_of_med("question", question) + _in_place_of_med("answer", answer)
    return Table(layout, rows, last.copies, position_ids(encoder, decoder))


def original_nlvr(model: Nlvr) -> Table:
    """An NLVR2 checkpoint of the 2022 release <-> `Nlvr` of two images."""
    bert, layers = "text_encoder.", len(model.med.blocks)
    rows = vision_original("visual_encoder", model) + embeddings(bert)
    rows += self_attention("text", bert, layers) + feed_forward(bert, layers)
    for i, block in enumerate(model.med.blocks):
        theirs = f"{bert}encoder.layer.{i}.crossattention"
        for k in range(len(block.cross.of_image)):
            ours = f"med.blocks.{i}.cross.of_image.{k}"
            rows += linear(f"{ours}.query", f"{theirs}.self{k}.query")
            rows += linear(f"{ours}.kv", f"{theirs}.self{k}.key", f"{theirs}.self{k}.value")
            rows += linear(f"{ours}.out", f"{theirs}.output.dense{k}")
        if block.cross.merges:
            rows += linear(f"med.blocks.{i}.cross.merge", f"{theirs}.output.merge_layer")
        rows += linear(f"med.blocks.{i}.cross_norm", f"{theirs}.output.LayerNorm")
    rows += linear("head_dense", "cls_head.0") + linear("head", "cls_head.2")
    return Table("an NLVR2 checkpoint of the 2022 release", rows, {}, position_ids(bert))


def _in_place_of_med(name: str, rows: Iterable[TensorRow]) -> list[TensorRow]:
    """The rows of a `Med` for one that the model holds under another name."""
    return [replace(row, ours=name + row.ours.removeprefix("med")) for row in rows]


def _under(prefix: str, rows: Iterable[TensorRow]) -> list[TensorRow]:
    return [replace(row, ours=f"{prefix}.{row.ours}") for row in rows]


def _queues() -> list[TensorRow]:
    rows = []
    for kind in ("image", "text"):
        rows.append(TensorRow(f"{kind}_queue.features", (f"{kind}_queue",), "transpose"))
        rows.append(TensorRow(f"{kind}_queue.next", ("queue_ptr",), "scalar"))
    return rows


def _contrast(suffix: str) -> list[TensorRow]:
    return linear("image_proj", f"vision_proj{suffix}") + linear("text_proj", f"text_proj{suffix}")


def _fresh_encoder(layers: int) -> dict[str, str]:
    rows = self_attention("text", "", layers) + _contrast("") + linear("match_head", "")
    return dict.fromkeys([*named(rows), "temperature"], _UNIMODAL)


def _fresh_decoder(layers: int) -> dict[str, str]:
    rows = self_attention("causal", "", layers) + head("", "").rows
    return dict.fromkeys(named(rows), _WRITING)


def _teacher_rows(model: Blip) -> list[TensorRow]:
    """The momentum encoders as far as they are used."""
    layers, encoder = len(model.med.blocks), "text_encoder_m."
    rows = vision_original("visual_encoder_m", model) + _contrast("_m") + embeddings(encoder)
    return rows + self_attention("text", encoder, layers) + feed_forward(encoder, layers)


def _teacher_cross(model: Blip) -> list[TensorRow]:
    return cross_attention("text_encoder_m.", len(model.med.blocks))


def teacher_copies(model: Blip) -> dict[str, str]:
    """The original's names of the momentum teacher's tensors -> the student's, which a teacher begins with.

    Its classes for pre-training and retrieval ask for the first of them when they read a file.
    """
    return {name: name.replace("_m.", ".", 1) for name in _teacher_names(model)}


_QUEUES = ("image_queue", "text_queue", "queue_ptr", "ptr_queue", "idx_queue")


def _teacher_names(model: Blip) -> list[str]:
    return [name for row in _teacher_rows(model) + _teacher_cross(model) for name in row.theirs]


def _training_names(model: Blip) -> list[str]:
    return [*_teacher_names(model), *position_ids("text_encoder_m."), *_QUEUES]
