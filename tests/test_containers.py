"""A picture whose end was cut off and closed again is refused, whatever the coding; a whole one never is."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from app.containers import check_scans, is_whole_png, plain, tag, with_filled_scans
from app.errors import ImageRejected
from app.images import ImageLimits, decode_image
from tests.test_images import chunk, png

LIMITS = ImageLimits(max_bytes=1 << 20, max_pixels=1 << 20, min_side=2, max_aspect=100.0, formats=("JPEG", "PNG"))
END = b"\xff\xd9"
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def picture(width: int, height: int, mode: str) -> Image.Image:
    """Soft, as photographs are."""
    coarse = np.random.default_rng(width + height).integers(0, 256, (max(1, height // 4), max(1, width // 4), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def jpeg(size: tuple[int, int], mode: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture(*size, mode).save(stream, "JPEG", **options)
    return stream.getvalue()


def decoded(data: bytes) -> np.ndarray[Any, Any] | None:
    """The pixels, or None if the picture is refused as truncated."""
    try:
        return decode_image(data, LIMITS, exif_transpose=False).pixels
    except ImageRejected:
        return None


def as_pillow_fills_it(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


MODES, SIZES, QUALITIES = ("RGB", "L", "CMYK"), ((64, 48), (63, 47), (8, 8), (17, 129), (200, 9)), (5, 50, 95)
RESTARTS: tuple[dict[str, Any], ...] = ({}, {"restart_marker_blocks": 1}, {"restart_marker_blocks": 3}, {"restart_marker_rows": 1})
CODINGS = [
    {"progressive": progressive, "optimize": optimized, "subsampling": subsampling, **restart}
    for progressive, optimized, subsampling, restart in itertools.product((False, True), (False, True), (0, 1, 2), RESTARTS)
]


@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_a_jpeg_is_whole_or_refused(coding: dict[str, Any]) -> None:
    """Cut at twelve places of its last scan, at a byte or within a marker, and closed by an end mark."""
    for mode, size, quality in itertools.product(MODES, SIZES, QUALITIES):
        whole = jpeg(size, mode, quality=quality, **coding)
        expected = decoded(whole)
        assert expected is not None, (mode, size, quality)
        scan = whole.rindex(b"\xff\xda") + 14
        for at in np.linspace(scan, len(whole) - len(END), 12, endpoint=False, dtype=int):
            found = decoded(whole[:at] + END)
            assert found is None or np.array_equal(found, expected), (mode, size, quality, at)


@settings(max_examples=200)
@given(st.sampled_from(CODINGS), st.integers(0, 4000))
def test_a_jpeg_cut_anywhere_is_refused(coding: dict[str, Any], at: int) -> None:
    whole = jpeg((64, 48), "RGB", quality=75, **coding)
    at %= len(whole) - len(END)
    found = decoded(whole[:at] + END)
    # A progressive picture that ends with one of its scans is whole, if blurred.
    starts = [at for at in range(len(whole)) if whole.startswith(b"\xff\xda", at)][1:] if coding["progressive"] else []
    ends = [whole, *(whole[:start] + END for start in starts)]
    assert found is None or any(np.array_equal(found, as_pillow_fills_it(each)) for each in ends)


@pytest.mark.parametrize("percent", [10, 30, 50, 70, 90, 99])
@pytest.mark.parametrize("progressive", [False, True])
def test_what_pillow_fills_with_grey_is_refused(percent: int, progressive: bool) -> None:
    """The defect is there to be found: Pillow decodes the same bytes without a word."""
    whole = jpeg((448, 336), "RGB", quality=85, progressive=progressive)
    scan = whole.rindex(b"\xff\xda") + 14
    cut = whole[: scan + (len(whole) - scan) * percent // 100] + END
    assert not np.array_equal(as_pillow_fills_it(cut), as_pillow_fills_it(whole))
    assert decoded(cut) is None


@pytest.mark.parametrize("number", range(1, 12))
def test_a_jpeg_cut_where_a_restart_would_follow_is_refused(number: int) -> None:
    """All blocks up to there are whole; nothing but the count of restarts is wrong."""
    whole = jpeg((64, 48), "RGB", quality=75, subsampling=0, restart_marker_blocks=4)
    places = [at for at in range(len(whole) - 1) if whole[at] == 0xFF and 0xD0 <= whole[at + 1] <= 0xD7]
    assert len(places) == 11
    assert decoded(whole[: places[-number]] + END) is None
    assert decoded(whole[: places[-number] + 2] + END) is None


def test_a_jpeg_without_one_of_its_components_is_refused() -> None:
    """A scan for each component is legal, and so is an end after the first of them; what is missing would be grey."""
    whole = jpeg((64, 48), "RGB", quality=75, progressive=True)
    starts = [at for at in range(len(whole)) if whole.startswith(b"\xff\xda", at)]
    assert whole[starts[0] + 4] == 3  # the first scan is of all three
    alone = whole[: starts[0] + 4] + b"\x01\x01\x00\x00\x00\x01" + whole[starts[0] + 14 : starts[1]]
    alone = alone.replace(b"\xff\xda\x00\x0c\x01", b"\xff\xda\x00\x08\x01")
    assert decoded(alone + END) is None


def test_components_of_one_name_are_refused() -> None:
    whole = bytearray(jpeg((64, 48), "RGB", quality=75))
    frame = whole.index(b"\xff\xc0")
    assert bytes(whole[frame + 10 : frame + 19 : 3]) == b"\1\2\3"
    whole[frame + 10 : frame + 19 : 3] = b"\1\1\1"
    with pytest.raises(ImageRejected):
        check_scans(bytes(whole))
    assert decoded(bytes(whole)) is None


def test_an_arithmetic_jpeg_is_refused() -> None:
    whole = jpeg((64, 48), "RGB")
    arithmetic = whole.replace(b"\xff\xc0", b"\xff\xc9")
    with pytest.raises(ImageRejected):
        decode_image(arithmetic, LIMITS, exif_transpose=False)
    with pytest.raises(ImageRejected, match=r"^arithmetic-coded JPEGs are not scored: nothing tells whether they are whole$"):
        check_scans(arithmetic)


def test_marks_before_the_end_and_pictures_behind_it_do_no_harm() -> None:
    whole = jpeg((64, 48), "RGB")
    for same in (
        whole[:-2] + b"\xff\xff\xff" + END,
        whole + whole,
        whole + b"\xff\xda\xff",
        whole + b"\xff\xc9\xff\xda",
        whole[:-2] + b"\xff\xfe\0\x04ab" + END,
    ):
        assert np.array_equal(decoded(same), decoded(whole))


def test_filling_is_linear() -> None:
    """Sixty-four scans of restarts and nothing else: each byte is copied, none looked at in Python."""
    whole = jpeg((64, 48), "RGB")
    start = whole.index(b"\xff\xda")
    scan = whole[start : start + 14] + b"\xff\xd0\xff\xd7" * 4000
    (filled,) = with_filled_scans(whole[:start] + scan * 64 + END)
    assert 0 < len(filled) - len(whole[:start] + scan * 64 + END) <= 64 * 700
    (filled,) = with_filled_scans(whole + b"\xff\xd9\xff\xda" * 10_000)  # what follows the end is nobody's business
    assert len(filled) - len(whole) - 40_000 <= 700


def lines(pixels: np.ndarray[Any, Any], depth: int) -> bytes:
    """Rows of [rows, columns, channels] as a PNG packs them, unfiltered."""
    if depth == 16:
        return b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    bits = np.unpackbits(pixels.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
    return b"".join(b"\0" + np.packbits(row.reshape(-1)).tobytes() for row in bits)


def interlaced(pixels: np.ndarray[Any, Any], depth: int) -> bytes:
    passes = (pixels[top::down, left::across] for left, top, across, down in ADAM7)
    return b"".join(lines(each, depth) for each in passes if each.size)


PALETTE = chunk(b"PLTE", bytes(range(256)) * 3)
KINDS = [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16), (3, 1), (3, 2), (3, 4), (3, 8), (4, 8), (4, 16), (6, 8), (6, 16)]


@pytest.mark.parametrize("interlace", [False, True])
@pytest.mark.parametrize(("colour", "depth"), KINDS)
@pytest.mark.parametrize("size", [(64, 48), (33, 17), (5, 3), (2, 9), (4, 4)])
def test_a_png_is_whole_or_refused(size: tuple[int, int], colour: int, depth: int, interlace: bool) -> None:
    """Every coding the specification has, each without its last byte, its last line, half of its lines, and all of them."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 1 << depth, (height, width, channels))
    unpacked = interlaced(pixels, depth) if interlace else lines(pixels, depth)

    def encoded(rows: bytes) -> bytes:
        data = png(width, height, packed=zlib.compress(rows), depth=depth, colour=colour, extra=PALETTE if colour == 3 else b"")
        header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
        return data.replace(data[8:33], chunk(b"IHDR", header))

    assert is_whole_png(encoded(unpacked))
    assert decoded(encoded(unpacked)) is not None
    assert decoded(encoded(unpacked + b"more")) is not None
    line = 1 + (width * channels * depth + 7) // 8
    assert not is_whole_png(encoded(unpacked[:-1]))
    for kept in (len(unpacked) - 1, len(unpacked) - line, len(unpacked) // 2, 1, 0):
        assert decoded(encoded(unpacked[:kept])) is None, kept


def test_a_png_in_many_chunks_is_whole() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3))
    packed = zlib.compress(lines(pixels, 8))
    header = png(300, 200).partition(b"\0\0\0\x08IDAT")[0]
    pieces = b"".join(chunk(b"IDAT", packed[at : at + 1000]) for at in range(0, len(packed), 1000))
    found = decoded(header + chunk(b"IDAT", b"") + pieces + chunk(b"IEND", b""))
    assert np.array_equal(found, pixels)


