"""Published layouts of reward models, each against its card's own recipe: alone, in groups, in mixed batches, and what must be refused."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer

from app.artifacts import CONFIG_NAME, Artifact, open_artifact
from app.cli import app as cli
from app.client import AsyncRewardClient
from app.contracts import Conversation, EncodedGroup, Group, Scores, Turn
from app.converting import convert
from app.encoding import Encoder, load_encoder
from app.engine import Engine
from app.errors import ArtifactInvalid, InvalidRequest
from app.framing import TextRun
from app.images import decode_image
from app.inspecting import inspect_artifact
from app.layouts import processor_files
from app.main import running
from app.model import RewardModel, load_model
from app.scoring import score_plain, score_shared
from app.serving import application
from app.settings import Settings
from tests.published import (
    PUBLISHED,
    THINKING_TEMPLATE,
    Asked,
    Message,
    PublishedKind,
    dialogue,
    write_seq_cls,
    write_seq_cls_adapter,
)
from tests.scorers import reusing
from tests.tiny import LIMITS, edit_json, edit_tensors, picture


class Loaded(NamedTuple):
    """A published folder and what is made of it; the engine has a model of its own, whose layers it packs."""

    folder: Path
    artifact: Artifact
    encoder: Encoder
    model: RewardModel
    engine: Engine

    def ways(self, groups: Sequence[EncodedGroup]) -> Iterator[list[Scores]]:
        """The scores of every way to compute them."""
        yield score_plain(self.model, groups)
        yield score_shared(self.model, groups)
        scorer = reusing(self.engine, max_bytes=(1 << 20, 1 << 20, 0))
        for _ in ("cold", "warm"):
            yield scorer.score(scorer.prepare(groups))


QUESTION: list[Message] = [{"role": "user", "content": "Why did the penguin bring an umbrella?"}]
LONGER: list[Message] = [
    {"role": "user", "content": "Who is the octopus?"},
    {"role": "assistant", "content": "Nobody told me about casual Friday."},
    {"role": "user", "content": "And the penguin\n\nin the office? "},
]
ANSWERS = [
    "Because of the iceberg.",
    "It is casual Friday, they said, and nobody told the octopus",
    "No.",
    "",
    "  two spaces, a line\nand more\n",
]
command_line = typer.main.get_command(cli)
each_kind = pytest.mark.parametrize("name", PUBLISHED)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    """One of each kind, opened as it was published. Do not write into them."""
    found = {}
    for name, kind in PUBLISHED.items():
        folder = kind.write(tmp_path_factory.mktemp(name))
        artifact = open_artifact(str(folder), offline=True, said=kind.said)
        found[name] = Loaded(folder, artifact, load_encoder(artifact), load_model(artifact).model, Engine(load_model(artifact).model))
    return found


def conversation(messages: list[Message]) -> Conversation:
    return tuple(Turn(message["role"], message["content"]) for message in messages)  # type: ignore[arg-type]


def group_of(encoder: Encoder, messages: list[Message], answers: list[str], seen: bytes | None) -> EncodedGroup:
    image = None if seen is None else encoder.encode_image(decode_image(seen, LIMITS, exif_transpose=False))
    group, errors = encoder.encode(Group(tuple(answers), conversation(messages), image))
    assert group is not None
    assert not any(errors), errors
    return group


def seen_by(kind: PublishedKind, seed: int = 0, size: tuple[int, int] = (120, 90)) -> bytes | None:
    return picture(*size, seed) if kind.takes_images else None


@each_kind
def test_the_layout_says_the_kind(loaded: dict[str, Loaded], name: str) -> None:
    artifact = loaded[name].artifact
    assert artifact.config.kind == name
    assert artifact.config.head.bias == (name == "value_head")
    assert all(said.partition("=")[0] not in PUBLISHED[name].said for said in artifact.assumed)


@each_kind
@pytest.mark.parametrize("messages", [QUESTION, LONGER], ids=["one turn", "three turns"])
def test_scores_are_those_of_the_cards_recipe(loaded: dict[str, Loaded], name: str, messages: list[Message]) -> None:
    at, kind = loaded[name], PUBLISHED[name]
    seen = seen_by(kind)
    expected = [kind.score(at.folder, Asked(messages, answer, seen)) for answer in ANSWERS]
    assert max(expected) - min(expected) > 0.05
    group = group_of(at.encoder, messages, ANSWERS, seen)
    for scores in at.ways([group]):
        assert scores[0].values == pytest.approx(expected, abs=1e-4)


@each_kind
def test_groups_of_a_mixed_batch_score_as_the_recipe_does(loaded: dict[str, Loaded], name: str) -> None:
    at, kind = loaded[name], PUBLISHED[name]
    asked = [
        (QUESTION, ANSWERS, seen_by(kind)),
        (LONGER, ANSWERS[:2], seen_by(kind)),
        (QUESTION, ANSWERS[2:4], seen_by(kind, 7, (90, 160))),
    ]
    groups = [group_of(at.encoder, messages, answers, seen) for messages, answers, seen in asked]
    expected = [[kind.score(at.folder, Asked(messages, answer, seen)) for answer in answers] for messages, answers, seen in asked]
    for scores in at.ways(groups):
        for one, other in zip(scores, expected, strict=True):
            assert one.values == pytest.approx(other, abs=1e-4)


@each_kind
def test_a_prompt_that_is_a_text_is_one_turn(loaded: dict[str, Loaded], name: str) -> None:
    encoder = loaded[name].encoder
    seen = seen_by(PUBLISHED[name])
    image = None if seen is None else encoder.encode_image(decode_image(seen, LIMITS, exif_transpose=False))
    as_text, _ = encoder.encode(Group(tuple(ANSWERS), QUESTION[0]["content"], image))
    as_turn = group_of(encoder, QUESTION, ANSWERS, seen)
    assert as_text is not None
    assert [row.tolist() for row in as_text.rows] == [row.tolist() for row in as_turn.rows]


LORA: dict[str, dict[str, Any]] = {
    "alpha of one layer": {"alpha_pattern": {"model.layers.0.self_attn.q_proj": 64}},
    "alpha by a regular expression": {"alpha_pattern": {"^model.layers.1.self_attn.v_proj": 64}},
    "rank of one layer": {"rank_pattern": {"model.layers.1.self_attn.o_proj": 2}},
    "one layer alone": {"layers_to_transform": [1]},
    "targets by a regular expression": {"target_modules": r"model\.layers\.\d+\.self_attn\.(q|v)_proj"},
    "targets by their whole names": {"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
    "all linear layers": {"target_modules": "all-linear"},
    "rank-stabilised": {"use_rslora": True},
}


@pytest.mark.parametrize("name", LORA)
def test_an_adapter_means_what_it_meant_in_training(tmp_path: Path, name: str) -> None:
    folder = write_seq_cls_adapter(tmp_path, **LORA[name])
    artifact = open_artifact(str(folder), said=PUBLISHED["seq_cls_adapter"].said)
    group = group_of(load_encoder(artifact), QUESTION, ANSWERS[:3], None)
    expected = [PUBLISHED["seq_cls_adapter"].score(folder, Asked(QUESTION, answer)) for answer in ANSWERS[:3]]
    for lora in ("merged", "unmerged"):
        (found,) = score_plain(load_model(artifact, lora=lora).model, [group])  # type: ignore[arg-type]
        assert found.values == pytest.approx(expected, abs=1e-4)
    assert inspect_artifact(str(folder), said=PUBLISHED["seq_cls_adapter"].said).stops == []


def test_a_pattern_for_no_layer_is_refused(tmp_path: Path) -> None:
    folder = write_seq_cls_adapter(tmp_path)
    edit_json(folder / "adapter_config.json", alpha_pattern={"layers.9.self_attn.q_proj": 64})
    with pytest.raises(ArtifactInvalid, match=r"alpha_pattern .*layers\.9\.self_attn\.q_proj"):
        load_model(open_artifact(str(folder), said=PUBLISHED["seq_cls_adapter"].said))


def test_a_transparent_picture_is_laid_on_white_as_the_card_does(loaded: dict[str, Loaded]) -> None:
    at, stream = loaded["value_head"], io.BytesIO()
    picture_of = Image.open(io.BytesIO(picture(120, 90))).convert("RGBA")
    picture_of.putalpha(Image.linear_gradient("L").resize(picture_of.size))
    picture_of.save(stream, "PNG")
    seen = stream.getvalue()
    rgb = decode_image(seen, LIMITS, exif_transpose=False, alpha=at.artifact.config.image.alpha)
    group, _ = at.encoder.encode(Group(tuple(ANSWERS[:2]), conversation(QUESTION), at.encoder.encode_image(rgb)))
    assert group is not None
    expected = [PUBLISHED["value_head"].score(at.folder, Asked(QUESTION, answer, seen)) for answer in ANSWERS[:2]]
    (found,) = score_plain(at.model, [group])
    assert found.values == pytest.approx(expected, abs=1e-4)


@each_kind
def test_added_tokens_that_are_not_special_are_tokens_as_in_the_recipe(loaded: dict[str, Loaded], name: str) -> None:
    at, kind = loaded[name], PUBLISHED[name]
    seen, answers = seen_by(kind), ["<tool_call> no </tool_call>", "<think> Because."]
    (found,) = score_plain(at.model, [group_of(at.encoder, QUESTION, answers, seen)])
    assert found.values == pytest.approx([kind.score(at.folder, Asked(QUESTION, answer, seen)) for answer in answers], abs=1e-4)


def test_a_tokenizer_that_adds_tokens_of_its_own_is_refused(tmp_path: Path) -> None:
    folder = write_seq_cls(tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    end = next(token for token in tokenizer["added_tokens"] if token["content"] == "<|im_end|>")
    said = {"id": end["content"], "ids": [end["id"]], "tokens": [end["content"]]}
    template = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": end["content"], "type_id": 0}}]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": template,
        "pair": template,
        "special_tokens": {end["content"]: said},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ArtifactInvalid, match="the tokenizer puts tokens of its own around a text"):
        load_encoder(open_artifact(str(folder)))


def test_a_borrowed_tokenizer_counts_and_is_copied(tmp_path: Path) -> None:
    """Of an adapter published without: what its base's template says is in the fingerprint, and in the converted artifact."""
    folder = write_seq_cls_adapter(tmp_path)
    for path in processor_files(folder):
        path.unlink()
    said = {"caption_role": "assistant", "max_tokens": 512}
    first = load_model(open_artifact(str(folder), said=said)).fingerprint
    target = convert(str(folder), tmp_path / "full", base_model=None, inputs=[], offline=True, progress=lambda step: None, said=said)
    assert {path.name for path in processor_files(target)} == {path.name for path in processor_files(tmp_path / "base")}
    template = tmp_path / "base/chat_template.jinja"
    template.write_text(template.read_text().replace("helpful", "gruff"))
    assert load_model(open_artifact(str(folder), said=said)).fingerprint != first
    assert load_encoder(open_artifact(str(target))).config.max_tokens == 512


