"""A trained speaker encoder as one thing: weights, features, back end and threshold; it embeds, scores and is saved."""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from cel_dist.back_end import BackEnd
from cel_dist.data.audio import SAMPLE_RATE
from cel_dist.description import (
    DESCRIPTION_FILE,
    Calibration,
    EncoderDescription,
    ModelDescription,
    Provenance,
    read_description,
)
from cel_dist.errors import CelError, RunError
from cel_dist.features import pieces
from cel_dist.model_folder import (
    MODEL_FILES,
    WEIGHTS_FILE,
    described,
    model_folder_of,
    read_back_end,
    read_weights,
    write_model_folder,
)
from cel_dist.network import front_end, new_network
from cel_dist.published import read_published
from cel_dist.utterance import MAX_WHOLE_SECONDS, MIN_SAMPLES, Audio, Excerpt, name_of, segments
from cel_dist.utterance import windows as cut_windows

__all__ = [
    "Calibration",
    "EncoderDescription",
    "ModelDescription",
    "Provenance",
    "SpeakerModel",
    "Verification",
    "load_model",
    "load_published",
    "load_weights",
]

Embeddings: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class Verification:
    """The answer to "is this one speaker?"; None where the model holds no threshold or calibration.

    With a calibration that knows durations, `threshold` is the one for utterances as long as these.
    """

    score: float
    probability: float | None
    same: bool | None
    threshold: float | None


