"""The command `cel`, also as `python -m cel_dist`: what is in place before anything that takes time is imported."""

import atexit
import os
import signal
import sys

# `errors.EXIT_INTERRUPTED`; a module more would be imported before Ctrl-C is one line.
_INTERRUPTED = 130


def main() -> None:
    """Entry point of the installed script: Ctrl-C at any moment is one line or, once the work is done, nothing."""
    # Who started it may have had it ignore Ctrl-C, as a shell does in the background: then that is what is wanted.
    listens = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if listens:
        signal.signal(signal.SIGINT, _end_early)
        # Registered first, and so called last: Python then gives Ctrl-C its own meaning back, that of being killed.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    from cel_dist.cli.app import run

    if listens:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = run(sys.argv[1:])
    if code == _INTERRUPTED:
        # What comes after the line is remarks on what was given up, as torch has one on a cache.
        import logging

        logging.disable()
    if listens:
        signal.signal(signal.SIGINT, lambda number, frame: _leave(code))
    # Python ends with signal 2, not with `code`, where an interrupt went through an `exec` of source and was caught
    # later: as many modules have one, of named tuples and data classes. Another `exec` lets it forget.
    exec("")
    sys.exit(code)


def _end_early(number: int, frame: object) -> None:
    os.write(2, b"error: interrupted\n")
    os._exit(_INTERRUPTED)


def _leave(code: int) -> None:
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
