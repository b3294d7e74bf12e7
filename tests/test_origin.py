"""What a model was trained on is recognized from the data, kept, passed on, and said where models are loaded."""

import io
import json
import shutil
import tarfile

import pytest
import torch
from PIL import Image
from test_checkpoint import SMALLEST, TOKENIZER

import blip
from blip import origin
from blip.app import cli
from blip.checkpoints import checkpoint
from blip.data.settings import DataConfig, SourceConfig
from blip.models.blip import Blip
from blip.world import classes, files, pairs, questions
from capfilt.score.models import BlipScorer
from capfilt.settings import ScoreConfig
from recipes import building
from recipes.building import ModelChoice

SHAPES = ("synthetic shapes",)
NOTE = "note: trained on synthetic shapes; on photographs its answers mean nothing\n"


def photo(side=40):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (200, 10, 10)).save(buffer, "JPEG")
    return buffer.getvalue()


def origins(*paths, **options):
    config = DataConfig([SourceConfig(str(path)) for path in paths], workers=0, **options)
    feed, _ = building.build_feed(config, 32, TOKENIZER, 0)
    return feed.origins


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["tar", "json", "imagefolder", "parquet"])
def test_data_of_the_synthetic_world_is_recognized_in_every_format(form, streaming, tmp_path):
    (path, *_) = files.write(
        tmp_path / "photographs of dogs", form, "train", 12, size=32, broken=3 if form == "tar" else 0
    )
    if streaming and form == "imagefolder":
        pytest.skip("an imagefolder is not streamed")
    where = {"json": tmp_path / "photographs of dogs/train.json"}.get(form, path)
    assert origins(where, streaming=streaming) == SHAPES


def test_the_folder_does_not_decide(tmp_path):
    folder = tmp_path / "world"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(photo())
    (folder / "train.json").write_text(
        json.dumps([{"image": "a.jpg", "caption": "a red square", "image_id": "world-0-train-1"}])
    )
    assert origins(folder / "train.json") == ("other images",)
    files.write(tmp_path / "shapes", "json", "train", 4, size=32)
    assert origins(folder / "train.json", tmp_path / "shapes/train.json") == ("other images", "synthetic shapes")


