"""`blip.load`: every verb against the functions of tensors, every kind of input, and what is refused."""

import contextlib
import hashlib
import io
import json
import subprocess
import sys
import threading
import typing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from test_blip_demo import vqa_model  # noqa: F401
from test_cli import model, photos, png  # noqa: F401

import blip
from blip.app import cli
from blip.app.loaded import Loaded
from blip.data import download, inputs
from blip.data.transforms import EvalTransform
from blip.errors import DataError
from blip.inference.answering import Candidates, answers, encode_questions
from blip.inference.explain import explain
from blip.inference.features import embed_images, embed_texts, match_texts
from blip.inference.generate import generate_texts
from blip.inference.settings import CAPTION_PROMPT, DECODE_PRESETS, AnswerConfig
from blip.models.dialogue import Dialogue
from blip.models.nlvr import Nlvr

PATHS = [f"photos/p{i}.png" for i in range(1, 12)]
TEXTS = ["a red circle", "two small stars"]


@pytest.fixture(scope="module")
def loaded(model):  # noqa: F811
    return blip.load(model, device="cpu", batch=4)


@pytest.fixture(scope="module")
def answerer(vqa_model):  # noqa: F811
    return blip.load(vqa_model, device="cpu", batch=4)


def pixels_of(paths, side):
    return torch.stack([EvalTransform(side)(Image.open(path).convert("RGB")) for path in paths])


def of_model(folder, kind, target):
    """A model of another kind with weights of one in a folder."""
    network, words = blip.from_pretrained(folder)
    blip.save_pretrained(kind(network), words, target)
    return blip.load(target, device="cpu")


# Verbs ----------------------------------------------------------------------------------------------------------------


def test_captions_are_those_of_generate_texts(loaded, photos):  # noqa: F811
    pixels = pixels_of(PATHS, loaded.image_size)
    beams = generate_texts(
        loaded.model, loaded.tokenizer, pixels, DECODE_PRESETS["caption_2022"], prompt=CAPTION_PROMPT
    )
    expected = [one.text for (one,) in beams]
    assert len(set(expected)) > 5, "the test needs captions that depend on their images"
    assert loaded.caption(PATHS) == expected
    assert [loaded.caption(path) for path in PATHS] == expected
    assert loaded.caption(PATHS, details=True) == [one for (one,) in beams]
    three = loaded.caption(PATHS, num=3)
    assert [len(set(some)) for some in three] == [3] * 11
    assert loaded.caption(PATHS[0], num=1) == expected[:1]
    assert [some[0] for some in loaded.caption(PATHS, num=2, details=True)] == [some[0] for some in beams]
    assert loaded.caption([]) == []
    plain = loaded.caption(PATHS[0], prompt="")
    greedy = generate_texts(loaded.model, loaded.tokenizer, pixels[:1], DECODE_PRESETS["greedy"])
    assert isinstance(plain, str)
    assert loaded.caption(PATHS[0], prompt="", decode="greedy") == greedy[0][0].text
    assert loaded.caption(PATHS[0], prompt="", decode=DECODE_PRESETS["greedy"]) == greedy[0][0].text


def test_samples_are_those_of_the_command(loaded, photos, model, capfd):  # noqa: F811
    command = ["caption", "photos", "--model", model, "--method", "nucleus", "--num", "2", "--seed", "5", "--json"]
    assert cli.main(command) == 0
    printed = [json.loads(line)["captions"] for line in capfd.readouterr().out.splitlines()]
    assert loaded.caption(PATHS, decode="nucleus", num=2, seed=5) == printed
    assert loaded.caption(PATHS, decode="nucleus", num=2, seed=6) != printed


