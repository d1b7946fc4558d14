"""Preparing into a folder again: finished, damaged, replaced, killed, or out of space."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
from prepare_corpus import NAMES, STOP_AFTER_FIRST_SHARD, contents, paths, table, voice, write_corpus

from cel_dist.data.check import check_shards
from cel_dist.data.folder import ShardFolder
from cel_dist.data.prepare import prepare
from cel_dist.errors import CelError, RunError


def test_a_finished_job_is_not_done_again_and_another_one_is_refused(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = prepare(corpus, out, workers=1)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare(corpus, out, workers=1) == result
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before | {
        out / ".lock": (out / ".lock").stat().st_mtime_ns
    }
    with pytest.raises(CelError, match=r"another preparation \(seed 0, not 1\)"):
        prepare(corpus, out, seed=1, workers=1)
    with pytest.raises(CelError, match="audio_format wav, not flac"):
        prepare(corpus, out, audio_format="flac", workers=1)
    (tmp_path / "list").write_text("s1/004.flac\n")
    with pytest.raises(CelError, match="other files"):
        prepare(corpus, out, list_file=tmp_path / "list", workers=1)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "x.tar").write_bytes(b"")
    with pytest.raises(CelError, match=r"x\.tar"):
        prepare(corpus, tmp_path / "foreign", workers=1)


def test_a_lost_or_cut_shard_is_written_again_and_no_other(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(corpus, out, samples_per_shard=5, workers=1)
    whole = contents(out)
    kept = (out / "train-000003.tar").stat().st_ino
    (out / "train-000000.tar").unlink()
    os.truncate(out / "train-000002.tar", 1000)
    (out / ".train-000001.tar.1.tmp").write_bytes(b"half")
    steps: list[tuple[int, int]] = []
    prepare(corpus, out, samples_per_shard=5, workers=1, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(10, 20), (15, 20), (20, 20)]
    assert contents(out) == whole
    assert (out / "train-000003.tar").stat().st_ino == kept


def test_replaced_files_are_looked_at_again_and_nothing_else(tmp_path: Path) -> None:
    source, out = write_corpus(tmp_path / "corpus", NAMES[:8]), tmp_path / "out"
    good = {name: (source / name).read_bytes() for name in NAMES[:2]}
    (source / NAMES[0]).write_text("words")
    assert prepare(source, out, samples_per_shard=1, workers=1).rejected == 1
    before = {path.name: path.stat().st_ino for path in out.glob("*.tar")}
    (source / NAMES[0]).write_bytes(good[NAMES[0]])
    (source / NAMES[1]).write_text("words, no longer audio")
    result = prepare(source, out, samples_per_shard=1, workers=1)
    assert table(result) == {NAMES[1]: "unreadable"}
    assert sorted(paths(out)) == sorted({*NAMES[:8]} - {NAMES[1]})
    after = {path.name: path.stat().st_ino for path in out.glob("*.tar")}
    assert len(before.items() & after.items()) == 6
    assert check_shards(out, workers=1) == []
    (source / NAMES[1]).write_bytes(good[NAMES[1]])
    prepare(source, out, samples_per_shard=1, workers=1)
    prepare(source, tmp_path / "straight", samples_per_shard=1, workers=1)
    assert contents(out) == contents(tmp_path / "straight")


def test_a_run_that_was_cut_short_while_it_replaced_a_shard_is_not_complete(corpus: Path, tmp_path: Path) -> None:
    source, out = write_corpus(tmp_path / "corpus", NAMES[:4]), tmp_path / "out"
    prepare(source, out, samples_per_shard=2, workers=1)
    soundfile.write(source / NAMES[3], voice(99, 1.6), 16_000)

    def stop(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, out, samples_per_shard=2, workers=1, progress=stop)
    with pytest.raises(CelError, match="if it was interrupted"):
        ShardFolder.open(out)
    prepare(source, out, samples_per_shard=2, workers=1)
    assert check_shards(out, workers=1) == []


def test_a_killed_run_leaves_nothing_that_passes_and_is_continued(corpus: Path, labels: Path, tmp_path: Path) -> None:
    script, out = tmp_path / "killed.py", tmp_path / "out"
    script.write_text(STOP_AFTER_FIRST_SHARD)
    command = [sys.executable, str(script), str(corpus), str(out), str(labels), '{"workers": 2}']
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        # The parent stands still after its first shard, its workers go on, and none of them outlives it.
        assert process.stdout.readline() == b"shard\n"
        with pytest.raises(RunError, match="another 'cel prepare' is writing"):
            prepare(corpus, out, labels=labels, samples_per_shard=2, workers=1)
        process.send_signal(signal.SIGKILL)
        # The workers hold the other end of the pipe: it ends when the last of them has.
        assert process.stdout.read() == b""
    with pytest.raises(CelError, match="if it was interrupted"):
        ShardFolder.open(out)
    assert [fault.shard for fault in check_shards(out) if not fault.shard.endswith(".tmp")] == ["manifest.json"]
    there = {path.name: path.stat().st_ino for path in out.glob("*.tar")}
    assert 0 < len(there) < 10
    recorded = {path.name.removesuffix(".json") for path in (out / ".prepare").glob("*.tar.json")}
    prepare(corpus, out, labels=labels, samples_per_shard=2, workers=1)
    assert all((out / name).stat().st_ino == there[name] for name in recorded)
    prepare(corpus, tmp_path / "straight", labels=labels, samples_per_shard=2, workers=1)
    assert contents(out) == contents(tmp_path / "straight")


def test_a_killed_worker_is_one_error_and_the_run_is_continued(corpus: Path, tmp_path: Path) -> None:
    def kill_a_worker(done: int, total: int) -> None:
        if done:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    with pytest.raises(RunError, match="a worker process was killed"):
        prepare(corpus, tmp_path / "out", samples_per_shard=1, workers=2, progress=kill_a_worker)
    assert prepare(corpus, tmp_path / "out", samples_per_shard=1, workers=1).samples == 20
    assert check_shards(tmp_path / "out", workers=1) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_leaves_no_half_shard_and_is_continued(
    corpus: Path, mount_disk: Callable[[int], Path], workers: int
) -> None:
    disk = mount_disk(600)
    out = disk / "out"
    with pytest.raises(RunError, match=r"cannot write .*disk/out: no space left on device.*run the same command again"):
        prepare(corpus, out, samples_per_shard=4, workers=workers)
    assert not (out / "manifest.json").exists()
    assert list(out.glob(".*.tmp")) == []
    recorded = {path.name.removesuffix(".json") for path in (out / ".prepare").glob("*.tar.json")}
    assert recorded == {path.name for path in out.glob("*.tar")} != set()
    subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
    assert prepare(corpus, out, samples_per_shard=4, workers=1).samples == 20
    assert check_shards(out, workers=1) == []


def test_a_shard_whose_record_cannot_be_written_does_not_stay(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # Where the record of the first shard is to be.
    blocked = out / ".prepare" / "train-000000.tar.json"
    (blocked / "full").mkdir(parents=True)
    with pytest.raises(RunError, match="cannot write"):
        prepare(corpus, out, samples_per_shard=4, workers=1)
    assert list(out.glob("*.tar")) == []
    (blocked / "full").rmdir()
    blocked.rmdir()
    assert prepare(corpus, out, samples_per_shard=4, workers=1).samples == 20


def test_a_limit_on_file_size_is_reported_like_a_full_disk(corpus: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        with pytest.raises(RunError, match=r"cannot write .*out: file too large"):
            prepare(corpus, tmp_path / "out", samples_per_shard=5, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "out").glob("*.t*")) == []
    assert prepare(corpus, tmp_path / "out", samples_per_shard=5, workers=1).samples == 20


def test_if_all_files_are_rejected_the_table_is_named_and_a_rerun_looks_again(tmp_path: Path) -> None:
    source = tmp_path / "corpus"
    source.mkdir()
    (source / "a.wav").write_text("words")
    with pytest.raises(CelError, match=r"all 1 audio files were rejected.*rejects\.tsv"):
        prepare(source, tmp_path / "out", workers=1)
    assert "a.wav\tunreadable" in (tmp_path / "out" / "rejects.tsv").read_text()
    write_corpus(source, ["a.wav"])
    assert prepare(source, tmp_path / "out", workers=1).samples == 1
