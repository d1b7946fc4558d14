import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from cel_dist.data.audio import (
    AudioError,
    audio_seconds,
    encode_audio,
    read_audio,
    read_segments,
    require_usable,
    stored_form_fault,
)


def noise(seconds: float, rate: int = 16_000, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=round(seconds * rate)) * 3000).astype(np.int16)


def tone(hz: float, seconds: float, rate: int) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)


def peak_hz(samples: np.ndarray) -> float:
    return float(np.abs(np.fft.rfft(samples)).argmax() * 16_000 / len(samples))


def reason(source: Path | bytes) -> str:
    with pytest.raises(AudioError) as caught:
        read_audio(source)
    return caught.value.reason


@pytest.mark.parametrize("audio_format", ["wav", "flac"])
def test_16_khz_mono_16_bit_comes_back_bit_for_bit(audio_format: str) -> None:
    samples = noise(1.5)
    samples[:2] = [-32_768, 32_767]
    data = encode_audio(samples, audio_format)
    np.testing.assert_array_equal(read_audio(data), samples)
    assert encode_audio(samples, audio_format) == data
    assert stored_form_fault(data, len(samples)) is None


def test_wav_bytes_are_those_of_libsndfile() -> None:
    samples = noise(0.3)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16_000, format="WAV", subtype="PCM_16")
    assert encode_audio(samples, "wav") == buffer.getvalue()


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = noise(1.0, seed=1).astype(np.int32), noise(1.0, seed=2).astype(np.int32)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1).astype(np.int16), 16_000)
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav"), np.rint((left + right) / 2).astype(np.int16))


def test_resampling_in_blocks_equals_resampling_at_once(tmp_path: Path) -> None:
    # 15 s of 44.1 kHz stereo are more than one block.
    left, right = noise(15, 44_100, seed=1), noise(15, 44_100, seed=2)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 44_100)
    mono = ((left.astype(np.float32) + right) / 65_536).astype(np.float32)
    expected = np.rint(soxr.resample(mono, 44_100, 16_000, quality="HQ") * 32_768)
    got = read_audio(tmp_path / "a.wav")
    assert len(got) == 240_000
    assert np.abs(got - expected).max() <= 1


@pytest.mark.parametrize(("name", "rate", "tolerance"), [("a.ogg", 16_000, 0), ("a.mp3", 44_100, 2400)])
def test_lossy_formats_keep_length_and_pitch(tmp_path: Path, name: str, rate: int, tolerance: int) -> None:
    soundfile.write(tmp_path / name, tone(1000, 2.0, rate), rate)
    got = read_audio(tmp_path / name)
    assert abs(len(got) - 32_000) <= tolerance
    assert peak_hz(got) == pytest.approx(1000, abs=1)
    assert np.abs(got).max() == pytest.approx(16_384, rel=0.1)


@pytest.mark.parametrize(
    ("subtype", "step"), [("PCM_U8", 256), ("PCM_24", 1), ("PCM_32", 1), ("FLOAT", 1), ("DOUBLE", 1), ("ULAW", 600)]
)
def test_other_sample_types_are_scaled_to_16_bit(tmp_path: Path, subtype: str, step: int) -> None:
    wave = tone(440, 1.0, 16_000)
    soundfile.write(tmp_path / "a.wav", wave, 16_000, subtype=subtype)
    assert np.abs(read_audio(tmp_path / "a.wav") - wave * 32_768).max() <= step


def test_values_beyond_full_scale_are_clipped_not_wrapped(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.array([0.0, 1.5, -1.5, 1.0]), 16_000, subtype="FLOAT")
    assert read_audio(tmp_path / "a.wav").tolist() == [0, 32_767, -32_768, 32_767]


def test_what_is_wrong_with_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("this is not audio")
    (tmp_path / "zero.wav").write_bytes(b"")
    (tmp_path / "cut.flac").write_bytes(encode_audio(noise(2.0), "flac")[:20_000])
    assert reason(tmp_path / "text.wav") == "unreadable"
    assert reason(tmp_path / "zero.wav") == "unreadable"
    assert reason(tmp_path / "cut.flac") == "unreadable"
    assert reason(tmp_path / "absent.wav") == "unreadable"
    assert reason(tmp_path) == "unreadable"
    assert reason(encode_audio(noise(0), "wav")) == "empty"
    for value in (np.nan, np.inf):
        soundfile.write(tmp_path / "a.wav", np.array([0.1, value, 0.1]), 16_000, subtype="FLOAT")
        assert reason(tmp_path / "a.wav") == "non_finite"
    soundfile.write(tmp_path / "slow.wav", noise(0.1), 3)
    assert reason(tmp_path / "slow.wav") == "unreadable"


