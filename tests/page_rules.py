"""The rules that every HTML page of the project keeps, checked in its text."""

import base64
import hashlib
import itertools
import re
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "input", "br", "stop", "path", "rect", "line", "circle", "polyline"}
NUMBER = re.compile(r"[+-]?[\d.,]+ ?%?")


class Parsed(HTMLParser):
    """Elements of a page in order: tag, attributes, text inside, tags around it."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "attrs": dict(attrs), "text": "", "around": [one["tag"] for one in self.open]}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        while self.open and tag not in VOID and self.open.pop()["tag"] != tag:
            pass

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, *tags):
        return [one for one in self.elements if one["tag"] in tags]

    def columns(self):
        """Cells of each column of each table, without its head."""
        tables = []
        for element in self.all("table", "tr", "td"):
            if element["tag"] == "td":
                tables[-1][-1].append(element)
            else:
                tables.append([]) if element["tag"] == "table" else tables[-1].append([])
        return [column for table in tables for column in zip(*filter(None, table), strict=True)]

    def meta(self, name):
        return [e["attrs"].get("content") for e in self.all("meta") if name in e["attrs"].values()]


def sha256(content):
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def faults(text, figures=4, crawled=(), served=False):
    """Rules that a page breaks; `crawled` are texts of others, which no attribute may repeat.

    A page that is `served` may ask its server, and only that, for images and more.
    """
    page = Parsed(text)
    checks = {
        "doctype": text.lower().startswith("<!doctype html>"),
        "under 5 MB": len(text.encode()) < 5_000_000,
        "lang": [e["attrs"].get("lang") for e in page.all("html")] == ["en"],
        "viewport": page.meta("viewport") == ["width=device-width, initial-scale=1"],
        "color-scheme": page.meta("color-scheme") == ["light dark"],
        "both schemes have colours": "@media(prefers-color-scheme:dark)" in text,
        "one main": len(page.all("main")) == 1,
        "figures": sum("dl" in e["around"] for e in page.all("dd")) == figures,
        "title is h1": [e["text"].strip() for e in page.all("title")] == [e["text"].strip() for e in page.all("h1")],
        "title": [e["text"].strip() for e in page.all("title")] == page.meta("og:title"),
        "description": all(page.meta("og:description")) and len(page.meta("og:description")) == 1,
        "nothing external": not re.search(r"url\((?!#)|@import", text),
        "no frames or forms": not page.all(*("iframe", "object", "embed", "base", "form")[: 4 if served else 5]),
        "unique ids": len(ids := [e["attrs"]["id"] for e in page.elements if "id" in e["attrs"]]) == len(set(ids)),
        "tables in details": all("details" in e["around"] for e in page.all("table")),
        "th scope": all(e["attrs"].get("scope") in ("row", "col") for e in page.all("th")),
        "numbers on the right": all(
            {cell["attrs"].get("class") for cell in column} == {"n"}
            for column in page.columns()
            if all(NUMBER.fullmatch(cell["text"].strip()) for cell in column)
        ),
        "every chart is named": all(e["attrs"].get("aria-label") and e["attrs"].get("role") == "img"
                                    for e in page.all("svg")),
    }  # fmt: skip
    problems = [rule for rule, is_kept in checks.items() if not is_kept]
    levels = [int(e["tag"][1]) for e in page.all("h1", "h2", "h3", "h4")]
    if levels[:1] != [1] or any(after > before + 1 for before, after in itertools.pairwise(levels)):
        problems.append(f"heading levels {levels}")
    problems += _policy_faults(page, served)
    for element in page.elements:
        attrs = element["attrs"]
        problems += [f"{element['tag']} has {name}" for name in attrs if name.startswith("on") or name == "style"]
        if element["tag"] == "img" and not attrs.get("alt"):
            problems.append("image without alt")
        src, href = attrs.get("src", "data:"), attrs.get("href", "data:")
        if not src.startswith("data:") or re.match(r"[a-z]+:(?<!data:)|//|/", href):
            problems.append(f"{element['tag']} leads to {src} {href}")
        repeated = {k for k, v in attrs.items() if k not in ("content", "title") and v and any(c in v for c in crawled)}
        problems += [f"{name} of {element['tag']} repeats a crawled text" for name in repeated]
    return problems


def _policy_faults(page, served):
    (policy,) = page.meta("Content-Security-Policy")
    by_name = dict(part.split(" ", 1) for part in policy.split("; "))
    scripts = [e["text"] for e in page.all("script") if "type" not in e["attrs"]]
    expected = {
        "default-src": "'none'",
        "img-src": "'self' data:" if served and by_name.get("img-src") != "data:" else "data:",
        "form-action": "'none'",
        **({"connect-src": "'self'"} if served else {}),
        "style-src": " ".join(sha256(e["text"]) for e in page.all("style")),
        **({"script-src": " ".join(map(sha256, scripts))} if scripts else {}),
    }
    return [f"policy {name}" for name, value in expected.items() if by_name.get(name) != value] + [
        "unsafe policy" for value in by_name.values() if "unsafe" in value
    ]
