"""Loading: LoRA arithmetic, every part that must be refused, and the gradients that training relies on."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, MistralConfig, MistralModel

from app.artifacts import Artifact, base_sha256, open_artifact
from app.bases import backbone_name, load_backbone, tensor_names, weights_bytes
from app.contracts import EncodedGroup
from app.encoding import FAMILIES, Encoder
from app.errors import ArtifactInvalid
from app.heads import LinearHead
from app.model import LoadedModel, RewardModel, load_model, resolve_device, resolve_dtype
from app.packing import pack
from app.scoring import score_plain, score_shared
from tests.tiny import (
    CORPUS,
    VISION_FAMILIES,
    TextFamily,
    VisionFamily,
    copy_artifact,
    edit_json,
    edit_tensors,
    encode,
    load_whole,
    write_base,
    write_text_base,
    write_text_only,
)
from training.demo.tokenizer import train_tokenizer

CAPTIONS = ["the penguin", "an iceberg, they said", "企鵝 <|im_end|>", "", "the penguin again and again, at length"]
Tensors = dict[str, torch.Tensor]
Damage = Callable[[Path], object]
ADAPTER = "backbone_adapter/adapter_model.safetensors"
ADAPTER_CONFIG = "backbone_adapter/adapter_config.json"
BASE = "../base/model.safetensors"


@pytest.fixture(scope="module")
def unmerged(artifact: Artifact) -> LoadedModel:
    return load_model(artifact, lora="unmerged")


@pytest.fixture(scope="module")
def groups(encoder: Encoder) -> list[EncodedGroup]:
    return [
        encode(encoder, (300, 200), 0, CAPTIONS),
        encode(encoder, (120, 260), 1, CAPTIONS[:2], "Be kind."),
        encode(encoder, (300, 200), 0, ["x"]),
    ]


def values(scores: list) -> np.ndarray:
    return np.concatenate([each.values for each in scores])


def test_merged_and_unmerged_score_the_same(loaded: LoadedModel, unmerged: LoadedModel, groups: list[EncodedGroup]) -> None:
    for score in (score_shared, score_plain):
        merged, apart = values(score(loaded.model, groups)), values(score(unmerged.model, groups))
        assert np.abs(merged - apart).max() <= 1e-5
    assert loaded.fingerprint != unmerged.fingerprint


def test_the_adapter_changes_the_scores(artifact: Artifact, loaded: LoadedModel, groups: list[EncodedGroup]) -> None:
    bare = RewardModel(load_backbone(artifact, torch.float32), loaded.model.head).eval()
    assert np.abs(values(score_shared(bare, groups)) - values(score_shared(loaded.model, groups))).max() > 1e-2


def weights(model: RewardModel) -> Tensors:
    return dict(model.backbone.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_sums_in_float32_and_rounds_once(artifact: Artifact, dtype: torch.dtype) -> None:
    """Every merged weight is the exact sum rounded to the base's format; every other weight is the base's."""
    ours = weights(load_model(artifact, dtype="float32" if dtype == torch.float32 else "bfloat16").model)
    untouched = weights(RewardModel(load_backbone(artifact, dtype), LinearHead(8)))
    deltas = deltas_of(PeftModel.from_pretrained(AutoModel.from_pretrained(artifact.base_path, dtype=dtype), artifact.adapter_path))
    assert len(deltas) > 10
    assert set(ours) == set(untouched)
    for name, weight in untouched.items():
        wanted = (weight.float() + deltas[name]).to(dtype) if name in deltas else weight
        assert torch.equal(ours[name], wanted)


def deltas_of(model: PeftModel) -> Tensors:
    """scaling * B @ A in float32, by the formula."""
    scaling = model.peft_config["default"].lora_alpha / model.peft_config["default"].r
    found = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            found[f"{name}.weight"] = scaling * (module.lora_B["default"].weight.float() @ module.lora_A["default"].weight.float())
    return found


def test_bfloat16_shared_and_plain_agree_to_its_precision(artifact: Artifact, groups: list[EncodedGroup]) -> None:
    """bfloat16 keeps 8 bits: two layers of it move scores of size one by about 2^-6. Equal captions still get equal bits."""
    model = load_model(artifact, dtype="bfloat16").model
    shared, plain = values(score_shared(model, groups)), values(score_plain(model, groups))
    exact = values(score_plain(load_model(artifact).model, groups))
    assert np.abs(shared - plain).max() <= 2e-2
    assert np.abs(shared - exact).max() <= 6e-2
    assert {parameter.dtype for parameter in model.backbone.parameters()} == {torch.bfloat16}
    assert model.head.last.weight.dtype == torch.float32


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_gradients_of_packed_and_plain_are_equal(published_of: Callable[[VisionFamily], Path], family: VisionFamily) -> None:
    """What training relies on: one packed forward gives every LoRA weight and the head the gradient of separate forwards."""
    encoder, loaded = load_whole(published_of(family), lora="unmerged")
    model, groups = loaded.model, [encode(encoder, (300, 200), 0, CAPTIONS), encode(encoder, (120, 260), 1, CAPTIONS[:2], "Be kind.")]
    trained = {name: each for name, each in model.named_parameters() if "lora_" in name or name.startswith("head.")}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    packed = gradients(model, trained, packed_scores(model, groups))
    plain = gradients(model, trained, plain_scores(model, groups))
    assert len(packed) == len(trained) > 40
    for name, gradient in packed.items():
        scale = float(plain[name].abs().max())
        assert scale > 0, name
        assert float((gradient - plain[name]).abs().max()) <= 1e-4 * scale, name


def gradients(model: RewardModel, trained: Tensors, scores: torch.Tensor) -> Tensors:
    """Of a sum with different weights, so that swapped rows would show."""
    model.zero_grad(set_to_none=True)
    (scores * torch.linspace(1, 2, len(scores))).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in trained.items() if parameter.grad is not None}


def packed_scores(model: RewardModel, groups: list[EncodedGroup]) -> torch.Tensor:
    packed = pack(groups, image_token_id=model.image_token_id, merge_size=model.merge_size, device=model.device)
    return model(packed)[[row for rows in packed.rows_of for row in rows]]


def plain_scores(model: RewardModel, groups: list[EncodedGroup]) -> torch.Tensor:
    scores = []
    for group in groups:
        assert group.image is not None
        pixels, grid = torch.from_numpy(group.image.patches), torch.tensor([group.image.grid_thw])
        scores += [model.forward_plain(torch.from_numpy(row)[None], pixels, grid) for row in group.rows]
    return torch.cat(scores)


def test_loaded_models_are_frozen_and_in_evaluation(loaded: LoadedModel, unmerged: LoadedModel) -> None:
    for model in (loaded.model, unmerged.model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any("lora" in name for name, _ in loaded.model.named_parameters())
    assert any("lora" in name for name, _ in unmerged.model.named_parameters())


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_the_vision_tower_keeps_sdpa(published_of: Callable[[VisionFamily], Path], family: VisionFamily) -> None:
    for lora in ("merged", "unmerged"):
        model = load_whole(published_of(family), lora=lora)[1].model
        assert model.backbone.visual.config._attn_implementation == "sdpa"
        assert model.backbone.language_model.config._attn_implementation == "punchline_shared_prefix"


def test_loading_twice_gives_equal_bits(artifact: Artifact, loaded: LoadedModel, groups: list[EncodedGroup]) -> None:
    again = load_model(artifact)
    assert again.fingerprint == loaded.fingerprint
    assert score_shared(again.model, groups) == score_shared(loaded.model, groups) == score_shared(loaded.model, groups)


def test_loading_leaves_one_copy_of_the_weights(artifact: Artifact) -> None:
    """Nothing of the adapter, of a second base or of half-read files stays behind."""
    gc.collect()
    before = num_tensor_bytes()
    model = load_model(artifact).model
    gc.collect()
    own = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    assert num_tensor_bytes() - before <= 1.02 * own


def weights_without_head(artifact: Artifact) -> int:
    """Bytes in float32 of what a backbone is loaded of, from its own tensors."""
    return sum(each.nbytes for each in load_backbone(artifact, torch.float32).parameters())


def test_a_model_larger_than_the_memory_left_is_refused_before_it_is_read(artifact: Artifact) -> None:
    """By a byte; the size is that of what is loaded, in the number format that is served."""
    needed = weights_without_head(artifact)
    with pytest.raises(ArtifactInvalid, match=r"GiB of weights in torch\.float32, cpu has .* GiB of memory left"):
        load_model(artifact, free=lambda _: needed - 1)
    with pytest.raises(ArtifactInvalid, match=r"torch\.bfloat16"):
        load_model(artifact, dtype="bfloat16", free=lambda _: needed // 2 - 1)
    for free in (needed, None):
        assert load_model(artifact, free=lambda _, free=free: free).dtype == "float32"  # type: ignore[misc]
    assert load_model(artifact, dtype="bfloat16", free=lambda _: needed // 2).dtype == "bfloat16"


def test_the_size_of_shards_is_that_of_those_the_index_names(published: Path, tmp_path: Path) -> None:
    root = copy_artifact(published, tmp_path)
    artifact = open_artifact(str(root), offline=True)
    whole = weights_bytes(artifact.base_path, torch.float32)
    shard_base(root, {})
    save_file({"old": torch.zeros(99)}, artifact.base_path / "forgotten.safetensors")
    assert weights_bytes(artifact.base_path, torch.float32) == whole


def shard_base(root: Path, more: Tensors) -> None:
    """The base in two shards with an index, the second with something more."""
    folder = root / "../base"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = [{name: tensors[name] for name in names[::2]}, {name: tensors[name] for name in names[1::2]} | more]
    places = {}
    for number, part in enumerate(parts, start=1):
        save_file(part, folder / f"model-{number}.safetensors", metadata={"format": "pt"})
        places |= dict.fromkeys(part, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def num_tensor_bytes() -> int:
    kinds = (torch.Tensor, torch.nn.Parameter)  # a compiler leaves others, of no memory
    tensors = [each for each in gc.get_objects() if type(each) in kinds and each.layout is torch.strided]  # prepacked: opaque
    tensors = [each for each in tensors if not each.is_meta]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def adapter(change: Callable[[Tensors], object]) -> Damage:
    return lambda root: edit_tensors(root / ADAPTER, change)


def text_config(**changes: object) -> Damage:
    """Of the base, the language model's part."""

    def damage(root: Path) -> None:
        path = root / "../base/config.json"
        edit_json(path, text_config=json.loads(path.read_bytes())["text_config"] | changes)

    return damage


