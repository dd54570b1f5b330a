"""A published artifact made whole: nothing assumed, every file hashed, the same scores; and nothing left behind on failure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from app.artifacts import CONFIG_NAME, RewardModelConfig, base_sha256, file_sha256, open_artifact
from app.converting import GoldenInput, convert, default_inputs, read_inputs
from app.errors import ArtifactInvalid
from app.golden import tolerance_of
from app.scoring import score_plain, score_shared
from tests.tiny import copy_artifact, edit_json, edit_tensors, encode, load_whole, picture

CAPTIONS = ("the penguin", "an iceberg", "", "企鵝 <|im_end|>")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[GoldenInput]:
    folder = tmp_path_factory.mktemp("golden")
    (folder / "wide.png").write_bytes(picture(600, 200))
    (folder / "tall.jpg").write_bytes(picture(90, 300, 1, "JPEG"))
    return [GoldenInput(folder / "wide.png", CAPTIONS), GoldenInput(folder / "tall.jpg", CAPTIONS[:2], "Be kind.")]


@pytest.fixture(scope="module")
def converted(published: Path, inputs: list[GoldenInput], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("converted") / "deep" / "artifact"
    return run(published, target, inputs)


def run(source: Path, target: Path, inputs: list[GoldenInput], base_model: str | None = None) -> Path:
    steps: list[str] = []
    result = convert(str(source), target, base_model=base_model, inputs=inputs, offline=True, progress=steps.append)
    assert steps
    return result


def test_nothing_is_assumed_any_more(converted: Path) -> None:
    opened = open_artifact(str(converted))
    assert opened.assumed == ()
    assert set(json.loads((converted / CONFIG_NAME).read_bytes())) == set(RewardModelConfig.model_fields)
    assert opened.config.base_model_sha256 == base_sha256(opened.base_path)


def test_the_head_is_safetensors_and_every_file_is_hashed(converted: Path) -> None:
    names = {str(path.relative_to(converted)) for path in converted.rglob("*") if path.is_file()}
    assert "reward_head.safetensors" in names
    assert not any(name.endswith(".pt") for name in names)
    files = open_artifact(str(converted)).config.files
    assert set(files) == names - {CONFIG_NAME}
    assert all(file_sha256(converted / name) == digest for name, digest in files.items())


def test_every_file_is_readable_to_a_container_of_another_user(converted: Path) -> None:
    assert {path.stat().st_mode & 0o444 for path in converted.rglob("*")} == {0o444}


def test_both_artifacts_give_equal_bits(converted: Path, published: Path) -> None:
    (old_encoder, old), (new_encoder, new) = load_whole(published), load_whole(converted)
    for score in (score_shared, score_plain):
        groups = [encode(encoder, (300, 200), 0, CAPTIONS, "A prompt.") for encoder in (old_encoder, new_encoder)]
        assert score(old.model, groups[:1]) == score(new.model, groups[1:])
    assert old.fingerprint != new.fingerprint  # another head file


def test_names_of_the_whole_model_are_converted_as_those_of_the_backbone(
    published: Path, converted: Path, inputs: list[GoldenInput], tmp_path: Path
) -> None:
    """As transformers 5 writes a base, and peft the adapter of a whole model; the golden scores show that the same is computed."""
    root = copy_artifact(published, tmp_path)
    pairs = {"visual.": "model.visual.", "model.": "model.language_model."}
    rename_keys(tmp_path / "base/model.safetensors", lambda name: next(new + name[len(old) :] for old, new in pairs.items() if old in name))
    rename_keys(root / "backbone_adapter/adapter_model.safetensors", lambda name: name.replace(".model.", ".model.model.", 1))
    found, expected = (open_artifact(str(each)).golden() for each in (run(root, tmp_path / "converted", inputs), converted))
    assert found is not None
    assert found == expected


def rename_keys(path: Path, name_of: Callable[[str], str]) -> None:
    edit_tensors(path, lambda tensors: [tensors.__setitem__(name_of(name), tensors.pop(name)) for name in list(tensors)])


def test_golden_scores_are_those_of_plain_float32(converted: Path, inputs: list[GoldenInput]) -> None:
    golden = open_artifact(str(converted)).golden()
    assert golden is not None
    assert [item.captions for item in golden.items] == [list(each.captions) for each in inputs]
    assert [item.image for item in golden.items] == ["golden/0.png", "golden/1.jpg"]
    encoder, loaded = load_whole(converted, dtype="float32")
    (scores,) = score_plain(loaded.model, [encode(encoder, (600, 200), 0, CAPTIONS)])
    assert np.abs(np.subtract(scores.values, golden.items[0].scores)).max() == 0


@pytest.mark.parametrize(
    ("scores", "float32", "bfloat16"),
    [
        ([1.0, -1.0], 1e-4, 0.1),
        ([3.0, -3.0], 3e-4, 0.3),
        ([0.005, -0.005], 5e-5, 0.1),
        ([0.001, -0.001], 2e-5, 0.1),
        ([0.7], 1e-4, 0.1),
    ],
)
def test_tolerances_follow_the_spread_of_the_scores(scores: list[float], float32: float, bfloat16: float) -> None:
    """Plus and minus x spread by x: wide scores round further, and close ones may differ by a hundredth of x, but not below 2e-5."""
    assert tolerance_of(scores) == {"float32": pytest.approx(float32), "bfloat16": pytest.approx(bfloat16)}


@pytest.mark.parametrize("max_prompt_tokens", [160, 2000])
def test_one_default_prompt_is_longer_than_any_budget(converted: Path, max_prompt_tokens: int) -> None:
    config = open_artifact(str(converted)).config.model_copy(update={"max_prompt_tokens": max_prompt_tokens})
    prompt = default_inputs(config, with_images=True)[1].prompt
    tokenizer = AutoTokenizer.from_pretrained(converted / "processor")
    assert prompt is not None
    assert len(tokenizer.encode(prompt)) > max_prompt_tokens


def test_one_changed_byte_anywhere_is_refused(converted: Path, tmp_path: Path) -> None:
    """Weights, tokenizer, golden items, the base: all but the configuration itself, whose text is checked by its schema."""
    root = tmp_path / "artifact"
    shutil.copytree(converted, root)
    shutil.copytree(open_artifact(str(converted)).base_path, tmp_path / "base")
    hashed = [root / name for name in open_artifact(str(root)).config.files]
    for path in [*hashed, tmp_path / "base/config.json", tmp_path / "base/model.safetensors"]:
        original = path.read_bytes()
        for position in (0, len(original) // 2, len(original) - 1):
            damaged = bytearray(original)
            damaged[position] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(ArtifactInvalid, match=r"sha256|cannot be read"):
                load_whole_with(root, tmp_path / "base")
        path.write_bytes(original)
    load_whole_with(root, tmp_path / "base")


def load_whole_with(root: Path, base: Path) -> None:
    edit_json(root / CONFIG_NAME, base_model_name=str(base))
    load_whole(root)


def test_a_base_inside_the_artifact_is_copied_without_its_pickles(published: Path, inputs: list[GoldenInput], tmp_path: Path) -> None:
    source = copy_artifact(published, tmp_path / "source")
    edit_json(source / CONFIG_NAME, base_model_name="./base")
    shutil.copytree(tmp_path / "source/base", source / "base")
    (tmp_path / "source/base/pytorch_model.bin").write_bytes(b"x")
    target = run(source, tmp_path / "target", inputs, base_model=str(tmp_path / "source/base"))
    assert open_artifact(str(target)).base_path == target / "base"
    assert not list(target.rglob("*.bin"))
    load_whole(target)


def test_converting_twice_changes_nothing(converted: Path, inputs: list[GoldenInput], tmp_path: Path) -> None:
    again = run(converted, tmp_path / "again", inputs)
    files = [{path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()} for root in (converted, again)]
    assert files[0] == files[1]


def test_an_existing_target_is_refused_and_kept(published: Path, inputs: list[GoldenInput], tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "target/mine").write_text("x")
    for name in ("target", "target/mine", "link"):
        with pytest.raises(ArtifactInvalid, match="exists already"):
            run(published, tmp_path / name, inputs)
    assert (tmp_path / "target/mine").read_text() == "x"


def golden(path: Path, captions: tuple[str, ...] = ("a",), prompt: str | None = None) -> list[GoldenInput]:
    return [GoldenInput(path, captions, prompt)]


@pytest.mark.parametrize(
    ("name", "captions", "prompt", "message"),
    [
        ("missing.png", ("a",), None, "missing.png: golden picture cannot be read"),
        ("broken.png", ("a",), None, "broken.png: golden item cannot be scored"),
        ("good.png", ("a", "\x07" * 99), None, "golden caption 1 cannot be scored: the caption is longer than 80 tokens"),
        ("good.png", (), None, "golden item without captions"),
        ("good.png", ("a",), "Another prompt.", "not the one fixed prompt"),
    ],
)
def test_a_failure_leaves_nothing_behind(
    published: Path, tmp_path: Path, name: str, captions: tuple[str, ...], prompt: str | None, message: str
) -> None:
    source = copy_artifact(published, tmp_path / "source")
    edit_json(source / CONFIG_NAME, prompt_policy="fixed")
    (tmp_path / "good.png").write_bytes(picture(40, 40))
    (tmp_path / "broken.png").write_bytes(picture(40, 40)[:90])
    (tmp_path / "out").mkdir()
    given = golden(tmp_path / "good.png") + golden(tmp_path / name, captions, prompt)
    with pytest.raises(ArtifactInvalid, match=message):
        run(source, tmp_path / "out" / "target", given)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_source_that_does_not_load_leaves_nothing_behind(published: Path, inputs: list[GoldenInput], tmp_path: Path) -> None:
    source = copy_artifact(published, tmp_path / "source")
    (source / "reward_head.pt").write_bytes(b"x")
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactInvalid, match=r"reward_head\.pt"):
        run(source, tmp_path / "out" / "target", inputs)
    assert list((tmp_path / "out").iterdir()) == []


def test_golden_inputs_from_json_lines(tmp_path: Path) -> None:
    lines = ['{"image": "a.png", "captions": ["x\u2028y", "z"]}', "", '{"image": "/b.png", "captions": ["x"], "prompt": "p"}', ""]
    (tmp_path / "golden.jsonl").write_text("\n".join(lines))
    assert read_inputs(tmp_path / "golden.jsonl") == [
        GoldenInput(tmp_path / "a.png", ("x\u2028y", "z")),
        GoldenInput(Path("/b.png"), ("x",), "p"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"image": "a.png"}',
        '{"image": "a.png", "captions": "one"}',
        '{"image": 1, "captions": ["a"]}',
        '{"image": "a", "captions": []}',
    ],
)
def test_a_bad_golden_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "golden.jsonl").write_text('{"image": "a.png", "captions": ["x"]}\n' + line)
    with pytest.raises(ArtifactInvalid, match=r"golden\.jsonl:2: expected"):
        read_inputs(tmp_path / "golden.jsonl")


def test_a_golden_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"\xff")
    for name in ("missing", "latin"):
        with pytest.raises(ArtifactInvalid, match=f"{name}: cannot be read"):
            read_inputs(tmp_path / name)
