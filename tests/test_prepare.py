import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cel_dist.cli.app import run
from cel_dist.data.audio import read_audio
from cel_dist.data.check import check_shards
from cel_dist.data.prepare import PrepareResult, prepare
from cel_dist.data.shards import ShardFolder
from cel_dist.errors import CelError, RunError

NAMES = ["a b/ü1.wav", "a b/2.FLAC", "c/d.e/3.ogg", *(f"s{number % 3}/{number:03d}.flac" for number in range(4, 21))]


def voice(seed: int, seconds: float, rate: int = 16_000) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=round(seconds * rate)) * 0.1


def write_corpus(folder: Path, names: list[str] = NAMES) -> Path:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, voice(seed, 1.0 + 0.2 * seed), 16_000)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def descriptions(folder: Path) -> list[dict[str, object]]:
    """The JSON members of all samples, in the order of the shards."""
    import tarfile

    found = []
    for record in ShardFolder.open(folder).manifest.shards:
        with tarfile.open(folder / record.name) as tar:
            found += [json.load(tar.extractfile(name)) for name in tar.getnames() if name.endswith(".json")]
    return found


def paths(folder: Path) -> list[str]:
    return [str(description["path"]) for description in descriptions(folder)]


def table(result: PrepareResult) -> dict[str, str]:
    header, *rows = result.rejects.read_text().splitlines()
    assert header == "path\treason\tdetail"
    return dict(row.split("\t")[:2] for row in rows)


def test_every_file_of_a_tree_is_there_once_with_its_audio(corpus: Path, tmp_path: Path) -> None:
    result = prepare(corpus, tmp_path / "out", samples_per_shard=8, workers=1)
    assert (result.samples, result.shards, result.rejected) == (20, 3, 0)
    assert table(result) == {}
    folder = ShardFolder.open(tmp_path / "out")
    found = descriptions(tmp_path / "out")
    assert sorted(str(description["path"]) for description in found) == sorted(NAMES)
    for place, description in enumerate(found):
        with open(folder.shard_path(folder.index.shard[place]), "rb") as file:
            audio = os.pread(file.fileno(), folder.index.size[place], folder.index.offset[place])
        np.testing.assert_array_equal(read_audio(audio), read_audio(corpus / str(description["path"])))
        assert description["seconds"] == folder.index.samples[place] / 16_000
        assert "speaker" not in description
    assert folder.manifest.seconds == 58.0
    assert check_shards(tmp_path / "out", workers=1) == []


