"""A finished folder of shards, on this machine or in a store, opened for reading."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np

from cel_dist.data.audio import SAMPLE_RATE
from cel_dist.data.cache import ShardCache, writing_cache
from cel_dist.data.files import atomic_write, sha256_of
from cel_dist.data.index import INDEX_NAME, Index
from cel_dist.data.remote import RemoteError, RemoteFolder, is_remote
from cel_dist.data.shard_files import CachedShards, LocalShards, ShardFiles, size_fault
from cel_dist.data.shards import MANIFEST_NAME, Manifest
from cel_dist.errors import CelError

# End-of-archive mark, padding to a record, and JSON members behind the last audio.
_END_BYTES = 1 << 15
# Not Path.home(), which raises for a user without a home; such are found in containers.
DEFAULT_CACHE = Path(os.path.expanduser("~/.cache/cel_dist"))


@dataclass(frozen=True)
class Access:
    """How shards are read.

    Attributes:
        verify: compare the sha256 of a local shard with the manifest's before the first read of it. Downloaded ones
            always are.
        cache: folder on a disk of this machine for what is remote or compressed.
        cache_bytes: most that the cache may hold.
        patience: seconds without any progress after which a download is given up.
    """

    verify: bool = False
    cache: Path = DEFAULT_CACHE
    cache_bytes: int = 50 << 30
    patience: float = 300.0


@dataclass(frozen=True)
class ShardFolder:
    """A finished folder of shards whose files, manifest and index agree in number and size.

    Attributes:
        location: folder or URL.
        manifest: what it must hold.
        index: where each sample lies.
        files: opens the shards.
    """

    location: str
    manifest: Manifest
    index: Index
    files: ShardFiles

    @classmethod
    def open(cls, location: str | Path, access: Access | None = None) -> "ShardFolder":
        """Open what `cel prepare` wrote after a check that reads no audio: one `stat` a shard if it lies here.

        Args:
            location: a folder, or the URL of one: `http://`, `https://`, `s3://` or `file://`.
            access: how the shards are to be read.

        Raises:
            CelError: the manifest or the index is missing or foreign, they contradict each other, or a shard is missing
                or has another size. The message names the shard, both numbers and the remedy.
        """
        access = access or Access()
        if is_remote(str(location)):
            return cls._open_remote(str(location), access)
        folder = Path(location)
        if not folder.is_dir():
            place = f"{folder}" if folder.is_absolute() else f"{folder} (in {Path.cwd()})"
            raise CelError(f"there is no folder of shards at {place}; write one with 'cel prepare SRC --out {folder}'")
        manifest = Manifest.load(folder)
        index = Index.load(folder)
        for problem in [*index_disagreements(str(folder), manifest, index), *_size_faults(folder, manifest)]:
            raise CelError(f"{problem}; run 'cel check {folder}' for every fault, or 'cel prepare' again")
        files: ShardFiles = LocalShards(folder, manifest.shards, access.verify)
        if any(record.is_compressed for record in manifest.shards):
            files = _cached(RemoteFolder(f"file://{folder.absolute()}", access.patience), manifest, index, access)
        return cls(str(folder), manifest, index, files)

    @classmethod
    def _open_remote(cls, url: str, access: Access) -> "ShardFolder":
        if url.startswith("http") and set(url) & set("?#"):
            raise CelError(f"the address {url} has a query or a fragment; give the address of the folder alone")
        path = f"file://{unquote(urlsplit(url).path)}" if url.startswith("file:") else url
        remote = RemoteFolder(path, access.patience)
        try:
            manifest = Manifest.parse(remote.read(MANIFEST_NAME), f"{remote.url}/{MANIFEST_NAME}")
            index = Index.load(_downloaded_index(remote, manifest, access))
        except RemoteError as error:
            raise CelError(
                f"cannot open the shards at {url}: {error}; check the address, the network and your rights to read it"
            ) from None
        for problem in index_disagreements(url, manifest, index):
            raise CelError(f"{problem}; upload the folder that 'cel prepare' wrote again, whole")
        return cls(url, manifest, index, _cached(remote, manifest, index, access))


def index_disagreements(location: str, manifest: Manifest, index: Index) -> Iterator[str]:
    """What manifest and index contradict each other or themselves in, one line each; looks at no shard."""
    if manifest.sample_rate != SAMPLE_RATE:
        yield f"the manifest of {location} says {manifest.sample_rate} Hz, this version reads {SAMPLE_RATE} Hz"
    stated = sum(record.samples for record in manifest.shards)
    if stated != manifest.samples:
        yield f"the manifest of {location} says {manifest.samples} samples, its shards add up to {stated}"
    if len(index) != manifest.samples:
        yield f"the index of {location} holds {len(index)} samples, the manifest says {manifest.samples}"
        return
    last = len(manifest.shards) - 1
    if len(index) and (index.shard.min() < 0 or index.shard.max() > last or (np.diff(index.shard) < 0).any()):
        yield f"the index of {location} is not in the order of the manifest's {last + 1} shards"
        return
    counts = np.bincount(index.shard, minlength=last + 1)
    ends = index.shard_ends(last + 1)
    for number, record in enumerate(manifest.shards):
        if counts[number] != record.samples:
            yield f"shard {record.name}: {counts[number]} samples in the index, {record.samples} in the manifest"
        if ends[number] > record.bytes and not record.is_compressed:
            yield f"shard {record.name}: the index reaches byte {ends[number]}, the manifest says {record.bytes}"


def _size_faults(folder: Path, manifest: Manifest) -> Iterator[str]:
    for record in manifest.shards:
        try:
            fault = size_fault((folder / record.name).stat().st_size, record)
        except OSError as error:
            fault = str(error.strerror).lower()
        if fault is not None:
            yield f"shard {record.name} in {folder} {fault}"


def _cached(remote: RemoteFolder, manifest: Manifest, index: Index, access: Access) -> CachedShards:
    ends = index.shard_ends(len(manifest.shards))
    # Of a compressed shard only the index tells how long it is when unpacked; behind the last audio comes little.
    sizes = [
        int(end) + _END_BYTES if record.is_compressed else record.bytes
        for record, end in zip(manifest.shards, ends, strict=True)
    ]
    return CachedShards(remote, manifest.shards, sizes, ShardCache(access.cache, access.cache_bytes))


def _downloaded_index(remote: RemoteFolder, manifest: Manifest, access: Access) -> Path:
    """A local folder with the index that the manifest of a remote one names, downloaded unless it is there."""
    if manifest.index_sha256 is None:
        raise CelError(
            f"the manifest of {remote.url} does not state the sha256 of its index, which a remote folder needs; run "
            "'cel check --index' on the folder and upload manifest.json and index.npz again"
        )
    folder = access.cache / "indices" / manifest.index_sha256
    path = folder / INDEX_NAME
    if path.exists() and sha256_of(path) == manifest.index_sha256:
        return folder
    with writing_cache(access.cache), ShardCache(access.cache, access.cache_bytes).sole_downloader():
        # Another process may have brought it while this one waited.
        if not (path.exists() and sha256_of(path) == manifest.index_sha256):
            _download_index(remote, manifest, path)
    return folder


def _download_index(remote: RemoteFolder, manifest: Manifest, path: Path) -> None:
    content = remote.read(INDEX_NAME)
    if hashlib.sha256(content).hexdigest() != manifest.index_sha256:
        raise CelError(
            f"{remote.url}/{INDEX_NAME} is not the index that the manifest beside it names; upload both again"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(content)
