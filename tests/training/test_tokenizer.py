"""The demo's processor folder reads and behaves like Qwen2.5-VL's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoTokenizer

from training.demo.captions import TEMPLATES
from training.demo.drawings import Idea, Scene, render
from training.demo.pictures import PatchGrid, to_patches
from training.demo.tokenizer import ADDED_TOKENS, SPECIAL_TOKENS, ImageSizes, save_processor, train_tokenizer

VOCAB_SIZE = 500
IMAGE_TURN = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("processor")
    save_processor(train_tokenizer(TEMPLATES, VOCAB_SIZE), ImageSizes(56 * 56, 168 * 168, 14, 2), path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def test_vocabulary_counts_the_special_tokens_which_come_last(tokenizer: Any) -> None:
    assert len(tokenizer) == VOCAB_SIZE
    ids = tokenizer.convert_tokens_to_ids([*SPECIAL_TOKENS, *ADDED_TOKENS])
    assert ids == list(range(VOCAB_SIZE - len(ids), VOCAB_SIZE))


def test_tokens_are_special_exactly_where_the_real_ones_are(tokenizer: Any) -> None:
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    plain = {token.content for token in tokenizer.added_tokens_decoder.values() if not token.special}
    assert special == set(SPECIAL_TOKENS)
    assert plain == set(ADDED_TOKENS)
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.bos_token is None


@pytest.mark.parametrize("text", ["A cat.", "naïve café ☕ 猫", "tabs\tand\n\nlines  ", "It's 42!", "\u0000\u007f"])
def test_any_text_survives_a_round_trip(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_text_is_normalised_to_nfc(tokenizer: Any) -> None:
    assert tokenizer("cafe\u0301").input_ids == tokenizer("caf\u00e9").input_ids


def test_digits_stand_alone_as_in_the_real_pre_tokeniser(tokenizer: Any) -> None:
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 1234 days")
    assert [piece for piece, _ in pieces] == ["in", "Ġ", "1", "2", "3", "4", "Ġdays"]


def test_chat_inserts_the_system_turn_and_one_image(tokenizer: Any) -> None:
    assert tokenizer.apply_chat_template(IMAGE_TURN, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>hi<|im_end|>\n"
    )


def test_chat_keeps_a_given_system_turn_and_asks_for_an_answer_when_told(tokenizer: Any) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_patches_for_training_are_those_of_the_image_processor(folder: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    pictures = [render(Scene(Idea(subject, "stage", "cake"), 0)) for subject in ("cat", "robot")]
    expected = processor(images=pictures, return_tensors="np")
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
    found = to_patches(pixels, PatchGrid(patch=14, merge=2))
    np.testing.assert_allclose(found.numpy(), expected["pixel_values"], atol=1e-5)
    assert expected["image_grid_thw"].tolist() == [list(PatchGrid(14, 2).grid_thw(112, 168))] * 2
