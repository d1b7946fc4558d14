"""The HTTP interface to enrolled people. docs/service.md has every endpoint."""

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import math
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from cel_dist.data.audio import SAMPLE_RATE
from cel_dist.errors import CelError, RunError
from cel_dist.service.limits import Limits, RateLimit, Refusal, Worker
from cel_dist.service.metrics import Metrics
from cel_dist.service.speakers import Speakers
from cel_dist.service.store import StoreFaultError, StoreFullError, UnknownPersonError
from cel_dist.service.uploads import decode, read_uploads
from cel_dist.service.web import Recorded, UnreadBodies

logger = logging.getLogger(__name__)

# Nothing from anywhere else, no frames around the page, the microphone for nobody but it.
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "permissions-policy": "microphone=(self), camera=(), geolocation=()",
}
_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/recorder.js": ("recorder.js", "text/javascript"),
}
_FILE = {"type": "string", "format": "binary"}
# FastAPI knows nothing of bodies that it does not read itself.
_TAKES_AUDIO: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "audio/*": {"schema": _FILE},
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"file": {"type": "array", "items": _FILE}}}
            },
        },
    }
}
_PORT = re.compile(r":[0-9]*$")
Name = Annotated[str, Query(max_length=400, description="Of a person.")]


@dataclass(frozen=True)
class Gate:
    """Who may use the service.

    Attributes:
        token: that a client must send as `Authorization: Bearer TOKEN`; None: everybody may.
        only_this_machine: whether nobody else reaches the service, so that a page of another site in a browser of this
            machine is the one to keep out.
    """

    token: str | None = None
    only_this_machine: bool = True

    def check_token(self, request: Request) -> None:
        """Refuse a request without the token: 401."""
        if self.token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Digests are equally long and compared in constant time: the answer tells nothing of how close a guess was.
        digests = (hashlib.sha256(text.encode()).digest() for text in (given.strip(), self.token))
        if not hmac.compare_digest(*digests) or scheme.lower() != "bearer":
            raise Refusal(401, "the token is missing or wrong; send 'Authorization: Bearer TOKEN'")

    def check_origin(self, request: Request) -> None:
        """Refuse what a browser sends for the page of another site: 403."""
        host = request.headers.get("host", "")
        origin = request.headers.get("origin")
        if origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
            raise Refusal(403, "a page of another site may not use this service")
        # Without this, a site whose name is made to resolve to this machine would have the same origin.
        if self.token is None and self.only_this_machine and not is_loopback(_PORT.sub("", host).strip("[]")):
            raise Refusal(403, "this service is for this machine alone; call it by the address it listens on")