def test_whole_rows_that_are_missing_would_be_black() -> None:
    """The defect is there to be found."""
    rows = lines(np.full((48, 64, 3), 200), 8)
    cut = png(64, 48, packed=zlib.compress(rows[: len(rows) // 2]))
    assert (as_pillow_fills_it(cut)[24:] == 0).all()
    assert decoded(cut) is None


def test_a_png_has_one_header_and_it_comes_first() -> None:
    """A decoder takes the last one, wherever it stands: one that says 64 x 64 to it could say anything to others."""
    data = png(64, 48, packed=zlib.compress(lines(np.zeros((48, 64, 3)), 8)))
    header, rest = data[8:33], data[33:]
    assert decoded(data) is not None
    with pytest.raises(ImageRejected, match=r"^the image could not be read$"):
        plain(data[:8] + header + data[8:])
    huge = chunk(b"IHDR", struct.pack(">IIBBBBB", 1 << 30, 1 << 30, 8, 2, 0, 0, 0))
    tiny = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, 2, 0, 0, 0))
    private = chunk(b"prIv", struct.pack(">IIBBBBB", 1 << 30, 1 << 30, 8, 2, 0, 0, 0))
    for odd in (huge + header, tiny + header, header + tiny, private + header, header + rest[:0] + huge, b"", chunk(b"IHDR", header[8:20])):
        with pytest.raises(ImageRejected):
            decode_image(data[:8] + odd + rest, LIMITS, exif_transpose=False)


def test_nothing_is_unpacked_behind_the_last_row() -> None:
    """However much there is: what follows here could not even be unpacked."""
    packer = zlib.compressobj()
    rows = packer.compress(lines(np.zeros((48, 64, 3)), 8) + bytes(1 << 20)) + packer.flush(zlib.Z_SYNC_FLUSH)
    assert is_whole_png(png(64, 48, packed=rows + b"\x07" + b"\xff" * 200_000))
    with pytest.raises(zlib.error):
        is_whole_png(png(640, 1049, packed=rows + b"\x07" + b"\xff" * 200_000))
    with pytest.raises(ImageRejected, match="truncated or corrupt"):
        decode_image(png(640, 1049, packed=rows + b"\x07" + b"\xff" * 200_000), LIMITS, exif_transpose=False)


def test_junk_behind_a_short_stream_is_not_gathered() -> None:
    """Each further piece of it would be copied with all before it."""
    short = zlib.compress(lines(np.zeros((24, 64, 3)), 8))
    data = png(64, 48, packed=short)
    junk = chunk(b"IDAT", b"x" * 1000) * 900
    assert not is_whole_png(data[:-12] + junk + data[-12:])


def test_rows_that_end_without_the_end_of_their_stream_are_not_whole() -> None:
    packer = zlib.compressobj()
    half = packer.compress(lines(np.zeros((24, 64, 3)), 8)) + packer.flush(zlib.Z_SYNC_FLUSH)
    assert not is_whole_png(png(64, 48, packed=half))
    assert is_whole_png(png(64, 24, packed=half))


@pytest.mark.parametrize("size", [0x7FFFFFFF, 0x80000000, 0xFFFFFFF4, 0xFFFFFFFF])
def test_a_chunk_that_claims_gigabytes_is_the_last(size: int) -> None:
    data = png(64, 48)
    long = data[:33] + struct.pack(">I4s", size, b"prIv") + data[33:]
    assert plain(long).data == long
    assert decoded(long) is None


def tiff(order: str, entries: list[tuple[int, int, int, bytes]], *, start: int = 8, count: int | None = None, tail: bytes = b"") -> bytes:
    """A header, something before the tags, the tags, and what follows."""
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
    written = b"".join(struct.pack(order + "HHI4s", *entry) for entry in entries)
    number = len(entries) if count is None else count
    return mark + struct.pack(order + "I", start) + b"\xaa" * (start - 8) + struct.pack(order + "H", number) + written + tail


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("start", [8, 9, 20, 0x8000])
def test_a_tag_is_read_where_it_stands_and_nowhere_else(order: str, start: int) -> None:
    def short(name: int, value: int, number: int = 1) -> tuple[int, int, int, bytes]:
        return name, 3, number, struct.pack(order + "HH", value, 0)

    entries = [short(256, 640), short(274, 6), short(305, 3)]
    assert tag(tiff(order, entries, start=start), 274) == 6
    assert tag(tiff(order, entries, start=start), 305) == 3
    assert tag(tiff(order, entries, start=start), 306) is None
    assert tag(tiff(order, entries, start=start, count=1), 274) is None  # what follows the last tag is none
    assert tag(tiff(order, entries, start=start, count=60_000, tail=b"x" * 11), 305) == 3
    assert tag(tiff(order, entries, start=start, count=4, tail=struct.pack(order + "HHI", 306, 3, 1) + b"\0\0\0"), 306) is None
    assert tag(tiff(order, [short(274, 6, number=2)], start=start), 274) is None
    assert tag(tiff(order, [(274, 4, 1, struct.pack(order + "I", 8))], start=start), 274) == 8
    assert tag(tiff(order, [(274, 2, 1, b"6\0\0\0")], start=start), 274) is None


def test_of_many_tags_few_are_read() -> None:
    entries = [(1, 3, 1, b"\1\0\0\0")] * 512 + [(274, 3, 1, b"\6\0\0\0")]
    assert tag(tiff("<", entries), 274) is None
    assert tag(tiff("<", entries[1:]), 274) == 6


@pytest.mark.parametrize(
    "data",
    [b"", b"II", b"II*\0", b"II*\0\x08\0\0", b"XX*\0" + bytes(40), b"II+\0\x08\0\0\0" + bytes(40), b"II*\0\xff\xff\xff\xff" + bytes(9)],
)
def test_what_is_no_header_has_no_tags(data: bytes) -> None:
    assert tag(data, 274) is None
