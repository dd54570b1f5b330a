"""The reward model in memory: backbone, with LoRA or trained whole, plus scalar head, loaded with every check, run on packed groups."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from app import attention
from app.artifacts import ADAPTER_WEIGHTS_NAME, Artifact, base_sha256, fingerprint
from app.encoding import TEXT_ONLY_FAMILIES
from app.errors import ArtifactInvalid
from app.heads import LinearHead, load_head
from app.machine import MappedFiles, forget_pages
from app.packing import Packed
from app.varlen import choose, installed

ENCODING_VERSION = "3"  # raise it whenever ids, pixels, packing, attention or pooling change
_SCORING_LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "pillow")
_UNUSED_BASE_KEYS = {"lm_head.weight"}
# Names within a whole model, old (`visual`, `model`) and new (`model.visual`, `model.language_model`), to those within the backbone; the
# first that matches counts. transformers 5.23 takes `model.visual` of a base for a part of the language model; peft knows none of them.
_BACKBONE_NAMES = {
    "qwen2_5_vl": {r"^model\.visual\.": "visual.", r"^model\.language_model\.": "language_model.", r"^model\.": "language_model."},
    "qwen2": {r"^model\.": ""},
}
_PEFT_PREFIX = "base_model.model."
_NUM_NAMED = 3  # keys that a refusal names
SUPPORTED_FAMILIES = ("qwen2_5_vl", *TEXT_ONLY_FAMILIES)
_MAX_REASON = 300  # characters of a library's own words
_HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva")  # the others change the base's weights as well
_GROWING_ROPES = ("dynamic", "longrope")  # their frequencies depend on the length of the whole
_COPIED_AT_ONCE = 1 << 22  # values
_LORA_KEYS = (".lora_A.weight", ".lora_B.weight")


class RewardModel(nn.Module):
    """Backbone and head. `forward` runs packed groups, `forward_plain` one caption as the published recipe does."""

    def __init__(self, backbone: Any, head: LinearHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        name = attention.register()
        backbone.set_attn_implementation({"text_config": name} if self.takes_images else name)

    @property
    def takes_images(self) -> bool:
        return str(self.backbone.config.model_type) not in TEXT_ONLY_FAMILIES

    @property
    def image_token_id(self) -> int | None:
        return int(self.backbone.config.image_token_id) if self.takes_images else None

    @property
    def merge_size(self) -> int:
        return int(self.backbone.config.vision_config.spatial_merge_size) if self.takes_images else 1

    @property
    def device(self) -> torch.device:
        return self.head.linear.weight.device

    def forward(self, packed: Packed) -> Tensor:
        """Scores of the packed rows, [rows] float32. Differentiable; positions are passed, no state is kept."""
        embedded = self.backbone.get_input_embeddings()(packed.input_ids)  # [tokens, hidden]
        if packed.pixel_values is not None:
            features = self._image_features(packed).to(embedded.dtype)  # [image tokens, hidden]
            here = (packed.input_ids == self.backbone.config.image_token_id).unsqueeze(-1)
            embedded = embedded.masked_scatter(here, features)
        language_model = self.backbone.language_model if self.takes_images else self.backbone
        hidden = language_model(
            inputs_embeds=embedded.unsqueeze(0),
            position_ids=packed.position_ids if self.takes_images else packed.position_ids[0],  # text has one axis
            attention_mask={"full_attention": packed.layout},
            use_cache=False,
        ).last_hidden_state[0]  # [tokens, hidden]
        scores: Tensor = self.head(hidden[packed.pooled_index])
        return scores

    def forward_plain(self, input_ids: Tensor, pixel_values: Tensor | None, image_grid_thw: Tensor | None) -> Tensor:
        """One caption by itself, transformers deciding mask and positions: the published usage recipe. [1] float32."""
        vision = {}
        if self.takes_images:
            types = (input_ids == self.backbone.config.image_token_id).int()
            vision = {"mm_token_type_ids": types, "pixel_values": pixel_values, "image_grid_thw": image_grid_thw}
        hidden = self.backbone(
            input_ids=input_ids,  # [1, tokens]
            attention_mask=torch.ones_like(input_ids),
            use_cache=False,
            **vision,
        ).last_hidden_state
        if self.takes_images:
            self.backbone.rope_deltas = None  # transformers leaves it on the module
        scores: Tensor = self.head(hidden[:, -1])
        return scores

    def _image_features(self, packed: Packed) -> Tensor:
        outputs = self.backbone.get_image_features(packed.pixel_values, packed.image_grid_thw)
        return torch.cat([outputs.pooler_output[slot] for slot in packed.image_slots])


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to score, and what it is made of."""

    model: RewardModel
    fingerprint: str
    dtype: Literal["float32", "bfloat16"]
    device: str


