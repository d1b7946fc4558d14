"""`cel data stats` on shards of audio whose faults were made here."""

import functools
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from audio_tree import SAMPLE_RATE, voice

from cel_dist.data.audio import read_audio
from cel_dist.data.duplicates import similar_pairs
from cel_dist.data.folder import Access
from cel_dist.data.measurement import fingerprint, measure
from cel_dist.data.prepare import prepare
from cel_dist.data.statistics import Batches, statistics
from cel_dist.errors import CelError

PLAIN = 12


def speech(seed: int, seconds: float = 4.0) -> np.ndarray:
    """A voice whose pitch and loudness wander, float64 [T] below 1, with noise over all the band."""
    rng = np.random.default_rng(seed)
    num = int(seconds * SAMPLE_RATE)
    knots = np.linspace(0, num, int(seconds * 8))
    pitch = np.interp(np.arange(num), knots, rng.uniform(90, 260, len(knots)))
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    sound = np.zeros(num)
    for k in range(1, 20):
        sound += np.interp(np.arange(num), knots, rng.uniform(0, 1, len(knots))) * np.sin(k * phase) / k
    return 0.2 * sound / abs(sound).max() + 0.004 * rng.standard_normal(num)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("statistics")
    audio = {f"plain/{number:02d}": speech(number) for number in range(PLAIN)}
    audio["clipped"] = np.clip(30 * speech(100), -1, 1 - 1 / 32768)
    audio["clipped_then_lowered"] = 0.4 * np.clip(30 * speech(101), -1, 1)
    audio["quiet"] = 0.03 * speech(102)
    audio["silent_half"] = np.concatenate([speech(103, 3), np.zeros(3 * SAMPLE_RATE)])
    audio["offset"] = speech(104) + 0.1
    audio["telephone"] = soxr.resample(soxr.resample(speech(105), SAMPLE_RATE, 8000), 8000, SAMPLE_RATE)
    audio["copy/exact"] = audio["plain/00"]
    audio["copy/louder"] = 1.7 * audio["plain/01"]
    audio["copy/cut"] = 0.8 * audio["plain/02"][11_111:]
    audio["short"] = speech(106, 2.5)
    audio["tiny"] = speech(107, 1.2)
    for name, wave in audio.items():
        path = folder / "audio" / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave, SAMPLE_RATE)
    (folder / "labels").write_text(
        "".join(f"{name}.wav {'anna' if place % 4 else 'bert'}\n" for place, name in enumerate(audio))
    )
    prepare(folder / "audio", folder / "shards", labels=folder / "labels", samples_per_shard=8, workers=1)
    return folder / "shards"


