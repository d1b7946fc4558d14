"""The whole story, shortened: a small corpus and two steps."""

from pathlib import Path

import pytest

from cel_dist.demo import MODEL_NAME, run_demo
from cel_dist.errors import CelError
from cel_dist.model import load_model

SHORT = ("train.max_steps=2", "train.batch_size=8", "data.segment_frames=60", "train.threads=1")


def test_the_demo_on_a_tree_of_speakers_ends_with_all_that_it_promises(small_corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = run_demo(tmp_path / "demo", small_corpus.audio, overrides=SHORT)
    assert 0 <= result.eer_before <= 1
    assert 0 <= result.eer_after <= 1
    assert result.model_uri == f"models:/{MODEL_NAME}/1"
    assert "<svg" in Path(result.report).read_text() or "data:image" in Path(result.report).read_text()
    assert (Path(result.run_dir) / "test" / "scores.txt").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", result.tracking_uri)
    registered = load_model(f"models:/{MODEL_NAME}@champion")
    sample = next(small_corpus.audio.rglob("*.wav"))
    assert (registered.embed(sample) == load_model(result.run_dir).embed(sample)).all()


def test_a_corpus_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CelError, match="there is no folder"):
        run_demo(tmp_path / "demo", tmp_path / "absent")
