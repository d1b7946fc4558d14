"""What a person at a terminal sees, through a pseudo-terminal, and that pipes are spared."""

import os
import pty
import re
import signal
import subprocess

import pytest
from training_runs import CEL, ENVIRONMENT, records, write_config

PLAIN = {**ENVIRONMENT, "TERM": "xterm-256color", "COLUMNS": "140", "LINES": "40"}
BAR = re.compile(r"epoch \d+ .*\d+/\d+ .*utt/s")


def at_a_terminal(*arguments, answer=None):
    """Exit code, stdout and what came to the terminal on stderr; `answer` is called with the process and the text."""
    leader, follower = pty.openpty()
    process = subprocess.Popen([*CEL, *arguments], stdout=subprocess.PIPE, stderr=follower, env=PLAIN, text=True)
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:
            # How Linux says that the last writer has closed it.
            break
        if not part:
            break
        shown += part
        if answer is not None:
            answer(process, shown.decode(errors="replace"))
    os.close(leader)
    out = process.communicate(timeout=60)[0]
    return process.returncode, out, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode(errors="replace"))


@pytest.fixture
def config(small_corpus, tmp_path):
    return write_config(small_corpus, tmp_path, encoder={"embedding_dim": 16, "name": "tdnn"})


@pytest.mark.parametrize("nproc", [[], ["--nproc", "2"]], ids=["alone", "launched"])
def test_progress_is_shown_on_a_terminal_with_the_log_above_it(config, tmp_path, nproc):
    code, out, shown = at_a_terminal("train", str(config), *nproc)
    assert code == 0, shown
    assert BAR.search(shown)
    assert "5/5" in shown
    lines = [line for line in re.split(r"[\r\n]+", shown) if line.startswith("step ")]
    assert len(lines) == 5
    assert "next: cel evaluate --model" in shown
    assert out.count("\n") == 1
    assert out.startswith("5 steps")


def test_nothing_moves_in_a_pipe(config):
    done = subprocess.run([*CEL, "train", str(config)], env=PLAIN, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not BAR.search(done.stderr)
    assert "\x1b" not in done.stderr
    assert "next:" not in done.stderr
    assert done.stderr.count("\nstep ") == 5


def test_ctrl_c_ends_a_run_that_shows_its_progress(config, tmp_path):
    asked = []

    def interrupt(process, text):
        if not asked and BAR.search(text) and "2/" in text:
            asked.append(True)
            process.send_signal(signal.SIGINT)

    code, _, shown = at_a_terminal("train", str(config), "train.epochs=500", answer=interrupt)
    assert asked
    assert code == 130
    assert "Traceback" not in shown
    assert shown.rstrip().endswith("error: interrupted")
    assert len(records(tmp_path / "run")) < 2500


def test_json_is_spared_the_next_step(small_corpus, tmp_path):
    for as_json in ([], ["--json"]):
        out = tmp_path / f"shards{len(as_json)}"
        code, _, shown = at_a_terminal(
            "prepare", str(small_corpus.audio), "--out", str(out), "--workers", "1", *as_json
        )
        assert code == 0
        assert (f"next: cel train configs/small.yaml data.shards={out}" in shown.replace("\r\n", " ")) is not bool(
            as_json
        )
