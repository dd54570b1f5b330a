"""Shared-prefix scoring against its slow twin, one forward a caption, and both against the published recipe."""

from __future__ import annotations

import io
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.ExifTags import Base

from app.artifacts import Artifact
from app.contracts import EncodedGroup, EncodedImage, Group
from app.encoding import Encoder
from app.images import decode_image
from app.model import LoadedModel, load_model
from app.scoring import score_plain, score_shared
from tests import reference
from tests.tiny import LIMITS, VISION_FAMILIES, VisionFamily, copy_artifact, edit_json, encode, load_whole, picture

WORDS = ["the", "penguin", "umbrella", "office", "is", "it", "about", "an", "iceberg", "nobody", "told"]
WORDS += ["企鵝", "🐧", "naïve", "<|im_end|>", "cat-like", "\u0301", "{prompt}", "{caption}", "why"]
PROMPTS = (None, "", "Be kind.", "Scene: an office.\nTwist: a penguin holds an umbrella.")


@st.composite
def captions(draw: st.DrawFn) -> list[str]:
    """1 to 64 captions: short and long, duplicates, Unicode, and families that share a long beginning."""
    count = draw(st.sampled_from([1, 2, 3, 8, 17, 64]))
    chance = random.Random(draw(st.integers(0, 2**32)))
    opening = " ".join(chance.choices(WORDS, k=12))
    texts: list[str] = []
    for _ in range(count):
        kind = chance.random()
        if texts and kind < 0.2:
            texts.append(chance.choice(texts))
        elif kind < 0.5:
            texts.append(f"{opening} {' '.join(chance.choices(WORDS, k=chance.randint(0, 3)))}")
        else:
            texts.append(" ".join(chance.choices(WORDS, k=chance.randint(0, 20)))[: chance.randint(0, 90)])
    return texts


@st.composite
def group_arguments(draw: st.DrawFn) -> tuple[tuple[int, int], int, list[str], str | None]:
    size = draw(st.tuples(st.integers(16, 700), st.integers(16, 700)))
    return size, draw(st.integers(0, 3)), draw(captions()), draw(st.sampled_from(PROMPTS))


@pytest.fixture(scope="module")
def whole_of(published_of: Callable[[VisionFamily], Path]) -> Callable[..., tuple[Encoder, LoadedModel]]:
    """Of a family, and of its adapter merged or not."""

    @cache
    def whole(family: VisionFamily, lora: str = "merged") -> tuple[Encoder, LoadedModel]:
        return load_whole(published_of(family), lora=lora)

    return whole


@pytest.mark.parametrize("family", VISION_FAMILIES)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(arguments=st.lists(group_arguments(), min_size=1, max_size=4))
def test_shared_equals_plain_on_any_mix(
    whole_of: Callable[..., tuple[Encoder, LoadedModel]], family: VisionFamily, arguments: list[tuple]
) -> None:
    encoder, loaded = whole_of(family)
    groups = [encode(encoder, *each) for each in fitted(encoder, arguments)]
    shared, plain = score_shared(loaded.model, groups), score_plain(loaded.model, groups)
    found = np.concatenate([scores.values for scores in shared])
    expected = np.concatenate([scores.values for scores in plain])
    assert np.abs(found - expected).max() <= 1e-5 * expected.std() + 1e-5


