"""The reward model in memory: backbone, with LoRA or trained whole, plus scalar head, loaded with every check, run on packed groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor, nn

from app import attention
from app.adapters import checked_adapter, with_adapter
from app.artifacts import Artifact, base_sha256, fingerprint
from app.bases import fitting_backbone, read_head_tensors
from app.encoding import TEXT_ONLY_FAMILIES
from app.errors import ArtifactInvalid
from app.hardware import free_bytes
from app.heads import Head, head_from, load_head
from app.machine import MappedFiles, forget_pages
from app.packing import Packed
from app.sharing import Free, SharedBases
from app.varlen import choose, installed
from app.vision import has_own_forward, layers_of

ENCODING_VERSION = "3"  # raise it whenever ids, pixels, packing, attention or pooling change
LoraUse = Literal["merged", "unmerged", "none"]
_SCORING_LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "pillow")
_COPIED_AT_ONCE = 1 << 22  # values


class RewardModel(nn.Module):
    """Backbone and head. `forward` runs packed groups, `forward_plain` one caption as the published recipe does."""

    def __init__(self, backbone: Any, head: Head) -> None:
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
        return self.head.device

    def forward(self, packed: Packed) -> Tensor:
        """Scores of the packed rows, [rows] float32. Differentiable; positions are passed, no state is kept."""
        embedded = self.backbone.get_input_embeddings()(packed.input_ids)  # [tokens, hidden]
        pictures: dict[str, Any] = {}
        if packed.pixel_values is not None:
            features, *deepstack = self._image_features(packed)
            here = packed.input_ids == self.backbone.config.image_token_id
            embedded = embedded.masked_scatter(here.unsqueeze(-1), features.to(embedded.dtype))
            if deepstack:
                pictures = {"visual_pos_masks": here.unsqueeze(0), "deepstack_visual_embeds": deepstack}
        language_model = self.backbone.language_model if self.takes_images else self.backbone
        hidden = language_model(
            inputs_embeds=embedded.unsqueeze(0),
            position_ids=packed.position_ids if self.takes_images else packed.position_ids[0],  # text has one axis
            attention_mask=None if self.takes_images else {"full_attention": None},  # of one axis of positions it would make a mask
            layout=packed.layout,
            use_cache=False,
            **pictures,
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

    def _image_features(self, packed: Packed) -> list[Tensor]:
        """Of the tower's end, then of each layer of DeepStack, every picture's features in packed order: [image tokens, hidden]."""
        found = self.backbone.get_image_features(packed.pixel_values, packed.image_grid_thw)
        return [torch.cat([pictures[slot] for slot in packed.image_slots]) for pictures in layers_of(found)]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to score, and what it is made of."""

    model: RewardModel
    fingerprint: str
    dtype: Literal["float32", "bfloat16"]
    device: str
    lora: LoraUse = "none"  # how its adapter is applied


