"""The whole story, shortened: a small corpus and few steps, with the settings of the demo where they cost no time."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from cel_dist.cli.demo import demo_text
from cel_dist.demo import MODEL_NAME, DemoResult, run_demo
from cel_dist.distributed import free_port
from cel_dist.errors import CelError
from cel_dist.metrics import eer
from cel_dist.model import load_model

SHORT = (
    "train.max_steps=24",
    "train.batch_size=8",
    "train.log_every=4",
    "train.threads=1",
    "data.segment_frames=60",
    "data.workers=0",
    "eval.every_epochs=100",
)


@pytest.fixture(scope="module")
def demo(small_corpus, tmp_path_factory) -> DemoResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        return run_demo(tmp_path_factory.mktemp("demo") / "out of the way", small_corpus.audio, overrides=SHORT)


def shell_lines(demo: DemoResult) -> list[str]:
    return [line.strip() for line in demo_text(demo).splitlines() if line.startswith("    ")]


def bare_shell() -> dict[str, str]:
    """What a reader's shell has when a line is pasted into it: nothing of this environment's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "VIRTUAL_ENV"))}
    return {**kept, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}


def test_the_encoder_learns(demo):
    rows = [json.loads(line) for line in (Path(demo.run_dir) / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20, 24]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    # Uniformity alone would lower the loss; an utterance's other view must come nearer than those of others, too.
    similarities = [row["similarity"] for row in rows]
    assert sum(similarities[3:]) < sum(similarities[:3]) - 0.5
    # The untrained encoder, then nothing before the last step: eval.every_epochs is more than the run has.
    evaluations = (Path(demo.run_dir) / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in evaluations] == [0, 24]
    assert demo.utterances_per_second > 0


def test_the_table_shows_what_was_measured_on_unheard_speakers(demo, small_corpus):
    run = Path(demo.run_dir)
    rows = [line.split() for line in (run / "test" / "scores.txt").read_text().splitlines()]
    assert demo.eer_after == eer([float(row[3]) for row in rows], [int(row[0]) for row in rows])
    model = load_model(run)
    scored = [model.score(small_corpus.audio / row[1], small_corpus.audio / row[2]) for row in rows[:3]]
    assert scored == pytest.approx([float(row[3]) for row in rows[:3]], abs=1e-5)
    trained = set((run.parents[1] / "lists" / "train.txt").read_text().split())
    assert not {Path(name).parent for row in rows for name in row[1:3]} & {Path(name).parent for name in trained}
    text = demo_text(demo)
    assert f"before {100 * demo.eer_before:.1f} %   after {100 * demo.eer_after:.1f} %" in text
    summary = json.loads((run / "summary.json").read_text())
    assert f"{summary['utterances_per_second']:.1f} utterances/s" in text
    assert (demo.model_uri, summary["model_uri"]) == (f"models:/{MODEL_NAME}/1", demo.model_uri)
    assert demo.seconds > summary["seconds"]


def test_the_report_is_of_this_run(demo):
    page = Path(demo.report).read_text()
    assert demo.model_uri in page
    summary = json.loads((Path(demo.run_dir) / "summary.json").read_text())
    assert f"{summary['eer']:.2%}" in page
    drawn = re.findall(r"<figure [^>]*>\s*<h2>(.*?)</h2>", page)
    assert drawn[:4] == ["Training", "Detection error trade-off", "Scores", "Map of held-out speakers"]


def test_the_printed_lines_work_where_they_were_printed(demo, small_corpus):
    verify, browse = shell_lines(demo)
    done = subprocess.run(["bash", "-c", verify], env=bare_shell(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    enrol, test = verify.split()[-2:]
    # The registered model is the run's best one.
    assert f"score {load_model(demo.run_dir).verify(Path(enrol), Path(test)).score:.4f}" in done.stdout
    assert re.search("(same|different) speaker", done.stdout)

    port = free_port()
    command = ["bash", "-c", f"exec {browse} --port {port} --workers 1"]
    server = subprocess.Popen(command, env=bare_shell(), start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        assert runs_of("demo", server, port) == [Path(demo.run_dir).name]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def runs_of(experiment: str, server: subprocess.Popen[bytes], port: int) -> list[str]:
    """Names of the runs that an MLflow server shows, as soon as it answers."""
    api = f"http://127.0.0.1:{port}/api/2.0/mlflow"
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(0.2)
        assert server.poll() is None, "mlflow ended"
        assert time.monotonic() < deadline
        with contextlib.suppress(ConnectionError, urllib.error.URLError):
            answer = urllib.request.urlopen(f"{api}/experiments/get-by-name?experiment_name={experiment}", timeout=30)
            number = json.load(answer)["experiment"]["experiment_id"]
            query = json.dumps({"experiment_ids": [number]}).encode()
            request = urllib.request.Request(f"{api}/runs/search", query, {"Content-Type": "application/json"})
            return [run["info"]["run_name"] for run in json.load(urllib.request.urlopen(request, timeout=30))["runs"]]


def test_a_corpus_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CelError, match="there is no folder"):
        run_demo(tmp_path / "demo", tmp_path / "absent")
