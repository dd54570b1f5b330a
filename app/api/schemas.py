"""The JSON the API takes and gives, as strict models: no coercion, no unknown fields, no lone surrogates."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from app.contracts import MAX_TURNS

IMAGE_EXAMPLE = "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
RUN_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
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


class Message(Strict):
    """A turn of the conversation that captions answer."""

    role: Literal["system", "user", "assistant"]
    content: Text


Messages = Annotated[
    list[Message] | None,
    Field(
        min_length=1,
        max_length=MAX_TURNS,
        description="In place of prompt, where captions are answers: the conversation, its last turn the user's.",
    ),
]
CAPTION_NAMES = ("captions", "responses")  # what captions may be called: text-only models score responses
_CAPTIONS = Field(min_length=1, examples=[CAPTIONS_EXAMPLE], description="Or `responses`.", validation_alias=AliasChoices(*CAPTION_NAMES))
Captions = Annotated[list[Text], _CAPTIONS]
SomeCaptions = Annotated[list[Text] | None, _CAPTIONS]


def _one_prompt(prompt: str | None, messages: list[Message] | None) -> None:
    if prompt is not None and messages is not None:
        raise PydanticCustomError("one_prompt", "send either prompt or messages")


class Options(Strict):
    """What every scoring request may add."""

    model: Text | None = Field(None, description="Which of the served models scores, as `/v1/models` names it; default: the first.")
    expect_fingerprint: Text | None = Field(None, description="Answer 412 unless exactly this model is loaded.")
    timeout_ms: int | None = Field(None, ge=1, description="Deadline; later than this the answer is 503.")
    run_id: Text | None = Field(
        None, pattern=RUN_ID, description="The training run whose monitors count the scores; or in the header X-Run-Id."
    )


class ScoreGroup(Strict):
    """One image with its captions."""

    id: Text | None = Field(None, max_length=256, description="Yours, echoed; each only once.")
    image: Text | None = Field(
        None, description="base64, a base64 data: URL, or `sha256:<hex>` of bytes sent before.", examples=[IMAGE_EXAMPLE]
    )
    prompt: Text | None = Field(None, description="The instruction the captions answer; default: the model's own.")
    messages: Messages = None
    captions: Captions

    @model_validator(mode="after")
    def _has_one_prompt(self) -> ScoreGroup:
        _one_prompt(self.prompt, self.messages)
        return self


class ScoreRequest(Options):
    """One group at the top level, or several in `groups`."""

    image: Text | None = Field(
        None, description="base64, a base64 data: URL, or `sha256:<hex>` of bytes sent before.", examples=[IMAGE_EXAMPLE]
    )
    prompt: Text | None = None
    messages: Messages = None
    captions: SomeCaptions = None
    groups: list[ScoreGroup] | None = Field(None, min_length=1)
    on_item_error: Literal["fail", "null"] = Field("fail", description="A caption that cannot be scored fails the request, or is null.")
    explain: bool = Field(False, description="Add the exact chat the model saw, with token counts.")

    @model_validator(mode="after")
    def _one_form(self) -> ScoreRequest:
        if (self.captions is None) == (self.groups is None):
            raise PydanticCustomError("one_form", "send either captions or groups")
        if self.groups is not None and (self.image, self.prompt, self.messages) != (None, None, None):
            raise PydanticCustomError("one_form", "image, prompt and messages belong inside each of groups")
        _one_prompt(self.prompt, self.messages)
        ids = [group.id for group in self.groups or [] if group.id is not None]
        if len(set(ids)) != len(ids):
            raise PydanticCustomError("duplicate_id", "two groups have the same id")
        return self


class CompareRequest(Options):
    """Two captions of one image."""

    image: Text | None = Field(None, examples=[IMAGE_EXAMPLE])
    prompt: Text | None = None
    messages: Messages = None
    a: Text = Field(examples=CAPTIONS_EXAMPLE[:1])
    b: Text = Field(examples=CAPTIONS_EXAMPLE[1:])

    @model_validator(mode="after")
    def _has_one_prompt(self) -> CompareRequest:
        _one_prompt(self.prompt, self.messages)
        return self


class RankRequest(Options):
    """One group to sort."""

    image: Text | None = Field(None, examples=[IMAGE_EXAMPLE])
    prompt: Text | None = None
    messages: Messages = None
    captions: Captions

    @model_validator(mode="after")
    def _has_one_prompt(self) -> RankRequest:
        _one_prompt(self.prompt, self.messages)
        return self


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


class SelfTestReport(Answer):
    passed: bool
    kind: Literal["golden", "probe"]
    num_scores: int
    max_error: float
    tolerance: float
    message: str


class SelfTestAnswer(SelfTestReport, Signed):
    """Of one model: the first that failed, else the first."""

    models: dict[str, SelfTestReport] | None = Field(None, description="Where several were asked: every one's report.")


class RunNumbers(Answer):
    """What some groups of a training run show. Null: these groups cannot tell."""

    groups: int
    captions: int
    compared_groups: int = Field(description="Of two or more captions: only these have a spread.")
    first_seen_s: float | None = Field(description="Seconds since the epoch.")
    last_seen_s: float | None
    mean: float | None
    std: float | None
    min: float | None
    max: float | None
    mean_length: float | None = Field(description="Characters.")
    group_spread: float | None = Field(description="Mean standard deviation of the scores within a group.")
    flat_share: float | None = Field(description="Of compared groups: those without spread, at most 1e-4.")
    length_correlation: float | None = Field(description="Pearson's, of score and characters, from the means of each group.")
    length_correlation_overall: float | None = Field(description="The same from the means of all.")
    duplicate_share: float | None = Field(description="Of captions: those that stand in their group more than once.")
    repeat_share: float | None = Field(description="Of captions: those that stood in an earlier group, lately.")
    drift: float | None = Field(description="Mean less that of the artifact's score distribution, in its standard deviations.")
    std_ratio: float | None = Field(description="Standard deviation over that of the artifact's score distribution.")
    outside_share: float | None = Field(description="Of scores: those more than 3 standard deviations from the artifact's mean.")


class RunLine(RunNumbers):
    id: str
    findings: list[str] = Field(description="Codes of the signs of reward hacking in the last groups.", examples=[["length"]])


class RunsAnswer(Answer):
    """The training runs that are kept, the one active last first."""

    runs: list[RunLine]


class RunFinding(Answer):
    code: Literal["no_spread", "length", "drift", "outside", "std_ratio", "spread_fell", "duplicates", "repeats"]
    value: float
    limit: float
    text: str


class ScoreSpread(Answer):
    mean: float
    std: float


class RunHistogram(Answer):
    edges: list[float]
    counts: list[int] = Field(description="Scores up to each edge, and those beyond the last.")


class RunAnswer(Answer):
    """All of a training run."""

    id: str
    expected: ScoreSpread | None = Field(description="The artifact's score distribution; null: it has none.")
    total: RunNumbers
    recent: RunNumbers = Field(description="Of the last 128 to 144 groups and of those that are open; findings are about these.")
    length_r: float | None = Field(
        description="Correlation of score and characters in the last groups, as findings have it; over all captions if each came by itself."
    )
    open_groups: int = Field(description="Of captions that came one a request: others about their picture and prompt may still join.")
    unusable_scores: int = Field(description="Beyond float32, left out everywhere else.")
    early: bool = Field(description="The last groups are too few to find anything in.")
    findings: list[RunFinding]
    limits: dict[str, float]
    histogram: RunHistogram
    history: list[RunNumbers] = Field(
        description="The whole run in at most 129 points of equally many groups, but for the last, which holds what is open."
    )


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
