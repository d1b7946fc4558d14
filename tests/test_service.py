"""`cel serve` as clients meet it: what it answers, what it refuses, and what it costs."""

import contextlib
import io
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
from hostile_audio import hostile_files, in_float
from service import Service, speech, wav

from cel_dist.model import load_model
from cel_dist.service import SpeakerStore

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


def test_hostile_files_are_refused_or_served_in_bounded_memory(service: Service) -> None:
    found, files = {}, hostile_files(MAX_BYTES, MAX_SECONDS)
    with bounded(service):
        for name, (make, _) in files.items():
            status, answer = service.call("POST", "/v1/verify", make(), name="Ann")
            found[name] = status
            if status != 200:
                assert set(answer) == {"detail"}
                assert "\n" not in answer["detail"]
                assert str(service.store) not in answer["detail"]
    wrong = {name: status for name, status in found.items() if status not in files[name][1]}
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
