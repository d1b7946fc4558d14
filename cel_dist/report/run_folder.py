"""What lies in the folder of a run, read for its report."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from cel_dist.config_file import read_settings
from cel_dist.data.index import INDEX_NAME, Index
from cel_dist.data.shards import MANIFEST_NAME, Manifest
from cel_dist.errors import CelError

if TYPE_CHECKING:
    from cel_dist.evaluation.diagnostics import Diagnostics
    from cel_dist.metrics import RankedTrials

Record: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Scores:
    """The scored trials of the best model, as `scores.txt` holds them: M trials by label, utterances and score."""

    labels: npt.NDArray[np.int64]
    enrol: list[str]
    test: list[str]
    scores: npt.NDArray[np.float64]

    @cached_property
    def ranked(self) -> "RankedTrials":
        """The trials in the order of their scores, for what is measured on them."""
        from cel_dist.metrics import RankedTrials

        return RankedTrials(self.scores, self.labels)


@dataclass(frozen=True)
class RunFolder:
    """A run as its folder tells it; what is not there is empty or None.

    Attributes:
        folder: where it lies.
        records, evaluations: of `metrics.jsonl` and `evaluations.jsonl`.
        summary: of `summary.json`.
        scores: of the best model on the validation trials.
        diagnostics: of that evaluation.
        configuration: text of `config.yaml`.
        settings: the same as sections within each other.
    """

    folder: Path
    records: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    summary: dict[str, Any]
    scores: Scores | None
    diagnostics: "Diagnostics | None"
    configuration: str
    settings: dict[str, Any] = field(repr=False)

    @classmethod
    def read(cls, run_dir: str | os.PathLike[str]) -> "RunFolder":
        """Read `metrics.jsonl` and, where they exist, `evaluations.jsonl`, `summary.json`, `config.yaml`,
        `evaluation/scores.txt` (lines `label enrol test score`) and `evaluation/diagnostics.json`.

        Raises:
            CelError: there is no such folder, it holds no metrics, or a file in it is damaged.
        """
        folder = Path(run_dir)
        if not folder.is_dir():
            raise CelError(f"there is no run folder {folder}; give the folder that run.dir of a training named")
        has_settings = (folder / "config.yaml").exists()
        return cls(
            folder,
            _read_records(folder / "metrics.jsonl"),
            _read_records(folder / "evaluations.jsonl") if (folder / "evaluations.jsonl").exists() else [],
            _read_summary(folder / "summary.json"),
            _read_scores(folder / "evaluation" / "scores.txt"),
            _read_diagnostics(folder / "evaluation"),
            _text(folder / "config.yaml"),
            read_settings(folder / "config.yaml") if has_settings else {},
        )

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.folder.resolve().name

    @property
    def trained(self) -> list[dict[str, Any]]:
        """The records that have a loss."""
        return [record for record in self.records if record.get("loss") is not None]

    @property
    def measured(self) -> list[dict[str, Any]]:
        """The evaluations that have an EER."""
        return [record for record in self.evaluations if record.get("eer") is not None]

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation with the lowest EER."""
        return min(self.measured, key=lambda record: float(record["eer"]), default=None)

    @property
    def mlflow_run(self) -> str:
        """Its number in MLflow; empty without one."""
        return _text(self.folder / "mlflow_run_id.txt").strip()

    def setting(self, section: str, name: str) -> Any:
        """A setting as it stands in `config.yaml`; None if it does not."""
        values = self.settings.get(section)
        return values.get(name) if isinstance(values, dict) else None

    @property
    def audio_root(self) -> Path | None:
        """Folder of the audio of the validation trials; None where it is not at hand."""
        root = self.setting("eval", "root")
        return Path(root) if isinstance(root, str) and Path(root).is_dir() else None

    def embeddings(self) -> tuple[list[str], npt.NDArray[np.float32]] | None:
        """Names [N] and embeddings [N, D] of the validation utterances, of windows their mean; None without them.

        Raises:
            CelError: the file is damaged.
        """
        from cel_dist.evaluation.geometry import unit_rows

        path = self.folder / "evaluation" / "embeddings.npz"
        if not path.exists():
            return None
        names, values = _read_embeddings(path)
        return names, unit_rows(values).astype(np.float32) if values.ndim == 3 else values

    def shards(self) -> tuple[Manifest, npt.NDArray[np.int64] | None] | None:
        """The manifest of the training data and the samples [N] of its utterances, None without an index; None where
        the shards are not on this machine.

        Raises:
            CelError: manifest or index are damaged.
        """
        place = self.setting("data", "shards")
        if not isinstance(place, str) or not (Path(place) / MANIFEST_NAME).is_file():
            return None
        manifest = Manifest.load(Path(place))
        has_index = (Path(place) / INDEX_NAME).is_file()
        return manifest, Index.load(Path(place), verify=False).samples if has_index else None


