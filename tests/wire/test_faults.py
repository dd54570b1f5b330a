"""Every way to write a request wrongly gets one clear answer or a closed connection, and harms nobody after it."""

from __future__ import annotations

import gc
import json
import socket
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fakes import FINGERPRINT, expected_scores
from tests.wire.client import Answer, captions, connect, listen, request, talk
from tests.wire.server import Wire, eventually, num_descriptors, wire

KEY = "a-key-of-sixteen-letters-and-more"
SECRET = "a caption nobody may read in an answer"
GOOD = request(captions(SECRET))
LIVEZ = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
MIB = 1 << 20


@dataclass(frozen=True)
class Fault:
    """Bytes, and what they must get. Without a code the statuses alone are asked; without statuses silence is fine too."""

    name: str
    data: bytes
    status: int | None = 400
    code: str | None = "bad_http"
    closed: bool = True
    num_answers: int = 1


def head(*lines: str, target: str = "/livez", method: str = "GET", version: str = "HTTP/1.1") -> bytes:
    return "\r\n".join((f"{method} {target} {version}", "Host: x", *lines)).encode("latin-1") + b"\r\n\r\n"


FAULTS = [
    # H1, H2: larger than allowed; the rest of the body is neither waited for nor read
    Fault("an honest length over the cap", request(length=100 * MIB), 413, "body_too_large"),
    Fault("40 MiB sent all the same", request(b"x" * 40 * MIB), 413, "body_too_large"),
    Fault("chunks over the cap", CHUNKED + b"400001\r\n" + b"x" * (4 * MIB + 1) + b"\r\n", 413, "body_too_large"),
    # H3: lengths that are not true
    Fault("longer than its length", request(captions(SECRET), length=10), 400, None, num_answers=2),  # the rest is no request
    Fault("a body that stops", request(captions(SECRET), length=5000), 408, "body_timeout"),
    Fault("a negative length", request(length=-5)),
    Fault("a length in letters", request(length="abc")),
    Fault("a length in hexadecimal", request(length="0x10")),
    Fault("a length of 40 digits", request(length="9" * 40)),
    # H4: two readings of one request; what follows is taken for no request of its own
    Fault("length and chunks", request(b"0\r\n\r\n", headers=("Transfer-Encoding: chunked",)) + LIVEZ),
    Fault("chunks and length", head("Transfer-Encoding: chunked", "Content-Length: 5", method="POST") + b"0\r\n\r\n" + LIVEZ),
    Fault("two equal lengths", request(b"ab", headers=("Content-Length: 2",)) + LIVEZ),
    Fault("two different lengths", request(b"ab", headers=("Content-Length: 3",)) + LIVEZ),
    Fault("an unknown coding", head("Transfer-Encoding: xchunked", method="POST") + LIVEZ),
    Fault("chunks, then identity", head("Transfer-Encoding: chunked, identity", method="POST") + LIVEZ),
    Fault("a space before the colon", head("Content-Length : 5", method="POST") + b"hello"),
    Fault("bare line feeds", b"GET /livez HTTP/1.1\nHost: x\n\n"),
    Fault("a folded header", head("A: b", " c")),
    Fault("a chunk size in letters", CHUNKED + b"zz\r\n" + LIVEZ),
    Fault("a chunk longer than its size", CHUNKED + b"1\r\nab\r\n0\r\n\r\n" + LIVEZ),
    # H7: heads without end
    Fault("a header line of 1 MiB", head("A: " + "x" * MIB), 431, "head_too_large"),
    Fault("a header line of 40 MiB", head("A: " + "x" * 40 * MIB), 431, "head_too_large"),
    Fault("a header line that never ends", b"GET / HTTP/1.1\r\nA: " + b"x" * MIB, 431, "head_too_large"),
    Fault("a header name of 1 MiB", head("x" * MIB + ": a"), 431, "head_too_large"),
    Fault("101 headers", head(*(f"A{number}: x" for number in range(100))), 431, "head_too_large"),
    Fault("10,000 headers", head(*(f"A{number}: x" for number in range(10_000))), 431, "head_too_large"),
    Fault("a target of 1 MiB", head(target="/" + "x" * MIB), 431, "head_too_large"),
    Fault("a key of 10 MiB", head("Authorization: Bearer " + "x" * 10 * MIB, target="/info"), 431, "head_too_large"),
    Fault("an extension of a chunk of 1 MiB", CHUNKED + b"1;" + b"x" * MIB + b"\r\n", 431, "head_too_large"),
    Fault("a trailer of 1 MiB", CHUNKED + b"1\r\n{\r\n0\r\nA: " + b"x" * MIB + b"\r\n\r\n", 431, "head_too_large"),
    Fault("101 trailers", CHUNKED + b"1\r\n{\r\n0\r\n" + b"A: b\r\n" * 101 + b"\r\n", 431, "head_too_large"),
    Fault("line ends without end", b"\r\n" * MIB, 431, "head_too_large"),
    # H11: the body is not asked for
    Fault("expecting to send too much", request(length=100 * MIB, headers=("Expect: 100-continue",)), 413, "body_too_large"),
    Fault("expecting to send another type", head("Expect: 100-continue", "Content-Length: 9", target="/score", method="POST"), 415,
          "unsupported_media_type"),
    # H16: odd targets and hosts
    Fault("no host", LIVEZ.replace(b"Host: x\r\n", b"")),
    Fault("two hosts", LIVEZ.replace(b"Host: x", b"Host: x\r\nHost: y")),
    Fault("two content types", request(b"{}", headers=("Content-Type: text/plain",)), 415, "unsupported_media_type", closed=False),
    Fault("a line end behind a path", request(captions(SECRET), path="/score%0a"), 404, "not_found"),
    Fault("an absolute target", head(target="http://evil/livez"), 200, None, closed=False),
    Fault("a target without a path", head(target="http://evil")),
    Fault("an asterisk", head(target="*", method="OPTIONS"), 404, "not_found", closed=False),
    Fault("an encoded path", request(captions(SECRET), path="/%73core"), 200, None, closed=False),
    Fault("a doubled slash", request(captions(SECRET), path="//score"), 404, "not_found"),
    Fault("letters that are not ASCII", head(target="/caf\xe9")),
    # H18: line ends and zeros in a header
    Fault("a carriage return in an id", head("X-Request-Id: a\rb")),
    Fault("a zero in an id", head("X-Request-Id: a\0b")),
    Fault("an id of 10 KiB", head("X-Request-Id: " + "a" * 10_240), 200, None, closed=False),
    # H20: other protocols
    Fault("HTTP/0.9", b"GET /livez\r\n\r\n"),
    Fault("HTTP/1.0", head(version="HTTP/1.0"), 200, None),
    Fault("HTTP/1.0 without a host", b"GET /livez HTTP/1.0\r\n\r\n", 200, None),
    Fault("HTTP/2 without asking", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    Fault("HTTP/3.7", head(version="HTTP/3.7")),
    Fault("a TLS hello", bytes.fromhex("16030100fa010000f60303") + bytes(range(200))),
    Fault("zeros", bytes(4096)),
    Fault("noise", bytes((number * 7919 + 13) % 251 for number in range(4096))),
    Fault("a web socket", head("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13") + b"\x81\x05hello", 200, None),
    Fault("a web socket to a closed route", head("Upgrade: websocket", "Connection: Upgrade", target="/score"), 405, "method_not_allowed"),
    Fault("HTTP/2 by upgrade", head("Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABk"), 200, None),
    # H21: methods
    Fault("TRACE", head(target="/score", method="TRACE"), 405, "method_not_allowed", closed=False),
    Fault("CONNECT", b"CONNECT evil:443 HTTP/1.1\r\nHost: evil:443\r\n\r\n"),
    Fault("a method nobody knows", head(target="/score", method="BREW")),  # 400, not 405: the parser has a fixed list of methods
]  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Wire]:
    with wire(takes_images=False, header_timeout_s=0.3, body_timeout_s=0.3, max_body_bytes=4 * MIB, max_image_bytes=MIB) as found:
        yield found


