"""Hostile bytes in, a bounded RGB picture or our own words out."""

from __future__ import annotations

import base64
import io
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps
from PIL.PngImagePlugin import PngInfo

from app.contracts import GroupEncoder
from app.encoding import Encoder
from app.errors import ApiError, ImageFormatNotAllowed, ImageRejected, ImageTooLarge, SettingsInvalid, UrlNotAllowed
from app.images import ImageLimits, check_limits, decode_image, image_id, image_limits, probe_image, read_image_field, shrink, shrunk_size
from app.settings import Settings
from tests.fakes import FakeEncoder

LIMITS = ImageLimits(max_bytes=1 << 20, max_pixels=1_000_000, min_side=16, max_aspect=10, formats=("JPEG", "PNG", "WEBP"))
EVERYTHING = replace(LIMITS, formats=("JPEG", "PNG", "WEBP", "BMP", "GIF"))
PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)
IMAGE_CODES = {"image_decode_failed", "image_too_large", "image_bad_dimensions", "image_format_not_allowed", "animated_not_allowed"}
ROWS = b"".join(b"\0" + row.tobytes() for row in PIXELS)  # as a PNG packs them, unfiltered


def or_error(read: Callable[..., Any], *arguments: Any) -> Any:
    """What a reader gives, or our own refusal; any other exception is a failure of the test."""
    try:
        return read(*arguments)
    except ApiError as error:
        return error


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(data: bytes, *, exif_transpose: bool = False, limits: ImageLimits = LIMITS) -> NDArray[np.uint8]:
    return decode_image(data, limits, exif_transpose=exif_transpose).pixels


