"""T8: hundreds of clients that dribble heads or bodies, or never take their answers. Others are served as before."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass, field

from tests.load import slow_clients
from tests.load.arrivals import arrive, moments, quantile
from tests.load.asking import Asker
from tests.load.processes import Oracle, oracle
from tests.load.scenario import Report, Run, Scenario, settled
from tests.load.tally import Tally
from tests.load.wire import Pool

_RATE, _GROUP_SIZE = 40.0, 8
_MAX_RATIO = 1.5
_RAMP = 200.0  # of the slow a second, as slowhttptest is often run; all at once they would be a flood of connections, another attack


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the server bears them."""

    head_s: float
    body_s: float
    write_s: float

    @property
    def longest_s(self) -> float:
        return max(self.head_s, self.body_s, self.write_s)

    @property
    def budget_s(self) -> float:
        """One of the slow is shown out by one of these, or by two after each other."""
        return 2 * self.longest_s + 4

    def as_settings(self) -> dict[str, str]:
        return {"header_timeout_s": str(self.head_s), "body_timeout_s": str(self.body_s), "write_timeout_s": str(self.write_s)}


_SHORT, _LONG = Patience(2, 3, 3), Patience(8, 9, 9)  # in the long one all of the slow are there at once
_ENDLESS = {"header_timeout_s": "75", "body_timeout_s": "600", "write_timeout_s": "600", "min_body_rate": "0"}


@dataclass(slots=True)
class Wave:
    """The slow, who come at `_RAMP` a second, in a process of their own."""

    process: asyncio.subprocess.Process
    stays_s: dict[str, list[float]] = field(default_factory=dict)
    came_s: float = 0.0

    @classmethod
    async def ready(cls, port: int, num_each: int, patience: Patience) -> Wave:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.load.slow_clients", str(port), str(num_each), str(_RAMP), str(patience.budget_s),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 24,
        )  # fmt: skip
        wave = cls(process)
        await wave._line()
        return wave

    def begin(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.write(b"go\n")

    async def end(self) -> None:
        """Wait until the last is out or had its time."""
        told = json.loads(await self._line())
        self.stays_s, self.came_s = told["stays_s"], told["came_s"]
        await self.process.wait()

    async def _line(self) -> bytes:
        if self.process.stdout is None or not (line := await self.process.stdout.readline()):
            raise RuntimeError("the slow clients' process has ended")
        return line


async def run(run: Run) -> Report:
    report, tally = Report(), Tally()
    patience: Patience = run.pick(_SHORT, _LONG)
    settings = _ENDLESS if run.plant == "patient" else patience.as_settings()
    async with oracle("--a-ms", "5", "--b-ms", "0.5", core=run.core, **settings) as server:
        pool, asker = server.pool(), Asker(seed=31, num_pictures=8, forms=("base64",))
        seconds, num_waves = (1.0, 1) if run.plant else run.pick((3.0, 1), (20.0, 3))
        await _healthy(pool, asker, Tally(), 0.5)
        before = await settled(server)
        baseline = await _healthy(pool, asker, tally, seconds)
        num_each, attacked, waves = 20 if run.plant else run.pick(50, 500), list[float](), list[Wave]()
        for _ in range(num_waves):
            waves.append(await Wave.ready(server.port, num_each, patience))
            waves[-1].begin()
            attacked += await _healthy(pool, asker, tally, slow_clients.count(num_each) / _RAMP + patience.longest_s)
            await waves[-1].end()
        num_files = await _files_at_rest(server)
        after = await settled(server)
        pool.close()
    report.add_tally(tally)
    report.add_zero("healthy requests refused or failed", tally.num_sent - tally.requests["ok"], tally.num_sent)
    p99 = quantile(attacked, 0.99), quantile(baseline, 0.99)
    text = f"{p99[0] * 1000:.1f} / {p99[1] * 1000:.1f} ms = {p99[0] / p99[1]:.2f}, of {len(attacked)} and {len(baseline)}"
    report.add("healthy p99, under attack / baseline", text, p99[0] <= _MAX_RATIO * p99[1], is_timed=True)
    stays = {name: [stay for wave in waves for stay in wave.stays_s[name]] for name in waves[0].stays_s}
    num_out = sum(stay <= patience.budget_s for each in stays.values() for stay in each)
    longest = {name: f"{max(each, default=0.0):.1f} s" for name, each in stays.items()}
    num_slow = slow_clients.count(num_each) * num_waves
    report.add("slow clients, a wave came within", f"{num_slow:,} in {num_waves}, {max(wave.came_s for wave in waves):.1f} s")
    report.add("slow clients shown out", f"{num_out:,} of {num_slow:,}, at the latest after {longest}", num_out == num_slow)
    report.add("open files afterwards", num_files)
    refused = {name: after[name] - before.get(name, 0.0) for name in after if name.startswith("http_server_refused_connections_total")}
    report.add("connections ended, by reason", {name.split('"')[1]: int(count) for name, count in refused.items() if count})
    return report


async def _healthy(pool: Pool, asker: Asker, tally: Tally, seconds: float) -> list[float]:
    """Latencies of an open-loop load, from the intended moments."""
    took: list[float] = []

    async def begin(intended: float) -> None:
        await tally.ask(pool, asker.of(asker.unique_captions(_GROUP_SIZE), name="h"))
        took.append(time.monotonic() - intended)

    await arrive(moments(_RATE, seconds, seed=31), begin)
    return took


async def _files_at_rest(server: Oracle) -> int:
    """Open files of the server once the last of the slow is gone on both sides."""
    found = server.num_files
    for _ in range(40):
        await asyncio.sleep(0.05)
        if server.num_files == found:
            break
        found = server.num_files
    return found


SLOW = Scenario(
    "T8", "slow clients: heads, bodies and readers that never end, beside normal load", {"patient": "slow clients shown out"}, run
)
