"""The HTML report, from real files in a run folder."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from cel_dist.errors import CelError
from cel_dist.report import write_comparison, write_report

SPEAKERS = ("anna", "bert", "carl")


def record_run(folder: Path) -> None:
    """A run of 60 steps and its evaluation: 3 speakers of 4 utterances, and every pair of them a trial."""
    records = []
    for step in range(10, 61, 10):
        loss = {"loss": 3 - step / 60, "similarity": 4.0, "uniformity": -1.0, "lr": 1e-3, "grad_norm": 2.0}
        records.append({"step": step, "epoch": step // 30, **loss, "utterances_per_second": 90.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    evaluations = [
        {"step": 0, "epoch": 0, "eer": 0.4012, "min_dcf": 0.99},
        {"step": 30, "epoch": 1, "eer": 0.0521, "min_dcf": 0.31},
        {"step": 60, "epoch": 2, "eer": 0.0634, "min_dcf": 0.35},
    ]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in evaluations))

    evaluation = folder / "evaluation"
    evaluation.mkdir()
    names = [f"{speaker}/{number}.flac" for speaker in SPEAKERS for number in range(4)]
    generator = np.random.default_rng(0)
    embeddings = np.repeat(np.eye(3, 8), 4, axis=0) + generator.normal(0, 0.1, (12, 8))
    np.savez(evaluation / "embeddings.npz", names=np.array(names), embeddings=embeddings.astype(np.float32))
    lines = [
        f"{int(i // 4 == j // 4)} {names[i]} {names[j]} {-np.linalg.norm(embeddings[i] - embeddings[j]):.6f}\n"
        for i in range(12)
        for j in range(i)
    ]
    (evaluation / "scores.txt").write_text("".join(lines))


class Page(HTMLParser):
    """Text, figures and addresses of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.figures = 0
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        if tag == "figure":
            self.figures += 1
        self.addresses += [str(named[name]) for name in ("src", "href") if name in named]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_report_shows_the_numbers_of_the_run(tmp_path: Path) -> None:
    record_run(tmp_path)
    (tmp_path / "summary.json").write_text(
        json.dumps({"seconds": 245.0, "utterances_per_second": 88.4, "model_uri": "models:/cel/3"})
    )
    (tmp_path / "config.yaml").write_text("train:\n  batch_size: 200\n")
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    page = Page(path)
    # The best evaluation is the one in the middle, not the last.
    assert "40.12% EER before training" in page.text
    assert "5.21% EER after 30 steps" in page.text
    assert "best, step 30 EER 5.21%, minDCF 0.310" in page.text
    assert "last, step 60 EER 6.34%, minDCF 0.350" in page.text
    assert "4 min 05 s time 88 utterances per second" in page.text
    assert "60 (epoch 2) last loss 2.0000 (similarity 4.0000, uniformity -1.0000)" in page.text
    assert "18 same speaker, 48 different speakers, 12 utterances" in page.text
    assert "models:/cel/3" in page.text
    assert "batch_size: 200" in page.text
    assert re.search(r"torch \d+\.\d+", page.text)
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_the_report_is_one_file_without_outside_resources(tmp_path: Path) -> None:
    record_run(tmp_path)
    page = Page(write_report(tmp_path))
    assert page.figures == 4
    assert all(address.startswith("data:") for address in page.addresses)
    assert "url(" not in page.source
    assert "@import" not in page.source


def test_diagnostics_of_the_evaluation_are_in_the_report(tmp_path: Path) -> None:
    record_run(tmp_path)
    (tmp_path / "evaluation" / "embeddings.npz").unlink()
    group = {"by": "sex", "name": "female", "targets": 7, "non_targets": 9}
    alignment = {"mean": 0.25, "pairs": 18}
    control = {"quiet_share": 0.1, "model_eer": 0.12, "spectrum_eer": 0.15, "whitened_eer": 0.1, "quiet_model_eer": 0.4}
    control |= {"control_eer": 0.1, "all_frames_eer": 0.05, "correlation_targets": None, "matched": None}
    diagnostics = {
        "groups": [{**group, "eer": None, "false_rejects": None, "false_accepts": None}],
        "min_trials": 100,
        "not_shown": ["errors by age: the metadata has no column 'age'"],
        "geometry": {
            "utterances": 12,
            "dimensions": 8,
            "uniformity": -2.5,
            "uniformity_utterances": 12,
            "alignment_targets": alignment,
            "effective_rank": 2.2,
            "components": 2,
        },
        "control": {**control, "correlation_non_targets": 0.3, "is_clearly_below": False},
    }
    (tmp_path / "evaluation" / "diagnostics.json").write_text(json.dumps(diagnostics))
    page = Page(write_report(tmp_path))
    assert "EER by condition" in page.text
    assert "alignment of target trials 0.2500 (18 pairs) uniformity -2.5000" in page.text
    assert "not shown errors by age: the metadata has no column 'age'" in page.text
    assert "The model's EER of 12.00% is not clearly below (less than half of) the 10.00% of the control" in page.text
    drawn = (tmp_path / "plots" / "groups.svg").read_text(encoding="utf-8")
    assert "sex: female" in drawn
    assert "too few trials" in drawn


