"""Encoded pictures by their bytes alone: bounded before a decoder sees them, and found to be whole once it has.

Knows what a JPEG, a PNG and a WEBP are made of; decodes nothing and knows no limits that anybody sets.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from app.errors import ImageRejected

_Part = TypeVar("_Part")
_MAX_SCANS = 64  # of a JPEG: progressive encoders write about ten, and each is a pass over every pixel
_MAX_PARTS = 10_000  # segments of a JPEG, chunks of a PNG or WEBP: Pillow takes one at a time, in Python
_MAX_HEADER_BYTES = 128 << 10  # of a JPEG, without its metadata; Pillow goes through some of it byte by byte
_MAX_TAGS = 512  # that are looked at for the one that is wanted


@dataclass(frozen=True, slots=True)
class Plain:
    """An encoded picture whose structure is bounded; a JPEG's metadata stands apart from it."""

    data: bytes
    exif: bytes = b""
    xmp: bytes = b""
    is_several: bool = False


@dataclass(frozen=True, slots=True)
class _Segment:
    """A JPEG's, from its marker to the end of its own data."""

    code: int
    start: int
    end: int


_PNG = b"\x89PNG\r\n\x1a\n"
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])", re.DOTALL)
_SCAN, _END = 0xDA, 0xD9
_SIZED = {*range(0xC0, 0xD0), *range(0xDB, 0xF0), 0xFE} - {0xC8}  # whose data both libjpeg and Pillow skip by its length
_INTEGERS = {3: "H", 4: "I", 8: "h", 9: "i"}  # TIFF's kinds of whole numbers
_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # what a picture's size and components stand in
_ARITHMETIC = {*range(0xC9, 0xD0)} - {0xCC}  # those whose scans may leave zeros at their end unwritten
_METADATA = {*range(0xE1, 0xF0), 0xFE} - {0xEE}  # no pixel depends on it, as on JFIF's and Adobe's segments


def is_jpeg(data: bytes) -> bool:
    return data.startswith(b"\xff\xd8\xff")


def is_png(data: bytes) -> bool:
    return data.startswith(_PNG)


def plain(data: bytes) -> Plain:
    """Bound what a decoder may do with these bytes, from their structure alone. Raises ImageRejected (`image_too_complex`, ..)."""
    if is_jpeg(data):
        return _plain_jpeg(data)
    if is_png(data):
        _check_png(data)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        deque(_check_number(_riff_chunks(data)), maxlen=0)
    return Plain(data)


def _plain_jpeg(data: bytes) -> Plain:
    """A JPEG as two: what is decoded, and its metadata, which Pillow would read tag by tag when it opens the file."""
    header = _jpeg_header(data)
    kept, last = [], 0
    for segment in header:
        if segment.code in _METADATA:
            kept.append(data[last : segment.start])
            last = segment.end
    kept.append(data[last : header[-1].start])
    if sum(map(len, kept)) > _MAX_HEADER_BYTES:
        raise _too_complex(f"{_MAX_HEADER_BYTES} bytes before its first scan")
    decoded = b"".join([*kept, data[header[-1].start :]]) if last else data
    xmp = _bodies(data, header, 0xE1, b"http://ns.adobe.com/xap/1.0/\0")
    return Plain(decoded, b"".join(_bodies(data, header, 0xE1, b"Exif\0\0")), xmp[-1] if xmp else b"", _is_several(data, header))


def _jpeg_header(data: bytes) -> list[_Segment]:
    """The segments up to and with the first scan, or the end. Raises ImageRejected over the limits on segments and scans."""
    header: list[_Segment] = []
    num_scans = 0
    for segment in _check_number(_jpeg_segments(data)):
        if not num_scans:
            header.append(segment)
        elif segment.code == _END:
            break
        num_scans += segment.code == _SCAN
        if num_scans > _MAX_SCANS:
            raise _too_complex(f"{_MAX_SCANS} scans")
    return header