def is_loopback(host: str) -> bool:
    """Whether a host name or address is that of the machine itself."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def create_app(speakers: Speakers, limits: Limits, gate: Gate) -> FastAPI:
    """The service as an ASGI application.

    Args:
        speakers: model and store.
        limits: of each client and of all.
        gate: who may use it.
    """
    worker, rate, metrics = Worker(limits.queue), RateLimit(limits.rate), Metrics()
    metrics.admitted.set_function(lambda: worker.admitted)
    metrics.speakers.set_function(lambda: len(speakers.store.gallery().names))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        worker.close()

    # Not in threads, as functions that are no coroutines would be: the counts of clients have no lock.
    async def admit(request: Request) -> None:
        rate.take(_address(request))
        gate.check_origin(request)
        gate.check_token(request)

    async def authorise(request: Request) -> None:
        # Who watches the service asks as often as they like. Who guesses a token is counted, and then not even told
        # that a guess was right.
        rate.take(_address(request), requests=0)
        try:
            gate.check_token(request)
        except Refusal:
            rate.take(_address(request))
            raise

    app = FastAPI(title="cel_dist", docs_url=None, redoc_url=None, lifespan=lifespan)
    # The last one added is the outermost.
    app.add_middleware(Recorded, metrics=metrics)
    app.add_middleware(UnreadBodies)
    _add_handlers(app)
    _add_page(app)

    @app.get("/health")
    def health() -> dict[str, str]:
        """Whether the service works: its store can be read."""
        speakers.store.check()
        return {"status": "ok"}

    @app.get("/metrics", dependencies=[Depends(authorise)])
    def prometheus() -> Response:
        """Counters for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    api = APIRouter(prefix="/v1", dependencies=[Depends(admit)])

    async def on_audio(request: Request, work: Callable[[list[Any]], Any], most: int = 1) -> Any:
        """The result of `work` on the decoded recordings of a request, in the worker's thread."""
        uploads: list[bytes] = []

        def decode_and_work() -> Any:
            waves: list[Any] = []
            number = len(uploads)
            while uploads:
                try:
                    waves.append(decode(uploads.pop(0), limits.max_seconds))
                except Refusal as refusal:
                    which = f"recording {len(waves) + 1} of {number}: " if number > 1 else ""
                    raise Refusal(refusal.status, which + refusal.message) from None
            metrics.audio_seconds.inc(sum(map(len, waves)) / SAMPLE_RATE)
            return work(waves)

        try:
            with worker.place():
                uploads += await read_uploads(request, limits)
                if len(uploads) > most:
                    raise Refusal(400, f"{len(uploads)} recordings where {most} is wanted; send one")
                return await worker.run(request, decode_and_work)
        except asyncio.CancelledError:
            # Nobody but uvicorn cancels, when it has been ending for long enough.
            raise Refusal(503, "the service ends; try again later", 1) from None

    @api.get("/service")
    def service() -> dict[str, Any]:
        """Model and limits."""
        description = speakers.model.description
        return {
            "fingerprint": speakers.fingerprint,
            "embedding_dim": description.encoder.embedding_dim,
            "encoder": description.encoder.name,
            "decides": description.threshold is not None,
            "max_seconds": limits.max_seconds,
            "max_bytes": limits.max_bytes,
        }

    @api.get("/speakers")
    def people() -> dict[str, Any]:
        """Who is enrolled."""
        return {"speakers": [asdict(person) for person in speakers.store.people()]}

    @api.delete("/speakers")
    def remove(name: Name) -> dict[str, Any]:
        """Forget somebody."""
        return {"name": name, "removed": speakers.store.remove(name)}

    @api.post("/enrol", openapi_extra=_TAKES_AUDIO)
    async def enrol(request: Request, name: Name) -> Any:
        """Enrol somebody, or add recordings to somebody who is enrolled."""

        def work(waves: list[Any]) -> Any:
            return asdict(speakers.enrol(name, waves, limits.max_recordings))

        return await on_audio(request, work, most=10)

    @api.post("/verify", openapi_extra=_TAKES_AUDIO)
    async def verify(request: Request, name: Name) -> Any:
        """Whether a recording is of somebody who is enrolled."""
        return await on_audio(request, lambda waves: {"name": name, **asdict(speakers.verify(name, waves[0]))})

    @api.post("/identify", openapi_extra=_TAKES_AUDIO)
    async def identify(request: Request, top: Annotated[int, Query(ge=1, le=100)] = 5) -> Any:
        """Who of those enrolled a recording may be of."""
        return await on_audio(request, lambda waves: asdict(speakers.identify(waves[0], top)))

    @api.post("/embed", openapi_extra=_TAKES_AUDIO)
    async def embed(request: Request) -> Any:
        """The unit embedding of a recording."""

        def work(waves: list[Any]) -> Any:
            embedding = speakers.model.embed(waves[0])
            return {"embedding": embedding.tolist(), "fingerprint": speakers.fingerprint}

        return await on_audio(request, work)

    app.include_router(api)
    return app


def _address(request: Request) -> str:
    return request.client.host if request.client else "unknown"


def _add_page(app: FastAPI) -> None:
    folder = files("cel_dist.service") / "page"

    def add(path: str, name: str, media_type: str) -> None:
        content = (folder / name).read_bytes()

        @app.get(path, include_in_schema=False)
        def page() -> Response:
            return Response(content, media_type=media_type, headers=_PAGE_HEADERS)

    for path, (name, media_type) in _PAGE.items():
        add(path, name, media_type)


def _add_handlers(app: FastAPI) -> None:
    """What becomes of failures: one line in `detail`, and a status."""

    def answer(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"detail": message}, status, headers)

    @app.exception_handler(Refusal)
    async def refused(_: Request, refusal: Refusal) -> JSONResponse:
        headers = {}
        if refusal.retry_after_seconds is not None:
            headers["retry-after"] = str(max(1, math.ceil(refusal.retry_after_seconds)))
        if refusal.status == 401:
            headers["www-authenticate"] = "Bearer"
        return answer(refusal.status, refusal.message, headers)

    @app.exception_handler(CelError)
    async def unusable(_: Request, error: CelError) -> JSONResponse:
        if isinstance(error, StoreFaultError):
            return failed(error)
        status = {UnknownPersonError: 404, StoreFullError: 507}.get(type(error), 422)
        return answer(status, str(error))

    @app.exception_handler(RunError)
    async def broken(_: Request, error: RunError) -> JSONResponse:
        return failed(error)

    def failed(error: Exception) -> JSONResponse:
        # The message may name files of the server, which is nobody's business.
        logger.error("%s", error)
        return answer(500, "the service failed; its log says why")

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return answer(422, f"{first['loc'][-1]}: {first['msg']}")
