"""Shards in a store: HTTP by nginx, S3 by a server process, each over the loopback, and connections that break."""

import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import fsspec
import pytest
import torch
import webdataset
from stores import nginx, plain_server, proxy, s3

from cel_dist.data import remote as remote_module
from cel_dist.data.cache import ShardCache
from cel_dist.data.check import check
from cel_dist.data.folder import Access, ShardFolder
from cel_dist.data.plan import Plan
from cel_dist.data.prepare import prepare
from cel_dist.data.reindex import rebuild_index
from cel_dist.data.remote import RemoteError, RemoteFolder
from cel_dist.data.stream import SegmentStream
from cel_dist.distributed import World
from cel_dist.errors import CelError, RunError

BATCH = 8


@pytest.fixture(scope="module")
def shards(small_corpus, tmp_path_factory):
    """Eight shards of five utterances."""
    folder = tmp_path_factory.mktemp("remote") / "shards"
    prepare(small_corpus.audio, folder, samples_per_shard=5, workers=1)
    return folder


@pytest.fixture(scope="module")
def web(shards, tmp_path_factory):
    with nginx(shards, tmp_path_factory.mktemp("nginx") / "own") as server:
        yield server


def stream(location, cache, *, rank=0, size=1, workers=0, window=2, patience=20.0, cache_bytes=1 << 30, rate=0.0):
    folder = ShardFolder.open(location, Access(cache=cache, cache_bytes=cache_bytes, patience=patience))
    plan = Plan(folder.index, segment_samples=9_600, batch_size=BATCH, short="drop", seed=1, window=window)
    rows = World(rank, size).rows(BATCH)
    return SegmentStream(folder, plan, rows, workers, max_fault_rate=rate)


def take(source, count):
    return [next(source) for _ in range(count)]


def same(batches, others):
    pairs = zip(batches, others, strict=True)
    return all(torch.equal(one.segments, other.segments) and torch.equal(one.ids, other.ids) for one, other in pairs)


def copied(shards, tmp_path):
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def cached(cache):
    return sorted(cache.glob("*.tar"))


def test_over_http_the_batches_are_those_of_the_local_shards(shards, web, tmp_path):
    source = stream(web.url, tmp_path / "cache")
    assert same(take(stream(shards, tmp_path), 12), take(source, 12))
    assert len(cached(tmp_path / "cache")) == 8


def test_a_machine_downloads_a_shard_once(shards, web, tmp_path):
    web.access_log.write_text("")
    sources = [stream(web.url, tmp_path / "cache", rank=rank, size=2, workers=2) for rank in range(2)]
    for expected in take(stream(shards, tmp_path), 12):
        parts = [next(source) for source in sources]
        assert torch.equal(torch.cat([part.segments for part in parts]), expected.segments)
    for source in sources:
        source.close()
    names = sorted(name for name, _ in web.downloads() if name.endswith(".tar"))
    assert names == [f"train-{number:06d}.tar" for number in range(8)]


def test_over_s3_the_batches_are_those_of_the_local_shards(shards, tmp_path, monkeypatch):
    with s3(tmp_path / "s3", monkeypatch) as url:
        store = fsspec.filesystem("s3", skip_instance_cache=True)
        store.mkdir("speech")
        store.put(f"{shards}/", f"{url}/v1/", recursive=True)
        assert same(take(stream(shards, tmp_path), 6), take(stream(f"{url}/v1", tmp_path / "cache"), 6))
        with pytest.raises(CelError, match=r"s3://speech/v2/manifest\.json is not there"):
            stream(f"{url}/v2", tmp_path / "cache")


def test_a_server_without_ranges_will_do(shards, tmp_path):
    with plain_server(shards, tmp_path / "server") as url:
        assert same(take(stream(shards, tmp_path), 6), take(stream(url, tmp_path / "cache"), 6))


@pytest.mark.parametrize("scheme", ["file://", "file:"])
def test_file_urls_and_restarted_processes_use_what_is_in_the_cache(shards, tmp_path, scheme):
    folder = Path(shutil.copytree(shards, tmp_path / "a copy, 100 %"))
    url = folder.as_uri().replace("file://", scheme)
    expected = take(stream(url, tmp_path / "cache"), 6)
    again = stream(url, tmp_path / "cache")
    for tar in folder.glob("*.tar"):
        tar.unlink()
    assert same(expected, take(again, 6))