def test_nobody_can_write_the_key_of_a_conversation(loaded: dict[str, Loaded]) -> None:
    """A prompt that is exactly what is hashed of a conversation has another key; rows under one key with other beginnings are refused."""
    at = loaded["seq_cls_adapter"]
    victim = group_of(at.encoder, LONGER, ANSWERS[:2], None)
    setting = at.encoder._setting(Group(("x",), conversation(LONGER)))
    runs = [list(run.parts) if isinstance(run, TextRun) else run for run in setting.frame.runs]
    spelt, _ = at.encoder.encode(Group(("No.",), json.dumps([runs, setting.frame.trims, setting.contents])))
    assert spelt is not None
    assert spelt.key != victim.key
    with pytest.raises(ValueError, match="rows of one image and prompt begin with different ids"):
        reusing(at.engine).prepare([victim, replace(spelt, key=victim.key)])


def test_long_texts_are_counted_before_they_are_refused(loaded: dict[str, Loaded]) -> None:
    """As bytes these were far more than they are; what is admitted is within a few tokens of the truth."""
    encoder = loaded["seq_cls"].encoder
    captions = tuple(f"{number} " + "the penguin in the office. " * 60 for number in range(12))
    group, errors = encoder.encode(Group(captions, "Why?"))
    assert group is not None
    assert not any(errors)
    assert group.num_tokens <= encoder.max_tokens(0, "Why?", captions) <= 1.1 * group.num_tokens + 200


