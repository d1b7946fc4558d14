"""The stored model as MLflow uses it: in Python, without this project installed, behind HTTP."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from stores import postgres

from cel_dist.cli.app import run
from cel_dist.data.audio import encode_audio
from cel_dist.description import EncoderDescription, ModelDescription
from cel_dist.distributed import free_port
from cel_dist.encoders import build_encoder
from cel_dist.model import SpeakerModel, load_model
from cel_dist.tracking import fetch_model
from cel_dist.tracking.catalogue import delete_version, list_versions, promote
from cel_dist.tracking.registration import REQUIREMENTS, register_model

WAVES = [np.random.default_rng(length).normal(0, 0.1, length).astype(np.float32) for length in (8000, 5000, 1600)]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("trained") / "model"
    description = ModelDescription(encoder=EncoderDescription(name="fast_resnet34", embedding_dim=16))
    SpeakerModel(build_encoder("fast_resnet34", 16), description).save(folder)
    return folder


@pytest.fixture(scope="module")
def packed(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as MLflow stores it."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    return fetch_model(register_model(model_folder, "cel", uri), uri).parent.parent


@pytest.fixture(scope="module")
def expected(model_folder: Path) -> np.ndarray:
    return load_model(model_folder).embed(WAVES)


@pytest.fixture(scope="module")
def pyfunc(packed: Path) -> Iterator[Any]:
    import mlflow

    # MLflow puts the code that the model carries before everything else, for good; processes started later by other
    # tests would import it.
    before = list(sys.path)
    yield mlflow.pyfunc.load_model(str(packed))
    sys.path[:] = before


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    for number, wave in enumerate(WAVES):
        (tmp_path / f"{number}.wav").write_bytes(encode_audio((32767 * wave).astype(np.int16), "wav"))
    return tmp_path


def test_utterances_come_in_any_form_and_length(pyfunc: Any, audio: Path, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(pyfunc.predict(WAVES), expected)
    np.testing.assert_array_equal(pyfunc.predict([wave.tolist() for wave in WAVES]), expected)
    np.testing.assert_array_equal(pyfunc.predict(pd.DataFrame({"waveform": WAVES})), expected)
    np.testing.assert_array_equal(pyfunc.predict(np.stack([WAVES[0], WAVES[0]])), expected[[0, 0]])
    files = [str(audio / f"{number}.wav") for number in range(3)]
    integers = [(32767 * wave).astype(np.int16) for wave in WAVES]
    np.testing.assert_array_equal(pyfunc.predict(files), pyfunc.predict(integers))
    np.testing.assert_array_equal(pyfunc.predict([wave.tolist() for wave in integers]), pyfunc.predict(integers))
    np.testing.assert_allclose(pyfunc.predict(files), expected, atol=1e-2)
    assert pyfunc.predict([]).shape == (0, 16)
    np.testing.assert_allclose(np.linalg.norm(pyfunc.predict(pyfunc.input_example), axis=1), 1, atol=1e-6)
    assert [len(row) for row in pyfunc.input_example] == [8000, 4800]
    [column] = pyfunc.metadata.signature.inputs.to_dict()
    assert (column["type"], column["items"]) == ("array", {"type": "double"})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (WAVES[0], "no list of utterances"),
        ("a.wav", "no list of utterances"),
        ([WAVES[0], [0.0] * 1600], "row 1: .*silent"),
        ([WAVES[0].tolist(), [[0.1], [0.2, 0.3]]], "row 1: it is no waveform"),
        ([[True, False]], "row 0: it is no waveform"),
        ([[100_000] * 1600], "row 0: integer samples must have 16 bits"),
        (["/nowhere/a.wav"], "row 0: .*/nowhere/a.wav"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(pyfunc: Any, rows: Any, message: str) -> None:
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match=message) as raised:
        pyfunc.predict(rows)
    assert raised.value.get_http_status_code() == 400


def test_files_are_read_only_below_the_folder_that_is_allowed(
    pyfunc: Any, audio: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException

    outside = tmp_path_factory.mktemp("outside") / "secret.wav"
    outside.write_bytes((audio / "0.wav").read_bytes())
    (audio / "link.wav").symlink_to(outside)
    monkeypatch.setenv("CEL_AUDIO_ROOT", str(audio))
    np.testing.assert_array_equal(pyfunc.predict(["0.wav"]), pyfunc.predict([str(audio / "0.wav")]))
    for path in (str(outside), f"../{outside.parent.name}/secret.wav", "link.wav", "."):
        with pytest.raises(MlflowException, match="not below the folder" if path != "." else "row 0"):
            pyfunc.predict([path])
    # A server whose variable is empty has no such folder, and not its working folder.
    monkeypatch.setenv("CEL_AUDIO_ROOT", "")
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    monkeypatch.chdir(audio)
    with pytest.raises(MlflowException, match="files are not read for clients"):
        pyfunc.predict(["0.wav"])


def test_no_pickles_and_all_that_its_code_imports(packed: Path) -> None:
    names = {path.name for path in packed.rglob("*") if path.is_file()}
    assert {"encoder.safetensors", "model.json", "model_card.md", "pyfunc_model.py"} <= names
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pth", ".pyc"))]
    required = (packed / "requirements.txt").read_text().split()
    assert [line.partition("==")[0] for line in required] == list(REQUIREMENTS)
    assert all("+" not in line for line in required)
    # Neither the project nor anything else that is not required is to be found: `.pth` files, by which an editable
    # installation is, are not read.
    # pydantic is never without its core.
    allowed = {"cel_dist", "pydantic_core", *REQUIREMENTS}
    code = f"""
