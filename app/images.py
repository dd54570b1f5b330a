"""Hostile bytes to a bounded RGB picture. Knows formats and limits; knows no model, no HTTP and no file system."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import math
import re
import struct
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from app.contracts import GroupEncoder, RgbImage
from app.errors import ImageFormatNotAllowed, ImageRejected, ImageTooLarge, SettingsInvalid, UrlNotAllowed
from app.settings import Settings

_ID = re.compile(r"sha256:[0-9a-f]{64}")
_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)
_URL = re.compile(r"([a-z][a-z0-9+.-]*):", re.IGNORECASE)
_Part = TypeVar("_Part")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MAX_SCANS = 64  # of a JPEG: progressive encoders write about ten, and each is a pass over every pixel
_MAX_PARTS = 10_000  # segments of a JPEG, chunks of a PNG or WEBP: Pillow takes one at a time, in Python
_MAX_HEADER_BYTES = 128 << 10  # of a JPEG, without its metadata; Pillow goes through some of it byte by byte
_MAX_TAGS = 512  # that are looked at for the one that is wanted
_BROKEN = (OSError, SyntaxError, ValueError, struct.error, EOFError, IndexError, KeyError, OverflowError, TypeError)


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What an encoded image may be; everything but `max_bytes` is read from its header before decoding."""

    max_bytes: int
    max_pixels: int
    min_side: int
    max_aspect: float
    formats: tuple[str, ...]


def image_id(data: bytes) -> str:
    """The id of encoded image bytes: `sha256:<hex>`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def read_image_field(text: str, limits: ImageLimits) -> bytes | str:
    """The bytes of a base64 string or `data:` URL, or an image id as it is.

    Raises ImageRejected (`bad_base64`, `bad_image_id`, `url_scheme_not_allowed`), ImageTooLarge before decoding, UrlNotAllowed.
    """
    if _ID.fullmatch(text):
        return text
    match = _DATA_URL.match(text)
    if match is None and (url := _URL.match(text)):
        raise _refused_scheme(url.group(1).lower())
    start = match.end() if match else 0
    if (len(text) - start) * 3 // 4 - 2 > limits.max_bytes:
        raise ImageTooLarge(f"the image is larger than {limits.max_bytes} bytes")
    try:
        return base64.b64decode(text[start:], validate=True)
    except (binascii.Error, ValueError):
        raise ImageRejected("image is not standard base64 with padding", code="bad_base64") from None


def _refused_scheme(scheme: str) -> UrlNotAllowed | ImageRejected:
    if scheme in ("http", "https"):
        return UrlNotAllowed("no image is fetched from this address; send base64, a base64 data: URL, or a sha256: id")
    if scheme == "data":
        return ImageRejected("a data: URL must begin with data:image/<type>;base64,", code="bad_base64")
    if scheme == "sha256":
        return ImageRejected("an image id is sha256: and 64 lower-case hexadecimal digits", code="bad_image_id")
    return ImageRejected("send base64, a base64 data: URL, or a sha256: id", code="url_scheme_not_allowed")


def probe_image(data: bytes, limits: ImageLimits) -> tuple[int, int]:
    """Width and height from the header alone, all limits checked. Decodes nothing."""
    return _probe(_plain(data, limits), limits)


def _probe(plain: _Plain, limits: ImageLimits) -> tuple[int, int]:
    with _open(plain.data, limits) as image, _as_rejected(limits):
        width, height = image.size
        animated = getattr(image, "is_animated", False)
    if width * height > limits.max_pixels:
        raise ImageTooLarge(f"the image has more than {limits.max_pixels} pixels")
    if min(width, height) < limits.min_side or max(width, height) > limits.max_aspect * min(width, height):
        raise ImageRejected(
            f"sides must be at least {limits.min_side} pixels and at most {limits.max_aspect:g}:1", code="image_bad_dimensions"
        )
    if animated:
        raise ImageRejected("animated images are not scored; send one frame", code="animated_not_allowed")
    return width, height


def image_limits(settings: Settings) -> ImageLimits:
    """The limits on encoded images that the settings name."""
    return ImageLimits(
        max_bytes=settings.max_image_bytes,
        max_pixels=settings.max_image_pixels,
        min_side=settings.min_image_side,
        max_aspect=settings.max_image_aspect,
        formats=settings.formats,
    )


def decode_image(data: bytes, limits: ImageLimits, *, exif_transpose: bool, alpha: Literal["drop", "white"] = "drop") -> RgbImage:
    """The whole picture as RGB at its own size.

    Alpha is dropped (or, "white", an RGBA picture laid on white) and palettes are expanded as `Image.convert("RGB")` does, which is
    what the training recipes did; 16-bit grey is scaled to 8 bits, not clipped. Truncated or corrupt files raise ImageRejected, never a
    grey rest.
    """
    plain = _plain(data, limits)
    _probe(plain, limits)
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES was switched on; refusing to decode")
    with _as_rejected(limits):
        with _open(plain.data, limits) as image:
            image.verify()  # PNG checksums; a no-op for other formats
        with _open(plain.data, limits) as image:
            image.load()
            turn = _TURNS.get(_orientation(plain, image)) if exif_transpose else None
            turned = image if turn is None else image.transpose(turn)
            rgb = _on_white(turned) if alpha == "white" and turned.mode == "RGBA" else _to_rgb(turned)
            return RgbImage(image_id(data), np.asarray(rgb))


def _on_white(image: Image.Image) -> Image.Image:
    """As `qwen_vl_utils.vision_process.to_rgb`."""
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def check_limits(limits: ImageLimits, encoder: GroupEncoder) -> None:
    """What the limits let in, the encoder takes. Raises SettingsInvalid: better at the start than at somebody's picture.

    The slimmest pictures decide: where the recipe shrinks them, their short side is rounded and they become slimmer still.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise SettingsInvalid("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is switched on: cut files would be scored as grey pictures")
    least, most = limits.min_side, max(math.isqrt(int(limits.max_pixels / limits.max_aspect)), limits.min_side)
    for short, aspect in ((least, 1.0), (least, limits.max_aspect), (most, limits.max_aspect)):
        long = int(short * aspect)
        for size in ((short, long), (long, short)) if encoder.takes_images else ():
            try:
                encoder.image_tokens(*size)
            except ImageRejected as error:
                message = f"min_image_side {least} and max_image_aspect {limits.max_aspect:g} allow a picture of {size[0]} x {size[1]}"
                raise SettingsInvalid(f"{message}, but {error}") from None