def refusal(data: bytes, limits: ImageLimits = LIMITS) -> ApiError:
    """The error of decoding, which must be ours and hold nothing of Pillow's."""
    with pytest.raises(ApiError) as caught:
        pixels(data, exif_transpose=True, limits=limits)
    assert re.search(r"0x[0-9a-f]{4}|BytesIO|object at|PIL", str(caught.value)) is None
    assert caught.value.__suppress_context__ or caught.value.__cause__ is None
    return caught.value


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, packed: bytes = zlib.compress(b""), depth: int = 8, colour: int = 2, extra: bytes = b"") -> bytes:
    """A PNG by hand, so that its header can say anything."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def webp_canvas(width: int, height: int) -> bytes:
    """An animated WEBP whose header claims this canvas."""
    data = bytearray(saved(PICTURE, "WEBP", save_all=True, append_images=[PICTURE.transpose(Image.Transpose.FLIP_TOP_BOTTOM)]))
    at = data.index(b"VP8X") + 12
    data[at : at + 6] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


# ---- the field


BYTES = b"any bytes at all"
BASE64 = base64.b64encode(BYTES).decode()
ID = "sha256:" + "0a" * 32


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (BASE64, BYTES),
        ("", b""),
        (f"data:image/png;base64,{BASE64}", BYTES),
        (f"DATA:Image/X-Anything.v2+z;BASE64,{BASE64}", BYTES),
        ("data:image/png;base64,", b""),
        (ID, ID),
    ],
)
def test_accepted_forms_of_the_field(text: str, found: bytes | str) -> None:
    assert read_image_field(text, LIMITS) == found


@pytest.mark.parametrize(
    ("text", "kind", "code"),
    [
        (BASE64[:-1], ImageRejected, "bad_base64"),
        (BASE64 + "=", ImageRejected, "bad_base64"),
        (BASE64[:8] + "\n" + BASE64[8:], ImageRejected, "bad_base64"),
        (BASE64 + "\n", ImageRejected, "bad_base64"),
        (" " + BASE64, ImageRejected, "bad_base64"),
        ("!" + BASE64, ImageRejected, "bad_base64"),
        ("_-_-", ImageRejected, "bad_base64"),
        ("é===", ImageRejected, "bad_base64"),
        ("=", ImageRejected, "bad_base64"),
        ("\0", ImageRejected, "bad_base64"),
        ("/etc/passwd", ImageRejected, "bad_base64"),
        ("../cartoon.png", ImageRejected, "bad_base64"),
        ("data:text/plain;base64," + BASE64, ImageRejected, "bad_base64"),
        ("data:image/png," + BASE64, ImageRejected, "bad_base64"),
        ("data:image/png;charset=x;base64," + BASE64, ImageRejected, "bad_base64"),
        ("data:;base64," + BASE64, ImageRejected, "bad_base64"),
        ("data:" + BASE64, ImageRejected, "bad_base64"),
        ("data:image/png;base64,data:image/png;base64," + BASE64, ImageRejected, "bad_base64"),
        (ID.upper(), ImageRejected, "bad_image_id"),
        (ID[:-1], ImageRejected, "bad_image_id"),
        (ID + "0", ImageRejected, "bad_image_id"),
        (ID + "\n", ImageRejected, "bad_image_id"),
        ("sha256:", ImageRejected, "bad_image_id"),
        ("file:///etc/passwd", ImageRejected, "url_scheme_not_allowed"),
        ("ftp://host/x", ImageRejected, "url_scheme_not_allowed"),
        ("gopher://host/x", ImageRejected, "url_scheme_not_allowed"),
        ("javascript:alert(1)", ImageRejected, "url_scheme_not_allowed"),
        ("md5:" + "0" * 32, ImageRejected, "url_scheme_not_allowed"),
        ("c:\\cartoon.png", ImageRejected, "url_scheme_not_allowed"),
        *[
            (f"{scheme}://{host}/x.png", UrlNotAllowed, "url_not_allowed")
            for scheme in ("http", "HTTPS")
            for host in ("example.org", "127.0.0.1", "127.1", "2130706433", "[::1]", "169.254.169.254", "user@127.0.0.1", "localhost.")
        ],
        ("http://127.0.0.1:6666\\@1.1.1.1/", UrlNotAllowed, "url_not_allowed"),
        ("http:", UrlNotAllowed, "url_not_allowed"),
    ],
)  # fmt: skip
def test_refused_forms_of_the_field(text: str, kind: type[ApiError], code: str) -> None:
    with pytest.raises(kind) as caught:
        read_image_field(text, LIMITS)
    assert (caught.value.code, caught.value.field) == (code, "image")
    assert caught.value.status == (403 if code == "url_not_allowed" else 422)
    assert "passwd" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_base64_is_measured_before_it_is_decoded(prefix: str) -> None:
    exactly = base64.b64encode(b"x" * LIMITS.max_bytes).decode()
    assert read_image_field(prefix + exactly, LIMITS) == b"x" * LIMITS.max_bytes
    with pytest.raises(ImageTooLarge):
        read_image_field(prefix + "!" * (len(exactly) + 8), LIMITS)  # not even base64: its size comes first


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    found = or_error(read_image_field, text, LIMITS)
    if isinstance(found, ApiError):
        assert found.code in {"bad_base64", "bad_image_id", "url_scheme_not_allowed", "url_not_allowed"}
    else:
        assert isinstance(found, bytes) or text == found


# ---- formats


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_allowed_formats(kind: str) -> None:
    data = saved(PICTURE, kind, **({"lossless": True} if kind == "WEBP" else {}))
    decoded = decode_image(data, LIMITS, exif_transpose=False)
    assert (decoded.width, decoded.height) == probe_image(data, LIMITS) == (64, 48)
    assert decoded.image_id == image_id(data)
    assert decoded.pixels.dtype == np.uint8
    assert decoded.pixels.shape == (48, 64, 3)
    assert kind == "JPEG" or np.array_equal(decoded.pixels, PIXELS)


def _heads() -> dict[str, bytes]:
    names = ("TIFF", "ICO", "JPEG2000", "GIF", "BMP", "PDF", "EPS")
    made = {name: saved(PICTURE, name) for name in names}
    return made | {
        "MPO": saved(PICTURE, "MPO", save_all=True, append_images=[PICTURE]),
        "AVIF": b"\0\0\0\x20ftypavif" + bytes(64),
        "HEIC": b"\0\0\0\x20ftypheic" + bytes(64),
        "PSD": b"8BPS\0\1" + bytes(64),
        "FITS": b"SIMPLE  =                    T" + bytes(64),
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "XML": b"<?xml version='1.0'?><svg/>",
        "big-endian TIFF": b"MM\0*" + bytes(64),
        "JPEG XL": b"\xff\x0a" + bytes(64),
        "JPEG 2000 stream": b"\xff\x4f\xff\x51" + bytes(64),
    }


@pytest.mark.parametrize("name", _heads())
def test_other_formats_are_named_as_such(name: str) -> None:
    error = refusal(_heads()[name])
    assert isinstance(error, ImageFormatNotAllowed)
    assert (error.status, error.code, str(error)) == (415, "image_format_not_allowed", "allowed image formats: JPEG, PNG, WEBP")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_the_list_decides_and_nothing_else(kind: str) -> None:
    data = saved(PICTURE, kind)
    assert pixels(data, limits=replace(LIMITS, formats=(kind,))).shape == (48, 64, 3)
    others = tuple(name for name in EVERYTHING.formats if name != kind)
    assert isinstance(refusal(data, replace(LIMITS, formats=others)), ImageFormatNotAllowed)
    assert refusal(data[: len(data) // 3], replace(LIMITS, formats=(kind,))).code == "image_decode_failed"


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"x" * 1000, b"<html>not found</html>", b"P6 64 48 255 " + bytes(64 * 48 * 3), b"RIFF\0\0\0\0WAVE", b"\x89PNG\r\n\x1a\n"],
)
def test_what_is_no_image(data: bytes) -> None:
    error = refusal(data)
    assert (error.status, error.code, error.field) == (422, "image_decode_failed", "image")


# ---- truncated and corrupt


ENCODED = {
    "PNG": saved(PICTURE, "PNG"),
    "PNG palette": saved(PICTURE.quantize(16), "PNG"),
    "JPEG": saved(PICTURE, "JPEG"),
    "JPEG progressive": saved(PICTURE, "JPEG", progressive=True),
    "WEBP": saved(PICTURE, "WEBP"),
    "WEBP lossless": saved(PICTURE, "WEBP", lossless=True),
    "WEBP with alpha": saved(PICTURE.convert("RGBA"), "WEBP"),
    "GIF": saved(PICTURE, "GIF"),
    "BMP": saved(PICTURE, "BMP"),
}


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("percent", range(0, 100, 5))
def test_a_truncated_file_is_never_a_grey_picture(name: str, percent: int) -> None:
    data = ENCODED[name]
    error = refusal(data[: len(data) * percent // 100], EVERYTHING)
    assert (error.status, error.code) == (422, "image_decode_failed")


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("missing", [5, 8, 13, 21, 64])
def test_a_file_without_its_last_bytes_is_refused(name: str, missing: int) -> None:
    assert refusal(ENCODED[name][:-missing]).code == "image_decode_failed"


def test_no_flipped_byte_of_a_png_changes_its_picture_unseen() -> None:
    data = saved(PICTURE.resize((16, 16)), "PNG")
    original, num_refused = pixels(data), 0
    for at in range(len(data)):
        flipped = data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]
        try:
            assert np.array_equal(pixels(flipped), original)
        except ApiError:
            num_refused += 1
    assert num_refused >= len(data) - 12  # the end mark carries no pixels


@pytest.mark.parametrize("cut", [5, 100, 4000])  # the last four bytes are a checksum
def test_a_png_whose_chunks_are_whole_and_whose_pixels_are_cut_is_refused(cut: int) -> None:
    whole = zlib.compress(ROWS)
    assert np.array_equal(pixels(png(64, 48, packed=whole)), PIXELS)
    assert refusal(png(64, 48, packed=whole[:-cut])).code == "image_decode_failed"
    assert refusal(png(64, 48)).code == "image_decode_failed"


def test_a_switch_that_would_let_truncated_files_through_stops_us() -> None:
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES"):
            pixels(ENCODED["PNG"])
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP"])
def test_what_follows_the_picture_is_ignored_and_still_in_its_id(name: str) -> None:
    for tail in (b"\0" * 100, b"<script>", ENCODED["PNG"]):
        longer = ENCODED[name] + tail
        assert np.array_equal(pixels(longer), pixels(ENCODED[name]))
        assert image_id(longer) != image_id(ENCODED[name])


@settings(max_examples=60)
@given(st.sampled_from(sorted(ENCODED)), st.integers(0, 10_000), st.binary(min_size=1, max_size=4))
def test_any_damage_is_a_picture_or_our_refusal(name: str, at: int, noise: bytes) -> None:
    data = ENCODED[name]
    at %= len(data)
    damaged = data[:at] + noise + data[at + len(noise) :]
    size = or_error(probe_image, damaged, EVERYTHING)
    found = or_error(lambda: pixels(damaged, limits=EVERYTHING))
    if isinstance(found, ApiError):
        assert found.code in IMAGE_CODES
    else:
        assert found.shape == (size[1], size[0], 3)


# ---- sizes


@pytest.mark.parametrize("size", [(50_000, 50_000), (10_000, 10_000), (9_400, 9_400), (2**31 - 1, 2**31 - 1), (1001, 1000)])
def test_a_bomb_is_refused_from_its_header(size: tuple[int, int]) -> None:
    data = png(*size)
    assert len(data) < 100
    for found in (refusal(data), _probe_refusal(data)):
        assert (found.status, found.code) == (413, "image_too_large")
        assert str(found) == "the image has more than 1000000 pixels"


def _probe_refusal(data: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        probe_image(data, LIMITS)
    return caught.value


@pytest.mark.parametrize("size", [(16_383, 16_383), (65_535, 65_535), (9_500, 9_500), (5_000, 500)])
def test_a_webp_bomb_is_refused_from_its_header(size: tuple[int, int]) -> None:
    assert refusal(webp_canvas(*size)).code == "image_too_large"


def test_an_image_of_exactly_the_pixel_limit_is_decoded() -> None:
    data = saved(Image.new("L", (1000, 1000)), "PNG")
    assert probe_image(data, LIMITS) == (1000, 1000)
    assert pixels(data).shape == (1000, 1000, 3)


def test_the_encoded_size_is_limited_before_anything_is_read() -> None:
    error = refusal(b"\x89PNG" + bytes(LIMITS.max_bytes))
    assert (error.status, str(error)) == (413, f"the image is larger than {LIMITS.max_bytes} bytes")


@pytest.mark.parametrize("size", [(1, 1), (15, 16), (16, 15), (161, 16), (16, 161), (1, 10_000), (10_000, 1)])
def test_bad_dimensions(size: tuple[int, int]) -> None:
    error = refusal(png(*size))
    assert (error.status, error.code) == (422, "image_bad_dimensions")


@pytest.mark.parametrize("size", [(0, 64), (64, 0), (0, 0)])
def test_no_side_may_be_nothing(size: tuple[int, int]) -> None:
    assert refusal(png(*size)).status == 422


@pytest.mark.parametrize("size", [(16, 16), (160, 16), (16, 160)])
def test_dimensions_exactly_at_the_limits(size: tuple[int, int]) -> None:
    assert probe_image(saved(Image.new("RGB", size), "PNG"), LIMITS) == size


def test_probing_decodes_nothing() -> None:
    header_only = png(1000, 1000)  # no pixel follows
    assert probe_image(header_only, LIMITS) == (1000, 1000)
    assert probe_image(ENCODED["JPEG"][:700], LIMITS) == (64, 48)
    assert refusal(header_only).code == "image_decode_failed"


# ---- animation


def _animated(kind: str) -> bytes:
    frames = [PICTURE, PICTURE.transpose(Image.Transpose.FLIP_TOP_BOTTOM), PICTURE.rotate(180)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=20)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animated_images_are_refused(kind: str) -> None:
    error = refusal(_animated(kind), EVERYTHING)
    assert (error.status, error.code) == (422, "animated_not_allowed")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_one_frame_is_no_animation(kind: str) -> None:
    data = saved(PICTURE, kind, save_all=True)
    assert pixels(data, limits=EVERYTHING).shape == (48, 64, 3)


def test_frames_that_are_not_there_are_an_animation_or_a_refusal() -> None:
    claims_five = png(64, 48, extra=chunk(b"acTL", struct.pack(">II", 5, 0)))
    assert refusal(claims_five).code == "animated_not_allowed"
    cut = _animated("GIF")
    assert all(refusal(cut[:end], EVERYTHING).status == 422 for end in range(20, len(cut), len(cut) // 20))


# ---- modes


def _grey16() -> bytes:
    ramp = np.linspace(0, 65535, 64 * 48).astype(">u2").reshape(48, 64)
    rows = b"".join(b"\0" + row.tobytes() for row in ramp)
    return png(64, 48, packed=zlib.compress(rows), depth=16, colour=0)


ALPHA = PICTURE.copy()
ALPHA.putalpha(Image.new("L", PICTURE.size, 90))
GREY = PICTURE.convert("L")
PALETTE = PICTURE.quantize(16)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (saved(PICTURE, "PNG"), PICTURE),
        (saved(ALPHA, "PNG"), PICTURE),
        (saved(ALPHA, "WEBP", lossless=True, exact=True), PICTURE),
        (saved(ALPHA.convert("LA"), "PNG"), GREY),
        (saved(GREY, "PNG"), GREY),
        (saved(GREY, "PNG", transparency=7), GREY),
        (saved(PICTURE, "PNG", transparency=(1, 2, 3)), PICTURE),
        (saved(PALETTE, "PNG"), PALETTE),
        (saved(PALETTE, "PNG", transparency=3), PALETTE),
        (saved(PALETTE, "PNG", transparency=bytes(range(16))), PALETTE),
        (saved(PICTURE.convert("1"), "PNG"), PICTURE.convert("1")),
    ],
    ids=["RGB", "RGBA", "RGBA WEBP", "LA", "L", "L+tRNS", "RGB+tRNS", "P", "P+tRNS", "P+tRNS bytes", "1"],
)
def test_every_mode_becomes_rgb_and_alpha_is_dropped(data: bytes, expected: Image.Image) -> None:
    """The catalogue wants alpha over the recipe's background; the recipes had none: they trained on `convert("RGB")`, which drops it."""
    assert np.array_equal(pixels(data), np.asarray(expected.convert("RGB")))


