"""Attention over segments laid end to end, each query's log-sum-exp beside it, so that attention over more keys can be merged in exactly.

Knows tensors and lengths; not what a prefix or a window is. Segment bounds live on the host: nothing waits for the device.
Forward only. `attend_plain` is the slow twin of every other way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate, groupby
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Attended: TypeAlias = tuple[Tensor, Tensor]  # [queries, heads, head_dim], and the log-sum-exp [queries, heads]
Kernel: TypeAlias = Callable[..., Any]
Backend: TypeAlias = Literal["flash-attn", "torch-varlen", "cpu", "plain"]

_ON_CUDA: tuple[Backend, ...] = ("flash-attn", "torch-varlen")  # the first one installed
_HALF = (torch.float16, torch.bfloat16)
_FAST_ON_CPU = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive segments of the same two lengths, and where they lie."""

    num_segments: int
    query_length: int
    key_length: int
    queries: slice
    keys: slice


@dataclass(frozen=True, slots=True)
class Segments:
    """Which queries look at which keys: segment i's queries at segment i's keys."""

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    max_query: int
    max_key: int
    cu_query: Tensor = field(compare=False)  # [segments + 1] int32: where each segment's queries begin, then how many there are
    cu_key: Tensor = field(compare=False)

    @classmethod
    def of(cls, query_lengths: Sequence[int], key_lengths: Sequence[int] | None, device: torch.device | str) -> Segments:
        """`key_lengths` None: as many keys as queries."""
        queries = tuple(query_lengths)
        keys = queries if key_lengths is None else tuple(key_lengths)
        if len(queries) != len(keys) or min((*queries, *keys), default=0) < 0:
            raise ValueError(f"segments need as many key lengths as query lengths, none negative: {queries} and {keys}")
        cu_query, cu_key = _bounds(queries, keys, torch.device(device))
        return cls(queries, keys, max(queries, default=0), max(keys, default=0), cu_query, cu_key)

    def runs(self) -> Iterator[Run]:
        query_at = key_at = 0
        for (query_length, key_length), same in groupby(zip(self.query_lengths, self.key_lengths, strict=True)):
            num = sum(1 for _ in same)
            query_stop, key_stop = query_at + num * query_length, key_at + num * key_length
            yield Run(num, query_length, key_length, slice(query_at, query_stop), slice(key_at, key_stop))
            query_at, key_at = query_stop, key_stop

    def leave_some_blind(self, *, causal: bool) -> bool:
        """Whether some query sees no key at all."""
        pairs = zip(self.query_lengths, self.key_lengths, strict=True)
        return any((queries > 0 and keys == 0) or (causal and queries > keys) for queries, keys in pairs)


def _bounds(query_lengths: tuple[int, ...], key_lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """[2, segments + 1] int32. From pinned memory: a copy from any other would make the host wait for the device."""
    cumulative = [list(accumulate(lengths, initial=0)) for lengths in (query_lengths, key_lengths)]
    bounds = torch.tensor(cumulative, dtype=torch.int32, pin_memory=device.type == "cuda")
    return bounds.to(device, non_blocking=True)


def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, causal: bool, scale: float) -> Attended:
    """Each segment's softmax attention: query [queries, heads, head_dim], key and value [keys, kv_heads, head_dim].

    Causal is aligned at the bottom right: a segment's last query sees all its keys. Returns the result in the query's dtype and
    the log-sum-exp of the scaled logits in float32 (float64 for float64); a query without keys gets zeros and -inf.
    """
    _check(query, key, value, segments)
    if not len(query) or not len(key):  # kernels refuse these
        return torch.zeros_like(query), query.new_full(query.shape[:2], -torch.inf, dtype=_wide(query))
    device = query.device.type
    way = way_of(choose(device, query.dtype, query.shape[-1], installed(device)))
    return way(query, key, value, segments, causal=causal, scale=scale)


