"""What goes wrong in a run: found before it starts where that is possible, else the failure of all ranks at once."""

import contextlib
import errno
import functools
import io
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import ENVIRONMENT, records, train_and_name_threads, train_job, write_config
from worlds import run_world

from cel_dist.config_file import load_config
from cel_dist.data.files import sole_writer
from cel_dist.data.folder import ShardFolder
from cel_dist.data.plan import Plan
from cel_dist.distributed import free_port
from cel_dist.errors import CelError, RunError
from cel_dist.launcher import Placement, launch
from cel_dist.model import load_model
from cel_dist.training.checkpoint import complete_checkpoints
from cel_dist.training.checkpoint_store import save_into
from cel_dist.training.start import find_start, signature


@pytest.fixture
def config(small_corpus, tmp_path):
    """Writes a configuration of a run in the test's folder."""
    return functools.partial(write_config, small_corpus, tmp_path)


def test_what_can_be_found_wrong_is_found_before_a_process_is_started(config, small_corpus, tmp_path):
    text, one_class, silent = tmp_path / "text", tmp_path / "one_class.txt", tmp_path / "gone.txt"
    text.write_text("text")
    one_class.write_text("1 spk00/utt00.wav spk00/utt01.wav\n")
    silent.write_text("1 spk00/utt00.wav spk00/gone.wav\n0 spk00/utt00.wav spk01/utt01.wav\n")
    cut = shutil.copytree(small_corpus.shards, tmp_path / "cut")
    os.truncate(min(cut.glob("*.tar")), 512)
    noise_only = shutil.copytree(small_corpus.bank, tmp_path / "noise_only")
    (noise_only / "bank.json").write_text("{")
    validation = f"eval.root={small_corpus.audio}"
    for overrides, message in {
        ("data.shards=nowhere",): "there is no folder of shards at nowhere",
        (f"data.shards={cut}",): "has 512 bytes, the manifest says",
        (f"data.bank={noise_only}",): r"bank\.json",
        ("train.batch_size=64",): "train.batch_size=64 is larger than the data",
        ("train.batch_size=7",): "does not divide by 2 ranks",
        ("encoder.name=fast_resnet43",): "did you mean 'fast_resnet34'",
        ("encoder.init=nowhere",): "there is no model at nowhere",
        (validation, "eval.trials=nowhere.txt"): r"cannot read the trials file nowhere\.txt",
        (validation, f"eval.trials={one_class}"): "error rates need both kinds",
        (validation, f"eval.trials={silent}"): r"1 of 3 audio files are missing .* spk00/gone\.wav",
        (validation, f"eval.trials={small_corpus.trials}", f"eval.metadata={text}"): "line 1 of .*text is not 'path sp",
        (f"run.dir={text}",): "text is a file; name a folder",
        (f"run.dir={text}/run",): "text is a file; name a folder",
    }.items():
        with pytest.raises(CelError, match=message) as caught:
            launch(config(), list(overrides), Placement(num_ranks=2))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_two_runs_do_not_share_a_folder(config, tmp_path):
    (tmp_path / "run").mkdir()
    with sole_writer(tmp_path / "run", "cel train"):
        with pytest.raises(RunError, match=f"another 'cel train' is writing {tmp_path / 'run'}"):
            launch(config(), [], Placement(num_ranks=2))
        first, second = run_world(2, train_job, config(), folder=tmp_path / "world")
    assert first.startswith("RunError: another 'cel train' is writing ")
    assert second.removeprefix("RunError: rank 0 failed: ") == first.removeprefix("RunError: ")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_tracking_server_that_only_rank_0_asks_stops_all_ranks_alike(config, tmp_path):
    file = config(tracking={"enabled": True, "uri": f"http://127.0.0.1:{free_port()}"})
    first, second = run_world(2, train_job, file, folder=tmp_path / "world")
    assert first.startswith("CelError: cannot record in MLflow at http://127.0.0.1:")
    assert second == first


def test_audio_that_one_rank_cannot_read_is_counted_by_all_and_too_much_of_it_stops_all(config, small_corpus, tmp_path):
    folder = Path(shutil.copytree(small_corpus.shards, tmp_path / "shards"))
    # One of the 20 utterances of an epoch that are a rank's may be unreadable.
    file = config(data={"shards": str(folder), "max_fault_rate": 1 / 20})
    shards, settings = ShardFolder.open(folder), load_config(file)
    index = shards.index
    plan = Plan(index, segment_samples=settings.segment_samples, batch_size=8, short=settings.data.short, seed=0)
    # The last rows of the second and the fourth step belong to rank 1.
    damaged = [int(plan.batch(0, step).ids[-1]) for step in (1, 3)]
    for sample in damaged:
        with (folder / shards.manifest.shards[index.shard[sample]].name).open("r+b") as shard:
            shard.seek(int(index.offset[sample]))
            shard.write(bytes(int(index.size[sample])))
    outcomes = run_world(2, train_and_name_threads, file, folder=tmp_path / "world", forked=False)
    (first, threads, has_mlflow), (second, *_) = outcomes
    assert first.startswith("RunError: rank 1 failed: 2 utterances of epoch 0 could not be read")
    assert f"sample {damaged[1]:09d}" in first
    assert first.removeprefix("RunError: rank 1 failed: ") == second.removeprefix("RunError: ")
    assert [row["faults"] for row in records(tmp_path / "run")] == [0, 1, 0]
    # One that is left when the interpreter ends may abort the process, whatever its outcome was.
    assert not [name for name in threads if "gloo" in name]
    # It takes two seconds to load, and nothing is tracked here.
    assert not has_mlflow