def test_a_cut_connection_goes_on_where_it_was_cut(shards, web, tmp_path, monkeypatch):
    # Chunks smaller than the test's shards, one after the other.
    monkeypatch.setattr(remote_module, "_CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(remote_module, "_CONCURRENT", 1)
    web.access_log.write_text("")
    with proxy(web.port) as broken:
        source = stream(broken.url, tmp_path / "cache")
        broken.cut_after, broken.faults = 400_000, 4
        assert same(take(stream(shards, tmp_path), 6), take(source, 6))
        assert broken.broken == 4
    fetched = [download for download in web.downloads() if download[0].endswith(".tar")]
    # Only the chunk that was on its way at a cut comes twice.
    assert len(fetched) - len(set(fetched)) <= 4


def test_a_server_that_falls_silent_is_asked_again(shards, web, tmp_path):
    with proxy(web.port) as silent:
        source = stream(silent.url, tmp_path / "cache", patience=2.0)
        silent.stall_after, silent.faults = 100_000, 1
        begin = time.monotonic()
        assert same(take(stream(shards, tmp_path), 6), take(source, 6))
        assert silent.broken == 1
        assert time.monotonic() - begin < 30


def test_a_server_that_stays_silent_is_given_up_with_one_line(shards, web, tmp_path):
    with proxy(web.port) as silent:
        source = stream(silent.url, tmp_path / "cache", patience=2.0)
        silent.stall_after, silent.faults = 100_000, 1_000_000
        with pytest.raises(RunError, match=r"train-0.*tar did not come .*given up after 2 s") as failure:
            next(source)
    assert "\n" not in str(failure.value)


def test_a_server_that_refuses_is_not_asked_again(shards, tmp_path):
    with nginx(
        shards, tmp_path / "nginx", "location ~ 000003 { return 403; } location /closed { return 401; }"
    ) as server:
        source = stream(server.url, tmp_path / "cache", patience=60.0, rate=1.0)
        begin = time.monotonic()
        faults = [fault for batch in take(source, 5) for fault in batch.faults]
        assert {fault.shard for fault in faults} == {"train-000003.tar"}
        assert all("may not be read (HTTP status 403)" in fault.reason for fault in faults)
        with pytest.raises(CelError, match=r"manifest.json may not be read \(HTTP status 401\)"):
            stream(f"{server.url}/closed", tmp_path / "cache", patience=60.0)
        assert time.monotonic() - begin < 30
    with pytest.raises(CelError, match="has a query or a fragment"):
        stream(f"{server.url}/?token=1", tmp_path / "cache")


def test_processes_that_wait_for_a_download_fail_with_it(shards, web, tmp_path):
    record = ShardFolder.open(shards).manifest.shards[0]
    cache = ShardCache(tmp_path / "cache", 1 << 30)
    with proxy(web.port, stall_after=0, faults=1_000_000) as silent:
        remote = RemoteFolder(silent.url, 3.0)
        outcomes = []

        def fetch():
            with pytest.raises(RemoteError) as failure:
                cache.fetch(record, record.bytes, remote)
            outcomes.append(str(failure.value))

        waiting = [threading.Thread(target=fetch) for _ in range(4)]
        begin = time.monotonic()
        for thread in waiting:
            thread.start()
        for thread in waiting:
            thread.join()
        # One after the other they would have taken three seconds each.
        assert time.monotonic() - begin < 9
    assert len(set(outcomes)) == 1
    cache.fetch(record, record.bytes, RemoteFolder(web.url, 3.0))
    assert sorted(path.suffix for path in cache.folder.iterdir()) == ["", ".tar"]


def test_a_cache_that_cannot_be_written_is_read_all_the_same(shards, web, tmp_path):
    cache = tmp_path / "cache"
    expected = take(stream(web.url, cache), 6)
    if subprocess.run(["mount", "--bind", cache, cache], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", cache], check=True)
        assert same(expected, take(stream(web.url, cache), 6))
    finally:
        subprocess.run(["umount", "--lazy", cache], check=True)


def test_a_server_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(CelError, match=r"cannot open the shards at http://127.0.0.1:9/x.*check the address"):
        stream("http://127.0.0.1:9/x", tmp_path, patience=0.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tar: tar.unlink(), "is not there"),
        (lambda tar: tar.write_bytes(tar.read_bytes()[:-1] + b"x"), "its sha256 is not the one in the manifest"),
        (lambda tar: os.truncate(tar, tar.stat().st_size - 1024), "bytes, the manifest says"),
    ],
    ids=["404", "checksum", "size"],
)
def test_a_bad_remote_shard_is_survived_or_refused_as_configured(shards, tmp_path, change, words):
    folder = copied(shards, tmp_path)
    bad = folder / "train-000003.tar"
    change(bad)
    with nginx(folder, tmp_path / "nginx") as server:
        tolerant = take(stream(server.url, tmp_path / "cache", rate=1.0), 5)
        faults = [fault for batch in tolerant for fault in batch.faults]
        assert {(fault.shard, words in fault.reason) for fault in faults} == {(bad.name, True)}
        assert len(faults) == 5
        with pytest.raises(RunError, match=rf"{bad.name}.*{words}"):
            take(stream(server.url, tmp_path / "other"), 5)
    assert len(cached(tmp_path / "cache")) == 7


