"""Public evaluations: tiny corpora in the layouts of the real ones, through `cel evaluate --protocol`."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cel_dist.cli.app import run
from cel_dist.data.audio import encode_audio
from cel_dist.encoders import build_encoder
from cel_dist.errors import CelError
from cel_dist.evaluation.protocols import PROTOCOLS, read_protocol
from cel_dist.model import EncoderDescription, ModelDescription, SpeakerModel, load_model
from cel_dist.utterance import Excerpt

Cel = Callable[..., tuple[int, str, str]]

COUNTS = {
    "voxceleb1-o": 37_720,
    "voxceleb1-o-cleaned": 37_611,
    "voxceleb1-e": 581_480,
    "voxceleb1-e-cleaned": 579_818,
    "voxceleb1-h": 552_536,
    "voxceleb1-h-cleaned": 550_894,
}
LISTS = {"o": "veri_test", "e": "list_test_all", "h": "list_test_hard"}
SPOKEN = [f"id10{speaker}/video{speaker}/0000{n}.wav" for speaker in (270, 271, 1) for n in (1, 2)]


@pytest.fixture
def cel(capsys: pytest.CaptureFixture[str]) -> Cel:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    encoder = EncoderDescription(name="fast_resnet34", embedding_dim=16)
    folder = tmp_path_factory.mktemp("model") / "model"
    SpeakerModel(build_encoder("fast_resnet34", 16), ModelDescription(encoder=encoder)).save(folder)
    return folder


def speak(path: Path, seed: int, seconds: float = 1.0) -> None:
    wave = (2000 * np.random.default_rng(seed).standard_normal(int(16000 * seconds))).astype(np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_audio(wave, "flac" if path.suffix == ".flac" else "wav"))


def write_lines(path: Path, lines: Sequence[str], number: int | None = None) -> None:
    """The lines, again and again until there are `number` of them."""
    number = number or len(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{line}\n" for line in lines)
    path.write_text(text * (number // len(lines)) + "".join(f"{line}\n" for line in lines[: number % len(lines)]))


def voxceleb_list(path: Path, number: int | None = None) -> None:
    pairs = [(a, b) for a in SPOKEN for b in SPOKEN if a != b]
    write_lines(path, [f"{int(a[:7] == b[:7])} {a} {b}" for a, b in pairs], number)


@pytest.fixture(scope="module")
def voxceleb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Test speakers in wav/, one of dev/ beside it, as somebody might have unpacked the two archives."""
    root = tmp_path_factory.mktemp("voxceleb1")
    for number, name in enumerate(SPOKEN):
        speak(root / ("dev/wav" if name.startswith("id101/") else "wav") / name, number)
    return root


def outcome(result: tuple[int, str, str]) -> dict[str, Any]:
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


def refusal(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert code == 2
    assert out == ""
    lines = err.splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1]


def score_lines(result: dict[str, Any]) -> list[list[str]]:
    return [line.split() for line in Path(result["scores"]).read_text().splitlines()]


def out(folder: Path) -> tuple[object, ...]:
    return "--out", folder / "out"


def link(corpus: Path, root: Path) -> Path:
    """A folder with the audio of `corpus`, for lists of its own."""
    root.mkdir()
    for entry in corpus.iterdir():
        (root / entry.name).symlink_to(entry)
    return root


def test_the_published_numbers_of_trials_are_known():
    assert {name: protocol.num_trials for name, protocol in PROTOCOLS.items() if protocol.num_trials} == COUNTS


@pytest.mark.parametrize("name", COUNTS)
def test_voxceleb1_lists_are_told_apart_by_their_number_of_trials_and_not_by_name(
    cel, model, voxceleb, tmp_path, monkeypatch, name
):
    letter, cleaned = name.split("-")[1], name.endswith("-cleaned")
    other = name.removesuffix("-cleaned") if cleaned else f"{name}-cleaned"
    counts = {name: COUNTS[name], other: COUNTS[other]}
    if letter != "o":
        # Half a million trials tell nothing more, and take ten times as long.
        counts = {name: 120 + cleaned, other: 121 - cleaned}
        for which, number in counts.items():
            monkeypatch.setitem(PROTOCOLS, which, replace(PROTOCOLS[which], num_trials=number))
    root = link(voxceleb, tmp_path / "corpus")
    # Each kind under the name of the other.
    voxceleb_list(root / f"{LISTS[letter]}{'' if cleaned else '2'}.txt", counts[name])
    voxceleb_list(root / f"{LISTS[letter]}{'2' if cleaned else ''}.txt", counts[other])
    result = outcome(cel("evaluate", "--model", model, "--protocol", name, "--root", root, "--json", *out(tmp_path)))
    assert (result["trials"], result["utterances"], result["protocol"]) == (counts[name], 6, name)
    assert score_lines(result)[0][1:3] == SPOKEN[:2]


