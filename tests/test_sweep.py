"""Sweeps on a real Ray cluster of two nodes with one core each: trials are whole runs, whatever becomes of them."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from training_runs import write_config

from cel_dist.errors import CelError
from cel_dist.sweep.outcomes import read_outcomes
from cel_dist.sweep.run import run_sweep
from cel_dist.sweep.settings import Sweep, load_sweep

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'cel_dist[sweep]'")
pytest.importorskip("optuna", reason="Optuna is not installed: pip install 'cel_dist[sweep]'")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster of two nodes that this process is connected to, and its address."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        nodes = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 << 20},
        )
        nodes.add_node(num_cpus=1, object_store_memory=80 << 20)
        ray.init(address=nodes.address, log_to_driver=False, logging_level="error")
        yield nodes.address
        ray.shutdown()
        nodes.shutdown()


def sweep_file(
    corpus: Any, folder: Path, *, space: dict[str, Any], epochs: int = 2, is_recorded: bool = True, **section: Any
) -> Path:
    return write_config(
        corpus,
        folder,
        "sweep",
        data={"segment_frames": 32},
        augment={"profile": 0},
        encoder={"embedding_dim": 32},
        train={"batch_size": 8, "epochs": epochs},
        checkpoint={"every_steps": 2, "keep_last": 1},
        eval={"trials": str(corpus.trials), "root": str(corpus.audio), "at_start": False},
        tracking={"enabled": is_recorded, "uri": f"sqlite:///{folder}/mlflow.db"},
        sweep={"space": space, **section},
    )


def ranks_below(folder: Path) -> list[psutil.Process]:
    """Training processes whose configuration lies in a folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "cel_dist.train" in words and any(word.startswith(str(folder)) for word in words):
            found.append(process)
    return found


def wait_for(condition: Any, until: float | threading.Event = 120.0) -> Any:
    """What a condition returns as soon as that is something: within so many seconds, or until an event."""
    begin = time.monotonic()
    while True:
        is_last = until.is_set() if isinstance(until, threading.Event) else time.monotonic() > begin + until
        found = condition()
        if found:
            return found
        if is_last:
            raise AssertionError("it did not happen in time")
        time.sleep(0.05)


def beside(task: Callable[[threading.Event], Any], sweep: Sweep) -> tuple[dict[str, Any], Any]:
    """Run a sweep and beside it a task, which is told when the sweep is over; returns what both did."""
    over = threading.Event()
    with ThreadPoolExecutor() as pool:
        found = pool.submit(task, over)
        try:
            result = run_sweep(sweep)
        finally:
            over.set()
        return result, found.result()