def shrink(pixels: NDArray[np.uint8], long_edge: int | None, resample: str) -> Image.Image:
    """The picture with its long edge at most `long_edge`, by `Image.thumbnail`; smaller ones stay as they are."""
    image = Image.fromarray(pixels)
    if long_edge is not None and max(image.size) > long_edge:
        image.thumbnail((long_edge, long_edge), Image.Resampling[resample.upper()])
    return image


def shrunk_size(width: int, height: int, long_edge: int | None) -> tuple[int, int]:
    """The size `shrink` gives, without pixels: the arithmetic of `Image.thumbnail`, which a test holds equal."""
    if long_edge is None or max(width, height) <= long_edge:
        return width, height
    aspect = width / height
    if aspect <= 1:
        return _nearest(long_edge * aspect, lambda n: abs(aspect - n / long_edge)), long_edge
    return long_edge, _nearest(long_edge / aspect, lambda n: abs(aspect - long_edge / n) if n else 0)


def _nearest(number: float, error: Callable[[int], float]) -> int:
    return max(min(math.floor(number), math.ceil(number), key=error), 1)


def _open(data: bytes, limits: ImageLimits) -> Image.Image:
    try:
        with _as_rejected(limits):
            image = Image.open(io.BytesIO(data), formats=limits.formats)
    except UnidentifiedImageError:
        raise _unidentified(data, limits) from None
    return image


@contextmanager
def _as_rejected(limits: ImageLimits) -> Iterator[None]:
    """Whatever Pillow makes of a broken file becomes a rejection with our words: its own hold memory addresses."""
    try:
        yield
    except UnidentifiedImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageTooLarge(f"the image has more than {limits.max_pixels} pixels") from None
    except _BROKEN:
        raise ImageRejected("the image is truncated or corrupt") from None


_MAGICS = {"JPEG": b"\xff\xd8\xff", "PNG": b"\x89PNG", "GIF": b"GIF8", "BMP": b"BM"}
_OTHER_MAGICS = (
    *(b"8BPS", b"SIMPLE", b"%!PS", b"\xc5\xd0\xd3\xc6", b"%PDF", b"II*\0", b"MM\0*", b"<svg", b"<?xml"),
    *(b"\0\0\0\x0cjP", b"\xff\x4f\xff\x51", b"\0\0\0\x0cJXL", b"\xff\x0a", b"\0\0\1\0"),
)


