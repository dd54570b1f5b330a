"""The budget of what is accepted and not answered: bounds, shares, what is given back, and when to come back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from app.admission import Admission, Reservation, jittered_s
from app.errors import DeadlineExceeded, Overloaded, TooManyTokens
from app.metrics import Metrics
from tests.loop_fakes import FakeClock, sample


def admission_of(max_items: int = 10, max_tokens: int = 100) -> tuple[Admission, Metrics]:
    metrics = Metrics()
    return Admission(max_items=max_items, max_tokens=max_tokens, metrics=metrics), metrics


def queued(metrics: Metrics) -> tuple[float, float]:
    return sample(metrics, "reward_queue_items"), sample(metrics, "reward_queue_tokens")


def test_exactly_what_exceeds_the_bound_is_refused() -> None:
    admission, metrics = admission_of(max_items=10)
    taken: list[Reservation] = []
    refused = []
    for _ in range(14):
        try:
            taken.append(admission.reserve(1))
        except Overloaded as error:
            refused.append(error)
    assert (len(taken), len(refused)) == (10, 4)
    assert all(int(error.headers["Retry-After"]) >= 1 for error in refused)
    assert queued(metrics) == (10, 0)
    with taken.pop():
        pass
    admission.reserve(1)
    assert queued(metrics) == (10, 0)


def test_tokens_are_bounded_too() -> None:
    admission, metrics = admission_of(max_tokens=100)
    with admission.reserve(1) as one, admission.reserve(1) as other:
        one.add_tokens(60)
        other.add_tokens(40)
        with pytest.raises(Overloaded):
            other.add_tokens(1)
        assert queued(metrics) == (2, 100)
    assert queued(metrics) == (0, 0)


def test_what_could_never_fit_is_not_told_to_come_back() -> None:
    admission, metrics = admission_of(max_tokens=100)
    with admission.reserve(1) as reservation:
        reservation.add_tokens(60)
        with pytest.raises(TooManyTokens):
            reservation.add_tokens(41)
        assert queued(metrics) == (1, 60)
    assert queued(metrics) == (0, 0)


def test_a_reservation_is_given_back_whatever_happens() -> None:
    admission, metrics = admission_of()

    def fail() -> None:
        with admission.reserve(3) as reservation:
            reservation.add_tokens(50)
            raise ValueError("anything")

    with pytest.raises(ValueError, match="anything"):
        fail()
    assert queued(metrics) == (0, 0)


def test_a_thread_that_comes_late_takes_nothing() -> None:
    admission, metrics = admission_of()
    with admission.reserve(1) as reservation:
        reservation.add_tokens(10)
    with pytest.raises(DeadlineExceeded):
        reservation.add_tokens(10)
    assert queued(metrics) == (0, 0)


def test_a_bound_settles_to_the_true_number() -> None:
    admission, metrics = admission_of(max_tokens=100)
    with admission.reserve(1) as reservation:
        reservation.add_tokens(90)
        reservation.settle(90, 40)
        assert queued(metrics) == (1, 40)
        reservation.add_tokens(60)
        reservation.settle(60, 60)
        assert queued(metrics) == (1, 100)
    assert queued(metrics) == (0, 0)
    reservation.settle(90, 40)  # a thread that comes late gives nothing back twice
    assert queued(metrics) == (0, 0)


def test_a_group_that_is_cut_takes_its_repeated_prefix_or_is_refused() -> None:
    """The bound counts a prefix once; every piece of a group that is larger than a batch has it again."""
    admission, metrics = admission_of(max_tokens=100)
    with admission.reserve(1) as reservation, admission.reserve(1) as other:
        reservation.add_tokens(50)
        reservation.settle(50, 70)
        assert queued(metrics) == (2, 70)
        other.add_tokens(20)
        with pytest.raises(Overloaded):
            other.settle(20, 40)
        assert queued(metrics) == (2, 90)
    assert queued(metrics) == (0, 0)


def test_threads_that_share_a_reservation_lose_no_tokens() -> None:
    admission, metrics = admission_of(max_items=1, max_tokens=1 << 30)
    with ThreadPoolExecutor(4) as pool, admission.reserve(1) as reservation:
        list(pool.map(lambda _: [reservation.add_tokens(1) for _ in range(2000)], range(4)))
        assert queued(metrics) == (1, 8000)
    assert queued(metrics) == (0, 0)


def test_retry_after_follows_the_measured_speed() -> None:
    """Half of 1000 tokens at 100 a second: 5 s, jittered by 0.75 to 1.5 and rounded up; never above 30 s."""
    admission, _ = admission_of(max_items=1, max_tokens=1000)
    with admission.reserve(1) as reservation:
        reservation.add_tokens(1000)
        seen = set()
        for _ in range(200):
            admission.tokens_per_s = 100.0
            seen.add(retry_after_s(admission))
        assert seen <= set(range(4, 9))
        assert len(seen) > 1
        admission.tokens_per_s = 0.001
        assert retry_after_s(admission) == 30


def retry_after_s(admission: Admission) -> int:
    with pytest.raises(Overloaded) as refused:
        admission.reserve(1)
    return int(refused.value.headers["Retry-After"])


# Shares


def shared(max_items: int = 12, max_tokens: int = 1000) -> tuple[Admission, FakeClock]:
    clock = FakeClock()
    return Admission(max_items=max_items, max_tokens=max_tokens, metrics=Metrics(), clock=clock), clock


def flood(admission: Admission, caller: str, taken: ExitStack) -> int:
    """One caption after the other until one is refused; returns how many were taken."""
    for number in range(1000):
        try:
            taken.enter_context(admission.reserve(1, caller))
        except Overloaded:
            return number
    raise AssertionError("nothing was refused")


def test_one_caller_alone_may_fill_the_queue() -> None:
    admission, _ = shared()
    with ExitStack() as taken:
        assert flood(admission, "a", taken) == 12


def test_who_floods_leaves_the_shares_of_those_who_were_there_lately() -> None:
    """Of 12 places and three callers a share is 4, whoever comes first."""
    admission, clock = shared()
    with ExitStack() as taken:
        for caller in "abc":
            with admission.reserve(1, caller):
                pass
        assert flood(admission, "a", taken) == 4
        clock.now += 5
        assert flood(admission, "b", taken) == 4
        assert flood(admission, "c", taken) == 4


def test_what_others_do_not_want_is_anybodys() -> None:
    """Two of three hold 1 each and want no more than their 4: of the 10 that are left, one may take 4, and then nothing."""
    admission, _ = shared()
    with ExitStack() as taken:
        for caller in "bc":
            taken.enter_context(admission.reserve(1, caller))
        assert flood(admission, "a", taken) == 4
        with pytest.raises(Overloaded, match="kept for other keys"):
            admission.reserve(1, "a")


def test_after_a_while_nobody_is_waited_for() -> None:
    admission, clock = shared()
    with admission.reserve(1, "gone"):
        pass
    clock.now += 11
    with ExitStack() as taken:
        assert flood(admission, "a", taken) == 12


def test_who_holds_nothing_may_take_more_than_a_share_at_once() -> None:
    """Else a large request could never be admitted where several callers are."""
    admission, _ = shared()
    with admission.reserve(1, "a"), admission.reserve(11, "b"), pytest.raises(Overloaded):
        admission.reserve(1, "b")


def test_tokens_have_shares_as_well() -> None:
    admission, _ = shared(max_items=1000, max_tokens=100)
    with admission.reserve(1, "b"), admission.reserve(1, "a") as mine:
        mine.add_tokens(60)
        with pytest.raises(Overloaded, match="kept for other keys"):
            admission.reserve(1, "a")
        with admission.reserve(1, "b") as other:
            other.add_tokens(40)


def test_seconds_to_wait_are_spread() -> None:
    assert {jittered_s(2.0) for _ in range(500)} == {2, 3}
    assert {jittered_s(0.0) for _ in range(10)} == {1}
    assert jittered_s(1e9) == 30


def test_what_the_refused_are_told() -> None:
    admission, _ = shared(max_items=2, max_tokens=100)
    with admission.reserve(2, "a") as reservation:
        reservation.add_tokens(100)
        admission.tokens_per_s = 5.0
        with pytest.raises(Overloaded) as full:
            admission.reserve(1, "b")
        with pytest.raises(Overloaded) as greedy:
            admission.reserve(1, "a")
        with pytest.raises(TooManyTokens) as large:
            reservation.add_tokens(1)
    with pytest.raises(DeadlineExceeded) as late:
        reservation.add_tokens(1)
    assert [str(error.value) for error in (full, greedy, large, late)] == [
        "the queue is full",
        "what is left of the queue is kept for other keys",
        "the request has more than 100 tokens; send fewer captions at a time",
        "nobody waits for this request any more",
    ]
    waits = [int(error.value.headers["Retry-After"]) for error in (full, greedy)]
    assert all(8 <= wait <= 15 for wait in waits)  # half of 100 tokens at 5 a second, jittered


def test_before_the_speed_is_known_it_is_a_second_or_two() -> None:
    admission, _ = admission_of(max_items=1)
    assert admission.tokens_per_s == 0
    with admission.reserve(1):
        assert {retry_after_s(admission) for _ in range(100)} == {1, 2}


@pytest.mark.parametrize(("waited_s", "room"), [(10.0, 6), (10.001, 12)])
def test_a_share_is_kept_for_exactly_as_long_as_promised(waited_s: float, room: int) -> None:
    admission, clock = shared()
    with admission.reserve(1, "gone"):
        pass
    clock.now += waited_s
    with ExitStack() as taken:
        assert flood(admission, "a", taken) == room


def test_who_holds_one_caption_is_there_however_long_ago_it_asked() -> None:
    admission, clock = shared()
    with admission.reserve(1, "slow"), ExitStack() as taken:
        clock.now += 1000
        assert flood(admission, "a", taken) == 6


def test_tokens_of_a_caller_add_up() -> None:
    """Twice 30 of 100 is more than half, though neither is."""
    admission, _ = shared(max_items=1000, max_tokens=100)
    with admission.reserve(1, "b"), admission.reserve(1, "a") as mine:
        mine.add_tokens(30)
        mine.add_tokens(30)
        with pytest.raises(Overloaded, match="kept for other keys"):
            admission.reserve(1, "a")


def test_below_its_share_nobody_is_refused_for_others() -> None:
    """Others hold all but one place: it goes to who asks, since it is below its share."""
    admission, _ = shared(max_items=12)
    with (
        admission.reserve(5, "a"),
        admission.reserve(6, "b"),
        admission.reserve(1, "a"),
        pytest.raises(Overloaded, match="the queue is full"),
    ):
        admission.reserve(1, "c")  # so all twelve were taken


def test_what_others_hold_is_no_longer_owed_to_them() -> None:
    """Of 12, what b holds less than its 6 is kept for it, and no more than that: never 6 beside what it holds."""
    admission, _ = shared(max_items=12)
    with admission.reserve(3, "b"), admission.reserve(6, "a"):
        with pytest.raises(Overloaded, match="kept for other keys"):
            admission.reserve(1, "a")
        with admission.reserve(2, "b"), pytest.raises(Overloaded, match="kept for other keys"):
            admission.reserve(1, "a")


def test_the_name_of_no_key_is_empty() -> None:
    admission, _ = shared(max_items=4)
    with admission.reserve(2), admission.reserve(1, "b"), pytest.raises(Overloaded, match="kept for other keys"):
        admission.reserve(1, "")
