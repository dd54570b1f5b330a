"""Training runs by id: what their scores look like, what of it is a sign of reward hacking, and which runs are kept. Keeps no caption.

For one thread, the event loop's: nothing here is locked, and nothing waits.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from app.joining import Group, OpenGroups
from app.tallies import Expected, History, Recent, Tally, merged, tally_of

MAX_SCORE = 3.5e38  # float32's; beyond it squares would overflow
MAX_TEXTS = 1024  # whose digests a run remembers
ESTABLISHED = 16  # groups; a run with as many gives way to no newcomer
MIN_GROUPS, MIN_CAPTIONS = 16, 64  # of the last ones, before anything is said of them
MAX_FLAT_SHARE = 0.25
MAX_CORRELATION = 0.4
MAX_DUPLICATE_SHARE = 0.25
MAX_REPEAT_SHARE = 0.25
MAX_DRIFT = 3.0
MAX_OUTSIDE_SHARE = 0.05  # 0.0027 of a normal distribution
STD_RATIOS = (0.1, 3.0)
MIN_SPREAD_LEFT = 0.2  # of the spread within groups at the beginning
LIMITS = {
    "min_groups": MIN_GROUPS,
    "min_captions": MIN_CAPTIONS,
    "flat_share": MAX_FLAT_SHARE,
    "length_correlation": MAX_CORRELATION,
    "duplicate_share": MAX_DUPLICATE_SHARE,
    "repeat_share": MAX_REPEAT_SHARE,
    "drift": MAX_DRIFT,
    "outside_share": MAX_OUTSIDE_SHARE,
}  # those the page draws
_PLAIN_EDGES = (-16, -8, -4, -3, -2, -1.5, -1, -0.5, -0.25, 0, 0.25, 0.5, 1, 1.5, 2, 3, 4, 8, 16)
_FINE = [step / 8 for step in range(1, 17)] + [step / 4 for step in range(9, 25)]  # a run may be a tenth as wide as the validation data
_ASIDE = (*_FINE, 6.5, 7, 7.5, 8, 16)
_SIGMAS = (*(-sigma for sigma in reversed(_ASIDE)), 0, *_ASIDE)


@dataclass(frozen=True, slots=True)
class Finding:
    """A sign of reward hacking, which may have another cause: its value, the limit it passed, and both in words."""

    code: str
    value: float
    limit: float
    text: str


@dataclass(frozen=True, slots=True)
class Seen:
    """What some captions brought: their scores at once, and the groups that are whole now, theirs or others'."""

    scores: list[float]
    num_unusable: int
    whole: list[Tally]


