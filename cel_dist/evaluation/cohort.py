"""A back end from a list of utterances: which ones, their embeddings, what is made of them."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cel_dist.back_end import BackEnd, Embeddings, ScoreNorm, Scoring
from cel_dist.distributed import World
from cel_dist.errors import CelError
from cel_dist.evaluation.cutting import WHOLE, Cutting
from cel_dist.evaluation.embed import Progress, embed_files, file_sizes
from cel_dist.evaluation.lists import UtteranceList
from cel_dist.model import SpeakerModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BackEndSettings:
    """How scores are made of embeddings; replaces what is stored with the model as a whole.

    Attributes:
        scoring: how two embeddings are compared.
        subtract_mean: take the cohort's mean off all embeddings.
        score_norm: see `BackEnd`; None for none.
        cohort: list of lines `path` or `path speaker`, speakers that are not in the trials. With speakers, the
            embeddings of each are averaged, and the average counts as one. Needed for the mean and for norms.
        cohort_root: folder to which its paths are relative. Default: that of the trials.
        top_n: of the norm `as`.

    Raises:
        CelError: a cohort is missing, or given for nothing.
    """

    scoring: Scoring = "negative_euclidean"
    subtract_mean: bool = False
    score_norm: ScoreNorm | None = None
    cohort: Path | None = None
    cohort_root: Path | None = None
    top_n: int = 300

    def __post_init__(self) -> None:
        needs_cohort = self.subtract_mean or self.score_norm is not None
        if needs_cohort and self.cohort is None:
            what = f"the score norm '{self.score_norm}'" if self.score_norm else "the mean to subtract"
            raise CelError(f"{what} needs a cohort; give a list of utterances of other speakers with --cohort")
        if self.cohort is not None and not needs_cohort:
            raise CelError("a cohort alone changes nothing; add a score norm with --score-norm, or --subtract-mean")
        if self.top_n < 2:
            raise CelError(f"top_n={self.top_n}; give at least 2, a deviation of one score is nothing")


@dataclass(frozen=True)
class Cohort:
    """The utterances behind a back end, checked: they exist.

    Attributes:
        root: folder to which the paths are relative.
        utterances: the list.
    """

    root: Path
    utterances: UtteranceList

    @classmethod
    def read(
        cls,
        settings: BackEndSettings,
        root: str | os.PathLike[str],
        trial_files: Sequence[str],
        cutting: Cutting = WHOLE,
    ) -> "Cohort | None":
        """The cohort that `settings` name, None if they name none; warns of utterances that are in the trials, too.

        Args:
            settings: what was asked for.
            root: of the trials.
            trial_files: utterances of the trials, paths relative to `root`.
            cutting: of the trials, and so of the cohort.

        Raises:
            CelError: as `UtteranceList.read`; files are missing, there are too few for a norm, or windows are wanted of
                speakers.
        """
        if settings.cohort is None:
            return None
        utterances = UtteranceList.read(settings.cohort)
        speakers = utterances.speakers
        if speakers is not None and cutting.keeps_windows:
            raise CelError(
                "a cohort with speakers is averaged over whole utterances, and the trials are cut into windows; leave "
                "out --frames, or the column of speakers"
            )
        if settings.score_norm is not None and len(set(speakers or utterances.files)) < 2:
            raise CelError(
                f"{settings.cohort} has one {'utterance' if speakers is None else 'speaker'}, and the score norm "
                f"'{settings.score_norm}' needs a cohort of at least two; give a longer list"
            )
        place = Path(root if settings.cohort_root is None else settings.cohort_root)
        file_sizes(place, utterances.files)
        tried = {os.path.abspath(Path(root) / name) for name in trial_files}
        shared = [name for name in utterances.files if os.path.abspath(place / name) in tried]
        if shared:
            logger.warning(
                "%d of %d utterances of the cohort %s are in the trials, too (first: %s); a cohort should be of other "
                "speakers, leave them out",
                len(shared),
                len(utterances.files),
                settings.cohort,
                shared[0],
            )
        return cls(place, utterances)

    def embed(
        self,
        model: SpeakerModel,
        *,
        cutting: Cutting,
        world: World,
        progress: Progress | None,
    ) -> Embeddings:
        """Unit embeddings of the cohort, as `embed_files` makes them; one a speaker, sorted, if the list has speakers.

        Raises:
            CelError: as `embed_files`.
        """
        speakers = self.utterances.speakers
        rows = embed_files(
            model,
            self.root,
            self.utterances.files,
            cutting=cutting,
            world=world,
            progress=progress,
        )
        return rows if speakers is None else speaker_means(rows, speakers)


def fitted_back_end(cohort: Embeddings | None, settings: BackEndSettings) -> BackEnd:
    """The back end that `settings` ask for, from the embeddings of the cohort they name."""
    if cohort is None:
        return BackEnd(scoring=settings.scoring)
    return BackEnd.fit(
        cohort,
        scoring=settings.scoring,
        subtract_mean=settings.subtract_mean,
        score_norm=settings.score_norm,
        top_n=settings.top_n,
    )


def speaker_means(rows: Embeddings, speakers: Sequence[str]) -> Embeddings:
    """Means of the unit embeddings [N, D] of each speaker, of unit length, in the order of the sorted names.

    >>> rows = np.array([[1, 0], [0, 1], [0, 1]], np.float32)
    >>> speaker_means(rows, ["b", "a", "a"]).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    _, places = np.unique(np.asarray(speakers), return_inverse=True)
    sums = np.zeros((places.max() + 1, rows.shape[1]))
    np.add.at(sums, places, rows)
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    means: Embeddings = (sums / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    return means