def test_cmyk_is_converted() -> None:
    found = pixels(saved(Image.new("CMYK", (64, 48), (255, 0, 0, 0)), "JPEG"))
    assert np.abs(found.astype(int) - [0, 255, 255]).max() <= 4


def test_sixteen_bit_grey_is_scaled_and_not_clipped_to_white() -> None:
    found = pixels(_grey16())
    expected = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64) >> 8
    assert np.array_equal(found[..., 0], expected)
    assert np.array_equal(found[..., 1], found[..., 2])
    assert len(np.unique(found)) == 256


def test_sixteen_bit_colour_keeps_its_high_byte() -> None:
    rows = b"".join(b"\0" + np.repeat(row.reshape(-1), 2).tobytes() for row in PIXELS)  # each byte twice: high and low
    assert np.array_equal(pixels(png(64, 48, packed=zlib.compress(rows), depth=16)), PIXELS)


def test_pixels_are_the_same_every_time_and_shared_with_nobody() -> None:
    first, second = pixels(ENCODED["JPEG"]), pixels(ENCODED["JPEG"])
    assert np.array_equal(first, second)
    assert not np.shares_memory(first, second)


# ---- EXIF and other metadata


def _turned(orientation: int, kind: str = "PNG") -> bytes:
    """A file whose pixels lie as a camera would leave them, so that turning gives PIXELS."""
    undo = {
        1: PICTURE,
        2: PICTURE.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: PICTURE.transpose(Image.Transpose.ROTATE_180),
        4: PICTURE.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: PICTURE.transpose(Image.Transpose.TRANSPOSE),
        6: PICTURE.transpose(Image.Transpose.ROTATE_90),
        7: PICTURE.transpose(Image.Transpose.TRANSVERSE),
        8: PICTURE.transpose(Image.Transpose.ROTATE_270),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    return saved(undo.get(orientation, PICTURE), kind, exif=exif.tobytes(), **options)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_turns_give_the_upright_picture(orientation: int, kind: str) -> None:
    data = _turned(orientation, kind)
    assert np.array_equal(pixels(data, exif_transpose=True), PIXELS)
    assert np.array_equal(pixels(data), PIXELS) == (orientation == 1)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_a_turn_that_does_not_exist_is_none(orientation: int) -> None:
    assert np.array_equal(pixels(_turned(orientation), exif_transpose=True), PIXELS)


def test_a_jpeg_is_turned_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(PICTURE, "JPEG", exif=exif.tobytes(), quality=95)
    upright = np.asarray(Image.fromarray(pixels(data)).transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(pixels(data, exif_transpose=True), upright)


ORIENTATION_AS_TEXT = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0six\0\0\0\0\0"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0" + b"garbage" * 5000,
        b"Exif\0\0II*\0" + b"\xff" * 5000,
        b"Exif\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        ORIENTATION_AS_TEXT,
    ],
)
def test_broken_exif_is_no_reason_to_refuse_a_picture(exif: bytes, kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(PICTURE, kind, exif=exif, **options)
    assert np.array_equal(pixels(data, exif_transpose=True), pixels(saved(PICTURE, kind, **options)))


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"iCCP", b"profile\0\0garbage"),
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(b"garbage" * 1000)),
        chunk(b"tEXt", b"Comment\0" + b"x" * 500_000),
        chunk(b"gAMA", struct.pack(">I", 1)) + chunk(b"pHYs", struct.pack(">IIB", 0, 0, 1)),
        chunk(b"prVt", b"anything"),
    ],
    ids=["broken profile", "wrong profile", "long text", "gamma", "private"],
)
def test_other_metadata_is_ignored(extra: bytes) -> None:
    assert np.array_equal(pixels(png(64, 48, packed=zlib.compress(ROWS), extra=extra)), PIXELS)


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_a_bomb_in_the_metadata_is_contained(kind: bytes) -> None:
    """The catalogue would score it or answer 413. Pillow's own limits refuse the file as broken, before memory does."""
    bomb = chunk(kind, b"name\0\0" + zlib.compress(bytes(20 << 20)))
    assert refusal(png(64, 48, packed=zlib.compress(ROWS), extra=bomb)).status == 422


