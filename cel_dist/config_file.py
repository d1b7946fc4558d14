"""Configuration files: YAML that holds what differs from the defaults, and `key=value` overrides of the same paths."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from cel_dist.config import Config
from cel_dist.errors import CelError


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides and check the result.

    Args:
        path: the YAML file.
        overrides: dotted assignments such as `train.batch_size=64`; values are YAML.

    Raises:
        CelError: the file is missing, not text or not a mapping, an override is malformed, a key is there twice or
            unknown (the nearest valid one is named), a value has the wrong type or range, or two settings exclude each
            other.
    """
    return parse_config(read_settings(path, overrides), source=str(path))


def read_settings(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The settings of a YAML file with `key=value` overrides, as sections within each other; not checked.

    Raises:
        CelError: as `load_config`, as far as it is about the text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise CelError(f"cannot read the configuration {path}: {error.strerror}; name a YAML file") from None
    except UnicodeDecodeError:
        raise CelError(f"the configuration {path} is not UTF-8 text; save it as UTF-8, or name a YAML file") from None
    try:
        tree = _read_yaml(text, (), str(path))
    except _YAML_ERRORS as error:
        raise CelError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise CelError(f"{path} holds a {type(tree).__name__}, not sections of settings; see configs/ for examples")
    for override in overrides:
        _override(tree, override)
    return tree


AnyConfig = TypeVar("AnyConfig", bound=Config)


def parse_config(tree: Mapping[str, Any], source: str) -> Config:
    """Check a nested mapping of settings; `source` names it in errors. Raises CelError as `load_config` does."""
    if "sweep" in tree:
        raise CelError(f"configuration {source} has the section 'sweep'; run it with 'cel sweep', or remove that")
    return parse_as(Config, tree, source)


def parse_as(kind: type[AnyConfig], tree: Mapping[str, Any], source: str) -> AnyConfig:
    """Check a nested mapping of settings that may have the further sections of `kind`; see `parse_config`."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(_describe(detail, kind) for detail in error.errors()[:5])
        raise CelError(f"configuration {source}: {problems}") from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one.

    >>> config = parse_config({"data": {"shards": "s"}, "augment": {"profile": 0}}, "example")
    >>> parse_config(yaml.safe_load(dump_config(config)), "again") == config
    True
    """
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML without dates: no setting is one, and a run may well be named after the day."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (the base class declares it so)
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


# The last three are what PyYAML lets through for a number or a tag that its own patterns accept and Python does not.
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError)
_STRING_TAG = "tag:yaml.org,2002:str"
_SCALAR_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:bool")


def _read_yaml(text: str, path: tuple[str, ...], source: str) -> Any:
    """The value of a YAML text that is to become the setting at `path`, or the whole tree if that is empty."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_node(node, path, source, set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check_node(node: yaml.Node, path: tuple[str, ...], source: str, seen: set[int]) -> None:
    """Refuse keys that are there twice, and take numbers as written where text is wanted: `run.name: 007`."""
    # An alias leads to a node again, and may lead to itself.
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            inner, line = (*path, str(key.value)), key.start_mark.line + 1
            if inner[-1] in lines:
                raise CelError(
                    f"{source}: '{'.'.join(inner)}' is set in line {lines[inner[-1]]} and again in line {line}; remove "
                    "one"
                )
            lines[inner[-1]] = line
            _check_node(value, inner, source, seen)
    elif node.tag in _SCALAR_TAGS and path in _text_settings():
        node.tag = _STRING_TAG


@cache
def _text_settings() -> frozenset[tuple[str, str]]:
    return frozenset(
        (section, name)
        for section, part in Config.model_fields.items()
        for name, field in part.annotation.model_fields.items()  # type: ignore[union-attr]
        if {str, Path} & {field.annotation, *get_args(field.annotation)}
    )


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise CelError(f"override '{override}' is not of the form key=value, for example train.batch_size=64")
    *sections, leaf = key.split(".")
    try:
        value = _read_yaml(text, (*sections, leaf), f"override '{override}'")
    except _YAML_ERRORS:
        value = text
    assign(tree, key, value, f"override '{override}'")


def assign(tree: dict[str, Any], path: str, value: Any, source: str) -> None:
    """Set the setting at a dotted path in sections within each other.

    Raises:
        CelError: there is a value where the path has a section; `source` names who wants that.
    """
    *sections, leaf = path.split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if child is None:
            child = node[section] = {}
        if not isinstance(child, dict):
            raise CelError(f"{source}: '{section}' is a value, not a section")
        node = child
    node[leaf] = value


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings under dotted names.

    >>> dict(flat({"a": {"b": 1}, "c": [2]}))
    {'a.b': 1, 'c': [2]}
    """
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _describe(detail: Mapping[str, Any], kind: type[Config]) -> str:
    location = [str(part) for part in detail["loc"]]
    path = ".".join(location)
    if detail["type"] == "extra_forbidden":
        valid = [".".join([*location[:-1], name]) for name in _fields_at(location[:-1], kind)]
        nearest = difflib.get_close_matches(path, valid + all_paths(), n=1, cutoff=0.0)
        return f"unknown key '{path}'; did you mean '{nearest[0]}'?"
    if detail["type"] == "missing":
        return f"'{path}' is required; set it in the file or as an override"
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    return f"'{path}': {detail['msg'][0].lower()}{detail['msg'][1:]}, not {detail['input']!r}"


def _fields_at(location: list[str], kind: type[Config]) -> list[str]:
    model: type[BaseModel] = kind
    for name in location:
        field = model.model_fields.get(name)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        model = field.annotation
    return list(model.model_fields)


def all_paths() -> list[str]:
    """The dotted paths of all settings of a run."""
    paths = []
    for name, field in Config.model_fields.items():
        candidates = [field.annotation, *get_args(field.annotation)]
        for section in candidates:
            if isinstance(section, type) and issubclass(section, BaseModel):
                paths += [f"{name}.{leaf}" for leaf in section.model_fields]
    return paths
