"""Speed perturbation: exact lengths, one speed an utterance, and the same for any number of ranks."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor
from training_runs import CEL, ENVIRONMENT, write_config

from cel_dist.config import Config
from cel_dist.config_file import parse_config
from cel_dist.data.speed import SpeedPerturbation

SPEEDS = (0.9, 1.0, 1.1)
BATCH = 16
PLACE = {"epoch": 2, "step": 5, "batch_size": BATCH}


def configured(**augment: object) -> Config:
    tree = {"data": {"shards": "s", "segment_frames": 20}, "augment": {"profile": 0, **augment}}
    return parse_config(tree, "test")


def perturbation(config: Config, seed: int = 0) -> SpeedPerturbation:
    return SpeedPerturbation(config.augment.speeds, config.segment_samples, seed)


def segments(num_samples: int) -> Tensor:
    """Sines of 500 Hz, int16 [K, 2, R]."""
    wave = 8000 * np.sin(2 * np.pi * 500 * np.arange(num_samples) / 16000)
    return torch.from_numpy(wave.astype(np.int16)).expand(BATCH, 2, num_samples).contiguous()


def frequency(wave: Tensor) -> float:
    spectrum = torch.fft.rfft(wave * torch.hann_window(len(wave)), 1 << 17).abs()
    return float(spectrum.argmax()) * 16000 / (1 << 17)


@pytest.mark.parametrize("speeds", [SPEEDS, (0.5, 2.0), (0.93,), (1.07, 1.0), (0.8, 0.9)])
def test_every_speed_gives_segments_of_the_length_asked_for_and_no_end_is_made_up(speeds) -> None:
    config = configured(speeds=speeds)
    module, ones = perturbation(config), torch.full((BATCH, 2, config.read_samples), 1000, dtype=torch.int16)
    played = module(ones, rows=slice(0, BATCH), **PLACE)
    assert played.shape == (BATCH, 2, config.segment_samples)
    assert played.dtype == torch.float32
    # A constant stays one, but for the filter's half width of 6 samples at the ends of what was read.
    torch.testing.assert_close(played[..., 16:-16], torch.full_like(played[..., 16:-16], 1000.0), rtol=1e-2, atol=0)


def test_a_faster_voice_is_higher_by_its_speed() -> None:
    config = configured(speeds=SPEEDS)
    module, place = perturbation(config), {"rows": slice(0, BATCH), **PLACE}
    played, chosen = module(segments(config.read_samples), **place), module.drawn(**place)
    assert set(chosen.tolist()) == {0, 1, 2}
    for row, number in enumerate(chosen):
        for view in range(2):
            assert frequency(played[row, view]) == pytest.approx(500 * SPEEDS[number], abs=1)
    unchanged = int(np.flatnonzero(chosen == 1)[0])
    assert torch.equal(played[unchanged], segments(config.segment_samples)[unchanged].float())


def test_the_speeds_are_drawn_alike_and_from_seed_epoch_and_step_alone() -> None:
    module = perturbation(configured(speeds=SPEEDS))
    place = {"epoch": 0, "step": 0, "rows": slice(0, 30_000), "batch_size": 30_000}
    chosen = module.drawn(**place)
    np.testing.assert_allclose(np.bincount(chosen) / len(chosen), 1 / 3, atol=0.01)
    assert np.array_equal(chosen, module.drawn(**place))
    others = (module.drawn(**{**place, "epoch": 1}), module.drawn(**{**place, "step": 1}))
    for other in (*others, perturbation(configured(speeds=SPEEDS), seed=1).drawn(**place)):
        assert not np.array_equal(chosen, other)


def test_a_row_is_played_alike_whichever_rank_holds_it() -> None:
    config = configured(speeds=SPEEDS)
    module, whole = perturbation(config), segments(config.read_samples)
    expected = module(whole, rows=slice(0, BATCH), **PLACE)
    halves = [module(whole[rows], rows=rows, **PLACE) for rows in (slice(0, 8), slice(8, 16))]
    torch.testing.assert_close(torch.cat(halves), expected, rtol=0, atol=1e-2)


def test_without_speeds_segments_pass_as_they_are() -> None:
    config = configured()
    assert config.read_samples == config.segment_samples
    wave = segments(config.read_samples)
    assert torch.equal(perturbation(config)(wave, rows=slice(0, BATCH), **PLACE), wave)


def test_so_much_is_read_as_the_highest_speed_takes() -> None:
    assert configured(speeds=SPEEDS).read_samples == 3784  # 1.1 times 3440
    assert configured(speeds=[1.07, 0.9]).read_samples == 3681  # 3680.8
    assert configured(speeds=[0.9]).read_samples == 3096


def test_only_other_speeds_need_torchaudio(small_corpus, tmp_path) -> None:
    """Its native part is linked with CUDA: beside a CPU build of torch, pip's torchaudio cannot be imported."""
    broken = tmp_path / "site" / "torchaudio"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise OSError('Could not load this library: _torchaudio.abi3.so')")
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(broken.parent), *sys.path])}

    def trained(*settings: str) -> subprocess.CompletedProcess[str]:
        command = [*CEL, "train", str(write_config(small_corpus, tmp_path)), "train.max_steps=2", *settings]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    done = trained("augment.speeds=[0.9, 1.0]", f"run.dir={tmp_path}/other")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: augment.speeds needs torchaudio, which cannot be imported")
    done = trained()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 steps")
