"""The moving average, its first steps worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.averaging import Average


def test_the_first_steps_by_hand() -> None:
    """Decay 2/11 after step 1, 3/12 after step 2: 0 -> 9/11 of 1 -> (1/4)(9/11) + (3/4) 2 = 1.7045."""
    weight = nn.Parameter(torch.zeros(1))
    average = Average({"w": weight}, decay=0.9)
    for step, value in ((1, 1.0), (2, 2.0)):
        weight.data.fill_(value)
        average.update(step)
    assert average.tensors["w"].item() == pytest.approx(9 / 11 / 4 + 1.5)


def test_the_decay_is_never_larger_than_asked() -> None:
    """After many steps the decay asked for holds: 0.5 of 4 and 0.5 of 0."""
    weight = nn.Parameter(torch.full((1,), 4.0))
    average = Average({"w": weight}, decay=0.5)
    weight.data.zero_()
    average.update(1000)
    assert average.tensors["w"].item() == pytest.approx(2.0)


def test_in_place_and_back_to_the_bit() -> None:
    weight = nn.Parameter(torch.tensor([0.1, 0.7]))
    average = Average({"w": weight}, decay=0.5)
    weight.data.add_(0.3)
    before, kept = weight.detach().clone(), average.tensors["w"].clone()
    with average.in_place():
        assert torch.equal(weight, kept)
    assert torch.equal(weight, before)
    assert torch.equal(average.tensors["w"], kept)


def test_an_average_of_other_weights_is_refused() -> None:
    average = Average({"w": nn.Parameter(torch.zeros(1))}, decay=0.5)
    with pytest.raises(ValueError, match="other weights"):
        average.load({"v": torch.zeros(1)})
