"""What the start says of an artifact's own records. The checks that refuse are shown by the planted faults."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest

from app.artifacts import RewardModelConfig
from app.startcheck import of_artifact


def messages(**fields: Any) -> list[str]:
    config = RewardModelConfig.model_validate({"base_model_name": "a/b", "score_head_shape": (1, 8), **fields})
    findings = list(of_artifact(config))
    assert [finding.check for finding in findings] == ["A2 files", "A3 versions"]
    assert all(finding.passed for finding in findings)
    return [finding.message for finding in findings]


def test_an_artifact_without_records_says_so() -> None:
    assert messages() == ["no sha256 recorded: nothing vouches for the files", "not recorded"]


def test_recorded_hashes_are_counted() -> None:
    assert messages(files={"a": "0" * 64, "b": "1" * 64})[0] == "2 files have the sha256 recorded"


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        ({"numpy": version("numpy")}, "those it was trained with"),
        (
            {"numpy": "0.1", "no-such-library": "2.0"},
            f"no-such-library none, trained with 2.0; numpy {version('numpy')}, trained with 0.1",
        ),
        ({}, "not recorded"),
        ("numpy 2", "not recorded"),
    ],
)
def test_other_libraries_than_in_training_are_named(recorded: Any, message: str) -> None:
    assert messages(training={"versions": recorded})[1] == message
