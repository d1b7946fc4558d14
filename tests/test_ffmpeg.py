"""AAC and other formats through the real ffmpeg, and what happens without it."""

import threading
from pathlib import Path

import numpy as np
import pytest
from ffmpeg_audio import FFMPEG, encode
from prepare_corpus import contents, paths, table, write_corpus

from cel_dist.data.audio import AudioError, read_audio
from cel_dist.data.ffmpeg import FFMPEG_SUFFIXES, FFmpegError, decoded
from cel_dist.data.prepare import prepare
from cel_dist.data.prepare_bank import prepare_bank

needs_ffmpeg = pytest.mark.skipif(FFMPEG is None, reason="ffmpeg is not installed: apt-get install ffmpeg")


def tone(hz: float, seconds: float, rate: int) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)


def failure(path: Path) -> str:
    with pytest.raises(AudioError) as caught:
        read_audio(path)
    return str(caught.value)


@needs_ffmpeg
@pytest.mark.parametrize("suffix", sorted(FFMPEG_SUFFIXES))
def test_every_format_keeps_length_pitch_and_level(tmp_path: Path, suffix: str) -> None:
    path = encode(tone(1000, 3.0, 44_100), 44_100, tmp_path / f"- é{suffix}")
    got = read_audio(path)
    # Formats without an edit list keep the silence that the encoder begins with, 2048 samples of AAC at most.
    assert abs(len(got) - 48_000) <= 1500
    assert np.abs(np.fft.rfft(got)).argmax() * 16_000 / len(got) == pytest.approx(1000, abs=1)
    assert np.abs(got[8000:-8000]).max() == pytest.approx(16_384, rel=0.1)
    np.testing.assert_array_equal(read_audio(path), got)


@needs_ffmpeg
def test_channels_are_averaged_as_in_other_formats(tmp_path: Path) -> None:
    left = tone(500, 2.0, 16_000)
    path = encode(np.stack([left, np.zeros_like(left)], 1), 16_000, tmp_path / "a.m4a")
    assert np.abs(read_audio(path)[4000:-4000]).max() == pytest.approx(8192, rel=0.1)


@needs_ffmpeg
def test_what_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    whole = encode(tone(440, 4.0, 44_100), 44_100, tmp_path / "whole.m4a").read_bytes()
    (tmp_path / "cut.m4a").write_bytes(whole[: len(whole) // 2])
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 400] = bytes(400)
    (tmp_path / "damaged.m4a").write_bytes(damaged)
    (tmp_path / "words.m4a").write_text("words")
    (tmp_path / "empty.aac").write_bytes(b"")
    # Would have another file opened, were it taken for what it is.
    (tmp_path / "list.m4a").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:4,\nfile:{tmp_path}/whole.m4a\n")
    for name in ("cut.m4a", "damaged.m4a", "words.m4a", "empty.aac", "list.m4a", "absent.mp4"):
        message = failure(tmp_path / name)
        assert message.startswith("unreadable: ffmpeg: "), name
        assert str(tmp_path) not in message
        assert " @ 0x" not in message
    assert "moov atom not found" in failure(tmp_path / "words.m4a")


def test_an_ffmpeg_that_stands_still_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "ffmpeg"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexec tail -f /dev/null\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    with pytest.raises(FFmpegError, match=r"gave nothing for 0\.2 s"), decoded(tmp_path / "a.m4a", 0.2):
        pass


@needs_ffmpeg
def test_what_the_reader_does_between_reads_does_not_count_as_standing_still(tmp_path: Path) -> None:
    encode(tone(440, 20.0, 16_000), 16_000, tmp_path / "a.m4a")
    with decoded(tmp_path / "a.m4a") as stream:
        read = len(stream.read(1000))
        # More is to come than the pipe holds, so that ffmpeg waits too.
        assert all(thread.finished.is_set() for thread in threading.enumerate() if isinstance(thread, threading.Timer))
        while block := len(stream.read(100_000)):
            read += block
    assert read >= 20 * 16_000


def test_without_ffmpeg_such_files_are_rejected_and_taken_in_once_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_corpus(tmp_path / "corpus", ["a.wav", "b.wav"])
    if FFMPEG is None:
        (source / "c.m4a").write_bytes(b"")
    else:
        encode(tone(440, 2.0, 16_000), 16_000, source / "c.m4a")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path / "nothing"))
        result = prepare(source, tmp_path / "out", samples_per_shard=1, workers=1)
    assert table(result) == {"c.m4a": "unreadable"}
    assert ".m4a needs ffmpeg, which is not installed; install it and run again" in result.rejects.read_text()
    if FFMPEG is None:
        pytest.skip("ffmpeg is not installed: apt-get install ffmpeg")
    before = {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")}
    assert prepare(source, tmp_path / "out", samples_per_shard=1, workers=2).rejected == 0
    assert before.items() < {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")}.items()
    assert sorted(paths(tmp_path / "out")) == ["a.wav", "b.wav", "c.m4a"]
    with monkeypatch.context() as patch:
        # What was made with ffmpeg is not undone where there is none.
        patch.setenv("PATH", str(tmp_path / "nothing"))
        assert prepare(source, tmp_path / "out", samples_per_shard=1, workers=1).rejected == 0
    prepare(source, tmp_path / "straight", samples_per_shard=1, workers=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


@needs_ffmpeg
def test_a_bank_takes_in_what_was_rejected_for_want_of_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_corpus(tmp_path / "noise", ["a.wav"])
    encode(tone(440, 2.0, 16_000), 16_000, source / "b.m4a")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path / "nothing"))
        assert prepare_bank(source, tmp_path / "bank", workers=1).rejected == 1
    assert prepare_bank(source, tmp_path / "bank", workers=1).clips == {"noise": 2}
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert prepare_bank(source, tmp_path / "bank", workers=1).rejected == 0
