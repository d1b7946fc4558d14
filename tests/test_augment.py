import numpy as np
import pytest
import soundfile
import torch
from scipy import signal

from cel_dist.config_sections import AugmentSection
from cel_dist.data.augment import Augment, Choices, at_snr, convolve
from cel_dist.data.bank import Bank
from cel_dist.data.prepare_bank import prepare_bank
from cel_dist.errors import CelError

SAMPLES = 4000


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank")
    random = np.random.default_rng(0)
    for kind, count in (("noise", 3), ("speech", 2), ("music", 2), ("rir", 3)):
        (folder / "audio" / kind).mkdir(parents=True)
        for number in range(count):
            clip = random.standard_normal(6000 + 100 * number)
            if kind == "rir":
                clip = clip[:800] * np.exp(-np.arange(800) / 100)
            soundfile.write(folder / "audio" / kind / f"{number}.wav", 0.3 * clip / abs(clip).max(), 16000)
    prepare_bank(folder / "audio", folder / "bank", workers=1)
    return Bank.open(folder / "bank")


@pytest.fixture
def segments():
    return torch.from_numpy(np.random.default_rng(1).integers(-8000, 8000, (8, 2, SAMPLES)).astype(np.int16))


def augment(bank, segments, profile, *, seed=0, epoch=0, step=0, rows=slice(0, 8), **ranges):
    module = Augment(AugmentSection(profile=profile, **ranges), bank, seed)
    return module(segments[rows], epoch=epoch, step=step, rows=rows, batch_size=8)


def test_profile_0_only_changes_the_type(bank, segments):
    assert torch.equal(augment(bank, segments, 0), segments.float())


@pytest.mark.parametrize("profile", [1, 2, 3])
def test_choices_depend_on_seed_epoch_and_step_and_on_nothing_else(bank, segments, profile):
    base = augment(bank, segments, profile)
    assert torch.equal(base, augment(bank, segments, profile))
    for change in ({"seed": 1}, {"epoch": 1}, {"step": 1}):
        assert not torch.equal(base, augment(bank, segments, profile, **change))


@pytest.mark.parametrize("profile", [1, 2, 3])
def test_a_row_is_augmented_alike_whichever_rank_holds_it(bank, segments, profile):
    whole = augment(bank, segments, profile)
    halves = [augment(bank, segments, profile, rows=rows) for rows in (slice(0, 4), slice(4, 8))]
    # The FFT is as long as the longest response of the rank's own rows, so the last bits may differ.
    torch.testing.assert_close(torch.cat(halves), whole, rtol=1e-4, atol=0.1)


def test_a_row_is_augmented_alike_in_a_batch_that_is_worked_on_in_parts(bank):
    segments = torch.from_numpy(np.random.default_rng(1).integers(-8000, 8000, (40, 2, 29_040)).astype(np.int16))
    module = Augment(AugmentSection(profile=2), bank, 0)
    whole = module(segments, epoch=0, step=0, rows=slice(0, 40), batch_size=40)
    for row in (0, 17, 18, 39):
        alone = module(segments[row : row + 1], epoch=0, step=0, rows=slice(row, row + 1), batch_size=40)
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-4, atol=0.1)


def test_the_views_of_an_utterance_are_augmented_differently(bank, segments):
    segments[:, 1] = segments[:, 0]
    result = augment(bank, segments, 3)
    assert not torch.isclose(result[:, 0], result[:, 1]).all(dim=-1).any()


def test_noise_is_added_at_the_snr_asked_for(bank, segments):
    for snr in (0.0, 12.0):
        bounds = (snr, snr)
        noisy = augment(bank, segments, 1, noise_snr_db=bounds, speech_snr_db=bounds, music_snr_db=bounds)
        noise = noisy - segments.float()
        measured = 10 * torch.log10(segments.float().square().mean(-1) / noise.square().mean(-1))
        torch.testing.assert_close(measured, torch.full_like(measured, snr), atol=1e-2, rtol=0)


def test_snr_stays_in_the_published_range_of_some_category(bank, segments):
    noise = augment(bank, segments, 1) - segments.float()
    measured = 10 * torch.log10(segments.float().square().mean(-1) / noise.square().mean(-1))
    assert measured.min() > -0.1
    assert measured.max() < 20.1
    assert measured.std() > 1


def test_profile_2_gives_a_room_to_a_quarter_and_noise_to_the_rest():
    choices = Choices.draw(2, 20_000, seed=0, epoch=0, step=0)
    assert (choices.has_room ^ choices.has_noise).all()
    assert abs(choices.has_room.mean() - 0.25) < 0.01


def test_profile_3_gives_both_to_all():
    choices = Choices.draw(3, 100, seed=0, epoch=0, step=0)
    assert choices.has_room.all()
    assert choices.has_noise.all()


def test_convolution_equals_the_direct_sum():
    random = np.random.default_rng(2)
    wave, response = random.standard_normal((3, 500)), random.standard_normal((3, 120))
    expected = np.stack([signal.convolve(w, r)[:500] for w, r in zip(wave, response, strict=True)])
    result = convolve(torch.from_numpy(wave), torch.from_numpy(response)).numpy()
    np.testing.assert_allclose(result, expected, atol=1e-10)


def test_the_room_gain_is_ten_to_the_tenth_of_g(bank, segments):
    quiet = {"noise_snr_db": (90, 90), "speech_snr_db": (90, 90), "music_snr_db": (90, 90)}
    low = augment(bank, segments, 3, rir_gain_db=(-7, -7), **quiet)
    high = augment(bank, segments, 3, rir_gain_db=(3, 3), **quiet)
    ratio = (high.square().sum(-1) / low.square().sum(-1)).sqrt()
    torch.testing.assert_close(ratio, torch.full_like(ratio, 10.0), rtol=1e-3, atol=0)


def test_silence_stays_finite(bank):
    assert torch.isfinite(augment(bank, torch.zeros(8, 2, SAMPLES, dtype=torch.int16), 3)).all()
    assert torch.isfinite(at_snr(torch.ones(1, 10), torch.zeros(1, 10), torch.zeros(1))).all()


def test_a_bank_without_rooms_is_refused_where_rooms_are_needed(tmp_path):
    (tmp_path / "audio" / "noise").mkdir(parents=True)
    soundfile.write(
        tmp_path / "audio" / "noise" / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(16000), 16000
    )
    prepare_bank(tmp_path / "audio", tmp_path / "bank", workers=1)
    only_noise = Bank.open(tmp_path / "bank")
    Augment(AugmentSection(profile=1), only_noise, 0)
    with pytest.raises(CelError, match="room responses"):
        Augment(AugmentSection(profile=3), only_noise, 0)
