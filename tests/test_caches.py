"""The byte-bounded cache against an exact model, and from several threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from app.caches import Audit, ByteBoundedCache
from app.metrics import Metrics
from tests.loop_fakes import sample

KEYS = st.sampled_from("abcdefgh")
VALUES = st.binary(max_size=12)


def cache_of(max_bytes: int, metrics: Metrics | None = None) -> ByteBoundedCache[bytes]:
    return ByteBoundedCache("test", max_bytes, len, metrics or Metrics())


class CacheMachine(RuleBasedStateMachine):
    """A get gives exactly the value last put for that key, or None; the one used longest ago goes first."""

    @initialize(max_bytes=st.integers(0, 30))
    def start(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.metrics = Metrics()
        self.cache = cache_of(max_bytes, self.metrics)
        self.model: OrderedDict[str, bytes] = OrderedDict()
        self.lookups = {"hit": 0, "miss": 0}

    def num_bytes(self) -> int:
        return sum(max(1, len(value)) for value in self.model.values())

    def remember(self, key: str, value: bytes) -> None:
        self.model.pop(key, None)
        if max(1, len(value)) > self.max_bytes:
            return
        while self.num_bytes() + max(1, len(value)) > self.max_bytes:
            self.model.popitem(last=False)
        self.model[key] = value

    @rule(key=KEYS, value=VALUES)
    def put(self, key: str, value: bytes) -> None:
        self.cache.put(key, value)
        self.remember(key, value)

    @rule(key=KEYS)
    def get(self, key: str) -> None:
        assert self.cache.get(key) == self.model.get(key)
        self.lookups["hit" if key in self.model else "miss"] += 1
        if key in self.model:
            self.model.move_to_end(key)

    @rule(key=KEYS)
    def holds(self, key: str) -> None:
        """Neither a lookup nor a use: the order in which values go stays as it was."""
        assert self.cache.holds(key) == (key in self.model)

    @rule(key=KEYS, value=VALUES)
    def get_or_make(self, key: str, value: bytes) -> None:
        assert self.cache.get_or_make(key, lambda: value) == self.model.get(key, value)
        if key in self.model:
            self.model.move_to_end(key)
        else:
            self.remember(key, value)

    @invariant()
    def counted(self) -> None:
        if not hasattr(self, "model"):
            return
        held = sample(self.metrics, "reward_cache_bytes", cache="test")
        assert held == self.num_bytes() <= self.max_bytes
        assert sample(self.metrics, "reward_cache_entries", cache="test") == len(self.model)
        for result, count in self.lookups.items():
            assert sample(self.metrics, "reward_cache_lookups_total", cache="test", result=result) == count


CacheMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestCacheMachine = CacheMachine.TestCase


def test_a_value_larger_than_the_cache_is_not_kept_and_leaves_nothing_old() -> None:
    cache = cache_of(4)
    cache.put("k", b"1234")
    cache.put("k", b"12345")
    assert cache.get("k") is None


@pytest.mark.parametrize("value", [b"", b"x"])
def test_no_bytes_keep_nothing(value: bytes) -> None:
    cache = cache_of(0)
    cache.put("k", value)
    assert cache.get("k") is None
    assert cache.get_or_make("k", lambda: value) == value


def test_empty_values_are_bounded_in_number() -> None:
    cache = cache_of(3)
    for key in "abcde":
        cache.put(key, b"")
    assert [key for key in "abcde" if cache.get(key) is not None] == ["c", "d", "e"]


def together(count: int, work: Callable[[int], object]) -> list[object]:
    """Run `work` on so many threads at the same moment."""
    start = threading.Barrier(count)

    def run(number: int) -> object:
        start.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_equal_misses_at_once_are_made_once() -> None:
    cache, made = cache_of(100), []

    def make() -> bytes:
        made.append(threading.get_ident())
        threading.Event().wait(0.02)  # time for the others to come
        return b"value"

    assert together(8, lambda _: cache.get_or_make("k", make)) == [b"value"] * 8
    assert len(made) == 1


@pytest.mark.parametrize("max_bytes", [0, 4], ids=["nothing is kept", "too large to be kept"])
def test_equal_misses_at_once_are_made_once_even_if_nothing_of_them_is_kept(max_bytes: int) -> None:
    cache, made = cache_of(max_bytes), []

    def make() -> bytes:
        made.append(threading.get_ident())
        threading.Event().wait(0.2)
        return b"value"

    assert together(8, lambda _: cache.get_or_make("k", make)) == [b"value"] * 8
    assert len(made) == 1
    assert cache.get_or_make("k", lambda: b"other") == b"other"  # nobody wanted the first one any more


def test_how_much_a_cache_may_hold_is_told() -> None:
    metrics = Metrics()
    cache_of(10, metrics)
    assert sample(metrics, "reward_cache_max_bytes", cache="test") == 10


def test_a_failure_reaches_its_caller_and_sticks_to_nothing() -> None:
    cache = cache_of(100)

    def fail() -> bytes:
        raise ValueError("cannot be made")

    for _ in range(2):
        with pytest.raises(ValueError, match="cannot be made"):
            cache.get_or_make("k", fail)
    assert cache.get("k") is None
    assert cache.get_or_make("k", lambda: b"value") == b"value"


def test_threads_never_get_a_value_of_another_key() -> None:
    cache = cache_of(40)

    def work(number: int) -> bool:
        keys = [f"{step * (number + 3) % 17}" for step in range(500)]
        for key in keys:
            cache.put(key, key.encode() * 5)
        return all(cache.get(key) in (None, key.encode() * 5) for key in keys)

    assert together(4, work) == [True] * 4


def test_a_cleared_cache_is_empty_and_says_so() -> None:
    metrics = Metrics()
    cache = cache_of(10, metrics)
    cache.put("a", b"abc")
    assert sample(metrics, "reward_cache_bytes", cache="test") == 3
    cache.clear()
    assert cache.get("a") is None
    assert sample(metrics, "reward_cache_bytes", cache="test") == 0
    assert sample(metrics, "reward_cache_entries", cache="test") == 0


def test_who_makes_one_value_holds_up_nobody_who_wants_another() -> None:
    cache = cache_of(10)
    with ThreadPoolExecutor(1) as pool:

        def make() -> bytes:
            return pool.submit(cache.get_or_make, "b", lambda: b"b").result(timeout=20) + b"a"

        assert cache.get_or_make("a", make) == b"ba"


def test_a_wrong_entry_is_logged_with_what_is_wrong(caplog: pytest.LogCaptureFixture) -> None:
    audit = Audit("scores", 2, Metrics())
    audit.record(agrees=True)
    assert not caplog.records
    audit.record(agrees=False)
    audit.record(agrees=False, what="of other ids")
    assert [record.getMessage() for record in caplog.records] == [
        "an entry of the cache of scores is wrong: not what is computed now",
        "an entry of the cache of scores is wrong: of other ids",
    ]