def test_a_manifest_and_an_index_that_do_not_belong_together_are_refused(shards, tmp_path):
    folder = copied(shards, tmp_path)
    index = folder / "index.npz"
    index.write_bytes(index.read_bytes() + b"x")
    with pytest.raises(CelError, match="is not the index that the manifest beside it names"):
        stream(folder.as_uri(), tmp_path / "cache")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["index_sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CelError, match="cel check --index"):
        stream(folder.as_uri(), tmp_path / "cache")


def test_the_cache_keeps_its_limit_and_the_epoch_its_order(shards, web, tmp_path):
    largest = max(tar.stat().st_size for tar in shards.glob("*.tar"))
    cache, limit = tmp_path / "cache", 6 * largest
    # A batch of 8 lies in up to three windows of one shard of five; one more is fetched ahead.
    source = stream(web.url, cache, cache_bytes=limit, window=1)
    for expected in take(stream(shards, tmp_path, window=1), 15):
        assert torch.equal(next(source).segments, expected.segments)
        held = [path for path in cache.iterdir() if path.suffix in (".tar", ".part")]
        assert sum(path.stat().st_size for path in held if path.exists()) <= limit
    assert len(cached(cache)) < 8


def test_a_cache_too_small_for_a_batch_is_refused_before_anything_is_read(web, tmp_path):
    with pytest.raises(CelError, match=r"data.cache_gib=0.00\d+ has no room for the 4 shards.*data.window_shards"):
        stream(web.url, tmp_path / "cache", cache_bytes=1 << 20, window=1)


def test_a_shard_in_use_is_not_removed_to_make_room(shards, web, tmp_path):
    records = ShardFolder.open(shards).manifest.shards
    remote = RemoteFolder(web.url, 1.0)
    cache = ShardCache(tmp_path / "cache", 2 * max(record.bytes for record in records))
    for record in records[:2]:
        cache.fetch(record, record.bytes, remote)
    first, second = cache.open(records[0]), cache.open(records[1])
    with pytest.raises(RunError, match="full of shards in use"):
        cache.fetch(records[2], records[2].bytes, remote)
    os.close(first)
    cache.fetch(records[2], records[2].bytes, remote)
    assert cache.open(records[0]) is None
    assert cache.open(records[2]) is not None
    os.close(second)


@pytest.mark.parametrize("num_shards", [3, 0])
def test_a_full_cache_disk_makes_room_or_says_so(shards, web, mount_disk, tmp_path, num_shards):
    largest = max(tar.stat().st_size for tar in shards.glob("*.tar"))
    source = stream(web.url, mount_disk((num_shards * largest >> 10) + 512) / "cache", window=1)
    if num_shards:
        expected = take(stream(shards, tmp_path, window=1), 10)
        assert all(torch.equal(next(source).segments, batch.segments) for batch in expected)
    else:
        with pytest.raises(RunError, match=r"cannot write the cache .*no space left on device.*data.cache_dir"):
            next(source)
    source.close()


def test_a_killed_download_is_continued_by_the_next_process(shards, tmp_path):
    record = max(ShardFolder.open(shards).manifest.shards, key=lambda shard: shard.bytes)
    program = (
        "import sys; from pathlib import Path; from cel_dist.data import remote; remote._CHUNK_BYTES = 1 << 17;"
        "remote._CONCURRENT = 1; from cel_dist.data.cache import ShardCache;"
        "from cel_dist.data.shards import ShardRecord;"
        "record = ShardRecord.model_validate_json(sys.argv[1]);"
        "ShardCache(Path(sys.argv[2]), 1 << 30).fetch(record, record.bytes, remote.RemoteFolder(sys.argv[3], 20))"
    )
    cache = tmp_path / "cache"
    with nginx(shards, tmp_path / "nginx", "limit_rate 100k;") as slow:
        command = [sys.executable, "-c", program, record.model_dump_json(), str(cache), slow.url]
        process = subprocess.Popen(command)
        part = cache / f"{record.sha256}.part"
        while not part.exists() or part.stat().st_size < 2 << 17:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        held = part.stat().st_size
        assert cached(cache) == []
        subprocess.run(command, check=True)
        starts = [first for name, first in slow.downloads() if name == record.name]
    assert cached(cache)[0].stat().st_size == record.bytes
    assert starts.count(0) == 1
    assert held in starts


@pytest.mark.parametrize("suffix", ["gz", "xz", "bz2"])
def test_compressed_shards_are_indexed_and_read(shards, tmp_path, suffix):
    folder = tmp_path / "packed, 100 %"
    folder.mkdir()
    for tar in shards.glob("*.tar"):
        program = {"gz": "gzip", "xz": "xz", "bz2": "bzip2"}[suffix]
        with (folder / f"{tar.name}.{suffix}").open("wb") as packed:
            subprocess.run([program, "-1", "-c", tar], stdout=packed, check=True)
    rebuild_index(folder, workers=1)
    assert check(folder, workers=1) == []
    assert same(take(stream(shards, tmp_path), 6), take(stream(folder, tmp_path / "cache"), 6))
    # One of five utterances beside its packed form.
    limit = 7 * max(tar.stat().st_size for tar in shards.glob("*.tar"))
    source = stream(folder, tmp_path / "small", cache_bytes=limit, window=1)
    for expected in take(stream(shards, tmp_path, window=1), 10):
        assert torch.equal(next(source).segments, expected.segments)
        assert sum(path.stat().st_size for path in (tmp_path / "small").glob("*.tar")) <= limit


def test_a_compressed_shard_that_is_cut_is_named(shards, tmp_path):
    folder = tmp_path / "packed"
    folder.mkdir()
    for tar in shards.glob("*.tar"):
        (folder / f"{tar.name}.gz").write_bytes(gzip.compress(tar.read_bytes(), 1))
    cut = folder / "train-000002.tar.gz"
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CelError, match=r"train-000002.tar.gz: cannot be unpacked"):
        rebuild_index(folder, workers=1)
    cut.write_bytes(whole)
    rebuild_index(folder, workers=1)
    cut.write_bytes(whole[: len(whole) // 2])
    (fault,) = [fault for fault in check(folder, workers=1) if "cannot be unpacked" in fault.reason]
    assert fault.shard == cut.name


@pytest.mark.parametrize("writer", ["webdataset", "pax", "gnu"])
def test_tars_of_other_writers_are_indexed_and_read(shards, tmp_path, writer):
    folder = tmp_path / "others"
    folder.mkdir()
    for tar in shards.glob("*.tar"):
        with tarfile.open(tar) as source:
            files = {member.name: source.extractfile(member).read() for member in source}
        # Longer than a plain header holds, where a writer can say it.
        keys = {name: name if writer == "webdataset" else f"{'k' * 120}{name}" for name in files}
        if writer == "webdataset":
            with webdataset.TarWriter(str(folder / tar.name)) as sink:
                for key in sorted({name.partition(".")[0] for name in files}):
                    sink.write({"__key__": key, "json": files[f"{key}.json"], "wav": files[f"{key}.wav"]})
        else:
            form = tarfile.PAX_FORMAT if writer == "pax" else tarfile.GNU_FORMAT
            with tarfile.open(folder / tar.name, "w", format=form) as sink:
                for name, data in files.items():
                    member = tarfile.TarInfo(keys[name])
                    member.size, member.mtime = len(data), 1.5
                    sink.addfile(member, io.BytesIO(data))
    rebuild_index(folder, workers=1)
    assert check(folder, workers=1) == []
    assert same(take(stream(shards, tmp_path), 6), take(stream(folder, tmp_path / "cache"), 6))


def test_an_index_is_rebuilt_from_the_tars_and_only_from_those_of_the_manifest(shards, tmp_path):
    folder = copied(shards, tmp_path)
    before = (folder / "index.npz").read_bytes()
    (folder / "index.npz").write_bytes(b"damaged")
    with pytest.raises(CelError, match="cannot read the index"):
        ShardFolder.open(folder)
    manifest = rebuild_index(folder, workers=2)
    assert (folder / "index.npz").read_bytes() == before
    assert manifest == ShardFolder.open(shards).manifest
    tar = folder / "train-000000.tar"
    tar.write_bytes(tar.read_bytes() + bytes(1024))
    with pytest.raises(CelError, match=r"train-000000.tar is not the one that the manifest names"):
        rebuild_index(folder, workers=1)
