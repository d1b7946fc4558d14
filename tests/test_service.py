"""`cel serve` as clients meet it: what it answers, what it refuses, and what it costs."""

import contextlib
import io
import select
import socket
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hostile_audio import flac_bomb
from service import Service, small_model, speech, wav

from cel_dist.data.audio import encode_audio
from cel_dist.errors import CelError
from cel_dist.model import load_model
from cel_dist.service import SpeakerStore
from cel_dist.service.limits import Limits, RateLimit, Refusal

MAX_BYTES = 2_000_000
MAX_SECONDS = 20
QUEUE = 4
READ_SECONDS = 5.0
# What any of the attacks below may add to the memory of the process. The bodies of a full queue are 8 MB.
MORE_MEMORY = 48 << 20


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Open to this machine, without a limit of the rate; Ann is enrolled."""
    options = ("--max-bytes", MAX_BYTES, "--max-seconds", MAX_SECONDS, "--rate", 0, "--queue", QUEUE)
    running = Service(tmp_path_factory.mktemp("service"), *options, "--read-seconds", READ_SECONDS)
    try:
        assert running.call("POST", "/v1/enrol", wav(0), name="Ann")[0] == 200
        # The longest recording there may be, so that what comes later is compared with what regular clients cost.
        assert running.call("POST", "/v1/embed", wav(0, MAX_SECONDS))[0] == 200
        yield running
    finally:
        running.close()


@contextlib.contextmanager
def bounded(service: Service) -> Iterator[None]:
    """Within the block the service must stay up, and its memory bounded."""
    service.forget_peak()
    before = service.memory("VmRSS")
    yield
    peak = service.memory("VmHWM")
    print(f"peak {(peak - before) >> 20} MiB above {before >> 20} MiB")
    assert peak - before < MORE_MEMORY, f"from {before >> 20} to {peak >> 20} MiB"
    assert service.process.poll() is None
    assert service.call("GET", "/health") == (200, {"status": "ok"})
    assert service.call("POST", "/v1/identify", wav(0))[0] == 200


def test_the_service_says_what_the_model_says(service: Service) -> None:
    model = load_model(service.folder.parent / "model")
    ann, other = speech(0), speech(1)
    expected = model.verify(ann, other)
    status, verified = service.call("POST", "/v1/verify", wav(1), name="Ann")
    assert status == 200
    assert verified == {
        "name": "Ann",
        "score": pytest.approx(expected.score, abs=1e-6),
        "probability": pytest.approx(expected.probability, abs=1e-4),
        "same": expected.same,
        "threshold": expected.threshold,
    }
    status, embedded = service.call("POST", "/v1/embed", wav(1))
    np.testing.assert_allclose(embedded["embedding"], model.embed(other), atol=1e-6)
    _, about = service.call("GET", "/v1/service")
    assert about["fingerprint"] == embedded["fingerprint"]
    assert (about["max_seconds"], about["max_bytes"], about["decides"]) == (MAX_SECONDS, MAX_BYTES, True)
    # Another process enrols; the service knows.
    SpeakerStore(service.store, about["fingerprint"], 32).add("Bob", model.embed(other)[None], [1.5])
    _, found = service.call("POST", "/v1/identify", wav(1), top=2)
    assert found["identified"] == "Bob"
    assert [candidate["name"] for candidate in found["candidates"]] == ["Bob", "Ann"]
    assert len(service.call("POST", "/v1/identify", wav(1), top=1)[1]["candidates"]) == 1
    _, listed = service.call("GET", "/v1/speakers")
    assert [person["name"] for person in listed["speakers"]] == ["Ann", "Bob"]
    assert service.call("DELETE", "/v1/speakers", name="Bob") == (200, {"name": "Bob", "removed": 1})
    status, refused = service.call("DELETE", "/v1/speakers", name="Bob")
    assert (status, refused["detail"]) == (404, "nobody called 'Bob' is enrolled; list the names first")


@pytest.mark.parametrize(
    ("container", "subtype"), [("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", None), ("AIFF", None)]
)
def test_formats_and_rates_that_people_have(service: Service, container: str, subtype: str | None) -> None:
    stereo = np.repeat(speech(0)[:, None], 2, axis=1)
    file = io.BytesIO()
    soundfile.write(file, stereo, 16_000 if container == "AIFF" else 44_100, format=container, subtype=subtype)
    status, answer = service.call("POST", "/v1/verify", file.getvalue(), name="Ann")
    assert (status, answer["name"]) == (200, "Ann")


def form(*parts: tuple[str, bytes], field: bytes = b"") -> dict[str, object]:
    """Body and headers of a form with files of these names."""
    lines = [b'--line\r\nContent-Disposition: form-data; name="comment"\r\n\r\n' + field + b"\r\n"] if field else []
    for name, content in parts:
        head = f'--line\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'.encode()
        lines.append(head + content + b"\r\n")
    return {
        "body": b"".join(lines) + b"--line--\r\n",
        "headers": {"Content-Type": "multipart/form-data; boundary=line"},
    }


def test_a_form_enrols_several_files_and_nothing_is_written_but_the_store(service: Service) -> None:
    large = in_float(speech(2, 19.9) / 32768)
    sent = form(("../../etc/passwd", large), ("C:\\a.wav", wav(2)), field=b"a comment")
    assert len(large) > 1 << 20
    before = service.written()
    for _ in range(3):
        assert service.call("POST", "/v1/enrol", **sent, name="Cid")[0] == 200
    assert service.call("DELETE", "/v1/speakers", name="Cid")[1]["removed"] == 6
    # Four megabytes came; embeddings, the journal of the store and the log are much less.
    assert service.written() - before < 1_000_000
    assert list(service.folder.iterdir()) == []
    status, refused = service.call("POST", "/v1/verify", **form(("a", wav(0)), ("b", wav(0))), name="Ann")
    assert (status, refused["detail"]) == (400, "2 recordings where 1 is wanted; send one")
    for bad in (wav(2)[:30], in_float(np.zeros(16_000))):
        status, refused = service.call("POST", "/v1/enrol", **form(("a", wav(2)), ("b", bad)), name="Cid")
        assert (status, refused["detail"][:18]) == (422, "recording 2 of 2: ")
    sent["body"] = bytes(sent["body"])[:-20]
    assert service.call("POST", "/v1/enrol", **sent, name="Cid")[0] == 400
    assert service.call("DELETE", "/v1/speakers", name="Cid")[0] == 404


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


HOSTILE = {
    "nothing": (lambda: b"", {400}),
    "text": (lambda: b"hello", {415}),
    "JSON": (lambda: b'{"path": "/etc/passwd"}', {415}),
    "a picture": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(5000), {415}),
    "a program": (lambda: Path(sys.executable).read_bytes()[:MAX_BYTES], {415}),
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
    "too long": (lambda: wav(0, MAX_SECONDS + 1), {413}),
    "too large": (lambda: bytes(MAX_BYTES + 1), {413}),
}


def test_hostile_files_are_refused_or_served_in_bounded_memory(service: Service) -> None:
    found = {}
    with bounded(service):
        for name, (make, _) in HOSTILE.items():
            status, answer = service.call("POST", "/v1/verify", make(), name="Ann")
            found[name] = status
            if status != 200:
                assert set(answer) == {"detail"}
                assert "\n" not in answer["detail"]
                assert str(service.store) not in answer["detail"]
    wrong = {name: status for name, status in found.items() if status not in HOSTILE[name][1]}
    assert not wrong


@pytest.mark.parametrize(
    ("query", "headers", "status"),
    [
        ({"name": "../../etc/passwd"}, {}, 422),
        ({"name": "..\\..\\boot.ini"}, {}, 422),
        ({"name": "a\0b"}, {}, 422),
        ({"name": ""}, {}, 422),
        ({"name": "x" * 401}, {}, 422),
        ({}, {}, 422),
        ({"name": "Dora"}, {"Content-Encoding": "gzip"}, 415),
        ({"name": "Dora"}, {"Content-Type": "multipart/form-data"}, 400),
        ({"name": "Dora"}, {"Content-Type": "multipart/form-data; boundary=none"}, 400),
        ({"name": "Dora"}, {"Content-Type": f"multipart/form-data; boundary={'x' * 1000}"}, 400),
        ({"name": "Dora"}, {"Origin": "https://elsewhere.example"}, 403),
        ({"name": "Dora"}, {"Origin": "null"}, 403),
        ({"name": "Dora"}, {"Host": "rebound.example"}, 403),
        ({"name": "Dora"}, {"Host": "[::1"}, 403),
    ],
)
def test_requests_that_enrol_nobody(
    service: Service, query: dict[str, str], headers: dict[str, str], status: int
) -> None:
    found, answer = service.call("POST", "/v1/enrol", wav(0), headers, **query)
    assert found == status
    assert isinstance(answer["detail"], str)
    assert [person["name"] for person in service.call("GET", "/v1/speakers")[1]["speakers"]] == ["Ann"]


def test_no_path_of_a_request_is_one_of_a_file(service: Service) -> None:
    for path in ("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/page.js/..", "/v1/speakers/..%2fmodel", "//etc"):
        assert service.call("GET", path)[0] == 404
    page = service.answer("GET", "/")
    assert page[0] == 200
    assert "default-src 'none'" in page[1]["content-security-policy"]
    assert page[1]["x-content-type-options"] == "nosniff"
    assert service.call("GET", "/page.js")[0] == 200


def test_programs_are_told_which_requests_take_audio(service: Service) -> None:
    described = service.call("GET", "/openapi.json")[1]["paths"]
    taking = {path for path, methods in described.items() if "requestBody" in methods.get("post", {})}
    assert taking == {"/v1/enrol", "/v1/verify", "/v1/identify", "/v1/embed"}
    assert set(described["/v1/enrol"]["post"]["requestBody"]["content"]) == {"audio/*", "multipart/form-data"}


def stream(service: Service, head: bytes, piece: bytes, number: int) -> tuple[bytes, int]:
    """Send a head and so many pieces, as far as the service takes them: what it answers, and the bytes that went."""
    sent = 0
    with service.connect() as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(head)
            for _ in range(number):
                connection.sendall(piece)
                sent += len(piece)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(1 << 16):
                answer += part
    return answer, sent


def test_two_gigabytes_are_refused_with_and_without_a_length(service: Service) -> None:
    start = f"POST /v1/verify?name=Ann HTTP/1.1\r\nHost: {service.host}:{service.port}\r\n".encode()
    piece = wav(0) + bytes((1 << 20) - len(wav(0)))
    chunk = b"100000\r\n" + piece + b"\r\n"
    with bounded(service):
        for head, part in (
            (start + f"Content-Length: {2 << 30}\r\n\r\n".encode(), piece),
            (start + b"Transfer-Encoding: chunked\r\n\r\n", chunk),
        ):
            answer, sent = stream(service, head, part, 2 << 10)
            assert answer.startswith(b"HTTP/1.1 413 ")
            assert b"connection: close" in answer.lower()
            # What the systems of both ends hold on the way is in it, too.
            assert sent < 64 << 20


def test_ten_hours_of_audio_are_refused_as_a_stream(service: Service) -> None:
    start = f"POST /v1/enrol?name=Eve HTTP/1.1\r\nHost: {service.host}:{service.port}\r\n"
    header, second = wav(0)[:44], speech(0, 1.0).tobytes()
    head = f"{start}Transfer-Encoding: chunked\r\n\r\n{len(header):x}\r\n".encode() + header + b"\r\n"
    with bounded(service):
        answer, sent = stream(service, head, f"{len(second):x}\r\n".encode() + second + b"\r\n", 36_000)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert sent < 64 << 20


def test_two_hundred_clients_at_once_are_served_or_told_to_come_back(service: Service) -> None:
    begin = threading.Barrier(200, timeout=60)

    def client(number: int) -> tuple[int, str | None]:
        begin.wait()
        status, headers, _ = service.answer("POST", "/v1/identify", wav(number % 3))
        return status, headers.get("retry-after")

    with bounded(service), ThreadPoolExecutor(200) as pool:
        answers = Counter(pool.map(client, range(200)))
    assert set(answers) <= {(200, None), (503, "1")}
    assert answers[200, None] >= QUEUE
    assert answers[503, "1"] > 0


def test_clients_that_send_or_take_slowly_or_nothing_are_let_go(service: Service) -> None:
    start = f"POST /v1/verify?name=Ann HTTP/1.1\r\nHost: {service.host}:{service.port}\r\nContent-Length: 9999\r\n"
    with contextlib.ExitStack() as opened, bounded(service):
        idle = [opened.enter_context(service.connect()) for _ in range(100)]
        heads = [opened.enter_context(service.connect()) for _ in range(50)]
        bodies = [opened.enter_context(service.connect()) for _ in range(QUEUE)]
        takers = [fill_with_answers(opened.enter_context(service.connect())) for _ in range(10)]
        begin = time.monotonic()
        for connection in heads:
            connection.sendall(start.encode()[:30])
        for connection in bodies:
            connection.sendall(f"{start}\r\nRIFF".encode())
        # The queue is full of them.
        assert service.call("GET", "/health")[0] == 200
        _wait_until_refused(service)
        for connection in bodies:
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 408 ")
        for connection in (*idle, *heads):
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1 << 16) == b""
        assert all(taker.poll(4000 * READ_SECONDS) for taker in takers)
        assert time.monotonic() - begin > READ_SECONDS - 0.1


def fill_with_answers(connection: socket.socket) -> select.poll:
    """Ask for more than the systems of both ends hold, and read nothing: tells when the connection is no more."""
    connection.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            connection.send(b"GET /page.js HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
    poll = select.poll()
    poll.register(connection, 0)
    return poll


def _wait_until_refused(service: Service) -> None:
    deadline = time.monotonic() + READ_SECONDS
    while service.call("POST", "/v1/identify", wav(0))[0] != 503:
        assert time.monotonic() < deadline


def test_metrics_count_what_was_answered(service: Service) -> None:
    def metrics() -> dict[str, float]:
        lines = service.call("GET", "/metrics")[1].splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    served = 'cel_requests_total{endpoint="/v1/identify",method="POST",status="200"}'
    before = metrics()
    assert service.call("POST", "/v1/identify", wav(0, 2.0))[0] == 200
    assert service.call("GET", "/made/up")[0] == 404
    assert service.call("GET", "/made/up/again")[0] == 404
    after = metrics()
    assert after[served] - before.get(served, 0) == 1
    assert after["cel_audio_seconds_total"] - before["cel_audio_seconds_total"] == pytest.approx(2.0)
    assert after['cel_request_seconds_count{endpoint="/v1/identify"}'] >= 1
    assert after["cel_speakers"] == 1
    assert after["cel_requests_admitted"] == 0
    assert after["process_resident_memory_bytes"] > 1 << 20
    other = 'cel_requests_total{endpoint="other",method="GET",status="404"}'
    assert after[other] - before.get(other, 0) == 2
    assert not any("made" in name for name in after)


def test_the_log_has_addresses_and_no_names(service: Service) -> None:
    claimed = {"X-Forwarded-For": "198.51.100.7"}
    assert service.call("POST", "/v1/verify", wav(0), claimed, name="Ann")[0] == 200
    log = service.log.read_text()
    assert "POST /v1/verify 200" in log
    assert "Ann" not in log
    # Nor whom somebody claims to be: the rate is counted by the address in the log.
    assert "198.51.100.7" not in log
    assert "Traceback" not in log


def test_a_token_a_rate_a_full_store_and_an_end_in_peace(tmp_path: Path) -> None:
    proxy = ("--trusted-proxy", "127.0.0.1")
    service = Service(
        tmp_path, "--token", "s3cret", "--rate", 12, "--max-recordings", 1, "--max-connections", 20, *proxy
    )
    try:
        token = {"Authorization": "Bearer s3cret"}

        def call(method: str, path: str, body: object = None, client: str = "198.51.100.1", **rest: object):
            headers = {"X-Forwarded-For": client, **token, **rest.pop("headers", {})}
            return service.answer(method, path, body, headers, **rest)

        for given in ({}, {"Authorization": "Bearer s3cre"}, {"Authorization": "Basic s3cret"}):
            status, headers, answer = service.answer("GET", "/v1/speakers", None, given)
            assert (status, headers["www-authenticate"]) == (401, "Bearer")
            assert "token" in answer["detail"]
            assert service.call("GET", "/metrics", None, given)[0] == 401
        assert service.call("GET", "/health")[0] == 200
        assert service.call("GET", "/")[0] == 200
        assert service.call("GET", "/metrics", None, token)[0] == 200
        # With a token, the name by which a proxy calls the service does not matter.
        assert call("GET", "/v1/speakers", headers={"Host": "voices.example"})[0] == 200

        assert call("POST", "/v1/enrol", wav(0), name="Ann")[0] == 200
        status, _, answer = call("POST", "/v1/enrol", wav(0), name="Bob")
        assert (status, answer["detail"][:37]) == (507, "the store holds 1 of at most 1 record")

        statuses = [call("GET", "/v1/speakers", client="203.0.113.9")[0] for _ in range(13)]
        assert statuses == [200] * 12 + [429]
        status, headers, _ = call("GET", "/v1/speakers", client="203.0.113.9")
        assert 1 <= int(headers["retry-after"]) <= 6
        assert call("GET", "/v1/speakers", client="203.0.113.10")[0] == 200
        # Guesses are counted wherever a token is asked for; whoever has it may watch as often as they like.
        assert {call("GET", "/metrics", client="203.0.113.11")[0] for _ in range(13)} == {200}
        wrong = {"Authorization": "Bearer guess"}
        guesses = [call("GET", "/metrics", client="203.0.113.12", headers=wrong)[0] for _ in range(13)]
        assert guesses == [401] * 12 + [429]
        assert call("GET", "/metrics", client="203.0.113.12")[0] == 429
        assert service.call("GET", "/health")[0] == 200

        # One connection more than there may be is closed, the others stay.
        with contextlib.ExitStack() as opened:
            connections = [opened.enter_context(service.connect()) for _ in range(21)]
            with contextlib.suppress(ConnectionResetError):
                assert connections[20].recv(1) == b""
            connections[0].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connections[0].recv(1 << 16).startswith(b"HTTP/1.1 200 ")

        # A request that is being served when the end comes is served.
        with service.connect() as connection:
            body = wav(0)
            head = (
                f"POST /v1/identify HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer s3cret\r\nContent-Length: {len(body)}"
            )
            connection.sendall(f"{head}\r\n\r\n".encode() + body[:1000])
            _wait_until_admitted(service, token)
            service.process.terminate()
            _wait_until_closed(service)
            connection.sendall(body[1000:])
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        assert service.process.wait(30) == 0
        assert "Traceback" not in service.log.read_text()
    finally:
        service.close()


def test_an_end_that_requests_do_not_come_to_in_time_is_told_to_them(tmp_path: Path) -> None:
    service = Service(tmp_path, "--end-seconds", 0.1)
    try:
        body = encode_audio(np.tile(speech(0, 10.0), 4), "wav")
        head = f"POST /v1/embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with contextlib.ExitStack() as opened:
            clients = [opened.enter_context(service.connect()) for _ in range(6)]
            for client in clients[1:]:
                client.sendall(head + body)
            clients[0].sendall(head + body[:1000])
            _wait_until_admitted(service, {}, 6)
            service.process.terminate()
            answers = [b"".join(iter(lambda client=client: client.recv(1 << 16), b"")) for client in clients]
        assert service.process.wait(60) == 0
        # One body does not come, one recording is worked on at a time, and the others wait for their turn.
        told = [answer.startswith(b"HTTP/1.1 503 ") and b"the service ends" in answer for answer in answers]
        assert told[0]
        assert sum(told) >= 2
        assert "Traceback" not in service.log.read_text()
    finally:
        service.close()


def _wait_until_admitted(service: Service, token: dict[str, str], number: int = 1) -> None:
    deadline = time.monotonic() + 20
    while f"cel_requests_admitted {number}.0" not in service.call("GET", "/metrics", None, token)[1]:
        assert time.monotonic() < deadline


def _wait_until_closed(service: Service) -> None:
    deadline = time.monotonic() + 20
    with contextlib.suppress(ConnectionRefusedError):
        while time.monotonic() < deadline:
            service.connect().close()
        pytest.fail("the service takes new connections")


def test_a_token_that_was_to_come_and_is_empty_opens_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cel_dist.cli.app import run

    monkeypatch.setenv("CEL_SERVE_TOKEN", "")
    assert run(["serve", "--model", "absent", "--store", "people.db", "--port", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: CEL_SERVE_TOKEN is empty; ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-seconds", "0"), "max_seconds=0.0; give a number above zero"),
        (("--rate", "-1"), "rate=-1.0; give a number above zero, or 0"),
        (("--token", "h\u00e9"), "the token is empty or has characters"),
        (("--host", "203.0.113.1"), "cannot listen on 203.0.113.1"),
        (("--host", "a" * 70), "cannot listen on aaaa"),
        (("--trusted-proxy", "proxy.example"), "the trusted proxy 'proxy.example' is no address"),
        (("--max-connections", str(1 << 40)), "and the system allows "),
        (("--port", "{taken}"), "give another --host or --port"),
        (("--store", "model"), "model is a folder; give a file"),
        (("--model", "absent"), "there is no model at absent"),
    ],
)
def test_what_it_cannot_serve_with_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, str],
    message: str,
) -> None:
    from cel_dist.cli.app import run

    monkeypatch.chdir(tmp_path)
    small_model().save("model")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = {"--model": "model", "--store": "people.db", "--port": "0"}
        given[options[0]] = options[1].format(taken=taken.getsockname()[1])
        code = run(["serve", *(word for pair in given.items() for word in pair)])
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_the_rate_comes_back_over_a_minute_and_is_of_an_address() -> None:
    now = 0.0
    limit = RateLimit(6, lambda: now)
    for _ in range(6):
        limit.take("192.0.2.1")
    with pytest.raises(Refusal) as refused:
        limit.take("192.0.2.1")
    assert refused.value.status == 429
    assert refused.value.retry_after_seconds == pytest.approx(10)
    limit.take("192.0.2.2")
    now = 10.0
    limit.take("192.0.2.1")
    with pytest.raises(Refusal):
        limit.take("192.0.2.1")
    # A subscriber of IPv6 has all addresses of a network.
    for number in range(6):
        limit.take(f"2001:db8::{number}")
    with pytest.raises(Refusal):
        limit.take("2001:db8::ffff")
    limit.take("2001:db8:0:1::1")
    limit.take("::ffff:192.0.2.2")


def test_clients_that_are_remembered_are_bounded() -> None:
    limit = RateLimit(1, lambda: 0.0)
    for number in range(20_000):
        limit.take(f"10.0.{number >> 8}.{number & 255}")
    assert len(limit._left) == 10_000


def test_limits_that_are_none_are_refused() -> None:
    for wrong in ({"queue": 0}, {"max_bytes": -1}, {"read_seconds": float("inf")}, {"rate": float("nan")}):
        with pytest.raises(CelError, match="give a number above zero"):
            Limits(**wrong)