def test_a_question_that_is_no_question_to_the_template_is_refused(tmp_path: Path) -> None:
    user = "{%- if message.role == 'user'"
    told = THINKING_TEMPLATE.replace(user, user + " and not message.content.startswith('<tool_response>')", 1)
    template = told.replace("namespace(user=0)", "namespace(user=99)")
    encoder = load_encoder(open_artifact(str(write_seq_cls(tmp_path, template=template))))
    with pytest.raises(InvalidRequest) as refusal:
        encoder.encode(Group(("No.",), "<tool_response>42</tool_response>"))
    assert refusal.value.code == "prompt_unclear"
    assert encoder.encode(Group(("No.",), "42"))[1] == [None]


def test_messages_do_not_get_round_a_template(loaded: dict[str, Loaded]) -> None:
    config = loaded["seq_cls"].artifact.config
    for changes in ({"template": "Question: {prompt}"}, {"max_prompt_tokens": 100}):
        artifact = replace(loaded["seq_cls"].artifact, config=config.model_copy(update=changes))
        with pytest.raises(InvalidRequest) as refusal:
            load_encoder(artifact).encode(Group(("No.",), conversation(QUESTION)))
        assert refusal.value.code == "messages_not_allowed"


def test_an_adapter_without_a_base_asks_for_one(tmp_path: Path) -> None:
    folder = write_seq_cls_adapter(tmp_path)
    edit_json(folder / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ArtifactInvalid, match="no base model is named"):
        open_artifact(str(folder), said=PUBLISHED["seq_cls_adapter"].said)
    assert (
        open_artifact(str(folder), base_model=str(tmp_path / "base"), said=PUBLISHED["seq_cls_adapter"].said).base_path == tmp_path / "base"
    )