def still_well(server: Wire, num_open: int) -> None:
    """The server answers others, rightly, and kept nothing of who was here before."""
    (alive,) = talk(server.address, LIVEZ).answers
    assert alive.status == 200
    (scored,) = talk(server.address, request(captions("well", "enough"))).answers
    assert scored.status == 200
    assert b'"scores": ' + str(expected_scores(None, ["well", "enough"])).encode() in scored.body
    for route in ("/score", "/livez", "_unmatched"):
        eventually(lambda route=route: server.served.metric("http_server_active_requests", http_route=route) == 0, f"{route} at rest")
    assert server.served.metric("reward_queue_items") == server.served.metric("reward_queue_tokens") == 0
    eventually(lambda: gc.collect() >= 0 and num_descriptors() <= num_open, "descriptors given back")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_answered_once_and_harms_nobody(server: Wire, fault: Fault) -> None:
    eventually(lambda: not server.server.server_state.connections, "nobody connected")
    num_open = num_descriptors()
    told = talk(server.address, fault.data, until_closed=fault.closed)
    assert [answer.status for answer in told.answers] == [fault.status] * fault.num_answers
    answer = told.answers[-1]
    if fault.code is not None:
        is_ours(answer, fault.code)
    if fault.closed:
        assert answer.headers["connection"] == "close"
    assert SECRET.encode() not in told.received
    still_well(server, num_open)