def load_model(
    artifact: Artifact,
    *,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    lora: Literal["merged", "unmerged"] = "merged",
    switches: Mapping[str, bool] | None = None,
    leave_mapped: bool = False,
) -> LoadedModel:
    """Base, adapter if there is one, and head, every part checked against the others. Raises ArtifactInvalid naming the file at fault.

    `leave_mapped`: on a CPU the weights still lie in their mapped files; an engine packs most of them, which copies as well.
    `switches`: ways of computing that move the last digits of a score; those that are on are part of the fingerprint.
    """
    place = torch.device(resolve_device(device))
    number = resolve_dtype(dtype, artifact.config.dtype, place)
    head = load_head(artifact.head_path, artifact.config.score_head_shape)
    has_adapter = artifact.config.kind == "lora_head"
    base_digest = _checked_base(artifact, _checked_adapter(artifact).get("base_model_name_or_path") if has_adapter else None)
    backbone = load_backbone(artifact, getattr(torch, number))
    if has_adapter:
        backbone = _with_adapter(backbone, artifact, merge=lora == "merged")
    hidden = backbone.config.get_text_config().hidden_size
    if head.linear.in_features != hidden:
        raise ArtifactInvalid(f"{artifact.head_path}: head takes {head.linear.in_features} values, the base gives {hidden}")
    model = RewardModel(backbone, head).eval().requires_grad_(False)
    _refuse_nonfinite(model, artifact)
    if place.type == "cpu" and not leave_mapped:
        own_memory(model)
    _move(model, place)
    runtime = {"dtype": number, "device": place.type, "lora": lora if has_adapter else "none", "encoding": ENCODING_VERSION}
    runtime |= {name: version(name) for name in _SCORING_LIBRARIES}
    runtime |= {name: "on" for name, is_on in (switches or {}).items() if is_on}
    if place.type == "cuda":  # a CPU has one way of attention for each format
        runtime |= {f"attention over {what}": way for what, way in attention_ways(model).items()}
    return LoadedModel(model, fingerprint(artifact, base_digest, runtime), number, str(place))


def attention_ways(model: RewardModel) -> dict[str, str]:
    """Which kernel of the serving forward computes attention over text, and over pictures, whose heads are of another size."""
    backbone, there = model.backbone, installed(model.device.type)
    heads = {"text": (backbone.language_model if model.takes_images else backbone).layers[0].self_attn.head_dim}
    if model.takes_images:
        heads["images"] = backbone.visual.blocks[0].attn.head_dim
    return {name: choose(model.device.type, backbone.dtype, int(head_dim), there) for name, head_dim in heads.items()}


def load_backbone(artifact: Artifact, dtype: torch.dtype) -> Any:
    """The base without language-model head, every weight accounted for."""
    path = artifact.base_path
    config = read_base_config(path)
    key_mapping = _key_mapping(path, config.model_type)
    try:
        backbone, info = AutoModel.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            key_mapping=key_mapping,
            output_loading_info=True,
        )
    except Exception as error:  # whatever the libraries raise, the base is at fault
        raise ArtifactInvalid(f"{path}: base model cannot be loaded ({_reason(error)})") from None
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := sorted(map(str, set(map(_name, info.get(fault, ()))) - _UNUSED_BASE_KEYS)):
            raise ArtifactInvalid(f"{path}: {len(found)} {fault.replace('_', ' ')} in the base weights, first {_first(found)}")
    return backbone


def _key_mapping(path: Path, family: str) -> dict[str, str] | None:
    """What transformers must be told of the names in a base, None where it knows them itself. Raises ArtifactInvalid for double ones."""
    names_of = {shard: _tensor_names(shard) for shard in sorted(path.glob("*.safetensors"))}
    names = [name for shard in _shards(path) for name in names_of.get(shard, ())]
    _refuse_doubles(path, [_backbone_name(name, family) for name in names])
    return _BACKBONE_NAMES[family] if any(name.startswith("model.visual.") for name in names) else None


def _shards(path: Path) -> list[Path]:
    """The files that transformers reads: the one whole file if there is one, else those the index names."""
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.exists() or not index.exists():
        return [whole] if whole.exists() else sorted(path.glob("*.safetensors"))
    try:
        found = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise ArtifactInvalid(f"{index}: cannot be read as an index of weights") from None
    return [path / str(name) for name in found]


def _backbone_name(name: str, family: str) -> str:
    """A weight's name within the backbone, whichever of its published names it has on disk."""
    for pattern, replacement in _BACKBONE_NAMES[family].items():
        renamed, matched = re.subn(pattern, replacement, name)
        if matched:
            return renamed
    return name