import ast, json, pathlib, sys
sys.path += {[sysconfig.get_paths()["purelib"]]!r}
try:
    import cel_dist
    sys.exit("cel_dist is installed")
except ImportError:
    pass
import mlflow, numpy
rows = json.load(sys.stdin)
print(json.dumps(mlflow.pyfunc.load_model({str(packed)!r}).predict(rows).tolist()))
import cel_dist
assert cel_dist.__file__.startswith({str(packed)!r}), cel_dist.__file__
for name, module in list(sys.modules.items()):
    if name.partition(".")[0] == "cel_dist":
        tree = ast.parse(pathlib.Path(module.__file__).read_text())
        for node in ast.walk(tree):
            if not isinstance(node, (ast.Import, ast.ImportFrom)):
                continue
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            for top in {{one.partition(".")[0] for one in found}} - set(sys.stdlib_module_names):
                assert top in {allowed!r} or top not in sys.modules, (name, top)
"""
    rows = json.dumps([wave.tolist() for wave in WAVES])
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], input=rows, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = np.float32(json.loads(done.stdout.splitlines()[-1]))
    np.testing.assert_allclose(found, load_model(packed / "artifacts" / "model").embed(WAVES), atol=1e-6)


@contextmanager
def started(folder: Path, *arguments: str, path: str, **environment: str) -> Iterator[str]:
    """An MLflow program that listens; its address."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", *arguments, "--host", "127.0.0.1", "--port", str(port)]
    log = folder / f"{arguments[0]}.log"
    # MLflow starts programs of its own by their names.
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "PATH": search, "MLFLOW_DISABLE_TELEMETRY": "true", **environment},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5):
                break
            # Waiting on the process, so that one that cannot start is noticed at once.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
            assert process.poll() is None, log.read_text()
        else:
            raise AssertionError(log.read_text())
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answer(address: str, rows: Any) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        f"{address}/invocations", json.dumps({"inputs": rows}).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def cel(folder: Path, uri: str, *arguments: str) -> dict[str, Any]:
    """A `cel models` of its own, in a folder of its own; its object."""
    folder.mkdir()
    command = [sys.executable, "-m", "cel_dist", "models", *arguments, "--json"]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_a_model_goes_through_a_server_on_postgresql_to_another_process_and_is_served(
    tmp_path: Path, model_folder: Path, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CEL_CACHE", str(tmp_path / "cache"))
    pytest.importorskip("psycopg", reason="psycopg is not installed; with pip: psycopg[binary]")
    with postgres("registry", "secret") as database:
        backend = f"postgresql+psycopg://registry:secret@127.0.0.1:{database}/registry"
        store = ("--backend-store-uri", backend, "--artifacts-destination", str(tmp_path / "files"), "--workers", "1")
        with started(tmp_path, "server", *store, path="/health") as uri:
            registered = cel(tmp_path / "one", uri, "register", str(model_folder), "--name", "voices")
            assert (registered["uri"], registered["aliases"]) == ("models:/voices/1", ["champion"])
            out = tmp_path / "pulled"
            assert run(["models", "pull", "models:/voices@champion", "--out", str(out), "--tracking-uri", uri]) == 0
            np.testing.assert_array_equal(load_model(out).embed(WAVES), expected)
            monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
            np.testing.assert_array_equal(load_model("models:/voices@champion").embed(WAVES), expected)
            [cached] = (tmp_path / "cache" / "models").iterdir()
            assert (cached / "MLmodel").is_file()
            assert register_model("models:/voices/1", "voices", uri) == "models:/voices/2"
            assert promote("voices", 2, tracking_uri=uri).former == 1
            assert delete_version("voices", 1, uri) == [2]
            [left] = list_versions(uri)
            assert (left.uri, left.aliases) == ("models:/voices/2", ("champion",))
            assert left.card.startswith("# voices")
            serve = ("models", "serve", "--model-uri", "models:/voices@champion", "--env-manager", "local")
            with started(tmp_path, *serve, path="/ping", MLFLOW_TRACKING_URI=uri) as address:
                status, found = answer(address, [wave.tolist() for wave in WAVES])
                assert status == 200
                np.testing.assert_allclose(found["predictions"], expected, atol=1e-6)
                # The word of a client opens no file, be it there or not.
                secret = tmp_path / "secret.wav"
                secret.write_bytes(encode_audio((32767 * WAVES[0]).astype(np.int16), "wav"))
                for path in (str(secret), "/nowhere.wav"):
                    status, found = answer(address, [path])
                    assert status == 400
                    assert "files are not read for clients" in found["message"]
                    assert "predictions" not in found
                status, found = answer(address, [[0.0] * 1600])
                assert status == 400
                assert "row 0" in found["message"]
                assert "Traceback" not in json.dumps(found)
