"""The builder of pages: its policy, its escaping, its tables, and charts by hand arithmetic."""

import base64
import hashlib
import math
import re

import jinja2
import pytest
from PIL import Image

from blip.app import html
from blip.app.html import charts
from blip.app.html.charts import Estimate


@pytest.fixture
def rendered(monkeypatch):
    """Render a template that stands in the test; scripts are those given by name."""

    def render(source, scripts=(), **data):
        files = {"test.html": '{% extends "page.html" %}{% from "parts.html" import grid, details %}' + source}
        files |= dict(scripts)
        real = html._content
        with monkeypatch.context() as patch:
            patch.setattr(html, "_content", lambda name: files.get(name) or real(name))
            html._environment.cache_clear()
            try:
                return html.page("test.html", **{"title": "A finding", "scripts": [*dict(scripts)], **data})
            finally:
                html._environment.cache_clear()

    return render


def sha256(content):
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def test_the_policy_allows_this_style_and_these_scripts_only(rendered):
    page = rendered("", {"a.js": "let a = '<b>' && 1;\n", "b.js": "2"}, allow={"connect-src": "'self'"})
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1].replace("&#39;", "'")
    by_name = dict(part.split(" ", 1) for part in policy.split("; "))
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert scripts == ["let a = '<b>' && 1;\n", "2"]
    assert by_name.pop("style-src") == f"'{sha256(style)}'"
    assert by_name.pop("script-src") == " ".join(f"'{sha256(one)}'" for one in scripts)
    assert by_name.pop("connect-src") == "'self'"
    assert by_name == {"default-src": "'none'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'"}
    assert "script-src" not in rendered("")


def test_all_that_a_page_is_given_is_escaped(rendered):
    hostile = "</title><script>alert(1)</script>\0\ud800 \" onload='x'"
    card = html.Card(html.thumbnail(Image.new("RGB", (8, 4))), hostile, [html.Line(hostile, hostile, False)], hostile)
    table = html.PageTable(hostile, [hostile], [[hostile]])
    head = dict.fromkeys(("title", "kind", "lead", "alert"), hostile)
    source = "{% block content %}{{ grid(cards) }}{{ details(table) }}{% endblock %}"
    page = rendered(source, **head, figures=[html.Figure(hostile, hostile)], cards=[card], table=table)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 18
    page.encode()
    assert "\0" not in page
    assert "�" in page


def test_a_name_that_a_template_lacks_is_an_error(rendered):
    with pytest.raises(jinja2.UndefinedError, match="gone"):
        rendered("{% block content %}{{ gone }}{% endblock %}")


def test_tables_align_numbers_and_name_their_rows(rendered):
    rows = [["web", 1200, 3.25, "12.5%", "1.0 ± 0.2"], ["synthetic", 7, None, "-", ""]]
    table = html.PageTable("Texts", ["from", "number", "mean", "share", "words"], rows)
    page = rendered("{% block content %}{{ details(table) }}{% endblock %}", table=table)
    assert table.numeric == [False, True, True, True, True]
    assert '<th scope="row">web</th><td class="n">1,200</td><td class="n">3.2</td><td class="n">12.5%</td>' in page
    assert '<td class="n">-</td>' in page
    assert '<th scope="col" class="n">share</th>' in page
    assert html.PageTable("", ["a", "b"], []).numeric == [False, False]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (3.2, 4.1, [3.2, 3.4, 3.6, 3.8, 4]), (0, 16000, [0, 5000, 10000, 15000]),
     (-1, 1, [-1, -0.5, 0, 0.5, 1]), (5, 5, [5]), (0, 3e-14, [0, 1e-14, 2e-14, 3e-14])],
)  # fmt: skip
def test_ticks_are_round(low, high, expected):
    assert charts.ticks(low, high) == pytest.approx(expected, abs=1e-20)


def test_intervals_are_drawn_to_scale():
    """10 to 30 over the width between the margins, 8 to 352: 17.2 a unit."""
    drawn = charts.intervals("TR@1 <here>", [("neither", Estimate(15, 10, 20)), ("both", Estimate(25, 20, 30))])
    lines = [tuple(map(float, one)) for one in re.findall(r'd="M([\d.]+),[\d.]+H([\d.]+)"/><circle', drawn)]
    assert lines == [(8.0, 180.0), (180.0, 352.0)]
    assert [float(x) for x in re.findall(r'cx="([\d.]+)"', drawn)] == [94.0, 266.0]
    assert 'd="M94.0,10V82"' in drawn, "the dashed line through the first value"
    assert 'aria-label="TR@1 &lt;here&gt;: neither: 15.0 (10.0 to 20.0); both: 25.0 (20.0 to 30.0)"' in drawn
    assert "<here>" not in drawn
    assert 'class="dot"' in charts.intervals("x", [("a", Estimate(3, 3, 3))])
    assert charts.intervals("x", []) == ""
    assert "NaN" not in charts.intervals("x", [("a", Estimate(0, 0, 0)), ("b", Estimate(1e-14, 0, 1e-14))])


def test_a_histogram_has_a_square_root_axis_and_a_threshold():
    """Bins 0 to 4 of which the last is for 1: 308 / 5 units each, heights as roots of the counts."""
    drawn = charts.histogram("Scores", [100, 0, 25, 4, 1], "web", at=0.5)
    (bars,) = re.findall(r'class="bars web" d="([^"]*)"', drawn)
    tops = [(float(x), float(y)) for x, y in re.findall(r"M([\d.]+),156V([\d.]+)h61.60", bars)]
    assert [x for x, _ in tops] == pytest.approx([42, 42 + 2 * 61.6, 42 + 3 * 61.6, 42 + 4 * 61.6])
    assert [156 - y for _, y in tops] == pytest.approx([146 * math.sqrt(n / 100) for n in (100, 25, 4, 1)], abs=0.06)
    assert 'class="veil" data-start="42" data-span="246.40" x="42" y="10" width="123.20"' in drawn
    assert re.findall(r'text-anchor="end">([\d,]+)</text>', drawn) == ["100", "50", "20", "5", "0"]


def test_curves_share_axes_that_enclose_them():
    drawn = charts.curves(
        "Losses",
        {"a & b": [(0, 4.0), (100, 1.0)], "c": [(50, 2.0), (75, float("nan")), (100, 0.5)], "lonely": [(1, 1)]},
    )
    points = re.findall(r'class="curve c\d" points="([^"]*)"', drawn)
    assert points == ["42.0,10.0 350.0,134.5", "196.0,93.0 350.0,155.2"]
    assert re.findall(r'text-anchor="end">([\d.]+)</text>', drawn) == ["0", "1", "2", "3", "4"]
    assert "a &amp; b: from 4 to 1" in drawn
    assert "lonely" not in drawn
    assert charts.curves("none", {"x": []}) == ""


def test_a_slope_has_both_values_with_their_intervals():
    drawn = charts.slope("Right", Estimate(40, 30, 50), Estimate(80, 80, 80), ("before", "after"), high=100)
    assert re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn) == [("106", "123.2"), ("204", "50.4")]
    assert "M106,141.4V105.0" in drawn
    assert "before: 40% (30% to 50%); after: 80%" in drawn
    assert drawn.count("%</text>") == 2
