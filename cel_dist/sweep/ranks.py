"""The ranks of a trial: an actor each in the trial's own placement group, which runs `cel_dist.train` in a process.

The process is what every other launcher starts. It ends with its actor, however that ends (`launcher.ranks`), so that
Ray, which takes an actor away at once, takes the rank away with it.
"""

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cel_dist.distributed import free_port
from cel_dist.errors import CelError, RunError
from cel_dist.launcher.ranks import LAUNCH, new_launch
from cel_dist.ray_cluster import first_line

# On a busy machine an interpreter with Ray takes minutes.
_START_SECONDS = 600.0
# What the actor of the trial itself takes of the share of rank 0.
DRIVER_CPUS = 0.1


class Place(NamedTuple):
    """Where an actor runs.

    Attributes:
        address: of its node.
        node: that it shares with others.
        gpus: that are its own, by the numbers of the node.
    """

    address: str
    node: str
    gpus: tuple[str, ...]


class Rank:
    """What the actor of a rank does."""

    def place(self) -> Place:
        """Where it runs."""
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        return Place(ray.util.get_node_ip_address(), context.get_node_id(), tuple(gpus))

    def free_port(self) -> int:
        """A port of its node that nobody listens on."""
        return free_port()

    def run(self, arguments: list[str], environment: Mapping[str, str], folder: str, log: str) -> int:
        """Train; returns the exit code, negative for a signal.

        Args:
            arguments: of `cel_dist.train`.
            environment: variables on top of those of the actor.
            folder: working folder.
            log: file that the output is appended to.
        """
        variables = {**os.environ, **environment, LAUNCH: new_launch(over_ssh=False)}
        with open(log, "ab") as out:
            command = [sys.executable, "-m", "cel_dist.train", *arguments]
            return subprocess.run(
                command, env=variables, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=out, check=False
            ).returncode


def bundles(ranks: int, cpus: float, gpus: float) -> list[dict[str, float]]:
    """The resources of a trial: a bundle for the actor that reports, cut from the share of rank 0, and one a rank.

    >>> bundles(2, 1.0, 0.0)
    [{'CPU': 0.1}, {'CPU': 0.9}, {'CPU': 1.0}]
    """
    share = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
    return [{"CPU": DRIVER_CPUS}, *({**share, "CPU": cpus - DRIVER_CPUS * (not rank)} for rank in range(ranks))]


class Ranks:
    """All ranks of a trial, from their start to their end.

    Args:
        group: the trial's placement group, with the bundles of `bundles`.
        shares: those bundles.
        arguments: of `cel_dist.train`.
        environment: variables of all ranks.
        folder: working folder.
        log: file that they write to; those besides rank 0 only warnings.
    """

    def __init__(
        self,
        group: PlacementGroup,
        shares: list[dict[str, float]],
        arguments: list[str],
        environment: Mapping[str, str],
        folder: str,
        log: Path,
    ) -> None:
        self._log = log
        # What former attempts said stays in the file.
        self._begin = log.stat().st_size if log.exists() else 0
        self._actors: list[Any] = []
        self._codes: list[Any] = []
        try:
            for number, share in enumerate(shares[1:], 1):
                where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
                actor = ray.remote(Rank).options(
                    num_cpus=share["CPU"], num_gpus=share.get("GPU", 0), scheduling_strategy=where, max_restarts=0
                )
                self._actors.append(actor.remote())
            places = ray.get([actor.place.remote() for actor in self._actors], timeout=_START_SECONDS)
            port = ray.get(self._actors[0].free_port.remote(), timeout=_START_SECONDS)
            for actor, own in zip(self._actors, environments(places, port), strict=True):
                self._codes.append(actor.run.remote(arguments, {**environment, **own}, folder, str(log)))
        except ray.exceptions.RayError as error:
            self.end()
            raise RunError(f"the ranks could not be started: {first_line(error)}") from None

    def wait(self, seconds: float) -> bool:
        """Wait for the end of all of them, at most so long; returns whether they are at their end.

        Raises:
            CelError: they refused the configuration or the data.
            RunError: one of them failed or was killed. The others are ended.
        """
        ended, _ = ray.wait(self._codes, num_returns=len(self._codes), timeout=seconds)
        codes = []
        for reference in ended:
            try:
                codes.append(ray.get(reference))
            except ray.exceptions.RayError as error:
                self.end()
                raise RunError(f"a rank was lost ({first_line(error)}); see {self._log}") from None
        failed = [code for code in codes if code]
        if failed:
            self.end()
            kind = CelError if 2 in failed else RunError
            raise kind(f"{last_words(self._log, self._begin, failed[0])}; see {self._log}")
        return len(ended) == len(self._codes)

    def end(self) -> None:
        """Take them away, at once."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors.clear()


def environments(places: list[Place], port: int) -> list[dict[str, str]]:
    """What tells each rank its place among all, which torchrun would set.

    Ranks of a node see the GPUs of all of them, so that they reach each other's, and take their own by local rank.

    >>> places = [Place("10.0.0.1", "a", ("3",)), Place("10.0.0.1", "a", ("5",)), Place("10.0.0.2", "b", ("0",))]
    >>> [told["CUDA_VISIBLE_DEVICES"] for told in environments(places, 29500)]
    ['3,5', '3,5', '0']
    >>> environments(places, 29500)[1]["LOCAL_RANK"]
    '1'
    """
    sizes, before = Counter(place.node for place in places), Counter[str]()
    told = []
    for rank, place in enumerate(places):
        variables = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(places)),
            "LOCAL_RANK": str(before[place.node]),
            "LOCAL_WORLD_SIZE": str(sizes[place.node]),
            "MASTER_ADDR": places[0].address,
            "MASTER_PORT": str(port),
        }
        # Without any of its own a rank would take the first of the node, as those of all other trials.
        gpus = [gpu for other in places if other.node == place.node for gpu in other.gpus]
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        before[place.node] += 1
        told.append(variables)
    return told


def last_words(log: Path, begin: int, code: int) -> str:
    """Why ranks ended: the last error in their log from a place on, or what the exit code of one says."""
    try:
        with open(log, "rb") as file:
            file.seek(begin)
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        lines = []
    said = [line for line in lines if line.startswith("error: ")]
    if said:
        return said[-1].removeprefix("error: ")
    return f"a rank was killed by {signal.Signals(-code).name}" if code < 0 else f"a rank ended with code {code}"
