"""Starting the ranks of a run through the deepspeed launcher, and what stands between them and who asked for them.

Importing this is light, because the launcher of a node is a module of it (`node`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cel_dist.launcher.command import Placement, launcher_command, planned_command
    from cel_dist.launcher.training import launch

__all__ = ["Placement", "launch", "launcher_command", "planned_command"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"{__name__}.{'training' if name == 'launch' else 'command'}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