# ---- structure: what a small file may make a decoder do


def segment(code: int, data: bytes) -> bytes:
    return bytes([0xFF, code]) + struct.pack(">H", len(data) + 2) + data


def in_jpeg(extra: bytes, at: int = 2) -> bytes:
    return ENCODED["JPEG"][:at] + extra + ENCODED["JPEG"][at:]


def in_png(extra: bytes) -> bytes:
    return png(64, 48, packed=zlib.compress(ROWS), extra=extra)


def in_webp(extra: bytes) -> bytes:
    data = ENCODED["WEBP"]
    canvas = b"VP8X" + struct.pack("<II", 10, 0) + (63).to_bytes(3, "little") + (47).to_bytes(3, "little")
    body = b"WEBP" + canvas + data[12:] + extra
    return b"RIFF" + struct.pack("<I", len(body)) + body


def with_scans(count: int, between: bytes = b"") -> bytes:
    """A progressive JPEG of so many scans: the last one again and again, its tables before it."""
    data = ENCODED["JPEG progressive"]
    last = data.rindex(b"\xff\xc4")
    return data[:-2] + (between + data[last:-2]) * (count - data.count(b"\xff\xda")) + data[-2:]


PROFILE = chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(1000)))
SCAN_HEADER = b"\xff\xda\0\x08\1\1\0\0\x3f\0"
TOO_COMPLEX = {
    "scans": with_scans(65),
    "scans by the thousand": with_scans(800),
    "scans that a shorter reading would hide": with_scans(11, between=b"\xff\x02\xff\xff" + SCAN_HEADER * 60),
    "scans before the end of a first picture": with_scans(65) + ENCODED["JPEG"],
    "segments": in_jpeg(segment(0xFE, b"") * 10_000),
    "ends before any scan": in_jpeg(b"\xff\xd9" * 10_000),
    "starts": in_jpeg(b"\xff\xd8" * 10_000),
    "fill bytes": in_jpeg(b"\xff" * 140_000),
    "restart marks": in_jpeg(b"\xff\xd0" * 70_000),
    "quantization tables": in_jpeg(segment(0xDB, (b"\0" + b"\1" * 64) * 700) * 3),
    "unknown segments, gone through byte by byte": in_jpeg(segment(0xF0, bytes(60_000)) * 3),
    "no scan and no end": ENCODED["JPEG"][: ENCODED["JPEG"].index(b"\xff\xda")] + bytes(140_000),
    "text chunks": in_png(chunk(b"tEXt", b"a\0b") * 10_000),
    "unknown chunks": in_png(chunk(b"prVt", b"") * 10_000),
    "empty pixel chunks": in_png(chunk(b"IDAT", b"") * 10_000),
    "colour profiles": in_png(PROFILE * 2),
    "WEBP chunks": in_webp((b"prVt" + bytes(4)) * 10_000),
}


