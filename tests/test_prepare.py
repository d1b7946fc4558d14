import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from prepare_corpus import NAMES, contents, descriptions, paths, speaker_of, table, voice, write_corpus

from cel_dist.cli.app import run
from cel_dist.data.audio import read_audio
from cel_dist.data.check import check_shards
from cel_dist.data.folder import ShardFolder
from cel_dist.data.prepare import prepare
from cel_dist.data.sources import audio_below
from cel_dist.errors import CelError


def test_every_file_of_a_tree_is_there_once_with_its_audio(corpus: Path, tmp_path: Path) -> None:
    result = prepare(corpus, tmp_path / "out", samples_per_shard=8, workers=1)
    assert (result.samples, result.shards, result.rejected) == (20, 3, 0)
    assert table(result) == {}
    folder = ShardFolder.open(tmp_path / "out")
    found = descriptions(tmp_path / "out")
    assert sorted(str(description["path"]) for description in found) == sorted(NAMES)
    for place, description in enumerate(found):
        with open(tmp_path / "out" / folder.manifest.shards[folder.index.shard[place]].name, "rb") as file:
            audio = os.pread(file.fileno(), folder.index.size[place], folder.index.offset[place])
        np.testing.assert_array_equal(read_audio(audio), read_audio(corpus / str(description["path"])))
        assert description["seconds"] == folder.index.samples[place] / 16_000
        assert "speaker" not in description
    assert folder.manifest.seconds == 58.0
    assert folder.index.speaker.tolist() == [-1] * 20
    assert "speaker" not in np.load(tmp_path / "out" / "index.npz")
    assert check_shards(tmp_path / "out", workers=1) == []


def test_the_order_is_shuffled_and_depends_on_the_seed_only(corpus: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        prepare(corpus, tmp_path / name, samples_per_shard=8, seed=seed, workers=1)
    assert paths(tmp_path / "a") != sorted(NAMES)
    assert paths(tmp_path / "a") != paths(tmp_path / "b")
    prepare(corpus, tmp_path / "c", samples_per_shard=20, seed=0, workers=1)
    assert paths(tmp_path / "a") == paths(tmp_path / "c")


def test_any_number_of_workers_writes_the_same_bytes(corpus: Path, labels: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        out = tmp_path / str(workers)
        prepare(corpus, out, labels=labels, samples_per_shard=5, audio_format="flac", workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    index = ShardFolder.open(out).index
    assert (index.speaker.dtype, index.speaker_names.tolist()) == (np.int32, ["a_b", "c", "s0", "s1", "s2"])
    found = [description["speaker"] for description in descriptions(out)]
    assert index.speaker_names[index.speaker].tolist() == found == [speaker_of(path) for path in paths(out)]
    assert check_shards(out, workers=1) == []


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


def test_links_that_lead_nowhere_are_rejected_or_passed_over(tmp_path: Path) -> None:
    source = tmp_path / "audio"
    source.mkdir()
    for name, target in {"loop": "loop", "loop.wav": "loop.wav", "gone": "missing", "gone.wav": "missing.wav"}.items():
        (source / name).symlink_to(target)
    assert audio_below(source) == ["gone.wav", "loop.wav"]


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
