"""What data sets call a picture, and when two of them are the same."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.client.columns import same, source_of
from app.client.pictures import read_picture
from tests.fakes import picture

CARTOON, OTHER = picture(64, 48, seed=0), picture(64, 48, seed=1)
ID = "sha256:" + "0" * 64


def opened(data: bytes = CARTOON) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize(
    ("value", "source"),
    [
        (None, None),
        ([], None),
        ([None], None),
        ("cartoons/1.png", "cartoons/1.png"),
        (Path("cartoons/1.png"), Path("cartoons/1.png")),
        (ID, ID),
        (CARTOON, CARTOON),
        (bytearray(CARTOON), CARTOON),
        (memoryview(CARTOON), CARTOON),
        ({"bytes": CARTOON, "path": "1.png"}, CARTOON),
        ({"bytes": None, "path": "1.png"}, "1.png"),
        ({"path": "1.png"}, "1.png"),
        (["1.png"], "1.png"),
        ([{"bytes": CARTOON, "path": None}], CARTOON),
        ("data:image/png;base64," + base64.b64encode(CARTOON).decode(), CARTOON),
        ({"bytes": None, "path": "data:image/png;base64," + base64.b64encode(CARTOON).decode()}, CARTOON),
    ],
)
def test_every_form_becomes_what_a_client_takes(value: Any, source: Any) -> None:
    assert source_of(value) == source


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (["1.png", "2.png"], "2"),
        ("http://cartoons/1.png", "not fetched"),
        ("https://cartoons/1.png", "not fetched"),
        ({"bytes": None, "path": None}, "bytes"),
        ({}, "bytes"),
        ("data:image/png,raw", "base64"),
        ("data:image/png;base64", "base64"),
        ("data:image/png;base64,!!!", "base64"),
    ],
)
def test_what_says_no_picture_is_refused(value: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        source_of(value)


def test_pictures_that_were_decoded_twice_are_the_same() -> None:
    assert same(opened()) == same(opened()) != same(opened(OTHER))
    assert same(opened().convert("L")) == same(opened().convert("L"))
    assert same(CARTOON) == same(bytes(bytearray(CARTOON))) != same(OTHER)


def test_pictures_that_only_look_the_same_to_a_hash_are_not() -> None:
    """Equal indices into other palettes, equal bytes of another shape or meaning."""
    red, blue = Image.new("P", (4, 4), 0), Image.new("P", (4, 4), 0)
    red.putpalette([255, 0, 0])
    blue.putpalette([0, 0, 255])
    assert same(red) != same(blue)
    assert same(Image.new("RGB", (2, 4))) != same(Image.new("RGB", (4, 2)))
    clear = Image.new("L", (4, 4))
    clear.info["transparency"] = 0
    assert same(Image.new("L", (4, 4))) != same(clear)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_what_is_the_same_is_sent_the_same(mode: str) -> None:
    one, two = (Image.new(mode, (8, 8), 0) for _ in range(2))
    if same(one) == same(two):
        assert read_picture(one) == read_picture(two)
    assert same(one) == same(one)
