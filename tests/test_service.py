"""From a request to its scores, without HTTP: order, faults by place, caches, deadlines, and nothing left behind."""

from __future__ import annotations

import asyncio
import base64
import gc
import sys
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.artifacts import RewardModelConfig
from app.caches import ByteBoundedCache
from app.contracts import EncodedGroup, EncodedImage, Scores
from app.errors import (
    ApiError,
    DeadlineExceeded,
    Draining,
    ImageRejected,
    ImageTooLarge,
    ImageUnknown,
    InvalidRequest,
    ItemRejected,
    NonfiniteScore,
    Overloaded,
    ScoringFailed,
    TooManyTokens,
    UrlNotAllowed,
)
from app.images import ImageLimits, image_id
from app.monitors import RunMonitors
from app.service import GroupRequest, GroupResult, ScoringService, Timing
from tests.fakes import MAX_CAPTION_TOKENS, UNSCORABLE, expected_scores, picture
from tests.loop_fakes import NAN, PATIENCE_S, RAISE, Bench, FaultyScorer, GatedScorer, HeldEncoder, batching, captions_of, turns, until

pytestmark = pytest.mark.anyio
LIMITS = ImageLimits(max_bytes=1 << 20, max_pixels=1_000_000, min_side=16, max_aspect=100, formats=("PNG", "JPEG"))
CARTOON = picture(64, 48, seed=0)
OTHER = picture(64, 48, seed=1)
TOO_LONG = "x" * (MAX_CAPTION_TOKENS + 1)
PREFIX = 4 + len("Say something funny.") + 1  # tokens: 64 x 48 pixels, the default prompt, its end


@dataclass
class Stack:
    """A service over fakes, with everything a test looks at."""

    service: ScoringService
    encoder: HeldEncoder
    bench: Bench
    pool: ThreadPoolExecutor
    pixels: ByteBoundedCache[EncodedImage]
    corrected: list[tuple[EncodedImage, EncodedImage]]  # pictures that were found wrong, and the right ones

    async def score(self, *requests: GroupRequest, timeout_s: float = PATIENCE_S, **options: object) -> list[GroupResult]:
        return await self.service.score(requests, timeout_s=timeout_s, **options)  # type: ignore[arg-type]

    def started(self, *requests: GroupRequest, timeout_s: float = PATIENCE_S) -> asyncio.Task[list[GroupResult]]:
        return asyncio.create_task(self.score(*requests, timeout_s=timeout_s))

    async def encode_threads_idle(self) -> None:
        """Every thread of the pool has come back from what it did."""
        barrier = threading.Barrier(2)
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(self.pool, barrier.wait, PATIENCE_S) for _ in range(2)))

    def items(self, outcome: str) -> float:
        return self.bench.sample("reward_items_total", outcome=outcome)

    def rejected(self, code: str) -> float:
        return self.bench.sample("reward_rejected_total", code=code)


@asynccontextmanager
async def stack_of(
    scorer: FaultyScorer | None = None,
    *,
    encoder: HeldEncoder | None = None,
    max_batch_tokens: int = 1000,
    max_items: int = 1000,
    max_tokens: int = 100_000,
    cache_bytes: int = 1 << 20,
    store_bytes: int | None = None,
    audit_every: int = 0,
    **config: str,
) -> AsyncIterator[Stack]:
    encoder = encoder or HeldEncoder()
    corrected: list[tuple[EncodedImage, EncodedImage]] = []
    running = batching(scorer or FaultyScorer(), max_batch_tokens=max_batch_tokens, max_items=max_items, max_tokens=max_tokens)
    with ThreadPoolExecutor(2, thread_name_prefix="encode") as pool:
        async with running as bench:
            service = ScoringService(
                config=RewardModelConfig(base_model_name="fake", score_head_shape=(1, 8), **config),
                encoder=encoder,
                batcher=bench.batcher,
                admission=bench.admission,
                limits=LIMITS,
                image_store=ByteBoundedCache[bytes]("images", cache_bytes if store_bytes is None else store_bytes, len, bench.metrics),
                pixel_cache=(pixels := ByteBoundedCache[EncodedImage]("pixels", cache_bytes, lambda image: image.num_bytes, bench.metrics)),
                pool=pool,
                max_batch_tokens=max_batch_tokens,
                metrics=bench.metrics,
                monitors=RunMonitors(8, None, bench.metrics),
                audit_every=audit_every,
                correct=lambda wrong, right: corrected.append((wrong, right)),
            )
            yield Stack(service, encoder, bench, pool, pixels, corrected)
            await until(lambda: bench.queued == (0, 0))  # whatever the test did, nothing stays reserved


