"""The budget of accepted and unanswered work. Knows captions and tokens, not what they are."""

from __future__ import annotations

import math
import random
import threading
from types import TracebackType
from typing import Self

from app.errors import DeadlineExceeded, Overloaded, TooManyTokens
from app.metrics import Metrics

_MAX_RETRY_AFTER_S = 30


class Admission:
    """The budget of accepted and unanswered work, in captions and tokens. Safe across threads."""

    def __init__(self, *, max_items: int, max_tokens: int, metrics: Metrics) -> None:
        self._max_items = max_items
        self.max_tokens = max_tokens
        self._metrics = metrics
        self._lock = threading.Lock()
        self._items = 0
        self._tokens = 0
        self.tokens_per_s = 0.0  # measured by the batcher; 0 until the first batch

    def reserve(self, num_items: int) -> Reservation:
        """Room for captions; tokens are added once the image header is known. Raises Overloaded."""
        self._take(num_items, 0)
        return Reservation(self, num_items)

    def _take(self, num_items: int, num_tokens: int) -> None:
        with self._lock:
            if self._items + num_items > self._max_items or self._tokens + num_tokens > self.max_tokens:
                raise Overloaded("the queue is full", retry_after_s=self._retry_after_s())
            self._items += num_items
            self._tokens += num_tokens
            self._publish()

    def _give(self, num_items: int, num_tokens: int) -> None:
        with self._lock:
            self._items -= num_items
            self._tokens -= num_tokens
            self._publish()

    def _publish(self) -> None:
        self._metrics.queue_items.set(self._items)
        self._metrics.queue_tokens.set(self._tokens)

    def _retry_after_s(self) -> int:
        """Seconds until half the queue is done, jittered so that callers do not come back as one."""
        return jittered_s(self._tokens / self.tokens_per_s / 2 if self.tokens_per_s else 1.0)


def jittered_s(wait_s: float) -> int:
    """Whole seconds for `Retry-After`, spread so that those who are sent away together do not come back together."""
    return min(_MAX_RETRY_AFTER_S, max(1, math.ceil(wait_s * random.uniform(0.75, 1.5))))  # noqa: S311 (jitter, not a secret)


class Reservation:
    """A share of the admission budget; released once, by leaving the `with` block. Several threads may add to it."""

    def __init__(self, admission: Admission, num_items: int) -> None:
        self._admission = admission
        self._lock = threading.Lock()
        self._open = True
        self._num_items = num_items
        self._num_tokens = 0

    def add_tokens(self, num_tokens: int) -> None:
        """Raises Overloaded when the tokens do not fit beside those of others, TooManyTokens when they never could.

        Once released it raises DeadlineExceeded: a thread that comes late takes nothing that nobody would give back.
        """
        with self._lock:
            if not self._open:
                raise DeadlineExceeded("nobody waits for this request any more")
            if self._num_tokens + num_tokens > self._admission.max_tokens:
                raise TooManyTokens(f"the request has more than {self._admission.max_tokens} tokens; send fewer captions at a time")
            self._admission._take(0, num_tokens)
            self._num_tokens += num_tokens

    def settle(self, bound: int, num_tokens: int) -> None:
        """Give back what an upper bound took too much, now that the true number is known.

        A group that is cut repeats its prefix and may cost more than the bound: what is missing is taken as by `add_tokens`.
        """
        if num_tokens > bound:
            self.add_tokens(num_tokens - bound)
            return
        with self._lock:
            if self._open:
                self._admission._give(0, bound - num_tokens)
                self._num_tokens -= bound - num_tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            if self._open:
                self._admission._give(self._num_items, self._num_tokens)
            self._open = False