def test_answers_are_those_of_the_function(answerer, photos):  # noqa: F811
    pixels = pixels_of(PATHS[:3], answerer.image_size)
    questions = ["what colour is the circle", "how many stars are there", "is it blue"]
    choices = Candidates(json.loads((answerer.path / "answers.json").read_text()), answerer.tokenizer)

    @torch.no_grad()
    def by_hand(image, question, top=1, choices=choices):
        tokens = answerer.model.vision(pixels[image : image + 1])
        context = encode_questions(answerer.model, answerer.tokenizer, tokens, [question], [0])
        return answers(answerer.model, answerer.tokenizer, context, AnswerConfig(), choices, top)[0]

    assert answerer.answer(PATHS[0], "What colour is the circle?") == by_hand(0, questions[0] + "?")[0].text
    assert answerer.answer(PATHS[:3], questions) == [by_hand(i, q)[0].text for i, q in enumerate(questions)]
    assert answerer.answer(PATHS[:3], questions[0]) == [by_hand(i, questions[0])[0].text for i in range(3)]
    assert answerer.answer(PATHS[0], questions) == [by_hand(0, q)[0].text for q in questions]
    assert answerer.answer(pixels, questions) == answerer.answer(PATHS[:3], questions)
    assert answerer.answer(PATHS[1], questions * 5) == [by_hand(1, q)[0].text for q in questions] * 5, (
        "more than a batch"
    )
    best = answerer.answer(PATHS[0], questions[1], top=3, details=True)
    expected = by_hand(0, questions[1], 3)
    assert [one.text for one in best] == [one.text for one in expected]
    assert [one.probability for one in best] == pytest.approx([one.probability for one in expected], rel=1e-5)
    assert 0 < best[-1].probability <= best[0].probability < 1
    assert answerer.answer(PATHS[0], questions[1], candidates=["blue", "red"], top=5, details=True)[0].text in (
        "blue",
        "red",
    )
    free = by_hand(0, questions[1], choices=None)[0].text
    assert answerer.answer(PATHS[0], questions[1], method="generate") == free
    assert answerer.answer([], "is it red?") == []
    assert answerer.answer([PATHS[0]], "is it red?") == [answerer.answer(PATHS[0], "is it red?")]
    assert answerer.answer((path for path in PATHS[:3]), questions) == answerer.answer(PATHS[:3], questions)
    with pytest.raises(ValueError, match="3 images and 2 questions: give as many of both, or one image, or one quest"):
        answerer.answer(PATHS[:3], questions[:2])
    for question, message in (
        ("!", "has no words"),
        ("", "has no words"),
        (None, "a list of texts, got None"),
        (["x", 3], "a list of texts, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            answerer.answer(PATHS[0], question)
    with pytest.raises(ValueError, match="no candidate answers"):
        answerer.answer(PATHS[0], "x", candidates=[])


def test_a_model_without_answers_generates_wherever_it_is_used(vqa_model, photos, tmp_path, monkeypatch):  # noqa: F811
    """A list of answers in the current folder is nobody's."""
    network, words = blip.from_pretrained(vqa_model, blip.load(vqa_model).model.__class__)
    blip.save_pretrained(network, words, tmp_path / "bare")
    (tmp_path / "answers.json").write_text('["moon"]')
    one = blip.load("bare", device="cpu")
    assert one.candidates() is None
    with pytest.raises(ValueError, match=r"has no answers\.json"):
        one.answer(PATHS[0], "what is it?", method="rank")


def test_comparisons_are_those_of_the_functions(loaded, photos):  # noqa: F811
    with torch.no_grad():
        tokens = loaded.model.vision(pixels_of(PATHS, loaded.image_size))
    scores = match_texts(loaded.model, loaded.tokenizer, [tokens], TEXTS)
    close = torch.testing.assert_close
    close(loaded.embed_image(PATHS), embed_images(loaded.model, [tokens]))
    close(loaded.embed_text(TEXTS), embed_texts(loaded.model, loaded.tokenizer, TEXTS))
    assert loaded.embed_image(PATHS[0]).shape == loaded.embed_text(TEXTS[0]).shape == (1, loaded.model.config.embed_dim)
    close(loaded.similarity(PATHS, TEXTS), scores.itc)
    close(loaded.match(PATHS, TEXTS).logits, scores.logits)
    close(loaded.match(PATHS[0], TEXTS[0]).probability, scores.probability[:1, :1])
    close(loaded.ground(PATHS[0], TEXTS).shape, loaded.ground(PATHS[:2], TEXTS).shape)
    chances = loaded.classify(PATHS, ["moon", "red circle", "star"], templates=["a {}"])
    assert [len(one) for one in chances] == [3] * 11
    logits = loaded.similarity(PATHS[2], ["a moon", "a red circle", "a star"])[0] / loaded.model.temperature.item()
    expected = dict(zip(["moon", "red circle", "star"], logits.softmax(0).tolist(), strict=True))
    assert dict(chances[2]) == pytest.approx(expected, rel=1e-4)
    assert [name for name, _ in chances[2]] == sorted(expected, key=expected.get, reverse=True)
    assert [name for name, _ in loaded.classify(PATHS[2], list(expected), templates=["a {}"], top=1)] == [
        chances[2][0][0]
    ]
    evidence = loaded.explain(PATHS[1], TEXTS[0])
    close(evidence.maps, explain(loaded.model, loaded.tokenizer, tokens[1:2], TEXTS[0]).maps)
    with pytest.raises(ValueError, match="explain takes one image"):
        loaded.explain(PATHS[:2], TEXTS[0])
    with pytest.raises(ValueError, match="a list of texts, got 1"):
        loaded.embed_text(["a", 1])


@pytest.mark.parametrize("batch", [1, 8])
def test_neighbours_batch_and_order_change_nothing(model, vqa_model, loaded, photos, batch):  # noqa: F811
    other, order = blip.load(model, device="cpu", batch=batch), [7, 0, 10, 3, 3]
    shuffled = [PATHS[i] for i in order]
    for how in ({}, {"decode": "nucleus", "num": 2}):
        everything = loaded.caption(PATHS, **how)
        assert other.caption(PATHS, **how) == everything
        assert other.caption(shuffled, **how) == [everything[i] for i in order]
    torch.testing.assert_close(other.match(shuffled, TEXTS).logits, loaded.match(PATHS, TEXTS).logits[order])
    one, same = blip.load(vqa_model, device="cpu", batch=batch), ["what is it", "how many red circles are there"]
    both = one.answer(PATHS, "what is it", method="generate")
    assert one.answer(shuffled, "what is it", method="generate") == [both[i] for i in order]
    assert one.answer(PATHS[3], same) == [one.answer(PATHS[3], question) for question in same]


# Inputs ---------------------------------------------------------------------------------------------------------------


def kinds(path):
    """One image in every way that it can be given."""
    data = Path(path).read_bytes()
    image = Image.open(path)
    array = np.asarray(image)
    features = datasets.Features({"image": datasets.Image(decode=False)})
    row = datasets.Dataset.from_dict({"image": [str(path)]}, features=features)[0]["image"]
    return {
        "str": str(path), "Path": Path(path), "bytes": data, "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "PIL": image, "array": array, "slice": np.flip(np.flip(array, 0), 0), "row": row, "np.str": np.str_(path),
        "bytes of datasets": {"bytes": data, "path": None}, "path of datasets": {"bytes": None, "path": str(path)},
    }  # fmt: skip


def test_every_kind_of_input_gives_the_same(loaded, photos):  # noqa: F811
    for path in PATHS[:2]:
        expected, embedding = loaded.caption(path), loaded.embed_image(path)
        given = kinds(path)
        for name, one in given.items():
            assert loaded.caption(one) == expected, name
            assert torch.equal(loaded.embed_image(one), embedding), name
        several = list(given.values())
        assert loaded.caption(several) == [expected] * len(several)
        assert loaded.caption(tuple(several[:2])) == [expected] * 2
    column = datasets.Dataset.from_dict({"image": PATHS}).cast_column("image", datasets.Image())["image"]
    assert loaded.caption(column) == loaded.caption(PATHS)
    assert loaded.caption(pixels_of(PATHS, loaded.image_size)) == loaded.caption(PATHS)
    assert loaded.caption(path for path in PATHS) == loaded.caption(PATHS)


def test_images_are_converted_as_files_are(loaded, tmp_path):
    """Grey, transparent over white, and upright."""
    noise = np.frombuffer(png(5) * 40, np.uint8)[: 30 * 20 * 4].reshape(30, 20, 4)
    clear = noise.copy()
    clear[..., 3] = 0
    white = np.full((30, 20, 3), 255, np.uint8)
    embed = loaded.embed_image
    assert torch.equal(embed(clear), embed(white))
    assert torch.equal(embed(Image.fromarray(clear)), embed(white))
    grey = noise[..., 0]
    assert torch.equal(embed(grey), embed(np.stack([grey] * 3, axis=2)))
    turned = Image.fromarray(noise[..., :3])
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "a.png", exif=exif)
    assert torch.equal(embed(tmp_path / "a.png"), embed(Image.open(tmp_path / "a.png")))
    assert torch.equal(embed(tmp_path / "a.png"), embed(np.rot90(noise[..., :3], 3)))


def test_samples_are_keyed_by_bytes_or_by_pixels(loaded, tmp_path):
    """Two files with the same pixels may differ; a PIL image and its array do not."""
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "b.png").write_bytes(png(1, level=0))
    reader = inputs.InputReader(loaded.transform, keyed=True)

    def key(image):
        ((read,),) = reader.read(image, 4)
        return read.key

    assert key(tmp_path / "a.png") == key(png(1)) == hashlib.sha256(png(1)).hexdigest()
    assert key(tmp_path / "b.png") != key(tmp_path / "a.png")
    image = Image.open(tmp_path / "a.png")
    by_hand = hashlib.sha256(b"RGB (12, 12)\0" + image.tobytes()).hexdigest()
    assert key(image) == key(np.asarray(image)) == key(Image.open(tmp_path / "b.png")) == by_hand
    assert key(image.convert("L")) != key(image)
    drawn = [loaded.caption(one, decode="nucleus", num=3) for one in (image, np.asarray(image))]
    assert drawn[0] == drawn[1]