def _refuse_doubles(path: Path, names: Sequence[str]) -> None:
    """One of two weights for the same place would be dropped, and nobody could say which."""
    if double := sorted(name for name, times in Counter(names).items() if times > 1):
        raise ArtifactInvalid(f"{path}: {len(double)} weights under two names, first {_first(double)}")


def _first(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:_NUM_NAMED])


def resolve_device(device: str) -> str:
    """`auto` is the first GPU, else the CPU. Raises ArtifactInvalid for a GPU that is not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if count else "cpu"
    place = torch.device(device)
    if place.type == "cuda" and (place.index or 0) >= count:
        raise ArtifactInvalid(f"device {device}: torch sees {count or 'no'} GPUs")
    return device


def resolve_dtype(
    dtype: Literal["auto", "float32", "bfloat16"], wanted: Literal["float32", "bfloat16"], device: torch.device
) -> Literal["float32", "bfloat16"]:
    """`auto` is the artifact's format on a GPU and float32 on a CPU, where it is exact and rarely slower."""
    if dtype != "auto":
        return dtype
    return wanted if device.type == "cuda" else "float32"


def _name(key: Any) -> str:
    return str(key[0]) if isinstance(key, tuple) else str(key)


def read_base_config(path: Path) -> Any:
    """The base's configuration, of a family whose forward we know and without tricks that change it."""
    name = path / "config.json"
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ArtifactInvalid(f"{name}: cannot be read ({_reason(error)})") from None
    if config.model_type not in SUPPORTED_FAMILIES:
        raise ArtifactInvalid(f"{name}: expected one of {SUPPORTED_FAMILIES}, found {config.model_type!r}")
    if getattr(config, "quantization_config", None) is not None:
        raise ArtifactInvalid(f"{name}: expected full-precision weights, found a quantised base")
    if set(config.get_text_config().layer_types) != {"full_attention"}:
        raise ArtifactInvalid(f"{name}: expected full attention in every layer, found sliding windows")
    for part in filter(None, (config.get_text_config(), getattr(config, "vision_config", None))):
        if part.hidden_act != "silu":
            raise ArtifactInvalid(f"{name}: expected hidden_act 'silu', found {part.hidden_act!r}")
    if (rope := config.get_text_config().rope_parameters["rope_type"]) in _GROWING_ROPES:
        raise ArtifactInvalid(f"{name}: rope_type {rope!r} makes a prefix depend on what follows it; expected one with fixed frequencies")
    return config


def _checked_base(artifact: Artifact, named: Any) -> str:
    """SHA-256 of the base, which is the one the configuration and the adapter name."""
    found = base_sha256(artifact.base_path)
    expected = artifact.config.base_model_sha256
    if expected is not None and found != expected:
        raise ArtifactInvalid(
            f"{artifact.base_path}: another base than the adapter was trained on: expected sha256 {expected}, found {found}"
        )
    if _both_hub_ids(named, artifact.config.base_model_name) and named != artifact.config.base_model_name:
        raise ArtifactInvalid(f"{artifact.adapter_path}: adapter for {named}, configuration names {artifact.config.base_model_name}")
    return found


