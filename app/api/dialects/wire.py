"""The JSON that dialects share: chats, contents with pictures, what engines' clients add. Unknown fields pass, as they do there."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from app.api.dialects.chats import without_picture
from app.api.schemas import Text
from app.errors import InvalidRequest

_PICTURE_KINDS = ("image_url", "image", "input_image")
_TEXT_KINDS = ("text", "input_text")


class Peer(BaseModel):
    """A body of another system. Its clients send more than we need, and add to it; values are taken as they are."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class Address(Peer):
    """OpenAI's wrapping of an image."""

    url: Text


class Part(Peer):
    """A piece of a content: a text or a picture."""

    type: Text | None = Field(None, examples=["image_url"])
    text: Text | None = None
    image_url: Text | Address | None = None
    image: Text | Address | None = None

    @model_validator(mode="after")
    def _known(self) -> Part:
        kinds = (*_PICTURE_KINDS, *_TEXT_KINDS)
        if self.type is not None and self.type not in kinds:
            raise PydanticCustomError("part_unknown", "a part is one of " + ", ".join(kinds))
        if (self.picture is None) == (self.text is None):
            raise PydanticCustomError("part_unclear", "a part has a text or an image")
        if self.type is not None and (self.type in _TEXT_KINDS) != (self.text is not None):
            raise PydanticCustomError("part_unclear", "a part is of another type than what it has")
        return self

    @property
    def picture(self) -> str | None:
        given = self.image_url if self.image_url is not None else self.image
        return given.url if isinstance(given, Address) else given


def _as_parts(content: Any) -> Any:
    return [{"text": content}] if isinstance(content, str) else content


Content = Annotated[list[Part], BeforeValidator(_as_parts, json_schema_input_type=Text | list[Part])]


class Message(Peer):
    """One turn of a chat."""

    role: Text = Field(examples=["user"])
    content: Content

    @property
    def images(self) -> list[str]:
        return [part.picture for part in self.content if part.picture is not None]


class Side(Peer):
    """One side of a pair: a plain text, or contents, or Jina's `{"text"}` and `{"image"}`."""

    bare: Text | None = None
    text: Text | None = None
    image: Text | Address | None = None
    content: Content | None = None

    @property
    def picture(self) -> str | None:
        """Raises InvalidRequest (`several_images`)."""
        own = Part(image=self.image).picture if self.image is not None else None
        found = [own] if own is not None else []
        found += [part.picture for part in self.content or [] if part.picture is not None]
        if len(found) > 1:
            raise InvalidRequest("a score is of one image", code="several_images")
        return found[0] if found else None

    @property
    def words(self) -> str | None:
        texts = [part.text for part in self.content or [] if part.text is not None]
        texts += [text for text in (self.text, self.bare) if text is not None]
        return "\n".join(texts) if texts else None


def _as_side(side: Any) -> Any:
    return {"bare": side} if isinstance(side, str) else side


def _as_sides(sides: Any) -> Any:
    return sides if isinstance(sides, list) else [sides]


def _as_list(texts: Any) -> Any:
    return [texts] if isinstance(texts, str) else texts


OneSide = Annotated[Side, BeforeValidator(_as_side, json_schema_input_type=Text | Side)]
Sides = Annotated[list[OneSide], BeforeValidator(_as_sides, json_schema_input_type=OneSide | list[OneSide])]
Texts = Annotated[list[Text], BeforeValidator(_as_list, json_schema_input_type=Text | list[Text])]


class Engine(Peer):
    """What clients of inference engines add. `model` is theirs to write while one model is loaded; of several it names one."""

    model: Text | None = None
    use_activation: bool | None = Field(None, description="true: the sigmoid of the score; else the raw score.")
    mm_processor_kwargs: dict[str, Any] | None = None
    chat_template: Text | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    activation: bool | None = None  # older names of use_activation
    softmax: bool | None = None
    normalize: bool | None = None

    @model_validator(mode="after")
    def _only_ours(self) -> Engine:
        """Template and picture recipe are the artifact's. What asks for others is refused: its scores would be other ones."""
        for name in ("mm_processor_kwargs", "chat_template", "chat_template_kwargs"):
            if getattr(self, name):
                raise PydanticCustomError("not_changeable", f"{name} cannot be changed: the artifact says how it is to be encoded")
        if self.activation or self.softmax or self.normalize:
            raise PydanticCustomError("not_changeable", "for numbers between 0 and 1 send use_activation")
        return self


def words_of_user(messages: list[Message]) -> str:
    """What the user said, of one turn, without the id of a picture. Raises InvalidRequest (`several_turns`)."""
    said = [message for message in messages if message.role == "user"]
    if len(said) > 1:
        raise InvalidRequest("several turns of the user's, of which one would be the prompt", code="several_turns")
    return without_picture(texts_of(said[0])) if said else ""


def texts_of(message: Message) -> str:
    """A turn's words, line by line."""
    return "\n".join(part.text for part in message.content if part.text is not None)