@pytest.mark.parametrize("name", TOO_COMPLEX)
def test_a_picture_of_too_many_parts_is_refused_before_anything_opens_it(name: str) -> None:
    """In 10 MB there is room for 338,000 scans of 31 bytes, each a pass over 16 million pixels: an hour of one thread."""
    data = TOO_COMPLEX[name]
    opened_by_none = replace(LIMITS, formats=("BMP",))  # whoever comes to open it says that the format is not allowed
    for found in (refusal(data), _probe_refusal(data), refusal(data, opened_by_none)):
        assert (found.status, found.code, found.field) == (422, "image_too_complex", "image")
    assert len(data) < LIMITS.max_bytes


@pytest.mark.parametrize("name", ["scans", "fill bytes", "restart marks", "text chunks", "unknown chunks", "WEBP chunks"])
def test_pillow_alone_would_take_them(name: str) -> None:
    """So it is the limit that refuses them, and nothing else would."""
    with Image.open(io.BytesIO(TOO_COMPLEX[name])) as image:
        image.load()
        assert image.size == (64, 48)


AT_THE_LIMIT = {
    "64 scans": with_scans(64),
    "scans after the end": ENCODED["JPEG"] + SCAN_HEADER * 100,
    "scans in a comment": in_jpeg(segment(0xFE, SCAN_HEADER * 100)),
    "scans in a comment between scans": with_scans(11, between=segment(0xFE, SCAN_HEADER * 100)),
    "scans in a thumbnail": in_jpeg(segment(0xE1, b"Exif\0\0" + SCAN_HEADER * 100 + b"\xff\xd9")),
    "600 kB of metadata": in_jpeg(segment(0xE1, b"Exif\0\0" + bytes(60_000)) * 10),
    "Photoshop blocks": in_jpeg(segment(0xED, b"Photoshop 3.0\0" + (b"8BIM" + bytes(8)) * 5000) * 8),
    "9,900 comments": in_jpeg(segment(0xFE, b"") * 9_900),
    "100 kB of fill bytes": in_jpeg(b"\xff" * 100_000),
    "10,000 PNG chunks": in_png(chunk(b"prVt", b"") * 9_997),
    "one colour profile": in_png(PROFILE),
    "10,000 WEBP chunks": in_webp((b"prVt" + bytes(4)) * 9_998),
    "chunks after the end of a PNG": ENCODED["PNG"] + chunk(b"prVt", b"") * 20_000,
    "chunks after the end of a WEBP": ENCODED["WEBP"] + (b"prVt" + bytes(4)) * 20_000,
}


