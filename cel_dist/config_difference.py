"""What two configurations, or one and the defaults, do not have in common."""

from pathlib import Path
from typing import Any

from cel_dist.config import Config
from cel_dist.config_file import flat, parse_as, parse_config, read_settings
from cel_dist.errors import CelError

_ABSENT = "(not there)"


def read_any(source: Path, overrides: list[str]) -> Config:
    """The configuration of a file, of a run or of a sweep, or of the folder of one.

    Raises:
        CelError: as `load_config`, or the folder holds no configuration.
    """
    file = source
    if source.is_dir():
        found = [source / name for name in ("config.yaml", "sweep.yaml") if (source / name).is_file()]
        if not found:
            raise CelError(f"{source} holds no config.yaml; name the folder of a run or of a sweep, or a YAML file")
        file = found[0]
    tree = read_settings(file, overrides)
    if "sweep" in tree:
        # Loaded for sweeps alone: nothing else of them is needed here.
        from cel_dist.sweep.section import SweepConfig

        return parse_as(SweepConfig, tree, str(file))
    return parse_config(tree, str(file))


def settings_of(config: Config) -> dict[str, Any]:
    """All settings by their dotted paths, as JSON values; mappings that are empty among them."""
    tree = config.model_dump(mode="json")
    return {**dict(flat(tree)), **({"augment.extra": {}} if not tree["augment"]["extra"] else {})}


def changed_settings(config: Config) -> dict[str, tuple[Any, Any]]:
    """Settings that differ from the default: value and default by path. What has no default is among them."""
    defaults = settings_of(Config.model_validate({"data": {"shards": "s", "bank": "b"}}))
    defaults |= {"data.shards": None, "data.bank": None}
    return {
        path: (value, defaults.get(path))
        for path, value in settings_of(config).items()
        if path not in defaults or value != defaults[path]
    }


def difference(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """Settings that are not the same in both: both values by path, in the order of the configuration."""
    left, right = settings_of(a), settings_of(b)
    return {
        path: (left.get(path, _ABSENT), right.get(path, _ABSENT))
        for path in dict.fromkeys([*left, *right])
        if left.get(path, _ABSENT) != right.get(path, _ABSENT)
    }
