"""The benchmarks run and report every row; how fast, is not asked here."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

PROJECT = Path(__file__).resolve().parent.parent
SOURCES = ("shards, local", "shards, cached", "shards, HTTP, cache empty", "per item, files")


def test_the_data_benchmark_reports_every_way(tmp_path: Path) -> None:
    command = [sys.executable, PROJECT / "benchmarks/data.py", "--quick", "--results", tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "data.json").read_text())
    rows = {(row["source"], row["audio_format"], row["output"]): row for row in report["table"]}
    formats = ("wav", "flac")
    assert set(rows) == {
        *((source, name, "int16") for source in ("local", "cache", "http", "files") for name in formats),
        *((source, name, "features") for source in ("local", "files") for name in formats),
    }
    for (source, name, output), row in rows.items():
        for figure in ("core_seconds", "seconds", "bytes_read", "import_seconds", "first_batch_seconds"):
            assert row[figure] > 0, (source, name, output, figure)
        assert (row["bytes_fetched"] > 0) == (source == "http")
    # Two segments of int16 and a header, not the member; decoding FLAC takes all of it.
    assert rows["local", "wav", "int16"]["bytes_read"] < 4 * 29_040 + 1000
    assert rows["cache", "wav", "int16"]["bytes_read"] < 4 * 29_040 + 1000
    assert rows["files", "wav", "int16"]["bytes_read"] > 0.9 * rows["files", "wav", "int16"]["member_bytes"]

    assert len(report["ratios"]) == 6
    assert all(0 < row["least"] <= row["median"] <= row["most"] for row in report["ratios"])
    assert report["stages"]["cpu"]["augmentation"] > 0
    assert report["stages"]["cpu"]["log_mel"] > 0

    page = (tmp_path / "data.md").read_text()
    for source in SOURCES:
        # Rates and first batches, of both formats.
        assert page.count(f"| {source} |") in (4, 8)
    assert str(tmp_path) not in page


def test_the_table_of_the_global_loss_is_written_again_without_measuring(tmp_path: Path) -> None:
    stored = PROJECT / "benchmarks/results/global_loss.json"
    shutil.copy(stored, tmp_path)
    command = [sys.executable, PROJECT / "benchmarks/global_loss.py", "--table", "--results", tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after = (json.loads((folder / stored.name).read_text()) for folder in (stored.parent, tmp_path))
    assert before == after
    assert (tmp_path / "global_loss.md").read_text() == stored.with_suffix(".md").read_text()
    for row in after["table"]:
        if row["W"] == 1:
            assert set(row["collectives"].values()) == set(row["words"].values()) == {0}
        else:
            # Rows with their ids; then the exchange, or the gradient of all rows.
            gathered, all_rows = row["b"] * (2 * row["d"] + 2), 2 * row["K"] * row["d"]
            assert row["words"] == {"tiles": gathered + 2 * (2 * row["b"] + 8), "materialised": gathered + all_rows}
            assert set(row["collectives"].values()) == {2}


def test_the_tables_of_scaling_are_written_again_without_measuring(tmp_path: Path) -> None:
    stored = PROJECT / "benchmarks/results/scaling.json"
    shutil.copy(stored, tmp_path)
    command = [sys.executable, PROJECT / "benchmarks/scaling.py", "--table", "--results", tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "scaling.md").read_text() == stored.with_suffix(".md").read_text()
    report = json.loads((tmp_path / "scaling.json").read_text())
    assert report == json.loads(stored.read_text())

    # Everything that was counted is what the formulas of today say; a world of one sends nothing.
    assert all(row["counted"] == row["formula"] for row in report["compared"])
    assert {row["W"] for row in report["compared"]} == {2, 4}
    assert {row["W"] for row in report["times"]} == {1, 2, 4}
    for row in report["counts"]:
        told = [sent for sent in row["sent"] if sent["part"] == "agreement"]
        assert sum(sent["given"] for sent in told) < 1024, "the training loop tells more than a few scalars"
    # The document quotes the model.
    sys.path.append(str(PROJECT / "benchmarks"))
    from scaling_report import efficiency_rows

    document = (PROJECT / "docs/scaling.md").read_text()
    assert [row for row in efficiency_rows(report) if row not in document] == []
    grid = {(row["encoder"], row["network"], row["b"], row["W"]): row["efficiency"] for row in report["model"]["grid"]}
    for (encoder, network, share, ranks), efficiency in grid.items():
        assert 0 < efficiency < 1
        if (encoder, network, share, 4 * ranks) in grid:
            assert grid[encoder, network, share, 4 * ranks] < efficiency

    # An encoder that is computed faster waits for the same network.
    command += ["--encoder-tflops", "25"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    faster = json.loads((tmp_path / "scaling.json").read_text())["model"]["grid"]
    assert all(row["efficiency"] < grid[row["encoder"], row["network"], row["b"], row["W"]] for row in faster)


def test_the_table_of_the_metrics_is_written_again_without_measuring(tmp_path: Path) -> None:
    stored = PROJECT / "benchmarks/results/metrics.json"
    shutil.copy(stored, tmp_path)
    command = [sys.executable, PROJECT / "benchmarks/metrics.py", "--table", "--results", tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "metrics.md").read_text() == stored.with_suffix(".md").read_text()
    names = [row["name"] for row in json.loads(stored.read_text())["rows"]]
    assert names == ["error_rates", "euclidean", "cosine", "adaptive_s_norm", "intervals_short", "intervals_listed"]


def test_the_tables_of_training_are_written_again_without_measuring(tmp_path: Path) -> None:
    for name, script in (
        ("train-cpu-fp32", "train"),
        ("train-cpu-bf16", "train"),
        ("train_eer-bf16", "train_eer"),
        ("train_eer-fp32", "train_eer"),
        ("start", "start"),
        ("evaluation", "evaluation"),
    ):
        stored = PROJECT / f"benchmarks/results/{name}.json"
        shutil.copy(stored, tmp_path)
        command = [sys.executable, PROJECT / f"benchmarks/{script}.py", "--table", "--results", tmp_path]
        if script == "train_eer":
            command += ["--precision", name[-4:]]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / f"{name}.md").read_text() == stored.with_suffix(".md").read_text()
        assert json.loads((tmp_path / f"{name}.json").read_text()) == json.loads(stored.read_text())


def test_the_jobs_of_the_evaluation_benchmark_run(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(3):
        noise = np.random.default_rng(number).integers(-3000, 3000, 16_000 + number, dtype=np.int16)
        soundfile.write(tree / f"{number}.wav", noise, 16_000)
    for job in (
        {"job": "embed", "way": "encoder alone", "tree": str(tree)},
        {"job": "prepare", "way": "to flac", "tree": str(tree), "out": str(tmp_path / "shards")},
    ):
        command = [sys.executable, PROJECT / "benchmarks/evaluation_one.py", json.dumps(job)]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["seconds"] > 0
    assert (tmp_path / "shards/manifest.json").is_file()


def test_the_published_step_computes_what_this_project_computes() -> None:
    """The same encoder and loss, so that only the way is compared."""
    sys.path.append(str(PROJECT / "benchmarks"))
    import torch
    from train_published import PlainFastResNet34, PlainLoss

    from cel_dist.encoders import build_encoder
    from cel_dist.losses import EquilibriumLoss

    torch.manual_seed(0)
    encoder, plain = build_encoder("fast_resnet34"), PlainFastResNet34()
    plain.load_state_dict(encoder.state_dict())
    features = torch.randn(6, 2, 40, 62)
    embeddings = [torch.stack([one(view) for view in features.unbind(1)], dim=1) for one in (encoder, plain)]
    # In another memory format sums are rounded in another order, in each of the 36 layers.
    torch.testing.assert_close(*embeddings, rtol=0, atol=2e-4)
    assert PlainLoss()(embeddings[1]).item() == pytest.approx(EquilibriumLoss()(embeddings[0]).loss.item(), rel=1e-4)