def fitted(encoder: Encoder, arguments: list[tuple]) -> list[tuple]:
    """Cut captions that random words made longer than the artifact allows."""
    limit = encoder.config.max_caption_tokens
    return [
        (size, seed, [text[: limit // 3] if len(text.encode()) > limit else text for text in texts], prompt)
        for size, seed, texts, prompt in arguments
    ]


def test_captions_of_80_tokens_and_1_token(loaded: LoadedModel, encoder: Encoder) -> None:
    limit = encoder.config.max_caption_tokens
    group = encode(encoder, (300, 200), 0, ["é" * (limit // 2), "x", ""], None)
    (shared,), (plain,) = score_shared(loaded.model, [group]), score_plain(loaded.model, [group])
    assert np.abs(np.subtract(shared.values, plain.values)).max() <= 1e-5


def test_scores_are_not_trivially_equal(loaded: LoadedModel, encoder: Encoder) -> None:
    """The equivalence above would mean nothing if captions or pictures did not matter."""
    texts = ["the penguin", "an iceberg", "nobody told the cat"]
    one, other = (encode(encoder, (300, 200), seed, texts, None) for seed in (0, 1))
    first, second = score_shared(loaded.model, [one, other])
    assert np.std(first.values) > 1e-2
    assert np.abs(np.subtract(first.values, second.values)).max() > 1e-3


def test_equal_captions_get_equal_bits_and_are_computed_once(loaded: LoadedModel, encoder: Encoder) -> None:
    once = encode(encoder, (200, 100), 0, ["the penguin", "an iceberg"], None)
    often = encode(encoder, (200, 100), 0, ["the penguin"] * 7 + ["an iceberg"], None)
    (few,), (many,) = score_shared(loaded.model, [once]), score_shared(loaded.model, [often])
    assert set(many.values[:7]) == {few.values[0]}
    assert many.num_computed_tokens == few.num_computed_tokens


def test_groups_of_one_image_and_prompt_are_one_group(loaded: LoadedModel, encoder: Encoder) -> None:
    apart = [encode(encoder, (200, 100), 0, [text], None) for text in ("the penguin", "an iceberg", "why")]
    together = encode(encoder, (200, 100), 0, ["the penguin", "an iceberg", "why"], None)
    several, (one,) = score_shared(loaded.model, apart), score_shared(loaded.model, [together])
    assert sum(scores.num_computed_tokens for scores in several) == one.num_computed_tokens
    assert [scores.values[0] for scores in several] == list(one.values)


def test_a_wrong_picture_size_cannot_be_packed(loaded: LoadedModel, encoder: Encoder) -> None:
    group = encode(encoder, (200, 100), 0, ["the penguin"], None)
    image = group.image
    assert image is not None
    other = EncodedImage(image.image_id, image.patches, image.grid_thw, image.num_tokens + 1)
    broken = EncodedGroup(group.key, other, group.rows, group.num_prefix)
    with pytest.raises(ValueError, match="shared prefix"):
        score_shared(loaded.model, [broken])


def test_picture_fixture_is_decodable() -> None:
    assert io.BytesIO(picture(20, 30)).getvalue()[:4] == b"\x89PNG"


CAPTIONS = [
    "the penguin",
    "  spaces around \n",
    "企鵝 naïve 🐧",
    "",
    "nobody told the cat about casual Friday, it seems",
    "{prompt} {caption}",
]
PICTURES = [((2560, 1978), "PNG", "RGB"), ((600, 415), "JPEG", "RGB"), ((90, 300), "PNG", "L"), ((64, 64), "PNG", "P")]
LONG_PROMPT = "Scene: an office. " * 60
CASES = [(0, None), (1, None), (1, LONG_PROMPT), (2, "Be kind."), (3, None)]  # picture and prompt


@pytest.fixture(scope="module")
def unmerged(artifact: Artifact) -> LoadedModel:
    return load_model(artifact, lora="unmerged")


@pytest.fixture(scope="module")
def expected(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str | None], list[float]]:
    """Scores by the published recipe."""
    folder, published = tmp_path_factory.mktemp("pictures"), reference.load(artifact.root)
    for number, (size, kind, mode) in enumerate(PICTURES):
        (folder / str(number)).write_bytes(picture(*size, number, kind, mode))
    return {(number, prompt): published.score(folder / str(number), CAPTIONS, prompt) for number, prompt in CASES}


def group_of(encoder: Encoder, number: int, prompt: str | None) -> EncodedGroup:
    size, kind, mode = PICTURES[number]
    image = encoder.encode_image(decode_image(picture(*size, number, kind, mode), LIMITS, exif_transpose=False))
    group, _ = encoder.encode(Group(tuple(CAPTIONS), prompt, image))
    assert group is not None
    return group


@pytest.mark.parametrize("lora", ["merged", "unmerged"])
@pytest.mark.parametrize("score", [score_plain, score_shared])
def test_scores_are_those_of_the_published_recipe(
    encoder: Encoder,
    loaded: LoadedModel,
    unmerged: LoadedModel,
    expected: dict[tuple[int, str | None], list[float]],
    lora: str,
    score: object,
) -> None:
    model = loaded.model if lora == "merged" else unmerged.model
    groups = [group_of(encoder, *key) for key in expected]
    found = score(model, groups)  # type: ignore[operator]
    for scores, wanted in zip(found, expected.values(), strict=True):
        assert np.abs(np.subtract(scores.values, wanted)).max() <= 1e-4
        assert np.std(wanted) > 1e-2


@pytest.mark.parametrize("lora", ["merged", "unmerged"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_other_families_score_by_the_published_recipe_as_well(
    published_of: Callable[[VisionFamily], Path],
    whole_of: Callable[..., tuple[Encoder, LoadedModel]],
    tmp_path: Path,
    family: VisionFamily,
    lora: str,
) -> None:
    encoder, loaded = whole_of(family, lora)
    published = reference.load(published_of(family))
    for number, prompt in CASES:
        size, kind, mode = PICTURES[number]
        (tmp_path / str(number)).write_bytes(picture(*size, number, kind, mode))
        wanted = published.score(tmp_path / str(number), CAPTIONS, prompt)
        group = group_of(encoder, number, prompt)
        for score in (score_plain, score_shared):
            assert np.abs(np.subtract(score(loaded.model, [group])[0].values, wanted)).max() <= 1e-4 * np.std(wanted)
        assert np.std(wanted) > 1e-2


def test_the_reference_reads_a_full_configuration(published: Path, tmp_path: Path) -> None:
    """Another recipe, a base inside the artifact and a picture with an orientation tag: both sides follow the configuration."""
    root = copy_artifact(published, tmp_path)
    shutil.move(tmp_path / "base", root / "base")
    recipe = {"long_edge": 150, "resample": "bicubic", "exif_transpose": True}
    edit_json(
        root / "reward_model_config.json",
        base_model_name="./base",
        image=recipe,
        template="Caption: {caption}\nTask: {prompt}",
        default_prompt="Be kind.",
        max_prompt_tokens=9,
    )
    encoder, loaded = load_whole(root)
    data = turned_picture()
    (tmp_path / "turned.png").write_bytes(data)
    image = encoder.encode_image(decode_image(data, LIMITS, exif_transpose=True))
    for prompt in (None, "A prompt of more than nine tokens, to be cut."):
        group, _ = encoder.encode(Group(tuple(CAPTIONS), prompt, image))
        assert group is not None
        wanted = reference.load(root).score(tmp_path / "turned.png", CAPTIONS, prompt)
        assert np.abs(np.subtract(score_shared(loaded.model, [group])[0].values, wanted)).max() <= 1e-4


def turned_picture() -> bytes:
    """A picture that says it lies on its side."""
    stream = io.BytesIO()
    with Image.open(io.BytesIO(picture(200, 120))) as image:
        exif = image.getexif()
        exif[Base.Orientation] = 6
        image.save(stream, "PNG", exif=exif)
    return stream.getvalue()


def test_the_reference_runs_as_a_script(published: Path, tmp_path: Path, encoder: Encoder, loaded: LoadedModel) -> None:
    """With the published libraries alone: `-P` keeps this repository off the path."""
    (tmp_path / "image.png").write_bytes(picture(300, 200))
    command = [sys.executable, "-P", reference.__file__, str(published), str(tmp_path / "image.png"), *CAPTIONS[:2], "--prompt", "Be kind."]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    group = encode(encoder, (300, 200), 0, CAPTIONS[:2], "Be kind.")
    found = json.loads(run.stdout)["scores"]
    assert np.abs(np.subtract(score_shared(loaded.model, [group])[0].values, found)).max() <= 1e-4
    assert "import app" not in Path(reference.__file__).read_text()
    assert "from app" not in Path(reference.__file__).read_text()


def test_the_order_of_asking_changes_no_bit(loaded: LoadedModel, encoder: Encoder) -> None:
    texts = ["the penguin", "an iceberg", "nobody told the cat", "why"]
    groups = [encode(encoder, (200, 100), seed, texts, None) for seed in (0, 1)]
    turned = [encode(encoder, (200, 100), seed, texts[::-1], None) for seed in (1, 0)]
    straight, backwards = score_shared(loaded.model, groups), score_shared(loaded.model, turned)
    assert [scores.values for scores in straight] == [scores.values[::-1] for scores in backwards[::-1]]
