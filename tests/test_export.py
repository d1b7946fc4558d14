"""`cel models export`: files that run elsewhere and compute what the model does, or no files at all."""

import contextlib
import copy
import io
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from cel_dist.back_end import BackEnd
from cel_dist.cli.app import run
from cel_dist.data.audio import encode_audio
from cel_dist.encoders import build_encoder, ecapa_tdnn, registry
from cel_dist.encoders.fast_resnet34 import FastResNet34
from cel_dist.encoders.resnet34 import ResNet34
from cel_dist.errors import CelError, RunError
from cel_dist.export import FORMATS, export_model
from cel_dist.export.files import metadata
from cel_dist.export.network import ConvolutionalLogMel
from cel_dist.export.parity import TOLERANCE, probe
from cel_dist.features import LogMel
from cel_dist.model import Calibration, EncoderDescription, ModelDescription, SpeakerModel, load_model

DIMENSION = 32
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "deployment.md"


@pytest.fixture(scope="module", autouse=True)
def _shallow() -> Iterator[None]:
    """Every kind of block of the deep encoders once: tracing takes as long as there are blocks, and learns no more."""
    with pytest.MonkeyPatch.context() as patch:
        for encoder in (FastResNet34, ResNet34):
            # The first stage keeps the size, all others change it.
            patch.setattr(encoder, "layout", [(channels, 1, stride) for channels, _, stride in encoder.layout[:2]])
        patch.setattr(ecapa_tdnn, "_DILATIONS", (3,))
        patch.setattr(ecapa_tdnn, "_SCALE", 4)
        yield


def new_model(name: str = "fast_resnet34", pooling: str = "default", num_mels: int = 40) -> SpeakerModel:
    """An encoder as if trained: drawn, with running statistics that are not those it begins with."""
    torch.manual_seed(0)
    encoder = build_encoder(name, DIMENSION, pooling=pooling, num_mels=num_mels)
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    description = ModelDescription(
        encoder=EncoderDescription(name=name, embedding_dim=DIMENSION, pooling=pooling), features={"num_mels": num_mels}
    )
    return SpeakerModel(encoder, description)


def full_scale(waves: list[np.ndarray]) -> np.ndarray:
    return np.stack(waves).astype(np.float32) / 32768


@pytest.fixture(scope="module")
def model() -> SpeakerModel:
    scores = [new_model().score(probe(4000, seed), probe(5000, seed + 1)) for seed in (1, 2)]
    return new_model().calibrate(float(np.mean(scores)), Calibration(slope=3.0, offset=2.5))


