"""Preparing on a Ray cluster: one real one for the module, joined from this process and from others."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from prepare_corpus import NAMES, STOP_AFTER_FIRST_SHARD, contents
from ray_jobs import MarkedJob, die_if_odd, die_the_first_time, fail, square

from cel_dist.cli.app import run
from cel_dist.data.check import check_shards
from cel_dist.data.prepare import prepare
from cel_dist.data.ray_pool import run_jobs_on_ray
from cel_dist.data.shard_jobs import ShardJob, build_shard_elsewhere
from cel_dist.distributed import free_port
from cel_dist.errors import CelError, RunError
from cel_dist.ray_cluster import RETRIES

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'cel_dist[ray]'")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster of two cores that this process is connected to, and the address by which others can join it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        # Workers import the jobs of these tests.
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        context = ray.init(
            "local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20
        )
        yield context.address_info["gcs_address"]
        ray.shutdown()


@pytest.fixture(scope="module")
def straight(corpus: Path, labels: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the single process writes."""
    out = tmp_path_factory.mktemp("straight")
    prepare(corpus, out, labels=labels, samples_per_shard=2, workers=1)
    return contents(out)


def ray_workers() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.name().startswith(("ray::build_shard", "ray::IDLE"))]


def test_results_come_in_order_with_few_tasks_at_a_time(cluster: str, tmp_path: Path) -> None:
    under_way: list[int] = []

    def jobs(folder: Path) -> Iterator[MarkedJob]:
        folder.mkdir()
        for number in range(12):
            yield MarkedJob(number, folder)
            under_way.append(number + 1 - len(list(folder.glob("done-*"))))

    results = run_jobs_on_ray(square, jobs(tmp_path / "all"), 12, cluster, 3, name=str)
    assert list(results) == [number**2 for number in range(12)]
    # The next job is taken once less than three are under way.
    assert max(under_way) <= 2
    left_early = run_jobs_on_ray(square, jobs(tmp_path / "some"), 12, cluster, 3, name=str)
    assert next(left_early) == 0
    left_early.close()


def test_a_job_whose_worker_is_killed_is_done_by_another(cluster: str, tmp_path: Path) -> None:
    jobs = [MarkedJob(number, tmp_path) for number in range(2)]
    assert list(run_jobs_on_ray(die_the_first_time, jobs, 2, cluster, name=str)) == [0, 1]
    assert len(list(tmp_path.glob("died-*"))) == 2


def test_a_job_that_always_kills_its_worker_is_named(cluster: str, tmp_path: Path) -> None:
    jobs = [MarkedJob(number, tmp_path) for number in range(2)]
    results = run_jobs_on_ray(die_if_odd, jobs, 2, cluster, name=lambda job: f"shard-{job.number}.tar")
    assert next(results) == 0
    with pytest.raises(RunError, match=rf"died at each of {RETRIES + 1} tries of shard-1\.tar"):
        next(results)
    assert len(list(tmp_path.glob("try-*"))) == RETRIES + 1


