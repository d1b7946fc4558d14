"""The front end: equal to the published one, in fp32 whatever surrounds it."""

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from cel_dist.errors import CelError
from cel_dist.features import MIN_SAMPLES, LogMel, pieces, quietest_frames, segment_samples


def published_crop(path: Path) -> np.ndarray:
    """The first 29 040 samples; a shorter file is padded with zeros, half on either side."""
    wave, rate = soundfile.read(path, dtype="int16")
    assert rate == 16_000
    missing = max(0, segment_samples(180) - len(wave))
    wave = np.pad(wave, (missing // 2, missing - missing // 2))
    return wave[: segment_samples(180)].astype(np.float32)


def noise(num_samples: int = 29_040, seed: int = 0) -> Tensor:
    return 3000 * torch.randn(2, num_samples, generator=torch.Generator().manual_seed(seed))


def test_log_mel_equals_the_published_one(shared: Path) -> None:
    golden = np.load(shared / "golden" / "encoder.npz")
    waves = np.stack([published_crop(shared / "data" / "corpus" / name) for name in golden["files"]])
    features = LogMel()(torch.from_numpy(waves))
    np.testing.assert_allclose(features.numpy(), golden["log_mel"], rtol=1e-4, atol=1e-4)


def test_a_segment_of_180_frames_gives_182_because_frames_are_centred() -> None:
    assert segment_samples(180) == 29_040
    assert LogMel()(noise()).shape == (2, 40, 182)


def test_every_band_has_zero_mean_and_unit_variance_over_time() -> None:
    features = LogMel()(noise())
    torch.testing.assert_close(features.mean(-1), torch.zeros(2, 40), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.var(-1, correction=0), torch.ones(2, 40), atol=1e-3, rtol=0)


def test_features_do_not_depend_on_the_level_of_speech() -> None:
    torch.testing.assert_close(LogMel()(noise()), LogMel()(noise() / 10), atol=1e-3, rtol=0)


def test_features_are_fp32_under_autocast_and_for_integer_samples() -> None:
    wave = noise().round()
    expected = LogMel()(wave)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = LogMel()(wave)
    assert torch.equal(under_autocast, expected)
    assert torch.equal(LogMel()(wave.to(torch.int16)), expected)


def test_a_batch_of_any_size_gives_each_row_the_same_bits() -> None:
    waves = torch.cat([noise(seed=seed) for seed in range(12)])
    row_by_row = torch.cat([LogMel()(wave[None]) for wave in waves])
    assert torch.equal(LogMel()(waves), row_by_row)


def test_silence_is_finite() -> None:
    assert torch.isfinite(LogMel()(torch.zeros(1, 4000))).all()


def test_too_short_a_waveform_is_refused_and_the_shortest_accepted() -> None:
    with pytest.raises(CelError, match="256 samples is too short"):
        LogMel()(noise(MIN_SAMPLES - 1))
    assert LogMel()(noise(MIN_SAMPLES)).shape == (2, 40, 2)


@pytest.mark.parametrize("num_samples", [MIN_SAMPLES, 1599, 1600, 1600 + MIN_SAMPLES - 1, 1600 + MIN_SAMPLES, 5000])
def test_pieces_of_a_waveform_have_the_frames_of_the_whole(num_samples: int) -> None:
    wave = noise(num_samples)[0]
    whole = LogMel().log_mel(wave)
    parts = [LogMel().log_mel(piece) for piece in pieces(wave, frames=10)]
    assert all(part.shape[-1] == 10 for part in parts[:-1])
    joined = torch.cat(parts, dim=-1)
    assert joined.shape == whole.shape
    # Windows of 400 samples reach into the neighbouring part at the three frames around a joint, and nowhere else.
    starts = torch.arange(10, 10 * len(parts), 10)
    inner = torch.ones(whole.shape[-1], dtype=torch.bool)
    inner[torch.cat([starts - 1, starts, starts + 1]).clamp(max=len(inner) - 1)] = False
    torch.testing.assert_close(joined[:, inner], whole[:, inner])


def test_the_quietest_frames_are_those_between_the_bursts() -> None:
    wave = noise(32_000)[0]
    is_quiet = (torch.arange(32_000) // 3200) % 2 == 1
    wave[is_quiet] /= 100
    wave[6400:9600] = 0
    log_mel = LogMel().log_mel(wave)
    chosen = quietest_frames(log_mel, 0.25)
    # 20 frames of zeros are passed over, but for those at the edges whose windows reach into sound.
    is_silent = (log_mel == log_mel.min()).all(dim=0)
    assert 15 <= int(is_silent.sum()) <= 20
    assert len(chosen) == round(0.25 * int((~is_silent).sum()))
    assert not is_silent[chosen].any()
    assert is_quiet[chosen.clamp(max=199) * 160].float().mean() > 0.9
    assert (chosen.diff() > 0).all()
    # Few frames have all to be taken, and none of nothing.
    assert len(quietest_frames(log_mel[:, :9], 0.1)) == 9
    assert len(quietest_frames(LogMel().log_mel(torch.zeros(4000)), 0.1)) == 0


@pytest.mark.parametrize("num_mels", [40, 80])
def test_features_are_the_same_bits_where_torchaudio_cannot_be_loaded(num_mels, tmp_path, monkeypatch):
    wave = 3000 * torch.randn(2, 12_345, generator=torch.Generator().manual_seed(1))
    usual = LogMel(num_mels)
    # What its wheel does beside a CPU build of torch.
    (tmp_path / "torchaudio").mkdir()
    (tmp_path / "torchaudio" / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
        monkeypatch.delitem(sys.modules, name)
    without = LogMel(num_mels)
    assert type(without.mel_scale).__module__ == "cel_dist.mel"
    assert without.state_dict().keys() == usual.state_dict().keys()
    assert torch.equal(without(wave), usual(wave))
    assert torch.equal(without.log_mel(wave[0]), usual.log_mel(wave[0]))
