"""The serving forward on a GPU: bf16 against float32 with a stated tolerance, and no waiting for the device before the scores."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from app.artifacts import Artifact, open_artifact
from app.contracts import EncodedGroup
from app.encoding import Encoder, load_encoder
from app.engine import Engine
from app.model import load_model
from app.reuse import Share
from app.scoring import score_plain
from tests import tiny
from tests.scorers import MIB, reusing

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# Of scores that spread by about 1: two bf16 roundings of a few layers each, measured on a CPU at 0.016, with room for other kernels.
TOLERANCE = 0.05


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    root: Path = tmp_path_factory.mktemp("gpu")
    return open_artifact(str(tiny.write_published(root)))


@pytest.fixture(scope="module")
def groups(artifact: Artifact) -> list[EncodedGroup]:
    encoder: Encoder = load_encoder(artifact)
    captions = ["A dog.", "The cat sat on a mat and it was flat.", "It says it is here about the iceberg."]
    return [tiny.encode(encoder, (200, 100), 0, captions), tiny.encode(encoder, (320, 240), 1, captions[::-1])]


def test_bf16_on_the_gpu_against_float32_on_the_cpu(artifact: Artifact, groups: list[EncodedGroup]) -> None:
    exact = score_plain(load_model(artifact, device="cpu", dtype="float32").model, groups)
    model = load_model(artifact, device="cuda", dtype="bfloat16").model
    scorer = reusing(Engine(model), lead_ids=load_encoder(artifact).lead_ids)
    for found in (scorer.score(scorer.prepare(groups)), score_plain(model, groups)):  # fast way and slow twin
        for scores, expected in zip(found, exact, strict=True):
            assert scores.values == pytest.approx(expected.values, abs=TOLERANCE)


def test_float32_on_the_gpu_is_float32(artifact: Artifact, groups: list[EncodedGroup]) -> None:
    exact = score_plain(load_model(artifact, device="cpu", dtype="float32").model, groups)
    scorer = reusing(Engine(load_model(artifact, device="cuda", dtype="float32").model))
    for scores, expected in zip(scorer.score(scorer.prepare(groups)), exact, strict=True):
        assert scores.values == pytest.approx(expected.values, abs=1e-4)


def test_the_forward_waits_for_the_device_only_to_read_the_scores(artifact: Artifact, groups: list[EncodedGroup]) -> None:
    engine = Engine(load_model(artifact, device="cuda", dtype="bfloat16").model)
    group, image = groups[0], groups[0].image
    assert image is not None
    share: Share[torch.Tensor, torch.Tensor] = Share(
        group.rows[0][: group.num_prefix], group.rows, image, engine.image_features(image), None
    )
    engine.forward([share])  # what is set up once may wait
    alone = replace(share, rows=())
    engine.forward([alone])
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.image_features(image)
        engine.forward([alone])  # without rows there are no scores to read
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_picture_sent_ahead_gives_the_same_features_and_nobody_waits(artifact: Artifact, groups: list[EncodedGroup]) -> None:
    """Staged from another thread, as the loop does, while the device works; taken in another order."""
    engine = Engine(load_model(artifact, device="cuda", dtype="bfloat16").model)
    images = [group.image for group in groups if group.image is not None]
    expected = [engine.image_features(image) for image in images]
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as pool:
        staged = list(pool.map(engine.stage, images))
    assert all(each.arrived is not None and each.tensor.is_cuda for each in staged)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [engine.image_features(image, ahead) for image, ahead in reversed(list(zip(images, staged, strict=True)))]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(one, other) for one, other in zip(found[::-1], expected, strict=True))


def test_the_shape_of_a_new_picture_makes_nobody_wait(artifact: Artifact, groups: list[EncodedGroup]) -> None:
    engine = Engine(load_model(artifact, device="cuda", dtype="bfloat16").model)
    first, second = (group.image for group in groups)
    assert first is not None
    assert second is not None
    assert first.grid_thw != second.grid_thw
    engine.image_features(first)  # what is set up once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.image_features(second)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bytes_per_token_on_the_gpu_count_the_pictures_sent_ahead(artifact: Artifact) -> None:
    engine = Engine(load_model(artifact, device="cuda", dtype="bfloat16").model)
    patch_bytes = 4 * 3 * 2 * 14 * 14 * 4  # of a token: four patches in float32
    assert engine.measure_bytes_per_token(2000) >= 2 * patch_bytes


def test_deterministic_scores_do_not_depend_on_company(artifact: Artifact, groups: list[EncodedGroup]) -> None:
    scorer = reusing(
        Engine(load_model(artifact, device="cuda", dtype="bfloat16").model),
        deterministic=True,
        max_bytes=(MIB, MIB, 0),
        lead_ids=load_encoder(artifact).lead_ids,
    )
    together = scorer.score(scorer.prepare(groups))
    alone = [scorer.score(scorer.prepare([group]))[0] for group in groups]
    assert [scores.values for scores in together] == [scores.values for scores in alone]
