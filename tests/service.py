"""A real `cel serve` process."""

import http.client
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import numpy as np
import torch
from audio_tree import voice

from cel_dist.data.audio import encode_audio
from cel_dist.encoders import build_encoder
from cel_dist.model import Calibration, EncoderDescription, ModelDescription, SpeakerModel


def small_model(seed: int = 0) -> SpeakerModel:
    """A model with a threshold and a calibration; its encoder has learned nothing."""
    torch.manual_seed(seed)
    encoder = EncoderDescription(name="fast_resnet34", embedding_dim=32)
    model = SpeakerModel(build_encoder("fast_resnet34", 32), ModelDescription(encoder=encoder))
    return model.calibrate(-0.05, Calibration(slope=20.0, offset=1.0))


def speech(speaker: int, seconds: float = 1.5, seed: int = 0) -> np.ndarray:
    """Something that sounds of a speaker, int16 [T]."""
    wave = voice(np.random.default_rng([speaker, seed]), 90 + 60 * speaker, seconds)
    return np.clip(wave * 20_000, -32_000, 32_000).astype(np.int16)


def wav(speaker: int, seconds: float = 1.5, seed: int = 0) -> bytes:
    """The same as a file."""
    return encode_audio(speech(speaker, seconds, seed), "wav")


class Service:
    """`cel serve` on a free port, with a model of `small_model`.

    Attributes:
        host, port, url: where it listens.
        store: its store.
        announced: the line that it prints when it is there.
    """

    def __init__(self, folder: Path, *options: object, model: SpeakerModel | None = None) -> None:
        self.store, self.log = folder / "people.db", folder / "log.txt"
        self.folder = folder / "cwd"
        self.folder.mkdir(parents=True)
        (model or small_model()).save(folder / "model")
        command = [sys.executable, "-m", "cel_dist", "serve", "--model", str(folder / "model"), "--json"]
        command += ["--store", str(self.store), "--port", "0", *map(str, options)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.folder)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, cwd=self.folder, env=environment
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        self.announced = json.loads(line)
        self.url = self.announced["url"]
        address = urlsplit(self.url)
        assert address.hostname
        assert address.port
        self.host, self.port = address.hostname, address.port

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        timeout: float = 60,
        **query: object,
    ) -> tuple[int, Any]:
        """Status and body of an answer, the latter decoded if it is JSON."""
        status, _, content = self.answer(method, path, body, headers, timeout, **query)
        return status, content

    def answer(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        timeout: float = 60,
        **query: object,
    ) -> tuple[int, dict[str, str], Any]:
        """The same with the headers, whose names are in lower case."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            connection.request(method, f"{path}?{urlencode(query)}" if query else path, body, headers or {})
            response = connection.getresponse()
            content = response.read()
            names = {name.lower(): value for name, value in response.getheaders()}
            if names.get("content-type") == "application/json":
                return response.status, names, json.loads(content)
            return response.status, names, content.decode()
        finally:
            connection.close()

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection((self.host, self.port), timeout=30)

    def memory(self, kind: str) -> int:
        """Bytes of main memory: `VmRSS`, now, or `VmHWM`, at most since `forget_peak`."""
        [line] = [line for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines() if kind in line]
        return int(line.split()[1]) * 1024

    def forget_peak(self) -> None:
        """Begin `VmHWM` anew."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def written(self) -> int:
        """Bytes that the process has written to files and pipes; what it sent over the network does not count."""
        counts = dict(line.split(": ") for line in Path(f"/proc/{self.process.pid}/io").read_text().splitlines())
        return int(counts["wchar"])

    def close(self) -> None:
        """End the process whatever it does."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