def asking(*captions: str, image: bytes | str | None = CARTOON, **fields: str) -> GroupRequest:
    return GroupRequest(captions, image=image, **fields)


# Scores in order


async def test_scores_come_in_the_order_of_the_captions() -> None:
    captions = [f"caption {number}" for number in range(30)]
    async with stack_of() as stack:
        (result,) = await stack.score(asking(*captions))
    assert list(result.scores) == expected_scores(CARTOON, captions)
    assert result.image_id == image_id(CARTOON)
    assert result.errors == (None,) * 30


async def test_groups_come_in_the_order_of_the_request() -> None:
    captions = [["a", "b"], ["c"], ["b", "a"], ["a"]]
    images = [CARTOON, OTHER, CARTOON, OTHER]
    async with stack_of() as stack:
        results = await stack.score(*(asking(*texts, image=image) for texts, image in zip(captions, images, strict=True)))
    assert [list(result.scores) for result in results] == [expected_scores(i, c) for i, c in zip(images, captions, strict=True)]
    assert [result.image_id for result in results] == [image_id(image) for image in images]


async def test_the_same_request_twice_is_equal_to_the_last_bit() -> None:
    async with stack_of() as stack:
        first, again = [await stack.score(asking("a", "b", "a")) for _ in range(2)]
        assert first == again
        assert first[0].scores[0] == first[0].scores[2]


async def test_the_prompt_and_the_image_matter() -> None:
    async with stack_of() as stack:
        results = await stack.score(asking("a"), asking("a", prompt="Be kind."), asking("a", image=OTHER))
    assert len({result.scores for result in results}) == 3
    assert list(results[1].scores) == expected_scores(CARTOON, ["a"], "Be kind.")


async def test_a_large_group_is_split_over_batches_and_put_back_in_order() -> None:
    """40 captions of 11 tokens on a prefix of 25: batches of 100 hold (100 - 25) // 11 = 6 captions."""
    captions = [f"caption {number:02}" for number in range(40)]
    scorer = FaultyScorer()
    async with stack_of(scorer, max_batch_tokens=100) as stack:
        (result,) = await stack.score(asking(*captions))
    assert list(result.scores) == expected_scores(CARTOON, captions)
    assert [sum(len(group.rows) for group in call) for call in scorer.calls] == [6] * 6 + [4]
    assert result.num_tokens == 40 * (PREFIX + 11)
    assert result.num_computed_tokens == 7 * PREFIX + 40 * 11


class CompanyScorer(FaultyScorer):
    """Its scores depend on the batch, as those in bfloat16 do."""

    def score(self, prepared: tuple[EncodedGroup, ...]) -> list[Scores]:
        number = len(self.calls)
        return [replace(each, values=tuple(value + number for value in each.values)) for each in super().score(prepared)]


@pytest.mark.parametrize("max_batch_tokens", [PREFIX + 8, 1000], ids=["a batch a caption", "one batch"])
async def test_equal_captions_of_a_group_have_equal_bits_in_whatever_pieces_it_is_cut(max_batch_tokens: int) -> None:
    """X10. A row is computed once, and what it would cost alone is counted for each."""
    captions, scorer = ("x1", "x2", "x1", "y3", "x2", "x1"), CompanyScorer()
    async with stack_of(scorer, max_batch_tokens=max_batch_tokens) as stack:
        (found,) = await stack.score(asking(*captions))
    scores = dict(zip(captions, found.scores, strict=True))
    assert found.scores == tuple(scores[caption] for caption in captions)
    assert len(set(scores.values())) == 3
    assert sum(len(group.rows) for batch in scorer.calls for group in batch) == 3
    assert found.num_tokens == len(captions) * (PREFIX + len("x1") + 1)
    assert stack.bench.sample("reward_tokens_total", kind="requested") == found.num_tokens


