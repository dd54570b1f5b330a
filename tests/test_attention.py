"""Shared-prefix attention against a double loop, and against plain attention row by row."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface

from app.attention import NAME, GroupSpan, Layout, chunks_of, register, shared_prefix_attention, visibility

CPU = torch.device("cpu")
HEADS, KV_HEADS, DIM = 4, 2, 8
spans = st.builds(GroupSpan, st.just(0), st.integers(0, 9), st.lists(st.integers(1, 6), min_size=1, max_size=5).map(tuple))
quick = settings(max_examples=50, deadline=None, derandomize=True)


def sees(span: GroupSpan, query: int, key: int) -> bool:
    """The rule in words: never ahead; the prefix, or the own suffix."""
    owners = [-1] * span.num_prefix
    for number, length in enumerate(span.suffix_lengths):
        owners += [number] * length
    return key <= query and (owners[key] == -1 or owners[key] == owners[query])


@quick
@given(spans)
def test_visibility_is_the_rule_in_words(span: GroupSpan) -> None:
    mask = visibility(span, CPU)
    expected = [[sees(span, query, key) for key in range(span.length)] for query in range(span.length)]
    assert mask.tolist() == expected


def placed(groups: list[GroupSpan], max_chunk: int | None = None) -> Layout:
    start, moved = 0, []
    for span in groups:
        moved.append(GroupSpan(start, span.num_prefix, span.suffix_lengths))
        start += span.length
    return Layout.of(tuple(moved), CPU, max_chunk)


def rows_of(layout: Layout) -> list[list[int]]:
    """The packed indices of each separate sequence."""
    rows = []
    for span in layout.spans:
        at = span.start + span.num_prefix
        for length in span.suffix_lengths:
            rows.append([*range(span.start, span.start + span.num_prefix), *range(at, at + length)])
            at += length
    return rows


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True, scale=scaling).transpose(1, 2)


def random_tensors(length: int, *, seed: int = 0, requires_grad: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, heads, length, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(shape, generator=generator).requires_grad_(requires_grad) for shape in shapes]


@quick
@given(st.lists(spans, min_size=1, max_size=4), st.sampled_from([None, 0.5]))
def test_every_row_gets_what_it_gets_alone(groups: list[GroupSpan], scaling: float | None) -> None:
    layout = placed(groups)
    query, key, value = random_tensors(sum(span.length for span in groups))
    packed, weights = shared_prefix_attention(torch.nn.Module(), query, key, value, None, scaling=scaling, layout=layout)
    assert weights is None
    assert packed.shape == (1, query.shape[2], HEADS, DIM)
    for row in rows_of(layout):
        alone = plain(query[:, :, row], key[:, :, row], value[:, :, row], scaling)
        assert torch.allclose(packed[:, row], alone, atol=1e-6)


def test_without_a_layout_it_is_sdpa() -> None:
    module = torch.nn.Module()
    module.is_causal = True  # type: ignore[assignment]
    module.num_key_value_groups = HEADS // KV_HEADS  # type: ignore[assignment]
    query, key, value = random_tensors(11)
    sdpa = AttentionInterface()["sdpa"]
    ours, _ = shared_prefix_attention(module, query, key, value, None, scaling=0.3)
    theirs, _ = sdpa(module, query, key, value, None, scaling=0.3)
    assert torch.equal(ours, theirs)
    assert torch.allclose(ours, plain(query, key, value, 0.3), atol=1e-6)
    mask = torch.ones(1, 1, 11, 11).tril().bool()
    assert torch.equal(shared_prefix_attention(module, query, key, value, mask)[0], sdpa(module, query, key, value, mask)[0])


def test_gradients_are_those_of_separate_rows() -> None:
    layout = placed([GroupSpan(0, 5, (2, 3)), GroupSpan(0, 1, (4,))])
    together, apart = (random_tensors(15, requires_grad=True) for _ in range(2))
    weight = torch.randn(15, HEADS, DIM)
    rows = rows_of(layout)
    packed, _ = shared_prefix_attention(torch.nn.Module(), *together, None, layout=layout)
    sum((packed[0, row] * weight[row]).sum() for row in rows).backward()  # type: ignore[union-attr]
    sum((plain(*(tensor[:, :, row] for tensor in apart), None)[0] * weight[row]).sum() for row in rows).backward()  # type: ignore[union-attr, call-arg, misc]
    for one, other in zip(together, apart, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.allclose(one.grad, other.grad, atol=1e-5)


def one_mask(layout: Layout, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The slow twin: one call a group under the mask of all its tokens. [1, tokens, heads, head_dim]"""
    pieces = []
    for span in layout.spans:
        parts = (tensor[:, :, span.start : span.start + span.length] for tensor in (query, key, value))
        pieces.append(F.scaled_dot_product_attention(*parts, attn_mask=visibility(span, CPU), enable_gqa=True))
    return torch.cat(pieces, dim=2).transpose(1, 2)


