"""Public corpora that may be downloaded without an account, and where torchaudio says that they lie.

Addresses and checksums are those of `torchaudio.datasets`, read when they are needed. What is written here is what
torchaudio does not know: how large a download is, and what one does with it next.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cel_dist.errors import CelError, RunError

Kind = Literal["librispeech", "libritts", "vctk", "yesno", "voxceleb1"]


@dataclass(frozen=True)
class RemoteFile:
    """One file of a corpus.

    Attributes:
        url: where its publishers have it.
        sha256: of the whole file, in hexadecimal; None where torchaudio knows none.
    """

    url: str
    sha256: str | None

    @property
    def folder(self) -> str:
        """The URL without the name of the file."""
        return self.url.rpartition("/")[0]

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class PublicCorpus:
    """A corpus, or a part of one, that is one download.

    Attributes:
        name: as on the command line.
        kind: which dataset of torchaudio it is.
        subset: the part, where there are several.
        title: what it is, for people.
        megabytes: size of the download, rounded, as its publishers state it.
        folder: what appears in the folder that it is downloaded into; empty for lists, which are files.
        next_command: what to do with it, with `{out}` in the place of that folder.
        page: where its publishers describe it and its terms.
    """

    name: str
    kind: Kind
    subset: str
    title: str
    megabytes: int
    folder: str
    next_command: str
    page: str


_TRIALS_OF = "cel corpus trials {{out}}/{folder} --out trials.txt"
_SPLIT_OF = "cel corpus split {{out}}/{folder} --out lists"
_RECIPE = "cel prepare {out} --recipe librispeech --out shards"

# Name, and megabytes of the archives of LibriSpeech and LibriTTS as on openslr.org.
_SUBSETS = (
    ("train-clean-100", 6_300, 7_700),
    ("train-clean-360", 23_000, 27_000),
    ("train-other-500", 30_000, 44_000),
    ("dev-clean", 337, 1_200),
    ("dev-other", 314, 924),
    ("test-clean", 346, 1_200),
    ("test-other", 328, 964),
)


def _openslr(kind: Kind, title: str, page: str, subset: str, megabytes: int) -> PublicCorpus:
    folder = f"{title}/{subset}"
    is_training = subset.startswith("train")
    if kind == "librispeech":
        command = _RECIPE if is_training else _TRIALS_OF.format(folder=folder)
    else:
        command = (_SPLIT_OF if is_training else _TRIALS_OF).format(folder=folder)
    return PublicCorpus(
        f"{kind}:{subset}", kind, subset, f"{title}, {subset}: read English", megabytes, folder, command, page
    )


CORPORA: dict[str, PublicCorpus] = {
    corpus.name: corpus
    for corpus in (
        *(
            _openslr("librispeech", "LibriSpeech", "https://www.openslr.org/12/", subset, megabytes)
            for subset, megabytes, _ in _SUBSETS
        ),
        *(
            _openslr("libritts", "LibriTTS", "https://www.openslr.org/60/", subset, megabytes)
            for subset, _, megabytes in _SUBSETS
        ),
        PublicCorpus(
            "vctk",
            "vctk",
            "",
            "VCTK 0.92: 110 speakers of English, read, two microphones",
            11_000,
            "VCTK-Corpus-0.92",
            _SPLIT_OF.format(folder="VCTK-Corpus-0.92/wav48_silence_trimmed"),
            "https://datashare.ed.ac.uk/handle/10283/3443",
        ),
        PublicCorpus(
            "yesno",
            "yesno",
            "",
            "YesNo: 60 recordings of one speaker, to try a connection",
            5,
            "waves_yesno",
            "cel prepare {out}/waves_yesno --out shards",
            "https://www.openslr.org/1/",
        ),
        PublicCorpus(
            "voxceleb1:lists",
            "voxceleb1",
            "lists",
            "VoxCeleb1: the trials O (veri_test.txt) and the split for identification (iden_split.txt), without audio",
            8,
            "",
            "cel evaluate --model MODEL --trials {out}/veri_test.txt --root VOXCELEB1/wav",
            "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/",
        ),
    )
}


def find_corpus(name: str) -> PublicCorpus:
    """The corpus of this name, in any case.

    Raises:
        CelError: there is none; the message has the nearest name.
    """
    key = name.strip().lower()
    if key in CORPORA:
        return CORPORA[key]
    if key.startswith("voxceleb"):
        recipe = "voxceleb2" if "2" in key else "voxceleb1"
        raise CelError(
            f"there is no download '{name}': the audio of VoxCeleb needs an account; see 'cel prepare SRC --recipe "
            f"{recipe} --dry-run' for what to get, and 'voxceleb1:lists' for the lists"
        )
    nearest = difflib.get_close_matches(key, CORPORA, n=1, cutoff=0.0)[0]
    raise CelError(f"there is no download '{name}', the nearest is '{nearest}'; 'cel corpus download --list' has all")


def remote_files(corpus: PublicCorpus) -> list[RemoteFile]:
    """Where torchaudio says that the files of a corpus lie.

    Raises:
        RunError: torchaudio cannot be imported, or has other tables than the version that this was written for.
    """
    try:
        return _READERS[corpus.kind](corpus.subset)
    except (ImportError, OSError) as error:
        raise RunError(f"torchaudio cannot be imported ({error}); see 'cel doctor' and docs/install.md") from None
    except (AttributeError, LookupError) as error:
        import torchaudio

        raise RunError(
            f"torchaudio {torchaudio.__version__} does not say where {corpus.name} lies ({error}); install the version "
            "in constraints.txt"
        ) from None


def count_utterances(corpus: PublicCorpus, root: Path) -> int:
    """How many utterances torchaudio finds in an unpacked corpus.

    Raises:
        RunError: it finds none, or cannot open it.
    """
    import torchaudio.datasets as datasets

    openers: dict[Kind, Callable[[], Any]] = {
        "librispeech": lambda: datasets.LIBRISPEECH(root, url=corpus.subset),
        "libritts": lambda: datasets.LIBRITTS(root, url=corpus.subset),
        "vctk": lambda: datasets.VCTK_092(str(root)),
        "yesno": lambda: datasets.YESNO(root),
    }
    try:
        found = len(openers[corpus.kind]())
    except (RuntimeError, OSError) as error:
        raise RunError(
            f"what was unpacked is not {corpus.name}: {error}; was the right archive on the mirror?"
        ) from None
    if not found:
        raise RunError(f"what was unpacked holds no utterance of {corpus.name}; was the right archive on the mirror?")
    return found


def _of_checksums(checksums: dict[str, str], ending: str) -> list[RemoteFile]:
    url = next((url for url in checksums if url.endswith(ending)), None)
    if url is None:
        raise LookupError(f"no address that ends in {ending}")
    return [RemoteFile(url, checksums[url])]


def _librispeech(subset: str) -> list[RemoteFile]:
    from torchaudio.datasets import librispeech

    return _of_checksums(librispeech._CHECKSUMS, f"/{subset}.tar.gz")


def _libritts(subset: str) -> list[RemoteFile]:
    from torchaudio.datasets import libritts

    return _of_checksums(libritts._CHECKSUMS, f"/{subset}.tar.gz")


def _vctk(_: str) -> list[RemoteFile]:
    from torchaudio.datasets import vctk

    return _of_checksums(vctk._CHECKSUMS, ".zip")


def _yesno(_: str) -> list[RemoteFile]:
    from torchaudio.datasets import yesno

    release = yesno._RELEASE_CONFIGS["release1"]
    return [RemoteFile(release["url"], release["checksum"])]


def _voxceleb1(_: str) -> list[RemoteFile]:
    from torchaudio.datasets import voxceleb1

    return [RemoteFile(voxceleb1._VERI_TEST_URL, None), RemoteFile(voxceleb1._IDEN_SPLIT_URL, None)]


_READERS: dict[Kind, Callable[[str], list[RemoteFile]]] = {
    "librispeech": _librispeech,
    "libritts": _libritts,
    "vctk": _vctk,
    "yesno": _yesno,
    "voxceleb1": _voxceleb1,
}
