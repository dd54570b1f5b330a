"""Every way to attend against the plain one, and merging by log-sum-exp against one softmax over all keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.varlen import (
    Attended,
    Backend,
    Segments,
    attend,
    attend_cpu,
    attend_flash_attn,
    attend_plain,
    attend_torch_varlen,
    choose,
    installed,
    merge,
    takes_fewer_key_heads,
    way_of,
)

Tensors = tuple[Tensor, Tensor, Tensor]
# bfloat16 keeps 8 bits: a result near 1 is off by up to 2^-8, and weights are rounded once more before they meet the values.
BF16_TOLERANCE = 2e-2
BF16_LSE_TOLERANCE = 5e-4  # logits are summed in float32 there too, but torch takes a quicker exp
quick = settings(max_examples=150, deadline=None, derandomize=True)
lengths = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12)), min_size=1, max_size=6)
heads = st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)])  # of queries, of keys
seeds = st.integers(0, 2**16)


def of(pairs: list[tuple[int, int]]) -> Segments:
    return Segments.of([queries for queries, _ in pairs], [keys for _, keys in pairs], "cpu")


def random_tensors(
    segments: Segments, num_heads: int = 4, num_kv_heads: int = 2, *, dtype: torch.dtype = torch.float32, dim: int = 8, seed: int = 0
) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    num_queries, num_keys = sum(segments.query_lengths), sum(segments.key_lengths)
    shapes = ((num_queries, num_heads, dim), (num_keys, num_kv_heads, dim), (num_keys, num_kv_heads, dim))
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return query, key, value


def by_loops(query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, causal: bool, scale: float) -> Attended:
    """The definition, one query and head at a time."""
    out, lse = torch.zeros_like(query), query.new_full(query.shape[:2], -torch.inf)
    first_query = first_key = 0
    for num_queries, num_keys in zip(segments.query_lengths, segments.key_lengths, strict=True):
        for index in range(num_queries):
            num_seen = max(0, num_keys - num_queries + index + 1) if causal else num_keys
            for head in range(query.shape[1] if num_seen else 0):
                seen = slice(first_key, first_key + num_seen), head // (query.shape[1] // key.shape[1])
                logits = key[seen] @ query[first_query + index, head] * scale
                out[first_query + index, head] = logits.softmax(0) @ value[seen]
                lse[first_query + index, head] = logits.logsumexp(0)
        first_query, first_key = first_query + num_queries, first_key + num_keys
    return out, lse


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def agree(ours: Attended, theirs: Attended, tolerance: float) -> None:
    for one, other in zip(ours, theirs, strict=True):
        close(one, other, tolerance)


@quick
@given(lengths, heads, st.booleans(), seeds)
def test_the_plain_way_is_the_definition(pairs: list[tuple[int, int]], heads: tuple[int, int], causal: bool, seed: int) -> None:
    segments = of(pairs)
    tensors = random_tensors(segments, *heads, dtype=torch.float64, seed=seed)
    ours = attend(*tensors, segments, causal=causal, scale=0.4)
    assert [tensor.dtype for tensor in ours] == [torch.float64] * 2
    agree(ours, by_loops(*tensors, segments, causal=causal, scale=0.4), 1e-12)


equal = st.lists(st.integers(0, 40), min_size=1, max_size=6).map(lambda found: [(length, length) for length in found])
lone = st.lists(st.integers(0, 40), min_size=1, max_size=6).map(lambda found: [(1, length) for length in found])
repeated = st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)).map(lambda it: [(it[1], it[2])] * it[0])


@quick
@given(lengths | equal | lone | repeated, heads, st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]), seeds)
@example([(3, 0), (4, 5), (3, 0)], (4, 2), False, torch.float32, 0)
@example([(5, 3), (1, 0), (0, 4), (2, 2)], (4, 2), True, torch.float32, 0)
def test_the_cpu_way_is_the_plain_way(
    pairs: list[tuple[int, int]], heads: tuple[int, int], causal: bool, dtype: torch.dtype, seed: int
) -> None:
    segments = of(pairs)
    tensors = random_tensors(segments, *heads, dtype=dtype, dim=16, seed=seed)
    out, lse = attend(*tensors, segments, causal=causal, scale=0.25)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (tensors[0].shape, dtype, tensors[0].shape[:2], torch.float32)
    expected, expected_lse = attend_plain(*tensors, segments, causal=causal, scale=0.25)
    close(lse, expected_lse, 1e-5 if dtype is torch.float32 else BF16_LSE_TOLERANCE)
    close(out, expected, 1e-5 if dtype is torch.float32 else BF16_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("pairs", "heads", "dim", "causal"),
    [
        ([(258, 258), *[(length, length) for length in range(24, 32)]], (16, 2), 128, True),
        ([(280, 258)], (16, 2), 128, False),
        ([(1, length) for length in range(24, 45)], (16, 2), 128, True),
        ([(64, 64)] * 8 + [(48, 48)] * 4, (16, 16), 80, False),
    ],
    ids=["own", "prefix", "pooled", "windows"],
)
def test_the_shapes_of_the_model(pairs: list[tuple[int, int]], heads: tuple[int, int], dim: int, causal: bool, dtype: torch.dtype) -> None:
    segments = of(pairs)
    tensors = random_tensors(segments, *heads, dtype=dtype, dim=dim)
    ours = attend_cpu(*tensors, segments, causal=causal, scale=dim**-0.5)
    plain = attend_plain(*tensors, segments, causal=causal, scale=dim**-0.5)
    agree(ours, plain, 1e-5 if dtype is torch.float32 else BF16_TOLERANCE)


def test_views_into_a_larger_tensor_are_taken_as_they_are() -> None:
    """Queries, keys and values of one product, and kept keys, are slices with gaps."""
    segments = Segments.of([5, 5, 1, 7], None, "cpu")
    together = torch.randn(18, 8, 16)
    slices = together[:, :4], together[:, 4:6], together[:, 6:]
    dense = tuple(tensor.contiguous() for tensor in slices)
    for ours, theirs in zip(
        attend(*slices, segments, causal=True, scale=0.3), attend(*dense, segments, causal=True, scale=0.3), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_the_cpu_a_segment_does_not_feel_its_company(dtype: torch.dtype) -> None:
    segments = Segments.of([70, 20, 20, 31, 1], None, "cpu")
    tensors = random_tensors(segments, 16, 2, dtype=dtype, dim=128)
    out, lse = attend(*tensors, segments, causal=True, scale=0.1)
    start = 0
    for length in segments.query_lengths:
        span = slice(start, start + length)
        alone, alone_lse = attend(*(tensor[span] for tensor in tensors), Segments.of([length], None, "cpu"), causal=True, scale=0.1)
        assert torch.equal(out[span], alone)
        assert torch.equal(lse[span], alone_lse)
        start += length


def test_causal_is_aligned_at_the_bottom_right() -> None:
    """Two queries over five keys: the first sees four, the last five. Four over two: two see none, then one, then two."""
    segments = Segments.of([2, 4], [5, 2], "cpu")
    zeros, value = torch.zeros(7, 1, 8), torch.arange(7.0)[:, None, None].expand(7, 1, 8).contiguous()
    for dtype in (torch.float32, torch.float64):
        out, lse = attend(zeros[:6].to(dtype), zeros.to(dtype), value.to(dtype), segments, causal=True, scale=1.0)
        assert lse[:, 0].exp().round().tolist() == [4, 5, 0, 0, 1, 2]  # equal logits of zero: the log of how many are seen
        assert out[:, 0, 0].tolist() == pytest.approx([1.5, 2.0, 0.0, 0.0, 5.0, 5.5])


def interleaved(first: Tensor, first_lengths: tuple[int, ...], second: Tensor, second_lengths: tuple[int, ...]) -> Tensor:
    """Segment by segment, the first's rows and then the second's."""
    pairs = zip(first.split(first_lengths), second.split(second_lengths), strict=True)
    return torch.cat([rows for pair in pairs for rows in pair])


triples = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5)


@quick
@given(triples, heads, st.sampled_from([0.3, 1e3, 1e6]), seeds)
def test_two_key_sets_merged_are_one_softmax_over_both(
    rows: list[tuple[int, int, int]], heads: tuple[int, int], scale: float, seed: int
) -> None:
    first, second = of([(queries, keys) for queries, keys, _ in rows]), of([(queries, keys) for queries, _, keys in rows])
    both = of([(queries, one + other) for queries, one, other in rows])
    query, key, value = random_tensors(first, *heads, dtype=torch.float64, seed=seed)
    _, more_key, more_value = random_tensors(second, *heads, dtype=torch.float64, seed=seed + 1)
    one = attend(query, key, value, first, causal=False, scale=scale)
    other = attend(query, more_key, more_value, second, causal=False, scale=scale)
    all_key = interleaved(key, first.key_lengths, more_key, second.key_lengths)
    all_value = interleaved(value, first.key_lengths, more_value, second.key_lengths)
    expected, expected_lse = attend(query, all_key, all_value, both, causal=False, scale=scale)
    largest = float(expected_lse.nan_to_num(neginf=0.0).abs().max()) if expected_lse.numel() else 0.0
    last_bit = largest * torch.finfo(torch.float64).eps  # a logit of 1e6 is itself known to 1e-10 only
    torch.testing.assert_close(merge(*one, *other), expected, rtol=0, atol=max(1e-12, 16 * last_bit))
    torch.testing.assert_close(torch.logaddexp(one[1], other[1]), expected_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_side_without_keys_leaves_the_other_as_it_is(dtype: torch.dtype) -> None:
    with_keys, without = Segments.of([3, 4], [5, 6], "cpu"), Segments.of([3, 4], [0, 0], "cpu")
    query, key, value = random_tensors(with_keys, dtype=dtype)
    something = attend(query, key, value, with_keys, causal=False, scale=1.0)
    nothing = attend(query, key[:0], value[:0], without, causal=False, scale=1.0)
    assert not nothing[0].any()
    assert nothing[1].isneginf().all()
    assert nothing[1].dtype == something[1].dtype
    assert torch.equal(merge(*something, *nothing), something[0])
    assert torch.equal(merge(*nothing, *something), something[0])
    assert torch.equal(merge(*nothing, *nothing), nothing[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logits_far_apart_do_not_overflow(dtype: torch.dtype) -> None:
    segments = Segments.of([2], [3], "cpu")
    query, key, value = random_tensors(segments, dtype=dtype)
    high, low = (attend(query, key, value, segments, causal=False, scale=scale) for scale in (1e8, 1e-8))
    assert all(tensor.isfinite().all() for tensor in (*high, *low))
    one_way, other_way = merge(*high, *low), merge(*low, *high)
    assert one_way.isfinite().all()
    torch.testing.assert_close(one_way, other_way)
    above = high[1] > low[1] + 100
    assert above.any()
    assert torch.equal(one_way[above], high[0][above])


def test_a_broken_side_is_not_hidden() -> None:
    fine, broken = (torch.ones(1, 1, 4), torch.zeros(1, 1)), (torch.full((1, 1, 4), torch.nan), torch.full((1, 1), torch.nan))
    assert merge(*fine, *broken).isnan().all()
    assert merge(*broken, *fine).isnan().all()


def test_bounds_lie_on_the_device_and_lengths_on_the_host() -> None:
    segments = Segments.of([3, 0, 2], [4, 1, 0], "cpu")
    assert (segments.query_lengths, segments.key_lengths) == ((3, 0, 2), (4, 1, 0))
    assert (segments.max_query, segments.max_key) == (3, 4)
    assert segments.cu_query.tolist() == [0, 3, 3, 5]
    assert segments.cu_key.tolist() == [0, 4, 5, 5]
    assert {segments.cu_query.dtype, segments.cu_key.dtype} == {torch.int32}
    assert segments.cu_key.is_contiguous()
    assert Segments.of([3, 2], None, "cpu") == Segments.of([3, 2], [3, 2], "cpu")


@pytest.mark.parametrize(("queries", "keys"), [([1], [1, 2]), ([-1], [1]), ([1], [-1])])
def test_lengths_that_make_no_sense_are_refused(queries: list[int], keys: list[int]) -> None:
    with pytest.raises(ValueError, match="as many key lengths"):
        Segments.of(queries, keys, "cpu")


def test_tensors_that_do_not_fit_are_refused() -> None:
    segments = Segments.of([2, 3], None, "cpu")
    query, key, value = random_tensors(segments)
    for wrong in ((query[1:], key, value), (query, key[1:], value[1:])):
        with pytest.raises(ValueError, match="do not fit"):
            attend(*wrong, segments, causal=False, scale=1.0)
    for wrong in ((query[:, :3], key, value), (query, key, value[1:]), (query[..., :4], key, value)):
        with pytest.raises(ValueError, match="multiple of the key heads"):
            attend(*wrong, segments, causal=False, scale=1.0)
    with pytest.raises(ValueError, match="contiguous"):
        attend(query.transpose(1, 2).contiguous().transpose(1, 2), key, value, segments, causal=False, scale=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_no_queries_and_no_segments_are_fine(dtype: torch.dtype) -> None:
    for segments in (Segments.of([], None, "cpu"), Segments.of([0, 0], [3, 2], "cpu")):
        tensors = random_tensors(segments, dtype=dtype)
        out, lse = attend(*tensors, segments, causal=False, scale=1.0)
        assert (out.shape, lse.shape) == ((0, 4, 8), (0, 4))


BOTH: frozenset[Backend] = frozenset({"flash-attn", "torch-varlen"})
TORCH_ONLY: frozenset[Backend] = frozenset({"torch-varlen"})


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "there", "expected"),
    [
        ("cuda", torch.bfloat16, 128, BOTH, "flash-attn"),
        ("cuda", torch.float16, 80, BOTH, "flash-attn"),
        ("cuda", torch.bfloat16, 80, TORCH_ONLY, "torch-varlen"),
        ("cuda", torch.bfloat16, 128, frozenset(), "plain"),
        ("cuda", torch.bfloat16, 36, BOTH, "plain"),
        ("cuda", torch.bfloat16, 264, BOTH, "plain"),
        ("cuda", torch.float32, 128, BOTH, "plain"),
        ("cpu", torch.float32, 128, BOTH, "cpu"),
        ("cpu", torch.bfloat16, 36, frozenset(), "cpu"),
        ("cpu", torch.float64, 128, BOTH, "plain"),
        ("mps", torch.float32, 128, BOTH, "plain"),
    ],
)
def test_the_way_follows_from_device_dtype_and_installation(
    device: str, dtype: torch.dtype, head_dim: int, there: frozenset[Backend], expected: Backend
) -> None:
    assert choose(device, dtype, head_dim, there) == expected


def test_torchs_own_is_used_only_where_it_takes_fewer_key_heads() -> None:
    from torch.nn.attention.varlen import varlen_attn

    def early(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
        return query

    assert takes_fewer_key_heads(varlen_attn)
    assert not takes_fewer_key_heads(early)
    assert installed("cpu") == frozenset()


def kernel_result(query: Tensor, key: Tensor, value: Tensor, cu_query: Tensor, cu_key: Tensor, causal: bool, scale: float) -> Attended:
    """What flash-attn 2 gives: log-sum-exps as [heads, queries], +inf where a query sees no key."""
    assert {cu_query.dtype, cu_key.dtype} == {torch.int32}
    segments = Segments.of(cu_query.diff().tolist(), cu_key.diff().tolist(), "cpu")
    out, lse = attend_plain(query, key, value, segments, causal=causal, scale=scale)
    return out, lse.masked_fill(lse.isneginf(), torch.inf).T.contiguous()


def longest(cu: Tensor) -> int:
    return int(cu.diff().max())


class FakeFlashAttn:
    """`flash_attn_varlen_func` of flash-attn 2.8."""

    def __init__(self) -> None:
        self.causal: list[bool] = []

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        return_attn_probs: bool = False,
    ) -> tuple[Tensor, Tensor, None]:
        assert softmax_scale is not None
        assert return_attn_probs
        assert dropout_p == 0.0
        assert window_size == (-1, -1)
        assert max_seqlen_q > 1  # at 1 it takes every segment to have exactly one query
        assert max_seqlen_q >= longest(cu_seqlens_q)
        assert max_seqlen_k == longest(cu_seqlens_k)
        self.causal.append(causal)
        return *kernel_result(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale), None


class FakeTorchVarlen:
    """`torch.nn.attention.varlen.varlen_attn` of torch 2.13."""

    def __init__(self) -> None:
        self.causal: list[bool] = []

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        return_aux: Any = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Attended:
        assert scale is not None
        assert return_aux.lse
        assert enable_gqa
        assert window_size in {(-1, -1), (-1, 0)}
        assert max_q > 1
        assert max_q >= longest(cu_seq_q)
        assert max_k == longest(cu_seq_k)
        self.causal.append(window_size == (-1, 0))
        return kernel_result(query, key, value, cu_seq_q, cu_seq_k, self.causal[-1], scale)


ADAPTERS = [(attend_flash_attn, FakeFlashAttn), (attend_torch_varlen, FakeTorchVarlen)]


@pytest.mark.parametrize(("adapter", "fake"), ADAPTERS)
@quick
@given(pairs=lengths | equal | lone, causal=st.booleans(), seed=seeds)
@example(pairs=[(4, 2), (3, 3)], causal=True, seed=0)
@example(pairs=[(4, 0), (3, 3)], causal=False, seed=0)
def test_the_adapters_speak_the_kernels_language(
    adapter: Callable[..., Attended],
    fake: type[FakeFlashAttn | FakeTorchVarlen],
    pairs: list[tuple[int, int]],
    causal: bool,
    seed: int,
) -> None:
    segments, kernel = of(pairs), fake()
    tensors = random_tensors(segments, seed=seed)
    ours = adapter(kernel, *tensors, segments, causal=causal, scale=0.7)
    assert kernel.causal == [causal]
    agree(ours, attend_plain(*tensors, segments, causal=causal, scale=0.7), 0.0)


@pytest.mark.parametrize(("adapter", "result"), [(attend_flash_attn, (0, 0, None)), (attend_torch_varlen, (0, 0))])
def test_a_log_sum_exp_of_another_layout_is_refused(adapter: Callable[..., Attended], result: tuple[Any, ...]) -> None:
    """As flash-attn gave before 2.6: [segments, heads, longest query]."""
    segments = Segments.of([3, 4], None, "cpu")
    tensors = random_tensors(segments)

    def kernel(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return tensors[0], torch.zeros(2, 4, 4), *result[2:]

    with pytest.raises(RuntimeError, match=r"log-sum-exp is \(2, 4, 4\), expected \(4, 7\)"):
        adapter(kernel, *tensors, segments, causal=False, scale=1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("way", ["flash-attn", "torch-varlen"])
@pytest.mark.parametrize("dim", [80, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_the_kernels_on_a_gpu(way: Backend, dim: int, causal: bool) -> None:
    """bfloat16 against float32 of the same numbers."""
    if way not in installed("cuda"):
        pytest.skip(f"{way} is not installed")
    for pairs in ([(258, 258), (31, 31), (0, 4), (45, 45)], [(90, 258), (7, 0), (64, 300)], [(1, 30), (1, 300), (0, 5)], [(1, 1)] * 5):
        host = of(pairs)
        segments = Segments.of(host.query_lengths, host.key_lengths, "cuda")
        tensors = tuple(tensor.cuda() for tensor in random_tensors(host, 16, 2, dtype=torch.bfloat16, dim=dim))
        ours, lse = way_of(way)(*tensors, segments, causal=causal, scale=dim**-0.5)
        expected, expected_lse = attend_plain(*(tensor.float() for tensor in tensors), segments, causal=causal, scale=dim**-0.5)
        close(ours.float(), expected, BF16_TOLERANCE)
        close(lse, expected_lse, BF16_LSE_TOLERANCE)
