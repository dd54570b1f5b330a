"""The decoder layers of the Qwen families over packed prefixes and suffixes: transformers' weights, our own forward.

A segment (a prefix or a suffix) looks at itself; a suffix also at its prefix, whose keys and values are kept for later batches.
The last layer computes nothing but keys, values and what the pooled tokens need. The slow twin is transformers' own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from app.layers import norm, plus, rotate, silu, times
from app.varlen import Segments, attend, merge


@dataclass(frozen=True, slots=True)
class Reach:
    """Consecutive tokens, and the prefix they all look at."""

    num_queries: int
    num_pooled: int  # of these queries, how many are the last of their row
    keys_values: Tensor  # [layers, 2, prefix or more, kv_heads, head_dim]
    num_prefix: int


@dataclass(frozen=True, slots=True)
class NewPrefix:
    """A prefix computed in this batch, all of it or what follows its known beginning, and where its keys and values go."""

    start: int  # of its new tokens, in the packed order
    num_tokens: int
    keys_values: Tensor  # [layers, 2, known and new tokens, kv_heads, head_dim]; the new part is written
    num_known: int

    @property
    def reach(self) -> Reach:
        return Reach(self.num_tokens, 0, self.keys_values, self.num_known)

    def put(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep the new tokens' part of [tokens, kv_heads, head_dim]."""
        for which, tensor in enumerate((key, value)):
            self.keys_values[layer, which, self.num_known :] = tensor[self.start : self.start + self.num_tokens]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Hidden states of some tokens, and the angles of their positions."""

    hidden: Tensor  # [tokens, hidden]
    cos: Tensor  # [tokens, 1, head_dim / 2]
    sin: Tensor

    def some(self, which: Tensor) -> Tokens:
        return Tokens(self.hidden[which], self.cos[which], self.sin[which])


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How the tokens of a batch lie: new prefixes first, then every suffix, those of one prefix together."""

    new_prefixes: tuple[NewPrefix, ...]
    suffix_lengths: tuple[int, ...]
    reaches: tuple[Reach, ...]  # of the suffixes, in order
    pooled: Tensor  # [rows] the last token of each suffix

    @property
    def prefix_lengths(self) -> tuple[int, ...]:
        return tuple(new.num_tokens for new in self.new_prefixes)

    @property
    def num_prefix_tokens(self) -> int:
        return sum(self.prefix_lengths)


@dataclass(frozen=True, slots=True)
class DeepStack:
    """What a picture adds to its own tokens behind the first layers, one after another (arXiv 2406.04334)."""

    start: int  # of the image tokens, in the packed order
    features: Tensor  # [layers, image tokens, hidden]

    def add_to(self, hidden: Tensor, layer: int) -> None:
        """To the states that leave a layer, [tokens, hidden], in place."""
        if layer < len(self.features):
            hidden[self.start : self.start + self.features.shape[1]] += self.features[layer]


