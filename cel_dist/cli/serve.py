"""`cel serve`: enrolled people over HTTP, with a page for the browser."""

import importlib.util
import os
import sys
from typing import Annotated

import typer

from cel_dist.cli.app import JsonOption, app, emit
from cel_dist.cli.evaluate import ModelOption
from cel_dist.cli.speakers import StoreOption
from cel_dist.errors import CelError

_TOKEN_VARIABLE = "CEL_SERVE_TOKEN"
_PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")


@app.command(epilog="Example: cel serve --model models:/cel@champion --store people.db --port 8000")
def serve(
    model: ModelOption,
    store: StoreOption,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes one that is free.", min=0, max=65535)] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar=_TOKEN_VARIABLE,
            help="That clients must send. Other users of this machine see command lines: better set the variable.",
        ),
    ] = None,
    max_seconds: Annotated[float, typer.Option(help="Longest recording.")] = 60.0,
    max_bytes: Annotated[int, typer.Option(help="Largest body of a request.")] = 16 << 20,
    rate: Annotated[
        float, typer.Option(help="Requests a minute that one client may make, as many at once; 0 for any number.")
    ] = 60.0,
    queue: Annotated[
        int, typer.Option(help="Requests with audio that may be received, wait or be worked on at one time.")
    ] = 8,
    read_seconds: Annotated[
        float,
        typer.Option(help="Time that a client has for the head of a request, for its body, and to take the answer."),
    ] = 20.0,
    max_recordings: Annotated[int, typer.Option(help="Recordings that the store may hold.")] = 10_000,
    max_connections: Annotated[int, typer.Option(help="Connections that may be open at one time.")] = 512,
    end_seconds: Annotated[
        float, typer.Option(help="After SIGTERM or Ctrl+C, time for requests that are being served.")
    ] = 10.0,
    trusted_proxy: Annotated[
        str | None,
        typer.Option(help="Address or network of a proxy in front, whose X-Forwarded-For tells who the client is."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Serve enrolment, verification and identification over HTTP, with a page that records from the microphone."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise CelError(f"'cel serve' needs {', '.join(missing)}; install them with: pip install 'cel_dist[serve]'")
    from dataclasses import asdict

    from cel_dist.model import load_model
    from cel_dist.service.limits import Limits
    from cel_dist.service.server import listen, url_of
    from cel_dist.service.server import serve as run_service
    from cel_dist.service.speakers import Speakers

    if token is None and _TOKEN_VARIABLE in os.environ:
        # Typer takes an empty variable for none, and a service that was to have a token would be open.
        raise CelError(f"{_TOKEN_VARIABLE} is empty; give it a token, or unset it for a service without one")
    limits = Limits(max_seconds, max_bytes, rate, queue, read_seconds, max_recordings, max_connections, end_seconds)
    with listen(host, port) as listener:
        speakers = Speakers(load_model(model), store, create=True)
        told = {"url": url_of(listener), "store": str(store), **asdict(limits)}

        def ready() -> None:
            emit(told, f"serving at {told['url']}; Ctrl+C ends it", as_json=as_json)
            # Whoever started this in a pipe waits for the line.
            sys.stdout.flush()

        run_service(speakers, listener, limits, token=token, trusted_proxy=trusted_proxy, ready=ready)
