"""Request bodies to plain data: bounded reading, strict JSON, strict multipart. Knows no route."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

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
MAX_PARTS = 4200
MAX_PART_HEADER_BYTES = 16384
_JSON_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)


@dataclass(slots=True)
class Part:
    """One part of a multipart body. The file name only says that it is a file; it is never a path."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    data: bytearray = field(default_factory=bytearray)
    name: str = ""
    is_file: bool = False


async def read_body(request: Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """The whole body, refused as early as its size is known. Raises BodyTooLarge, BodyTimeout, UnsupportedMediaType."""
    if any(value.strip().lower() != "identity" for value in request.headers.getlist("content-encoding")):
        raise UnsupportedMediaType("compressed bodies are not accepted")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise _too_large(max_bytes)
    except TimeoutError:
        raise BodyTimeout(f"the body did not arrive within {timeout_s:g} s", headers={"Connection": "close"}) from None
    return bytes(body)


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {max_bytes} bytes", headers={"Connection": "close"})


def media_type(request: Request) -> str:
    """The content type without parameters, lower case."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def parse_json(body: bytes) -> Any:
    """Strict JSON: UTF-8, no NaN, no equal keys, bounded. Raises InvalidJson, DuplicateKey, TooDeep, TooManyItems."""
    _check_values(body)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidJson(f"the body is not UTF-8 at byte {error.start}") from None
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise InvalidJson(f"the body is not JSON at byte {len(text[: error.pos].encode())}") from None
    except RecursionError:
        raise TooDeep("the JSON is nested too deeply") from None
    except ValueError:
        raise InvalidJson("the body holds a number that cannot be read") from None


def _check_values(body: bytes) -> None:
    """Refuse before parsing: ten million empty lists in 30 MB would hold the event loop for seconds. Text in strings is free."""
    if _num_separators(body) <= MAX_JSON_VALUES:
        return
    num_quotes = body.count(b'"') - body.count(b'\\"')  # never more than there are, at least half of them
    if num_quotes > 2 * MAX_JSON_VALUES or _num_separators(_JSON_STRING.sub(b"", body)) > MAX_JSON_VALUES:
        raise TooManyItems(f"the body holds more than {MAX_JSON_VALUES} values")


def _num_separators(text: bytes) -> int:
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def _no_constant(name: str) -> NoReturn:
    raise InvalidJson("NaN and Infinity are not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise DuplicateKey("an object names one key twice")
    return found


def parse_multipart(body: bytes, content_type: str) -> list[Part]:
    """The parts of a complete multipart body, in order. Raises MultipartInvalid; writes nothing to disk."""
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if not 0 < len(boundary) <= 256:
        raise MultipartInvalid("the content type names no usable boundary")
    collector = _Collector()
    try:
        parser = MultipartParser(boundary, collector.callbacks(), max_header_size=MAX_PART_HEADER_BYTES)
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise MultipartInvalid("the body is not valid multipart") from None
    if not collector.ended:
        raise MultipartInvalid("the body ends before its final boundary")
    return [_named(part) for part in collector.parts]


def _named(part: Part) -> Part:
    _, options = parse_options_header(part.headers.get(b"content-disposition", b""))
    try:
        part.name = options[b"name"].decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        raise MultipartInvalid("a part has no name") from None
    part.is_file = b"filename" in options
    return part


class _Collector:
    """Gathers parts from the parser's callbacks."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.ended = False
        self._name = bytearray()
        self._value = bytearray()

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._part,
            "on_part_data": lambda data, start, end: self.parts[-1].data.extend(data[start:end]),
            "on_header_field": lambda data, start, end: self._name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header,
            "on_end": self._end,
        }

    def _part(self) -> None:
        if len(self.parts) >= MAX_PARTS:
            raise MultipartInvalid(f"the body has more than {MAX_PARTS} parts")
        self.parts.append(Part())

    def _header(self) -> None:
        name = bytes(self._name).lower()
        if name in self.parts[-1].headers:
            raise MultipartInvalid("a part has one header twice")
        self.parts[-1].headers[name] = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def _end(self) -> None:
        self.ended = True
