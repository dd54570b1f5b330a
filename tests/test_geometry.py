"""Shapes as published, artifacts of random weights that load, and the padded batch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2_5_VLForConditionalGeneration

from app.artifacts import open_artifact
from app.contracts import EncodedImage
from app.encoding import load_encoder
from app.errors import ArtifactInvalid
from app.geometry import GEOMETRIES, Geometry, Limits, base_config, check_room, pad_rows, write_artifact
from app.model import load_model
from app.scoring import score_plain
from tests.tiny import encode, encode_text

TINY = Geometry(
    layers=2,
    vision_layers=2,
    hidden=64,
    heads=4,
    kv_heads=2,
    intermediate=96,
    vocabulary=1000,
    vision_hidden=48,
    vision_heads=4,
    vision_intermediate=64,
    mrope_section=(2, 3, 3),
)
TINY_TEXT = Geometry(2, 0, hidden=64, heads=4, kv_heads=2, intermediate=96, vocabulary=1000, family="qwen2")
TINY_QWEN3 = replace(TINY_TEXT, family="qwen3", head_dim=32, tied=False)
SPECIAL = {"image_token_id": 1, "vision_start_token_id": 2, "vision_end_token_id": 3}


@pytest.mark.parametrize(("name", "total_size"), [("qwen2.5-vl-3b", 7_509_245_952), ("qwen2.5-vl-7b", 16_584_333_312)])
def test_as_many_bytes_as_the_published_weights(name: str, total_size: int) -> None:
    """`total_size` of the published model.safetensors.index.json."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(base_config(GEOMETRIES[name], SPECIAL))
    assert 2 * sum(weight.numel() for weight in model.parameters()) == total_size


@pytest.mark.parametrize(
    ("name", "total_size"),
    [
        ("qwen2.5-0.5b", 988_065_536),
        ("qwen2.5-1.5b", 3_087_428_608),
        ("qwen2.5-7b", 15_231_233_024),
        ("qwen3-0.6b", 1_192_099_840),  # 596,049,920 weights; the published file has the tied head a second time
        ("qwen3-8b", 16_381_470_720),
    ],
)
def test_as_many_bytes_as_the_published_weights_of_text_only_models(name: str, total_size: int) -> None:
    """`total_size` of the published index, or twice the number of weights where one file has them all."""
    config = base_config(GEOMETRIES[name], {})
    assert config.model_type == GEOMETRIES[name].family
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert 2 * sum(weight.numel() for weight in model.parameters()) == total_size