def test_what_a_job_raises_comes_through_as_it_is(cluster: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        list(run_jobs_on_ray(fail, [MarkedJob(0, tmp_path)], 1, cluster, name=str))
    assert (type(caught.value), caught.value.strerror) == (FileNotFoundError, "no such file")


def test_progress_is_told_as_without_ray(
    cluster: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cel_dist.data.progress.INTERVAL_SECONDS", 0.0)
    with caplog.at_level("INFO", "cel_dist.data.progress"):
        prepare(corpus, tmp_path / "out", samples_per_shard=5, ray_address=cluster)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.partition(" (")[0] for line in lines] == [f"{done} of 20 files" for done in (5, 10, 15)]


def test_a_machine_that_sees_less_than_the_driver_rejects_nothing_for_it(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    job = ShardJob(corpus, out, "train-000000.tar", 0, (NAMES[0],), None, "wav", 16_000, False, "job")
    with pytest.raises(RunError, match=r"sees no folder .*/out/\.prepare; SRC and OUT must lie"):
        build_shard_elsewhere(job)
    (out / ".prepare").mkdir(parents=True)
    with pytest.raises(RunError, match=r"sees no folder .*/elsewhere"):
        build_shard_elsewhere(replace(job, source=tmp_path / "elsewhere"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match="holds files for ffmpeg, which is not installed on "):
        build_shard_elsewhere(replace(job, paths=("a.m4a",)))
    assert list(out.glob("*.tar")) == []
    assert build_shard_elsewhere(job).seconds == 1.0


def test_killed_workers_change_nothing(
    cluster: str, corpus: Path, labels: Path, straight: dict[str, bytes], tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill_the_workers(done: int, total: int) -> None:
        if done and not killed:
            for worker in ray_workers():
                worker.kill()
                killed.append(worker.pid)

    out = tmp_path / "out"
    prepare(corpus, out, labels=labels, samples_per_shard=2, ray_address=cluster, progress=kill_the_workers)
    assert killed
    assert contents(out) == straight
    assert list((out / ".prepare").glob(".*.tmp")) == []
    assert check_shards(out, workers=1) == []


def test_a_killed_driver_is_continued_without_doing_again_what_is_done(
    cluster: str, corpus: Path, labels: Path, straight: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = json.dumps({"ray_address": cluster})
    command = [sys.executable, "-c", STOP_AFTER_FIRST_SHARD, str(corpus), str(out), str(labels), options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"shard\n"
        process.send_signal(signal.SIGKILL)
    assert not (out / "manifest.json").exists()
    done = {path.name.removesuffix(".json") for path in (out / ".prepare").glob("*.tar.json")}
    there = {name: (out / name).stat().st_ino for name in done}
    assert there
    steps: list[int] = []
    prepare(
        corpus,
        out,
        labels=labels,
        samples_per_shard=2,
        ray_address=cluster,
        progress=lambda done, total: steps.append(done),
    )
    assert steps[0] >= 2 * len(there)
    assert all((out / name).stat().st_ino == there[name] for name in there)
    assert contents(out) == straight


def test_the_command_line_starts_a_cluster_for_the_time(
    corpus: Path, labels: Path, straight: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ["--labels", str(labels), "--samples-per-shard", "2", "--ray", "local", "--workers", "2", "--json"]
    # A folder relative to one that Ray's workers are not in.
    command = [sys.executable, "-m", "cel_dist", "prepare", corpus.name, "--out", str(out), *options]
    done = subprocess.run(command, cwd=corpus.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == 20
    assert contents(out) == straight


def test_of_a_cluster_that_wants_a_token_it_is_told_how_to_send_it(corpus: Path, tmp_path: Path) -> None:
    # As `ray start` does by itself once a cluster has run on the machine.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    environment |= {"HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
    port, log = free_port(), tmp_path / "ray.log"
    ray_start = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"]
    ray_start += ["--num-cpus=1", "--include-dashboard=false", f"--object-store-memory={80 << 20}"]
    with log.open("wb") as output, subprocess.Popen(ray_start, stdout=output, stderr=output, env=environment) as head:
        try:
            while "Ray runtime started" not in log.read_text():
                assert head.poll() is None, log.read_text()
                time.sleep(0.1)
            assert "Token authentication is enabled" in log.read_text()
            command = [sys.executable, "-m", "cel_dist", "prepare", str(corpus), "--out", str(tmp_path / "out")]
            command += ["--ray", f"127.0.0.1:{port}", "--json"]
            refused, done = (
                subprocess.run(command, env={**environment, **token}, capture_output=True, text=True, check=False)
                for token in ({}, {"RAY_AUTH_MODE": "token"})
            )
        finally:
            head.terminate()
    assert refused.returncode == 1
    assert f"{tmp_path}/.ray/auth_token, set RAY_AUTH_MODE=token; " in refused.stderr.splitlines()[-1]
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == 20


def test_an_address_where_no_cluster_is_gives_one_line(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = "import sys; from cel_dist.cli.app import run; [run([*sys.argv[2:], one]) for one in sys.argv[1].split()]"
    prepared = ["prepare", str(corpus), "--out", str(tmp_path / "out"), "--ray"]
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}
    done = subprocess.run(
        [sys.executable, "-c", program, "127.0.0.1:1 ray://127.0.0.1:1 auto nonsense", *prepared],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stderr.splitlines() if "WARNING" not in line]
    assert [line.partition(":")[0] for line in lines] == ["error"] * 4
    assert all("no Ray cluster can be reached at" in line and "--ray local" in line for line in lines[:3])
    assert "cannot use the Ray address 'nonsense'" in lines[3]
    assert run(["prepare", str(corpus), "--bank", "--out", str(tmp_path / "bank"), "--ray", "local"]) == 2
    assert "--ray is for shards" in capsys.readouterr().err


def test_without_ray_one_line_says_how_to_get_it(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(CelError, match=r"Ray is not installed; pip install 'cel_dist\[ray\]'"):
        prepare(corpus, tmp_path / "out", ray_address="local")
