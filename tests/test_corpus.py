import csv
import json
import multiprocessing
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cel_dist.cli.app import run
from cel_dist.corpus import voices
from cel_dist.corpus.synth import CorpusResult, read_corpus, synthesise_corpus
from cel_dist.corpus.trials import Trial
from cel_dist.errors import CelError, RunError

SPEAKERS, UTTERANCES = 12, 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusResult:
    return synthesise_corpus(
        tmp_path_factory.mktemp("corpus") / "tiny", speakers=SPEAKERS, utterances=UTTERANCES, workers=2
    )


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def read_trials(path: Path) -> list[Trial]:
    return [Trial(int(label), enrol, test) for label, enrol, test in map(str.split, path.read_text().splitlines())]


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The corpus on disk


def test_every_utterance_is_16_khz_mono_16_bit_flac_long_enough_for_two_segments(corpus: CorpusResult) -> None:
    rows = table(corpus.out / "manifest.tsv")
    assert len(rows) == corpus.utterances == SPEAKERS * UTTERANCES
    assert {row["path"] for row in rows} == set(tree(corpus.root))
    for row in rows:
        wave, rate = soundfile.read(corpus.root / row["path"], dtype="int16")
        info = soundfile.info(corpus.root / row["path"])
        assert (rate, wave.ndim, info.format, info.subtype) == (16_000, 1, "FLAC", "PCM_16")
        assert 2 * 29_040 <= len(wave) <= 7 * 16_000
        assert float(row["seconds"]) == pytest.approx(len(wave) / 16_000, abs=1e-3)
        assert 300 < np.std(wave.astype(float)) < 10_000
    assert corpus.seconds_audio == pytest.approx(sum(float(row["seconds"]) for row in rows), abs=0.1)


def test_splits_share_no_speaker_and_every_speaker_has_two_sessions(corpus: CorpusResult) -> None:
    rows = table(corpus.out / "manifest.tsv")
    splits: dict[str, set[str]] = {}
    sessions: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row["speaker"], set()).add(row["split"])
        sessions.setdefault(row["speaker"], set()).add(row["session"])
    assert all(len(names) == 1 for names in splits.values())
    assert all(len(names) == 2 for names in sessions.values())
    assert Counter(next(iter(names)) for names in splits.values()) == {"train": 8, "validation": 2, "test": 2}
    assert {row["speaker"]: row["split"] for row in table(corpus.out / "speakers.tsv")} == {
        name: next(iter(names)) for name, names in splits.items()
    }


