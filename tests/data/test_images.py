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
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from blip.data import images
from blip.data.image_header import count_frames
from blip.data.images import UnreadableImage, decode, model_input

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


def test_a_path_and_a_image_are_decoded_too(tmp_path):
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


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_allowed_formats_are_decoded(kind):
    assert decode(encoded(Image.fromarray(noise()), kind), LIMIT).size == (20, 30)


@pytest.mark.parametrize("kind", ["PPM", "TGA", "ICO", "PCX", "SGI", "EPS", "PDF"])
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


def test_an_opened_image_is_what_its_file_is():
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
    "gzip": b"\x1f\x8b\x08\0\0\0\0\0",
    "not one of": b"hello, I am not an image",
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
    error = pickle.loads(pickle.dumps(UnreadableImage("truncated", "because")))
    assert (type(error), error.reason, str(error)) == (UnreadableImage, "because", "because")
    assert error.code == "truncated"


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


def png(width, height, *, before=b"", after=b"", depth=8, colour=0):
    """Black, with other chunks before and after the pixels."""
    row = bytes(1 + (width * depth * {0: 1, 2: 3, 6: 4}[colour] + 7) // 8)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(row * height))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + pixels + after + chunk(b"IEND", b"")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_sides_and_aspect_are_limited_as_well_as_the_area():
    assert why(png(100_000_000, 1)) == "100,000,000 x 1 pixels by its header, more than the limit of 65,535 for a side"
    assert "65,535 for a side" in why(png(66, 65_536))
    assert "1,000 to 1" in why(png(1001, 1))
    assert "1,000 to 1" in why(png(2, 2001))
    assert decode(png(1000, 1), LIMIT).size == (1000, 1)
    with pytest.raises(UnreadableImage, match="1,000 to 1"):
        decode(Image.new("L", (1, 1001)), LIMIT)


def test_what_a_transform_raises_is_the_image_s_fault():
    def fail(error):
        def transform(image):
            assert image.mode == "RGB"
            raise error

        return transform

    data = encoded(Image.fromarray(noise()))
    for error in (MemoryError(), OSError(28, "no"), ValueError("a"), OverflowError("b"), RuntimeError("c")):
        with pytest.raises(UnreadableImage):
            model_input(data, LIMIT, fail(error))
    with pytest.raises(KeyboardInterrupt):
        model_input(data, LIMIT, fail(KeyboardInterrupt()))
    assert model_input(data, LIMIT, lambda image: image.size) == (20, 30)


def test_memory_is_estimated_from_the_header():
    """Progressive CMYK: 4 x 2 bytes of coefficients and 4 of pixels, which is 1.12 GiB for 100 million."""
    data = bytearray(encoded(Image.new("CMYK", (16, 16)), "JPEG", progressive=True))
    at = data.index(b"\xff\xc2")
    data[at + 5 : at + 9] = struct.pack(">HH", 10_000, 10_000)
    assert why(bytes(data)) == "needs 1.1 GiB to decode by its header, more than the limit of 1 GiB"
    data[at + 5 : at + 9] = struct.pack(">HH", 8_000, 10_000)  # 0.89 GiB
    assert "GiB" not in (outcome(bytes(data)) or "")
    assert "GiB" in why(BOMBS["webp 268 Mpx"], 300_000_000)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16", "P", "CMYK", "L", "1"])
def test_large_images_are_converted_in_bands(mode, monkeypatch):
    grey = Image.fromarray((np.arange(50 * 31) * 41 % 65_536).astype(np.uint16).reshape(50, 31))
    image = grey if mode == "I;16" else Image.fromarray(noise((31, 50), 4), "RGBA").convert(mode)
    options = {"transparency": 7} if mode == "P" else {}
    data = encoded(image, "JPEG" if mode == "CMYK" else "PNG", **options)
    whole = decode(data, LIMIT)
    monkeypatch.setattr(images, "_BAND", 31 * 7)
    banded = decode(data, LIMIT)
    assert banded.tobytes() == whole.tobytes()
    assert len(set(whole.tobytes())) > 1


@pytest.mark.parametrize("orientation", range(1, 10))
def test_every_orientation_is_as_pillow_turns_it(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(Image.fromarray(noise()), exif=exif)
    assert decode(data, LIMIT).tobytes() == ImageOps.exif_transpose(Image.open(io.BytesIO(data))).tobytes()


# Work that the size does not bound -----------------------------------------------------------------------------------


def scanned(times, side=64):
    """A progressive JPEG, its last scan again and again."""
    data = encoded(Image.new("RGB", (side, side), (90, 120, 30)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * times + data[-2:], data.count(b"\xff\xda")


def test_scans_of_a_jpeg_are_counted_before_decoding():
    few, own = scanned(0)
    assert decode(scanned(100 - own)[0], LIMIT).tobytes() == decode(few, LIMIT).tobytes()
    assert why(scanned(101 - own)[0]) == "too much work to decode: more than 100 scans of 64 x 64 pixels"
    many, _ = scanned(300)
    assert decode(few + many, LIMIT).size == (64, 64)  # a second image in the file, which is not decoded
    inside = few[:2] + b"\xff\xe5" + struct.pack(">H", 30_002) + b"\xff\xda" * 15_000 + few[2:]
    assert decode(inside, LIMIT).tobytes() == decode(few, LIMIT).tobytes()  # metadata that looks like scans


def test_large_images_may_have_fewer_scans():
    data = bytearray(scanned(60)[0])
    at = data.index(b"\xff\xc2")
    data[at + 5 : at + 9] = struct.pack(">HH", 10_000, 10_000)
    assert "more than 40 scans of 10,000 x 10,000 pixels" in why(bytes(data))  # 4,000 million pixels in all


SEGMENT = b"\xff\xe3\0\2"
PLAIN = encoded(Image.new("RGB", (8, 8), (1, 2, 3)), "JPEG")
GIF = encoded(Image.new("P", (8, 8)), "GIF")


def bitmap(width, height, body):
    palette = bytes(range(256)) * 4
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(body), 0, 0, 1078) + header + palette + body


WORK = {
    "jpeg segments": PLAIN[:2] + SEGMENT * 200_000 + PLAIN[2:],
    "png chunks": png(8, 8, before=chunk(b"IDAT", b"") * 200_000),
    "png deflate": png(8, 8, before=chunk(b"IDAT", b"\x78\x9c" + b"\0\0\0\xff\xff" * 500_000)),
    "gif bytes": GIF[:-1][:13] + b"w" * 1_500_000 + GIF[13:],
    "bmp pixels": bitmap(10_000, 1_001, b""),
    "bmp bytes": bitmap(64, 64, b"\0\0" * 100_000 + b"\0\1"),
}


@pytest.mark.parametrize("name", WORK)
def test_work_beyond_the_pixels_is_refused_before_it_is_done(name):
    began = time.process_time()
    reason = why(WORK[name])
    assert "too much work" in reason or "run-length" in reason
    assert time.process_time() - began < 2


def test_a_run_length_encoded_bitmap_is_decoded():
    rows = b"".join(bytes([8, row]) + b"\0\0" for row in range(8))
    assert decode(bitmap(8, 8, rows + b"\0\1"), LIMIT).size == (8, 8)


def test_frames_of_an_animation_are_counted_up_to_a_limit():
    frames = [Image.fromarray(noise((8, 8), seed=i)) for i in range(5)]
    several = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert count_frames(several, Image.open(io.BytesIO(several))) == Image.open(io.BytesIO(several)).n_frames == 5
    start = 13 + (3 << (GIF[10] & 7) + 1) * (GIF[10] >> 7)
    many = GIF[:start] + GIF[start:-1] * 20_000 + b";"
    assert count_frames(many, Image.open(io.BytesIO(many))) == 10_000
    assert count_frames(PLAIN, Image.open(io.BytesIO(PLAIN))) == 1


# Metadata says nothing about the pixels ------------------------------------------------------------------------------


def test_metadata_of_any_size_and_state_refuses_no_image():
    text = PngImagePlugin.PngInfo()
    text.add_itxt("workflow", "node " * 400_000, zip=True)  # 2 MB, more than Pillow unpacks
    image = Image.fromarray(noise())
    datas = [
        encoded(image, pnginfo=text),
        encoded(image, icc_profile=bytes(2_000_000)),
        png(8, 8, before=chunk(b"zTXt", b"key\0\x07")),  # a way of packing that there is not
        # The same in texts that may hold the orientation, which are read.
        png(8, 8, before=chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(9_000_000)))),
        png(8, 8, before=chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(9_000_000)))),
        png(8, 8, before=chunk(b"zTXt", b"Raw profile type exif\0\x07" + zlib.compress(b"x"))),
        png(8, 8, before=chunk(b"tEXt", b"XML:com.adobe.xmp\0" + bytes(65_000)) * 1_200),
        png(8, 8, before=chunk(b"tEXt", b"comment\0" + b"a" * 3_000_000)),
        encoded(image, "JPEG", icc_profile=bytes(3_000_000), comment=bytes(60_000)),
        encoded(
            image,
            "WEBP",
            icc_profile=bytes(3_000_000),
            exif=b"MM\0*\0\0\0\x08" + bytes(3_000_000),
            xmp=bytes(3_000_000),
        ),
        encoded(image, "TIFF", icc_profile=bytes(3_000_000), tiffinfo={270: "a" * 3_000_000}),
        encoded(
            image,
            "AVIF",
            icc_profile=bytes(3_000_000),
            exif=b"MM\0*\0\0\0\x08" + bytes(3_000_000),
            xmp=bytes(3_000_000),
        ),
        png(8, 8, before=chunk(b"tEXt", b"key\0value")[:-1] + b"?"),  # a wrong checksum
        png(8, 8, after=chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(2_000_000)))),
        GIF[:-1][:13] + GIF[13:],
        PLAIN[:2] + SEGMENT * 5_000 + PLAIN[2:],
        PLAIN[:2] + b"junk" * 5_000 + PLAIN[2:],
    ]
    assert [outcome(data) for data in datas] == [None] * len(datas)
    assert decode(datas[0], LIMIT).tobytes() == decode(datas[1], LIMIT).tobytes() == image.tobytes()
    assert decode(datas[-1], LIMIT).tobytes() == decode(datas[-2], LIMIT).tobytes() == decode(PLAIN, LIMIT).tobytes()