def test_a_base_for_several_models_is_left_aside_by_those_that_carry_theirs(loaded: dict[str, Loaded], tmp_path: Path) -> None:
    folder = str(loaded["value_head"].folder)
    assert open_artifact(folder, base_model=str(tmp_path), in_company=True).base_path == loaded["value_head"].folder
    with pytest.raises(ArtifactInvalid, match="carries its trained base"):
        open_artifact(folder, base_model=str(tmp_path))


# Converted and served


@pytest.fixture(scope="module")
def converted(loaded: dict[str, Loaded], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A full artifact of each kind. Do not write into them."""
    folder = tmp_path_factory.mktemp("converted")
    return {
        name: convert(
            str(at.folder), folder / name, base_model=None, inputs=[], offline=True, progress=lambda step: None, said=PUBLISHED[name].said
        )
        for name, at in loaded.items()
    }


@each_kind
def test_converted_nothing_is_assumed_and_the_files_are_as_they_were(
    loaded: dict[str, Loaded], converted: dict[str, Path], name: str
) -> None:
    artifact = open_artifact(str(converted[name]), offline=True)
    assert artifact.assumed == ()
    assert artifact.config.kind == name
    assert set(artifact.config.files) == {path.relative_to(artifact.root).as_posix() for path in files_in(artifact.root)} - {CONFIG_NAME}
    for path in files_in(loaded[name].folder):
        assert (artifact.root / path.name).read_bytes() == path.read_bytes()


def files_in(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file() and path.suffix != ".md"]


@each_kind
@pytest.mark.anyio
async def test_the_server_scores_as_the_recipe_does(loaded: dict[str, Loaded], converted: dict[str, Path], name: str) -> None:
    """Golden items at start, then answers to a conversation, a prompt that is one turn, and every refusal of what is none."""
    kind, at = PUBLISHED[name], loaded[name]
    seen = seen_by(kind)
    picture_of = {} if seen is None else {"image": base64.b64encode(seen).decode()}
    expected = [kind.score(at.folder, Asked(LONGER, answer, seen)) for answer in ANSWERS]
    async with running(Settings(model=str(converted[name]), offline=True)) as runtime:
        assert runtime.first.last_report is not None
        assert (runtime.first.last_report.kind, runtime.first.last_report.passed) == ("golden", True)
        transport = httpx.ASGITransport(application(runtime))
        async with httpx.AsyncClient(transport=transport, base_url="http://punchline") as client:
            for word in ("captions", "responses"):
                answer = (await client.post("/score", json={"messages": LONGER, word: ANSWERS, "explain": True, **picture_of})).json()
                assert answer["scores"] == pytest.approx(expected, abs=1e-4)
            assert answer["explain"]["prefix_tokens"] > 20
            ranked = (await client.post("/rank", json={"messages": LONGER, "responses": ANSWERS, **picture_of})).json()
            assert ranked["ranking"][0]["index"] == max(range(len(expected)), key=expected.__getitem__)
            pair = (await client.post("/compare", json={"messages": LONGER, "a": ANSWERS[0], "b": ANSWERS[1], **picture_of})).json()
            assert pair["margin"] == pytest.approx(expected[0] - expected[1], abs=2e-4)
            await check_refused(client, picture_of, dialogue=name == "seq_cls_adapter")
        async with AsyncRewardClient("http://punchline", transport=transport) as asking:
            assert await asking.score(seen, ANSWERS, LONGER) == pytest.approx(expected, abs=1e-4)


async def check_refused(client: httpx.AsyncClient, picture_of: dict[str, str], *, dialogue: bool) -> None:
    user, assistant = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
    unsaid: dict[str, dict[str, object]] = {
        "missing_field at prompt": {},
        "invalid_request at messages": {"messages": [user, assistant]},
        "invalid_request at messages ": {"messages": [user, user]},
        "empty_batch at messages": {"messages": []},
        "invalid_request at messages   ": {"messages": [assistant, user]},
        "invalid_request at None": {"messages": [user], "prompt": "Why?"},
        "invalid_request at messages[0].role": {"messages": [{"role": "tool", "content": "x"}]},
        "unknown_field at messages[0].name": {"messages": [{"role": "user", "content": "x", "name": "y"}]},
        "unknown_field at responses": {"prompt": "Why?", "responses": ["x"]},
    }
    if dialogue:
        unsaid["invalid_request at messages    "] = {"messages": [{"role": "system", "content": "Be kind."}, user]}
        unsaid["prompt_unclear at prompt"] = {"prompt": "\n\nHuman: Why?"}
    for wanted, body in unsaid.items():
        answer = await client.post("/score", json={"captions": ["No."], **picture_of, **body})
        error = answer.json()["error"]
        assert (answer.status_code, f"{error['code']} at {error.get('field')}") == (422, wanted.strip()), error


# Texts


def test_a_dialogue_written_out_is_taken_as_it_is(loaded: dict[str, Loaded]) -> None:
    """With the space before the response or without it, the prompt's or the response's own."""
    encoder = loaded["seq_cls_adapter"].encoder
    expected = group_of(encoder, LONGER, ["No."], None).rows[0].tolist()
    opened = dialogue(Asked(LONGER, ""))
    for prompt, answer in ((opened, "No."), (opened.rstrip(" "), "No."), (opened.rstrip(" "), " No.")):
        group, _ = encoder.encode(Group((answer,), prompt))
        assert group is not None
        assert group.rows[0].tolist() == expected
    tokenizer = AutoTokenizer.from_pretrained(loaded["seq_cls_adapter"].folder)
    assert tokenizer(opened + "No.")["input_ids"] == expected


def test_a_template_that_takes_a_turn_apart_is_told(loaded: dict[str, Loaded]) -> None:
    """Its reasoning would go elsewhere, or nowhere: the caption fails by itself, a prompt fails whole."""
    encoder = loaded["seq_cls"].encoder
    thought = "<think>\nHm.\n</think>\n\nNo."
    group, errors = encoder.encode(Group(("No.", thought), "Why?"))
    assert group is not None
    assert [None if error is None else error.code for error in errors] == [None, "caption_unclear"]
    for kind in ("seq_cls_adapter", "value_head"):
        frame = loaded[kind].encoder
        assert not frame.takes_images or frame.image_tokens(40, 40) > 0
        if kind == "seq_cls_adapter":
            assert frame.encode(Group((thought,), "Why?"))[1] == [None]


@given(text=st.lists(st.sampled_from([*"\n\t aé.", "<think>", "<|im_end|>"]), max_size=12).map("".join))
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_turns_are_trimmed_as_their_template_does_it(loaded: dict[str, Loaded], text: str) -> None:
    """Whatever stands at the ends of an answer, the ids are those of the rendered chat; what spells a special token stays text."""
    at = loaded["seq_cls"]
    group, errors = at.encoder.encode(Group((text,), "Why?"))
    assert (group is not None, errors) == (True, [None])
    tokenizer = AutoTokenizer.from_pretrained(at.folder)
    chat = tokenizer.apply_chat_template(
        [*QUESTION[:0], {"role": "user", "content": "Why?"}, {"role": "assistant", "content": text}], tokenize=False
    )
    assert at.encoder.explain([group]).chats == [chat]  # type: ignore[list-item]
    if "<" not in text:
        assert group.rows[0].tolist() == tokenizer(chat)["input_ids"]  # type: ignore[union-attr]


def test_longer_than_the_model_takes_is_refused_by_whose_fault_it_is(loaded: dict[str, Loaded]) -> None:
    encoder = loaded["seq_cls_adapter"].encoder
    group, errors = encoder.encode(Group(("No.", "x y " * 400), "Why?"))
    assert group is not None
    assert len(group.rows) == 1
    assert [None if error is None else error.code for error in errors] == [None, "caption_too_long"]
    with pytest.raises(InvalidRequest, match="tokens without a caption, the model takes 512 in all"):
        encoder.encode(Group(("No.",), "x y " * 400))


@each_kind
@given(
    turns=st.integers(0, 3), words=st.lists(st.sampled_from(["a", "the iceberg ", "\n", "企鵝", "."]), max_size=30), count=st.integers(1, 6)
)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_the_bound_of_a_groups_tokens_holds(loaded: dict[str, Loaded], name: str, turns: int, words: list[str], count: int) -> None:
    encoder = loaded[name].encoder
    text = "".join(words)
    messages = [Turn("user", text), *(turn for _ in range(turns) for turn in (Turn("assistant", text), Turn("user", "Why?")))]
    seen = seen_by(PUBLISHED[name])
    image = None if seen is None else encoder.encode_image(decode_image(seen, LIMITS, exif_transpose=False))
    captions = tuple(f"{number} {text}" for number in range(count))
    group, _ = encoder.encode(Group(captions, tuple(messages), image))
    assert group is not None
    assert group.num_tokens <= encoder.max_tokens(image.num_tokens if image else 0, tuple(messages), captions)


def test_padding_at_the_end_is_not_pooled(tmp_path: Path) -> None:
    """transformers takes the last token that is no padding, whatever stands behind it in the template."""
    ending = THINKING_TEMPLATE + "<|endoftext|><|endoftext|>"
    folder = write_seq_cls(tmp_path / "ended", template=ending)
    artifact = open_artifact(str(folder))
    group = group_of(load_encoder(artifact), QUESTION, ANSWERS, None)
    expected = [PUBLISHED["seq_cls"].score(folder, Asked(QUESTION, answer)) for answer in ANSWERS]
    (found,) = score_plain(load_model(artifact).model, [group])
    assert found.values == pytest.approx(expected, abs=1e-4)
    assert not any(row[-1] == artifact_pad(artifact) for row in group.rows)


def artifact_pad(artifact: Artifact) -> int:
    return int(json.loads((artifact.base_path / "config.json").read_bytes())["pad_token_id"])


# What is none, and what is broken


def swapped(name: str) -> Callable[[Path], object]:
    return lambda folder: edit_tensors(
        folder / name, lambda tensors: tensors.update({key: tensor.mT for key, tensor in tensors.items() if tensor.dim() == 2})
    )


BROKEN: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no head in the adapter": (
        "seq_cls_adapter",
        lambda folder: edit_tensors(folder / "adapter_model.safetensors", lambda tensors: tensors.pop("base_model.model.score.weight")),
        r"no base_model\.model\.score\.weight among its tensors",
    ),
    "half the adapter": (
        "seq_cls_adapter",
        lambda folder: edit_tensors(
            folder / "adapter_model.safetensors",
            lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1." in name],
        ),
        "missing adapter keys",
    ),
    "another task": (
        "seq_cls_adapter",
        lambda folder: edit_json(folder / "adapter_config.json", task_type="CAUSAL_LM"),
        "an adapter for the task 'CAUSAL_LM', which has no reward head; expected SEQ_CLS",
    ),
    "other modules saved": (
        "seq_cls_adapter",
        lambda folder: edit_json(folder / "adapter_config.json", modules_to_save=["embed_tokens", "score"]),
        "modules_to_save embed_tokens: expected plain LoRA, and at most its head beside it",
    ),
    "no score": (
        "seq_cls",
        lambda folder: edit_tensors(folder / "model.safetensors", lambda tensors: tensors.pop("score.weight")),
        r"no score\.weight among its tensors",
    ),
    "a causal model": (
        "seq_cls",
        lambda folder: edit_json(folder / "config.json", architectures=["Qwen3ForCausalLM"]),
        "Qwen3ForCausalLM without a reward head; its scores would be noise",
    ),
    "no value head": ("value_head", lambda folder: (folder / "value_head.safetensors").unlink(), "without a reward head"),
    "a value head transposed": (
        "value_head",
        swapped("value_head.safetensors"),
        r"expected a head with one row, .*found the shape \[64, 1\]",
    ),
    "a value head without its weight": (
        "value_head",
        lambda folder: edit_tensors(folder / "value_head.safetensors", lambda tensors: tensors.pop("v_head.summary.weight")),
        r"no v_head\.summary\.weight among its tensors",
    ),
    "a foreign tensor in the value head": (
        "value_head",
        lambda folder: edit_tensors(folder / "value_head.safetensors", lambda tensors: tensors.update({"v_head.summary.x": torch.ones(1)})),
        "expected the tensors .*found",
    ),
    "no tokenizer": (
        "seq_cls",
        lambda folder: [(folder / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
        "tokenizer",
    ),
    "code of its own": ("value_head", lambda folder: edit_json(folder / "config.json", auto_map={"AutoModel": "x.Y"}), "auto_map"),
    "a mixture of experts": (
        "seq_cls",
        lambda folder: edit_json(folder / "config.json", model_type="qwen3_moe"),
        "expected one of .*found 'qwen3_moe'",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_broken_is_refused_in_one_line_and_shown_without_loading(tmp_path: Path, fault: str) -> None:
    name, damage, message = BROKEN[fault]
    kind = PUBLISHED[name]
    folder = kind.write(tmp_path)
    damage(folder)
    with pytest.raises(ArtifactInvalid, match=message) as refusal:
        load_all(folder, kind)
    assert "\n" not in str(refusal.value)
    stops = inspect_artifact(str(folder), offline=True, said=kind.said).stops
    assert stops
    assert all("\n" not in stop for stop in stops)


def load_all(folder: Path, kind: PublishedKind) -> None:
    artifact = open_artifact(str(folder), offline=True, said=kind.said)
    load_encoder(artifact)
    load_model(artifact)


def test_two_labels_are_no_reward(tmp_path: Path) -> None:
    with pytest.raises(ArtifactInvalid, match=r"expected a head with one row.*\[2, 64\]|score_head_shape"):
        load_model(open_artifact(str(write_seq_cls(tmp_path, num_labels=2))))


def test_an_adapter_of_which_nobody_says_how_texts_were_written(tmp_path: Path) -> None:
    folder = write_seq_cls_adapter(tmp_path)
    with pytest.raises(ArtifactInvalid, match="say so once, with punchline convert, --caption-role and --max-tokens"):
        open_artifact(str(folder))
    with pytest.raises(ArtifactInvalid, match="with punchline convert, --max-tokens"):
        open_artifact(str(folder), said={"caption_role": "dialogue"})


def test_what_a_configuration_says_is_not_said_again(converted: dict[str, Path]) -> None:
    with pytest.raises(ArtifactInvalid, match="says already what max_tokens would"):
        open_artifact(str(converted["seq_cls"]), said={"max_tokens": 5})


@each_kind
def test_a_good_folder_has_nothing_that_stops_it(loaded: dict[str, Loaded], converted: dict[str, Path], name: str) -> None:
    published = inspect_artifact(str(loaded[name].folder), offline=True, said=PUBLISHED[name].said)
    assert (published.stops, published.as_dict()["kind"]) == ([], name)
    full = inspect_artifact(str(converted[name]), offline=True)
    assert (full.stops, full.assumed) == ([], ())


def test_the_command_line_says_what_a_folder_is(loaded: dict[str, Loaded], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command_line(["info", str(loaded["value_head"].folder), "--json"], standalone_mode=False)
    shown = json.loads(capfd.readouterr().out)
    assert (shown["what"], shown["stops"]) == ("a whole checkpoint with a value head beside it", [])
    (broken := tmp_path / "broken").mkdir()
    with pytest.raises(SystemExit) as left:
        command_line(["info", str(broken), "--json"], standalone_mode=False)
    assert left.value.code == 3
    assert json.loads(capfd.readouterr().out)["stops"] == [
        f"{broken}: no reward model: neither reward_model_config.json nor the files of a published one"
    ]


def test_the_command_line_converts_an_adapter(loaded: dict[str, Loaded], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, target = loaded["seq_cls_adapter"].folder, tmp_path / "full"
    said = ["--caption-role", "dialogue", "--max-tokens", "512"]
    command_line(["convert", str(source), str(target), *said, "--offline"], standalone_mode=False)
    config = open_artifact(str(target)).config
    assert (config.caption_role, config.max_tokens, config.template) == ("dialogue", 512, "{prompt}")
