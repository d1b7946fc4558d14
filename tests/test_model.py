"""A trained model: embedding, scoring, saving, loading, and what is refused."""

import json
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import cel_dist
from cel_dist.data.audio import encode_audio
from cel_dist.encoders import build_encoder
from cel_dist.errors import CelError, RunError
from cel_dist.model import (
    Calibration,
    EncoderDescription,
    ModelDescription,
    Provenance,
    SpeakerModel,
    load_model,
)

DIMENSION = 32


@pytest.fixture(scope="module")
def model() -> SpeakerModel:
    torch.manual_seed(0)
    encoder = build_encoder("fast_resnet34", embedding_dim=DIMENSION)
    description = ModelDescription(
        encoder=EncoderDescription(name="fast_resnet34", embedding_dim=DIMENSION),
        training=Provenance(
            config={"loss": {"t": 2.0}},
            step=7,
            epoch=1.5,
            metrics={"eer": 0.1, "loss": float("nan")},
            versions={"a": "1"},
        ),
    )
    return SpeakerModel(encoder, description)


def speech(seed: int, seconds: float = 0.3) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (3000 * generator.standard_normal(int(16000 * seconds))).clip(-32768, 32767).astype(np.int16)


def test_path_and_all_kinds_of_waveform_give_the_same_unit_embedding(model, tmp_path):
    wave = speech(1)
    path = tmp_path / "a.wav"
    path.write_bytes(encode_audio(wave, "wav"))
    expected = model.embed(path)
    assert expected.shape == (DIMENSION,)
    assert expected.dtype == np.float32
    assert np.linalg.norm(expected) == pytest.approx(1, abs=1e-6)
    for same in (str(path), wave, torch.from_numpy(wave), wave / 32768, torch.from_numpy(wave).float() / 32768):
        np.testing.assert_array_equal(model.embed(same), expected)


def test_a_list_gives_one_row_an_utterance_and_the_order_is_kept(model):
    waves = [speech(1), speech(2, 0.7), speech(3, 0.4)]
    rows = model.embed(waves)
    assert rows.shape == (3, DIMENSION)
    for row, wave in zip(rows, waves, strict=True):
        np.testing.assert_array_equal(row, model.embed(wave))
    assert model.embed([]).shape == (0, DIMENSION)


def test_an_autocast_region_around_the_caller_changes_nothing(model):
    wave = speech(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = model.embed(wave)
    np.testing.assert_array_equal(inside, model.embed(wave))


def test_an_encoder_in_training_mode_is_put_into_evaluation_mode(model):
    encoder = build_encoder("fast_resnet34", embedding_dim=DIMENSION).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    SpeakerModel(encoder, model.description).embed(speech(1))
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


def test_windows_equal_the_published_crop_of_eval_mode(shared):
    # Some of these files are shorter than the window, so that the padding is checked too.
    golden = np.load(shared / "golden" / "encoder.npz")
    published = load_model(shared / "golden" / "published_format.model")
    expected = golden["embedding_eval_mode"]
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    found = [published.embed_windows(shared / "data" / "corpus" / name, 180, 1)[0] for name in golden["files"]]
    np.testing.assert_allclose(np.stack(found), expected, atol=1e-5)


def test_windows_start_evenly_and_are_truncated_to_integers(model):
    wave = speech(1, 0.5)
    length = 20 * 160 + 240
    rows = model.embed_windows(wave, frames=20, windows=4)
    starts = [int(number * (len(wave) - length) / 3) for number in range(4)]
    for row, start in zip(rows, starts, strict=True):
        np.testing.assert_allclose(row, model.embed(wave[start : start + length]), atol=1e-6)


def test_windows_of_short_audio_are_padded_half_and_half(model):
    wave = speech(1, 0.2)
    length = 30 * 160 + 240
    half = (length - len(wave)) // 2
    padded = np.pad(wave, half)
    rows = model.embed_windows(wave, frames=30, windows=3)
    np.testing.assert_allclose(rows, np.tile(model.embed(padded), (3, 1)), atol=1e-6)


def test_score_is_minus_the_distance_for_audio_and_for_embeddings(model):
    a, b = speech(1), speech(2)
    row_a, row_b = model.embed(a), model.embed(b)
    expected = -np.linalg.norm(row_a.astype(np.float64) - row_b)
    assert model.score(a, b) == pytest.approx(expected, rel=1e-5)
    assert model.score(row_a, torch.from_numpy(row_b)) == model.score(a, b)
    assert model.score(a, a) == 0


def test_verification_is_undecided_without_threshold_and_decides_with_one(model):
    a, b = speech(1), speech(2)
    undecided = model.verify(a, b)
    assert (undecided.probability, undecided.same, undecided.threshold) == (None, None, None)
    calibration = Calibration(slope=2.0, offset=1.0)
    strict = model.calibrate(-1e-9, calibration).verify(a, b)
    lenient = model.calibrate(undecided.score, calibration).verify(a, b)
    assert strict.same is False
    assert lenient.same is True
    assert lenient.probability == pytest.approx(1 / (1 + np.exp(-(2 * undecided.score + 1))), rel=1e-12)
    assert model.description.threshold is None


@pytest.mark.parametrize("score", [-1e300, 1e300])
def test_probability_of_an_extreme_score_does_not_overflow(score):
    assert Calibration(slope=5.0, offset=0.0).probability(score) == (score > 0)


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (np.ones(1599, np.int16), "at least 0.1 s"),
        (np.zeros(16000, np.int16), "silent"),
        (np.zeros(16000, np.float32), "silent"),
        (speech(1).reshape(2, -1), "give one channel"),
        (speech(1).astype(np.int32), "int32"),
        (np.full(16000, np.nan, np.float32), "not finite"),
        (3.5, "cannot embed a float"),
        (Path("/nowhere/a.wav"), "there is no audio file /nowhere/a.wav"),
    ],
)
def test_unusable_audio_is_refused_with_the_reason(model, audio, message):
    with pytest.raises(CelError, match=message):
        model.embed(audio)


