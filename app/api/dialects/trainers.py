"""How trainers ask for rewards: OpenRLHF's `/get_reward` and slime's `/rm`. They send texts; see `pictures.py` for the picture."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from app.api.dialects.asked import Asked, Asking, Item, Scored, activated, placed
from app.api.dialects.chats import last_user, split_or_none, without_end, without_picture
from app.api.dialects.pictures import named_in, needed
from app.api.dialects.wire import Message, Peer, texts_of, words_of_user
from app.api.schemas import Text
from app.errors import InvalidRequest, TooManyItems


class GetRewardRequest(Peer):
    """OpenRLHF: whole chats, their prompts, their labels."""

    query: list[Text] = Field(examples=[["<|im_start|>user\n..<|im_end|>\n<|im_start|>assistant\nIt is about the iceberg.<|im_end|>"]])
    prompts: list[Text] | None = None
    labels: list[Any] | None = Field(None, examples=[['{"image_id": "sha256:.."}']])


class RmRequest(Peer):
    """slime: one completion."""

    prompt: Text | list[Message]
    response: Text = Field(examples=["It is about the iceberg."])
    label: Any = Field(None, examples=[{"image_id": "sha256:.."}])
    metadata: Any = None


class RewardsAnswer(Peer):
    """What OpenRLHF logs and learns from: raw scores, their sigmoid for its filter between 0 and 1, lengths."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


class RewardAnswer(Peer):
    """slime's with `?format=dict`, for `--reward-key reward`."""

    reward: float
    caption_chars: int


def read_get_reward(told: GetRewardRequest, asking: Asking) -> Asked:
    """Raises InvalidRequest where the lists have different lengths, or a caption cannot be told from its prompt."""
    num = len(told.query)
    if num > asking.max_captions:  # before anything is read of their labels
        raise TooManyItems(f"at most {asking.max_captions} captions a request", field="query")
    for name, given in (("prompts", told.prompts), ("labels", told.labels)):
        if given is not None and len(given) != num:
            raise InvalidRequest(f"{len(given)} for {num} queries", field=name)
    items = [
        _item_of_chat(query, told.prompts[index] if told.prompts else None, told.labels[index] if told.labels else None, index, asking)
        for index, query in enumerate(told.query)
    ]
    return Asked(items, lambda scored: _rewards(items, scored))


def _item_of_chat(query: str, prompt: str | None, label: Any, index: int, asking: Asking) -> Item:
    where = f"query[{index}]"
    with placed(where):
        before, caption = split_or_none(query, prompt, may_fail=asking.refused is not None)
        if caption is None:
            return Item(None, where)
        named = named_in([(f"labels[{index}]", label)], before)
        image = needed(named.image, f"labels[{index}]", takes_images=asking.takes_images)
        asked = named.prompt if asking.takes_images or named.prompt is not None else last_user(prompt or before) or None
    return Item(caption, where, image, asked)


def _rewards(items: list[Item], scored: Scored) -> RewardsAnswer:
    return RewardsAnswer(
        rewards=list(scored.scores),
        scores=[activated(score, use=True) for score in scored.scores],
        extra_logs={"caption_chars": [float(len(item.caption or "")) for item in items]},
    )


def read_rm(told: RmRequest, asking: Asking) -> Asked:
    """Raises InvalidRequest for a `format` that is none."""
    form = _form(asking.params)
    with placed("prompt"):
        named = named_in([("label", told.label), ("metadata", told.metadata), *_shown(told.prompt)], _words(told.prompt))
        prompt = named.prompt if asking.takes_images or named.prompt is not None else _said(told.prompt) or None
    image = needed(named.image, "label", takes_images=asking.takes_images)
    item = Item(without_end(told.response), "response", image, prompt)
    return Asked([item], lambda scored: _reward(item, scored, form))


def _shown(prompt: str | list[Message]) -> list[tuple[str, Any]]:
    """The picture among the messages that the policy did not write."""
    turns = [] if isinstance(prompt, str) else prompt
    found = [
        (f"prompt[{index}]", {"image": image})
        for index, message in enumerate(turns)
        if message.role != "assistant"
        for image in message.images
    ]
    if len(found) > 1:
        raise InvalidRequest("a score is of one image", code="several_images")
    return list(found)


def _words(prompt: str | list[Message]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(texts_of(message) for message in prompt if message.role != "assistant")


def _form(params: Any) -> Literal["number", "dict"]:
    form = params.get("format", "number")
    if form not in ("number", "dict"):
        raise InvalidRequest("format is number or dict", field="format")
    return "dict" if form == "dict" else "number"


def _said(prompt: str | list[Message]) -> str:
    """What a text-only model takes for the prompt: the user's words, of one turn. Raises InvalidRequest (`several_turns`)."""
    if isinstance(prompt, str):
        return without_picture(last_user(prompt))
    return words_of_user(prompt)


def _reward(item: Item, scored: Scored, form: str) -> float | RewardAnswer:
    (score,) = scored.scores
    return score if form == "number" else RewardAnswer(reward=score, caption_chars=len(item.caption or ""))
