"""Packages with native parts, each tried on something small."""

import io
from collections.abc import Callable
from functools import partial
from importlib import metadata
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cel_dist.doctor.check import Check, Checks, tried
from cel_dist.doctor.machine import program
from cel_dist.imports import hidden

if TYPE_CHECKING:
    from cel_dist.doctor.examine import Settings

_RATE_HZ = 16_000
# What libsndfile writes and reads -> whether training needs it: shards are WAV or FLAC.
_FORMATS = {"WAV": True, "FLAC": True, "OGG": False, "MP3": False}
_CORPUS = "run pip install 'cel_dist[corpus]'; or give 'cel demo' audio of your own (--corpus DIR)"


def _reinstall(package: str) -> str:
    return f"reinstall it: pip install --force-reinstall {package}"


def audio(settings: "Settings") -> Checks:
    """What audio is read and resampled by."""
    yield tried("libsndfile", _libsndfile, _reinstall("soundfile"))
    yield tried("soxr", _soxr, _reinstall("soxr"))
    yield program("ffmpeg", ["ffmpeg", "-version"], "install ffmpeg to read M4A, AAC, MP4, WMA, WebM and MKA")


def _libsndfile() -> Check:
    import numpy as np
    import soundfile

    wave = np.sin(2 * np.pi * 440 * np.arange(_RATE_HZ) / _RATE_HZ).astype(np.float32) * 0.5
    failed = []
    for name in _FORMATS:
        try:
            buffer = io.BytesIO()
            soundfile.write(buffer, wave, _RATE_HZ, format=name)
            buffer.seek(0)
            read, rate_hz = soundfile.read(buffer, dtype="float32")
            # MP3 adds some samples at both ends.
            if rate_hz != _RATE_HZ or len(read) < _RATE_HZ or not 0.4 < float(abs(read).max()) < 0.6:
                failed.append(f"{name} comes back changed")
        except (soundfile.SoundFileError, OSError, ValueError, TypeError) as error:
            failed.append(f"{name}: {getattr(error, 'error_string', None) or error}")
    found = f"soundfile {soundfile.__version__}, {soundfile.__libsndfile_version__}"
    if not failed:
        return Check("libsndfile", "ok", f"{found}: writes and reads {', '.join(_FORMATS)}")
    needed = any(text.startswith(name) for text in failed for name, is_needed in _FORMATS.items() if is_needed)
    remedy = f"{_reinstall('soundfile')}, whose wheel brings a libsndfile that knows all of them"
    return Check("libsndfile", "fault" if needed else "note", f"{found}: {'; '.join(failed)}", remedy)


def _soxr() -> Check:
    import numpy as np
    import soxr

    tone = np.sin(2 * np.pi * 440 * np.arange(44_100) / 44_100).astype(np.float32)
    resampled = soxr.resample(tone, 44_100, _RATE_HZ, quality="HQ")
    loudness = float(np.sqrt(np.square(resampled[1000:-1000]).mean()))
    if abs(len(resampled) - _RATE_HZ) > 1 or abs(loudness - 0.5**0.5) > 1e-2:
        return Check("soxr", "fault", f"{soxr.__version__}: a resampled tone is wrong", _reinstall("soxr"))
    return Check("soxr", "ok", f"{soxr.__version__}: resamples 44.1 kHz to 16 kHz")


def deepspeed(settings: "Settings") -> Checks:
    """The engine and its launcher, which is imported as `cel train` starts it."""
    yield tried("deepspeed", _deepspeed, "reinstall it with 'make install', which builds it against this torch")


def _deepspeed() -> Check:
    import os

    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    # As the ranks import it.
    with hidden("mlflow"):
        import deepspeed
        from deepspeed.launcher import launch, runner
    has_all = callable(deepspeed.initialize) and callable(launch.main) and callable(runner.main)
    if not has_all:
        raise ImportError("parts of it are missing")
    return Check("deepspeed", "ok", f"{deepspeed.__version__}, with its launcher")


def torchaudio(settings: "Settings") -> Checks:
    """The spectra of the front end; without, the package's own are used."""
    remedy = "see 'torchaudio on a CPU' in docs/install.md; only training with augment.speeds needs it"
    yield tried("torchaudio", partial(_imported, "torchaudio", _spectrum), remedy, "note")


def _spectrum(module: ModuleType) -> None:
    import torch

    spectrum = module.transforms.Spectrogram(n_fft=512, hop_length=160)(torch.ones(1, 1600))
    if spectrum.shape[1] != 257:
        raise ImportError("a spectrum has the wrong number of bins")


def webdataset(settings: "Settings") -> Checks:
    """The stream of samples: a pipeline over two names."""
    yield tried("webdataset", partial(_imported, "webdataset", _pipeline), _reinstall("webdataset"))


def _pipeline(module: Any) -> None:
    read = [shard["url"] for shard in module.DataPipeline(module.SimpleShardList(["a.tar", "b.tar"]))]
    if read != ["a.tar", "b.tar"]:
        raise ImportError("a pipeline over two names gives something else")


def _imported(name: str, try_it: Callable[[ModuleType], None]) -> Check:
    import importlib

    try_it(importlib.import_module(name))
    return Check(name, "ok", f"{metadata.version(name)}: imports and works")


def corpus(settings: "Settings") -> Checks:
    """The voice of the embedded corpus says a word."""
    yield tried("espeak-ng", _espeak, _CORPUS)


def _espeak() -> Check:
    from cel_dist.corpus.espeak import speak
    from cel_dist.errors import CelError, RunError

    try:
        spoken = speak("doctor", voice="en-us", rate_wpm=160, pitch=50, pitch_range=50)
    except (CelError, RunError) as error:
        return Check("espeak-ng", "fault", f"'cel demo' cannot make its corpus: {error}", _CORPUS)
    if len(spoken) == 0 or not spoken.any():
        return Check("espeak-ng", "fault", "it speaks, but nothing is to be heard", _CORPUS)
    return Check("espeak-ng", "ok", "speaks, so that 'cel demo' can make its corpus")


def ray(settings: "Settings") -> Checks:
    """Whether sweeps and preparation on a cluster can begin; no cluster is started."""
    remedy = "for sweeps and 'cel prepare --ray': pip install 'cel_dist[ray,sweep]'"
    try:
        metadata.version("ray")
    except metadata.PackageNotFoundError:
        yield Check("ray", "note", "not installed", remedy)
        return
    yield tried("ray", partial(_imported, "ray", lambda module: None), remedy, "note")
