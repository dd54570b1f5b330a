"""Requests that nobody honest sends, whole on the wire. Each gets a clear 4xx and leaves nothing behind."""

from __future__ import annotations

import base64
import json
import random

from tests.load.truth import draw
from tests.load.wire import post

_GOOD = draw(1).data


def hostile_requests() -> dict[str, bytes]:
    """By what is wrong with them."""
    image = base64.b64encode(_GOOD).decode()
    bodies = {
        "no json": b"{",
        "nan": b'{"captions": [NaN], "image": 1}',
        "duplicate key": b'{"captions": ["a"], "captions": ["b"]}',
        "deep": b"[" * 40_000 + b"]" * 40_000,
        "many values": b'{"captions": [' + b"[]," * 100_000 + b"[]]}",
        "lone surrogate": b'{"image": "x", "captions": ["\\ud800"]}',
        "not utf-8": b'{"captions": ["\xff"]}',
        "unknown field": json.dumps({"image": image, "captions": ["a"], "modle": "x"}).encode(),
        "no captions": json.dumps({"image": image, "captions": []}).encode(),
        "number for text": json.dumps({"image": image, "captions": [1]}).encode(),
        "too many captions": json.dumps({"image": image, "captions": ["a"] * 5000}).encode(),
    }
    made = {name: post("/score", "application/json", body, f"hostile-{index}") for index, (name, body) in enumerate(bodies.items())}
    made["multipart without end"] = post("/score", "multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data", "hostile-m")
    made["no boundary"] = post("/score", "multipart/form-data", b"--x--", "hostile-b")
    made["other type"] = post("/score", "text/plain", b"hello", "hostile-t")
    return made


def hostile_images() -> dict[str, bytes]:
    """Pictures that are none, by what is wrong with them: for `PUT /images`."""
    flipped = bytearray(_GOOD)
    flipped[len(flipped) // 2] ^= 0xFF
    bodies = {"empty": b"", "text": b"<svg/>", "truncated": _GOOD[: len(_GOOD) // 2], "noise": random.Random(0).randbytes(5000)}
    return {name: post("/images", "application/octet-stream", body, "hostile-i", method="PUT") for name, body in bodies.items()}
