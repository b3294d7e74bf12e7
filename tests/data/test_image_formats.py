"""AVIF, HEIC and TIFF: upright, over white, first page, and refused from the header where decoding takes too much."""

import io
import random
import struct
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageOps

from blip.data import image_header, isobmff
from blip.data.images import UnreadableImage, decode, model_input

LIMIT = 100_000_000
heif = pytest.importorskip("pillow_heif", reason="the extra heif is not installed")
heif.register_heif_opener()


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def quarters(mode="RGB"):
    """Red, green, blue and white quarters, 64 x 32."""
    image = Image.new("RGB", (64, 32), "white")
    for box, colour in (((0, 0, 32, 16), "red"), ((32, 0, 64, 16), "lime"), ((0, 16, 32, 32), "blue")):
        image.paste(colour, box)
    return image.convert(mode)


def close(a, b):
    return a.size == b.size and np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() < 6


def refusal(data, limit=LIMIT):
    with pytest.raises(UnreadableImage) as caught:
        decode(data, limit)
    return caught.value


def turned(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def upright(orientation):
    """A HEIC that its rotation and mirroring set upright, with the same orientation in its metadata."""
    image = quarters()
    image.info["exif"] = turned(orientation).tobytes()
    return encoded(image, "HEIF", quality=95)


# Pixels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["AVIF", "HEIF", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_set_upright_once(kind, orientation):
    image = quarters()
    image.getexif()[274] = orientation
    expected = ImageOps.exif_transpose(image)
    data = encoded(image, kind, exif=turned(orientation), quality=95) if kind != "HEIF" else upright(orientation)
    assert close(decode(data, LIMIT), expected)
    assert close(decode(Image.open(io.BytesIO(data)), LIMIT), expected)  # opened by somebody else


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_an_orientation_in_metadata_alone_does_not_turn_an_image(kind):
    """The standard of HEIF: the rotation is a property of the item, and its EXIF tag is not used."""
    data = upright(6) if kind == "HEIF" else encoded(quarters(), kind, exif=turned(6), quality=95)
    assert data.count(b"irot\3") == 1
    assert close(decode(data.replace(b"irot\3", b"irot\0"), LIMIT), quarters())


@pytest.mark.parametrize("kind", ["AVIF", "HEIF", "TIFF"])
def test_transparency_lies_over_white(kind):
    image = quarters("RGBA")
    image.putalpha(Image.fromarray(np.repeat([[255, 0]], 32, axis=0).repeat(32, axis=1).astype(np.uint8)))
    got = decode(encoded(image, kind, quality=95), LIMIT)
    expected = quarters()
    expected.paste("white", (32, 0, 64, 32))
    assert close(got, expected)


def test_modes_of_a_tiff():
    grey = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    assert np.asarray(decode(encoded(Image.fromarray(grey), "TIFF"), LIMIT))[0, :, 0].tolist() == [0, 1, 128, 255]
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    assert decode(encoded(cyan, "TIFF"), LIMIT).getpixel((4, 4)) == (0, 255, 255)
    for mode in ("1", "L", "P", "LA"):
        expected = quarters(mode).convert("RGB")
        for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"):
            data = encoded(quarters(mode), "TIFF", compression=compression)
            assert decode(data, LIMIT).tobytes() == expected.tobytes(), (mode, compression)
    assert decode(encoded(quarters(), "TIFF", big_tiff=True), LIMIT).tobytes() == quarters().tobytes()


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.fromarray(np.ones((4, 4), np.float32)), "32-bit values of unknown range"),
        (Image.fromarray(np.ones((4, 4), np.int32)), "32-bit values of unknown range"),
        (Image.new("LAB", (4, 4)), "colour space 8"),
    ],
)
def test_tiffs_whose_values_have_no_one_meaning_are_refused(image, words):
    error = refusal(encoded(image, "TIFF"))
    assert error.code == "other_format"
    assert words in error.reason