def test_training_lists_name_the_training_utterances_and_nothing_else(corpus: CorpusResult) -> None:
    expected = {row["path"]: row["speaker"] for row in table(corpus.out / "manifest.tsv") if row["split"] == "train"}
    assert corpus.train_list.read_text().splitlines() == list(expected)
    assert [line.split() for line in corpus.train_labelled.read_text().splitlines()] == [*map(list, expected.items())]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_trials_are_balanced_across_sessions_and_within_their_split(corpus: CorpusResult, split: str) -> None:
    rows = {row["path"]: row for row in table(corpus.out / "manifest.tsv")}
    trials = read_trials(corpus.validation_trials if split == "validation" else corpus.test_trials)
    labels = Counter(trial.label for trial in trials)
    assert labels[0] == labels[1] == 2 * (UTTERANCES // 2) ** 2
    assert len({frozenset(trial[1:]) for trial in trials}) == len(trials)
    for label, enrol, test in trials:
        assert rows[enrol]["split"] == rows[test]["split"] == split
        assert (rows[enrol]["speaker"] == rows[test]["speaker"]) == bool(label)
        assert rows[enrol]["session"] != rows[test]["session"]


def test_bank_has_noises_voices_music_and_rooms(corpus: CorpusResult) -> None:
    for kind in ("noise", "speech", "music"):
        files = sorted((corpus.noise / kind).glob("*.flac"))
        assert len(files) >= 16
        for path in files:
            wave, rate = soundfile.read(path)
            assert (rate, wave.ndim) == (16_000, 1)
            assert len(wave) >= 5 * 16_000
            assert np.abs(wave).max() == pytest.approx(0.5, abs=1e-3)
            assert wave.std() > 0.003
    assert len(list(corpus.rir.glob("*.flac"))) >= 100


def test_files_do_not_depend_on_the_number_of_processes(corpus: CorpusResult, tmp_path: Path) -> None:
    again = synthesise_corpus(tmp_path / "again", speakers=SPEAKERS, utterances=UTTERANCES, workers=1)
    first, second = tree(corpus.out), tree(again.out)
    assert sorted(first) == sorted(second)
    assert [name for name in first if first[name] != second[name]] == []


def test_another_seed_gives_other_voices(corpus: CorpusResult, tmp_path: Path) -> None:
    first = voices.draw_voices(20, seed=0)
    assert first == voices.draw_voices(40, seed=0)[:20]
    assert set(first).isdisjoint(voices.draw_voices(20, seed=1))


def test_finished_corpus_is_reused_untouched(corpus: CorpusResult) -> None:
    before = {path: path.stat().st_mtime_ns for path in corpus.out.rglob("*")}
    again = synthesise_corpus(corpus.out, speakers=SPEAKERS, utterances=UTTERANCES)
    assert again.reused
    assert not corpus.reused
    assert again.seconds_audio == corpus.seconds_audio
    assert {path: path.stat().st_mtime_ns for path in corpus.out.rglob("*")} == before


def test_corpus_of_other_parameters_is_refused_and_named(corpus: CorpusResult) -> None:
    with pytest.raises(CelError, match="utterances 4 instead of 5"):
        synthesise_corpus(corpus.out, speakers=SPEAKERS, utterances=5)


def test_folder_with_other_files_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(CelError, match="is not empty"):
        synthesise_corpus(tmp_path, speakers=6, utterances=2)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_interruption_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesise_corpus(tmp_path / "out", speakers=6, utterances=2, workers=1, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_death_of_a_process_is_a_runtime_failure_that_leaves_nothing_behind(tmp_path: Path) -> None:
    def kill(done: int, total: int) -> None:
        if done == 1:
            multiprocessing.active_children()[0].kill()

    with pytest.raises(RunError, match="a process of the speech synthesis died"):
        synthesise_corpus(tmp_path / "out", speakers=6, utterances=2, workers=2, progress=kill)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_a_runtime_failure_that_leaves_nothing_behind(tmp_path: Path) -> None:
    # A limit on the size of a file fails a write as a full disk does.
    script = (
        "import resource, signal, sys; from cel_dist.cli.app import run; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); sys.exit(run(sys.argv[1:]))"
    )
    arguments = ["corpus", "synth", "--out", str(tmp_path / "out"), "--speakers", "6", "--utterances", "2"]
    command = [sys.executable, "-c", script, *arguments, "--workers", "1"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode == 1
    assert outcome.stderr.startswith("error: cannot write the corpus to")
    assert outcome.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"speakers": 5}, "speakers is 5"),
        ({"utterances": 1}, "utterances is 1"),
        ({"seed": -1}, "seed is -1"),
        ({"workers": 0}, "workers is 0"),
        ({"speakers": 10, "held_out": (1, 4)}, "held_out is"),
        ({"speakers": 10, "held_out": (5, 4)}, "held_out is"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(CelError, match=message):
        synthesise_corpus(tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_missing_engine_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(CelError, match=r"pip install 'cel_dist\[corpus\]'"):
        synthesise_corpus(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# The command


def test_command_prints_one_json_object(corpus: CorpusResult, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = ["--speakers", str(SPEAKERS), "--utterances", str(UTTERANCES)]
    assert run(["corpus", "synth", "--out", str(corpus.out), *numbers, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == {
        "out": str(corpus.out),
        "speakers": SPEAKERS,
        "utterances": SPEAKERS * UTTERANCES,
        "seconds_audio": corpus.seconds_audio,
        "train_list": str(corpus.train_list),
        "validation_trials": str(corpus.validation_trials),
        "test_trials": str(corpus.test_trials),
        "root": str(corpus.root),
    }


def test_command_ends_with_one_line_and_exit_code_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["corpus", "synth", "--out", str(tmp_path / "out"), "--speakers", "3"]) == 2
    assert capsys.readouterr().err == "error: speakers is 3; use 6 to 2000, of whom some are held out\n"


def test_a_finished_corpus_is_recognised_and_nothing_else_is(corpus: CorpusResult, tmp_path: Path) -> None:
    found = read_corpus(corpus.out)
    assert found is not None
    assert (found.train_list, found.speakers) == (corpus.train_list, corpus.speakers)
    assert read_corpus(tmp_path) is None
    marker = json.loads((corpus.out / "corpus.json").read_text())
    (tmp_path / "corpus.json").write_text(json.dumps({**marker, "format": marker["format"] + 1}))
    assert read_corpus(tmp_path) is None
