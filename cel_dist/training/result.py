"""The outcome of a run, as its last step leaves it in `summary.json` for whoever started the processes."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from cel_dist.data.files import atomic_write

SUMMARY = "summary.json"


@dataclass
class TrainResult:
    """Outcome of a run.

    Attributes:
        run_dir: folder of the run.
        steps: optimizer steps taken in all, over every resumption.
        eer: lowest validation EER, a fraction; None without a validation list.
        eer_before: validation EER of the untrained encoder.
        seconds: wall-clock time of this process's part, evaluation included.
        utterances_per_second: utterances trained on per second of training steps, over this process's part.
        model_uri: where MLflow has the best encoder; None where nothing is recorded, or MLflow did not take it.
        report: the HTML report.
    """

    run_dir: str
    steps: int
    eer: float | None
    eer_before: float | None
    seconds: float
    utterances_per_second: float | None
    model_uri: str | None
    report: str

    def nothing_to_do(self) -> str:
        """What a user is told who starts a finished run again."""
        return (
            f"nothing to do: the run in {self.run_dir} has taken its {self.steps} steps; raise train.max_steps or "
            "train.epochs to go on, or choose another run.dir"
        )

    def write(self, run_dir: Path) -> None:
        """Write `summary.json`, atomically."""
        with atomic_write(run_dir / SUMMARY) as file:
            file.write(json.dumps(asdict(self), indent=2).encode())

    @classmethod
    def read(cls, run_dir: Path) -> "TrainResult | None":
        """What `write` left in `run_dir`; None if there is none or it is damaged."""
        try:
            values = json.loads((run_dir / SUMMARY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        complete = isinstance(values, dict) and values.keys() == {field.name for field in fields(cls)}
        return cls(**values) if complete else None
