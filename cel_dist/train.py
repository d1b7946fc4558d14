"""Entry point of a training process: `deepspeed --module cel_dist.train CONFIG [key=value ...] [--resume
auto|DIR|none]`.

torchrun, Slurm and a plain `python -m cel_dist.train` start the same function; the world comes from the environment.
"""

import argparse
import logging
import os
import sys

from cel_dist.config_file import load_config
from cel_dist.distributed import leave_process, let_idle_threads_sleep
from cel_dist.errors import EXIT_INTERRUPTED, CelError, PreemptedError, RunError, exit_code, missing_package
from cel_dist.launcher.ranks import LAUNCH, end_with_launcher


def main(arguments: list[str] | None = None) -> int:
    """Train as the command line says; returns the exit code (`errors.exit_code`)."""
    parser = argparse.ArgumentParser(prog="cel_dist.train", description="Train one rank of a run.")
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    parser.add_argument("--resume", default="auto", help="auto, none, or the path of a checkpoint (default: auto)")
    # The deepspeed launcher passes the local rank to every process; the environment has it too.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if is_main else logging.WARNING, format="%(message)s", stream=sys.stderr)
    let_idle_threads_sleep()
    end_with_launcher()
    try:
        config = load_config(options.config, options.overrides)
        try:
            from cel_dist.training.trainer import train

            train(config, options.resume)
        except ModuleNotFoundError as error:
            raise missing_package(error) from None
    except (CelError, RunError) as error:
        if _is_said_here(error):
            told = " ".join(str(error).split())
            print(told if isinstance(error, PreemptedError) else f"error: {told}", file=sys.stderr)  # noqa: T201
        return exit_code(error)
    except KeyboardInterrupt:
        # `cel train` says so itself.
        if LAUNCH not in os.environ and os.environ.get("LOCAL_RANK", "0") == "0":
            print("error: interrupted", file=sys.stderr)  # noqa: T201
        return EXIT_INTERRUPTED
    return 0


def _is_said_here(error: CelError | RunError) -> bool:
    """Whether this rank is the one to print a failure: one line is enough, where several ranks meet it."""
    if isinstance(error, CelError):
        # Bad input is the same for all ranks of a node.
        return os.environ.get("LOCAL_RANK", "0") == "0"
    return error.said_by in (None, int(os.environ.get("RANK", "0")))


if __name__ == "__main__":
    leave_process(main())