def test_the_first_page_of_a_tiff_is_decoded_and_pages_are_counted():
    data = encoded(quarters(), "TIFF", save_all=True, append_images=[Image.new("L", (9, 9))] * 4)
    assert decode(data, LIMIT).tobytes() == quarters().tobytes()
    assert image_header.count_frames(data, Image.open(io.BytesIO(data))) == 5
    at = struct.unpack("<I", data[4:8])[0]
    entries = struct.unpack("<H", data[at : at + 2])[0]
    own = at + 2 + 12 * entries
    endless = data[:own] + data[4:8] + data[own + 4 :]  # the page after the first is the first
    assert image_header.count_frames(endless, Image.open(io.BytesIO(data))) == 1
    assert decode(endless, LIMIT).tobytes() == quarters().tobytes()


def test_a_sequence_shows_its_first_frame():
    data = encoded(quarters(), "AVIF", save_all=True, append_images=[Image.new("RGB", (64, 32))], quality=95)
    assert data[8:12] == b"avis"
    assert close(decode(data, LIMIT), quarters())


def test_a_grid_is_put_together(monkeypatch):
    monkeypatch.setattr(heif.options, "GRID_TILE_SIZE", 64)
    image = quarters().resize((200, 150), Image.Resampling.NEAREST)
    data = encoded(image, "HEIF", quality=95)
    assert b"grid" in data
    assert close(decode(data, LIMIT), image)


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_the_general_brand_is_decoded_by_the_compatible_ones(kind):
    data = encoded(quarters(), kind, quality=95)
    assert close(decode(data[:8] + b"mif1" + data[12:], LIMIT), quarters())


# Limits ---------------------------------------------------------------------------------------------------------------


def test_a_missing_decoder_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    error = refusal(encoded(quarters(), "HEIF"))
    assert (error.code, error.reason) == ("no_decoder", "is a HEIC image: pip install 'pillow-heif>=1'")
    monkeypatch.setattr("PIL.AvifImagePlugin.SUPPORTED", False)
    assert refusal(encoded(quarters(), "AVIF")).code == "no_decoder"


@pytest.mark.parametrize("kind", ["AVIF", "HEIF", "TIFF"])
def test_pixels_are_limited_by_the_header(kind):
    data = encoded(quarters().resize((64, 64)), kind)
    assert decode(data, 64 * 64).size == (64, 64)
    assert refusal(data, 64 * 64 - 1).reason == "64 x 64 pixels by its header, more than the limit of 4,095"


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_memory_is_estimated_from_the_header(kind):
    data = encoded(quarters().resize((64, 64)), kind)
    data = data.replace(b"ispe" + struct.pack(">III", 0, 64, 64), b"ispe" + struct.pack(">III", 0, 8_000, 8_000))
    assert refusal(data).code == "too_much_memory"


def test_an_avif_that_is_larger_than_its_box_says_is_refused():
    """A small box around a large frame, which its decoder would allocate first."""
    data = encoded(Image.new("RGB", (3_000, 2_000)), "AVIF", speed=10)
    small = data.replace(b"ispe" + struct.pack(">III", 0, 3_000, 2_000), b"ispe" + struct.pack(">III", 0, 64, 64))
    assert small != data
    assert refusal(small, 1_000_000).code == "too_many_pixels"


def tiff(fields, body=b"", big=False):
    """A TIFF of one page by hand: {tag: (type, count, value)}."""
    size, kinds = ("Q", "<HHQQ") if big else ("I", "<HHII")
    entries = b"".join(struct.pack(kinds, tag, *entry) for tag, entry in sorted(fields.items()))
    start = b"II+\0" + struct.pack("<HHQ", 8, 0, 16) if big else b"II*\0" + struct.pack("<I", 8)
    return start + struct.pack("<Q" if big else "<H", len(fields)) + entries + struct.pack("<" + size, 0) + body


def page(**more):
    fields = {256: (4, 1, 64), 257: (4, 1, 64), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 273: (4, 1, 8)}
    fields |= {277: (3, 1, 1), 278: (4, 1, 64), 279: (4, 1, 4096)}
    return fields | {int(tag[1:]): entry for tag, entry in more.items()}


