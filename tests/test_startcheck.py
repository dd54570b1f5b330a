"""What the start says of an artifact's records, and of captions that spell control tokens. Planted faults show the other refusals."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from app.artifacts import Artifact, Golden, GoldenItem, RewardModelConfig
from app.encoding import Encoder, load_encoder
from app.golden import make_pictures, pixel_libraries
from app.startcheck import modes, of_artifact, specials


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
    encoder._plain.backend.encode_special_tokens = False
    finding = specials(encoder)
    assert not finding.passed
    assert finding.check == "C12 special"


def test_where_no_caption_can_be_encoded_nothing_is_shown(artifact: Artifact) -> None:
    encoder = load_encoder(artifact)
    encoder._config = encoder.config.model_copy(update={"max_caption_tokens": 0})
    assert not specials(encoder).passed


def golden_of(encoder: Encoder) -> Golden:
    return Golden(
        tolerance={"float32": 1e-4, "bfloat16": 0.1},
        items=[GoldenItem(image=None, captions=["a"], scores=[0.0])],
        made_with=pixel_libraries(),
        pictures=make_pictures(encoder),
    )


def test_a_picture_in_each_mode_becomes_the_pixels_it_had(artifact: Artifact) -> None:
    encoder = load_encoder(artifact)
    golden = golden_of(encoder)
    assert [each.mode for each in golden.pictures] == ["RGBA", "palette", "grey", "CMYK", "RGB, turned"]
    assert len({each.pixels_sha256 for each in golden.pictures}) == 5, "each has pixels of its own"
    assert modes(golden, encoder).passed
    assert modes(golden, encoder).message == "5 modes of pictures have the pixels they had at export"


def test_pictures_of_a_file_say_the_same_elsewhere(artifact: Artifact) -> None:
    """They are kept as bytes: whatever would write them anew, another version, say, makes others."""
    encoder = load_encoder(artifact)
    golden = Golden.model_validate_json(golden_of(encoder).model_dump_json())
    assert modes(golden, encoder).passed
    with Image.open(io.BytesIO(base64.b64decode(golden.pictures[3].data))) as image:
        assert (image.mode, image.format) == ("CMYK", "JPEG")


@pytest.mark.parametrize(("recipe", "fails"), [({"alpha": "white"}, "RGBA"), ({"exif_transpose": None}, "RGB, turned")])
def test_a_mode_that_becomes_other_pixels_is_named(artifact: Artifact, recipe: dict[str, Any], fails: str) -> None:
    encoder = load_encoder(artifact)
    golden = golden_of(encoder)
    before = encoder.config.image
    changed = before.model_copy(update={name: not before.exif_transpose if value is None else value for name, value in recipe.items()})
    other = load_encoder(replace(artifact, config=artifact.config.model_copy(update={"image": changed})))
    found = modes(golden, other)
    assert (found.passed, found.message) == (False, f"pictures have other pixels than at export: {fails}")
    libraries = pixel_libraries() | {"pillow": "1.0"}
    found = modes(golden.model_copy(update={"made_with": libraries}), other)
    assert found.passed, "another library may round: then scores must do"
    assert f"pillow 1.0 there, {version('pillow')} here" in found.message


def test_a_picture_that_cannot_be_read_fails(artifact: Artifact) -> None:
    encoder = load_encoder(artifact)
    golden = golden_of(encoder)
    cut = golden.pictures[0].model_copy(update={"data": golden.pictures[0].data[:400]})
    found = modes(golden.model_copy(update={"pictures": [cut]}), encoder)
    assert not found.passed
    assert found.message.startswith("a picture of golden.json cannot be read")


@pytest.mark.parametrize("data", ["abc", "ab!d", "AAAA\n", "A==="])
def test_pictures_are_base64(artifact: Artifact, data: str) -> None:
    golden = golden_of(load_encoder(artifact)).model_dump(mode="json")
    golden["pictures"][0]["data"] = data
    with pytest.raises(ValidationError):
        Golden.model_validate_json(json.dumps(golden))


def test_goldens_without_such_pictures_say_so(artifact: Artifact) -> None:
    encoder = load_encoder(artifact)
    assert modes(golden_of(encoder).model_copy(update={"pictures": []}), encoder).message == "not recorded in golden.json"