def test_text_called_wav_is_refused_by_name(model, tmp_path):
    path = tmp_path / "text.wav"
    path.write_text("this is not audio")
    with pytest.raises(CelError, match=r"text\.wav cannot be read as audio"):
        model.embed(path)


def test_windows_need_a_frame_and_a_window(model):
    with pytest.raises(CelError, match="windows=0"):
        model.embed_windows(speech(1), frames=20, windows=0)


def test_an_encoder_that_has_diverged_is_a_failure_while_running(model):
    encoder = build_encoder("fast_resnet34", embedding_dim=DIMENSION)
    with torch.no_grad():
        encoder.projection.bias.fill_(float("nan"))
    with pytest.raises(RunError, match="not finite"):
        SpeakerModel(encoder, model.description).embed(speech(1))


def test_saved_and_loaded_model_is_bit_exact(model, tmp_path):
    model.calibrate(-0.9, Calibration(slope=3.0, offset=2.5)).save(tmp_path / "model")
    loaded = SpeakerModel.load_folder(tmp_path / "model")
    state = loaded.encoder.state_dict()
    for name, tensor in model.encoder.state_dict().items():
        assert torch.equal(state[name], tensor)
    np.testing.assert_array_equal(loaded.embed(speech(1)), model.embed(speech(1)))
    assert loaded.description.threshold == -0.9
    assert loaded.description.calibration == Calibration(slope=3.0, offset=2.5)
    training = loaded.description.training
    assert (training.step, training.epoch, training.config) == (7, 1.5, {"loss": {"t": 2.0}})
    assert np.isnan(training.metrics["loss"])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model"]
    assert sorted(entry.name for entry in (tmp_path / "model").iterdir()) == ["encoder.safetensors", "model.json"]


