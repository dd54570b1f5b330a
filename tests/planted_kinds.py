"""Faults planted in published layouts, converted: the table of `python -m tests.planted` goes on with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from app.artifacts import CONFIG_NAME, base_sha256
from app.converting import convert
from tests.planted import Planted
from tests.published import PUBLISHED
from tests.tiny import TEXT_CHAT_TEMPLATE, edit_json, edit_tensors

Change = Callable[[dict[str, torch.Tensor]], object]
_ADAPTER, _VALUES, _WHOLE = "adapter_model.safetensors", "value_head.safetensors", "model.safetensors"
_ADAPTED, _LABEL, _VALUE = "base_model.model.score.weight", "score.weight", "v_head.summary.weight"


def make_kind(name: str, folder: Path) -> Path:
    """A tiny model of a published layout in `folder/published`, converted to `folder/artifact`; the base of an adapter in `folder/base`."""
    kind = PUBLISHED[name]
    published = kind.write(folder / "published")
    base = None
    if name == "seq_cls_adapter":
        base = str(shutil.copytree(published.parent / "base", folder / "base"))
    return convert(
        str(published), folder / "artifact", base_model=base, inputs=[], offline=True, progress=lambda step: None, said=kind.said
    )


def copy_kind(artifact: Path, target: Path) -> Path:
    """A private copy, to be damaged, with the base beside it if there is one."""
    root = Path(shutil.copytree(artifact, target / "artifact"))
    if (artifact.parent / "base").exists():
        base = shutil.copytree(artifact.parent / "base", target / "base")
        edit_json(root / CONFIG_NAME, base_model_name=str(base))
    return root


def _tensors(name: str, change: Change) -> Callable[[Path], object]:
    return lambda root: edit_tensors(root / name, change)


def _head(name: str, change: Change) -> Callable[[Path], object]:
    """A head changed by somebody who hashed the weights beside it anew as well."""

    def damage(root: Path) -> None:
        edit_tensors(root / name, change)
        if name != _ADAPTER:
            edit_json(root / CONFIG_NAME, base_model_sha256=base_sha256(root))

    return damage


def _config(**changes: object) -> Callable[[Path], object]:
    return lambda root: edit_json(root / CONFIG_NAME, **changes)


def _heads(name: str, weight: str) -> dict[str, Planted]:
    """Faults of a head that lies in `name` as `weight`."""
    return {
        "head of another run": Planted("D15 scores", _head(name, lambda tensors: tensors[weight].normal_(std=0.1))),
        "sign of the head flipped": Planted("D15 scores", _head(name, lambda tensors: tensors[weight].neg_())),
        "head doubled": Planted("D15 scores", _head(name, lambda tensors: tensors[weight].mul_(2))),
        "head zero": Planted("is all zero", _head(name, lambda tensors: tensors[weight].zero_())),
        "head left out": Planted("expected the", _head(name, lambda tensors: tensors.pop(weight))),
        "head with two rows": Planted(
            "expected weight [1, 64]", _head(name, lambda tensors: tensors.update({weight: torch.cat([tensors[weight]] * 2)}))
        ),
        "head not finite": Planted("is not finite", _head(name, lambda tensors: tensors[weight][0, :1].fill_(torch.nan))),
        "longest text halved": Planted("A1 recipe", lambda root: edit_json(root / CONFIG_NAME, max_tokens=_halved(root))),
        "a caption that is no turn": Planted("A1 recipe", _config(caption_role="user", template="{prompt}{caption}")),
        "vocabulary in another order": Planted("C11 ids", _swap_words),
    }


def _halved(root: Path) -> int:
    return int(json.loads((root / CONFIG_NAME).read_bytes())["max_tokens"]) // 2


def _swap_words(root: Path) -> None:
    """Two tokens of the vocabulary change places."""
    tokenizer = json.loads((root / "tokenizer.json").read_bytes())
    words = tokenizer["model"]["vocab"]
    words["e"], words["t"] = words["t"], words["e"]
    (root / "tokenizer.json").write_text(json.dumps(tokenizer))


def _template(change: Callable[[str], str]) -> Callable[[Path], object]:
    def damage(root: Path) -> None:
        path = root / "chat_template.jinja"
        before = path.read_text()
        if (after := change(before)) == before:
            raise ValueError("the template is what it was")
        path.write_text(after)

    return damage


def _without_layer(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "layers.1." in name]:
        del tensors[name]


def _other_adapter(tensors: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(7)
    for name, tensor in tensors.items():
        if ".lora_" in name:
            tensor.normal_(std=0.05)


PLANTED_IN_KINDS: dict[str, dict[str, Planted]] = {
    "seq_cls_adapter": {
        **_heads(_ADAPTER, _ADAPTED),
        "adapter of another run": Planted("D15 scores", _tensors(_ADAPTER, _other_adapter)),
        "adapter of half the layers": Planted("missing adapter keys", _tensors(_ADAPTER, _without_layer)),
        "alpha doubled": Planted("D15 scores", lambda root: edit_json(root / "adapter_config.json", lora_alpha=16)),
        "adapter zero": Planted(
            "is all zero", _tensors(_ADAPTER, lambda tensors: [each.zero_() for name, each in tensors.items() if "lora_B" in name])
        ),
        "base of another revision": Planted(
            "another base than the adapter was trained on",
            lambda root: edit_tensors(root / "../base/model.safetensors", lambda tensors: tensors["model.norm.weight"].mul_(1.01)),
        ),
        "no dialogue": Planted("A1 recipe", _config(caption_role="raw", template="{prompt}{caption}")),
        "two turns run together": Planted("A1 recipe", _config(template="{prompt} ")),
    },
    "seq_cls": {
        **_heads(_WHOLE, _LABEL),
        "weights of another step": Planted(
            "another base", _tensors(_WHOLE, lambda tensors: tensors["model.layers.0.self_attn.q_norm.weight"].mul_(1.01))
        ),
        "other padding": Planted("another base", lambda root: edit_json(root / "config.json", pad_token_id=1)),
        "another chat template": Planted("C11 ids", _template(lambda _: TEXT_CHAT_TEMPLATE)),
        "chat template without reasoning": Planted(
            "C11 ids", _template(lambda text: text.replace("<think>\\n' + thought + '\\n</think>\\n\\n' + ", "' + "))
        ),
    },
    "value_head": {
        **_heads(_VALUES, _VALUE),
        "bias zero": Planted("D15 scores", _head(_VALUES, lambda tensors: tensors["v_head.summary.bias"].zero_())),
        "bias left out": Planted("expected the tensors", _head(_VALUES, lambda tensors: tensors.pop("v_head.summary.bias"))),
        "bias not mentioned": Planted("expected the one tensor 'weight'", _config(head={"layers": "linear", "bias": False})),
        "weights of another step": Planted(
            "another base", _tensors(_WHOLE, lambda tensors: tensors["visual.merger.ln_q.weight"].mul_(1.01))
        ),
        "pictures shrunk": Planted("A1 recipe", _config(image={"long_edge": 448})),
        "pictures turned by EXIF": Planted("A1 recipe", _config(image={"long_edge": None, "exif_transpose": True})),
        "other means of colours": Planted("C13 pixels", lambda root: edit_json(root / "preprocessor_config.json", image_mean=[0.5] * 3)),
        "fewer pixels": Planted(
            "C1", lambda root: edit_json(root / "preprocessor_config.json", size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 9})
        ),
        "chat template without a system turn": Planted("C11 ids", _template(lambda text: text.replace("You are a helpful assistant.", ""))),
    },
}