async def test_concurrent_single_captions_of_one_image_are_one_batch() -> None:
    """64 requests that come while the device is busy: decoded once, one call."""
    captions = [f"caption {number}" for number in range(64)]
    scorer = GatedScorer()
    async with stack_of(scorer, max_batch_tokens=10_000) as stack:
        first = stack.started(asking("first", image=OTHER))
        await scorer.entered()
        tasks = [stack.started(asking(caption)) for caption in captions]
        await until(lambda: len(stack.encoder.encoded) == 65)
        await stack.encode_threads_idle()
        await turns()
        scorer.let_go(2)
        results = await asyncio.gather(*tasks)
        await first
        assert stack.encoder.decoded == [image_id(OTHER), image_id(CARTOON)]
    assert [result.scores[0] for (result,) in results] == expected_scores(CARTOON, captions)
    assert len(scorer.calls) == 2


async def test_a_text_only_model_scores_without_an_image() -> None:
    async with stack_of(encoder=HeldEncoder(takes_images=False)) as stack:
        (result,) = await stack.score(asking("a", "b", image=None))
        assert list(result.scores) == expected_scores(None, ["a", "b"])
        assert result.image_id is None
        with pytest.raises(InvalidRequest, match="takes no image"):
            await stack.score(asking("a"))


async def test_the_spread_and_the_captions_are_counted() -> None:
    async with stack_of() as stack:
        await stack.score(asking("a", TOO_LONG, "b"), on_item_error="null")
        assert (stack.items("scored"), stack.items("null"), stack.items("failed")) == (2, 1, 0)
        assert stack.bench.sample("reward_score_count") == 2
        assert stack.bench.sample("reward_group_score_stddev_count") == 1


async def test_times_are_noted_by_stage() -> None:
    timing = Timing()
    async with stack_of() as stack:
        await stack.score(asking("a"), timing=timing)
        stages = {stage: stack.bench.sample("reward_stage_duration_seconds_count", stage=stage) for stage in timing.seconds}
    assert stages == {"decode": 1, "encode": 1, "queue": 1, "forward": 1}


# Captions that cannot be scored


async def test_by_default_one_bad_caption_fails_the_request_and_is_named() -> None:
    scorer = FaultyScorer()
    async with stack_of(scorer) as stack:
        good, bad = asking("a", field="groups[0]"), asking("a", TOO_LONG, UNSCORABLE, field="groups[1]")
        with pytest.raises(ItemRejected) as refused:
            await stack.score(good, bad)
        assert stack.items("client_error") == 4
    assert (refused.value.code, refused.value.field, refused.value.index) == ("caption_too_long", "groups[1].captions[1]", 1)
    assert scorer.calls == []


async def test_outside_groups_the_place_has_no_group() -> None:
    async with stack_of() as stack:
        with pytest.raises(ItemRejected) as refused:
            await stack.score(asking("a", "b", UNSCORABLE))
    assert (refused.value.field, refused.value.index) == ("captions[2]", 2)


async def test_null_keeps_the_others_in_place() -> None:
    captions = [TOO_LONG, "a", UNSCORABLE, "b", TOO_LONG]
    async with stack_of() as stack:
        (result,) = await stack.score(asking(*captions), on_item_error="null")
    score_a, score_b = expected_scores(CARTOON, ["a", "b"])
    assert result.scores == (None, score_a, None, score_b, None)
    assert [error and error.code for error in result.errors] == ["caption_too_long", None, "caption_rejected", None, "caption_too_long"]


async def test_null_keeps_places_when_a_group_is_split() -> None:
    captions = [TOO_LONG if number % 3 == 0 else f"caption {number:02}" for number in range(20)]
    async with stack_of(max_batch_tokens=100) as stack:
        (result,) = await stack.score(asking(*captions), on_item_error="null")
    scores = iter(expected_scores(CARTOON, [caption for caption in captions if caption != TOO_LONG]))
    assert result.scores == tuple(None if caption == TOO_LONG else next(scores) for caption in captions)


async def test_a_group_of_bad_captions_alone_asks_the_device_nothing() -> None:
    scorer = FaultyScorer()
    async with stack_of(scorer) as stack:
        (result,) = await stack.score(asking(TOO_LONG, TOO_LONG), on_item_error="null", explain=True)
    assert result.scores == (None, None)
    assert result.explanation is None
    assert (result.num_tokens, scorer.calls) == (0, [])