def _jpeg_segments(data: bytes) -> Iterator[_Segment]:
    """As libjpeg finds them: what stands before a marker is passed over, so a scan may follow anything. The last is the end of the data."""
    at = 2
    while match := _MARKER.search(data, at):
        code, start = match[1][0], match.start()
        at = start + 2 + (int.from_bytes(data[start + 2 : start + 4]) if code in _SIZED else 0)
        yield _Segment(code, start, at)
    yield _Segment(_END, len(data), len(data))


def _bodies(data: bytes, header: list[_Segment], code: int, label: bytes) -> list[bytes]:
    found = [segment for segment in header if segment.code == code and data.startswith(label, segment.start + 4)]
    return [data[segment.start + 4 + len(label) : segment.end] for segment in found]


def _is_several(data: bytes, header: list[_Segment]) -> bool:
    """Whether this is an MPO of more than one picture; a picture with a gain map is one picture, as it is to Pillow."""
    indexes = _bodies(data, header, 0xE2, b"MPF\0")
    gain_map = any(b' hdrgm:Version="' in body for body in _bodies(data, header, 0xE1, b""))
    return bool(indexes) and (tag(indexes[-1], 0xB001) or 0) > 1 and not gain_map


def _check_png(data: bytes) -> None:
    """One header, where it belongs: a decoder takes the last of several, wherever it stands."""
    chunks = list(_check_number(_png_chunks(data)))
    kinds = [chunk.kind for chunk in chunks]
    if kinds.count(b"iCCP") > 1:  # each is inflated as the file is opened
        raise _too_complex("one colour profile")
    if kinds[:1] != [b"IHDR"] or kinds.count(b"IHDR") > 1 or chunks[0].end - chunks[0].start != _IHDR.size:
        raise ImageRejected("the image could not be read")


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A PNG's, and where its own data lie."""

    kind: bytes
    start: int
    end: int


def _png_chunks(data: bytes) -> Iterator[_Chunk]:
    at, kind = 8, b""
    while kind != b"IEND" and at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        yield _Chunk(kind, at + 8, at + 8 + size)
        at += 12 + size


def _riff_chunks(data: bytes) -> Iterator[bytes]:
    at, end = 12, min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    while at + 8 <= end:
        kind, size = struct.unpack_from("<4sI", data, at)
        yield kind
        at += 8 + size + size % 2


def _check_number(parts: Iterator[_Part]) -> Iterator[_Part]:
    """The same parts, until there are too many."""
    for number, part in enumerate(parts):
        if number == _MAX_PARTS:
            raise _too_complex(f"{_MAX_PARTS} parts")
        yield part


def _too_complex(limit: str) -> ImageRejected:
    return ImageRejected(f"the image has more than {limit}", code="image_too_complex")


