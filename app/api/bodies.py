"""Request bodies to plain data: bounded reading, strict JSON, strict multipart. Knows no route.

Everything here is cheap in the number of bytes, and no single step of a parse is long: see `requests.py` for where it runs.
"""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from app.api.body_room import HeldBody
from app.errors import (
    BodyTimeout,
    BodyTooLarge,
    DuplicateKey,
    InvalidJson,
    MultipartInvalid,
    TooDeep,
    TooManyItems,
    UnsupportedMediaType,
)

MAX_JSON_VALUES = 50_000
MAX_INTEGER_DIGITS = 19  # int() of more takes quadratic time, and no field is that large
MAX_PART_HEADER_BYTES = 12 << 10  # of one line: a file name of 10 KB passes
MAX_FORM_HEADER_BYTES = 1 << 20  # of all parts together
MAX_OPTIONS = 32  # `;` in one header line
_OPTION = re.compile(rb';[ \t]*([^=;"\s]+)[ \t]*=[ \t]*(?:"(?:[^"\\]|\\.)*"|[^;"]*)')  # the name of one
_AS_IT_IS = frozenset({b"7bit", b"8bit", b"binary"})  # how a part may be encoded (RFC 7578, section 4.7)
SLOW_START_S = 5.0  # before the least rate of a body counts
_WINDOW_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """How large and how slow a body may be. `min_rate`: bytes a second after the first five seconds; 0 for none."""

    max_bytes: int
    timeout_s: float
    min_rate: int = 0

    def deadline(self, began: float, num_bytes: int) -> float:
        """When the rest must have come, if this much has."""
        ends = began + self.timeout_s
        return min(ends, began + SLOW_START_S + num_bytes / self.min_rate) if self.min_rate else ends


