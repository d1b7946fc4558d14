"""The nodes of a job, as a hostfile lists them."""

import re
from pathlib import Path

from cel_dist.errors import CelError

# What ssh, pdsh and the deepspeed launcher all take for one name, and no shell for anything else.
_LINE = re.compile(r"(?P<name>[A-Za-z0-9_][A-Za-z0-9_.:@-]*)[ \t]+slots=(?P<slots>[1-9][0-9]{0,4})")
_FORM = "write one line 'name slots=PROCESSES' for each node"


def read_hostfile(path: Path) -> dict[str, int]:
    """Processes by node, in the order of the ranks. Blank lines and what follows a `#` say nothing.

    Raises:
        CelError: the file cannot be read, a line has another form, a node comes twice, or there is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise CelError(f"cannot read the hostfile {path} ({reason}); {_FORM}") from None
    except UnicodeDecodeError:
        raise CelError(f"the hostfile {path} is no text; {_FORM}") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        match = _LINE.fullmatch(entry)
        if match is None:
            raise CelError(f"hostfile {path}, line {number}: {entry!r} is no node; {_FORM}")
        if match["name"] in slots:
            raise CelError(
                f"hostfile {path}, line {number}: {match['name']} is there twice; add its slots up in one line"
            )
        slots[match["name"]] = int(match["slots"])
    if not slots:
        raise CelError(f"the hostfile {path} names no node; {_FORM}")
    return slots
