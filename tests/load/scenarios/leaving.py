"""T7: three clients in ten leave at a random moment. Their captions are not computed, nobody else notices, nothing stays behind."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.load.asking import Asked, Asker
from tests.load.processes import oracle
from tests.load.scenario import Report, Run, Scenario, settled
from tests.load.tally import Samples, Tally
from tests.load.wire import Connection, Pool

_NUM_WORKERS, _GROUP_SIZE, _LEAVING_SHARE = 128, 8, 0.3
_A_MS, _B_MS, _MAX_BATCH_TOKENS = 10.0, 1.0, 2048  # a batch has about eight of the groups: most of those who leave wait in the queue
_LONGEST_STAY_S = 1.0
_MAX_WASTED_SHARE, _MIN_SKIPPED_SHARE = 0.05, 0.95


@dataclass(slots=True)
class Storm:
    """Who stayed, who left and when."""

    tally: Tally = field(default_factory=Tally)
    num_begun: int = 0
    left: dict[str, float] = field(default_factory=dict)  # when, by caption; of requests that were sent whole
    num_left: dict[str, int] = field(default_factory=lambda: {"while sending": 0, "while waiting": 0})

    async def leave(self, port: int, asked: Asked, source: random.Random) -> None:
        """Send all of it or some, and go before or after the answer."""
        data, connection = asked.as_bytes(), await Connection.open(port)
        is_whole = source.random() < 0.75
        head = data.index(b"\r\n\r\n") + 4
        sent = data if is_whole else data[: source.randint(head, len(data) - 1)]
        stay_s = source.uniform(0, _LONGEST_STAY_S)
        connection.writer.write(sent)
        try:
            async with asyncio.timeout(stay_s):
                await connection.reader.readuntil(b"\r\n\r\n")  # an answer in time is one nobody needed; it counts as left all the same
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            pass
        connection.close()
        self.num_left["while waiting" if is_whole else "while sending"] += 1
        if is_whole:
            self.left |= dict.fromkeys(asked.groups[0].captions, time.monotonic())


async def run(run: Run) -> Report:
    storm, report, seconds = Storm(), Report(), 2.0 if run.plant else run.pick(2.5, 120.0)
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "journal"
        flags = ("--a-ms", str(_A_MS), "--b-ms", str(_B_MS), "--journal", str(journal), *run.server_plant("deaf"))
        async with oracle(*flags, core=run.core, max_batch_tokens=str(_MAX_BATCH_TOKENS), max_queue_tokens=str(1 << 22)) as server:
            pool, asker, source = server.pool(), Asker(seed=29, num_pictures=64, forms=("base64",)), random.Random(29)
            before, ends = await settled(server), time.monotonic() + seconds

            async def work(worker: int) -> None:
                while time.monotonic() < ends:
                    asked = asker.of(asker.unique_captions(_GROUP_SIZE), name=f"w{worker}")
                    storm.num_begun += 1
                    if source.random() < _LEAVING_SHARE:
                        await storm.leave(server.port, asked, source)
                    else:
                        await storm.tally.ask(pool, asked)

            await asyncio.gather(*(work(worker) for worker in range(_NUM_WORKERS)))
            after = await settled(server)
            await _see_that_it_is_well(pool, asker, report)
            pool.close()
        _judge(report, storm, before, after, _arrivals(journal))
    return report


async def _see_that_it_is_well(pool: Pool, asker: Asker, report: Report) -> None:
    last = Tally()
    await last.ask(pool, asker.of(asker.unique_captions(2), name="last"))
    report.add_zero("one last request: wrong items", last.num_wrong, last.num_right)


def _arrivals(journal: Path) -> dict[str, float]:
    """When each caption came to the device."""
    lines = (line.partition("\t") for line in journal.read_text(encoding="utf-8").splitlines())
    return {caption: float(when) for when, _, caption in lines}


def _judge(report: Report, storm: Storm, before: Samples, after: Samples, arrived: dict[str, float]) -> None:
    tally = storm.tally
    report.add_tally(tally)
    report.add_zero("others refused or failed", tally.num_sent - tally.requests["ok"], tally.num_sent)
    report.add("clients that left", dict(storm.num_left))
    never = sum(caption not in arrived for caption in storm.left)
    too_late = sum(caption in arrived and arrived[caption] > when for caption, when in storm.left.items())
    skipped = never / max(1, never + too_late)
    text = f"{skipped:.1%} of {never + too_late:,} captions whose client had gone before"
    report.add("skipped before the device", text, skipped >= _MIN_SKIPPED_SHARE)
    wasted = _growth(before, after, "reward_wasted_items_total")
    share = wasted / max(1, len(arrived))
    report.add("computed for nobody", f"{share:.1%} of {len(arrived):,} captions ({wasted:.0f})", share <= _MAX_WASTED_SHARE)
    received, ended = (_growth(before, after, f"reward_requests_{name}") for name in ("received_total", "total"))
    report.add(
        "requests begun, received, ended", f"{storm.num_begun:,} / {received:,.0f} / {ended:,.0f}", storm.num_begun == received == ended
    )
    resting = {name: value for name, value in after.items() if _is_held(name) and value}
    report.add("gauges that are not back at 0", resting or 0, not resting)


def _is_held(name: str) -> bool:
    held = ("reward_queue_items", "reward_queue_tokens", "reward_active_items", "http_server_body_bytes", "http_server_active_requests")
    return name.startswith(held) and '"/metrics"' not in name


def _growth(before: Samples, after: Samples, family: str) -> float:
    """Of a counter over all its labels."""
    return sum(value - before.get(name, 0.0) for name, value in after.items() if name.partition("{")[0] == family)


LEAVING = Scenario("T7", "disconnect storm: 3 of 10 clients leave while they send or wait", {"deaf": "skipped before the device"}, run)
