"""From utterances to embeddings: segments, windows, long files, and what shares a pass of the encoder."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from cel_dist.data.audio import encode_audio
from cel_dist.encoders import build_encoder
from cel_dist.errors import CelError
from cel_dist.evaluation import embed, embed_files
from cel_dist.evaluation.batches import Room
from cel_dist.evaluation.cutting import Cutting
from cel_dist.evaluation.side_by_side import SideBySide
from cel_dist.model import EncoderDescription, ModelDescription, SpeakerModel
from cel_dist.utterance import Excerpt

DIMENSION = 16
RATE = 16_000


@pytest.fixture(scope="module")
def model() -> SpeakerModel:
    torch.manual_seed(0)
    description = ModelDescription(encoder=EncoderDescription(name="fast_resnet34", embedding_dim=DIMENSION))
    return SpeakerModel(build_encoder("fast_resnet34", embedding_dim=DIMENSION), description)


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return (2000 * np.random.default_rng(seed).standard_normal(round(RATE * seconds))).astype(np.int16)


def mean_of(rows: np.ndarray) -> np.ndarray:
    mean = rows.astype(np.float64).mean(axis=0)
    return mean / np.linalg.norm(mean)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Utterances of 0.3 s (three), 0.75 s and 1 s."""
    folder = tmp_path_factory.mktemp("audio")
    for number, seconds in enumerate((0.3, 0.75, 0.3, 1.0, 0.3)):
        (folder / f"{number}.wav").write_bytes(encode_audio(noise(seconds, number), "wav"))
    return folder


