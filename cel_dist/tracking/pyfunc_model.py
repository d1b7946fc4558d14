"""The MLflow face of a model: MLflow keeps a copy of this file beside the weights and runs it to load them.

Only `cel_dist.tracking` names this file; everybody else loads models with `cel_dist.load_model`.
"""

from typing import Any

import mlflow
import numpy as np

from cel_dist.model import SpeakerModel


class SpeakerEmbedding(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Waveforms [N, T], 16 kHz, float32 with full scale 1.0, to unit embeddings [N, D], float32."""

    def load_context(self, context: Any) -> None:
        """Load the model folder that was stored as the artifact `model`."""
        self._model = SpeakerModel.load_folder(context.artifacts["model"])

    # The bare array type: MLflow would derive a signature from any other annotation, and complains about none at all.
    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> Any:
        """Embed each row of `model_input` as one whole utterance."""
        return self._model.embed(list(model_input))


mlflow.models.set_model(SpeakerEmbedding())
