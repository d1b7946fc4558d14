"""What is known of each rank, and what to conclude from it. Times are seconds of one monotonic clock."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

# A process that lives notices a connection that was cut, and comes back within this.
_RETURN_SECONDS = 0.5
# Ranks of one machine fall silent together, as far as their last beats let one see.
_SILENT_WITH = 0.6
_AGAIN = "run the same command again: it goes on from the last checkpoint"


class Limits(NamedTuple):
    """Seconds of patience.

    Attributes:
        start: until all ranks have joined and come past their first step, and where one rank works for all.
        step: for a rank that lives but does not come where the others wait for it.
        peer: without a sign of life.
    """

    start: float = 1800.0
    step: float = 600.0
    peer: float = 30.0

    @property
    def beat(self) -> float:
        """Seconds between two signs of life."""
        return min(self.peer / 10, 3.0)

    def collective(self, patient: bool) -> float:
        """Seconds that a collective may take: the watchdog is to be first, because it says who."""
        return (self.start if patient else self.step) + 2 * self.peer


class Position(NamedTuple):
    """Where the main thread of a rank is.

    Attributes:
        passed: how many places it has come through; all ranks count alike.
        step: the step that it is at.
        doing: what it does there.
        patient: whether `Limits.start` is the limit there.
        where: place in the code.
    """

    passed: int = 0
    step: int = 0
    doing: str = "starting"
    patient: bool = True
    where: str = ""

    def __str__(self) -> str:
        return f"step {self.step} ({self.doing})" if self.step else self.doing


class Finding(NamedTuple):
    """What ended the run.

    Attributes:
        kind: `lost` without a word, `failed` with words of their own, or `stalled`, alive.
        text: for people, one line.
        ranks: those that it names.
    """

    kind: Literal["lost", "failed", "stalled"]
    text: str
    ranks: tuple[int, ...]


@dataclass
class _Rank:
    heard: float
    moved: float
    host: str = "a host that did not answer yet"
    address: str = ""
    position: Position = field(default_factory=Position)
    closed: float | None = None
    failed: float | None = None
    words: str = ""
    is_done: bool = False


class Roster:
    """The ranks that one rank watches.

    Args:
        ranks: which.
        limits: patience.
        now: the time.
    """

    def __init__(self, ranks: Iterable[int], limits: Limits, now: float) -> None:
        self._limits = limits
        self._ranks = {rank: _Rank(now, now) for rank in ranks}

    def came(self, rank: int, host: str, address: str, now: float) -> None:
        """A rank has connected, for the first time or again."""
        known = self._ranks[rank]
        known.host, known.address, known.heard, known.closed = host, address, now, None

    def beat(self, rank: int, position: Position, now: float) -> None:
        """A rank gave a sign of life."""
        known = self._ranks[rank]
        known.heard = now
        if position.passed != known.position.passed:
            known.moved = now
        known.position = position

    def closed(self, rank: int, now: float, *, surely: bool = False) -> None:
        """The connection to a rank has ended.

        Args:
            rank: which.
            now: the time.
            surely: whether the process ended with it. A network may also have cut a connection.
        """
        known = self._ranks[rank]
        known.closed = (now if known.closed is None else known.closed) - (_RETURN_SECONDS if surely else 0.0)

    def failed(self, rank: int, words: str, now: float) -> None:
        """A rank said why it ends."""
        self._ranks[rank].failed, self._ranks[rank].words = now, words

    def done(self, rank: int) -> None:
        """A rank has come to its regular end, and is watched no more."""
        self._ranks[rank].is_done = True

    def is_done(self, rank: int) -> bool:
        """Whether a rank has come to its regular end."""
        return self._ranks[rank].is_done

    def forgive(self, seconds: float) -> None:
        """Leave out a time in which the watching process itself stood still."""
        for known in self._ranks.values():
            known.heard += seconds
            known.moved += seconds

    def lost(self, now: float, *, asked: bool) -> Finding | None:
        """Ranks that are gone.

        Args:
            now: the time.
            asked: whether a collective has failed already. Otherwise a rank that said why it ends need not be the only
                one: all may be about to, by themselves.
        """
        watched = {rank: known for rank, known in self._ranks.items() if not known.is_done}
        failed = [rank for rank, known in watched.items() if known.failed is not None]
        if failed:
            first = min(failed, key=lambda rank: watched[rank].failed or 0.0)
            known = watched[first]
            if asked or now - (known.failed or now) > self._limits.peer:
                return Finding("failed", f"{self._names([first])} failed: {known.words}", (first,))
            # Whether others are gone is not to be heard above its words.
            return None
        closed = [rank for rank, known in watched.items() if known.closed is not None]
        if any(now - (watched[rank].closed or now) >= _RETURN_SECONDS for rank in closed):
            return Finding(
                "lost",
                f"{self._names(closed)} ended without a word, last at {self._last(closed)}: killed, or out of memory; "
                f"look at the log there, then {_AGAIN}",
                tuple(closed),
            )
        longest = max((now - known.heard for known in watched.values()), default=0.0)
        if longest <= self._limits.peer:
            return None
        silent = [rank for rank, known in watched.items() if now - known.heard > _SILENT_WITH * self._limits.peer]
        return Finding(
            "lost",
            f"{self._names(silent)} not heard of for {longest:.0f} s, last at {self._last(silent)}: the machine or the "
            f"network is gone, or the process stands still; look there, then {_AGAIN}",
            tuple(silent),
        )

    def stalled(self, now: float) -> Finding | None:
        """Ranks that live but do not come on, while no other does; all ranks must be on this roster."""
        watched = {rank: known for rank, known in self._ranks.items() if not known.is_done and known.failed is None}
        if len(watched) < len(self._ranks):
            return None
        seconds = now - max(known.moved for known in watched.values())
        passed = {known.position.passed for known in watched.values()}
        behind = [rank for rank, known in watched.items() if known.position.passed == min(passed)]
        position = watched[behind[0]].position
        if seconds <= (self._limits.start if position.patient else self._limits.step):
            return None
        if len(passed) > 1:
            ahead = [rank for rank in watched if rank not in behind]
            waiting = max((watched[rank].position for rank in ahead), key=lambda ahead: ahead.passed)
            return Finding(
                "stalled",
                f"{self._names(behind)} did not come on from {position} for {seconds:.0f} s; the others wait at "
                f"{waiting}; {self._places(behind)}; its stack is in the log there; then {_AGAIN}",
                tuple(behind),
            )
        if position.patient:
            # One rank may be at work for all the others.
            return None
        return Finding(
            "stalled",
            f"no rank came on from {position} for {seconds:.0f} s: {self._places(behind)}; their stacks are in their "
            f"logs; then {_AGAIN}",
            tuple(behind),
        )

    def _names(self, ranks: Iterable[int]) -> str:
        machines: dict[tuple[str, str], list[int]] = defaultdict(list)
        for rank in sorted(ranks):
            machines[self._ranks[rank].host, self._ranks[rank].address].append(rank)
        return " and ".join(
            f"{named(on_it)} on {host}{f' ({address})' if address else ''}"
            for (host, address), on_it in machines.items()
        )

    def _last(self, ranks: list[int]) -> str:
        return str(max((self._ranks[rank].position for rank in ranks), key=lambda position: position.passed))

    def _places(self, ranks: Iterable[int]) -> str:
        places: dict[str, list[int]] = defaultdict(list)
        for rank in ranks:
            places[self._ranks[rank].position.where].append(rank)
        return ", ".join(f"{named(there)} in {where or 'native code'}" for where, there in places.items())


def named(ranks: Iterable[int]) -> str:
    """Ranks for people.

    >>> named([3]), named([1, 2]), named([4, 5, 6, 7, 9])
    ('rank 3', 'ranks 1, 2', 'ranks 4-7, 9')
    """
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    is_one = len(runs) == 1 and len(runs[0]) == 1
    return f"rank{'' if is_one else 's'} {', '.join(parts)}"
