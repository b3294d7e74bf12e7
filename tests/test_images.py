import io
import json
import os
import pickle
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image, ImageFile

from blip.data.images import UnreadableImage, decode

LIMIT = 100_000_000


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(size=(20, 30), channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)


def why(data, limit=LIMIT):
    with pytest.raises(UnreadableImage) as caught:
        decode(data, limit)
    return caught.value.reason


def test_rgb_is_left_as_it_is():
    pixels = noise()
    image = decode(encoded(Image.fromarray(pixels)), LIMIT)
    assert image.mode == "RGB"
    assert (np.asarray(image) == pixels).all()


def test_a_path_and_a_picture_are_decoded_too(tmp_path):
    image = Image.fromarray(noise())
    path = tmp_path / "ünïcode name.png"
    image.save(path)
    assert decode(path, LIMIT).tobytes() == image.tobytes() == decode(image, LIMIT).tobytes()


def test_transparency_lies_over_white():
    pixels = noise(channels=4)
    colour, alpha = pixels[..., :3].astype(float), pixels[..., 3:].astype(float) / 255
    expected = colour * alpha + 255 * (1 - alpha)
    got = np.asarray(decode(encoded(Image.fromarray(pixels, "RGBA")), LIMIT), float)
    assert np.abs(got - expected).max() <= 1


def test_a_transparent_palette_entry_is_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        got = decode(encoded(image, kind, transparency=0), LIMIT)
        assert got.getpixel((0, 0)) == (255, 255, 255)
        assert got.getpixel((1, 0)) == (200, 100, 50)


def test_a_transparent_rgb_colour_is_white():
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    got = decode(encoded(image, transparency=(1, 2, 3)), LIMIT)
    assert [got.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (9, 9, 9)]


def test_grey_cmyk_bits_and_palette():
    assert decode(encoded(Image.new("L", (3, 3), 77)), LIMIT).getpixel((1, 1)) == (77, 77, 77)
    assert decode(encoded(Image.new("1", (3, 3), 1)), LIMIT).getpixel((1, 1)) == (255, 255, 255)
    cyan = decode(encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG"), LIMIT).getpixel((8, 8))
    assert cyan[0] < 40
    assert min(cyan[1:]) > 150
    assert decode(encoded(Image.new("LA", (3, 3), (0, 0))), LIMIT).getpixel((1, 1)) == (255, 255, 255)


def test_sixteen_bits_become_eight():
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    got = np.asarray(decode(encoded(Image.fromarray(values)), LIMIT))
    assert got[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_allowed_formats_are_decoded(kind):
    assert decode(encoded(Image.fromarray(noise()), kind), LIMIT).size == (20, 30)


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "TGA", "ICO", "PCX", "SGI", "EPS", "PDF"])
def test_other_formats_are_refused(kind):
    assert why(encoded(Image.fromarray(noise((32, 32))), kind))


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned: rotate by 90 degrees clockwise
    got = decode(encoded(image, "JPEG", exif=exif, quality=95), LIMIT)
    assert got.size == (16, 32)
    assert got.getpixel((8, 4))[0] > 200
    assert got.getpixel((8, 28))[0] < 50


def test_an_opened_picture_is_what_its_file_is():
    """Upright too, and refused in the same way."""
    exif = Image.Exif()
    exif[274] = 6
    for data in (encoded(Image.fromarray(noise()), exif=exif), encoded(Image.fromarray(noise()))):
        assert np.array_equal(decode(Image.open(io.BytesIO(data)), LIMIT), decode(data, LIMIT))
    with pytest.raises(UnreadableImage, match="truncated"):
        decode(Image.open(io.BytesIO(encoded(Image.fromarray(noise()), "BMP")[:-300])), LIMIT)


def test_damaged_exif_does_not_matter():
    data = encoded(Image.new("RGB", (8, 8)), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 40)
    assert decode(data, LIMIT).size == (8, 8)


def test_draft_keeps_at_least_the_size_asked_for():
    data = encoded(Image.fromarray(noise((640, 480))), "JPEG")
    assert decode(data, LIMIT).size == (640, 480)
    assert decode(data, LIMIT, at_least=192).size == (320, 240)
    assert decode(data, LIMIT, at_least=241).size == (640, 480)