wide = st.builds(GroupSpan, st.just(0), st.integers(0, 20), st.lists(st.integers(1, 9), min_size=1, max_size=40).map(tuple))


@quick
@given(st.lists(wide, min_size=1, max_size=3), st.integers(1, 60))
def test_chunks_give_what_one_mask_gives(groups: list[GroupSpan], max_chunk: int) -> None:
    """Values and gradients; no call looks at more than its prefix and one chunk, and together they ask for every token once."""
    layout = placed(groups, max_chunk)
    together, apart = (random_tensors(sum(span.length for span in groups), requires_grad=True) for _ in range(2))
    found, expected = shared_prefix_attention(torch.nn.Module(), *together, None, layout=layout)[0], one_mask(layout, *apart)
    assert torch.allclose(found, expected, atol=1e-6)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.autograd.grad((out * weight).sum(), given) for out, given in ((found, together), (expected, apart)))
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(ours, theirs, strict=True))
    asked = [token for call in layout.calls for token in range(call.queries.start, call.queries.stop)]
    assert asked == list(range(query_length(layout)))
    longest = max(length for span in groups for length in span.suffix_lengths)
    masks = [call.mask.numel() for call in layout.calls if call.mask is not None]
    assert all(numel <= (20 + max(max_chunk, longest)) ** 2 for numel in masks)


def query_length(layout: Layout) -> int:
    return sum(span.length for span in layout.spans)


@quick
@given(st.lists(st.integers(1, 9), min_size=1, max_size=40).map(tuple), st.integers(1, 30))
def test_chunks_are_as_long_as_they_may(lengths: tuple[int, ...], max_chunk: int) -> None:
    chunks = list(chunks_of(lengths, max_chunk))
    assert tuple(length for chunk in chunks for length in chunk) == lengths
    assert all(sum(chunk) <= max_chunk or len(chunk) == 1 for chunk in chunks)
    assert all(sum(chunk) + following[0] > max_chunk for chunk, following in itertools.pairwise(chunks))


def test_small_groups_are_one_call_and_wide_ones_grow_with_their_captions() -> None:
    """8 captions of 10 tokens: one chunk of 128. 64 of them: 12 a chunk, so 6 chunks and the prefix; masks of 120 x 150, one of 40 x 70."""
    small, wide = (Layout.of((GroupSpan(0, 30, (10,) * count),), CPU) for count in (8, 64))
    assert len(small.calls) == 1
    assert len(wide.calls) == 7
    assert sum(call.mask.numel() for call in wide.calls if call.mask is not None) == 5 * 120 * 150 + 40 * 70


def test_registering_twice_is_one_registration() -> None:
    assert register() == register() == NAME
    assert AttentionInterface()[NAME] is shared_prefix_attention


@pytest.mark.parametrize("lengths", [(1,), (3, 1)])
def test_a_layout_without_a_prefix(lengths: tuple[int, ...]) -> None:
    mask = visibility(GroupSpan(0, 0, lengths), CPU)
    assert int(mask.sum()) == sum(n * (n + 1) // 2 for n in lengths)
