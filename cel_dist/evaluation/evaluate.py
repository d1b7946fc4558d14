"""Evaluation of a model on a list of trials."""

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cel_dist.data.files import atomic_write, require_folder_or_nothing
from cel_dist.description import Calibration
from cel_dist.distributed import World
from cel_dist.errors import CelError, RunError
from cel_dist.evaluation.calibration import fit_calibration
from cel_dist.evaluation.embed import Progress, embed_files, raised_together
from cel_dist.evaluation.scoring import score_trials
from cel_dist.evaluation.trials import Trials
from cel_dist.metrics import eer, eer_threshold, min_dcf
from cel_dist.model import SpeakerModel

SCORES_FILE = "scores.txt"
EMBEDDINGS_FILE = "embeddings.npz"
DET_FILE = "det.png"
HISTOGRAM_FILE = "scores.png"

_MIN_FRAMES = 16
_PRIORS = ("0.01", "0.05")


@dataclass(frozen=True)
class Evaluation:
    """What a model does on a list of M trials over N utterances.

    Attributes:
        eer: equal error rate, a fraction.
        min_dcf: normalised minimum detection cost by prior of a target trial ("0.01", "0.05"), both costs 1.
        threshold: score at the equal error rate; a trial is accepted at or above it.
        calibration: score to probability, fitted on these trials.
        trials: the trials, with their labels.
        scores: float64 [M].
        embeddings: float32 [N, D] or [N, windows, D], row i for `trials.files[i]`.
    """

    eer: float
    min_dcf: dict[str, float]
    threshold: float
    calibration: Calibration
    trials: Trials
    scores: NDArray[np.float64]
    embeddings: NDArray[np.float32]

    @property
    def labels(self) -> NDArray[np.int8]:
        """int8 [M], 1 for target trials."""
        return self.trials.labels

    def summary(self) -> dict[str, Any]:
        """The numbers as JSON values; `trials` and `utterances` are counts."""
        return {
            "eer": self.eer,
            "min_dcf": self.min_dcf,
            "trials": len(self.trials),
            "utterances": len(self.trials.files),
            "threshold": self.threshold,
            "calibration": self.calibration.model_dump(),
        }

    def write(self, folder: str | os.PathLike[str]) -> dict[str, Path]:
        """Write what `write_scores` does, and the pictures `det.png` and `scores.png`.

        Returns:
            The paths under `scores`, `embeddings`, `det` and `histogram`.

        Raises:
            RunError: the folder cannot be written.
        """
        from cel_dist.evaluation import plots

        pictures = {
            "det": (DET_FILE, plots.det_plot({"": (self.scores, self.labels)})),
            "histogram": (HISTOGRAM_FILE, plots.score_histogram(self.scores, self.labels, threshold=self.threshold)),
        }
        return {**self.write_scores(folder), **_write_files(Path(folder), pictures)}

    def write_scores(self, folder: str | os.PathLike[str]) -> dict[str, Path]:
        """Write `scores.txt` (lines `label enrol test score`) and `embeddings.npz` (`names` [N], `embeddings`).

        Blanks separate the columns, or tabs if the name of a file holds white space.

        Returns:
            The paths under `scores` and `embeddings`.

        Raises:
            RunError: the folder cannot be written.
        """
        packed = io.BytesIO()
        np.savez(packed, names=np.array(self.trials.files), embeddings=self.embeddings)
        contents = {
            "scores": (SCORES_FILE, self._score_lines().encode()),
            "embeddings": (EMBEDDINGS_FILE, packed.getvalue()),
        }
        return _write_files(Path(folder), contents)

    def _score_lines(self) -> str:
        files = self.trials.files
        rows = zip(
            self.labels.tolist(),
            self.trials.enrol.tolist(),
            self.trials.test.tolist(),
            self.scores.tolist(),
            strict=True,
        )
        gap = " " if all(len(name.split()) == 1 for name in files) else "\t"
        return "".join(
            gap.join((str(label), files[enrol], files[test], f"{score:.8f}\n")) for label, enrol, test, score in rows
        )


def _write_files(folder: Path, contents: Mapping[str, tuple[str, bytes]]) -> dict[str, Path]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.values():
            with atomic_write(folder / name) as stream:
                stream.write(content)
    except OSError as error:
        raise RunError(
            f"cannot write the evaluation to {folder}: {error.strerror}; check space and permissions"
        ) from error
    return {kind: folder / name for kind, (name, _) in contents.items()}


def evaluate(
    model: SpeakerModel,
    trials: str | os.PathLike[str] | Trials,
    root: str | os.PathLike[str],
    *,
    frames: int = 0,
    windows: int = 10,
    world: World | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Embed the utterances of a trials file, score its trials and measure the errors.

    Inside a job every rank calls this, with the default process group running; every rank returns the same numbers.

    Args:
        model: on this rank's device.
        trials: the trials, or the file that `Trials.read` reads.
        root: folder to which its paths are relative.
        frames: 0 scores whole utterances; else windows of this many frames (at least 16), as published.
        windows: windows an utterance; the score of a trial is the mean over all pairs of windows.
        world: this rank's place in the job. Default: one process.
        out: where rank 0 writes what `Evaluation.write` does. Default: nothing is written.
        progress: told after each utterance of this rank.

    Raises:
        CelError: a setting is out of range, the trials file is at fault, audio is missing or unreadable, or `out` is a
            file.
        RunError: the encoder's output is not finite, or `out` cannot be written.
    """
    world = world or World()
    if frames and frames < _MIN_FRAMES:
        raise CelError(f"frames={frames}; give 0 for whole utterances or at least {_MIN_FRAMES} frames of 10 ms")
    if windows < 1:
        raise CelError(f"windows={windows}; give at least one window")
    with raised_together(world):
        if out is not None:
            require_folder_or_nothing(Path(out))
        listed = trials if isinstance(trials, Trials) else Trials.read(trials)
    embeddings = embed_files(model, root, listed.files, frames=frames, windows=windows, world=world, progress=progress)
    scores = score_trials(embeddings, listed)
    evaluation = Evaluation(
        eer=eer(scores, listed.labels),
        min_dcf={prior: min_dcf(scores, listed.labels, p_target=float(prior)) for prior in _PRIORS},
        threshold=eer_threshold(scores, listed.labels),
        calibration=fit_calibration(scores, listed.labels),
        trials=listed,
        scores=scores,
        embeddings=embeddings,
    )
    if out is not None:
        with raised_together(world):
            if world.is_main:
                evaluation.write(out)
    return evaluation
