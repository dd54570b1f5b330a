"""Hostile bytes to a bounded RGB picture. Knows formats and limits; knows no model, no HTTP and no file system."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import math
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from app.containers import Plain, check_scans, is_jpeg, is_png, is_whole_png, plain, tag, with_filled_scans
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
_BROKEN = (OSError, SyntaxError, ValueError, struct.error, EOFError, IndexError, KeyError, OverflowError, TypeError, zlib.error)


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


def _plain(data: bytes, limits: ImageLimits) -> Plain:
    if len(data) > limits.max_bytes:
        raise ImageTooLarge(f"the image is larger than {limits.max_bytes} bytes")
    found = plain(data)
    if found.is_several:
        raise _not_allowed(limits)
    return found


def _probe(encoded: Plain, limits: ImageLimits) -> tuple[int, int]:
    with _open(encoded.data, limits) as image, _as_rejected(limits):
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
    what the training recipes did; 16-bit grey is scaled to 8 bits, not clipped. Truncated or corrupt files raise ImageRejected, also
    those whose end is closed again: never a grey rest. A progressive JPEG without its last scans is whole, and blurred.
    """
    encoded = _plain(data, limits)
    _probe(encoded, limits)
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES was switched on; refusing to decode")
    with _as_rejected(limits):
        with _open(encoded.data, limits) as image:
            image.verify()  # PNG checksums; a no-op for other formats
        with _open(encoded.data, limits) as image:
            image.load()
            _check_whole(encoded.data, image, limits)
            turn = _TURNS.get(_orientation(encoded, image)) if exif_transpose else None
            turned = image if turn is None else image.transpose(turn)
            rgb = _on_white(turned) if alpha == "white" and turned.mode == "RGBA" else _to_rgb(turned)
            return RgbImage(image_id(data), np.asarray(rgb))


def _check_whole(data: bytes, image: Image.Image, limits: ImageLimits) -> None:
    """Decoders fill up what is missing before a proper end, and tell nobody. Raises ImageRejected."""
    if is_jpeg(data):
        check_scans(data)
        is_whole = all(_has_pixels(filled, image, limits) for filled in with_filled_scans(data))
    else:
        is_whole = not is_png(data) or is_whole_png(data)
    if not is_whole:
        raise ImageRejected("the image is truncated or corrupt")


def _has_pixels(data: bytes, image: Image.Image, limits: ImageLimits) -> bool:
    with _open(data, limits) as other:
        return np.array_equal(np.asarray(image), np.asarray(other))


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


def _orientation(plain: Plain, image: Image.Image) -> int:
    """The EXIF turn, 1..8, found where `Image.getexif` finds it; broken metadata is no reason to refuse a picture."""
    exif = plain.exif or image.info.get("exif", b"") or _raw_profile(image.info.get("Raw profile type exif", ""))
    turn = tag(re.sub(rb"^(Exif\0\0){1,2}", b"", exif), ExifTags.Base.Orientation)
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


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: keep the high byte
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    image.info.pop("transparency", None)  # dropped like alpha; some kinds would warn
    return image.convert("RGB")
