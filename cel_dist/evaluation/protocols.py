"""Public evaluations, from the folders in which their corpora are distributed.

Where trials, enrolments and audio lie is data, and so are the published numbers of trials; the code below only looks
for them. A protocol whose number of trials could not be verified in two public sources has none, and is not checked.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from cel_dist.errors import CelError
from cel_dist.evaluation.enrolment import Enrolment
from cel_dist.evaluation.trials import Trials

_VOXCELEB_PAGE = "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/vox1.html"


@dataclass(frozen=True)
class Protocol:
    """A list of trials that results are published on.

    All paths are relative to the root of the corpus, and tried in their order.

    Attributes:
        title: what its publishers call it.
        keys: where the trials with their labels may lie.
        audio: folders that the paths of audio in the lists may be relative to.
        num_trials: published number, which must be met; None where it could not be verified.
        enrolments: where the list of models may lie, if trials name models.
        test_folder: what the paths of test audio lack in the trials.
        family: protocols of one family have lists that are taken for each other.
        page: where it is described and downloaded.
    """

    title: str
    keys: tuple[str, ...]
    audio: tuple[str, ...]
    page: str
    num_trials: int | None = None
    enrolments: tuple[str, ...] = ()
    test_folder: str = ""
    family: str = ""


# Archives unpack to wav/; dev and test may have been put into folders of their own. E and H need both.
_VOXCELEB_AUDIO = ("wav", "dev/wav", "test/wav", "vox1_dev_wav/wav", "vox1_test_wav/wav")

# Numbers: the table of trials of PaddleSpeech's VoxCeleb recipe, which papers that report on the original and on the
# cleaned lists agree with.
_VOXCELEB_LISTS = (
    ("o", "VoxCeleb1-O", ("veri_test.txt", "veri_test2.txt"), 37_720, 37_611),
    ("e", "VoxCeleb1-E", ("list_test_all.txt", "list_test_all2.txt"), 581_480, 579_818),
    ("h", "VoxCeleb1-H", ("list_test_hard.txt", "list_test_hard2.txt"), 552_536, 550_894),
)


def _voxceleb() -> dict[str, Protocol]:
    protocols = {}
    for letter, title, names, original, cleaned in _VOXCELEB_LISTS:
        name = f"voxceleb1-{letter}"
        protocol = Protocol(
            title,
            tuple(folder + list_name for folder in ("", "meta/") for list_name in names),
            _VOXCELEB_AUDIO,
            _VOXCELEB_PAGE,
            original,
            family=name,
        )
        protocols[name] = protocol
        protocols[f"{name}-cleaned"] = replace(protocol, title=f"{title} (cleaned)", num_trials=cleaned)
    return protocols


def _sitw(subset: str, enrol: str, test: str) -> Protocol:
    return Protocol(
        f"SITW {subset} {enrol}-{test}",
        keys=(f"{subset}/keys/{enrol}-{test}.lst",),
        audio=(subset,),
        page="http://www.speech.sri.com/projects/sitw/",
        enrolments=(f"{subset}/lists/enroll-{enrol}.lst",),
    )


_VOICES_PAGE = "https://iqtlabs.github.io/voices/"
_VOICES_DEV = "Development_Data/Speaker_Recognition"
_VOICES_EVAL = ("Speaker_Recognition", "Evaluation_Data/Speaker_Recognition")

PROTOCOLS: dict[str, Protocol] = {
    **_voxceleb(),
    "voices2019-dev": Protocol(
        "VOiCES from a Distance 2019, development set",
        keys=(f"{_VOICES_DEV}/sid_dev_lists_and_keys/dev-trial-keys.lst",),
        audio=(_VOICES_DEV,),
        page=_VOICES_PAGE,
        enrolments=(f"{_VOICES_DEV}/sid_dev_lists_and_keys/dev-enroll.lst",),
    ),
    "voices2019-eval": Protocol(
        "VOiCES from a Distance 2019, evaluation set",
        keys=("VOiCES_challenge_2019_post-eval-release/VOiCES_challenge_2019_eval.SID.trial-keys.lst",),
        audio=_VOICES_EVAL,
        page=_VOICES_PAGE,
        enrolments=tuple(f"{folder}/sid_eval_lists/eval-enroll.lst" for folder in _VOICES_EVAL),
        # Its keys name files, its enrolments files in their folder.
        test_folder="sid_eval/",
    ),
    **{
        f"sitw-{subset}-{enrol}-{test}": _sitw(subset, enrol, test)
        for subset in ("dev", "eval")
        for enrol in ("core", "assist")
        for test in ("core", "multi")
    },
}
"""Protocols by their names."""


def find_protocol(name: str) -> Protocol:
    """The protocol of this name, in any case.

    Raises:
        CelError: there is none.
    """
    protocol = PROTOCOLS.get(name.lower())
    if protocol is None:
        raise CelError(f"there is no protocol '{name}'; the protocols are {', '.join(PROTOCOLS)}")
    return protocol


def read_protocol(name: str, root: str | os.PathLike[str], trials: str | os.PathLike[str] | None = None) -> Trials:
    """The trials of a protocol, with the places of their audio below `root`.

    Args:
        name: see `PROTOCOLS`.
        root: folder of the corpus as it is distributed, or one within it that its lists and audio lie below.
        trials: its list of trials, where that does not lie below `root`.

    Raises:
        CelError: there is no such protocol; its lists or audio are not below `root`; the list is that of another
            protocol, by its number of trials, or that of none; or a list is at fault.
    """
    protocol = find_protocol(name)
    folder = Path(root).absolute()
    if not folder.is_dir():
        raise CelError(f"there is no folder {root}; give the one that {protocol.title} was unpacked into")
    keys = _right_list(name.lower(), protocol, [Path(trials)] if trials else _there(folder, protocol.keys), root)
    enrolment = None
    if protocol.enrolments:
        lists = _there(folder, protocol.enrolments)
        if not lists:
            raise _missing("list of enrolments", protocol, protocol.enrolments, root)
        enrolment = Enrolment.read(lists[0])
    return _placed(Trials.read(keys, enrolment=enrolment, test_folder=protocol.test_folder), protocol, folder, root)


def _right_list(name: str, protocol: Protocol, lists: list[Path], root: str | os.PathLike[str]) -> Path:
    """The list with the published number of trials: original and cleaned ones go by each other's names."""
    if not lists:
        raise _missing("list of trials", protocol, protocol.keys, root)
    if protocol.num_trials is None:
        return lists[0]
    numbers = [_num_lines(path) for path in lists]
    if protocol.num_trials not in numbers:
        raise CelError(_other_number(name, protocol, lists[0], numbers[0]))
    return lists[numbers.index(protocol.num_trials)]


