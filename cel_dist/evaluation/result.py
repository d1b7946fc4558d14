"""What an evaluation found, and its files."""

import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cel_dist.back_end import BackEnd
from cel_dist.data.files import write_files
from cel_dist.description import Calibration
from cel_dist.evaluation.bootstrap import LEVEL, Intervals
from cel_dist.evaluation.diagnostics import DIAGNOSTICS_FILE, PICTURE_FILE
from cel_dist.evaluation.trials import Trials
from cel_dist.metrics import RankedTrials
from cel_dist.model import SpeakerModel

SCORES_FILE = "scores.txt"
EMBEDDINGS_FILE = "embeddings.npz"
DET_FILE = "det.png"
DET_POINTS_FILE = "det.tsv"
HISTOGRAM_FILE = "scores.png"

_LINES_AT_ONCE = 100_000


@dataclass(frozen=True)
class CalibrationReport:
    """What a calibration is worth on a list of trials.

    Attributes:
        fitted_on: `these trials` (then the figures flatter it), or the name of the list that the model's calibration
            was fitted on.
        cllr: cost of the log-likelihood ratios, in bits.
        min_cllr: what it would be if only their order counted.
        act_dcf: normalised cost of the decisions at the Bayes threshold, by prior.
        eer: equal error rate of the log-likelihood ratios: another one than that of the scores if durations count.
    """

    fitted_on: str
    cllr: float
    min_cllr: float
    act_dcf: dict[str, float]
    eer: float


@dataclass(frozen=True)
class Evaluation:
    """What a model does on a list of M trials over N utterances.

    Attributes:
        eer: equal error rate, a fraction.
        min_dcf: normalised minimum detection cost by prior of a target trial ("0.01", "0.05"), both costs 1.
        threshold: score at the equal error rate; a trial is accepted at or above it. It is one of `compensated`.
        calibration: score to probability, fitted on these trials.
        trials: the trials, with their labels.
        scores: float64 [M].
        compensated: float64 [M], what is decided by: `scores` or, if durations count, those that `calibration` makes of
            them for the usual duration.
        embeddings: float32 [N, D] or [N, windows, D], row i for `trials.files[i]`.
        calibrated: what the model's calibration is worth here or, without one, `calibration`.
        back_end: what made scores of embeddings.
        cohort: name of the list that a back end of this evaluation's own comes from.
        intervals: of EER and minDCF, if asked for.
    """

    eer: float
    min_dcf: dict[str, float]
    threshold: float
    calibration: Calibration
    trials: Trials
    scores: NDArray[np.float64]
    compensated: NDArray[np.float64]
    embeddings: NDArray[np.float32]
    calibrated: CalibrationReport
    back_end: BackEnd
    cohort: str | None = None
    intervals: Intervals | None = None

    @property
    def labels(self) -> NDArray[np.int8]:
        """int8 [M], 1 for target trials."""
        return self.trials.labels

    def summary(self) -> dict[str, Any]:
        """The numbers as JSON values; `trials` and `utterances` are counts."""
        calibrated = self.calibrated
        values: dict[str, Any] = {
            "eer": self.eer,
            "min_dcf": self.min_dcf,
            "trials": len(self.trials),
            "utterances": len(self.trials.files),
            "threshold": self.threshold,
            "calibration": self.calibration.model_dump(),
            "cllr": calibrated.cllr,
            "min_cllr": calibrated.min_cllr,
            "act_dcf": calibrated.act_dcf,
            "eer_calibrated": calibrated.eer,
            "calibration_fitted_on": calibrated.fitted_on,
            "scoring": self.back_end.scoring,
            "score_norm": self.back_end.score_norm,
            "mean_subtracted": self.back_end.mean is not None,
        }
        if (intervals := self.intervals) is not None:
            values |= {
                "eer_interval": list(intervals.eer),
                "min_dcf_interval": {prior: list(ends) for prior, ends in intervals.min_dcf.items()},
                "bootstrap": {
                    "level": LEVEL,
                    "replicates": intervals.replicates,
                    "speakers": intervals.speakers,
                    "seed": intervals.seed,
                },
            }
        return values

    def calibrate(self, model: SpeakerModel) -> SpeakerModel:
        """`model`, which was evaluated, with the threshold, the calibration and the back end of this evaluation."""
        return model.calibrate(self.threshold, self.calibration, self.back_end, self.cohort)

    def write(self, folder: str | os.PathLike[str]) -> dict[str, Path]:
        """Write what `write_scores` does, the pictures `det.png` and `scores.png`, and `det.tsv`.

        `det.tsv` has the operating points that are best for some prior and costs (`RankedTrials.convex_hull`): a head,
        then lines `threshold false_positive_rate false_negative_rate` between tabs. Few, whatever the number of trials.

        Returns:
            The paths under `scores`, `embeddings`, `det`, `histogram` and `det_points`.

        Raises:
            RunError: the folder cannot be written.
        """
        from cel_dist.evaluation import plots

        picture = plots.det_plot({"": (self.scores, self.labels)})
        histogram = plots.score_histogram(self.compensated, self.labels, threshold=self.threshold)
        false_accepts, false_rejects, thresholds = RankedTrials(self.scores, self.labels).convex_hull()
        points = ["threshold\tfalse_positive_rate\tfalse_negative_rate\n"]
        points += [
            f"{threshold!r}\t{accept!r}\t{reject!r}\n"
            for threshold, accept, reject in zip(
                thresholds.tolist(), false_accepts.tolist(), false_rejects.tolist(), strict=True
            )
        ]
        contents = {
            "det": (DET_FILE, [picture]),
            "histogram": (HISTOGRAM_FILE, [histogram]),
            "det_points": (DET_POINTS_FILE, ["".join(points).encode()]),
        }
        return {**self.write_scores(folder), **write_files(Path(folder), contents, "the evaluation")}

    def write_scores(self, folder: str | os.PathLike[str]) -> dict[str, Path]:
        """Write `scores.txt` (lines `label enrol test score`) and `embeddings.npz` (`names` [N], `embeddings`).

        Diagnostics of an earlier evaluation in the folder are removed: they are of other scores. Blanks separate the
        columns, or tabs if the name of a file holds white space.

        Returns:
            The paths under `scores` and `embeddings`.

        Raises:
            RunError: the folder cannot be written.
        """
        packed = io.BytesIO()
        np.savez(packed, names=np.array(self.trials.files), embeddings=self.embeddings)
        contents: dict[str, tuple[str, Iterable[bytes]]] = {
            "scores": (SCORES_FILE, self._score_lines()),
            "embeddings": (EMBEDDINGS_FILE, [packed.getvalue()]),
        }
        paths = write_files(Path(folder), contents, "the evaluation")
        for name in (DIAGNOSTICS_FILE, PICTURE_FILE):
            (Path(folder) / name).unlink(missing_ok=True)
        return paths

    def _score_lines(self) -> Iterator[bytes]:
        """The lines in pieces: all of a few million would take a gigabyte."""
        files, trials = self.trials.files, self.trials
        gap = " " if all(len(name.split()) == 1 for name in files) else "\t"
        for begin in range(0, len(trials), _LINES_AT_ONCE):
            part = slice(begin, begin + _LINES_AT_ONCE)
            columns = (trials.labels[part], trials.enrol[part], trials.test[part], self.scores[part])
            rows = zip(*(column.tolist() for column in columns), strict=True)
            yield "".join(
                gap.join((str(label), files[enrol], files[test], f"{score:.8f}\n"))
                for label, enrol, test, score in rows
            ).encode()
