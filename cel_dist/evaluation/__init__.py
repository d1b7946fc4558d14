"""How well a model tells voices apart: trials, embeddings over the ranks, scores, error rates, pictures."""

from cel_dist.evaluation.calibration import fit_calibration
from cel_dist.evaluation.cohort import BackEndSettings
from cel_dist.evaluation.control import score_without_voice
from cel_dist.evaluation.diagnostics import Diagnostics, diagnose
from cel_dist.evaluation.embed import embed_files, embed_trials, write_embeddings
from cel_dist.evaluation.evaluate import PRIORS, BootstrapSettings, evaluate
from cel_dist.evaluation.result import Evaluation
from cel_dist.evaluation.scoring import score_trials
from cel_dist.evaluation.trials import Trials

__all__ = [
    "PRIORS",
    "BackEndSettings",
    "BootstrapSettings",
    "Diagnostics",
    "Evaluation",
    "Trials",
    "diagnose",
    "embed_files",
    "embed_trials",
    "evaluate",
    "fit_calibration",
    "score_trials",
    "score_without_voice",
    "write_embeddings",
]
