"""How busy the machine is: samples at a fixed interval, by MLflow's own instruments and under its names.

MLflow's own thread is not used: it drops what a server does not take.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from cel_dist.tracking.recorded import SYSTEM_METRICS, Point, points_of, read_records

logger = logging.getLogger(__name__)


class SystemMonitor:
    """A thread that samples load, memory, disk, network and GPUs of this machine.

    A sample becomes a line of `system_metrics.jsonl`, whose `step` counts samples over all resumptions of the run, and
    points for MLflow. Losing a sample to a full disk does not end a training.

    Args:
        run_dir: folder of the run.
        interval_seconds: from sample to sample; the first one is taken at once.
        put: told of the points of each sample.
    """

    def __init__(self, run_dir: Path, interval_seconds: float, put: Callable[[Iterable[Point]], None]) -> None:
        self._path, self._interval, self._put = run_dir / SYSTEM_METRICS, interval_seconds, put
        self._step = max((record["step"] for record in read_records(self._path)), default=0)
        self._begin_line()
        self._instruments = _instruments()
        self._is_told = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="system metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take no more samples; waits for the one that is being taken."""
        self._stopped.set()
        self._thread.join()

    def _work(self) -> None:
        while True:
            self._sample()
            if self._stopped.wait(self._interval):
                return

    def _sample(self) -> None:
        self._step += 1
        seconds = round(time.time(), 3)
        values: dict[str, float] = {}
        for instrument in self._instruments:
            instrument.collect_metrics()
            values |= {f"system/{name}": value for name, value in instrument.aggregate_metrics().items()}
            instrument.clear_metrics()
        self._write({"step": self._step, "time": seconds, **values})
        self._put(points_of(values, step=self._step, seconds=seconds))

    def _begin_line(self) -> None:
        """Cut off what a killed process left of a line."""
        if self._path.exists():
            content = self._path.read_bytes()
            os.truncate(self._path, content.rfind(b"\n") + 1)

    def _write(self, record: dict[str, float]) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
        except OSError as error:
            if not self._is_told:
                logger.warning("samples are missing in %s: %s", self._path, (error.strerror or str(error)).lower())
            self._is_told = True


def _instruments() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    instruments = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        instruments.append(GPUMonitor())
    except ImportError:
        if torch.cuda.is_available():
            logger.warning("system metrics are without GPUs: that needs the package nvidia-ml-py")
    except RuntimeError:
        # There is no GPU.
        pass
    return instruments
