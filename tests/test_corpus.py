import csv
import itertools
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
from cel_dist.corpus import espeak, music, noises, rooms, sentences, voices
from cel_dist.corpus.channel import draw_channel
from cel_dist.corpus.synth import CorpusResult, read_corpus, synthesise_corpus
from cel_dist.corpus.trials import Trial, Utterance, count_target_pairs, draw_trials, write_trials
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


def long_term_spectrum(wave: np.ndarray) -> np.ndarray:
    """[30] dB in bands a quarter octave wide, without the level."""
    frames = np.lib.stride_tricks.sliding_window_view(wave, 1024)[::512] * np.hanning(1024)
    power = (np.abs(np.fft.rfft(frames)) ** 2).mean(axis=0)
    edges = np.unique(np.round(np.geomspace(5, 480, 31)).astype(int))
    bands = np.array([10 * np.log10(power[low:high].mean() + 1e-9) for low, high in itertools.pairwise(edges)])
    return bands - bands.mean()


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


# Speakers


def test_no_two_of_a_hundred_speakers_have_nearly_the_same_parameters() -> None:
    drawn = voices.draw_voices(116, seed=0)
    assert min(voices.distance(first, second) for first, second in itertools.combinations(drawn, 2)) > 0.7
    assert len({voice.variant for voice in drawn}) >= 30
    assert len({voice.accent for voice in drawn}) >= 6


def test_every_variant_and_accent_is_one_the_engine_knows() -> None:
    drawn = voices.draw_voices(116, seed=0)
    for name in {voice.variant for voice in drawn}:
        assert len(espeak.speak("no", voice=f"en-us+{name}", rate_wpm=200, pitch=50, pitch_range=50)) > 1_000
    for name in {voice.accent for voice in drawn}:
        assert len(espeak.speak("no", voice=f"{name}+f1", rate_wpm=200, pitch=50, pitch_range=50)) > 1_000


def test_speakers_sound_different_before_the_channel_and_alike_to_themselves() -> None:
    rng = np.random.default_rng(0)
    texts = [sentences.compose(rng, 30) for _ in range(2)]
    # Twice the number of timbres, so that every voice has a rival of the same timbre.
    drawn = voices.draw_voices(76, seed=0)
    first, second = (
        np.array([long_term_spectrum(voices.speak(voice, text, voices.Delivery())) for voice in drawn])
        for text in texts
    )
    # [76, 76] distance in dB between each speaker reading one text and each speaker reading the other.
    distance = np.sqrt(((first[:, None] - second[None]) ** 2).mean(axis=-1))
    others = distance + np.where(np.eye(len(drawn)), np.inf, 0)
    assert (np.diag(distance) < others.min(axis=1)).mean() > 0.97


def test_formant_scale_moves_the_spectrum_and_leaves_pitch_and_length() -> None:
    text = "The captain carried seven oranges along the coast road."
    small, large = (
        voices.speak(voices.Voice("m3", "en-us", scale, 1.0, 50.0, 170.0), text, voices.Delivery())
        for scale in (1.15, 0.87)
    )
    assert len(small) == pytest.approx(len(large), rel=0.1)
    assert fundamental_hz(small) == pytest.approx(fundamental_hz(large), rel=0.08)
    centroids = [centroid_hz(wave) for wave in (small, large)]
    assert centroids[0] > 1.1 * centroids[1]


def fundamental_hz(wave: np.ndarray) -> float:
    """Median over the voiced frames of the lag with the highest autocorrelation."""
    found = []
    for start in range(0, len(wave) - 1024, 512):
        frame = wave[start : start + 1024] - wave[start : start + 1024].mean()
        correlation = np.correlate(frame, frame, "full")[1023:]
        lag = 53 + int(correlation[53:267].argmax())
        if frame.std() > 0.02 and correlation[lag] > 0.6 * correlation[0]:
            found.append(16_000 / lag)
    return float(np.median(found))


def centroid_hz(wave: np.ndarray) -> float:
    power = np.abs(np.fft.rfft(wave)) ** 2
    frequencies = np.fft.rfftfreq(len(wave), 1 / 16_000)
    band = (frequencies > 300) & (frequencies < 4_000)
    return float((power[band] * frequencies[band]).sum() / power[band].sum())