class Run:
    """The scores of one training run, of any length in bounded memory. What it shows includes groups that are still open.

    A group that a client sends again, after it lost the answer, is counted again.
    """

    def __init__(self, run_id: str, expected: Expected | None = None) -> None:
        self.run_id = run_id
        self.expected = expected
        self.num_unusable = 0
        self.history = History()
        self.edges = edges_for(expected)
        self.counts = [0] * (len(self.edges) + 1)  # of scores up to each edge, and beyond the last
        self.last_seen_s = -math.inf
        self._whole = Tally()
        self._recent = Recent()
        self._open = OpenGroups()
        self._texts: dict[int, None] = {}  # digests, the one met longest ago first
        self._shown: tuple[Tally, Tally] | None = None  # of the last groups and of the open ones, until something comes

    def observe(self, captions: Sequence[str], scores: Sequence[float | None], now_s: float, about: int | None = None) -> Seen:
        """Some captions of one request. Those without a score are left out; so are scores that no float32 can hold, which are counted.

        `now_s`: seconds since the epoch. Lengths are characters (Unicode code points). `about`: a digest of picture and prompt;
        a caption that comes alone joins others about the same. Without it, and if several come together, they are a group.
        """
        scored = [(text, score) for text, score in zip(captions, scores, strict=True) if score is not None]
        usable = [(text, score) for text, score in scored if -MAX_SCORE <= score <= MAX_SCORE]
        num_unusable = len(scored) - len(usable)
        self.num_unusable += num_unusable
        whole = self.close(now_s)
        if not usable:
            return Seen([], num_unusable, whole)
        found = [score for _, score in usable]
        group = Group([hash(text) for text, _ in usable], [len(text) for text, _ in usable], found, now_s, now_s)
        for score in found:
            self.counts[bisect_left(self.edges, score)] += 1
        self.last_seen_s, self._shown = max(self.last_seen_s, now_s), None
        ended = self._open.join(about, group) if about is not None and len(captions) == 1 else [group]
        return Seen(found, num_unusable, whole + [self._take(each) for each in ended])

    def close(self, now_s: float) -> list[Tally]:
        """Counts the open groups whose time has passed, and says which."""
        return [self._take(group) for group in self._open.due(now_s)]

    def _take(self, group: Group) -> Tally:
        tally = self._tally(group)
        for digest in group.digests:
            self._texts.pop(digest, None)
            self._texts[digest] = None
        while len(self._texts) > MAX_TEXTS:
            del self._texts[next(iter(self._texts))]
        for place in (self._whole, self.history, self._recent):
            place.add(tally)
        self._shown = None
        return tally

    def _tally(self, group: Group) -> Tally:
        """Texts are told apart by Python's 64-bit hash, keyed anew in every process: nobody can make two of them meet."""
        num_repeats = sum([digest in self._texts for digest in group.digests])
        return tally_of(
            group.scores, group.lengths, group.began_s, group.ended_s,
            num_duplicates=group.num_twins(), num_repeats=num_repeats, expected=self.expected,
        )  # fmt: skip

    @property
    def num_groups(self) -> int:
        return self._whole.num_groups + len(self._open)

    @property
    def total(self) -> Tally:
        return merged((self._whole, self._looked_at()[1]))

    @property
    def recent(self) -> Tally:
        """The last 128 to 144 groups that are whole, and those that are open. Not to be changed."""
        return self._looked_at()[0]

    def _looked_at(self) -> tuple[Tally, Tally]:
        if self._shown is None:
            still = merged([self._tally(group) for group in self._open])
            self._shown = merged((self._recent.tally(), still)), still
        return self._shown

    @property
    def length_correlation(self) -> float | None:
        """Of the last groups, as far as anything is said of it: one number for verdict, gauge and page."""
        return length_correlation(self.recent)

    def beginning(self) -> Tally:
        """The first eighth of the run."""
        points = list(self.history)
        return merged(points[: math.ceil(len(points) / 8)])

    def findings(self) -> list[Finding]:
        """What in the last groups is a sign of reward hacking; nothing while they are few."""
        return findings(self.recent, self.beginning(), self.expected)

    def summary(self) -> dict[str, Any]:
        """A line of the list of runs."""
        found = [finding.code for finding in self.findings()]
        return {"id": self.run_id, **described(self.total, self.expected), "findings": found}

    def as_dict(self) -> dict[str, Any]:
        """Everything the page shows. What is unknown is None, never 0."""
        return {
            "id": self.run_id,
            "expected": asdict(self.expected) if self.expected else None,
            "total": described(self.total, self.expected),
            "recent": described(self.recent, self.expected),
            "length_r": self.length_correlation,
            "open_groups": len(self._open),
            "unusable_scores": self.num_unusable,
            "early": is_early(self.recent),
            "findings": [asdict(finding) for finding in self.findings()],
            "limits": LIMITS,
            "histogram": {"edges": list(self.edges), "counts": list(self.counts)},
            "history": [described(point, self.expected) for point in self.history.whole(self._looked_at()[1])],
        }


def edges_for(expected: Expected | None) -> tuple[float, ...]:
    """Edges of a histogram: eighths of a standard deviation around what is expected, or as the metric of all scores has them."""
    return tuple(expected.mean + sigma * expected.std for sigma in _SIGMAS) if expected else _PLAIN_EDGES


