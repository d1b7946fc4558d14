"""Public corpora as they are distributed: what to download, how it lies on disk, which part is for training.

Published numbers are those of the corpus' own page or paper, named with each recipe. None: no number that could be
verified, so that it is not checked.
"""

import re
from dataclasses import dataclass
from typing import Literal

from cel_dist.data.bank import Category
from cel_dist.errors import CelError

Use = Literal["train", "held out"] | Category


@dataclass(frozen=True)
class Part:
    """One part of a corpus, by the paths of its files.

    Attributes:
        name: what its publishers call it.
        pattern: regular expression, searched in the absolute POSIX path of a file; the group `speaker` is who speaks. A
            file belongs to the first part of the recipe whose pattern is found.
        use: `train`: goes into shards; `held out`: it is for testing; or the category of a bank.
        speakers: published number of speakers.
        files: published number of files.
        optional: whether it is a download of its own, which may be left out.
    """

    name: str
    pattern: str
    use: Use
    speakers: int | None = None
    files: int | None = None
    optional: bool = False


@dataclass(frozen=True)
class Recipe:
    """A public corpus.

    Attributes:
        title: its name.
        page: where its publishers describe it and its downloads.
        download: the archives, in words.
        layout: where the archives are to be unpacked and what comes out, in words.
        parts: see `Part`.
    """

    title: str
    page: str
    download: tuple[str, ...]
    layout: tuple[str, ...]
    parts: tuple[Part, ...]

    @property
    def is_bank(self) -> bool:
        """Whether it is of noises and rooms, for a bank, not of speech, for shards."""
        return all(part.use not in ("train", "held out") for part in self.parts)


# VoxCeleb1-O is made of the 40 speakers whose names begin with E. Names are in alphabetical order, so that these have
# consecutive numbers.
_VOXCELEB1_TEST = r"id10(?:2[7-9]\d|30\d)"

# (name, speakers, utterances) as in Panayotov et al. 2015, table 1, and the openslr.org archives.
_LIBRISPEECH = (
    ("train-clean-100", 251, 28_539),
    ("train-clean-360", 921, 104_014),
    ("train-other-500", 1166, 148_688),
    ("dev-clean", 40, 2703),
    ("dev-other", 33, 2864),
    ("test-clean", 40, 2620),
    ("test-other", 33, 2939),
)

# Name, use, and the recordings at a distance of the devkit.
_VOICES_SPLITS: tuple[tuple[str, Use, int], ...] = (("train", "train", 12_800), ("test", "held out", 6400))
_VOICES_DISTANT = r"distant-16k/speech/{split}/rm\d/[a-z]+/(?P<speaker>sp\d+)/Lab41-SRI-VOiCES-[^/]+\.wav$"
_VOICES_SOURCE = r"source-16k/{split}/(?P<speaker>sp\d+)/Lab41-SRI-VOiCES-[^/]+\.wav$"

