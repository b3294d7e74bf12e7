"""JPEGs without their last bytes: read where every pixel is there, refused where one may be missing."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from blip.data import images
from blip.data.images import UnreadableImage, decode

LIMIT = 100_000_000
KINDS = {
    "baseline": {"quality": 80},
    "no subsampling": {"quality": 95, "subsampling": 0, "optimize": True},
    "progressive": {"quality": 85, "progressive": True},
    "grey": {"quality": 60},
    "restarts": {"quality": 80, "restart_marker_blocks": 3},
}


def textured(kind, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (72, 96, 3), dtype=np.uint8)
    image = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2))
    file = io.BytesIO()
    (image.convert("L") if kind == "grey" else image).save(file, "JPEG", **KINDS[kind])
    return file.getvalue()


def outcome(data):
    try:
        return decode(data, LIMIT).tobytes()
    except UnreadableImage as error:
        return error.code


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_end_may_be_missing(kind):
    """What is read has the pixels of the whole file; nothing with four bytes of its pixels missing is read."""
    accepted = 0
    for seed in range(8):
        data = textured(kind, seed)
        whole = outcome(data)
        for cut in range(1, 601, 1 if seed == 0 else 37):
            got = outcome(data[:-cut])
            if cut <= 2:
                assert got == whole, cut
            assert got == whole or isinstance(got, str), cut
            accepted += cut > 2 and got == whole
            assert cut < 6 or isinstance(got, str), cut
    assert accepted <= 4


def test_a_missing_scan_is_noticed():
    """The pixels of fewer scans are complete in themselves, and coarser than those of the image."""
    data = textured("progressive")
    starts = [at for at in range(len(data)) if data.startswith(b"\xff\xda", at)]
    assert len(starts) > 5
    for start in starts[1:]:
        table = data.rfind(b"\xff\xc4", 0, start)  # of the scan
        assert outcome(data[: min(start, table)]) == "truncated"
        assert outcome(data[:start]) == "truncated"


def test_a_missing_channel_is_noticed():
    """A baseline JPEG with a scan for each channel, cut after the first."""
    data = textured("grey")
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    height_width = data[frame + 5 : frame + 9]
    three = b"\xff\xc0\0\x11\x08" + height_width + b"\3" + b"\1\x11\0\2\x11\0\3\x11\0"
    end = frame + 2 + int.from_bytes(data[frame + 2 : frame + 4], "big")
    assert data[scan + 4 : scan + 6] == b"\1\1"  # the only component
    assert outcome(data[:frame] + three + data[end:-2]) == "truncated"


def test_the_fraction_that_is_decoded_does_not_matter():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8))
    file = io.BytesIO()
    image.save(file, "JPEG")
    data = file.getvalue()
    assert decode(data[:-2], LIMIT, at_least=100).tobytes() == decode(data, LIMIT, at_least=100).tobytes()
    with pytest.raises(UnreadableImage, match="truncated"):
        decode(data[:-40], LIMIT, at_least=100)


def test_whole_files_are_decoded_once(monkeypatch):
    calls = []
    as_stored = images._as_stored
    monkeypatch.setattr(images, "_as_stored", lambda *given: calls.append(1) or as_stored(*given))
    outcome(textured("progressive"))
    assert len(calls) == 1
