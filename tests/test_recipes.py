"""Public corpora by name, each on a tiny tree of exactly the layout in which it is distributed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from ffmpeg_audio import FFMPEG, encode
from prepare_corpus import descriptions

from cel_dist.cli.app import run
from cel_dist.data.bank import Bank
from cel_dist.data.check import check
from cel_dist.data.ffmpeg import needs_ffmpeg
from cel_dist.data.recipes import RECIPES, find_recipe
from cel_dist.data.survey import Survey, survey
from cel_dist.errors import CelError

VOICES = "VOiCES_devkit/distant-16k"
VOICES_TRAIN = f"{VOICES}/speech/train/rm1/babb/sp0307/Lab41-SRI-VOiCES-rm1-babb"
VOICES_TEST = f"{VOICES}/speech/test/rm3/none/sp0032/Lab41-SRI-VOiCES-rm3-none"

# Recipe -> path of a file -> the part it is of, and its speaker; None: of no part.
LAYOUTS: dict[str, dict[str, tuple[str, str] | None]] = {
    "voxceleb1": {
        "wav/id10001/1zcIwhmdeo4/00001.wav": ("dev", "id10001"),
        "wav/id10001/7gWzIy6yIIk/00002.wav": ("dev", "id10001"),
        "wav/id10269/0DANwLdHVVE/00001.wav": ("dev", "id10269"),
        "wav/id10310/0BfEYyT43rA/00001.wav": ("dev", "id10310"),
        "wav/id11251/5-6lI5JQtb8/00001.wav": ("dev", "id11251"),
        # The test set: names that begin with E.
        "wav/id10270/5r0dWxy17C8/00001.wav": ("test", "id10270"),
        "wav/id10300/ize_eiCFEg0/00003.wav": ("test", "id10300"),
        "wav/id10309/0b1inHMAr6o/00001.wav": ("test", "id10309"),
        "notes/hello.wav": None,
    },
    "voxceleb2": {
        "dev/aac/id00012/21Uxsk56VDQ/00001.m4a": ("dev", "id00012"),
        "dev/aac/id00012/21Uxsk56VDQ/00002.m4a": ("dev", "id00012"),
        "dev/aac/id09272/u7VNkYraCw0/00027.m4a": ("dev", "id09272"),
        "aac/id00017/01dfn2spqyE/00001.m4a": ("test", "id00017"),
        "dev/mp4/id00012/21Uxsk56VDQ/00001.mp4": None,
    },
    "librispeech": {
        "LibriSpeech/train-clean-100/103/1240/103-1240-0000.flac": ("train-clean-100", "103"),
        "LibriSpeech/train-clean-100/103/1241/103-1241-0003.flac": ("train-clean-100", "103"),
        "LibriSpeech/train-clean-360/100/121669/100-121669-0000.flac": ("train-clean-360", "100"),
        "LibriSpeech/train-other-500/20/205/20-205-0000.flac": ("train-other-500", "20"),
        "LibriSpeech/dev-clean/84/121123/84-121123-0000.flac": ("dev-clean", "84"),
        "LibriSpeech/dev-other/116/288045/116-288045-0000.flac": ("dev-other", "116"),
        "LibriSpeech/test-clean/61/70968/61-70968-0000.flac": ("test-clean", "61"),
        "LibriSpeech/test-other/367/130732/367-130732-0000.flac": ("test-other", "367"),
    },
    "voices": {
        "VOiCES_devkit/source-16k/train/sp0307/Lab41-SRI-VOiCES-src-sp0307-ch127535-sg0042.wav": (
            "source train",
            "sp0307",
        ),
        "VOiCES_devkit/source-16k/test/sp0032/Lab41-SRI-VOiCES-src-sp0032-ch021625-sg0005.wav": (
            "source test",
            "sp0032",
        ),
        f"{VOICES_TRAIN}-sp0307-ch127535-sg0042-mc01-stu-clo-dg080.wav": (
            "devkit train",
            "sp0307",
        ),
        f"{VOICES_TEST}-sp0032-ch021625-sg0005-mc01-stu-clo-dg110.wav": (
            "devkit test",
            "sp0032",
        ),
        f"{VOICES}/room-response/rm1/impulse/Lab41-SRI-VOiCES-rm1-impulse-mc01-stu-clo.wav": None,
        f"{VOICES}/distractors/rm1/babb/Lab41-SRI-VOiCES-rm1-babb-mc01-stu-clo.wav": None,
    },
    "musan": {
        "musan/noise/free-sound/noise-free-sound-0000.wav": ("noise", ""),
        "musan/noise/sound-bible/noise-sound-bible-0001.wav": ("noise", ""),
        "musan/speech/librivox/speech-librivox-0000.wav": ("speech", ""),
        "musan/music/fma-western-art/music-fma-wa-0000.wav": ("music", ""),
    },
    "rirs_noises": {
        "RIRS_NOISES/simulated_rirs/smallroom/Room001/Room001-00001.wav": ("smallroom", ""),
        "RIRS_NOISES/simulated_rirs/mediumroom/Room200/Room200-00100.wav": ("mediumroom", ""),
        "RIRS_NOISES/simulated_rirs/largeroom/Room001/Room001-00001.wav": ("largeroom", ""),
        "RIRS_NOISES/real_rirs_isotropic_noises/RVB2014_type1_rir_largeroom1_far_angla.wav": ("real rirs", ""),
        "RIRS_NOISES/real_rirs_isotropic_noises/air_type1_air_binaural_aula_carolina_1_1_90_3_16k.wav": (
            "real rirs",
            "",
        ),
        "RIRS_NOISES/real_rirs_isotropic_noises/RVB2014_type1_noise_largeroom1_1.wav": ("isotropic noises", ""),
        "RIRS_NOISES/pointsource_noises/noise-free-sound-0000.wav": ("pointsource noises", ""),
    },
}


def write_layout(name: str, folder: Path, *, audio: bool = True) -> Path:
    for seed, path in enumerate(LAYOUTS[name]):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        samples = np.random.default_rng(seed).normal(size=17_000) * 0.1
        if not audio or (needs_ffmpeg(target) and FFMPEG is None):
            target.touch()
        elif needs_ffmpeg(target):
            encode(samples, 16_000, target)
        else:
            soundfile.write(target, samples, 16_000)
    return folder


def found_in(name: str, folder: Path) -> dict[str, tuple[str, str]]:
    found = {}
    for part in survey(RECIPES[name], folder).parts:
        speakers = part.speakers or [""] * len(part.paths)
        found |= {path: (part.part.name, speaker) for path, speaker in zip(part.paths, speakers, strict=True)}
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_each_file_of_the_layout_is_of_its_part_and_speaker(name: str, tmp_path: Path) -> None:
    folder = write_layout(name, tmp_path / "corpus", audio=False)
    expected = LAYOUTS[name]
    assert found_in(name, folder) == {path: part for path, part in expected.items() if part is not None}
    assert survey(RECIPES[name], folder).others == list(expected.values()).count(None)


def test_the_source_may_be_a_folder_within_the_layout(tmp_path: Path) -> None:
    write_layout("voxceleb2", tmp_path, audio=False)
    assert set(found_in("voxceleb2", tmp_path / "dev/aac").values()) == {("dev", "id00012"), ("dev", "id09272")}
    assert set(found_in("voxceleb2", tmp_path / "aac").values()) == {("test", "id00017")}
    write_layout("librispeech", tmp_path, audio=False)
    assert len(found_in("librispeech", tmp_path / "LibriSpeech/train-clean-100/103")) == 2


def published_here(name: str, folder: Path) -> Survey:
    """A survey for which the numbers of the tiny tree are the published ones."""
    there = survey(RECIPES[name], folder)
    parts = [
        replace(
            found.part,
            speakers=None if found.part.speakers is None else found.num_speakers,
            files=None if found.part.files is None else len(found.paths),
        )
        for found in there.parts
    ]
    return survey(replace(there.recipe, parts=tuple(parts)), folder)


@pytest.mark.parametrize("name", RECIPES)
def test_numbers_as_published_and_other_ones_are_told_apart(name: str, tmp_path: Path) -> None:
    folder = write_layout(name, tmp_path / "corpus", audio=False)
    whole = published_here(name, folder)
    assert whole.is_as_published
    assert {found.difference for found in whole.parts} <= {"as published", "not checked", "not there, not needed"}
    checked = next(found for found in whole.parts if found.paths and found.part.files is not None)
    file = folder / checked.paths[0]
    another = file.with_name(file.name.replace("0", "9", 1))
    another.touch()
    more = survey(whole.recipe, folder)
    assert not more.is_as_published
    assert "1 file more" in [found.difference for found in more.parts]


def test_a_missing_part_counts_only_where_it_is_needed(tmp_path: Path) -> None:
    folder = write_layout("voxceleb1", tmp_path, audio=False)
    recipe = published_here("voxceleb1", folder).recipe
    for path in folder.glob("wav/id10[23]*/*/*"):
        if path.parts[-3] in {"id10270", "id10300", "id10309"}:
            path.unlink()
    without_test = survey(recipe, folder)
    assert without_test.is_as_published
    assert [found.difference for found in without_test.parts] == ["not there, not needed", "as published"]
    for path in folder.glob("wav/*/*/*"):
        path.unlink()
    nothing = survey(recipe, folder)
    assert not nothing.is_as_published
    assert [found.difference for found in nothing.parts] == ["not there, not needed", "not there"]
    assert not survey(RECIPES["librispeech"], tmp_path / "absent").is_as_published


def test_the_published_numbers_add_up() -> None:
    def total(name: str, attribute: str) -> int:
        return sum(getattr(part, attribute) or 0 for part in RECIPES[name].parts)

    assert (total("voxceleb1", "speakers"), total("voxceleb1", "files")) == (1251, 153_516)
    assert (total("voxceleb2", "speakers"), total("voxceleb2", "files")) == (6112, 1_128_246)
    assert (total("librispeech", "speakers"), total("librispeech", "files")) == (2484, 292_367)
    assert total("musan", "files") == 2016


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if not recipe.is_bank])
def test_a_recipe_of_speech_prepares_its_training_part_with_speakers(name: str, tmp_path: Path) -> None:
    source = write_layout(name, tmp_path / "corpus")
    out = tmp_path / "shards"
    training = {
        path: part[1]
        for path, part in LAYOUTS[name].items()
        if part is not None and ("train" in part[0] or part[0] == "dev")
    }
    if name == "voxceleb2" and FFMPEG is None:
        pytest.skip("ffmpeg is not installed: apt-get install ffmpeg")
    assert run(["prepare", str(source), "--out", str(out), "--recipe", name.upper(), "--workers", "1"]) == 0
    assert {str(sample["path"]): sample["speaker"] for sample in descriptions(out)} == training
    assert check(out, workers=1) == []


@pytest.mark.parametrize(("name", "clips"), [("musan", (2, 1, 1, 0)), ("rirs_noises", (2, 0, 0, 5))])
def test_a_recipe_of_noises_and_rooms_prepares_a_bank(name: str, clips: tuple[int, ...], tmp_path: Path) -> None:
    source = write_layout(name, tmp_path / "corpus")
    # Of no part, though its folder would tell a category.
    soundfile.write(source / "speech.wav", np.random.default_rng(0).normal(size=17_000) * 0.1, 16_000)
    assert run(["prepare", str(source), "--out", str(tmp_path / "bank"), "--recipe", name, "--workers", "1"]) == 0
    bank = Bank.open(tmp_path / "bank")
    counts = {category: len(bank.clips(category)) for category in bank.categories}
    assert counts == {
        category: number for category, number in zip(("noise", "speech", "music", "rir"), clips, strict=True) if number
    }
    assert check(tmp_path / "bank") == []


def test_a_dry_run_says_what_to_download_and_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_layout("voxceleb1", tmp_path / "corpus", audio=False)
    assert run(["prepare", str(source), "--recipe", "VoxCeleb1", "--dry-run"]) == 1
    shown = capsys.readouterr().out
    assert "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/vox1.html" in shown
    assert "vox1_dev_wav_partaa to vox1_dev_wav_partad" in shown
    assert "wav/id10001/VIDEO/00001.wav" in shown
    assert "1207 speakers fewer, 148637 files fewer" in shown
    assert "other audio files, which are left out: 1" in shown
    assert run(["prepare", str(source), "--recipe", "voxceleb1", "--dry-run", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] is False
    assert result["parts"][1] == {
        "part": "dev",
        "use": "train",
        "speakers": 4,
        "published_speakers": 1211,
        "files": 5,
        "published_files": 148_642,
        "difference": "1207 speakers fewer, 148637 files fewer",
    }
    assert run(["prepare", str(tmp_path / "not yet"), "--recipe", "musan", "--dry-run"]) == 1
    assert "musan.tar.gz" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"]


def test_a_dry_run_of_a_whole_corpus_ends_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in RECIPES["musan"].parts:
        folder = tmp_path / "musan" / part.name / "some"
        folder.mkdir(parents=True)
        for number in range(part.files or 0):
            (folder / f"{part.name}-some-{number:04d}.wav").touch()
    assert run(["prepare", str(tmp_path), "--recipe", "musan", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--recipe", "voxceleb3", "--out", "x"], "the recipes are voxceleb1, voxceleb2, librispeech, voices"),
        (["--recipe", "musan", "--out", "x"], "holds nothing of MUSAN to prepare"),
        (["--recipe", "voxceleb2", "--out", "x"], "holds nothing of VoxCeleb2 to prepare"),
        (["--recipe", "voxceleb1", "--out", "x", "--bank"], "leave out --bank"),
        (["--recipe", "voxceleb1", "--out", "x", "--labels", "y"], "does not go with --list and --labels"),
        (["--recipe", "musan", "--out", "x", "--seed", "1"], "--seed is for shards"),
        (["--dry-run"], "name it with --recipe"),
        ([], "give --out FOLDER"),
    ],
)
def test_a_wrong_request_is_one_line(
    options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_layout("voxceleb1", tmp_path / "corpus", audio=False)
    assert run(["prepare", str(source), *options]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("error: ")
    assert words in error[-1]
    assert not (tmp_path / "x").exists()


def test_names_are_found_however_they_are_written() -> None:
    assert find_recipe("RIRS-NOISES") is find_recipe("rirs_noises") is RECIPES["rirs_noises"]
    with pytest.raises(CelError, match="there is no recipe 'slr28'"):
        find_recipe("slr28")
