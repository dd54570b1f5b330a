"""From a request to validated data: JSON and multipart become the same models, faults become the one error shape."""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from app.api.bodies import BodyLimits, Part, media_type, parse_json, parse_multipart, read_body
from app.api.card import ModelCard, Models
from app.api.middleware import exchange_of
from app.api.schemas import CAPTION_NAMES, RUN_ID, Options, Strict
from app.contracts import Conversation, Turn
from app.errors import (
    CaptionTooLarge,
    FingerprintMismatch,
    InvalidRequest,
    RequestError,
    TooManyItems,
    UnsupportedMediaType,
)
from app.service import GroupRequest
from app.settings import Settings

_Model = TypeVar("_Model", bound=Strict)
_Body = TypeVar("_Body", bound=BaseModel)
_Read = TypeVar("_Read")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")
_RUN_ID = re.compile(RUN_ID.strip("^$"))
_REPEATED = {"caption": "captions"}
_JSON_ONLY = {*CAPTION_NAMES, "groups", "messages"}
_OTHER_PARTS = 16  # of a form, beside its captions
_INTEGERS = {"timeout_ms"}
_BOOLEANS = {"explain"}
_CODES = {
    "extra_forbidden": "unknown_field",
    "missing": "missing_field",
    "too_short": "empty_batch",
    "invalid_unicode": "invalid_unicode",
    "string_unicode": "invalid_unicode",
    "duplicate_id": "duplicate_id",
}


async def read_request(request: Request, model: type[_Model], settings: Settings) -> tuple[_Model, bytes | None]:
    """The validated request, and the image bytes of a multipart file. Raises RequestError."""
    read_params(request)
    kind = media_type(request)
    if kind not in ("application/json", "multipart/form-data"):
        raise UnsupportedMediaType("send application/json or multipart/form-data")
    body = await _body(request, settings)
    content_type = request.headers["content-type"]

    def read() -> tuple[_Model, bytes | None]:
        if kind == "application/json":
            data, image = parse_json(body), None
        else:
            data, image = _form_data(_parts(body, content_type, settings), _part_names(model))
        _check_counts(data, settings)
        return _validated(model, data), image

    return await exchange_of(request.scope).held.parse(read)


async def read_json(request: Request, model: type[_Body], settings: Settings, read: Callable[[_Body], _Read]) -> _Read:
    """What `read` makes of a validated JSON body, off the event loop. Raises RequestError."""
    if media_type(request) != "application/json":
        raise UnsupportedMediaType("send application/json")
    body = await _body(request, settings)

    def parse() -> _Read:
        return read(_validated(model, _object(parse_json(body))))

    return await exchange_of(request.scope).held.parse(parse)


def read_options(request: Request, others: Collection[str]) -> tuple[Options, dict[str, str]]:
    """Options given in the address, for clients that can write nothing else, and the `others` apart. Raises InvalidRequest."""
    given = read_params(request, {*others, *Options.model_fields})
    options = {name: _plain_value(name, value) for name, value in given.items() if name not in others}
    return _validated(Options, options), {name: value for name, value in given.items() if name in others}


def read_params(request: Request, known: Collection[str] = ()) -> dict[str, str]:
    """The parameters of an address. Raises InvalidRequest for one that this route does not read, or that comes twice.

    What is not read was meant all the same: a fingerprint to pin, or another model.
    """
    params: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name in params:
            raise InvalidRequest("this parameter may come only once", field=_shown(name), code="duplicate_parameter")
        if name not in known:
            raise InvalidRequest("this address takes no such parameter", field=_shown(name), code="unknown_field")
        params[name] = value
    return params


async def read_image(request: Request, settings: Settings) -> bytes:
    """The image of `PUT /images`: the raw body, or the part named `image`."""
    read_params(request)
    body = await _body(request, settings)
    if media_type(request) != "multipart/form-data":
        return body
    content_type = request.headers["content-type"]
    data, image = await exchange_of(request.scope).held.parse(lambda: _form_data(_parts(body, content_type, settings), {"image"}))
    if image is None or data:
        raise InvalidRequest("send one file part named image and nothing else", field="image")
    return image


async def _body(request: Request, settings: Settings) -> bytes:
    limits = BodyLimits(settings.max_body_bytes, settings.body_timeout_s, settings.min_body_rate)
    return await read_body(request, limits, exchange_of(request.scope).held)


def _parts(body: bytes, content_type: str, settings: Settings) -> list[Part]:
    return parse_multipart(body, content_type, max_parts=settings.max_captions + _OTHER_PARTS)


def _part_names(model: type[Strict]) -> set[str]:
    """What the parts of a form may be called that stands for this model."""
    singular = {name for name, field in _REPEATED.items() if field in model.model_fields}
    return singular | model.model_fields.keys() - _JSON_ONLY


def group_request(
    group: Any, captions: Sequence[str], image: bytes | None, field: str, settings: Settings, caption_fields: tuple[str, ...] = ()
) -> GroupRequest:
    """The service's form of one group, its texts within their byte limits. `caption_fields`: of captions that stand in no list."""
    where = f"{field}." if field else ""
    prompt: str | Conversation | None = group.prompt
    check_prompt_size(group.prompt, f"{where}prompt", settings)
    if group.messages is not None:
        prompt = tuple(Turn(message.role, message.content) for message in group.messages)
        check_prompt_size("".join(turn.content for turn in prompt), f"{where}messages", settings)
    for index, caption in enumerate(captions):
        place = (caption_fields[index], None) if caption_fields else (f"{where}captions[{index}]", index)
        check_caption_size(caption, place[0], settings, place[1])
    image = group.image if image is None else image
    return GroupRequest(tuple(captions), image=image, prompt=prompt, field=field, caption_fields=caption_fields)