RECIPES: dict[str, Recipe] = {
    "voxceleb1": Recipe(
        title="VoxCeleb1",
        page="https://www.robots.ox.ac.uk/~vgg/data/voxceleb/vox1.html",
        download=(
            "vox1_dev_wav_partaa to vox1_dev_wav_partad, joined in this order: vox1_dev_wav.zip",
            "vox1_test_wav.zip (only to test)",
        ),
        layout=(
            "Unpack into one folder or two: wav/id10001/VIDEO/00001.wav",
            "The speakers id10270 to id10309, whose names begin with E, are the test set O wherever they lie.",
        ),
        parts=(
            # Nagrani et al. 2017 and the page above, verification split.
            Part(
                "test",
                rf"/wav/(?P<speaker>{_VOXCELEB1_TEST})/[^/]+/\d+\.(?:wav|flac)$",
                "held out",
                speakers=40,
                files=4874,
                optional=True,
            ),
            Part("dev", r"/wav/(?P<speaker>id1\d{4})/[^/]+/\d+\.(?:wav|flac)$", "train", 1211, 148_642),
        ),
    ),
    "voxceleb2": Recipe(
        title="VoxCeleb2",
        page="https://www.robots.ox.ac.uk/~vgg/data/voxceleb/vox2.html",
        download=(
            "vox2_dev_aac_partaa to vox2_dev_aac_partah, joined in this order: vox2_dev_aac.zip",
            "vox2_test_aac.zip (only to test)",
        ),
        layout=(
            "Unpack into one folder: dev/aac/id00012/VIDEO/00001.m4a, and aac/id00017/VIDEO/00001.m4a for the test set",
            "or test/aac/... The same as wav is taken, too (dev/wav/...). M4A needs ffmpeg.",
        ),
        parts=(
            # Chung et al. 2018, table 2.
            Part(
                "dev", r"/dev/(?:aac|wav)/(?P<speaker>id\d{5})/[^/]+/\d+\.(?:m4a|wav|flac)$", "train", 5994, 1_092_009
            ),
            Part(
                "test",
                r"/(?:aac|wav)/(?P<speaker>id\d{5})/[^/]+/\d+\.(?:m4a|wav|flac)$",
                "held out",
                speakers=118,
                files=36_237,
                optional=True,
            ),
        ),
    ),
    "librispeech": Recipe(
        title="LibriSpeech",
        page="https://www.openslr.org/12/",
        download=tuple(f"{name}.tar.gz" for name, _, _ in _LIBRISPEECH),
        layout=(
            "Unpack into one folder: LibriSpeech/train-clean-100/103/1240/103-1240-0000.flac",
            "Any of the train subsets will do.",
        ),
        parts=tuple(
            Part(
                name,
                rf"/{name}/(?P<speaker>\d+)/\d+/\d+-\d+-\d+\.flac$",
                "train" if name.startswith("train") else "held out",
                speakers=speakers,
                files=utterances,
                optional=True,
            )
            for name, speakers, utterances in _LIBRISPEECH
        ),
    ),
    "voices": Recipe(
        title="VOiCES",
        page="https://iqtlabs.github.io/voices/",
        download=(
            "VOiCES_devkit.tar.gz or VOiCES_release.tar.gz, from the AWS registry of open data (lab41-sri-voices)",
        ),
        layout=(
            "Unpack: VOiCES_devkit/source-16k/train/sp0307/Lab41-SRI-VOiCES-src-sp0307-ch127535-sg0042.wav",
            "and VOiCES_devkit/distant-16k/speech/train/rm1/babb/sp0307/Lab41-SRI-VOiCES-rm1-babb-sp0307-....wav",
            "Room responses and distractors alone are left out.",
        ),
        parts=(
            *(
                Part(
                    f"devkit {split}",
                    rf"/VOiCES_devkit/{_VOICES_DISTANT.format(split=split)}",
                    use,
                    files=files,
                    optional=True,
                )
                # Speakers, and all numbers of the release, could not be verified.
                for split, use, files in _VOICES_SPLITS
            ),
            *(
                Part(f"{kind} {split}", rf"/{pattern.format(split=split)}", use, optional=True)
                for kind, pattern in (("release", _VOICES_DISTANT), ("source", _VOICES_SOURCE))
                for split, use, _ in _VOICES_SPLITS
            ),
        ),
    ),
    "musan": Recipe(
        title="MUSAN",
        page="https://www.openslr.org/17/",
        download=("musan.tar.gz",),
        layout=("Unpack: musan/noise/free-sound/noise-free-sound-0000.wav, musan/speech/..., musan/music/...",),
        parts=(
            # Snyder, Chen and Povey 2015.
            Part("noise", r"/noise/[^/]+/noise-[^/]+\.wav$", "noise", files=930),
            Part("speech", r"/speech/[^/]+/speech-[^/]+\.wav$", "speech", files=426),
            Part("music", r"/music/[^/]+/music-[^/]+\.wav$", "music", files=660),
        ),
    ),
    "rirs_noises": Recipe(
        title="RIRS_NOISES",
        page="https://www.openslr.org/28/",
        download=("rirs_noises.zip",),
        layout=(
            "Unpack: RIRS_NOISES/simulated_rirs/smallroom/Room001/Room001-00001.wav (mediumroom, largeroom),",
            "RIRS_NOISES/real_rirs_isotropic_noises/*.wav and RIRS_NOISES/pointsource_noises/*.wav",
        ),
        parts=(
            # Ko et al. 2017: 200 rooms of each size with 100 responses each; 843 of MUSAN's noises.
            *(
                Part(room, rf"/simulated_rirs/{room}/Room\d+/Room\d+-\d+\.wav$", "rir", files=20_000)
                for room in ("smallroom", "mediumroom", "largeroom")
            ),
            Part("isotropic noises", r"/real_rirs_isotropic_noises/[^/]*_noise_[^/]*\.wav$", "noise"),
            Part("real rirs", r"/real_rirs_isotropic_noises/[^/]+\.wav$", "rir"),
            Part("pointsource noises", r"/pointsource_noises/[^/]+\.wav$", "noise", files=843),
        ),
    ),
}


def find_recipe(name: str) -> Recipe:
    """The recipe of this name, in any case.

    Raises:
        CelError: there is none.
    """
    recipe = RECIPES.get(re.sub(r"[- ]", "_", name.lower()))
    if recipe is None:
        raise CelError(f"there is no recipe '{name}'; the recipes are {', '.join(RECIPES)}")
    return recipe
