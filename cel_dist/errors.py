"""The two kinds of failure that a user meets, and what becomes of them on the command line."""


class CelError(Exception):
    """Input that cannot be used. The message is one line: what is wrong, where, and what to do (exit code 2)."""


class RunError(Exception):
    """A failure while running, through no fault of the input. One line as well (exit code 1).

    Args:
        message: the line.
        said_by: the rank that says it, where all ranks raise for the same reason. None: whoever raises it.
    """

    def __init__(self, message: str, *, said_by: int | None = None) -> None:
        super().__init__(message)
        self.said_by = said_by
