"""Going on with a run: what must be the same, what may change, and what of the earlier part still holds."""

import errno
import functools
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_runs import CEL, ENVIRONMENT, losses, records, smooth_train_job, train_job, write_config
from worlds import run_world

from cel_dist.config import Config
from cel_dist.config_file import load_config
from cel_dist.errors import CelError, RunError
from cel_dist.model import load_model
from cel_dist.tracking import Tracker
from cel_dist.training.checkpoint import TrainState, complete_checkpoints, read_checkpoint
from cel_dist.training.records import Records
from cel_dist.training.start import Start, find_start, signature
from cel_dist.training.trainer import train


@pytest.fixture(scope="module")
def finished(small_corpus, tmp_path_factory) -> Path:
    """The configuration file of a run of four steps with a checkpoint at each, evaluated before and after."""
    folder = tmp_path_factory.mktemp("finished")
    file = write_config(
        small_corpus,
        folder,
        train={"max_steps": 4},
        checkpoint={"every_steps": 1, "keep_last": 4},
        eval={"trials": str(small_corpus.trials), "root": str(small_corpus.audio)},
    )
    assert run_world(1, train_job, file, folder=folder / "world")[0]["steps"] == 4
    return file


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> tuple[Path, str]:
    """A copy of the finished run, and the override that names it."""
    shutil.copytree(finished.parent / "run", tmp_path / "run")
    return tmp_path / "run", f"run.dir={tmp_path / 'run'}"


def start_of(config: Config, resume: str = "auto") -> Start:
    return find_start(config, signature=signature(steps_per_epoch=5), num_ranks=1, resume=resume)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("override", "before", "after"),
    [
        ("loss.pairs=an", "loss.pairs=pon", "loss.pairs=an"),
        ("loss.t=3.0", "loss.t=2.0", "loss.t=3.0"),
        ("loss.lambda_u=0.5", "loss.lambda_u=1.0", "loss.lambda_u=0.5"),
        ("loss.similarity=prototypical", "loss.similarity=angular_prototypical", "loss.similarity=prototypical"),
        ("augment.profile=1", "augment.profile=3", "augment.profile=1"),
        ("augment.noise_snr_db=[1, 2]", "augment.noise_snr_db=[0.0, 15.0]", "augment.noise_snr_db=[1.0, 2.0]"),
        ("encoder.views=joint", "encoder.views=separate", "encoder.views=joint"),
        ("encoder.init=models:/cel/1", "encoder.init=None", "encoder.init=models:/cel/1"),
        ("encoder.embedding_dim=64", "encoder.embedding_dim=512", "encoder.embedding_dim=64"),
        ("train.seed=1", "train.seed=0", "train.seed=1"),
        ("train.batch_size=4", "train.batch_size=8", "train.batch_size=4"),
        ("train.precision=bf16", "train.precision=fp32", "train.precision=bf16"),
        ("data.shards=other", "data.shards=", "data.shards=other"),
        ("data.short=repeat", "data.short=drop", "data.short=repeat"),
        ("optim.lr=0.5", "optim.lr=0.001", "optim.lr=0.5"),
    ],
)
def test_another_experiment_does_not_go_on_in_the_same_folder(finished, override, before, after):
    with pytest.raises(CelError, match=r"was written with .*, this run has .*another run.dir") as caught:
        start_of(load_config(finished, [override]))
    former, now = str(caught.value).split("this run has")
    assert before in former
    assert after in now
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["encoder.pooling=asp", "features.num_mels=80"])
def test_another_network_does_not_go_on_from_a_checkpoint(finished, tmp_path, override):
    checkpoint = finished.parent / "run" / "checkpoints" / "step-00000004"
    config = load_config(finished, [f"run.dir={tmp_path / 'fork'}", override])
    with pytest.raises(CelError, match=rf"this run has {override}; .* start a new run .*\(encoder\.init"):
        start_of(config, str(checkpoint))


def test_all_changed_settings_are_named_and_other_data_is_noticed(finished):
    with pytest.raises(CelError, match=r"with loss\.t=2\.0, optim\.lr=0\.001, this run has loss\.t=3\.0, optim\.lr=1"):
        start_of(load_config(finished, ["optim.lr=1", "loss.t=3"]))
    with pytest.raises(CelError, match="steps per epoch=5, this run has steps per epoch=6"):
        find_start(load_config(finished), signature=signature(steps_per_epoch=6), num_ranks=1, resume="auto")


