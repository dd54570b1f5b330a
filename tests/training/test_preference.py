"""Bradley-Terry on packed pairs: the arithmetic by hand, the scores against the slow twin, who gets gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import AutoModel

from app.artifacts import Artifact
from app.contracts import EncodedImage
from app.encoding import Encoder
from app.errors import ItemRejected
from app.heads import LinearHead
from app.images import decode_image
from app.model import LoadedModel, RewardModel
from app.scoring import score_plain
from tests.tiny import LIMITS, picture
from training.optimisation import Optimisation, rate_share
from training.preference import PairScores, bradley_terry_loss, encode_pairs, measure_margins, preference_loss, score_pairs
from training.recipe import Lora
from training.trainee import add_lora

PAIRS = [
    ("The penguin brought an umbrella.", "It rains."),
    ("Casual Friday again.", "The octopus is at the office."),
    ("It rains.", "Ice."),
]


def image_of(encoder: Encoder, seed: int) -> EncodedImage:
    return encoder.encode_image(decode_image(picture(84, 56, seed), LIMITS, exif_transpose=False))


def test_loss_by_hand() -> None:
    """-log sigmoid(m) = log(1 + exp(-m)): ln 2 at 0; log(1 + 1/3) at ln 3; their mean is 0.4904."""
    margins = torch.tensor([0.0, math.log(3)])
    assert bradley_terry_loss(margins).item() == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)


def test_loss_of_a_hopeless_pair_stays_finite() -> None:
    margins = torch.tensor([-1e4], requires_grad=True)
    loss = bradley_terry_loss(margins)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(1e4)
    assert margins.grad is not None
    assert margins.grad.item() == pytest.approx(-1.0)


def test_centring_by_hand() -> None:
    """Scores (3, 1) and (-1, 0): sums 4 and -1, mean square 8.5; a tenth of it comes on top of the pairs' loss."""
    scores = PairScores(torch.tensor([3.0, -1.0]), torch.tensor([1.0, 0.0]))
    plain = preference_loss(scores)
    assert plain.item() == pytest.approx((math.log(1 + math.exp(-2)) + math.log(1 + math.e)) / 2)
    assert preference_loss(scores, centring=0.1).item() == pytest.approx(plain.item() + 0.85)


def test_a_margin_asked_is_taken_off_the_margin() -> None:
    scores = PairScores(torch.tensor([3.0]), torch.tensor([1.0]))
    assert preference_loss(scores, asked=torch.tensor([2.0])).item() == pytest.approx(math.log(2))


def test_packed_pairs_score_as_captions_by_themselves(encoder: Encoder, loaded: LoadedModel) -> None:
    """Several pairs of one picture, two pictures, one caption on both sides: same margins as one forward a caption."""
    groups = [encode_pairs(encoder, image_of(encoder, 0), None, PAIRS), encode_pairs(encoder, image_of(encoder, 1), None, PAIRS[:2])]
    with torch.no_grad():
        found = score_pairs(loaded.model, groups)
    expected_chosen, expected_rejected = [], []
    for scores, group in zip(score_plain(loaded.model, groups), groups, strict=True):
        half = len(group.rows) // 2
        expected_chosen += scores.values[:half]
        expected_rejected += scores.values[half:]
    torch.testing.assert_close(found.chosen, torch.tensor(expected_chosen), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.rejected, torch.tensor(expected_rejected), atol=1e-5, rtol=0)
    assert measure_margins(loaded.model, groups, groups_per_batch=1) == pytest.approx(found.margins.tolist(), abs=1e-5)


def test_a_caption_that_cannot_be_scored_stops_the_training(encoder: Encoder) -> None:
    with pytest.raises(ItemRejected):
        encode_pairs(encoder, image_of(encoder, 0), None, [("fine", "long " * 500)])


def test_training_starts_at_ln_2_moves_only_adapter_and_head_and_learns(artifact: Artifact, encoder: Encoder) -> None:
    torch.manual_seed(0)
    backbone = AutoModel.from_pretrained(artifact.base_path, dtype=torch.float32)
    head = LinearHead(backbone.config.get_text_config().hidden_size)
    model = RewardModel(add_lora(backbone, Lora(r=2, alpha=4)).get_base_model(), head)
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    groups = [encode_pairs(encoder, image_of(encoder, seed), None, PAIRS) for seed in (0, 1)]
    optimisation = Optimisation(model.parameters(), num_steps=18, learning_rate=5e-3)
    losses = []
    for _ in range(18):
        loss = bradley_terry_loss(score_pairs(model, groups).margins)
        optimisation.step(loss)
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.3
    names = {name for name, value in model.named_parameters() if value.requires_grad}
    assert all("lora_" in name or name.startswith("head.") for name in names)
    assert all(torch.equal(value, frozen[name]) for name, value in model.named_parameters() if name in frozen)
    assert any("visual" in name for name in names)
    assert all(value.any() for name, value in model.named_parameters() if "lora_B" in name)


def test_a_nonfinite_loss_is_refused() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    optimisation = Optimisation([weight], num_steps=1, learning_rate=1.0)
    with pytest.raises(FloatingPointError):
        optimisation.step((weight * float("nan")).sum())
    assert weight.item() == 1.0


def test_rate_rises_in_a_line_and_falls_to_its_final_share() -> None:
    rates = [rate_share(step, num_steps=100, num_warmup_steps=10, final_share=0.1) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))