@pytest.mark.parametrize(("caption", "kind"), [(NAN, NonfiniteScore), (RAISE, ScoringFailed)])
async def test_a_fault_on_the_device_fails_its_request_and_no_other(caption: str, kind: type[ApiError]) -> None:
    async with stack_of() as stack:
        sound, faulty = stack.started(asking("a", "b")), stack.started(asking("a"), asking("b", caption))
        with pytest.raises(kind):
            await faulty
        assert list((await sound)[0].scores) == expected_scores(CARTOON, ["a", "b"])
        assert (stack.items("scored"), stack.items("failed")) == (2, 3)


async def test_a_fault_never_becomes_null() -> None:
    async with stack_of() as stack:
        with pytest.raises(NonfiniteScore):
            await stack.score(asking("a", NAN), on_item_error="null")


# Prompts, images, sizes


async def test_a_fixed_prompt_allows_no_other() -> None:
    async with stack_of(prompt_policy="fixed", default_prompt="Say something funny.") as stack:
        assert await stack.score(asking("a")) == await stack.score(asking("a", prompt="Say something funny."))
        with pytest.raises(InvalidRequest) as refused:
            await stack.score(asking("a", prompt="Be kind.", field="groups[0]"))
        assert (refused.value.code, refused.value.field) == ("prompt_not_allowed", "groups[0].prompt")
        assert len(stack.encoder.encoded) == 2


@pytest.mark.parametrize(
    ("image", "kind", "code"),
    [
        (None, InvalidRequest, "invalid_request"),
        ("sha256:" + "0" * 64, ImageUnknown, "image_unknown"),
        ("not base64!", ImageRejected, "bad_base64"),
        ("https://example.org/a.png", UrlNotAllowed, "url_not_allowed"),
        (b"not a picture", ImageRejected, "image_decode_failed"),
        (CARTOON[:-40], ImageRejected, "image_decode_failed"),
    ],
)
async def test_an_image_fault_names_its_group_and_leaves_nothing_behind(image: bytes | str | None, kind: type[ApiError], code: str) -> None:
    scorer = FaultyScorer()
    async with stack_of(scorer) as stack:
        with pytest.raises(kind) as refused:
            await stack.score(asking("a", field="groups[0]"), asking("b", image=image, field="groups[1]"))
        assert (refused.value.code, refused.value.field) == (code, "groups[1].image")
        assert stack.bench.queued == (0, 0)
        assert stack.items("client_error") == 2
        assert len(await stack.score(asking("a"))) == 1
    assert len(scorer.calls) == 1


@pytest.mark.parametrize("form", ["base64", "data URL", "id"])
async def test_every_way_to_name_an_image_is_the_same_image(form: str) -> None:
    text = base64.b64encode(CARTOON).decode()
    forms = {"base64": text, "data URL": f"data:image/png;base64,{text}", "id": image_id(CARTOON)}
    async with stack_of() as stack:
        await stack.service.add_image(CARTOON, timeout_s=PATIENCE_S)
        (result,) = await stack.score(asking("a", image=forms[form]))
        assert stack.encoder.decoded == [image_id(CARTOON)]
    assert list(result.scores) == expected_scores(CARTOON, ["a"])


async def test_a_known_image_is_neither_decoded_nor_resized_again() -> None:
    async with stack_of() as stack:
        for caption in "abc":
            await stack.score(asking(caption), asking(caption, image=OTHER))
        assert sorted(stack.encoder.decoded) == sorted([image_id(CARTOON), image_id(OTHER)])
        assert stack.bench.sample("reward_cache_lookups_total", cache="pixels", result="hit") == 4
        assert stack.bench.sample("reward_cache_lookups_total", cache="pixels", result="miss") == 2


async def test_without_caches_scores_are_the_same() -> None:
    async with stack_of(cache_bytes=0) as stack:
        (first,), (again,) = [await stack.score(asking("a")) for _ in range(2)]
        assert first == again
        assert len(stack.encoder.decoded) == 2
        with pytest.raises(ImageUnknown):
            await stack.score(asking("a", image=image_id(CARTOON)))


async def test_an_image_sent_with_captions_can_be_named_afterwards() -> None:
    async with stack_of() as stack:
        (first,) = await stack.score(asking("a"))
        assert first.image_id is not None
        assert await stack.score(asking("a", image=first.image_id)) == [first]


