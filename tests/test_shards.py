import io
import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cel_dist.data.audio import encode_audio, read_audio
from cel_dist.data.check import check, check_shards
from cel_dist.data.files import sha256_of
from cel_dist.data.folder import ShardFolder
from cel_dist.data.index import Index
from cel_dist.data.shards import Manifest, Utterance, scan_shard, write_shard
from cel_dist.errors import CelError

BLOCK = 512


def utterances(first: int, count: int, audio_format: str = "wav") -> list[Utterance]:
    made = []
    for number in range(first, first + count):
        draw = np.random.default_rng(number)
        samples = (draw.normal(size=1000 + 10 * number) * 3000).astype(np.int16)
        audio = encode_audio(samples, audio_format)
        made.append(
            Utterance(f"{number:09d}", audio, len(samples), f"sub folder/ü{number}.ogg", f"speaker{number % 2}")
        )
    return made


def write_folder(folder: Path, audio_format: str = "wav") -> Path:
    folder.mkdir()
    written = [
        write_shard(folder / f"train-{shard:06d}.tar", utterances(4 * shard, 4, audio_format), audio_format)
        for shard in range(2)
    ]
    index = Index.from_shards([rows for _, rows in written])
    index.save(folder)
    Manifest(
        seed=0,
        sample_rate=16_000,
        audio_format=audio_format,
        samples=len(index),
        seconds=int(index.samples.sum()) / 16_000,
        rejected=0,
        shards=tuple(record for record, _ in written),
    ).save(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "shards")


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def reasons(folder: Path) -> str:
    return "\n".join(str(fault) for fault in check_shards(folder, workers=1))


@pytest.mark.parametrize("audio_format", ["wav", "flac"])
def test_the_index_leads_to_every_utterance(tmp_path: Path, audio_format: str) -> None:
    folder = ShardFolder.open(write_folder(tmp_path / "shards", audio_format))
    index = folder.index
    assert index.shard.tolist() == [0] * 4 + [1] * 4
    assert (index.offset.dtype, index.size.dtype, index.samples.dtype) == (np.int64, np.int64, np.int64)
    for place, expected in enumerate(utterances(0, 8, audio_format)):
        with open(Path(folder.location) / folder.manifest.shards[index.shard[place]].name, "rb") as file:
            assert os.pread(file.fileno(), index.size[place], index.offset[place]) == expected.audio
        assert index.samples[place] == expected.samples
    assert check_shards(folder.location, workers=1) == []


def test_an_index_from_before_the_speakers_has_them_all_unknown(folder: Path) -> None:
    index = Index.load(folder)
    assert index.speaker_names.tolist() == ["speaker0", "speaker1"]
    assert index.speaker.tolist() == [0, 1] * 4
    # Copies: the file that they are mapped from is overwritten.
    places = {name: getattr(index, name).copy() for name in ("shard", "offset", "size", "samples")}
    np.savez(folder / "index.npz", **places)
    older = ShardFolder.open(folder).index
    assert (older.speaker.dtype, older.speaker.tolist()) == (np.int32, [-1] * 8)
    assert older.speaker_names.tolist() == []
    assert check_shards(folder, workers=1) == []


def test_the_stock_library_reads_the_same_audio_and_description(folder: Path) -> None:
    import webdataset

    urls = sorted(str(path) for path in folder.glob("*.tar"))
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    expected = utterances(0, 8)
    assert [sample["__key__"] for sample in found] == [utterance.key for utterance in expected]
    for sample, utterance in zip(found, expected, strict=True):
        assert sample["wav"] == utterance.audio
        assert json.loads(sample["json"]) == {
            "path": utterance.path,
            "seconds": utterance.samples / 16_000,
            "speaker": utterance.speaker,
        }


def test_the_same_utterances_give_the_same_bytes(tmp_path: Path, folder: Path) -> None:
    again = write_folder(tmp_path / "again")
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_a_shard_whose_writing_fails_is_not_there(tmp_path: Path) -> None:
    def broken():
        yield from utterances(0, 2)
        raise OSError("decoder fell over")

    with pytest.raises(OSError, match="decoder"):
        write_shard(tmp_path / "train-000000.tar", broken(), "wav")
    assert list(tmp_path.iterdir()) == []


CUTS = (
    "at the start",
    "in a header",
    "at a header",
    "in an audio member",
    "in a json member",
    "between the members of a sample",
    "at the end mark",
    "in the end mark",
)


