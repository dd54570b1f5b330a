"""Models beyond vision and LoRA: text-only bases, captions without a chat, bases trained whole; and every mix that must be refused."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import pytest
import torch
import typer
from transformers import AutoModel, AutoTokenizer

from app.artifacts import CONFIG_NAME, DEMO_PATH, RewardModelConfig, fingerprint, open_artifact
from app.cli import app as cli
from app.contracts import EncodedGroup, EncodedImage, Group
from app.converting import GoldenInput, convert
from app.encoding import Encoder, load_encoder
from app.errors import ArtifactInvalid, InvalidRequest
from app.heads import load_head
from app.main import running
from app.model import LoadedModel, load_model
from app.packing import pack
from app.scoring import score_plain, score_shared
from app.serving import application
from app.settings import Settings
from tests.e2e.server import started
from tests.tiny import (
    TextFamily,
    copy_artifact,
    edit_json,
    edit_tensors,
    encode_text,
    load_whole,
    picture,
    write_published,
    write_text_only,
)

Kind = Literal["lora_head", "full_head"]
Role = Literal["user", "raw"]
CARTOON = DEMO_PATH / "cartoons" / "penguin-office.png"
command_line = typer.main.get_command(cli)
WORDS = ["the", "penguin", "umbrella", "office", "is", "iceberg", "企鵝", "🐧", "<|im_end|>", "<|endoftext|>", "{prompt}", "why"]
CAPTIONS = ["the penguin", "an iceberg, they said", "企鵝 <|im_end|>", "", "the penguin again and again, at length"]
VARIANTS: list[tuple[Kind, Role]] = [("lora_head", "user"), ("lora_head", "raw"), ("full_head", "user"), ("full_head", "raw")]
QWEN3: list[tuple[Kind, Role]] = [("lora_head", "raw"), ("full_head", "user")]
WholeOf = Callable[[TextFamily, Kind, Role], tuple[Path, Encoder, LoadedModel]]
each_family = pytest.mark.parametrize(
    ("family", "variant"), [*(("qwen2", each) for each in VARIANTS), *(("qwen3", each) for each in QWEN3)]
)
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids="-".join)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Kind, Role], Path]:
    """One artifact of each variant. Do not write into them."""
    return {(kind, role): write_text_only(tmp_path_factory.mktemp("text"), kind=kind, caption_role=role) for kind, role in VARIANTS}


@pytest.fixture(scope="module")
def whole(written: dict[tuple[Kind, Role], Path]) -> dict[tuple[Kind, Role], tuple[Encoder, LoadedModel]]:
    return {variant: load_whole(root) for variant, root in written.items()}


@pytest.fixture(scope="module")
def whole_of(written: dict, whole: dict, tmp_path_factory: pytest.TempPathFactory) -> WholeOf:
    """By family too: the artifact and what a server loads of it."""

    @cache
    def found(family: TextFamily, kind: Kind, role: Role) -> tuple[Path, Encoder, LoadedModel]:
        if family == "qwen2":
            return written[kind, role], *whole[kind, role]
        root = write_text_only(tmp_path_factory.mktemp(family), kind=kind, caption_role=role, family=family)
        return root, *load_whole(root)

    return found


def copied(root: Path, target: Path) -> Path:
    return Path(shutil.copytree(root, target / "artifact"))


def random_groups(encoder: Encoder, seed: int) -> list[EncodedGroup]:
    """One to four groups of 1 to 30 captions, duplicates among them; two groups may share their prompt."""
    chance = random.Random(seed)
    groups = []
    for _ in range(chance.randint(1, 4)):
        captions = [" ".join(chance.choices(WORDS, k=chance.randint(0, 6))) for _ in range(chance.choice([1, 2, 8, 30]))]
        groups.append(encode_text(encoder, captions, chance.choice([None, "Be kind.", "Scene: an office.\nTwist: a penguin.\n\n"])))
    return groups


def values(scores: list[Any]) -> np.ndarray:
    return np.concatenate([each.values for each in scores])


@each_family
@pytest.mark.parametrize("seed", range(5))
def test_shared_equals_plain(whole_of: WholeOf, family: TextFamily, variant: tuple[Kind, Role], seed: int) -> None:
    _, encoder, loaded = whole_of(family, *variant)
    groups = random_groups(encoder, seed)
    found, expected = values(score_shared(loaded.model, groups)), values(score_plain(loaded.model, groups))
    assert np.abs(found - expected).max() <= 1e-5 * expected.std() + 1e-5
    assert len(expected) < 3 or expected.std() > 1e-2


@each_family
def test_scores_are_those_of_plain_transformers(whole_of: WholeOf, family: TextFamily, variant: tuple[Kind, Role]) -> None:
    """transformers and peft alone: chat template or bare text, the last hidden state, the head."""
    root, encoder, loaded = whole_of(family, *variant)
    tokenizer = AutoTokenizer.from_pretrained(root / "processor")
    backbone = AutoModel.from_pretrained(root / "base", dtype=torch.float32)
    if variant[0] == "lora_head":
        backbone.load_adapter(str(root / "backbone_adapter"))
    head = load_head(root / "reward_head.safetensors", (1, 64))
    captions, expected = [text for text in CAPTIONS if "<|" not in text], []
    for caption in captions:
        text = encoder.config.template.replace("{prompt}", "Be kind. ").replace("{caption}", caption)
        if variant[1] == "user":
            text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
        with torch.inference_mode():
            expected.append(head(backbone(**tokenizer(text, return_tensors="pt")).last_hidden_state[:, -1]).item())
    group = encode_text(encoder, captions, "Be kind. ")
    for score in (score_shared, score_plain):
        assert values(score(loaded.model, [group])) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("family", "role"), [("qwen2", "raw"), ("qwen3", "user")])
def test_gradients_of_packed_and_plain_are_equal(whole_of: WholeOf, family: TextFamily, role: Role) -> None:
    """Every weight of a base that is trained whole."""
    root, encoder, _ = whole_of(family, "full_head", role)
    model = load_model(open_artifact(str(root))).model.requires_grad_(True)
    group = encode_text(encoder, CAPTIONS, "Be kind. ")
    packed = pack([group], image_token_id=model.image_token_id, merge_size=model.merge_size, device=model.device)
    plain = torch.cat([model.forward_plain(torch.from_numpy(row)[None], None, None) for row in group.rows])
    weights = torch.linspace(1, 2, len(CAPTIONS))
    found = gradients(model, (model(packed)[list(packed.rows_of[0])] * weights).sum())
    for name, expected in gradients(model, (plain * weights).sum()).items():
        assert float((found[name] - expected).abs().max()) <= 1e-4 * float(expected.abs().max()) + 1e-6, name


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


# Encoding


def test_a_raw_row_is_the_tokenised_template(written: dict, whole: dict) -> None:
    encoder, _ = whole["full_head", "raw"]
    tokenizer = AutoTokenizer.from_pretrained(written["full_head", "raw"] / "processor")
    assert tokenizer.chat_template is None
    prompt, captions = "\n\nHuman: Why an iceberg?\n\nAssistant:", [" Nobody told the penguin.", " 企鵝", ""]
    group = encode_text(encoder, captions, prompt)
    assert [row.tolist() for row in group.rows] == [tokenizer(prompt + caption)["input_ids"] for caption in captions]
    assert encoder.explain([group]).chats == [prompt + caption for caption in captions]
    assert encoder.explain([group]).image_grid is None


def test_special_tokens_at_the_ends_of_a_raw_template_are_special_and_in_captions_text(tmp_path: Path) -> None:
    encoder = load_encoder(open_artifact(str(write_text_only(tmp_path, caption_role="raw", template="{prompt}{caption}<|endoftext|>"))))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "artifact/processor")
    group = encode_text(encoder, ["why", "<|endoftext|>", ""], "")
    assert group.rows[0].tolist() == tokenizer("why<|endoftext|>")["input_ids"]
    assert [int((row == tokenizer.pad_token_id).sum()) for row in group.rows] == [1, 1, 1]
    assert len(group.rows[2]) == 1
    assert group.num_prefix == 0


def test_an_empty_text_is_refused_alone(whole: dict) -> None:
    encoder, loaded = whole["lora_head", "raw"]
    group, errors = encoder.encode(Group(("", "why", ""), ""))
    assert [error and (error.code, error.index) for error in errors] == [("empty_text", 0), None, ("empty_text", 2)]
    assert group is not None
    assert (len(group.rows), group.num_prefix) == (1, 0)
    other = encode_text(encoder, ["why", "the penguin"], "")
    assert values(score_shared(loaded.model, [group, other])) == pytest.approx(values(score_plain(loaded.model, [group, other])), abs=1e-5)
    assert encoder.encode(Group(("",), ""))[0] is None
    assert encode_text(whole["lora_head", "user"][0], [""], "").rows


@each_variant
def test_max_tokens_is_an_upper_bound(whole: dict, variant: tuple[Kind, Role]) -> None:
    encoder, _ = whole[variant]
    for prompt, caption in itertools.product((None, "Be kind.", "🐧" * 99), ("a", "企鵝 <|im_end|>", "the penguin at length")):
        group = encode_text(encoder, [caption, "b"], prompt)
        assert group.num_tokens <= encoder.max_tokens(0, prompt, [caption, "b"])


def test_a_picture_cannot_be_packed_for_a_text_only_model(whole: dict) -> None:
    encoder, loaded = whole["lora_head", "user"]
    group = encode_text(encoder, ["a"])
    image = EncodedImage("x", np.zeros((4, 2), np.float32), (1, 2, 2), 1)
    with pytest.raises(ValueError, match="shared prefix"):
        score_shared(loaded.model, [EncodedGroup(group.key, image, group.rows, group.num_prefix)])


# Artifacts


def test_every_file_of_a_trained_base_is_hashed(written: dict) -> None:
    full, adapter = (open_artifact(str(written[kind, "user"])).config.files for kind in ("full_head", "lora_head"))
    assert {"base/config.json", "base/model.safetensors"} <= set(full)
    assert not any(name.startswith("base/") for name in adapter)
    assert not any(name.startswith("backbone_adapter/") for name in full)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def config(**changes: object) -> Callable[[Path], object]:
    return lambda root: edit_json(root / CONFIG_NAME, **changes)


def steal_adapter(root: Path) -> None:
    write_published(root.parent / "other")
    shutil.copytree(root.parent / "other/artifact/backbone_adapter", root / "backbone_adapter")


REFUSED: dict[str, tuple[Kind, Role, Callable[[Path], object], str]] = {
    "a tampered weight of a trained base": (
        "full_head",
        "user",
        lambda root: flip(root / "base/model.safetensors"),
        r"base/model\.safetensors: expected sha256 [0-9a-f]{64}, found [0-9a-f]{64}",
    ),
    "a missing shard of a trained base": (
        "full_head",
        "user",
        lambda root: (root / "base/model.safetensors").rename(root / "base/other.safetensors"),
        r"base/model\.safetensors: missing, expected sha256",
    ),
    "a file too many in a trained base": (
        "full_head",
        "user",
        lambda root: (root / "base/extra.safetensors").write_bytes(b"x"),
        r"base/extra\.safetensors: not in the list of files",
    ),
    "an adapter beside a trained base": (
        "full_head",
        "user",
        steal_adapter,
        "backbone_adapter: expected no adapter in a full_head artifact",
    ),
    "a trained base on the Hub": (
        "full_head",
        "user",
        config(base_model_name="Qwen/Qwen2.5-7B"),
        rf"{CONFIG_NAME}: kind: full_head keeps its weights in the artifact; expected base_model_name './folder', not 'Qwen/Qwen2.5-7B'",
    ),
    "a trained base outside": ("full_head", "user", config(base_model_name="./../base"), "expected base_model_name './folder'"),
    "an adapter that is missing": (
        "full_head",
        "user",
        config(kind="lora_head"),
        r"backbone_adapter/adapter_config\.json: missing",
    ),
    "another kind": ("full_head", "user", config(kind="head"), "kind: .*found 'head'"),
    "another role": ("full_head", "user", config(caption_role="tool"), "caption_role: .*found 'tool'"),
    "a chat model without a chat template": (
        "lora_head",
        "user",
        lambda root: ((root / "processor/chat_template.jinja").unlink(), config(files={})(root)),
        "processor: no chat template",
    ),
    "a tokenizer of another base": (
        "lora_head",
        "raw",
        lambda root: edit_json(root / "base/config.json", vocab_size=300),
        "processor: tokenizer of another base: expected at most 300 tokens, found 420",
    ),
    "a NaN in a trained base": (
        "full_head",
        "raw",
        lambda root: (edit_tensors(root / "base/model.safetensors", spoil), config(files={})(root)),
        "base: .* is not finite",
    ),
    "a weight missing from a trained base": (
        "full_head",
        "raw",
        lambda root: (
            edit_tensors(root / "base/model.safetensors", lambda tensors: tensors.pop("model.norm.weight")),
            config(files={})(root),
        ),
        "base: 1 missing keys in the base weights, first norm.weight",
    ),
    "experts": (
        "lora_head",
        "user",
        lambda root: edit_json(root / "base/config.json", model_type="qwen3_moe"),
        r"base/config\.json: expected one of \(.*'qwen3'\), found 'qwen3_moe'",
    ),
    "sliding windows": (
        "lora_head",
        "user",
        lambda root: edit_json(root / "base/config.json", layer_types=["sliding_attention"] * 2),
        r"base/config\.json: expected full attention in every layer",
    ),
}


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")


@pytest.mark.parametrize("fault", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(written: dict, tmp_path: Path, fault: str) -> None:
    kind, role, damage, message = REFUSED[fault]
    root = copied(written[kind, role], tmp_path)
    damage(root)
    with pytest.raises(ArtifactInvalid, match=message) as refusal:
        load_whole(root)
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_another_base_cannot_take_the_place_of_a_trained_one(written: dict) -> None:
    root, other = written["full_head", "user"], written["lora_head", "user"] / "base"
    with pytest.raises(ArtifactInvalid, match=rf"{CONFIG_NAME}: a full_head artifact carries its trained base; .* found {other}"):
        open_artifact(str(root), base_model=str(other))


def test_raw_captions_of_a_vision_base_are_refused(published: Path, tmp_path: Path) -> None:
    root = copy_artifact(published, tmp_path)
    edit_json(root / CONFIG_NAME, caption_role="raw")
    with pytest.raises(ArtifactInvalid, match=r"base/config\.json: caption_role raw expects a text-only base, found qwen2_5_vl"):
        load_encoder(open_artifact(str(root)))


def test_a_vision_base_may_be_trained_whole(published: Path, tmp_path: Path) -> None:
    """The scores are those of the base alone; nothing of an adapter is looked for."""
    root = copy_artifact(published, tmp_path)
    shutil.rmtree(root / "backbone_adapter")
    shutil.move(tmp_path / "base", root / "base")
    edit_json(root / CONFIG_NAME, kind="full_head", base_model_name="./base")
    encoder, loaded = load_whole(root)
    assert encoder.takes_images
    assert loaded.model.takes_images
    assert not any("lora" in name for name, _ in loaded.model.named_parameters())


def test_the_fingerprint_covers_kind_role_and_base_but_not_its_folder(written: dict, tmp_path: Path) -> None:
    root = copied(written["full_head", "user"], tmp_path)
    edit_json(root / CONFIG_NAME, files={})
    before, recipe = load_model(open_artifact(str(root))).fingerprint, json.loads((root / CONFIG_NAME).read_bytes())
    assert load_model(open_artifact(str(root)), lora="unmerged").fingerprint == before  # there is nothing to merge
    (root / "base").rename(root / "trained")
    edit_json(root / CONFIG_NAME, base_model_name="./trained")
    opened = open_artifact(str(root))
    assert load_model(opened).fingerprint == before
    for change in ({"kind": "lora_head"}, {"caption_role": "raw"}):
        other = RewardModelConfig.model_validate_json(json.dumps(recipe | change))
        changed = type(opened)(opened.root, other, opened.base_path, ())
        assert fingerprint(changed, "base", {}) != fingerprint(opened, "base", {})
    assert fingerprint(opened, "base", {}) != fingerprint(opened, "other", {})


# The whole way


@pytest.mark.anyio
@each_variant
async def test_the_server(written: dict, whole: dict, variant: tuple[Kind, Role]) -> None:
    """Probe at start, then every route a client uses; an image is refused wherever it comes."""
    encoder, loaded = whole[variant]
    (expected,) = score_plain(loaded.model, [encode_text(encoder, CAPTIONS, "Be kind. ")])
    async with running(Settings(model=str(written[variant]), offline=True)) as runtime:
        transport = httpx.ASGITransport(application(runtime))
        async with httpx.AsyncClient(transport=transport, base_url="http://punchline") as client:
            scored = (await client.post("/score", json={"prompt": "Be kind. ", "captions": CAPTIONS, "explain": True})).json()
            assert scored["scores"] == pytest.approx(expected.values, abs=1e-5)
            assert (scored["image_id"], scored["explain"]["image_tokens"]) == (None, 0)
            await check_routes(client, scored["scores"])
            await check_refusals(client)
            model = (await client.get("/info")).json()["model"]
            assert (model["kind"], model["caption_role"], model["fingerprint"]) == (*variant, loaded.fingerprint)


async def check_routes(client: httpx.AsyncClient, scores: list[float]) -> None:
    a, b = CAPTIONS[:2]
    compared = (await client.post("/compare", json={"prompt": "Be kind. ", "a": a, "b": b})).json()
    assert compared["margin"] == pytest.approx(scores[0] - scores[1], abs=1e-5)
    ranked = await client.post("/rank", files=[("prompt", (None, b"Be kind. ")), *(("caption", (None, text.encode())) for text in (a, b))])
    assert ranked.json()["ranking"][0]["score"] == pytest.approx(max(scores[:2]), abs=1e-5)
    tested = (await client.post("/selftest")).json()
    assert (tested["passed"], tested["kind"], tested["num_scores"]) == (True, "probe", 3)
    assert (await client.get("/readyz")).status_code == 200


async def check_refusals(client: httpx.AsyncClient) -> None:
    sent = [
        await client.post("/score", files=[("image", ("a.png", picture(40, 40))), ("caption", (None, b"x"))]),
        await client.post("/score", json={"image": "sha256:" + "0" * 64, "captions": ["x"]}),
        await client.put("/images", content=picture(40, 40)),
    ]
    for answer in sent:
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["field"]) == (422, "invalid_request", "image")
        assert error["message"] == "this model takes no image"


def test_the_command_line(written: dict, whole: dict, capfd: pytest.CaptureFixture[str]) -> None:
    """`-` stands for no picture; a picture is one line of refusal."""
    encoder, loaded = whole["full_head", "raw"]
    (expected,) = score_plain(loaded.model, [encode_text(encoder, CAPTIONS[:2])])
    chosen = ["--model", str(written["full_head", "raw"]), "--json"]
    command_line(["score", "-", *CAPTIONS[:2], *chosen], standalone_mode=False)
    assert json.loads(capfd.readouterr().out)["scores"] == pytest.approx(expected.values, abs=1e-5)
    command_line(["compare", "-", *CAPTIONS[:2], *chosen], standalone_mode=False)
    assert json.loads(capfd.readouterr().out)["margin"] == pytest.approx(expected.values[0] - expected.values[1], abs=1e-5)
    with pytest.raises(InvalidRequest, match="this model takes no image"):
        command_line(["score", str(CARTOON), "x", *chosen], standalone_mode=False)
    with started("--model", str(written["full_head", "raw"])) as server:
        command_line(["score", "-", *CAPTIONS[:2], "--url", server.url, "--json"], standalone_mode=False)
    assert json.loads(capfd.readouterr().out)["scores"] == pytest.approx(expected.values, abs=1e-5)
    with pytest.raises(typer.BadParameter, match="does not exist"):
        command_line(["score", "nowhere.png", "x", *chosen], standalone_mode=False)


@pytest.mark.anyio
@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[3]], ids="-".join)
async def test_golden_items_without_pictures(written: dict, tmp_path: Path, variant: tuple[Kind, Role]) -> None:
    inputs = [GoldenInput(None, tuple(CAPTIONS), "Be kind. ")] if variant[1] == "user" else []  # else the package's own
    target = convert(str(written[variant]), tmp_path / "full", base_model=None, inputs=inputs, offline=True, progress=lambda step: None)
    opened = open_artifact(str(target))
    golden = opened.golden()
    assert golden is not None
    assert {item.image for item in golden.items} == {None}
    assert opened.assumed == ()
    assert not (target / "golden").exists()
    async with running(Settings(model=str(target), offline=True)) as runtime:
        report = await runtime.first.selftest.run()
    assert (report.passed, report.kind, report.num_scores) == (True, "golden", sum(len(item.captions) for item in golden.items))


@pytest.mark.parametrize("image", [True, False])
def test_golden_items_of_the_other_sort_are_refused(published: Path, written: dict, tmp_path: Path, image: bool) -> None:
    (tmp_path / "a.png").write_bytes(picture(40, 40))
    source = written["lora_head", "user"] if image else published
    given = [GoldenInput(tmp_path / "a.png" if image else None, ("a",))]
    message = r"a\.png: this model takes no image" if image else "golden item 0: this model needs an image"
    with pytest.raises(ArtifactInvalid, match=message):
        convert(str(source), tmp_path / "full", base_model=None, inputs=given, offline=True, progress=lambda step: None)
    assert not (tmp_path / "full").exists()
