"""Bodies as a hostile client sends them: JSON that is not quite JSON, forms that are not quite forms, too much of either."""

from __future__ import annotations

import asyncio
import json
import selectors
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from app.api.bodies import (
    MAX_FORM_HEADER_BYTES,
    MAX_INTEGER_DIGITS,
    MAX_JSON_VALUES,
    MAX_OPTIONS,
    MAX_PART_HEADER_BYTES,
    SLOW_START_S,
    BodyLimits,
    Part,
    num_structural,
    parse_json,
    read_body,
)
from app.api.bodies import parse_multipart as parse_multipart_within
from app.api.body_room import BodyRoom, HeldBody
from app.errors import ApiError, BodyTimeout, BodyTooLarge, MultipartInvalid, Overloaded, RequestError, UnsupportedMediaType
from app.metrics import Metrics

OPEN = b"--bound\r\n"
END = b"\r\n--bound--\r\n"
KIND = "multipart/form-data; boundary=bound"
MAX_PARTS = 300


def parse_multipart(body: bytes, content_type: str) -> list[Part]:
    return parse_multipart_within(body, content_type, max_parts=MAX_PARTS)


def held(max_bytes: int = 1 << 30) -> HeldBody:
    return BodyRoom(max_bytes, Metrics()).open()


def limits(max_bytes: int, timeout_s: float = 5, min_rate: int = 0) -> BodyLimits:
    return BodyLimits(max_bytes, timeout_s, min_rate)


def part(disposition: bytes, data: bytes = b"value", *headers: bytes) -> bytes:
    lines = [b"Content-Disposition: " + disposition, *headers]
    return OPEN + b"\r\n".join(lines) + b"\r\n\r\n" + data


ONE = part(b'form-data; name="a"')


def or_error(read: Callable[..., Any], *arguments: Any) -> Any:
    """What a reader gives, or our own refusal; any other exception is a failure of the test."""
    try:
        return read(*arguments)
    except ApiError as error:
        return error


class Wire:
    """Chunks as a server hands them to an application; counts how many were asked for."""

    def __init__(self, chunks: Sequence[bytes]) -> None:
        self.chunks = list(chunks)
        self.num_received = 0

    async def receive(self) -> dict[str, Any]:
        chunk = self.chunks[self.num_received]
        self.num_received += 1
        return {"type": "http.request", "body": chunk, "more_body": self.num_received < len(self.chunks)}

    def request(self, *headers: tuple[bytes, bytes]) -> Request:
        return Request({"type": "http", "method": "POST", "path": "/", "headers": list(headers)}, self.receive)


@pytest.mark.anyio
async def test_a_body_arrives_whole() -> None:
    wire = Wire([b"one ", b"", b"two ", b"three"])
    assert await read_body(wire.request((b"content-length", b"13")), limits(13), held()) == b"one two three"


@pytest.mark.anyio
@pytest.mark.parametrize("length", [b"1025", b"99999999999999999999", b"9" * 5000])
async def test_an_honest_length_over_the_cap_is_refused_unread(length: bytes) -> None:
    wire = Wire([b"x" * 1025])
    with pytest.raises(BodyTooLarge) as caught:
        await read_body(wire.request((b"content-length", length)), limits(1024), held())
    assert (wire.num_received, caught.value.status) == (0, 413)


@pytest.mark.anyio
@pytest.mark.parametrize("headers", [[], [(b"content-length", b"10")], [(b"content-length", b"-1")], [(b"content-length", b"\xb2")]])
async def test_a_body_over_the_cap_is_refused_at_the_chunk_that_passes_it(headers: list[tuple[bytes, bytes]]) -> None:
    wire = Wire([b"x" * 512] * 100)
    with pytest.raises(BodyTooLarge):
        await read_body(wire.request(*headers), limits(1024), held())
    assert wire.num_received == 3


