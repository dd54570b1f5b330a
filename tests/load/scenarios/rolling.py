"""T5: a rolling restart to another model, behind a balancer. Nothing is lost, and no group of a caller who pins is scored by two models."""

from __future__ import annotations

import asyncio
import random
import signal
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field, replace

from tests.load.asking import Asked, AskedGroup, Asker
from tests.load.balancer import balancer
from tests.load.processes import Oracle, oracle
from tests.load.scenario import Report, Run, Scenario
from tests.load.tally import Tally
from tests.load.truth import fingerprint_of
from tests.load.wire import Answer, Lost, Pool, Unreached

_MODELS = ("A", "B")
_GROUP_SIZE, _NUM_WORKERS, _NOTICE_S, _DRAIN_S = 8, 16, 1.0, 10
_MAX_TRIES = 50  # of one group: a pin that never holds must end


@dataclass(slots=True)
class Rollout:
    """What was seen over all restarts."""

    tallies: dict[str, Tally] = field(default_factory=lambda: {fingerprint_of(model): Tally(model) for model in _MODELS})
    num_groups: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})  # by whether their worker pins
    num_mixed: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    num_asked: int = 0
    num_lost: int = 0
    num_begun_anew: int = 0  # groups, after 412
    num_unsigned: int = 0
    codes: list[int | None] = field(default_factory=list)
    is_over: bool = False

    @property
    def num_wrong(self) -> int:
        return sum(tally.num_wrong for tally in self.tallies.values())

    @property
    def num_right(self) -> int:
        return sum(tally.num_right for tally in self.tallies.values())


@dataclass(slots=True)
class Worker:
    """A rollout worker that asks for a group caption by caption, as many trainers do."""

    name: str
    is_pinning: bool
    pool: Pool
    asker: Asker
    rollout: Rollout

    async def work(self) -> None:
        while not self.rollout.is_over:
            signatures = await self._group()
            if signatures is not None:
                self.rollout.num_groups[self.is_pinning] += 1
                self.rollout.num_mixed[self.is_pinning] += len(set(signatures)) > 1

    async def _group(self) -> list[str] | None:
        """The fingerprints its captions were signed with; begun anew when the model changed under a pin."""
        whole = self.asker.of(self.asker.unique_captions(_GROUP_SIZE), name=self.name).groups[0]
        for _ in range(_MAX_TRIES):
            signatures = await self._captions(whole)
            if signatures is not None:
                return signatures
            self.rollout.num_begun_anew += 1
        return None

    async def _captions(self, whole: AskedGroup) -> list[str] | None:
        """None when a pin did not hold any more."""
        signatures: list[str] = []
        for number, caption in enumerate(whole.captions):
            pin = {"expect_fingerprint": signatures[0]} if signatures and self.is_pinning else {}
            asked = self.asker.of([caption], name=f"{self.name}-{number}", **pin)
            asked = replace(asked, groups=(replace(whole, captions=(caption,)),))
            answer = await self._ask(asked)
            if answer is None or answer.status == 412:
                return None
            signatures.append(answer.header("x-model-fingerprint") or "")
        return signatures

    async def _ask(self, asked: Asked) -> Answer | None:
        rollout = self.rollout
        rollout.num_asked += 1
        try:
            answer = await self.pool.ask(asked.as_bytes())
        except (Lost, Unreached):
            rollout.num_lost += 1
            return None
        tally = rollout.tallies.get(answer.header("x-model-fingerprint") or "")
        if tally is None:
            rollout.num_unsigned += 1
        else:
            tally.note(asked, answer)
        return answer


async def run(run: Run) -> Report:
    rollout, report, source = Rollout(), Report(), random.Random(23)
    num_swaps = 1 if run.plant else int(run.pick(2, 20))
    async with AsyncExitStack() as servers:
        running = await servers.enter_async_context(_server(run, 0))
        door = await servers.enter_async_context(balancer(running.port))
        pools = [Pool(door.port) for _ in range(_NUM_WORKERS)]
        asker = Asker(seed=23, num_pictures=8, forms=("base64",))
        pins = [run.plant != "no-pins" and number % 2 == 0 for number in range(_NUM_WORKERS)]
        workers = [Worker(f"r{number}", pins[number], pool, asker, rollout) for number, pool in enumerate(pools)]
        working = [asyncio.create_task(worker.work()) for worker in workers]
        for number in range(1, num_swaps + 1):
            await asyncio.sleep(source.uniform(0.3, 0.8))
            successor = await servers.enter_async_context(_server(run, number))
            door.target = successor.port  # it answers; from now on the old one gets no new connection
            running.signal(signal.SIGTERM)
            rollout.codes.append(await running.wait())
            running = successor
        await asyncio.sleep(0.3)
        rollout.is_over = True
        await asyncio.gather(*working)
        for pool in pools:
            pool.close()
    _judge(run, report, rollout, num_swaps)
    return report


def _server(run: Run, number: int) -> AbstractAsyncContextManager[Oracle]:
    """The next of the two models; planted, the second signs as the first."""
    model = _MODELS[number % 2]
    lie = ("--signs-as", _MODELS[0]) if run.plant == "false-signature" else ()
    return oracle("--a-ms", "5", "--model", model, *lie, core=run.core, drain_notice_s=str(_NOTICE_S), drain_s=str(_DRAIN_S))


def _judge(run: Run, report: Report, rollout: Rollout, num_swaps: int) -> None:
    pinned = run.plant != "no-pins"
    report.add_zero("requests lost or not taken in", rollout.num_lost, rollout.num_asked)
    report.add_zero("wrong items, each by the model that signed it", rollout.num_wrong, rollout.num_right + rollout.num_wrong)
    report.add_zero("groups of pinning workers scored by two models", rollout.num_mixed[pinned], rollout.num_groups[pinned])
    report.add("answers without a known signature", rollout.num_unsigned, rollout.num_unsigned == 0)
    report.add("groups begun anew because a pin told of the change", rollout.num_begun_anew, bool(run.plant) or rollout.num_begun_anew > 0)
    if pinned:
        report.add("without pins: groups scored by two models, visibly", f"{rollout.num_mixed[False]} of {rollout.num_groups[False]}")
    others = {code for tally in rollout.tallies.values() for code in tally.codes} - {"model_changed"}
    report.add("refusals other than of a pin", sorted(others) or 0, not others)
    report.add("exit codes other than 0", [code for code in rollout.codes if code] or 0, all(code == 0 for code in rollout.codes))
    report.add("restarts", num_swaps)
    for tally in rollout.tallies.values():
        report.shown += tally.shown


ROLLING = Scenario(
    "T5",
    "rolling restart to another model, groups of 8 asked for caption by caption",
    {"no-pins": "groups of pinning workers", "false-signature": "wrong items"},
    run,
)
