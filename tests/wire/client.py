"""What clients put on the wire, byte for byte, and what came back."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tests.wire.server import Address

PATIENCE_S = 20


@dataclass(frozen=True)
class Answer:
    """One HTTP answer, parsed."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)["error"]
        return found


@dataclass
class Talk:
    """Everything a server sent on one connection, and whether it closed it."""

    received: bytes = b""
    closed: bool = False
    answers: list[Answer] = field(default_factory=list)


def request(
    body: bytes = b"", *, method: str = "POST", path: str = "/score", headers: tuple[str, ...] = (), length: int | str | None = None
) -> bytes:
    """A request as a well-behaved client writes it, unless told otherwise."""
    announced = len(body) if length is None else length
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {announced}", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def captions(*texts: str, **fields: Any) -> bytes:
    """The body of a scoring request without an image."""
    return json.dumps({"captions": texts, **fields}).encode()


def connect(address: Address) -> socket.socket:
    return socket.create_connection(address, timeout=PATIENCE_S)


def talk(address: Address, data: bytes, *, num_answers: int = 1, until_closed: bool = False) -> Talk:
    """Send all and read until so many answers are there, or until the server closes."""
    with connect(address) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):  # it closed before it had it all; what it said is read below
            connection.sendall(data)
        return listen(connection, num_answers=num_answers, until_closed=until_closed)


def listen(connection: socket.socket, *, num_answers: int = 1, until_closed: bool = False) -> Talk:
    found = Talk()
    while until_closed or len(found.answers) < num_answers:
        try:
            data = connection.recv(65536)
        except ConnectionResetError:
            data = b""
        if not data:
            found.closed = True
            break
        found.received += data
        found.answers = parse(found.received)
    return found


def parse(received: bytes) -> list[Answer]:
    """The whole answers in these bytes; ours always name their length. `100 Continue` is an answer of its own."""
    answers = []
    while b"\r\n\r\n" in received:
        head, _, rest = received.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        length = int(headers.get("content-length", 0))
        if len(rest) < length:
            break
        answers.append(Answer(int(status.split()[1]), headers, rest[:length]))
        received = rest[length:]
    return answers
