"""What a sweep accepts, and the configuration that each trial gets."""

import io
import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_runs import write_config

from cel_dist.cli.app import run
from cel_dist.config_file import load_config
from cel_dist.errors import CelError, RunError
from cel_dist.sweep import plots
from cel_dist.sweep.outcomes import Outcome, best_of, curve, read_outcomes, write_outcomes
from cel_dist.sweep.run import run_sweep
from cel_dist.sweep.settings import Sweep, load_sweep
from cel_dist.sweep.summary import best_settings, importances
from cel_dist.sweep.table import line, table

PROJECT = Path(__file__).parent.parent


def sweep_file(corpus: Any, folder: Path, **section: Any) -> Path:
    """A sweep over the small corpus."""
    trials = {"trials": str(corpus.trials), "root": str(corpus.audio)}
    space = {"optim.lr": {"log_uniform": [1e-4, 1e-2]}, "loss.pairs": {"choice": ["pon", "apn"]}}
    return write_config(corpus, folder, "sweep", eval=trials, sweep={"space": space, **section})


def sweep_of(corpus: Any, folder: Path, **section: Any) -> Sweep:
    return load_sweep(sweep_file(corpus, folder, **section))


def test_a_trial_has_its_values_and_a_place_of_its_own(small_corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = sweep_of(small_corpus, tmp_path, cpus=3)
    config = sweep.of_trial({"optim.lr": 0.004, "loss.pairs": "apn"}, tmp_path / "x" / "1", "x", "parent")
    assert (config.optim.lr, config.loss.pairs, config.run.dir) == (0.004, "apn", tmp_path / "x" / "1")
    assert (config.tracking.parent_run, config.tracking.register_as) == ("parent", None)
    # Ranks work in other folders than the command.
    assert config.tracking.uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert config.train.threads == 1
    unset = load_sweep(sweep_file(small_corpus, tmp_path, cpus=3), ["train.threads=null"])
    assert unset.of_trial({}, tmp_path, "x").train.threads == 3


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        ({"space": {"optim.rate": {"choice": [1]}}}, "did you mean 'optim.lr'|no setting 'optim.rate'"),
        ({"space": {"run.dir": {"choice": ["a"]}}}, r"the sweep sets run\.\* itself"),
        ({"space": {"optim.lr": {"uniform": [-1, 1]}}}, r"optim.lr=-1.0 cannot be searched: .*greater than 0"),
        ({"space": {"optim.lr": {"uniform": [2, 1]}}}, "write the lower bound first"),
        ({"space": {"optim.lr": {"log_uniform": [0, 1]}}}, "bounds are above 0"),
        ({"space": {"optim.lr": {"uniform": [1, 2], "choice": [1]}}}, "exactly one of"),
        ({"space": {"optim.lr": {}}}, "exactly one of"),
        ({"space": {}}, "at least 1 item"),
        ({"space": {"train.batch_size": {"choice": [8, 9]}}, "ranks": 2}, "batch_size=9 cannot be .* does not divide"),
        ({"space": {"train.batch_size": {"integer": [8, 16]}}, "ranks": 2}, "batch_size=9 cannot be .* not divide"),
        ({"space": {"train.batch_size": {"uniform": [8, 16]}}}, "batch_size=11.05.* cannot be searched"),
        ({"gpus": 0.5, "ranks": 2}, "trials may share a GPU, the 2 ranks of one may not"),
        ({"gpus": 2}, "'sweep.gpus'.*less than or equal to 1"),
        ({"search": "grid"}, r"sweep.space.optim.lr has no end"),
        ({"search": "grid", "space": {"loss.pairs": {"choice": ["pon"]}}, "trials": 3}, "leave out sweep.trials"),
        ({"search": "tpe", "scheduler": "pbt"}, "goes with sweep.search=random"),
        ({"scheduler": "pbt", "space": {"train.batch_size": {"choice": [4, 8]}}}, "cannot change train.batch_size"),
        ({"scheduler": "pbt", "trials": 4, "concurrent": 2}, "compares all 4 trials .*; leave out sweep.concurrent"),
        ({"scheduler": "fifo", "reduction": 4}, "sweep.reduction is not used with sweep.scheduler=fifo"),
        ({"trails": 3}, "unknown key 'sweep.trails'; did you mean 'sweep.trials'"),
    ],
)  # fmt: skip
def test_a_sweep_that_cannot_be_is_refused_in_a_line(small_corpus, tmp_path, section, complaint):
    with pytest.raises(CelError, match=complaint) as caught:
        sweep_of(small_corpus, tmp_path, **section)
    assert "\n" not in str(caught.value)


def test_a_sweep_needs_a_validation_list(small_corpus, tmp_path):
    file = sweep_file(small_corpus, tmp_path)
    with pytest.raises(CelError, match=r"set eval\.trials and eval\.root"):
        load_sweep(file, ["eval.trials=null", "eval.root=null"])