def merge(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> Tensor:
    """The softmax over both key sets, from the attention over each. [queries, heads, head_dim]

    (e^a first + e^b second) / (e^a + e^b) with a and b the two log-sum-exps. Only b - a counts, so nothing overflows; lerp gives back
    either side exactly at a share of 0 or 1. Where neither side has keys, b - a is NaN and both sides are zero.
    """
    share = torch.sigmoid(second_lse - first_lse).masked_fill(first_lse.isneginf() & second_lse.isneginf(), 0.0)[..., None]
    return torch.lerp(first.to(share.dtype), second.to(share.dtype), share).to(first.dtype)


def choose(device_type: str, dtype: torch.dtype, head_dim: int, there: frozenset[Backend]) -> Backend:
    """The fastest way that takes such tensors, among what is `there`."""
    if device_type == "cpu" and dtype in _FAST_ON_CPU:
        return "cpu"
    if device_type == "cuda" and dtype in _HALF and head_dim % 8 == 0 and head_dim <= 256:
        return next((way for way in _ON_CUDA if way in there), "plain")
    return "plain"


@cache
def installed(device_type: str) -> frozenset[Backend]:
    """What this installation has for a device. Looked up for CUDA only, as importing torch's own loads its compiler: seconds."""
    if device_type != "cuda":
        return frozenset()
    found = {"flash-attn": find_spec("flash_attn") is not None, "torch-varlen": takes_fewer_key_heads(_torch_varlen())}
    return frozenset(way for way in _ON_CUDA if found[way])


def takes_fewer_key_heads(kernel: Kernel) -> bool:
    """Early versions of torch's varlen_attn do not, and know no window."""
    return {"enable_gqa", "window_size"} <= inspect.signature(kernel).parameters.keys()


def way_of(backend: Backend) -> Callable[..., Attended]:
    if backend == "flash-attn":
        return partial(attend_flash_attn, _flash_attn())
    if backend == "torch-varlen":
        return partial(attend_torch_varlen, _torch_varlen())
    return attend_cpu if backend == "cpu" else attend_plain


@cache
def _flash_attn() -> Kernel:
    kernel: Kernel = import_module("flash_attn").flash_attn_varlen_func
    return kernel


@cache
def _torch_varlen() -> Kernel:
    kernel: Kernel = import_module("torch.nn.attention.varlen").varlen_attn
    return kernel


def attend_flash_attn(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, causal: bool, scale: float
) -> Attended:
    """Through flash-attn's `flash_attn_varlen_func`, which is aligned at the bottom right as we are."""
    out, lse, _ = kernel(
        query,
        key,
        value,
        cu_seqlens_q=segments.cu_query,
        cu_seqlens_k=segments.cu_key,
        max_seqlen_q=_safe_max_query(segments),
        max_seqlen_k=segments.max_key,
        softmax_scale=scale,
        causal=causal,
        return_attn_probs=True,
    )
    return out, _by_query(lse, query, segments, causal=causal)


def attend_torch_varlen(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, causal: bool, scale: float
) -> Attended:
    """Through torch's `varlen_attn`: flash-attn's kernel, as torch carries it."""
    out, lse = kernel(
        query,
        key,
        value,
        segments.cu_query,
        segments.cu_key,
        _safe_max_query(segments),
        segments.max_key,
        return_aux=import_module("torch.nn.attention.varlen").AuxRequest(lse=True),
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=True,
    )
    return out, _by_query(lse, query, segments, causal=causal)


def _safe_max_query(segments: Segments) -> int:
    """At 1 the kernels reshape the queries as if every segment had exactly one, and ours may have none. Any upper bound is right."""
    return max(segments.max_query, 2)


def _by_query(lse: Tensor, query: Tensor, segments: Segments, *, causal: bool) -> Tensor:
    """From the kernels' [heads, queries], +inf where a query has no key, to [queries, heads] and -inf."""
    num_queries, num_heads, _ = query.shape
    if lse.shape != (num_heads, num_queries):
        raise RuntimeError(f"the attention kernel's log-sum-exp is {tuple(lse.shape)}, expected {(num_heads, num_queries)}")
    lse = lse.transpose(0, 1)
    return lse.masked_fill(lse.isposinf(), -torch.inf) if segments.leave_some_blind(causal=causal) else lse


def attend_cpu(query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, causal: bool, scale: float) -> Attended:
    """torch's flash kernel for the CPU, one call a run of equal segments.

    Suffixes of unequal lengths are not padded into one call: a call costs microseconds, and the kernel computes every padded token
    (64 suffixes of 20 to 60 tokens on one core: 28 ms one by one, 42 ms padded). So a segment's bits do not depend on its company.
    """
    pieces = []
    for run in segments.runs():
        queries, keys, values = query[run.queries], key[run.keys], value[run.keys]
        if not len(queries):
            continue
        if not run.key_length or (causal and run.query_length not in (1, run.key_length)):  # nothing in a forward looks like this
            own = Segments.of([run.query_length] * run.num_segments, [run.key_length] * run.num_segments, query.device)
            pieces.append(attend_plain(queries, keys, values, own, causal=causal, scale=scale))
        elif run.query_length == 1:
            pieces.append(_attend_lone(queries, keys, values, run.num_segments, scale))
        else:
            pieces.append(_attend_equal(queries, keys, values, run.num_segments, causal=causal, scale=scale))
    return _joined(pieces)


def _attend_equal(query: Tensor, key: Tensor, value: Tensor, num_segments: int, *, causal: bool, scale: float) -> Attended:
    """Segments of equal lengths in one call. The kernel's causal is aligned at the top left: the same for as many queries as keys."""
    queries, keys, values = (torch.unflatten(tensor, 0, (num_segments, -1)).transpose(1, 2) for tensor in (query, key, value))
    out, lse = _flash_cpu(queries, keys, values, causal, scale)  # [segments, heads, queries, ...], queries before heads in memory
    return out.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)