def test_vision_layers_with_full_attention() -> None:
    """Every eighth of the whole tower; a short one ends with its only one."""
    assert base_config(GEOMETRIES["qwen2.5-vl-7b"], SPECIAL).vision_config.fullatt_block_indexes == [7, 15, 23, 31]
    short = GEOMETRIES["qwen2.5-vl-3b"].shortened(2, 3)
    assert (short.layers, short.vision_layers, short.hidden) == (2, 3, 2048)
    assert base_config(short, SPECIAL).vision_config.fullatt_block_indexes == [2]
    assert GEOMETRIES["qwen2.5-vl-3b"].shortened(None, None) == GEOMETRIES["qwen2.5-vl-3b"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(TINY, tmp_path_factory.mktemp("geometry") / "artifact")


def test_the_artifact_is_whole_and_scores(artifact: Path) -> None:
    opened = open_artifact(str(artifact), offline=True)
    assert opened.config.kind == "full_head"
    assert any(name.startswith("base/") for name in opened.config.files)
    encoder, loaded = load_encoder(opened), load_model(opened, device="cpu", dtype="float32")
    assert encoder.image_tokens(448, 308) == 176
    group = encode(encoder, (448, 308), 0, ["the dog said no", "a cat on the moon", "is it the lawyer"])
    (scores,) = score_plain(loaded.model, [group])
    assert 1e-3 < np.std(scores.values) < 10  # hidden states neither vanish nor explode


def test_weights_are_random_where_they_should_be(artifact: Path) -> None:
    weights = load_file(artifact / "base" / "model-00001.safetensors")
    assert all(weight.dtype == torch.bfloat16 for weight in weights.values())
    assert all((weight == 1).all() for name, weight in weights.items() if name.endswith("norm.weight"))
    assert not any(weight.any() for name, weight in weights.items() if name.endswith("bias"))
    gate = weights["model.layers.0.mlp.gate_proj.weight"].float()
    assert gate.std() == pytest.approx(0.8 / 64**0.5, rel=0.05)
    assert len(torch.unique(gate, dim=0)) == len(gate)


def test_a_written_artifact_is_kept(artifact: Path) -> None:
    before = (artifact / "reward_model_config.json").stat().st_mtime_ns
    assert write_artifact(TINY, artifact) == artifact
    assert (artifact / "reward_model_config.json").stat().st_mtime_ns == before


def test_shards_untied_head_and_what_an_interrupted_write_left(tmp_path: Path) -> None:
    (tmp_path / "artifact.partial" / "base").mkdir(parents=True)
    (tmp_path / "artifact.partial" / "base" / "model-00009.safetensors").write_bytes(b"half")
    shares: list[float] = []
    untied = Geometry(**{name: getattr(TINY, name) for name in TINY.__slots__} | {"tied": False})
    root = write_artifact(untied, tmp_path / "artifact", shares.append, shard_bytes=100_000)
    names = sorted(path.name for path in (root / "base").glob("*.safetensors"))
    assert names[0] == "model-00001.safetensors"
    assert len(names) == len(shares) > 1
    assert shares[-1] == 1.0
    places = json.loads((root / "base" / "model.safetensors.index.json").read_bytes())["weight_map"]
    assert set(places.values()) == set(names)
    assert "lm_head.weight" in places
    assert not (tmp_path / "artifact.partial").exists()
    load_model(open_artifact(str(root), offline=True), device="cpu", dtype="bfloat16")


def test_a_text_only_artifact_is_whole_and_scores(tmp_path: Path) -> None:
    root = write_artifact(TINY_TEXT, tmp_path / "artifact", limits=Limits(300, 90))
    opened = open_artifact(str(root), offline=True)
    assert (opened.config.kind, opened.config.caption_role) == ("full_head", "raw")
    assert (opened.config.max_prompt_tokens, opened.config.max_caption_tokens) == (300, 90)
    assert not (root / "processor" / "preprocessor_config.json").exists()
    encoder, loaded = load_encoder(opened), load_model(opened, device="cpu", dtype="float32")
    assert not encoder.takes_images
    (scores,) = score_plain(loaded.model, [encode_text(encoder, ["the dog said no", "a cat on the moon", "is it the lawyer"], "why")])
    assert 1e-3 < np.std(scores.values) < 10


def test_a_written_artifact_takes_texts_of_the_lengths_asked_for_last(tmp_path: Path) -> None:
    root = write_artifact(TINY_TEXT, tmp_path / "artifact", limits=Limits(300, 90))
    weights = (root / "base" / "model-00001.safetensors").stat().st_mtime_ns
    write_artifact(TINY_TEXT, root, limits=Limits(900, 40))
    config = open_artifact(str(root), offline=True).config
    assert (config.max_prompt_tokens, config.max_caption_tokens) == (900, 80)  # the usual, for the self-test's own texts
    assert (root / "base" / "model-00001.safetensors").stat().st_mtime_ns == weights


def test_a_base_with_heads_of_their_own_size_is_what_transformers_reads(tmp_path: Path) -> None:
    """Qwen3: norms of queries and keys, no biases, a head dimension that does not divide the hidden size."""
    root = write_artifact(TINY_QWEN3, tmp_path / "artifact")
    model, info = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (4 * 32, 64)
    assert (attention.q_norm.weight == 1).all()
    assert attention.q_proj.bias is None


def test_a_full_disk_is_seen_before_it_is_full(tmp_path: Path) -> None:
    check_room(tmp_path, 1)
    with pytest.raises(ArtifactInvalid, match=r"1048576\.0 GiB of random weights do not fit"):
        check_room(tmp_path, 1 << 50)


def test_the_padded_batch_by_hand() -> None:
    image = EncodedImage("one", np.ones((4, 1176), dtype=np.float32), (1, 2, 2), 1)
    batch = pad_rows([np.array([5, 9, 6]), np.array([5, 9])], [image, image], 9)
    assert batch["input_ids"].tolist() == [[5, 9, 6], [5, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["mm_token_type_ids"].tolist() == [[0, 1, 0], [0, 1, 0]]
    assert batch["pixel_values"].shape == (8, 1176)
    assert batch["image_grid_thw"].tolist() == [[1, 2, 2], [1, 2, 2]]
    assert set(pad_rows([np.array([5])], [None], None)) == {"input_ids", "attention_mask"}
