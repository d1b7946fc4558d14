"""Calibration: durations as a quality measure, what a model keeps of it, and on which list it is judged."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from cel_dist.back_end import BackEnd
from cel_dist.data.audio import audio_seconds, encode_audio
from cel_dist.description import Calibration
from cel_dist.encoders import build_encoder
from cel_dist.errors import CelError
from cel_dist.evaluation import BackEndSettings, BootstrapSettings, diagnose, evaluate, fit_calibration
from cel_dist.evaluation.cutting import Cutting
from cel_dist.metrics import act_dcf, cllr
from cel_dist.model import EncoderDescription, ModelDescription, SpeakerModel, load_model

DIMENSION = 16


@pytest.fixture(scope="module")
def model() -> SpeakerModel:
    torch.manual_seed(0)
    encoder = EncoderDescription(name="fast_resnet34", embedding_dim=DIMENSION)
    return SpeakerModel(build_encoder("fast_resnet34", embedding_dim=DIMENSION), ModelDescription(encoder=encoder))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three speakers in folders of their own, three utterances each; two lists of trials and a cohort."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    for speaker in range(3):
        for number in range(3):
            samples = 16 * int(generator.integers(150, 900))
            wave = (2000 * generator.standard_normal(samples)).astype(np.int16)
            path = folder / f"id{speaker}" / f"{number}.wav"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(encode_audio(wave, "wav"))
    pairs = [(a, b) for a in range(9) for b in range(a + 1, 9)]
    lines = [f"{int(a // 3 == b // 3)} id{a // 3}/{a % 3}.wav id{b // 3}/{b % 3}.wav\n" for a, b in pairs]
    (folder / "fit.txt").write_text("".join(lines[::2]))
    (folder / "test.txt").write_text("".join(lines[1::2]))
    (folder / "cohort.txt").write_text("".join(f"id2/{number}.wav\n" for number in range(3)))
    return folder


def drawn(num_trials: int = 20_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores whose log-likelihood ratio is 10 (score + 1) + log(seconds / 4): short pairs look less alike."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, num_trials)
    seconds = np.exp(generator.normal(np.log(4), 0.7, num_trials))
    scores = generator.normal(-1.2 + 0.4 * labels, 0.2) - 0.1 * np.log(seconds / 4)
    return scores, labels, seconds


def test_durations_recover_the_logistic_that_scores_were_drawn_from():
    scores, labels, seconds = drawn()
    calibration = fit_calibration(scores, labels, seconds)
    assert calibration.quality == "duration"
    assert calibration.slope == pytest.approx(10, rel=0.04)
    assert calibration.duration_slope == pytest.approx(1, rel=0.1)
    assert calibration.reference_seconds == pytest.approx(4, rel=0.02)
    assert calibration.probability(-1, seconds=4) == pytest.approx(0.5, abs=0.02)
    other_scores, other_labels, other_seconds = drawn(seed=1)
    plain = fit_calibration(scores, labels)
    with_durations = calibration.log_likelihood_ratios(other_scores, other_seconds)
    without = plain.log_likelihood_ratios(other_scores)
    assert cllr(with_durations, other_labels) < cllr(without, other_labels) - 0.02


def test_durations_that_are_all_the_same_change_nothing():
    scores, labels, _ = drawn(2000)
    plain, with_durations = fit_calibration(scores, labels), fit_calibration(scores, labels, np.full(2000, 3.3))
    assert with_durations.duration_slope == 0
    assert with_durations.slope == pytest.approx(plain.slope, rel=1e-9)
    with pytest.raises(CelError, match="the duration of trial 1 is not positive"):
        fit_calibration([0.1, 0.2], [0, 1], [1.0, 0.0])


def test_a_compensated_score_stands_for_the_same_ratio_at_the_usual_duration():
    calibration = Calibration(slope=5, offset=1, quality="duration", duration_slope=2, reference_seconds=4)
    scores, seconds = np.array([-1.0, -0.5]), np.array([1.0, 8.0])
    ratios = calibration.log_likelihood_ratios(scores, seconds)
    np.testing.assert_allclose(ratios, 5 * scores + 1 + 2 * np.log(seconds / 4), rtol=1e-12)
    usual = calibration.compensated(scores, seconds)
    np.testing.assert_allclose(calibration.log_likelihood_ratios(usual, np.full(2, 4.0)), ratios, rtol=1e-12)
    with pytest.raises(CelError, match="depend on the duration"):
        calibration.probability(-1.0)


def test_a_model_calibrated_with_durations_decides_by_them(model, corpus, tmp_path):
    result = evaluate(model, corpus / "fit.txt", corpus, quality="duration")
    result.calibrate(model).save(tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    calibration = loaded.description.calibration
    assert calibration == result.calibration
    assert calibration.quality == "duration"
    a, b = corpus / "id0/0.wav", corpus / "id1/2.wav"
    seconds = min(audio_seconds(a), audio_seconds(b))
    answer = loaded.verify(a, b)
    expected = calibration.slope * answer.score + calibration.offset
    expected += calibration.duration_slope * np.log(seconds / calibration.reference_seconds)
    assert answer.probability == pytest.approx(1 / (1 + np.exp(-expected)), rel=1e-9)
    # The threshold is that of the usual duration, moved to this one: the same probability on either side.
    at_threshold = calibration.probability(answer.threshold, seconds)
    usual = calibration.probability(loaded.description.threshold, calibration.reference_seconds)
    assert at_threshold == pytest.approx(usual, rel=1e-6)
    assert answer.same == (answer.score >= answer.threshold)
    samples = torch.frombuffer(bytearray(a.read_bytes()[44:]), dtype=torch.int16)
    assert loaded.verify(samples, b) == answer
    with pytest.raises(CelError, match="give audio, not embeddings"):
        loaded.verify(loaded.embed(a), b)


def test_parts_of_a_list_are_decided_as_a_user_of_the_model_decides(model, corpus):
    result = evaluate(model, corpus / "fit.txt", corpus, quality="duration")
    seconds = {name: audio_seconds(corpus / name) for name in result.trials.files}
    shorter = [
        min(seconds[result.trials.files[side]] for side in pair)
        for pair in zip(result.trials.enrol, result.trials.test, strict=True)
    ]
    accepted = result.calibration.compensated(result.scores, np.array(shorter)) >= result.threshold
    assert (accepted != (result.scores >= result.threshold)).any()
    everything = diagnose(result, min_trials=1).groups[0]
    assert everything.false_rejects == pytest.approx((~accepted)[result.labels == 1].mean())
    assert everything.false_accepts == pytest.approx(accepted[result.labels == 0].mean())
    assert everything.eer == result.eer


def test_an_evaluation_says_whether_the_calibration_knew_its_trials(model, corpus, tmp_path):
    fitted = evaluate(model, corpus / "fit.txt", corpus)
    assert fitted.summary()["calibration_fitted_on"] == "these trials"
    fitted.calibrate(model).save(tmp_path / "m")
    calibrated = load_model(tmp_path / "m")
    again = evaluate(calibrated, corpus / "fit.txt", corpus).summary()
    assert again["calibration_fitted_on"] == "these trials"
    held_out = evaluate(calibrated, corpus / "test.txt", corpus)
    summary = held_out.summary()
    assert summary["calibration_fitted_on"] == "fit.txt"
    ratios = fitted.calibration.log_likelihood_ratios(held_out.scores)
    assert summary["cllr"] == pytest.approx(cllr(ratios, held_out.labels), rel=1e-12)
    assert summary["act_dcf"]["0.05"] == pytest.approx(act_dcf(ratios, held_out.labels, 0.05), rel=1e-12)
    assert summary["min_cllr"] <= summary["cllr"]
    # Of other scores the stored calibration knows nothing.
    cosine = BackEndSettings(scoring="cosine")
    for settings in (
        {"cutting": Cutting(frames=20, windows=2)},
        {"cutting": Cutting(segment_seconds=1)},
        {"back_end": cosine},
        {"quality": "duration"},
    ):
        other = evaluate(calibrated, corpus / "test.txt", corpus, **settings)
        assert other.summary()["calibration_fitted_on"] == "these trials"


@pytest.mark.parametrize(("score_norm", "subtract_mean"), [(None, False), (None, True), ("z", False), ("as", True)])
def test_a_stored_back_end_scores_as_the_evaluation_did(model, corpus, tmp_path, score_norm, subtract_mean):
    needs_cohort = subtract_mean or score_norm
    settings = BackEndSettings(
        scoring="cosine",
        subtract_mean=subtract_mean,
        score_norm=score_norm,
        cohort=corpus / "cohort.txt" if needs_cohort else None,
        top_n=2,
    )
    result = evaluate(model, corpus / "fit.txt", corpus, back_end=settings)
    plain = evaluate(model, corpus / "fit.txt", corpus)
    assert not np.allclose(result.scores, plain.scores)
    result.calibrate(model).save(tmp_path / "m")
    expected = {"encoder.safetensors", "model.json"} | ({"back_end.safetensors"} if needs_cohort else set())
    assert {entry.name for entry in (tmp_path / "m").iterdir()} == expected
    loaded = load_model(tmp_path / "m")
    assert loaded.back_end == result.back_end
    files, trials = result.trials.files, result.trials
    pair = [corpus / files[trials.enrol[0]], corpus / files[trials.test[0]]]
    assert loaded.score(*pair) == pytest.approx(result.scores[0], rel=1e-5, abs=1e-6)
    assert loaded.verify(*pair).threshold == result.threshold
    again = evaluate(loaded, corpus / "fit.txt", corpus)
    np.testing.assert_allclose(again.scores, result.scores, rtol=1e-5, atol=1e-6)
    # What was stored goes on into the next model.
    again.calibrate(loaded).save(tmp_path / "again")
    assert load_model(tmp_path / "again").back_end == result.back_end
    stored = load_model(tmp_path / "again").description.back_end
    assert (stored.cohort if stored else None) == ("cohort.txt" if needs_cohort else None)


def test_a_cohort_in_the_trials_is_warned_of_and_speakers_are_averaged(model, corpus, tmp_path, caplog):
    settings = BackEndSettings(score_norm="s", cohort=corpus / "cohort.txt")
    evaluate(model, corpus / "fit.txt", corpus, back_end=settings)
    assert "3 of 3 utterances of the cohort" in caplog.text
    listed = tmp_path / "speakers.txt"
    listed.write_text("".join(f"id{speaker}/{n}.wav id{speaker}\n" for speaker in range(3) for n in range(3)))
    settings = BackEndSettings(score_norm="s", cohort=listed, cohort_root=corpus)
    result = evaluate(model, corpus / "fit.txt", corpus, back_end=settings)
    assert result.back_end.cohort.shape == (3, DIMENSION)


@pytest.mark.parametrize(
    ("lines", "settings", "message"),
    [
        ("id2/0.wav\n", {}, "has one utterance, and the score norm 's' needs a cohort of at least two"),
        ("id2/0.wav a\nid2/1.wav a\n", {}, "has one speaker"),
        ("id2/0.wav a\nid2/1.wav b\n", {"cutting": Cutting(frames=20, windows=2)}, "leave out --frames"),
        ("id2/0.wav\nid2/1.wav\n", {"bootstrap": BootstrapSettings(50)}, "50 replicates"),
        (
            "".join(f"id{n // 3}/{n % 3}.wav x\n" for n in range(9)),
            {"bootstrap": BootstrapSettings(100, speakers=Path("list.txt")), "back_end": None},
            "all utterances are of one speaker",
        ),
    ],
)
def test_lists_that_cannot_serve_are_refused_before_anything_is_embedded(
    model, corpus, tmp_path, monkeypatch, lines, settings, message
):
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text(lines)
    monkeypatch.setattr(SpeakerModel, "encode", lambda *_: pytest.fail("something was embedded"))
    asked = {"back_end": BackEndSettings(score_norm="s", cohort=Path("list.txt")), **settings}
    with pytest.raises(CelError, match=message):
        evaluate(model, corpus / "fit.txt", corpus, **asked)


def test_windows_are_normalised_by_windows_and_not_by_a_stored_cohort(model, corpus):
    settings = BackEndSettings(score_norm="s", cohort=corpus / "cohort.txt")
    result = evaluate(model, corpus / "fit.txt", corpus, back_end=settings, cutting=Cutting(frames=20, windows=2))
    assert result.back_end.cohort.shape == (3, 2, DIMENSION)
    normed = SpeakerModel(model.encoder, model.description, BackEnd(score_norm="s", cohort=np.eye(DIMENSION)[:4]))
    with pytest.raises(CelError, match="says nothing of windows"):
        evaluate(normed, corpus / "fit.txt", corpus, cutting=Cutting(frames=20))


def test_a_back_end_that_is_missing_or_of_another_model_is_refused(model, corpus, tmp_path):
    settings = BackEndSettings(score_norm="s", cohort=corpus / "cohort.txt")
    result = evaluate(model, corpus / "fit.txt", corpus, back_end=settings)
    result.calibrate(model).save(tmp_path / "m")
    description = tmp_path / "m" / "model.json"
    whole = json.loads(description.read_text())
    description.write_text(json.dumps({**whole, "back_end": {**whole["back_end"], "mean_subtracted": True}}))
    with pytest.raises(CelError, match=r"back_end\.safetensors is not the back end"):
        load_model(tmp_path / "m")
    description.write_text(json.dumps(whole))
    cohort = result.back_end.cohort
    for wrong, message in (
        (cohort[:, :-1], "is not the back end"),
        (cohort[:, None], "is not the back end"),
        (cohort * np.nan, "not finite"),
    ):
        save_file({"cohort": np.ascontiguousarray(wrong)}, tmp_path / "m" / "back_end.safetensors")
        with pytest.raises(CelError, match=message):
            load_model(tmp_path / "m")
    (tmp_path / "m" / "back_end.safetensors").unlink()
    with pytest.raises(CelError, match=r"back_end\.safetensors is missing"):
        load_model(tmp_path / "m")


def test_models_of_the_first_format_still_load(model, tmp_path):
    model.calibrate(-0.9, Calibration(slope=3.0, offset=2.5)).save(tmp_path / "m")
    path = tmp_path / "m" / "model.json"
    tree = json.loads(path.read_text())
    del tree["back_end"]
    first = {**tree, "version": 1, "calibration": {"slope": 3.0, "offset": 2.5}}
    path.write_text(json.dumps(first))
    loaded = load_model(tmp_path / "m")
    assert (loaded.description.threshold, loaded.back_end) == (-0.9, BackEnd())
    assert loaded.description.calibration == Calibration(slope=3.0, offset=2.5)
    loaded.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model.json").read_text())["version"] == 2


def test_priors_and_intervals_are_in_the_summary(model, corpus):
    result = evaluate(
        model, corpus / "fit.txt", corpus, priors=("0.2", "0.001"), bootstrap=BootstrapSettings(100, seed=3)
    )
    summary = json.loads(json.dumps(result.summary()))
    assert set(summary["min_dcf"]) == set(summary["act_dcf"]) == set(summary["min_dcf_interval"]) == {"0.2", "0.001"}
    assert summary["eer_interval"][0] <= summary["eer"] <= summary["eer_interval"][1]
    assert summary["bootstrap"] == {"level": 0.95, "replicates": 100, "speakers": 3, "seed": 3}
    for prior in ("1", "much"):
        with pytest.raises(CelError, match=f"the prior '{prior}'"):
            evaluate(model, corpus / "fit.txt", corpus, priors=(prior,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score_norm": "z"}, "the score norm 'z' needs a cohort"),
        ({"subtract_mean": True}, "the mean to subtract needs a cohort"),
        ({"cohort": Path("list.txt")}, "a cohort alone changes nothing"),
        ({"score_norm": "as", "cohort": Path("list.txt"), "top_n": 1}, "top_n=1"),
    ],
)
def test_back_ends_that_cannot_be_made_are_refused(settings, message):
    with pytest.raises(CelError, match=message):
        BackEndSettings(**settings)


def test_durations_come_from_the_header_or_from_decoding(tmp_path, monkeypatch):
    wave = np.random.default_rng(0).integers(-9000, 9000, 12_345).astype(np.int16)
    for suffix in ("wav", "flac"):
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(encode_audio(wave, suffix))
        assert audio_seconds(path) == 12_345 / 16_000
    monkeypatch.setattr("cel_dist.data.audio._LONGEST_FRAMES", 0)
    assert audio_seconds(tmp_path / "a.wav") == 12_345 / 16_000