@pytest.fixture(scope="module")
def exported(model: SpeakerModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """All three formats, by the command line, and what it prints."""
    folder = tmp_path_factory.mktemp("export")
    model.save(folder / "model")
    formats = [argument for name in FORMATS for argument in ("--format", name)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = run(["models", "export", str(folder / "model"), "--out", str(folder / "exported"), *formats, "--json"])
    assert code == 0
    return folder / "exported", json.loads(printed.getvalue())


@pytest.fixture(scope="module")
def session(exported: tuple[Path, dict[str, Any]]) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(exported[0] / "model.onnx", providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def program(exported: tuple[Path, dict[str, Any]]) -> nn.Module:
    return torch.export.load(exported[0] / "model.pt2").module()


@pytest.mark.parametrize("num_mels", [40, 80])
def test_features_by_convolution_are_those_of_the_front_end(num_mels):
    published, exportable = LogMel(num_mels), ConvolutionalLogMel(num_mels)
    for samples in (257, 1599, 1600, 1601, 12_345):
        waves = [probe(samples, seed) for seed in range(2)]
        expected = published(torch.from_numpy(np.stack(waves)))
        found = exportable(torch.from_numpy(full_scale(waves)))
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=1e-3)
        assert (found - expected).abs().mean() < 1e-5


def test_a_folder_holds_all_formats_and_says_how_near_they_are(model, exported):
    folder, said = exported
    assert sorted(path.name for path in folder.iterdir()) == [
        "encoder.safetensors",
        "model.json",
        "model.onnx",
        "model.pt2",
    ]
    assert said["files"] == {name: str(folder / file) for name, file in FORMATS.items()}
    assert said["embedding_dim"] == DIMENSION
    assert said["differences"].keys() == FORMATS.keys()
    assert said["differences"]["safetensors"] == 0
    assert all(difference < 1e-5 for difference in said["differences"].values())
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_an_exported_folder_is_a_model_with_its_threshold_and_calibration(model, exported):
    loaded = load_model(exported[0])
    assert loaded.description == model.description
    wave = probe(8000, 3)
    np.testing.assert_array_equal(loaded.embed(wave), model.embed(wave))


@pytest.mark.parametrize(("rows", "samples"), [(5, 1600), (1, 20_011), (2, 150_000)])
def test_onnx_and_torch_take_any_number_of_waveforms_of_any_length(model, program, session, rows, samples):
    waves = [probe(samples, 100 + row) for row in range(rows)]
    expected = model.embed(waves)
    (by_onnx,) = session.run(None, {"wave": full_scale(waves)})
    with torch.inference_mode():
        by_torch = program(torch.from_numpy(full_scale(waves))).numpy()
    for found in (by_onnx, by_torch):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_files_say_what_they_take(model, exported, session):
    said = session.get_modelmeta().custom_metadata_map
    assert said.items() >= metadata(model.description).items()
    assert (said["embedding_dim"], said["sample_rate_hz"], said["min_samples"]) == (str(DIMENSION), "16000", "1600")
    extra = {"metadata.json": ""}
    torch.export.load(exported[0] / "model.pt2", extra_files=extra)
    assert json.loads(extra["metadata.json"]) == metadata(model.description)
    (wave,), (embedding,) = session.get_inputs(), session.get_outputs()
    assert (wave.name, wave.shape) == ("wave", ["batch", "samples"])
    assert (embedding.name, embedding.shape) == ("embedding", ["batch", DIMENSION])


def test_files_do_not_hold_paths_of_the_machine_they_were_made_on(exported):
    for path in exported[0].iterdir():
        assert str(Path(__file__).parent.parent).encode() not in path.read_bytes(), path


def test_the_example_of_the_documentation_decides_as_cel_verify_does(model, exported, tmp_path):
    code = DOCUMENT.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line]) == 10
    (tmp_path / "exported").symlink_to(exported[0])
    for name, wave in (("enrol", probe(4000, 1)), ("test", probe(5000, 2))):
        (tmp_path / f"{name}.wav").write_bytes(encode_audio(wave, "wav"))
    verified = model.verify(tmp_path / "enrol.wav", tmp_path / "test.wav")
    shown = "import sys; print(sorted({'torch', 'cel_dist'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{shown}"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    words, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    assert words.startswith("score ")
    assert float(words.split()[1].rstrip(":")) == pytest.approx(verified.score, abs=2e-4)
    assert words.endswith("same speaker" if verified.same else "different speakers")


@pytest.mark.parametrize(
    ("name", "pooling", "num_mels"),
    [
        ("tdnn", "tap", 80),
        # One frame is left of the shortest audio.
        ("vggvox", "sap", 40),
        ("resnet34", "stats", 40),
        ("ecapa_tdnn_512", "asp", 80),
    ],
)
def test_every_kind_of_encoder_and_pooling_can_be_exported(name, pooling, num_mels, tmp_path):
    exported = export_model(new_model(name, pooling, num_mels), tmp_path / "out", ["onnx"])
    assert exported.differences.keys() == {"onnx"}
    assert exported.differences["onnx"] < TOLERANCE
    assert sorted(path.name for path in exported.folder.iterdir()) == ["model.json", "model.onnx"]


