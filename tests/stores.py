"""Real stores for tests, each a process on the loopback: nginx, an S3 server, PostgreSQL, and a proxy that breaks
connections."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cel_dist.distributed import free_port

_NGINX = """
daemon off;
{user}
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
    log_format lines '$request_method $uri $status $http_range $body_bytes_sent';
    access_log {folder}/access.log lines;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    server {{ listen 127.0.0.1:{port}; root {root}; {options} }}
}}
"""


def _wait_for(port: int, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(f"nothing listens on {port}: {log.read_text()}")


@dataclass
class Nginx:
    port: int
    access_log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def downloads(self) -> list[tuple[str, int]]:
        """Name and first byte of every GET that was answered."""
        # nginx writes the line when the answer is out, a moment after the reader has it.
        time.sleep(0.2)
        lines = re.findall(r"^GET /(\S+) 20[06] (?:bytes=(\d+)-\d*|-) ", self.access_log.read_text(), re.MULTILINE)
        return [(name, int(first or 0)) for name, first in lines]


@contextmanager
def nginx(root: Path, folder: Path, options: str = "") -> Iterator[Nginx]:
    """nginx, serving the files below `root`; `folder` is for its own."""
    program = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    if program is None:
        pytest.skip("nginx is not installed; with apt: apt-get install nginx-light")
    folder.mkdir(parents=True)
    port = free_port()
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(_NGINX.format(folder=folder, root=root, port=port, user=user, options=options))
    log = folder / "error.log"
    log.touch()
    process = subprocess.Popen([program, "-c", folder / "nginx.conf", "-p", folder, "-e", log])
    try:
        _wait_for(port, process, log)
        yield Nginx(port, folder / "access.log")
    finally:
        process.terminate()
        process.wait()


@contextmanager
def plain_server(root: Path, folder: Path) -> Iterator[str]:
    """Python's own HTTP server, which knows no ranges; the URL of `root`."""
    folder.mkdir(parents=True)
    port = free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(root)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait_for(port, process, folder / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


@contextmanager
def s3(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server with an empty bucket `speech`; the URL of it. The environment points every S3 client there."""
    folder.mkdir(parents=True)
    port = free_port()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stdout=log, stderr=log)
        try:
            _wait_for(port, process, folder / "log")
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
            monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            yield "s3://speech"
        finally:
            process.terminate()
            process.wait()


@contextmanager
def postgres(user: str, password: str) -> Iterator[int]:
    """PostgreSQL with a database and a user of that name; its port."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = installed[-1] if installed else shutil.which("initdb")
    if initdb is None:
        pytest.skip("PostgreSQL is not installed; with apt: apt-get install postgresql")
    programs = Path(initdb).parent
    # It refuses to run as root, and another user cannot enter pytest's folders.
    account = {"user": "postgres"} if os.geteuid() == 0 else {}
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="postgres-") as root:
        folder = Path(root)
        (folder / "password").write_text(password)
        if account:
            for path in (folder, folder / "password"):
                shutil.chown(path, "postgres")
        options: dict[str, Any] = {"cwd": folder, **account}
        command = [initdb, "--pgdata=data", f"--username={user}", "--pwfile=password", "--auth=scram-sha-256"]
        command += ["--no-sync", "--encoding=UTF8", "--locale=C"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **options)
        # Sockets in the folder, because the system's may be another user's.
        listening = f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off"
        control = [programs / "pg_ctl", "--pgdata=data", "--wait", "--silent"]
        subprocess.run([*control, "--log=log", f"--options={listening}", "start"], check=True, **options)
        try:
            command = [programs / "createdb", "--host=127.0.0.1", f"--port={port}", f"--username={user}", user]
            subprocess.run(command, check=True, env={**os.environ, "PGPASSWORD": password})
            yield port
        finally:
            # Closing the connections that are open.
            subprocess.run([*control, "--mode=fast", "stop"], check=True, **options)


@dataclass
class Proxy:
    """A proxy in front of a server, whose next connections break.

    Attributes:
        cut_after: bytes of each answer that are let through on the next connections; then the connection is closed.
        stall_after: bytes after which a connection stays open in silence.
        faults: connections that are to be treated so.
    """

    target: int
    cut_after: int | None = None
    stall_after: int | None = None
    faults: int = 0
    broken: int = 0
    _server: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.getsockname()[1]}"

    def serve(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=[client], daemon=True).start()

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _connect(self, client: socket.socket) -> None:
        server = socket.create_connection(("127.0.0.1", self.target))
        threading.Thread(target=self._forward, args=[client, server, None], daemon=True).start()
        self._forward(server, client, self)

    def _forward(self, source: socket.socket, sink: socket.socket, breaking: "Proxy | None") -> None:
        passed = 0
        try:
            while data := source.recv(1 << 14):
                passed += len(data)
                if breaking and self._breaks(passed):
                    if self.stall_after is not None:
                        # In silence, until the other side gives up.
                        while source.recv(1 << 14):
                            pass
                    break
                sink.sendall(data)
        except OSError:
            pass
        # Closing alone would wait for the thread of the other direction.
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _breaks(self, passed: int) -> bool:
        limit = self.cut_after if self.stall_after is None else self.stall_after
        if self.faults < 1 or limit is None or passed <= limit:
            return False
        self.faults, self.broken = self.faults - 1, self.broken + 1
        return True


@contextmanager
def proxy(target: int, **breaking: int) -> Iterator[Proxy]:
    """A proxy in front of a port of this machine."""
    server = Proxy(target, **breaking)
    threading.Thread(target=server.serve, daemon=True).start()
    try:
        yield server
    finally:
        server.close()