async def test_adding_an_image_says_what_it_is() -> None:
    async with stack_of() as stack:
        stored = await stack.service.add_image(CARTOON, timeout_s=PATIENCE_S)
        assert (stored.image_id, stored.width, stored.height, stored.num_tokens) == (image_id(CARTOON), 64, 48, 4)
        assert await stack.service.add_image(CARTOON, timeout_s=PATIENCE_S) == stored
        assert len(stack.encoder.decoded) == 1
        with pytest.raises(ImageRejected):
            await stack.service.add_image(b"not a picture", timeout_s=PATIENCE_S)


async def test_an_image_that_cannot_be_kept_is_not_confirmed() -> None:
    """Its id would be unknown to every request that names it, for ever."""
    async with stack_of(cache_bytes=0) as stack:
        with pytest.raises(ImageTooLarge) as caught:
            await stack.service.add_image(CARTOON, timeout_s=PATIENCE_S)
        assert (caught.value.status, caught.value.code) == (413, "image_not_kept")
    async with stack_of(store_bytes=0) as stack:  # its pixels are, and they are all that scoring needs
        stored = await stack.service.add_image(CARTOON, timeout_s=PATIENCE_S)
        assert (await stack.score(asking("a", image=stored.image_id)))[0].scores


@pytest.mark.parametrize("store_bytes", [0, None], ids=["bytes in the request", "bytes in the store"])
async def test_wrong_pixels_are_found_and_told(store_bytes: int | None) -> None:
    async with stack_of(store_bytes=store_bytes, audit_every=2) as stack:
        (first,) = await stack.score(asking("a"))
        right = stack.pixels.get(image_id(CARTOON))
        assert right is not None
        wrong = replace(right, patches=right.patches + 1)
        stack.pixels.put(right.image_id, wrong)
        named: bytes | str = CARTOON if store_bytes == 0 else right.image_id
        for _ in range(2):
            found = await stack.score(asking("a", image=named))
        assert found == [first]
        ((told, corrected),) = stack.corrected
        assert told is wrong
        assert np.array_equal(corrected.patches, right.patches)
        assert stack.bench.sample("reward_cache_audits_total", cache="pixels") == 1
        assert stack.bench.sample("reward_cache_audit_mismatches_total", cache="pixels") == 1


async def test_a_failed_image_is_not_kept() -> None:
    broken = CARTOON[:-40]
    async with stack_of() as stack:
        for _ in range(2):
            with pytest.raises(ImageRejected):
                await stack.service.add_image(broken, timeout_s=PATIENCE_S)
        with pytest.raises(ImageUnknown):
            await stack.score(asking("a", image=image_id(broken)))


async def test_a_caption_that_fits_no_batch_is_refused_before_the_queue() -> None:
    scorer = FaultyScorer()
    async with stack_of(scorer, max_batch_tokens=PREFIX + 10) as stack:
        await stack.score(asking("x" * 9))
        with pytest.raises(TooManyTokens) as refused:
            await stack.score(asking("x", "x" * 10, field="groups[0]"))
        assert refused.value.field == "groups[0]"
    assert len(scorer.calls) == 1


async def test_a_request_larger_than_the_whole_queue_is_told_so() -> None:
    async with stack_of(max_tokens=100) as stack:
        with pytest.raises(TooManyTokens):
            await stack.score(*(asking("x" * 9) for _ in range(3)))
        assert len(await stack.score(*(asking("x" * 9) for _ in range(2)))) == 2


async def test_explaining_happens_off_the_event_loop() -> None:
    async with stack_of() as stack:
        (result,) = await stack.score(asking("a", "bb"), explain=True)
        assert result.explanation is not None
        assert result.explanation.prefix_tokens == PREFIX
        assert result.explanation.tokens == [PREFIX + 2, PREFIX + 3]
        assert "explain" in stack.encoder.reached
        assert all(name.startswith("encode") for name in stack.encoder.threads)
        (plain,) = await stack.score(asking("a", "bb"))
        assert plain.explanation is None


# Too much, too late, gone