ACCIDENTS = {
    "0 bytes": b"",
    "git-LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "HTML": b"\n<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "XML": b"<?xml version='1.0'?><svg/>",
    "PDF": b"%PDF-1.7 ...",
    "HEIC": b"\0\0\0\x18ftypheic" + bytes(40),
    "gzip": b"\x1f\x8b\x08\0\0\0\0\0",
    "not one of": b"hello, I am not a picture",
}


@pytest.mark.parametrize("word", ACCIDENTS)
def test_common_accidents_are_named(word):
    assert word in why(ACCIDENTS[word])


def test_files_that_cannot_be_read_are_named(tmp_path):
    assert why(tmp_path / "absent.jpg") == "no such file"
    assert "not a regular file" in why(tmp_path) or "cannot be read" in why(tmp_path)
    os.mkfifo(tmp_path / "pipe.jpg")
    assert why(tmp_path / "pipe.jpg") == "not a regular file"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_every_truncation_is_refused_even_if_a_library_allowed_them(kind, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encoded(Image.fromarray(noise((64, 48))), kind)
    for share in np.linspace(0, 0.9, 50):
        assert why(data[: int(len(data) * share)])


def test_the_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(UnreadableImage("because")))
    assert (type(error), error.reason, str(error)) == (UnreadableImage, "because", "because")


def png_claiming(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packed = zlib.compressobj(9)
    rows = b"".join(packed.compress(bytes(1 << 20)) for _ in range(64)) + packed.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


BOMBS = {
    "gif 4.3 Gpx": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
    + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02L\x01\0;",
    "bmp 6 Tpx": b"BM" + bytes(12) + struct.pack("<IiiHHIIiiII", 40, 2**31 - 1, 2900, 1, 24, 0, 0, 0, 0, 0, 0),
    "png 178 Mpx": png_claiming(13350, 13350),
    "webp 268 Mpx": b"RIFF" + struct.pack("<I", 100) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0"
    # canvas sides minus one, 24 bits each
    + b"\xff\x3f\0\xff\x3f\0" + bytes(80),
    "webp lossless": b"RIFF" + struct.pack("<I", 100) + b"WEBPVP8L" + struct.pack("<I", 90) + b"\x2f"
    + struct.pack("<I", 0x0FFFFFFF) + bytes(80),
}  # fmt: skip


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_from_their_header(name):
    why(encoded(Image.new("RGB", (2, 2))), 1)  # plugins are loaded
    before, began = resident(), time.perf_counter()
    reason = why(BOMBS[name])
    assert time.perf_counter() - began < 0.1
    assert resident() - before < 50e6
    assert "pixels" in reason


def test_the_limit_is_ours():
    data = encoded(Image.new("RGB", (100, 100)))
    assert decode(data, 10_000).size == (100, 100)
    assert why(data, 9_999) == "100 x 100 pixels by its header, more than the limit of 9,999"


def test_a_large_legal_picture_warns_nobody(recwarn, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8000)  # Pillow warns above this, below our limit
    assert decode(encoded(Image.new("1", (100, 100))), LIMIT).size == (100, 100)
    assert not recwarn.list


def test_real_broken_images_are_decoded_or_refused_as_their_record_says(real_data):
    folder = real_data / "broken_images"
    cases = json.loads((folder / "manifest.json").read_text())
    decoded = 0
    for case in cases:
        began = time.perf_counter()
        reason = outcome(folder / case["file"])
        assert time.perf_counter() - began < 10
        if reason is None:
            assert case["outcome"].startswith("ok"), f"{case} was decoded"
            decoded += 1
        elif case["file"].endswith((".jpg", ".jpeg", ".webp")):
            assert not case["outcome"].startswith("ok"), f"{case}: {reason}"
    assert len(cases) > 300
    assert decoded > (100 if int(PIL.__version__.split(".")[0]) >= 13 else 90)  # older Pillow refuses some bitmaps


def outcome(path):
    """None if it decodes to RGB, the reason if it is refused; any other exception is a failure."""
    try:
        assert decode(path, LIMIT).mode == "RGB"
    except UnreadableImage as error:
        return error.reason or "?"


def test_real_photographs_and_emoji(real_data):
    for file in [
        *sorted((real_data / "photos" / "images").iterdir())[:10],
        *sorted((real_data / "emoji/png").glob("*"))[:10],
    ]:
        image = decode(file, LIMIT)
        assert image.mode == "RGB"
        assert image.size == Image.open(file).size
    corner = decode(real_data / "emoji" / "png" / "emoji_u002a.png", LIMIT).getpixel((0, 0))
    assert corner == (255, 255, 255)
