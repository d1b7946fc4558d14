"""What a run that failed left, what ended it, and when it can be started again."""

import json
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cel_dist.data.files import sole_writer
from cel_dist.errors import RunError
from cel_dist.training.checkpoint import STATE, complete_checkpoints
from cel_dist.training.result import SUMMARY

# How long ranks may hold the run folder after their launcher ended: on a node that was lost they need a minute.
_RELEASE_SECONDS = 90.0
_LOOK_EVERY_SECONDS = 0.5


@dataclass(frozen=True)
class Progress:
    """How far a run folder says that its run has come.

    Attributes:
        step: of the last record.
        checkpoints: the complete checkpoints, each with the time when it was completed.
        summary: time and file number of the summary of a run that reached its end; None without one.
    """

    step: int
    checkpoints: frozenset[tuple[Path, int]]
    summary: tuple[int, int] | None

    @classmethod
    def of(cls, run_dir: Path) -> "Progress":
        """Read it; what is not there yet is no progress."""
        checkpoints = frozenset(
            (path, (path / STATE).stat().st_mtime_ns) for path in complete_checkpoints(run_dir / "checkpoints")
        )
        summary = None
        with suppress(FileNotFoundError):
            state = (run_dir / SUMMARY).stat()
            summary = (state.st_mtime_ns, state.st_ino)
        return cls(_last_step(run_dir / "metrics.jsonl"), checkpoints, summary)

    @property
    def newest(self) -> str | None:
        """Name of the newest checkpoint."""
        return max((path.name for path, _ in self.checkpoints), default=None)

    def is_beyond(self, former: "Progress") -> bool:
        """Whether there is a step or a checkpoint that was not there."""
        return self.step > former.step or bool(self.checkpoints - former.checkpoints)


def _last_step(metrics: Path) -> int:
    """The step of the last whole line; 0 if there is none."""
    with suppress(OSError):
        with open(metrics, "rb") as file:
            file.seek(max(0, metrics.stat().st_size - (64 << 10)))
            lines = file.read().splitlines()
        for line in reversed(lines):
            with suppress(ValueError, KeyError, TypeError):
                return int(json.loads(line)["step"])
    return 0


def what_ended(code: int, *, over_ssh: bool) -> str:
    """What the exit code of the launcher says about the ranks.

    >>> what_ended(1, over_ssh=False), what_ended(247, over_ssh=False), what_ended(-9, over_ssh=False)
    ('a rank ended with code 1', 'a rank was killed by SIGKILL', 'the launcher was killed by SIGKILL')
    """
    if code == 0:
        return "the launcher ended without a summary in run.dir, killed or because not all nodes see run.dir"
    if code == 255 and over_ssh:
        return "ssh could not reach a node, or lost it"
    for number, whose in ((-code, "the launcher"), (256 - code, "a rank"), (code - 128, "the launcher of a node")):
        with suppress(ValueError):
            return f"{whose} was killed by {signal.Signals(number).name}"
    return f"a rank ended with code {code}"


def wait_until_released(run_dir: Path) -> None:
    """Wait until no rank of a launch that ended holds the run folder, on whatever node it is.

    Raises:
        RunError: one still does after a while.
    """
    end = time.monotonic() + _RELEASE_SECONDS
    while run_dir.is_dir():
        try:
            with sole_writer(run_dir, "cel train"):
                return
        except RunError:
            if time.monotonic() > end:
                raise
        time.sleep(_LOOK_EVERY_SECONDS)
