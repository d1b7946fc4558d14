"""What the shell completes: settings as `key=value`, and names. Nothing here loads torch."""

import os
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

import typer

# What bash cuts a line at belongs to the word that is completed: it hands over `loss.pairs`, `=` and `po`.
_ASSIGNMENT = "="


def complete_settings(context: typer.Context, incomplete: str) -> list[str]:
    """Settings of a run that begin so, or the values of the one that is named.

    A setting that is the only one to fit comes with its values, or with its default, to be changed.
    """
    key, equals, value, is_cut = _split(incomplete)
    from cel_dist.config_file import all_paths

    paths = all_paths()
    if equals:
        fitting = [choice for choice in _values(key) if choice.startswith(value)]
        return fitting if is_cut else [f"{key}={choice}" for choice in fitting]
    fitting = [path for path in paths if path.startswith(key)]
    if len(fitting) != 1:
        return [f"{path}=" for path in fitting]
    only = fitting[0]
    return [f"{only}={choice}" for choice in _values(only) or [_default(only)]]


def complete_recipes(incomplete: str) -> list[str]:
    """Names of public corpora that begin so."""
    from cel_dist.data.recipes import RECIPES

    return [name for name in RECIPES if name.startswith(incomplete)]


def _split(incomplete: str) -> tuple[str, bool, str, bool]:
    """Key, whether there is a `=`, what stands behind it, and whether the shell cuts the word there."""
    words = os.environ.get("COMP_WORDS", "").split()
    place = os.environ.get("COMP_CWORD", "")
    if "=" in words and place.isdigit():
        index = int(place)
        if index < len(words) and words[index] == _ASSIGNMENT:
            return words[index - 1], True, "", True
        if 2 <= index <= len(words) and words[index - 1] == _ASSIGNMENT:
            return words[index - 2], True, incomplete, True
    key, equals, value = incomplete.partition(_ASSIGNMENT)
    return key, bool(equals), value, False


def _values(path: str) -> list[str]:
    """The values of a setting, where they can be counted."""
    from cel_dist import config_sections, plugins

    if path == "encoder.name":
        return sorted({*config_sections.ENCODERS, *plugins.entry_point_names("cel_dist.encoders")})
    if path == "loss.similarity":
        return [*config_sections.SIMILARITIES, *config_sections.CLASSIFIERS, *plugins.SIMILARITIES.names()]
    field = _field(path)
    return [] if field is None else list(dict.fromkeys(_choices(field.annotation)))


def _choices(annotation: Any) -> Iterable[str]:
    if annotation is bool:
        yield from ("true", "false")
    elif get_origin(annotation) is Literal:
        yield from (str(value) for value in get_args(annotation))
    elif annotation is type(None):
        yield "null"
    else:
        parts = list(get_args(annotation))
        if parts and all(part is type(None) or get_origin(part) is Literal or part is bool for part in parts):
            for part in parts:
                yield from _choices(part)


def _default(path: str) -> str:
    field = _field(path)
    value = None if field is None or field.is_required() else field.default
    return "" if value is None or isinstance(value, (dict, tuple)) else str(value)


def _field(path: str) -> Any:
    from cel_dist.config import Config

    section, _, name = path.partition(".")
    part = Config.model_fields.get(section)
    return None if part is None else part.annotation.model_fields.get(name)  # type: ignore[union-attr]