def test_data_that_were_moved_are_the_same_experiment(run, finished, small_corpus, tmp_path):
    folder, override = run
    for name in ("shards", "bank"):
        shutil.copytree(getattr(small_corpus, name), tmp_path / "elsewhere" / name)
    moved = [override, *(f"data.{name}={tmp_path / 'elsewhere' / name}" for name in ("shards", "bank"))]
    result = run_world(1, train_job, finished, [*moved, "train.max_steps=5"], folder=tmp_path / "world")[0]
    assert result["steps"] == 5
    assert sorted(losses(folder)) == [1, 2, 3, 4, 5]


def test_other_data_in_the_same_place_are_told(run, finished):
    folder, override = run
    config, manifests = load_config(finished, [override]), {"shards": "0" * 64}
    start = find_start(
        config, signature=signature(steps_per_epoch=5, manifest_sha256=manifests), num_ranks=1, resume="auto"
    )
    checkpoint = folder / "checkpoints" / "step-00000004"
    assert start.remarks == (
        f"data.shards has other data than when {checkpoint} was written: its manifest is another one",
    )
    assert start_of(config).remarks == ()


def test_length_reports_and_places_may_change(finished):
    free = ["train.max_steps=9", "train.epochs=7", "train.log_every=3", "train.threads=2", "data.workers=1"]
    free += [
        "engine.zero_stage=0",
        "checkpoint.every_steps=7",
        "tracking.experiment=other",
        "eval.every_epochs=2",
        "run.name=other",
    ]
    start = start_of(load_config(finished, free))
    assert (start.state.step, start.result, start.remarks) == (4, None, ())


def test_a_new_end_of_the_cosine_schedule_is_remarked(small_corpus, finished, run):
    folder, override = run
    for checkpoint in (folder / "checkpoints").iterdir():
        text = (checkpoint / "config.yaml").read_text()
        (checkpoint / "config.yaml").write_text(text.replace("schedule: step", "schedule: cosine"))
        saved = read_checkpoint(checkpoint)
        size, digest = saved.files["config.yaml"]
        files = {**saved.files, "config.yaml": (size + len("cosine") - len("step"), digest)}
        (checkpoint / "state.json").write_bytes(replace(saved, files=files).record())
    settings = [override, "optim.schedule=cosine"]
    assert start_of(load_config(finished, settings)).remarks == ()
    (remark,) = start_of(load_config(finished, [*settings, "train.max_steps=5"])).remarks
    assert "now ends at step 5 instead of 4" in remark


