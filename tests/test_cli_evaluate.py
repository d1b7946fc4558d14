"""`cel evaluate`, `cel embed`, `cel verify`, `cel import-published`, as a user calls them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cel_dist.cli.app import run
from cel_dist.data.audio import encode_audio
from cel_dist.encoders import build_encoder
from cel_dist.model import Calibration, EncoderDescription, ModelDescription, SpeakerModel

EVALUATE = ("evaluate", "--model", "model", "--trials", "trials.txt", "--root", "audio")
Cel = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cel(capsys: pytest.CaptureFixture[str]) -> Cel:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a model in `model`, three recordings in `audio`, `trials.txt`."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    encoder = EncoderDescription(name="fast_resnet34", embedding_dim=16)
    SpeakerModel(build_encoder("fast_resnet34", 16), ModelDescription(encoder=encoder)).save("model")
    generator = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        Path("audio").mkdir(exist_ok=True)
        wave = (2000 * generator.standard_normal(4800)).astype(np.int16)
        Path(f"audio/{name}.wav").write_bytes(encode_audio(wave, "wav"))
    Path("trials.txt").write_text("1 a.wav b.wav\n0 a.wav c.wav\n")
    Path("who.txt").write_text("a.wav ann\nb.wav bob\nc.wav cid\n")
    return tmp_path


def outcome(result: tuple[int, str, str]) -> dict[str, Any]:
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


def refusal(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture(scope="module")
def few_golden_trials(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[float]]]:
    """Four published trials of both kinds, and their scores by frames."""
    lines = {
        frames: (shared / "golden" / f"scores_frames{frames}.txt").read_text().splitlines()[:4] for frames in (0, 200)
    }
    path = tmp_path_factory.mktemp("golden") / "few.txt"
    path.write_text("".join(line.rsplit(" ", 1)[0] + "\n" for line in lines[0]))
    return path, {frames: [float(line.split()[3]) for line in rows] for frames, rows in lines.items()}


@pytest.mark.parametrize("frames", [0, 200])
def test_a_published_checkpoint_scores_as_published_directly_and_imported(
    cel, shared, few_golden_trials, tmp_path, frames
):
    trials, golden = few_golden_trials
    published = shared / "golden" / "published_format.model"
    imported = outcome(cel("import-published", published, "--out", tmp_path / "imported", "--json"))
    assert imported == {"model": str(tmp_path / "imported"), "encoder": "fast_resnet34", "embedding_dim": 512}
    files = []
    for name, model in (("direct", published), ("imported", tmp_path / "imported")):
        arguments = ["--model", model, "--trials", trials, "--root", shared / "data" / "corpus", "--frames", frames]
        result = outcome(cel("evaluate", *arguments, "--out", tmp_path / name, "--json"))
        assert result["trials"] == 4
        files.append(Path(result["scores"]).read_text())
        found = [float(line.split()[3]) for line in files[-1].splitlines()]
        np.testing.assert_allclose(found, golden[frames], rtol=1e-4)
    assert files[0] == files[1]


def test_evaluate_writes_scores_and_plots_beside_the_numbers(cel, folder):
    result = outcome(cel(*EVALUATE, "--json"))
    assert 0 <= result["eer"] <= 1
    assert set(result["min_dcf"]) == {"0.01", "0.05"}
    for kind in ("scores", "det", "histogram"):
        assert Path(result[kind]).parent == Path("evaluation/trials")
        assert Path(result[kind]).stat().st_size > 0
    code, out, _ = cel(*EVALUATE, "--out", "elsewhere")
    assert code == 0
    assert f"EER {result['eer']:.2%}" in out
    assert "elsewhere/scores.txt" in out


def test_diagnostics_do_not_outlive_the_scores_they_are_of(cel, folder):
    Path("table.txt").write_text("a.wav ann\nb.wav ann\nc.wav bob\n")
    written = outcome(cel(*EVALUATE, "--metadata", "table.txt", "--json"))
    assert Path(written["diagnostics_file"]).exists()
    outcome(cel(*EVALUATE, "--scoring", "cosine", "--json"))
    assert not Path(written["diagnostics_file"]).exists()
    assert not Path(written["diagnostics_picture"]).exists()


def test_names_with_blanks_go_through_trials_and_scores(cel, folder):
    Path("audio/a.wav").rename("audio/Ann Lee.wav")
    Path("trials.txt").write_text("1\tAnn Lee.wav\tb.wav\n0\tAnn Lee.wav\tc.wav\n")
    result = outcome(cel(*EVALUATE, "--json"))
    rows = [line.split("\t")[:3] for line in Path(result["scores"]).read_text().splitlines()]
    assert rows == [["1", "Ann Lee.wav", "b.wav"], ["0", "Ann Lee.wav", "c.wav"]]


def test_windows_change_the_scores(cel, folder):
    arguments = (*EVALUATE, "--json", "--frames", 20)
    one = outcome(cel(*arguments, "--windows", 1))["threshold"]
    four = outcome(cel(*arguments, "--windows", 4))["threshold"]
    assert one != four


@pytest.mark.parametrize(
    "arguments",
    [
        ("--segment-seconds", 0.2),
        ("--frames", 20, "--windows", 3, "--windows-as", "embedding"),
    ],
)
def test_the_way_of_cutting_changes_the_scores(cel, folder, arguments):
    base = arguments[:-2] if "--frames" in arguments else ()
    plain = outcome(cel(*EVALUATE, "--json", *base))
    cut = outcome(cel(*EVALUATE, "--json", *arguments))
    assert plain["threshold"] != cut["threshold"]
    with np.load(cut["embeddings"]) as arrays:
        assert arrays["embeddings"].shape == (3, 16)


def test_smaller_batches_leave_the_scores(cel, folder):
    cut = (*EVALUATE, "--json", "--segment-seconds", 0.1)
    assert outcome(cel(*cut))["threshold"] == pytest.approx(
        outcome(cel(*cut, "--batch-seconds", 0.1))["threshold"], abs=1e-6
    )


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("1 a.wav b.wav\n0 a.wav x.wav\n0 y.wav a.wav\n", "2 of 4 audio files are missing under audio, the first is x"),
        ("1 a.wav b.wav\n1 a.wav c.wav\n", "all 2 trials of trials.txt (line 1 and on) are target trials"),
        ("1 a.wav b.wav\n0 a.wav c.wav\n0 a.wav b.wav\n", "line 3: the pair of line 1 with the other label"),
        ("1 a.wav b.wav\n0 a.wav c.wav\n0 b.wav a.wav\n", "line 3: the pair of line 1 with the other label"),
        ("1 a.wav b.wav\n0 a.wav\n", "trials.txt, line 2: 2 columns instead of 3"),
        # Six columns in two lines, but not three in each.
        ("1 a.wav\n1 0 1 b.wav\n", "trials.txt, line 1: 2 columns instead of 3"),
        ("1 a.wav b.wav\n0 a b.wav c.wav\n", "line 2: 4 columns instead of 3; write 'label enrol test'"),
        ("1 a.wav b.wav\n0\ta b.wav\tc.wav\n", "the first is a b.wav"),
        ("same a.wav b.wav\n", "line 1: no label in 'same a.wav b.wav'"),
        ("\r\n \r\n", "trials.txt holds no trials"),
        (b"RIFF\xff\xfe", "trials.txt is not UTF-8 text"),
    ],
)
def test_malformed_lists_are_one_line_and_exit_code_two(cel, folder, lines, message):
    Path("trials.txt").write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    assert message in refusal(cel(*EVALUATE))
    assert not Path("evaluation").exists()


def test_windows_line_ends_a_byte_order_mark_and_repeated_trials_are_read(cel, folder, caplog):
    plain = outcome(cel(*EVALUATE, "--json"))
    Path("trials.txt").write_bytes(b"\xef\xbb\xbf1 a.wav b.wav\r\n\r\n0 a.wav c.wav\r\n0 a.wav c.wav")
    code, out, _ = cel(*EVALUATE, "--json")
    assert code == 0
    assert (json.loads(out)["trials"], json.loads(out)["threshold"]) == (3, plain["threshold"])
    assert "1 trials repeat an earlier one (first: line 4 repeats line 3)" in caplog.text


def test_verify_without_threshold_says_how_to_get_one_and_then_decides(cel, folder):
    pair = ("audio/a.wav", "audio/b.wav")
    undecided = outcome(cel("verify", "--model", "model", *pair, "--json"))
    assert undecided["score"] < 0
    assert (undecided["probability"], undecided["same"], undecided["threshold"]) == (None, None, None)
    code, out, _ = cel("verify", "--model", "model", *pair)
    assert code == 0
    assert "--calibrate" in out

    arguments = (
        "evaluate",
        "--model",
        "model",
        "--trials",
        "trials.txt",
        "--root",
        "audio",
        "--calibrate",
        "calibrated",
    )
    evaluated = outcome(cel(*arguments, "--json"))
    decided = outcome(cel("verify", "--model", "calibrated", *pair, "--json"))
    assert decided["threshold"] == evaluated["threshold"]
    assert decided["same"] == (decided["score"] >= decided["threshold"])
    assert decided["probability"] == pytest.approx(
        Calibration(**evaluated["calibration"]).probability(decided["score"]), rel=1e-9
    )
    assert "speaker" in cel("verify", "--model", "calibrated", *pair)[1]


def test_back_end_options_change_scores_and_stay_with_the_calibrated_model(cel, folder):
    Path("cohort.txt").write_text("c.wav\nb.wav\n")
    Path("other.txt").write_text("audio/c.wav\naudio/b.wav\n")
    pair = ("audio/a.wav", "audio/b.wav", "--json")
    plain = outcome(cel(*EVALUATE, "--json"))
    assert (plain["scoring"], plain["score_norm"], plain["mean_subtracted"]) == ("negative_euclidean", None, False)
    norm = ("--score-norm", "as", "--top-n", 2)
    for name, options in {
        "cosine": ("--scoring", "cosine"),
        "mean": ("--subtract-mean", "--cohort", "cohort.txt"),
        "normalised": (*norm, "--cohort", "cohort.txt"),
        "elsewhere": (*norm, "--cohort", "other.txt", "--cohort-root", "."),
    }.items():
        found = outcome(cel(*EVALUATE, *options, "--calibrate", name, "--json"))
        assert found["threshold"] != plain["threshold"], f"{options} change nothing"
        score = float(Path(found["scores"]).read_text().split()[3])
        verified = outcome(cel("verify", "--model", name, *pair))
        assert verified["score"] == pytest.approx(score, abs=1e-6)
        assert verified["threshold"] == found["threshold"]
    assert found["score_norm"] == "as"
    # Both roots lead to the same cohort.
    assert outcome(cel("verify", "--model", "normalised", *pair)) == verified


def test_a_calibration_on_models_of_several_files_says_what_it_holds_for(cel, folder, caplog):
    Path("models.txt").write_text("m a.wav\nm b.wav\n")
    Path("trials.txt").write_text("1 m b.wav\n0 m c.wav\n")
    outcome(cel(*EVALUATE, "--enrol", "models.txt", "--calibrate", "calibrated", "--json"))
    assert "fitted on models of several files, and 'cel verify' compares single ones" in caplog.text


def test_durations_and_intervals_and_priors_are_asked_for_and_reported(cel, folder):
    lines = [f"{name[0]}.wav {name[1:]}\n" for name in ("aann", "bann", "cbob")]
    Path("speakers.txt").write_text("".join(lines))
    options = ("--quality", "duration", "--priors", "0.1, 0.5", "--bootstrap", 100, "--speakers", "speakers.txt")
    result = outcome(cel(*EVALUATE, *options, "--json"))
    assert result["calibration"]["quality"] == "duration"
    assert set(result["min_dcf"]) == set(result["act_dcf"]) == {"0.1", "0.5"}
    assert result["bootstrap"] == {"level": 0.95, "replicates": 100, "speakers": 2, "seed": 0}
    assert outcome(cel(*EVALUATE, *options, "--seed", 1, "--json"))["bootstrap"]["seed"] == 1
    head, *points = Path(result["det_points"]).read_text().splitlines()
    assert head.split("\t") == ["threshold", "false_positive_rate", "false_negative_rate"]
    assert [point.split("\t")[1:] for point in (points[0], points[-1])] == [["0.0", "1.0"], ["1.0", "0.0"]]
    code, out, _ = cel(*EVALUATE, *options)
    assert code == 0
    assert "95 % intervals over 2 speakers, drawn 100 times" in out
    assert "calibrated on these trials, which flatters" in out


def test_the_same_recording_is_the_same_speaker(cel, folder):
    cel(*EVALUATE, "--calibrate", "calibrated")
    result = outcome(cel("verify", "--model", "calibrated", "audio/a.wav", "audio/a.wav", "--json"))
    assert result["score"] == 0
    assert result["same"] is True


def test_embed_writes_names_and_unit_rows(cel, folder):
    result = outcome(cel("embed", "--model", "model", "audio", "--out", "rows.npz", "--json"))
    assert result == {"out": "rows.npz", "utterances": 3, "embedding_dim": 16}
    content = np.load("rows.npz")
    assert content["names"].tolist() == ["audio/a.wav", "audio/b.wav", "audio/c.wav"]
    assert content["embeddings"].shape == (3, 16)
    np.testing.assert_allclose(np.linalg.norm(content["embeddings"], axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verify", "--model", "absent", "audio/a.wav", "audio/b.wav"), "there is no model at absent"),
        (("verify", "--model", "model", "audio/a.wav", "audio/x.wav"), "there is no audio file audio/x.wav"),
        (("embed", "--model", "model", "audio/x.wav", "--out", "rows.npz"), "1 of 1 audio files are missing"),
        (("import-published", "trials.txt", "--out", "new"), "trials.txt"),
        (("evaluate", "--model", "model", "--trials", "x.txt", "--root", "audio"), "cannot read the trials file x.txt"),
        (
            ("evaluate", "--model", "model", "--trials", "trials.txt", "--root", "model"),
            "3 of 3 audio files are missing",
        ),
        ((*EVALUATE, "--frames", "3"), "frames=3"),
        ((*EVALUATE, "--out", "trials.txt"), "trials.txt is a file"),
        ((*EVALUATE, "--out", "trials.txt/below"), "trials.txt is a file"),
        ((*EVALUATE, "--calibrate", "trials.txt"), "trials.txt is a file"),
        ((*EVALUATE, "--calibrate", "audio"), "audio holds other files than a model (first a.wav)"),
        (("embed", "--model", "model", "audio", "--out", "audio"), "audio is a folder"),
        ((*EVALUATE, "--frames", "20", "--calibrate", "new"), "leave out --frames"),
        ((*EVALUATE, "--segment-seconds", "5", "--calibrate", "new"), "leave out --segment-seconds"),
        ((*EVALUATE, "--segment-seconds", "0"), "segment_seconds=0.0; give at least 0.1 s"),
        ((*EVALUATE, "--segment-seconds", "inf"), "segment_seconds=inf; give at least 0.1 s, and a number"),
        ((*EVALUATE, "--batch-seconds", "0"), "batch_seconds=0.0; give more than 0 s"),
        ((*EVALUATE, "--batch-seconds", "inf"), "batch_seconds=inf; give more than 0 s, and a number"),
        ((*EVALUATE, "--frames", "20", "--windows-as", "mean"), "windows_as=mean; give scores or embedding"),
        ((*EVALUATE, "--protocol", "voxceleb1-o", "--enrol", "x"), "leave out --enrol"),
        (("evaluate", "--model", "model", "--root", "audio"), "nothing to score: give --trials FILE, or --protocol"),
        ((*EVALUATE, "--score-norm", "as"), "the score norm 'as' needs a cohort"),
        ((*EVALUATE, "--score-norm", "as", "--cohort", "x.txt"), "cannot read the list x.txt"),
        ((*EVALUATE, "--score-norm", "as", "--cohort", "trials.txt"), "3 columns instead of 'path speaker'"),
        ((*EVALUATE, "--cohort", "trials.txt"), "a cohort alone changes nothing"),
        ((*EVALUATE, "--priors", "0.05 2"), "the prior '2' is no probability"),
        ((*EVALUATE, "--speakers", "trials.txt"), "add --bootstrap 1000"),
        ((*EVALUATE, "--bootstrap", "50", "--speakers", "who.txt"), "50 replicates say nothing"),
        ((*EVALUATE, "--bootstrap", "100", "--speakers", "who.txt"), "b.wav are a target trial of two speakers"),
        ((*EVALUATE, "--windows-as", "embedding"), "--windows-as is for windows; add --frames 200"),
        ((*EVALUATE, "--windows", "3"), "--windows is for windows; add --frames 200"),
        ((*EVALUATE, "--segment-seconds", "4", "--frames", "200"), "--segment-seconds is not for windows"),
        ((*EVALUATE, "--cohort-root", "audio"), "--cohort-root is for a cohort; add --cohort LIST"),
        ((*EVALUATE, "--top-n", "5"), "--top-n is for the adaptive s-norm; add --score-norm as"),
        ((*EVALUATE, "--bootstrap", "1000"), "does not tell its speaker by its first folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(cel, folder, arguments, message):
    before = {path.name for path in folder.iterdir()}
    assert message in refusal(cel(*arguments))
    assert {path.name for path in folder.iterdir()} == before


@pytest.mark.parametrize("command", ["evaluate", "embed", "verify", "import-published"])
def test_help_ends_with_an_example(cel, command):
    code, out, _ = cel(command, "--help")
    assert code == 0
    assert f"Example: cel {command}" in out
