"""Ranks that start at once: copies of a process that has loaded torch and DeepSpeed already, which takes seconds."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from worlds import load_what_takes_long

TIMEOUT_SECONDS = 60


class Ranks:
    """The process that is copied. `module` has a function `main()`, which a rank runs; it returns the exit code."""

    def __init__(self, module: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, module],
            env={**os.environ, "DS_ACCELERATOR": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **question: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


class Rank:
    """A process of the job; what it says is in the files `out` and `err`, what it is told comes on its stdin."""

    def __init__(self, ranks: Ranks, folder: Path, environment: dict[str, str]) -> None:
        self._ranks, self._folder, self.code = ranks, folder, None
        folder.mkdir(parents=True)
        os.mkfifo(folder / "in")
        self.pid = ranks.ask(folder=str(folder), environment=environment)

    def tell(self, line: str) -> None:
        with open(self._folder / "in", "w") as stdin:
            stdin.write(f"{line}\n")

    def wait_for(self, line: str) -> None:
        """Until the rank has printed a line."""
        until = time.monotonic() + TIMEOUT_SECONDS
        while line not in (self._folder / "out").read_text().splitlines():
            assert self.poll() is None, self.errors()
            assert time.monotonic() < until, f"{self._folder.name} does not come to '{line}': {self.errors()}"
            time.sleep(0.01)

    def wait(self) -> int:
        """The exit code, when the rank has ended; minus the signal that killed it."""
        until = time.monotonic() + TIMEOUT_SECONDS
        while (code := self.poll()) is None:
            assert time.monotonic() < until, f"{self._folder.name} does not end: {self.errors()}"
            time.sleep(0.01)
        return code

    def poll(self) -> int | None:
        if self.code is None:
            self.code = self._ranks.ask(poll=self.pid)
        return self.code

    def send(self, signal: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal)

    def errors(self) -> str:
        return (self._folder / "err").read_text()


def _serve(module: str) -> None:
    load_what_takes_long()
    main = __import__(module).main
    for line in sys.stdin:
        question = json.loads(line)
        if "poll" in question:
            pid, status = os.waitpid(question["poll"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
            continue
        folder = Path(question["folder"])
        for name in ("out", "err"):
            (folder / name).touch()
        pid = os.fork()
        if pid == 0:
            # Open for both, so that it does not end when a writer leaves.
            for number, (name, mode) in enumerate({"in": os.O_RDWR, "out": os.O_WRONLY, "err": os.O_WRONLY}.items()):
                os.dup2(os.open(folder / name, mode), number)
            os.environ.update(question["environment"])
            from cel_dist.distributed import leave_process

            leave_process(main())
        print(json.dumps(pid), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