@pytest.mark.anyio
@pytest.mark.parametrize("values", [[b"gzip"], [b"br"], [b"identity, gzip"], [b"identity", b"gzip"], [b""]])
async def test_compressed_bodies_are_refused_unread(values: list[bytes]) -> None:
    wire = Wire([b"x"])
    with pytest.raises(UnsupportedMediaType):
        await read_body(wire.request(*[(b"content-encoding", value) for value in values]), limits(1024), held())
    assert wire.num_received == 0


@pytest.mark.anyio
async def test_identity_is_no_compression() -> None:
    assert await read_body(Wire([b"x"]).request((b"content-encoding", b"Identity")), limits(9), held()) == b"x"


@pytest.mark.anyio
async def test_a_body_that_stops_arriving_is_408() -> None:
    async def silence() -> AsyncIterator[dict[str, Any]]:
        await asyncio.Event().wait()
        yield {}

    request = Request({"type": "http", "method": "POST", "path": "/", "headers": []}, silence().__anext__)
    with pytest.raises(BodyTimeout) as caught:
        await read_body(request, limits(9, timeout_s=0.01), held())
    assert (caught.value.status, caught.value.retryable) == (408, True)
    assert "within 0.01 s" in caught.value.message


class SkippingSelector(selectors.SelectSelector):
    """Never waits: when nothing is ready its clock jumps to the next timer."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            self.now += timeout or 0
        return ready


class SkippingLoop(asyncio.SelectorEventLoop):
    """An event loop in which an hour passes at once."""

    def __init__(self) -> None:
        self.clock = SkippingSelector()
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.now


class Dribble:
    """A client that sends `chunk` every `every_s` seconds, `num_chunks` times."""

    def __init__(self, chunk: bytes, every_s: float, num_chunks: int) -> None:
        self.chunk, self.every_s, self.num_chunks = chunk, every_s, num_chunks
        self.num_received = 0

    async def receive(self) -> dict[str, Any]:
        await asyncio.sleep(self.every_s)
        self.num_received += 1
        return {"type": "http.request", "body": self.chunk, "more_body": self.num_received < self.num_chunks}


def read_dribble(dribble: Dribble, wanted: BodyLimits) -> tuple[Any, float]:
    """What became of the body, and after how long."""
    request = Request({"type": "http", "method": "POST", "path": "/", "headers": []}, dribble.receive)

    async def read() -> tuple[Any, float]:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            found: Any = len(await read_body(request, wanted, held()))
        except ApiError as error:
            found = error.message
        return found, loop.time() - began

    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        return runner.run(read())


SLOW, LATE = "the body came more slowly than 100 bytes a second", "the body did not arrive within 30 s"
DRIBBLES: dict[str, tuple[Dribble, int, Any, float]] = {
    "nothing": (Dribble(b"", 1000, 1), 100, SLOW, SLOW_START_S),
    "a byte a second": (Dribble(b"x", 1, 1000), 100, SLOW, SLOW_START_S + 0.05),
    "less than half the rate": (Dribble(b"x" * 40, 1, 1000), 100, SLOW, 7.8),
    "a little, then nothing": (Dribble(b"x" * 1000, 4, 1000), 100, None, 30),
    "just the rate": (Dribble(b"x" * 100, 1, 20), 100, 2000, 20),
    "slow but short": (Dribble(b"x", 1, 5), 100, 5, 5),
    "the rate, too long": (Dribble(b"x" * 100, 1, 1000), 100, LATE, 30),
    "a byte a second, any rate will do": (Dribble(b"x", 1, 20), 0, 20, 20),
    "a byte a second for ever": (Dribble(b"x", 1, 1000), 0, LATE, 30),
}


@pytest.mark.parametrize("name", DRIBBLES)
def test_a_body_must_arrive_at_the_least_rate(name: str) -> None:
    dribble, min_rate, expected, seconds = DRIBBLES[name]
    found, passed = read_dribble(dribble, limits(1 << 20, timeout_s=30, min_rate=min_rate))
    assert (found, passed) == (expected or LATE, pytest.approx(seconds))


@pytest.mark.anyio
async def test_no_byte_is_kept_that_there_is_no_room_for() -> None:
    wire, room = Wire([b"x" * 512] * 100), BodyRoom(1024, Metrics())
    with room.open() as own, pytest.raises(Overloaded):
        await read_body(wire.request(), limits(1 << 20), own)
    assert wire.num_received == 3


JSON_FAULTS = {
    "nothing": (b"", "invalid_json"),
    "spaces": (b" \n", "invalid_json"),
    "cut": (b'{"captions": ["x"', "invalid_json"),
    "word": (b"captions", "invalid_json"),
    "single quotes": (b"{'captions': []}", "invalid_json"),
    "trailing comma": (b'{"captions": ["x"],}', "invalid_json"),
    "comment": (b'{"captions": ["x"]} // x', "invalid_json"),
    "two values": (b"{} {}", "invalid_json"),
    "control character": (b'{"captions": ["a\nb"]}', "invalid_json"),
    "byte order mark": (b'\xef\xbb\xbf{"captions": ["x"]}', "invalid_json"),
    "UTF-16": ('{"captions": ["x"]}'.encode("utf-16"), "invalid_json"),
    "UTF-16 without mark": ('{"captions": ["x"]}'.encode("utf-16-le"), "invalid_json"),
    "Latin-1": ('{"captions": ["é"]}'.encode("latin-1"), "invalid_json"),
    "encoded surrogate": (b'{"captions": ["\xed\xa0\x80"]}', "invalid_json"),
    "overlong": (b'{"captions": ["\xc0\xaf"]}', "invalid_json"),
    "NUL": (b"\0", "invalid_json"),
    "NaN": (b'{"timeout_ms": NaN}', "invalid_json"),
    "Infinity": (b'{"timeout_ms": Infinity}', "invalid_json"),
    "minus Infinity": (b"[-Infinity]", "invalid_json"),
    "5000 digits": (b'{"timeout_ms": ' + b"9" * 5000 + b"}", "invalid_json"),
    "20 digits": (b'{"timeout_ms": ' + b"9" * 20 + b"}", "invalid_json"),
    "minus 20 digits": (b"[-" + b"9" * 20 + b"]", "invalid_json"),
    "7000 integers of 4300 digits": (b"[" + b",".join([b"9" * 4300] * 7000) + b"]", "invalid_json"),
    "equal keys": (b'{"captions": ["x"], "captions": ["y"]}', "duplicate_key"),
    "equal keys, escaped": (b'{"a": 1, "\\u0061": 2}', "duplicate_key"),
    "equal keys inside": (b'{"groups": [{"image": "a", "image": "b"}]}', "duplicate_key"),
    # J4: deep as well, but that they are too many is known without parsing one
    "100 000 lists": (b"[" * 100_000, "too_many_items"),
    "40 000 lists": (b"[" * 40_000, "too_deep"),
    "40 000 objects": (b'{"a":' * 40_000, "too_deep"),
    "a million captions": (b'{"captions":["a"' + b',"a"' * 1_000_000 + b"]}", "too_many_items"),
    "a million backslashes": (b"[" + b'"\\\\",' * 1_000_000 + b"1]", "too_many_items"),
    "a million empty lists": (b"[" + b"[]," * 1_000_000 + b"1]", "too_many_items"),
    "a million texts after commas in one": (b'["' + b"," * 60_000 + b'"' + b'""' * 1_000_000 + b"]", "too_many_items"),
    "open string after many": (b'"[', "invalid_json"),
}


@pytest.mark.parametrize("name", JSON_FAULTS)
def test_json_faults(name: str) -> None:
    body, code = JSON_FAULTS[name]
    with pytest.raises(RequestError) as caught:
        parse_json(body)
    assert caught.value.code == code
    assert caught.value.status == (413 if code == "too_many_items" else 400)


@pytest.mark.parametrize(("body", "byte"), [(b'{"a": 1,}', 8), ('{"é": 1,}'.encode(), 9), (b'{"\xff": 1}', 2), (b"", 0)])
def test_json_faults_name_the_byte(body: bytes, byte: int) -> None:
    with pytest.raises(RequestError, match=rf"at byte {byte}$"):
        parse_json(body)


@pytest.mark.parametrize("body", [b'"' + b"[,{" * 100_000 + b'"', json.dumps(["[" * 60_000, '\\"' * 60_000]).encode()])
def test_text_inside_strings_is_no_structure(body: bytes) -> None:
    assert parse_json(body) == json.loads(body)


@pytest.mark.parametrize("num_values", [MAX_JSON_VALUES - 1, MAX_JSON_VALUES])
def test_the_bound_on_values(num_values: int) -> None:
    body = json.dumps([["x"] for _ in range(num_values // 2)]).encode()
    assert len(parse_json(body)) == num_values // 2


@pytest.mark.parametrize("number", [10**MAX_INTEGER_DIGITS - 1, 1 - 10**MAX_INTEGER_DIGITS, 0])
def test_the_longest_integers(number: int) -> None:
    assert parse_json(b'{"timeout_ms": %d}' % number) == {"timeout_ms": number}


_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.text(max_size=8) | st.text('"\\\\[,{n', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50)
@given(_values)
def test_what_json_writes_is_read_back(value: Any) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")) == value


def structural(value: Any) -> int:
    """Commas and opening brackets that writing this value takes."""
    if not isinstance(value, list | dict):
        return 0
    return max(1, len(value)) + sum(structural(inner) for inner in (value.values() if isinstance(value, dict) else value))


@settings(max_examples=200)
@given(_values, st.integers(1, 9))
def test_structure_is_counted_alike_through_windows_of_any_size(value: Any, window_bytes: int) -> None:
    """Quotes, and runs of backslashes, fall across the windows' ends."""
    body = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    assert num_structural(body, window_bytes=window_bytes) == structural(value)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    found = or_error(parse_json, body)
    assert found.status == 400 if isinstance(found, ApiError) else found == json.loads(body)


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary=""',
        "multipart/form-data; boundary=" + "b" * 257,
        "multipart/form-data; boundary=" + "b" * 65536,
        "multipart/form-data; boundary=other",
        "multipart/form-data; boundary*=utf-8''bound",
        "multipart/form-data; boundary*=nocodec''%ff",
        "multipart/form-data; boundary=bound; boundary=other",
        "multipart/form-data; boundary=\xff",
        "multipart/form-data; boundary",
    ],
)
def test_an_unusable_boundary_is_refused(content_type: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_multipart(ONE + END, content_type)
    assert (caught.value.code, caught.value.status) == ("multipart_invalid", 400)


MULTIPART_FAULTS = {
    "nothing": b"",
    "no final boundary": ONE,
    "cut inside a boundary": ONE + b"\r\n--bou",
    "another boundary": ONE + b"\r\n--other--\r\n",
    "not a form": b'{"captions": ["x"]}',
    "preamble": b"x" * (1 << 20) + b"\r\n" + ONE + END,
    "no headers": OPEN + b"\r\nvalue" + END,
    "no name": part(b"form-data") + END,
    "no disposition": OPEN + b"Content-Type: text/plain\r\n\r\nvalue" + END,
    "name is not UTF-8": part(b'form-data; name="\xff"') + END,
    "name by RFC 2231": part(b"form-data; name*=utf-8''a") + END,
    "two dispositions": part(b'form-data; name="a"', b"value", b'Content-Disposition: form-data; name="b"') + END,
    "header without colon": OPEN + b"Content-Disposition\r\n\r\nvalue" + END,
    "header name too long": part(b'form-data; name="a"', b"value", b"X" * (MAX_PART_HEADER_BYTES + 1) + b": y") + END,
    "header value too long": part(b'form-data; name="a"', b"value", b"X: " + b"y" * (MAX_PART_HEADER_BYTES + 1)) + END,
    "a megabyte of headers": part(b'form-data; name="a"', b"value", *[b"X-%d: y" % number for number in range(100_000)]) + END,
    "too many parts": (ONE + b"\r\n") * (MAX_PARTS + 1) + b"--bound--\r\n",
    "too many parameters": part(b'form-data; name="a"' + b"; x=y" * MAX_OPTIONS) + END,
    "parameters of nothing": part(b'form-data; name="a"' + b";" * MAX_OPTIONS) + END,
    "semicolons in the name": part(b'form-data; name="' + b";" * MAX_OPTIONS + b'"') + END,
}


@pytest.mark.parametrize("name", MULTIPART_FAULTS)
def test_multipart_faults(name: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_multipart(MULTIPART_FAULTS[name], KIND)
    assert (caught.value.code, caught.value.status) == ("multipart_invalid", 400)


@pytest.mark.parametrize(
    "disposition",
    [
        b'form-data; name="a"; filename="../../etc/x"',
        b'form-data; name="a"; filename="C:\\\\x"',
        b'form-data; name="a"; filename="a\x00b"',
        b'form-data; name="a"; filename=""',
        b'form-data; name="a"; filename="' + b"x" * 10_000 + b'"',
        b'form-data; name="a"; filename="\xff\xfe"',
        b"form-data; name=a; filename=x",
    ],
)
def test_a_file_name_only_says_that_it_is_a_file(disposition: bytes) -> None:
    (found,) = parse_multipart(part(disposition) + END, KIND)
    assert (found.name, bytes(found.data), found.is_file) == ("a", b"value", True)


def num_calls(read: Callable[[], Any]) -> int:
    """How many functions were called, C ones included: the work of a parse, whatever the machine."""
    found = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal found
        found += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        or_error(read)
    finally:
        sys.setprofile(None)
    return found


def form_of(disposition: bytes, num_parts: int) -> bytes:
    return b"".join(part(b'form-data; name="caption"' + disposition, b"x") + b"\r\n" for _ in range(num_parts)) + b"--bound--\r\n"


FORM_BOMBS = {
    "parameters of nothing": b"; " + b";" * 7000,
    "short parameters": b"; x=y" * 2000,
    "quotes": b'; a="' + b'\\"' * 3500 + b'"',
    "one long parameter": b'; a="' + b"x" * 10_000 + b'"',
    "semicolons in a file name": b'; filename="' + b";" * 7000 + b'"',
    "another long header": b"\r\nX: " + b"x" * 10_000,
    "another header of semicolons": b"\r\nX: " + b";" * 10_000,
}


@pytest.mark.parametrize("name", FORM_BOMBS)
def test_no_form_asks_for_much_more_work_than_an_honest_one(name: str) -> None:
    """A form of 7 MB whose parts name 7000 parameters each took twenty seconds."""
    honest = num_calls(lambda: parse_multipart(form_of(b"", MAX_PARTS), KIND))
    bomb = form_of(FORM_BOMBS[name], MAX_PARTS)
    assert len(bomb) > 2_000_000
    assert num_calls(lambda: parse_multipart(bomb, KIND)) < 2 * honest


def test_the_headers_of_all_parts_are_bounded_together() -> None:
    """Each is far below its own bound."""
    size = len(b"Content-Disposition" + b'form-data; name="caption"' + FORM_BOMBS["one long parameter"])
    fits = MAX_FORM_HEADER_BYTES // size
    assert len(parse_multipart(form_of(FORM_BOMBS["one long parameter"], fits), KIND)) == fits
    with pytest.raises(RequestError, match="headers of the parts") as caught:
        parse_multipart(form_of(FORM_BOMBS["one long parameter"], fits + 1), KIND)
    assert caught.value.code == "multipart_invalid"


def test_a_content_type_of_many_parameters_is_refused_unread() -> None:
    kind = KIND + "; x=y" * 100_000
    assert num_calls(lambda: parse_multipart(ONE + END, kind)) < 50
    with pytest.raises(RequestError, match="more than 32 parameters"):
        parse_multipart(ONE + END, kind)


@pytest.mark.parametrize(
    "line",
    [
        b'form-data; name="caption"; name="prompt"',
        b'form-data; name="caption"; NAME="prompt"',
        b'form-data; name=caption;name="prompt"',
        b'form-data; name="caption" ; name = prompt',
        b'form-data; filename="a;b=\\"c"; name="caption"; filename="x"',
    ],
)
def test_no_parameter_comes_twice(line: bytes) -> None:
    with pytest.raises(MultipartInvalid, match="twice"):
        parse_multipart(part(line) + END, KIND)
    with pytest.raises(MultipartInvalid, match="twice"):
        parse_multipart(part(b'form-data; name="a"') + END, KIND + "; boundary=other")


def test_a_value_may_look_like_parameters() -> None:
    (found,) = parse_multipart(part(b'form-data; filename="name=x; name=y; \\"; name=z"; name="image"') + END, KIND)
    assert (found.name, found.is_file) == ("image", True)


@pytest.mark.parametrize("coding", [b"base64", b"Quoted-Printable", b"x-uuencode", b""])
def test_an_encoded_part_is_not_taken_for_its_text(coding: bytes) -> None:
    line = b'form-data; name="caption"\r\nContent-Transfer-Encoding: '
    with pytest.raises(MultipartInvalid, match="encoded"):
        parse_multipart(part(line + coding, b"YSBjYXB0aW9u") + END, KIND)
    for plain in (b"binary", b"8BIT", b"7bit "):
        assert bytes(parse_multipart(part(line + plain, b"a caption") + END, KIND)[0].data) == b"a caption"


def test_as_many_parameters_as_are_allowed() -> None:
    (found,) = parse_multipart(part(b'form-data; name="a"' + b"".join(b"; x%d=y" % at for at in range(MAX_OPTIONS - 1))) + END, KIND)
    assert found.name == "a"


@pytest.mark.parametrize("data", [b"", b"\r\n" * 1000, b"\r\n--boun", b"--bound", b"\0\xff" * 100, b"\r\n--bound-x"[:7]])
def test_data_comes_back_byte_for_byte(data: bytes) -> None:
    parts = parse_multipart(part(b'form-data; name="a"', data) + b"\r\n" + part(b'form-data; name="b"') + END, KIND)
    assert [(one.name, bytes(one.data), one.is_file) for one in parts] == [("a", data, False), ("b", b"value", False)]


def test_what_follows_the_final_boundary_is_ignored() -> None:
    (found,) = parse_multipart(ONE + END + b"z" * (1 << 20), KIND)
    assert bytes(found.data) == b"value"


def test_headers_of_one_part_do_not_reach_the_next() -> None:
    body = part(b'form-data; name="a"; filename="x"', b"1", b"Content-Type: image/png") + b"\r\n" + part(b'form-data; name="b"', b"2") + END
    first, second = parse_multipart(body, KIND)
    assert (first.is_file, second.is_file) == (True, False)
    assert set(second.headers) == {b"content-disposition"}


@settings(max_examples=50)
@given(st.binary(max_size=120), st.integers(0, 100), st.binary(max_size=8))
def test_any_form_is_read_or_refused(data: bytes, at: int, noise: bytes) -> None:
    whole = part(b'form-data; name="a"', data) + END
    at %= len(whole)
    found = or_error(parse_multipart, whole[:at] + noise + whole[at + len(noise) :], KIND)
    assert found.code == "multipart_invalid" if isinstance(found, ApiError) else all(isinstance(one.name, str) for one in found)


@settings(max_examples=50)
@given(st.text(st.characters(max_codepoint=255), max_size=60))
def test_any_content_type_is_read_or_refused(text: str) -> None:
    found = or_error(parse_multipart, ONE + END, f"multipart/form-data; {text}")
    assert found.code == "multipart_invalid" if isinstance(found, ApiError) else len(found) == 1
