"""The tutorials of the documentation, run command by command on the embedded corpus.

Every block of bash is run as it stands, one after the other, in the folder that the tutorial speaks of. What differs is
how long it takes: `cel train` and `cel sweep` get small settings behind the name of the configuration, where what the
tutorial says itself comes later and counts.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from ffmpeg_audio import FFMPEG, encode
from hosts import Hosts, two_hosts

from cel_dist.corpus.synth import CorpusResult, synthesise_corpus

PROJECT = Path(__file__).resolve().parent.parent
TUTORIALS = PROJECT / "docs" / "tutorials"
SMALL = "data.segment_frames=60 encoder.embedding_dim=16 train.batch_size=8 train.threads=1"
SHORT = f"{SMALL} train.max_steps=4 data.workers=0"
# Without MLflow, where a tutorial does not speak of it.
UNTRACKED = "tracking.enabled=false"


def blocks(tutorial: str) -> list[str]:
    """The shell blocks of a tutorial, in order."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", (TUTORIALS / f"{tutorial}.md").read_text(), re.DOTALL | re.MULTILINE)
    assert {language for language, _ in fenced} <= {"bash", "python"}, "a block that nothing runs"
    return [block for language, block in fenced if language == "bash"]


def programs(folder: Path, settings: str) -> Path:
    """A folder with the `cel` of the tutorials."""
    folder.mkdir()
    program = folder / "cel"
    cel = f"{shlex.quote(sys.executable)} -m cel_dist"
    program.write_text(
        "#!/bin/bash\n"
        f'case $1 in\ntrain) exec {cel} train "$2" {SHORT} {settings} "${{@:3}}" ;;\n'
        f'sweep) exec {cel} sweep "$2" {SMALL} {UNTRACKED} "${{@:3}}" ;;\n*) exec {cel} "$@" ;;\nesac\n'
    )
    program.chmod(0o755)
    return folder