def _unidentified(data: bytes, limits: ImageLimits) -> ImageFormatNotAllowed | ImageRejected:
    """A known format outside the allow-list is named as such, without opening it; the rest is no image."""
    known = next((name for name, magic in _MAGICS.items() if data.startswith(magic)), "WEBP" if data[8:12] == b"WEBP" else None)
    if data.startswith(_OTHER_MAGICS) or data[4:8] == b"ftyp" or (known and known not in limits.formats):
        return _not_allowed(limits)
    return ImageRejected("the image could not be read")


def _not_allowed(limits: ImageLimits) -> ImageFormatNotAllowed:
    return ImageFormatNotAllowed(f"allowed image formats: {', '.join(limits.formats)}")


@dataclass(frozen=True, slots=True)
class _Plain:
    """An encoded picture whose structure is bounded; a JPEG's metadata stands apart from it."""

    data: bytes
    exif: bytes = b""
    xmp: bytes = b""


@dataclass(frozen=True, slots=True)
class _Segment:
    """A JPEG's, from its marker to the end of its own data."""

    code: int
    start: int
    end: int


_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])", re.DOTALL)
_SCAN, _END = 0xDA, 0xD9
_SIZED = {*range(0xC0, 0xD0), *range(0xDB, 0xF0), 0xFE} - {0xC8}  # whose data both libjpeg and Pillow skip by its length
_INTEGERS = {3: "H", 4: "I", 8: "h", 9: "i"}  # TIFF's kinds of whole numbers
_METADATA = {*range(0xE1, 0xF0), 0xFE} - {0xEE}  # no pixel depends on it, as on JFIF's and Adobe's segments


def _plain(data: bytes, limits: ImageLimits) -> _Plain:
    """Bound what a decoder may do with these bytes, from their structure alone. Raises what `decode_image` raises."""
    if len(data) > limits.max_bytes:
        raise ImageTooLarge(f"the image is larger than {limits.max_bytes} bytes")
    if data.startswith(b"\xff\xd8\xff"):
        return _plain_jpeg(data, limits)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_png(data)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        deque(_check_number(_riff_chunks(data)), maxlen=0)
    return _Plain(data)


def _plain_jpeg(data: bytes, limits: ImageLimits) -> _Plain:
    """A JPEG as two: what is decoded, and its metadata, which Pillow would read tag by tag when it opens the file."""
    header = _jpeg_header(data)
    if _is_several(data, header):
        raise _not_allowed(limits)
    kept, last = [], 0
    for segment in header:
        if segment.code in _METADATA:
            kept.append(data[last : segment.start])
            last = segment.end
    kept.append(data[last : header[-1].start])
    if sum(map(len, kept)) > _MAX_HEADER_BYTES:
        raise _too_complex(f"{_MAX_HEADER_BYTES} bytes before its first scan")
    plain = b"".join([*kept, data[header[-1].start :]]) if last else data
    xmp = _bodies(data, header, 0xE1, b"http://ns.adobe.com/xap/1.0/\0")
    return _Plain(plain, b"".join(_bodies(data, header, 0xE1, b"Exif\0\0")), xmp[-1] if xmp else b"")


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
    return bool(indexes) and (_tag(indexes[-1], 0xB001) or 0) > 1 and not gain_map


def _check_png(data: bytes) -> None:
    kinds = list(_check_number(_png_chunks(data)))
    if kinds.count(b"iCCP") > 1:  # each is inflated as the file is opened
        raise _too_complex("one colour profile")


def _png_chunks(data: bytes) -> Iterator[bytes]:
    at, kind = 8, b""
    while kind != b"IEND" and at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        yield kind
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


def _orientation(plain: _Plain, image: Image.Image) -> int:
    """The EXIF turn, 1..8, found where `Image.getexif` finds it; broken metadata is no reason to refuse a picture."""
    exif = plain.exif or image.info.get("exif", b"") or _raw_profile(image.info.get("Raw profile type exif", ""))
    turn = _tag(re.sub(rb"^(Exif\0\0){1,2}", b"", exif), ExifTags.Base.Orientation)
    if turn is not None:
        return turn
    xmp = plain.xmp or image.info.get("xmp") or image.info.get("XML:com.adobe.xmp", "").encode("utf-8", "replace")
    match = re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp)
    return int(match[1]) if match else 1


def _raw_profile(text: str) -> bytes:
    """EXIF as ImageMagick keeps it in a PNG: a name and a length, then hexadecimal lines."""
    try:
        return bytes.fromhex("".join(text.split("\n")[3:]))
    except ValueError:
        return b""


def _tag(tiff: bytes, wanted: int) -> int | None:
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


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: keep the high byte
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    image.info.pop("transparency", None)  # dropped like alpha; some kinds would warn
    return image.convert("RGB")
