"""Captions to raw scores for evaluation: by a model in this process, or by a running server over HTTP.

Both answer group after group, a score or a refusal a caption; whatever else goes wrong stops the run. Knows no pairs and no figures.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import httpx

from app.artifacts import Artifact, base_sha256, file_sha256, open_artifact
from app.contracts import EncodedGroup, EncodedImage, Group
from app.encoding import Encoder, load_encoder
from app.errors import ApiError, ImageRejected, NonfiniteScore, RequestError
from app.images import ImageLimits, decode_image
from app.layouts import ADAPTER_WEIGHTS_NAME
from app.model import RewardModel, load_model
from app.scoring import score_shared

LIMITS = ImageLimits(
    max_bytes=10 << 20, max_pixels=16_000_000, min_side=16, max_aspect=100, formats=("JPEG", "PNG", "WEBP")
)  # a server's own
MAX_WAIT_S = 600.0  # patience with a server that answers 503 to the same request
_MAX_GROUPS, _MAX_CAPTIONS = 8, 64  # a request: large enough to batch, small enough for the deadline of a slow server
_SPARE_S = 30.0  # beyond the server's own deadline
_NUM_UPLOADS = 3  # times an image is sent to a server that forgets it at once
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_DTYPE = re.compile(r"float32|bfloat16")
_DEVICE = re.compile(r"[a-z]{1,16}(:\d{1,3})?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Item:
    """One caption to score, in its place."""

    image: Path | None
    prompt: str | None  # None: the model's default prompt
    caption: str


@dataclass(frozen=True, slots=True)
class CaptionGroup:
    """Captions of one image and prompt."""

    image: Path | None
    prompt: str | None
    captions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a caption has no score."""

    code: str
    message: str


Outcome = float | Refusal


@dataclass(frozen=True, slots=True)
class Target:
    """What is evaluated."""

    name: str
    kind: Literal["artifact", "server"]
    fingerprint: str
    dtype: str
    device: str
    default_prompt: str | None  # None: every group brings its own
    fixed_prompt: bool  # no other prompt than the default one is allowed
    temperature: float  # of the artifact's calibration
    takes_images: bool | None  # None: the server says so when it is asked
    weights_sha256: str | None = None  # `weights_sha256` of an artifact; a server does not say


class GroupScorer(Protocol):
    """Scores groups, in order, as they get done. Raises PunchlineError for anything but a caption that cannot be scored."""

    @property
    def target(self) -> Target: ...

    def score(self, groups: Sequence[CaptionGroup]) -> Iterator[tuple[Outcome, ...]]: ...


def score_items(
    scorer: GroupScorer, items: Iterable[Item], group_size: int, report: Callable[[int], None] = lambda num_captions: None
) -> dict[Item, Outcome]:
    """Every distinct item once, captions of one image and prompt in groups of at most `group_size`."""
    groups = make_groups(items, group_size)
    found: dict[Item, Outcome] = {}
    for group, outcomes in zip(groups, scorer.score(groups), strict=True):
        for caption, outcome in zip(group.captions, outcomes, strict=True):
            found[Item(group.image, group.prompt, caption)] = outcome
        report(len(outcomes))
    return found


def make_groups(items: Iterable[Item], group_size: int) -> list[CaptionGroup]:
    """Groups of one image stand together, so that its pixels are needed once."""
    by_image: dict[Path | None, dict[str | None, list[str]]] = {}
    for item in dict.fromkeys(items):
        by_image.setdefault(item.image, {}).setdefault(item.prompt, []).append(item.caption)
    return [
        CaptionGroup(image, prompt, tuple(captions[start : start + group_size]))
        for image, prompts in by_image.items()
        for prompt, captions in prompts.items()
        for start in range(0, len(captions), group_size)
    ]