@dataclass(slots=True)
class Part:
    """One part of a multipart body. The file name only says that it is a file; it is never a path."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    data: bytearray = field(default_factory=bytearray)
    name: str = ""
    is_file: bool = False


async def read_body(request: Request, limits: BodyLimits, held: HeldBody) -> bytes:
    """The whole body, refused as early as its size is known; `held` has room for every byte before it is kept.

    Raises BodyTooLarge, BodyTimeout, UnsupportedMediaType, Overloaded.
    """
    _refuse_unread(request, limits.max_bytes)
    began = asyncio.get_running_loop().time()
    body = bytearray()
    limit = asyncio.timeout_at(limits.deadline(began, 0))
    try:
        async with limit:
            async for chunk in request.stream():
                if len(body) + len(chunk) > limits.max_bytes:
                    raise _too_large(limits.max_bytes)
                held.take(len(chunk))
                body += chunk
                limit.reschedule(limits.deadline(began, len(body)))
    except TimeoutError:
        if limits.deadline(began, len(body)) < began + limits.timeout_s:
            raise BodyTimeout(f"the body came more slowly than {limits.min_rate} bytes a second") from None
        raise BodyTimeout(f"the body did not arrive within {limits.timeout_s:g} s") from None
    return bytes(body)


def _refuse_unread(request: Request, max_bytes: int) -> None:
    if any(value.strip().lower() != "identity" for value in request.headers.getlist("content-encoding")):
        raise UnsupportedMediaType("compressed bodies are not accepted")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise _too_large(max_bytes)


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {max_bytes} bytes")


def media_type(request: Request) -> str:
    """The content type without parameters, lower case."""
    given = request.headers.getlist("content-type")
    if len(given) > 1:
        raise UnsupportedMediaType("the request names two content types")
    return given[0].partition(";")[0].strip().lower() if given else ""


def parse_json(body: bytes) -> Any:
    """Strict JSON: UTF-8, no NaN, no equal keys, bounded. Raises InvalidJson, DuplicateKey, TooDeep, TooManyItems."""
    _check_values(body)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidJson(f"the body is not UTF-8 at byte {error.start}") from None
    try:
        return json.loads(text, parse_int=_integer, parse_constant=_no_constant, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise InvalidJson(f"the body is not JSON at byte {len(text[: error.pos].encode())}") from None
    except RecursionError:
        raise TooDeep("the JSON is nested too deeply") from None


def _check_values(body: bytes) -> None:
    """Refuse before parsing: ten million empty lists in 30 MB would take seconds and gigabytes. Text in strings is free."""
    if _num_separators(body) > MAX_JSON_VALUES and num_structural(body) > MAX_JSON_VALUES:
        raise TooManyItems(f"the body holds more than {MAX_JSON_VALUES} values")


def num_structural(body: bytes, *, window_bytes: int = _WINDOW_BYTES) -> int:
    """Commas and opening brackets of a JSON text outside its strings; stops counting soon after MAX_JSON_VALUES.

    In windows, because a single call over the whole body would keep every other thread from running. Quotes count too, a
    quarter each, for a value has at most two strings, itself and its key: what has more of them is no JSON. Of text that is no
    JSON the parser reads no further than the count is right.
    """
    found = num_quotes = 0
    is_inside = is_escaped = False
    for start in range(0, len(body), window_bytes):
        window = body[start + is_escaped : start + window_bytes].replace(b"\\\\", b"")
        is_escaped = window.endswith(b"\\")
        window = window.replace(b'\\"', b"")
        num_quotes += window.count(b'"')
        if max(found, num_quotes // 4 - 1) > MAX_JSON_VALUES:
            break
        pieces = window.split(b'"')
        found += _num_separators(b"".join(pieces[is_inside::2]))
        is_inside ^= len(pieces) % 2 == 0
    return max(found, num_quotes // 4 - 1)


def _num_separators(text: bytes) -> int:
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > MAX_INTEGER_DIGITS:
        raise InvalidJson(f"the body holds an integer of more than {MAX_INTEGER_DIGITS} digits")
    return int(text)


def _no_constant(name: str) -> NoReturn:
    raise InvalidJson("NaN and Infinity are not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise DuplicateKey("an object names one key twice")
    return found


def parse_multipart(body: bytes, content_type: str, *, max_parts: int) -> list[Part]:
    """The parts of a complete multipart body, in order. Raises MultipartInvalid; writes nothing to disk."""
    boundary = _options(content_type.encode("latin-1")).get(b"boundary", b"")
    if not 0 < len(boundary) <= 256:
        raise MultipartInvalid("the content type names no usable boundary")
    collector = _Collector(max_parts)
    try:
        parser = MultipartParser(boundary, collector.callbacks(), max_header_size=MAX_PART_HEADER_BYTES)
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise MultipartInvalid("the body is not valid multipart") from None
    if not collector.ended:
        raise MultipartInvalid("the body ends before its final boundary")
    return [_named(part) for part in collector.parts]


def _options(line: bytes) -> dict[bytes, bytes]:
    """The parameters of a header line. Reading one costs the most of all that a form can ask for, so their number is bounded."""
    if line.count(b";") > MAX_OPTIONS:
        raise MultipartInvalid(f"a header line has more than {MAX_OPTIONS} parameters")
    names = [name.lower() for name in _OPTION.findall(line)]
    if len(set(names)) < len(names):
        raise MultipartInvalid("a header line names one parameter twice")
    options: dict[bytes, bytes] = parse_options_header(line)[1]
    return options


def _named(part: Part) -> Part:
    options = _options(part.headers.get(b"content-disposition", b""))
    try:
        part.name = options[b"name"].decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        raise MultipartInvalid("a part has no name") from None
    part.is_file = b"filename" in options
    if part.headers.get(b"content-transfer-encoding", b"binary").strip().lower() not in _AS_IT_IS:
        raise MultipartInvalid("a part is encoded; send its bytes as they are")
    return part


class _Collector:
    """Gathers parts from the parser's callbacks."""

    def __init__(self, max_parts: int) -> None:
        self.parts: list[Part] = []
        self._max_parts = max_parts
        self._num_header_bytes = 0
        self.ended = False
        self._name = bytearray()
        self._value = bytearray()

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._part,
            "on_part_data": lambda data, start, end: self.parts[-1].data.extend(data[start:end]),
            "on_header_field": lambda data, start, end: self._gather(self._name, data[start:end]),
            "on_header_value": lambda data, start, end: self._gather(self._value, data[start:end]),
            "on_header_end": self._header,
            "on_end": self._end,
        }

    def _part(self) -> None:
        if len(self.parts) >= self._max_parts:
            raise MultipartInvalid(f"the body has more than {self._max_parts} parts")
        self.parts.append(Part())

    def _gather(self, into: bytearray, piece: bytes) -> None:
        self._num_header_bytes += len(piece)
        if self._num_header_bytes > MAX_FORM_HEADER_BYTES:
            raise MultipartInvalid(f"the headers of the parts are larger than {MAX_FORM_HEADER_BYTES} bytes")
        into.extend(piece)

    def _header(self) -> None:
        name = bytes(self._name).lower()
        if name in self.parts[-1].headers:
            raise MultipartInvalid("a part has one header twice")
        self.parts[-1].headers[name] = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def _end(self) -> None:
        self.ended = True
