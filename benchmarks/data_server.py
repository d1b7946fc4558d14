"""An HTTP server for `benchmarks/data.py`: nginx where it is installed, else Python's own, which knows no ranges."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

START_SECONDS = 60
NGINX = """
daemon off;
{user}
pid {folder}/nginx.pid;
events {{ worker_connections 64; }}
http {{
    access_log off;
    sendfile on;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


class Server(NamedTuple):
    """Where it answers, and what it is."""

    url: str
    name: str


@contextmanager
def serving(root: Path, folder: Path) -> Iterator[Server]:
    """Serve the files below `root` on the loopback; `folder` is made for the server's own files."""
    folder.mkdir(parents=True)
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port = int(probe.getsockname()[1])
    command, name = _nginx(root, folder, port) or _python(root, port)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait_for(port, process, folder / "log")
        yield Server(f"http://127.0.0.1:{port}", name)
    finally:
        process.terminate()
        process.wait()


def _nginx(root: Path, folder: Path, port: int) -> tuple[list[str], str] | None:
    program = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    if program is None:
        return None
    # Its workers would else be another user's, who may not read a temporary folder.
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, root=root, port=port, user=user))
    stated = subprocess.run([program, "-v"], capture_output=True, text=True, check=True).stderr
    command = [program, "-c", str(folder / "nginx.conf"), "-p", str(folder), "-e", str(folder / "error.log")]
    return command, "nginx " + stated.partition("nginx/")[2].split()[0]


def _python(root: Path, port: int) -> tuple[list[str], str]:
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(root)]
    return command, "Python's http.server, which knows no ranges"


def _wait_for(port: int, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise SystemExit(f"error: the HTTP server does not answer on port {port}: {log.read_text()}")
