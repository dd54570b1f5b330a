"""What goes on around a server and is no client's fault: peers that vanish without a word, encode threads that are all busy."""

from __future__ import annotations

import json
import socket
import threading
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.contracts import EncodedImage, RgbImage
from tests.fakes import FakeEncoder, OracleScorer, expected_scores, picture
from tests.wire.client import connect, listen, request, talk
from tests.wire.server import eventually, wire

GET = "GET {} HTTP/1.1\r\nHost: x\r\n\r\n"
NUM_THREADS = 2  # that encode, in a served fake


def test_the_kernel_is_told_to_give_up_peers_that_vanished() -> None:
    """C5. No test can pull a cable: what the kernel does then is read back from an accepted connection.

    Silence: asked after 30 s, three times, every 10 s. An answer that nobody acknowledges: given up after twice the write timeout,
    should our own timer not have ended it before (C6).
    """
    wanted = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 14_000}
    with wire(write_timeout_s=7) as server, connect(server.address) as connection:
        connection.sendall(GET.format("/livez").encode())
        listen(connection)
        (protocol,) = server.server.server_state.connections
        accepted = protocol.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        found = {name: accepted.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in wanted if hasattr(socket, name)}
    assert found == {name: seconds for name, seconds in wanted.items() if name in found}
    assert found


class BusyEncoder(FakeEncoder):
    """Takes as long over a picture as the test likes."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.begun: list[str] = []

    def encode_image(self, image: RgbImage) -> EncodedImage:
        self.begun.append(image.image_id)
        self.gate.wait(30)
        return super().encode_image(image)


def asking(number: int) -> bytes:
    return request(json.dumps({"image": b64encode(picture(seed=number)).decode(), "captions": [str(number)]}).encode())


@pytest.mark.parametrize("path", ["/score", "/images"])
def test_busy_encode_threads_keep_nobody_from_the_state_routes(path: str) -> None:
    """O8. Pictures that wait for an encode thread hold a place in the queue: their number is bounded and the next is refused at once.

    The event loop decodes nothing: probes and metrics are answered while not one picture is ready, and the device has had no work.
    """
    num_asked, encoder, scorer = 8, BusyEncoder(), OracleScorer()
    with (
        wire(encoder=encoder, scorer=scorer, max_queue_items=num_asked, max_captions=num_asked) as server,
        ThreadPoolExecutor(num_asked) as pool,
    ):
        asked = [pool.submit(talk, server.address, asking(number)) for number in range(num_asked)]
        eventually(lambda: server.served.metric("reward_queue_items") == num_asked, "all admitted")
        eventually(lambda: len(encoder.begun) == NUM_THREADS, "every thread is busy")
        for state in ("/livez", "/readyz", "/metrics", "/info"):
            assert talk(server.address, GET.format(state).encode()).answers[0].status == 200
        more = asking(num_asked) if path == "/score" else request(picture(seed=99), method="PUT", path=path)
        (refused,) = talk(server.address, more).answers
        assert (refused.status, refused.error["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert (len(encoder.begun), scorer.batches) == (NUM_THREADS, [])
        encoder.gate.set()
        for number, answer in enumerate(each.result().answers[0] for each in asked):
            assert json.loads(answer.body)["scores"] == expected_scores(picture(seed=number), [str(number)])
        assert server.served.metric("reward_queue_items") == server.served.metric("reward_queue_tokens") == 0
