"""The serving forward: the distinct rows of several groups, some with kept prefixes, to scores. Knows tensors, not requests or caches.

Its slow twins are `score_shared` (the same packing through transformers) and `score_plain` (one forward a caption).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.contracts import EncodedImage, Ids
from app.decoder import Arrangement, Decoder, DeepStack, NewPrefix, Reach
from app.encoding import positions
from app.faults import faults_named
from app.layers import PrepackedLinear, prepack
from app.machine import peak_bytes, reset_peak, resident_bytes
from app.model import RewardModel, own_memory
from app.reuse import Computed, KeptPrefix, Share
from app.transfer import Staged, Stager, on_device
from app.vision import AnyTower, tower_of

TensorShare = Share[Tensor, Tensor]
_PeakOf: TypeAlias = Callable[[Callable[[], object]], int]
_PRACTICE_PREFIX, _PRACTICE_LEAD = 512, 8  # tokens
_MAX_PRACTICE_PICTURE = {"cpu": 144, "cuda": 1024}  # tokens: one picture at a time goes through the tower
_STAGED_BATCHES = 2  # the one that runs and the one behind it: of both, patches may be on the device
_KEYS_VALUES_DIM = 5  # [layers, 2, tokens, kv_heads, head_dim]
_AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 0.2}  # what rounding in other company may move, of what tokens differ by
_ENOUGH_TOKENS = 8
_AGREEMENT_OF_ONE = 2.5  # times that for the worst token: among hundreds a few that are all wrong would not show


class Engine:
    """Runs batches on a loaded model, whose linear layers it prepacks where that helps. Call it from one thread.

    On a CPU every weight is in memory of this process's own afterwards, wherever it was before.
    """

    def __init__(self, model: RewardModel) -> None:
        self._model = model
        backbone = model.backbone
        prepack(backbone)  # unless it was done already, for several models together
        self.num_prepacked = sum(isinstance(layer, PrepackedLinear) for layer in backbone.modules())
        if model.device.type == "cpu":
            own_memory(model)  # before anything takes a view of a weight that still lies in a mapped file
        self._text = backbone.language_model if model.takes_images else backbone
        self._decoder = Decoder(self._text)
        self._vision = tower_of(backbone) if model.takes_images else None
        self._stager = Stager(model.device)
        self._embed = backbone.get_input_embeddings()

    def stage(self, image: EncodedImage) -> Staged:
        """Begin to copy a picture to the device, from any thread. Raises OutOfMemory."""
        with faults_named():
            return self._stager.stage(image.patches)

    @torch.inference_mode()
    def image_features(self, image: EncodedImage, staged: Staged | None = None) -> Tensor:
        """What the vision tower makes of one picture by itself, [image tokens, hidden or, with DeepStack, more]. Raises OutOfMemory.

        `staged`: the picture, sent ahead.
        """
        if self._vision is None:
            raise ValueError("a text-only model takes no image")
        with faults_named():
            patches = self._on_device(image.patches) if staged is None else staged.take()
            return self._vision.features(patches, image.grid_thw)

    @torch.inference_mode()
    def forward(self, shares: Sequence[TensorShare]) -> list[Computed[Tensor]]:
        """The scores of every row, and each share's prefix to be kept. Raises OutOfMemory."""
        return self._run(shares, self._decoder)

    def _run(self, shares: Sequence[TensorShare], decoder: Decoder) -> list[Computed[Tensor]]:
        with faults_named():
            lots = [self._lot(share, decoder) for share in shares]
            arrangement = self._arrange(lots)
            embedded, pictures = self._embedded(lots)
            where = self._on_device(np.concatenate([*(lot.prefix_positions for lot in lots), *_suffix_positions(lots)], axis=1))
            pooled = decoder.forward(embedded, where if self._model.takes_images else where[0], arrangement, pictures)
            values = iter(self._model.head(pooled).tolist() if len(pooled) else [])
        return [Computed(tuple(next(values) for _ in lot.share.rows), lot.prefix) for lot in lots]

    @torch.inference_mode()
    def measure_bytes_per_token(self, num_tokens: int) -> int:
        """What a token of a batch takes at most beside the weights, by running a batch and a picture of so many. Raises OutOfMemory."""
        is_on_gpu = self._model.device.type == "cuda"
        peak_of = self._peak_on_gpu if is_on_gpu else _peak_on_cpu
        found = [self._counted_bytes_per_token(), -(-self._peak_of_text(num_tokens, peak_of) // num_tokens)]
        if self._vision is not None:
            # One block of each kind stands for all: on a CPU they would take seconds, and what they need is the same.
            tower = self._vision if is_on_gpu else self._vision.shortened()
            side = max(1, math.isqrt(min(num_tokens, _MAX_PRACTICE_PICTURE[self._model.device.type])))
            found.append(-(-self._peak_of_picture(tower, side, peak_of) // side**2))
        return max(found) + (self._staged_bytes_per_token() if is_on_gpu else 0)

    def _peak_of_text(self, num_tokens: int, peak_of: _PeakOf) -> int:
        if self._model.device.type == "cuda":
            return peak_of(lambda: self._run(self._practice(num_tokens, self._decoder), self._decoder))
        # Two layers stand for all: one comes after another, and only keys and values grow with their number.
        two = Decoder(self._text, [self._text.layers[0], self._text.layers[-1]])
        return peak_of(lambda: self._run(self._practice(num_tokens, two), two)) + self._decoder.new_keys_values(1).nbytes * num_tokens

    def _peak_of_picture(self, tower: AnyTower, side: int, peak_of: _PeakOf) -> int:
        """Of a square picture, its patches included."""
        grid = (1, side * tower.merge_size, side * tower.merge_size)
        patches = np.ones((math.prod(grid), tower.num_patch_values), dtype=np.float32)

        def run() -> None:
            with faults_named():
                tower.features(self._on_device(patches), grid)

        return peak_of(run)

    def _peak_on_gpu(self, work: Callable[[], object]) -> int:
        before = torch.cuda.memory_allocated(self._model.device)
        torch.cuda.reset_peak_memory_stats(self._model.device)
        work()
        return int(torch.cuda.max_memory_allocated(self._model.device) - before)

    def _practice(self, num_tokens: int, decoder: Decoder) -> list[TensorShare]:
        """Shares that compute `num_tokens` tokens, almost all of them prefixes behind a known beginning, with one row at the end.

        No other arrangement takes more: what a prefix takes beyond a suffix are its keys and values in every layer; what a suffix
        takes beyond a prefix is the attention over what is known, and this prefix has that as well.
        """
        known = decoder.new_keys_values(_PRACTICE_LEAD).zero_()
        lead = KeptPrefix(np.zeros(_PRACTICE_LEAD, dtype=np.int64), known, known.nbytes)
        lengths = [min(_PRACTICE_PREFIX, left) for left in range(num_tokens, 0, -_PRACTICE_PREFIX)]
        ids = [np.zeros(_PRACTICE_LEAD + length, dtype=np.int64) for length in lengths]
        first, *others = ids
        return [Share(first[:-1], (first,), None, None, None, lead), *(Share(own, (), None, None, None, lead) for own in others)]

    def _counted_bytes_per_token(self) -> int:
        """The tensors of a layer that are there at once, in the text model or the vision tower, and the keys and values of all layers."""
        config, item = self._text.config, self._text.norm.weight.element_size()
        values = 3 * config.intermediate_size + 8 * max(config.hidden_size, self._decoder.num_query_values)
        if self._vision is not None:
            values = max(values, self._vision.num_values_per_token)
        return int(values * item) + self._decoder.new_keys_values(1).nbytes

    def _staged_bytes_per_token(self) -> int:
        if self._vision is None:
            return 0
        return _STAGED_BATCHES * self._vision.num_patch_values * self._vision.merge_size**2 * np.dtype(np.float32).itemsize

    @torch.inference_mode()
    def agree(self, first: Tensor, second: Tensor, *, exact: bool) -> bool:
        """Whether two results of the same computation are equal, or differ by no more than rounding in other company does."""
        if first.dim() == _KEYS_VALUES_DIM == second.dim():  # a kept prefix may be the longer one
            length = min(first.shape[2], second.shape[2])
            first, second = first[:, :, :length], second[:, :, :length]
        if first.shape != second.shape:
            return False
        with faults_named():
            if exact:
                return torch.equal(first, second)
            if first.dim() != _KEYS_VALUES_DIM:
                return _close(first, second)
            return all(_close(one, other) for one, other in zip(first.flatten(0, 1), second.flatten(0, 1), strict=True))

    def _lot(self, share: TensorShare, decoder: Decoder) -> _Lot:
        """Where a share is split: at its own prefix, or earlier where the kept one ends."""
        image, kept = share.image, share.kept
        split = share.num_prefix if kept is None else min(share.num_prefix, len(kept.ids))
        ids = share.prefix_ids[:split]
        if image is not None and int((ids == self._model.image_token_id).sum()) != image.num_tokens:
            raise ValueError("the image does not lie whole in the shared prefix")
        if kept is not None:
            return _Lot(share, split, kept, _NO_POSITIONS, self._delta(share))
        if self._is_behind_lead(share) != (share.features is not None):
            raise ValueError("a new prefix needs the features of its image, unless its known beginning holds it")
        where = positions(ids, image, self._model.image_token_id, self._model.merge_size)
        keys_values = decoder.new_keys_values(split)
        num_known = 0
        if share.lead is not None:
            num_known = len(share.lead.ids)
            keys_values[:, :, :num_known] = share.lead.keys_values
        prefix = KeptPrefix(ids, keys_values, keys_values.nbytes)
        return _Lot(share, split, prefix, where[:, num_known:], self._delta(share))

    def _is_behind_lead(self, share: TensorShare) -> bool:
        """Whether there is an image that is computed now, not known from the beginning of the prefix."""
        if share.image is None:
            return False
        num_known = 0 if share.lead is None else int((share.lead.ids == self._model.image_token_id).sum())
        if num_known not in (0, share.image.num_tokens):
            raise ValueError("the image does not lie whole on one side of the known beginning")
        return num_known == 0

    def _delta(self, share: TensorShare) -> int:
        """What positions behind the image differ by from the index: an image spans its longer side, not its tokens."""
        if share.image is None:
            return 0
        _, rows, columns = share.image.grid_thw
        return max(rows, columns) // self._model.merge_size - share.image.num_tokens

    def _arrange(self, lots: Sequence[_Lot]) -> Arrangement:
        start, new = 0, []
        for lot in lots:
            if lot.num_new:
                new.append(NewPrefix(start, lot.num_new, lot.prefix.keys_values, lot.split - lot.num_new))
                start += lot.num_new
        lengths = [lot.suffix_lengths for lot in lots]
        flat = tuple(length for row in lengths for length in row)
        return Arrangement(
            new_prefixes=tuple(new),
            suffix_lengths=flat,
            reaches=tuple(
                Reach(sum(own), len(own), lot.prefix.keys_values, lot.split) for lot, own in zip(lots, lengths, strict=True) if own
            ),
            pooled=self._on_device(start + np.cumsum(flat, dtype=np.int64) - 1),
        )

    def _embedded(self, lots: Sequence[_Lot]) -> tuple[Tensor, list[DeepStack]]:
        """[tokens, hidden] of new prefixes and then of all suffixes, pictures in their places; and what these add behind layers."""
        prefixes = [lot.new_ids for lot in lots if lot.num_new]
        suffixes = [row[lot.split :] for lot in lots for row in lot.share.rows]
        embedded: Tensor = self._embed(self._on_device(np.concatenate([*prefixes, *suffixes])))
        start, pictures = 0, []
        for lot in lots:
            if lot.num_new and lot.share.features is not None:
                first = start + int(np.argmax(lot.new_ids == self._model.image_token_id))
                features, *deepstack = torch.split(lot.share.features, embedded.shape[1], dim=1)  # each [image tokens, hidden]
                embedded[first : first + len(features)] = features
                if deepstack:
                    pictures.append(DeepStack(first, torch.stack(deepstack)))
            start += lot.num_new
        return embedded, pictures

    def _on_device(self, array: NDArray[Any]) -> Tensor:
        return on_device(array, self._model.device)


_NO_POSITIONS = np.zeros((3, 0), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class _Lot:
    """A share on its way through the forward."""

    share: TensorShare
    split: int  # where its rows leave the prefix
    prefix: KeptPrefix[Tensor]  # kept from before, or to be filled now
    prefix_positions: Ids  # [3, tokens] of what of the prefix is computed now
    delta: int

    @property
    def num_new(self) -> int:
        """Prefix tokens to be computed now."""
        return int(self.prefix_positions.shape[1])

    @property
    def new_ids(self) -> Ids:
        return self.prefix.ids[self.split - self.num_new :]

    @property
    def suffix_lengths(self) -> tuple[int, ...]:
        return tuple(len(row) - self.split for row in self.share.rows)


def _suffix_positions(lots: Sequence[_Lot]) -> Iterator[Ids]:
    for lot in lots:
        for row in lot.share.rows:
            yield np.tile(np.arange(lot.split, len(row), dtype=np.int64) + lot.delta, (3, 1))


def _close(first: Tensor, second: Tensor) -> bool:
    """[tokens, ..], all together and each by itself, against what tokens differ by: a bias that all share would hide any fault.

    A step of the format is never a fault, however alike the tokens are.
    """
    one, other = first.flatten(1).float(), second.flatten(1).float()
    own = (one - _middle(one)).norm(dim=1) if len(one) > 1 else one.norm(dim=1)
    off, step = (one - other).norm(dim=1), torch.finfo(first.dtype).eps * one.norm(dim=1)
    allowed = _AGREEMENT[first.dtype]
    is_near = off.norm() <= torch.maximum(allowed * own.norm(), step.norm())
    are_near = off <= torch.maximum(_AGREEMENT_OF_ONE * allowed * torch.maximum(own, own.median()), step)
    return bool(is_near and are_near.all())


def _middle(tokens: Tensor) -> Tensor:
    """What tokens have in common; where there are enough, not moved by the few that are a thousand times larger than others."""
    return tokens.median(0).values if len(tokens) >= _ENOUGH_TOKENS else tokens.mean(0)


def _peak_on_cpu(work: Callable[[], object]) -> int:
    """0 where nobody tells."""
    before, was_reset = resident_bytes(), reset_peak()
    work()
    peak = peak_bytes()
    return 0 if before is None or peak is None or not was_reset else max(0, peak - before)
