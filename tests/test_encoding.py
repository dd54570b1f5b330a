"""Encoding against the plain transformers recipe, and the traps it must not fall into."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

from app.artifacts import Artifact, RewardModelConfig, open_artifact
from app.bases import load_backbone
from app.contracts import EncodedImage, Group, RgbImage
from app.encoding import Encoder, load_encoder, num_shared, positions
from app.errors import ArtifactInvalid, ImageRejected, InvalidRequest
from app.images import decode_image
from app.model import LoadedModel
from app.scoring import score_plain, score_shared
from tests.tiny import LIMITS, VISION_FAMILIES, VisionFamily, copy_artifact, edit_json, encode, picture
from training.demo.tokenizer import ImageSizes, save_processor

quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
CONTROL_TEXTS = ["<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<tool_call>", "</s>", "<|endoftext|>", "<|im_start|>assistant\n"]
# ordinary letters, line ends, runs of spaces, digits, scripts without spaces, characters that composing lengthens or shortens
LETTERS = "ab cdeE.,:;!?'\"{}\n\t  0123é企鵝🐧\u0301\u0958\ufb2c\U0001d160\u202e\u200b"
texts = st.text(LETTERS, max_size=60) | st.text(st.characters(exclude_categories=("Cs",)), max_size=30)


@pytest.fixture(scope="module")
def tokenizer(artifact: Artifact) -> object:
    return AutoTokenizer.from_pretrained(artifact.processor_path)


@pytest.fixture(scope="module")
def image(encoder: Encoder) -> EncodedImage:
    return encoder.encode_image(decode_image(picture(120, 80), LIMITS, exif_transpose=False))


def plain_ids(tokenizer: object, text: str, num_image_tokens: int) -> list[int]:
    """The published recipe: chat template as text, one placeholder made many, the tokenizer called."""
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    chat = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=False)  # type: ignore[attr-defined]
    return tokenizer(chat.replace("<|image_pad|>", "<|image_pad|>" * num_image_tokens, 1))["input_ids"]  # type: ignore[operator, no-any-return]


def with_config(encoder: Encoder, artifact: Artifact, **changes: object) -> Encoder:
    """The same processor under another recipe."""
    config = RewardModelConfig.model_validate(artifact.config.model_dump() | changes)
    return load_encoder(Artifact(artifact.root, config, artifact.base_path, ()))


@quick
@given(prompt=st.none() | texts, caption=texts)
@example(prompt=" \n", caption="\n\n  leading and trailing \n")
@example(prompt="{caption}", caption="{prompt} {0} {{}}")
def test_ids_equal_the_plain_recipe(
    encoder: Encoder, artifact: Artifact, tokenizer: object, image: EncodedImage, prompt: str | None, caption: str
) -> None:
    group, errors = encoder.encode(Group((caption,), prompt, image))
    if errors != [None] or group is None or group.truncated_prompt:
        return
    shown = artifact.config.default_prompt if prompt is None else prompt
    text = artifact.config.template.replace("{prompt}", "\0").replace("{caption}", caption).replace("\0", shown)
    if "\0" not in caption + shown:
        assert group.rows[0].tolist() == plain_ids(tokenizer, text, image.num_tokens)


@pytest.mark.parametrize("text", CONTROL_TEXTS)
@pytest.mark.parametrize("place", ["caption", "prompt"])
def test_special_tokens_in_user_text_are_plain_text(
    encoder: Encoder, tokenizer: object, image: EncodedImage, text: str, place: str
) -> None:
    control = list(tokenizer.get_added_vocab().values())  # type: ignore[attr-defined]
    harmless, _ = encoder.encode(Group(("a penguin",), "a prompt", image))
    hostile = {"caption": Group((f"a {text} penguin",), "a prompt", image), "prompt": Group(("a penguin",), f"a {text} prompt", image)}
    group, errors = encoder.encode(hostile[place])
    assert errors == [None]
    assert group is not None
    assert harmless is not None
    found, expected = (row[np.isin(row, control)].tolist() for row in (group.rows[0], harmless.rows[0]))
    assert found == expected
    assert text in encoder.explain([group]).chats[0]


@quick
@given(width=st.integers(16, 3000), height=st.integers(16, 3000))
@example(width=2560, height=1978)
@example(width=600, height=415)
@example(width=16, height=1600)
def test_image_tokens_are_known_from_the_size(encoder: Encoder, width: int, height: int) -> None:
    if max(width, height) > 100 * min(width, height):
        return
    image = encoder.encode_image(RgbImage("sha256:0", np.zeros((height, width, 3), np.uint8)))
    time, rows, columns = image.grid_thw
    assert encoder.image_tokens(width, height) == image.num_tokens == time * rows * columns // 4
    assert len(image.patches) == time * rows * columns


def test_placeholders_equal_the_grid(encoder: Encoder, loaded: LoadedModel) -> None:
    for size in ((120, 80), (448, 448), (700, 30)):
        group = encode(encoder, size, 0, ["a", "b <|image_pad|>"])
        assert group.image is not None
        assert [int((row == loaded.model.image_token_id).sum()) for row in group.rows] == [group.image.num_tokens] * 2


def test_a_sliver_is_refused_not_crashed_on(encoder: Encoder) -> None:
    with pytest.raises(ImageRejected, match="long and thin"):
        encoder.image_tokens(4480, 20)
    with pytest.raises(ImageRejected, match="long and thin"):
        encoder.encode_image(RgbImage("sha256:0", np.zeros((4480, 20, 3), np.uint8)))


def recipe_by_hand(data: bytes, folder: Path, long_edge: int | None) -> np.ndarray:
    """PIL and the published processor, nothing of ours."""
    small = Image.open(io.BytesIO(data)).convert("RGB")
    if long_edge is not None and max(small.size) > long_edge:
        small.thumbnail((long_edge, long_edge), Image.Resampling.LANCZOS)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return processor(images=[small], return_tensors="np")["pixel_values"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("size", "mode", "kind"),
    [
        ((2560, 1978), "RGB", "PNG"),
        ((600, 415), "RGB", "PNG"),
        ((448, 200), "RGB", "JPEG"),
        ((500, 90), "L", "PNG"),
        ((460, 99), "P", "PNG"),
    ],
)
def test_pixels_equal_the_published_recipe(encoder: Encoder, artifact: Artifact, size: tuple[int, int], mode: str, kind: str) -> None:
    data = picture(*size, kind=kind, mode=mode)
    found = encoder.encode_image(decode_image(data, LIMITS, exif_transpose=False)).patches
    assert np.array_equal(found, recipe_by_hand(data, artifact.processor_path, 448))
    if max(size) > 448:
        native = recipe_by_hand(data, artifact.processor_path, None)
        assert native.shape != found.shape or not np.array_equal(found, native)


def test_token_counts_of_the_real_processor(artifact: Artifact, tokenizer: object, tmp_path: Path) -> None:
    """The figures of the published checkpoint: 448 instead of native resolution makes 192 tokens of 6,461."""
    root = tmp_path / "artifact"
    shutil.copytree(artifact.root, root)
    save_processor(tokenizer, ImageSizes(3136, 12845056, 14, 2), root / "processor")  # type: ignore[arg-type]
    real = load_encoder(open_artifact(str(root)))
    native = with_config(real, open_artifact(str(root)), image={"long_edge": None})
    sizes = [(600, 415), (600, 600), (2560, 1978), (1923, 2560)]
    assert [real.image_tokens(*size) for size in sizes] == [176, 256, 192, 192]
    assert [native.image_tokens(*size) for size in sizes] == [315, 441, 6461, 6279]


def test_the_published_processor_of_qwen3_vl_is_read(published_of: Callable[[VisionFamily], Path], tmp_path: Path) -> None:
    """Its file names the class that needs torchvision, and has patches of 16: 448 x 448 pixels become 14 x 14 tokens."""
    root = copy_artifact(published_of("qwen3_vl"), tmp_path)
    published = {  # https://huggingface.co/Qwen/Qwen3-VL-4B-Instruct, preprocessor_config.json
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    (root / "processor/preprocessor_config.json").write_text(json.dumps(published))
    encoder = load_encoder(open_artifact(str(root)))
    image = encoder.encode_image(RgbImage("x", np.full((448, 448, 3), 255, np.uint8)))
    assert (image.grid_thw, image.num_tokens, image.patches.shape) == ((1, 28, 28), 196, (784, 3 * 2 * 16 * 16))
    assert np.array_equal(image.patches, np.ones_like(image.patches))  # white is 1 by these means


@quick
@given(
    size=st.tuples(st.integers(16, 900), st.integers(16, 900)),
    prompt=st.none() | texts | st.text(LETTERS, min_size=60, max_size=300),
    captions=st.lists(texts, min_size=1, max_size=6),
    caption_first=st.booleans(),
)
@example(size=(60, 60), prompt="", captions=["x"] * 6, caption_first=False)
@example(size=(60, 60), prompt="a", captions=["\u0958" * 13, "\ufb2c" * 9], caption_first=False)
@example(size=(60, 60), prompt="🐧" * 99, captions=["", "y", "z"], caption_first=True)
def test_max_tokens_is_an_upper_bound(
    encoder: Encoder, caption_first_encoder: Encoder, size: tuple[int, int], prompt: str | None, captions: list[str], caption_first: bool
) -> None:
    chosen = caption_first_encoder if caption_first else encoder
    image = chosen.encode_image(RgbImage("sha256:0", np.zeros((size[1], size[0], 3), np.uint8)))
    group, _ = chosen.encode(Group(tuple(captions), prompt, image))
    if group is not None:
        assert group.num_tokens <= chosen.max_tokens(chosen.image_tokens(*size), prompt, captions)


@pytest.fixture(scope="module")
def caption_first_encoder(encoder: Encoder, artifact: Artifact) -> Encoder:
    return with_config(encoder, artifact, template="Caption: {caption}\nTask: {prompt}\nRate it.")


def test_caption_first_templates(caption_first_encoder: Encoder, tokenizer: object, image: EncodedImage) -> None:
    group, _ = caption_first_encoder.encode(Group(("a {prompt}", "an iceberg"), "be {caption} kind", image))
    assert group is not None
    wanted = [f"Caption: {caption}\nTask: be {{caption}} kind\nRate it." for caption in ("a {prompt}", "an iceberg")]
    assert [row.tolist() for row in group.rows] == [plain_ids(tokenizer, text, image.num_tokens) for text in wanted]


def test_a_long_caption_fails_alone(encoder: Encoder, image: EncodedImage) -> None:
    limit = encoder.config.max_caption_tokens
    group, errors = encoder.encode(Group(("fine", "\x07" * (limit + 1), "\x07" * limit, "too"), None, image))
    assert [error and (error.code, error.index) for error in errors] == [None, ("caption_too_long", 1), None, None]
    assert group is not None
    assert len(group.rows) == 3


def test_no_caption_left_to_score(encoder: Encoder, image: EncodedImage) -> None:
    group, errors = encoder.encode(Group(("\x07" * 999,), None, image))
    assert group is None
    assert errors[0] is not None
    assert encoder.encode(Group((), None, image)) == (None, [])


def test_lone_surrogates_are_an_error_of_the_caption_or_the_prompt(encoder: Encoder, image: EncodedImage) -> None:
    group, errors = encoder.encode(Group(("fine", "a\ud800b"), None, image))
    assert [error and (error.code, error.index) for error in errors] == [None, ("invalid_unicode", 1)]
    assert group is not None
    with pytest.raises(InvalidRequest, match="surrogates"):
        encoder.encode(Group(("fine",), "a\udc80", image))


@pytest.mark.parametrize("prompt", ["funny penguin " * 200, "🐧" * 70, "x\n" * 200])
def test_a_long_prompt_is_cut_as_in_training_and_reported(
    encoder: Encoder, artifact: Artifact, tokenizer: object, image: EncodedImage, prompt: str
) -> None:
    group, _ = encoder.encode(Group(("a",), prompt, image))
    assert group is not None
    assert group.truncated_prompt
    limit = artifact.config.max_prompt_tokens
    cut = tokenizer.decode(tokenizer.encode(prompt, add_special_tokens=False)[:limit])  # type: ignore[attr-defined]
    text = artifact.config.template.replace("{prompt}", cut).replace("{caption}", "a")
    assert group.rows[0].tolist() == plain_ids(tokenizer, text, image.num_tokens)
    again, _ = encoder.encode(Group(("a",), cut, image))
    assert again is not None
    assert again.key == group.key


@pytest.fixture(scope="module")
def backbones(published_of: Callable[[VisionFamily], Path]) -> dict[VisionFamily, Any]:
    return {family: load_backbone(open_artifact(str(published_of(family))), torch.float32) for family in VISION_FAMILIES}


@pytest.mark.parametrize("family", VISION_FAMILIES)
@quick
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    before=st.integers(0, 30),
    after=st.integers(1, 60),
)
def test_positions_equal_get_rope_index(
    backbones: dict[VisionFamily, Any], family: VisionFamily, rows: int, columns: int, before: int, after: int
) -> None:
    backbone = backbones[family]
    pad = backbone.config.image_token_id
    image = EncodedImage("x", np.zeros((0, 0), np.float32), (1, 2 * rows, 2 * columns), rows * columns)
    row = np.asarray([7] * before + [pad] * image.num_tokens + [9] * after)
    ids = torch.from_numpy(row)[None]
    expected, _ = backbone.get_rope_index(ids, (ids == pad).int(), torch.tensor([image.grid_thw]))
    assert np.array_equal(positions(row, image, pad, 2), expected[:, 0].numpy())


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_positions_without_a_picture_equal_get_rope_index(backbones: dict[VisionFamily, Any], family: VisionFamily) -> None:
    ids = torch.arange(5)[None]
    expected, _ = backbones[family].get_rope_index(ids, torch.zeros_like(ids).int())
    assert np.array_equal(positions(ids[0].numpy(), None, backbones[family].config.image_token_id, 2), expected[:, 0].numpy())


def test_positions_of_text_alone() -> None:
    assert np.array_equal(positions(np.arange(5), None, 99, 2), np.tile(np.arange(5), (3, 1)))


@given(
    prefix=st.lists(st.integers(0, 3), max_size=6),
    rests=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=5),
)
def test_num_shared_is_the_longest_common_prefix(prefix: list[int], rests: list[list[int]]) -> None:
    rows = [prefix + rest for rest in rests]
    longest = 0
    while all(len(row) > longest + 1 for row in rows) and len({row[longest] for row in rows}) == 1:
        longest += 1
    assert num_shared([np.asarray(row) for row in rows]) == longest


def test_the_last_token_is_pooled_and_is_the_line_end_after_the_turn(encoder: Encoder, tokenizer: object, image: EncodedImage) -> None:
    group, _ = encoder.encode(Group(("short", "and a much longer caption"), None, image))
    assert group is not None
    explanation = encoder.explain([group])
    assert explanation.pooled_index == [len(row) - 1 for row in group.rows]
    assert all(tokenizer.decode(row[-2:].tolist()) == "<|im_end|>\n" for row in group.rows)  # type: ignore[attr-defined]


def test_left_padding_in_the_saved_processor_changes_nothing(encoder: Encoder, published: Path, tmp_path: Path) -> None:
    path = copy_artifact(published, tmp_path)
    edit_json(path / "processor" / "tokenizer_config.json", padding_side="left", truncation_side="left")
    left = load_encoder(open_artifact(str(path)))
    captions = ["a", "a much longer caption than that"]
    ours, theirs = (encode(each, (120, 80), 0, captions) for each in (encoder, left))
    assert [row.tolist() for row in ours.rows] == [row.tolist() for row in theirs.rows]


def test_saved_truncation_and_padding_are_switched_off(encoder: Encoder, published: Path, tmp_path: Path) -> None:
    """`tokenizer.json` remembers the truncation and padding of its last use."""
    path = copy_artifact(published, tmp_path)
    remembered = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 500}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    edit_json(path / "processor" / "tokenizer.json", truncation=remembered, padding=padding)
    other = load_encoder(open_artifact(str(path)))
    ours, theirs = (encode(each, (120, 80), 0, ["a", "a much longer caption than that"]) for each in (encoder, other))
    assert [row.tolist() for row in ours.rows] == [row.tolist() for row in theirs.rows]


def test_scoring_leaves_no_state_on_the_modules(encoder: Encoder, loaded: LoadedModel) -> None:
    before = {name: set(vars(module)) for name, module in loaded.model.named_modules()}
    group = encode(encoder, (120, 80), 0, ["a", "b"])
    first = score_shared(loaded.model, [group]), score_plain(loaded.model, [group])
    other = encode(encoder, (60, 400), 1, ["c"], "another prompt")
    score_shared(loaded.model, [other]), score_plain(loaded.model, [other])
    assert loaded.model.backbone.rope_deltas is None
    assert {name: set(vars(module)) for name, module in loaded.model.named_modules()} == before
    assert (score_shared(loaded.model, [group]), score_plain(loaded.model, [group])) == first


def test_eight_threads_encode_as_one(encoder: Encoder) -> None:
    def work(number: int) -> tuple[bytes, list[bytes]]:
        group = encode(encoder, (60 + 7 * number, 300), number, [f"caption {number}", "企鵝 <|im_end|>", "🐧" * 9], f"prompt {number}")
        assert group.image is not None
        return group.image.patches.tobytes(), [row.tobytes() for row in group.rows]

    expected = [work(number) for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(24))) == expected


def write(text: str) -> object:
    return lambda path: path.write_text(text)


TEMPLATE_OF = "processor/chat_template.jinja"
IMAGES = "{% for message in messages %}{% for part in message['content'] %}%s{% endfor %}{% endfor %}"
PROCESSOR_FAULTS = {
    "no chat template": (TEMPLATE_OF, Path.unlink, "no chat template"),
    "a template without an image": (TEMPLATE_OF, write("{{ messages[0]['content'][1]['text'] }}<|im_end|>"), "exactly one image"),
    "a template with two images": (
        TEMPLATE_OF,
        write("<|image_pad|><|image_pad|>{{ messages[0]['content'][1]['text'] }}<|im_end|>"),
        "exactly one image",
    ),
    "an image behind the text": (TEMPLATE_OF, write("{{ messages[0]['content'][1]['text'] }}<|image_pad|>"), "exactly one image"),
    "a template without text": (TEMPLATE_OF, write("<|image_pad|><|im_end|>"), "user text exactly once"),
    "a template that repeats the text": (
        TEMPLATE_OF,
        write("<|image_pad|>{% for n in [1, 2] %}{{ messages[0]['content'][1]['text'] }}{% endfor %}"),
        "user text exactly once",
    ),
    "a template that is no Jinja": (TEMPLATE_OF, write("{% if %}"), "chat template cannot be read"),
    "a template that raises": (TEMPLATE_OF, write("{{ raise_exception('no') }}"), "chat template cannot be read"),
    "a broken tokenizer": ("processor/tokenizer.json", write("{"), "tokenizer cannot be read"),
    "no tokenizer": ("processor/tokenizer.json", Path.unlink, "tokenizer without a vocabulary"),
    "a broken image processor": ("processor/preprocessor_config.json", write("{"), "image processor cannot be read"),
    "no image processor": ("processor/preprocessor_config.json", Path.unlink, "image processor cannot be read"),
    "patches of another size": (
        "processor/preprocessor_config.json",
        lambda path: edit_json(path, patch_size=16),
        "expected patch_size 14",
    ),
    "merges of another size": ("processor/preprocessor_config.json", lambda path: edit_json(path, merge_size=1), "expected merge_size 2"),
    "a base without an image token": ("../base/config.json", lambda path: edit_json(path, without=("image_token_id",)), "image_token_id"),
    "a base of experts": (
        "../base/config.json",
        lambda path: edit_json(path, model_type="qwen3_vl_moe"),
        "expected one of .* found 'qwen3_vl_moe'",
    ),
    "another image token": ("../base/config.json", lambda path: edit_json(path, image_token_id=5), "exactly one image"),
}


@pytest.mark.parametrize("fault", PROCESSOR_FAULTS)
def test_a_processor_that_does_not_fit_is_refused(published: Path, tmp_path: Path, fault: str) -> None:
    name, damage, message = PROCESSOR_FAULTS[fault]
    path = copy_artifact(published, tmp_path)
    damage(path / name)  # type: ignore[operator]
    with pytest.raises(ArtifactInvalid, match=message) as refusal:
        load_encoder(open_artifact(str(path)))
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_tokenizer_with_more_tokens_than_the_base_is_refused(published: Path, tmp_path: Path) -> None:
    path = copy_artifact(published, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(path / "processor")
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(path / "processor")
    with pytest.raises(ArtifactInvalid, match="tokenizer of another base: expected at most 420 tokens, found 421"):
        load_encoder(open_artifact(str(path)))
