"""Runs of training for tests: a configuration for a few short steps, a run in every rank, and what it wrote."""

import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
CEL = [sys.executable, "-m", "cel_dist"]
LOSSES = ("loss", "similarity", "uniformity", "alignment", "accuracy", "grad_norm", "w", "b", "lr")


def write_config(corpus: Any, folder: Path, name: str = "run", **sections: dict[str, Any]) -> Path:
    """A configuration of the run `folder/name` on the small corpus, five steps an epoch; returns the file."""
    tree: dict[str, Any] = {
        "run": {"dir": str(folder / name)},
        "data": {
            "shards": str(corpus.shards),
            "bank": str(corpus.bank),
            "segment_frames": 60,
            "workers": 0,
        },
        "train": {"batch_size": 8, "epochs": 1, "log_every": 1, "threads": 1},
        "checkpoint": {"every_steps": 2},
        "tracking": {"enabled": False},
    }
    for section, values in sections.items():
        tree.setdefault(section, {}).update(values)
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def copy_of_scripts(folder: Path) -> Path:
    """A checkout of the scripts alone, beside a .venv whose programs are those that run this test."""
    shutil.copytree(Path(__file__).parent.parent / "launch", folder / "launch")
    (folder / ".venv").symlink_to(Path(sys.executable).parent.parent)
    return folder


def train_job(config, overrides=(), resume="auto"):
    """Train in the world of the environment; the outcome as a dict, or the failure as a line."""
    from cel_dist.config_file import load_config
    from cel_dist.errors import CelError, RunError
    from cel_dist.training.trainer import train

    try:
        return asdict(train(load_config(config, overrides), resume))
    except (CelError, RunError) as error:
        return f"{type(error).__name__}: {error}"


def smooth_train_job(config, overrides=(), resume="auto"):
    """`train_job` without kinks: where a value happens to lie on one, rounding moves a gradient by a thousandth."""
    with patch.object(torch, "relu", torch.nn.functional.silu):
        return train_job(config, overrides, resume)


def train_and_name_threads(config, overrides=()):
    """`train_job`, the names of the threads that are there afterwards, and whether MLflow was loaded."""
    outcome = train_job(config, overrides)
    return (
        outcome,
        [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")],
        "mlflow" in sys.modules,
    )


def records(run: Path, name: str = "metrics.jsonl"):
    """The objects of a file of records."""
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def losses(run: Path):
    """Losses and gradient norms by step, to compare runs bit by bit."""
    return {row["step"]: [row[name] for name in LOSSES if name in row] for row in records(run)}
