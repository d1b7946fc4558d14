"""The result of a check, and how a check that fails in any way becomes one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "fault"]


@dataclass(frozen=True)
class Check:
    """One thing that was tried.

    Attributes:
        name: of the thing.
        state: `ok`; `note`, where something is missing that training and `cel demo` do without; `fault`, where one of
            them cannot work.
        found: what was seen, one line.
        remedy: what to do, one line; empty where nothing is to be done.
    """

    name: str
    state: State
    found: str
    remedy: str = ""


def tried(name: str, function: Callable[[], Check], remedy: str, failure: State = "fault") -> Check:
    """What `function` returns, or what it raises as a finding.

    Args:
        name: of the check.
        function: tries the thing.
        remedy: what to do where it raises.
        failure: what it means if it raises.
    """
    try:
        return function()
    # A damaged package raises anything, an exit among it.
    except (Exception, SystemExit) as error:
        return Check(name, failure, one_line(error), remedy)


def one_line(error: BaseException) -> str:
    """The kind of an exception and the first of its words."""
    text = " ".join(str(error).split())
    shown = text if len(text) <= 200 else text[:200] + " ..."
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__


Checks = Iterator[Check]
"""What a probe yields: each result as soon as it is there, so that what follows may hang or crash."""
