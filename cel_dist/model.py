"""A trained speaker encoder as one thing: weights, features, scoring and threshold; saved, loaded, embedding, scoring.

A model folder holds two files and no pickles:

    encoder.safetensors    the encoder's parameters and buffers
    model.json             `ModelDescription`: what the tensors are, how to score, where they come from
"""

import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.nn import functional

from cel_dist.data.audio import AudioError, read_audio, require_usable
from cel_dist.description import (
    DESCRIPTION_FILE,
    Calibration,
    EncoderDescription,
    ModelDescription,
    Provenance,
    read_description,
)
from cel_dist.encoders import build_encoder
from cel_dist.errors import CelError, RunError
from cel_dist.features import LogMel, pieces, segment_samples
from cel_dist.published import read_published

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
Audio: TypeAlias = str | os.PathLike[str] | NDArray[Any] | Tensor

WEIGHTS_FILE = "encoder.safetensors"

MIN_SAMPLES = 1600
"""Shortest waveform that is embedded: 0.1 s. Less than that says nothing about a voice."""


@dataclass(frozen=True)
class Verification:
    """The answer to "is this one speaker?"; None where the model holds no threshold or calibration."""

    score: float
    probability: float | None
    same: bool | None
    threshold: float | None


class SpeakerModel:
    """An encoder with all it takes to compare voices.

    The encoder is put into evaluation mode and stays on its device, where features are computed too. It is not copied:
    pass a copy of an encoder that is still in training.
    """

    def __init__(self, encoder: nn.Module, description: ModelDescription) -> None:
        self.encoder = encoder.eval()
        self.description = description
        self.device: torch.device = next(encoder.parameters()).device
        self._features = LogMel().to(self.device).eval()

    def embed(self, audio: Audio | list[Audio] | tuple[Audio, ...]) -> Embeddings:
        """Unit embedding of a whole utterance [D], or of each utterance of a list or tuple [N, D]; float32.

        Utterances pass the encoder one by one, because padding to a common length would change the embedding.

        Args:
            audio: path of an audio file; or a waveform [T] at 16 kHz, numpy or torch, either int16 or floating point
                with full scale 1.0 (it is multiplied by 32768); or a list of these.

        Raises:
            CelError: the file cannot be read; the waveform has another shape or type, is shorter than 0.1 s, silent or
                not finite.
            RunError: the encoder's output is not finite.
        """
        if isinstance(audio, (list, tuple)):
            rows = [self.embed(utterance) for utterance in audio]
            return np.stack(rows) if rows else np.empty((0, self.description.encoder.embedding_dim), np.float32)
        row: Embeddings = self._encode(_waveform(audio)[None], audio)[0]
        return row

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
        if frames < 1 or windows < 1:
            raise CelError(f"frames={frames} and windows={windows}; windows need at least one frame, and one of them")
        cut = _cut_windows(_waveform(audio), frames, windows)
        return self._encode(cut, audio)

    def log_mel(self, audio: Audio) -> Tensor:
        """Log-mel spectrum [M, F] of one utterance before it is normalised. Raises as `embed` does."""
        wave = _waveform(audio)
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            return torch.cat([self._features.log_mel(piece.to(self.device)) for piece in pieces(wave)], dim=-1)

    def embed_log_mel(self, log_mel: Tensor) -> Embeddings:
        """Unit embedding [D] of [M, F] frames as `log_mel` returns them, normalised among themselves."""
        with torch.inference_mode():
            features = self._features.normalise(log_mel[None])
        row: Embeddings = self._encode_features(features, "the frames")[0]
        return row

    def score(self, a: Audio, b: Audio) -> float:
        """Similarity of two utterances: minus the Euclidean distance of their unit embeddings, in [-2, 0].

        Either may be an embedding [D] that `embed` returned instead of audio: compute it once, compare it often.
        Raises as `embed` does.
        """
        return -float(np.linalg.norm(self._embedding(a) - self._embedding(b)))

    def probability(self, score: float) -> float | None:
        """Probability of the same speaker at equal priors; None for a model without calibration."""
        calibration = self.description.calibration
        return None if calibration is None else calibration.probability(score)

    def verify(self, enrol: Audio, test: Audio) -> Verification:
        """Compare two utterances: score, probability, and the decision at the stored threshold. Raises as `embed`."""
        score = self.score(enrol, test)
        threshold = self.description.threshold
        same = None if threshold is None else score >= threshold
        return Verification(score, self.probability(score), same, threshold)

    def calibrate(self, threshold: float, calibration: Calibration) -> "SpeakerModel":
        """The same encoder with this threshold and calibration; `self` stays as it is."""
        update = {"threshold": threshold, "calibration": calibration}
        return SpeakerModel(self.encoder, self.description.model_copy(update=update))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a model folder in one step: it is there whole, or not at all. An older model there is replaced.

        Raises:
            CelError: the folder holds other files than a model.
            RunError: the folder cannot be written.
        """
        target = Path(folder).resolve()
        _refuse_other_content(target)
        unique = f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}"
        fresh, former = target.with_name(unique + ".new"), target.with_name(unique + ".old")
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.encoder.state_dict().items()}
        try:
            fresh.mkdir(parents=True)
            # Not `save_file`, whose files only their owner can read: models are shared.
            (fresh / WEIGHTS_FILE).write_bytes(to_safetensors(tensors, metadata={"format": "pt"}))
            (fresh / DESCRIPTION_FILE).write_text(self.description.model_dump_json(indent=2) + "\n", encoding="utf-8")
            if target.exists():
                target.replace(former)
            fresh.replace(target)
        except OSError as error:
            shutil.rmtree(fresh, ignore_errors=True)
            if former.exists():
                former.replace(target)
            raise RunError(
                f"cannot write the model folder {target}: {error.strerror}; check space and permissions"
            ) from error
        shutil.rmtree(former, ignore_errors=True)

    @classmethod
    def load_folder(cls, folder: str | os.PathLike[str], device: str | torch.device | None = None) -> "SpeakerModel":
        """Load a model folder. `device` as in `load_model`.

        Raises:
            CelError: a file is missing or damaged, the format is newer than this version, or the tensors are those of
                another encoder.
        """
        folder = Path(folder)
        description = read_description(folder / DESCRIPTION_FILE)
        weights = folder / WEIGHTS_FILE
        try:
            state = load_file(weights)
        except FileNotFoundError:
            raise CelError(
                f"{weights} is missing; {DESCRIPTION_FILE} alone is no model, copy the whole folder"
            ) from None
        except (OSError, SafetensorError) as error:
            raise CelError(f"{weights} is damaged ({error}); copy or export the model again") from None
        return cls._from_state(state, description, weights, device)

    @classmethod
    def _from_state(
        cls,
        state: Mapping[str, Tensor],
        description: ModelDescription,
        source: Path,
        device: str | torch.device | None,
    ) -> "SpeakerModel":
        encoder = build_encoder(description.encoder.name, embedding_dim=description.encoder.embedding_dim)
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

    def _encode(self, waves: Tensor, audio: Audio) -> Embeddings:
        with torch.inference_mode():
            features = self._features(waves.to(self.device).float())
        return self._encode_features(features, audio)

    def _encode_features(self, features: Tensor, audio: Audio) -> Embeddings:
        # Scores must not depend on the device's shortcuts (TF32) or on an autocast region around the caller; benchmark
        # mode would search for new kernels at each new length.
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False), exact:
            rows = functional.normalize(self.encoder(features).float(), dim=-1).cpu().numpy()
        if not np.isfinite(rows).all():
            raise RunError(f"the encoder's output for {_name(audio)} is not finite; its training has diverged")
        result: Embeddings = rows
        return result


def load_model(source: str | os.PathLike[str], device: str | torch.device | None = None) -> SpeakerModel:
    """Load any MODEL: run, checkpoint or model folder, published `.model` file, or MLflow URI.

    Args:
        source: a folder with `model.json`, or with a sub-folder `model` that has one (runs and checkpoints); a file of
            the published implementation; `models:/NAME@alias`, `models:/NAME/3` or `runs:/ID/model`.
        device: where to compute. Default: the GPU if there is one, else the CPU.

    Raises:
        CelError: nothing is there, it is no model, it is damaged, or it was written by a newer version.
    """
    if str(source).startswith(("models:/", "runs:/")):
        from cel_dist.tracking import fetch_model

        return SpeakerModel.load_folder(fetch_model(str(source)), device)
    path = Path(source)
    if path.is_file():
        return load_published(path, device)
    for folder in (path, path / "model"):
        if (folder / DESCRIPTION_FILE).is_file():
            return SpeakerModel.load_folder(folder, device)
    if not path.exists():
        problem = f"there is no model at {path}"
    elif checkpoints := sorted(path.glob(f"checkpoints/*/model/{DESCRIPTION_FILE}")):
        problem = f"the run {path} has no best model yet; its newest checkpoint is {checkpoints[-1].parent.parent}"
    else:
        problem = f"{path} holds no {DESCRIPTION_FILE}, neither itself nor in a sub-folder 'model'"
    raise CelError(
        f"{problem}; give a run, checkpoint or model folder, a published .model file, or an MLflow URI such as "
        "models:/cel@champion"
    )


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
            f"dimensions: {len(differing)} tensors differ ({'; '.join(differing[:3])}); "
            "name the encoder it was made with"
        )
    encoder.load_state_dict(dict(state))


def load_published(path: str | os.PathLike[str], device: str | torch.device | None = None) -> SpeakerModel:
    """A checkpoint of the published implementation as a model without threshold. `device` as in `load_model`.

    Raises:
        CelError: the file cannot be read or is no such checkpoint.
    """
    path = Path(path)
    if path.name in (WEIGHTS_FILE, DESCRIPTION_FILE):
        raise CelError(f"{path} is a part of a model; give its folder {path.parent}")
    published = read_published(path)
    encoder = EncoderDescription(name="fast_resnet34", embedding_dim=published.embedding_dim)
    description = ModelDescription(encoder=encoder, training=Provenance(source=f"published checkpoint {path.name}"))
    return SpeakerModel._from_state(published.encoder_state, description, path, device)


def _refuse_other_content(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CelError(f"{folder} is a file; give a new folder for the model")
    others = sorted(entry.name for entry in folder.iterdir() if entry.name not in (WEIGHTS_FILE, DESCRIPTION_FILE))
    if others:
        raise CelError(f"{folder} holds other files than a model (first {others[0]}); give a new folder for the model")


def _waveform(audio: Audio) -> Tensor:
    """The utterance [T] on int16 scale, int16 or float32."""
    samples: NDArray[Any]
    name = _name(audio)
    if isinstance(audio, (str, os.PathLike)):
        samples = _read(Path(audio))
    elif isinstance(audio, Tensor):
        samples = audio.detach().cpu().numpy()
    elif isinstance(audio, np.ndarray):
        samples = audio
    else:
        raise CelError(f"cannot embed a {type(audio).__name__}; give a path, a waveform [T] or a list of them")
    if samples.ndim != 1:
        raise CelError(
            f"{name} has shape {list(samples.shape)}; give one channel [T], and several utterances as a list"
        )
    if samples.dtype.kind == "f":
        samples = samples.astype(np.float32) * np.float32(32768)
        if not np.isfinite(samples).all():
            raise CelError(f"{name} holds values that are not finite; check how it was made")
    elif samples.dtype != np.int16:
        raise CelError(f"{name} holds {samples.dtype}; give int16, or floating point with full scale 1.0")
    try:
        require_usable(samples, MIN_SAMPLES)
    except AudioError as error:
        raise CelError(f"{name} cannot be embedded ({error}); leave it out or record it again") from None
    return torch.from_numpy(np.ascontiguousarray(samples))


def _read(path: Path) -> NDArray[np.int16]:
    if not path.is_file():
        raise CelError(f"there is no audio file {path}; check the path")
    try:
        return read_audio(path)
    except AudioError as error:
        raise CelError(
            f"{path} cannot be read as audio ({error}); convert it to WAV or FLAC, or leave it out"
        ) from None


def _cut_windows(wave: Tensor, frames: int, windows: int) -> Tensor:
    length = segment_samples(frames)
    if len(wave) < length:
        # One sample more than needed when the shortage is odd: the published loader rounds up on both sides.
        half = (length - len(wave) + 1) // 2
        wave = functional.pad(wave, (half, half))
    starts = np.linspace(0, len(wave) - length, num=windows).astype(np.int64)
    return torch.stack([wave[start : start + length] for start in starts])


def _name(audio: Audio) -> str:
    return str(audio) if isinstance(audio, (str, os.PathLike)) else "the waveform"
