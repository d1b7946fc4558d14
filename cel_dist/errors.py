"""The kinds of failure that a user meets, and what becomes of them on the command line."""

import sys

# What sysexits.h calls a failure that goes away by itself: whoever started the run may start it again as it is.
EXIT_PREEMPTED = 75
# What a shell says of a program that SIGINT ended: 128 + 2.
EXIT_INTERRUPTED = 130

# No rank: the watchdog has said it.
ALREADY_SAID = -1


# Packages of the extras, by the names of their modules; all others belong to every installation.
_EXTRAS = {
    "espeakng_loader": "corpus",
    "fastapi": "serve",
    "multipart": "serve",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "optuna": "sweep",
    "prometheus_client": "serve",
    "python_multipart": "serve",
    "ray": "ray",
    "s3fs": "s3",
    "starlette": "serve",
    "uvicorn": "serve",
}


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


def missing_package(error: ModuleNotFoundError) -> CelError:
    """What to say of a package that is not installed.

    Raises:
        ModuleNotFoundError: `error`, if it names none, or a part of this package.

    >>> str(missing_package(ModuleNotFoundError("...", name="onnx.helper"))).partition(" in ")[0]
    "the Python package 'onnx' is not installed"
    """
    package = (error.name or "").partition(".")[0]
    if package in ("", "cel_dist"):
        raise error
    if package in _EXTRAS:
        remedy = f"pip install 'cel_dist[{_EXTRAS[package]}]'"
    else:
        remedy = f"run 'make install' in the checkout, or pip install {package}"
    return CelError(
        f"the Python package '{package}' is not installed in {sys.prefix}; {remedy}; 'cel doctor' looks further"
    )
