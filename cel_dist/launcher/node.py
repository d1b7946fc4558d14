"""`python -m cel_dist.launcher.node ARGUMENTS` is DeepSpeed's launcher of one node, with the same arguments."""

import signal
from types import SimpleNamespace
from typing import Any

from cel_dist.imports import hidden

# With these a scheduler asks the ranks to end, and often asks all processes of a job.
_FOR_RANKS = (signal.SIGTERM, signal.SIGUSR1)


def main() -> None:
    """Start the ranks of this node and wait for them; ends the process with the code of the first one that fails.

    SIGTERM and SIGUSR1 are for the ranks, whom `cel train` tells. DeepSpeed would take the first for an order to end
    them, and say with code 1 that they failed; of the second it would die.
    """
    # DeepSpeed's autotuner, which is not used, imports mlflow where it can: two seconds of every start.
    with hidden("mlflow"):
        from deepspeed.launcher import launch

    for number in _FOR_RANKS:
        # A function of this process and not SIG_IGN, which the ranks would inherit.
        signal.signal(number, lambda number, frame: None)
    launch.signal = SimpleNamespace(signal=_set, SIGINT=signal.SIGINT, SIGTERM=signal.SIGTERM)
    launch.main()


def _set(number: signal.Signals, handler: Any) -> None:
    if number not in _FOR_RANKS:
        signal.signal(number, handler)


if __name__ == "__main__":
    main()
