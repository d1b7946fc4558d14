"""The process group of a job: joining it, its timeouts, its watchdog, and leaving it.

Rank 0 serves a store at MASTER_ADDR:MASTER_PORT where the ranks find each other; a launcher that serves one itself
(torchrun) is taken at its word.
"""

import gc
import json
import logging
import os
import secrets
import socket
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Before there is a process group: its functions keep the one of that moment as their default, for ever.
import torch.distributed.nn.functional
from torch.distributed import distributed_c10d as c10d

from cel_dist.config_sections import EngineSection
from cel_dist.distributed import World, free_port
from cel_dist.errors import CelError, PreemptedError, RunError
from cel_dist.imports import hidden
from cel_dist.watch import Limits, Watchdog, listen, named

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.1
_REMIND_SECONDS = 60.0
_READ_SECONDS = 2.0


@contextmanager
def process_group(world: World, settings: EngineSection) -> Iterator[tuple[torch.device, Watchdog]]:
    """Be a member of the job's process group within the block: NCCL on CUDA machines, gloo elsewhere.

    One process without a launcher forms a group of its own.

    Args:
        world: this process's place.
        settings: the limits of patience.

    Yields:
        This rank's device, and the watchdog, which is to be told where the rank is.

    Raises:
        CelError: the master's port is taken, or nobody answers there.
        RunError: ranks did not join, or one was lost or failed within the block, which a collective here then notices.
            A rank whose main thread hangs in a collective ends with exit code 1 instead.
    """
    limits = Limits(settings.start_timeout_seconds, settings.step_timeout_seconds, settings.peer_timeout_seconds)
    device = _prepare(world)
    listener = listen() if world.is_main and world.size > 1 else None
    told = {"port": listener.getsockname()[1] if listener else 0, "token": secrets.token_hex(16)}
    store, told = _meet(world, told, limits.start)
    watchdog = Watchdog(
        world,
        limits,
        main=(os.environ["MASTER_ADDR"], told["port"]),
        token=told["token"],
        listener=listener,
        on_patience=set_timeout,
    )
    with watchdog:
        failure: Exception | None = None
        try:
            _initialise(world, device, store, limits.collective(True))
            yield device, watchdog
            watchdog.done()
        except PreemptedError as error:
            # All ranks leave alike, whatever time each of them takes.
            traceback.clear_frames(error.__traceback__)
            watchdog.done()
            raise
        except Exception as error:
            # Frames in the traceback hold the engine, and with it the process group that is to end.
            traceback.clear_frames(error.__traceback__)
            failure = error if not _is_of_a_collective(error) else watchdog.explain(_one_line(error))
            watchdog.failed(_one_line(failure))
            if failure is error:
                raise
        except BaseException as error:
            watchdog.failed(f"interrupted ({type(error).__name__})")
            raise
        finally:
            stop_process_group()
    if failure is not None:
        # Outside of the handler: what a collective said, in a dozen lines, is no news beside this.
        raise failure


def start_process_group(world: World, timeout_seconds: float = 1800.0) -> torch.device:
    """Join the process group of the job without a watchdog, and return this rank's device. Raises as
    `process_group`."""
    device = _prepare(world)
    store, _ = _meet(world, {}, timeout_seconds)
    _initialise(world, device, store, timeout_seconds)
    return device


def stop_process_group() -> None:
    """Leave the process group, if there is one, and end its threads.

    A thread that still holds the tensors of the last collective when the interpreter ends aborts the process.
    """
    if not dist.is_initialized():
        return
    import deepspeed

    # DeepSpeed's own forgets the group that it cloned, too; engines hold groups in reference cycles.
    deepspeed.comm.destroy_process_group()
    gc.collect()


def set_timeout(seconds: float) -> None:
    """Let collectives that begin from now on fail after `seconds`, in all groups of this rank."""
    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def own_store(name: str, timeout_seconds: float = 300.0) -> c10d.Store:
    """A connection of its own to the store of the job, for use by another thread.

    Args:
        name: keeps its keys apart from those of others.
        timeout_seconds: how long it waits for a key.
    """
    store = c10d.PrefixStore(name, c10d._get_default_store().clone())  # type: ignore[attr-defined]
    store.set_timeout(timedelta(seconds=timeout_seconds))
    return store


def _prepare(world: World) -> torch.device:
    """Import DeepSpeed, with what it reads of the environment, and choose the device."""
    device = torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    # DeepSpeed reads its accelerator when it is imported, and warns on machines that have none.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("RANK", str(world.rank))
    os.environ.setdefault("WORLD_SIZE", str(world.size))
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    if world.size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise CelError(f"WORLD_SIZE is set but {name} is not; start through deepspeed or torchrun")
    # DeepSpeed's autotuner, which is not used, imports mlflow where it can: two seconds of every rank's start.
    with hidden("mlflow"):
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Under ZeRO 3 it calls them by their older names, and torch 2.13 would say so several times a step on every rank.
    older = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", older, FutureWarning)
    # Left alone, DeepSpeed compiles a shared-memory all-reduce for a minute when it first starts on a CPU. Gloo has
    # one.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _connect(world: World, timeout_seconds: float) -> c10d.Store:
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        return dist.TCPStore(  # type: ignore[attr-defined]
            address,
            int(port),
            world.size,
            is_master=world.is_main and not is_served,
            timeout=timedelta(seconds=timeout_seconds),
            # Who is missing is asked for by name, below.
            wait_for_workers=False,
            multi_tenant=True,
        )
    except ValueError:
        raise CelError(f"MASTER_PORT={port} is no port; give a number from 1 to 65535") from None
    except dist.DistNetworkError as error:
        where = f"{address}:{port}"
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise CelError(f"port {where} is in use; choose another one (MASTER_PORT, or --master_port)") from None
        raise CelError(f"no connection to the main process at {where}: {str(error).splitlines()[0]}") from None


