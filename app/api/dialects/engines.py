"""How clients of inference engines ask for the score of whole chats: `/classify`, `/v1/embeddings` and `/pooling`, as vLLM has them."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from app.api.dialects.asked import Asked, Asking, Item, Scored, activated, placed
from app.api.dialects.chats import last_user, split_or_none, without_end, without_picture
from app.api.dialects.pictures import named_in, needed
from app.api.dialects.wire import Engine, Message, Texts, texts_of, words_of_user
from app.errors import InvalidRequest


class ChatsRequest(Engine):
    """Texts of whole chats, or one chat as messages, the caption its last turn."""

    input: Texts | None = Field(None, examples=[["<|im_start|>user\n<image:sha256:..>..<|im_end|>\n<|im_start|>assistant\nNice day."]])
    messages: list[Message] | None = None
    label: Any = None
    metadata: Any = None

    @model_validator(mode="after")
    def _one_form(self) -> ChatsRequest:
        if (self.input is None) == (self.messages is None):
            raise PydanticCustomError("one_form", "send either input or messages")
        return self


class VectorRequest(ChatsRequest):
    """As `/classify`, the score as a vector of one number. OpenAI's own client asks for base64: one little-endian float32."""

    encoding_format: Literal["float", "base64"] = "float"

    def vector(self, score: float) -> list[float] | str:
        return [score] if self.encoding_format == "float" else base64.b64encode(struct.pack("<f", score)).decode("ascii")


class PoolingRequest(VectorRequest):
    """vLLM's `/pooling`."""

    task: Literal["classify", "token_classify", "score"] | None = None

    @model_validator(mode="after")
    def _last_token(self) -> PoolingRequest:
        if self.task == "token_classify":
            raise PydanticCustomError("not_supported", "one score a chat, of its last token")
        return self


def read_classify(told: ChatsRequest, asking: Asking) -> Asked:
    """verl's router and vLLM's clients read `data[i].probs`."""

    def datum(index: int, score: float) -> dict[str, Any]:
        return {"index": index, "label": "LABEL_0", "probs": [score], "num_classes": 1}

    return _asked(told, asking, "classify", datum)


def read_embeddings(told: VectorRequest, asking: Asking) -> Asked:
    """verl reads `data[-1].embedding[-1]` where its rollouts run on SGLang."""

    def datum(index: int, score: float) -> dict[str, Any]:
        return {"object": "embedding", "index": index, "embedding": told.vector(score)}

    return _asked(told, asking, "embd", datum)


def read_pooling(told: PoolingRequest, asking: Asking) -> Asked:
    """vLLM's examples read `data[i].data`."""

    def datum(index: int, score: float) -> dict[str, Any]:
        return {"index": index, "object": "pooling", "data": told.vector(score)}

    return _asked(told, asking, "pool", datum)


def _asked(told: ChatsRequest, asking: Asking, name: str, datum: Callable[[int, float], dict[str, Any]]) -> Asked:
    if told.messages is not None:
        items = [_item_of_messages(told.messages, told, asking)]
    else:
        items = [_item_of_text(text, index, told, asking) for index, text in enumerate(told.input or [])]

    def answer(scored: Scored) -> dict[str, Any]:
        data = [datum(index, activated(score, use=told.use_activation is True)) for index, score in enumerate(scored.scores)]
        return listed(data, scored, name)

    return Asked(items, answer)


def listed(data: list[dict[str, Any]], scored: Scored, name: str) -> dict[str, Any]:
    """OpenAI's form of a list."""
    about = {"id": f"{name}-{scored.request_id}", "object": "list", "created": scored.created, "model": scored.model}
    return {**about, "data": data, "usage": scored.usage}


def _item_of_text(text: str, index: int, told: ChatsRequest, asking: Asking) -> Item:
    where = f"input[{index}]"
    with placed(where):
        before, caption = split_or_none(text, None, may_fail=asking.refused is not None)
        if caption is None:
            return Item(None, where)
        named = named_in([("label", told.label), ("metadata", told.metadata)], before)
        image = needed(named.image, where, takes_images=asking.takes_images)
        said = None if asking.takes_images else without_picture(last_user(before)) or None
    return Item(caption, where, image, said if named.prompt is None else named.prompt)


def _item_of_messages(messages: list[Message], told: ChatsRequest, asking: Asking) -> Item:
    """The last turn is the caption, the words of the user's before it the prompt. One turn alone is a caption with its picture."""
    with placed("messages"):
        images = [image for message in messages for image in message.images]
        if len(images) > 1:
            raise InvalidRequest("a score is of one image", code="several_images")
        before = _before_caption(messages)
        places = [("label", told.label), ("metadata", told.metadata), *(("messages", {"image": image}) for image in images)]
        named = named_in(places, "\n".join(map(texts_of, before)))
        image = needed(named.image, "messages", takes_images=asking.takes_images)
        words = words_of_user(before).strip() or None
    return Item(without_end(texts_of(messages[-1])), "messages", image, words if named.prompt is None else named.prompt)


def _before_caption(messages: list[Message]) -> list[Message]:
    """Raises InvalidRequest where several turns do not end with an assistant's that answers a user's."""
    if len(messages) == 1 and messages[0].role == "user":
        return []
    if len(messages) < 2 or messages[-1].role != "assistant" or messages[-1].images:
        raise InvalidRequest("messages end with the assistant's, which is the caption, after a user's")
    if any(message.role not in ("system", "user") for message in messages[:-1]):
        raise InvalidRequest("several turns, of which one would be scored", code="several_turns")
    if all(message.role != "user" for message in messages):
        raise InvalidRequest("messages have no user's turn")
    return messages[:-1]
