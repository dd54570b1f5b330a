"""Exact accounting: what was sent, what came of it, and whether the server counted the same."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tests.load.asking import Asked
from tests.load.wire import Answer, Lost, Pool, Unreached, get

_MAX_SHOWN = 5
_AT_REST = ("reward_queue_items", "reward_queue_tokens", "reward_active_items")  # gauges that are 0 when nothing is in flight
Samples = dict[str, float]


def outcome_of(status: int) -> str:
    """As the server names it."""
    if status < 400:
        return "ok"
    if status == 503:
        return "rejected"
    return "client_error" if status < 500 else "failed"


def bound(num_trials: int) -> str:
    """The 95 % upper bound behind "0 of N" (rule of three)."""
    return f"at most {3 / num_trials:.1e}" if num_trials else "no bound"


@dataclass(slots=True)
class Tally:
    """One a scenario; every request passes through `ask`."""

    model: str = ""
    requests: Counter[str] = field(default_factory=Counter)  # by outcome, "lost" and "unreached" among them
    items: Counter[str] = field(default_factory=Counter)  # scored, null, and those of requests without scores
    codes: Counter[str] = field(default_factory=Counter)
    num_right: int = 0
    num_wrong: int = 0
    shown: list[str] = field(default_factory=list)  # the first faults

    @property
    def num_sent(self) -> int:
        return self.requests.total() - self.requests["unreached"]

    @property
    def num_lost(self) -> int:
        return self.requests["lost"]

    async def ask(self, pool: Pool, asked: Asked, *, timeout_s: float = 60.0) -> Answer | None:
        """Send, check every item, count. None when no answer came."""
        try:
            answer = await pool.ask(asked.as_bytes(), timeout_s=timeout_s)
        except (Lost, Unreached) as error:
            self.requests["lost" if isinstance(error, Lost) else "unreached"] += 1
            self._show(f"{asked.request_id}: {error}")
            return None
        self.note(asked, answer)
        return answer

    def note(self, asked: Asked, answer: Answer) -> None:
        self.requests[outcome_of(answer.status)] += 1
        if answer.status != 200:
            self.codes[answer.error_code or ""] += 1
            self.items["without"] += asked.num_items
            return
        faults = asked.faults(answer, self.model)
        self.num_wrong += len(faults)
        self.num_right += asked.num_items - len(faults)
        data = answer.json()
        scores = [score for group in data.get("groups", [data]) for score in group["scores"]]
        self.items["null"] += scores.count(None)
        self.items["scored"] += len(scores) - scores.count(None)
        for fault in faults:
            self._show(fault)

    def note_hostile(self, answer: Answer | None) -> None:
        """A request that cannot be right, and holds no caption that would be counted."""
        self.requests["lost" if answer is None else outcome_of(answer.status)] += 1

    def _show(self, text: str) -> None:
        if len(self.shown) < _MAX_SHOWN:
            self.shown.append(text)


async def read_samples(pool: Pool) -> Samples:
    """The server's own counts. Raises Unreached, Lost."""
    answer = await pool.ask(get("/metrics"))
    lines = (line for line in answer.body.decode().splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def difference(before: Samples, after: Samples, tally: Tally) -> list[str]:
    """Where the server's counts of scoring requests and captions are not those of the tally; empty when they are equal."""
    requests, items = _grown(before, after, "reward_requests_total"), _grown(before, after, "reward_items_total")
    mine = {name: count for name, count in tally.requests.items() if count and name != "unreached"}
    faults = [] if requests == mine else [f"requests: counted {requests}, sent {mine}"]
    scored = {name: count for name, count in tally.items.items() if count and name != "without"}
    other = sum(count for name, count in items.items() if name not in ("scored", "null"))
    if {name: count for name, count in items.items() if name in ("scored", "null")} != scored or other != tally.items["without"]:
        faults.append(f"captions: counted {items}, sent {dict(tally.items)}")
    received = _grown(before, after, "reward_requests_received_total", "endpoint"), _grown(before, after, "reward_items_received_total")
    if [sum(each.values()) for each in received] != [tally.num_sent, tally.items.total()]:
        faults.append(f"received: counted {received}, sent {tally.num_sent} and {tally.items.total()}")
    gauges = {name: whole(after, name) for name in _AT_REST}
    return faults + [f"{name} is {value:g} at rest" for name, value in gauges.items() if value]


def whole(samples: Samples, name: str) -> float:
    """A metric over all its labels."""
    return sum(value for key, value in samples.items() if key.partition("{")[0] == name)


def grown(before: Samples, after: Samples, name: str, outcome: str = "") -> int:
    """By how much a counter grew, of one outcome or without labels."""
    return _grown(before, after, name).get(outcome, 0)


def _grown(before: Samples, after: Samples, name: str, label: str = "outcome") -> dict[str, int]:
    """Growth of a counter by one of its labels; zeros left out."""
    found: Counter[str] = Counter()
    for key, value in after.items():
        family, _, labels = key.partition("{")
        if family == name:
            wanted = [part.split("=", 1)[1].strip('"') for part in labels.rstrip("}").split(",") if part.startswith(f"{label}=")]
            found[wanted[0] if wanted else ""] += int(value - before.get(key, 0.0))
    return {key: count for key, count in found.items() if count}