class SpeakerModel:
    """An encoder with all it takes to compare voices.

    The encoder is put into evaluation mode and stays on its device, where features are computed too. It is not copied:
    pass a copy of an encoder that is still in training.
    """

    def __init__(self, encoder: nn.Module, description: ModelDescription, back_end: BackEnd | None = None) -> None:
        self.encoder = encoder.eval()
        self.description = description
        self.back_end = back_end or BackEnd(scoring=description.scoring)
        self.device: torch.device = next(encoder.parameters()).device
        self._features = front_end(description).to(self.device).eval()

    def embed(self, audio: Audio | list[Audio] | tuple[Audio, ...]) -> Embeddings:
        """Unit embedding of a whole utterance [D], or of each utterance of a list or tuple [N, D]; float32.

        Utterances pass the encoder one by one, because padding to a common length would change the embedding. One that
        is longer than `MAX_WHOLE_SECONDS` does so in segments of that length (see `utterance.segments`); its embedding
        is the mean of theirs, again of unit length.

        Args:
            audio: path of an audio file, or a part of one; or a waveform [T] at 16 kHz, numpy or torch, either int16 or
                floating point with full scale 1.0 (it is multiplied by 32768); or a list of these.

        Raises:
            CelError: the file cannot be read; the waveform has another shape or type, is shorter than 0.1 s, silent or
                not finite.
            RunError: the encoder's output is not finite.
        """
        if isinstance(audio, (list, tuple)):
            rows = [self.embed(utterance) for utterance in audio]
            return np.stack(rows) if rows else np.empty((0, self.description.encoder.embedding_dim), np.float32)
        pieces = segments(audio, round(MAX_WHOLE_SECONDS * SAMPLE_RATE))
        return mean_embedding(np.concatenate([self.encode([piece], [name_of(audio)]) for piece in pieces]))

    def embed_windows(self, audio: Audio, frames: int, windows: int) -> Embeddings:
        """Unit embeddings [windows, D] of evenly spaced, overlapping windows of one utterance, as published.

        A window has `frames` * 160 + 240 samples. The first starts at the first sample, the last ends at the last one,
        and starts between are truncated to integers. A shorter utterance is padded with zeros, half on either side.

        Args:
            audio: as for `embed`, one utterance.
            frames: frames of 10 ms in a window.
            windows: number of windows.

        Raises:
            CelError: as for `embed`, or `frames` or `windows` is below 1.
        """
        cut = cut_windows(audio, frames, windows)
        return self.encode(list(cut), [name_of(audio)] * windows)

    def encode(self, waves: Sequence[Tensor], names: Sequence[str]) -> Embeddings:
        """Unit embeddings [B, D] of waveforms with equally many frames, 1 + T // 160 each, in one pass of the encoder.

        Args:
            waves: each [T] samples at 16 kHz on int16 scale, any real dtype; those of equal length best side by side.
            names: what each is called in an error.

        Raises:
            RunError: the encoder's output is not finite; the first waveform of which it is not is named.
        """
        with torch.inference_mode():
            stacks = [torch.stack(list(same)) for _, same in groupby(waves, len)]
            features = torch.cat([self._features(self._on_device(stack).float()) for stack in stacks])
        return self._encode_features(features, names)

    def _on_device(self, waves: Tensor) -> Tensor:
        # From pinned memory a copy neither waits for the GPU nor holds up what comes after it.
        return waves.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else waves

    def _encode_features(self, features: Tensor, names: Sequence[str]) -> Embeddings:
        # Scores must not depend on an autocast region around the caller.
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False), exact_kernels():
            rows: Embeddings = functional.normalize(self.encoder(features).float(), dim=-1).cpu().numpy()
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            name = names[int(np.argmin(finite))]
            raise RunError(f"the encoder's output for {name} is not finite; its training has diverged")
        return rows

    def log_mel(self, audio: Audio) -> Tensor:
        """Log-mel spectrum [M, F] of one utterance before it is normalised. Raises as `embed` does."""
        # As one segment, however long.
        (wave,) = segments(audio, sys.maxsize)
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            return torch.cat([self._features.log_mel(piece.to(self.device)) for piece in pieces(wave)], dim=-1)

    def embed_log_mel(self, log_mel: Tensor) -> Embeddings:
        """Unit embedding [D] of [M, F] frames as `log_mel` returns them, normalised among themselves."""
        with torch.inference_mode():
            features = self._features.normalise(log_mel[None])
        row: Embeddings = self._encode_features(features, ["the frames"])[0]
        return row

    def score(self, a: Audio, b: Audio) -> float:
        """Similarity of two utterances by the model's back end: higher for more alike.

        Without one it is minus the Euclidean distance of their unit embeddings, in [-2, 0]. Either may be an embedding
        [D] that `embed` returned instead of audio: compute it once, compare it often. Raises as `embed` does.
        """
        rows = np.stack([self._embedding(a), self._embedding(b)])
        return float(self.back_end.score(rows, np.array([0]), np.array([1]))[0])

    def probability(self, score: float, seconds: float | None = None) -> float | None:
        """Probability of the same speaker at equal priors; None for a model without calibration.

        Args:
            score: that `score` returned.
            seconds: duration of the shorter utterance, for a calibration that knows durations.

        Raises:
            CelError: the calibration needs `seconds`.
        """
        calibration = self.description.calibration
        return None if calibration is None else calibration.probability(score, seconds)

    def verify(self, enrol: Audio | list[Audio] | tuple[Audio, ...], test: Audio) -> Verification:
        """Compare a voice with an utterance: score, probability, and the decision at the stored threshold.

        Args:
            enrol: an utterance, or several of one person, who is then the mean of their embeddings and as long as all
                of them together, as in `cel evaluate --enrol`.
            test: the utterance in question.

        Raises:
            CelError: as `embed`, there is nothing in `enrol`, or an embedding is given where the calibration needs
                durations.
        """
        recordings = list(enrol) if isinstance(enrol, (list, tuple)) else [enrol]
        if not recordings:
            raise CelError("nothing to compare with; give at least one recording of the known speaker")
        person = mean_embedding(np.stack([self._embedding(recording) for recording in recordings]))
        score = self.score(person, test)
        if self.description.calibration is None or not self.description.calibration.quality:
            return self.decide(score)
        durations = [self._seconds(recording) for recording in recordings]
        known, tested = None if None in durations else sum(filter(None, durations)), self._seconds(test)
        return self.decide(score, None if known is None or tested is None else min(known, tested))

    def decide(self, score: float, seconds: float | None = None) -> Verification:
        """What a score means: probability, and the decision at the stored threshold.

        Args:
            score: that `score` returned.
            seconds: duration of the shorter side, for a calibration that knows durations.

        Raises:
            CelError: the calibration needs `seconds`.
        """
        threshold, calibration = self.description.threshold, self.description.calibration
        if threshold is not None and calibration is not None and calibration.quality:
            length = None if seconds is None else np.array([seconds])
            threshold -= float(calibration.compensated(np.zeros(1), length)[0])
        same = None if threshold is None else score >= threshold
        return Verification(score, self.probability(score, seconds), same, threshold)

    def calibrate(
        self, threshold: float, calibration: Calibration, back_end: BackEnd | None = None, cohort: str | None = None
    ) -> "SpeakerModel":
        """The same encoder with this threshold and calibration; `self` stays as it is.

        Args:
            threshold: of scores that the back end gives whole utterances.
            calibration: of the same scores.
            back_end: the new one. Default: that of `self`.
            cohort: name of the list that a new back end comes from.
        """
        update: dict[str, Any] = {"threshold": threshold, "calibration": calibration}
        if back_end is not None:
            update |= {"scoring": back_end.scoring, "back_end": described(back_end, cohort)}
        description = self.description.model_copy(update=update)
        return SpeakerModel(self.encoder, description, back_end or self.back_end)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a model folder in one step: it is there whole, or not at all. An older model there is replaced.

        Raises:
            CelError: the folder holds other files than a model.
            RunError: the folder cannot be written.
        """
        write_model_folder(folder, self.tensors(), self.description, self.back_end)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of the encoder by name, on the CPU and contiguous."""
        return {name: value.detach().cpu().contiguous() for name, value in self.encoder.state_dict().items()}

    @classmethod
    def load_folder(cls, folder: str | os.PathLike[str], device: str | torch.device | None = None) -> "SpeakerModel":
        """Load a model folder. `device` as in `load_model`.

        Raises:
            CelError: a file is missing or damaged, the format is newer than this version, or the tensors are those of
                another encoder.
        """
        folder = Path(folder)
        description = read_description(folder / DESCRIPTION_FILE)
        model = cls._from_state(read_weights(folder), description, folder / WEIGHTS_FILE, device)
        model.back_end = read_back_end(folder, description)
        return model

    @classmethod
    def _from_state(
        cls,
        state: Mapping[str, Tensor],
        description: ModelDescription,
        source: Path,
        device: str | torch.device | None,
    ) -> "SpeakerModel":
        encoder = new_network(description)
        load_weights(encoder, state, description.encoder, source)
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(encoder.to(chosen).requires_grad_(False), description)

    def _embedding(self, audio: Audio) -> Embeddings:
        if isinstance(audio, Tensor):
            audio = audio.detach().cpu().numpy()
        dimension = self.description.encoder.embedding_dim
        if isinstance(audio, np.ndarray) and audio.shape == (dimension,) and audio.dtype.kind == "f":
            vector: Embeddings = audio.astype(np.float32)
            # A waveform of just so many samples would hardly have the energy of a unit vector.
            is_embedding = abs(float(np.linalg.norm(vector)) - 1) < 1e-3
        else:
            is_embedding = False
        return vector if is_embedding else self.embed(audio)

    def _seconds(self, audio: Audio) -> float | None:
        """Duration of an utterance; None for an embedding, which does not tell."""
        if isinstance(audio, (str, os.PathLike)):
            return Excerpt(str(audio)).seconds()
        if isinstance(audio, Excerpt):
            return audio.seconds()
        return len(audio) / SAMPLE_RATE if len(audio) >= MIN_SAMPLES else None


