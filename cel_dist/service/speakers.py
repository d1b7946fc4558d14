"""Enrolled people and the model that tells them apart."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cel_dist.data.audio import SAMPLE_RATE
from cel_dist.errors import CelError
from cel_dist.model import SpeakerModel, Verification
from cel_dist.service.fingerprint import fingerprint
from cel_dist.service.store import Person, SpeakerStore, checked_name
from cel_dist.utterance import Excerpt

Recording: TypeAlias = str | os.PathLike[str] | NDArray[np.int16]
"""Path of an audio file, or a waveform [T] at 16 kHz."""


@dataclass(frozen=True)
class Candidate:
    """An enrolled person against an utterance; see `Verification`."""

    name: str
    score: float
    probability: float | None
    same: bool | None
    threshold: float | None


@dataclass(frozen=True)
class Identification:
    """Who an utterance may be of.

    Attributes:
        identified: the most similar person, if the score reaches the threshold; None if nobody's does, or the model has
            no threshold.
        candidates: the most similar people, the first one most.
    """

    identified: str | None
    candidates: tuple[Candidate, ...]


class Speakers:
    """Verification and identification against a store.

    Args:
        model: that makes and compares embeddings.
        path: of the store.
        create: make the store if there is none.

    Raises:
        CelError: there is no such store, it is none, or its embeddings are of another model.
        RunError: it cannot be read or made.
    """

    def __init__(self, model: SpeakerModel, path: Path, *, create: bool = False) -> None:
        self.model = model
        self.fingerprint = fingerprint(model)
        self.store = SpeakerStore(path, self.fingerprint, model.description.encoder.embedding_dim, create=create)

    def enrol(
        self,
        name: str,
        recordings: Sequence[Recording],
        max_recordings: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Person:
        """Enrol somebody, or add recordings to somebody who is enrolled: all of them, or none.

        Args:
            name: of the person.
            recordings: at least one.
            max_recordings: that the store may hold in all.
            progress: called with the recordings done and to do.

        Raises:
            CelError: a recording cannot be embedded, or there is none; the name is none (`NameFaultError`); the store
                is full (`StoreFullError`).
            RunError: the store cannot be written.
        """
        name = checked_name(name)
        if not recordings:
            raise CelError(f"no recording to enrol '{name}' with; give at least one")
        rows: list[NDArray[np.float32]] = []
        seconds: list[float] = []
        for done, recording in enumerate(recordings, start=1):
            try:
                rows.append(self.model.embed(recording))
            except CelError as error:
                # A waveform has no name; a file is named in the message.
                if isinstance(recording, np.ndarray) and len(recordings) > 1:
                    raise CelError(f"recording {done} of {len(recordings)}: {error}") from None
                raise
            seconds.append(_seconds(recording))
            if progress is not None:
                progress(done, len(recordings))
        return self.store.add(name, np.stack(rows), seconds, max_recordings)

    def verify(self, name: str, recording: Recording) -> Verification:
        """Whether an utterance is of somebody who is enrolled.

        Raises:
            UnknownPersonError: nobody of this name is enrolled.
            CelError: the recording cannot be embedded.
        """
        name = checked_name(name)
        gallery = self.store.gallery()
        place = gallery.place(name)
        score = self.model.score(gallery.embeddings[place], self.model.embed(recording))
        return self.model.decide(score, min(gallery.seconds[place], _seconds(recording)))

    def identify(self, recording: Recording, top: int = 5) -> Identification:
        """Who of those enrolled an utterance may be of.

        Args:
            recording: the utterance.
            top: number of candidates at most.

        Raises:
            CelError: the recording cannot be embedded, or `top` is below 1.
        """
        if top < 1:
            raise CelError(f"top={top}; ask for at least one candidate")
        embedding = self.model.embed(recording)
        gallery = self.store.gallery()
        number = len(gallery.names)
        if number == 0:
            return Identification(None, ())
        rows = np.concatenate([gallery.embeddings, embedding[None]])
        scores = self.model.back_end.score(rows, np.arange(number), np.full(number, number))
        seconds = np.minimum(gallery.seconds, _seconds(recording))
        calibration = self.model.description.calibration
        # By what is compared with one threshold for all; stable: of equals the order of the names decides.
        compared = scores if calibration is None else calibration.compensated(scores, seconds)
        candidates = []
        for place in np.argsort(-compared, kind="stable")[:top]:
            answer = self.model.decide(float(scores[place]), float(seconds[place]))
            candidates.append(
                Candidate(gallery.names[place], answer.score, answer.probability, answer.same, answer.threshold)
            )
        first = candidates[0]
        return Identification(first.name if first.same else None, tuple(candidates))


def _seconds(recording: Recording) -> float:
    if isinstance(recording, np.ndarray):
        return len(recording) / SAMPLE_RATE
    return Excerpt(str(recording)).seconds()
