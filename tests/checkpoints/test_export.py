"""Weights out: what transformers and the code of 2022 load and say, and round trips of every kind."""

import dataclasses
import random
import re
import shlex
import shutil
from pathlib import Path

import goldens
import pytest
import released
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoProcessor,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
)

import blip
from blip.app import cli
from blip.checkpoints import export, foreign
from blip.checkpoints.card import Provenance
from blip.checkpoints.layouts import original_training
from blip.checkpoints.table import from_theirs, to_theirs
from blip.data.transforms import EvalTransform
from blip.inference.answering import answers, encode_questions
from blip.inference.generate import generate_texts
from blip.inference.settings import AnswerConfig, DecodeConfig
from blip.models.blip import Blip, starting_with
from blip.models.dialogue import Dialogue
from blip.models.nlvr import Nlvr
from blip.models.presets import BASE, LARGE
from blip.models.settings import BlipConfig
from blip.models.vqa import Vqa
from blip.nn.settings import VisionConfig
from blip.objectives.pretrain import Pretrain
from blip.tokenizer import Tokenizer

TEXT = goldens.CONFIG.text
BEAMS = DecodeConfig(beams=3, max_length=12, min_length=5)
FROM = Provenance("somewhere", "a layout")


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return Tokenizer.load(released.vocabulary(tmp_path_factory.mktemp("words")))


def lively(model):
    """Random weights that are not tiny, so that outputs depend on everything."""
    g = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.15 + ("norm" in name and name.endswith("weight")))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return lively(Blip(goldens.CONFIG))


@pytest.fixture(scope="module")
def answerer():
    """transformers' decoder reads questions as wide as images."""
    return lively(Vqa(dataclasses.replace(goldens.CONFIG, vision=dataclasses.replace(goldens.CONFIG.vision, width=24))))


@pytest.fixture
def kept(model, words, tmp_path):
    blip.save_pretrained(model, words, tmp_path / "model", licence="mit")
    return tmp_path / "model"


def run(*args):
    return cli.main(["convert", *map(str, args)])


