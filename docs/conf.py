"""Sphinx: these pages as a site, with the reference from docstrings; `make docs` builds it into docs/_build."""

import re
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

project = "openblip"
version = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]["version"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton"]
nb_execution_mode = "off"  # notebooks show the outputs that they were saved with
copybutton_prompt_text = "$ "
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"openblip {version}"
default_role = "code"  # single backquotes in docstrings
myst_heading_anchors = 4
suppress_warnings = [
    "misc.highlighting_failure",  # examples with ... in them
    "ref.python",  # annotations that several classes could be meant by
]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True


def _no_way_out(app, name: str, source: list[str]) -> None:
    """What a page links to outside of this folder is in the repository and not on the site: it stays as a name."""
    if "/" not in name:
        source[0] = re.sub(r"\[([^]]+)\]\(\.\./[^)]*\)", r"\1", source[0])


def _navigation(app, name: str, source: list[str]) -> None:
    """The map becomes the site's navigation: a section for each of its headings, a page for each link in a table."""
    if name != "index":
        return
    for title, section in re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", source[0], re.M | re.S):
        pages = re.findall(r"^\| \[[^]]+\]\(([\w/]+)\.(?:md|ipynb)\)", section, re.M)
        source[0] += (
            f"\n\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n" + "\n".join(pages) + "\n```\n" if pages else ""
        )


def _reference(app, name: str, source: list[str]) -> None:
    if name == "api/index":
        pages = re.findall(r"\]\((\w+)\.rst\)", source[0])
        source[0] += "\n\n```{toctree}\n:hidden:\n\n" + "\n".join(pages) + "\n```\n"


def _evaluations(app, name: str, source: list[str]) -> None:
    """The page of `eval` gets a section for each of its tasks."""
    if name == "api/eval":
        from eval.options import COMMANDS

        for module in dict.fromkeys(module for _, module in COMMANDS.values()):
            source[0] += f"\n{module}\n{'-' * len(module)}\n\n.. automodule:: {module}\n   :members:\n"


def _literal_blocks(app, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """An indented example in a docstring keeps its lines, without the two colons that reStructuredText asks for."""
    shown: list[str] = []
    inside = False
    for line in lines:
        indented = line.startswith("    ")
        if indented and not inside and (not shown or not shown[-1].strip()):
            shown += ["::", ""]
            inside = True
        elif line.strip() and not indented:
            inside = False
        shown.append(line)
    lines[:] = shown


def setup(app) -> None:
    app.connect("source-read", _no_way_out)
    app.connect("source-read", _navigation)
    app.connect("source-read", _reference)
    app.connect("source-read", _evaluations)
    app.connect("autodoc-process-docstring", _literal_blocks)
