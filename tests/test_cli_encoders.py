"""`cel encoders` as a user starts it."""

import json

import pytest

from cel_dist.cli.app import run
from cel_dist.encoders import encoder_names


def test_the_table_has_source_pooling_size_and_work_of_every_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["encoders", "--json", "--mels", "80", "--embedding-dim", "256"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["num_mels"], summary["embedding_dim"], summary["frames"]) == (80, 256, 200)
    rows = {row["name"]: row for row in summary["encoders"]}
    assert sorted(rows) == encoder_names()
    resnet = rows["resnet34"]
    assert resnet["parameters"] == 6_634_336
    # Wang et al. 2023, arXiv 2210.17016, count 4.55 billion for 2 s, with batch norm and activations.
    assert resnet["multiply_adds"] == pytest.approx(4.55e9, rel=0.01)
    assert resnet["source"].startswith("Zeinali et al. 2019")
    assert (resnet["pooling"], resnet["default_pooling"]) == ("stats", "stats")


def test_a_pooling_changes_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["encoders", "--pooling", "tap"]) == 0
    lines = capsys.readouterr().out.splitlines()
    [line] = [line for line in lines if line.startswith("fast_resnet34")]
    assert line.split()[1:6] == ["1.42", "M", "0.44", "G", "tap"]
    assert lines[-1] == "with 40 mel bands and embeddings of 512 dimensions; multiply-adds of 200 frames (2 s)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mels", "64"], "error: --mels 64: features have 40 or 80 mel bands; give one of these"),
        (["--pooling", "mean"], "known poolings: default, tap, sap, stats, asp"),
        (["--embedding-dim", "0"], "give a positive embedding_dim"),
    ],
)
def test_bad_options_cost_one_line_and_exit_code_2(arguments, message, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["encoders", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