def test_one_lazy_image_many_times(loaded, tmp_path):
    """PIL reads a file when it is first used, here in several threads."""
    Image.effect_noise((900, 700), 80).save(tmp_path / "a.png")
    expected = loaded.embed_image(tmp_path / "a.png")[0]
    for _ in range(5):
        image = Image.open(tmp_path / "a.png")
        torch.testing.assert_close(loaded.embed_image([image] * 4), expected.expand(4, -1))


UNUSABLE = {
    "gone.png": "gone.png cannot be used: no such file",
    "web.png": "web.png cannot be used: is an HTML page",
    "nul\0.png": "cannot be used: no such file",
    "lone \ud800.png": "cannot be used: no such file",
}
MISTAKES = {
    "photos": "photos cannot be used: is a folder: give a list of its images, or run `blip caption photos`",
    "my [photos]": r"cannot be used: is a folder: .* run `blip caption 'my \[photos\]'`",
    "https://example.org/a.jpg": r"a.jpg cannot be used: is an address: download it first.*blip.load\(..., urls=True\)",
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_images_that_cannot_be_used_are_named(loaded, answerer, photos, name):  # noqa: F811
    Path("web.png").write_bytes(b"<html>")
    for verb in (loaded.caption, loaded.embed_image):
        for images in (name, [PATHS[0], name]):
            with pytest.raises(DataError, match=UNUSABLE[name]) as error:
                verb(images)
            assert "\n" not in str(error.value)
    first, second = loaded.caption(PATHS[:2])
    assert loaded.caption([PATHS[0], name, PATHS[1]], errors="none") == [first, None, second]
    assert loaded.caption(name, errors="none") is None
    assert loaded.caption([name] * 9, errors="none", num=2) == [None] * 9
    answer = answerer.answer(PATHS[0], "what is it?")
    assert answerer.answer([name, PATHS[0]], ["is it red?", "what is it?"], errors="none") == [None, answer]
    assert answerer.answer(name, ["is it red?", "what is it?"], errors="none") == [None, None]
    assert answerer.answer(name, "is it red?", errors="none") is None


@pytest.mark.parametrize("errors", ["raise", "none"])
@pytest.mark.parametrize("name", MISTAKES)
def test_folders_and_addresses_are_mistakes_whatever_is_wanted_of_images(loaded, answerer, photos, name, errors):  # noqa: F811
    Path("my [photos]").mkdir()
    for images in (name, [PATHS[0], "gone.png", name], {"bytes": None, "path": name}):
        for verb, args in ((loaded.caption, (images,)), (answerer.answer, (images, "is it red?"))):
            if errors == "raise" and isinstance(images, list):
                continue  # which the missing file ends
            with pytest.raises(DataError, match=MISTAKES[name]) as error:
                verb(*args, errors=errors)
            assert "\n" not in str(error.value)
    if errors == "raise":
        with pytest.raises(DataError, match=MISTAKES[name]):
            loaded.embed_image([PATHS[0], name])


def test_images_without_a_name_are_named_by_number(loaded, photos):  # noqa: F811
    broken, fine = png(1)[:60], png(1)
    for images, place in (
        ([fine, fine, broken, fine], "image 3 of 4 cannot be used"),
        (iter([fine, broken]), "image 2 cannot be used"),
        (broken, "the image cannot be used"),
        ([{"bytes": broken, "path": None}], "image 1 of 1 cannot be used"),
        ([{"bytes": broken, "path": "a/b.png"}], "a/b.png cannot be used"),
        ({"bytes": None, "path": None}, "the image cannot be used: it has neither bytes nor a path"),
        (np.zeros((0, 3), np.uint8), "the image cannot be used: an array of uint8 .* has no pixels"),
        (np.zeros((1, 5000), np.uint8), "the image cannot be used: .*1,000 to 1"),
        (Image.new("RGB", (0, 8)), "the image cannot be used: 0 x 8 pixels by its header$"),
        ("", "the image cannot be used: its path is empty"),
        ({"bytes": None, "path": ""}, "the image cannot be used: its path is empty"),
    ):
        with pytest.raises(DataError, match=f"^{place}") as error:
            loaded.caption(images)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((8, 8, 3)), "array of float64 .8, 8, 3.: give uint8"),
        ([np.zeros((8, 8), np.float32)], "image 1 of 1 is an array of float32 .8, 8.: give uint8"),
        (np.zeros((2, 8, 8, 3), np.uint8), "give a list of images"),
        (np.zeros(8, np.uint8), "give a list of images"),
        (np.array(["a.png", "b.png"], object), "give a list of images"),
        (np.zeros((3, 8, 8), np.uint8), "give .height, width. or .height, width, 3 or 4."),
        (np.zeros((8, 8, 1), np.uint8), "give .height, width. or .height, width, 3 or 4."),
        (np.zeros((8, 8), bool), "give uint8"),
        (torch.zeros(3, 32, 32), "made by EvalTransform"),
        (torch.zeros(2, 3, 9, 9), "made by EvalTransform"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "made by EvalTransform"),
        (None, "expected an image or several, got None"),
        (3, "expected an image or several, got 3"),
        ([["a.png"]], "image 1 of 1 is .'a.png'.: give a path"),
        ([None], "image 1 of 1 is None: give a path"),
        ({"image": 1, "caption": "x"}, "mapping with the keys image, caption: give the image in it, or the column"),
        ({"bytes": "text", "path": None}, "the bytes of the image are 'text'"),
    ],
)
def test_what_is_no_image_is_refused_with_the_remedy(loaded, images, message):
    for how in ("raise", "none"):
        with pytest.raises(ValueError, match=message) as error:
            loaded.caption(images, errors=how)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        loaded.embed_image(images)