class Decoder:
    """Runs the layers of a transformers text model (`layers`, `norm`, `rotary_emb`) on packed tokens. Inference only."""

    def __init__(self, text_model: Any, layers: Sequence[Any] | None = None) -> None:
        """`layers`: run only these of the model's; the last of them computes what the pooled tokens need."""
        self._model = text_model
        self._layers = list(text_model.layers if layers is None else layers)
        attention = self._layers[0].self_attn
        self._head_dim = int(attention.head_dim)
        self._num_kv_heads = int(text_model.config.num_key_value_heads)
        self._scale = float(attention.scaling)
        self.num_query_values = int(text_model.config.num_attention_heads) * self._head_dim  # of a token; Qwen3's may be more than hidden

    def new_keys_values(self, num_tokens: int) -> Tensor:
        """Room for the keys and values of a prefix."""
        weight = self._model.norm.weight
        shape = (len(self._layers), 2, num_tokens, self._num_kv_heads, self._head_dim)
        return torch.empty(shape, dtype=weight.dtype, device=weight.device)

    def forward(self, embedded: Tensor, positions: Tensor, arrangement: Arrangement, pictures: Sequence[DeepStack] = ()) -> Tensor:
        """[tokens, hidden] and positions [3, tokens] (one axis for text) to the normed states of the pooled tokens, [rows, hidden].

        What pictures add behind the last layer would reach no pooled token.
        """
        tokens = Tokens(embedded, *self._angles(embedded, positions))
        view = _View(arrangement, embedded.device, last=False)
        *numbers, last = range(len(self._layers))
        for number in numbers:
            tokens = replace(tokens, hidden=self._layer(number, tokens, tokens, view))
            for picture in pictures:
                picture.add_to(tokens.hidden, number)
        pooled = self._layer(last, tokens, tokens.some(arrangement.pooled), _View(arrangement, embedded.device, last=True))
        return norm(pooled, self._model.norm)

    def _angles(self, embedded: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, [tokens, 1, head_dim / 2] each: both halves of a head turn by the same angles."""
        position_ids = positions.unsqueeze(1) if positions.dim() == 2 else positions.unsqueeze(0)
        cos, sin = self._model.rotary_emb(embedded.unsqueeze(0), position_ids)  # [1, tokens, head_dim]
        half = self._head_dim // 2
        return cos[0, :, None, :half].contiguous(), sin[0, :, None, :half].contiguous()

    def _layer(self, number: int, tokens: Tokens, asking: Tokens, view: _View) -> Tensor:
        """The new states of those who ask, [queries, hidden]: all tokens, or some of them."""
        layer, hidden = self._layers[number], asking.hidden
        attention, mlp = layer.self_attn, layer.mlp
        normed = norm(tokens.hidden, layer.input_layernorm)
        normed_asking = normed if asking is tokens else norm(hidden, layer.input_layernorm)
        key = self._turned(attention.k_proj(normed), getattr(attention, "k_norm", None), tokens)
        value = self._heads(attention.v_proj(normed))
        view.keep(number, key, value)
        if not len(hidden):
            return hidden  # a prefix by itself: its last layer ends here
        query = self._turned(attention.q_proj(normed_asking), getattr(attention, "q_norm", None), asking)
        attended = view.attend(number, query, key, value, self._scale)
        hidden = plus(attention.o_proj, attended.reshape(len(hidden), -1), hidden)
        inner = norm(hidden, layer.post_attention_layernorm)
        return plus(mlp.down_proj, times(mlp.up_proj, inner, silu(mlp.gate_proj, inner)), hidden)

    def _turned(self, flat: Tensor, head_norm: Any | None, tokens: Tokens) -> Tensor:
        """Queries or keys at their positions, [tokens, heads, head_dim]; Qwen3 norms each head before."""
        heads = self._heads(flat)
        return rotate(heads if head_norm is None else norm(heads, head_norm), tokens.cos, tokens.sin)

    def _heads(self, flat: Tensor) -> Tensor:
        return flat.view(len(flat), -1, self._head_dim)


class _View:
    """Who looks at whom in a layer: every token in most, only the pooled ones in the last. Built once, used by each layer."""

    def __init__(self, arrangement: Arrangement, device: torch.device, *, last: bool) -> None:
        self._new_prefixes = arrangement.new_prefixes
        suffixes, num_prefix_tokens = arrangement.suffix_lengths, arrangement.num_prefix_tokens
        self._own_keys = slice(num_prefix_tokens if last else 0, None)
        self._own = (
            Segments.of([1] * len(suffixes), suffixes, device)
            if last
            else Segments.of([*arrangement.prefix_lengths, *suffixes], None, device)
        )
        continued = () if last or not any(new.num_known for new in self._new_prefixes) else tuple(new.reach for new in self._new_prefixes)
        self._reaches = (*continued, *arrangement.reaches)
        self._first_query = 0 if last or continued else num_prefix_tokens  # that looks at a prefix
        self._across = Segments.of(
            [reach.num_pooled if last else reach.num_queries for reach in self._reaches],
            [reach.num_prefix for reach in self._reaches],
            device,
        )

    def keep(self, number: int, key: Tensor, value: Tensor) -> None:
        """Put the keys and values of new prefixes where they stay."""
        for new in self._new_prefixes:
            new.put(number, key, value)

    def attend(self, number: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """[queries, heads, head_dim], own segment and prefix together."""
        own, own_lse = attend(query, key[self._own_keys], value[self._own_keys], self._own, causal=True, scale=scale)
        start = self._first_query
        if start == len(query):
            return own
        kept_key, kept_value = (
            _end_to_end([reach.keys_values[number, which, : reach.num_prefix] for reach in self._reaches]) for which in (0, 1)
        )
        over, over_lse = attend(query[start:], kept_key, kept_value, self._across, causal=False, scale=scale)
        merged = merge(own[start:], own_lse[start:], over, over_lse)
        return merged if start == 0 else torch.cat([own[:start], merged])


def _end_to_end(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
