"""The kinds of failure that a user meets, and what becomes of them on the command line."""

# What sysexits.h calls a failure that goes away by itself: whoever started the run may start it again as it is.
EXIT_PREEMPTED = 75
# What a shell says of a program that SIGINT ended: 128 + 2.
EXIT_INTERRUPTED = 130

# No rank: the watchdog has said it.
ALREADY_SAID = -1


class CelError(Exception):
    """Input that cannot be used. The message is one line: what is wrong, where, and what to do (exit code 2)."""


class RunError(Exception):
    """A failure while running, through no fault of the input. One line as well (exit code 1).

    Args:
        message: the line.
        said_by: the rank that says it, where all ranks raise for the same reason, or ALREADY_SAID. None: whoever raises
            it.
    """

    def __init__(self, message: str, *, said_by: int | None = None) -> None:
        super().__init__(message)
        self.said_by = said_by


class PreemptedError(RunError):
    """The run was asked to end (SIGTERM, SIGUSR1) and did so after writing a checkpoint (exit code EXIT_PREEMPTED)."""


def exit_code(error: CelError | RunError) -> int:
    """What a process that ends with `error` returns.

    >>> exit_code(CelError("no such file")), exit_code(RunError("disk full")), exit_code(PreemptedError("SIGTERM"))
    (2, 1, 75)
    """
    if isinstance(error, PreemptedError):
        return EXIT_PREEMPTED
    return 2 if isinstance(error, CelError) else 1
