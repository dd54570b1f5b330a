"""Shared-prefix attention for packed groups, registered with transformers under one name.

A packed sequence is `[prefix | suffix_1 | ... | suffix_N]` group after group. A suffix token sees its group's prefix and
its own suffix; a prefix token sees the prefix before it. Nothing else. Called without a layout, it is plain SDPA.
The layout is a keyword that transformers hands on untouched: where a mask belongs, some families take tensors only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "punchline_shared_prefix"
# Suffix tokens that share one mask: a mask for all would grow with the square of the captions. On a CPU small chunks are
# fastest (8 captions of 32 tokens after 258: 18 ms in chunks of 128, 27 ms in one); on a GPU every call is launches.
_MAX_CHUNK = {"cpu": 128}
_MAX_CHUNK_ELSEWHERE = 512


@dataclass(frozen=True, slots=True)
class GroupSpan:
    """Where one group lies in the packed sequence."""

    start: int
    num_prefix: int
    suffix_lengths: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.num_prefix + sum(self.suffix_lengths)


@dataclass(frozen=True, slots=True)
class Call:
    """One attention call: consecutive queries, and the keys they look at, packed indices both."""

    queries: slice
    prefix: slice  # keys before those of the queries themselves; may be empty
    mask: Tensor | None  # [queries, prefix + queries] bool, True where query (row) sees key (column); None: causal, no prefix

    def keys_of(self, tensor: Tensor) -> Tensor:
        """The seen part of [1, heads, tokens, head_dim]."""
        own = tensor[:, :, self.queries]
        return own if self.prefix.start == self.prefix.stop else torch.cat([tensor[:, :, self.prefix], own], dim=2)


@dataclass(frozen=True, slots=True)
class Layout:
    """The spans of a packed sequence and the calls that compute them in order; says what else an attention mask would."""

    spans: tuple[GroupSpan, ...]
    calls: tuple[Call, ...]

    @classmethod
    def of(cls, spans: tuple[GroupSpan, ...], device: torch.device, max_chunk: int | None = None) -> Layout:
        max_chunk = max_chunk or _MAX_CHUNK.get(device.type, _MAX_CHUNK_ELSEWHERE)
        return cls(spans, tuple(call for span in spans for call in calls_of(span, device, max_chunk)))


def calls_of(span: GroupSpan, device: torch.device, max_chunk: int) -> Iterator[Call]:
    """A group whose suffixes fit one chunk is one call; else the prefix is one, and each chunk of suffixes over prefix and chunk."""
    chunks = list(chunks_of(span.suffix_lengths, max_chunk))
    if len(chunks) == 1:
        yield Call(slice(span.start, span.start + span.length), slice(0, 0), visibility(span, device))
        return
    at = span.start + span.num_prefix
    prefix = slice(span.start, at)
    if span.num_prefix:
        yield Call(prefix, slice(0, 0), None)
    for lengths in chunks:
        mask = visibility(GroupSpan(0, span.num_prefix, lengths), device)[span.num_prefix :]
        yield Call(slice(at, at + sum(lengths)), prefix, mask)
        at += sum(lengths)


def chunks_of(lengths: tuple[int, ...], max_chunk: int) -> Iterator[tuple[int, ...]]:
    """Consecutive lengths that sum to at most `max_chunk`; a longer one is alone."""
    start = 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or sum(lengths[start : end + 1]) > max_chunk:
            yield lengths[start:end]
            start = end


def visibility(span: GroupSpan, device: torch.device) -> Tensor:
    """Which token of a group sees which: causal, and a suffix sees only the prefix and itself. [length, length] bool."""
    lengths = torch.tensor([span.num_prefix, *span.suffix_lengths], device=device)
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)  # 0 = prefix
    index = torch.arange(span.length, device=device)
    causal = index[:, None] >= index
    return causal & ((owner == 0) | (owner[:, None] == owner))


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, tokens, head_dim]
    key: Tensor,  # [1, kv_heads, tokens, head_dim]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One SDPA call a small group, a few a wide one. Returns [1, tokens, heads, head_dim]."""
    if layout is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return plain
    pieces = [
        F.scaled_dot_product_attention(
            query[:, :, call.queries],
            call.keys_of(key),
            call.keys_of(value),
            attn_mask=call.mask,
            is_causal=call.mask is None,
            scale=scaling,
            dropout_p=dropout,
            enable_gqa=True,
        )
        for call in layout.calls
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def register() -> str:
    """Make the attention known to transformers; returns the name to load a model with. Safe to call again."""
    AttentionInterface.register(NAME, shared_prefix_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