def test_one_photograph_among_shapes_counts_in_one_source(tmp_path):
    (shard,) = files.write(tmp_path, "tar", "train", 20, size=32)
    with tarfile.open(shard, "a") as tar:
        for name, content in (("z.jpg", photo()), ("z.txt", b"a red square")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert origins(shard) == ("other images", "synthetic shapes")


def test_shards_that_are_streamed_are_looked_at_first_and_last(tmp_path):
    (first,) = files.write(tmp_path, "tar", "train", 6, size=32)
    with tarfile.open(tmp_path / "train-00001.tar", "w") as tar:
        for name, content in (("z.jpg", photo()), ("z.txt", b"a red square")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert origins(tmp_path / "train-0000{0..1}.tar", streaming=True) == ("other images", "synthetic shapes")
    (tmp_path / "train-00001.tar").write_bytes(b"not a tar" * 200)
    assert origins(first, streaming=True) == SHAPES


def test_what_is_no_image_has_no_origin(tmp_path):
    assert origin.origins_of([b"", b"<!DOCTYPE html>", tmp_path / "none.jpg"]) == ()
    assert origin.origins_of([photo(), Image.new("RGB", (2, 2))]) == ("other images",)


@pytest.mark.parametrize("size", [(8, 8), (300, 200)])
@pytest.mark.parametrize("form", ["JPEG", "WEBP", "PNG", "TIFF"])
def test_the_mark_is_read_back_from_every_format(form, size, tmp_path):
    noise = Image.effect_noise(size, 90).convert("RGB")  # 300 x 200 is too large for the first bytes to be all
    noise.save(tmp_path / "plain", form)
    noise.save(tmp_path / "marked", form, **origin.marking(form))
    assert origin.origins_of([tmp_path / "plain"]) == ("other images",)
    assert origin.origins_of([tmp_path / "marked"]) == SHAPES
    assert origin.origins_of([(tmp_path / "marked").read_bytes()]) == SHAPES
    assert Image.open(tmp_path / "marked").tobytes() == Image.open(tmp_path / "plain").tobytes()


@pytest.mark.parametrize("make", [questions, pairs, classes])
def test_all_images_of_the_world_carry_the_mark_and_the_same_pixels(make, tmp_path):
    make.write(tmp_path / "w", count=2) if make is classes else make.write(tmp_path / "w", "train", 2)
    images = [path for path in (tmp_path / "w").rglob("*") if path.suffix in (".jpg", ".png")]
    assert images
    assert origin.origins_of(images) == SHAPES
    one = Image.open(images[0])
    assert one.info["comment"] == b"openblip: synthetic shapes"


# Model folders --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "shapes"
    checkpoint.save_pretrained(Blip(SMALLEST), TOKENIZER, folder, trained_on=SHAPES)
    return folder


def test_it_stands_beside_the_model_and_old_folders_have_none(shapes, tmp_path):
    config = json.loads((shapes / "config.json").read_text())
    assert config["trained_on"] == ["synthetic shapes"]
    assert "trained_on" not in config["model"]
    assert checkpoint.opened(shapes).trained_on == checkpoint.trained_on(shapes) == SHAPES
    old = shutil.copytree(shapes, tmp_path / "old")
    del config["trained_on"]
    (old / "config.json").write_text(json.dumps(config))
    assert checkpoint.opened(old).trained_on == checkpoint.trained_on(old) == ()


@pytest.mark.parametrize(
    "value", [5, "synthetic shapes", [1], [""], ["a\nb"], ["\x1b[2J"], ["x" * 101], ["x"] * 17, {}, None]
)
def test_anything_else_in_its_place_is_one_line(shapes, value, tmp_path):
    odd = shutil.copytree(shapes, tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text()) | {"trained_on": value}
    (odd / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json: trained_on must be a list of up to 16 short texts"):
        checkpoint.opened(odd)


def test_loading_says_so_once_a_load_and_once_a_command(shapes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(origin, "_printed", [])
    for _ in range(2):
        blip.load(shapes)
        assert capsys.readouterr().err == NOTE
    monkeypatch.setattr(origin, "_printed", [])
    (tmp_path / "photo.jpg").write_bytes(photo())
    assert cli.main(["caption", str(tmp_path / "photo.jpg"), "--model", str(shapes), "--prompt", "a"]) == 0
    assert capsys.readouterr().err == NOTE


def test_scores_of_a_crawl_record_it_for_the_report(shapes, tmp_path):
    checkpoint.save_pretrained(Blip(SMALLEST), TOKENIZER, tmp_path / "old")
    for captioner, recorded in ((shapes, list(SHAPES)), (tmp_path / "old", [])):
        config = ScoreConfig(captioner=str(captioner), filter=str(shapes), max_length=9, max_tokens=9, decode="greedy")
        assert json.loads(BlipScorer.load(config, "cpu").facts["trained_on"]) == recorded


def test_of_several_processes_one_says_so(capsys, monkeypatch):
    for rank, printed in (("0", NOTE), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        origin.print_note(SHAPES)
        assert capsys.readouterr().err == printed


def test_others_are_loaded_without_a_word(tmp_path, capsys):
    checkpoint.save_pretrained(Blip(SMALLEST), TOKENIZER, tmp_path / "m", trained_on=["other images", *SHAPES])
    blip.load(tmp_path / "m")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("to", ["openblip", "transformers --use captioning", "original --use pretraining"])
def test_conversion_passes_it_on_there_and_back(shapes, to, tmp_path, capsys):
    out, back = tmp_path / "out", tmp_path / "back"
    assert cli.main(["convert", str(shapes), str(out), "--to", *to.split()]) == 0
    assert capsys.readouterr().err == NOTE
    assert "on photographs its answers mean nothing" in (out / "README.md").read_text()
    source = out / "model.pth" if "original" in to else out
    assert checkpoint.opened(source).trained_on == checkpoint.trained_on(source) == SHAPES
    if "original" in to:
        assert cli.main(["convert", str(source), str(back), "--tokenizer", str(shapes)]) == 0
        assert checkpoint.trained_on(back) == SHAPES


def test_a_word_of_another_program_is_not_taken_for_ours():
    assert origin.claimed({"trained_on": "COCO"}) == origin.claimed({}) == origin.claimed(None) == ()


def test_fine_tuning_passes_it_on(shapes, tmp_path):
    checkpoint.save_pretrained(Blip(SMALLEST), TOKENIZER, tmp_path / "unknown")
    assert ModelChoice(start_from=str(shapes)).trained_on() == SHAPES
    assert ModelChoice(start_from=str(tmp_path / "unknown")).trained_on() == ("other images",)
    assert ModelChoice(vision_weights="vit.pth").trained_on() == ("other images",)
    assert ModelChoice().trained_on() == ()