def load_model(
    artifact: Artifact,
    *,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    lora: Literal["auto", "merged", "unmerged"] = "merged",
    switches: Mapping[str, bool] | None = None,
    leave_mapped: bool = False,
    bases: SharedBases | None = None,
    free: Free = free_bytes,
) -> LoadedModel:
    """Base, adapter if there is one, and head, every part checked against the others. Raises ArtifactInvalid naming the file at fault.

    Also raised where the weights are more than is `free` on the device, before they are read.

    `leave_mapped`: on a CPU the weights still lie in their mapped files; an engine packs most of them, which copies as well.
    `bases`: those of models that are served together; where this one's is another's as well, `auto` leaves the adapter unmerged and the
    weights are shared. `switches`: ways of computing that move the last digits of a score; those that are on are part of the fingerprint.
    """
    place = torch.device(resolve_device(device))
    number = resolve_dtype(dtype, artifact.config.dtype, place)
    head = _load_head(artifact)
    has_adapter = artifact.has_adapter
    adapter_base = checked_adapter(artifact).get("base_model_name_or_path") if has_adapter else None
    base_digest = _checked_base(artifact, adapter_base, base_sha256(artifact.base_path) if bases is None else bases.digest(artifact))
    shared = bases if bases is not None and bases.is_shared(artifact) else None
    applied: LoraUse = "none" if not has_adapter else "merged" if lora == "merged" or (lora == "auto" and not shared) else "unmerged"
    backbone = _adapted(artifact, applied, getattr(torch, number), place, shared, free)
    hidden = backbone.config.get_text_config().hidden_size
    if head.in_features != hidden:
        raise ArtifactInvalid(f"{artifact.head_path}: head takes {head.in_features} values, the base gives {hidden}")
    model = RewardModel(backbone, head).eval().requires_grad_(False)
    _refuse_nonfinite(model, artifact)
    if place.type == "cpu" and not leave_mapped:
        own_memory(model)
    _move(model, place)
    runtime = _runtime_of(model, switches or {}) | {"dtype": number, "lora": applied}
    return LoadedModel(model, fingerprint(artifact, base_digest, runtime), number, str(place), applied)


def _runtime_of(model: RewardModel, switches: Mapping[str, bool]) -> dict[str, str]:
    """What of this process can move a score, beside the number format and how the adapter is applied."""
    place = model.device.type
    runtime = {"device": place, "encoding": ENCODING_VERSION} | {name: version(name) for name in _SCORING_LIBRARIES}
    runtime |= {name: "on" for name, is_on in switches.items() if is_on}
    if place == "cuda":  # a CPU has one way of attention for each format
        runtime |= {f"attention over {what}": way for what, way in attention_ways(model).items()}
    return runtime


def _adapted(artifact: Artifact, lora: LoraUse, dtype: torch.dtype, place: torch.device, shared: SharedBases | None, free: Free) -> Any:
    """The backbone with its adapter, if any. A base that is merged into is nobody else's."""
    if shared is None or lora == "merged":
        backbone = fitting_backbone(artifact, dtype, place, free(place))
    else:
        backbone = shared.take(artifact, dtype, place, free)
    return backbone if lora == "none" else with_adapter(backbone, artifact, merge=lora == "merged")


def attention_ways(model: RewardModel) -> dict[str, str]:
    """Which kernel of the serving forward computes attention over text, and over pictures, whose heads are of another size."""
    backbone, there = model.backbone, installed(model.device.type)
    heads = {"text": (backbone.language_model if model.takes_images else backbone).layers[0].self_attn.head_dim}
    if model.takes_images and has_own_forward(backbone):
        heads["images"] = backbone.visual.blocks[0].attn.head_dim
    ways: dict[str, str] = {name: choose(model.device.type, backbone.dtype, int(head_dim), there) for name, head_dim in heads.items()}
    if model.takes_images and not has_own_forward(backbone):
        ways["images"] = f"transformers {backbone.visual.config._attn_implementation}"
    return ways


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


def _checked_base(artifact: Artifact, named: Any, found: str) -> str:
    """The SHA-256 that was found of the base, which is the one the configuration and the adapter name."""
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


def _load_head(artifact: Artifact) -> Head:
    config = artifact.config
    if not artifact.layout.head_prefix:
        return load_head(artifact.head_path, config.score_head_shape, config.head)
    where = f"{artifact.head_path}: {artifact.layout.head_prefix}*"
    return head_from(read_head_tensors(artifact), config.head, config.score_head_shape, where)


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
        torch.backends.cuda.matmul.allow_tf32 = False
    try:
        model.to(place)
    except torch.OutOfMemoryError:
        needed = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        free, whole = torch.cuda.mem_get_info(place)
        sizes = f"{needed / 2**30:.1f} GiB of weights, {free / 2**30:.1f} of {whole / 2**30:.1f} GiB were left when it ended"
        raise ArtifactInvalid(f"device {place}: the model does not fit into its free memory ({sizes})") from None
