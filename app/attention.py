"""Shared-prefix attention for packed groups, registered with transformers under one name.

A packed sequence is `[prefix | suffix_1 | ... | suffix_N]` group after group. A suffix token sees its group's prefix and
its own suffix; a prefix token sees the prefix before it. Nothing else. Called without a layout, it is plain SDPA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "punchline_shared_prefix"


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
class Layout:
    """The spans of a packed sequence with one visibility mask each; takes the place of transformers' attention mask."""

    spans: tuple[GroupSpan, ...]
    masks: tuple[Tensor, ...]  # one [length, length] bool a span, True where query (row) sees key (column)

    @classmethod
    def of(cls, spans: tuple[GroupSpan, ...], device: torch.device) -> Layout:
        return cls(spans, tuple(visibility(span, device) for span in spans))


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
    attention_mask: Layout | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One SDPA call a group. Returns [1, tokens, heads, head_dim]."""
    if not isinstance(attention_mask, Layout):
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return plain
    pieces = []
    for span, mask in zip(attention_mask.spans, attention_mask.masks, strict=True):
        own = slice(span.start, span.start + span.length)
        pieces.append(
            F.scaled_dot_product_attention(
                query[:, :, own], key[:, :, own], value[:, :, own], attn_mask=mask, scale=scaling, dropout_p=dropout, enable_gqa=True
            )
        )
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def register() -> str:
    """Make the attention known to transformers; returns the name to load a model with. Safe to call again."""
    AttentionInterface.register(NAME, shared_prefix_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
