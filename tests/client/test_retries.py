"""What a client does about failures: what it repeats, how long it waits, when it gives up, and that nothing becomes a score."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import httpx
import pytest

from app.client import AsyncRewardClient, Group, ImageUnknown, ModelChanged, Refused, RewardClient, RewardError, Unanswered
from app.client.calls import KnownPictures, in_order
from tests.client.both import FINGERPRINT, Kind, Script, asking, both, broken, refusing, right

PICTURE = b"a picture"
URLS = ("http://one", "http://two", "http://three")

REPEATED = {
    "overloaded": refusing(503, "overloaded", retryable=True, retry_after="1"),
    "no Retry-After": refusing(503, "draining", retryable=True),
    "a limit": refusing(429),
    "bad gateway": refusing(502),
    "gateway timeout": refusing(504),
    "a proxy's own fault": refusing(500),
    "retryable by its word": refusing(500, "scoring_failed", retryable=True),
    "a late body": refusing(408, "body_timeout", retryable=True),
    "no connection": broken(httpx.ConnectError("refused")),
    "cut while read": broken(httpx.ReadError("reset")),
    "closed without an answer": broken(httpx.RemoteProtocolError("closed")),
    "too slow": broken(httpx.ReadTimeout("slow")),
}
FINAL = {
    "a bad request": refusing(422, "invalid_request"),
    "no key": refusing(401, "unauthorized"),
    "too large": refusing(413, "body_too_large"),
    "a score that is none": refusing(500, "nonfinite_score"),
    "no such route": refusing(404),
}


@both
@pytest.mark.parametrize("step", REPEATED.values(), ids=REPEATED.keys())
def test_what_may_pass_is_asked_again(kind: Kind, step: Any) -> None:
    script = Script(step, step, right)
    with asking(kind, transport=script) as asked:
        assert asked.score(PICTURE, ["a", "bb"]) == [1.0, 2.0]
    assert len(script.posts) == 3
    assert len(script.uploads) == 1
    assert len(asked.slept) == 2


@both
@pytest.mark.parametrize("step", FINAL.values(), ids=FINAL.keys())
def test_what_would_be_said_again_is_asked_once(kind: Kind, step: Any) -> None:
    script = Script(step)
    with asking(kind, transport=script) as asked, pytest.raises(Refused):
        asked.score(PICTURE, ["a"])
    assert len(script.posts) == 1
    assert asked.slept == []


@both
@pytest.mark.parametrize(("said", "least"), [("7", 7.0), ("0", 0.0), ("0.5", 0.5), ("soon", 0.0), ("nan", 0.0), ("-3", 0.0)])
def test_the_server_says_how_long_to_wait(kind: Kind, said: str, least: float) -> None:
    script = Script(refusing(503, "overloaded", retryable=True, retry_after=said), right)
    with asking(kind, transport=script) as asked:
        asked.score(PICTURE, ["a"])
    (waited,) = asked.slept
    assert least <= waited <= max(least, 10.0)
    assert waited > 0


@both
def test_waits_of_its_own_grow_and_end(kind: Kind) -> None:
    script = Script(*[refusing(502)] * 9, right)
    with asking(kind, transport=script) as asked:
        asked.score(PICTURE, ["a"])
    assert all(0.5 * wait <= found <= wait for wait, found in zip((0.25, 0.5, 1, 2, 4, 8, 10, 10, 10), asked.slept, strict=True))


@both
def test_beyond_the_deadline_nothing_is_waited_for(kind: Kind) -> None:
    """A wait that would end after it is not begun: whoever asked hears at once, with the last reason."""
    script = Script(refusing(503, "overloaded", retryable=True, retry_after="100"))
    with asking(kind, transport=script, deadline_s=50) as asked, pytest.raises(Unanswered, match=r"after 1 attempts.*overloaded") as found:
        asked.score(PICTURE, ["a"])
    assert asked.slept == []
    assert isinstance(found.value.__cause__, Refused)


@both
def test_every_server_is_asked_before_any_is_waited_for(kind: Kind) -> None:
    down = broken(httpx.ConnectError("refused"))
    script = Script(down, down, down, down, right)
    with asking(kind, URLS, transport=script) as asked:
        assert asked.score(PICTURE, ["abc"]) == [3.0]
    hosts = ["http://" + request.url.host for request in script.asked if request.method == "POST"]
    first = list(in_order(URLS, script.posts[0]["groups"][0]["image"]))
    assert hosts == [*first, *first[:2]]
    assert [wait > 0 for wait in asked.slept] == [False, False, True, False]
    assert sorted(script.uploads) == ["one", "three", "two"]  # each was sent it once


@both
def test_a_picture_has_its_server(kind: Kind) -> None:
    """The same for everybody, spread over pictures, so that each is kept once."""
    script = Script()
    pictures = [bytes([number]) for number in range(60)]
    with asking(kind, URLS, transport=script) as asked:
        asked.score_groups([Group(picture, ["a"]) for picture in pictures * 2])
    assert len(script.uploads) == len(pictures)
    assert min(script.uploads.count(url.removeprefix("http://")) for url in URLS) >= 8
    for request, post in zip([each for each in script.asked if each.method == "POST"], script.posts, strict=True):
        assert {in_order(URLS, group["image"])[0] for group in post["groups"]} == {f"http://{request.url.host}"}


@both
def test_a_picture_the_server_forgot_is_sent_again_at_once(kind: Kind) -> None:
    script = Script(right, refusing(404, "image_unknown"), right)
    with asking(kind, transport=script) as asked:
        assert asked.score(PICTURE, ["a"]) == asked.score(PICTURE, ["b"]) == [1.0]
    assert len(script.uploads) == 2
    assert asked.slept == []


@both
def test_an_id_alone_cannot_be_sent_again(kind: Kind) -> None:
    script = Script(refusing(404, "image_unknown"))
    with asking(kind, transport=script) as asked, pytest.raises(ImageUnknown):
        asked.score("sha256:" + "0" * 64, ["a"])
    assert (len(script.posts), script.uploads) == (1, [])


@both
def test_an_id_beside_bytes_is_not_asked_for_ever(kind: Kind) -> None:
    script = Script(refusing(404, "image_unknown"))
    with asking(kind, transport=script) as asked, pytest.raises(ImageUnknown):
        asked.score_groups([Group("sha256:" + "0" * 64, ["a"]), Group(PICTURE, ["b"])])
    assert (len(script.posts), len(script.uploads)) == (2, 2)


@both
def test_a_server_that_keeps_no_picture_is_given_up_with_the_deadline(kind: Kind) -> None:
    script = Script(refusing(404, "image_unknown"))
    with asking(kind, transport=script, deadline_s=0.2) as asked, pytest.raises(Unanswered, match="image_unknown"):
        asked.score(PICTURE, ["a"])


@both
def test_the_model_of_the_first_answer_is_expected_from_then_on(kind: Kind) -> None:
    script = Script()
    with asking(kind, transport=script) as asked:
        assert asked.client.fingerprint is None
        asked.score(PICTURE, ["a"])
        asked.score(PICTURE, ["b"])
        assert asked.client.fingerprint == FINGERPRINT
    assert [post.get("expect_fingerprint") for post in script.posts] == [None, FINGERPRINT]


@both
@pytest.mark.parametrize(
    "step", [refusing(412, "model_changed"), lambda told: told | {"model_fingerprint": "e" * 64}], ids=["said", "seen"]
)
def test_another_model_gives_no_scores(kind: Kind, step: Any) -> None:
    script = Script(step)
    with asking(kind, transport=script, fingerprint=FINGERPRINT) as asked, pytest.raises(ModelChanged):
        asked.score(PICTURE, ["a"])
    assert len(script.posts) == 1


@both
def test_one_failure_among_many_requests_is_that_error(kind: Kind) -> None:
    """Not a group of errors: a trainer catches RewardError."""
    script = Script(right, right, refusing(422, "invalid_request"), right)
    with asking(kind, transport=script) as asked, pytest.raises(RewardError, match="invalid_request"):
        asked.score_groups([Group(bytes([number]), ["a"] * 100) for number in range(20)])


@both
def test_a_server_that_is_not_there_is_noticed_long_before_one_that_computes(kind: Kind) -> None:
    """A dead host swallows packets; the next server is to be asked soon."""
    script = Script()
    with asking(kind, transport=script, attempt_s=60) as asked:
        asked.score(PICTURE, ["a"])
    for timeout in (request.extensions["timeout"] for request in script.asked):
        assert timeout["connect"] <= 5
        assert 60 <= timeout["read"] <= 65
    assert 59_000 <= script.posts[0]["timeout_ms"] <= 60_000


class Silent(httpx.AsyncBaseTransport):
    """Takes requests and never answers."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError("nothing sets it")


