"""The front end: equal to the published one, in fp32 whatever surrounds it."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from cel_dist.errors import CelError
from cel_dist.features import MIN_SAMPLES, LogMel, segment_samples


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