def adapter_config(**changes: object) -> Damage:
    return lambda root: edit_json(root / ADAPTER_CONFIG, **changes)


def base(change: Callable[[Tensors], object]) -> Damage:
    return lambda root: edit_tensors(root / BASE, change)


def cut(name: str, keep: float) -> Damage:
    return lambda root: (root / name).write_bytes((data := (root / name).read_bytes())[: int(len(data) * keep)])


def text(name: str, content: str) -> Damage:
    return lambda root: (root / name).write_text(content)


def fill(part: str, value: float) -> Callable[[Tensors], object]:
    """Set every element of the first tensor whose name holds `part`."""
    return lambda tensors: tensors[min(name for name in tensors if part in name)].fill_(value)


def spoil(part: str, value: float) -> Callable[[Tensors], object]:
    """Set one element."""
    return lambda tensors: tensors[min(name for name in tensors if part in name)].view(-1)[3:4].fill_(value)


def remove(part: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(min(name for name in tensors if part in name))


def rename(tensors: Tensors, name_of: Callable[[str], str]) -> None:
    for name in list(tensors):
        tensors[name_of(name)] = tensors.pop(name)


def other_family(root: Path) -> None:
    config = MistralConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=16, vocab_size=420
    )
    shutil.rmtree(root / "../base")
    MistralModel(config).save_pretrained(root / "../base")
    edit_json(root / "../base/config.json", image_token_id=410)