def test_the_order_is_shuffled_and_depends_on_the_seed_only(corpus: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        prepare(corpus, tmp_path / name, samples_per_shard=8, seed=seed, workers=1)
    assert paths(tmp_path / "a") != sorted(NAMES)
    assert paths(tmp_path / "a") != paths(tmp_path / "b")
    prepare(corpus, tmp_path / "c", samples_per_shard=20, seed=0, workers=1)
    assert paths(tmp_path / "a") == paths(tmp_path / "c")


def test_any_number_of_workers_writes_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        prepare(corpus, tmp_path / str(workers), samples_per_shard=5, audio_format="flac", workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_unusable_files_are_reported_by_name_and_reason_and_stop_nothing(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "corpus", ["good.wav"])
    soundfile.write(source / "stereo 44.1.wav", np.stack([voice(1, 2.0, 44_100)] * 2, 1), 44_100)
    soundfile.write(source / "24.wav", voice(2, 1.5), 16_000, subtype="PCM_24")
    soundfile.write(source / "8.wav", voice(3, 1.5), 16_000, subtype="PCM_U8")
    soundfile.write(source / "long.mp3", voice(4, 1.5, 22_050), 22_050)
    soundfile.write(source / "short.wav", voice(5, 0.9), 16_000)
    soundfile.write(source / "silent.wav", np.zeros(20_000), 16_000)
    soundfile.write(source / "nan.wav", np.full(20_000, np.nan), 16_000, subtype="FLOAT")
    soundfile.write(source / "none.wav", np.zeros(0), 16_000)
    (source / "text.wav").write_text("words")
    (source / "zero.mp3").write_bytes(b"")
    os.symlink("nowhere", source / "dangling.wav")
    (source / "notes.txt").write_text("not audio, not asked for")
    result = prepare(source, tmp_path / "out", samples_per_shard=3, workers=1)
    assert table(result) == {
        "short.wav": "too_short",
        "silent.wav": "silent",
        "nan.wav": "non_finite",
        "none.wav": "empty",
        "text.wav": "unreadable",
        "zero.mp3": "unreadable",
        "dangling.wav": "unreadable",
    }
    assert (result.samples, result.rejected) == (5, 7)
    assert ShardFolder.open(tmp_path / "out").manifest.rejected == 7
    assert sorted(paths(tmp_path / "out")) == ["24.wav", "8.wav", "good.wav", "long.mp3", "stereo 44.1.wav"]
    assert check_shards(tmp_path / "out", workers=1) == []


def test_a_shard_that_lost_all_its_files_is_left_out(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "corpus", ["good.wav"])
    for number in range(3):
        (source / f"bad{number}.wav").write_text("words")
    result = prepare(source, tmp_path / "out", samples_per_shard=1, workers=1)
    assert (result.samples, result.shards, result.rejected) == (1, 1, 3)
    assert check_shards(tmp_path / "out", workers=1) == []
    assert prepare(source, tmp_path / "out", samples_per_shard=1, workers=1) == result


def test_the_shortest_length_can_be_chosen(corpus: Path, tmp_path: Path) -> None:
    assert prepare(corpus, tmp_path / "out", min_seconds=2.0, workers=1).rejected == 5


def test_if_all_files_are_rejected_the_table_is_named_and_a_rerun_looks_again(tmp_path: Path) -> None:
    source = tmp_path / "corpus"
    source.mkdir()
    (source / "a.wav").write_text("words")
    with pytest.raises(CelError, match=r"all 1 audio files were rejected.*rejects\.tsv"):
        prepare(source, tmp_path / "out", workers=1)
    assert "a.wav\tunreadable" in (tmp_path / "out" / "rejects.tsv").read_text()
    write_corpus(source, ["a.wav"])
    assert prepare(source, tmp_path / "out", workers=1).samples == 1


def test_names_that_are_not_utf_8_are_kept(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "corpus", ["good.wav"])
    name = os.fsdecode(b"caf\xe9.wav")
    (source / "good.wav").rename(source / name)
    (source / os.fsdecode(b"bad\xe9.wav")).write_text("words")
    (tmp_path / "list").write_bytes(b"caf\xe9.wav\nbad\xe9.wav\n")
    result = prepare(source, tmp_path / "out", list_file=tmp_path / "list", workers=1)
    assert paths(tmp_path / "out") == [name]
    assert b"\nbad\xe9.wav\tunreadable" in result.rejects.read_bytes()
    assert prepare(source, tmp_path / "out", list_file=tmp_path / "list", workers=1) == result


def test_folders_are_searched_once_even_through_links_to_themselves(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "corpus", ["a/1.wav", "b/2.wav"])
    os.symlink("..", source / "a" / "up")
    elsewhere = write_corpus(tmp_path / "elsewhere", ["3.wav"])
    os.symlink(elsewhere, source / "linked")
    prepare(source, tmp_path / "out", workers=1)
    assert sorted(paths(tmp_path / "out")) == ["a/1.wav", "b/2.wav", "linked/3.wav"]


def test_a_list_chooses_files_and_labels_name_their_speakers(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes("\ufeff# chosen\r\n\r\na b/ü1.wav\r\n./s1//004.flac\r\n".encode())
    (tmp_path / "labels").write_text("a b/ü1.wav alice\ns1/004.flac\tbob\ns2/005.flac carol\n", encoding="utf-8")
    result = prepare(
        corpus, tmp_path / "out", list_file=tmp_path / "list", labels=tmp_path / "labels", prefix="few", workers=1
    )
    assert (result.samples, result.shards) == (2, 1)
    found = {description["path"]: description["speaker"] for description in descriptions(tmp_path / "out")}
    assert found == {"a b/ü1.wav": "alice", "s1/004.flac": "bob"}
    assert (tmp_path / "out" / "few-000000.tar").exists()


@pytest.mark.parametrize(
    ("list_text", "labels_text", "words"),
    [
        ("", None, "names no file"),
        ("# only this\n\n", None, "names no file"),
        (
            "s1/004.flac\nnone.wav\ns2/x.wav\n",
            None,
            r"2 of the 3 files in .* do not exist, the first is none\.wav in line 2",
        ),
        ("s1/004.flac\ns2/005.flac\n./s1/004.flac\n", None, "in line 1 and again in line 3"),
        ("/etc/passwd\n", None, "leaves the source folder"),
        ("s1/../../x.wav\n", None, "leaves the source folder"),
        ("s1/004.flac\ns2/005.flac\n", "s1/004.flac bob\n", r"1 of the 2 files have no speaker .* s2/005\.flac"),
        ("s1/004.flac\n", "s1/004.flac bob\ns1/004.flac eve\n", "the speakers bob and eve"),
        ("s1/004.flac\n", "s1/004.flac\n", "is not 'path speaker'"),
    ],
)
def test_a_wrong_list_is_one_error_before_any_work(
    corpus: Path, tmp_path: Path, list_text: str, labels_text: str | None, words: str
) -> None:
    (tmp_path / "list").write_text(list_text)
    labels = None if labels_text is None else tmp_path / "labels"
    if labels is not None and labels_text is not None:
        labels.write_text(labels_text)
    with pytest.raises(CelError, match=words):
        prepare(corpus, tmp_path / "out", list_file=tmp_path / "list", labels=labels, workers=1)
    assert not (tmp_path / "out").exists()


def test_a_wrong_source_or_option_is_an_error(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for source, out, options, words in [
        (tmp_path / "absent", "out", {}, "there is no folder"),
        (tmp_path / "empty", "out", {}, "no audio below"),
        (corpus, "out", {"list_file": tmp_path / "absent"}, "cannot read"),
        (corpus, "out", {"labels": tmp_path / "absent"}, "cannot read"),
        (corpus, "out", {"samples_per_shard": 0}, "samples per shard"),
        (corpus, "out", {"seed": -1}, "seed"),
        (corpus, "out", {"workers": 0}, "workers"),
        (corpus, "out", {"min_seconds": float("nan")}, "shortest length"),
        (corpus, "out", {"prefix": "a/b"}, "prefix"),
        (corpus, "file", {}, "is a file"),
    ]:
        with pytest.raises(CelError, match=words):
            prepare(source, tmp_path / out, **options)
    assert not (tmp_path / "out").exists()


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


STOP_AFTER_FIRST_SHARD = """
import sys
from cel_dist.data.prepare import prepare
def progress(done, total):
    if done:
        print("shard", flush=True)
        sys.stdin.read()
if __name__ == "__main__":
    prepare(sys.argv[1], sys.argv[2], samples_per_shard=2, workers=2, progress=progress)
"""


def test_a_killed_run_leaves_nothing_that_passes_and_is_continued(corpus: Path, tmp_path: Path) -> None:
    script, out = tmp_path / "killed.py", tmp_path / "out"
    script.write_text(STOP_AFTER_FIRST_SHARD)
    command = [sys.executable, str(script), str(corpus), str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        # The parent stands still after its first shard, its workers go on, and none of them outlives it.
        assert process.stdout.readline() == b"shard\n"
        with pytest.raises(RunError, match="another 'cel prepare' is writing"):
            prepare(corpus, out, samples_per_shard=2, workers=1)
        process.send_signal(signal.SIGKILL)
        # The workers hold the other end of the pipe: it ends when the last of them has.
        assert process.stdout.read() == b""
    with pytest.raises(CelError, match="if it was interrupted"):
        ShardFolder.open(out)
    assert [fault.shard for fault in check_shards(out) if not fault.shard.endswith(".tmp")] == ["manifest.json"]
    there = {path.name: path.stat().st_ino for path in out.glob("*.tar")}
    assert 0 < len(there) < 10
    recorded = {path.name.removesuffix(".json") for path in (out / ".prepare").glob("*.tar.json")}
    prepare(corpus, out, samples_per_shard=2, workers=1)
    assert all((out / name).stat().st_ino == there[name] for name in recorded)
    prepare(corpus, tmp_path / "straight", samples_per_shard=2, workers=1)
    assert contents(out) == contents(tmp_path / "straight")


def test_a_killed_worker_is_one_error_and_the_run_is_continued(corpus: Path, tmp_path: Path) -> None:
    def kill_a_worker(done: int, total: int) -> None:
        if done:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    with pytest.raises(RunError, match="a worker process was killed"):
        prepare(corpus, tmp_path / "out", samples_per_shard=1, workers=2, progress=kill_a_worker)
    assert prepare(corpus, tmp_path / "out", samples_per_shard=1, workers=1).samples == 20
    assert check_shards(tmp_path / "out", workers=1) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", mount], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting a small tmpfs is not permitted here: {done.stderr.decode().strip()}")
    yield mount
    subprocess.run(["umount", mount], check=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_leaves_no_half_shard_and_is_continued(corpus: Path, small_disk: Path, workers: int) -> None:
    out = small_disk / "out"
    with pytest.raises(RunError, match=r"cannot write .*disk/out: no space left on device.*run the same command again"):
        prepare(corpus, out, samples_per_shard=4, workers=workers)
    assert not (out / "manifest.json").exists()
    assert list(out.glob(".*.tmp")) == []
    recorded = {path.name.removesuffix(".json") for path in (out / ".prepare").glob("*.tar.json")}
    assert recorded == {path.name for path in out.glob("*.tar")} != set()
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    assert prepare(corpus, out, samples_per_shard=4, workers=1).samples == 20
    assert check_shards(out, workers=1) == []


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


def test_short_utterances_are_counted_in_the_log(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "cel_dist.data.prepare"):
        prepare(corpus, tmp_path / "out", workers=1)
    # 1.0, 1.2, ... s: the first 14 are shorter than 3.63 s.
    assert "14 utterances are shorter than two segments of 180 frames (3.63 s)" in caplog.text


def test_prepare_and_check_on_the_command_line(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--format", "flac", "--samples-per-shard", "7", "--seed", "3", "--workers", "1", "--min-seconds", "1.1"]
    assert run(["prepare", str(corpus), "--out", str(out), *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "samples": 19,
        "shards": 3,
        "rejected": 1,
        "rejects": str(out / "rejects.tsv"),
    }
    assert ShardFolder.open(out).manifest.audio_format == "flac"
    assert run(["check", str(out), "--workers", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "faults": []}
    os.truncate(out / "train-000001.tar", 5000)
    assert run(["check", str(out), "--workers", "1", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] is False
    assert {fault["shard"] for fault in result["faults"]} == {"train-000001.tar"}
    assert run(["check", str(out), "--workers", "1"]) == 1
    assert "train-000001.tar: has 5000 bytes, the manifest says" in capsys.readouterr().out
    assert run(["prepare", str(tmp_path / "absent"), "--out", str(tmp_path / "x")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: there is no folder")
