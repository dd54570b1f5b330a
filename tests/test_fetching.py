"""Images by address: which are asked for at all, over which addresses, and what becomes of every answer a host can give."""

from __future__ import annotations

import asyncio
import base64
import gc
import socket
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ssl import CERT_REQUIRED
from typing import Any

import pytest

from app.dialling import Dialler, Origin, Resolver, is_own, is_public
from app.errors import ImageFetchTimeout, ImageRejected, Overloaded, TooManyItems, UrlNotAllowed
from app.fetching import Fetcher, fetcher_of, is_address
from app.images import image_id
from app.metrics import Metrics
from app.settings import Settings, load_settings
from tests.fakes import OracleScorer, Served, picture, serving, until

pytestmark = pytest.mark.anyio

PUBLIC, OTHER, PRIVATE = "93.184.216.34", "93.184.216.35", "10.0.0.7"
HOST = "images.test"
SILENT = -1  # the port of an address that never answers
PICTURE, ANOTHER = picture(64, 48, 1), picture(48, 64, 2)
Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def whole(data: bytes, *headers: str, status: str = "200 OK") -> bytes:
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(data)}", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + data


@dataclass(slots=True)
class Host:
    """A server on loopback that answers every request with `answer`, bytes or a way of writing them."""

    answer: bytes | Answer
    port: int = 0
    heads: list[bytes] = field(default_factory=list)
    num_connections: int = 0
    num_open: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self.num_open += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.heads.append(head)
                if isinstance(self.answer, bytes):
                    writer.write(self.answer)
                    await writer.drain()
                else:
                    await self.answer(reader, writer)
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.num_open -= 1
            writer.close()


@asynccontextmanager
async def hosting(answer: bytes | Answer = b"") -> AsyncIterator[Host]:
    host = Host(answer)
    server = await asyncio.start_server(host.serve, "127.0.0.1", 0)
    host.port = server.sockets[0].getsockname()[1]
    try:
        yield host
    finally:
        server.close()


@dataclass(slots=True)
class Internet:
    """A small one: public addresses lead to ports of this machine, any other nowhere."""

    ports: dict[str, int]
    asked: list[tuple[str, int]] = field(default_factory=list)

    async def connect(self, address: str, port: int, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        self.asked.append((address, port))
        if address not in self.ports:
            raise ConnectionRefusedError
        if self.ports[address] == SILENT:
            await asyncio.sleep(30)
        return await asyncio.open_connection("127.0.0.1", self.ports[address], **options)


def names(*answers: Sequence[str]) -> Callable[[str, int], Awaitable[Sequence[str]]]:
    """A resolver that gives these answers one after the other, then the last."""
    left = list(answers)

    async def find(host: str, port: int) -> Sequence[str]:
        return left.pop(0) if len(left) > 1 else left[0]

    return find


def internet(host: Host, *answers: Sequence[str]) -> Dialler:
    return Dialler(names(*(answers or ([PUBLIC],))), Internet({PUBLIC: host.port}).connect)


def getting(host: Host, **flags: Any) -> Fetcher:
    found = fetcher_of(Settings(image_hosts=f"http://{HOST}", **flags), Metrics(), internet(host))
    assert found is not None
    return found


@asynccontextmanager
async def asking(answer: bytes | Answer, **flags: Any) -> AsyncIterator[tuple[Served, Host]]:
    """A server that fetches from a host of that answer."""
    flags = {"image_hosts": f"http://{HOST}", "canary_s": 0, **flags}
    async with hosting(answer) as host, serving(dialler=internet(host), **flags) as served:
        yield served, host


def body(address: str, **more: Any) -> dict[str, Any]:
    return {"image": address, "captions": ["a", "b"], **more}


AT = f"http://{HOST}/a.png"
MESSAGES = [
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": AT}}, {"type": "text", "text": "?"}]},
    {"role": "assistant", "content": "x"},
]


async def test_an_image_by_address_scores_as_its_bytes() -> None:
    async with asking(whole(PICTURE)) as (served, host):
        by_address = await served.client.post("/score", json=body(AT))
        by_bytes = await served.client.post("/score", json=body(base64.b64encode(PICTURE).decode()))
    assert by_address.status_code == by_bytes.status_code == 200
    assert by_address.json()["scores"] == by_bytes.json()["scores"]
    assert by_address.json()["image_id"] == image_id(PICTURE)
    assert b"GET /a.png HTTP/1.1" in host.heads[0]
    assert b"host: images.test" in host.heads[0].lower()
    assert b"accept-encoding: identity" in host.heads[0].lower()
    assert served.metric("reward_image_fetches_total", outcome="ok") == 1
    assert "fetch" in by_address.headers["server-timing"]


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("/a;picture=7?b=1", b"/a;picture=7?b=1"),
        ("/a?", b"/a?"),
        ("?b", b"/?b"),
        ("", b"/"),
        ("/%2e%2e/a", b"/%2e%2e/a"),
        ("/a#b", b"/a"),
        ("/../a", b"/../a"),
    ],
)
async def test_what_is_asked_for_is_what_was_written(written: str, sent: bytes) -> None:
    async with asking(whole(PICTURE)) as (served, host):
        answer = await served.client.post("/score", json=body(f"HTTP://Images.Test:80{written}"))
    assert answer.status_code == 200
    assert host.heads[0].startswith(b"GET " + sent + b" HTTP/1.1\r\n")


