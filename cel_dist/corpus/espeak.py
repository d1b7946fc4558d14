"""Text to speech through the espeak-ng library that the wheel `espeakng_loader` ships.

`speak` is a pure function of its arguments. The library is not: flutter, breath and the Klatt synthesiser keep counters
in static variables, which outlive even `espeak_Terminate`. Unloading the library between two calls resets all of them
and costs about five milliseconds.
"""

import _ctypes
import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from cel_dist.errors import CelError, RunError

SAMPLE_RATE_HZ = 22_050

# Values of the C enumerations in espeak-ng's public header `speak_lib.h`.
_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000
_PARAMETER_RATE = 1
_PARAMETER_PITCH = 3
_PARAMETER_PITCH_RANGE = 4
_POSITION_CHARACTER = 1
_CHARACTERS_UTF8 = 1

_SYNTH_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
# The library lives once in a process, whatever the number of threads.
_lock = threading.Lock()


def check_available() -> None:
    """Raise CelError, naming the package to install, if the library is not there."""
    _paths()


def speak(text: str, *, voice: str, rate_wpm: int, pitch: int, pitch_range: int) -> NDArray[np.int16]:
    """Speak a text.

    Args:
        text: plain text.
        voice: language and variant, for example `en-gb-scotland+f3`.
        rate_wpm: speaking rate in words per minute, 80 to 450.
        pitch: 0 to 99; 50 is the voice's own pitch.
        pitch_range: 0 (monotone) to 99; 50 is the voice's own range.

    Returns:
        [T] int16 at `SAMPLE_RATE_HZ`.

    Raises:
        CelError: `espeakng_loader` is not installed.
        RunError: the library cannot be loaded, does not know the voice, or fails.
    """
    chunks: list[bytes] = []

    def collect(samples: int | None, count: int, _events: int | None) -> int:
        if samples and count > 0:
            chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    with _lock, _loaded_library() as library:
        callback = _SYNTH_CALLBACK(collect)
        library.espeak_SetSynthCallback(callback)
        _require(library.espeak_SetVoiceByName(voice.encode()), f"does not know the voice '{voice}'")
        settings = ((_PARAMETER_RATE, rate_wpm), (_PARAMETER_PITCH, pitch), (_PARAMETER_PITCH_RANGE, pitch_range))
        for parameter, value in settings:
            _require(library.espeak_SetParameter(parameter, value, 0), f"refuses parameter {parameter} = {value}")
        encoded = text.encode()
        status = library.espeak_Synth(
            encoded, ctypes.c_size_t(len(encoded) + 1), 0, _POSITION_CHARACTER, 0, _CHARACTERS_UTF8, None, None
        )
        _require(status, f"cannot speak with the voice '{voice}'")
    return np.frombuffer(b"".join(chunks), np.int16)


def _paths() -> tuple[str, str]:
    try:
        import espeakng_loader
    except ImportError:
        raise CelError(
            "the embedded corpus needs the package espeakng_loader, which is not installed; "
            "run pip install 'cel_dist[corpus]'"
        ) from None
    return str(espeakng_loader.get_library_path()), str(espeakng_loader.get_data_path())


@contextmanager
def _loaded_library() -> Iterator[ctypes.CDLL]:
    path, data = _paths()
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise RunError(
            f"cannot load {path}: {error}; reinstall it with pip install --force-reinstall espeakng_loader"
        ) from None
    try:
        if library.espeak_Initialize(_OUTPUT_SYNCHRONOUS, 0, data.encode(), _INITIALIZE_DONT_EXIT) != SAMPLE_RATE_HZ:
            raise RunError(f"espeak-ng cannot start with the data in {data}; reinstall espeakng_loader")
        # Both generators are in use: the library's own, which it seeds from the clock, and the C library's.
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        ctypes.CDLL(None).srand(1)
        yield library
        library.espeak_Terminate()
    finally:
        _ctypes.dlclose(library._handle)
    if _is_resident(path):
        raise RunError(
            f"{path} stays in memory when it is closed, so speech would depend on what was spoken before; "
            "use a system with glibc, and load this library nowhere else in the process"
        )


def _is_resident(path: str) -> bool:
    try:
        handle = _ctypes.dlopen(path, os.RTLD_NOW | os.RTLD_NOLOAD)
    except OSError:
        return False
    _ctypes.dlclose(handle)
    return True


def _require(status: int, problem: str) -> None:
    if status != 0:
        raise RunError(f"espeak-ng {problem} (status {status}); reinstall espeakng_loader")
