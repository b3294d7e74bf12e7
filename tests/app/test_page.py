"""What the pages of runs draw: places by hand arithmetic, and texts that cannot become markup."""

import re

from PIL import Image

from blip.app import page


def test_intervals_are_drawn_to_scale():
    """Values 10 to 30 (with what is beside them) over the width between names and figures, 250 to 440."""
    drawn = page.intervals("TR@1 <here>", [("neither", 15.0, 5.0), ("both", 25.0, 5.0)])
    lines = [tuple(map(float, one)) for one in re.findall(r'd="M([\d.]+),[\d.]+H([\d.]+)"', drawn)]
    assert lines == [(250.0, 345.0), (345.0, 440.0)]
    assert [float(x) for x in re.findall(r'cx="([\d.]+)"', drawn)] == [297.5, 392.5]
    assert re.search(r'd="M297.5,', drawn), "the line through the first value"
    assert "TR@1 &lt;here&gt;" in drawn
    assert "<here>" not in drawn


def test_intervals_of_one_value_or_none():
    assert 'cx="250.0"' in page.intervals("x", [("a", 3.0, 0.0)])
    assert page.intervals("x", []) == ""


def test_notes_label_texts_and_mark_what_is_right():
    lines = [
        ("found, dropped", page.JudgedText("<b>buy</b>", False)),
        ("written, kept", page.JudgedText("a red star", True)),
    ]
    drawn = page.notes([page.Note(Image.new("RGB", (4, 4)), lines)], 8)
    assert drawn.count('src="data:image/jpeg;base64,') == 1
    assert '<b>found, dropped</b> <span class="no">&lt;b&gt;buy&lt;/b&gt; ✗</span>' in drawn
    assert '<b>written, kept</b> <span class="yes">a red star ✓</span>' in drawn