@pytest.mark.parametrize("name", ["voxceleb1-e", "voxceleb1-h-cleaned"])
def test_whole_lists_of_half_a_million_trials_are_read(voxceleb, tmp_path, name):
    voxceleb_list(tmp_path / "list.txt", COUNTS[name])
    trials = read_protocol(name, voxceleb, tmp_path / "list.txt")
    assert len(trials) == COUNTS[name]
    assert trials.recordings[-1] == (Excerpt("dev/wav/id101/video1/00002.wav"),)


def test_a_list_of_another_protocol_is_named_and_an_unknown_one_says_what_is_expected(cel, model, voxceleb, tmp_path):
    root = link(voxceleb, tmp_path / "corpus")
    arguments = ("evaluate", "--model", model, "--root", root, *out(tmp_path))
    error = refusal(cel(*arguments, "--protocol", "voxceleb1-o"))
    assert "no list of trials of VoxCeleb1-O below" in error
    assert "veri_test.txt" in error
    voxceleb_list(root / "veri_test.txt", COUNTS["voxceleb1-o-cleaned"])
    error = refusal(cel(*arguments, "--protocol", "voxceleb1-o"))
    assert "holds 37611 trials, but voxceleb1-o has 37720: it is the list of voxceleb1-o-cleaned" in error
    voxceleb_list(tmp_path / "part.txt")
    error = refusal(cel(*arguments, "--protocol", "voxceleb1-o", "--trials", tmp_path / "part.txt"))
    assert "part.txt holds 30 trials, but voxceleb1-o has 37720 (voxceleb1-o-cleaned 37611)" in error
    assert not (tmp_path / "out").exists()
    (root / "dev").unlink()
    error = refusal(cel(*arguments, "--protocol", "voxceleb1-o-cleaned"))
    assert "there is no id101 of VoxCeleb1-O (cleaned) below" in error
    error = refusal(cel(*arguments, "--protocol", "voxceleb2"))
    assert "there is no protocol 'voxceleb2'; the protocols are voxceleb1-o, " in error
    assert "nothing to score" in refusal(cel(*arguments))


def test_intervals_over_the_speakers_of_a_corpus_need_no_list(cel, model, voxceleb, tmp_path, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "voxceleb1-o", replace(PROTOCOLS["voxceleb1-o"], num_trials=30))
    voxceleb_list(tmp_path / "list.txt")
    arguments = ("--protocol", "voxceleb1-o", "--root", voxceleb, "--trials", tmp_path / "list.txt")
    result = outcome(cel("evaluate", "--model", model, *arguments, "--bootstrap", 100, "--json", *out(tmp_path)))
    assert result["bootstrap"]["speakers"] == 3


def test_audio_missing_in_a_corpus_is_counted(cel, model, voxceleb, tmp_path):
    root = tmp_path / "corpus"
    speak(root / "wav" / SPOKEN[0], 1)
    voxceleb_list(root / "veri_test.txt", COUNTS["voxceleb1-o"])
    (root / "wav" / "id10271").mkdir()
    (root / "wav" / "id101").mkdir()
    error = refusal(cel("evaluate", "--model", model, "--root", root, "--protocol", "voxceleb1-o", *out(tmp_path)))
    assert f"5 of 6 audio files are missing under {root}, the first is wav/{SPOKEN[1]}" in error


VOICES = "Lab41-SRI-VOiCES-rm1-none-sp{speaker}-ch0000-sg0000-mc01-stu-clo-dg010"


