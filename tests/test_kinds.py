"""Published layouts of reward models, each against its card's own recipe: alone, in groups, in mixed batches, and what must be refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from app.artifacts import Artifact, open_artifact
from app.contracts import Conversation, EncodedGroup, Group, Scores, Turn
from app.encoding import Encoder, load_encoder
from app.engine import Engine
from app.images import decode_image
from app.model import RewardModel, load_model
from app.scoring import score_plain, score_shared
from tests.published import PUBLISHED, Asked, Message, PublishedKind
from tests.scorers import reusing
from tests.tiny import LIMITS, picture


class Loaded(NamedTuple):
    """A published folder and what is made of it; the engine has a model of its own, whose layers it packs."""

    folder: Path
    artifact: Artifact
    encoder: Encoder
    model: RewardModel
    engine: Engine

    def ways(self, groups: Sequence[EncodedGroup]) -> Iterator[list[Scores]]:
        """The scores of every way to compute them."""
        yield score_plain(self.model, groups)
        yield score_shared(self.model, groups)
        scorer = reusing(self.engine, max_bytes=(1 << 20, 1 << 20, 0))
        for _ in ("cold", "warm"):
            yield scorer.score(scorer.prepare(groups))


QUESTION: list[Message] = [{"role": "user", "content": "Why did the penguin bring an umbrella?"}]
LONGER: list[Message] = [
    {"role": "user", "content": "Who is the octopus?"},
    {"role": "assistant", "content": "Nobody told me about casual Friday."},
    {"role": "user", "content": "And the penguin\n\nin the office? "},
]
ANSWERS = [
    "Because of the iceberg.",
    "It is casual Friday, they said, and nobody told the octopus",
    "No.",
    "",
    "  two spaces, a line\nand more\n",
]
each_kind = pytest.mark.parametrize("name", PUBLISHED)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    """One of each kind, opened as it was published. Do not write into them."""
    found = {}
    for name, kind in PUBLISHED.items():
        folder = kind.write(tmp_path_factory.mktemp(name))
        artifact = open_artifact(str(folder), offline=True, said=kind.said)
        found[name] = Loaded(folder, artifact, load_encoder(artifact), load_model(artifact).model, Engine(load_model(artifact).model))
    return found


def conversation(messages: list[Message]) -> Conversation:
    return tuple(Turn(message["role"], message["content"]) for message in messages)  # type: ignore[arg-type]


def group_of(encoder: Encoder, messages: list[Message], answers: list[str], seen: bytes | None) -> EncodedGroup:
    image = None if seen is None else encoder.encode_image(decode_image(seen, LIMITS, exif_transpose=False))
    group, errors = encoder.encode(Group(tuple(answers), conversation(messages), image))
    assert group is not None
    assert not any(errors), errors
    return group


def seen_by(kind: PublishedKind, seed: int = 0, size: tuple[int, int] = (120, 90)) -> bytes | None:
    return picture(*size, seed) if kind.takes_images else None


@each_kind
def test_the_layout_says_the_kind(loaded: dict[str, Loaded], name: str) -> None:
    artifact = loaded[name].artifact
    assert artifact.config.kind == name
    assert artifact.config.head.bias == (name == "value_head")
    assert all(said.partition("=")[0] not in PUBLISHED[name].said for said in artifact.assumed)


@each_kind
@pytest.mark.parametrize("messages", [QUESTION, LONGER], ids=["one turn", "three turns"])
def test_scores_are_those_of_the_cards_recipe(loaded: dict[str, Loaded], name: str, messages: list[Message]) -> None:
    at, kind = loaded[name], PUBLISHED[name]
    seen = seen_by(kind)
    expected = [kind.score(at.folder, Asked(messages, answer, seen)) for answer in ANSWERS]
    assert max(expected) - min(expected) > 0.05
    group = group_of(at.encoder, messages, ANSWERS, seen)
    for scores in at.ways([group]):
        assert scores[0].values == pytest.approx(expected, abs=1e-4)


@each_kind
def test_groups_of_a_mixed_batch_score_as_the_recipe_does(loaded: dict[str, Loaded], name: str) -> None:
    at, kind = loaded[name], PUBLISHED[name]
    asked = [
        (QUESTION, ANSWERS, seen_by(kind)),
        (LONGER, ANSWERS[:2], seen_by(kind)),
        (QUESTION, ANSWERS[2:4], seen_by(kind, 7, (90, 160))),
    ]
    groups = [group_of(at.encoder, messages, answers, seen) for messages, answers, seen in asked]
    expected = [[kind.score(at.folder, Asked(messages, answer, seen)) for answer in answers] for messages, answers, seen in asked]
    for scores in at.ways(groups):
        for one, other in zip(scores, expected, strict=True):
            assert one.values == pytest.approx(other, abs=1e-4)


@each_kind
def test_a_prompt_that_is_a_text_is_one_turn(loaded: dict[str, Loaded], name: str) -> None:
    encoder = loaded[name].encoder
    seen = seen_by(PUBLISHED[name])
    image = None if seen is None else encoder.encode_image(decode_image(seen, LIMITS, exif_transpose=False))
    as_text, _ = encoder.encode(Group(tuple(ANSWERS), QUESTION[0]["content"], image))
    as_turn = group_of(encoder, QUESTION, ANSWERS, seen)
    assert as_text is not None
    assert [row.tolist() for row in as_text.rows] == [row.tolist() for row in as_turn.rows]
