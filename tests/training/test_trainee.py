"""Dropout on embeddings: in training only, on text only, at its rate."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.recipe import Regularisation
from training.trainee import drop_embeddings, load_trained


def embedding(**wanted: float) -> nn.Embedding:
    layer = nn.Embedding(10, 8)
    nn.init.ones_(layer.weight)
    drop_embeddings(layer, Regularisation(**wanted))
    return layer


def test_whole_tokens_are_dropped() -> None:
    torch.manual_seed(0)
    embedded = embedding(token_dropout=0.25)(torch.zeros(4000, dtype=torch.long))
    dropped = (embedded == 0).all(-1)
    assert torch.equal(dropped, (embedded == 0).any(-1))
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_single_values_are_dropped_and_the_rest_made_larger() -> None:
    torch.manual_seed(0)
    embedded = embedding(embedding_dropout=0.5)(torch.zeros(4000, dtype=torch.long))
    assert set(embedded.unique().tolist()) == {0.0, 2.0}
    assert embedded.mean().item() == pytest.approx(1.0, abs=0.05)


def test_nothing_is_dropped_outside_training_or_unasked() -> None:
    ids = torch.zeros(100, dtype=torch.long)
    assert embedding(token_dropout=0.9, embedding_dropout=0.9).eval()(ids).min() == 1
    assert embedding()(ids).min() == 1
    assert not embedding()._forward_hooks


@pytest.mark.parametrize("tensors", [{}, {"weight": torch.zeros(3, 2)}, {"weight": torch.zeros(2, 3), "more": torch.zeros(1)}])
def test_trained_weights_that_do_not_fit_are_refused(tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"weight|more"):
        load_trained(nn.Linear(3, 2, bias=False), tensors)
