"""Least-recently-used caches bounded by bytes, safe across threads. They hold values for exactly one key or miss."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from cachetools import LRUCache

from app.metrics import Metrics

log = logging.getLogger("punchline.caches")
_Value = TypeVar("_Value")


@dataclass(slots=True)
class _Making(Generic[_Value]):
    """What several threads want of which one makes it. It is there as long as any of them."""

    turn: threading.Lock = field(default_factory=threading.Lock)
    num_wanting: int = 0
    value: _Value | None = None


class ByteBoundedCache(Generic[_Value]):
    """Maps a content id to a value; the values used longest ago go when `max_bytes` is reached. 0 bytes: always a miss.

    `model`: whose cache it is, a label of its metrics; empty for what all models have in common.
    """

    def __init__(self, name: str, max_bytes: int, num_bytes: Callable[[_Value], int], metrics: Metrics, model: str = "") -> None:
        self._labels = (model, name)
        self._max_bytes = max_bytes
        self._num_bytes = num_bytes
        self._metrics = metrics
        self._values: LRUCache[str, _Value] = LRUCache(max_bytes, getsizeof=self._cost)
        self._lock = threading.Lock()
        self._makings: dict[str, _Making[_Value]] = {}  # of each key that is being made
        metrics.cache_max_bytes.labels(*self._labels).set(max_bytes)

    def get(self, key: str) -> _Value | None:
        value = self._find(key)
        self._metrics.cache_lookups.labels(*self._labels, "miss" if value is None else "hit").inc()
        return value

    def holds(self, key: str) -> bool:
        """Whether a value is kept now. Neither counts as a lookup nor as a use."""
        with self._lock:
            return key in self._values

    def takes(self, value: _Value) -> bool:
        """Whether it is small enough to be kept at all."""
        return self._cost(value) <= self._max_bytes

    def put(self, key: str, value: _Value) -> None:
        """Keep a value in the place of any other of this key; one larger than the whole cache is not kept."""
        with self._lock:
            self._values.pop(key, None)
            if self.takes(value):
                self._values[key] = value
            self._metrics.cache_bytes.labels(*self._labels).set(self._values.currsize)
            self._metrics.cache_entries.labels(*self._labels).set(len(self._values))

    def get_or_make(self, key: str, make: Callable[[], _Value]) -> _Value:
        """The value of a key, made by one thread while others that want it wait, whether or not it can be kept.

        A failure is not kept: the next one tries again.
        """
        with self._alone(key) as making:
            value = making.value if making.value is not None else self._find(key)
            if value is None:
                value = making.value = make()
                self.put(key, value)
            return value

    @contextmanager
    def _alone(self, key: str) -> Iterator[_Making[_Value]]:
        """One thread at a time for each key."""
        with self._lock:
            making = self._makings.setdefault(key, _Making())
            making.num_wanting += 1
        try:
            with making.turn:
                yield making
        finally:
            with self._lock:
                making.num_wanting -= 1
                if not making.num_wanting:
                    del self._makings[key]

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._values.clear()
            self._metrics.cache_bytes.labels(*self._labels).set(0)
            self._metrics.cache_entries.labels(*self._labels).set(0)

    def _find(self, key: str) -> _Value | None:
        with self._lock:
            return self._values.get(key)

    def _cost(self, value: _Value) -> int:
        """No value is free, so that their number is bounded too."""
        return max(1, self._num_bytes(value))


class Audit:
    """Doubts every n-th hit of one cache (0: none), and counts what was not as it should be. Safe across threads."""

    def __init__(self, cache: str, every: int, metrics: Metrics, model: str = "") -> None:
        self._cache = cache
        self._model = model
        self._every = every
        self._metrics = metrics
        self._lock = threading.Lock()
        self._num_hits = 0

    def is_due(self) -> bool:
        """Whether this hit shall be computed again and compared."""
        with self._lock:
            self._num_hits += 1
            return self._every > 0 and self._num_hits % self._every == 0

    def record(self, *, agrees: bool, what: str = "not what is computed now") -> None:
        """The result of a comparison."""
        self._metrics.cache_audits.labels(self._model, self._cache).inc()
        if not agrees:
            self._metrics.cache_audit_mismatches.labels(self._model, self._cache).inc()
            log.error("an entry of the cache of %s is wrong: %s", self._cache, what)
