"""Files that are small and decode to hours."""

import struct
from itertools import count

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
