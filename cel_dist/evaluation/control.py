"""The control: how well the trials are told apart with next to no voice.

Utterances of one session share microphone, room and background. A model, and an EER, may owe all they have to that. So
the same trials are scored from the quietest tenth of the frames, where next to no speech is:

    spectrum    the cosine of their mean log-mel spectra, each band with zero mean and unit variance over the utterances
                of the list
    whitened    the same with the bands made uncorrelated over the utterances of the list, by their covariance with the
                shrinkage of Ledoit and Wolf (2004, doi 10.1016/S0047-259X(03)00096-4)
    model       the score of the model that gets these frames alone (`SpeakerModel.embed_log_mel`)

None of them knows a label. For comparison there is the whitened mean spectrum of all frames, in which voice and channel
are mixed.

Frames are cut out of the spectrum, not out of the waveform: joints of a waveform click, and a click is in all bands of
the frames around it. What the model gets is normalised by itself; by mean and variance of the whole utterance the voice
in the other frames would shine through.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from cel_dist.evaluation.embed import Progress
from cel_dist.evaluation.geometry import unit_rows
from cel_dist.evaluation.groups import MIN_TRIALS
from cel_dist.evaluation.scoring import score_trials
from cel_dist.evaluation.trials import Trials
from cel_dist.features import quietest_frames
from cel_dist.metrics import eer
from cel_dist.model import SpeakerModel

QUIET_SHARE = 0.1

CLEARLY_BELOW = 0.5
"""A model's EER is clearly below the control's if it is less than this part of it."""

_STRATA = 20


class MatchedTrials(BaseModel):
    """Trials chosen so that the control cannot tell them apart: as many targets as non-targets at every control score.

    Attributes:
        trials: their number, half of them targets.
        control_eer: of the control on them, near one half by construction.
        model_eer: of the model on them: what it knows besides what the control knows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    trials: int
    control_eer: float
    model_eer: float