def refused(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        run(*args)
    stderr = capsys.readouterr().err
    assert (stop.value.code, stderr.count("\n")) == (2, 1), stderr
    return stderr


def loaded(kind, folder):
    """A model of transformers, loaded as anyone does; nothing may lack or be left over."""
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def images(side=(50, 40)):
    draw = random.Random(5)
    return [Image.frombytes("RGB", side, draw.randbytes(3 * side[0] * side[1])) for _ in range(3)]


# transformers ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_captioner_says_the_same_in_transformers(model, kept, words, tmp_path):
    assert run(kept, tmp_path / "out", "--to", "transformers", "--use", "captioning") == 0
    theirs, processor = (
        loaded(BlipForConditionalGeneration, tmp_path / "out"),
        AutoProcessor.from_pretrained(tmp_path / "out"),
    )
    batch = goldens.batch(0)
    ids = starting_with(batch.ids, TEXT.dec_id)
    logits = theirs(pixel_values=batch.image, input_ids=ids, attention_mask=batch.keep.long()).logits
    close(
        model.caption_logits(ids, batch.keep, model.context(model.vision(batch.image)))[batch.keep], logits[batch.keep]
    )
    for prompt in ("", "w4 w7"):
        given = {"text": [prompt] * 3} if prompt else {}
        inputs = processor(images=images(), return_tensors="pt", **given)
        generated = theirs.generate(**inputs, num_beams=3, max_length=12, min_length=5)
        start = len(prompt.split()) + 1
        ours = generate_texts(model, words, inputs.pixel_values, BEAMS, prompt=prompt)
        assert [text.text for (text,) in ours] == [words.decode([row[start:].tolist()])[0] for row in generated]
        assert processor.batch_decode(generated, skip_special_tokens=True)[0].startswith(prompt)
    transform = EvalTransform(32)
    ours = torch.stack([transform(image) for image in images()])
    assert float((inputs.pixel_values - ours).abs().max()) < 0.03, "its default processor resizes a little otherwise"
    assert theirs.generation_config.num_beams == 3


@torch.no_grad()
def test_a_matcher_says_the_same_in_transformers(model, kept, words, tmp_path):
    """The tokenizer that is written begins with [ENC], which transformers does not put there itself."""
    assert run(kept, tmp_path / "out", "--to", "transformers", "--use", "matching") == 0
    theirs = loaded(BlipForImageTextRetrieval, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    texts = ["w3 w9", "w4", "w8 w1 w2 w7 w30 w31"]
    inputs = processor(images=images(), text=texts, padding=True, return_tensors="pt")
    assert inputs.input_ids[:, 0].tolist() == [TEXT.enc_id] * 3
    ids, keep = words.encode(texts, first="enc", max_length=30)
    tokens = model.vision(inputs.pixel_values)
    close(model.match(ids, keep, model.context(tokens)), theirs(**inputs).itm_score)
    inputs.input_ids[:, 0] = processor.tokenizer.cls_token_id
    ids, keep = words.encode(texts, first="cls", max_length=30)
    cosines = model.embed_image(tokens) @ model.embed_text(ids, keep).T
    close(cosines, theirs(**inputs, use_itm_head=False).itm_score)


@torch.no_grad()
def test_an_answerer_says_the_same_in_transformers(answerer, words, tmp_path):
    blip.save_pretrained(answerer, words, tmp_path / "model")
    assert run(tmp_path / "model", tmp_path / "out", "--to", "transformers") == 0
    theirs = loaded(BlipForQuestionAnswering, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    for image, question in zip(images(), ("w3 w9", "w4", "w8 w1 w2 w7"), strict=True):
        inputs = processor(images=image, text=question, return_tensors="pt")
        ids = theirs.generate(**inputs, num_beams=3, max_length=10)[0, 1:].tolist()
        context = encode_questions(answerer, words, answerer.vision(inputs.pixel_values), [question], [0])
        ((best,),) = answers(answerer, words, context, AnswerConfig(), None, 1)
        assert words.decode([ids]) == [best.text]


@pytest.mark.parametrize("use", ["captioning", "matching"])
def test_to_transformers_and_back(model, kept, words, tmp_path, use):
    run(kept, tmp_path / "out", "--to", "transformers", "--use", use)
    back, tokenizer = blip.from_pretrained(tmp_path / "out")
    shape = dataclasses.replace(model.config, parts={"captioning": "writing", "matching": "matching"}[use])
    vision = dataclasses.replace(shape.vision, model="vit_base_patch16_224")
    embed = shape.embed_dim if use == "matching" else BlipConfig.embed_dim
    assert back.config == dataclasses.replace(shape, vision=vision, embed_dim=embed)
    assert tokenizer.digest() == words.digest()
    whole = model.state_dict()
    for name, tensor in back.state_dict().items():
        if name != "temperature":
            assert torch.equal(tensor, whole[name]), name
    run(tmp_path / "out", tmp_path / "again")
    assert blip.from_pretrained(tmp_path / "again")[0].config == back.config


def test_config_json_says_what_was_trained(model, kept, tmp_path):
    run(kept, tmp_path / "out", "--to", "transformers", "--use", "captioning")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.vision_config.layer_norm_eps == 1e-6
    assert (config.vision_config.num_attention_heads, config.text_config.num_attention_heads) == (2, 2)
    assert config.text_config.layer_norm_eps == 1e-12
    assert config.text_config.encoder_hidden_size == 32
    assert config.architectures == ["BlipForConditionalGeneration"]
    ids = config.text_config
    assert (ids.bos_token_id, ids.sep_token_id, ids.eos_token_id, ids.pad_token_id) == (97, 3, 3, 0)
    odd = dataclasses.replace(model.config, vision=dataclasses.replace(model.config.vision, norm_eps=1e-3))
    other = Blip(odd)
    folder = tmp_path / "odd"
    words = blip.from_pretrained(kept)[1]
    export.write(other, words, folder, "transformers", FROM, "matching")
    assert AutoConfig.from_pretrained(folder).vision_config.layer_norm_eps == 1e-3
    assert blip.from_pretrained(folder)[0].config.vision.norm_eps == 1e-3
    with pytest.raises(ValueError, match=r"epsilon 0\.001, and the code of 2022 has 1e-6"):
        export.write(other, words, tmp_path / "never", "original", FROM)


# The code of 2022 -----------------------------------------------------------------------------------------------------


def judge():
    return lively(Nlvr(released.NLVR))


KINDS = {
    "pretraining": (lambda: lively(Blip(goldens.CONFIG)), "pretraining"),
    "captioning": (lambda: lively(Blip(goldens.CONFIG)), "captioning"),
    "matching": (lambda: lively(Blip(goldens.CONFIG)), "retrieval"),
    "vqa": (lambda: lively(Vqa(goldens.CONFIG)), "vqa"),
    "nlvr": (judge, None),
}


@pytest.mark.parametrize("use", KINDS)
def test_to_the_original_and_back(use, words, tmp_path):
    """All keys of the original's class and shape, as recorded, but for the queues, which a model lacks.

    The teacher's are the student's tensors: `load_checkpoint` of the original reads its positions unasked.
    """
    make, golden = KINDS[use]
    ours = make()
    blip.save_pretrained(ours, words, tmp_path / "model")
    assert run(tmp_path / "model", tmp_path / "out", "--to", "original", "--use", use) == 0
    path = tmp_path / "out" / "model.pth"
    written = torch.load(path, weights_only=True)["model"]
    keys = goldens.keys(golden) if golden else {k: list(v.shape) for k, v in released.state("nlvr").items()}
    expected = {k: shape for k, shape in keys.items() if "queue" not in k}
    assert {key: list(tensor.shape) for key, tensor in written.items()} == expected
    teacher = [key for key in expected if "_m." in key]
    assert bool(teacher) == (use in ("pretraining", "matching"))
    assert all(torch.equal(written[key], written[key.replace("_m.", ".")]) for key in teacher)
    back, tokenizer = blip.from_pretrained(path, type(ours))
    assert tokenizer.digest() == words.digest()
    whole = ours.state_dict()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, whole[name]), name
    assert set(back.state_dict()) == set(whole) or use in ("captioning", "matching")


def test_the_state_of_a_pretraining_both_ways():
    """Student, teacher and queues of the original's class: all keys but the counting buffers and the unused ones."""
    objective = Pretrain(Blip(goldens.CONFIG), goldens.PRETRAIN)
    table = original_training(objective)
    theirs = goldens.checkpoint()
    objective.load_state_dict(from_theirs(table, theirs, objective.state_dict(), "goldens"))
    back = to_theirs(table, objective.state_dict())
    assert {name: torch.equal(tensor, theirs[name]) for name, tensor in back.items()} == dict.fromkeys(back, True)
    assert set(theirs) - set(back) == set(theirs) & set(table.dropped)
    assert all(
        "position_ids" in k or ("text_encoder_m" in k and "crossattention" in k) for k in set(theirs) - set(back)
    )


@torch.no_grad()
def test_from_the_original_to_transformers(tmp_path):
    """The way that released weights have gone: what the original computed is what transformers computes."""
    path = released.pth(tmp_path, "captioning", attention_heads={"vision": 2, "text": 2})
    assert run(path, tmp_path / "out", "--to", "transformers") == 0
    theirs, batch = loaded(BlipForConditionalGeneration, tmp_path / "out"), goldens.batch(0)
    ids = starting_with(batch.ids, TEXT.dec_id)
    logits = theirs(pixel_values=batch.image, input_ids=ids, attention_mask=batch.keep.long()).logits
    close(logits[batch.keep], goldens.results()["lm_logits"][batch.keep])


# The command ----------------------------------------------------------------------------------------------------------


def test_it_tells_what_became_of_every_tensor(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(foreign, "HEADS", foreign.HEADS | released.HEADS)
    path = released.pth(tmp_path / "in", "retrieval")
    assert run(path, tmp_path / "out", "--image-size", 48) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("read retrieval.pth: the layout of the 2022 release and LAVIS for matching, ")
    dropped = [line for line in lines if "left out" in line]
    assert len(dropped) == 2
    assert any("the momentum teacher and its queues: only training needs them" in line for line in dropped)
    counts = [int(line.split()[0]) for line in lines if "left out" in line or "carried over" in line]
    assert sum(counts) == len(released.state("retrieval"))
    wrote = {line.split()[1].rsplit("/", 1)[1] for line in lines if line.startswith("wrote")}
    assert wrote == {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert blip.from_pretrained(tmp_path / "out")[0].config.vision.image_size == 48
    card = (tmp_path / "out/README.md").read_text()
    assert "license: other" in card
    assert "BSD 3-Clause" in card
    assert str(tmp_path) not in card


def test_cards_say_licence_and_differences(kept, tmp_path):
    for use, words in (
        ("captioning", ("generation_config.json is loaded but not used", "prompts of the same length")),
        ("matching", ("[ENC]", "cls_token_id")),
    ):
        run(kept, tmp_path / use, "--to", "transformers", "--use", use)
        card = (tmp_path / use / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: transformers\nlicense: mit\n")
        assert "The weights have the licence of model: mit" in card
        assert all(word in card for word in words)
        assert str(tmp_path) not in card
    run(kept, tmp_path / "pth", "--to", "original")
    assert "load_checkpoint" in (tmp_path / "pth/README.md").read_text()


def test_the_lines_of_a_card_run(kept, answerer, words, tmp_path, capsys):
    blip.save_pretrained(answerer, words, tmp_path / "answerer")
    for source, use in ((kept, "captioning"), (kept, "matching"), (tmp_path / "answerer", "vqa")):
        run(source, tmp_path / use, "--to", "transformers", "--use", use)
        lines = re.search(r"```python\n(.*?)```", (tmp_path / use / "README.md").read_text(), re.DOTALL)[1]
        capsys.readouterr()
        exec(lines, {"FOLDER": str(tmp_path / use), "image": images()[0]})
        assert capsys.readouterr().out.strip()


def test_a_folder_with_something_in_it_is_left_alone(kept, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for target in ("full", "file"):
        assert "already exists: give a new or empty folder" in refused(capsys, kept, tmp_path / target)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    assert run(kept, tmp_path / "empty", "--to", "original") == 0
    assert (tmp_path / "empty/model.pth").is_file()


def test_a_full_disk_leaves_nothing(kept, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    for to in ("openblip", "original", "transformers"):
        with pytest.raises(SystemExit) as stop:
            run(kept, tmp_path / "out", "--to", to, *(["--use", "matching"] if to != "openblip" else []))
        assert stop.value.code == 1
        assert "10 bytes are free" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_wrong_use_is_one_line(kept, tmp_path, capsys):
    out = tmp_path / "out"
    for args, message in (
        ((kept, out, "--to", "transformers"), "give --use captioning or --use matching"),
        ((kept, out, "--to", "transformers", "--use", "nlvr"), "it can be for captioning, matching"),
        ((kept, out, "--use", "captioning"), "leave it out with --to openblip"),
        ((kept, out, "--image-size", "50"), "50 is not a multiple of the patch size 8"),
        ((kept, out, "--tokenizer", "world"), "another tokenizer than world"),
        ((tmp_path / "none.pth", out), "no weights at"),
        ((kept, out, "--too", "original"), "there is no option --too; did you mean --to?"),
        ((kept, out, "--to", "lavis"), "expected one of openblip"),
    ):
        assert message in refused(capsys, *args)
    assert not out.exists()


def test_models_that_a_program_cannot_hold(words, tmp_path):
    wide = Vqa(goldens.CONFIG)
    with pytest.raises(ValueError, match=r"questions as wide as images \(32\), and they are 24"):
        export.write(wide, words, tmp_path / "a", "transformers", FROM)
    small = Nlvr(dataclasses.replace(released.NLVR, text=dataclasses.replace(released.NLVR.text, layers=2)))
    with pytest.raises(ValueError, match="2 images with 12 layers, this model over 2 with 2"):
        export.write(small, words, tmp_path / "a", "original", FROM)
    with pytest.raises(ValueError, match="transformers has no model like Nlvr: use --to openblip"):
        export.write(judge(), words, tmp_path / "a", "transformers", FROM)
    for to in ("original", "transformers"):
        with pytest.raises(ValueError, match="no model like Dialogue"):
            export.write(Dialogue.from_blip(Blip(goldens.CONFIG)), words, tmp_path / "a", to, FROM)
    flat = dataclasses.replace(goldens.CONFIG, vision=dataclasses.replace(goldens.CONFIG.vision, hidden=48))
    with pytest.raises(
        ValueError, match=r"feed-forward is 48 wide, and the code of 2022 has 4 times its width \(128\)"
    ):
        export.write(Blip(flat), words, tmp_path / "a", "original", FROM)
    for name, message in (
        ("vit_base_patch16_clip_224", "needs vision.vit.patch_embed.proj.bias, which the model does not have"),
        ("vit_base_patch16_clip_quickgelu_224", "is not the plain ViT of BLIP"),
        ("beit_base_patch16_224", "is not the plain ViT of BLIP"),
        ("deit3_base_patch16_224", "has no place for the model's vision.vit.blocks.0.ls1.gamma"),
    ):
        tower = Blip(dataclasses.replace(goldens.CONFIG, vision=dataclasses.replace(goldens.CONFIG.vision, model=name)))
        for to in ("original", "transformers"):
            with pytest.raises(ValueError, match=message):
                export.write(tower, words, tmp_path / "a", to, FROM, "captioning")
    assert not (tmp_path / "a").exists()


def test_a_command_takes_the_file_and_what_it_was_converted_to(tmp_path, capsys, monkeypatch):
    """`blip caption` and `blip match` with a .pth and its vocabulary, and with the folders made of it."""
    monkeypatch.chdir(tmp_path)
    heads = {"vision": 2, "text": 2}
    path = released.pth(tmp_path / "in", "pretraining", beside=False, attention_heads=heads)
    vocabulary = str(released.vocabulary(tmp_path / "words"))
    images()[0].save("p.png")
    assert run(path, "ours", "--tokenizer", vocabulary) == 0
    assert run("ours", "theirs", "--to", "transformers", "--use", "captioning") == 0
    assert run("ours", "matching", "--to", "transformers", "--use", "matching") == 0
    capsys.readouterr()

    def stdout_of(*args):
        assert cli.main([*args]) == 0
        return capsys.readouterr().out

    options = ("p.png", "--prompt", "w4", "--max-length", "12", "--json")
    captions = {
        stdout_of("caption", *options, "--model", str(path), "--tokenizer", vocabulary),
        stdout_of("caption", *options, "--model", "ours"),
        stdout_of("caption", *options, "--model", "theirs"),
    }
    assert len(captions) == 1
    matches = [
        stdout_of("match", "p.png", "w3 w9", "--model", "ours"),
        stdout_of("match", "p.png", "w3 w9", "--model", "matching"),
    ]
    assert matches[0] == matches[1]
    with pytest.raises(SystemExit):
        cli.main(["match", "p.png", "w3", "--model", "theirs"])
    assert "a captioning model cannot match texts with images; load one of recipes.retrieval" in capsys.readouterr().err


# The page -------------------------------------------------------------------------------------------------------------

SPOKEN = "a picture of what is on the table ? dog cat"
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *SPOKEN.split()]
STAND_INS = {
    "model_base_caption_capfilt_large": "captioning",
    "model_base_retrieval_coco": "retrieval",
    "model_base_vqa_capfilt_large": "vqa",
    "model_base_capfilt_large": "pretraining",
}
"""What docs/weights.md calls a released file -> which recorded small model stands for it."""


def test_every_command_of_the_page_runs(tmp_path, monkeypatch, capsys):
    """The `sh` blocks of docs/weights.md, in their order; what needs a download or data stands in `text` blocks."""
    page = (Path(__file__).parents[2] / "docs/weights.md").read_text()
    monkeypatch.chdir(tmp_path)
    for released_name, name in STAND_INS.items():
        path = released.pth(tmp_path, name, beside=False, attention_heads={"vision": 2, "text": 2})
        path.rename(f"{released_name}.pth")
    (tmp_path / "vocab.txt").write_text("\n".join([*PIECES, *(f"w{i}" for i in range(97 - len(PIECES)))]) + "\n")
    images()[0].save("photo.jpg")
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    assert len(lines) >= 9
    for line in lines:
        program, *args = shlex.split(line, comments=True)
        assert program == "blip"
        if "224" in args:
            args[args.index("224")] = "48"  # a size of the small models
        args = ["models/base" if arg == "runs/demo/model" else arg for arg in args]  # the one converted before
        assert cli.main(args) == 0, line
        assert capsys.readouterr().out.strip(), line


# Full size ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("preset", "side"), [(BASE, 224), (LARGE, 64)])
def test_whole_base_and_large_models_both_ways(preset, side, tmp_path):
    """ViT-B and ViT-L with BERT-base at full depth, random weights: 1e-5 in transformers, every bit there and back."""
    pieces = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join([*pieces, *(f"p{i}" for i in range(30522 - len(pieces)))]) + "\n")
    words = Tokenizer.load(tmp_path / "vocab.txt")
    torch.manual_seed(0)
    model = Blip(dataclasses.replace(preset, vision=dataclasses.replace(preset.vision, image_size=side))).eval()
    whole = model.state_dict()
    image, ids = torch.randn(2, 3, side, side), torch.randint(999, 30000, (2, 7))
    keep = torch.ones_like(ids, dtype=torch.bool)
    tokens = model.vision(image)
    for use, kind, first in (
        ("captioning", BlipForConditionalGeneration, TEXT_IDS["dec"]),
        ("matching", BlipForImageTextRetrieval, TEXT_IDS["enc"]),
    ):
        ids[:, 0] = first
        export.write(model, words, tmp_path / use, "transformers", FROM, use)
        theirs = loaded(kind, tmp_path / use)
        outputs = theirs(pixel_values=image, input_ids=ids, attention_mask=keep.long())
        if use == "captioning":
            close(model.caption_logits(ids, keep, model.context(tokens)), outputs.logits)
            generated = theirs.generate(image, num_beams=3, max_length=8, min_length=5)
            ours = generate_texts(model, words, image, DecodeConfig(beams=3, max_length=8, min_length=5))
            assert [text.text for (text,) in ours] == words.decode(generated[:, 1:])
        else:
            close(model.match(ids, keep, model.context(tokens)), outputs.itm_score)
        del theirs
        back = blip.from_pretrained(tmp_path / use)[0].state_dict()
        assert all(torch.equal(tensor, whole[name]) for name, tensor in back.items() if name != "temperature")
    export.write(model, words, tmp_path / "pth", "original", FROM)
    back = blip.from_pretrained(tmp_path / "pth/model.pth")[0]
    assert back.config.vision == VisionConfig(preset.vision.model, image_size=side)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in back.state_dict().items())


TEXT_IDS = {"dec": 30522, "enc": 30523}
