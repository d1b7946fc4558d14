"""The command `cel`: one application, one place that turns failures into a line and an exit code."""

import importlib
import json
import logging
import os
import sys
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from cel_dist.distributed import let_idle_threads_sleep
from cel_dist.errors import EXIT_INTERRUPTED, CelError, RunError, exit_code, missing_package

app = typer.Typer(
    name="cel",
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
corpus_app = typer.Typer(help="Make, download and divide corpora.", rich_markup_mode=None)
app.add_typer(corpus_app, name="corpus")
config_app = typer.Typer(
    help="Configurations: what they come to, whether they work, where they differ.", rich_markup_mode=None
)
app.add_typer(config_app, name="config")
data_app = typer.Typer(help="Look into prepared data.", rich_markup_mode=None)
app.add_typer(data_app, name="data")
models_app = typer.Typer(help="Models in the MLflow registry.", rich_markup_mode=None)
app.add_typer(models_app, name="models")
speakers_app = typer.Typer(help="People enrolled in a store.", rich_markup_mode=None)
app.add_typer(speakers_app, name="speakers")


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    from cel_dist import __version__
    from cel_dist.code_version import code_version

    commit = code_version()
    print(f"cel_dist {__version__}" + (f" ({commit})" if commit.startswith("git:") else ""))
    raise typer.Exit


@app.callback(help="Speaker embeddings from unlabelled speech.")
def cel(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """What comes before a command."""


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, on stdout.")]

# Each module adds its commands to `app` when it is imported.
_COMMAND_MODULES = (
    "corpus",
    "config",
    "data",
    "data_stats",
    "encoders",
    "train",
    "sweep",
    "evaluate",
    "demo",
    "doctor",
    "report",
    "models",
    "models_export",
    "speakers",
    "serve",
)


def emit(result: dict[str, Any], text: str, *, as_json: bool) -> None:
    """Print the outcome of a command on stdout: `result` as one JSON object, or `text` for people."""
    print(json.dumps(result) if as_json else text)


def suggest(next_step: str, *, as_json: bool) -> None:
    """Tell a person at a terminal what usually comes next, on stderr; logs, pipes and programs are spared."""
    if not as_json and sys.stderr.isatty():
        print(f"next: {next_step}", file=sys.stderr)


def run(arguments: list[str]) -> int:
    """Run `cel` with `arguments` and return the exit code."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    let_idle_threads_sleep()
    try:
        for name in _COMMAND_MODULES:
            importlib.import_module(f"cel_dist.cli.{name}")
        outcome = app(args=arguments or ["--help"], prog_name="cel", standalone_mode=False)
        # The code of `typer.Exit` is returned, not raised, when typer does not run stand-alone. Ctrl-C is one, too.
        if outcome == EXIT_INTERRUPTED:
            return _interrupted()
        return outcome if isinstance(outcome, int) else 0
    except (CelError, RunError) as error:
        return _fail(str(error), exit_code(error))
    except ModuleNotFoundError as error:
        return _fail(str(missing_package(error)), 2)
    except TyperException as error:
        return _fail(f"{error.format_message().rstrip('.')}; see 'cel --help' and 'cel COMMAND --help'", 2)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except BrokenPipeError:
        # The reader went away (`cel ... | head`): nothing is left to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _interrupted() -> int:
    # Transfers that were under way are given up with the process, which asyncio would remark on, task by task.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    return _fail("interrupted", EXIT_INTERRUPTED)


def _fail(message: str, code: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code


def main() -> None:
    """Entry point of scripts that were installed before `cel_dist.__main__` was one."""
    from cel_dist.__main__ import main as begin

    begin()