async def test_exactly_what_exceeds_the_queue_is_refused() -> None:
    scorer = GatedScorer()
    async with stack_of(scorer, max_items=10) as stack:
        tasks = [stack.started(asking("a", "b")) for _ in range(8)]
        await scorer.entered()
        scorer.let_go(8)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [outcome for outcome in found if isinstance(outcome, Overloaded)]
        assert (len(refused), len(found) - len(refused)) == (3, 5)
        assert all(error.retryable and error.field is None and int(error.headers["Retry-After"]) >= 1 for error in refused)
        assert stack.rejected("overloaded") == 3
        assert (stack.items("scored"), stack.items("rejected"), stack.items("failed")) == (10, 6, 0)
        assert stack.bench.queued == (0, 0)


async def test_tokens_of_others_refuse_without_blaming_a_field() -> None:
    scorer = GatedScorer()
    async with stack_of(scorer, max_tokens=PREFIX + 20) as stack:
        first = stack.started(asking("x" * 9))
        await scorer.entered()
        with pytest.raises(Overloaded) as refused:
            await stack.score(asking("x" * 9, field="groups[0]"))
        assert refused.value.field is None
        scorer.let_go()
        await first


async def test_a_request_past_its_deadline_is_given_up_and_never_computed() -> None:
    """O7, G11. How long a queue will take depends on what its requests can share, so nobody is refused by a guess at it: when a device
    becomes slow, those it cannot serve in time are told so at their deadline at the latest, and their work is not done."""
    scorer = GatedScorer()
    async with stack_of(scorer) as stack:
        first = stack.started(asking("a"))
        await scorer.entered()
        with pytest.raises(DeadlineExceeded):
            await stack.score(asking("b"), asking("c", image=OTHER), timeout_s=0.02)
        assert stack.rejected("deadline_exceeded") == 1
        assert stack.bench.sample("reward_queue_items") == 1
        scorer.let_go()
        await first
    assert len(scorer.calls) == 1


async def test_no_time_at_all_is_no_work() -> None:
    scorer = FaultyScorer()
    async with stack_of(scorer) as stack:
        with pytest.raises(DeadlineExceeded):
            await stack.score(asking("a"), timeout_s=0)
        assert stack.bench.queued == (0, 0)
    assert scorer.calls == []


async def test_a_deadline_while_encoding_leaves_nothing_reserved() -> None:
    """The thread goes on after its request was given up; it finds the reservation closed and decodes nothing."""
    async with stack_of() as stack:
        held = stack.encoder.hold("image_tokens")
        with pytest.raises(DeadlineExceeded):
            await stack.score(asking("a"), timeout_s=0.02)
        assert stack.bench.queued == (0, 0)
        held.set()
        await stack.encode_threads_idle()
        assert stack.bench.queued == (0, 0)
        assert stack.encoder.decoded == []


@pytest.mark.parametrize("method", ["image_tokens", "encode_image", "encode"])
async def test_cancelled_while_encoding(method: str) -> None:
    scorer = FaultyScorer()
    async with stack_of(scorer) as stack:
        held = stack.encoder.hold(method)
        task = stack.started(asking("a"), asking("b", image=OTHER))
        await until(lambda: stack.encoder.reached.count(method) == 2)
        await cancelled(task)
        assert stack.bench.queued == (0, 0)
        held.set()
        await stack.encode_threads_idle()
        await turns()
        assert stack.bench.queued == (0, 0)
        assert scorer.calls == []
        assert list((await stack.score(asking("a")))[0].scores) == expected_scores(CARTOON, ["a"])


async def test_cancelled_before_its_turn_on_the_encode_threads() -> None:
    """Two threads are held; the third request never reaches one."""
    async with stack_of() as stack:
        held = stack.encoder.hold("encode")
        busy = [stack.started(asking("a")), stack.started(asking("b", image=OTHER))]
        await until(lambda: len(stack.encoder.encoded) == 2)
        data = bytes(bytearray(CARTOON))
        num_references = sys.getrefcount(data)
        waiting = stack.started(asking("c", image=data))
        await turns()
        await cancelled(waiting)
        assert stack.bench.sample("reward_queue_items") == 2
        await turns()
        gc.collect()
        assert sys.getrefcount(data) == num_references  # the threads' queue holds no picture of whom nobody waits for
        held.set()
        await asyncio.gather(*busy)
        assert [group.captions for group in stack.encoder.encoded if group.captions == ("c",)] == []