class Desk:
    """A folder with everything that the tutorials take for granted.

    Attributes:
        folder: where commands are called.
        corpus: what the recordings are from.
    """

    def __init__(self, folder: Path, corpus: CorpusResult) -> None:
        self.folder, self.corpus = folder, corpus
        (folder / "configs").symlink_to(PROJECT / "configs")
        speakers = sorted((corpus.root).iterdir())
        names = ["ann", "bob", *(f"person {number}" for number in range(8))]
        for name, speaker in zip(names, speakers, strict=False):
            self.put(speaker, f"my_labelled/{name}", "{number}.wav")
        for speaker in speakers[len(names) :]:
            self.put(speaker, f"my_audio/Aufnahmen für {speaker.name}", "recording {number}.flac")
            self.put(speaker, f"my_spoken/{speaker.name}", "{number}.wav")
        spoken = sorted((folder / "my_spoken").rglob("*.wav"))
        lines = [f"{path.relative_to(folder / 'my_spoken')} {path.parent.name}\n" for path in spoken]
        (folder / "speakers.txt").write_text("".join(lines))

    def put(self, speaker: Path, to: str, name: str) -> list[Path]:
        """Write a speaker's recordings into a folder, numbered from 1."""
        folder = self.folder / to
        folder.mkdir(parents=True)
        made = []
        for number, source in enumerate(sorted(speaker.rglob("*.flac")), start=1):
            made.append(folder / name.format(number=number))
            samples, rate = soundfile.read(source, dtype="int16")
            soundfile.write(made[-1], samples, rate)
        return made

    def run(self, tutorial: str, settings: str = "", hosts: Hosts | None = None) -> str:
        """Run a tutorial, on the first of two hosts if they are given; what it printed."""
        bin = programs(self.folder / f"bin-{tutorial}", settings)
        environment = {
            **os.environ,
            "PATH": f"{bin}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        if hosts is not None:
            environment["PATH"] = f"{hosts.folder / 'bin'}{os.pathsep}{environment['PATH']}"
        options = {"cwd": self.folder, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        said = []
        for block in blocks(tutorial):
            for number, address in enumerate(hosts.addresses if hosts else (), start=1):
                block = block.replace(f"node{number} ", f"{address} ")
            command = ["bash", "-euo", "pipefail", "-c", block]
            if hosts is not None:
                process = hosts.start(0, command, environment=environment, **options)
            else:
                process = subprocess.Popen(command, env=environment, text=True, **options)
            out, errors = process.communicate()
            assert process.returncode == 0, f"{block}\n{out[-2000:]}\n{errors[-3000:]}"
            said.append(out)
        return "".join(said)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = tmp_path_factory.mktemp("tutorials")
    return Desk(folder, synthesise_corpus(tmp_path_factory.mktemp("corpus"), speakers=26, utterances=5, workers=1))


@pytest.fixture(scope="module")
def own_audio(desk: Desk) -> str:
    """What the first tutorial said; the others begin with what it leaves."""
    return desk.run("own_audio")


def test_your_own_audio_ends_in_a_model_a_report_and_a_figure(desk: Desk, own_audio: str) -> None:
    assert (desk.folder / "runs/first/report.html").stat().st_size > 10_000
    assert (desk.folder / "runs/first/test/scores.txt").exists()
    assert "EER" in own_audio
    assert re.search(r"score -\d\.\d+, probability of the same speaker [\d.]+%: (same|different) speaker", own_audio)
    manifest = json.loads((desk.folder / "shards/manifest.json").read_text())
    assert manifest["samples"] == len(list((desk.folder / "my_audio").rglob("*.flac")))


def test_fine_tuning_ends_in_a_comparison_of_three_models(desk: Desk, own_audio: str) -> None:
    desk.run("finetuning", UNTRACKED)
    page = (desk.folder / "comparison.html").read_text()
    assert all(name in page for name in ("first", "arcface", "large_margin"))


def test_a_sweep_ends_in_the_best_settings_and_a_run_of_them(desk: Desk, own_audio: str) -> None:
    said = desk.run("sweep", UNTRACKED)
    assert "lambda_u" in said
    assert (desk.folder / "runs/sweep/sweep.html").exists()
    assert (desk.folder / "runs/best/test/scores.txt").exists()


def test_a_model_is_pulled_and_served(desk: Desk, own_audio: str) -> None:
    said = desk.run("serving")
    assert '"name":"Bob"' in said.replace(" ", "")
    assert "Ann" in said
    assert (desk.folder / "exported/model.onnx").exists()


def test_voxceleb_ends_in_scores(desk: Desk, tmp_path: Path) -> None:
    if not FFMPEG:
        pytest.skip("ffmpeg is not installed")
    desk = Desk(tmp_path, desk.corpus)
    speakers = sorted(desk.corpus.root.iterdir())
    for number, speaker in enumerate(speakers[:12]):
        for file in desk.put(speaker, f"corpora/voxceleb2/dev/aac/id{12 + number:05}/21Uxsk56VDQ", "{number:05}.wav"):
            encode(*soundfile.read(file, dtype="int16"), file.with_suffix(".m4a"))
            file.unlink()
    for number, speaker in enumerate(speakers[12:18]):
        desk.put(speaker, f"corpora/voxceleb1/dev/wav/id{10001 + number}/1zcIwhmdeo4", "{number:05}.wav")
    for number, speaker in enumerate(speakers[18:22]):
        desk.put(speaker, f"corpora/voxceleb1/test/wav/id{10270 + number}/5r0dWxy17C8", "{number:05}.wav")
    noises = desk.folder / "corpora/noises"
    bank = desk.corpus.noise.parent
    shutil.copytree(bank, noises / "musan", ignore=shutil.ignore_patterns("rir"))
    shutil.copytree(bank / "rir", noises / "RIRS_NOISES/simulated_rirs/smallroom")
    lists = desk.folder / "lists"
    lists.mkdir()
    (lists / "veri_test2.txt").write_text(
        "".join(
            f"{int(one == other)} id{10270 + one}/5r0dWxy17C8/00001.wav id{10270 + other}/5r0dWxy17C8/00002.wav\n"
            for one in range(4)
            for other in range(4)
        )
    )
    desk.run("voxceleb", UNTRACKED)
    assert len((desk.folder / "runs/voxceleb/vox1-O/scores.txt").read_text().splitlines()) == 16
    assert (desk.folder / "runs/voxceleb/report.html").exists()


def test_two_machines_train_together(desk: Desk, own_audio: str) -> None:
    with two_hosts(desk.folder / "keys") as hosts:
        said = desk.run("two_machines", UNTRACKED, hosts)
    assert "deepspeed.launcher.runner --hostfile hosts" in said
    # 20 and 30 steps of two ranks, and 40 of one.
    steps = {json.loads(line)["step"] for line in (desk.folder / "runs/two/metrics.jsonl").read_text().splitlines()}
    assert {20, 30, 40} <= steps
    states = (desk.folder / "runs/two/checkpoints").glob("step-*/state.json")
    assert {json.loads(state.read_text())["num_ranks"] for state in states} == {1, 2}