def is_ours(answer: Answer, code: str) -> None:
    """The one error shape, signed as every answer is."""
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-model-fingerprint"] == FINGERPRINT
    assert answer.error["code"] == code
    assert answer.error["retryable"] == (code in {"body_timeout", "head_timeout"})
    assert answer.error["request_id"] == answer.headers["x-request-id"]
    assert len(answer.error["message"]) < 100


def test_the_largest_head_that_is_allowed_is_answered(server: Wire) -> None:
    """To the byte: target, and for each header its name, its value and four bytes more."""
    taken = len("/livez") + len("Host: x\r\n") + len("A: \r\n")
    fits, over = (head("A: " + "x" * (size - taken)) for size in (65536, 65537))
    assert talk(server.address, fits).answers[0].status == 200
    assert talk(server.address, over).answers[0].status == 431
    assert talk(server.address, head(*(f"A{number}: x" for number in range(99)))).answers[0].status == 200


OFFERS = [
    ("Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABk"),
    ("Upgrade: websocket", "Connection: upgrade"),
]


@pytest.mark.parametrize("offer", OFFERS, ids=lambda offer: offer[0])
@pytest.mark.parametrize("step", [1, 7, 100_000])
def test_a_request_that_offers_another_protocol_keeps_its_body_and_its_connection(server: Wire, offer: tuple[str, ...], step: int) -> None:
    """Java's HTTP client and `curl --http2` offer one with their first request, whatever its method."""
    body = captions("a body")
    chunks = head(*offer, "Content-Type: application/json", "Transfer-Encoding: chunked", target="/score", method="POST")
    sent = request(body, headers=offer) + chunks + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) + request(captions("after", "it"))
    with connect(server.address) as connection:
        for at in range(0, len(sent), step):
            connection.sendall(sent[at : at + step])
        told = listen(connection, num_answers=3)
    expected = [expected_scores(None, texts) for texts in (["a body"], ["a body"], ["after", "it"])]
    assert [answer.status for answer in told.answers] == [200, 200, 200]
    assert [json.loads(answer.body)["scores"] for answer in told.answers] == expected


def test_what_breaks_behind_an_offer_is_refused_as_elsewhere(server: Wire) -> None:
    for sent, status in (
        (request(captions(SECRET), headers=OFFERS[0], length=5000), 408),
        (request(headers=OFFERS[0], length=100 * MIB), 413),
        (CHUNKED.replace(b"Host: x", b"Host: x\r\nUpgrade: h2c\r\nConnection: Upgrade") + b"zz\r\n" + LIVEZ, 400),
    ):
        told = talk(server.address, sent, until_closed=True)
        assert [answer.status for answer in told.answers] == [status], sent[:200]


def test_a_client_that_closes_its_side_is_gone(server: Wire) -> None:
    """H3. Whether it still listens cannot be told from one that left, and scores for those who left are computed for nobody."""
    num_open = num_descriptors()
    for sent in (GOOD, request(captions(SECRET), length=5000)):
        with connect(server.address) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            assert listen(connection, until_closed=True).answers == []
        still_well(server, num_open)


