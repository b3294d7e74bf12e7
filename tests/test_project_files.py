"""The files that GitHub and citation tools read: they parse, and have what their formats require."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from blip.errors import DOCS

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FORMS = ROOT / ".github" / "ISSUE_TEMPLATE"


def test_the_changelog_is_newest_first_in_known_sections():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert text.startswith("# Changelog\n")
    versions = re.findall(r"^## \[([^]]+)\](?: - (\d{4}-\d{2}-\d{2}))?$", text, re.M)
    assert versions[0] == ("Unreleased", "")
    assert len(versions) == len(re.findall(r"^## ", text, re.M))
    dates = [date for _, date in versions[1:]]
    assert all(dates)
    assert dates == sorted(dates, reverse=True)
    for _, section in re.findall(r"^(## \[[^\n]*)\n(.*?)(?=^## |\Z)", text, re.M | re.S):
        headings = re.findall(r"^### (.*)$", section, re.M)
        order = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
        assert headings
        assert set(headings) <= set(order)
        assert len(set(headings)) == len(headings)


def test_the_citation_has_what_version_1_2_0_requires():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert cited["cff-version"] == "1.2.0"
    assert str(cited["version"]) == PROJECT["version"]
    assert cited["license"] == PROJECT["license"]
    assert cited["type"] == "software"
    for one in (cited, *cited["references"]):
        assert all("name" in author or {"family-names", "given-names"} <= author.keys() for author in one["authors"])
    (paper,) = cited["references"]
    assert {"type", "title", "authors", "year"} <= paper.keys()
    assert [author["family-names"] for author in paper["authors"]] == ["Li", "Li", "Xiong", "Hoi"]
    assert (paper["type"], paper["year"]) == ("conference-paper", 2022)


@pytest.mark.parametrize("name", ["bug.yml", "feature.yml"])
def test_issue_forms_have_what_github_requires(name):
    form = yaml.safe_load((FORMS / name).read_text())
    assert {"name", "description", "body"} <= form.keys()
    kinds = {"markdown", "textarea", "input", "dropdown", "checkboxes"}
    assert {field["type"] for field in form["body"]} <= kinds
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    ids = [field["id"] for field in fields]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[\w-]+", one) for one in ids)
    labels = [field["attributes"]["label"] for field in fields]
    assert len(set(labels)) == len(labels)
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_a_bug_asks_for_the_doctor():
    form = yaml.safe_load((FORMS / "bug.yml").read_text())
    (field,) = [field for field in form["body"] if field.get("id") == "doctor"]
    assert "blip doctor --json" in field["attributes"]["label"]
    assert field["validations"]["required"]


def test_the_chooser_of_issues_links_the_documentation():
    config = yaml.safe_load((FORMS / "config.yml").read_text())
    assert set(config) <= {"blank_issues_enabled", "contact_links"}
    assert [set(link) for link in config["contact_links"]] == [{"name", "url", "about"}]
    assert config["contact_links"][0]["url"] == DOCS


def test_security_says_how_to_report_and_what_counts():
    text = (ROOT / "SECURITY.md").read_text()
    assert "Report a vulnerability" in text
    for opened in ("images", "tar", "model folders", "pages"):
        assert opened in text
