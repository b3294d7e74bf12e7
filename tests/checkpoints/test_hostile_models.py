"""Model folders that nobody vouches for: refused in a line that names file and field, at no cost, without a call."""

import dataclasses
import json
import resource
import shutil
import socket
import struct
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import blip
from blip.app import cli
from blip.models.blip import Blip
from blip.models.nlvr import Nlvr
from blip.models.presets import TINY
from blip.models.settings import NlvrModelConfig
from blip.nn.settings import TextConfig, VisionConfig
from blip.tensors import read_tensors
from blip.tokenizer import Tokenizer

SECONDS, BYTES = 2.0, 200 << 20
"""What refusing a folder may take, far above what it does and far below what its numbers ask for."""
WORDS = Tokenizer.load("world")
CONFIG = dataclasses.replace(
    TINY,
    vision=VisionConfig("vit_tiny_patch16_224", image_size=32, patch_size=8, width=24, depth=1, heads=2),
    text=WORDS.text_config(TextConfig(width=16, layers=1, heads=2, hidden=32, max_positions=32)),
    embed_dim=8,
)
NLVR = NlvrModelConfig.of(CONFIG, images=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    blip.save_pretrained(Blip(CONFIG), WORDS, folder / "blip")
    blip.save_pretrained(Nlvr(NLVR), WORDS, folder / "nlvr")
    return folder


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Addresses that were asked for; each try fails."""
    names = []

    def refuse(*args, **_):
        names.append(args[-1])
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    return names


# Edits ----------------------------------------------------------------------------------------------------------------


def config(field, value):
    """A field of config.json's `model`, such as `vision.width`."""

    def edit(folder):
        values = json.loads((folder / "config.json").read_text())
        *parts, name = field.split(".")
        place = values["model"]
        for part in parts:
            place = place[part]
        place[name] = value
        (folder / "config.json").write_text(json.dumps(values))

    return edit


def text(name, content):
    def edit(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return edit


def weights(change):
    def edit(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return edit


def tokenizer(change):
    def edit(folder):
        values = json.loads((folder / "tokenizer.json").read_text())
        change(values)
        (folder / "tokenizer.json").write_text(json.dumps(values))

    return edit


def filled(name, value):
    return weights(lambda state: state[name].view(-1)[:1].fill_(value))


def cast(name, dtype):
    return weights(lambda state: state.update({name: state[name].to(dtype)}))


def header(content: bytes, rest: bytes = b""):
    return text("model.safetensors", struct.pack("<Q", len(content)) + content + rest)


def empties(count):
    return header(
        json.dumps({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(count)}).encode()
    )


HUGE, NAN, DEEP = 10**12, float("nan"), '{"a":' * 100_000
WRONG = ["x", None, True, 0, -1, 1.5, [1], {}, HUGE, 10**400]
"""For a whole number that must be given."""
CASES = {}
for field in ("vision.image_size", "text.width", "text.layers", "text.heads", "text.hidden", "text.max_positions",
              "text.vocab_size", "embed_dim"):  # fmt: skip
    CASES |= {f"{field} {str(value)[:14]}": (config(field, value), f"config.json: {field} must") for value in WRONG}
for field in ("vision.patch_size", "vision.width", "vision.depth", "vision.heads", "vision.hidden"):
    wrong = [value for value in WRONG if value is not None]
    CASES |= {f"{field} {str(value)[:14]}": (config(field, value), f"config.json: {field} must") for value in wrong}
for field in ("text.pad_id", "text.cls_id", "text.sep_id", "text.dec_id", "text.enc_id"):
    wrong = ["x", None, True, -1, HUGE]
    CASES |= {f"{field} {value}": (config(field, value), f"config.json: {field} must") for value in wrong}
for field in ("temperature", "text.dropout", "text.attention_dropout", "text.norm_eps", "vision.drop_path",
              "vision.patch_drop", "text.init_std", "vision.norm_eps", "vision.init_gain"):  # fmt: skip
    wrong = ["x", True, NAN, float("inf"), -1, 10**400, []]
    CASES |= {f"{field} {str(value)[:14]}": (config(field, value), f"config.json: {field} must") for value in wrong}
PLACES = ["hf-hub:evil/repo", "hf_hub:evil/repo", "HF-HUB:evil/repo", "timm/evil", "local-dir:/tmp", "../x", "/etc"]
PLACES += ["https://evil.example/x", "hf-hub:../..", "vit_base_patch16_224.evil", "vit_tiny_patch16_224.augreg_in21k"]
PLACES += ["C:\\x", "", "a" * 200, "vit_tiny_patch16_224\n", "evil/repo@main", "file:x", None, 7, ["x"]]
for place in PLACES:
    CASES[f"vision.model {str(place)[:30]!r}"] = (config("vision.model", place), "config.json: vision.model must")
CASES |= {
    "an architecture of nobody": (config("vision.model", "vit_of_nobody"), "config.json: vision.model vit_of_nobody"),
    "a model that is no ViT": (config("vision.model", "resnet18"), "config.json: vision.model resnet18"),
    "temperature 0": (config("temperature", 0), "config.json: temperature must"),
    "temperature null": (config("temperature", None), "config.json: temperature must"),
    "heads that do not divide, image": (config("vision.heads", 5), "config.json: vision.width 24"),
    "heads that do not divide, text": (config("text.heads", 3), "config.json: text width 16"),
    "drop_path 1": (config("vision.drop_path", 1), "config.json: drop_path must"),
    "parts": (config("parts", "most"), "config.json: parts must"),
    "parts of a list": (config("parts", ["all"]), "config.json: parts must"),
    "checkpoint": (config("vision.checkpoint", 1), "config.json: vision.checkpoint must"),
    "vision of a list": (config("vision", []), "config.json: vision config"),
    "text of nothing": (config("text", None), "config.json: text config"),
    "a key more": (config("vision.auto_map", "x"), "config.json: vision config has unknown keys"),
    "within range, more than the weights": (config("vision.width", 16384), "model.safetensors does not fit"),
    "a feed-forward of another width": (config("vision.hidden", 131072), "model.safetensors does not fit"),
    "positions": (config("text.max_positions", 1 << 20), "model.safetensors does not fit"),
    "pixels": (config("vision.image_size", 8192), "model.safetensors does not fit"),
    "a patch of a pixel": (config("vision.patch_size", 1), "model.safetensors does not fit"),
    "depth": (config("vision.depth", 128), "config.json: vision.depth is 128, model.safetensors has 1"),
    "layers": (config("text.layers", 128), "config.json: text.layers is 128, model.safetensors has 1"),
    "a larger architecture": (config("vision.model", "vit_giant_patch14_224"), "model.safetensors does not fit"),
    "a vocabulary of others": (config("text.vocab_size", 1 << 24), "does not fit the model"),
    "config.json nested": (text("config.json", DEEP), "config.json is not JSON"),
    "config.json nested in lists": (text("config.json", "[" * 100_000), "config.json is not JSON"),
    "config.json of digits": (text("config.json", '{"version": ' + "9" * 10_000 + "}"), "config.json is not JSON"),
    "config.json too large": (text("config.json", b" " * (17 << 20)), "config.json has"),
    "config.json binary": (text("config.json", b"\xff\x00\xfe"), "config.json is not JSON"),
    "config.json of null": (text("config.json", "null"), "config.json does not say"),
    "task of a list": (text("config.json", '{"format": "openblip", "version": 1, "task": []}'), "json is of task"),
    "NaN": (filled("image_proj.weight", NAN), "model.safetensors: image_proj.weight holds NaN"),
    "infinity": (filled("med.word.weight", float("inf")), "model.safetensors: med.word.weight holds NaN or infinity"),
    "minus infinity": (filled("vision.vit.norm.bias", -float("inf")), "vision.vit.norm.bias holds NaN or infinity"),
    "NaN of a scalar": (filled("temperature", NAN), "model.safetensors: temperature holds NaN"),
    "a learned temperature of 0": (filled("temperature", 0.0), "model.safetensors: temperature is 0"),
    "a negative temperature": (filled("temperature", -0.1), "model.safetensors: temperature is -0.1"),
    "NaN of half precision": (
        weights(lambda s: s.update({"match_head.bias": torch.tensor([0, NAN]).half()})), "match_head.bias holds NaN"
    ),
    "one position": (
        weights(lambda s: s.update({"vision.vit.pos_embed": torch.zeros(1, 1, 24)})), "vision.vit.pos_embed (1, 1, 24)"
    ),
    "no positions": (
        weights(lambda s: s.update({"vision.vit.pos_embed": torch.zeros(1, 0, 24)})), "vision.vit.pos_embed (1, 0, 24)"
    ),
    "positions of a larger image": (
        weights(lambda s: s.update({"vision.vit.pos_embed": torch.zeros(1, 26, 24)})), "pos_embed (1, 26, 24)"
    ),
    "a tensor turned": (
        weights(lambda s: s.update({"image_proj.weight": torch.zeros(24, 8)})), "image_proj.weight (24, 8) for (8, 24)"
    ),
    "a name of pages": (weights(lambda s: s.update({"x" * 100_000: torch.zeros(1)})), "1 unexpected: xxx"),
    "many tensors": (empties(200_000), "model.safetensors has a header of 13,288,890 bytes"),
    "tensors without content": (empties(30_000), "not a readable safetensors file (it names 30,000 tensors"),
    "no layers": (empties(1000), "config.json: vision.depth is 1, model.safetensors has 0 layers"),
    "a header nested": (header(DEEP.encode()), "model.safetensors is not a readable safetensors file"),
    "a header of a list": (header(b"[]"), "model.safetensors is not a readable safetensors file"),
    "a header of no offsets": (header(b'{"a": {"dtype": "F32", "shape": [1]}}'), "not a readable safetensors file"),
    "a header of text sizes": (
        header(b'{"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}', b"1234"), "not a readable"
    ),
    "a shape that claims more": (
        header(b'{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4]}}', b"1234"), "does not have 4"
    ),
    "an unknown type": (
        header(b'{"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}  ', b"1234"), "a is of type F4"
    ),
    "tokenizer.json nested": (text("tokenizer.json", DEEP), "tokenizer.json"),
    "tokenizer.json of a list": (text("tokenizer.json", "[]"), "tokenizer.json is not a tokenizer.json"),
    "tokenizer.json binary": (text("tokenizer.json", b"\xff\xfe"), "tokenizer.json is not a tokenizer.json"),
    "tokenizer.json too large": (text("tokenizer.json", b" " * (33 << 20)), "tokenizer.json has"),
}  # fmt: skip
for name, dtype in {"int64": torch.int64, "uint8": torch.uint8, "bool": torch.bool, "complex64": torch.complex64,
                    "float8_e4m3fn": torch.float8_e4m3fn}.items():  # fmt: skip
    other_type = f"1 of another type: image_proj.bias {name} for float32"
    CASES[f"weights of {name}"] = (cast("image_proj.bias", dtype), other_type)


def normal(**step):
    return tokenizer(lambda file: file.update(normalizer=step))


def vocab(**ids):
    return tokenizer(lambda file: file["model"]["vocab"].update(ids))


def model(**values):
    return tokenizer(lambda file: file["model"].update(values))


REGEX = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}
BLOW = {"type": "Replace", "pattern": {"String": ""}, "content": "x" * 1000}
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
STRETCH = {
    "strategy": {"Fixed": 10**9},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
}
TOKENIZERS = {
    "an id beyond the vocabulary": (vocab(a=744), "the ids of its 744 pieces must be 0 to 743"),
    "a hole": (vocab(a=743), "the ids of its"),
    "an id of 4e9": (vocab(a=4_000_000_000), "pieces cannot have the id 4000000000"),
    "an id of 1e30": (vocab(a=10**30), "pieces cannot have the id"),
    "a negative id": (vocab(a=-1), "pieces cannot have the id -1"),
    "an id of text": (vocab(a="7"), "pieces cannot have the id 7"),
    "an id twice": (vocab(a=7), "ids of its"),
    "a vocabulary of a list": (model(vocab=[]), "tokenizer.json"),
    "no vocabulary": (model(vocab={}), "tokenizer.json"),
    "a regular expression": (normal(**REGEX), "its normalizer has a part of type 'Replace'"),
    "a replacement that grows": (normal(**BLOW), "its normalizer has a part of type 'Replace'"),
    "one inside a sequence": (
        normal(type="Sequence", normalizers=[{"type": "Sequence", "normalizers": [BLOW]}]), "type 'Replace'"
    ),
    "Precompiled": (normal(type="Precompiled", precompiled_charsmap=""), "a part of type 'Precompiled'"),
    "Prepend": (normal(type="Prepend", prepend="x" * 10**6), "a part of type 'Prepend'"),
    "a normalizer without a type": (normal(pattern="x"), "tokenizer.json is not a tokenizer.json"),
    "a normalizer of a list": (tokenizer(lambda file: file.update(normalizer=[1])), "is not a tokenizer.json"),
    "many normalizers": (
        normal(type="Sequence", normalizers=[{"type": "Lowercase"}] * 1000), "its normalizer has 1,001 parts"
    ),
    "a splitting expression": (
        tokenizer(lambda file: file.update(pre_tokenizer={
            "type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Removed", "invert": False})), "type 'Split'"
    ),
    "a template of pages": (
        tokenizer(lambda file: file["post_processor"].update(single=[{"Sequence": {"id": "A", "type_id": 0}}] * 10000)),
        "its post_processor adds 10,000 pieces"
    ),
    "a decoder that grows": (tokenizer(lambda file: file.update(decoder=BLOW)), "decoder has a part of type 'Replace'"),
    "a BPE": (model(type="BPE"), "holds a BPE model"),
    "another unknown piece": (model(unk_token="[PAD]"), "its unknown piece must be [UNK]"),
    "an unknown piece that lacks": (model(unk_token="[NO]"), "its unknown piece must be [UNK]"),
    "words of no characters": (model(max_input_chars_per_word=0), "max_input_chars_per_word must be 1 to"),
    "words of many characters": (model(max_input_chars_per_word=10**9), "max_input_chars_per_word must be 1 to"),
    "an added piece far away": (
        tokenizer(lambda file: file["added_tokens"].append(ADDED | {"id": 10**9, "content": "zzz"})), "cannot have the"
    ),
    "an added piece of nothing": (
        tokenizer(lambda file: file["added_tokens"].append(ADDED | {"id": 744, "content": ""})), "has 0 characters"
    ),
    "one piece more": (
        tokenizer(lambda file: file["added_tokens"].append(ADDED | {"id": 744, "content": "zzz"})),
        "does not fit the model"
    ),
}  # fmt: skip


def refused(load):
    """What a load says, which is one line and neither costs nor calls."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load()
    assert time.perf_counter() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < BYTES >> 10
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


def edited(saved, tmp_path, edit, task="blip"):
    folder = tmp_path / "model"
    shutil.copytree(saved / task, folder)
    edit(folder)
    return folder


@pytest.mark.parametrize("case", CASES | TOKENIZERS)
def test_a_hostile_folder_is_refused_in_a_line(case, saved, tmp_path, calls):
    edit, expected = (CASES | TOKENIZERS)[case]
    folder = edited(saved, tmp_path, edit)
    message = refused(lambda: blip.from_pretrained(folder))
    assert expected in message
    assert str(folder) in message
    assert not calls


@pytest.mark.parametrize("value", [1, "x", None, HUGE, True])
def test_the_images_of_a_task(saved, tmp_path, value):
    folder = edited(saved, tmp_path, config("images", value), "nlvr")
    assert f"{folder}/config.json: images must be" in refused(lambda: blip.from_pretrained(folder, Nlvr))


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_hostile_tokenizer_beside_a_model(case, saved, tmp_path, calls):
    """Given as --tokenizer."""
    folder = edited(saved, tmp_path, TOKENIZERS[case][0])
    if case != "one piece more":  # which is a vocabulary as good as any
        assert str(folder / "tokenizer.json") in refused(lambda: Tokenizer.load(folder / "tokenizer.json"))
    assert not calls


def test_lengths_that_a_tokenizer_says_are_not_kept(saved, tmp_path):
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 50}
    stretch = STRETCH | {"pad_token": "[PAD]"}
    folder = edited(saved, tmp_path, tokenizer(lambda file: file.update(truncation=cut, padding=stretch)))
    loaded = Tokenizer.load(folder)
    assert loaded.pieces("a red square and a blue circle", 30) == WORDS.pieces("a red square and a blue circle", 30)
    assert loaded.digest() == WORDS.digest()


def test_what_programs_write_is_still_read(saved, tmp_path):
    """Half precision is cast, the oldest tokenizers do not say their kind, a mark of byte order is no harm."""
    folder = edited(saved, tmp_path, lambda folder: None)
    weights(lambda state: state.update({k: v.bfloat16() for k, v in state.items()}))(folder)
    tokenizer(lambda file: file["model"].pop("type"))(folder)
    text("config.json", b"\xef\xbb\xbf" + (folder / "config.json").read_bytes())(folder)
    config_of = blip.from_pretrained(folder)[0]
    assert config_of.image_proj.weight.dtype == torch.float32
    whole = load_file(saved / "blip" / "model.safetensors")
    assert torch.equal(config_of.image_proj.weight, whole["image_proj.weight"].bfloat16().float())


@pytest.mark.parametrize("length", [15_392, 640])
def test_a_header_whose_length_looks_like_a_web_page_or_a_pickle(tmp_path, length):
    """15,392 is 0x3c20, which is " <" in the file; 640 is 0x0280, with which a pickle begins."""
    path = tmp_path / "a.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(length)
    path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<f", 2.0))
    assert read_tensors(path)["a"].tolist() == [2.0]


@pytest.mark.parametrize("case", ["vision.depth 1000000000000", "vision.model 'hf-hub:evil/repo'", "NaN"])
def test_a_command_ends_with_one_line(case, saved, tmp_path, capsys, calls):
    folder = edited(saved, tmp_path, CASES[case][0])
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    with pytest.raises(SystemExit) as end:
        cli.main(["caption", str(tmp_path / "a.png"), "--model", str(folder)])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert CASES[case][1] in line
    assert not calls