TIFFS = {
    "pixels": (page(_256=(4, 1, 60_000), _257=(4, 1, 60_000)), "too_many_pixels"),
    "sides": (page(_256=(4, 1, 2**32 - 1), _257=(4, 1, 1)), "too_m"),
    "tile": (page(_259=(3, 1, 5), _322=(4, 1, 60_000), _323=(4, 1, 60_000), _324=(4, 1, 8), _325=(4, 1, 99)),
             "too_much_memory"),
    "channels": (page(_277=(3, 1, 65_535)), "other_format"),
    "count": (page(_273=(4, 2**31, 8)), "too_much_work"),
    "entries": (dict.fromkeys(range(30000, 31001), (1, 1, 0)), "too_much_work"),
    "lzma": (page(_259=(3, 1, 34_925)), "other_format"),
    "fraction": (page(_256=(12, 1, 8)), "decoder_error"),
}  # fmt: skip


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("name", TIFFS)
def test_tiffs_that_take_too_much_are_refused_from_their_header(name, big):
    fields, code = TIFFS[name]
    began = time.process_time()
    error = refusal(tiff(fields, bytes(200_000 if name == "count" else 5_000), big))
    assert time.process_time() - began < 0.2
    assert code in error.code or (name == "count" and error.code == "truncated"), error.reason


def test_long_metadata_of_a_tiff_is_not_read():
    """A thousand fields, each as long as the file: a thousand times its size, if they were read."""
    fields = page() | dict.fromkeys(range(40000, 40900), (1, 4000000, 8))
    before = resident()
    assert decode(tiff(fields, bytes(4_100_000)), LIMIT).size == (64, 64)
    assert resident() - before < 60e6


def resident():
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_long_metadata_turns_no_image():
    """An EXIF block whose fields overlap would take many times its size."""
    exif = b"Exif\0\0" + tiff({274: (3, 1, 6)} | dict.fromkeys(range(40000, 40900), (1, 60000, 8)), bytes(60_000))
    data = encoded(quarters(), "PNG", exif=exif)
    assert decode(data, LIMIT).tobytes() == quarters().tobytes()
    assert decode(encoded(quarters(), "PNG", exif=turned(6)), LIMIT).size == (32, 64)


def box(kind, *parts):
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def image_file(items, references, sizes, brand=b"heic"):
    """A HEIC header by hand: {id: kind}, [(kind, from, to)] and {id: (width, height)}; the first item is the image."""
    names = b"".join(box(b"infe", struct.pack(">IHH4sB", 2 << 24, item, 0, kind, 0)) for item, kind in items.items())
    links = [box(kind, struct.pack(f">HH{len(to)}H", item, len(to), *to)) for kind, item, to in references]
    shapes = b"".join(box(b"ispe", struct.pack(">III", 0, *size)) for size in sizes.values())
    owners = b"".join(struct.pack(">HBB", item, 1, number) for number, item in enumerate(sizes, 1))
    return box(b"ftyp", brand, bytes(4), b"mif1", brand) + box(
        b"meta",
        bytes(4),
        box(b"pitm", bytes(4), struct.pack(">H", next(iter(items)))),
        box(b"iinf", bytes(4), struct.pack(">H", len(items)), names),
        box(b"iref", bytes(4), *links),
        box(b"iprp", box(b"ipco", shapes), box(b"ipma", struct.pack(">II", 0, len(sizes)), owners)),
    )