async def test_cancelled_while_waiting_for_the_device() -> None:
    scorer = GatedScorer()
    async with stack_of(scorer) as stack:
        first, second = stack.started(asking("a")), None
        await scorer.entered()
        second = stack.started(asking("b"), asking("c", image=OTHER))
        await until(lambda: len(stack.encoder.encoded) == 3)
        await stack.encode_threads_idle()
        await cancelled(second)
        assert stack.bench.sample("reward_queue_items") == 1
        scorer.let_go()
        await first
    assert len(scorer.calls) == 1


async def test_cancelled_while_on_the_device() -> None:
    scorer = GatedScorer()
    async with stack_of(scorer) as stack:
        task = stack.started(asking("a"))
        await scorer.entered()
        await cancelled(task)
        assert stack.bench.queued == (0, 0)
        scorer.let_go(2)
        assert list((await stack.score(asking("b")))[0].scores) == expected_scores(CARTOON, ["b"])
        assert (stack.items("cancelled"), stack.items("failed")) == (1, 0)


async def test_cancelled_before_it_began() -> None:
    async with stack_of() as stack:
        await cancelled(stack.started(asking("a")))
        assert stack.encoder.reached == []


async def cancelled(task: asyncio.Task[list[GroupResult]]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_request_that_fails_gives_up_what_still_waits() -> None:
    """Three batches: the first fails; the second is on the device by then or dropped, the third is never computed."""
    scorer = GatedScorer()
    async with stack_of(scorer, max_batch_tokens=PREFIX + 10) as stack:
        task = stack.started(asking(RAISE), asking("b", image=OTHER), asking("c", prompt="Be kind."))
        await scorer.entered()
        scorer.let_go()
        with pytest.raises(ScoringFailed):
            await task
        assert stack.bench.queued == (0, 0)
        scorer.let_go(2)
    assert [captions_of(call) for call in scorer.calls] in ([[RAISE]], [[RAISE], ["b"]])


async def test_while_stopping_new_requests_are_told_to_go_elsewhere() -> None:
    scorer = FaultyScorer()
    async with stack_of(scorer) as stack:
        await stack.bench.batcher.__aexit__(None, None, None)
        with pytest.raises(Draining):
            await stack.score(asking("a"), asking("b", image=OTHER))
        assert stack.rejected("draining") == 1
        assert stack.bench.queued == (0, 0)
    assert scorer.calls == []


async def test_a_crash_in_the_encoder_is_the_callers_error_and_leaks_nothing() -> None:
    class Crashing(HeldEncoder):
        def image_tokens(self, width: int, height: int) -> int:
            raise ZeroDivisionError

    async with stack_of(encoder=Crashing()) as stack:
        with pytest.raises(ZeroDivisionError):
            await stack.score(asking("a"), asking("b", image=OTHER))
        assert stack.bench.queued == (0, 0)
        assert stack.items("failed") == 2


# Counting

OUTCOMES = ("scored", "null", "client_error", "rejected", "failed", "cancelled")
ENDINGS: dict[str, tuple[GroupRequest, str]] = {
    "scored": (asking("a", "b"), "fail"),
    "null": (asking("a", TOO_LONG), "null"),
    "refused caption": (asking("a", TOO_LONG), "fail"),
    "fault": (asking(NAN, "b"), "fail"),
    "no image": (asking("a", image=b"junk"), "null"),
    "unknown image": (asking("a", image="sha256:" + "1" * 64), "fail"),
    "too many": (asking(*("a",) * 1001), "fail"),
    "late": (asking("a", "b", "c"), "fail"),
    "left": (asking("a", "b", "c", "d"), "fail"),
}


def assert_books_balance(stack: Stack) -> None:
    received = stack.bench.sample("reward_items_received_total")
    assert received == sum(map(stack.items, OUTCOMES)) + stack.bench.sample("reward_active_items")


async def test_every_caption_is_counted_once_by_what_became_of_its_request() -> None:
    async with stack_of() as stack:
        for ending, (request, policy) in ENDINGS.items():
            timeout_s = 0 if ending == "late" else PATIENCE_S
            task = asyncio.create_task(stack.score(request, on_item_error=policy, timeout_s=timeout_s))
            await asyncio.sleep(0)
            assert stack.bench.sample("reward_active_items") == (0 if ending == "too many" else len(request.captions))
            if ending == "left":
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert_books_balance(stack)
        assert stack.bench.sample("reward_items_received_total") == sum(len(request.captions) for request, _ in ENDINGS.values())
        found = {outcome: stack.items(outcome) for outcome in OUTCOMES}
        assert found == {"scored": 3, "null": 1, "client_error": 4, "rejected": 1004, "failed": 2, "cancelled": 4}
        assert stack.bench.sample("reward_active_items") == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(ENDINGS)), st.integers(0, 6)), max_size=12))