@pytest.mark.parametrize("name", AT_THE_LIMIT)
def test_a_picture_up_to_the_limits_is_the_picture(name: str) -> None:
    decoded = decode_image(AT_THE_LIMIT[name], LIMITS, exif_transpose=True)
    assert np.array_equal(decoded.pixels, turned_by_pillow(AT_THE_LIMIT[name]))
    assert decoded.image_id == image_id(AT_THE_LIMIT[name])


def exif_of(entries: list[tuple[int, int, int, bytes]], order: str = ">", claimed: int | None = None) -> bytes:
    """EXIF by hand: (tag, kind, number, four bytes of value or offset)."""
    head = (b"MM\0*" if order == ">" else b"II*\0") + struct.pack(order + "IH", 8, len(entries) if claimed is None else claimed)
    return head + b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries) + bytes(4)


UPSIDE_DOWN = (0x112, 3, 1, b"\0\3\0\0")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_of_any_length_costs_a_few_tags_and_no_warning(kind: str) -> None:
    """Pillow reads all 65,535 and warns of each; warnings are errors here. The turn is found among the first 512."""
    broken = [(1 + number % 250, 5, 1, b"\xff\xff\xff\xff") for number in range(5000)]
    for entries, turned in (([UPSIDE_DOWN, *broken], True), ([*broken, UPSIDE_DOWN], False)):
        for claimed in (len(entries), 65_535):
            exif = b"Exif\0\0" + exif_of(entries, claimed=claimed)
            data = saved(PICTURE, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
            expected = pixels(data)[::-1, ::-1] if turned else pixels(data)
            assert np.array_equal(pixels(data, exif_transpose=True), expected)


entries = st.tuples(
    st.sampled_from([0x10F, 0x112, 0x112, 0x128]), st.sampled_from([1, 2, 3, 3, 4, 8, 9]), st.just(1), st.binary(min_size=4, max_size=4)
)
small = st.tuples(st.just(0x112), st.sampled_from([3, 4]), st.just(1), st.sampled_from([b"\0\6\0\0", b"\0\0\0\6", b"\6\0\0\0"]))


@settings(max_examples=150)
@given(st.lists(entries | small, max_size=4), st.sampled_from("<>"), st.sampled_from(["PNG", "JPEG", "WEBP"]), st.booleans())
def test_our_reading_of_the_turn_is_pillows(found: list[tuple[int, int, int, bytes]], order: str, kind: str, twice: bool) -> None:
    exif = b"Exif\0\0" * (1 + (twice and kind != "PNG")) + exif_of(found, order)
    data = saved(PICTURE, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(pixels(data, exif_transpose=True), turned_by_pillow(data))


def turned_by_pillow(data: bytes) -> NDArray[np.uint8]:
    """What Pillow makes of the same bytes; the turn alone, as it would write the other tags anew and stumble over broken ones."""
    with Image.open(io.BytesIO(data)) as image:
        upright = Image.fromarray(np.asarray(image.convert("RGB")))
        upright.getexif()[0x112] = image.getexif().get(0x112, 1)
    return np.asarray(ImageOps.exif_transpose(upright))


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'
RAW = "\nexif\n      40\n" + (b"Exif\0\0" + exif_of([UPSIDE_DOWN])).hex()


def _png_text(key: str, text: str) -> bytes:
    info = PngInfo()
    info.add_itxt(key, text) if key.startswith("XML") else info.add_text(key, text, zip=True)
    return saved(PICTURE, "PNG", pnginfo=info)


@pytest.mark.parametrize(
    "data",
    [
        saved(PICTURE, "JPEG", xmp=XMP),
        saved(PICTURE, "WEBP", lossless=True, xmp=XMP),
        _png_text("XML:com.adobe.xmp", XMP.decode()),
        _png_text("Raw profile type exif", RAW),
    ],
    ids=["JPEG", "WEBP", "PNG", "ImageMagick's PNG"],
)
def test_a_turn_outside_exif_is_found_where_pillow_finds_it(data: bytes) -> None:
    assert np.array_equal(pixels(data, exif_transpose=True), pixels(data)[::-1, ::-1])
    assert np.array_equal(pixels(data, exif_transpose=True), turned_by_pillow(data))


def test_a_raw_profile_that_is_no_hexadecimal_is_no_turn() -> None:
    assert np.array_equal(pixels(_png_text("Raw profile type exif", "\nexif\n4\nzzzz"), exif_transpose=True), PIXELS)


def test_a_picture_with_a_gain_map_is_one_picture() -> None:
    several = saved(PICTURE, "MPO", save_all=True, append_images=[PICTURE])
    gain_map = several[:2] + segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x hdrgm:Version="1.0"/>') + several[2:]
    assert isinstance(refusal(several), ImageFormatNotAllowed)
    assert pixels(gain_map).shape == (48, 64, 3)


# ---- limits that the encoder cannot keep


class ThinEncoder(FakeEncoder):
    """Refuses what is slimmer than 50:1 after its long side became 448, as a recipe would."""

    def image_tokens(self, width: int, height: int) -> int:
        short, long = sorted(shrunk_size(width, height, 448))
        if long > 50 * short:
            raise ImageRejected("the image is too long and thin for the model", code="image_bad_dimensions")
        return super().image_tokens(width, height)


def or_start_refused(limits: ImageLimits, encoder: GroupEncoder) -> SettingsInvalid | None:
    try:
        check_limits(limits, encoder)
    except SettingsInvalid as error:
        return error
    return None


@pytest.mark.parametrize(
    ("encoder", "min_side", "max_aspect", "fits"),
    [
        (FakeEncoder(), 16, 100, True),
        (ThinEncoder(), 16, 10, True),
        (ThinEncoder(), 16, 49, True),
        (ThinEncoder(), 16, 55, False),
        (ThinEncoder(), 1, 60, False),
        (ThinEncoder(), 16, 1, True),
        (ThinEncoder(takes_images=False), 16, 200, True),
    ],
)
def test_limits_that_let_in_what_the_encoder_refuses_stop_the_start(
    encoder: GroupEncoder, min_side: int, max_aspect: float, fits: bool
) -> None:
    limits = replace(LIMITS, min_side=min_side, max_aspect=max_aspect)
    found = or_start_refused(limits, encoder)
    said = rf"min_image_side {min_side} and max_image_aspect {max_aspect} allow a picture of \d+ x \d+, but .* too long and thin .*"
    assert found is None if fits else re.fullmatch(said, str(found))


def test_the_default_limits_suit_the_real_encoder(encoder: Encoder) -> None:
    check_limits(replace(LIMITS, max_pixels=16_000_000, max_aspect=100), encoder)


def test_the_start_is_refused_while_cut_files_would_pass() -> None:
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        with pytest.raises(SettingsInvalid, match="LOAD_TRUNCATED_IMAGES"):
            check_limits(LIMITS, FakeEncoder())
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


# ---- shrinking


@settings(max_examples=200)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(28, 1000))
def test_the_size_without_pixels_is_the_size_with_pixels(width: int, height: int, long_edge: int) -> None:
    height = max(1, min(height, 100_000 // width))  # many shapes, few pixels
    image = shrink(np.zeros((height, width, 3), np.uint8), long_edge, "bilinear")
    assert shrunk_size(width, height, long_edge) == image.size
    assert max(image.size) == min(long_edge, max(width, height))


@pytest.mark.parametrize("size", [(448, 448), (448, 1), (10, 20), (4000, 3)])
def test_without_a_long_edge_or_below_it_nothing_changes(size: tuple[int, int]) -> None:
    image = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(shrink(image, None, "lanczos")), image)
    assert shrunk_size(*size, None) == size
    assert size[0] > 448 or np.array_equal(np.asarray(shrink(image, 448, "lanczos")), image)


@pytest.mark.parametrize("resample", ["lanczos", "bicubic", "bilinear"])
def test_shrinking_is_pillows_thumbnail(resample: str) -> None:
    expected = PICTURE.copy()
    expected.thumbnail((28, 28), Image.Resampling[resample.upper()])
    assert np.array_equal(np.asarray(shrink(PIXELS, 28, resample)), np.asarray(expected))


def test_an_id_is_the_digest_of_the_encoded_bytes() -> None:
    assert image_id(b"") == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    flat, tall = Image.new("RGB", (30, 100)), Image.new("RGB", (100, 30))
    assert image_id(saved(flat, "PNG")) != image_id(saved(tall, "PNG"))


# ---- what a refusal says: whoever sent the picture can mend it by this alone

URL_TEXT = "no image is fetched from this address; send base64, a base64 data: URL, or a sha256: id"
FIELD_TEXTS = {
    BASE64[:-1]: "image is not standard base64 with padding",
    "https://example.org/a.png": URL_TEXT,
    "HTTP://example.org/a.png": URL_TEXT,
    "data:text/plain;base64," + BASE64: "a data: URL must begin with data:image/<type>;base64,",
    ID[:-1]: "an image id is sha256: and 64 lower-case hexadecimal digits",
    "file:///etc/passwd": "send base64, a base64 data: URL, or a sha256: id",
    base64.b64encode(bytes(LIMITS.max_bytes + 4)).decode(): "the image is larger than 1048576 bytes",
}


@pytest.mark.parametrize("text", FIELD_TEXTS, ids=lambda text: text[:30])
def test_what_a_refused_field_is_told(text: str) -> None:
    found = or_error(read_image_field, text, LIMITS)
    assert isinstance(found, ApiError)
    assert found.message == FIELD_TEXTS[text]


@pytest.mark.parametrize("num_bytes", [LIMITS.max_bytes - 1, LIMITS.max_bytes])
def test_a_field_of_exactly_the_limit_is_read(num_bytes: int) -> None:
    assert read_image_field(base64.b64encode(bytes(num_bytes)).decode(), LIMITS) == bytes(num_bytes)


PICTURE_TEXTS = {
    "bytes": (bytes(LIMITS.max_bytes + 1), "the image is larger than 1048576 bytes"),
    "pixels": (png(1001, 1000), "the image has more than 1000000 pixels"),
    "side": (png(15, 16), "sides must be at least 16 pixels and at most 10:1"),
    "animation": (_animated("PNG"), "animated images are not scored; send one frame"),
    "nothing known": (b"no picture at all", "the image could not be read"),
    "scans": (with_scans(65), "the image has more than 64 scans"),
    "header": (in_jpeg(b"\xff" * 140_000), "the image has more than 131072 bytes before its first scan"),
    "parts": (in_png(chunk(b"prVt", b"") * 10_000), "the image has more than 10000 parts"),
    "profiles": (in_png(PROFILE * 2), "the image has more than one colour profile"),
}


@pytest.mark.parametrize("name", PICTURE_TEXTS)
def test_what_a_refused_picture_is_told(name: str) -> None:
    data, text = PICTURE_TEXTS[name]
    assert refusal(data).message == text


def test_a_file_of_exactly_the_limit_is_decoded() -> None:
    data = ENCODED["PNG"]
    assert np.array_equal(pixels(data, limits=replace(LIMITS, max_bytes=len(data))), PIXELS)
    assert refusal(data, replace(LIMITS, max_bytes=len(data) - 1)).code == "image_too_large"


def test_a_turn_in_the_xmp_of_a_png_is_found() -> None:
    for space, turned in (("XML:com.adobe.xmp", True), ("xml:com.adobe.xmp", False), ("Comment", False)):
        text = PngInfo()
        text.add_itxt(space, '<x tiff:Orientation="6"/>\ud7ff')
        shape = pixels(saved(PICTURE, "PNG", pnginfo=text), exif_transpose=True).shape
        assert shape == ((64, 48, 3) if turned else (48, 64, 3)), space


def test_several_pictures_are_told_by_their_number() -> None:
    """An index that claims one picture is no index of several."""
    index = struct.pack(">2sHIHHHII", b"MM", 42, 8, 1, 0xB001, 4, 1, 1)
    assert np.array_equal(pixels(in_jpeg(segment(0xE2, b"MPF\0" + index))), pixels(ENCODED["JPEG"]))


def test_a_png_says_its_turn_in_xmp_too() -> None:
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>')
    data = saved(PICTURE, "PNG", pnginfo=info)
    assert np.array_equal(pixels(data, exif_transpose=True), np.rot90(PIXELS, -1))
    assert np.array_equal(pixels(data), PIXELS)


def test_alpha_is_dropped_or_laid_on_white() -> None:
    alpha = np.random.default_rng(1).integers(0, 256, (48, 64, 1), dtype=np.uint8)
    data = saved(Image.fromarray(np.concatenate([PIXELS, alpha], axis=2)), "PNG")
    assert np.array_equal(pixels(data), PIXELS)
    share = alpha.astype(float) / 255
    expected = np.round(PIXELS * share + 255 * (1 - share))
    found = decode_image(data, LIMITS, exif_transpose=False, alpha="white").pixels
    assert np.abs(found - expected).max() <= 1
    assert np.array_equal(decode_image(saved(PICTURE, "PNG"), LIMITS, exif_transpose=False, alpha="white").pixels, PIXELS)


def test_limits_are_those_of_the_settings() -> None:
    found = image_limits(
        Settings(max_image_bytes=4711, max_image_pixels=5000, min_image_side=17, max_image_aspect=3.5, image_formats="png")
    )
    assert found == ImageLimits(max_bytes=4711, max_pixels=5000, min_side=17, max_aspect=3.5, formats=("PNG",))
