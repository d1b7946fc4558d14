"""What a machine and its environment can do for this package: every check tries the thing itself, in bounded time."""

from cel_dist.doctor.check import Check, State
from cel_dist.doctor.examine import Settings, examine

__all__ = ["Check", "Settings", "State", "examine"]