def test_the_books_balance_at_every_moment(arrivals: list[tuple[str, int]]) -> None:
    """Requests of every ending beside each other, some cancelled after a few turns of the event loop."""

    async def live() -> None:
        async with stack_of(max_items=1000) as stack:
            tasks = []
            for ending, num_turns in arrivals:
                request, policy = ENDINGS[ending]
                timeout_s = 0.001 if ending == "late" else PATIENCE_S
                tasks.append(asyncio.create_task(stack.score(request, on_item_error=policy, timeout_s=timeout_s)))
                for _ in range(num_turns):
                    await asyncio.sleep(0)
                    assert_books_balance(stack)
                if ending == "left":
                    tasks[-1].cancel()
            for task in asyncio.as_completed(tasks):
                await asyncio.gather(task, return_exceptions=True)
                assert_books_balance(stack)
            assert stack.bench.sample("reward_active_items") == 0

    asyncio.run(live())


async def test_golden_captions_are_nobodys() -> None:
    async with stack_of() as stack:
        results = await stack.score(asking("a", "b"), counted=False)
        assert list(results[0].scores) == expected_scores(CARTOON, ["a", "b"])
        with pytest.raises(NonfiniteScore):
            await stack.score(asking("a", NAN), counted=False)
        assert sum(map(stack.items, OUTCOMES)) == stack.bench.sample("reward_items_received_total") == 0
        assert stack.bench.sample("reward_score_count") == stack.bench.sample("reward_group_score_stddev_count") == 0


async def test_what_is_refused_before_scores_are_asked_for_was_received() -> None:
    async with stack_of() as stack:
        with stack.service.refusing(3):
            assert_books_balance(stack)
        assert stack.bench.sample("reward_items_received_total") == 0
        with pytest.raises(InvalidRequest), stack.service.refusing(3):
            raise InvalidRequest("another model")
        assert (stack.items("client_error"), stack.bench.sample("reward_items_received_total")) == (3, 3)


# Images sent alone


async def test_an_image_waits_for_an_encode_thread_within_its_deadline_and_counts_as_one_caption() -> None:
    async with stack_of() as stack:
        held = stack.encoder.hold("encode_image")
        busy = [stack.started(asking("a")), stack.started(asking("b", image=OTHER))]
        await until(lambda: stack.encoder.reached.count("encode_image") == 2)
        waiting = asyncio.create_task(stack.service.add_image(picture(seed=2), timeout_s=PATIENCE_S))
        await turns()
        assert stack.bench.sample("reward_queue_items") == 3
        with pytest.raises(DeadlineExceeded):
            await stack.service.add_image(picture(seed=3), timeout_s=0.02)
        assert stack.rejected("deadline_exceeded") == 1
        held.set()
        await asyncio.gather(*busy)
        assert (await waiting).image_id == image_id(picture(seed=2))
        assert image_id(picture(seed=3)) not in stack.encoder.decoded  # given up before a thread had it


async def test_an_image_is_refused_when_the_queue_is_full() -> None:
    scorer = GatedScorer()
    async with stack_of(scorer, max_items=2) as stack:
        first = stack.started(asking("a", "b"))
        await scorer.entered()
        with pytest.raises(Overloaded):
            await stack.service.add_image(OTHER, timeout_s=PATIENCE_S)
        assert stack.rejected("overloaded") == 1
        scorer.let_go()
        await first
        assert (await stack.service.add_image(OTHER, timeout_s=PATIENCE_S)).width == 64


async def test_a_client_that_leaves_before_its_image_is_decoded_takes_no_place() -> None:
    async with stack_of() as stack:
        held = stack.encoder.hold("encode_image")
        task = asyncio.create_task(stack.service.add_image(CARTOON, timeout_s=PATIENCE_S))
        await until(lambda: "encode_image" in stack.encoder.reached)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert stack.bench.queued == (0, 0)
        held.set()
        await stack.encode_threads_idle()
        assert stack.bench.queued == (0, 0)