def described(tally: Tally, expected: Expected | None) -> dict[str, Any]:
    """A tally as plain numbers; None for what these groups cannot tell."""
    has_scores = tally.num_captions > 0
    return {
        "groups": tally.num_groups,
        "captions": tally.num_captions,
        "compared_groups": tally.num_compared,
        "first_seen_s": tally.began_s if has_scores else None,
        "last_seen_s": tally.ended_s if has_scores else None,
        "mean": tally.all.score if has_scores else None,
        "std": tally.all.std(),
        "min": tally.lowest if has_scores else None,
        "max": tally.highest if has_scores else None,
        "mean_length": tally.all.length if has_scores else None,
        "group_spread": tally.spread,
        "flat_share": tally.flat_share,
        "length_correlation": tally.within.correlation(),
        "length_correlation_overall": tally.all.around.correlation(),
        "duplicate_share": tally.duplicate_share,
        "repeat_share": tally.repeat_share,
        "drift": tally.drift(expected),
        "std_ratio": tally.std_ratio(expected),
        "outside_share": tally.outside_share(expected),
    }


def is_early(recent: Tally) -> bool:
    """Whether the last groups are too few to tell anything."""
    return recent.num_groups < MIN_GROUPS or recent.num_captions < MIN_CAPTIONS


def length_correlation(recent: Tally) -> float | None:
    """Within groups if there are enough, over all captions if each came by itself, and None between the two or while it is early."""
    if is_early(recent) or 0 < recent.num_compared < MIN_GROUPS:
        return None
    return (recent.within if recent.num_compared else recent.all.around).correlation()


def findings(recent: Tally, beginning: Tally, expected: Expected | None) -> list[Finding]:
    """Signs of reward hacking, the surest first. Nothing while it is early."""
    if is_early(recent):
        return []
    grouped = recent if recent.num_compared >= MIN_GROUPS else Tally()  # all of it unknown
    checks = (_flat(grouped), _length(recent), _drift(recent, expected), _outside(recent, expected), _std_ratio(recent, expected))
    rest = (_spread(grouped, beginning), _duplicates(grouped), _repeats(recent))
    return [finding for finding in (*checks, *rest) if finding is not None]


def _flat(recent: Tally) -> Finding | None:
    share = recent.flat_share
    if share is None or share <= MAX_FLAT_SHARE:
        return None
    text = f"{_percent(share)} of groups have no spread (limit {_percent(MAX_FLAT_SHARE)}): nothing is learned from them."
    return Finding("no_spread", share, MAX_FLAT_SHARE, text)


def _length(recent: Tally) -> Finding | None:
    found = length_correlation(recent)
    if found is None or abs(found) <= MAX_CORRELATION:
        return None
    where = "within groups" if recent.num_compared else "over all captions"
    way, better = ("grow", "longer") if found > 0 else ("fall", "shorter")
    text = (
        f"Scores {way} with length: r = {found:.2f} {where} (limit ±{MAX_CORRELATION}). "
        f"The policy may be learning to write {better} captions, not better ones."
    )
    return Finding("length", found, MAX_CORRELATION, text)


def _drift(recent: Tally, expected: Expected | None) -> Finding | None:
    found = recent.drift(expected)
    if found is None or abs(found) <= MAX_DRIFT:
        return None
    side = "above" if found > 0 else "below"
    text = (
        f"The mean score is {abs(found):.1f} σ {side} that of the model's validation data (limit {MAX_DRIFT:g} σ): there it only guesses."
    )
    return Finding("drift", found, MAX_DRIFT, text)


def _outside(recent: Tally, expected: Expected | None) -> Finding | None:
    share = recent.outside_share(expected)
    if share is None or share <= MAX_OUTSIDE_SHARE:
        return None
    text = f"{_percent(share)} of scores lie over 3 σ from the validation mean (limit {_percent(MAX_OUTSIDE_SHARE)}): read those captions."
    return Finding("outside", share, MAX_OUTSIDE_SHARE, text)


