"""Evaluation of a model on a list of trials."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cel_dist.data.files import require_folder_or_nothing
from cel_dist.description import Calibration
from cel_dist.distributed import World
from cel_dist.errors import CelError
from cel_dist.evaluation.bootstrap import bootstrap_intervals, check_draws
from cel_dist.evaluation.calibration import fingerprint, fit_calibration
from cel_dist.evaluation.cohort import BackEndSettings, Cohort, fitted_back_end
from cel_dist.evaluation.cutting import WHOLE, Cutting
from cel_dist.evaluation.embed import Progress, embed_trials, raised_together
from cel_dist.evaluation.lists import speakers_of_files
from cel_dist.evaluation.result import CalibrationReport, Evaluation
from cel_dist.evaluation.scoring import score_trials
from cel_dist.evaluation.trials import Trials
from cel_dist.metrics import RankedTrials, act_dcf, cllr
from cel_dist.model import SpeakerModel

PRIORS = ("0.01", "0.05")


@dataclass(frozen=True)
class BootstrapSettings:
    """Intervals over speakers: see `bootstrap_intervals`.

    Attributes:
        replicates: how often speakers are drawn.
        seed: of the draws.
        speakers: list of lines `path speaker`. Default: the first folder of a path is its speaker.
    """

    replicates: int = 1000
    seed: int = 0
    speakers: Path | None = None


def evaluate(
    model: SpeakerModel,
    trials: str | os.PathLike[str] | Trials,
    root: str | os.PathLike[str],
    *,
    cutting: Cutting = WHOLE,
    world: World | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    back_end: BackEndSettings | None = None,
    quality: Literal["duration"] | None = None,
    priors: Sequence[str] = PRIORS,
    bootstrap: BootstrapSettings | None = None,
) -> Evaluation:
    """Embed the utterances of a trials file, score its trials and measure the errors.

    Inside a job every rank calls this, with the default process group running; every rank returns the same numbers.

    Args:
        model: on this rank's device.
        trials: file that `Trials.read` reads, or what it and `read_protocol` return.
        root: folder to which its paths are relative.
        cutting: whole utterances, segments, or windows as published.
        world: this rank's place in the job. Default: one process.
        out: where rank 0 writes what `Evaluation.write` does. Default: nothing is written.
        progress: told after each utterance of this rank.
        back_end: how scores are made. Default: as the model has it.
        quality: what the calibration knows besides the score.
        priors: of a target trial, as text, for minDCF and actDCF.
        bootstrap: ask for intervals over speakers.

    Raises:
        CelError: a setting is out of range, the trials file or another list is at fault, audio is missing or
            unreadable, or `out` is a file.
        RunError: the encoder's output is not finite, or `out` cannot be written.
    """
    world = world or World()
    _check_settings(model, cutting, priors, back_end)
    stored = model.description.calibration
    if not cutting.is_as_verified or back_end is not None or quality is not None:
        # It was fitted on other scores than these.
        stored = None
    cohort, speakers, seconds = None, None, None
    with raised_together(world):
        if out is not None:
            require_folder_or_nothing(Path(out))
        listed = trials if isinstance(trials, Trials) else Trials.read(trials)
        if bootstrap is not None:
            speakers = speakers_of_files(listed.first_paths, bootstrap.speakers, names=listed.files)
            check_draws(listed, speakers, bootstrap.replicates)
        if back_end is not None:
            cohort = Cohort.read(back_end, root, listed.paths, cutting)
    how: dict[str, Any] = {"cutting": cutting, "world": world, "progress": progress}
    embeddings = embed_trials(model, root, listed, **how)
    chosen = model.back_end
    if back_end is not None:
        chosen = fitted_back_end(cohort.embed(model, **how) if cohort else None, back_end)
    with raised_together(world):
        if quality is not None or (stored is not None and stored.quality):
            seconds = _shorter_seconds(Path(root), listed)
    scores = score_trials(embeddings, listed, chosen)
    ranked = RankedTrials(scores, listed.labels)
    mark = {"trials": listed.origin, "trials_sha256": fingerprint(listed)}
    fitted = fit_calibration(scores, listed.labels, seconds if quality else None).model_copy(update=mark)
    compensated, threshold = scores, ranked.eer_threshold
    if fitted.quality:
        compensated = fitted.compensated(scores, seconds)
        threshold = RankedTrials(compensated, listed.labels).eer_threshold
    intervals = None
    if bootstrap is not None and speakers is not None:
        intervals = bootstrap_intervals(
            ranked, listed, speakers, priors=priors, replicates=bootstrap.replicates, seed=bootstrap.seed
        )
    evaluation = Evaluation(
        eer=ranked.eer,
        min_dcf={prior: ranked.min_dcf(float(prior)) for prior in priors},
        threshold=threshold,
        calibration=fitted,
        trials=listed,
        scores=scores,
        compensated=compensated,
        embeddings=embeddings,
        calibrated=_calibration_report(stored, fitted, scores, listed.labels, seconds, priors),
        back_end=chosen,
        cohort=_cohort_name(model, back_end),
        intervals=intervals,
    )
    if out is not None:
        with raised_together(world):
            if world.is_main:
                evaluation.write(out)
    return evaluation


def _check_settings(
    model: SpeakerModel, cutting: Cutting, priors: Sequence[str], back_end: BackEndSettings | None
) -> None:
    if cutting.frames and back_end is None and model.back_end.score_norm is not None:
        raise CelError(
            "the cohort stored with the model was embedded as whole utterances and says nothing of windows; leave out "
            "--frames, or give --score-norm and --cohort again"
        )
    for prior in priors:
        try:
            fits = 0 < float(prior) < 1
        except ValueError:
            fits = False
        if not fits:
            raise CelError(f"the prior '{prior}' is no probability between 0 and 1, both excluded; write 0.01, 0.05")


def _shorter_seconds(root: Path, trials: Trials) -> NDArray[np.float64]:
    """Duration of the shorter utterance of each trial, float64 [M]."""
    durations = np.array([sum(part.below(root).seconds() for part in parts) for parts in trials.recordings])
    shorter: NDArray[np.float64] = np.minimum(durations[trials.enrol], durations[trials.test])
    return shorter


def _calibration_report(
    stored: Calibration | None,
    fitted: Calibration,
    scores: NDArray[np.float64],
    labels: NDArray[np.int8],
    seconds: NDArray[np.float64] | None,
    priors: Sequence[str],
) -> CalibrationReport:
    is_other_list = stored is not None and stored.trials_sha256 != fitted.trials_sha256
    applied = stored or fitted
    ratios = applied.log_likelihood_ratios(scores, seconds)
    ranked = RankedTrials(ratios, labels)
    return CalibrationReport(
        fitted_on=(applied.trials or "an unknown list") if is_other_list else "these trials",
        cllr=cllr(ratios, labels),
        min_cllr=ranked.min_cllr(),
        act_dcf={prior: act_dcf(ratios, labels, float(prior)) for prior in priors},
        eer=ranked.eer,
    )


def _cohort_name(model: SpeakerModel, back_end: BackEndSettings | None) -> str | None:
    if back_end is not None:
        return None if back_end.cohort is None else back_end.cohort.name
    stored = model.description.back_end
    return None if stored is None else stored.cohort