async def test_one_address_in_many_groups_is_asked_once() -> None:
    async with asking(whole(PICTURE)) as (served, host):
        groups = [body(AT) for _ in range(8)]
        answer = await served.client.post("/score", json={"groups": groups})
    assert answer.status_code == 200
    assert len(host.heads) == 1


async def test_the_same_address_with_other_content_is_another_image() -> None:
    async with asking(whole(PICTURE)) as (served, host):
        first = (await served.client.post("/score", json=body(AT))).json()
        host.answer = whole(ANOTHER)
        second = (await served.client.post("/score", json=body(AT))).json()
    assert (first["image_id"], second["image_id"]) == (image_id(PICTURE), image_id(ANOTHER))
    assert first["scores"] != second["scores"]


async def test_without_hosts_nothing_is_fetched() -> None:
    async with asking(whole(PICTURE), image_hosts="") as (served, host):
        answer = await served.client.post("/score", json=body(AT))
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "url_not_allowed")
    assert host.num_connections == 0


ELSEWHERE = [
    "http://127.0.0.1:{port}/a", "http://127.1:{port}/a", "http://2130706433:{port}/a", "http://0x7f.1:{port}/a",
    "http://[::1]:{port}/a", "http://[::ffff:127.0.0.1]:{port}/a", "http://[::ffff:169.254.169.254]/a", "http://169.254.169.254/latest",
    "http://100.64.0.1/a", "http://10.0.0.1/a", "http://localhost:{port}/a", "http://localhost.:{port}/a",
    "http://user@127.0.0.1:{port}/a", "http://127.0.0.1:{port}\\@images.test/a", "http://images.test@127.0.0.1:{port}/a",
    "http://images.test:80@127.0.0.1:{port}/a", "http://images.test.evil.test/a", "http://evil-images.test/a", "http://images.test./a",
    "http://images.test:{port}/a", "https://images.test/a", "http://images.test#@127.0.0.1:{port}/", "http://images.test\\.evil.test/",
    "http://images.test /a", "http:///a", "http://", "http://images.test/a\r\nX: y", "http://images.test/\u017f.png",
    "http://image\u017f.test/a", "http://images.test/\u00e9", "http://im\u00e5ges.test/a", "HTTP://LOCALHOST:{port}/a",
    "http://images.test:000000080/a", "http://images.test:99999/a", "http://images.test/" + "a" * 9000,
]  # fmt: skip


@pytest.mark.parametrize("address", ELSEWHERE)
async def test_an_address_that_is_not_plainly_an_allowed_one_connects_nowhere(address: str) -> None:
    async with hosting(whole(PICTURE)) as canary:
        async with serving(dialler=internet(canary), image_hosts=f"http://{HOST}") as served:
            answer = await served.client.post("/score", json=body(address.replace("{port}", str(canary.port))))
        expected = 200 if address == "http://images.test#@127.0.0.1:{port}/" else 403  # what stands behind # is never sent
        assert answer.status_code == expected, answer.text
        assert canary.num_connections == (expected == 200)


