"""How the memory left after loading is shared out: by hand, and never more than there is."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.budgets import Budgets, share_out
from app.errors import SettingsInvalid

MIB, GIB = 1 << 20, 1 << 30


def shared(left_bytes: int | None, **changes: Any) -> Budgets:
    given = {"bytes_per_token": 1000, "max_batch_tokens": 16_384, "min_batch_tokens": 500}
    given |= {"prefix_cache_bytes": None, "feature_cache_bytes": None, "on_host": False}
    return share_out(left_bytes=left_bytes, **(given | changes))


def test_by_hand_where_the_batch_is_bounded_by_memory() -> None:
    """Of 10,000,000 bytes a tenth is left alone; half of 9,000,000 is 4,500 tokens; caches get 60 and 10 % of the other half."""
    assert shared(10_000_000) == Budgets(4500, 4_500_000, 2_700_000, 450_000)


def test_by_hand_where_the_batch_is_as_large_as_was_asked_for() -> None:
    """9,000,000 less 1,000 tokens of 1,000 bytes leaves 8,000,000."""
    assert shared(10_000_000, max_batch_tokens=1000) == Budgets(1000, 1_000_000, 4_800_000, 800_000)


def test_by_hand_with_a_cache_that_is_set() -> None:
    """3,000,000 are gone before anything else: half of 6,000,000, and a tenth of the rest."""
    assert shared(10_000_000, prefix_cache_bytes=3_000_000) == Budgets(3000, 3_000_000, 3_000_000, 300_000)
    assert shared(10_000_000, feature_cache_bytes=3_000_000) == Budgets(3000, 3_000_000, 1_800_000, 3_000_000)
    assert shared(10_000_000, prefix_cache_bytes=0, feature_cache_bytes=0) == Budgets(4500, 4_500_000, 0, 0)


def test_no_cache_grows_beyond_its_use() -> None:
    """A device of its own is filled further than memory that others need too; what somebody sets is taken."""
    device, host = shared(500 * GIB), shared(500 * GIB, on_host=True)
    assert (device.prefix_cache_bytes, device.feature_cache_bytes) == (16 * GIB, 2 * GIB)
    assert (host.prefix_cache_bytes, host.feature_cache_bytes) == (2 * GIB, 2 * GIB)
    assert shared(500 * GIB, on_host=True, prefix_cache_bytes=100 * GIB).prefix_cache_bytes == 100 * GIB


def test_where_nobody_tells_what_is_left_caches_stay_small() -> None:
    assert shared(None) == Budgets(16_384, 16_384_000, 64 * MIB, 64 * MIB)
    assert shared(None, prefix_cache_bytes=5, feature_cache_bytes=0) == Budgets(16_384, 16_384_000, 5, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"left_bytes": 0},
        {"left_bytes": 1_000_000},  # 450 tokens
        {"left_bytes": 10_000_000, "min_batch_tokens": 4501},
        {"left_bytes": 10_000_000, "prefix_cache_bytes": 8_500_000},
        {"left_bytes": 10_000_000, "feature_cache_bytes": 20_000_000},
        {"left_bytes": 10_000_000, "bytes_per_token": 100_000},
    ],
    ids=str,
)
def test_too_little_for_one_caption_stops_the_start(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingsInvalid, match=r"MiB are left .* room for \d+ tokens in a batch, and one caption may need \d+") as caught:
        shared(**changes)
    assert "\n" not in str(caught.value)
    assert "-" not in str(caught.value)


def test_a_cache_that_takes_all_is_named() -> None:
    with pytest.raises(SettingsInvalid, match=r"its other caches, less PUNCHLINE_PREFIX_CACHE_BYTES=8500000: room for"):
        shared(left_bytes=10_000_000, prefix_cache_bytes=8_500_000)


def test_the_very_least_is_enough() -> None:
    assert shared(10_000_000, min_batch_tokens=4500).max_batch_tokens == 4500
    assert (
        shared(10_000_000, min_batch_tokens=9000, max_batch_tokens=1000).max_batch_tokens == 1000
    )  # asked for; captions above are refused


sizes = st.none() | st.integers(0, 10**13)


@given(
    left_bytes=st.integers(0, 10**13),
    bytes_per_token=st.integers(0, 10**7),
    max_batch_tokens=st.integers(1, 10**6),
    min_batch_tokens=st.integers(1, 10**5),
    prefix_cache_bytes=sizes,
    feature_cache_bytes=sizes,
    on_host=st.booleans(),
)
def test_never_more_than_is_left(left_bytes: int, **given: Any) -> None:
    try:
        budgets = share_out(left_bytes=left_bytes, **given)
    except SettingsInvalid:
        return
    caches = (budgets.prefix_cache_bytes, budgets.feature_cache_bytes)
    assert budgets.batch_bytes + sum(caches) <= left_bytes
    assert min(*caches, budgets.batch_bytes) >= 0
    assert min(given["min_batch_tokens"], given["max_batch_tokens"]) <= budgets.max_batch_tokens <= given["max_batch_tokens"]
    assert budgets.batch_bytes == budgets.max_batch_tokens * given["bytes_per_token"]
    for asked, got in zip((given["prefix_cache_bytes"], given["feature_cache_bytes"]), caches, strict=True):
        assert asked in (None, got)


@given(left=st.lists(st.integers(10**6, 10**12), min_size=2, max_size=2).map(sorted))
def test_more_memory_never_means_a_smaller_batch(left: list[int]) -> None:
    less, more = (shared(each, min_batch_tokens=1) for each in left)
    assert less.max_batch_tokens <= more.max_batch_tokens


def test_as_a_dictionary() -> None:
    named = {"max_batch_tokens": 1, "batch_bytes": 2, "prefix_cache_bytes": 3, "feature_cache_bytes": 4}
    assert Budgets(1, 2, 3, 4).as_dict() == named
