"""Two processes that form a group and sum a tensor over it, as the ranks of a job do."""

import os
import subprocess
import sys
from datetime import timedelta
from typing import TYPE_CHECKING

from cel_dist.distributed import free_port
from cel_dist.doctor.check import Check, Checks, one_line

if TYPE_CHECKING:
    from cel_dist.doctor.examine import Settings

_RANKS = 2
_GLOO = (
    "check that the name of this machine resolves (/etc/hosts) and that a firewall lets its processes meet; "
    "GLOO_SOCKET_IFNAME=lo names the network to use"
)
_NCCL = (
    "run with NCCL_DEBUG=INFO to see why; NCCL_SOCKET_IFNAME names the network, NCCL_P2P_DISABLE=1 avoids peer access"
)


def collectives(settings: "Settings") -> Checks:
    """An all-reduce over two processes with gloo; with GPUs one with NCCL as well."""
    # Less than what the probe has: a hanging collective is told apart from a slow import by its own words.
    patience = max(5.0, 0.8 * settings.timeout_seconds)
    address = ["127.0.0.1", str(free_port()), str(patience)]
    command = [sys.executable, "-m", "cel_dist.doctor.collectives"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), *address], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=2, text=True
        )
        for rank in range(_RANKS)
    ]
    said: dict[str, list[str]] = {"gloo": [], "nccl": []}
    # Rank 0 first, whose lines come while the other one may still hang.
    for rank in ranks:
        assert rank.stdout is not None
        for line in rank.stdout:
            backend, _, outcome = line.strip().partition(" ")
            if backend in said:
                said[backend].append(outcome)
                if len(said[backend]) == _RANKS:
                    yield _judged(backend, said[backend])
    for backend in (name for name, outcomes in said.items() if len(outcomes) < _RANKS):
        ends = ", ".join(f"rank {number} ended with code {rank.wait()}" for number, rank in enumerate(ranks))
        yield Check(backend, "fault", next(iter(_failures(said[backend])), ends), _GLOO if backend == "gloo" else _NCCL)


def _failures(outcomes: list[str]) -> list[str]:
    return [outcome for outcome in outcomes if not outcome.startswith(("right:", "none:"))]


def _judged(backend: str, outcomes: list[str]) -> Check:
    failures = _failures(outcomes)
    if failures:
        return Check(backend, "fault", failures[0], _GLOO if backend == "gloo" else _NCCL)
    # Where there is one GPU, one rank sums alone.
    outcome = min(outcomes, key=lambda text: text.startswith("none:"))
    if outcome.startswith("none:"):
        return Check(backend, "note", outcome.removeprefix("none: "), "nothing, unless there should be a GPU")
    return Check(backend, "ok", outcome.removeprefix("right: "))


def _rank(rank: int, address: str, port: int, patience: float) -> None:
    """Be one of the ranks; says a line a backend."""
    import torch
    import torch.distributed as dist

    timeout = timedelta(seconds=patience)
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as results:
        os.dup2(2, 1)

        def say(backend: str, outcome: str) -> None:
            results.write(f"{backend} {outcome}\n")
            results.flush()

        try:
            store = dist.TCPStore(address, port, _RANKS, rank == 0, timeout)  # type: ignore[attr-defined]
            dist.init_process_group("gloo", store=store, rank=rank, world_size=_RANKS, timeout=timeout)
            tensor = torch.full((1000,), float(rank + 1))
            dist.all_reduce(tensor)
            is_right = bool((tensor == 3.0).all())
            say("gloo", "right: two processes summed a tensor" if is_right else f"a wrong sum, {tensor[0]} and not 3.0")
        except Exception as error:
            say("gloo", one_line(error))
            say("nccl", "not tried, because gloo failed")
            return
        try:
            say("nccl", _nccl(rank, timeout))
        except Exception as error:
            say("nccl", one_line(error))
        # Nobody leaves while the other one still needs the store.
        dist.barrier()


def _nccl(rank: int, timeout: timedelta) -> str:
    import torch
    import torch.distributed as dist

    if not torch.cuda.is_available():
        return "none: there is no GPU; ranks meet through gloo"
    if not dist.is_nccl_available():
        return "this torch is built without NCCL"
    members = list(range(min(_RANKS, torch.cuda.device_count())))
    group = dist.new_group(members, timeout=timeout, backend="nccl")
    if rank not in members:
        return "none: one GPU, so rank 0 sums alone"
    torch.cuda.set_device(rank)
    tensor = torch.full((1000,), float(rank + 1), device="cuda")
    dist.all_reduce(tensor, group=group)
    expected = float(sum(member + 1 for member in members))
    version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    if not bool((tensor == expected).all()):
        return f"NCCL {version}: a wrong sum, {float(tensor[0])} and not {expected}"
    ranks = "two GPUs" if len(members) == _RANKS else "one GPU (there is no second one)"
    return f"right: NCCL {version} summed a tensor on {ranks}"


if __name__ == "__main__":
    _rank(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
    sys.stdout.flush()
    os._exit(0)