class LocalScorer:
    """A loaded model. Implements `GroupScorer` by the packing and the forward that serve."""

    def __init__(self, target: Target, encoder: Encoder, model: RewardModel, max_batch_tokens: int) -> None:
        self._target = target
        self._encoder = encoder
        self._model = model
        self._max_batch_tokens = max_batch_tokens
        self._pixels: tuple[Path, EncodedImage] | None = None

    @property
    def target(self) -> Target:
        return self._target

    def score(self, groups: Sequence[CaptionGroup]) -> Iterator[tuple[Outcome, ...]]:
        """Batches of whole groups under the token budget; a group larger than the budget runs alone."""
        batch: list[_Encoded] = []
        for group in groups:
            encoded = self._encode(group)
            if batch and sum(each.num_tokens for each in batch) + encoded.num_tokens > self._max_batch_tokens:
                yield from self._run(batch)
                batch = []
            batch.append(encoded)
        yield from self._run(batch)

    def _run(self, batch: Sequence[_Encoded]) -> Iterator[tuple[Outcome, ...]]:
        groups = [each.group for each in batch if each.group is not None]
        scores = iter(score_shared(self._model, groups) if groups else ())
        for each in batch:
            values = iter(next(scores).values if each.group is not None else ())
            yield tuple(_finite(next(values)) if refusal is None else refusal for refusal in each.refusals)

    def _encode(self, group: CaptionGroup) -> _Encoded:
        image = None if group.image is None else self._encode_image(group.image)
        encoded, errors = self._encoder.encode(Group(group.captions, group.prompt, image))
        return _Encoded(encoded, tuple(None if error is None else Refusal(error.code, error.message) for error in errors))

    def _encode_image(self, path: Path) -> EncodedImage:
        if self._pixels is None or self._pixels[0] != path:
            recipe = self._encoder.config.image
            try:
                rgb = decode_image(_read(path), LIMITS, exif_transpose=recipe.exif_transpose, alpha=recipe.alpha)
                self._pixels = path, self._encoder.encode_image(rgb)
            except RequestError as error:
                raise _blamed(error, path) from None
        return self._pixels[1]


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A group ready for the device; None when every caption is refused."""

    group: EncodedGroup | None
    refusals: tuple[Refusal | None, ...]

    @property
    def num_tokens(self) -> int:
        return self.group.num_tokens if self.group else 0


def open_local(
    model: str,
    *,
    base_model: str | None = None,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    offline: bool = False,
    max_batch_tokens: int = 8192,
) -> LocalScorer:
    """Load an artifact with every check of the server. Raises ArtifactInvalid."""
    artifact = open_artifact(model, base_model=base_model, offline=offline)
    encoder = load_encoder(artifact)
    loaded = load_model(artifact, device=device, dtype=dtype)
    target = Target(
        name=model,
        kind="artifact",
        fingerprint=loaded.fingerprint,
        dtype=loaded.dtype,
        device=loaded.device,
        default_prompt=artifact.config.default_prompt,
        fixed_prompt=artifact.config.prompt_policy == "fixed",
        temperature=artifact.config.calibration.temperature,
        takes_images=encoder.takes_images,
        weights_sha256=weights_sha256(artifact),
    )
    return LocalScorer(target, encoder, loaded.model, max_batch_tokens)


def weights_sha256(artifact: Artifact) -> str:
    """One SHA-256 over the weights that score: head, adapter where there is one, base. Two exports of a checkpoint share it."""
    adapter = [artifact.adapter_path / ADAPTER_WEIGHTS_NAME] if artifact.has_adapter else []
    digests = [file_sha256(path) for path in (artifact.head_path, *adapter)]
    base = artifact.config.base_model_sha256 or base_sha256(artifact.base_path)  # checked when the model is loaded
    return hashlib.sha256(" ".join([*digests, base]).encode()).hexdigest()


class RemoteScorer:
    """A running server. Implements `GroupScorer`; pinned to the model that answered first."""

    def __init__(self, connection: Connection, target: Target, *, max_groups: int, max_captions: int, timeout_ms: int) -> None:
        self._connection = connection
        self._target = target
        self._max_groups = max_groups
        self._max_captions = max_captions
        self.timeout_ms = timeout_ms
        self._ids: dict[Path, str] = {}

    @property
    def target(self) -> Target:
        return self._target

    def score(self, groups: Sequence[CaptionGroup]) -> Iterator[tuple[Outcome, ...]]:
        for request in self._requests(groups):
            yield from self._ask(request)

    def _requests(self, groups: Sequence[CaptionGroup]) -> Iterator[list[CaptionGroup]]:
        """Consecutive groups within the limits of one request; a group beyond them goes alone and the server says so."""
        request: list[CaptionGroup] = []
        for group in groups:
            num_captions = sum(len(each.captions) for each in request)
            if request and (len(request) == self._max_groups or num_captions + len(group.captions) > self._max_captions):
                yield request
                request = []
            request.append(group)
        if request:
            yield request

    def _ask(self, groups: Sequence[CaptionGroup]) -> list[tuple[Outcome, ...]]:
        images = {group.image for group in groups if group.image is not None}
        for attempt in range(1, _NUM_UPLOADS + 1):
            for path in images - set(self._ids):
                self._ids[path] = self._upload(path)
            try:
                return self._outcomes(groups, self._connection.post("/score", self._body(groups)))
            except ApiError as error:
                if error.code != "image_unknown" or attempt == _NUM_UPLOADS:
                    raise
                self._ids.clear()  # it forgets the oldest first, so the others are gone as well or soon will be
        raise RuntimeError("unreachable")

    def _body(self, groups: Sequence[CaptionGroup]) -> dict[str, Any]:
        return {
            "groups": [self._group(group) for group in groups],
            "on_item_error": "null",
            "expect_fingerprint": self._target.fingerprint,
            "timeout_ms": self.timeout_ms,
        }

    def _group(self, group: CaptionGroup) -> dict[str, Any]:
        named = {"image": group.image and self._ids[group.image], "prompt": group.prompt}
        return {"captions": group.captions} | {name: value for name, value in named.items() if value is not None}

    def _upload(self, path: Path) -> str:
        try:
            answer = self._connection.put("/images", _read(path))
        except ApiError as error:
            raise _blamed(error, path) if error.field == "image" else error from None
        return str(answer["image_id"])

    def _outcomes(self, groups: Sequence[CaptionGroup], answer: dict[str, Any]) -> list[tuple[Outcome, ...]]:
        """Raises ApiError for an answer of another shape or another model: no score is better than a wrong one."""
        if answer.get("model_fingerprint") != self._target.fingerprint:
            raise ApiError("the server answered with another model than the one it began with", code="model_changed")
        found = answer.get("groups")
        if not isinstance(found, list) or len(found) != len(groups):
            raise _bad_answer()
        return [_read_group(each, len(group.captions)) for group, each in zip(groups, found, strict=True)]


class Connection:
    """JSON to and from one server. 503 is asked again after `Retry-After`; any other error stops."""

    def __init__(self, url: str, client: httpx.Client, wait: Callable[[float], None] = time.sleep) -> None:
        self._url = url
        self._client = client
        self._wait = wait

    def get(self, route: str) -> dict[str, Any]:
        return self._send("GET", route)

    def post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._send("POST", route, json=body)

    def put(self, route: str, content: bytes) -> dict[str, Any]:
        return self._send("PUT", route, content=content)

    def _send(self, method: str, route: str, **content: Any) -> dict[str, Any]:
        waited = 0.0
        while True:
            try:
                answer = self._client.request(method, route, **content)
            except httpx.HTTPError as error:
                raise ApiError(f"{self._url} does not answer ({type(error).__name__})", code="unreachable") from None
            pause = _retry_after_s(answer)
            if pause is None or waited + pause > MAX_WAIT_S:
                return self._checked(answer)
            self._wait(pause)
            waited += pause

    def _checked(self, answer: httpx.Response) -> dict[str, Any]:
        try:
            body = answer.json()
        except ValueError:
            raise ApiError(f"{self._url} answered HTTP {answer.status_code} and something else than JSON", code="bad_answer") from None
        if not isinstance(body, dict):
            raise _bad_answer()
        if answer.is_error:
            fault = body.get("error")
            fault = fault if isinstance(fault, dict) else {}
            message = f"{self._url}: {fault.get('message', f'HTTP {answer.status_code}')}"
            raise ApiError(message, code=str(fault.get("code", "error")), field=fault.get("field"))
        return body


@contextmanager
def open_remote(
    url: str, key: str | None = None, *, transport: httpx.BaseTransport | None = None, wait: Callable[[float], None] = time.sleep
) -> Iterator[RemoteScorer]:
    """Ask a server what it has loaded and what it allows; the connection stays open as long as the context. Raises ApiError."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=url.rstrip("/"), headers=headers, transport=transport) as client:
        connection = Connection(url, client, wait)
        scorer = _scorer_of(url, connection, connection.get("/info"))
        client.timeout = httpx.Timeout(scorer.timeout_ms / 1000 + _SPARE_S)
        yield scorer