# Addresses ------------------------------------------------------------------------------------------------------------


class Web(BaseHTTPRequestHandler):
    def do_GET(self):
        status, headers, data = self.server.pages.get(self.path, (404, {}, b""))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def web():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    server.pages, server.place = {}, f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_addresses_only_if_allowed_and_public(model, loaded, web, monkeypatch):  # noqa: F811
    web.pages["/a b.png?x=1"] = web.pages["/a%20b.png?x=1"] = (200, {}, png(1))
    web.pages["/moved"] = (302, {"Location": "/a%20b.png?x=1"}, b"")
    web.pages["/circle"] = (302, {"Location": "/circle"}, b"")
    web.pages["/file"] = (302, {"Location": "file:///etc/passwd"}, b"")
    web.pages["/large"] = (200, {}, b"x" * 2000)
    urls = blip.load(model, device="cpu", urls=True)
    for address in (
        web.place,
        "http://localhost/a",
        "http://[::1]/a",
        "http://169.254.169.254/meta",
        "http://10.1.2.3/",
    ):
        with pytest.raises(DataError, match=r"private network|cannot be downloaded"):
            urls.caption(address)
    with pytest.raises(DataError, match="not an http or https address"):
        urls.caption("file:///etc/passwd")
    monkeypatch.setattr(download, "is_public", lambda address: True)
    expected = loaded.caption(png(1))
    for path in ("/a b.png?x=1", "/moved"):
        assert urls.caption(web.place + path) == expected
    assert urls.caption([web.place + "/moved", web.place + "/gone"], errors="none") == [expected, None]
    monkeypatch.setattr(download, "MAX_BYTES", 1000)
    for path, message in (
        ("/gone", "404"), ("/circle", "more than 5 times"), ("/file", "not an http"), ("/large", "limit of 1,000 bytes")
    ):  # fmt: skip
        with pytest.raises(DataError, match=message) as error:
            urls.caption(web.place + path)
        assert "\n" not in str(error.value)