def train_with_poison(config, poisoned, overrides=()):
    """Train; rank 1 alone finds a gradient that is not finite at the steps `poisoned`, and features that are not at the
    first of them. The outcome, and whether each of these steps left parameters, buffers
    and the state of the optimizers as they were."""
    from cel_dist.engine import Engine

    genuine_pass, genuine_norm, genuine_step, seen = (
        Engine.forward_backward,
        Engine.gradient_norm,
        Engine.step,
        [],
    )
    count = 0

    def forward_backward(engine, features, ids):
        nonlocal count
        count += 1
        if count in poisoned:
            seen.append(tensors_of(engine))
        if count == min(poisoned) and os.environ["RANK"] == "1":
            features[0] = float("nan")
        return genuine_pass(engine, features, ids)

    def gradient_norm(engine):
        norm = genuine_norm(engine)
        return norm * float("nan") if count in poisoned and os.environ["RANK"] == "1" else norm

    def step(engine, *arguments):
        genuine_step(engine, *arguments)
        if count in poisoned:
            seen.append(tensors_of(engine))

    Engine.forward_backward, Engine.gradient_norm, Engine.step = forward_backward, gradient_norm, step
    outcome = train_job(config, overrides)
    pairs = zip(seen[::2], seen[1::2], strict=True)
    return outcome, [same_bits(before, after) for before, after in pairs]


def tensors_of(engine):
    """All that a step changes, copied: parameters, buffers, moments and step counts, those of sharded weights too."""
    tensors = [*engine.encoder_state().values()]
    kept = [engine.snapshot()]
    while kept:
        value = kept.pop()
        if isinstance(value, torch.Tensor):
            tensors.append(value.detach().clone())
        elif isinstance(value, dict):
            kept += value.values()
        elif isinstance(value, (list, tuple)):
            kept += value
    return tensors


def same_bits(before, after):
    """Whether two lists of tensors are, of which there are some."""
    return len(before) == len(after) > 100 and all(map(torch.equal, before, after))


@pytest.mark.parametrize(("stage", "chunks"), [(0, 1), (2, 2), (3, 1)])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(config, stage, chunks, tmp_path):
    file = config(
        data={"segment_frames": 24},
        encoder={"embedding_dim": 32},
        engine={"zero_stage": stage},
        train={"log_every": 2, "encode_chunks": chunks},
    )
    outcomes = run_world(2, train_with_poison, file, (2, 3), folder=tmp_path / "world")
    for result, are_unchanged in outcomes:
        assert result["steps"] == 5
        assert are_unchanged == [True, True]
    rows = records(tmp_path / "run")
    assert [(row["step"], row["skipped"]) for row in rows] == [(2, 1), (4, 2), (5, 2)]
    assert all(math.isfinite(row[name]) for row in rows for name in ("loss", "grad_norm", "w"))
    first, second = records(tmp_path / "run", "skipped.jsonl")
    assert (first["step"], first["epoch"], second["step"]) == (2, 0, 3)
    shards = ShardFolder.open(load_config(file).data.shards)
    plan = Plan(shards.index, segment_samples=load_config(file).segment_samples, batch_size=8, short="drop", seed=0)
    assert first["ids"] == plan.batch(0, 1).ids.tolist()
    # The first row of rank 1.
    assert first["not_finite"] == [first["ids"][4]]
    # Global batch norm carries it to the other rows of all ranks, of a chunk.
    found = 4 // chunks
    assert f"rank 0 has embeddings that are not finite in {found} of 4 utterances; rank 1 has" in first["reason"]
    assert (second["not_finite"], "gradient norm nan" in second["reason"]) == ([], True)


def test_too_many_skipped_steps_stop_all(config, tmp_path):
    settings = ["train.max_skipped_steps=1"]
    outcomes = run_world(2, train_with_poison, config(), (3, 4), settings, folder=tmp_path / "world")
    for message, _ in outcomes:
        assert message.startswith("RunError: step 4 (epoch 0): loss ")
        assert "the last 2 batches were skipped, their samples are in" in message
    assert len(records(tmp_path / "run", "skipped.jsonl")) == 2
    (checkpoint,) = re.findall(r"--resume (\S+)", outcomes[0][0])
    assert load_model(checkpoint).description.training.step == 2
    # What the message advises is accepted.
    fork = load_config(config(), [f"run.dir={tmp_path / 'fork'}", "optim.lr=1e-4"])
    assert find_start(fork, signature=signature(steps_per_epoch=5), num_ranks=2, resume=checkpoint).state.step == 2


