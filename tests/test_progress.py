"""The progress bar of long work."""

import io
import sys

from blip.progress import bar, clock


def test_long_work_tells_how_far_it_is_and_survives_who_listened(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stderr := io.StringIO())
    with bar(10, "short", "images") as short:
        short.update(10)
    assert stderr.getvalue() == "", "what is done at once needs no progress"
    with bar(10, "long", "images") as line:
        line.start_t -= 100
        line.update(5)
    assert "long:  50%" in stderr.getvalue()
    assert "5/10" in stderr.getvalue()

    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError("nobody reads this")

    monkeypatch.setattr(sys, "stderr", Gone())
    with bar(10, "long", "images") as line:
        line.start_t -= 100
        line.update(5)
    assert line.n == 5


def test_clock():
    assert clock(3725.9) == "1:02:05"