def _both_hub_ids(*names: Any) -> bool:
    return all(isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/", "~")) for name in names)


def _checked_adapter(artifact: Artifact) -> dict[str, Any]:
    """The adapter's configuration; configuration and tensors were looked at."""
    config = _adapter_config(artifact)
    _check_adapter_file(artifact.adapter_path / ADAPTER_WEIGHTS_NAME)
    return config


def _adapter_config(artifact: Artifact) -> dict[str, Any]:
    """`adapter_config.json` of a plain LoRA; what peft would ignore or what changes the base is refused."""
    path = artifact.adapter_path / "adapter_config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactInvalid(f"{path}: cannot be read ({_reason(error)})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ArtifactInvalid(f"{path}: expected peft_type 'LORA', found {found!r}")
    if config.get("init_lora_weights", True) not in _HARMLESS_INITS:
        raise ArtifactInvalid(
            f"{path}: init_lora_weights {config['init_lora_weights']!r} changes the base; convert the adapter to plain LoRA"
        )
    known = {field.name for field in fields(LoraConfig)}
    if unknown := sorted(name for name, value in config.items() if name not in known and value):
        raise ArtifactInvalid(f"{path}: peft {version('peft')} does not know {', '.join(unknown)}")
    return config


def _check_adapter_file(path: Path) -> None:
    """Every tensor readable, finite and not all zero."""
    names = _tensor_names(path)
    if not names:
        raise ArtifactInvalid(f"{path}: holds no tensors")
    with safe_open(path, framework="pt") as stream:
        for name in names:
            tensor = stream.get_tensor(name)
            if not torch.isfinite(tensor).all():
                raise ArtifactInvalid(f"{path}: {name} is not finite")
            if ".lora_" in name and not tensor.any():
                raise ArtifactInvalid(f"{path}: {name} is all zero; this adapter changes nothing there and was not trained")


def _tensor_names(path: Path) -> list[str]:
    """Names in a safetensors file. Raises ArtifactInvalid for one that is cut off or no safetensors at all."""
    try:
        with safe_open(path, framework="pt") as stream:
            return sorted(stream.keys())
    except Exception as error:
        raise ArtifactInvalid(f"{path}: cannot be read ({_reason(error)})") from None


def _with_adapter(backbone: Any, artifact: Artifact, *, merge: bool) -> Any:
    path = artifact.adapter_path
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # a refusal in `_check_adapter`
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # peft 0.21 asks transformers 5.23 so
            peft_model = PeftModel.from_pretrained(
                backbone, str(path), adapter_name="default", is_trainable=False, key_mapping=_BACKBONE_NAMES[backbone.config.model_type]
            )
    except Exception as error:
        raise ArtifactInvalid(f"{path}: adapter does not fit the base ({_reason(error)})") from None
    _check_adapter(peft_model, artifact.adapter_path / ADAPTER_WEIGHTS_NAME)
    # peft holds the adapter in float32, so merging sums in float32 and rounds once to the base's format; a test proves it
    return peft_model.merge_and_unload() if merge else peft_model.get_base_model()


def _check_adapter(peft_model: PeftModel, path: Path) -> None:
    """PEFT only warns about missing keys and says nothing of others; here each is a refusal."""
    family = peft_model.get_base_model().config.model_type
    names = [_PEFT_PREFIX + _backbone_name(name.removeprefix(_PEFT_PREFIX), family) for name in _tensor_names(path)]
    _refuse_doubles(path, names)
    expected, found = set(get_peft_model_state_dict(peft_model, save_embedding_layers=False)), set(names)
    for what, wrong in (("missing", expected - found), ("unexpected", found - expected)):
        if wrong:
            raise ArtifactInvalid(f"{path}: {len(wrong)} {what} adapter keys, first {_first(wrong)}")
    strange = [name for name in expected if not name.endswith(_LORA_KEYS)]
    layers = [module for module in peft_model.modules() if isinstance(module, LoraLayer)]
    if strange or any(type(layer) is not LoraLinear or layer.lora_variant for layer in layers):
        raise ArtifactInvalid(f"{path}: expected plain LoRA on linear layers, found {min(strange, default='a variant of it')}")


def _refuse_nonfinite(model: RewardModel, artifact: Artifact) -> None:
    for name, tensor in model.named_parameters():
        if tensor.is_meta:
            raise ArtifactInvalid(f"{artifact.base_path}: {name} was not loaded")
        # the least and the largest are NaN if anything is; forty times as fast as asking every value
        if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
            raise ArtifactInvalid(f"{artifact.base_path}: {name} is not finite")


def own_memory(model: nn.Module) -> None:
    """Copy what is still a mapped file, tensor by tensor: a file that changes after its check must not change what is served."""
    mapped = MappedFiles()
    for tensor in model.parameters():
        data = tensor.data
        if mapped.hold(data.data_ptr(), data.nbytes):
            tensor.data = _copied(data)


def _copied(mapped: Tensor) -> Tensor:
    """A copy in memory of our own; the pages of the file go as soon as they are copied."""
    copy = torch.empty_like(mapped, memory_format=torch.contiguous_format)
    pieces = zip(*(torch.split(tensor.reshape(-1), _COPIED_AT_ONCE) for tensor in (copy, mapped)), strict=True)
    for target, source in pieces:
        target.copy_(source)
        forget_pages(source.data_ptr(), source.nbytes)
    return copy


def _move(model: RewardModel, place: torch.device) -> None:
    if place.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # the patch embedding is a convolution: float32 means float32
    try:
        model.to(place)
    except torch.OutOfMemoryError:
        needed = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        free, whole = torch.cuda.mem_get_info(place)
        sizes = f"{needed / 2**30:.1f} GiB of weights, {free / 2**30:.1f} of {whole / 2**30:.1f} GiB were left when it ended"
        raise ArtifactInvalid(f"device {place}: the model does not fit into its free memory ({sizes})") from None


def _reason(error: Exception) -> str:
    """What a library's error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = next((line for line in lines if "mismatch" in line and "torch.Size" in line), lines[0] if lines else "")
    return f"{type(error).__name__}: {line[:_MAX_REASON]}" if line else type(error).__name__
