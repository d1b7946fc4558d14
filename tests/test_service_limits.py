"""Whom `cel serve` lets in, how much, and how it ends."""

import contextlib
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from service import Service, small_model, speech, wav

from cel_dist.data.audio import encode_audio
from cel_dist.errors import CelError
from cel_dist.service.limits import Limits, RateLimit, Refusal


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
