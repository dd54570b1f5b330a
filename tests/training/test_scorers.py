"""Both scorers: the one in process against one forward a caption, the one over HTTP against a real server and a scripted one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from app.artifacts import Artifact
from app.contracts import Group
from app.encoding import Encoder
from app.errors import ApiError, ImageRejected, NonfiniteScore
from app.images import decode_image, image_id
from app.model import LoadedModel
from app.scoring import score_plain
from tests.e2e.server import started
from tests.tiny import LIMITS, picture
from training.scorers import (
    CaptionGroup,
    Item,
    LocalScorer,
    Outcome,
    Refusal,
    RemoteScorer,
    Target,
    make_groups,
    open_local,
    open_remote,
    score_items,
)

TARGET = Target("tiny", "artifact", "f" * 64, "float32", "cpu", "Say it.", False, 1.0, True)
TOO_LONG = "word " * 200
KEY = "a key of more than sixteen characters".replace(" ", "-")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_bytes(picture(84 + 28 * number, 84, seed=number))
    return paths


def items_of(images: Sequence[Path | None]) -> list[Item]:
    """Several prompts, one caption that is refused, and one that stands twice."""
    captions = ("The penguin.", "Nobody told the octopus about casual Friday.", TOO_LONG, "An umbrella.", "The penguin.")
    return [Item(image, prompt, caption) for image in images for prompt in (None, "Judge this.") for caption in captions]


def local(encoder: Encoder, loaded: LoadedModel, max_batch_tokens: int = 8192) -> LocalScorer:
    return LocalScorer(TARGET, encoder, loaded.model, max_batch_tokens)


@dataclass
class Recording:
    """Scores nothing: the length of each caption. Implements `GroupScorer` and keeps what it was asked."""

    asked: list[CaptionGroup] = field(default_factory=list)

    @property
    def target(self) -> Target:
        return TARGET

    def score(self, groups: Sequence[CaptionGroup]) -> Iterator[tuple[Outcome, ...]]:
        for group in groups:
            self.asked.append(group)
            yield tuple(float(len(caption)) for caption in group.captions)


def test_every_distinct_caption_is_asked_for_once(images: list[Path]) -> None:
    scorer, steps = Recording(), []
    found = score_items(scorer, items_of(images), 3, steps.append)
    asked = [Item(group.image, group.prompt, caption) for group in scorer.asked for caption in group.captions]
    assert len(asked) == len(set(asked)) == 3 * 2 * 4
    assert found == {item: float(len(item.caption)) for item in asked}
    assert sum(steps) == len(asked)
    assert max(len(group.captions) for group in scorer.asked) == 3


def test_groups_of_an_image_stand_together() -> None:
    """Whatever the order of the pairs: pixels are made once an image."""
    first, second = Path("a.png"), Path("b.png")
    items = [Item(first, None, "1"), Item(second, None, "2"), Item(first, "p", "3"), Item(first, None, "4"), Item(second, None, "2")]
    assert make_groups(items, 16) == [
        CaptionGroup(first, None, ("1", "4")),
        CaptionGroup(first, "p", ("3",)),
        CaptionGroup(second, None, ("2",)),
    ]


@pytest.mark.parametrize("max_batch_tokens", [1, 300, 8192])
def test_local_scores_are_those_of_one_forward_a_caption(
    encoder: Encoder, loaded: LoadedModel, images: list[Path], max_batch_tokens: int
) -> None:
    found = score_items(local(encoder, loaded, max_batch_tokens), items_of([*images, None]), 2)
    assert {type(outcome) for item, outcome in found.items() if item.caption == TOO_LONG} == {Refusal}
    for item, outcome in found.items():
        if item.caption != TOO_LONG:
            image = item.image and encoder.encode_image(decode_image(item.image.read_bytes(), LIMITS, exif_transpose=False))
            group, _ = encoder.encode(Group((item.caption,), item.prompt, image or None))
            assert group is not None
            (plain,) = score_plain(loaded.model, [group])
            assert outcome == pytest.approx(plain.values[0], abs=1e-4)


def test_a_group_of_refused_captions_only_needs_no_forward(encoder: Encoder, loaded: LoadedModel, images: list[Path]) -> None:
    (outcomes,) = local(encoder, loaded).score([CaptionGroup(images[0], None, (TOO_LONG, TOO_LONG + "!"))])
    assert [isinstance(outcome, Refusal) and outcome.code for outcome in outcomes] == ["caption_too_long"] * 2


def test_no_groups_no_scores(encoder: Encoder, loaded: LoadedModel) -> None:
    assert score_items(local(encoder, loaded), [], 16) == {}


@pytest.mark.parametrize(("content", "words"), [(b"not a picture", "could not be read"), (None, "No such file")])
def test_a_bad_image_stops_with_its_name(encoder: Encoder, loaded: LoadedModel, tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "510.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageRejected, match=f"510.png: .*{words}"):
        score_items(local(encoder, loaded), [Item(path, None, "a")], 16)


def test_a_score_that_is_no_number_stops(artifact: Artifact, encoder: Encoder, images: list[Path]) -> None:
    scorer = open_local(str(artifact.root), device="cpu", dtype="float32")
    with torch.no_grad():
        scorer._model.head.last.weight.fill_(float("nan"))
    with pytest.raises(NonfiniteScore):
        score_items(scorer, [Item(images[0], None, "a")], 16)


def test_a_running_server_gives_the_scores_of_this_process(artifact: Artifact, images: list[Path]) -> None:
    """The same artifact, the same refusals, the same fingerprint; only the way differs. A wrong key is refused."""
    items = items_of(images)
    with started("--model", str(artifact.root), "--api-key", KEY, "--device", "cpu") as server:
        with open_remote(server.url, KEY) as remote:
            found = score_items(remote, items, 2)
        with pytest.raises(ApiError) as refused, open_remote(server.url, "x" * 20):
            pass
    here = open_local(str(artifact.root), device="cpu")
    expected = score_items(here, items, 2)
    assert refused.value.code == "unauthorized"
    assert remote.target.fingerprint == here.target.fingerprint
    assert (remote.target.default_prompt, remote.target.dtype) == (here.target.default_prompt, here.target.dtype)
    assert list(found) == list(expected)
    for item, outcome in found.items():
        own = expected[item]
        assert outcome == (own if isinstance(own, Refusal) else pytest.approx(own, abs=1e-4))


# a scripted server

FINGERPRINT = "a" * 64
CARD = {
    "model": {"fingerprint": FINGERPRINT, "default_prompt": "Say it.", "prompt_policy": "fixed", "calibration": {"temperature": 2.0}},
    "runtime": {"dtype": "bfloat16", "device": "cuda:0"},
    "settings": {"max_timeout_ms": 60_000, "max_groups": 16, "max_captions": 256},
}
Reply = Callable[[dict[str, Any]], httpx.Response]


@dataclass
class Scripted:
    """A server that answers /score by its script, then with the length of each caption. Holds images until told to forget."""

    script: list[Reply] = field(default_factory=list)
    card: Any = field(default_factory=lambda: CARD)
    images: set[str] = field(default_factory=set)
    num_uploads: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def connect(self) -> AbstractContextManager[RemoteScorer]:
        return open_remote("http://server/", transport=httpx.MockTransport(self.answer), wait=self.waits.append)

    def run(self, items: Sequence[Item], group_size: int = 16) -> dict[Item, Outcome]:
        with self.connect() as remote:
            return score_items(remote, items, group_size)

    def answer(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/info":
            return httpx.Response(200, json=self.card)
        if request.url.path == "/images":
            return self._keep(request.content)
        body = json.loads(request.content)
        self.bodies.append(body)
        return (self.script.pop(0) if self.script else self.score)(body)

    def score(self, body: dict[str, Any]) -> httpx.Response:
        if any("image" in group and group["image"] not in self.images for group in body["groups"]):
            return refusal(404, "image_unknown", field="groups[0].image")
        groups = [{"scores": [len(caption) for caption in group["captions"]]} for group in body["groups"]]
        return httpx.Response(200, json={"groups": groups, "model_fingerprint": FINGERPRINT})

    def _keep(self, content: bytes) -> httpx.Response:
        if not content.startswith(b"\x89PNG"):
            return refusal(422, "image_decode_failed", field="image")
        self.num_uploads += 1
        self.images.add(image_id(content))
        return httpx.Response(200, json={"image_id": image_id(content)})

    def forget(self, body: dict[str, Any]) -> httpx.Response:
        self.images.clear()
        return self.score(body)


def refusal(status: int, code: str, *, field: str | None = None, headers: dict[str, str] | None = None) -> httpx.Response:
    return httpx.Response(status, json={"error": {"code": code, "message": f"because {code}", "field": field}}, headers=headers)


def answers(**body: Any) -> Reply:
    return lambda _: httpx.Response(200, json=body)


def test_the_card_says_what_is_evaluated_and_what_a_request_may_hold(images: list[Path]) -> None:
    server = Scripted(card=CARD | {"settings": {"max_timeout_ms": 5_000, "max_groups": 2, "max_captions": 7}})
    with server.connect() as remote:
        score_items(remote, [Item(image, None, f"{number}") for image in images for number in range(6)], 3)
    assert remote.target == Target("http://server/", "server", FINGERPRINT, "bfloat16", "cuda:0", "Say it.", True, 2.0, None)
    assert [[len(group["captions"]) for group in body["groups"]] for body in server.bodies] == [[3, 3]] * 3
    assert {body["timeout_ms"] for body in server.bodies} == {5_000}


def test_a_request_names_each_image_by_the_id_of_one_upload_and_pins_the_model(images: list[Path]) -> None:
    server = Scripted()
    found = server.run([Item(image, None, "four") for image in images] + [Item(None, "p", "seven..")])
    assert server.num_uploads == 3
    (body,) = server.bodies
    assert body["expect_fingerprint"] == FINGERPRINT
    assert body["on_item_error"] == "null"
    assert body["groups"][0] == {"captions": ["four"], "image": image_id(images[0].read_bytes())}
    assert body["groups"][3] == {"captions": ["seven.."], "prompt": "p"}
    assert list(found.values()) == [4.0, 4.0, 4.0, 7.0]


def test_a_busy_server_is_asked_again_after_the_seconds_it_names(images: list[Path]) -> None:
    busy = [refusal(503, "overloaded", headers={"Retry-After": seconds}) for seconds in ("2", "7")]
    server = Scripted([lambda _: busy[0], lambda _: busy[1]])
    assert server.run([Item(images[0], None, "four")]) == {Item(images[0], None, "four"): 4.0}
    assert server.waits == [2.0, 7.0]
    assert server.bodies[0] == server.bodies[1] == server.bodies[2]


def test_patience_with_a_busy_server_ends(images: list[Path]) -> None:
    """Ten waits of a minute, then its error."""
    server = Scripted([lambda _: refusal(503, "overloaded", headers={"Retry-After": "60"})] * 20)
    with pytest.raises(ApiError, match="because overloaded"):
        server.run([Item(images[0], None, "a")])
    assert server.waits == [60.0] * 10


@pytest.mark.parametrize(
    ("status", "code", "headers"),
    [(412, "model_changed", {}), (413, "too_many_tokens", {}), (500, "scoring_failed", {"Retry-After": "1"}), (503, "unavailable", {})],
)
def test_any_other_error_stops_with_the_servers_own_words(images: list[Path], status: int, code: str, headers: dict[str, str]) -> None:
    """Also a 503 that names no seconds: nothing says that waiting helps."""
    server = Scripted([lambda _: refusal(status, code, headers=headers)])
    with pytest.raises(ApiError, match=f"http://server/: because {code}") as stopped:
        server.run([Item(images[0], None, "a")])
    assert stopped.value.code == code
    assert (len(server.bodies), server.waits) == (1, [])


def test_an_image_the_server_forgot_is_sent_again(images: list[Path]) -> None:
    server = Scripted()
    with server.connect() as remote:
        score_items(remote, [Item(images[0], None, "a")], 16)
        server.script.append(server.forget)
        assert score_items(remote, [Item(images[0], None, "bb")], 16) == {Item(images[0], None, "bb"): 2.0}
    assert server.num_uploads == 2


def test_a_server_that_keeps_no_image_stops_the_run(images: list[Path]) -> None:
    server = Scripted()
    server.script += [server.forget] * 10
    with pytest.raises(ApiError, match="image_unknown"):
        server.run([Item(images[0], None, "a")])
    assert server.num_uploads == 3


def test_an_image_the_server_refuses_stops_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "510.png"
    path.write_bytes(b"not a picture")
    with pytest.raises(ImageRejected, match=r"510\.png: .*because image_decode_failed"):
        Scripted().run([Item(path, None, "a")])


def test_a_null_score_with_its_error_is_a_refusal() -> None:
    group = {"scores": [1.5, None], "errors": [None, {"code": "caption_too_long", "message": "too long"}]}
    server = Scripted([answers(groups=[group], model_fingerprint=FINGERPRINT)])
    found = server.run([Item(None, None, "a"), Item(None, None, "b")])
    assert list(found.values()) == [1.5, Refusal("caption_too_long", "too long")]


@pytest.mark.parametrize(
    "groups",
    [
        None,
        [],
        [{}],
        [{"scores": [1.0, 2.0]}],
        [{"scores": [None]}],
        [{"scores": ["1.0"]}],
        [{"scores": [True]}],
        [{"scores": [1.0], "errors": []}, {"scores": [1.0]}],
        [{"scores": [1.0], "errors": [None, None]}],
    ],
)
def test_an_answer_of_another_shape_is_no_score(groups: Any) -> None:
    server = Scripted([answers(groups=groups, model_fingerprint=FINGERPRINT)])
    with pytest.raises(ApiError, match="documented shape"):
        server.run([Item(None, None, "a")])


def test_scores_of_another_model_are_no_scores() -> None:
    server = Scripted([answers(groups=[{"scores": [1.0]}], model_fingerprint="b" * 64)])
    with pytest.raises(ApiError, match="another model"):
        server.run([Item(None, None, "a")])


HOSTILE_CARDS = [
    CARD | {"model": CARD["model"] | {"fingerprint": "<script>"}},
    CARD | {"model": CARD["model"] | {"calibration": {"temperature": "nan"}}},
    CARD | {"runtime": {"dtype": "bfloat16`", "device": "cpu"}},
    CARD | {"runtime": {"dtype": "bfloat16", "device": "cpu</p>"}},
]


@pytest.mark.parametrize("card", [{}, {"model": {}}, CARD | {"settings": {}}, CARD | {"runtime": None}, *HOSTILE_CARDS])
def test_something_else_than_a_punchline_server_is_named(card: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match="not the card of a Punchline server"):
        Scripted(card=card).run([])


def test_a_server_that_is_not_there_or_speaks_no_json_is_named() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    def stammer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(502, text="<html>")

    for transport, words in ((refuse, r"does not answer \(ConnectError\)"), (stammer, "HTTP 502 and something else than JSON")):
        with pytest.raises(ApiError, match=words), open_remote("http://server", transport=httpx.MockTransport(transport)):
            pass
