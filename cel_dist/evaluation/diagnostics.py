"""Diagnostics of an evaluation: what an EER is made of, and whether it is voice or channel that is told apart."""

import os
import textwrap
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from cel_dist.data.files import write_files
from cel_dist.errors import CelError
from cel_dist.evaluation.control import Control
from cel_dist.evaluation.geometry import Alignment, Geometry, measure_geometry
from cel_dist.evaluation.groups import MIN_TRIALS, Group, errors_by_group
from cel_dist.evaluation.metadata import Metadata
from cel_dist.evaluation.trials import Trials

DIAGNOSTICS_FILE = "diagnostics.json"
PICTURE_FILE = "diagnostics.png"

Row = tuple[str, str]
"""What, and how much of it."""


class Diagnostics(BaseModel):
    """What `diagnose` found; the content of `diagnostics.json`.

    Attributes:
        groups: errors on the whole list and on its parts.
        min_trials: fewest trials of a class for which `groups` has rates.
        not_shown: what the metadata does not allow, with the reason, a sentence each.
        geometry: alignment, uniformity and spectrum of the embeddings.
        control: the same trials without voice; None if it was not asked for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    groups: list[Group]
    min_trials: int
    not_shown: list[str]
    geometry: Geometry
    control: Control | None = None

    @classmethod
    def load(cls, path: Path) -> "Diagnostics":
        """Read a `diagnostics.json`.

        Raises:
            CelError: the file cannot be read or holds something else.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise CelError(f"cannot read {path}: {error.strerror}; check its permissions") from None
        except ValidationError as error:
            detail = error.errors()[0]
            place = ".".join(str(part) for part in detail["loc"]) or "content"
            raise CelError(
                f"{path} does not hold diagnostics ({place}: {detail['msg'].lower()}); remove it or evaluate again"
            ) from None

    def write(self, folder: str | os.PathLike[str]) -> dict[str, Path]:
        """Write `diagnostics.json` and the picture `diagnostics.png`.

        Returns:
            The paths under `diagnostics_file` and `diagnostics_picture`.

        Raises:
            RunError: the folder cannot be written.
        """
        from cel_dist.evaluation.plots import group_errors

        contents = {
            "diagnostics_file": (DIAGNOSTICS_FILE, [self.model_dump_json(indent=1).encode(), b"\n"]),
            "diagnostics_picture": (PICTURE_FILE, [group_errors(self.groups, self.control)]),
        }
        return write_files(Path(folder), contents, "the diagnostics")

    def text(self) -> str:
        """The diagnostics as a table for a terminal."""
        lines = [f"{'':<28}{'targets':>9}{'non-targets':>13}{'EER':>9}{'rejected':>10}{'accepted':>10}"]
        for group in self.groups:
            rates = (group.eer, group.false_rejects, group.false_accepts)
            eer, rejected, accepted = ("too few" if rate is None else f"{rate:.2%}" for rate in rates)
            lines.append(
                f"{group.label:<28}{group.targets:>9}{group.non_targets:>13}{eer:>9}{rejected:>10}{accepted:>10}"
            )
        lines.append(
            "EER: at a threshold of the part's own; rejected targets, accepted non-targets: at that of all trials"
        )
        lines.append(f"too few: fewer than {self.min_trials} trials of a class")
        lines += [f"not shown: {reason}" for reason in self.not_shown]
        lines += [f"{what:<50}{value}" for what, value in [*self.geometry_rows(), *self.control_rows()]]
        if self.control is not None:
            lines += textwrap.wrap(verdict(self.control), 100)
        return "\n".join(lines)

    def geometry_rows(self) -> list[Row]:
        """How the embeddings lie, for people."""
        found = self.geometry
        sampled = found.uniformity_utterances < found.utterances
        of = f" (of {found.uniformity_utterances} utterances)" if sampled else ""
        alignments = (
            ("alignment of target trials", found.alignment_targets),
            ("alignment of one speaker's utterances", found.alignment_speakers),
            ("alignment within sessions", found.alignment_within_sessions),
            ("alignment between sessions", found.alignment_between_sessions),
        )
        rows = [(name, _alignment(value)) for name, value in alignments if value is not None]
        rows.append(("uniformity", f"{found.uniformity:.4f}{of}"))
        rank = f"{found.effective_rank:.1f} of {found.dimensions}, {found.components} hold 90% of the variance"
        rows.append(("dimensions in use (effective rank)", rank))
        return rows

    def control_rows(self) -> list[Row]:
        """The control, for people; empty without one."""
        control = self.control
        if control is None:
            return []
        quietest = f"the quietest {control.quiet_share:.0%} of the frames"
        rows = [
            ("EER of the model", f"{control.model_eer:.2%}"),
            (f"EER of {quietest}: spectrum", f"{control.spectrum_eer:.2%}"),
            ("their whitened spectrum", f"{control.whitened_eer:.2%}"),
            ("the model that gets them alone", f"{control.quiet_model_eer:.2%}"),
            ("EER of the whitened spectrum of all frames", f"{control.all_frames_eer:.2%}"),
        ]
        for kind, value in (("targets", control.correlation_targets), ("non-targets", control.correlation_non_targets)):
            if value is not None:
                rows.append((f"correlation with the control, {kind}", f"{value:.2f}"))
        matched = control.matched
        if matched is not None:
            text = f"{matched.model_eer:.2%} ({matched.trials} trials, control {matched.control_eer:.2%})"
            rows.append(("EER of the model where the control is at chance", text))
        return rows