@pytest.fixture
def encoded(model: SpeakerModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and samples of each pass of the encoder."""
    passes = []
    encode = model.encode

    def counted(waves: list[torch.Tensor], names: list[str]) -> np.ndarray:
        passes.append((len(waves), len(waves[0])))
        return encode(waves, names)

    monkeypatch.setattr(model, "encode", counted)
    return passes


FILES = [f"{number}.wav" for number in range(5)]


def test_an_utterance_is_the_mean_of_equal_segments_of_which_the_last_reaches_back(model, folder):
    rows = embed_files(model, folder, FILES, cutting=Cutting(segment_seconds=0.4))
    for number in (0, 2, 4):
        # Not longer than a segment: whole.
        np.testing.assert_array_equal(rows[number], model.embed(folder / FILES[number]))
    for number, starts in ((1, (0, 0.35)), (3, (0, 0.4, 0.6))):
        wave, _ = soundfile.read(folder / FILES[number], dtype="int16")
        cut = [wave[round(RATE * start) : round(RATE * (start + 0.4))] for start in starts]
        np.testing.assert_allclose(rows[number], mean_of(model.embed(cut)), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


def test_segments_that_fit_exactly_do_not_overlap(model, folder, encoded):
    embed_files(model, folder, ["3.wav"], cutting=Cutting(segment_seconds=0.25))
    assert encoded == [(4, 4000)]


def test_a_batch_holds_so_many_seconds_and_the_embeddings_stay(model, folder, encoded):
    small = embed_files(model, folder, ["3.wav"], cutting=Cutting(segment_seconds=0.2, batch_seconds=8 * 0.4))
    # On a CPU a pass has an eighth of what may be in the encoder at once.
    assert encoded == [(2, 3200), (2, 3200), (1, 3200)]
    encoded.clear()
    large = embed_files(model, folder, ["3.wav"], cutting=Cutting(segment_seconds=0.2))
    assert encoded == [(5, 3200)]
    np.testing.assert_allclose(small, large, atol=1e-6)


def test_utterances_of_a_long_list_share_passes_if_they_are_equally_long(model, folder, encoded, monkeypatch):
    alone = embed_files(model, folder, FILES)
    assert sorted(encoded) == [(1, 4800), (1, 4800), (1, 4800), (1, 12000), (1, 16000)]
    encoded.clear()
    monkeypatch.setattr(embed, "_MIN_GROUPS", 1)
    together = embed_files(model, folder, FILES)
    assert sorted(encoded) == [(1, 12000), (1, 16000), (3, 4800)]
    np.testing.assert_allclose(together, alone, atol=1e-6)
    encoded.clear()
    embed_files(model, folder, FILES, cutting=Cutting(segment_seconds=0.3))
    assert encoded == [(10, 4800)]


def test_equally_many_frames_share_a_pass_and_embeddings_stay(model, tmp_path, encoded, monkeypatch):
    # 31 frames three times, by different numbers of samples, and 30.
    files = {"a.wav": 4800, "b.wav": 4959, "c.wav": 4850, "d.wav": 4799}
    for number, (name, samples) in enumerate(files.items()):
        (tmp_path / name).write_bytes(encode_audio(noise(samples / RATE, number), "wav"))
    alone = [model.embed(tmp_path / name) for name in files]
    encoded.clear()
    monkeypatch.setattr(embed, "_MIN_GROUPS", 1)
    together = embed_files(model, tmp_path, list(files))
    assert sorted(number for number, _ in encoded) == [1, 3]
    np.testing.assert_allclose(together, alone, atol=1e-6)


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
def test_several_threads_give_the_embeddings_of_one_in_the_order_of_the_list(model, tmp_path, encoded):
    lengths = np.random.default_rng(0).permutation(np.arange(20)) * 1000 + 8000
    files = [f"{number}.flac" for number in range(20)]
    for number, (name, samples) in enumerate(zip(files, lengths, strict=True)):
        (tmp_path / name).write_bytes(encode_audio(noise(samples / RATE, number), "flac"))
    told = []
    rows = embed_files(model, tmp_path, files, progress=lambda done, total: told.append((done, total)))
    # The longest first, by headers.
    assert [samples for _, samples in encoded][:2] in ([27000, 26000], [26000, 27000])
    assert told == [(done, 20) for done in range(1, 21)]
    assert torch.get_num_threads() == 2
    np.testing.assert_allclose(rows, [model.embed(tmp_path / name) for name in files], atol=1e-6)
    (tmp_path / files[7]).write_bytes(b"text")
    with pytest.raises(CelError, match=r"7\.flac cannot be read as audio"):
        embed_files(model, tmp_path, files)
    assert torch.get_num_threads() == 2


def test_what_is_in_the_encoder_at_once_is_bounded():
    room = Room(2.0)
    entered, left = threading.Event(), threading.Event()
    held = []

    def second() -> None:
        entered.set()
        # More than there is room for passes, too, once it is alone.
        with room.taken(5 * RATE):
            held.append(left.is_set())

    other = threading.Thread(target=second)
    with room.taken(RATE):
        with room.taken(RATE):
            other.start()
            entered.wait()
        other.join(0.2)
        left.set()
    other.join(10)
    assert held == [True]


@pytest.mark.parametrize(
    ("threads", "groups", "expected"), [(2, 1, (1, 2)), (2, 16, (2, 1)), (12, 64, (6, 2)), (64, 999, (8, 8))]
)
def test_threads_are_shared_out_over_groups(threads, groups, expected, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    plan = SideBySide.plan(torch.device("cpu"), groups)
    assert (plan.workers, plan.threads) == expected


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("number", [1, 5, 200, 5000])
def test_every_utterance_is_dealt_to_one_rank_and_the_first_rank_has_most(number, num_ranks):
    groups = embed._groups(np.random.default_rng(0).permutation(number))
    dealt = [embed._dealt(groups, rank, num_ranks) for rank in range(num_ranks)]
    assert sorted(np.concatenate(dealt).tolist()) == list(range(number))
    counts = [len(share) for share in dealt]
    assert max(counts) == counts[0]
    # Ranks differ by a group at most, of which a list has many.
    assert counts[0] - min(counts) <= max(1, number // 64)


def test_silent_segments_are_left_out_and_silence_alone_is_refused(model, tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(encode_audio(np.concatenate([noise(0.4), np.zeros(6400, np.int16), noise(0.2, 1)]), "wav"))
    rows = embed_files(model, tmp_path, ["a.wav"], cutting=Cutting(segment_seconds=0.2))
    expected = mean_of(model.embed([noise(0.4)[:3200], noise(0.4)[3200:], noise(0.2, 1)]))
    np.testing.assert_allclose(rows[0], expected, atol=1e-6)
    path.write_bytes(encode_audio(np.zeros(16000, np.int16), "wav"))
    with pytest.raises(CelError, match=r"a\.wav cannot be embedded \(silent"):
        embed_files(model, tmp_path, ["a.wav"], cutting=Cutting(segment_seconds=0.2))


def test_windows_may_become_one_embedding(model, folder):
    kept = embed_files(model, folder, FILES, cutting=Cutting(frames=20, windows=3))
    mean = embed_files(model, folder, FILES, cutting=Cutting(frames=20, windows=3, windows_as="embedding"))
    assert kept.shape == (5, 3, DIMENSION)
    assert mean.shape == (5, DIMENSION)
    for row, windows in zip(mean, kept, strict=True):
        np.testing.assert_allclose(row, mean_of(windows), atol=1e-6)


@pytest.mark.parametrize("rate", [RATE, 44_100])
def test_a_file_too_long_to_be_held_gives_the_embeddings_of_its_waveform(model, tmp_path, monkeypatch, rate):
    # Several blocks of reading, and a limit below them.
    monkeypatch.setattr("cel_dist.data.audio._VALUES_AT_ONCE", 5000)
    monkeypatch.setattr("cel_dist.utterance.MAX_WHOLE_SECONDS", 0.5)
    monkeypatch.setattr("cel_dist.model.MAX_WHOLE_SECONDS", 0.5)
    path = tmp_path / "long.wav"
    soundfile.write(path, noise(1.3 * rate / RATE), rate)
    from cel_dist.data.audio import read_audio

    wave = read_audio(path)
    cut = [wave[:8000], wave[8000:16000], wave[-8000:]]
    np.testing.assert_allclose(model.embed(path), mean_of(np.stack([model.embed(part) for part in cut])), atol=1e-6)
    np.testing.assert_array_equal(model.embed(path), model.embed(wave))
    np.testing.assert_array_equal(model.embed_windows(path, 20, 4), model.embed_windows(wave, 20, 4))


def test_a_part_of_a_file_is_cut_where_its_times_say(model, tmp_path, monkeypatch):
    monkeypatch.setattr("cel_dist.data.audio._VALUES_AT_ONCE", 5000)
    wave = noise(1.3)
    (tmp_path / "a.wav").write_bytes(encode_audio(wave, "wav"))
    parts = [
        Excerpt("a.wav", 0.25, 0.75),
        Excerpt("a.wav", 0.9),
        Excerpt("a.wav", 0.0, 0.3),
        Excerpt("a.wav", 1.0, 9.0),
    ]
    rows = embed_files(model, tmp_path, parts)
    for row, (first, last) in zip(rows, ((4000, 12000), (14400, None), (0, 4800), (16000, None)), strict=True):
        np.testing.assert_array_equal(row, model.embed(wave[first:last]))


def test_memory_does_not_grow_with_the_length_of_a_file(model, tmp_path):
    model.save(tmp_path / "model")
    block = noise(60)
    for name, minutes in (("short.flac", 2), ("long.flac", 30)):
        with soundfile.SoundFile(tmp_path / name, "w", RATE, 1, "PCM_16") as file:
            for _ in range(minutes):
                file.write(block)
    program = """
import resource, sys, torch
from cel_dist.data.audio import read_audio
from cel_dist.evaluation.batches import Room
from cel_dist.evaluation.cutting import Cutting
from cel_dist.evaluation.side_by_side import SideBySide
from cel_dist.evaluation.embed import embed_files
from cel_dist.model import load_model
torch.set_num_threads(1)
model = load_model("model")
model.encode = lambda waves, names: torch.ones(len(waves), 16).numpy() / 4
def peak(name, **cutting):
    embed_files(model, ".", [name], cutting=Cutting(**cutting))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(*[peak(name, **cutting) for name in ("short.flac", "long.flac")
        for cutting in (dict(), dict(segment_seconds=4), dict(frames=200))])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=120
    )
    peaks = [int(word) for word in done.stdout.split()]
    # 30 minutes are 55 MiB of samples at 16 bits; what is held is some blocks of them.
    assert (peaks[-1] - peaks[2]) / 1024 < 30