def train_on_a_small_disk(config, disk):
    """Train; from the second checkpoint to the third the disk is full, and from the fifth, at whose step there is an
    evaluation, to the sixth."""
    from cel_dist.training.checkpoint_store import CheckpointStore

    genuine, filler = CheckpointStore.save, disk / "filler"

    def save(store, engine, model, saved, classes):
        store.wait()
        torch.distributed.barrier()
        if os.environ["RANK"] == "0":
            filler.unlink(missing_ok=True)
            if saved.state.step in (2, 5):
                fill(filler)
        torch.distributed.barrier()
        genuine(store, engine, model, saved, classes)

    CheckpointStore.save = save
    return train_job(config)


def fill(file):
    with file.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(1 << 16))


def test_a_disk_that_is_full_for_a_while_costs_the_checkpoints_of_that_while(
    config, small_corpus, mount_disk, tmp_path
):
    disk = mount_disk(200 << 10)
    file = config(
        run={"dir": str(disk / "run")},
        train={"epochs": 2, "max_steps": 7},
        checkpoint={"every_steps": 1, "keep_last": 9},
        engine={"zero_stage": 2},
        eval={"trials": str(small_corpus.trials), "root": str(small_corpus.audio), "at_start": False},
    )
    for result in run_world(2, train_on_a_small_disk, file, disk, folder=tmp_path / "world"):
        assert result["steps"] == 7
    run = disk / "run"
    assert [path.name for path in complete_checkpoints(run / "checkpoints")] == [
        f"step-0000000{step}" for step in (1, 3, 4, 6, 7)
    ]
    assert not list((run / "checkpoints").glob(".*"))
    assert [row["step"] for row in records(run)] == [1, 2, 3, 4, 5, 6, 7]
    eer = {row["step"]: row["eer"] for row in records(run, "evaluations.jsonl")}
    assert set(eer) == {5, 7}
    assert load_model(run).description.training.step == min(eer, key=eer.__getitem__)


def test_a_run_folder_that_not_all_nodes_share_is_refused(config, tmp_path):
    messages = run_world(2, train_in_a_folder_of_its_own, config(), tmp_path, folder=tmp_path / "world")
    for message in messages:
        assert re.search(r"CelError: run\.dir=\S+ is not the same folder on all nodes: .* does not see", message)


def train_in_a_folder_of_its_own(config, folder):
    return train_job(config, [f"run.dir={folder / os.environ['RANK']}"])


def test_a_last_checkpoint_that_does_not_fit_fails_the_run_and_leaves_the_others(config, mount_disk, tmp_path):
    small_disk = mount_disk(40 << 10)
    file = config(run={"dir": str(small_disk / "run")}, checkpoint={"every_steps": 1}, engine={"zero_stage": 2})
    for message in run_world(2, train_job, file, folder=tmp_path / "world"):
        assert message.startswith("RunError: ")
        assert re.search(
            r"checkpoint \S+step-00000005 cannot be written: .*no space left.*make room", message, re.IGNORECASE
        )
        assert "\n" not in message
    (checkpoint,) = (small_disk / "run" / "checkpoints").iterdir()
    assert (
        find_start(load_config(file), signature=signature(steps_per_epoch=5), num_ranks=2, resume="auto").checkpoint
        == checkpoint
    )
    assert load_model(checkpoint).description.training.step == 1


class FullOnce(io.BytesIO):
    """A file on a disk that another process makes room on, a moment too late."""

    writes = 0

    def write(self, data):
        self.writes += 1
        if self.writes == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_disk_that_is_full_for_one_write_is_told_as_that():
    with pytest.raises(OSError, match="No space left"):
        save_into({"weight": torch.zeros(100_000)}, FullOnce())


def train_with_too_little_memory(config):
    """Train; a step wants a petabyte."""
    from cel_dist.engine import Engine

    Engine.forward_backward = lambda engine, features, ids: torch.empty(1 << 50, dtype=torch.uint8)
    return train_job(config)


def test_a_rank_without_memory_names_the_settings_that_take_it(config, tmp_path):
    (message,) = run_world(1, train_with_too_little_memory, config(), folder=tmp_path / "world")
    assert message.startswith("RunError: rank 0 ran out of memory (")
    assert "raise train.encode_chunks=1 (parts of the 8 rows of a rank), or set train.precision=bf16" in message
    assert "train.batch_size=8" in message


def test_a_model_that_mlflow_does_not_take_costs_neither_summary_nor_report(config, tmp_path):
    # Where the files of the experiment belong lies a file.
    (tmp_path / "mlartifacts").write_text("in the way")
    file = config(train={"max_steps": 1}, tracking={"enabled": True, "uri": f"sqlite:///{tmp_path}/mlflow.db"})
    command = [sys.executable, "-m", "cel_dist.train", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cannot store the model in MLflow" in done.stderr
    run = tmp_path / "run"
    assert '"model_uri": null' in (run / "summary.json").read_text()
    assert "<html" in (run / "report.html").read_text()
    assert [row["step"] for row in records(run)] == [1]
