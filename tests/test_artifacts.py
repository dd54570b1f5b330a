"""The artifact on disk: its configuration, hashes and fingerprint, and every layout that must be refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from app.artifacts import (
    CONFIG_NAME,
    Artifact,
    Golden,
    GoldenItem,
    RewardModelConfig,
    base_sha256,
    file_sha256,
    fingerprint,
    open_artifact,
    recipe_sha256,
    write_config,
    write_golden,
)
from app.errors import ArtifactInvalid
from tests.tiny import HIDDEN, copy_artifact, edit_json, picture

RUNTIME = {"dtype": "float32", "device": "cpu"}
GOLDEN = {"tolerance": {"float32": 1e-4, "bfloat16": 0.1}, "items": [{"image": "golden/0.png", "captions": ["a"], "scores": [1.0]}]}
Damage = Callable[[Path], object]


def config(**changes: object) -> Damage:
    return lambda root: edit_json(root / CONFIG_NAME, **changes)


def golden(text: str | None = None, **changes: object) -> Damage:
    return lambda root: (root / "golden.json").write_text(text or json.dumps(GOLDEN | changes))


def golden_item(**changes: object) -> Damage:
    return golden(items=[GOLDEN["items"][0] | changes])  # type: ignore[index]


def put(name: str, data: bytes = b"x") -> Damage:
    def write(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)

    return write


def drop(name: str) -> Damage:
    return lambda root: shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()


FAULTS: dict[str, tuple[Damage, str]] = {
    "no configuration": (drop(CONFIG_NAME), f"{CONFIG_NAME}: missing"),
    "truncated JSON": (put(CONFIG_NAME, b'{"base_model_name": "x", "sco'), "Invalid JSON"),
    "JSON that is no object": (put(CONFIG_NAME, b"[]"), "content"),
    "not UTF-8": (put(CONFIG_NAME, b'{"base_model_name": "\xff"}'), "Invalid JSON"),
    "unknown key": (config(temprature=1), "temprature: Extra inputs are not permitted, found 1"),
    "unknown nested key": (config(image={"long_egde": 448}), "image.long_egde"),
    "a required key missing": (
        lambda root: edit_json(root / CONFIG_NAME, without=("score_head_shape",)),
        "score_head_shape: Field required",
    ),
    "a number as text": (config(max_caption_tokens="80"), "max_caption_tokens: Input should be a valid integer, found '80'"),
    "a truth value as number": (config(max_prompt_tokens=True), "max_prompt_tokens"),
    "another pooling": (config(pooling="mean"), "pooling: Input should be 'last_token', found 'mean'"),
    "another number format": (config(dtype="float16"), "dtype: .*found 'float16'"),
    "another schema": (config(schema_version=2), "schema_version: .*found 2"),
    "a head shape of three": (config(score_head_shape=[1, 64, 1]), "score_head_shape"),
    "a two-layer head without width": (config(head={"layers": "two_layer"}), "head: a two_layer head needs its width"),
    "a two-layer head of no width": (config(head={"layers": "two_layer", "width": 0}), "head.width: .*found 0"),
    "a linear head with a width": (config(head={"width": 8}), "head: a linear head has neither width nor activation"),
    "a linear head with an activation": (config(head={"activation": "relu"}), "head: a linear head has neither width nor activation"),
    "an unknown activation": (config(head={"layers": "two_layer", "width": 8, "activation": "swish"}), "head.activation: .*found 'swish'"),
    "an unknown head": (config(head={"layers": "three"}), "head.layers: .*found 'three'"),
    "a bias as a number": (config(head={"bias": 1}), "head.bias: .*found 1"),
    "a tiny long edge": (config(image={"long_edge": 8}), "image.long_edge: .*found 8"),
    "an endless temperature": (lambda root: text_config(root, '"calibration": {"temperature": Infinity}'), "finite"),
    "a template without caption": (config(template="{prompt}"), "template must contain"),
    "a template with two captions": (config(template="{prompt}{caption}{caption}"), "template must contain"),
    "no adapter configuration": (drop("backbone_adapter/adapter_config.json"), "adapter_config.json: missing"),
    "no adapter weights": (drop("backbone_adapter/adapter_model.safetensors"), "adapter_model.safetensors: missing"),
    "a pickled adapter": (
        lambda root: (root / "backbone_adapter/adapter_model.safetensors").rename(root / "backbone_adapter/adapter_model.bin"),
        "adapter_model.safetensors: missing",
    ),
    "no processor": (drop("processor"), "processor: missing"),
    "no head": (drop("reward_head.pt"), "reward_head.safetensors: missing"),
    "a pickle lying around": (put("backbone_adapter/optimizer.pt"), "optimizer.pt: pickled files are not loaded"),
    "a deep pickle": (put("processor/deep/er/x.pkl"), "x.pkl: pickled files are not loaded"),
    "a pickle in capitals": (put("training_args.BIN"), "training_args.BIN: pickled files"),
    "auto_map in the processor": (put("processor/config.json", b'{"auto_map": {"AutoConfig": "x.Y"}}'), "auto_map"),
    "golden items that are no JSON": (golden("{"), "golden.json: content: Invalid JSON"),
    "golden items without items": (golden(items=[]), "golden.json: items"),
    "a golden item with a score too few": (golden_item(scores=[]), "golden.json: items.0: 1 captions with 0 scores"),
    "a golden item without captions": (golden_item(captions=[], scores=[]), "golden.json: items.0.captions"),
    "a golden NaN": (golden(json.dumps(GOLDEN).replace("[1.0]", "[NaN]")), "golden.json: items.0.scores.0"),
    "an endless tolerance": (golden(json.dumps(GOLDEN).replace("0.1", "Infinity")), "golden.json: tolerance"),
    "a tolerance below zero": (golden(tolerance={"float32": -1.0, "bfloat16": 0.1}), "golden.json: tolerance"),
    "a tolerance too few": (golden(tolerance={"float32": 1e-4}), "golden.json: tolerance"),
    "a golden picture that is not there": (golden(), "golden/0.png: missing golden image"),
    "a golden picture elsewhere": (golden_item(image="../secret.png"), "golden.json: items.0.image"),
    "a golden picture outside by a detour": (golden_item(image="golden/../../secret.png"), "golden.json: items.0.image"),
    "a golden picture by its full path": (golden_item(image="/etc/passwd"), "golden.json: items.0.image"),
    "a base that is not there": (config(base_model_name="/nowhere/base"), "/nowhere/base: base model is neither"),
    "a relative base that is not there": (config(base_model_name="./base"), "base: missing; it should hold the base model"),
    "a base that is a Hub id, offline": (
        config(base_model_name="nobody/nothing"),
        "nobody/nothing: base model is no directory here, and could not be fetched",
    ),
    "a base with a strange name": (config(base_model_name="a/b/c"), "a/b/c: base model is neither"),
    "a base without a configuration": (drop("../base/config.json"), "config.json: missing"),
    "a base without safetensors": (
        lambda root: (root / "../base/model.safetensors").rename(root / "../base/pytorch_model.bin"),
        "no .safetensors weights",
    ),
    "a base with its own code": (lambda root: edit_json(root / "../base/config.json", auto_map={"AutoModel": "x.Y"}), "auto_map"),
    "an adapter as base": (put("../base/adapter_config.json", b"{}"), "is an adapter, not a base model"),
}


def text_config(root: Path, extra: str) -> None:
    text = (root / CONFIG_NAME).read_text()
    (root / CONFIG_NAME).write_text(f"{text.rstrip()[:-1]}, {extra}}}")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_artifact_is_refused_in_one_line(published: Path, tmp_path: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    root = copy_artifact(published, tmp_path)
    damage(root)
    with pytest.raises(ArtifactInvalid, match=message) as refusal:
        open_artifact(str(root), offline=True)
    assert "\n" not in str(refusal.value)


@pytest.fixture
def full(published: Path, tmp_path: Path) -> Path:
    """An artifact with hashes and golden items."""
    root = copy_artifact(published, tmp_path)
    put("golden/0.png", picture(32, 32))(root)
    write_golden(root, Golden.model_validate(GOLDEN))
    write_config(root, RewardModelConfig.model_validate_json((root / CONFIG_NAME).read_bytes()))
    return root


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_one_changed_byte_in_any_listed_file_is_refused(full: Path) -> None:
    listed = open_artifact(str(full)).config.files
    assert {"golden.json", "golden/0.png", "reward_head.pt", "processor/tokenizer.json", "backbone_adapter/adapter_config.json"} <= set(
        listed
    )
    for name, digest in listed.items():
        original = (full / name).read_bytes()
        flip(full / name)
        with pytest.raises(ArtifactInvalid, match=f"{name}: expected sha256 {digest}, found {file_sha256(full / name)}"):
            open_artifact(str(full))
        (full / name).write_bytes(original)
    assert open_artifact(str(full)).golden() is not None


MANIFEST_FAULTS: dict[str, tuple[Damage, str]] = {
    "a listed file missing": (drop("processor/chat_template.jinja"), "chat_template.jinja: missing, expected sha256"),
    "a file that is not listed": (put("processor/extra.json", b"{}"), "processor/extra.json: not in the list of files"),
    "a nested file that is not listed": (put("processor/additional_chat_templates/x.jinja"), "x.jinja: not in the list of files"),
    "a second head": (put("reward_head.safetensors"), "reward_head.safetensors: not in the list of files"),
    "a listed file outside": (lambda root: list_also(root, "../base/config.json"), "config.json: missing, expected sha256"),
}


def list_also(root: Path, name: str) -> None:
    files = json.loads((root / CONFIG_NAME).read_bytes())["files"]
    edit_json(root / CONFIG_NAME, files=files | {name: "0" * 64})


@pytest.mark.parametrize("fault", MANIFEST_FAULTS)
def test_files_and_manifest_must_agree(full: Path, fault: str) -> None:
    damage, message = MANIFEST_FAULTS[fault]
    damage(full)
    with pytest.raises(ArtifactInvalid, match=message):
        open_artifact(str(full))


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "nowhere", "a/b/c", "no such/thing", "~nobody/x", "x/y\0z"])
def test_an_artifact_that_does_not_exist(name: str) -> None:
    with pytest.raises(ArtifactInvalid, match="model"):
        open_artifact(name, offline=True)


@pytest.mark.parametrize("name", ["nobody/nothing", "nobody/nothing@main", "nobody/nothing@abc123", "nobody/nothing@" + "A" * 40])
def test_where_commits_are_asked_for_nothing_else_is_taken(name: str) -> None:
    with pytest.raises(ArtifactInvalid, match=r"model is not pinned to a commit \(PUNCHLINE_REQUIRE_PINNED\)"):
        open_artifact(name, require_pinned=True)


def test_a_commit_is_pinned_and_folders_need_no_pin(full: Path) -> None:
    with pytest.raises(ArtifactInvalid, match="could not be fetched"):
        open_artifact("nobody/nothing@" + "a" * 40, offline=True, require_pinned=True)
    assert open_artifact(str(full), require_pinned=True).root == full
    edit_json(full / CONFIG_NAME, base_model_name="nobody/base", files={})
    with pytest.raises(ArtifactInvalid, match="nobody/base: base model is not pinned to a commit"):
        open_artifact(str(full), require_pinned=True)


def test_a_hub_id_offline_is_refused() -> None:
    with pytest.raises(ArtifactInvalid, match="nobody/nothing@abc: model is no directory here, and could not be fetched from the Hub"):
        open_artifact("nobody/nothing@abc", offline=True)


def test_an_artifact_that_says_nothing_of_newer_keys_keeps_its_fingerprint(tmp_path: Path) -> None:
    """Pinned by trainers: a new key of the configuration must not change what an artifact without it is called."""
    config = RewardModelConfig(base_model_name="a/b", score_head_shape=(1, 8))
    found = fingerprint(Artifact(tmp_path, config, tmp_path, ()), "base", {})
    assert found == "0fe90f3eec14aafe7db7cf6a9a78d1e63bb0b8d8a22e5d10e9d54cc34b232e38"
    assert recipe_sha256(config) == "e2b0e935609929695a9e75bd4672bd3ae379b88d220a286d50fdb0d976610e7d"


def test_a_published_artifact_says_what_was_assumed(published: Path) -> None:
    opened = open_artifact(str(published))
    names = [text.split("=")[0] for text in opened.assumed]
    assert {"template", "default_prompt", "image", "pooling", "dtype", "max_caption_tokens", "prompt_policy"} <= set(names)
    assert opened.config.template.count("{caption}") == 1
    assert opened.config.score_head_shape == (1, HIDDEN)


def test_a_full_artifact_assumes_nothing(full: Path) -> None:
    opened = open_artifact(str(full))
    assert opened.assumed == ()
    assert set(json.loads((full / CONFIG_NAME).read_bytes())) == set(RewardModelConfig.model_fields)


def test_the_base_may_lie_elsewhere(published: Path, tmp_path: Path) -> None:
    root = copy_artifact(published, tmp_path)
    edit_json(root / CONFIG_NAME, base_model_name="Qwen/Qwen2.5-VL-3B-Instruct")
    assert open_artifact(str(root), base_model=str(tmp_path / "base"), offline=True).base_path == tmp_path / "base"
    shutil.copytree(tmp_path / "base", root / "base")
    edit_json(root / CONFIG_NAME, base_model_name="./base")
    assert open_artifact(str(root), offline=True).base_path == root / "base"


def test_symlinked_files_are_followed(full: Path, tmp_path: Path) -> None:
    """A Hub snapshot is a folder of links into a store of blobs."""
    link = tmp_path / "snapshot"
    for path in full.rglob("*"):
        if path.is_file():
            (link / path.relative_to(full)).parent.mkdir(parents=True, exist_ok=True)
            (link / path.relative_to(full)).symlink_to(path)
    opened = open_artifact(str(link))
    assert opened.golden() is not None


def print_of(root: Path, **runtime: str) -> str:
    opened = open_artifact(str(root))
    return fingerprint(opened, base_sha256(opened.base_path), RUNTIME | runtime)


def unlisted(damage: Damage) -> Damage:
    """The same change in an artifact without hashes, so that it still opens."""

    def change(root: Path) -> None:
        edit_json(root / CONFIG_NAME, files={})
        damage(root)

    return change


def base_weight(root: Path) -> None:
    flip(root / "../base/model.safetensors")


SCORING: dict[str, Damage] = {
    "template": config(template="{prompt} {caption}"),
    "default prompt": config(default_prompt="Other."),
    "prompt budget": config(max_prompt_tokens=161),
    "caption budget": config(max_caption_tokens=81),
    "long edge": config(image={"long_edge": 447}),
    "resampling": config(image={"resample": "bicubic"}),
    "exif": config(image={"exif_transpose": True}),
    "dtype": config(dtype="float32"),
    "temperature": config(calibration={"temperature": 2.0}),
    "prompt policy": config(prompt_policy="fixed"),
    "bias of the head": config(head={"bias": True}),
    "layers of the head": config(head={"layers": "two_layer", "width": 8}),
    "activation of the head": config(head={"layers": "two_layer", "width": 8, "activation": "relu"}),
    "head": lambda root: torch.save({"weight": torch.ones(1, HIDDEN)}, root / "reward_head.pt"),
    "adapter": lambda root: flip(root / "backbone_adapter/adapter_model.safetensors"),
    "adapter scaling": lambda root: edit_json(root / "backbone_adapter/adapter_config.json", lora_alpha=9),
    "chat template": put("processor/chat_template.jinja"),
    "tokenizer": put("processor/tokenizer.json"),
    "image processor": put("processor/preprocessor_config.json"),
    "nested processor file": put("processor/deep/x.jinja"),
    "base weights": base_weight,
    "base configuration": lambda root: edit_json(root / "../base/config.json", tie_word_embeddings=False),
}
NOT_SCORING: dict[str, Damage] = {
    "description": config(description="Another one."),
    "training notes": config(training={"recipe": "x"}),
    "score distribution": config(score_distribution={"mean": 0.0, "std": 1.0}),
    "hashes": config(files={}),
    "a linear head left unsaid": lambda root: edit_json(root / CONFIG_NAME, without=("head",)),
    "golden items": golden_item(scores=[2.0]),
    "a read-me": put("backbone_adapter/README.md"),
    "name of the base": lambda root: (shutil.copytree(root / "../base", root / "moved"), config(base_model_name="./moved")(root)),
    "revision of the base": config(base_model_revision="abc"),
    "the artifact's own place": lambda root: None,
}


@pytest.mark.parametrize("what", SCORING)
def test_the_fingerprint_changes_with(full: Path, what: str) -> None:
    before = print_of(full)
    unlisted(SCORING[what])(full)
    assert print_of(full) != before


@pytest.mark.parametrize("what", NOT_SCORING)
def test_the_fingerprint_does_not_change_with(full: Path, tmp_path: Path, what: str) -> None:
    before = print_of(full)
    unlisted(NOT_SCORING[what])(full)
    moved = full.rename(tmp_path / "moved")
    assert print_of(moved) == before


def test_the_fingerprint_covers_the_runtime_and_recorded_base(full: Path) -> None:
    prints = [print_of(full), print_of(full, dtype="bfloat16"), print_of(full, device="cuda"), print_of(full, torch="0")]
    assert len(set(prints)) == 4
    assert all(len(each) == 64 for each in prints)
    edit_json(full / CONFIG_NAME, base_model_sha256=base_sha256(full.parent / "base"))
    assert print_of(full) == prints[0]


def test_base_sha256_covers_every_shard(full: Path) -> None:
    base = full.parent / "base"
    before = base_sha256(base)
    shutil.copy(base / "model.safetensors", base / "model-2.safetensors")
    assert base_sha256(base) != before


def test_large_files_are_hashed_without_reading_them_whole(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(64 << 20)
    tracemalloc.start()
    digest = file_sha256(tmp_path / "large")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert digest == hashlib.sha256(bytes(64 << 20)).hexdigest()
    assert peak < 4 << 20


def test_golden_items_read_back(full: Path) -> None:
    found = open_artifact(str(full)).golden()
    assert found is not None
    assert found.items == [GoldenItem(image="golden/0.png", captions=["a"], scores=[1.0])]


def test_an_artifact_without_golden_items(artifact: Artifact) -> None:
    assert artifact.golden() is None
