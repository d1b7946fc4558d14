"""The control tells a list of recordings from a list of voices, and `cel evaluate` reports it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cel_dist.cli.app import run
from cel_dist.data.audio import encode_audio
from cel_dist.encoders import build_encoder
from cel_dist.evaluation import Diagnostics, Trials, score_without_voice
from cel_dist.evaluation.control import Control
from cel_dist.evaluation.diagnostics import verdict
from cel_dist.model import EncoderDescription, ModelDescription, SpeakerModel

SPEAKERS, UTTERANCES, SAMPLES = 6, 4, 16_000


def write_corpus(folder: Path, *, own_background: bool) -> Path:
    """Loud bursts of one and the same "voice" over a background that each speaker has to itself, or all share."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    bins = SAMPLES // 2 + 1
    for speaker in range(SPEAKERS):
        gains = np.exp(1.5 * np.interp(np.arange(bins), np.linspace(0, bins, 12), rng.standard_normal(12)))
        for utterance in range(UTTERANCES):
            noise = np.fft.rfft(rng.standard_normal(SAMPLES)) * (gains if own_background else 1.0)
            background = np.fft.irfft(noise, SAMPLES)
            # Speech of another length and place in every utterance, so that nothing but the background is shared.
            speech = rng.standard_normal(SAMPLES) * (np.sin(np.arange(SAMPLES) / 800 + rng.uniform(0, 6)) > -0.3)
            wave = 30 * background / background.std() + 3000 * speech
            (folder / f"{speaker}-{utterance}.wav").write_bytes(encode_audio(wave.astype(np.int16), "wav"))
    names = [f"{speaker}-{utterance}.wav" for speaker in range(SPEAKERS) for utterance in range(UTTERANCES)]
    lines = [f"{int(a[0] == b[0])} {a} {b}\n" for place, a in enumerate(names) for b in names[:place]]
    (folder / "trials.txt").write_text("".join(lines))
    table = [f"{name}\t{name[0]}\ts{int(name[2]) % 2}\t{'fm'[int(name[0]) % 2]}\t1.0\n" for name in names]
    (folder / "table.tsv").write_text("path\tspeaker\tsession\tsex\tseconds\n" + "".join(table))
    return folder


@pytest.fixture(scope="module")
def model() -> SpeakerModel:
    torch.manual_seed(0)
    description = ModelDescription(encoder=EncoderDescription(name="fast_resnet34", embedding_dim=32))
    return SpeakerModel(build_encoder("fast_resnet34", embedding_dim=32), description)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("own") / "corpus", own_background=True)


def test_a_background_of_its_own_gives_a_speaker_away(model: SpeakerModel, own: Path) -> None:
    trials = Trials.read(own / "trials.txt")
    rng = np.random.default_rng(0)
    scores = rng.standard_normal(len(trials)) + trials.labels
    found = score_without_voice(model, own, trials, scores, min_trials=1)
    assert found.spectrum_eer < 0.02
    assert found.whitened_eer < 0.02
    assert not found.is_clearly_below
    assert "not clearly below" in verdict(found)
    assert found.control_eer == min(found.spectrum_eer, found.whitened_eer, found.quiet_model_eer)
    # Not even a model without errors shows on this list that it hears voices.
    perfect = score_without_voice(model, own, trials, trials.labels.astype(np.float64), min_trials=1)
    assert (perfect.model_eer, perfect.is_clearly_below) == (0, False)


def test_a_shared_background_gives_nobody_away(model: SpeakerModel, tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "shared", own_background=False)
    trials = Trials.read(folder / "trials.txt")
    rng = np.random.default_rng(0)
    # A model that hears voices: targets are far above non-targets.
    scores = rng.standard_normal(len(trials)) + 6.0 * trials.labels
    found = score_without_voice(model, folder, trials, scores, min_trials=10)
    for rate in (found.spectrum_eer, found.whitened_eer, found.quiet_model_eer):
        assert 0.35 < rate < 0.65
    assert found.is_clearly_below
    assert "less than half" in verdict(found)
    # Where the control is at chance, the model is not.
    assert found.matched is not None
    assert found.matched.trials >= 20
    assert 0.4 < found.matched.control_eer < 0.6
    assert found.matched.model_eer < 0.05
    assert found.correlation_targets is not None
    assert abs(found.correlation_targets) < 0.5