@pytest.mark.parametrize("num_requests", [1, 32], ids=["waiting for its turn", "waiting for an answer"])
def test_an_event_loop_waits_no_longer_than_the_deadline(num_requests: int) -> None:
    async def ask() -> list[BaseException | list[float]]:
        client = AsyncRewardClient("http://rewards", transport=Silent(), deadline_s=0.1, num_requests=num_requests)
        return await asyncio.gather(*(client.score(None, [caption]) for caption in "ab"), return_exceptions=True)

    assert [type(each) for each in asyncio.run(ask())] == [Unanswered, Unanswered]


class Late(KnownPictures):
    """Knows every picture, but not at the first look: another thread was just done sending it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_looks = 0

    def __contains__(self, place: tuple[str, str]) -> bool:
        self.num_looks += 1
        return self.num_looks > 1


def test_a_picture_that_was_sent_since_it_was_looked_for_is_not_sent_again() -> None:
    script = Script()
    with RewardClient("http://rewards", transport=script) as client:
        client._known = Late()
        assert client.score(PICTURE, ["a"]) == [1.0]
    assert script.uploads == []


def test_the_oldest_pictures_are_forgotten() -> None:
    known = KnownPictures(max_known=2)
    for name in "abc":
        known.add("http://one", name)
    assert [("http://one", name) in known for name in "abc"] == [False, True, True]
    assert ("http://two", "c") not in known


@both
@pytest.mark.parametrize("urls", [(), "ftp://x", "example.org", ("http://x", "http://x/")])
def test_addresses_are_checked(kind: Kind, urls: Any) -> None:
    with pytest.raises(ValueError, match="base URLs"):
        asking(kind, urls).__enter__()


@both
def test_a_retry_leaves_the_generator_of_a_seeded_run_alone(kind: Kind) -> None:
    """Or a run whose server was restarted would go another way from there on."""
    before = random.getstate()
    with asking(kind, URLS, transport=Script(refusing(503), refusing(503), refusing(503), refusing(503), right)) as asked:
        assert asked.score(None, ["four"]) == [4.0]
        assert asked.slept
    assert random.getstate() == before


@both
def test_every_request_names_its_training_run(kind: Kind) -> None:
    script = Script(refusing(503), right)
    with asking(kind, transport=script, run_id="grpo-7") as asked:
        asked.score(PICTURE, ["a"])
    assert [request.headers.get("X-Run-Id") for request in script.asked] == ["grpo-7"] * 3
    with asking(kind, transport=script) as asked:
        asked.score(PICTURE, ["a"])
    assert "X-Run-Id" not in script.asked[-1].headers


@both
@pytest.mark.parametrize("run_id", ["", ".", "a/b", "a b", "x" * 65, "ü", "a\r\nX-Evil: 1", "a\n"])
def test_a_run_id_no_server_takes_is_refused_at_once(kind: Kind, run_id: str) -> None:
    with pytest.raises(ValueError, match="a run id is"):
        asking(kind, run_id=run_id).__enter__()
