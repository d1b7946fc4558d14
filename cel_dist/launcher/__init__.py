"""Starting the ranks of a run through the deepspeed launcher, and what stands between them and who asked for them."""

from cel_dist.launcher.command import Placement, launcher_command, planned_command
from cel_dist.launcher.training import launch

__all__ = ["Placement", "launch", "launcher_command", "planned_command"]