def other_rank(root: Path) -> None:
    """An adapter of rank 2 under a configuration that says 4."""
    save_adapter(root, LoraConfig(r=2, lora_alpha=8, target_modules="all-linear", bias="none"))
    edit_json(root / ADAPTER_CONFIG, r=4)


def save_adapter(root: Path, config: LoraConfig) -> None:
    torch.manual_seed(1)
    model = get_peft_model(AutoModel.from_pretrained(root / "../base", dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(root / "backbone_adapter", save_embedding_layers=False)


def lora(**options: object) -> Damage:
    return lambda root: save_adapter(root, LoraConfig(r=4, lora_alpha=8, **({"target_modules": ["q_proj"]} | options)))


def hub_names(root: Path) -> None:
    edit_json(root / "reward_model_config.json", base_model_name="Qwen/Qwen2.5-VL-3B-Instruct")
    edit_json(root / ADAPTER_CONFIG, base_model_name_or_path="Qwen/Qwen2.5-VL-7B-Instruct")


FAULTS: dict[str, tuple[Damage, str]] = {
    "an adapter key missing": (
        adapter(remove("lora_A")),
        r"adapter_model.safetensors: 1 missing adapter keys, first base_model.*lora_A.weight",
    ),
    "half the adapter missing": (
        adapter(lambda tensors: [tensors.pop(name) for name in list(tensors) if "visual" in name]),
        "missing adapter keys",
    ),
    "an unexpected adapter key": (
        adapter(lambda tensors: tensors.update({"base_model.model.extra.lora_A.weight": torch.ones(4, 4)})),
        "1 unexpected adapter keys, first base_model.model.extra.lora_A.weight",
    ),
    "an adapter under names of no layout": (
        adapter(lambda tensors: rename(tensors, lambda name: name.replace("language_model", "text"))),
        r"28 missing adapter keys, first (base_model\.model\.language_model\.layers\.0\.\S+(, )?){3}$",
    ),
    "an adapter key under two names": (
        adapter(lambda tensors: tensors.update({"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(4, 64)})),
        "1 weights under two names, first base_model.model.language_model.layers.0.mlp.up_proj.lora_A.weight",
    ),
    "an empty adapter": (adapter(dict.clear), "holds no tensors"),
    "a truncated adapter": (cut(ADAPTER, 0.7), r"adapter_model.safetensors: cannot be read"),
    "an adapter of zero bytes": (cut(ADAPTER, 0), r"adapter_model.safetensors: cannot be read"),
    "an untrained adapter": (adapter(fill("lora_B", 0.0)), "lora_B.weight is all zero"),
    "a zero lora_A": (adapter(fill("lora_A", 0.0)), "lora_A.weight is all zero"),
    "a NaN in the adapter": (adapter(spoil("lora_B", float("nan"))), "lora_B.weight is not finite"),
    "an infinity in the adapter": (adapter(spoil("lora_A", float("inf"))), "lora_A.weight is not finite"),
    "an adapter of another rank": (other_rank, r"backbone_adapter: adapter does not fit the base .*torch.Size\(\[2, "),
    "an adapter of another width": (
        adapter(
            lambda tensors: [tensors.__setitem__(name, tensors[name][:, :3].contiguous()) for name in tensors if "q_proj.lora_A" in name]
        ),
        "adapter does not fit the base",
    ),
    "an adapter for another base": (hub_names, "adapter for Qwen/Qwen2.5-VL-7B-Instruct, configuration names Qwen/Qwen2.5-VL-3B-Instruct"),
    "broken adapter configuration": (text(ADAPTER_CONFIG, "{"), "adapter_config.json: cannot be read"),
    "an adapter configuration that is a list": (text(ADAPTER_CONFIG, "[]"), "adapter_config.json: expected peft_type 'LORA', found 'list'"),
    "an adapter configuration without a type": (text(ADAPTER_CONFIG, "{}"), "expected peft_type 'LORA', found None"),
    "another kind of adapter": (adapter_config(peft_type="IA3"), "expected peft_type 'LORA', found 'IA3'"),
    "a rank that is no number": (adapter_config(r="many"), "backbone_adapter: adapter does not fit the base"),
    "a key peft would ignore": (adapter_config(new_scaling=2.0), "peft [0-9.]+ does not know new_scaling"),
    "a start that changes the base": (adapter_config(init_lora_weights="pissa"), "init_lora_weights 'pissa' changes the base"),
    "DoRA": (lora(use_dora=True), "expected plain LoRA on linear layers"),
    "a trained bias": (lora(bias="lora_only"), "expected plain LoRA on linear layers"),
    "LoRA on embeddings": (lora(target_modules=["embed_tokens"]), "expected plain LoRA on linear layers"),
    "LoRA on convolutions": (lora(target_modules=["patch_embed.proj"]), "expected plain LoRA on linear layers"),
    "whole modules saved": (lora(modules_to_save=["norm"]), "modules_to_save norm: expected plain LoRA"),
    "targets that do not exist": (adapter_config(target_modules=["no_such_layer"]), "backbone_adapter: adapter does not fit the base"),
    "the wrong base by its hash": (
        lambda root: edit_json(root / "reward_model_config.json", base_model_sha256="0" * 64),
        f"another base than the adapter was trained on: expected sha256 {'0' * 64}, found [0-9a-f]{{64}}",
    ),
    "a base of another family": (other_family, r"config.json: expected one of \('qwen2_5_vl', .*\), found 'mistral'"),
    "a base of no family": (lambda root: edit_json(root / "../base/config.json", model_type="nope"), "config.json: cannot be read"),
    "a quantised base": (
        lambda root: edit_json(root / "../base/config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "config.json: expected full-precision weights",
    ),
    "a base with sliding windows": (
        text_config(layer_types=["sliding_attention"] * 2),
        "config.json: expected full attention in every layer",
    ),
    "a base with another activation": (text_config(hidden_act="gelu"), "config.json: expected hidden_act 'silu', found 'gelu'"),
    "a base whose rotary positions grow with the length": (
        text_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0, "mrope_section": [2, 3, 3]}),
        "config.json: rope_type 'dynamic'",
    ),
    "a base under names of no layout": (
        base(lambda tensors: rename(tensors, lambda name: f"net.{name}")),
        r"base: 56 missing keys in the base weights, first (language_model\.\S+(, )?){3}$",
    ),
    "a base weight under two names": (
        base(lambda tensors: tensors.update({"model.visual.merger.ln_q.weight": torch.ones(48)})),
        r"base: 1 weights under two names, first visual.merger.ln_q.weight$",
    ),
    "a base weight under two names in two shards": (
        lambda root: shard_base(root, {"model.visual.merger.ln_q.weight": torch.ones(48)}),
        r"base: 1 weights under two names, first visual.merger.ln_q.weight$",
    ),
    "an index of weights that is none": (
        lambda root: (shard_base(root, {}), (root / "../base/model.safetensors.index.json").write_text("[]")),
        r"model.safetensors.index.json: cannot be read as an index of weights",
    ),
    "a base weight missing": (base(remove("layers.1.mlp")), "base: 1 missing keys in the base weights, first language_model.layers.1.mlp"),
    "a base weight too many": (base(lambda tensors: tensors.update({"visual.extra": torch.ones(2)})), "1 unexpected keys .*visual.extra"),
    "a base weight of another shape": (
        base(lambda tensors: tensors.update({name: tensors[name][:5].clone() for name in tensors if "layers.0.mlp.down" in name})),
        "base",
    ),
    "a NaN in the base": (base(spoil("layers.0.mlp", float("nan"))), "base: .* is not finite"),
    "an infinity in the embeddings": (base(spoil("embed_tokens", float("inf"))), "base: .*embed_tokens.weight is not finite"),
    "a truncated base": (cut(BASE, 0.9), "model.safetensors: cannot be read"),
    "a shard that is no safetensors": (text("../base/model-2.safetensors", "hello"), "model-2.safetensors: cannot be read"),
    "a head of another width": (
        lambda root: (
            torch.save({"weight": torch.ones(1, 32)}, root / "reward_head.pt"),
            edit_json(root / "reward_model_config.json", score_head_shape=[1, 32]),
        ),
        "reward_head.pt: head takes 32 values, the base gives 64",
    ),
    "a head of another shape than it says": (
        lambda root: edit_json(root / "reward_model_config.json", score_head_shape=[1, 32]),
        r"reward_head.pt: expected weight \[1, 32\] with one row, found \[1, 64\]",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused_in_one_line(published: Path, tmp_path: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    root = copy_artifact(published, tmp_path)
    damage(root)
    override = str(tmp_path / "base")
    with pytest.raises(ArtifactInvalid, match=message) as refusal:
        load_model(open_artifact(str(root), base_model=override, offline=True))
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def in_whole_model(name: str) -> str:
    """Of a base weight as it was published, what transformers calls it now."""
    return f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.")


BASE_LAYOUTS: dict[str, Callable[[str], str]] = {
    "of the whole model since transformers 5": in_whole_model,
    "of the backbone": lambda name: in_whole_model(name).removeprefix("model."),
    "new for the pictures, old for the text": lambda name: name.replace("visual.", "model.visual."),
    "old for the pictures, new for the text": lambda name: in_whole_model(name).replace("model.visual.", "visual."),
}
ADAPTER_LAYOUTS: dict[str, Callable[[str], str]] = {
    "of the whole model since transformers 5": lambda name: name.replace("base_model.model.", "base_model.model.model."),
    "of the whole model before": lambda name: name.replace("model.language_model.", "model.model."),
}


@pytest.mark.parametrize("layout", BASE_LAYOUTS)
def test_a_base_is_read_under_any_of_its_published_names(published: Path, loaded: LoadedModel, tmp_path: Path, layout: str) -> None:
    root = copy_artifact(published, tmp_path)
    base(lambda tensors: rename(tensors, BASE_LAYOUTS[layout]))(root)
    assert_equal_weights(load_model(open_artifact(str(root))), loaded)


@pytest.mark.parametrize("layout", ADAPTER_LAYOUTS)
def test_an_adapter_is_read_under_any_of_its_published_names(published: Path, loaded: LoadedModel, tmp_path: Path, layout: str) -> None:
    root = copy_artifact(published, tmp_path)
    adapter(lambda tensors: rename(tensors, ADAPTER_LAYOUTS[layout]))(root)
    assert_equal_weights(load_model(open_artifact(str(root))), loaded)


def test_a_text_only_adapter_of_the_whole_model(tmp_path: Path) -> None:
    """peft put on a language model, or on its backbone as we do."""
    root = write_text_only(tmp_path)
    before = load_model(open_artifact(str(root)))
    edit_tensors(root / ADAPTER, lambda tensors: rename(tensors, lambda name: name.replace("base_model.model.", "base_model.model.model.")))
    edit_json(root / "reward_model_config.json", files={})
    assert_equal_weights(load_model(open_artifact(str(root))), before)


def test_a_base_of_new_names_is_written_so_that_it_is_read_again(published: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    """What export does with a backbone that was trained whole."""
    root = copy_artifact(published, tmp_path)
    base(lambda tensors: rename(tensors, in_whole_model))(root)
    load_backbone(open_artifact(str(root)), torch.float32).save_pretrained(tmp_path / "again")
    assert_equal_weights(load_model(open_artifact(str(root), base_model=str(tmp_path / "again"), offline=True)), loaded)


def assert_equal_weights(found: LoadedModel, expected: LoadedModel) -> None:
    ours, theirs = weights(found.model), weights(expected.model)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_pickled_base_weights_are_not_read(published: Path, tmp_path: Path) -> None:
    """A stray safetensors file beside pickled weights must not make transformers read the pickle."""
    root = copy_artifact(published, tmp_path)
    (tmp_path / "base/model.safetensors").rename(tmp_path / "base/other.safetensors")
    torch.save({}, tmp_path / "base/pytorch_model.bin")
    with pytest.raises(ArtifactInvalid, match=r"base model cannot be loaded .*safetensors"):
        load_model(open_artifact(str(root)))


@pytest.mark.parametrize("names", [("org/base", "org/base"), ("/some/where", "org/base"), (None, "org/base"), ("org/base", "./base")])
def test_bases_that_may_be_the_same_are_loaded(published: Path, tmp_path: Path, names: tuple[str | None, str]) -> None:
    root = copy_artifact(published, tmp_path)
    edit_json(root / ADAPTER_CONFIG, base_model_name_or_path=names[0])
    edit_json(root / "reward_model_config.json", base_model_name=names[1], base_model_sha256=base_sha256(tmp_path / "base"))
    assert load_model(open_artifact(str(root), base_model=str(tmp_path / "base"), offline=True)).device == "cpu"


# Names on disk, family by family


def write_layouts(family: str, folder: Path) -> dict[str, Path]:
    """The same tiny weights as each class of transformers saves them: whole, the backbone alone, a sequence classifier."""
    tokenizer = train_tokenizer(CORPUS, 420)
    if family in VISION_FAMILIES:
        write_base(folder / "whole", tokenizer, family)  # type: ignore[arg-type]
    else:
        write_text_base(folder / "whole", tokenizer, family)  # type: ignore[arg-type]
        AutoModelForSequenceClassification.from_pretrained(folder / "whole", num_labels=1).save_pretrained(folder / "classifier")
    AutoModel.from_pretrained(folder / "whole").save_pretrained(folder / "backbone")
    return {path.name: path for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_have_one_name_whatever_class_saved_them(family: VisionFamily | TextFamily, tmp_path: Path) -> None:
    """A classifier's own head is no part of the backbone."""
    layouts = write_layouts(family, tmp_path)
    names = {layout: {backbone_name(name, family) for name in tensor_names(path / "model.safetensors")} for layout, path in layouts.items()}
    names.get("classifier", set()).discard("score.weight")
    expected = {name for name, _ in AutoModel.from_pretrained(layouts["whole"]).named_parameters()}
    assert all(found == expected for found in names.values())
    assert len(names) == (2 if family in VISION_FAMILIES else 3)


@pytest.mark.parametrize("layout", ["of the whole model since transformers 5", "of the backbone", "before transformers 5"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_a_base_of_another_family_is_read_under_its_published_names(
    published_of: Callable[[VisionFamily], Path], tmp_path: Path, family: VisionFamily, layout: str
) -> None:
    """Qwen3-VL is younger than the new names, so under the old ones it is refused."""
    expected = load_model(open_artifact(str(published_of(family))))
    root = copy_artifact(published_of(family), tmp_path)
    within = {"of the backbone": "", "of the whole model since transformers 5": "model."}
    old = {"visual.": "visual.", "language_model.": "model."}

    def named(name: str) -> str:
        name = backbone_name(name, family)
        part = "visual." if name.startswith("visual.") else "language_model."
        return within[layout] + name if layout in within else name.replace(part, old[part], 1)

    base(lambda tensors: rename(tensors, named))(root)
    if layout in within or family == "qwen2_vl":
        assert_equal_weights(load_model(open_artifact(str(root))), expected)
        return
    with pytest.raises(ArtifactInvalid, match=r"base: \d+ missing keys in the base weights, first language_model\."):
        load_model(open_artifact(str(root)))


def vision_config(**changes: object) -> Damage:
    def damage(root: Path) -> None:
        path = root / "../base/config.json"
        edit_json(path, vision_config=json.loads(path.read_bytes())["vision_config"] | changes)

    return damage


FAMILY_FAULTS: dict[str, tuple[VisionFamily, Damage, str]] = {
    "an unexpected weight": ("qwen3_vl", base(lambda tensors: tensors.update({"model.visual.extra": torch.ones(2)})), "1 unexpected keys"),
    "no norm of the queries": ("qwen3_vl", base(remove("q_norm")), "1 missing keys .*q_norm.weight"),
    "no merger of DeepStack": ("qwen3_vl", base(remove("deepstack_merger_list.1.norm.weight")), "1 missing keys .*deepstack_merger_list.1"),
    "a weight under two names": (
        "qwen3_vl",
        base(lambda tensors: tensors.update({"visual.pos_embed.weight": torch.ones(36, 48)})),
        "1 weights under two names, first visual.pos_embed.weight$",
    ),
    "a weight under an old name and a new": (
        "qwen2_vl",
        base(lambda tensors: tensors.update({"model.visual.merger.ln_q.weight": torch.ones(48)})),
        "1 weights under two names, first visual.merger.ln_q.weight$",
    ),
    "another activation of the tower": (
        "qwen3_vl",
        vision_config(hidden_act="silu"),
        "expected hidden_act 'gelu_pytorch_tanh', found 'silu'",
    ),
    "another activation of the older tower": (
        "qwen2_vl",
        vision_config(hidden_act="silu"),
        "expected hidden_act 'quick_gelu', found 'silu'",
    ),
    "another activation of the text": ("qwen3_vl", text_config(hidden_act="gelu"), "expected hidden_act 'silu', found 'gelu'"),
    "sliding windows": (
        "qwen2_vl",
        text_config(layer_types=["full_attention", "sliding_attention", "full_attention"]),
        "expected full attention",
    ),
    "sliding windows where there are none": ("qwen3_vl", text_config(layer_types=["sliding_attention"] * 3), "expected full attention"),
    "experts": ("qwen3_vl", lambda root: edit_json(root / "../base/config.json", model_type="qwen3_vl_moe"), "found 'qwen3_vl_moe'"),
    "experts of text": ("qwen2_vl", lambda root: edit_json(root / "../base/config.json", model_type="qwen2_moe"), "found 'qwen2_moe'"),
}


@pytest.mark.parametrize("fault", FAMILY_FAULTS)
def test_what_does_not_fit_another_family_is_refused_in_one_line(
    published_of: Callable[[VisionFamily], Path], tmp_path: Path, fault: str
) -> None:
    family, damage, message = FAMILY_FAULTS[fault]
    root = copy_artifact(published_of(family), tmp_path)
    damage(root)
    with pytest.raises(ArtifactInvalid, match=message) as refusal:
        load_model(open_artifact(str(root), base_model=str(tmp_path / "base"), offline=True))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("layout", ADAPTER_LAYOUTS)
def test_an_adapter_of_another_family_is_read_under_its_published_names(
    published_of: Callable[[VisionFamily], Path], tmp_path: Path, layout: str
) -> None:
    expected = load_model(open_artifact(str(published_of("qwen2_vl"))))
    root = copy_artifact(published_of("qwen2_vl"), tmp_path)
    adapter(lambda tensors: rename(tensors, ADAPTER_LAYOUTS[layout]))(root)
    assert_equal_weights(load_model(open_artifact(str(root))), expected)


def test_a_qwen3_vl_adapter_of_the_whole_model(published_of: Callable[[VisionFamily], Path], tmp_path: Path) -> None:
    """Those of DeepStack's mergers included."""
    expected = load_model(open_artifact(str(published_of("qwen3_vl"))))
    root = copy_artifact(published_of("qwen3_vl"), tmp_path)
    assert any("deepstack_merger_list" in name for name in tensor_names(root / ADAPTER))
    adapter(lambda tensors: rename(tensors, ADAPTER_LAYOUTS["of the whole model since transformers 5"]))(root)
    assert_equal_weights(load_model(open_artifact(str(root))), expected)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_a_base_that_was_trained_whole_is_written_so_that_it_is_read_again(
    published_of: Callable[[VisionFamily], Path], tmp_path: Path, family: VisionFamily
) -> None:
    root = str(published_of(family))
    load_backbone(open_artifact(root), torch.float32).save_pretrained(tmp_path / "again")
    found = load_model(open_artifact(root, base_model=str(tmp_path / "again"), offline=True))
    assert_equal_weights(found, load_model(open_artifact(root)))


def test_adapters_of_the_language_model_alone(published: Path, tmp_path: Path, encoder: Encoder) -> None:
    root = copy_artifact(published, tmp_path)
    lora(target_modules=["q_proj", "v_proj"], use_rslora=True)(root)
    group = encode(encoder, (120, 80), 0, CAPTIONS)
    merged, apart = (load_model(open_artifact(str(root)), lora=each).model for each in ("merged", "unmerged"))  # type: ignore[arg-type]
    assert np.abs(values(score_shared(merged, [group])) - values(score_plain(apart, [group]))).max() <= 1e-5


def test_devices_and_number_formats() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_device("cpu") == "cpu"
    assert resolve_dtype("auto", "bfloat16", cpu) == "float32"
    assert resolve_dtype("auto", "bfloat16", cuda) == "bfloat16"
    assert resolve_dtype("float32", "bfloat16", cuda) == "float32"
    with pytest.raises(ArtifactInvalid, match="device cuda:64: torch sees"):
        resolve_device("cuda:64")


def test_the_head_is_outside_autocast(loaded: LoadedModel) -> None:
    assert isinstance(loaded.model.head, LinearHead)
    assert loaded.model.head.last.weight.dtype == torch.float32
