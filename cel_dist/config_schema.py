"""The configuration as a JSON Schema, for editors that check and complete YAML."""

from typing import Any

from cel_dist.config import Config
from cel_dist.config_file import all_paths

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
# pydantic leaves bounds behind a validator under its own names.
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def json_schema(kind: type[Config]) -> dict[str, Any]:
    """The schema (draft 2020-12) of the files of a configuration, with the description of every setting.

    Nothing of a run's settings is required: a file may leave them to `key=value` on the command line. What settings
    exclude each other is not in it; `cel config validate` knows.

    Args:
        kind: `Config`, or `cel_dist.sweep.section.SweepConfig`.

    >>> schema = json_schema(Config)
    >>> schema["additionalProperties"], schema["properties"]["run"]["$ref"]
    (False, '#/$defs/RunSection')
    """
    schema = kind.model_json_schema()
    del schema["title"]
    parts = schema["$defs"]
    for part in parts.values():
        for field in part.get("properties", {}).values():
            # Made of the name, it says nothing that the name does not.
            field.pop("title", None)
            _one_line(field)
            if "anyOf" in field and field.get("type") == "string":
                # The names that are known are an offer and no limit: plug-ins have others.
                field.pop("type")
        _one_line(part)
    # A section may stand with a part of its settings; the rest comes from the command line.
    schema.pop("required", None)
    parts["DataSection"].pop("required", None)
    if "SweepSection" in parts:
        _complete_space(parts["SweepSection"]["properties"]["space"])
        schema["required"] = ["sweep"]
    for section in schema["properties"].values():
        section.pop("default", None)
    _name_bounds(schema)
    title = "cel_dist sweep" if "SweepSection" in parts else "cel_dist run"
    rest = {key: value for key, value in schema.items() if key != "$defs"}
    return {"$schema": _DIALECT, "title": title, **rest, "$defs": parts}


def _one_line(node: dict[str, Any]) -> None:
    if "description" in node:
        node["description"] = " ".join(node["description"].split())


def _name_bounds(node: Any) -> None:
    if isinstance(node, dict):
        if "type" in node:
            for ours, name in _BOUNDS.items():
                if isinstance(node.get(ours), (int, float)):
                    node[name] = node.pop(ours)
        for inner in node.values():
            _name_bounds(inner)
    elif isinstance(node, list):
        for inner in node:
            _name_bounds(inner)


def _complete_space(space: dict[str, Any]) -> None:
    """Offer the paths that can be searched; sections within each other are as good as dotted paths."""
    parameter = space.pop("additionalProperties")
    paths = all_paths()
    sections = dict.fromkeys(path.partition(".")[0] for path in paths)
    space["properties"] = {
        **dict.fromkeys(paths, parameter),
        **{section: {"type": "object"} for section in sections},
    }
    space["additionalProperties"] = False