def test_a_redirection_into_a_private_network_is_refused(web, monkeypatch):
    web.pages["/out"] = (302, {"Location": f"http://127.0.0.2:{web.server_port}/secret"}, b"")
    web.pages["/secret"] = (200, {}, b"secret")
    monkeypatch.setattr(download, "is_public", lambda address: address == "127.0.0.1")
    with pytest.raises(blip.errors.UnreadableImage, match=r"private network \(127\.0\.0\.2\)"):
        download.download(web.place + "/out")


def test_public_addresses():
    for address in ("8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"):
        assert download.is_public(address), address
    for address in (
        "127.0.0.1", "0.0.0.0", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1%eth0", "fd00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1",
        "2002:7f00:1::",
    ):  # fmt: skip
        assert not download.is_public(address), address


def test_a_slow_address_is_not_waited_for(monkeypatch):
    started = threading.Event()
    monkeypatch.setattr(download.socket, "getaddrinfo", lambda *_, **__: started.wait(3) or [])
    with pytest.raises(blip.errors.UnreadableImage, match=r"more than 0\.3 seconds"):
        download.download("http://example.org/a.png", 0.3)
    started.set()


# Models ---------------------------------------------------------------------------------------------------------------


def test_a_verb_that_a_model_lacks_names_the_recipe(loaded, answerer, tmp_path, model, photos):  # noqa: F811
    assert loaded.can == {
        "caption",
        "embed_image",
        "embed_text",
        "similarity",
        "ground",
        "match",
        "classify",
        "explain",
    }
    assert answerer.can == {"answer"}
    with pytest.raises(ValueError, match=r"^a question-answering model cannot caption; load one of recipes\.caption$"):
        answerer.caption("not even there.png")
    with pytest.raises(ValueError, match=r"cannot answer questions; load one of recipes\.vqa"):
        loaded.answer(PATHS[0], "what is it?")
    nobody = (
        of_model(model, Nlvr.from_blip, tmp_path / "nlvr"),
        of_model(model, Dialogue.from_blip, tmp_path / "dialogue"),
    )
    for one in (answerer, *nobody):
        for verb in ("embed_image", "embed_text", "similarity", "ground", "match", "classify", "explain"):
            with pytest.raises(ValueError, match=r"recipes\.retrieval$"):
                getattr(one, verb)(*[PATHS[0]] if verb.startswith("embed") else (PATHS[0], ["a"]))
    assert all(one.can == set() for one in nobody)