def _attend_lone(query: Tensor, key: Tensor, value: Tensor, num_segments: int, scale: float) -> Attended:
    """One query a segment sees every key, so the heads that share keys can pass for queries: each key is read once, not once a head."""
    keys, values = (torch.unflatten(tensor, 0, (num_segments, -1)).transpose(1, 2) for tensor in (key, value))
    out, lse = _flash_cpu(torch.unflatten(query, 1, (key.shape[1], -1)), keys, values, False, scale)  # [segments, kv_heads, sharing, ...]
    return out.flatten(1, 2), lse.flatten(1, 2)


def _flash_cpu(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> Attended:
    """What scaled_dot_product_attention calls on a CPU; it alone gives the log-sum-exp."""
    attended: Attended = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
    return attended


def attend_plain(query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, causal: bool, scale: float) -> Attended:
    """By the formula, segment by segment, in float32 or better."""
    queries = torch.split(query, list(segments.query_lengths))
    keys, values = (torch.split(tensor, list(segments.key_lengths)) for tensor in (key, value))
    return _joined([_attend_one(*tensors, causal=causal, scale=scale) for tensors in zip(queries, keys, values, strict=True)])


def _attend_one(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> Attended:
    wide = _wide(query)
    grouped = torch.unflatten(query.to(wide), 1, (key.shape[1], -1))  # [queries, kv_heads, sharing, head_dim]
    logits = torch.einsum("qgsd,kgd->gsqk", grouped, key.to(wide)) * scale
    if causal:
        seen = torch.ones(len(query), len(key), dtype=torch.bool, device=query.device).tril(len(key) - len(query))
        logits = logits.masked_fill(~seen, -torch.inf)
    lse = logits.logsumexp(-1, keepdim=True)
    weights = (logits - lse.masked_fill(lse.isneginf(), 0.0)).exp()  # -inf less -inf would be NaN; a blind query's weights are zero
    out = torch.einsum("gsqk,kgd->qgsd", weights, value.to(wide))
    return out.flatten(1, 2).to(query.dtype), lse.squeeze(-1).permute(2, 0, 1).flatten(1, 2)


def _wide(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def _joined(pieces: list[Attended]) -> Attended:
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat([out for out, _ in pieces]), torch.cat([lse for _, lse in pieces])


def _check(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> None:
    """The kernels would read past the end instead."""
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if key.shape != value.shape or query.shape[2] != key.shape[2] or query.shape[1] % key.shape[1]:
        raise ValueError(f"attention needs one head size, and query heads that are a multiple of the key heads: {shapes}")
    if (len(query), len(key)) != (sum(segments.query_lengths), sum(segments.key_lengths)):
        raise ValueError(f"segments of {segments.query_lengths} queries and {segments.key_lengths} keys do not fit {shapes}")
    if {query.stride(-1), key.stride(-1), value.stride(-1)} != {1}:
        raise ValueError("attention needs heads that are contiguous in memory")