def tag(tiff: bytes, wanted: int) -> int | None:
    """A whole number among the first tags of a TIFF header; None if it is not there. However many the header claims, few are read."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or 42 not in tiff[2:4]:
        return None
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
    except struct.error:
        return None
    num_tags = min(count, _MAX_TAGS, (len(tiff) - start - 2) // 12)
    for tag, kind, number, value in struct.iter_unpack(order + "HHI4s", tiff[start + 2 : start + 2 + 12 * num_tags]):
        if tag == wanted:
            return int(struct.unpack_from(order + _INTEGERS[kind], value)[0]) if number == 1 and kind in _INTEGERS else None
    return None


def check_scans(data: bytes) -> None:
    """That a JPEG has a scan of each of its components, by a coding that shows where a scan ends too early. Raises ImageRejected."""
    wanted, found = b"", set[int]()
    for segment in _jpeg_segments(data):
        if segment.code in _ARITHMETIC:
            raise ImageRejected("arithmetic-coded JPEGs are not scored: nothing tells whether they are whole")
        if segment.code in _FRAME:
            wanted = data[segment.start + 10 : segment.end : 3]
        elif segment.code == _SCAN:
            start, number = segment.start + 5, data[segment.start + 4 : segment.start + 5]
            found.update(data[start : start + 2 * sum(number) : 2])
        elif segment.code == _END and found:
            break
    if not set(wanted) <= found or len(set(wanted)) < len(wanted):
        raise ImageRejected("the image is truncated or corrupt")


def with_filled_scans(data: bytes) -> Iterator[bytes]:
    """A JPEG with other bytes behind the end of each scan, in one way or two.

    A decoder passes over what follows a scan's last block: a whole picture decodes to the same pixels. Where blocks are missing it
    takes these bytes for theirs, where it would else make the rest grey and say nothing. In a progressive picture they may happen to
    say that nothing follows, hence the second way.
    """
    is_progressive = any(segment.code in _PROGRESSIVE for segment in _jpeg_segments(data))
    for noise in _NOISES if is_progressive else _NOISES[:1]:
        yield _filled(data, noise)


def _filled(data: bytes, noise: bytes) -> bytes:
    pieces, last, scan = [], 0, 0
    for segment in _jpeg_segments(data):
        if scan:
            coded = data[scan : segment.start].rstrip(b"\xff")  # more of a marker's first byte belong to the marker
            pieces += [data[last:scan], coded, _filling(coded, noise)]
            last, scan = scan + len(coded), 0
        if segment.code == _SCAN:
            scan = segment.end
        elif segment.code == _END and pieces:
            break
    return b"".join([*pieces, data[last:]])


def _filling(scan: bytes, noise: bytes) -> bytes:
    """Noise without markers but those of restarts, from the one that would come next."""
    last = max(range(8), key=lambda number: scan.rfind(bytes((0xFF, 0xD0 + number))))
    following = last + 1 if bytes((0xFF, 0xD0 + last)) in scan else 0
    return b"".join(noise + bytes((0xFF, 0xD0 + (following + number) % 8)) for number in range(8)) + noise


_PROGRESSIVE = {0xC2, 0xC6}
_NOISE = bytes((number * 37 + 181) % 251 for number in range(64))  # its first bit is not that of the zeros which a decoder makes up
_NOISES = (_NOISE, bytes(0x80 | (0x7E & ~byte) for byte in _NOISE))


def is_whole_png(data: bytes) -> bool:
    """Whether the pixels that a PNG packs are as many as its header says; a decoder leaves the rest black.

    Of data whose chunks are intact. Unpacks them once more, a little at a time.
    """
    width, height, depth, colour, _, _, interlace = _IHDR.unpack_from(data, 16)
    expected = _png_bytes(width, height, depth * _CHANNELS[colour], _ADAM7 if interlace else _ONE_PASS)
    unpacker, found, view = zlib.decompressobj(), 0, memoryview(data)
    for chunk in _png_chunks(data):
        for at in range(chunk.start, min(chunk.end, len(data)), _PIECE) if chunk.kind == b"IDAT" else ():
            packed: bytes | memoryview = view[at : min(at + _PIECE, chunk.end)]
            while packed and found < expected and not unpacker.eof:
                found += len(unpacker.decompress(packed, min(_PIECE, expected - found)))
                packed = unpacker.unconsumed_tail
            if found >= expected or unpacker.eof:
                return found >= expected
    return False


def _png_bytes(width: int, height: int, pixel_bits: int, passes: tuple[tuple[int, int, int, int], ...]) -> int:
    """Unpacked, with a byte for the filter of each line (PNG specification, sections 7.2 and 8.2)."""
    num_bytes = 0
    for left, top, across, down in passes:
        columns, rows = len(range(left, width, across)), len(range(top, height, down))
        num_bytes += rows * (1 + (columns * pixel_bits + 7) // 8) if columns else 0
    return num_bytes


_IHDR = struct.Struct(">IIBBBBB")
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of each colour type
_ONE_PASS = ((0, 0, 1, 1),)  # left, top, step across, step down
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_PIECE = 64 << 10