class Odd(nn.Module):
    """Mean and maximum of the bands, but for what `oddity` does to them."""

    def __init__(self, oddity: Callable[[Tensor, Tensor], Tensor], embedding_dim: int, num_mels: int) -> None:
        super().__init__()
        self.oddity = oddity
        self.projection = nn.Linear(num_mels, embedding_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.projection(self.oddity(features, features.square().mean(dim=2)))


CALLS: list[None] = []


def counting(features: Tensor, pooled: Tensor) -> Tensor:
    CALLS.append(None)
    return pooled + 0.1 * len(CALLS) * torch.arange(pooled.shape[1])


def branching(features: Tensor, pooled: Tensor) -> Tensor:
    return pooled if float(features.amax()) > 3 else features.amax(dim=2)


def without_onnx(features: Tensor, pooled: Tensor) -> Tensor:
    return pooled + torch.special.i1(pooled)


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SpeakerModel]]:
    """Models whose encoder, registered as `odd`, does something that exporting does not survive."""
    with_odd = copy.copy(registry._ENCODERS)
    monkeypatch.setattr(with_odd, "_known", dict(with_odd._known))
    monkeypatch.setattr(registry, "_ENCODERS", with_odd)

    def make(oddity: Callable[[Tensor, Tensor], Tensor]) -> SpeakerModel:
        def factory(embedding_dim: int, *, pooling: str, num_mels: int) -> nn.Module:
            return Odd(oddity, embedding_dim, num_mels)

        registry.register_encoder("odd", source="a test", pooling="tap")(factory)
        return new_model("odd")

    return make


@pytest.mark.parametrize("name", ["torch", "onnx"])
def test_a_file_that_computes_something_else_is_refused_and_not_left(odd, tmp_path, name):
    with pytest.raises(RunError, match=r"the embeddings of the exported .* differ from the model's by up to 0\.\d+"):
        export_model(odd(counting), tmp_path / "new" / "out", [name])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("oddity", "formats", "message"),
    [
        (branching, ["safetensors", "torch"], "encoder 'odd' cannot be exported as a graph"),
        (without_onnx, ["onnx"], "encoder 'odd' cannot be exported as ONNX .*bessel_i1"),
    ],
)
def test_an_encoder_that_cannot_be_exported_is_named_with_the_reason(
    odd, tmp_path, capfd, caplog, oddity, formats, message
):
    with pytest.raises(CelError, match=message) as raised:
        export_model(odd(oddity), tmp_path / "new" / "out", formats)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []
    # torch has graphs of hundreds of lines to show.
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_any_encoder_can_be_exported_as_safetensors(odd, tmp_path):
    export_model(odd(branching), tmp_path / "out", ["safetensors"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["encoder.safetensors", "model.json"]


def test_an_older_export_is_replaced_and_its_back_end_with_it(model, tmp_path):
    cohort = model.embed([probe(4000, seed) for seed in range(4)])
    with_cohort = model.calibrate(0.0, Calibration(slope=1.0, offset=0.0), BackEnd.fit(cohort, score_norm="s"), "list")
    export_model(with_cohort, tmp_path / "out", ["safetensors"])
    assert load_model(tmp_path / "out").back_end == with_cohort.back_end
    export_model(model, tmp_path / "out", ["safetensors"])
    assert load_model(tmp_path / "out").description == model.description
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["encoder.safetensors", "model.json"]


def test_weights_are_never_replaced_by_a_folder_without_them(model, tmp_path, capsys):
    model.save(tmp_path)
    assert run(["models", "export", str(tmp_path), "--out", str(tmp_path), "--format", "onnx"]) == 2
    assert "does not write (first encoder.safetensors)" in capsys.readouterr().err
    assert load_model(tmp_path).description == model.description


def test_an_unknown_format_names_the_known_ones(model, tmp_path, capsys):
    model.save(tmp_path / "model")
    assert run(["models", "export", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--format", "tflite"]) == 2
    assert "unknown format 'tflite'; choose from safetensors, torch, onnx" in capsys.readouterr().err


def test_without_the_packages_of_onnx_the_remedy_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(CelError, match=r"needs the package onnxscript.*pip install 'cel_dist\[onnx\]'"):
        export_model(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_leaves_nothing(model, mount_disk):
    disk = mount_disk(64)
    with pytest.raises(RunError, match=r"cannot write the exported model .*/disk/out: No space left"):
        export_model(model, disk / "out", ["safetensors"])
    assert list(disk.iterdir()) == []
