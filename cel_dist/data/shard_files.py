"""Shards opened for reading, wherever they lie."""

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from cel_dist.data.cache import ShardCache
from cel_dist.data.files import sha256_of
from cel_dist.data.remote import RemoteError, RemoteFolder
from cel_dist.data.shards import ShardRecord
from cel_dist.errors import CelError, RunError


class ShardUnavailableError(Exception):
    """A shard of which nothing can be read; the message says why, not which shard."""


class ShardFiles(Protocol):
    """The shards of a folder, by their position in the manifest."""

    max_open: int
    """Shards that a reader may keep open at the same time."""

    def open(self, shard: int) -> int:
        """A descriptor of a plain tar of the size in the manifest.

        Raises:
            ShardUnavailableError: there is no such shard, or it is not whole.
            RunError: nothing can be read until something is put right on this machine.
        """

    def expect(self, shards: Sequence[int]) -> None:
        """Make ready, in this order, shards that are going to be opened; returns at once."""

    def part(self, shard: int) -> "ShardFiles":
        """The files of this shard alone, at place 0: little to hand to another process."""

    def require_room(self, num_shards: int, remedy: str) -> None:
        """Raise CelError, which ends with the remedy, if so many shards cannot be open at the same time."""


class LocalShards:
    """Plain tars in a folder.

    Args:
        folder: of the shards.
        records: of the manifest.
        verify: compare a shard's sha256 before the first read.
    """

    # Far below the usual limit of 1024 files a process.
    max_open = 64

    def __init__(self, folder: Path, records: Sequence[ShardRecord], verify: bool) -> None:
        self._folder, self._records, self._verify = folder, records, verify
        self._verdicts: dict[int, str | None] = {}

    def open(self, shard: int) -> int:
        """See `ShardFiles.open`."""
        record = self._records[shard]
        path = self._folder / record.name
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ShardUnavailableError(str(error.strerror).lower()) from None
        fault = size_fault(os.fstat(descriptor).st_size, record)
        if fault is None and self._verify:
            if shard not in self._verdicts:
                same = sha256_of(path) == record.sha256
                self._verdicts[shard] = None if same else "its sha256 is not the one in the manifest"
            fault = self._verdicts[shard]
        if fault is not None:
            os.close(descriptor)
            raise ShardUnavailableError(fault)
        return descriptor

    def expect(self, shards: Sequence[int]) -> None:
        """Nothing: they are here."""

    def part(self, shard: int) -> ShardFiles:
        """See `ShardFiles.part`."""
        return LocalShards(self._folder, [self._records[shard]], self._verify)

    def require_room(self, num_shards: int, remedy: str) -> None:
        """Nothing: they have it."""


class CachedShards:
    """Remote or compressed shards, read through the cache of this machine.

    Args:
        remote: where they come from.
        records: of the manifest.
        sizes: bytes of each shard as a plain tar.
        cache: where they go.
    """

    # None can be removed from the cache while it is open.
    max_open = 1

    def __init__(
        self, remote: RemoteFolder, records: Sequence[ShardRecord], sizes: Sequence[int], cache: ShardCache
    ) -> None:
        self._remote, self._records, self._sizes, self._cache = remote, records, sizes, cache
        self._begin()

    def _begin(self) -> None:
        self._failed: dict[int, str] = {}
        self._expected: list[int] = []
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None

    def open(self, shard: int) -> int:
        """See `ShardFiles.open`; downloads the shard if it is not in the cache."""
        record = self._records[shard]
        while shard not in self._failed:
            descriptor = self._cache.open(record)
            if descriptor is not None:
                return descriptor
            self._fetch(shard)
        raise ShardUnavailableError(self._failed[shard])

    def expect(self, shards: Sequence[int]) -> None:
        """See `ShardFiles.expect`; what was expected before and is not in the list any more is forgotten."""
        with self._wake:
            self._expected = list(shards)
            if self._thread is None:
                self._thread = threading.Thread(target=self._fetch_expected, daemon=True)
                self._thread.start()
            self._wake.notify()

    def part(self, shard: int) -> ShardFiles:
        """See `ShardFiles.part`."""
        return CachedShards(self._remote, [self._records[shard]], [self._sizes[shard]], self._cache)

    def require_room(self, num_shards: int, remedy: str) -> None:
        """See `ShardFiles.require_room`."""
        largest = sorted(self._sizes, reverse=True)[:num_shards]
        limit = self._cache.limit_bytes
        if sum(largest) > limit:
            raise CelError(
                f"data.cache_gib={limit / 2**30:.3g} has no room for the {len(largest)} shards that are in use at the "
                f"same time ({sum(largest) / 2**30:.3g} GiB); {remedy}"
            )

    def _fetch_expected(self) -> None:
        while True:
            with self._wake:
                while not self._expected:
                    self._wake.wait()
                shard = self._expected.pop(0)
            if shard not in self._failed:
                # Whoever opens the shard will hear of what is wrong.
                with suppress(RunError):
                    self._fetch(shard)

    def _fetch(self, shard: int) -> None:
        try:
            self._cache.fetch(self._records[shard], self._sizes[shard], self._remote)
        except RemoteError as error:
            # Once is enough: each of its samples would wait as long again.
            self._failed[shard] = str(error)

    def __getstate__(self) -> dict[str, Any]:
        # A thread and its lock belong to one process.
        kept = ("_remote", "_records", "_sizes", "_cache")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()


def size_fault(size: int, record: ShardRecord) -> str | None:
    """What is wrong with the size of a shard's file, or None."""
    return None if size == record.bytes else f"has {size} bytes, the manifest says {record.bytes}"