def cut_at(place: str, path: Path) -> int:
    rows = scan_shard(path)
    second = int(rows.offset[1])
    end = int(rows.offset[-1] + -(-rows.size[-1] // BLOCK) * BLOCK)
    places = (0, second - BLOCK + 100, second - BLOCK, second + 50, BLOCK + 10, int(rows.offset[0]) - BLOCK, end)
    return dict(zip(CUTS, (*places, end + BLOCK), strict=True))[place]


@pytest.mark.parametrize("place", CUTS)
def test_a_cut_shard_never_passes_for_a_short_one(folder: Path, place: str) -> None:
    shard = folder / "train-000001.tar"
    with open(shard, "r+b") as file:
        file.truncate(cut_at(place, shard))
    with pytest.raises(CelError, match=r"train-000001\.tar.*cut"):
        scan_shard(shard)
    with pytest.raises(CelError, match=r"train-000001\.tar .* has \d+ bytes, the manifest says \d+.*cel check"):
        ShardFolder.open(folder)
    faults = check_shards(folder, workers=1)
    assert {fault.shard for fault in faults} == {"train-000001.tar"}
    assert any("cut" in fault.reason for fault in faults)


def test_a_flipped_byte_is_found_in_audio_header_and_padding(folder: Path) -> None:
    shard = folder / "train-000000.tar"
    whole = shard.read_bytes()
    rows = scan_shard(shard)
    for place in (int(rows.offset[0]) + 700, int(rows.offset[1]) - BLOCK + 3, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        shard.write_bytes(damaged)
        ShardFolder.open(folder)
        assert "sha256" in reasons(folder), place


def test_audio_that_does_not_decode_is_named_by_its_key(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "shards", "flac")
    row = Index.load(folder)
    data = bytearray((folder / "train-000001.tar").read_bytes())
    data[row.offset[5] + 200 : row.offset[5] + 260] = bytes(60)
    (folder / "train-000001.tar").write_bytes(data)
    assert "000000005" in {fault.key for fault in check_shards(folder, workers=1)}


def test_a_manifest_that_does_not_match_is_refused_with_both_numbers(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    shards = manifest["shards"]
    shards[1]["samples"] = 5
    edit_manifest(folder, samples=9, shards=shards)
    with pytest.raises(CelError, match="holds 8 samples, the manifest says 9"):
        ShardFolder.open(folder)
    assert "holds 4 samples, the manifest says 5" in reasons(folder)


def test_an_index_that_does_not_match_is_refused(folder: Path) -> None:
    index = Index.load(folder)
    replace(index, offset=index.offset + BLOCK).save(folder)
    assert "index and tar differ in where" in reasons(folder)
    replace(index, speaker=1 - index.speaker).save(folder)
    assert "index and tar differ in its speaker, speaker1 and speaker0" in reasons(folder)
    for wrong in (
        {"speaker": index.speaker + 1},
        {"speaker": index.speaker - 2},
        {"speaker": index.speaker[1:]},
        {"speaker": index.speaker.astype(np.int64)},
        {"speaker_names": index.speaker_names[::-1]},
    ):
        replace(index, **wrong).save(folder)
        with pytest.raises(CelError, match="its speakers are not codes of sorted names"):
            ShardFolder.open(folder)
    columns = ("shard", "offset", "size", "samples", "speaker")
    replace(index, **{name: getattr(index, name)[:-1] for name in columns}).save(folder)
    with pytest.raises(CelError, match=r"index of .* holds 7 samples, the manifest says 8"):
        ShardFolder.open(folder)
    replace(index, shard=index.shard[::-1].copy()).save(folder)
    with pytest.raises(CelError, match="order"):
        ShardFolder.open(folder)
    replace(index, size=index.size * 10**6).save(folder)
    with pytest.raises(CelError, match="the index reaches byte"):
        ShardFolder.open(folder)
    (folder / "index.npz").write_bytes(b"not an index")
    with pytest.raises(CelError, match=r"index\.npz"):
        ShardFolder.open(folder)
    assert "index.npz" in reasons(folder)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"version": 2}, "version"),
        ({"format": "other"}, "format"),
        ({"shards": None}, "shards"),
        ({"samples": -1}, "samples"),
    ],
)
def test_a_foreign_manifest_is_refused(folder: Path, changes: dict[str, object], word: str) -> None:
    edit_manifest(folder, **changes)
    with pytest.raises(CelError, match=word):
        ShardFolder.open(folder)
    assert "manifest.json" in reasons(folder)


def test_a_manifest_cannot_lead_out_of_its_folder(folder: Path) -> None:
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    shards[0]["name"] = "../elsewhere.tar"
    edit_manifest(folder, shards=shards)
    with pytest.raises(CelError, match=r"shards\.0\.name"):
        ShardFolder.open(folder)


