"""Training in new processes, on this machine or on many, and again when they fail."""

import logging
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cel_dist.config_file import load_config
from cel_dist.data.files import sole_writer
from cel_dist.errors import EXIT_PREEMPTED, CelError, PreemptedError, RunError
from cel_dist.launcher.command import Placement, launcher_command
from cel_dist.launcher.nodes import environment_file, require_reachable, wait_until_reachable
from cel_dist.launcher.process import LaunchProcess

logger = logging.getLogger(__name__)


def launch(
    config: Path, overrides: list[str], placement: Placement, *, resume: str = "auto", max_restarts: int = 0
) -> dict[str, Any]:
    """Train in new processes and return the run's summary (see `TrainResult`).

    Everything that can be found wrong beforehand is checked here first, so that a mistake costs seconds and one line
    instead of a launch. With a hostfile, this machine must see the data and the run folder as the nodes do.

    SIGTERM and SIGUSR1 are handed to the ranks, which write a checkpoint and end; a second one ends them at once.

    Args:
        config: YAML file.
        overrides: `key=value` settings.
        placement: where.
        resume: as in `cel_dist.training.trainer.train`.
        max_restarts: how often a run that failed is started again, from its newest checkpoint.

    Returns:
        The summary; on a node without rank 0 the run folder alone, if the summary is not to be seen from there.

    Raises:
        CelError: the run cannot be started, here or by the ranks.
        PreemptedError: the ranks were asked to end, and did.
        RunError: another process writes the run folder, or the ranks failed; what they said is above on stderr.
    """
    if max_restarts < 0:
        raise CelError(f"--max-restarts {max_restarts}: give 0 or more")
    hosts = placement.hosts()
    with LaunchProcess(next(iter(hosts)) if placement.over_ssh else None) as process:
        return _launch(config, overrides, placement, hosts, process, resume=resume, max_restarts=max_restarts)


def _launch(
    config: Path,
    overrides: list[str],
    placement: Placement,
    hosts: Mapping[str, int],
    process: LaunchProcess,
    *,
    resume: str,
    max_restarts: int,
) -> dict[str, Any]:
    # Both read much, of which the command line and its help know nothing.
    from cel_dist.training.conclusion import catch_up
    from cel_dist.training.preflight import preflight
    from cel_dist.training.result import TrainResult

    settings = load_config(config, overrides)
    num_ranks = sum(hosts.values()) if hosts else placement.num_ranks or 1
    start = preflight(settings, num_ranks, resume).start
    if start.result is not None:
        return asdict(catch_up(settings, start.result))
    if placement.over_ssh:
        require_reachable(list(hosts))
    if placement.has_rank_0 and settings.run.dir.is_dir():
        # The ranks hold the folder while they run; looking now spares the start of a second set of them.
        with sole_writer(settings.run.dir, "cel train"):
            pass

    def command(resume: str) -> list[str]:
        environment = environment_file(settings.run.dir) if placement.over_ssh else None
        return launcher_command(config, overrides, placement, resume=resume, environment=environment)

    _train(command, process, placement, hosts, settings.run.dir, resume, max_restarts)
    result = TrainResult.read(settings.run.dir)
    if result is None and placement.has_rank_0:
        raise RunError(f"training ended, but its summary in {settings.run.dir} cannot be read")
    return asdict(result) if result else {"run_dir": str(settings.run.dir), "steps": None, "eer": None}


def _train(
    command_for: Callable[[str], list[str]],
    process: LaunchProcess,
    placement: Placement,
    hosts: Mapping[str, int],
    run_dir: Path,
    resume: str,
    max_restarts: int,
) -> None:
    """Start the run, and again as often as it fails and may; returns when it has reached its end."""
    from cel_dist.launcher.restarts import Progress, wait_until_released, what_ended

    first = Progress.of(run_dir)
    num_idle = 0
    for restart in range(max_restarts + 1):
        begin = Progress.of(run_dir)
        # What this launch has saved counts; before that, the run begins where it was asked to.
        command = command_for(resume if begin.checkpoints == first.checkpoints else "auto")
        logger.info("starting: %s", shlex.join(command))
        code = process.run(command, environment_file(run_dir) if placement.over_ssh else None)
        now = Progress.of(run_dir)
        if code == 0 and (now.summary != begin.summary or not placement.has_rank_0):
            return
        _raise_unless_worth_another_start(code, process, run_dir)
        num_idle = 0 if now.is_beyond(begin) else num_idle + 1
        what = what_ended(code, over_ssh=placement.over_ssh)
        idle = f"; the last {num_idle} starts made no step" if num_idle > 1 else ""
        if restart == max_restarts:
            tries = f", after {restart} restart{'s' * (restart > 1)}{idle}" if restart else ""
            raise RunError(f"training failed: {what}{tries}; its last words are above, its run folder is {run_dir}")
        place = now.newest or "the beginning"
        logger.warning("training failed: %s; restart %d of %d, from %s%s", what, restart + 1, max_restarts, place, idle)
        if placement.has_rank_0:
            wait_until_released(run_dir)
        if placement.over_ssh:
            # A start without them would wait for them too, and then fail.
            wait_until_reachable(list(hosts), lambda: bool(process.requests))


def _raise_unless_worth_another_start(code: int, process: LaunchProcess, run_dir: Path) -> None:
    """Raise what a launch came to that would come to the same again, or is not to be started again."""
    if code == 2:
        raise CelError("training did not start; the line above that begins with 'error:' says why")
    requests = process.requests
    if len(requests) > 1:
        raise RunError(f"training was ended at the second signal ({requests[-1].name}); run folder {run_dir}")
    # Ranks that are still starting have no checkpoint to write, and die of the signal.
    asked = {-number for number in requests} | {256 - number for number in requests}
    if code == EXIT_PREEMPTED or code in asked or process.found_no_rank:
        by = f" ({requests[0].name})" if requests else ""
        raise PreemptedError(
            f"training was asked to end{by} and did; run the same command again to go on, run folder {run_dir}"
        )
    if requests:
        raise RunError(
            f"training was asked to end ({requests[0].name}) and failed instead, with code {code}; its last words are "
            f"above, its run folder is {run_dir}"
        )