def test_uploads_that_break_off_leave_nothing(server: Wire, tmp_path: Path) -> None:
    """D5. No file anywhere, no byte held, no descriptor."""
    num_open, usual = num_descriptors(), tempfile.tempdir
    form = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n' + b"x" * 30_000
    kind = ("Content-Type: multipart/form-data; boundary=b", "Content-Length: 3000000")
    tempfile.tempdir = str(tmp_path)  # this process is the server's
    try:
        for _ in range(500):
            with connect(server.address) as connection:
                connection.sendall(head(*kind, target="/score", method="POST") + form)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        still_well(server, num_open)
        assert server.served.metric("http_server_body_bytes") == 0
        assert list(tmp_path.iterdir()) == []
    finally:
        tempfile.tempdir = usual


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_a_request_may_come_in_pieces(server: Wire, step: int) -> None:
    with connect(server.address) as connection:
        for at in range(0, len(GOOD), step):
            connection.sendall(GOOD[at : at + step])
        (answer,) = listen(connection).answers
    assert answer.status == 200


def test_fifty_requests_at_once_are_answered_in_their_order(server: Wire) -> None:
    """H17. Each with its own id and its own numbers."""
    texts = [[f"caption {number}", *(["another"] * (number % 3))] for number in range(50)]
    sent = b"".join(request(captions(*each), headers=(f"X-Request-Id: r{number}",)) for number, each in enumerate(texts))
    answers = talk(server.address, sent, num_answers=50).answers
    assert [answer.headers["x-request-id"] for answer in answers] == [f"r{number}" for number in range(50)]
    for each, answer in zip(texts, answers, strict=True):
        assert b'"scores": ' + str(expected_scores(None, each)).encode() in answer.body


def test_what_cannot_be_read_is_refused_after_the_answers_before_it(server: Wire) -> None:
    """A refusal must not be taken for the answer to an earlier request, nor stand in the middle of one."""
    told = talk(server.address, GOOD * 3 + b"zz\r\n\r\n" + GOOD, until_closed=True)
    assert [answer.status for answer in told.answers] == [200, 200, 200, 400]
    is_ours(told.answers[3], "bad_http")


def test_a_body_that_breaks_ends_its_own_request_only(server: Wire) -> None:
    told = talk(server.address, GOOD * 2 + CHUNKED + b"zz\r\n" + GOOD, until_closed=True)
    assert [answer.status for answer in told.answers] == [200, 200, 400]


def test_more_than_a_hundred_requests_do_not_wait_on_one_connection(server: Wire) -> None:
    told = talk(server.address, LIVEZ * 5000, until_closed=True)
    assert {answer.status for answer in told.answers[:-1]} == {200}
    assert 100 < len(told.answers) < 1000
    is_ours(told.answers[-1], "bad_http")


def test_a_trailer_does_not_change_a_request(server: Wire) -> None:
    body = captions("chunked")
    sent = CHUNKED + b"%x\r\n%b\r\n0\r\nX-Request-Id: evil\r\n\r\n" % (len(body), body)
    (answer,) = talk(server.address, sent).answers
    assert answer.status == 200
    assert answer.headers["x-request-id"] != "evil"


@pytest.mark.parametrize(
    "data",
    [
        request(GOOD, path="/%73core"),
        request(GOOD, path="//score"),
        request(GOOD, path="/livez/../score"),
        request(GOOD, path="/livez%2f..%2fscore"),
        request(GOOD, path="http://evil/score"),
        request(GOOD, path="/score?key=" + KEY),
        GOOD.replace(b"Host: x", b"Host: a/?x="),
        GOOD.replace(b"Host: x", b"Host:"),
        head("Upgrade: websocket", "Connection: Upgrade", target="/score"),
        request(length=100, headers=("Expect: 100-continue",)),
    ],
)
def test_no_spelling_opens_a_closed_route_and_no_stranger_is_asked_for_a_body(data: bytes) -> None:
    with wire(takes_images=False, api_key=KEY) as server:
        told = talk(server.address, data, until_closed=True)
        (answer,) = told.answers
        assert (answer.status, answer.error["code"]) == (401, "unauthorized")