def test_a_folder_without_manifest_says_how_to_go_on(folder: Path, tmp_path: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(CelError, match="cel prepare"):
        ShardFolder.open(folder)
    assert "manifest.json" in reasons(folder)
    with pytest.raises(CelError, match="no folder"):
        ShardFolder.open(tmp_path / "absent")
    with pytest.raises(CelError, match="no folder"):
        check(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CelError, match="not a finished folder"):
        check(tmp_path / "empty")


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "train-000000.tar").unlink()
    with pytest.raises(CelError, match=r"train-000000\.tar.*no such file"):
        ShardFolder.open(folder)
    assert "train-000000.tar: cannot be read: no such file" in reasons(folder)


def test_what_lies_about_is_a_fault(folder: Path) -> None:
    shutil.copy(folder / "train-000000.tar", folder / "train-000007.tar")
    (folder / ".train-000001.tar.123.tmp").write_bytes(b"half")
    found = reasons(folder)
    assert "train-000007.tar: not in the manifest" in found
    assert ".train-000001.tar.123.tmp: left by an interrupted run" in found


def test_a_key_that_occurs_twice_is_a_fault(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "shards")
    written = [
        write_shard(folder / f"train-{shard:06d}.tar", utterances(first, 4), "wav")
        for shard, first in enumerate((0, 2))
    ]
    index = Index.from_shards([rows for _, rows in written])
    index.save(folder)
    edit_manifest(folder, shards=[record.model_dump() for record, _ in written])
    faults = check_shards(folder, workers=1)
    assert [(fault.shard, fault.key) for fault in faults] == [
        ("train-000001.tar", "000000002"),
        ("train-000001.tar", "000000003"),
    ]


def test_members_that_do_not_pair_up_are_a_fault(tmp_path: Path) -> None:
    import tarfile

    def write(names: list[str], description: bytes = b'{"seconds": 1.0}') -> Path:
        path = tmp_path / "odd.tar"
        with tarfile.open(path, "w") as tar:
            for name in names:
                member = tarfile.TarInfo(name)
                data = description if name.endswith("json") else b"audio"
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        return path

    for names, words in [
        (["a.json", "b.json", "b.wav"], "a has no audio"),
        (["a.json", "a.wav", "b.wav"], "b has no json"),
        (["a.json", "a.json"], "twice"),
        (["a.wav", "a.flac"], "no json"),
        (["a.json", "a.png"], "a.png"),
    ]:
        with pytest.raises(CelError, match=words):
            scan_shard(write(names))
    with pytest.raises(CelError, match=r"a\.json states the speaker 7"):
        scan_shard(write(["a.json", "a.wav"], b'{"seconds": 1.0, "speaker": 7}'))
    assert scan_shard(write(["a.json", "a.wav"], b'{"seconds": 1.0, "speaker": null}')).speakers == (None,)


def test_checking_in_processes_finds_the_same_faults(folder: Path) -> None:
    with open(folder / "train-000001.tar", "r+b") as file:
        file.truncate(3000)
    assert check_shards(folder, workers=2) == check_shards(folder, workers=1) != []


def test_stored_audio_is_what_was_given(folder: Path) -> None:
    shards = ShardFolder.open(folder)
    with open(folder / shards.manifest.shards[1].name, "rb") as file:
        data = os.pread(file.fileno(), shards.index.size[6], shards.index.offset[6])
    assert len(read_audio(data)) == shards.index.samples[6] == 1060


def test_a_tar_has_the_bytes_that_tarfile_writes_and_the_rows_that_a_reader_finds(tmp_path: Path) -> None:
    # More than is synchronised at once, and members that fill their blocks and that do not.
    audio = [np.random.default_rng(n).bytes(size) for n, size in enumerate((512, 17 << 20, 700, 1))]
    utterances = [Utterance(f"{n:09d}", data, n + 1, f"{n}.wav", f"s{n}") for n, data in enumerate(audio)]
    record, rows = write_shard(tmp_path / "a.tar", utterances, "wav")
    with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for utterance in utterances:
            text = {"path": utterance.path, "seconds": utterance.samples / 16_000, "speaker": utterance.speaker}
            for suffix, data in (("json", json.dumps(text).encode()), ("wav", utterance.audio)):
                member = tarfile.TarInfo(f"{utterance.key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert record.sha256 == sha256_of(tmp_path / "b.tar")
    assert record.bytes == (tmp_path / "b.tar").stat().st_size
    found = scan_shard(tmp_path / "a.tar")
    for column in ("offset", "size", "samples"):
        np.testing.assert_array_equal(getattr(rows, column), getattr(found, column))
    assert rows.speakers == found.speakers == ("s0", "s1", "s2", "s3")
