"""Who of a job is alive, and where each rank is: beside the collectives, so that a failure of theirs can be told."""

from cel_dist.watch.roster import Limits, named
from cel_dist.watch.watchdog import Watchdog, listen

__all__ = ["Limits", "Watchdog", "listen", "named"]
