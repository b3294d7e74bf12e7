"""Installed packages, compared with the ranges that this project's metadata requires, and how to install others.

No message names an extra of this project: on an index that name may be anybody's.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from blip.options import PROJECT

TESTED = {"torch": ("2.11", "2.15"), "transformers": ("5.17", "5.24")}
"""Oldest and newest series on which the test suite passes; others may work as well."""


@dataclass(frozen=True)
class Package:
    """A required package and its installed version."""

    name: str
    wanted: str
    """Range of versions, such as `>=2.11`; empty if any will do."""
    version: str | None
    """Installed version, None if not installed."""
    fits: bool
    """Whether it is installed, in a version within the range."""

    @property
    def remedy(self) -> str:
        """Command that installs it."""
        return f"pip install '{self.requirement}'"

    @property
    def requirement(self) -> str:
        """Name and range of versions, as pip takes them."""
        return f"{self.name}{self.wanted}"


def packages(extra: str = "") -> list[Package]:
    """Packages that the project requires, or that an extra adds.

    LookupError if the project is not installed, or has no such extra.
    """
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError:
        raise LookupError(f"{PROJECT} is not installed, so its requirements are unknown: pip install -e .") from None
    packages_needed = []
    for requirement in map(Requirement, lines):
        ours = requirement.marker is None if not extra else _of_extra(requirement, extra)
        if ours:
            version = _version(requirement.name)
            fits = version is not None and requirement.specifier.contains(version, prereleases=True)
            packages_needed.append(Package(requirement.name, str(requirement.specifier), version, fits))
    if not packages_needed:
        raise LookupError(f"the installed {PROJECT} has no extra {extra!r}; reinstall it: pip install -e .")
    return packages_needed


def require(extra: str, what: str) -> None:
    """Raise a one-line ValueError unless the packages of an extra are installed; `what` names their user."""
    for package in packages(extra):
        if not package.fits:
            there = f"{package.version} is installed" if package.version else "it is not installed"
            raise ValueError(f"{what} needs {package.requirement}, but {there}: {remedy(extra)}")


def remedy(extra: str) -> str:
    """Command that installs the packages of an extra."""
    try:
        return " ".join(("pip install", *(f"'{package.requirement}'" for package in packages(extra))))
    except LookupError:  # run from a checkout that is not installed, or that was installed before it had this extra
        return f"pip install -e '.[{extra}]' in the checkout"


def _of_extra(requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