class Control(BaseModel):
    """EERs of one list, by the model on whole utterances and by what has no voice to go by.

    Attributes:
        quiet_share: of the frames, those with the least power.
        model_eer: of the model on whole utterances, as evaluated.
        spectrum_eer, whitened_eer: of the mean spectrum of the quietest frames.
        quiet_model_eer: of the model that gets the quietest frames alone.
        control_eer: the lowest of these three, that of the control.
        all_frames_eer: of the whitened mean spectrum of all frames.
        correlation_targets, correlation_non_targets: of the model's scores with those of the control, within the target
            and within the non-target trials; None where either does not vary.
        matched: the model where the control is at chance; None if too few trials are left.
        is_clearly_below: `model_eer` is less than `CLEARLY_BELOW` times `control_eer`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    quiet_share: float
    model_eer: float
    spectrum_eer: float
    whitened_eer: float
    quiet_model_eer: float
    control_eer: float
    all_frames_eer: float
    correlation_targets: float | None
    correlation_non_targets: float | None
    matched: MatchedTrials | None
    is_clearly_below: bool


def score_without_voice(
    model: SpeakerModel,
    root: str | Path,
    trials: Trials,
    scores: NDArray[np.float64],
    *,
    min_trials: int = MIN_TRIALS,
    progress: Progress | None = None,
) -> Control:
    """Score trials from the quietest frames of their utterances, and compare.

    Args:
        model: also its front end is used.
        root: folder to which the files of `trials` are relative.
        trials: M trials.
        scores: [M] of the model on whole utterances.
        min_trials: fewest targets for a rate on matched trials.
        progress: told after each utterance.

    Raises:
        CelError: audio is missing or unreadable.
        RunError: the encoder's output is not finite.
    """
    quiet, whole, embeddings = [], [], []
    for done, excerpts in enumerate(trials.recordings, start=1):
        log_mel = torch.cat([model.log_mel(excerpt.below(root)) for excerpt in excerpts], dim=1)
        chosen = log_mel[:, quietest_frames(log_mel, QUIET_SHARE)]
        quiet.append(chosen.mean(dim=1).cpu().numpy())
        whole.append(log_mel.mean(dim=1).cpu().numpy())
        embeddings.append(model.embed_log_mel(chosen))
        if progress:
            progress(done, len(trials.files))
    ways = {
        "spectrum": score_trials(unit_rows(_standardised(quiet)).astype(np.float32), trials),
        "whitened": score_trials(unit_rows(_whitened(quiet)).astype(np.float32), trials),
        "model": score_trials(np.stack(embeddings), trials),
    }
    eers = {name: eer(way, trials.labels) for name, way in ways.items()}
    strongest = min(eers, key=lambda name: eers[name])
    control, model_eer = ways[strongest], eer(scores, trials.labels)
    targets = trials.labels == 1
    return Control(
        quiet_share=QUIET_SHARE,
        model_eer=model_eer,
        spectrum_eer=eers["spectrum"],
        whitened_eer=eers["whitened"],
        quiet_model_eer=eers["model"],
        control_eer=eers[strongest],
        all_frames_eer=eer(score_trials(unit_rows(_whitened(whole)).astype(np.float32), trials), trials.labels),
        correlation_targets=_correlation(scores[targets], control[targets]),
        correlation_non_targets=_correlation(scores[~targets], control[~targets]),
        matched=_on_matched_trials(scores, control, trials.labels, min_trials),
        is_clearly_below=model_eer < CLEARLY_BELOW * eers[strongest],
    )


def _standardised(rows: list[NDArray[np.float32]]) -> NDArray[np.float64]:
    """Columns with zero mean and unit variance over the utterances; one that does not vary stays zero."""
    values = np.stack(rows).astype(np.float64)
    centred = values - values.mean(axis=0)
    spread = centred.std(axis=0)
    # What is left of a constant after rounding is no difference between utterances.
    varies = spread > 1e-6 * (1 + np.abs(values).max(axis=0))
    return np.where(varies, centred / np.where(varies, spread, 1), 0)


def _whitened(rows: list[NDArray[np.float32]]) -> NDArray[np.float64]:
    """Standardised columns, made uncorrelated by their covariance shrunk towards a multiple of the identity."""
    values = _standardised(rows)
    num, size = values.shape
    covariance = values.T @ values / num
    level = np.trace(covariance) / size
    if level == 0:
        return values
    distance = np.square(covariance - level * np.eye(size)).sum()
    # Sum over the utterances of |z z' - C|^2, in closed form because the mean of z z' is C.
    noise = (np.square(np.square(values).sum(axis=1)).sum() - num * np.square(covariance).sum()) / num**2
    shrinkage = min(1.0, noise / distance) if distance > 0 else 1.0
    variances, axes = np.linalg.eigh((1 - shrinkage) * covariance + shrinkage * level * np.eye(size))
    floor = 1e-6 * variances[-1]
    return np.asarray(values @ axes / np.sqrt(np.maximum(variances, floor)))


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _on_matched_trials(
    scores: NDArray[np.float64], control: NDArray[np.float64], labels: NDArray[np.int8], min_trials: int
) -> MatchedTrials | None:
    """The model on as many targets as non-targets from each stratum of the control's scores.

    The strata are between quantiles of the scores that both classes have. Which of the more numerous class are taken is
    drawn with a fixed seed.
    """
    targets, others = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    low = max(control[targets].min(), control[others].min())
    high = min(control[targets].max(), control[others].max())
    common = control[(control >= low) & (control <= high)]
    if len(common) == 0:
        return None
    edges = np.quantile(common, np.linspace(0, 1, _STRATA + 1)[1:-1])
    generator = np.random.default_rng(0)
    chosen = []
    for stratum in range(_STRATA):
        in_stratum = [
            part[(np.searchsorted(edges, control[part]) == stratum) & (control[part] >= low) & (control[part] <= high)]
            for part in (targets, others)
        ]
        number = min(len(part) for part in in_stratum)
        chosen += [generator.permutation(part)[:number] for part in in_stratum]
    rows = np.concatenate(chosen)
    if len(rows) < 2 * max(1, min_trials):
        return None
    return MatchedTrials(
        trials=len(rows), control_eer=eer(control[rows], labels[rows]), model_eer=eer(scores[rows], labels[rows])
    )