def stats(*arguments: str, code: int = 0) -> dict[str, Any]:
    """What `cel data stats --json` prints."""
    command = [sys.executable, "-m", "cel_dist", "data", "stats", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_every_fault_is_counted_and_no_other(shards: Path) -> None:
    found = stats(str(shards), "--batch-size", "10", "--workers", "2")
    num = found["utterances"]
    assert num == found["sampled"] == PLAIN + 11
    assert found["unreadable"] == 0
    assert sum(found["duration_counts"]) == num
    # 1 to 2 s, 2 to 3 s, 3 to 4 s: tiny, short, cut.
    assert found["duration_counts"][1:4] == [1, 1, 1]
    levels = found["levels"]
    shares = {name: round(levels[name] * num, 6) for name in ("clipped", "quiet", "offset", "padded", "narrow")}
    assert shares == {"clipped": 2, "quiet": 1, "offset": 1, "padded": 1, "narrow": 1}
    # Three seconds of zeros, and what is soft in the voices.
    assert 2.9 < levels["silence_of_all"] * 3600 * found["hours"] < 3.5
    drawn = found["drawn"]
    assert (drawn["short_utterances"], drawn["shorter_than_a_segment"], drawn["dropped"]) == (3, 1, 3)
    assert (drawn["usable"], drawn["batches_per_epoch"]) == (num - 3, (num - 3) // 10)
    copies = found["duplicates"]
    assert (copies["exact"], copies["similar"]) == (1, 2)
    assert [sorted(group) for group in copies["exact_examples"]] == [["copy/exact.wav", "plain/00.wav"]]
    assert sorted(sorted(pair) for pair in copies["similar_examples"]) == [
        ["copy/cut.wav", "plain/02.wav"],
        ["copy/louder.wav", "plain/01.wav"],
    ]
    assert found["negatives"] is None
    about = [advice["about"] for advice in found["advice"]]
    assert about == ["batch", "short", "duplicates", "similar", "clipping"]


def test_the_configuration_decides_what_is_short_and_labels_are_read_when_asked(shards: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "data: {shards: elsewhere, short: overlap, segment_frames: 180, num_speakers: 5}\n"
        "augment: {profile: 0}\ntrain: {batch_size: 400}\n"
    )
    found = stats(str(shards), "--config", str(config))
    assert (found["drawn"]["batch_size"], found["drawn"]["dropped"], found["drawn"]["usable"]) == (400, 1, 22)
    assert any("batches of 400 over 22 utterances" in advice["found"] for advice in found["advice"])
    assert found["negatives"]["source"] == "estimate"
    assert found["negatives"]["pair_rate"] == pytest.approx((22 / 5 - 1) / 21)

    labelled = stats(str(shards), "--config", str(config), "--use-labels", "--batch-size", "2")
    assert labelled["negatives"]["source"] == "labels"
    # A pair of a batch of two is one pair.
    assert labelled["negatives"]["pairs_per_batch"] == pytest.approx(labelled["negatives"]["pair_rate"])
    assert labelled["negatives"]["pair_rate"] > 0.5


def test_a_sample_is_seeded_and_bounded(shards: Path) -> None:
    first, again, other = (statistics(shards, sample=7, seed=seed, workers=1) for seed in (1, 1, 2))
    assert first == again
    assert first.sampled == 7
    assert first.utterances == PLAIN + 11
    assert first.levels != other.levels


def test_what_cannot_be_read_is_counted(shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "shards"))
    tar = sorted(copy.glob("*.tar"))[1]
    content = bytearray(tar.read_bytes())
    for place in range(len(content)):
        if content[place : place + 4] == b"RIFF":
            content[place : place + 4] = b"XXXX"
            break
    tar.write_bytes(content)
    found = statistics(copy, workers=1)
    assert found.unreadable == 1
    assert found.advice[0].about == "unreadable"
    assert "cel check" in found.advice[0].remedy


def test_shards_in_a_store_are_measured_alike_and_only_some_are_fetched(shards: Path, tmp_path: Path) -> None:
    handler = functools.partial(QuietHandler, directory=str(shards))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}"
            few = statistics(url, sample=6, access=Access(cache=tmp_path / "few"), workers=1)
            everything = statistics(url, access=Access(cache=tmp_path / "all"), workers=2)
        finally:
            server.shutdown()
            thread.join()
    assert few.sampled == 6
    assert len(list((tmp_path / "few").glob("*.tar"))) == 1
    here = statistics(shards, workers=1)
    assert everything.levels == here.levels
    assert everything.duplicates == here.duplicates


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def test_people_get_a_histogram_and_what_to_do(shards: Path) -> None:
    command = [sys.executable, "-m", "cel_dist", "data", "stats", str(shards), "--batch-size", "400"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=dict(os.environ))
    assert "23 utterances" in done.stdout
    assert "#" * 40 in done.stdout
    assert "! batches of 400 over 20 utterances that are long enough: no batch" in done.stdout
    assert "-> lower train.batch_size" in done.stdout
    assert "plain/00.wav" in done.stdout


def test_bad_input_is_one_line(shards: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cel_dist", "data", "stats", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no folder of shards")
    folder = tmp_path / "audio"
    folder.mkdir()
    soundfile.write(folder / "one.wav", speech(0), SAMPLE_RATE)
    prepare(folder, tmp_path / "unlabelled", workers=1)
    with pytest.raises(CelError, match="no labels"):
        statistics(tmp_path / "unlabelled", Batches(), use_labels=True, workers=1)


def test_a_copy_in_mp3_is_found_and_other_utterances_of_a_voice_are_not(tmp_path: Path) -> None:
    original = speech(7, 6.0)
    soundfile.write(tmp_path / "copy.mp3", original, SAMPLE_RATE)
    rng = np.random.default_rng(0)
    waves = [(32767 * voice(rng, 120, 4.0)).clip(-32768, 32767).astype(np.int16) for _ in range(20)]
    waves += [np.rint(32767 * original).astype(np.int16), read_audio(tmp_path / "copy.mp3")]
    pairs = similar_pairs([fingerprint(wave) for wave in waves])
    assert [(pair.first, pair.second) for pair in pairs] == [(20, 21)]


def test_loud_audio_that_does_not_clip_is_not_taken_for_clipped() -> None:
    loud = speech(3)
    measured = measure(np.rint(32760 * loud / abs(loud).max()).astype(np.int16))
    assert measured.clipped == 0
    assert measured.peak_db > -0.01


def test_a_voice_that_fades_towards_8_khz_is_not_taken_for_telephone_audio() -> None:
    spectrum = np.fft.rfft(np.random.default_rng(0).standard_normal(4 * SAMPLE_RATE))
    hertz = np.fft.rfftfreq(4 * SAMPLE_RATE, 1 / SAMPLE_RATE)
    # From 4 kHz on 40 dB below what is under it, or 70.
    fading, cut = (np.fft.irfft(spectrum * np.where(hertz < 4000, 1, gain)) for gain in (1e-2, 10**-3.5))
    measured = [measure(np.rint(8000 * wave / abs(wave).max()).astype(np.int16)) for wave in (fading, cut)]
    assert [one.is_narrow for one in measured] == [False, True]