@pytest.mark.parametrize(
    ("scheme", "code"), [("file", "url_scheme_not_allowed"), ("ftp", "url_scheme_not_allowed"), ("gopher", "url_scheme_not_allowed"),
                         ("javascript", "url_scheme_not_allowed"), ("data", "bad_base64")],
)  # fmt: skip
async def test_other_schemes_are_refused(scheme: str, code: str) -> None:
    async with asking(whole(PICTURE)) as (served, host):
        answer = await served.client.post("/score", json=body(f"{scheme}:///etc/passwd"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, code)
    assert host.num_connections == 0


NOT_PUBLIC = [
    "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.7", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1",
    "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::a00:1", "64:ff9b:1::1",
    "2002:a00:1::", "2001::1", "2001:db8::1", "fec0::1", "192.0.0.192", "::ffff:192.0.0.192", "192.88.99.1", "3fff::1", "168.63.129.16",
]  # fmt: skip


@pytest.mark.parametrize("address", NOT_PUBLIC)
async def test_a_host_that_stands_for_an_inner_address_is_not_connected_to(address: str) -> None:
    assert not is_public(address)
    network = Internet({address: 1, PUBLIC: 1})
    for answer in ([address], [PUBLIC, address], [address, PUBLIC]):
        with pytest.raises(UrlNotAllowed, match="public internet"):
            await Dialler(names(answer), network.connect).open(Origin("http", HOST, 80), 1.0)
    assert network.asked == []


def test_public_addresses_are() -> None:
    assert is_public(PUBLIC)
    assert is_public("2606:2800:220:1:248:1893:25c8:1946")
    assert is_public(f"::ffff:{PUBLIC}")


def test_an_address_of_this_machine_is_its_own_whatever_it_looks_like() -> None:
    assert is_own("127.0.0.1")
    assert is_own("127.0.0.2")  # of this machine, and not the address it speaks from: as a second one of a network
    assert not is_own(PUBLIC)


async def test_names_that_the_system_resolves_to_this_machine_are_refused() -> None:
    """The real resolver and the real network: an operator who names localhost does not get it."""
    async with hosting(whole(PICTURE)) as canary:
        async with serving(image_hosts=f"http://localhost:{canary.port},http://127.0.0.1:{canary.port}") as served:
            for host in ("localhost", "127.0.0.1"):
                answer = await served.client.post("/score", json=body(f"http://{host}:{canary.port}/a"))
                assert (answer.status_code, answer.json()["error"]["code"]) == (403, "url_not_allowed")
        assert canary.num_connections == 0


async def test_a_name_that_changes_its_address_is_connected_to_the_one_that_was_checked() -> None:
    """Public when it is looked at, private a moment later: the connection goes to the first; the next one is refused."""
    async with hosting(whole(PICTURE, "Connection: close")) as host:
        dialler = internet(host, [PUBLIC], [PRIVATE])
        async with serving(dialler=dialler, image_hosts=f"http://{HOST}") as served:
            first = await served.client.post("/score", json=body(AT))
            second = await served.client.post("/score", json=body(AT))
        assert (first.status_code, second.status_code) == (200, 403)
        assert host.num_connections == 1


async def test_the_next_address_of_a_host_is_tried() -> None:
    async with hosting(whole(PICTURE)) as host:
        dialler = internet(host, [OTHER, PUBLIC])
        async with serving(dialler=dialler, image_hosts=f"http://{HOST}") as served:
            assert (await served.client.post("/score", json=body(AT))).status_code == 200


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
async def test_redirects_are_not_followed(status: str) -> None:
    async with hosting(whole(PICTURE)) as canary:
        async with asking(whole(b"", f"Location: http://127.0.0.1:{canary.port}/", status=status)) as (served, host):
            answer = await served.client.post("/score", json=body(AT))
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "url_not_allowed")
        assert (len(host.heads), canary.num_connections) == (1, 0)


async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"10000\r\n" + bytes(65536) + b"\r\n")
        await writer.drain()


async def dripping(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(PICTURE)}\r\n\r\n".encode())
    for place in range(len(PICTURE)):
        writer.write(PICTURE[place : place + 1])
        await writer.drain()
        await asyncio.sleep(0.05)


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()  # until the other side leaves


async def crumbs(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 100_000)
    await writer.drain()


async def interim(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1000 + whole(PICTURE))
    await writer.drain()


async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(PICTURE)}\r\n\r\n".encode() + PICTURE[:50])
    await writer.drain()


