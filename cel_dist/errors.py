"""The two kinds of failure that a user meets, and what becomes of them on the command line."""


class CelError(Exception):
    """Input that cannot be used. The message is one line: what is wrong, where, and what to do (exit code 2)."""


class RunError(Exception):
    """A failure while running, through no fault of the input. One line as well (exit code 1)."""