@pytest.mark.parametrize("variant", ["f5", "m8", "klatt5", "grandma"])
def test_speech_does_not_depend_on_what_was_spoken_before(variant: str) -> None:
    def say() -> bytes:
        text = "The judge found three heavy books."
        return espeak.speak(text, voice=f"en-us+{variant}", rate_wpm=170, pitch=50, pitch_range=50).tobytes()

    alone = say()
    espeak.speak("Something else.", voice="en-029+klatt5", rate_wpm=120, pitch=20, pitch_range=90)
    assert say() == alone


def test_missing_engine_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(CelError, match=r"pip install 'cel_dist\[corpus\]'"):
        synthesise_corpus(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_sentences_vary() -> None:
    rng = np.random.default_rng(0)
    texts = [sentences.compose(rng, 10) for _ in range(500)]
    assert len(set(texts)) > 490
    assert len({word for text in texts for word in text.lower().split()}) > 250


# Channels, noises and rooms


def test_channel_sets_level_and_signal_to_noise_ratio() -> None:
    rng = np.random.default_rng(1)
    speech = np.concatenate([rng.standard_normal(32_000), np.zeros(32_000)]).astype(np.float32) * 0.1
    for number in range(5):
        channel = draw_channel(np.random.default_rng(number))
        recorded = channel.apply(speech, rng).astype(float) / 32768
        assert 10 * np.log10(np.mean(recorded**2)) == pytest.approx(channel.level_dbfs, abs=0.5)
        # Power of the two halves: speech and noise, then noise after the tail of the room. The mean of the speech power
        # is over both halves.
        both, noise = np.mean(recorded[:32_000] ** 2), np.mean(recorded[40_000:] ** 2)
        assert 10 * np.log10((both - noise) / 2 / noise) == pytest.approx(channel.snr_db, abs=1.0)


def test_channels_of_two_sessions_colour_speech_differently() -> None:
    noise = np.random.default_rng(0).standard_normal(64_000).astype(np.float32)
    spectra = [
        long_term_spectrum(draw_channel(np.random.default_rng(n)).apply(noise, np.random.default_rng(0)).astype(float))
        for n in range(8)
    ]
    assert min(np.sqrt(np.mean((a - b) ** 2)) for a, b in itertools.combinations(spectra, 2)) > 1.5


@pytest.mark.parametrize("t60", [0.15, 0.4, 1.0])
def test_room_decays_as_asked_after_a_direct_sound_at_two_milliseconds(t60: float) -> None:
    for seed in range(5):
        response = rooms.draw_response(np.random.default_rng(seed), t60_seconds=t60, max_seconds=2.0)
        assert np.abs(response).max() == pytest.approx(0.9, abs=1e-3)
        assert np.abs(response[:30]).max() < 1e-6
        assert abs(response[32]) > 0
        # Schroeder's backward integral between -5 and -25 dB.
        energy = np.cumsum(response[::-1].astype(float) ** 2)[::-1]
        decay_db = 10 * np.log10(energy / energy[0])
        start, end = int(np.argmax(decay_db < -15)), int(np.argmax(decay_db < -35))
        assert 3 * (end - start) / 16_000 == pytest.approx(t60, rel=0.35)


@pytest.mark.parametrize("kind", list(noises.KINDS))
def test_noises_of_a_kind_differ_and_are_finite(kind: str) -> None:
    first, second = (noises.draw_noise(np.random.default_rng(seed), kind, 32_000) for seed in (1, 2))
    assert first.shape == (32_000,)
    assert np.isfinite(first).all()
    assert first.std() > 0
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.5


@pytest.mark.parametrize(("slope_db", "tolerance"), [(0, 0.4), (3, 0.4), (6, 0.4)])
def test_coloured_noise_falls_by_its_slope_an_octave(slope_db: float, tolerance: float) -> None:
    wave = noises.coloured(np.random.default_rng(0), 160_000, slope_db)
    power, frequencies = np.abs(np.fft.rfft(wave)) ** 2, np.fft.rfftfreq(160_000, 1 / 16_000)
    low, high = (power[(frequencies > edge) & (frequencies < 1.1 * edge)].mean() for edge in (500, 4_000))
    assert 10 * np.log10(low / high) / 3 == pytest.approx(slope_db, abs=tolerance)


def test_music_has_tones_and_changes() -> None:
    wave = music.draw_music(np.random.default_rng(3), 64_000)
    halves = [np.abs(np.fft.rfft(half)) for half in np.split(wave, 2)]
    assert np.isfinite(wave).all()
    # A few bins hold most of the energy of a tone; noise spreads it over all of them.
    assert np.sort(halves[0] ** 2)[-320:].sum() > 0.5 * (halves[0] ** 2).sum()
    assert np.corrcoef(*halves)[0, 1] < 0.95


# Trials of any list


def utterances_of(counts: dict[str, list[int]]) -> list[Utterance]:
    return [
        Utterance(f"{speaker}/{session}/{number}.wav", speaker, f"s{session}")
        for speaker, sessions in counts.items()
        for session, count in enumerate(sessions)
        for number in range(count)
    ]


@pytest.mark.parametrize("num_nontarget", [30, 170])
def test_trials_are_distinct_and_never_a_file_against_itself(num_nontarget: int) -> None:
    listed = utterances_of({"a": [4, 3], "b": [2, 5], "c": [6], "d": [1, 1]})
    of = {utterance.path: utterance for utterance in listed}
    trials = draw_trials(listed, num_target=23, num_nontarget=num_nontarget, seed=4, cross_session=False)
    assert Counter(trial.label for trial in trials) == {1: 23, 0: num_nontarget}
    assert len({frozenset((trial.enrol, trial.test)) for trial in trials}) == len(trials)
    for label, enrol, test in trials:
        assert enrol != test
        assert (of[enrol].speaker == of[test].speaker) == bool(label)


def test_cross_session_trials_can_be_exhausted_and_no_more() -> None:
    listed = utterances_of({"a": [4, 3], "b": [2, 5], "c": [6]})
    possible = 4 * 3 + 2 * 5
    assert count_target_pairs(listed) == possible
    of = {utterance.path: utterance for utterance in listed}
    trials = draw_trials(listed, num_target=possible, num_nontarget=40, seed=0)
    assert all(of[trial.enrol].session != of[trial.test].session for trial in trials)
    with pytest.raises(CelError, match=f"there are {possible} pairs"):
        draw_trials(listed, num_target=possible + 1, num_nontarget=0, seed=0)
    with pytest.raises(CelError, match="non-target trials asked for"):
        draw_trials(listed, num_target=0, num_nontarget=10_000, seed=0)


def test_target_trials_are_spread_evenly_over_speakers() -> None:
    listed = utterances_of({"many": [50, 50], "few": [3, 3], "some": [10, 10]})
    trials = draw_trials(listed, num_target=24, num_nontarget=0, seed=0)
    assert Counter(trial.enrol.split("/")[0] for trial in trials) == {"many": 8, "few": 8, "some": 8}


def test_speakers_with_one_session_each_still_get_nontarget_trials() -> None:
    listed = utterances_of({"a": [4], "b": [4]})
    trials = draw_trials(listed, num_target=6, num_nontarget=16, seed=0, cross_session=False)
    assert len(trials) == 22
    assert len(draw_trials(listed, num_target=0, num_nontarget=16, seed=0)) == 16
    with pytest.raises(CelError, match="different sessions"):
        draw_trials(listed, num_target=1, num_nontarget=0, seed=0)


def test_trials_depend_on_the_seed_and_on_nothing_else() -> None:
    listed = utterances_of({"a": [5, 5], "b": [5, 5]})
    first, again, other = (draw_trials(listed, num_target=9, num_nontarget=9, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_same_path_twice_is_refused() -> None:
    listed = utterances_of({"a": [2, 2], "b": [2, 2]})
    with pytest.raises(CelError, match="names a file twice"):
        draw_trials([*listed, listed[0]], num_target=1, num_nontarget=1, seed=0)


def test_trials_file_has_label_enrolment_and_test(tmp_path: Path) -> None:
    write_trials(tmp_path / "t.txt", [Trial(1, "a/1.wav", "a/2.wav"), Trial(0, "a/1.wav", "b/1.wav")])
    assert (tmp_path / "t.txt").read_text() == "1 a/1.wav a/2.wav\n0 a/1.wav b/1.wav\n"
    assert [path.name for path in tmp_path.iterdir()] == ["t.txt"]


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