def test_comments_of_a_gif_are_not_read():
    start = 13 + (3 << (GIF[10] & 7) + 1) * (GIF[10] >> 7)
    comment = b"!\xfe" + b"\xffabc" * 64 * 1_500 + b"\0"
    assert decode(GIF[:start] + comment + GIF[start:], LIMIT).tobytes() == decode(GIF, LIMIT).tobytes()


def test_the_orientation_is_found_in_texts_of_a_png_too():
    image = Image.fromarray(noise())
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    assert decode(encoded(image, pnginfo=text), LIMIT).tobytes() == image.rotate(-90, expand=True).tobytes()


def test_the_limit_is_ours():
    data = encoded(Image.new("RGB", (100, 100)))
    assert decode(data, 10_000).size == (100, 100)
    assert why(data, 9_999) == "100 x 100 pixels by its header, more than the limit of 9,999"


def test_a_large_legal_image_warns_nobody(recwarn, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8000)  # Pillow warns above this, below our limit
    assert decode(encoded(Image.new("1", (100, 100))), LIMIT).size == (100, 100)
    assert not recwarn.list


def test_real_broken_images_are_decoded_or_refused_as_their_record_says(real_data):
    folder = real_data / "broken_images"
    cases = json.loads((folder / "manifest.json").read_text())
    decoded = 0
    # Metadata that unpacks to more than Pillow reads, and a JPEG without the last byte of its end marker: whole pixels.
    whole = ("pillow_ded2d7_png_decompression_dos.png", "pillow_e3f68b_truncated_jpeg.jpg")
    cases = [case for case in cases if case["file"] not in whole]
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