def test_windows_are_on_the_map_as_their_mean(tmp_path: Path) -> None:
    record_run(tmp_path)
    write_report(tmp_path)
    whole = (tmp_path / "plots" / "speakers.svg").read_text()
    path = tmp_path / "evaluation" / "embeddings.npz"
    with np.load(path) as archive:
        names, rows = archive["names"], archive["embeddings"]
    np.savez(path, names=names, embeddings=np.stack([rows, rows], axis=1))
    write_report(tmp_path)
    windows = (tmp_path / "plots" / "speakers.svg").read_text()
    assert windows.count("symbol") == whole.count("symbol") > 12


def test_the_pictures_are_also_files_of_their_own(tmp_path: Path) -> None:
    record_run(tmp_path)
    write_report(tmp_path)
    pictures = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "plots").iterdir()}
    assert set(pictures) == {"training.svg", "det.svg", "scores.svg", "speakers.svg"}
    assert all("<svg" in picture for picture in pictures.values())
    # The validation curve comes out of the evaluations.
    assert "EER on validation trials" in pictures["training.svg"]


def test_a_run_without_validation_has_curves_only(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "epoch": 0, "loss": 2.5}\n{"step": 20, "epoch": 0, "lo')
    page = Page(write_report(tmp_path))
    assert page.figures == 1
    assert "last loss 2.5000" in page.text
    assert "EER" not in page.text


def test_what_a_user_wrote_is_shown_and_not_interpreted(tmp_path: Path) -> None:
    record_run(tmp_path)
    (tmp_path / "config.yaml").write_text("run:\n  name: <script>alert('x')</script>\n")
    page = Page(write_report(tmp_path))
    assert "<script>alert('x')" not in page.source
    assert "<script>alert('x')</script>" in page.text


def test_speakers_on_the_map_are_what_the_trials_say(tmp_path: Path) -> None:
    from cel_dist.report.run_folder import Scores, speakers_of

    # One flat folder: the names tell nothing, the target trials do.
    names = ["x1.wav", "x2.wav", "x3.wav", "x4.wav"]
    scores = Scores(np.array([1, 0, 1]), ["x1.wav", "x1.wav", "x3.wav"], ["x4.wav", "x2.wav", "x4.wav"], np.zeros(3))
    assert speakers_of(names, scores) == ["x1.wav", "x2.wav", "x1.wav", "x1.wav"]


@pytest.mark.parametrize(
    ("damage", "content", "message"),
    [
        ("metrics.jsonl", '{"step": 1, "epoch": 0}\nnonsense\n', r"metrics\.jsonl, line 2"),
        ("evaluations.jsonl", "nonsense\n", r"evaluations\.jsonl, line 1"),
        ("summary.json", "{", r"summary\.json is not valid JSON"),
        ("evaluation/scores.txt", "1 a.wav b.wav\n", r"scores\.txt has lines that are not"),
        ("evaluation/diagnostics.json", "{", r"diagnostics\.json does not hold diagnostics"),
        ("evaluation/embeddings.npz", "text", r"embeddings\.npz does not hold names and embeddings"),
    ],
)
def test_a_damaged_file_is_named(damage: str, content: str, message: str, tmp_path: Path) -> None:
    record_run(tmp_path)
    (tmp_path / damage).write_text(content)
    with pytest.raises(CelError, match=message):
        write_report(tmp_path)


def test_bad_input_of_a_report_is_named(tmp_path: Path) -> None:
    record_run(tmp_path)
    with pytest.raises(CelError, match="there is no run folder"):
        write_report(tmp_path / "missing")
    with pytest.raises(CelError, match="is a folder; name the file"):
        write_report(tmp_path, tmp_path)
    with pytest.raises(CelError, match="there is no folder"):
        write_report(tmp_path, tmp_path / "missing" / "report.html")
    with pytest.raises(CelError, match="is given twice"):
        write_comparison([tmp_path, tmp_path / "evaluation" / ".."], tmp_path / "both.html")


def test_runs_are_compared_by_results_and_the_settings_that_differ(tmp_path: Path) -> None:
    for name, rate in (("one", "0.001"), ("two", "0.002")):
        (tmp_path / name).mkdir()
        record_run(tmp_path / name)
        (tmp_path / name / "config.yaml").write_text(f"optim:\n  lr: {rate}\ntrain:\n  batch_size: 200\n")
    page = Page(write_comparison([tmp_path / "one", tmp_path / "two"], tmp_path / "both.html"))
    assert "best EER 5.21% 5.21%" in page.text
    assert "optim.lr 0.001 0.002" in page.text
    assert "batch_size" not in page.text
    assert page.figures == 2


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CelError, match=r"cannot read .*metrics\.jsonl.*No such file"):
        write_report(tmp_path)
