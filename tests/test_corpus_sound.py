"""Voices, channels, rooms, noises and music of the embedded corpus."""

import itertools

import numpy as np
import pytest

from cel_dist.corpus import espeak, music, noises, rooms, sentences, voices
from cel_dist.corpus.channel import draw_channel


def long_term_spectrum(wave: np.ndarray) -> np.ndarray:
    """[30] dB in bands a quarter octave wide, without the level."""
    frames = np.lib.stride_tricks.sliding_window_view(wave, 1024)[::512] * np.hanning(1024)
    power = (np.abs(np.fft.rfft(frames)) ** 2).mean(axis=0)
    edges = np.unique(np.round(np.geomspace(5, 480, 31)).astype(int))
    bands = np.array([10 * np.log10(power[low:high].mean() + 1e-9) for low, high in itertools.pairwise(edges)])
    return bands - bands.mean()


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