def test_a_model_that_follows_the_control_is_at_chance_on_matched_trials() -> None:
    from cel_dist.evaluation.control import _on_matched_trials

    rng = np.random.default_rng(0)
    labels = np.repeat(np.array([1, 0], np.int8), 2000)
    control = rng.standard_normal(4000) + 1.5 * labels
    channel = control + 0.05 * rng.standard_normal(4000)
    voice = rng.standard_normal(4000) + 4.0 * labels
    followed = _on_matched_trials(channel, control, labels, 100)
    heard = _on_matched_trials(voice, control, labels, 100)
    assert followed is not None
    assert heard is not None
    assert followed.trials == heard.trials > 1000
    assert abs(followed.control_eer - 0.5) < 0.03
    assert abs(followed.model_eer - 0.5) < 0.04
    assert heard.model_eer < 0.05
    assert _on_matched_trials(voice, control, labels, 5000) is None
    # Nothing in common, nothing to match.
    assert _on_matched_trials(voice, labels + 0.0, labels, 1) is None


def test_the_model_hears_nothing_of_the_frames_that_are_left_out(model: SpeakerModel, own: Path) -> None:
    log_mel = model.log_mel(own / "0-0.wav")
    chosen = log_mel[:, :30]
    alone = model.embed_log_mel(chosen)
    assert alone.shape == (32,)
    assert np.linalg.norm(alone) == pytest.approx(1, abs=1e-6)
    # All frames of the file are its embedding: the two ways into the encoder are one.
    np.testing.assert_allclose(model.embed_log_mel(log_mel), model.embed(own / "0-0.wav"), atol=1e-6)
    # The level and the channel of what is left are normalised away with it, as ever.
    np.testing.assert_allclose(model.embed_log_mel(chosen + 3.0), alone, atol=1e-3)


def test_cel_evaluate_reports_groups_and_control(
    model: SpeakerModel, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save(tmp_path / "model")
    arguments = ["evaluate", "--model", tmp_path / "model", "--trials", own / "trials.txt", "--root", own]
    arguments += ["--metadata", own / "table.tsv", "--control", "--out", tmp_path / "out"]
    assert run([str(argument) for argument in [*arguments, "--json"]]) == 0
    result = json.loads(capsys.readouterr().out)
    diagnostics = Diagnostics.model_validate(result["diagnostics"])
    assert Diagnostics.load(Path(result["diagnostics_file"])) == diagnostics
    assert Path(result["diagnostics_picture"]).stat().st_size > 0
    groups = {group.label: group for group in diagnostics.groups}
    assert groups["all trials"].eer is None
    assert (groups["all trials"].targets, groups["all trials"].non_targets) == (36, 240)
    assert (groups["same session"].targets, groups["different sessions"].targets) == (12, 24)
    assert groups["sex: female and male"].non_targets == 9 * 16
    assert isinstance(diagnostics.control, Control)
    assert diagnostics.control.whitened_eer < 0.02
    assert diagnostics.not_shown == ["errors by age: the metadata has no column 'age'"]


def test_faults_of_the_table_come_before_anything_is_embedded(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.tsv"
    table.write_text((own / "table.tsv").read_text().replace("3-2.wav", "3-9.wav"))
    arguments = ["evaluate", "--model", "absent", "--trials", own / "trials.txt", "--root", own]
    assert run([str(argument) for argument in [*arguments, "--metadata", table]]) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        f"error: {table} lacks 1 of the 24 utterances of the trials, the first is 3-2.wav; write paths there as in the "
        "trials\n"
    )
    assert captured.out == ""