def test_a_finished_run_is_left_as_it_is(finished, run):
    folder, override = run
    before = content(folder)
    summary = json.loads(before["summary.json"])
    command = [*CEL, "train", str(finished), override, "--nproc", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == summary
    assert done.stderr.startswith("nothing to do: ")
    result = train(load_config(finished, [override, "train.max_steps=3", "train.profile_steps=9"]))
    assert (result.steps, result.eer) == (4, summary["eer"])
    assert content(folder) == before


def test_a_folder_with_a_run_is_not_overwritten(finished, run, tmp_path):
    config = load_config(finished, [run[1]])
    with pytest.raises(CelError, match="already holds a run"):
        start_of(config, "none")
    with pytest.raises(CelError, match="is no complete checkpoint"):
        start_of(config, str(tmp_path / "nowhere"))
    with pytest.raises(CelError, match=r"already holds a run .* cannot go on from"):
        start_of(config, str(finished.parent / "run" / "checkpoints" / "step-00000002"))


@pytest.mark.parametrize("record", ["{}", '{"state": {"step": 4}}', '{"sha256": ""}', "[]", "4", "{", ""])
def test_a_damaged_state_of_a_checkpoint_is_named(finished, run, record):
    folder, override = run
    checkpoint = folder / "checkpoints" / "step-00000004"
    (checkpoint / "state.json").write_text(record)
    with pytest.raises(CelError, match=r"step-00000004/state\.json is damaged"):
        start_of(load_config(finished, [override]), str(checkpoint))


def test_a_number_of_the_state_that_changed_is_damage(finished, run):
    folder, override = run
    state = folder / "checkpoints" / "step-00000004" / "state.json"
    state.write_text(state.read_text().replace('"step": 4', '"step": 3', 1))
    start = start_of(load_config(finished, [override]))
    assert start.state.step == 3
    assert "state.json is damaged (ValueError: other content than was written)" in start.remarks[0]


def test_what_cannot_be_read_now_is_not_taken_for_damage(finished, run, monkeypatch):
    folder, override = run
    weights = folder / "checkpoints" / "step-00000004" / "engine" / "mp_rank_00_model_states.pt"
    genuine = Path.stat

    def stat(path, **options):
        if path == weights:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return genuine(path, **options)

    # A network file system in such a state cannot be had here.
    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(RunError, match=r"cannot read .*mp_rank_00_model_states\.pt: stale file handle"):
        start_of(load_config(finished, [override]))


def test_a_folder_of_checkpoints_is_no_checkpoint_and_names_its_newest(finished, tmp_path):
    config = load_config(finished, [f"run.dir={tmp_path / 'fork'}"])
    for folder in (finished.parent / "run", finished.parent / "run" / "checkpoints"):
        with pytest.raises(CelError, match=r"it has no state\.json; the newest one in it is \S+step-00000004"):
            start_of(config, str(folder))


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(finished, run):
    folder, override = run
    config = load_config(finished, [override])
    newest, older, oldest = sorted((folder / "checkpoints").iterdir(), reverse=True)[:3]
    weights = newest / "engine" / "mp_rank_00_model_states.pt"
    os.truncate(weights, weights.stat().st_size - 1)
    with (older / "model" / "encoder.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    # What a start looks at in any case are sizes; the bytes are compared once, by the process that holds the folder.
    start = start_of(config)
    assert start.checkpoint == older
    (remark,) = start.remarks
    assert f"{newest} is damaged: engine/mp_rank_00_model_states.pt has " in remark
    start = find_start(config, signature=signature(steps_per_epoch=5), num_ranks=1, resume="auto", contents=True)
    assert (start.checkpoint, start.state.step) == (oldest, 2)
    assert "encoder.safetensors has other bytes than were written" in start.remarks[1]
    with pytest.raises(CelError, match="is damaged: engine/mp_rank_00"):
        start_of(config, str(newest))
    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / "config.yaml").unlink()
    with pytest.raises(CelError, match="no checkpoint before it is whole either: remove"):
        start_of(config)


def test_a_checkpoint_holds_what_a_run_needs_to_go_on(finished):
    checkpoint = finished.parent / "run" / "checkpoints" / "step-00000004"
    record = json.loads((checkpoint / "state.json").read_text())
    assert record["stream"] == {"epoch": 0, "step": 4}
    assert (record["num_ranks"], record["state"]["step"], record["state"]["skipped"]) == (1, 4, 0)
    assert set(record["versions"]) == {"cel_dist", "torch", "deepspeed"}
    on_disk = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert on_disk == {*record["files"], "state.json"}
    assert {"config.yaml", "random/rank-00000.pt", "engine/mp_rank_00_model_states.pt"} < on_disk


def test_the_best_model_counts_only_while_it_is_there_and_of_the_same_list(finished, run):
    folder, override = run
    config = load_config(finished, [override])
    known = start_of(config).state
    assert (known.best_step, known.evaluated_step) in ((0, 4), (4, 4))
    other_list = config.model_copy(update={"eval": config.eval.model_copy(update={"trials": Path("other.txt")})})
    assert start_of(other_list).state == TrainState(step=4)
    shutil.rmtree(folder / "model")
    assert start_of(config).state == replace(known, best_eer=None, best_step=None, evaluated_step=None)


def test_going_back_within_a_run_retires_what_lies_behind(finished, run, tmp_path):
    folder, override = run
    checkpoints = folder / "checkpoints"
    back = str(checkpoints / "step-00000002")
    (checkpoints / ".writing-step-00000005").mkdir()
    before = losses(folder)
    settings = [override, "train.max_steps=3"]
    result = run_world(1, train_job, finished, settings, back, folder=tmp_path / "world")[0]
    assert result["steps"] == 3
    numbers = {f"step-0000000{step}" for step in (1, 2, 3)}
    assert {path.name for path in checkpoints.iterdir()} == {*numbers, "retired-step-00000003", "retired-step-00000004"}
    assert start_of(load_config(finished, settings)).checkpoint == checkpoints / "step-00000003"
    assert losses(folder) == {step: before[step] for step in (1, 2, 3)}
    assert [row["step"] for row in records(folder, "evaluations.jsonl")] == [0, 3]
    assert load_model(folder).description.training.step in (0, 3)
    # The same command goes on, and does not go back again.
    again = start_of(load_config(finished, [override, "train.max_steps=5"]), back)
    assert again.checkpoint == checkpoints / "step-00000003"


def test_a_run_begins_with_a_checkpoint_of_another_one_and_its_own_best_model(finished, tmp_path):
    # The other run's best EER is taken over neither as a number nor as a model, so this one must measure its own.
    checkpoint = str(finished.parent / "run" / "checkpoints" / "step-00000004")
    settings = [f"run.dir={tmp_path / 'fork'}", "optim.lr=0.5"]
    start = start_of(load_config(finished, settings), checkpoint)
    assert start.state == TrainState(step=4)
    (remark,) = start.remarks
    assert remark.startswith("optim.lr is now 0.5, up to ")
    with pytest.raises(CelError, match=r"written with train\.batch_size=8, this run has train\.batch_size=4; "):
        start_of(load_config(finished, [*settings, "train.batch_size=4"]), checkpoint)
    result = run_world(1, train_job, finished, settings, checkpoint, folder=tmp_path / "world")[0]
    former = records(finished.parent / "run", "evaluations.jsonl")[-1]
    assert (result["steps"], result["eer"]) == (4, former["eer"])
    one, other = load_model(tmp_path / "fork"), load_model(checkpoint)
    assert all(torch.equal(one.encoder.state_dict()[name], value) for name, value in other.encoder.state_dict().items())
    assert one.description.threshold is not None
    # From now on it is a run of its own.
    assert start_of(load_config(finished, settings)).result is not None
    # Told the same once more, as a scheduler tells it, it does not begin once more.
    again = start_of(load_config(finished, [*settings, "train.max_steps=9"]), checkpoint)
    assert (again.checkpoint, again.is_own) == (tmp_path / "fork" / "checkpoints" / "step-00000004", True)
    assert "the run began from" in again.remarks[0]


def test_a_run_goes_on_with_other_ranks_and_stages(small_corpus, tmp_path):
    file = write_config(small_corpus, tmp_path, train={"max_steps": 4}, checkpoint={"every_steps": 1, "keep_last": 4})
    run_world(1, smooth_train_job, file, folder=tmp_path / "1")
    former = tmp_path / "run"
    settings = [f"run.dir={tmp_path / 'fork'}"]
    start = str(former / "checkpoints" / "step-00000002")
    # One rank under stage 0 wrote it.
    two = [*settings, "engine.zero_stage=2", "train.max_steps=3"]
    assert run_world(2, smooth_train_job, file, two, start, folder=tmp_path / "2")[0]["steps"] == 3
    four = [*settings, "engine.zero_stage=3", "train.max_steps=4"]
    assert run_world(4, smooth_train_job, file, four, folder=tmp_path / "4")[0]["steps"] == 4
    before, after = losses(former), losses(tmp_path / "fork")
    assert set(after) == {3, 4}
    # The same batch and parameters; sums in another order, of which Adam's first steps make more. Seen: 2e-6.
    assert after[3] == pytest.approx(before[3], rel=2e-5)
    assert after[4] == pytest.approx(before[4], rel=2e-5)
    checkpoints = tmp_path / "fork" / "checkpoints"
    assert [read_checkpoint(path).num_ranks for path in complete_checkpoints(checkpoints)] == [2, 2, 4]
    assert not list(checkpoints.glob(".*"))


def test_a_failed_validation_costs_nothing_that_was_trained(small_corpus, tmp_path):
    audio = shutil.copytree(small_corpus.audio, tmp_path / "audio")
    heard = audio / small_corpus.trials.read_text().split()[1]
    sound = heard.read_bytes()
    heard.write_text("this is no sound")
    file = write_config(
        small_corpus,
        tmp_path,
        train={"max_steps": 1},
        eval={"trials": str(small_corpus.trials), "root": str(audio), "at_start": False},
    )
    for message in run_world(2, train_job, file, folder=tmp_path / "1"):
        assert message.startswith("CelError: ")
        assert "cannot be read as audio" in message
    assert (tmp_path / "run" / "checkpoints" / "step-00000001" / "state.json").exists()
    heard.write_bytes(sound)
    result = run_world(1, train_job, file, folder=tmp_path / "2")[0]
    assert (result["steps"], result["utterances_per_second"]) == (1, None)
    assert [row["eer"] for row in records(tmp_path / "run", "evaluations.jsonl")] == [result["eer"]]


def test_records_continue_where_the_state_is(tmp_path, caplog):
    metrics, evaluations = tmp_path / "metrics.jsonl", tmp_path / "evaluations.jsonl"
    line = functools.partial('{{"step": {}, "epoch": 0}}\n'.format)
    metrics.write_text(line(1) + "nonsense\n" + '{"step": 2}\n' + line(2) + line(3) + '{"step": 4')
    evaluations.write_text(line(0) + line(2) + line(3))
    Records(tmp_path, Tracker(), TrainState(step=2, evaluated_step=2))
    assert metrics.read_text() == line(1) + line(2)
    assert evaluations.read_text() == line(0) + line(2)
    assert "metrics.jsonl, line 2, is damaged" in caplog.text
    # The evaluation of the step that the run goes on from is still to come.
    Records(tmp_path, Tracker(), TrainState(step=2, evaluated_step=0))
    assert evaluations.read_text() == line(0)
    # No checkpoint was written yet: everything comes again, the evaluation of the untrained encoder too.
    Records(tmp_path, Tracker(), TrainState())
    assert (metrics.read_text(), evaluations.read_text()) == ("", "")