def test_both_files_of_a_model_have_the_usual_permissions(model, tmp_path):
    model.save(tmp_path / "m")
    (tmp_path / "usual").touch()
    for name in ("encoder.safetensors", "model.json"):
        assert (tmp_path / "m" / name).stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_saving_replaces_an_older_model(model, tmp_path):
    model.save(tmp_path / "model")
    model.calibrate(-0.5, Calibration(slope=1.0, offset=0.0)).save(tmp_path / "model")
    assert load_model(tmp_path / "model").description.threshold == -0.5
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_saving_never_removes_files_that_are_no_model(model, tmp_path):
    (tmp_path / "thesis.txt").write_text("three years")
    with pytest.raises(CelError, match=r"other files than a model \(first thesis.txt\)"):
        model.save(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "three years"


def test_a_write_that_fails_leaves_the_older_model_whole(model, tmp_path):
    model.save(tmp_path / "model")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(RunError, match="cannot write the model folder"):
            model.calibrate(-0.5, Calibration(slope=1.0, offset=0.0)).save(tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_model(tmp_path / "model").description.threshold is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_run_and_checkpoint_folders_are_models(model, tmp_path):
    model.save(tmp_path / "run" / "model")
    model.save(tmp_path / "run" / "checkpoints" / "step-00000010" / "model")
    expected = model.embed(speech(1))
    for place in ("run", "run/model", "run/checkpoints/step-00000010"):
        np.testing.assert_array_equal(cel_dist.load_model(tmp_path / place).embed(speech(1)), expected)


def test_a_run_without_best_model_names_its_newest_checkpoint(model, tmp_path):
    model.save(tmp_path / "checkpoints" / "step-00000010" / "model")
    model.save(tmp_path / "checkpoints" / "step-00000020" / "model")
    with pytest.raises(CelError, match=r"newest checkpoint is .*step-00000020;"):
        load_model(tmp_path)


def test_where_there_is_no_model_the_kinds_of_model_are_named(tmp_path):
    with pytest.raises(CelError, match=r"there is no model at /nowhere; give a run, checkpoint or model folder"):
        load_model("/nowhere")
    with pytest.raises(CelError, match=r"holds no model\.json"):
        load_model(tmp_path)


def test_a_part_of_a_model_points_to_its_folder(model, tmp_path):
    model.save(tmp_path / "m")
    with pytest.raises(CelError, match=f"give its folder {tmp_path / 'm'}"):
        load_model(tmp_path / "m" / "encoder.safetensors")


def test_weights_of_another_encoder_are_refused_by_name_and_tensor(model, tmp_path):
    model.save(tmp_path / "m")
    description = json.loads((tmp_path / "m" / "model.json").read_text())
    description["encoder"]["embedding_dim"] = 64
    (tmp_path / "m" / "model.json").write_text(json.dumps(description))
    with pytest.raises(CelError) as caught:
        load_model(tmp_path / "m")
    assert "another encoder than 'fast_resnet34' with 64 dimensions and pooling 'default': 2 tensors differ" in str(
        caught.value
    )
    assert "projection.weight has shape [32, 128] instead of [64, 128]" in str(caught.value)


@pytest.mark.parametrize("cut", [4, 1000, -1])
def test_truncated_weights_are_damaged(model, tmp_path, cut):
    model.save(tmp_path / "m")
    weights = tmp_path / "m" / "encoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    with pytest.raises(CelError, match=r"encoder\.safetensors is damaged"):
        load_model(tmp_path / "m")


def test_weights_with_a_garbled_header_are_damaged(model, tmp_path):
    model.save(tmp_path / "m")
    weights = tmp_path / "m" / "encoder.safetensors"
    weights.write_bytes(struct.pack("<Q", 2**60) + weights.read_bytes()[8:])
    with pytest.raises(CelError, match="is damaged"):
        load_model(tmp_path / "m")


def test_missing_weights_are_named(model, tmp_path):
    model.save(tmp_path / "m")
    (tmp_path / "m" / "encoder.safetensors").unlink()
    with pytest.raises(CelError, match=r"encoder\.safetensors is missing"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "format version 3, this cel_dist reads up to 2; update cel_dist"),
        ({"format": "other"}, "does not describe a model of this project"),
        ({"features": {"num_mels": 64}}, "'features.num_mels': Input should be 40 or 80"),
        ({"features": {"fft_size": 400}}, "fft_size=400, but this version computes fft_size=512"),
        ({"encoder": {"name": "tdnn", "embedding_dim": 32, "pooling": "mean"}}, "'encoder.pooling': Input should be"),
        ({"scoring": "plda"}, "'scoring'"),
        ({"encoder": {"name": "fast_resnet43", "embedding_dim": 32}}, "did you mean 'fast_resnet34'"),
        ({"encoder": {"name": "fast_resnet34"}}, "'encoder.embedding_dim': Field required"),
    ],
)
def test_descriptions_of_something_else_are_refused(model, tmp_path, change, message):
    model.save(tmp_path / "m")
    path = tmp_path / "m" / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CelError, match=message) as caught:
        load_model(tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_a_description_that_is_not_json_is_refused(model, tmp_path):
    model.save(tmp_path / "m")
    (tmp_path / "m" / "model.json").write_text('{"format": "cel_dist')
    with pytest.raises(CelError, match="is not valid JSON"):
        load_model(tmp_path / "m")


def test_a_registry_uri_is_looked_up_in_mlflow(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(CelError, match=r"cannot look up models:/nobody@champion: there is no database"):
        load_model("models:/nobody@champion")