def _num_lines(path: Path) -> int:
    try:
        with open(path, "rb") as file:
            return sum(1 for line in file if line.strip())
    except OSError as error:
        raise CelError(f"cannot read the trials file {path}: {error.strerror}; check the path") from None


def _other_number(name: str, protocol: Protocol, path: Path, number: int) -> str:
    text = f"{path} holds {number} trials, but {name} has {protocol.num_trials}"
    for other, candidate in PROTOCOLS.items():
        if candidate.num_trials == number:
            return (
                f"{text}: it is the list of {other}; give --protocol {other}, or get the list of {name} from "
                f"{protocol.page}"
            )
    siblings = [
        f"{other} {candidate.num_trials}"
        for other, candidate in PROTOCOLS.items()
        if candidate.family == protocol.family and candidate is not protocol
    ]
    return (
        f"{text} ({', '.join(siblings)}); get the whole list from {protocol.page}, or score a part of it as a list of "
        "your own, with --trials and without --protocol"
    )


def _there(folder: Path, places: Iterable[str]) -> list[Path]:
    """Those of `places` that exist, also where `folder` is within what they are relative to."""
    found = []
    for place in places:
        parts = PurePosixPath(place).parts
        for depth in range(len(parts) + 1):
            if folder.parts[len(folder.parts) - depth :] == parts[:depth]:
                path = folder.joinpath(*parts[depth:])
                if path.exists():
                    found.append(path)
                    break
    return found


def _missing(what: str, protocol: Protocol, places: Iterable[str], root: str | os.PathLike[str]) -> CelError:
    return CelError(
        f"there is no {what} of {protocol.title} below {root}, no {' or '.join(places)}; give the folder that the "
        f"corpus was unpacked into ({protocol.page})"
    )


def _placed(trials: Trials, protocol: Protocol, folder: Path, root: str | os.PathLike[str]) -> Trials:
    """The same trials with paths relative to `folder`."""
    bases = _there(folder, protocol.audio)
    base_of: dict[str, str] = {}
    sources = {}
    for name, excerpts in zip(trials.files, trials.recordings, strict=True):
        placed = []
        for excerpt in excerpts:
            first = excerpt.path.partition("/")[0]
            if first not in base_of:
                base = next((base for base in bases if (base / first).exists()), None)
                if base is None:
                    raise CelError(
                        f"there is no {first} of {protocol.title} below {root}, in none of "
                        f"{', '.join(protocol.audio)}; unpack all audio of the corpus there ({protocol.page})"
                    )
                base_of[first] = os.path.relpath(base, folder)
            placed.append(excerpt.below(base_of[first]))
        sources[name] = tuple(placed)
    return replace(trials, sources=sources)