def _scorer_of(url: str, connection: Connection, card: dict[str, Any]) -> RemoteScorer:
    try:
        settings = card["settings"]
        return RemoteScorer(
            connection,
            _target(url, card),
            max_groups=min(_MAX_GROUPS, int(settings["max_groups"])),
            max_captions=min(_MAX_CAPTIONS, int(settings["max_captions"])),
            timeout_ms=int(settings["max_timeout_ms"]),
        )
    except (KeyError, TypeError, ValueError):
        raise ApiError(f"{url}/info is not the card of a Punchline server", code="bad_answer") from None


def _target(url: str, card: dict[str, Any]) -> Target:
    model, runtime = card["model"], card["runtime"]
    return Target(
        name=url,
        kind="server",
        fingerprint=_matching(_FINGERPRINT, model["fingerprint"]),
        dtype=_matching(_DTYPE, runtime["dtype"]),
        device=_matching(_DEVICE, runtime["device"]),
        default_prompt=model["default_prompt"],
        fixed_prompt=model["prompt_policy"] == "fixed",
        temperature=_positive(model["calibration"]["temperature"]),
        takes_images=None,
    )


def _matching(form: re.Pattern[str], value: Any) -> str:
    """What a report will show of a server is of the form it has, or ValueError."""
    if not isinstance(value, str) or not form.fullmatch(value):
        raise ValueError(f"expected {form.pattern}")
    return value


