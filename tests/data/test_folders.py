"""Listing folders: links are followed, loops end, what cannot be listed is named."""

import os
from pathlib import Path

import pytest

from blip.data import folders, image_files
from blip.data.folders import Walk, files, matching


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """photos/ with two images, and elsewhere/ with two more, in one of which is a folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos/a.png", "photos/in/b.png", "elsewhere/c.png", "elsewhere/deep/d.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    return tmp_path


def listed(folder: str = "photos") -> list[str]:
    return sorted(files(folder, Walk()))


OWN = ["photos/a.png", "photos/in/b.png"]


def test_linked_folders_are_followed(tree):
    Path("photos/more").symlink_to(tree / "elsewhere")
    assert listed() == [*OWN, "photos/more/c.png", "photos/more/deep/d.png"]
    assert image_files.find(["photos"]).paths == listed()
    Path("photos").rename("moved")
    Path("photos").symlink_to("moved")
    assert listed() == [*OWN, "photos/more/c.png", "photos/more/deep/d.png"]


@pytest.mark.parametrize("links", [
    {"photos/loop": "."},
    {"photos/in/loop": ".."},
    {"photos/1": ".", "photos/2": ".", "photos/in/3": "..", "photos/in/4": "."},
    {"photos/0": "in"},
    {"photos/self": "self"},
])  # fmt: skip
@pytest.mark.parametrize("pattern", [None, "photos/**/*.png", "**/?.png"])
def test_loops_end_and_every_image_is_listed_once_where_it_lies(tree, links, pattern):
    for name, target in links.items():
        Path(name).symlink_to(target)
    if pattern is None:
        assert [path for path in listed() if path.endswith(".png")] == OWN
    else:
        assert [path for path in matching(pattern) if path.startswith("photos")] == OWN


def test_links_between_two_linked_folders_end(tree):
    Path("photos/more").symlink_to("../elsewhere")
    Path("elsewhere/back").symlink_to("../photos")
    Path("elsewhere/deep/again").symlink_to("..")
    assert listed() == [*OWN, "photos/more/c.png", "photos/more/deep/d.png"]


def test_a_link_that_leads_above_the_folder_is_named_and_not_followed(tree):
    Path("photos/up").symlink_to("..")
    inputs = image_files.find(["photos"])
    assert inputs.paths == OWN
    assert inputs.walk.unreadable == []
    assert inputs.walk.notes == [f"photos/up leads back up to {tree} and was not followed"]


def test_a_link_that_leads_nowhere_is_named(tree):
    Path("photos/gone").symlink_to("/no/such/folder")
    inputs = image_files.find(["photos"])
    assert inputs.paths == OWN
    assert inputs.walk.unreadable == [("photos/gone", "is a link to /no/such/folder, where nothing can be found")]
    assert inputs.total == 3


def test_a_folder_that_may_not_be_listed_stops_nothing_else(tree, monkeypatch):
    scan = os.scandir

    def refusing(path):
        if str(path).endswith("/in"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(folders.os, "scandir", refusing)
    inputs = image_files.find(["photos"])
    assert inputs.paths == ["photos/a.png"]
    assert inputs.walk.unreadable == [("photos/in", "cannot be read: Permission denied")]
    assert image_files.find(["photos/**/*.png"]).walk.unreadable == inputs.walk.unreadable


def test_hidden_folders_stay_hidden(tree):
    Path("photos/.cache").symlink_to("../elsewhere")
    assert listed() == OWN
    assert matching("photos/**/.cache/*") == ["photos/.cache/c.png", "photos/.cache/deep"]


def test_globs_mean_what_they_meant(tree):
    import glob

    for pattern in ("photos/*", "photos/**", "**/*.png", "*/**/d*", "photos/**/in", str(tree / "**" / "c.png"), "**"):
        assert matching(pattern) == sorted(name.rstrip("/") for name in glob.glob(pattern, recursive=True) if name)
