"""What the start says of an artifact's records, and of captions that spell control tokens. Planted faults show the other refusals."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest

from app.artifacts import Artifact, RewardModelConfig
from app.encoding import load_encoder
from app.startcheck import of_artifact, specials


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


def test_captions_that_spell_control_tokens_stay_text(artifact: Artifact) -> None:
    """X4: every added token of the tokenizer, not only those a table thought of."""
    encoder = load_encoder(artifact)
    finding = specials(encoder)
    assert finding.passed
    assert finding.message.startswith("{0} of {0} captions".format(len(encoder.special_tokens)))
    assert len(encoder.special_tokens) >= 3


def test_a_tokenizer_that_takes_them_for_control_tokens_is_refused(artifact: Artifact) -> None:
    encoder = load_encoder(artifact)
    encoder._plain.encode_special_tokens = False
    finding = specials(encoder)
    assert not finding.passed
    assert finding.check == "C12 special"


def test_where_no_caption_can_be_encoded_nothing_is_shown(artifact: Artifact) -> None:
    encoder = load_encoder(artifact)
    encoder._config = encoder.config.model_copy(update={"max_caption_tokens": 0})
    assert not specials(encoder).passed