def exact_kernels() -> AbstractContextManager[None]:
    """Convolutions of a GPU without its shortcuts (TF32), which scores must not depend on, and without a search for new
    kernels at each new length. It holds for all threads: whoever encodes in several is inside of it in the first."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def mean_embedding(rows: Embeddings) -> Embeddings:
    """The mean of unit embeddings [n, D] of one voice, again of unit length [D]; one row comes back as it is."""
    if len(rows) == 1:
        only: Embeddings = rows[0]
        return only
    mean = rows.mean(axis=0, dtype=np.float64)
    unit: Embeddings = (mean / np.linalg.norm(mean)).astype(np.float32)
    return unit


def load_model(source: str | os.PathLike[str], device: str | torch.device | None = None) -> SpeakerModel:
    """Load any MODEL: run, checkpoint or model folder, published `.model` file, or MLflow URI.

    Args:
        source: a folder with `model.json`, or with a sub-folder `model` that has one (runs and checkpoints); a file of
            the published implementation; `models:/NAME@alias`, `models:/NAME/3` or `runs:/ID/model`.
        device: where to compute. Default: the GPU if there is one, else the CPU.

    Raises:
        CelError: nothing is there, it is no model, it is damaged, or it was written by a newer version.
    """
    folder = model_folder_of(source)
    return load_published(source, device) if folder is None else SpeakerModel.load_folder(folder, device)


def load_weights(
    encoder: nn.Module, state: Mapping[str, Tensor], description: EncoderDescription, source: str | Path
) -> None:
    """Copy `state` into `encoder`, all of it or nothing.

    Args:
        encoder: built as `description` says.
        state: tensors by name.
        description: names the encoder in errors.
        source: names the origin of the tensors in errors.

    Raises:
        CelError: a tensor is missing, unknown or of another shape; the first ones are named.
    """
    expected = encoder.state_dict()
    differing = [f"{name} is missing" for name in expected if name not in state]
    differing += [f"{name} is not of this encoder" for name in state if name not in expected]
    differing += [
        f"{name} has shape {list(state[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if differing:
        raise CelError(
            f"{source} is a checkpoint of another encoder than '{description.name}' with {description.embedding_dim} "
            f"dimensions and pooling '{description.pooling}': {len(differing)} tensors differ "
            f"({'; '.join(differing[:3])}); name the encoder it was made with"
        )
    encoder.load_state_dict(dict(state))


def load_published(path: str | os.PathLike[str], device: str | torch.device | None = None) -> SpeakerModel:
    """A checkpoint of the published implementation as a model without threshold. `device` as in `load_model`.

    Raises:
        CelError: the file cannot be read or is no such checkpoint.
    """
    path = Path(path)
    if path.name in MODEL_FILES:
        raise CelError(f"{path} is a part of a model; give its folder {path.parent}")
    published = read_published(path)
    encoder = EncoderDescription(name="fast_resnet34", embedding_dim=published.embedding_dim)
    description = ModelDescription(encoder=encoder, training=Provenance(source=f"published checkpoint {path.name}"))
    return SpeakerModel._from_state(published.encoder_state, description, path, device)
