"""Python and the packages that are installed, against what this package requires."""

import platform
import sys
from collections.abc import Iterable
from importlib import metadata
from typing import TYPE_CHECKING

from cel_dist.doctor.check import Check, Checks, tried

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from cel_dist.doctor.examine import Settings

_DISTRIBUTION = "cel_dist"
# For who works on this package.
_NOT_FOR_USERS = "dev"
_REINSTALL = "run 'make install' in the checkout, or pip install --force-reinstall cel_dist"


def environment(settings: "Settings") -> Checks:
    """Python, the required packages, and the extras."""
    yield tried("python", _python, _REINSTALL)
    yield tried("packages", _packages, _REINSTALL)
    yield tried("extras", _extras, _REINSTALL, "note")


def _python() -> Check:
    found = f"{platform.python_version()} in {sys.prefix}"
    try:
        required = metadata.metadata(_DISTRIBUTION)["Requires-Python"]
    except metadata.PackageNotFoundError:
        return Check(
            "python", "note", f"{found}; cel_dist itself is not installed, so no versions are known", _REINSTALL
        )
    from packaging.specifiers import SpecifierSet

    if not SpecifierSet(required).contains(platform.python_version(), prereleases=True):
        return Check("python", "fault", f"{found}; {required} is required", "make the environment with a newer Python")
    return Check("python", "ok", found)


def _packages() -> Check:
    requirements = _requirements("")
    if requirements is None:
        return Check("packages", "note", "cel_dist is not installed, so it is not known what it requires", _REINSTALL)
    wrong = list(_wrong(requirements))
    if wrong:
        return Check("packages", "fault", "; ".join(wrong), _REINSTALL)
    return Check("packages", "ok", f"{len(requirements)} required packages, all in a version that is supported")


def _extras() -> Check:
    try:
        names = metadata.metadata(_DISTRIBUTION).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        names = []
    complete: list[str] = []
    lacking: list[str] = []
    for name in names:
        if name != _NOT_FOR_USERS:
            (lacking if list(_wrong(_requirements(name) or [])) else complete).append(name)
    found = f"installed: {', '.join(complete) or 'none'}" + (f"; not: {', '.join(lacking)}" if lacking else "")
    remedy = f"for what they are for: pip install 'cel_dist[{','.join(lacking)}]'" if lacking else ""
    return Check("extras", "note" if lacking else "ok", found, remedy)


def _requirements(extra: str) -> "list[Requirement] | None":
    """What an extra requires here, or, for the empty name, the package itself; None if that is not installed."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return None
    found = []
    for requirement in map(Requirement, lines):
        of_extra = requirement.marker is not None and "extra" in str(requirement.marker)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if of_extra == bool(extra) and applies:
            found.append(requirement)
    return found


def _wrong(requirements: "Iterable[Requirement]") -> Iterable[str]:
    for requirement in requirements:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield f"{requirement.name} is not installed"
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name} is {version}, {requirement.specifier} is required"