def _positive(value: Any) -> float:
    if not 0 < (number := float(value)) < math.inf:
        raise ValueError("expected a positive number")
    return number


def _read_group(answer: Any, num_captions: int) -> tuple[Outcome, ...]:
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list) or len(scores) != num_captions:
        raise _bad_answer()
    errors = answer.get("errors") or [None] * num_captions
    if len(errors) != num_captions:
        raise _bad_answer()
    return tuple(_read_score(score, error) for score, error in zip(scores, errors, strict=True))


def _read_score(score: Any, error: Any) -> Outcome:
    """Either a finite number or an error that says why there is none."""
    if score is None and isinstance(error, dict):
        return Refusal(str(error.get("code")), str(error.get("message")))
    if isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score):
        return float(score)
    raise _bad_answer()


def _retry_after_s(answer: httpx.Response) -> float | None:
    """Seconds a 503 asks to wait; None for every other answer, and for a 503 that does not say."""
    text = answer.headers.get("Retry-After", "") if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE else ""
    return float(text) if text.isascii() and text.isdecimal() else None


def _bad_answer() -> ApiError:
    return ApiError("the server's answer does not have the documented shape", code="bad_answer")


def _finite(score: float) -> float:
    if not math.isfinite(score):
        raise NonfiniteScore("the model returned a score that is not a finite number")
    return score


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageRejected(f"{path}: cannot be read ({error.strerror})") from None


def _blamed(error: ApiError, path: Path) -> ImageRejected:
    return ImageRejected(f"{path}: {error.message}", code=error.code)