def _meet(world: World, told: dict[str, Any], timeout_seconds: float) -> tuple[c10d.Store, dict[str, Any]]:
    """Wait for all ranks at the store.

    Args:
        world: this process's place.
        told: what rank 0 lets all know.
        timeout_seconds: how long it waits.

    Returns:
        A part of the store that this job has for itself, and what rank 0 let all know.
    """
    store = c10d.PrefixStore("cel_dist", _connect(world, timeout_seconds))
    if world.size == 1:
        return store, told
    try:
        session, told = (
            _call(store, world, told, timeout_seconds) if world.is_main else _answer(store, world, timeout_seconds)
        )
    except dist.DistError:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RunError(
            f"rank 0 at {where} ended, or does not answer, before all ranks had joined; its log says why"
        ) from None
    if "error" in told:
        raise RunError(told["error"], said_by=0)
    return c10d.PrefixStore(session, store), told


# A store may outlive a job: torchrun starts ranks again at the same one, and a process may form one group after
# another. So rank 0 names a session, who answers names it and a number drawn anew, and rank 0 repeats these numbers:
# neither side then takes for an answer what was said in another session.


def _call(store: c10d.Store, world: World, told: dict[str, Any], timeout_seconds: float) -> tuple[str, dict[str, Any]]:
    """Rank 0's part in `_meet`: its session, and what it told."""
    session, begin, reminded = secrets.token_hex(8), time.monotonic(), 0
    store.set("told", "{}")
    store.set("session", session)
    came: dict[int, dict[str, str]] = {}
    while missing := [rank for rank in range(1, world.size) if rank not in came]:
        for rank in missing:
            if store.check([f"came/{rank}"]):
                answer = json.loads(store.get(f"came/{rank}"))
                if answer["session"] == session:
                    came[rank] = answer
        waited = time.monotonic() - begin
        hosts = ", ".join(sorted({socket.gethostname(), *(answer["host"] for answer in came.values())}))
        if len(came) < world.size - 1 and waited > timeout_seconds:
            told = {
                "error": f"{named(rank for rank in missing if rank not in came)} of {world.size} did not join within "
                f"{timeout_seconds:g} s (engine.start_timeout_seconds); the others are on {hosts}; look at the "
                "launcher's log of the other machines, and whether they reach MASTER_ADDR"
            }
            break
        if waited > (reminded + 1) * _REMIND_SECONDS:
            reminded += 1
            logger.warning("waiting for %s for %.0f s; the others are on %s", named(missing), waited, hosts)
        time.sleep(_LOOK_SECONDS)
    numbers = {rank: answer["number"] for rank, answer in came.items()}
    store.set("told", json.dumps({**told, "session": session, "numbers": numbers}))
    if "error" in told and came:
        # The store ends with this rank; the others are to have read why.
        with suppress(dist.DistError):
            store.wait([f"{session}/read/{rank}" for rank in came], timedelta(seconds=_READ_SECONDS))
    return session, told


def _answer(store: c10d.Store, world: World, timeout_seconds: float) -> tuple[str, dict[str, Any]]:
    """The part of the others in `_meet`: rank 0's session, and what it told."""
    number, answered = secrets.token_hex(8), ""
    # Rank 0 gives up first, and says why.
    until = time.monotonic() + timeout_seconds + _REMIND_SECONDS
    while time.monotonic() < until:
        if (session := store.get("session").decode()) != answered:
            answer = {"session": session, "number": number, "host": socket.gethostname()}
            store.set(f"came/{world.rank}", json.dumps(answer))
            answered = session
        told = json.loads(store.get("told"))
        if told.get("session") == session and told["numbers"].get(str(world.rank)) == number:
            store.set(f"{session}/read/{world.rank}", "")
            return session, told
        time.sleep(_LOOK_SECONDS)
    raise dist.DistStoreError("no answer")


def _initialise(world: World, device: torch.device, store: c10d.Store, timeout_seconds: float) -> None:
    import deepspeed

    is_cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        store=store,
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=timeout_seconds),
        # One process has no peer, for whom NCCL would split communicators.
        device_id=device if is_cuda and world.size > 1 else None,
    )
    # Finds the group that is there.
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)


def _is_of_a_collective(error: Exception) -> bool:
    """Whether this is what a collective says when another rank, or the way to it, is gone, or was made of it."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    if type(error) is RuntimeError and ("gloo" in text or "nccl" in text):
        return True
    return isinstance(error.__cause__, Exception) and _is_of_a_collective(error.__cause__)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:1000]
    return text if isinstance(error, (CelError, RunError)) else f"{type(error).__name__}: {text}"
