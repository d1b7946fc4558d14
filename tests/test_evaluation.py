"""Trials, embeddings over ranks, scores, calibration, and parity with the published scoring."""

import json
import logging
import os
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from worlds import run_world

from cel_dist import back_end
from cel_dist.data.audio import encode_audio
from cel_dist.distributed import World
from cel_dist.encoders import build_encoder
from cel_dist.errors import CelError, RunError
from cel_dist.evaluation import (
    BackEndSettings,
    Trials,
    embed_files,
    evaluate,
    fit_calibration,
    score_trials,
    write_embeddings,
)
from cel_dist.evaluation.cutting import Cutting
from cel_dist.model import EncoderDescription, ModelDescription, SpeakerModel, load_model

DIMENSION = 32


@pytest.fixture(scope="module")
def model() -> SpeakerModel:
    torch.manual_seed(0)
    encoder = build_encoder("fast_resnet34", embedding_dim=DIMENSION)
    return SpeakerModel(
        encoder, ModelDescription(encoder=EncoderDescription(name="fast_resnet34", embedding_dim=DIMENSION))
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five files of different lengths, with names in two folders, and trials over them."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    for number, seconds in enumerate((0.3, 0.6, 0.2, 0.5, 0.4)):
        wave = (2000 * generator.standard_normal(int(16000 * seconds))).astype(np.int16)
        path = folder / f"s{number % 2}" / f"{number}.wav"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode_audio(wave, "wav"))
    (folder / "trials.txt").write_text(
        "1 s0/0.wav s0/2.wav\n0 s0/0.wav s1/1.wav\n1 s1/1.wav s1/3.wav\n0 s1/3.wav s0/4.wav\n0 s0/2.wav s1/1.wav\n"
    )
    (folder / "cohort.txt").write_text("s0/4.wav\ns1/3.wav\ns0/2.wav\n")
    return folder


def written(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "trials.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_both_trial_formats_with_windows_line_ends_and_byte_order_mark_are_one(tmp_path):
    numbers = Trials.read(written(tmp_path, "1 a.wav b.wav\n0 a.wav c.wav\n\n1 c.wav b.wav\n"))
    words = Trials.read(
        written(tmp_path, b"\xef\xbb\xbfa.wav b.wav target\r\na.wav c.wav nontarget\r\n\r\nc.wav b.wav target\r\n")
    )
    for trials in (numbers, words):
        assert trials.files == ["a.wav", "b.wav", "c.wav"]
        assert trials.labels.dtype == np.int8
        assert trials.enrol.dtype == trials.test.dtype == np.int32
        assert trials.labels.tolist() == [1, 0, 1]
        assert trials.enrol.tolist() == [0, 0, 2]
        assert trials.test.tolist() == [1, 2, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no trials"),
        ("\n \n", "holds no trials"),
        ("1 a b\n0 a c\n1 a\n", r"line 3: 2 columns instead of 3"),
        ("1 a b\n0 a c d\n", r"line 2: 4 columns instead of 3"),
        ("1 a b\n\n2 a c\n", r"line 3: no label in '2 a c'"),
        ("a b target\na c impostor\n", r"line 2: no label"),
        ("1 a b\n1 a c\n", r"all 2 trials .*are target trials; error rates need both"),
        ("0 a b\n0 a c\n", r"all 2 trials .*are non-target trials"),
        ("1 a b\n0 a c\n0 a b\n", r"line 3: the pair of line 1 with the other label"),
        (b"\xff\xfe1\x00 \x00a\x00", "not UTF-8"),
    ],
)
def test_faulty_trials_are_refused_with_file_and_line(tmp_path, content, message):
    path = written(tmp_path, content)
    with pytest.raises(CelError, match=message) as caught:
        Trials.read(path)
    assert str(path) in str(caught.value)


def test_a_missing_trials_file_is_named():
    with pytest.raises(CelError, match=r"cannot read the trials file /nowhere/trials\.txt"):
        Trials.read("/nowhere/trials.txt")


