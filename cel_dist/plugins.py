"""Encoders, augmentations and similarity losses of other packages: found by name, loaded when they are asked for.

A plug-in is a module that registers something under a name when it is imported. It is found in one of two ways: a
package that is installed names it as an entry point, whose name is that of what it registers; or the configuration
names it in `run.plugins`, and then it may be a file in the working folder.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from cel_dist.errors import CelError

Registered = TypeVar("Registered")


class Registry(Generic[Registered]):
    """What is known under a name, by itself or through an entry point.

    Args:
        what: what it holds, for messages: `encoder`.
        group: the entry points that lead to more of them: `cel_dist.encoders`.
    """

    def __init__(self, what: str, group: str) -> None:
        self._what, self._group = what, group
        self._known: dict[str, Registered] = {}

    def add(self, name: str, registered: Registered) -> None:
        """Make something known. Raises ValueError where the name is taken."""
        if name in self._known:
            raise ValueError(f"two {self._what}s are called '{name}'")
        self._known[name] = registered

    def names(self) -> list[str]:
        """All names, sorted; nothing is loaded for that."""
        return sorted({*self._known, *entry_point_names(self._group)})

    def find(self, name: str) -> Registered | None:
        """What has this name; an entry point is loaded where nothing has it yet. None: nothing has.

        Raises:
            CelError: the entry point leads to a module that cannot be imported, or that registers something else.
        """
        if name not in self._known:
            found = _entry_points(self._group).get(name)
            if found is None:
                return None
            load_entry_point(found, self._group)
            if name not in self._known:
                raise CelError(
                    f"plug-in {found.value} (entry point '{name}' of {self._group}) registers no {self._what} called "
                    f"'{name}'; name the entry point as what it registers"
                )
        return self._known[name]

    def get(self, name: str) -> Registered:
        """As `find`, and CelError with the nearest name where nothing has this one."""
        found = self.find(name)
        if found is None:
            valid = self.names()
            nearest = difflib.get_close_matches(name, valid, n=1, cutoff=0.0)
            meant = (
                f"did you mean '{nearest[0]}'? Known {self._what}s: {', '.join(valid)}"
                if nearest
                else ("there are none; name the module that registers it in run.plugins")
            )
            raise CelError(f"unknown {self._what} '{name}'; {meant}")
        return found


SIMILARITIES: Registry[Any] = Registry("similarity loss", "cel_dist.similarities")
"""Of `cel_dist.losses.similarity.Similarity`; here, because a configuration is checked without loading torch."""
AUGMENTATIONS: Registry[Any] = Registry("augmentation", "cel_dist.augmentations")
"""Of factories of `cel_dist.data.plugin_augment.Augmentation`."""


def entry_point_names(group: str) -> list[str]:
    """Names of the entry points of a group, sorted; nothing is loaded for that."""
    return sorted(_entry_points(group))


def _entry_points(group: str) -> Mapping[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}


def load_entry_point(point: EntryPoint, group: str) -> None:
    """Import what an entry point leads to. Raises CelError as `load_plugins`."""
    _import(point.module, f"entry point '{point.name}' of {group}", point.load)


def load_plugins(modules: Iterable[str], named_by: str = "run.plugins") -> None:
    """Import modules that register encoders, augmentations or similarity losses; those of the working folder, too.

    Args:
        modules: dotted names.
        named_by: who names them, for errors.

    Raises:
        CelError: a module is not there or fails when it is imported; it is named, with what it failed of.
    """
    folder = os.getcwd()
    for module in modules:
        if folder not in sys.path and "" not in sys.path:
            # Last, so that no file beside a configuration takes the place of an installed package.
            sys.path.append(folder)
        _import(module, named_by, lambda name=module: importlib.import_module(name))  # type: ignore[misc]


def _import(module: str, named_by: str, load: Callable[[], Any]) -> None:
    try:
        load()
    except Exception as error:
        # Whatever foreign code raises is a fault of that code; the message says whose.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, ModuleNotFoundError) and error.name and (module + ".").startswith(error.name + "."):
            remedy = "install its package, or start where its file is"
        else:
            remedy = "put that right in the plug-in"
        raise CelError(f"plug-in {module} ({named_by}) cannot be imported: {reason}; {remedy}") from error