def test_parts_of_an_image_are_counted():
    header, _ = isobmff.read_header(image_file({1: b"hvc1"}, [], {1: (640, 480)}))
    assert header == ("HEIC", 640, 480)
    tiles = dict.fromkeys(range(2, 6), b"hvc1")
    good = image_file(
        {1: b"grid"} | tiles, [(b"dimg", 1, [2, 3, 4, 5])], {1: (1000, 1000)} | dict.fromkeys(tiles, (512, 512))
    )
    assert isobmff.read_header(good)[0] == ("HEIC", 1000, 1000)
    same = image_file({1: b"grid", 2: b"hvc1"}, [(b"dimg", 1, [2] * 60_000)], {1: (1000, 1000), 2: (1000, 1000)})
    chain = dict.fromkeys(range(1, 30), b"iovl")
    doubled = [(b"dimg", n, [n + 1] * 100) for n in chain]
    circle = image_file({1: b"iden", 2: b"iden"}, [(b"dimg", 1, [2]), (b"dimg", 2, [1])], {1: (9, 9), 2: (9, 9)})
    for data in (same, image_file(chain, doubled, dict.fromkeys(chain, (9, 9))), circle):
        began = time.process_time()
        assert refusal(data).code == "too_much_work"
        assert time.process_time() - began < 0.5


def test_other_codecs_in_the_same_container_are_refused():
    error = refusal(image_file({1: b"grid", 2: b"unci"}, [(b"dimg", 1, [2])], {1: (64, 64), 2: (64, 64)}))
    assert (error.code, error.reason.split(";")[0]) == ("other_format", "is a HEIF image coded as unci")


@pytest.mark.parametrize("kind", ["AVIF", "HEIF", "TIFF"])
def test_every_truncation_is_refused(kind):
    data = encoded(Image.fromarray(np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8)), kind)
    for share in np.linspace(0, 0.99, 60):
        assert refusal(data[: int(len(data) * share)]).code in ("truncated", "not_an_image", "empty_file"), share


def seeds():
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 4), dtype=np.uint8)
    image, clear = Image.fromarray(noise[..., :3]), Image.fromarray(noise)
    exif = turned(6)
    yield from (encoded(clear, "AVIF", exif=exif), encoded(clear, "HEIF", exif=exif))
    yield encoded(image, "AVIF", save_all=True, append_images=[image])
    yield from (encoded(image, "TIFF", compression=c) for c in ("raw", "tiff_lzw", "jpeg", "tiff_adobe_deflate"))
    yield from (encoded(image, "TIFF", big_tiff=True), encoded(clear.convert("1"), "TIFF", compression="group4"))


def mutated(data, draw):
    changed = bytearray(data)
    for _ in range(draw.choice((1, 2, 4))):
        at = draw.randrange(min(len(changed), 700))
        if draw.random() < 0.5:
            changed[at] = draw.randrange(256)
        else:
            changed[at : at + 4] = struct.pack(">I", draw.choice((0, 1, 65_535, 2**31, 2**32 - 1)))
    return bytes(changed[: draw.randrange(len(changed))] if draw.random() < 0.2 else changed)


@pytest.mark.parametrize("count", [40, pytest.param(2_000, marks=pytest.mark.slow)])
def test_mutated_files_are_decoded_or_refused(count, capfd):
    """Nothing but UnreadableImage, nothing printed, no long decoding."""
    draw, outcomes = random.Random(0), Counter()
    for data in seeds():
        for _ in range(count):
            began = time.process_time()
            try:
                outcomes[model_input(mutated(data, draw), LIMIT, lambda image: image.mode)] += 1
            except UnreadableImage as error:
                outcomes[error.code] += 1
            assert time.process_time() - began < 2
    assert min(outcomes[one] for one in ("RGB", "decoder_error", "truncated", "not_an_image")) > count / 4
    assert capfd.readouterr() == ("", "")


def test_a_damaged_tiff_prints_nothing(tmp_path):
    """Its library writes to the terminal by itself; in a process of its own, as a worker is."""
    data = bytearray(encoded(Image.fromarray(np.random.default_rng(0).integers(0, 2, (64, 64), dtype=np.uint8) * 255)
                             .convert("1"), "TIFF", compression="group4"))  # fmt: skip
    data[20:60] = bytes(40)
    (tmp_path / "a.tif").write_bytes(data)
    program = (
        "import sys; from pathlib import Path; from blip.data.images import UnreadableImage, decode\n"
        "try: decode(Path(sys.argv[1]), 10**8)\nexcept UnreadableImage as error: print(error.code)"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "a.tif"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