def test_every_verb_is_in_the_class_and_has_a_docstring(loaded):
    public = {name for name in dir(Loaded) if not name.startswith("_")}
    assert loaded.can <= public
    for name in public - {"model", "tokenizer", "device"}:
        if callable(getattr(Loaded, name)):
            assert (getattr(Loaded, name).__doc__ or "").strip(), name
    assert "question-answering" not in repr(loaded)
    assert len(repr(loaded)) < 300, "not the whole network"


def test_options_that_contradict(loaded, photos):  # noqa: F811
    for arguments, message in (
        ({"num": 0}, "num must be a whole number of 1 or more, got 0"),
        ({"num": "3"}, "num must be a whole number of 1 or more, got '3'"),
        ({"num": 2.0}, "num must be a whole number of 1 or more, got 2.0"),
        ({"seed": "a"}, "seed must be a whole number, got 'a'"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"prompt": None}, "prompt must be a text, got None"),
        ({"decode": 3}, "decode must be a DecodeConfig or one of .*, got 3"),
        ({"num": 2, "decode": "greedy"}, "num 2 is more than the 1 beams"),
        ({"decode": "best"}, "one of greedy, caption_2022, nucleus, capfilt_2022, got 'best'"),
        ({"prompt": "\u4e00 "}, r"words that the model's tokenizer does not know: give prompt=\"\""),
        ({"errors": "ignore"}, 'errors must be "raise" or "none"'),
    ):
        with pytest.raises(ValueError, match=message):
            loaded.caption(PATHS[0], **arguments)
    for top in (0, "x", 1.5):
        with pytest.raises(ValueError, match=f"top must be a whole number of 1 or more, got {top!r}"):
            loaded.classify(PATHS[0], ["a", "b"], top=top)
    with pytest.raises(ValueError, match=r"explain takes one text, got \['a'\]"):
        loaded.explain(PATHS[0], ["a"])
    with pytest.raises(ValueError, match="'a' is named twice"):
        loaded.classify(PATHS[0], ["a", "a"])
    for batch in (0, "3", 2.5):
        with pytest.raises(ValueError, match=f"batch must be a whole number of 1 or more, got {batch!r}"):
            blip.load(loaded.path, batch=batch)
    for dtype in ("float16", torch.int8, None):
        with pytest.raises(ValueError, match=r"^dtype must be a floating-point type of torch, such as"):
            blip.load(loaded.path, dtype=dtype)
    with pytest.raises(ValueError, match="nonsense cannot be used here"):
        blip.load(loaded.path, device="nonsense")