def test_a_flac_may_state_no_length_but_not_a_longer_one(tmp_path: Path) -> None:
    samples = noise(1.5)
    flac = bytearray(encode_audio(samples, "flac"))
    # Four bits of byte 21 and the four bytes behind it; 0 is what a program leaves there that writes into a pipe.
    assert (flac[21] & 15, int.from_bytes(flac[22:26], "big")) == (0, len(samples))
    flac[22:26] = bytes(4)
    (tmp_path / "streamed.flac").write_bytes(flac)
    np.testing.assert_array_equal(read_audio(bytes(flac)), samples)
    np.testing.assert_array_equal(read_audio(tmp_path / "streamed.flac"), samples)
    assert audio_seconds(tmp_path / "streamed.flac") == 1.5
    flac[22:26] = (len(samples) + 1).to_bytes(4, "big")
    assert reason(bytes(flac)) == "unreadable"


def test_unusable_audio_is_refused() -> None:
    require_usable(noise(1.0), 16_000)
    with pytest.raises(AudioError, match=r"too_short: 0\.999"):
        require_usable(noise(1.0)[:-16], 16_000)
    dither = np.random.default_rng(0).integers(-2, 3, 16_000).astype(np.int16)
    for silence in (np.zeros(16_000, np.int16), dither, dither + np.int16(1000)):
        with pytest.raises(AudioError, match="silent"):
            require_usable(silence, 16_000)


def test_an_audio_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(AudioError("silent", "two\nlines")))
    assert (error.reason, error.detail) == ("silent", "two lines")


def wav_with_a_chunk_before_the_data(samples: np.ndarray) -> bytes:
    plain = encode_audio(samples, "wav")
    chunk = b"LIST" + (4).to_bytes(4, "little") + b"INFO"
    return plain[:4] + (len(plain) + 4).to_bytes(4, "little") + plain[8:36] + chunk + plain[36:]


@pytest.mark.parametrize("kind", ["wav", "flac", "wav with a chunk more"])
def test_a_segment_equals_that_part_of_the_whole(kind: str) -> None:
    samples = noise(2.0)
    data = wav_with_a_chunk_before_the_data(samples) if " " in kind else encode_audio(samples, kind)
    ranges = [(7001, 16_001), (0, 32_000), (0, 1), (31_999, 1)]
    for source in (data, memoryview(data)):
        for (start, length), segment in zip(ranges, read_segments(source, ranges), strict=True):
            assert segment.dtype == np.int16
            np.testing.assert_array_equal(segment, samples[start : start + length])
    for start, length in ((16_000, 16_001), (-1, 10), (32_000, 1)):
        with pytest.raises(AudioError, match="32000"):
            read_segments(data, [(0, 1), (start, length)])


def test_a_segment_of_a_damaged_file_is_an_error_not_noise() -> None:
    data = encode_audio(noise(2.0), "wav")
    with pytest.raises(AudioError):
        read_segments(data[:20_000], [(8_000, 8_000)])
    with pytest.raises(AudioError):
        read_segments(b"RIFF", [(0, 1)])
    flac = encode_audio(noise(2.0), "flac")
    with pytest.raises(AudioError):
        read_segments(flac[: len(flac) // 2], [(24_000, 8_000)])


def test_a_flipped_byte_in_flac_is_an_error() -> None:
    flac = bytearray(encode_audio(noise(2.0), "flac"))
    flac[len(flac) // 2] ^= 1
    with pytest.raises(AudioError):
        read_segments(bytes(flac), [(0, 32_000)])


def test_a_stored_member_of_another_form_is_a_fault(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, noise(1.0), 8_000, format="WAV")
    assert "8000 Hz" in str(stored_form_fault(buffer.getvalue(), 16_000))
    assert "decodes to 16000" in str(stored_form_fault(encode_audio(noise(1.0), "wav"), 16_001))
    assert "does not decode" in str(stored_form_fault(b"fLaC", 1))
