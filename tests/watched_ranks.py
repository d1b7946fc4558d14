"""What the ranks of the tests of the watchdog do, after `WHAT` of their environment."""

import itertools
import os
import select
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from cel_dist.distributed import World
from cel_dist.watch import Limits, Watchdog, listen


def main() -> int:
    """What a rank does."""
    return {"add": add, "train": train, "reconnect": reconnect, "late": late}[os.environ["WHAT"]]()


def train() -> int:
    from cel_dist.train import main

    return main([os.environ["CONFIG"]])


def late() -> int:
    """Rank 1 comes a second late to the default group, and again to another one once the timeout is half a second."""
    import torch
    import torch.distributed as dist

    from cel_dist.process_group import set_timeout, start_process_group

    world = World.from_environment()
    start_process_group(world)
    group = dist.new_group()
    dist.all_reduce(torch.ones(1), group=group)
    time.sleep(float(world.rank))
    dist.all_reduce(torch.ones(1))
    print("default group: late and in time", flush=True)
    set_timeout(0.5)
    time.sleep(2.0 * world.rank)
    try:
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError as error:
        print(f"another group: {str(error).partition('] ')[2]}", flush=True)
    # Until rank 1 has come.
    time.sleep(1.0)
    return 0


def reconnect() -> int:
    """Two watchdogs in one process, whose connection is cut between them, once for a moment and once for good."""
    listener, between = listen(), socket.create_server(("127.0.0.1", 0))
    # A stranger, who has no token and does not know the language.
    where = ("127.0.0.1", listener.getsockname()[1])
    stranger = socket.create_connection(where)
    stranger.sendall(b'{"hello": 1, "token": "guessed", "host": "h"}\nGET / HTTP/1.0\n')

    def carry(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1000):
                sink.sendall(data)

    def connect() -> list[socket.socket]:
        # From another address, as another machine.
        ends = [between.accept()[0], socket.create_connection(where, None, ("127.0.0.2", 0))]
        for source, sink in (ends, ends[::-1]):
            threading.Thread(target=carry, args=(source, sink), daemon=True).start()
        return ends

    limits = Limits(60.0, 60.0, 20.0)
    main = Watchdog(World(0, 2), limits, token="secret", listener=listener)
    other = Watchdog(World(1, 2), limits, token="secret", main=between.getsockname())
    with main, ThreadPoolExecutor() as pool:
        connected = pool.submit(connect)
        with other:
            for _ in range(2):
                ends, connected = connected.result(), pool.submit(connect)
                for end in ends:
                    end.shutdown(socket.SHUT_RDWR)
            connected.result()
            # Longer than a process is waited for that has lost its connection.
            assert not main._found.wait(1.0)
            assert stranger.recv(1) == b""
            between.close()
            other.done()
        main.done()
    return 0


def add() -> int:
    """Do at each step what stands on stdin."""
    import logging

    import torch

    from cel_dist.config_sections import EngineSection
    from cel_dist.errors import CelError, RunError, exit_code
    from cel_dist.process_group import own_store, process_group
    from cel_dist.train import _is_said_here

    logging.basicConfig(format="%(message)s")
    torch.set_num_threads(1)
    limits = dict(pair.split("=") for pair in os.environ["LIMITS"].split(","))
    settings = EngineSection(**{f"{name}_timeout_seconds": float(value) for name, value in limits.items()})
    world = World.from_environment()
    try:
        with process_group(world, settings) as (_, watchdog):
            for step in itertools.count(1):
                order, _, seconds = told().partition(" for ")
                watchdog.at(step, "waiting for data")
                if order == "hang":
                    hang()
                elif order == "fail":
                    raise RunError(f"the disk of rank {world.rank} is full")
                elif order == "store":
                    with ThreadPoolExecutor() as pool:
                        pool.submit(own_store("first").set, "key", "value").result()
                        assert own_store("first").get("key") == b"value"
                        assert not own_store("second").check(["key"])
                elif order == "pause":
                    time.sleep(float(seconds))
                watchdog.at(step, "adding")
                if order == "hang unseen":
                    hang()
                torch.distributed.all_reduce(torch.ones(1))
                watchdog.at(step, "resting", alone=True)
                # Two cores are enough for three ranks that do nothing.
                time.sleep(float(seconds) if order == "work alone" else 0.01)
                torch.distributed.all_reduce(torch.ones(1))
                if order or step == 3:
                    print(order or "step 3", flush=True)
    except (CelError, RunError) as error:
        if _is_said_here(error):
            print(f"error: {error}", file=sys.stderr)
        return exit_code(error)
    return 0


def told() -> str:
    """What stands on stdin by now."""
    return sys.stdin.readline().strip() if select.select([sys.stdin], [], [], 0)[0] else ""


def hang() -> None:
    while True:
        time.sleep(1000)