def test_type_and_size_are_honoured(model, photos):  # noqa: F811
    exact, half = blip.load(model), blip.load(model, dtype=torch.bfloat16)
    assert exact.device.type == ("cuda" if torch.cuda.is_available() else "cpu"), "the default is the commands'"
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert half.embed_image(PATHS).dtype == half.match(PATHS, TEXTS).logits.dtype == torch.float32
    torch.testing.assert_close(half.embed_image(PATHS), exact.embed_image(PATHS), atol=0.05, rtol=0)
    side = 2 * exact.image_size
    large = blip.load(model, image_size=side)
    assert (large.image_size, large.transform(Image.new("RGB", (9, 5))).shape) == (side, (3, side, side))
    assert isinstance(large.caption(PATHS[0]), str)


# The package ----------------------------------------------------------------------------------------------------------


def test_importing_the_package_brings_no_torch():
    program = "import blip, sys; blip.BASE; blip.__version__; dir(blip); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_names_of_the_package_are_listed_and_are_there():
    assert dir(blip) == sorted(blip.__all__)
    for name in blip.__all__:
        assert getattr(blip, name) is not None
    assert {"load", "pipeline", "Loaded", "MatchScores", "DataError"} <= set(blip.__all__)
    for name, now in (("Features", "Loaded"), ("Matches", "MatchScores"), ("write", "generate_texts")):
        with pytest.raises(AttributeError, match=rf"blip\.{name} is now blip\.{now}$"):
            getattr(blip, name)
    for package in ("blip", "capfilt", "eval", "recipes"):
        assert (Path(blip.__file__).parents[1] / package / "py.typed").is_file()


def test_types_are_visible():
    """The first overload is what a checker sees for `caption("photo.jpg")`."""
    first, *others = typing.get_overloads(Loaded.caption)
    assert first.__annotations__["images"] == "ImageInput"
    assert first.__annotations__["return"] == "str"
    assert [one.__annotations__["return"] for one in others[:3]] == ["list[str]", "list[str]", "list[list[str]]"]
    assert typing.get_overloads(Loaded.answer)[0].__annotations__["return"] == "str"
    assert len(typing.get_overloads(Loaded.classify)) == len(typing.get_overloads(blip.pipeline)) == 2


def test_an_open_file_is_to_be_read_first(loaded):
    with pytest.raises(ValueError, match=r"got an open file, .*: give file\.read\(\)"):
        loaded.caption(io.BytesIO(png(1)))
    with pytest.raises(ValueError, match=r"image 1 of 1 is .*BytesIO.*: give a path"):
        loaded.caption([io.BytesIO(png(1))])
