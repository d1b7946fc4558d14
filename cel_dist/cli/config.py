"""`cel config`: what a configuration comes to, whether it works, and what an editor should know of it."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from cel_dist.cli.app import JsonOption, config_app, emit
from cel_dist.cli.completion import complete_settings

ConfigArgument = Annotated[Path, typer.Argument(help="YAML file, or the folder of a run or of a sweep.")]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings that replace those of the file.",
        autocompletion=complete_settings,
    ),
]


@config_app.command(epilog="Example: cel config show configs/small.yaml train.batch_size=64 --changed-only")
def show(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    defaults: Annotated[
        bool, typer.Option("--defaults/--changed-only", help="Every setting, or those that differ from the defaults.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Print the whole configuration as YAML that can be used as it is; what differs from the default says so."""
    from cel_dist.config_difference import changed_settings, read_any
    from cel_dist.config_file import assign

    loaded = read_any(config, overrides or [])
    changed = changed_settings(loaded)
    tree = loaded.model_dump(mode="json")
    if not defaults:
        tree = {}
        for path, (value, _) in changed.items():
            assign(tree, path, value, str(config))
    result = {
        "config": tree,
        "changed": {path: {"value": value, "default": default} for path, (value, default) in changed.items()},
    }
    emit(result, _as_yaml(tree, changed), as_json=as_json)


def _as_yaml(tree: dict[str, Any], changed: dict[str, tuple[Any, Any]]) -> str:
    lines = []
    for section, settings in tree.items():
        lines.append(f"{section}:")
        for name, value in settings.items():
            text = yaml.safe_dump({name: value}, sort_keys=False).rstrip("\n").split("\n")
            path = f"{section}.{name}"
            if path in changed and section != "sweep":
                # Of a text the first line is the one that has the key.
                text[0] += f"  # default: {json.dumps(changed[path][1])}"
            elif any(key.startswith(f"{path}.") for key in changed) and section != "sweep":
                text[0] += "  # default: {}"
            lines += [f"  {line}" for line in text]
    return "\n".join(lines)


@config_app.command(epilog="Example: cel config validate configs/small.yaml data.shards=shards --nproc 2")
def validate(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    nproc: Annotated[
        int | None, typer.Option(help="Ranks of the run, for what depends on their number; of a sweep it is known.")
    ] = None,
    settings_only: Annotated[
        bool, typer.Option("--settings-only", help="Do not look at data, models and the run folder.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check all settings, and what they name: data, bank, validation list, model, run folder. Writes nothing."""
    from cel_dist.config_difference import read_any
    from cel_dist.sweep.section import SweepConfig

    loaded = read_any(config, overrides or [])
    if isinstance(loaded, SweepConfig):
        from cel_dist.sweep.settings import load_sweep

        load_sweep(config / "sweep.yaml" if config.is_dir() else config, overrides or [])
        nproc = loaded.sweep.ranks
    if not settings_only:
        from cel_dist.training.preflight import preflight

        preflight(loaded, nproc, "auto")
    looked_at = "settings" if settings_only else "settings and what they name"
    emit({"ok": True, "config": str(config)}, f"{config}: {looked_at} are in order", as_json=as_json)


@config_app.command(epilog="Example: cel config schema --out cel.schema.json")
def schema(
    out: Annotated[Path | None, typer.Option(help="File to write. Default: standard output.")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="That of 'cel sweep' instead of a run.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the JSON Schema (draft 2020-12) of configuration files, by which editors check and complete them."""
    from cel_dist.config import Config
    from cel_dist.config_schema import json_schema
    from cel_dist.sweep.section import SweepConfig

    content = json_schema(SweepConfig if sweep else Config)
    text = json.dumps(content, indent=1)
    if out is None:
        emit(content, text, as_json=as_json)
        return
    from cel_dist.data.files import atomic_write

    with atomic_write(out) as file:
        file.write(f"{text}\n".encode())
    remark = (
        f"{out} is written; the first line '# yaml-language-server: $schema={out}' of a YAML file leads editors to it"
    )
    emit({"schema": str(out)}, remark, as_json=as_json)


@config_app.command(epilog="Example: cel config diff runs/a runs/b")
def diff(
    a: Annotated[Path, typer.Argument(help="YAML file, or the folder of a run or of a sweep.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
    as_json: JsonOption = False,
) -> None:
    """List the settings in which two configurations differ: path, value in A, value in B, between tabs.

    Settings that a file leaves out have their defaults. As of diff(1), the exit code is 0 where all settings are the
    same, 1 where some differ, and 2 where there is nothing to compare.
    """
    from cel_dist.config_difference import difference, read_any

    differing = difference(read_any(a, []), read_any(b, []))
    lines = [f"{path}\t{json.dumps(left)}\t{json.dumps(right)}" for path, (left, right) in differing.items()]
    result = {"same": not differing, "differing": {path: list(pair) for path, pair in differing.items()}}
    if differing or as_json:
        emit(result, "\n".join(lines), as_json=as_json)
    if differing:
        raise typer.Exit(code=1)