def voices_dev(root: Path) -> None:
    folder = root / "Development_Data" / "Speaker_Recognition"
    utterances = {VOICES.format(speaker=f"{speaker:04d}-{n}"): f"sp{speaker:04d}" for speaker in (1, 2) for n in (1, 2)}
    for number, (name, speaker) in enumerate(utterances.items()):
        speak(folder / "sid_dev" / speaker / f"{name}.wav", number)
    lists = folder / "sid_dev_lists_and_keys"
    enrolled, tested = list(utterances)[0::2], list(utterances)[1::2]
    write_lines(lists / "dev-enroll.lst", [f"{name} sid_dev/{utterances[name]}/{name}.wav" for name in enrolled])
    write_lines(lists / "dev-test.lst", [f"sid_dev/{utterances[name]}/{name}.wav" for name in tested])
    keys = [
        f"{a} sid_dev/{utterances[b]}/{b}.wav {'tgt' if utterances[a] == utterances[b] else 'imp'}"
        for a in enrolled
        for b in tested
    ]
    write_lines(lists / "dev-trial-keys.lst", keys)


def voices_eval(root: Path) -> None:
    folder = root / "Speaker_Recognition"
    for number in range(4):
        speak(folder / "sid_eval" / f"{number:05d}.wav", number)
    write_lines(folder / "sid_eval_lists" / "eval-enroll.lst", [f"m{n} sid_eval/0000{n}.wav" for n in (0, 1)])
    write_lines(folder / "sid_eval_lists" / "eval-test.lst", [f"sid_eval/0000{n}.wav" for n in (2, 3)])
    keys = [f"m{a} 0000{b}.wav {'tgt' if b == a + 2 else 'imp'}" for a in (0, 1) for b in (2, 3)]
    write_lines(
        root / "VOiCES_challenge_2019_post-eval-release" / "VOiCES_challenge_2019_eval.SID.trial-keys.lst", keys
    )


def test_voices_2019_dev_and_eval_run_from_their_folders(cel, model, tmp_path):
    root = tmp_path / "VOiCES_Box_unzip"
    voices_dev(root)
    voices_eval(root)
    arguments = ("evaluate", "--model", model, "--json", *out(tmp_path))
    dev = outcome(cel(*arguments, "--protocol", "voices2019-dev", "--root", root))
    assert (dev["trials"], dev["utterances"]) == (4, 4)
    assert [line[0] for line in score_lines(dev)] == ["1", "0", "0", "1"]
    assert score_lines(dev)[0][1] == f"sid_dev/sp0001/{VOICES.format(speaker='0001-1')}.wav"
    lines = score_lines(outcome(cel(*arguments, "--protocol", "voices2019-eval", "--root", root)))
    assert [line[:3] for line in lines[:2]] == [
        ["1", "sid_eval/00000.wav", "sid_eval/00002.wav"],
        ["0", "sid_eval/00000.wav", "sid_eval/00003.wav"],
    ]
    loaded = load_model(model)
    audio = root / "Speaker_Recognition" / "sid_eval"
    assert float(lines[0][3]) == pytest.approx(loaded.score(audio / "00000.wav", audio / "00002.wav"), abs=1e-6)
    # The folder of the lists and audio will do as well.
    within = read_protocol("voices2019-dev", root / "Development_Data" / "Speaker_Recognition")
    assert within.recordings[0][0].path.startswith("sid_dev/sp0001/")


def sitw(root: Path, subset: str) -> None:
    folder = root / subset
    for number, name in enumerate(("aaaaa", "bbbbb", "ccccc", "ddddd")):
        speak(folder / "audio" / f"{name}.flac", number, seconds=1.5)
    write_lines(folder / "lists" / "enroll-core.lst", ["12013 audio/aaaaa.flac", "12014 audio/bbbbb.flac"])
    write_lines(
        folder / "lists" / "enroll-assist.lst",
        ["45205 audio/aaaaa.flac 0.250 0.990", "45206 audio/bbbbb.flac 0.500 1.400", "45206 audio/aaaaa.flac 0.0 0.5"],
    )
    for enrol, models in (("core", ("12013", "12014")), ("assist", ("45205", "45206"))):
        for test, names in (("core", "cd"), ("multi", "cdb")):
            keys = [
                f"{name} audio/{letter * 5}.flac {'tgt' if (place + column) % 2 == 0 else 'imp'}"
                for place, name in enumerate(models)
                for column, letter in enumerate(names)
            ]
            write_lines(folder / "keys" / f"{enrol}-{test}.lst", keys)