def _read_diagnostics(folder: Path) -> "Diagnostics | None":
    from cel_dist.evaluation.diagnostics import DIAGNOSTICS_FILE, Diagnostics

    path = folder / DIAGNOSTICS_FILE
    return Diagnostics.load(path) if path.exists() else None


def speakers_of(names: Sequence[str], scores: Scores) -> list[str]:
    """The speaker of each utterance: those that target trials connect are one voice, however their files are called.

    A speaker is called after the first folder of the paths if all of its utterances share one, else after the first of
    its utterances.

    >>> scores = Scores(np.array([1, 0]), ["a/1.wav", "b/1.wav"], ["a/2.wav", "a/2.wav"], np.array([0.0, -1.0]))
    >>> speakers_of(["a/1.wav", "a/2.wav", "b/1.wav"], scores)
    ['a', 'a', 'b']
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    place = {name: number for number, name in enumerate(names)}
    pairs = [
        (place[enrol], place[test])
        for label, enrol, test in zip(scores.labels.tolist(), scores.enrol, scores.test, strict=True)
        if label == 1 and enrol in place and test in place
    ]
    rows, columns = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    graph = coo_matrix((np.ones(len(pairs)), (rows, columns)), shape=(len(names), len(names)))
    _, voices = connected_components(graph, directed=False)
    called: dict[int, str] = {}
    for voice in np.unique(voices).tolist():
        members = [names[number] for number in np.flatnonzero(voices == voice).tolist()]
        folders = {Path(member).parts[0] for member in members if len(Path(member).parts) > 1}
        called[voice] = folders.pop() if len(folders) == 1 else members[0]
    return [called[voice] for voice in voices.tolist()]


def _read_records(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CelError(f"cannot read {path}: {error.strerror}; give the folder of a run that has begun") from None
    records = []
    # What follows the last line break was cut off in the middle of writing.
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            record = json.loads(line)
            record["step"], record["epoch"]
        except (ValueError, TypeError, KeyError):
            raise CelError(f"{path}, line {number}, is no record with a step and an epoch; remove that line") from None
        records.append(record)
    return records


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        summary = json.loads(_text(path) or "{}")
    except ValueError:
        raise CelError(f"{path} is not valid JSON; remove it, and the report does without") from None
    return summary if isinstance(summary, dict) else {}


def _read_scores(path: Path) -> Scores | None:
    from cel_dist.evaluation.trials import split_columns

    rows = [split_columns(line, 4) for line in _text(path).split("\n") if line]
    if not rows:
        return None
    try:
        labels, enrol, test, scores = zip(*rows, strict=True)
        return Scores(
            np.array([int(label) for label in labels]), list(enrol), list(test), np.array(scores, dtype=np.float64)
        )
    except ValueError:
        raise CelError(f"{path} has lines that are not 'label enrol test score'; evaluate again") from None


def _read_embeddings(path: Path) -> tuple[list[str], npt.NDArray[np.float32]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive["names"].tolist(), archive["embeddings"]
    except (OSError, ValueError, KeyError) as error:
        raise CelError(f"{path} does not hold names and embeddings ({error}); remove it or evaluate again") from None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
