"""The port a server takes."""

from __future__ import annotations

import socket
from contextlib import closing

from app.serving import bind
from app.settings import load_settings


def test_answers_are_sent_at_once() -> None:
    """asyncio switches Nagle's algorithm off only for sockets that name TCP; with it small answers wait 40 ms for an acknowledgement."""
    with closing(bind(load_settings(port=0))) as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()), closing(listener.accept()[0]) as connection:
            assert connection.proto == socket.IPPROTO_TCP