@pytest.fixture(scope="module")
def sitw_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sitw")
    sitw(root, "dev")
    sitw(root, "eval")
    return root


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name.startswith("sitw")])
def test_sitw_conditions_run_from_their_folders(cel, model, sitw_root, tmp_path, name):
    result = outcome(
        cel("evaluate", "--model", model, "--json", "--protocol", name, "--root", sitw_root, *out(tmp_path))
    )
    assert result["trials"] == (6 if name.endswith("multi") else 4)
    first = score_lines(result)[0]
    assert first[1] == ("45205" if "assist" in name else "audio/aaaaa.flac")
    loaded = load_model(model)
    audio = sitw_root / name.split("-")[1] / "audio"
    enrolled = str(audio / "aaaaa.flac")
    excerpt = Excerpt(enrolled, 0.25, 0.99) if "assist" in name else Excerpt(enrolled)
    expected = -np.linalg.norm(loaded.embed(excerpt) - loaded.embed(audio / "ccccc.flac"))
    assert float(first[3]) == pytest.approx(expected, abs=1e-6)


def test_the_dev_folder_of_sitw_is_not_taken_for_eval(sitw_root):
    assert read_protocol("sitw-dev-core-core", sitw_root / "dev").recordings[0][0].path == "audio/aaaaa.flac"
    with pytest.raises(CelError, match="no list of trials of SITW eval core-core below"):
        read_protocol("sitw-eval-core-core", sitw_root / "dev")


def test_a_model_of_several_parts_is_the_mean_of_their_embeddings(cel, model, sitw_root, tmp_path):
    # The lists of a protocol as lists of one's own.
    folder = sitw_root / "dev"
    lists = ("--trials", folder / "keys" / "assist-core.lst", "--enrol", folder / "lists" / "enroll-assist.lst")
    arguments = ("evaluate", "--model", model, "--root", folder, *lists, *out(tmp_path), "--json")
    result = outcome(cel(*arguments))
    loaded = load_model(model)
    parts = loaded.embed(
        [Excerpt(f"{folder}/audio/bbbbb.flac", 0.5, 1.4), Excerpt(f"{folder}/audio/aaaaa.flac", 0.0, 0.5)]
    )
    mean = parts.mean(axis=0) / np.linalg.norm(parts.mean(axis=0))
    expected = -np.linalg.norm(mean - loaded.embed(folder / "audio" / "ccccc.flac"))
    line = score_lines(result)[2]
    assert line[:3] == ["0", "45206", "audio/ccccc.flac"]
    assert float(line[3]) == pytest.approx(expected, abs=1e-6)
    with np.load(result["embeddings"]) as arrays:
        assert arrays["names"].tolist() == ["45205", "audio/ccccc.flac", "audio/ddddd.flac", "45206"]
    error = refusal(cel(*arguments, "--frames", 40))
    assert "1 models are made of several files (first 45206)" in error
    outcome(cel(*arguments, "--frames", 40, "--windows-as", "embedding"))


@pytest.mark.parametrize(
    ("enrolments", "message"),
    [
        ("", "holds no enrolments"),
        ("m\n", "enrol.txt, line 1: 1 columns instead of 2 or 4"),
        ("m c.wav\nm a.wav 1.0\n", "enrol.txt, line 2: 3 columns instead of 2 or 4"),
        ("m a.wav 2.0 1.0\n", "line 1: a part from '2.0' to '1.0'; give start and end in seconds"),
        ("m a.wav from here\n", "a part from 'from' to 'here'"),
        ("other a.wav\n", "trials.txt, line 3: the model m is not among the 1 of enrol.txt"),
        ("m a.wav 5 6\nother a.wav\n", "a.wav ends after 1 s, but a part of it is to begin at 5 s"),
        ("other a.wav\nm c.wav 0.0 0.5\nc.wav a.wav 0.1 0.9\n", "enrol.txt: c.wav is the name of a model of several"),
        ("other c.wav\nm a.wav 0.0 0.5\nc.wav a.wav\nc.wav c.wav\n", "give the model another name"),
        (None, "cannot read the enrolments enrol.txt"),
    ],
)
def test_faulty_enrolments_are_refused_in_one_line(cel, model, tmp_path, monkeypatch, enrolments, message):
    monkeypatch.chdir(tmp_path)
    speak(Path("a.wav"), 1)
    speak(Path("c.wav"), 2)
    Path("trials.txt").write_text("\n1 other a.wav\n0 m c.wav\n")
    if enrolments is not None:
        Path("enrol.txt").write_text(enrolments)
    arguments = ("evaluate", "--model", model, "--root", ".", "--trials", "trials.txt", "--enrol", "enrol.txt")
    assert message in refusal(cel(*arguments))