def check_prompt_size(prompt: str | None, field: str, settings: Settings) -> None:
    """Raises CaptionTooLarge (`prompt_too_large`)."""
    if prompt is not None and len(prompt.encode()) > settings.max_prompt_bytes:
        raise CaptionTooLarge(f"the prompt is larger than {settings.max_prompt_bytes} bytes", field=field, code="prompt_too_large")


def check_caption_size(caption: str, field: str, settings: Settings, index: int | None = None) -> None:
    """Raises CaptionTooLarge."""
    if len(caption.encode()) > settings.max_caption_bytes:
        raise CaptionTooLarge(f"the caption is larger than {settings.max_caption_bytes} bytes", field=field, index=index)


def model_of(request: Request, models: Models, name: str | None, num_captions: int = 0) -> ModelCard:
    """The model that a request names, which signs its answer from now on. Raises ModelUnknown."""
    model = models.named(name, num_captions)
    exchange_of(request.scope).fingerprint = model.fingerprint
    return model


def check_fingerprint(options: Options, loaded: str) -> None:
    """Raises FingerprintMismatch when the caller pinned another model."""
    if options.expect_fingerprint is not None and not hmac.compare_digest(options.expect_fingerprint.encode(), loaded.encode()):
        raise FingerprintMismatch("another model is loaded than the one expected", field="expect_fingerprint")


def run_id_of(request: Request, given: str | None = None) -> str | None:
    """The training run a request belongs to, by its header X-Run-Id or the field that its body `given`. None: to none.

    For every route that scores. Raises InvalidRequest: a run whose scores are not counted where its owner looks is worse than an error.
    """
    named = [value.strip(" \t") for value in request.headers.getlist("x-run-id")]
    if len(set(named)) > 1 or (given is not None and named and given != named[0]):
        raise InvalidRequest("the request names two training runs", field="run_id")
    found = named[0] if named else given
    if found is not None and not _RUN_ID.fullmatch(found):
        message = "a run id is 1 to 64 letters, digits, dots, hyphens and underscores, a letter or digit first"
        raise InvalidRequest(message, field="run_id")
    return found


def timeout_s(options: Options, settings: Settings) -> float:
    """Seconds until the deadline. Raises InvalidRequest above the server's cap."""
    if options.timeout_ms is None:
        return settings.default_timeout_ms / 1000
    if options.timeout_ms > settings.max_timeout_ms:
        raise InvalidRequest(f"timeout_ms is at most {settings.max_timeout_ms}", field="timeout_ms")
    return options.timeout_ms / 1000


def _form_data(parts: list[Part], names: Collection[str]) -> tuple[dict[str, Any], bytes | None]:
    """Form parts as the JSON they stand for; a file named `image` apart.

    A file of another name than the model's fields is refused by that name; as text, a picture would only be "not UTF-8".
    """
    data: dict[str, Any] = {}
    image: bytes | None = None
    for part in parts:
        if part.name in _JSON_ONLY:
            raise InvalidRequest("this is a field of the JSON form; in a form repeat caption", field=part.name, code="unknown_field")
        if part.is_file and part.name not in names:
            raise InvalidRequest("unknown field; an image goes in the part named image", field=_shown(part.name), code="unknown_field")
        if part.name in _REPEATED:
            data.setdefault(_REPEATED[part.name], []).append(_text(part))
        elif part.name in data or (part.name == "image" and image is not None):
            raise InvalidRequest("this part may come only once", field=_shown(part.name), code="duplicate_part")
        elif part.name == "image" and part.is_file:
            image = bytes(part.data)
        else:
            data[part.name] = _plain_value(part.name, _text(part))
    return data, image


def _plain_value(name: str, text: str) -> Any:
    """Of a form or an address, where everything is text."""
    if name in _INTEGERS and text.isascii() and text.isdecimal() and len(text) < 19:
        return int(text)
    if name in _BOOLEANS and text in ("true", "false"):
        return text == "true"
    return text


def _text(part: Part) -> str:
    try:
        return part.data.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidRequest("the text is not UTF-8", field=_shown(part.name), code="invalid_unicode") from None


def _shown(name: str) -> str | None:
    """A field's name may appear in an error when it looks like one; anything else a client wrote never does."""
    return name if _IDENTIFIER.fullmatch(name) else None


def _check_counts(data: Any, settings: Settings) -> None:
    """Refuse too many groups or captions before looking at any of them."""
    groups = _object(data).get("groups")
    groups = groups if isinstance(groups, list) else []
    if len(groups) > settings.max_groups:
        raise TooManyItems(f"at most {settings.max_groups} groups a request", field="groups")
    lists = [group.get(name) for group in (data, *groups) if isinstance(group, dict) for name in CAPTION_NAMES]
    if sum(len(captions) for captions in lists if isinstance(captions, list)) > settings.max_captions:
        raise TooManyItems(f"at most {settings.max_captions} captions a request", field="captions")


def _object(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise InvalidRequest("the body must be one JSON object")
    return data


def _validated(model: type[_Body], data: Any) -> _Body:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _fault(error) from None


def _fault(error: ValidationError) -> RequestError:
    """The first fault, by field and kind; never the input."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    path = [part for part in first["loc"] if isinstance(part, int) or _shown(part)]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    code = _CODES.get(first["type"], "invalid_request")
    message = "unknown field" if code == "unknown_field" else first["msg"]
    return InvalidRequest(message, field=field or None, code=code)
