"""`python -m cel_dist.doctor.probe NAME SETTINGS` makes the checks of a probe: a JSON object a line on stdout."""

import importlib
import json
import os
import sys
from dataclasses import asdict

from cel_dist.distributed import let_idle_threads_sleep

# Probe -> module of this folder and function.
_FUNCTIONS = {
    "environment": ("packages", "environment"),
    "machine": ("machine", "machine"),
    "programs": ("machine", "programs"),
    "compute": ("compute", "compute"),
    "collectives": ("collectives", "collectives"),
    "deepspeed": ("libraries", "deepspeed"),
    "audio": ("libraries", "audio"),
    "torchaudio": ("libraries", "torchaudio"),
    "webdataset": ("libraries", "webdataset"),
    "corpus": ("libraries", "corpus"),
    "ray": ("libraries", "ray"),
    "tracking": ("tracking", "tracking"),
}


def main(arguments: list[str]) -> None:
    """Run the probe `arguments[0]` with the settings in `arguments[1]`."""
    # Libraries write to stdout when they please, native ones to the descriptor.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as results:
        os.dup2(2, 1)
        let_idle_threads_sleep()
        module, function = _FUNCTIONS[arguments[0]]
        from cel_dist.doctor.examine import Settings

        checks = getattr(importlib.import_module(f"cel_dist.doctor.{module}"), function)
        for check in checks(Settings(**json.loads(arguments[1]))):
            results.write(json.dumps(asdict(check)) + "\n")
            results.flush()
    # Threads of a library that cannot end must not keep what is known already.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
