"""Where a row leaves the prefix of its image and prompt: by the row alone, whatever its company. And how long a row can be at most."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from app.artifacts import open_artifact
from app.contracts import EncodedGroup, EncodedImage, Group, RgbImage
from app.encoding import Encoder, load_encoder
from app.images import decode_image
from tests.tiny import LIMITS, copy_artifact, edit_json, encode_text, load_whole, picture, write_text_only

quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LETTERS = "ab cdeEThein.,:;!?'\"{}\n\t  0123é企鵝🐧\u0301\u0958\ufb2c\u200b"
WORDS = ["in", "ins", "n", "The", "Then", " the", "x", "", "\n", "umbrella", "pengu", "guin"]
texts = st.text(LETTERS, max_size=40) | st.sampled_from(WORDS) | st.lists(st.sampled_from(WORDS), max_size=4).map(" ".join)
prompts = st.none() | st.sampled_from(["", "the pengu", "Write a fun", "Be kind. ", "umb", "Th", "\n"]) | texts
KINDS = ("vision", "seam", "caption-first", "chat", "raw", "raw-caption-first")


@pytest.fixture(scope="module")
def encoders(encoder: Encoder, published: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Encoder]:
    """`seam`: the caption follows the prompt at once; `raw`: without a chat around both."""
    folder = tmp_path_factory.mktemp("prefixes")
    found = {"vision": encoder, "chat": load_whole(write_text_only(folder / "chat"))[0]}
    for name, template in (("seam", "{prompt}{caption}"), ("caption-first", "{caption}\nTask: {prompt}")):
        root = copy_artifact(published, folder / name)
        edit_json(root / "reward_model_config.json", template=template)
        found[name] = load_encoder(open_artifact(str(root)))
    for name, template in (("raw", "{prompt}{caption}"), ("raw-caption-first", "{caption}{prompt}")):
        found[name] = load_whole(write_text_only(folder / name, caption_role="raw", template=template))[0]
    return found


@pytest.fixture(scope="module")
def image(encoder: Encoder) -> EncodedImage:
    return encoder.encode_image(decode_image(picture(120, 80), LIMITS, exif_transpose=False))


def encoded(encoder: Encoder, image: EncodedImage, captions: Sequence[str], prompt: str | None) -> tuple[EncodedGroup | None, list[bool]]:
    group, errors = encoder.encode(Group(tuple(captions), prompt, image if encoder.takes_images else None))
    return group, [error is None for error in errors]


@quick
@given(kind=st.sampled_from(KINDS), prompt=prompts, captions=st.lists(texts, min_size=1, max_size=6))
@example(kind="raw", prompt="the pengu", captions=["in", "x", "", "ins"])
@example(kind="seam", prompt="the pengu", captions=["in", "x", "", "ins"])
@example(kind="raw", prompt="", captions=["x", "The", "T"])
@example(kind="raw", prompt="Th", captions=["e", "x"])
@example(kind="raw", prompt="Be kind.", captions=["", "The", "The umbrella"])
def test_a_rows_prefix_is_its_own_whatever_its_company(
    encoders: dict[str, Encoder], image: EncodedImage, kind: str, prompt: str | None, captions: list[str]
) -> None:
    encoder = encoders[kind]
    group, is_fine = encoded(encoder, image, captions, prompt)
    kept = [caption for caption, fine in zip(captions, is_fine, strict=True) if fine]
    if group is None:
        assert kept == []
        return
    assert len(group.row_prefixes) == len(group.rows) == len(kept)
    assert group.num_prefix == min(group.row_prefixes)
    for caption, row, own in zip(kept, group.rows, group.row_prefixes, strict=True):
        assert 0 <= own < len(row)
        alone, _ = encoded(encoder, image, [caption], prompt)
        assert alone is not None
        assert (alone.num_prefix, alone.row_prefixes) == (own, (own,))
        assert np.array_equal(alone.rows[0], row)


@quick
@given(
    kind=st.sampled_from(KINDS),
    prompt=prompts,
    captions=st.lists(texts, min_size=2, max_size=6),
    other=st.lists(texts, min_size=1, max_size=3),
)
def test_rows_of_one_image_and_prompt_share_the_prefix_as_far_as_both_go(
    encoders: dict[str, Encoder], image: EncodedImage, kind: str, prompt: str | None, captions: list[str], other: list[str]
) -> None:
    """Also over two requests: whoever computes a prefix, all can use it."""
    groups = [encoded(encoders[kind], image, each, prompt)[0] for each in (captions, other)]
    prefixes = [row[:own] for group in groups if group for row, own in zip(group.rows, group.row_prefixes, strict=True)]
    longest = max(prefixes, key=len, default=np.zeros(0))
    assert all(np.array_equal(prefix, longest[: len(prefix)]) for prefix in prefixes)


@quick
@given(kind=st.sampled_from(["vision", "seam", "caption-first"]), prompt=prompts, caption=texts)
def test_the_image_lies_whole_in_every_prefix(
    encoders: dict[str, Encoder], image: EncodedImage, kind: str, prompt: str | None, caption: str
) -> None:
    encoder = encoders[kind]
    group, _ = encoded(encoder, image, [caption], prompt)
    if group is None:
        return
    (row,), pad = group.rows, encoder._image_token_id
    assert int((row[: group.num_prefix] == pad).sum()) == int((row == pad).sum()) == image.num_tokens


def test_the_prompt_is_shared_not_only_the_image(encoders: dict[str, Encoder], image: EncodedImage) -> None:
    """All but a few tokens of a long chat with a short caption; a caption that comes first shares nothing of the prompt."""
    prompt = "Scene: an office. Twist: a penguin holds an umbrella."
    for kind in ("vision", "seam", "chat", "raw"):
        group, _ = encoded(encoders[kind], image, ["x", "why not"], prompt)
        empty, _ = encoded(encoders[kind], image, ["x", "why not"], "")
        assert group is not None
        assert empty is not None
        assert group.num_prefix >= empty.num_prefix + 15
    group, _ = encoded(encoders["raw-caption-first"], image, ["x", "why not"], prompt)
    assert group is not None
    assert group.num_prefix == 0


def test_a_caption_that_merges_into_the_prompt_leaves_it_earlier(encoders: dict[str, Encoder]) -> None:
    merging = encode_text(encoders["raw"], ["in", "x", "ins", "an iceberg"], "the pengu")
    first, *_ = own = merging.row_prefixes
    assert (own[0], own[1]) == (first, first + 1)
    assert own[2] == first
    assert own[3] == first + 1
    assert not np.array_equal(merging.rows[0][: first + 1], merging.rows[1][: first + 1])


# The longest row


@quick
@given(
    kind=st.sampled_from(KINDS),
    size=st.tuples(st.integers(16, 900), st.integers(16, 900)),
    prompt=st.none() | texts | st.text(LETTERS, min_size=60, max_size=400),
    caption=texts | st.text(LETTERS, max_size=80),
)
@example(kind="vision", size=(900, 900), prompt="🐧" * 99, caption="\x07" * 80)
@example(kind="seam", size=(900, 16), prompt="\x07" * 400, caption="\x07" * 80)
@example(kind="raw", size=(16, 16), prompt="\x07" * 400, caption="\x07" * 80)
def test_no_row_is_longer_than_the_longest(
    encoders: dict[str, Encoder], kind: str, size: tuple[int, int], prompt: str | None, caption: str
) -> None:
    encoder = encoders[kind]
    image = encoder.encode_image(RgbImage("sha256:0", np.zeros((size[1], size[0], 3), np.uint8))) if encoder.takes_images else None
    group, _ = encoder.encode(Group((caption,), prompt, image))
    assert group is None or len(group.rows[0]) <= encoder.max_row_tokens


def test_the_longest_row_is_no_idle_bound(encoders: dict[str, Encoder], encoder: Encoder) -> None:
    """The longest prompt and caption come near it where there is no picture; with one, the processor's largest picture counts."""
    raw = encoders["raw"]
    group = encode_text(raw, ["\x07" * raw.config.max_caption_tokens], "\x08" * raw.config.max_prompt_tokens)
    assert raw.max_row_tokens - 16 <= len(group.rows[0]) <= raw.max_row_tokens
    assert encoder.max_row_tokens > 64 + encoder.config.max_prompt_tokens + encoder.config.max_caption_tokens
