"""The JSON the API takes and gives, as strict models: no coercion, no unknown fields, no lone surrogates."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

IMAGE_EXAMPLE = "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
CAPTIONS_EXAMPLE = ["It says it is here about the iceberg.", "Nice day."]


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise PydanticCustomError("invalid_unicode", "the text has lone surrogates") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Options(Strict):
    """What every scoring request may add."""

    expect_fingerprint: Text | None = Field(None, description="Answer 412 unless exactly this model is loaded.")
    timeout_ms: int | None = Field(None, ge=1, description="Deadline; later than this the answer is 503.")


class ScoreGroup(Strict):
    """One image with its captions."""

    id: Text | None = Field(None, max_length=256, description="Yours, echoed; each only once.")
    image: Text | None = Field(
        None, description="base64, a base64 data: URL, or `sha256:<hex>` of bytes sent before.", examples=[IMAGE_EXAMPLE]
    )
    prompt: Text | None = Field(None, description="The instruction the captions answer; default: the model's own.")
    captions: list[Text] = Field(min_length=1, examples=[CAPTIONS_EXAMPLE])


class ScoreRequest(Options):
    """One group at the top level, or several in `groups`."""

    image: Text | None = Field(
        None, description="base64, a base64 data: URL, or `sha256:<hex>` of bytes sent before.", examples=[IMAGE_EXAMPLE]
    )
    prompt: Text | None = None
    captions: list[Text] | None = Field(None, min_length=1, examples=[CAPTIONS_EXAMPLE])
    groups: list[ScoreGroup] | None = Field(None, min_length=1)
    on_item_error: Literal["fail", "null"] = Field("fail", description="A caption that cannot be scored fails the request, or is null.")
    explain: bool = Field(False, description="Add the exact chat the model saw, with token counts.")

    @model_validator(mode="after")
    def _one_form(self) -> ScoreRequest:
        if (self.captions is None) == (self.groups is None):
            raise PydanticCustomError("one_form", "send either captions or groups")
        if self.groups is not None and (self.image is not None or self.prompt is not None):
            raise PydanticCustomError("one_form", "image and prompt belong inside each of groups")
        ids = [group.id for group in self.groups or [] if group.id is not None]
        if len(set(ids)) != len(ids):
            raise PydanticCustomError("duplicate_id", "two groups have the same id")
        return self


class CompareRequest(Options):
    """Two captions of one image."""

    image: Text | None = Field(None, examples=[IMAGE_EXAMPLE])
    prompt: Text | None = None
    a: Text = Field(examples=CAPTIONS_EXAMPLE[:1])
    b: Text = Field(examples=CAPTIONS_EXAMPLE[1:])


class RankRequest(Options):
    """One group to sort."""

    image: Text | None = Field(None, examples=[IMAGE_EXAMPLE])
    prompt: Text | None = None
    captions: list[Text] = Field(min_length=1, examples=[CAPTIONS_EXAMPLE])


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorBody(Answer):
    code: str = Field(examples=["image_unknown"])
    message: str
    retryable: bool
    field: str | None = None
    index: int | None = None
    request_id: str


class ErrorAnswer(Answer):
    """The one shape of every error."""

    error: ErrorBody


class ItemError(Answer):
    code: str = Field(examples=["caption_too_long"])
    message: str


class Usage(Answer):
    captions: int
    tokens: int = Field(description="What separate forwards would have computed.")
    computed_tokens: int = Field(description="What this request added to its batches.")
    cached_tokens: int = Field(description="Tokens taken from a cache of earlier requests.")


class Explanation(Answer):
    chats: list[str] = Field(description="The text of the token ids of each scored caption, image tokens counted.")
    tokens: list[int]
    pooled_index: list[int] = Field(description="Position of the token the head reads, in the whole chat.")
    prefix_tokens: int
    image_tokens: int
    image_grid: list[int] | None


class GroupAnswer(Answer):
    id: str | None = None
    scores: list[float | None] = Field(examples=[[1.25, -0.5]])
    errors: list[ItemError | None] | None = Field(None, description="With on_item_error=null: why a score is null.")
    image_id: str | None
    usage: Usage
    warnings: list[str] | None = Field(None, examples=[["prompt_truncated"]])
    explain: Explanation | None = None


class Signed(Answer):
    model_fingerprint: str
    request_id: str


class ScoreAnswer(GroupAnswer, Signed):
    """One group."""


class GroupsAnswer(Signed):
    """Several groups, in the order sent."""

    groups: list[GroupAnswer]


class Pair(Answer):
    a: float
    b: float


class CompareAnswer(Signed):
    preferred: Literal["a", "b", "tie"]
    probability_a: float = Field(description="Bradley-Terry: sigmoid(margin / temperature).")
    margin: float
    scores: Pair
    image_id: str | None
    usage: Usage
    warnings: list[str] | None = None


class RankedCaption(Answer):
    rank: int
    index: int = Field(description="Where the caption stood in the request.")
    caption: str
    score: float
    win_probability: float = Field(description="Against the best.")
    tied: bool


class RankAnswer(Signed):
    ranking: list[RankedCaption]
    image_id: str | None
    usage: Usage
    warnings: list[str] | None = None


class ImageAnswer(Answer):
    image_id: str = Field(examples=[IMAGE_EXAMPLE])
    width: int
    height: int
    tokens: int
    request_id: str


class SelfTestAnswer(Signed):
    passed: bool
    kind: Literal["golden", "probe"]
    num_scores: int
    max_error: float
    tolerance: float
    message: str


class StatusAnswer(Answer):
    status: str


def json_schema(*models: type[BaseModel]) -> dict[str, Any]:
    """The models as OpenAPI components, references included."""
    schemas: dict[str, Any] = {}
    for model in models:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    return schemas