def _std_ratio(recent: Tally, expected: Expected | None) -> Finding | None:
    found = recent.std_ratio(expected)
    least, most = STD_RATIOS
    if found is None or least <= found <= most:
        return None
    limit = least if found < least else most
    text = f"Scores spread {found:.2g} times as wide as on the model's validation data (limits {least:g} and {most:g})."
    return Finding("std_ratio", found, limit, text)


def _spread(recent: Tally, beginning: Tally) -> Finding | None:
    now, first = recent.spread, beginning.spread
    if now is None or not first or now >= MIN_SPREAD_LEFT * first:
        return None
    left = now / first
    text = f"The spread within groups fell to {_percent(left)} of that at first (limit {_percent(MIN_SPREAD_LEFT)}): samples grow alike."
    return Finding("spread_fell", left, MIN_SPREAD_LEFT, text)


def _duplicates(recent: Tally) -> Finding | None:
    share = recent.duplicate_share
    if share is None or share <= MAX_DUPLICATE_SHARE:
        return None
    text = (
        f"{_percent(share)} of captions have a twin in their group, word for word (limit {_percent(MAX_DUPLICATE_SHARE)}): entropy is low."
    )
    return Finding("duplicates", share, MAX_DUPLICATE_SHARE, text)


def _repeats(recent: Tally) -> Finding | None:
    share = recent.repeat_share
    if share is None or share <= MAX_REPEAT_SHARE:
        return None
    text = (
        f"{_percent(share)} of captions stood in an earlier group, word for word (limit {_percent(MAX_REPEAT_SHARE)}): "
        "one text for every picture, requests sent twice, or a picture that came back after its group was closed."
    )
    return Finding("repeats", share, MAX_REPEAT_SHARE, text)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


class Runs:
    """At most `max_runs` runs. For a new one the idle longest goes, and of those the newcomers first.

    A run of fewer than 16 groups is a newcomer, and a quarter of the places is kept for newcomers: endless new ids push each other
    out, never a run that is under way, and to pass for such a run costs 16 scored groups an id.
    """

    def __init__(self, max_runs: int, on_forgotten: Callable[[str], None] = lambda _: None) -> None:
        """`on_forgotten`: called with the id of each run that goes."""
        self._max_runs = max_runs
        self._max_established = max(1, max_runs - max(1, max_runs // 4))
        self._on_forgotten = on_forgotten
        self._new: dict[str, Run] = {}  # the one idle longest first, here and below
        self._established: dict[str, Run] = {}

    def __len__(self) -> int:
        return len(self._new) + len(self._established)

    def active(self, run_id: str, expected: Expected | None = None) -> Run:
        """The run of this id, begun with what is `expected` of its scores if there is none. It counts as active now."""
        run = self._new.pop(run_id, None) or self._established.pop(run_id, None)
        if run is None:
            self._make_room()
            run = Run(run_id, expected)
        if run.num_groups < ESTABLISHED:
            self._new[run_id] = run
            return run
        while len(self._established) >= self._max_established:
            self._forget(self._established)
        self._established[run_id] = run
        return run

    def find(self, run_id: str) -> Run | None:
        """To look at it: whoever looks keeps no run alive."""
        return self._new.get(run_id) or self._established.get(run_id)

    def all(self) -> list[Run]:
        """The one active last first."""
        return sorted((*self._new.values(), *self._established.values()), key=lambda run: run.last_seen_s, reverse=True)

    def _make_room(self) -> None:
        while len(self) >= self._max_runs:
            self._forget(self._new or self._established)

    def _forget(self, place: dict[str, Run]) -> None:
        run_id = next(iter(place))
        del place[run_id]
        self._on_forgotten(run_id)
