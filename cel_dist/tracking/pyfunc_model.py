"""The MLflow face of a model: MLflow keeps a copy of this file beside the weights and runs it to load them.

Only `cel_dist.tracking` names this file; everybody else loads models with `cel_dist.load_model`.
"""

import os
from pathlib import Path
from typing import Any

import mlflow
import numpy as np

# Private, but without it paths of clients would be read: an MLflow that lacks it must not load the model.
from mlflow.environment_variables import _MLFLOW_IS_IN_SERVING_ENVIRONMENT as IS_SERVING
from mlflow.exceptions import MlflowException
from numpy.typing import NDArray

from cel_dist.errors import CelError, RunError
from cel_dist.model import SpeakerModel

AUDIO_ROOT = "CEL_AUDIO_ROOT"
"""Environment variable: the folder whose files a server may read for its clients."""


class _Embedding:
    """What the model does, in a class that MLflow does not know: of its own subclasses it wraps `predict`, looks at
    every single sample, and refuses arrays where the annotation says lists."""

    _model: SpeakerModel

    def load_context(self, context: Any) -> None:
        """Load the model folder that was stored as the artifact `model`."""
        self._model = SpeakerModel.load_folder(context.artifacts["model"])

    # MLflow makes the signature of the annotation, and hands JSON on as it is: rows may have any lengths.
    def predict(
        self, context: Any, model_input: list[list[float]], params: dict[str, Any] | None = None
    ) -> NDArray[np.float32]:
        """Unit embeddings [N, D] of N utterances, each embedded as a whole.

        Args:
            context: MLflow's; not used.
            model_input: waveforms at 16 kHz, each an array or list [T] of its own length, floating point with full
                scale 1.0 or integers of 16 bits; or an array [N, T] of them; or paths of audio files; or a data frame
                with either in its first column. A server reads only files below the folder in $CEL_AUDIO_ROOT, and
                without it none.
            params: there are none.

        Raises:
            MlflowException: a row cannot be used (status 400 of a server), or the model has diverged (500).
        """
        try:
            rows = [self._embed(row, number) for number, row in enumerate(_rows(model_input))]
        except CelError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        except RunError as error:
            raise MlflowException(str(error)) from None
        return np.stack(rows) if rows else self._model.embed([])

    def _embed(self, row: Any, number: int) -> NDArray[np.float32]:
        try:
            return self._model.embed(_readable(row) if isinstance(row, (str, os.PathLike)) else _waveform(row))
        except CelError as error:
            raise CelError(f"row {number}: {error}") from None


def _rows(model_input: Any) -> list[Any]:
    if hasattr(model_input, "iloc"):
        model_input = model_input.iloc[:, 0].tolist()
    rows = list(model_input) if isinstance(model_input, (list, tuple, np.ndarray)) else [None]
    if any(row is None or (np.isscalar(row) and not isinstance(row, str)) for row in rows):
        raise CelError("the input is no list of utterances; give [[0.01, ...], [...]], one inner list of samples each")
    return rows


def _waveform(row: Any) -> NDArray[Any]:
    try:
        wave = np.asarray(row)
    except ValueError:
        wave = np.empty(0, object)
    if wave.dtype.kind in "iu":
        if wave.size and (wave.min() < -(1 << 15) or wave.max() >= 1 << 15):
            raise CelError("integer samples must have 16 bits; others as floating point with full scale 1.0")
        return wave.astype(np.int16)
    if wave.dtype.kind != "f":
        raise CelError("it is no waveform; give a list of numbers, 16 000 a second, of full scale 1.0")
    return wave


def _readable(path: str | os.PathLike[str]) -> Path:
    """The file, if it may be read: whoever talks to a server must not choose among all files of its machine."""
    root = os.environ.get(AUDIO_ROOT)
    # Containers are handed variables that nobody set as empty ones. An empty path would be the working folder.
    if not root:
        if IS_SERVING.get():
            raise CelError(f"files are not read for clients; send waveforms, or start the server with {AUDIO_ROOT}=DIR")
        return Path(path)
    folder = Path(root).resolve()
    file = (folder / path).resolve()
    if not file.is_relative_to(folder):
        raise CelError(f"'{path}' is not below the folder that {AUDIO_ROOT} names; give a path relative to it")
    return file


class SpeakerEmbedding(_Embedding, mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Utterances of any lengths to unit embeddings [N, D], float32; see `predict`."""


mlflow.models.set_model(SpeakerEmbedding())