ANSWERS: dict[str, tuple[bytes | Answer, int, str]] = {
    "a body without end": (endless, 413, "image_too_large"),
    "a length that is too much": (b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n", 413, "image_too_large"),
    "a byte now and then": (dripping, 504, "image_fetch_timeout"),
    "nothing at all": (silent, 504, "image_fetch_timeout"),
    "less than was announced": (cut, 502, "image_fetch_failed"),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", 502, "image_fetch_failed"),
    "a compressed body": (whole(PICTURE, "Content-Encoding: gzip"), 502, "image_fetch_failed"),
    "a page": (whole(b"<!doctype html><title>Sign in</title>"), 422, "image_decode_failed"),
    "an empty body": (whole(b""), 422, "image_decode_failed"),
    "not found": (whole(b"no", status="404 Not Found"), 422, "image_fetch_refused"),
    "forbidden": (whole(b"no", status="403 Forbidden"), 422, "image_fetch_refused"),
    "a fault": (whole(b"no", status="500 Internal Server Error"), 502, "image_fetch_failed"),
    "a part": (whole(PICTURE, status="206 Partial Content"), 502, "image_fetch_failed"),
    "a byte a chunk": (crumbs, 502, "image_fetch_failed"),
    "answers before the answer": (interim, 502, "image_fetch_failed"),
    "a head that is too large": (whole(PICTURE, *(f"X-{number}: y" for number in range(4000))), 502, "image_fetch_failed"),
    "two lengths": (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef", 502, "image_fetch_failed"),
    "another protocol": (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", 502, "image_fetch_failed"),
    "encoded and then not": (whole(PICTURE, "Content-Encoding: gzip", "Content-Encoding: identity"), 502, "image_fetch_failed"),
    "too many requests": (whole(b"no", status="429 Too Many Requests"), 502, "image_fetch_failed"),
    "too early": (whole(b"no", status="425 Too Early"), 502, "image_fetch_failed"),
    "no length": (b"HTTP/1.0 200 OK\r\n\r\n" + PICTURE, 502, "image_fetch_failed"),
    "not modified": (b"HTTP/1.1 304 Not Modified\r\n\r\n", 502, "image_fetch_failed"),
    "several choices": (whole(b"", status="300 Multiple Choices"), 502, "image_fetch_failed"),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", 502, "image_fetch_failed"),
}


@pytest.mark.parametrize("what", ANSWERS)
async def test_every_answer_but_an_image_is_an_error_of_its_own(what: str) -> None:
    answer, status, code = ANSWERS[what]
    async with asking(answer, max_image_bytes=1 << 20, image_fetch_timeout_s=0.5) as (served, _):
        found = await served.client.post("/score", json={"groups": [body(base64.b64encode(PICTURE).decode()), body(AT)]})
        error = found.json()["error"]
        assert (found.status_code, error["code"], error["retryable"]) == (status, code, status >= 500)
        assert error["field"] == "groups[1].image"
        assert HOST not in found.text  # input is never echoed
        assert served.metric("reward_active_items") == 0
        assert (await served.client.post("/score", json=body(base64.b64encode(PICTURE).decode()))).status_code == 200


async def test_a_host_without_an_address_or_a_listener_is_502() -> None:
    async def unknown(host: str, port: int) -> Sequence[str]:
        raise OSError("Name or service not known")

    for dialler in (Dialler(unknown), Dialler(names([PUBLIC]), Internet({}).connect), Dialler(names([]))):
        async with serving(dialler=dialler, image_hosts=f"http://{HOST}") as served:
            answer = await served.client.post("/score", json=body(AT))
            assert (answer.status_code, answer.json()["error"]["code"]) == (502, "image_fetch_failed")


async def test_an_address_that_never_answers_leaves_time_for_the_next() -> None:
    async with hosting(whole(PICTURE)) as host:
        network = Internet({OTHER: SILENT, PUBLIC: host.port})
        dialler = Dialler(names([OTHER, PUBLIC]), network.connect)
        async with serving(dialler=dialler, image_hosts=f"http://{HOST}", image_fetch_timeout_s=2) as served:
            assert (await served.client.post("/score", json=body(AT))).status_code == 200
    assert network.asked == [(OTHER, 80), (PUBLIC, 80)]


async def test_a_host_that_speaks_no_tls_is_502() -> None:
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(whole(PICTURE))
        writer.close()

    server = await asyncio.start_server(plain, "127.0.0.1", 0)
    host = Host(b"", server.sockets[0].getsockname()[1])
    async with server, serving(dialler=internet(host), image_hosts=HOST) as served:
        answer = await served.client.post("/score", json=body(f"https://{HOST}/a"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "image_fetch_failed")


async def test_tls_asks_for_the_certificate_of_the_name_not_of_the_address() -> None:
    told: list[Any] = []

    async def connect(address: str, port: int, *, ssl: Any, server_hostname: str, **_: Any) -> Any:
        assert (address, port) == (PUBLIC, 443)
        assert ssl.verify_mode == CERT_REQUIRED
        assert ssl.check_hostname
        told.append((server_hostname, ssl))
        raise ConnectionRefusedError

    async with serving(dialler=Dialler(names([PUBLIC]), connect), image_hosts=HOST) as served:
        for _ in range(2):
            await served.client.post("/score", json=body(f"https://{HOST}/a"))
    assert [name for name, _ in told] == [HOST, HOST]
    assert told[0][1] is told[1][1]  # made once


async def test_too_many_addresses_in_a_request_ask_nobody() -> None:
    async with hosting(whole(PICTURE)) as host:
        fetcher = getting(host, max_groups=2)
        with fetcher.holding() as held:
            with pytest.raises(TooManyItems, match="at most 2 images") as refused:
                await fetcher.fetch({f"{AT}?{number}": f"groups[{number}]" for number in range(3)}, held)
            assert refused.value.field == "groups[2].image"
            assert host.num_connections == 0
            assert len(await fetcher.fetch({f"{AT}?{number}": "" for number in range(2)}, held)) == 2


async def test_the_images_of_a_request_are_no_more_than_a_body_could_bring() -> None:
    async with asking(whole(PICTURE + bytes(3000)), max_body_bytes=8192, max_image_bytes=8000, max_pending_body_bytes=1 << 20) as (
        served,
        _,
    ):
        answer = await served.client.post("/score", json={"groups": [body(f"{AT}?{number}") for number in range(4)]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "image_too_large")


async def test_where_the_images_of_others_fill_the_room_it_is_503_and_given_back() -> None:
    may_end = asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(PICTURE)}\r\n\r\n".encode() + PICTURE[:-1])
        await writer.drain()
        await may_end.wait()
        writer.write(PICTURE[-1:])
        await writer.drain()

    most = len(PICTURE) * 3 // 2
    async with hosting(slow) as host:
        fetcher = getting(host)
        fetcher.max_bytes = fetcher.max_request_bytes = fetcher.max_held_bytes = most
        first = asyncio.create_task(held_fetch(fetcher))
        await until(lambda: fetcher.held_bytes == len(PICTURE))  # as announced, before the last byte is there
        with pytest.raises(Overloaded, match="fill the room") as refused:
            await held_fetch(fetcher)
        assert 1 <= int(refused.value.headers["Retry-After"]) <= 3
        assert fetcher.held_bytes == len(PICTURE)
        may_end.set()
        assert await first == {AT: PICTURE}
        assert fetcher.held_bytes == 0


async def test_of_requests_that_do_not_fit_together_one_comes_through() -> None:
    """What is refused holds nothing from that moment on, and of chunks nothing is announced."""
    chunk = f"{len(PICTURE):x}\r\n".encode() + PICTURE + b"\r\n0\r\n\r\n"
    for answer in (whole(PICTURE), b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk):
        async with hosting(answer) as host:
            fetcher = getting(host)
            fetcher.max_bytes = fetcher.max_request_bytes = fetcher.max_held_bytes = 3 * len(PICTURE)
            for number in range(20):
                wanted = [{f"{AT}?{number}{one}{two}": "" for two in range(2)} for one in range(2)]
                outcomes = await asyncio.gather(*(fetch_all(fetcher, each) for each in wanted), return_exceptions=True)
                assert any(isinstance(outcome, dict) for outcome in outcomes), outcomes
                assert fetcher.held_bytes == 0


async def test_what_arrives_counts_whatever_was_announced() -> None:
    """An answer may say both how long it is and that it comes in chunks, and then the chunks are what counts."""
    chunk = f"{len(PICTURE):x}\r\n".encode() + PICTURE + b"\r\n0\r\n\r\n"
    async with hosting(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk) as host:
        fetcher = getting(host)
        with fetcher.holding() as held:
            assert await fetcher.fetch({AT: ""}, held) == {AT: PICTURE}
            assert fetcher.held_bytes == held.num_bytes == len(PICTURE)


async def fetch_all(fetcher: Fetcher, wanted: dict[str, str]) -> dict[str, bytes]:
    with fetcher.holding() as held:
        return await fetcher.fetch(wanted, held)


async def test_a_full_room_asks_nobody() -> None:
    async with hosting(whole(PICTURE)) as host:
        fetcher = getting(host)
        fetcher.held_bytes = fetcher.max_held_bytes
        with pytest.raises(Overloaded, match="fill the room"):
            await held_fetch(fetcher)
        assert host.num_connections == 0


async def held_fetch(fetcher: Fetcher, caller: str = "") -> dict[str, bytes]:
    with fetcher.holding() as held:
        return await fetcher.fetch({AT: ""}, held, caller)


async def test_whoever_leaves_or_fails_leaves_nothing_behind() -> None:
    """More often than there are connections: callers that leave, hosts that hang, siblings that fail; then all is well again."""
    async with hosting(silent) as host:
        fetcher = getting(host, image_fetch_timeout_s=0.2)
        for turn in range(24):
            num_heads = len(host.heads)
            with fetcher.holding() as held:
                task = asyncio.create_task(fetcher.fetch({f"{AT}?{number}": "" for number in range(3)}, held))
                await until(lambda before=num_heads, task=task: task.done() or len(host.heads) >= before + 3)  # type: ignore[misc]
                if turn % 2:
                    task.cancel()
                with pytest.raises((asyncio.CancelledError, ImageFetchTimeout)):
                    await task
            assert fetcher.held_bytes == 0
        await until(lambda: host.num_open == 0)
        host.answer = whole(PICTURE)
        assert await asyncio.gather(*(held_fetch(fetcher) for _ in range(32))) == [{AT: PICTURE}] * 32


async def test_an_error_keeps_nothing_of_what_was_fetched() -> None:
    """Frames that an error came through would hold the bytes until cycles are collected, which happens seldom."""

    async def by_path(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if host.heads[-1].startswith(b"GET /bad"):
            await until(lambda: len(host.heads) == 3)
            await asyncio.sleep(0.05)
            writer.write(whole(b"no", status="404 Not Found"))
        else:
            writer.write(whole(PICTURE))
        await writer.drain()

    async with hosting(by_path) as host:
        fetcher = getting(host)
        with fetcher.holding() as held, pytest.raises(ImageRejected) as refused:
            await fetcher.fetch({f"http://{HOST}/bad": "", AT: "", f"{AT}?1": ""}, held)
        trace, held_bytes = refused.value.__traceback__, []
        while trace is not None:
            held_bytes += [each for each in trace.tb_frame.f_locals.values() if isinstance(each, bytes | bytearray)]
            held_bytes += [
                kept for each in trace.tb_frame.f_locals.values() if isinstance(each, dict) for kept in each.values() if kept == PICTURE
            ]
            trace = trace.tb_next
        assert held_bytes == []
        assert refused.value.__context__ is None


async def test_a_host_that_hangs_delays_nobody_else() -> None:
    """More captions than the queue holds wait for it; scores of bytes and of another host's images come meanwhile, and deadlines hold."""
    async with hosting(silent) as hung, hosting(whole(PICTURE)) as well:
        network = Internet({PUBLIC: hung.port, OTHER: well.port})

        async def find(host: str, port: int) -> Sequence[str]:
            return [OTHER if host == "well.test" else PUBLIC]

        flags = {"image_hosts": f"http://{HOST},http://well.test", "image_fetch_timeout_s": 60, "max_queue_items": 256}
        async with serving(dialler=Dialler(find, network.connect), **flags) as served:
            many = [{"image": f"{AT}?{number}", "captions": ["x"] * 200, "timeout_ms": 1500} for number in range(24)]
            waiting = [asyncio.create_task(served.client.post("/score", json=each)) for each in many]
            await until(lambda: len(hung.heads) == 8)
            for image in (base64.b64encode(PICTURE).decode(), "http://well.test/a"):
                answer = await served.client.post("/score", json=body(image))
                assert answer.status_code == 200, answer.text
            assert not any(task.done() for task in waiting)
            answers = await asyncio.gather(*waiting)
    assert {(each.status_code, each.json()["error"]["code"]) for each in answers} == {(503, "deadline_exceeded")}


async def test_more_than_may_wait_for_a_host_are_refused_whole() -> None:
    """Those at once among them; a request that comes first may ask for all that a request may."""
    async with hosting(silent) as host:
        fetcher = getting(host, image_fetch_timeout_s=60, max_groups=100, max_captions=100)
        wanted = {f"{AT}?{number}": "" for number in range(100)}
        with fetcher.holding() as held:
            first = asyncio.create_task(fetcher.fetch(wanted, held))
            await until(lambda: len(host.heads) == 8)
            with pytest.raises(Overloaded, match="this host"):
                await held_fetch(fetcher)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            host.answer = whole(PICTURE)
            assert len(await fetcher.fetch(wanted, held)) == 100
            assert held.num_bytes == 100 * len(PICTURE)
        assert await held_fetch(fetcher) == {AT: PICTURE}


async def test_callers_share_a_host() -> None:
    """One that fills it is not waited for by another: who has nothing under way is let in, and is next."""
    may_end = asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await may_end.wait()
        writer.write(whole(PICTURE))
        await writer.drain()

    async with hosting(slow) as host:
        fetcher = getting(host, image_fetch_timeout_s=60, max_groups=64)
        with fetcher.holding() as held:
            greedy = asyncio.create_task(fetcher.fetch({f"{AT}?{number}": "" for number in range(64)}, held, "greedy"))
            await until(lambda: len(host.heads) == 8)
            modest = asyncio.create_task(held_fetch(fetcher, "modest"))
            with pytest.raises(Overloaded, match="this host"):
                await held_fetch(fetcher, "greedy")
            may_end.set()
            assert await modest == {AT: PICTURE}
            assert len(await greedy) == 64
        (place,) = [number for number, head in enumerate(host.heads) if b"?" not in head.partition(b"\r\n")[0]]
        assert place < 16


async def test_trainers_wait_for_a_host_that_too_many_wait_for() -> None:
    async with hosting(silent) as host:
        flags = {"image_hosts": f"http://{HOST}", "image_fetch_timeout_s": 60, "max_groups": 64}
        async with serving(dialler=internet(host), **flags) as served:
            groups = {"groups": [body(f"{AT}?{number}") for number in range(64)], "timeout_ms": 2000}
            many = asyncio.create_task(served.client.post("/score", json=groups))
            await until(lambda: len(host.heads) == 8)
            refused = await served.client.post("/score", json=body(AT))
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
            held = asyncio.create_task(served.client.post("/classify", json={"messages": MESSAGES}))
            host.answer = whole(PICTURE)
            assert (await many).status_code == 503  # its time is up
            assert (await held).status_code == 200


async def test_what_a_full_queue_would_refuse_is_not_fetched_first() -> None:
    scorer = OracleScorer()
    async with hosting(whole(PICTURE)) as host:
        async with serving(dialler=internet(host), scorer=scorer, image_hosts=f"http://{HOST}", max_queue_items=256) as served:
            scorer.gate.clear()
            try:
                full = {"image": base64.b64encode(ANOTHER).decode(), "captions": ["x"] * 256}
                waiting = asyncio.create_task(served.client.post("/score", json=full))
                await until(lambda: served.metric("reward_queue_items") == 256)
                answer = await served.client.post("/score", json=body(AT))
            finally:
                scorer.gate.set()
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
            assert (await waiting).status_code == 200
        assert host.num_connections == 0


async def test_a_name_that_nobody_can_look_up_is_waited_for_on_one_thread() -> None:
    """A lookup cannot be stopped: eight that hang would take every thread there is, and other names with them."""
    may_end, num_looks = threading.Event(), Counter[str]()

    def look(host: str, port: int, **_: Any) -> list[Any]:
        num_looks[host] += 1
        if host == HOST:
            may_end.wait(30)
            raise OSError("no answer")
        return [(None, None, None, None, (PUBLIC, port))]

    find = Resolver(look)
    waiting = [asyncio.create_task(find(HOST, 80)) for _ in range(40)]
    await until(lambda: num_looks[HOST] == 1)
    for task in waiting[1:]:
        task.cancel()
    assert await find("well.test", 80) == [PUBLIC]
    may_end.set()
    with pytest.raises(OSError, match="looked up"):
        await waiting[0]
    await asyncio.gather(*waiting, return_exceptions=True)
    assert num_looks == {HOST: 1, "well.test": 1}
    with pytest.raises(OSError, match="looked up"):
        await find(HOST, 80)  # asked anew
    assert num_looks[HOST] == 2


async def test_a_lookup_that_cannot_even_begin_or_ends_oddly_is_asked_anew() -> None:
    """No future may stay that nobody will end."""
    outcomes: list[BaseException | None] = [MemoryError(), RuntimeError("odd"), None]

    def look(host: str, port: int, **_: Any) -> list[Any]:
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome
        return [(None, None, None, None, (PUBLIC, port))]

    def no_thread() -> None:
        raise RuntimeError("can't start new thread")

    find = Resolver(look, start=lambda thread: no_thread())
    with pytest.raises(OSError, match="no thread"):
        await find(HOST, 80)
    find = Resolver(look)
    for _ in range(2):
        with pytest.raises(OSError, match="looked up"):
            await find(HOST, 80)
    assert await find(HOST, 80) == [PUBLIC]


async def test_both_families_are_tried() -> None:
    """Three dead addresses of one family do not hide the other."""
    dead = [f"2606:4700::{number}" for number in range(1, 6)]
    async with hosting(whole(PICTURE)) as host:
        network = Internet({PUBLIC: host.port})
        dialler = Dialler(names([*dead, PUBLIC]), network.connect)
        async with serving(dialler=dialler, image_hosts=f"http://{HOST}") as served:
            assert (await served.client.post("/score", json=body(AT))).status_code == 200
    assert network.asked == [(dead[0], 80), (PUBLIC, 80)]


async def test_the_time_of_a_lookup_is_taken_from_the_addresses() -> None:
    async def slow(host: str, port: int) -> Sequence[str]:
        await asyncio.sleep(1.2)
        return [OTHER, PUBLIC]

    async with hosting(whole(PICTURE)) as host:
        network = Internet({OTHER: SILENT, PUBLIC: host.port})
        dialler = Dialler(slow, network.connect)
        async with serving(dialler=dialler, image_hosts=f"http://{HOST}", image_fetch_timeout_s=2.4) as served:
            assert (await served.client.post("/score", json=body(AT))).status_code == 200


async def stuck(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(PICTURE)}\r\n\r\n".encode() + PICTURE[:-1])
    await writer.drain()
    await reader.read()


async def crooked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    size = len(PICTURE)
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + f"{size:x}\r\n".encode() + PICTURE + b"\r\nzz\r\n")
    await writer.drain()
    await reader.read()


async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(PICTURE)}\r\n\r\n".encode() + PICTURE[:-1])
    await writer.drain()
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await asyncio.sleep(0.05)
    writer.transport.abort()


@pytest.mark.parametrize("answer", [stuck, crooked, reset, cut, whole(PICTURE, status="404 Not Found")])
async def test_no_cycle_keeps_what_came_of_an_image_that_failed(answer: bytes | Answer) -> None:
    """Old cycles are looked at every half minute: until then the bytes would be in nobody's account."""
    async with asking(answer) as (served, _):
        gc.collect()
        gc.disable()
        try:
            groups = [body(AT), body(base64.b64encode(PICTURE).decode())]
            found = await served.client.post("/score", json={"groups": groups, "timeout_ms": 400})
            assert found.status_code >= 400
            await asyncio.sleep(0.1)
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            kept = [
                each for each in gc.garbage for part in gc.get_referents(each) if isinstance(part, bytes | bytearray) and len(part) > 200
            ]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
    assert len(PICTURE) > 200
    assert kept == []


async def test_a_request_that_waits_for_room_fetches_once() -> None:
    """Routes of trainers that give up early are held while the queue is full, and tried again and again."""
    scorer = OracleScorer()
    async with hosting(whole(PICTURE)) as host:
        async with serving(dialler=internet(host), scorer=scorer, image_hosts=f"http://{HOST}", max_queue_items=256) as served:
            scorer.gate.clear()
            try:
                full = asyncio.create_task(
                    served.client.post("/score", json={"image": base64.b64encode(ANOTHER).decode(), "captions": ["x"] * 256})
                )
                await until(lambda: served.metric("reward_queue_items") == 256)
                held = asyncio.create_task(served.client.post("/classify", json={"messages": MESSAGES}))
                await asyncio.sleep(1.0)
                assert not held.done()
            finally:
                scorer.gate.set()
            assert (await full).status_code == (await held).status_code == 200
        assert len(host.heads) == 1


async def test_the_first_fault_of_several_is_the_answer_and_ends_the_others() -> None:
    async def by_address(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(host.heads) > 1:
            await asyncio.sleep(30)
        writer.write(whole(b"no", status="404 Not Found"))
        await writer.drain()

    async with asking(by_address, image_fetch_timeout_s=20) as (served, host):
        answer = await served.client.post("/score", json={"groups": [body(f"{AT}?{number}") for number in range(3)]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "image_fetch_refused")


async def test_a_model_without_images_fetches_none() -> None:
    async with hosting(whole(PICTURE)) as host, serving(dialler=internet(host), image_hosts=f"http://{HOST}", takes_images=False) as served:
        answer = await served.client.post("/score", json=body(AT))
    assert answer.status_code == 422
    assert host.num_connections == 0


async def test_other_systems_forms_fetch_as_well() -> None:
    async with asking(whole(PICTURE)) as (served, host):
        answer = await served.client.post("/classify", json={"messages": MESSAGES})
    assert answer.status_code == 200, answer.text
    assert len(host.heads) == 1


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("images.test", {("https", "images.test", 443)}),
        ("Images.Test:8443, http://b", {("https", "images.test", 8443), ("http", "b", 80)}),
        ("https://a,http://a:81", {("https", "a", 443), ("http", "a", 81)}),
        ("", set()),
        (" , ", set()),
    ],
)
def test_hosts_by_name(hosts: str, expected: set[tuple[str, str, int]]) -> None:
    assert Settings(image_hosts=hosts).image_origins == expected


@pytest.mark.parametrize(
    "hosts",
    ["*", "*.test", "a/b", "ftp://a", "a:0", "a:65536", "a:b", "user@a", "[::1]", "-a", "a..b", "a.", "\u00e5", "a b", "http://", "a" * 64],
)
def test_what_is_no_host_refuses_the_start(hosts: str) -> None:
    with pytest.raises(Exception, match="image_hosts"):
        load_settings(image_hosts=hosts)


def test_what_is_meant_as_an_address() -> None:
    assert is_address("HTTPS://x")
    assert is_address("http://")
    assert not is_address("httpx://x")
    assert not is_address("sha256:" + "0" * 64)