class Scored(Protocol):
    """What diagnostics need of an `Evaluation`."""

    @property
    def trials(self) -> Trials:
        """M trials over N utterances."""

    @property
    def scores(self) -> NDArray[np.float64]:
        """[M]."""

    @property
    def compensated(self) -> NDArray[np.float64]:
        """[M], what the threshold is one of."""

    @property
    def threshold(self) -> float:
        """Of the whole list."""

    @property
    def embeddings(self) -> NDArray[np.float32]:
        """[N, D] or [N, windows, D]."""


def diagnose(
    evaluation: Scored,
    metadata: Metadata | None = None,
    control: Control | None = None,
    *,
    min_trials: int = MIN_TRIALS,
) -> Diagnostics:
    """Errors by group and the geometry of the embeddings, from what was evaluated.

    Args:
        evaluation: trials, scores as they are and as they are decided by, threshold and embeddings.
        metadata: of `evaluation.trials.files`; without it there are no parts of the list.
        control: of `score_without_voice`.
        min_trials: fewest trials of a class for a rate.

    Raises:
        CelError: metadata and trials contradict each other.
    """
    trials = evaluation.trials
    if metadata is not None:
        metadata.check(trials)
    groups, not_shown = errors_by_group(
        evaluation.scores,
        trials,
        metadata,
        evaluation.threshold,
        compensated=evaluation.compensated,
        min_trials=min_trials,
    )
    return Diagnostics(
        groups=groups,
        min_trials=min_trials,
        not_shown=not_shown,
        geometry=measure_geometry(evaluation.embeddings, trials, metadata),
        control=control,
    )


def verdict(control: Control) -> str:
    """What the control says about the model, in plain words."""
    rates = f"The model's EER of {control.model_eer:.2%} is {{}} the {control.control_eer:.2%} of the control, "
    if control.is_clearly_below:
        words = (
            rates.format("less than half of") + "which has next to no voice to go by: it hears more than the channel."
        )
    else:
        words = rates.format("not clearly below (less than half of)") + (
            "which has next to no voice to go by: background noise and channel alone can give such an EER on this "
            "list. Target trials of different sessions would tell."
        )
    if control.matched is not None:
        words += (
            f" Where the control is at chance, the model has {control.matched.model_eer:.2%}; a model that knows "
            "nothing else would have 50%."
        )
    return words


def _alignment(value: Alignment) -> str:
    return "no pairs" if value.mean is None else f"{value.mean:.4f} ({value.pairs} pairs)"