def test_repeated_trials_count_and_are_reported(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trials = Trials.read(written(tmp_path, "1 a b\n0 a c\n\n1 a b\n1 a b\n"))
    assert len(trials) == 4
    assert "2 trials repeat an earlier one (first: line 4 repeats line 1)" in caplog.text


@pytest.mark.parametrize("windows", [0, 3])
def test_scores_are_minus_the_mean_distance_whatever_the_block(monkeypatch, windows):
    generator = np.random.default_rng(0)
    shape = (6, windows, 8) if windows else (6, 8)
    rows = generator.standard_normal(shape)
    # One pair nearly coincides: there float32 products would lose most digits.
    rows[1] = rows[0] + 1e-4 * generator.standard_normal(shape[1:])
    rows = (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)
    pairs = np.array([(a, b) for a in range(6) for b in range(6)], np.int32)
    trials = Trials([str(n) for n in range(6)], np.arange(36).astype(np.int8) % 2, pairs[:, 0], pairs[:, 1])
    exact = rows.astype(np.float64).reshape(6, -1, 8)
    expected = [-np.mean([[np.linalg.norm(x - y) for y in exact[b]] for x in exact[a]]) for a, b in pairs]
    np.testing.assert_allclose(score_trials(rows, trials), expected, rtol=1e-6, atol=1e-7)
    monkeypatch.setattr(back_end, "_BLOCK_FLOATS", 5 * 8 * 3)
    monkeypatch.setattr(back_end, "_BLOCK_PAIRS", 5)
    np.testing.assert_allclose(score_trials(rows, trials), expected, rtol=1e-6, atol=1e-7)


def test_embeddings_come_in_the_order_of_the_files_and_report_progress(model, corpus):
    files = ["s0/2.wav", "s1/1.wav", "s0/0.wav"]
    told: list[tuple[int, int]] = []
    rows = embed_files(model, corpus, files, progress=lambda done, total: told.append((done, total)))
    np.testing.assert_array_equal(rows, model.embed([corpus / name for name in files]))
    assert told == [(1, 3), (2, 3), (3, 3)]
    windowed = embed_files(model, corpus, files, cutting=Cutting(frames=20, windows=2))
    assert windowed.shape == (3, 2, DIMENSION)
    np.testing.assert_array_equal(windowed[1], model.embed_windows(corpus / files[1], 20, 2))


def test_evaluation_agrees_with_itself(model, corpus, tmp_path):
    result = evaluate(model, corpus / "trials.txt", corpus, out=tmp_path / "new" / "out")
    accepted = result.scores >= result.threshold
    targets = result.labels == 1
    assert result.eer == pytest.approx(max((~accepted)[targets].mean(), accepted[~targets].mean()))
    assert set(result.min_dcf) == {"0.01", "0.05"}
    assert result.summary()["trials"] == 5
    lines = (tmp_path / "new" / "out" / "scores.txt").read_text().splitlines()
    assert lines[1] == f"0 s0/0.wav s1/1.wav {result.scores[1]:.8f}"
    assert len(lines) == 5
    written_files = {path.name for path in (tmp_path / "new" / "out").iterdir()}
    assert written_files == {"det.png", "det.tsv", "embeddings.npz", "scores.png", "scores.txt"}
    with np.load(tmp_path / "new" / "out" / "embeddings.npz") as arrays:
        assert arrays["names"].tolist() == list(result.trials.files)
        assert (arrays["embeddings"] == result.embeddings).all()


def test_missing_audio_is_counted_and_the_first_is_named(model, corpus, tmp_path):
    path = written(tmp_path, "1 s0/0.wav s0/7.wav\n0 s0/0.wav s0/8.wav\n")
    with pytest.raises(CelError, match=r"2 of 3 audio files are missing under .*, the first is s0/7\.wav"):
        evaluate(model, path, corpus)


def test_unreadable_audio_is_named(model, corpus, tmp_path):
    (tmp_path / "text.wav").write_text("no audio")
    path = written(tmp_path, f"1 s0/0.wav {tmp_path}/text.wav\n0 s0/0.wav s1/1.wav\n")
    with pytest.raises(CelError, match=r"text\.wav cannot be read as audio"):
        evaluate(model, path, corpus)


@pytest.mark.parametrize(("settings", "name"), [({"frames": 15}, "frames=15"), ({"windows": 0}, "windows=0")])
def test_settings_out_of_range_are_refused(model, corpus, settings, name):
    with pytest.raises(CelError, match=name):
        evaluate(model, corpus / "trials.txt", corpus, cutting=Cutting(**settings))


@pytest.mark.parametrize("frames", [0, 200])
def test_scores_equal_those_of_the_published_implementation(shared, tmp_path, frames):
    golden = (shared / "golden" / f"scores_frames{frames}.txt").read_text().splitlines()
    # Windowed scoring costs ten forward passes an utterance: a quarter of the trials does.
    golden = golden[:10] if frames else golden
    path = written(tmp_path, "".join(line.rsplit(" ", 1)[0] + "\n" for line in golden))
    published = load_model(shared / "golden" / "published_format.model")
    result = evaluate(published, path, shared / "data" / "corpus", cutting=Cutting(frames=frames, windows=10))
    np.testing.assert_allclose(result.scores, [float(line.split()[3]) for line in golden], rtol=1e-4)


def test_names_and_embeddings_are_written_for_files_and_folders(model, corpus, tmp_path):
    out = tmp_path / "rows.npz"
    names = write_embeddings(model, [corpus / "s1" / "3.wav", corpus], out)
    content = np.load(out)
    expected = [str(corpus / name) for name in ("s1/3.wav", "s0/0.wav", "s0/2.wav", "s0/4.wav", "s1/1.wav")]
    assert content["names"].tolist() == names == expected
    np.testing.assert_array_equal(content["embeddings"], model.embed(names))
    assert content["embeddings"].dtype == np.float32


def test_a_folder_without_audio_and_a_folder_that_is_missing_are_refused(model, corpus, tmp_path):
    with pytest.raises(CelError, match="no audio below"):
        write_embeddings(model, [tmp_path], tmp_path / "a.npz")
    with pytest.raises(CelError, match="does not exist"):
        write_embeddings(model, [corpus], tmp_path / "absent" / "a.npz")


def test_calibration_recovers_the_logistic_it_was_drawn_from():
    # Normal classes of equal variance have the log-likelihood ratio (mean1 - mean0) / variance * (score - middle).
    generator = np.random.default_rng(0)
    scores = np.concatenate([generator.normal(-1.2, 0.2, 40_000), generator.normal(-0.8, 0.2, 10_000)])
    calibration = fit_calibration(scores, np.repeat([0, 1], [40_000, 10_000]))
    assert calibration.slope == pytest.approx(10, rel=0.03)
    assert -calibration.offset / calibration.slope == pytest.approx(-1, abs=0.005)
    assert calibration.probability(-1) == pytest.approx(0.5, abs=0.02)


def test_calibration_does_not_depend_on_how_often_a_class_is_listed():
    scores, labels = [-1.3, -1.1, -0.9, -1.0, -0.7], [0, 0, 0, 1, 1]
    once = fit_calibration(scores, labels)
    more = fit_calibration([*scores, -1.0, -0.7], [*labels, 1, 1])
    # The scores are standardised by what is listed, which the ridge alone feels.
    assert more.slope == pytest.approx(once.slope, rel=1e-2)
    assert more.offset == pytest.approx(once.offset, rel=1e-2)


@pytest.mark.parametrize("gap", [1e-6, 0.1, 1.0])
def test_calibration_of_separable_scores_is_finite_and_sure(gap):
    calibration = fit_calibration([-1.0 - gap, -1.0, -1.0 + gap, -1.0 + 2 * gap], [0, 0, 1, 1])
    assert np.isfinite([calibration.slope, calibration.offset]).all()
    assert calibration.probability(-1.0) < 0.1
    assert calibration.probability(-1.0 + gap) > 0.9


def test_calibration_of_equal_scores_knows_nothing():
    assert fit_calibration([-1.0, -1.0], [0, 1]).probability(-1.0) == 0.5


def rank_of_two(folder: Path, corpus: Path) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    world = World(rank=rank, size=2, local_rank=rank, local_size=2)
    model = load_model(folder / "model")
    outcome: dict[str, object] = {}
    for frames in (0, 20):
        done: list[int] = []
        result = evaluate(
            model,
            corpus / "trials.txt",
            corpus,
            cutting=Cutting(frames=frames, windows=3),
            world=world,
            out=folder / f"out{frames}",
            progress=lambda count, total, done=done: done.append(total),
        )
        outcome[f"scores{frames}"] = result.scores.tolist()
        outcome[f"embedded{frames}"] = len(done)
    normalised = BackEndSettings(score_norm="as", cohort=corpus / "cohort.txt", top_n=2)
    result = evaluate(model, corpus / "trials.txt", corpus, world=world, back_end=normalised, quality="duration")
    outcome["normalised"] = [*result.scores.tolist(), result.threshold]
    lacking = BackEndSettings(score_norm="s", cohort=corpus / ("cohort.txt" if rank else "absent.txt"))
    faults = {
        # Each of these happens on one rank only; the other must hear of it instead of waiting.
        "missing": lambda: embed_files(model, corpus if rank == 0 else "/nowhere", ["s0/0.wav"], world=world),
        "trials": lambda: evaluate(model, corpus / "trials.txt" if rank else "/nowhere", corpus, world=world),
        "cohort": lambda: evaluate(model, corpus / "trials.txt", corpus, world=world, back_end=lacking),
        "unreadable": lambda: embed_files(model, folder, ["long.wav", "text.wav"], world=world),
        "diverged": lambda: embed_files(broken(model, rank), corpus, ["s0/0.wav", "s1/1.wav"], world=world),
    }
    for name, action in faults.items():
        with pytest.raises((CelError, RunError)) as caught:
            action()
        outcome[name] = [caught.type.__name__, str(caught.value)]
    (folder / f"rank{rank}.json").write_text(json.dumps(outcome))
    dist.destroy_process_group()


def broken(model: SpeakerModel, rank: int) -> SpeakerModel:
    if rank == 1:
        model.encoder.projection.bias.fill_(float("nan"))
    return model


@pytest.fixture(scope="module")
def two_ranks(
    model: SpeakerModel, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, object]]]:
    folder = tmp_path_factory.mktemp("two_ranks")
    model.save(folder / "model")
    (folder / "long.wav").write_bytes((corpus / "s1" / "1.wav").read_bytes())
    (folder / "text.wav").write_text("no audio")
    run_world(2, rank_of_two, folder, corpus, folder=folder / "world")
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("frames", [0, 20])
def test_two_ranks_share_the_work_and_score_as_one_process(model, corpus, two_ranks, frames):
    folder, ranks = two_ranks
    alone = evaluate(model, corpus / "trials.txt", corpus, cutting=Cutting(frames=frames, windows=3))
    for rank in ranks:
        assert rank[f"scores{frames}"] == alone.scores.tolist()
    assert [rank[f"embedded{frames}"] for rank in ranks] == [3, 2]
    assert len((folder / f"out{frames}" / "scores.txt").read_text().splitlines()) == 5


def test_two_ranks_normalise_by_the_same_cohort(model, corpus, two_ranks):
    settings = BackEndSettings(score_norm="as", cohort=corpus / "cohort.txt", top_n=2)
    alone = evaluate(model, corpus / "trials.txt", corpus, back_end=settings, quality="duration")
    for rank in two_ranks[1]:
        np.testing.assert_allclose(rank["normalised"], [*alone.scores, alone.threshold], rtol=1e-9)


@pytest.mark.parametrize(
    ("fault", "failing", "kind", "message"),
    [
        ("missing", 1, "CelError", "1 of 1 audio files are missing under /nowhere"),
        ("trials", 0, "CelError", "cannot read the trials file /nowhere"),
        ("cohort", 0, "CelError", "cannot read the list"),
        ("unreadable", 1, "CelError", "text.wav cannot be read as audio"),
        ("diverged", 1, "RunError", "is not finite"),
    ],
)
def test_a_failure_of_one_rank_is_the_failure_of_both(two_ranks, fault, failing, kind, message):
    for number, rank in enumerate(two_ranks[1]):
        assert rank[fault][0] == kind
        assert message in rank[fault][1]
        assert ("rank 1 failed" in rank[fault][1]) == (kind == "RunError" and number != failing)
