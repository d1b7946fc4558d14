"""`cel corpus download`: from a server on this machine, whole or not at all."""

import hashlib
import io
import json
import signal
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from commands import cel, finish, only_error, start
from stores import Nginx, nginx, plain_server, proxy
from torchaudio.datasets import librispeech, libritts, vctk, voxceleb1, yesno

from cel_dist.cli.app import run
from cel_dist.corpus.catalogue import CORPORA, remote_files
from cel_dist.corpus.download import download_corpus
from cel_dist.data.recipes import find_recipe
from cel_dist.data.survey import survey
from cel_dist.errors import CelError, RunError

DEV = CORPORA["librispeech:dev-clean"]
ARCHIVE = "dev-clean.tar.gz"
CHUNK_BYTES = 4 << 20


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def recording(seconds: float, seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(-(1 << 15), 1 << 15, int(16_000 * seconds)).astype(np.int16)
    stream = io.BytesIO()
    soundfile.write(stream, noise, 16_000, format="FLAC")
    return stream.getvalue()


def write_archive(path: Path, seconds: float = 5) -> Path:
    """Two speakers of LibriSpeech with two utterances each, as its archives have them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        add(tar, "LibriSpeech/SPEAKERS.TXT", b"84 | F | dev-clean\n")
        for place, name in enumerate(("84-121123-0000", "84-121123-0001", "174-50561-0000", "174-50561-0001")):
            speaker, chapter, _ = name.split("-")
            folder = f"LibriSpeech/dev-clean/{speaker}/{chapter}"
            add(tar, f"{folder}/{name}.flac", recording(seconds, place))
            add(tar, f"{folder}/{speaker}-{chapter}.trans.txt", f"{name} GO ON\n".encode())
    return path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    """A server with a small archive, a large one below `large`, and things that are not what they are called."""
    root = tmp_path_factory.mktemp("site")
    write_archive(root / ARCHIVE)
    write_archive(root / "large" / ARCHIVE, seconds=100)
    (root / "page").mkdir()
    for name in (ARCHIVE, "veri_test.txt"):
        (root / "page" / name).write_text("<html>please log in</html>\n")
    (root / "lists").mkdir()
    (root / "lists" / "veri_test.txt").write_text("1 id10270/x6uYqmx31kE/00001.wav id10270/8jEAjG6SegY/00008.wav\n")
    (root / "lists" / "iden_split.txt").write_text("1 id10006/nLEBBc9oIFs/00003.wav\n")
    with nginx(root, tmp_path_factory.mktemp("nginx") / "server", "limit_rate 4m;") as server:
        yield server


@pytest.fixture
def published(site: Nginx, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchaudio knows the checksum of the small archive as that of the published one."""
    root = Path(site.access_log).parent
    config = (root / "nginx.conf").read_text()
    archive = Path(config.partition("; root ")[2].partition(";")[0]) / ARCHIVE
    [url] = [url for url in librispeech._CHECKSUMS if url.endswith(ARCHIVE)]
    monkeypatch.setitem(librispeech._CHECKSUMS, url, hashlib.sha256(archive.read_bytes()).hexdigest())


def audio_of(out: Path) -> list[str]:
    return sorted(path.stem for path in out.rglob("*.flac"))


def test_every_name_is_one_that_torchaudio_knows_where_to_find() -> None:
    found = {name: remote_files(corpus) for name, corpus in CORPORA.items()}
    by_kind = {
        kind: {file.url: file.sha256 for name, files in found.items() if CORPORA[name].kind == kind for file in files}
        for kind in ("librispeech", "libritts", "vctk", "yesno")
    }
    release = yesno._RELEASE_CONFIGS["release1"]
    assert by_kind == {
        "librispeech": librispeech._CHECKSUMS,
        "libritts": libritts._CHECKSUMS,
        "vctk": vctk._CHECKSUMS,
        "yesno": {release["url"]: release["checksum"]},
    }
    assert [file.url for file in found["voxceleb1:lists"]] == [voxceleb1._VERI_TEST_URL, voxceleb1._IDEN_SPLIT_URL]


def test_a_corpus_comes_whole_lies_as_the_recipe_expects_and_is_not_fetched_again(
    site: Nginx, tmp_path: Path, published: None
) -> None:
    out = tmp_path / "my corpora"
    bar: list[tuple[int, int]] = []
    result = download_corpus(DEV, out, mirror=site.url, progress=lambda done, total: bar.append((done, total)))
    assert (result.utterances, result.reused, result.path) == (4, False, out / "LibriSpeech" / "dev-clean")
    assert sorted(path.name for path in out.iterdir()) == [".lock", "LibriSpeech"]
    assert (out / "LibriSpeech" / "SPEAKERS.TXT").is_file()
    [part] = [part for part in survey(find_recipe("librispeech"), out).parts if part.part.name == "dev-clean"]
    assert (part.num_speakers, len(part.paths)) == (2, 4)
    assert bar
    asked = len(site.downloads())
    assert download_corpus(DEV, out, mirror=site.url).reused
    assert len(site.downloads()) == asked


def test_another_file_than_the_published_one_is_refused_and_leaves_nothing(site: Nginx, tmp_path: Path) -> None:
    error = only_error(cel("corpus", "download", DEV.name, "--out", "c", "--mirror", site.url, cwd=tmp_path), 1)
    assert "checksum is not the published one" in error
    assert [path.name for path in (tmp_path / "c").iterdir()] == [".lock"]
    done = cel(
        "corpus", "download", DEV.name, "--out", "c", "--mirror", site.url, "--no-verify", "--json", cwd=tmp_path
    )
    told = json.loads(done[1])
    assert (told["utterances"], told["reused"]) == (4, False)
    assert told["next"] == "cel corpus trials c/LibriSpeech/dev-clean --out trials.txt"


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_download_goes_on_where_it_stopped(site: Nginx, tmp_path: Path, end: signal.Signals) -> None:
    arguments = ("corpus", "download", DEV.name, "--out", "c", "--mirror", f"{site.url}/large", "--no-verify")
    process = start(*arguments, cwd=tmp_path)
    part = tmp_path / "c" / f".{ARCHIVE}.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size >= CHUNK_BYTES):
        assert process.poll() is None
        assert time.monotonic() < deadline
    process.send_signal(end)
    result = finish(process)
    if end == signal.SIGINT:
        assert only_error(result, 130) == "error: interrupted"
    assert audio_of(tmp_path) == []
    kept = part.stat().st_size
    before = len(site.downloads())
    code, out, err = cel(*arguments, cwd=tmp_path)
    assert (code, err.count("error")) == (0, 0), err
    assert "4 utterances" in out
    assert len(audio_of(tmp_path)) == 4
    # One byte is asked for to see whether the server can begin in the middle.
    assert min(begin for _, begin in site.downloads()[before:] if begin != 1) >= kept


def test_a_line_that_breaks_costs_nothing_that_came(site: Nginx, tmp_path: Path, published: None) -> None:
    with proxy(int(site.url.rpartition(":")[2]), cut_after=20_000, faults=2) as line:
        assert download_corpus(DEV, tmp_path / "c", mirror=line.url).utterances == 4
        assert line.broken == 2


def test_a_server_without_ranges_and_a_folder_serve_as_well(tmp_path: Path) -> None:
    write_archive(tmp_path / "copied" / ARCHIVE, seconds=100)
    with plain_server(tmp_path / "copied", tmp_path / "server") as url:
        (tmp_path / "a").mkdir()
        # The beginning of something: this server cannot go on from it, so that it must not stay.
        (tmp_path / "a" / f".{ARCHIVE}.part").write_bytes(b"x" * 1000)
        assert download_corpus(DEV, tmp_path / "a", mirror=url, verify=False).utterances == 4
    assert download_corpus(DEV, tmp_path / "b", mirror=f"file://{tmp_path}/copied", verify=False).utterances == 4
    assert audio_of(tmp_path / "a") == audio_of(tmp_path / "b")


def test_a_page_in_the_place_of_a_file_is_not_taken_for_it(site: Nginx, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be unpacked"):
        download_corpus(DEV, tmp_path, mirror=f"{site.url}/page", verify=False)
    with pytest.raises(RunError, match=r"line 1 .* is not of veri_test.txt but '<html>please log in</html>'"):
        download_corpus(CORPORA["voxceleb1:lists"], tmp_path, mirror=f"{site.url}/page")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_an_archive_cannot_write_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "mirror").mkdir()
    with tarfile.open(tmp_path / "mirror" / ARCHIVE, "w:gz") as tar:
        add(tar, "../../escaped", b"")
    with pytest.raises(RunError, match="cannot be unpacked"):
        download_corpus(DEV, tmp_path / "a" / "b", mirror=f"file://{tmp_path}/mirror", verify=False)
    assert not list(tmp_path.rglob("escaped"))


def test_the_lists_of_voxceleb_come_with_what_is_missing_of_them(site: Nginx, tmp_path: Path) -> None:
    lists = CORPORA["voxceleb1:lists"]
    (tmp_path / "iden_split.txt").write_text("mine\n")
    result = download_corpus(lists, tmp_path, mirror=f"{site.url}/lists")
    assert ([path.name for path in result.files], result.reused) == (["veri_test.txt", "iden_split.txt"], False)
    assert (tmp_path / "veri_test.txt").read_text().startswith("1 id10270/")
    assert (tmp_path / "iden_split.txt").read_text() == "mine\n"
    assert download_corpus(lists, tmp_path, mirror="http://127.0.0.1:9/").reused


def test_a_disk_that_is_too_small_is_one_line_and_then_it_goes_on(site: Nginx, tmp_path: Path, mount_disk) -> None:
    disk = mount_disk(9_000)
    arguments = ("corpus", "download", DEV.name, "--out", disk, "--mirror")
    assert "MB free" in only_error(cel(*arguments, f"{site.url}/large", cwd=tmp_path), 1)
    filler = disk / "filler"
    archive_bytes = download_size(site)
    # Room for the archive, not for what is in it.
    filler.write_bytes(b"x" * (9_000 * 1024 - archive_bytes - 300_000))
    error = only_error(cel(*arguments, site.url, "--no-verify", cwd=tmp_path), 1)
    assert "no space left on device" in error
    assert audio_of(disk) == []
    filler.unlink()
    assert cel(*arguments, site.url, "--no-verify", cwd=tmp_path)[0] == 0
    assert len(audio_of(disk)) == 4


def download_size(site: Nginx) -> int:
    from cel_dist.data.remote import RemoteFolder

    return RemoteFolder(site.url, 10).size(ARCHIVE)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("librispeech:train-clean-10", "--out", "c"), 2, "the nearest is 'librispeech:train-clean-100'"),
        (("voxceleb2", "--out", "c"), 2, "needs an account; see 'cel prepare SRC --recipe voxceleb2 --dry-run'"),
        (("yesno",), 2, "give --out FOLDER"),
        (("yesno", "--out", "file"), 2, "is a file"),
        (("yesno", "--out", "c", "--mirror", "nowhere"), 2, "is no URL"),
        (("yesno", "--out", "c", "--mirror", "http://127.0.0.1:9"), 1, "check the network"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    tmp_path: Path,
    arguments: tuple[str, ...],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    returned = run(["corpus", "download", *arguments])
    captured = capsys.readouterr()
    assert message in only_error((returned, captured.out, captured.err), code)


def test_what_the_server_lacks_is_one_line(site: Nginx, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"waves_yesno.tar.gz is not there; .*--mirror"):
        download_corpus(CORPORA["yesno"], tmp_path, mirror=site.url)
    with pytest.raises(CelError, match="is no URL"):
        download_corpus(CORPORA["yesno"], tmp_path, mirror="../mirror")


def test_the_list_has_all_names_for_people_and_programs(tmp_path: Path) -> None:
    code, out, _ = cel("corpus", "download", cwd=tmp_path)
    assert code == 0
    assert all(name in out for name in CORPORA)
    code, out, _ = cel("corpus", "download", "--list", "--json", cwd=tmp_path)
    assert [row["name"] for row in json.loads(out)["corpora"]] == list(CORPORA)