def test_a_run_refuses_a_sweep_and_a_sweep_a_run(small_corpus, tmp_path, capsys):
    assert run(["train", str(sweep_file(small_corpus, tmp_path))]) == 2
    assert "run it with 'cel sweep'" in capsys.readouterr().err
    assert run(["sweep", str(write_config(small_corpus, tmp_path))]) == 2
    assert "has no section 'sweep'" in capsys.readouterr().err


def test_an_override_may_add_to_the_space(small_corpus, tmp_path):
    added = load_sweep(sweep_file(small_corpus, tmp_path), ["sweep.space.loss.t={uniform: [1, 3]}", "sweep.trials=5"])
    assert set(added.section.space) == {"optim.lr", "loss.pairs", "loss.t"}
    assert added.section.num_trials == 5


def test_a_sweep_is_in_one_place_for_processes_with_other_working_folders(small_corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = load_sweep(sweep_file(small_corpus, tmp_path), ["run.dir=runs/sweep", "tracking.uri=sqlite:///here.db"])
    (tmp_path / "worker").mkdir()
    monkeypatch.chdir(tmp_path / "worker")
    assert sweep.folder == tmp_path / "runs/sweep"
    assert sweep.tracking_uri == f"sqlite:///{tmp_path}/here.db"


def test_a_sweep_does_not_go_through_the_client_of_ray(small_corpus, tmp_path):
    with pytest.raises(CelError, match="give HOST:PORT, or auto"):
        run_sweep(sweep_of(small_corpus, tmp_path), address="ray://localhost:10001")
    assert not (tmp_path / "sweep").exists()


def test_what_a_sweep_lacks_of_ray_is_said_in_one_line():
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'cel_dist[sweep]'")
    program = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from cel_dist.ray_cluster import connected\n"
        "with connected('local', extra='sweep'): pass"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "CelError: a part of Ray is missing" in done.stderr
    assert done.stderr.strip().endswith("pip install 'cel_dist[sweep]'")


def test_ranks_that_fit_on_no_machine_are_refused():
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'cel_dist[sweep]'")
    from cel_dist.sweep.ranks import bundles
    from cel_dist.sweep.tuner import require_room

    require_room(bundles(2, 1.0, 0.0), [{"CPU": 1.0}, {"CPU": 1.0}])
    require_room(bundles(2, 1.0, 1.0), [{"CPU": 4.0}, {"CPU": 2.0, "GPU": 2.0}])
    with pytest.raises(CelError, match="needs 4 CPUs, and the Ray cluster has 2"):
        require_room(bundles(2, 2.0, 0.0), [{"CPU": 2.0}])
    with pytest.raises(CelError, match=r"2.9 CPUs for one of them cannot be had on one machine; lower sweep\.cpus"):
        require_room(bundles(1, 3.0, 0.0), [{"CPU": 2.0}, {"CPU": 2.0}])


def test_the_reason_of_a_failure_is_of_this_attempt(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'cel_dist[sweep]'")
    from cel_dist.sweep.ranks import last_words

    log = tmp_path / "1.log"
    log.write_text("error: the disk was full\n")
    begin = log.stat().st_size
    assert last_words(log, 0, 1) == "the disk was full"
    assert last_words(log, begin, -9) == "a rank was killed by SIGKILL"
    assert last_words(log, begin, 1) == "a rank ended with code 1"


def test_a_grid_has_every_combination(small_corpus, tmp_path):
    space = {"augment.profile": {"integer": [0, 2]}, "augment.speeds": {"choice": [[1.0], [0.9, 1.0]]}}
    section = sweep_of(small_corpus, tmp_path, search="grid", space=space).section
    assert section.num_trials == 6
    # Searchers take only what can be compared; trials get what was meant.
    name = section.space["augment.speeds"].name_of([0.9, 1.0])
    assert isinstance(name, str)
    assert section.values_of({"augment.profile": 1, "augment.speeds": name})["augment.speeds"] == [0.9, 1.0]


def test_the_shipped_sweep_is_valid(small_corpus):
    sweep = load_sweep(PROJECT / "configs/sweep_cel.yaml")
    assert {"loss.lambda_u", "loss.t", "loss.similarity", "optim.lr", "train.batch_size"} < set(sweep.section.space)


def outcomes_of(sweep: Sweep) -> list[Outcome]:
    rows = [(1e-4, "pon", 0.3), (1e-3, "apn", 0.1), (1e-2, "pon", 0.25), (5e-3, "apn", 0.2), (2e-3, "pon", None)]
    return [
        Outcome(f"t{number}", {"optim.lr": lr, "loss.pairs": pairs}, "finished", 3.0, eer, eer, f"run{number}")
        for number, (lr, pairs, eer) in enumerate(rows)
    ]


def test_the_best_settings_are_a_configuration_for_a_run(small_corpus, tmp_path):
    sweep = sweep_of(small_corpus, tmp_path)
    best = best_of(outcomes_of(sweep))
    assert best is not None
    assert best.id == "t1"
    (tmp_path / "best.yaml").write_text(best_settings(sweep, best))
    config = load_config(tmp_path / "best.yaml")
    assert (config.optim.lr, config.loss.pairs, config.run.dir) == (1e-3, "apn", sweep.base.run.dir / "best")
    assert config.train == sweep.base.train


def test_outcomes_are_read_as_written(small_corpus, tmp_path):
    outcomes = outcomes_of(sweep_of(small_corpus, tmp_path))
    assert read_outcomes(tmp_path) == []
    write_outcomes(tmp_path, outcomes)
    assert read_outcomes(tmp_path) == outcomes
    (tmp_path / "trials.json").write_text((tmp_path / "trials.json").read_text()[:-20])
    with pytest.raises(CelError, match="is damaged; remove it and go on with --resume"):
        read_outcomes(tmp_path)


def test_a_measurement_that_is_no_number_is_not_the_best():
    outcome = Outcome("t0", {})
    for eer in (math.nan, 0.3, 0.4, math.nan):
        outcome.add({"epoch": 1, "eer": eer, "run_dir": "run"}, "eer")
    assert outcome.best == 0.3


def test_importance_is_of_what_makes_the_difference(small_corpus, tmp_path):
    pytest.importorskip("optuna", reason="Optuna is not installed: pip install 'cel_dist[sweep]'")
    sweep = sweep_of(small_corpus, tmp_path)
    outcomes = []
    for number in range(40):
        values = {"optim.lr": 1e-4 * 1.1**number, "loss.pairs": "pon" if number % 2 else "apn"}
        eer = 0.1 + 0.01 * number
        outcomes.append(Outcome(f"t{number}", values, "finished", 1.0, eer, eer))
    shares = importances(sweep.section, outcomes)
    assert shares["optim.lr"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)
    assert importances(sweep.section, outcomes[:3]) == {}


def test_pictures_hold_every_trial_that_was_measured(small_corpus, tmp_path):
    sweep = sweep_of(small_corpus, tmp_path)
    outcomes = outcomes_of(sweep)
    svg = plots.parallel_coordinates(outcomes, sweep.section.space, "eer")
    text = "".join(ElementTree.fromstring(svg).itertext())
    assert {"optim.lr", "loss.pairs", "apn", "0.1000", "0.3000"} <= set(text.split())
    curves = {"t0": [(1.0, 0.4), (2.0, 0.3)], "t1": [(1.0, 0.2)], "t4": []}
    assert b"best (t1)" in plots.budget(curves, "t1", "eer")
    assert plots.importances({"optim.lr": 0.9, "loss.pairs": 0.1})


def test_the_curve_of_a_trial_goes_through_its_runs(tmp_path):
    for name, records in {"1": [(1, 0.3), (2, 0.4)], "2": [(2, 0.2), (3, 0.1)]}.items():
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": 10 * epoch, "epoch": epoch, "eer": eer}) for epoch, eer in records]
        (tmp_path / name / "evaluations.jsonl").write_text("\n".join(lines) + "\n")
    assert curve([tmp_path / "1", tmp_path / "2"], "eer") == [(1.0, 0.3), (2.0, 0.2), (3.0, 0.1)]


def test_a_line_says_what_has_happened():
    outcome = Outcome("t0", {"optim.lr": 0.00123456}, "running", 2.0, 0.25, 0.2)
    assert line(outcome, "started", "eer") == "trial t0: started with optim.lr=0.001235"
    assert line(outcome, "reported", "eer") == "trial t0: reported, epoch 2, eer 0.2500, best 0.2000"


@pytest.mark.parametrize(("width", "heading"), [(80, "settings"), (160, "loss.similarity")])
def test_the_table_fits_the_terminal(width, heading):
    console = pytest.importorskip("rich.console").Console(width=width, file=io.StringIO())
    names = ("loss.lambda_u", "loss.t", "loss.similarity", "optim.lr", "train.batch_size", "augment.profile")
    values = dict(zip(names, (0.2687, 3.466, "angular_prototypical", 0.001424, 200, 3), strict=True))
    outcomes = [Outcome("3f2a1_00000", values, "stopped", 3.0, 0.25, 0.2), Outcome("3f2a1_00001", values, "running")]
    console.print(table(outcomes, 40, "eer", width))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert heading in lines[2]
    row = next(number for number, text in enumerate(lines) if "3f2a1_00000" in text)
    assert {"stopped", "0.2500", "0.2000"} <= set(lines[row].split())
    assert "angular_prototypical" in "".join("".join(lines[row:]).split())
    assert "1 of 40" in lines[0]
    assert table([], 40, "eer", width).row_count == 0


def test_the_section_survives_yaml(small_corpus, tmp_path):
    sweep = sweep_of(small_corpus, tmp_path)
    text = yaml.safe_dump(sweep.section.model_dump(mode="json", exclude_none=True))
    assert type(sweep.section).model_validate(yaml.safe_load(text)) == sweep.section


def test_a_cluster_out_of_reach_leaves_nothing_that_refuses_the_same_command(small_corpus, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'cel_dist[sweep]'")
    sweep = sweep_of(small_corpus, tmp_path)
    for _ in range(2):
        with pytest.raises(RunError, match=r"no Ray cluster can be reached at '127\.0\.0\.1:9'"):
            run_sweep(sweep, address="127.0.0.1:9")
