import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cel_dist.cli.app import run
from cel_dist.data.audio import read_audio
from cel_dist.data.bank import Bank, BankManifest, CategoryRecord
from cel_dist.data.check import check
from cel_dist.data.prepare_bank import category_of, prepare_bank
from cel_dist.errors import CelError

FILES = {
    "musan/noise/free/b.wav": 0.5,
    "musan/noise/free/a.flac": 3.0,
    "musan/music/x.wav": 1.0,
    "musan/speech/y.wav": 1.25,
    "RIRS_NOISES/simulated_rirs/small/r1.wav": 0.3,
    "RIRS_NOISES/real_rirs_isotropic_noises/RWCP_rir_1.wav": 0.2,
    "RIRS_NOISES/real_rirs_isotropic_noises/RWCP_noise_1.wav": 0.4,
    "readings/z.wav": 1.0,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for seed, (name, seconds) in enumerate(FILES.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        samples = np.random.default_rng(seed).normal(size=round(seconds * 16_000)) * 0.1
        soundfile.write(folder / name, samples, 16_000)
    (folder / "musan/noise/free/text.wav").write_text("words")
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    prepare_bank(source, tmp_path / "bank", workers=1)
    return tmp_path / "bank"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("path", "category"),
    [
        ("noise/noise/a.wav", "noise"),
        ("noise/speech/a.wav", "speech"),
        ("Noise/MUSIC/deep/er/a.wav", "music"),
        ("rir/real/a.wav", "rir"),
        ("RIRS_NOISES/pointsource_noises/a.wav", "noise"),
        ("RIRS_NOISES/simulated_rirs/smallroom/Room001/a.wav", "rir"),
        ("x/real_rirs_isotropic_noises/air_type1_air_binaural_0.wav", "rir"),
        ("x/real_rirs_isotropic_noises/RVB2014_type1_noise_largeroom1_1.wav", "noise"),
        ("corpus/so0001/s1/a.wav", None),
        ("noise.wav", None),
    ],
)
def test_the_deepest_known_folder_decides(path: str, category: str | None) -> None:
    assert category_of(path) == category


def test_a_bank_holds_every_clip_of_every_category(source: Path, tmp_path: Path) -> None:
    result = prepare_bank(source, tmp_path / "bank", workers=1)
    assert result.clips == {"noise": 3, "speech": 1, "music": 1, "rir": 2}
    assert (result.skipped, result.rejected) == (1, 1)
    assert "musan/noise/free/text.wav\tunreadable" in result.rejects.read_text()
    bank = Bank.open(tmp_path / "bank")
    assert bank.categories == ("noise", "speech", "music", "rir")
    for category in bank.categories:
        clips = bank.clips(category)
        names = sorted(name for name in FILES if category_of(name) == category)
        whole = clips.padded(np.arange(len(clips)))
        assert len(clips) == len(names)
        for place, name in enumerate(names):
            expected = read_audio(source / name)
            assert clips.lengths[place] == len(expected)
            np.testing.assert_array_equal(whole[place, : len(expected)], expected)
            assert not whole[place, len(expected) :].any()
    assert check(tmp_path / "bank") == []


def test_any_number_of_workers_writes_the_same_bank(source: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        prepare_bank(source, tmp_path / str(workers), workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_a_crop_is_the_window_at_its_fraction(folder: Path) -> None:
    clips = Bank.open(folder).clips("noise")
    place = int(clips.lengths.argmax())
    whole = clips.padded(np.array([place]))[0]
    fractions = np.array([0.0, 0.25, 0.5, np.nextafter(1, 0)])
    crops = clips.crop(np.full(4, place), fractions, 16_000)
    assert (crops.dtype, crops.shape) == (np.int16, (4, 16_000))
    for crop, first in zip(crops, (0, 8000, 16_000, 32_000), strict=True):
        np.testing.assert_array_equal(crop, whole[first : first + 16_000])


def test_a_clip_that_is_too_short_is_repeated(folder: Path) -> None:
    clips = Bank.open(folder).clips("noise")
    place = int(clips.lengths.argmin())
    whole = clips.padded(np.array([place]))[0]
    assert len(whole) == 6400
    for samples in (6400, 6401, 29_040):
        crop = clips.crop(np.array([place]), np.array([0.9]), samples)[0]
        np.testing.assert_array_equal(crop, np.resize(whole, samples))


def test_padded_clips_are_cut_to_the_limit(folder: Path) -> None:
    clips = Bank.open(folder).clips("rir")
    assert clips.padded(np.array([0, 1, 1])).shape == (3, 4800)
    assert clips.padded(np.array([0, 1]), max_samples=4000).shape == (2, 4000)
    assert clips.padded(np.array([], np.int64)).shape == (0, 0)


def test_the_audio_is_mapped_and_read_only_also_in_other_processes(folder: Path) -> None:
    bank = Bank.open(folder)
    assert not bank.clips("noise").audio.flags.writeable
    pickled = pickle.dumps(bank)
    assert len(pickled) < 1000
    np.testing.assert_array_equal(pickle.loads(pickled).clips("music").audio, bank.clips("music").audio)


def test_a_finished_bank_is_not_written_again_and_another_is_refused(
    source: Path, folder: Path, tmp_path: Path
) -> None:
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    result = prepare_bank(source, folder, workers=1)
    assert result.clips["noise"] == 3
    assert {path.name: path.stat().st_ino for path in folder.iterdir()} == before
    with pytest.raises(CelError, match="another source"):
        prepare_bank(source / "musan", folder, workers=1)
    (folder / "rir.i16").unlink()
    (folder / ".rir.i16.77.tmp").write_bytes(b"half")
    prepare_bank(source, folder, workers=1)
    assert check(folder) == []


def test_a_repaired_clip_is_looked_at_again(tmp_path: Path) -> None:
    clips = tmp_path / "noise"
    clips.mkdir()
    soundfile.write(clips / "a.wav", np.random.default_rng(0).normal(size=8000) * 0.1, 16_000)
    (clips / "b.wav").write_text("words")
    assert prepare_bank(clips, tmp_path / "out", workers=1).rejected == 1
    (clips / "b.wav").write_bytes((clips / "a.wav").read_bytes())
    result = prepare_bank(clips, tmp_path / "out", workers=1)
    assert (result.clips, result.rejected) == ({"noise": 2}, 0)
    assert check(tmp_path / "out") == []


def test_what_does_not_fit_together_is_refused(folder: Path) -> None:
    data = (folder / "music.i16").read_bytes()
    (folder / "music.i16").write_bytes(data[:-2])
    with pytest.raises(CelError, match=r"music\.i16 has 31998 bytes, bank\.json says 32000"):
        Bank.open(folder)
    assert "31998" in str(check(folder)[0])
    (folder / "music.i16").unlink()
    with pytest.raises(CelError, match=r"cannot read .*music\.i16"):
        Bank.open(folder)
    (folder / "music.i16").write_bytes(bytes([data[0] ^ 1]) + data[1:])
    Bank.open(folder)
    steps: list[tuple[int, int]] = []
    faults = check(folder, workers=2, progress=lambda done, total: steps.append((done, total)))
    assert [str(fault) for fault in faults] == ["music.i16: its sha256 is not the one in bank.json"]
    assert faults == check(folder, workers=1)
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    np.savez(folder / "clips.npz", noise=[1], speech=[1], music=[1], rir=[1])
    with pytest.raises(CelError, match=r"clips\.npz"):
        Bank.open(folder)
    (folder / "bank.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(CelError, match="not a bank that this version reads"):
        Bank.open(folder)


def test_sources_without_a_bank_in_them_are_refused(source: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CelError, match="none of the 1 audio files"):
        prepare_bank(source / "readings", tmp_path / "out")
    with pytest.raises(CelError, match="there is no folder"):
        prepare_bank(source / "absent", tmp_path / "out")
    with pytest.raises(CelError, match="cel prepare SRC --bank"):
        Bank.open(tmp_path / "absent")
    with pytest.raises(CelError, match="holds no traffic, only noise, speech, music, rir"):
        Bank.open(folder).clips("traffic")
    bad = tmp_path / "bad" / "noise"
    bad.mkdir(parents=True)
    (bad / "a.wav").write_text("words")
    with pytest.raises(CelError, match="all 1 audio files were rejected"):
        prepare_bank(bad, tmp_path / "out", workers=1)


def test_the_folder_itself_may_name_the_category(source: Path, tmp_path: Path) -> None:
    assert prepare_bank(source / "musan" / "noise", tmp_path / "out", workers=1).clips == {"noise": 2}


def test_a_bank_on_the_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "bank")
    assert run(["prepare", str(source), "--bank", "--out", out, "--workers", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["clips"] == {"noise": 3, "speech": 1, "music": 1, "rir": 2}
    assert (result["samples"], result["rejected"], result["skipped"]) == (7, 1, 1)
    assert run(["check", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert run(["prepare", str(source), "--bank", "--out", out, "--labels", "x"]) == 2
    assert "--labels is for shards" in capsys.readouterr().err


def test_reading_a_bank_or_preparing_loads_neither_torch_nor_webdataset() -> None:
    code = (
        "import sys, cel_dist.data.prepare, cel_dist.data.prepare_bank, cel_dist.data.check, cel_dist.cli.data\n"
        "sys.exit(bool({'torch', 'webdataset'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def resident_kib() -> int:
    """Memory of this process that no file backs."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def test_a_bank_of_a_hundred_hours_is_opened_without_reading_it(tmp_path: Path) -> None:
    # The size of MUSAN, 109 h in clips of 3 minutes, in a file of holes.
    clips = 2180
    samples = 109 * 3600 * 16_000 // clips
    with (tmp_path / "noise.i16").open("wb") as file:
        file.truncate(2 * clips * samples)
    np.savez(tmp_path / "clips.npz", noise=np.full(clips, samples))
    record = CategoryRecord(clips=clips, seconds=109 * 3600, bytes=2 * clips * samples, sha256="0" * 64)
    BankManifest(job="", rejected=0, skipped=0, categories={"noise": record}).save(tmp_path)
    before = resident_kib()
    noise = Bank.open(tmp_path).clips("noise")
    windows = noise.crop(np.arange(0, clips, 20), np.linspace(0, 0.999, clips // 20), 29_040)
    assert windows.shape == (109, 29_040)
    # The windows take 6 MiB.
    assert resident_kib() - before < 16 << 10
    copy = pickle.loads(pickle.dumps(Bank.open(tmp_path)))
    assert len(pickle.dumps(copy)) < 1000
