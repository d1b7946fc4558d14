"""The licences of everything that cel_dist installs, as `docs/licences.md`, from the metadata of this environment.

python scripts/licences.py           # write the page anew, in an environment with all extras
"""

import re
from collections import defaultdict
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PAGE = Path(__file__).resolve().parent.parent / "docs" / "licences.md"
# What users install; the tools of developers are not handed on.
EXTRAS = ("corpus", "onnx", "ray", "sweep", "s3", "serve")
# Libraries in other languages that lie in wheels, as the projects themselves say.
NATIVE = (
    ("libsndfile", "soundfile", "LGPL-2.1-or-later", "decodes audio; loaded as a library of its own, may be replaced"),
    ("libsoxr", "soxr", "LGPL-2.1-or-later", "resamples; linked into the module of soxr"),
    ("espeak-ng", "espeakng-loader", "GPL-3.0-or-later", "speaks the synthetic corpus; only with the extra corpus"),
    ("CUDA, cuDNN, NCCL", "torch", "NVIDIA's own licences", "only in builds of torch for GPUs"),
)
_HEAD = """# Licences

cel_dist is under the Apache License 2.0. This page lists what an installation brings along: the packages that it needs
and those that these need, by what their own metadata say. `python scripts/licences.py` writes it; the versions are
those of `constraints.txt`. It is a list for whoever has to check, and no legal advice.

"""
# What a build of torch for GPUs brings along; told of together, because it is not on every machine.
OF_CUDA = re.compile(r"(nvidia|cuda|cudnn|triton)")
_COPYLEFT = re.compile(r"\b(A?GPL|LGPL|MPL|EUPL|CDDL|EPL)", re.IGNORECASE)
_TEXTS = (
    ("apache", "Apache-2.0"),
    ("mit license", "MIT"),
    ("permission is hereby granted, free of charge", "MIT"),
    ("redistribution and use in source and binary forms", "BSD"),
    ("mozilla public license", "MPL-2.0"),
)


def closure(extras: tuple[str, ...] = EXTRAS) -> dict[str, set[str]]:
    """Every package that cel_dist needs here, to the extras that bring it; an empty set: always there.

    Packages that the metadata name but this machine does not need, as those for other systems, are not in it.
    """
    found: dict[str, set[str]] = {}
    for extra in ("", *extras):
        reached: set[str] = set()
        left = [("cel_dist", extra)]
        done = set(left)
        while left:
            name, wanted = left.pop()
            try:
                needs = distribution(name).requires or []
            except PackageNotFoundError:
                continue
            if name != "cel_dist":
                reached.add(name)
            for requirement in map(Requirement, needs):
                if OF_CUDA.match(requirement.name):
                    continue
                if requirement.marker is not None and not requirement.marker.evaluate({"extra": wanted}):
                    continue
                for part in ("", *requirement.extras):
                    step = (canonicalize_name(requirement.name), part)
                    if step not in done:
                        done.add(step)
                        left.append(step)
        for name in reached:
            if extra == "":
                found[name] = set()
            elif name not in found or found[name]:
                found.setdefault(name, set()).add(extra)
    return dict(sorted(found.items()))


def licence(package: Distribution) -> str:
    """What the metadata say: the SPDX expression, else the classifiers, else the field, else what the text is."""
    metadata = package.metadata
    if expression := metadata.get("License-Expression"):
        return str(expression)
    classified = [
        line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier") or [] if line.startswith("License :: ")
    ]
    classified = [line for line in classified if line != "OSI Approved"]
    if classified:
        return ", ".join(classified)
    field = (metadata.get("License") or "").strip()
    if field and "\n" not in field and len(field) < 60 and field.upper() != "UNKNOWN":
        return field
    texts = [field, *(_text(package))]
    for text in texts:
        for words, name in _TEXTS:
            if words in " ".join(text.lower().split()):
                return f"{name} (by its text)"
    return "not stated"


def _text(package: Distribution) -> list[str]:
    files = package.files or []
    named = [file for file in files if re.search(r"licen[cs]e|copying", file.name, re.IGNORECASE)]
    return [
        str(Path(str(file.locate())).read_text(errors="replace"))[:3000] for file in named if "dist-info" in str(file)
    ]


def address(package: Distribution) -> str:
    """The home page, as far as it is told."""
    metadata = package.metadata
    links = dict(line.split(", ", 1) for line in metadata.get_all("Project-URL") or [] if ", " in line)
    lowered = {name.lower(): link for name, link in links.items()}
    for name in ("homepage", "home", "repository", "source", "source code", "github", "documentation"):
        if name in lowered:
            return lowered[name]
    return str(metadata.get("Home-page") or next(iter(links.values()), ""))


def page() -> str:
    """The page."""
    rows, copyleft = defaultdict(list), []
    for name, extras in closure().items():
        package = distribution(name)
        terms = licence(package)
        title = package.metadata["Name"]
        link = address(package)
        where = "always" if not extras else ", ".join(sorted(extras))
        shown = f"[{title}]({link})" if link.startswith("http") else title
        rows[where == "always"].append(f"| {shown} | {terms} | {where} |")
        if _COPYLEFT.search(terms) or "General Public" in terms or "Mozilla" in terms:
            copyleft.append(f"- {title} ({where}): {terms}")
    lines = ["## With conditions on passing them on", ""]
    lines += ["Packages whose licence asks more than that its notice stays:", "", *(copyleft or ["- none"]), ""]
    lines += ["Libraries in other languages inside of wheels, which their metadata do not name:", ""]
    lines += ["| library | in | licence | |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {package} | {terms} | {what} |" for name, package, terms, what in NATIVE]
    lines += [
        "",
        "ffmpeg, git and ssh are used as programs where they are installed, and are not part of any of this.",
        "",
    ]
    lines += ["## All packages", "", "| package | licence | with |", "| --- | --- | --- |", *rows[True], *rows[False]]
    return _HEAD + "\n".join(lines) + "\n"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
