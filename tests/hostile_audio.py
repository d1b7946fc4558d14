"""Recordings that nobody should send: small ones that decode to hours, and what is none."""

import io
import struct
import sys
import zipfile
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import soundfile
from service import speech, wav

_BLOCK = 65_535


def flac_bomb(seconds: float, rate_hz: int = 16_000) -> bytes:
    """A valid FLAC, mono and 16-bit, of constant blocks: 14 bytes for four seconds at 16 kHz."""
    blocks = round(seconds * rate_hz / _BLOCK)
    rate_channels_bits_total = rate_hz << 44 | 15 << 36 | blocks * _BLOCK
    streaminfo = struct.pack(">HH6xQ16x", _BLOCK, _BLOCK, rate_channels_bits_total)
    frames = bytearray(b"fLaC" + b"\x80" + len(streaminfo).to_bytes(3, "big") + streaminfo)
    for number in range(blocks):
        # Sync and fixed block size; the block size follows, the rate is in the beginning; mono, 16 bits.
        header = b"\xff\xf8\x70\x08" + _coded(number) + (_BLOCK - 1).to_bytes(2, "big")
        frame = header + bytes([_crc(header, 8, 0x07)]) + b"\x00" + struct.pack(">h", 1000 if number % 2 else -1000)
        frames += frame + _crc(frame, 16, 0x8005).to_bytes(2, "big")
    return bytes(frames)


def _coded(number: int) -> bytes:
    """A number as UTF-8 codes it, beyond what Unicode has."""
    if number < 0x80:
        return bytes([number])
    size = next(n for n in count(2) if number < 1 << (5 * n + 1))
    tail = [0x80 | number >> 6 * place & 0x3F for place in reversed(range(size - 1))]
    return bytes([(0xFF00 >> size & 0xFF) | number >> 6 * (size - 1), *tail])


def _crc(data: bytes, bits: int, polynomial: int) -> int:
    rest = 0
    for byte in data:
        rest ^= byte << bits - 8
        for _ in range(8):
            rest = (rest << 1 ^ (polynomial if rest >> bits - 1 & 1 else 0)) & (1 << bits) - 1
    return rest


def archive() -> bytes:
    """A zip of 20 MB of zeros."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("voice.flac", bytes(20 << 20))
    return file.getvalue()


def in_float(values: np.ndarray, rate_hz: int = 16_000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, values, rate_hz, format="WAV", subtype="FLOAT")
    return file.getvalue()


def flac() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, speech(0, 3.0), 16_000, format="FLAC")
    return file.getvalue()


def boasting() -> bytes:
    """A WAV whose header says that it has 2 GB."""
    data = bytearray(wav(0))
    data[4:8] = data[40:44] = (0x7FFF_FF00).to_bytes(4, "little")
    return bytes(data)


def patched(place: int, value: int, size: int) -> bytes:
    data = bytearray(wav(0))
    data[place : place + size] = value.to_bytes(size, "little")
    return bytes(data)


def hostile_files(max_bytes: int, max_seconds: int) -> dict[str, tuple[Callable[[], bytes], set[int]]]:
    """By name, what makes a file that nobody should send, and the statuses that a service may answer with."""
    return {
        "nothing": (lambda: b"", {400}),
        "text": (lambda: b"hello", {415}),
        "JSON": (lambda: b'{"path": "/etc/passwd"}', {415}),
        "a picture": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(5000), {415}),
        "a program": (lambda: Path(sys.executable).read_bytes()[:max_bytes], {415}),
        "a zip of 20 MB, called .flac": (archive, {415}),
        "a FLAC that decodes to ten hours": (lambda: flac_bomb(36_000), {413}),
        "a FLAC of five minutes in 655 kHz": (lambda: flac_bomb(300, 655_350), {413}),
        "half a FLAC": (lambda: flac()[: len(flac()) // 2], {200, 422}),
        "the head of a FLAC": (lambda: flac()[:42], {422}),
        "the head of a WAV": (lambda: wav(0)[:44], {422}),
        "half the head of a WAV": (lambda: wav(0)[:20], {422}),
        "half a WAV": (lambda: wav(0)[: len(wav(0)) // 2], {200}),
        "a WAV that says it has 2 GB": (boasting, {200}),
        "a WAV at 1 Hz": (lambda: patched(24, 1, 4), {422}),
        "seven minutes of WAV at 1 kHz": (lambda: in_float(np.full(440_000, 0.1, np.float32), 1000), {413}),
        "a WAV of 60 000 channels": (lambda: patched(22, 60_000, 2), {422}),
        "silence": (lambda: in_float(np.zeros(16_000)), {422}),
        "a moment": (lambda: wav(0, 0.01), {422}),
        "not a number": (lambda: in_float(np.full(16_000, np.nan)), {422}),
        "noise called MP3": (lambda: b"ID3" + np.random.default_rng(0).bytes(500_000), {200, 422}),
        "noise called Ogg": (lambda: b"OggS" + np.random.default_rng(0).bytes(500_000), {422}),
        "too long": (lambda: wav(0, max_seconds + 1), {413}),
        "too large": (lambda: bytes(max_bytes + 1), {413}),
    }