def mlflow_of(folder: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{folder}/mlflow.db")


def runs_in_mlflow(folder: Path) -> list[Any]:
    client = mlflow_of(folder)
    return list(client.search_runs([found.experiment_id for found in client.search_experiments()]))


def test_trials_run_on_both_nodes_and_one_that_is_killed_goes_on(cluster, small_corpus, tmp_path):
    space = {"optim.lr": {"log_uniform": [1e-4, 1e-2]}}
    sweep = load_sweep(sweep_file(small_corpus, tmp_path, space=space, trials=3, scheduler="median"))

    def kill_a_rank(over: threading.Event) -> Path:
        """When trials run on both nodes and one of them has a checkpoint, end its only rank."""

        def with_checkpoint() -> tuple[Path, psutil.Process] | None:
            runs = {Path(rank.info["cmdline"][3]).with_suffix(""): rank for rank in ranks_below(sweep.folder)}
            return next(
                (one for one in runs.items() if len(runs) == 2 and any(one[0].glob("checkpoints/step-*/state.json"))),
                None,
            )

        run: Path
        run, rank = wait_for(with_checkpoint, over)
        rank.send_signal(signal.SIGKILL)
        return run

    result, killed = beside(kill_a_rank, sweep)
    outcomes = {outcome.id: outcome for outcome in read_outcomes(sweep.folder)}
    assert len(outcomes) == 3
    assert {outcome.status for outcome in outcomes.values()} <= {"finished", "stopped"}
    hurt = outcomes[killed.parent.name]
    assert hurt.failures == 1
    log = killed.with_suffix(".log").read_text()
    assert "from step 0 to" in log
    # None was started more often than it failed: those that wait do not take turns with those that run.
    starts = {name: (sweep.folder / "trials" / name / "1.log").read_text().count("from step") for name in outcomes}
    assert starts == {name: 1 + outcome.failures for name, outcome in outcomes.items()}
    assert log.count("from step 0 to") == 1, "it began anew instead of going on from its checkpoint"
    best = min(outcomes.values(), key=lambda outcome: outcome.best)
    assert result["best"]["best"] == best.best
    assert Path(best.run_dir, "model", "model.json").exists()
    # Everything is free, and nothing runs on.
    assert ray.cluster_resources()["CPU"] == 2
    wait_for(lambda: ray.available_resources().get("CPU") == 2, 10)
    assert not ranks_below(sweep.folder)
    found = runs_in_mlflow(tmp_path)
    assert {run.info.status for run in found} == {"FINISHED"}
    parent = next(run for run in found if "mlflow.parentRunId" not in run.data.tags)
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {run.data.tags["sweep.trial"] for run in children} == set(outcomes)
    assert parent.data.metrics["best_eer"] == best.best
    assert {path.name for path in map(Path, result["files"].values())} == {"best.yaml", "sweep.html"}


def test_a_stopped_trial_frees_everything_and_the_next_sweep_starts(cluster, small_corpus, tmp_path):
    # With such a learning rate the second trial is far worse than the first, and ASHA ends it.
    space = {"optim.lr": {"choice": [3e-3, 0.3]}}
    file = sweep_file(
        small_corpus, tmp_path, space=space, epochs=3, search="grid", scheduler="asha", reduction=2, concurrent=1,
        is_recorded=False,
    )  # fmt: skip

    folder = tmp_path / "sweep"

    def watch(over: threading.Event) -> Path:
        """When a trial is stopped, its ranks are gone at once."""
        stopped = wait_for(lambda: [one for one in read_outcomes(folder) if one.status == "stopped"], over)
        run: Path = folder / "trials" / stopped[0].id / "1"
        wait_for(lambda: not ranks_below(run.parent), 20)
        return run

    _, stopped = beside(watch, load_sweep(file))
    outcomes = read_outcomes(folder)
    assert sorted(outcome.status for outcome in outcomes) == ["finished", "stopped"]
    assert not (stopped / "summary.json").exists()
    wait_for(lambda: ray.available_resources().get("CPU") == 2, 10)


def test_population_based_training_changes_settings_in_flight(cluster, small_corpus, tmp_path):
    space = {"optim.lr": {"log_uniform": [1e-9, 1e-2]}}
    file = sweep_file(
        small_corpus, tmp_path, space=space, epochs=3, scheduler="pbt", perturb_epochs=1, trials=2, seed=1
    )
    run_sweep(load_sweep(file))
    outcomes = read_outcomes(tmp_path / "sweep")
    assert [outcome.status for outcome in outcomes] == ["finished"] * 2
    heirs = [outcome for outcome in outcomes if outcome.origins]
    assert heirs, "no trial took over another's weights"
    heir, origin = heirs[0], heirs[0].origins[0]
    first, second = (json.loads((tmp_path / f"sweep/trials/{heir.id}/{name}.json").read_text()) for name in "12")
    assert first["values"] != second["values"]
    assert origin["trial"] != heir.id
    # The second run took up where the other trial was.
    begun = (tmp_path / f"sweep/trials/{heir.id}/2.log").read_text()
    assert f"from step {origin['step']} to" in begun
    tags = [run.data.tags for run in runs_in_mlflow(tmp_path)]
    child = next(found for found in tags if found.get("sweep.trial") == heir.id and found["sweep.run"] == "2")
    assert child["sweep.begun_from_trial"] == origin["trial"]
    donor = tmp_path / f"sweep/trials/{origin['trial']}/{origin['run']}/mlflow_run_id.txt"
    assert child["sweep.begun_from_run"] == donor.read_text().strip()


def test_a_sweep_that_is_ended_or_killed_is_closed_and_goes_on(cluster, small_corpus, tmp_path):
    space = {"optim.lr": {"choice": [1e-3, 2e-3, 3e-3]}}
    file = sweep_file(small_corpus, tmp_path, space=space, search="grid", scheduler="fifo", concurrent=1, epochs=1)
    folder = tmp_path / "sweep"
    command = [sys.executable, "-m", "cel_dist", "sweep", str(file), "--address", cluster, "--json"]

    def finished() -> list[str]:
        return [one.id for one in read_outcomes(folder) if one.status == "finished"]

    def end_by(signum: int, number: int, *options: str) -> int:
        """Start, wait until so many trials are over and the next one is recorded, and send the signal."""
        log = tmp_path / f"{number}.log"
        with log.open("wb") as err, subprocess.Popen([*command, *options], stdout=err, stderr=err) as process:

            def is_reached(condition: bool) -> bool:
                assert process.poll() is None, log.read_text()
                return condition

            wait_for(lambda: is_reached(len(finished()) == number), 900)
            wait_for(lambda: is_reached(len(list(folder.glob("trials/*/1/mlflow_run_id.txt"))) == number + 1), 300)
            process.send_signal(signum)
        # Somebody closes the records, and the ranks end with the search.
        wait_for(lambda: not ranks_below(folder), 60)
        wait_for(lambda: {run.info.status for run in runs_in_mlflow(tmp_path)} == {"FINISHED", "KILLED"}, 60)
        return process.returncode

    def written() -> dict[Path, int]:
        trials = [folder / "trials" / name for name in finished()]
        return {path: path.stat().st_mtime_ns for trial in trials for path in trial.rglob("*.jsonl")}

    assert end_by(signal.SIGTERM, 1) == 75
    first = written()
    assert end_by(signal.SIGKILL, 2, "--resume") == -signal.SIGKILL
    second = written()
    with pytest.raises(CelError, match="go on with --resume"):
        run_sweep(load_sweep(file))
    with pytest.raises(CelError, match=r"other settings than this sweep: sweep\.seed=0;"):
        run_sweep(load_sweep(file, ["sweep.seed=1"]), resume=True)
    # As after a loss of power: Ray begins anew with what it cannot read.
    state = max((folder / "tune").glob("experiment_state-*.json"))
    state.write_bytes(state.read_bytes()[:-100])
    done = subprocess.run([*command, "--resume", "--register", "found"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [outcome["status"] for outcome in result["trials"]] == ["finished"] * 3
    assert {outcome["values"]["optim.lr"] for outcome in result["trials"]} == {1e-3, 2e-3, 3e-3}
    # No trial that was over was touched again.
    assert len(first) < len(second)
    assert first.items() <= second.items()
    assert second.items() <= written().items()
    assert {run.info.status for run in runs_in_mlflow(tmp_path)} == {"FINISHED"}
    assert result["model_uri"] == "models:/found/1"
    version = mlflow_of(tmp_path).get_model_version("found", "1")
    assert version.run_id == Path(result["best"]["run_dir"], "mlflow_run_id.txt").read_text().strip()
