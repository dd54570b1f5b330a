"""From checkpoint to artifact: it serves the scores of training, says where it comes from, and is either whole or not there."""

from __future__ import annotations

import io
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from app.artifacts import (
    CONFIG_NAME,
    HEAD_NAME,
    Golden,
    GoldenItem,
    RewardModelConfig,
    base_sha256,
    file_sha256,
    open_artifact,
    write_config,
)
from app.contracts import EncodedGroup
from app.encoding import Encoder
from app.errors import ArtifactInvalid, PunchlineError
from app.golden import long_prompt
from app.main import running
from app.model import RewardModel
from app.scoring import score_plain, score_shared
from app.settings import load_settings
from tests.tiny import CORPUS, TEXT_CHAT_TEMPLATE, edit_json, edit_tensors, encode, encode_text, load_whole, write_text_base
from tests.training.test_model_card import make_evaluation
from tests.training.tiny_run import QUIET, TinyRun
from training.collation import Collator
from training.demo.tokenizer import train_tokenizer
from training.export import ExportFailed, ExportRefused, HuggingFaceHub, app, export_artifact, name_base, push_artifact
from training.golden import Proof, choose_inputs, prove, prove_in_fresh_process, widened_tolerance
from training.loop import TRAINED_NAME
from training.model_card import EvaluationInvalid
from training.pairs import DataInvalid, Pair, read_pairs, write_pairs
from training.recipe import Recipe
from training.report import Evaluation, as_json
from training.scorers import weights_sha256
from training.train import train
from training.trainee import load_trained, make_trainee

ROOT = Path(__file__).parents[2]
CAPTIONS = ("the penguin and the umbrella", "an iceberg", "", "Nobody told the octopus <|im_end|>")


@pytest.fixture(scope="module")
def run(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps with checkpoints after two and four. Do not write into it."""
    out = tmp_path_factory.mktemp("run") / "run"
    tiny.train(out, run={"max_steps": 4}, lora={"dropout": 0.1})
    return out


@pytest.fixture(scope="module")
def exported(tiny: TinyRun, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one export that goes the whole way, fresh process included."""
    out = tmp_path_factory.mktemp("exported") / "deep" / "artifact"
    return export_artifact(run, out, pairs=table_of(tiny), description="Likes umbrellas.", console=QUIET)


@pytest.fixture
def own_run(run: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(run, tmp_path / "run")


def table_of(tiny: TinyRun) -> Path:
    return tiny.data / "pairs_validation.parquet"


def export(run: Path, out: Path, tiny: TinyRun, **options: Any) -> Path:
    """Proven in this process: quick, and the same code."""
    return export_artifact(run, out, **{"console": QUIET, "pairs": table_of(tiny), "prove": prove} | options)


def evaluation_of(artifact: Path, **target: Any) -> Evaluation:
    """As if the artifact had been measured."""
    return make_evaluation(**{"name": str(artifact), "weights_sha256": weights_sha256(open_artifact(str(artifact)))} | target)


def without_prompts(tiny: TinyRun, root: Path) -> TinyRun:
    """The same tables, every pair to the default prompt."""
    data = shutil.copytree(tiny.data, root / "data")
    for path in data.glob("*.parquet"):
        write_pairs(path, [replace(pair, prompt=None) for pair in read_pairs(path)])
    return TinyRun(tiny.base, data)


def load_trainee(recipe: Recipe, run: Path, step: int, folder: Path) -> tuple[Encoder, RewardModel]:
    trainee = make_trainee(recipe, folder)
    load_trained(trainee.model, load_file(run / "checkpoints" / f"step-{step:07d}" / TRAINED_NAME))
    return trainee.encoder, trainee.model.eval()


def differences(artifact: Path, recipe: Recipe, run: Path, step: int, folder: Path, make: Callable[[Encoder], EncodedGroup]) -> float:
    """The artifact by the forward that serves against the trainee by one forward a caption."""
    encoder, model = load_trainee(recipe, run, step, folder)
    (expected,) = score_plain(model, [make(encoder)])
    served_encoder, loaded = load_whole(artifact, dtype="float32")
    (served,) = score_shared(loaded.model, [make(served_encoder)])
    assert statistics.stdev(expected.values) > 0.005
    return max(abs(ours - theirs) for ours, theirs in zip(served.values, expected.values, strict=True))


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_it_serves_the_scores_of_training(tiny: TinyRun, run: Path, exported: Path, tmp_path: Path) -> None:
    group = lambda encoder: encode(encoder, (84, 112), 9, CAPTIONS, "Look closely.")  # noqa: E731
    assert differences(exported, tiny.recipe(lora={"dropout": 0.1}), run, 4, tmp_path, group) < 1e-5


@pytest.mark.anyio
async def test_a_server_starts_on_it(exported: Path) -> None:
    async with running(load_settings(model=str(exported), offline=True)) as runtime:
        assert runtime.first.last_report is not None
        assert (runtime.first.last_report.kind, runtime.first.last_report.num_scores) == ("golden", 36)
        assert runtime.ready


def test_the_configuration_says_everything(tiny: TinyRun, run: Path, exported: Path) -> None:
    opened = open_artifact(str(exported))
    config, training = opened.config, opened.config.training
    assert opened.assumed == ()
    assert set(json.loads((exported / CONFIG_NAME).read_bytes())) == set(RewardModelConfig.model_fields)
    assert (config.kind, config.description, config.base_model_name) == ("lora_head", "Likes umbrellas.", str(tiny.base.resolve()))
    assert config.base_model_sha256 == base_sha256(tiny.base)
    described = json.loads((run / "run.json").read_bytes())
    assert {name: training[name] for name in ("recipe", "data", "versions")} == {
        name: described[name] for name in ("recipe", "data", "versions")
    }
    assert (training["step"], training["seed"]) == (4, 3)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert training["metrics"] == {"training": lines[-2], "validation": lines[-1], "evaluation": None}
    assert training["golden_pairs"] == {"table": "pairs_validation.parquet", "sha256": file_sha256(table_of(tiny))}
    assert config.calibration.temperature == 1.0


def test_only_the_parts_of_an_artifact_are_there(exported: Path) -> None:
    names = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    files = open_artifact(str(exported)).config.files
    assert set(files) == names - {CONFIG_NAME, "README.md", "card/learning_curve.png"}
    assert {name for name in names if name.startswith("backbone_adapter/")} == {
        "backbone_adapter/adapter_config.json",
        "backbone_adapter/adapter_model.safetensors",
    }
    assert {path.stat().st_mode & 0o444 for path in exported.rglob("*")} == {0o444}
    assert left_in(exported.parent) == {"artifact"}


def test_the_distribution_is_that_of_the_captions(tiny: TinyRun, exported: Path) -> None:
    """Ten pairs of ten distinct captions each side: twenty scores, their mean and deviation (divisor n - 1)."""
    encoder, loaded = load_whole(exported, dtype="float32")
    pairs = read_pairs(table_of(tiny))
    batch = Collator(encoder, pairs, tiny.data).collate(range(len(pairs)))
    scores = [value for scores in score_plain(loaded.model, batch.groups) for value in scores.values]
    found = open_artifact(str(exported)).config.score_distribution
    assert found is not None
    assert len({caption for pair in pairs for caption in (pair.chosen, pair.rejected)}) == len(scores) == 20
    assert found.mean == pytest.approx(statistics.fmean(scores), abs=1e-5)
    assert found.std == pytest.approx(statistics.stdev(scores), abs=1e-5)


def test_golden_items_cover_pictures_and_prompts(exported: Path) -> None:
    opened = open_artifact(str(exported))
    golden = opened.golden()
    assert golden is not None
    assert [item.prompt for item in golden.items] == [None, "Look closely.", long_prompt(160)]
    assert all(len(item.captions) == len(set(item.captions)) == 12 for item in golden.items)
    assert len({file_sha256(exported / str(item.image)) for item in golden.items}) > 1
    encoder, _ = load_whole(exported)
    cut = [encode(encoder, (56, 56), 0, item.captions, item.prompt).truncated_prompt for item in golden.items]
    assert cut == [False, False, True]


@pytest.mark.parametrize(
    "change",
    [
        {"max_prompt_tokens": 159},
        {"max_prompt_tokens": 161},
        {"template": "{prompt}\n\nCandidate caption: {caption}\n\nJudge how funny this caption is for the drawing."},
        {"default_prompt": "Write a caption."},
        {"image": {"long_edge": 56, "resample": "lanczos", "exif_transpose": False}},
    ],
)
def test_the_golden_items_notice_a_changed_recipe(exported: Path, change: dict[str, Any], tmp_path: Path) -> None:
    copy = shutil.copytree(exported, tmp_path / "artifact")
    edit_json(copy / CONFIG_NAME, **change)
    with pytest.raises(ArtifactInvalid, match="golden scores in float32 differ"):
        prove(copy)


def test_equal_checkpoints_give_equal_files(tiny: TinyRun, run: Path, exported: Path, tmp_path: Path) -> None:
    again = open_artifact(str(export(run, tmp_path / "again", tiny))).config
    first = open_artifact(str(exported)).config
    assert again.files == first.files
    assert again.score_distribution == first.score_distribution


def test_an_earlier_checkpoint_by_name(tiny: TinyRun, run: Path, exported: Path, tmp_path: Path) -> None:
    artifact = export(run, tmp_path / "early", tiny, checkpoint="step-0000002")
    config = open_artifact(str(artifact)).config
    assert config.training["step"] == config.training["metrics"]["training"]["step"] == 2
    assert config.training["metrics"]["validation"] is None  # measured at step 4 for the first time
    assert file_sha256(artifact / HEAD_NAME) != file_sha256(exported / HEAD_NAME)


def test_with_its_base_it_needs_nothing_else(tiny: TinyRun, run: Path, exported: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    artifact = export(run, tmp_path / "whole", tiny, embed_base=True, console=console)
    assert "not calibrated: no evaluation" in console.file.getvalue()  # type: ignore[attr-defined]
    opened = open_artifact(str(artifact))
    assert opened.base_path == artifact / "base"
    assert (opened.config.base_model_name, opened.config.base_model_revision) == ("./base", None)
    assert left_in(artifact / "base") == {"config.json", "generation_config.json", "model.safetensors"}
    assert json.loads((artifact / "backbone_adapter/adapter_config.json").read_bytes())["base_model_name_or_path"] == "./base"
    assert opened.config.base_model_sha256 == open_artifact(str(exported)).config.base_model_sha256


def test_a_hub_base_is_pinned_to_the_commit_it_was_found_at(tiny: TinyRun, tmp_path: Path) -> None:
    snapshot = shutil.copytree(tiny.base, tmp_path / "snapshots" / ("ab" * 20))
    recipe = tiny.recipe(model={"base": "owner/base", "revision": "main"})
    names = name_base(recipe, snapshot, embed_base=False)
    assert (names["base_model_name"], names["base_model_revision"]) == ("owner/base", "ab" * 20)
    assert names["base_model_sha256"] == base_sha256(tiny.base)


def test_a_fixed_prompt_is_the_only_golden_one(tiny: TinyRun, tmp_path: Path) -> None:
    """A table with other prompts would give a distribution, and a card, of what the model refuses."""
    plain = without_prompts(tiny, tmp_path)
    plain.train(tmp_path / "run", model={"prompt_policy": "fixed"}, run={"max_steps": 2})
    golden = open_artifact(str(export(tmp_path / "run", tmp_path / "artifact", plain))).golden()
    assert golden is not None
    assert [item.prompt for item in golden.items] == [None] * 3
    with pytest.raises(DataInvalid, match=r"pairs_validation\.parquet, pair 0: has a prompt, and model\.prompt_policy is fixed"):
        export(tmp_path / "run", tmp_path / "other", tiny)


def test_one_scene_makes_three_different_golden_items(exported: Path, tiny: TinyRun) -> None:
    """Eighteen pairs of one picture: the items take pairs 0 to 5, 6 to 11 and 12 to 17."""
    encoder, _ = load_whole(exported)
    pairs = [Pair(str(number), "c", "images/0.png", None, f"a {number}", f"b {number}") for number in range(18)]
    items = choose_inputs(encoder, pairs, tiny.data)
    assert [item.captions for item in items] == [
        tuple(f"{side} {number}" for number in range(start, start + 6) for side in "ab") for start in (0, 6, 12)
    ]


def test_bfloat16_may_differ_by_a_quarter_of_the_spread_and_no_more() -> None:
    """Scores 1 and -1 spread by 1: seen 0.05, three times that is allowed; seen 0.2, the quarter; seen 0.26, none."""
    item = GoldenItem(image=None, captions=["a", "b"], scores=[1.0, -1.0])
    golden = Golden(tolerance={"float32": 1e-4, "bfloat16": 0.1}, items=[item])
    for seen, allowed in ((0.01, 0.1), (0.05, 0.15), (0.2, 0.25)):
        assert widened_tolerance(golden, {"float32": 0.0, "bfloat16": seen}).tolerance == {
            "float32": 1e-4,
            "bfloat16": pytest.approx(allowed),
        }
    for seen in (0.26, math.nan):
        with pytest.raises(ArtifactInvalid, match="golden scores in bfloat16 differ"):
            widened_tolerance(golden, {"float32": 0.0, "bfloat16": seen})


def test_a_bfloat16_recipe_has_exact_golden_scores(tiny: TinyRun, tmp_path: Path) -> None:
    """The frozen weights are the same numbers in float32; only arithmetic is rounded, so the golden scores are those of float32."""
    tiny.train(tmp_path / "run", model={"dtype": "bfloat16"}, run={"max_steps": 2})
    artifact = export(tmp_path / "run", tmp_path / "artifact", tiny)
    assert open_artifact(str(artifact)).config.dtype == "bfloat16"
    assert prove(artifact).differences["float32"] < 1e-5


def test_an_evaluation_gives_figures_and_temperature(tiny: TinyRun, run: Path, exported: Path, tmp_path: Path) -> None:
    evaluation = evaluation_of(exported)
    (tmp_path / "report.json").write_text(as_json(evaluation))
    artifact = export(run, tmp_path / "artifact", tiny, evaluation=tmp_path / "report.json")
    config = open_artifact(str(artifact)).config
    assert config.calibration.temperature == evaluation.pairs.temperature.value
    headline = config.training["metrics"]["evaluation"]
    assert headline["accuracy"]["value"] == 0.75
    assert headline["accuracy_over_contests"]["value"] == pytest.approx(5 / 6)
    assert (headline["num_pairs"], headline["num_contests"]) == (4, 2)
    assert headline["ignored"] == []
    assert (headline["evaluated_fingerprint"], headline["inputs"]) == ("e" * 64, {"pairs": "1" * 64})
    assert "card/calibration.png" in (artifact / "README.md").read_text()
    assert (artifact / "card" / "calibration.png").is_file()


def test_an_evaluation_of_another_checkpoint_is_refused(tiny: TinyRun, run: Path, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(as_json(evaluation_of(exported)))
    with pytest.raises(ExportRefused, match=r"measured other weights than those of .*step-0000002: expected sha256"):
        export(run, tmp_path / "out", tiny, evaluation=tmp_path / "report.json", checkpoint="step-0000002")
    assert left_in(tmp_path) == {"report.json"}


def test_the_weights_are_those_of_head_adapter_and_base(exported: Path, tmp_path: Path) -> None:
    """A name alone says nothing, and neither does the head: an adapter with another sign has another digest."""
    copy = shutil.copytree(exported, tmp_path / "artifact")
    edit_tensors(copy / "backbone_adapter/adapter_model.safetensors", lambda tensors: [tensor.neg_() for tensor in tensors.values()])
    edit_json(copy / CONFIG_NAME, files={})
    assert weights_sha256(open_artifact(str(copy))) != weights_sha256(open_artifact(str(exported)))


def full_recipe(recipe: Recipe) -> Recipe:
    """The same without LoRA: every weight is trained."""
    values = recipe.model_dump(mode="json", exclude={"lora"})
    values["optimiser"] |= {"learning_rate": 2e-3}
    return Recipe.model_validate_json(json.dumps(values))


def test_every_weight_trained(tiny: TinyRun, tmp_path: Path) -> None:
    recipe = full_recipe(tiny.recipe(run={"max_steps": 2}))
    train(recipe, tiny.data, tmp_path / "run", resume=False, trackers=(), console=QUIET)
    artifact = export(tmp_path / "run", tmp_path / "artifact", tiny)
    opened = open_artifact(str(artifact))
    assert (opened.config.kind, opened.config.base_model_name) == ("full_head", "./base")
    assert not opened.adapter_path.exists()
    assert opened.config.base_model_sha256 == base_sha256(artifact / "base") != base_sha256(tiny.base)
    assert opened.config.training["base"]["sha256"] == base_sha256(tiny.base)
    assert "base/model.safetensors" in opened.config.files
    group = lambda encoder: encode(encoder, (84, 112), 9, CAPTIONS)  # noqa: E731
    assert differences(artifact, recipe, tmp_path / "run", 2, tmp_path / "again", group) < 1e-5


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("role", ["user", "raw"])
def test_a_text_only_base(role: str, lora: bool, tmp_path: Path) -> None:
    tiny = write_text_run(tmp_path)
    shape = {"caption_role": "raw", "template": "{prompt}{caption}<|im_end|>", "default_prompt": ""} if role == "raw" else {}
    recipe = tiny.recipe(model=shape, run={"max_steps": 2})
    recipe = recipe if lora else full_recipe(recipe)
    train(recipe, tiny.data, tmp_path / "run", resume=False, trackers=(), console=QUIET)
    artifact = export(tmp_path / "run", tmp_path / "artifact", tiny)
    golden = open_artifact(str(artifact)).golden()
    assert golden is not None
    assert [item.image for item in golden.items] == [None] * 3
    assert not (artifact / "golden").exists()
    assert "pipeline_tag: text-ranking" in (artifact / "README.md").read_text()
    group = lambda encoder: encode_text(encoder, CAPTIONS, "Look closely.")  # noqa: E731
    assert differences(artifact, recipe, tmp_path / "run", 2, tmp_path / "again", group) < 1e-5


def write_text_run(root: Path) -> TinyRun:
    torch.manual_seed(2)
    tokenizer = train_tokenizer(CORPUS, 420)
    tokenizer.chat_template = TEXT_CHAT_TEMPLATE
    tokenizer.save_pretrained(root / "base")
    write_text_base(root / "base", tokenizer)
    (root / "data").mkdir()
    rng = random.Random(4)
    words = CORPUS[-1].split()
    pairs = [
        Pair(str(number), f"c{number % 5}", None, f"Tell me of {number % 5}.", f"umbrella {number}", " ".join(rng.choices(words, k=4)))
        for number in range(40)
    ]
    write_pairs(root / "data" / "pairs_train.parquet", pairs[:30])
    write_pairs(root / "data" / "pairs_validation.parquet", pairs[30:])
    return TinyRun(root / "base", root / "data")


def no_run(run: Path, tiny: TinyRun) -> dict[str, Any]:
    (run / "run.json").unlink()
    return {}


def half_a_description(run: Path, tiny: TinyRun) -> dict[str, Any]:
    edit_json(run / "run.json", without=("base_sha256",))
    return {}


def wrong_recipe(run: Path, tiny: TinyRun) -> dict[str, Any]:
    edit_json(run / "run.json", recipe={"model": {"base": 3}})
    return {}


def no_checkpoint(run: Path, tiny: TinyRun) -> dict[str, Any]:
    shutil.rmtree(run / "checkpoints")
    return {}


def unknown_checkpoint(run: Path, tiny: TinyRun) -> dict[str, Any]:
    return {"checkpoint": "step-0000003"}


def outside_checkpoint(run: Path, tiny: TinyRun) -> dict[str, Any]:
    return {"checkpoint": "../checkpoints"}


def broken_checkpoint(run: Path, tiny: TinyRun) -> dict[str, Any]:
    path = run / "checkpoints" / "step-0000004" / TRAINED_NAME
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    return {"checkpoint": "step-0000004"}


def other_base(run: Path, tiny: TinyRun) -> dict[str, Any]:
    edit_json(run / "run.json", base_sha256="0" * 64)
    return {}


def other_tokenizer(run: Path, tiny: TinyRun) -> dict[str, Any]:
    edit_json(run / "processor" / "tokenizer_config.json", padding_side="left")
    return {}


def broken_metrics(run: Path, tiny: TinyRun) -> dict[str, Any]:
    path = run / "metrics.jsonl"
    path.write_text("nothing\n" + path.read_text())
    return {}


def no_metrics(run: Path, tiny: TinyRun) -> dict[str, Any]:
    (run / "metrics.jsonl").unlink()
    return {}


def no_table(run: Path, tiny: TinyRun) -> dict[str, Any]:
    return {"pairs": run / "pairs.parquet"}


def table_without_pictures(run: Path, tiny: TinyRun) -> dict[str, Any]:
    write_pairs(run / "pairs.parquet", [Pair("1", "c", None, None, "the umbrella", "ice")])
    return {"pairs": run / "pairs.parquet"}


def table_that_does_not_fit(run: Path, tiny: TinyRun) -> dict[str, Any]:
    write_pairs(run / "pairs.parquet", [Pair("1", "c", None, None, "umbrella " * 500, "ice")])
    return {"pairs": run / "pairs.parquet"}


def no_evaluation(run: Path, tiny: TinyRun) -> dict[str, Any]:
    return {"evaluation": run / "run.json"}


def evaluation_of_a_server(run: Path, tiny: TinyRun) -> dict[str, Any]:
    (run / "report.json").write_text(as_json(make_evaluation(kind="server", name="http://host:8000")))
    return {"evaluation": run / "report.json"}


def evaluation_of_unknown_weights(run: Path, tiny: TinyRun) -> dict[str, Any]:
    (run / "report.json").write_text(as_json(make_evaluation()))
    return {"evaluation": run / "report.json"}


def evaluation_on_the_training_table(run: Path, tiny: TinyRun) -> dict[str, Any]:
    found = make_evaluation(weights_sha256="0" * 64)
    table = replace(found.inputs["pairs"], sha256=file_sha256(tiny.data / "pairs_train.parquet"))
    (run / "report.json").write_text(as_json(replace(found, inputs={"pairs": table})))
    return {"evaluation": run / "report.json"}


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (no_run, ExportRefused, "not a training run"),
        (half_a_description, ExportRefused, "run.json: not the description of a training run"),
        (wrong_recipe, ExportRefused, "run.json: not the description of a training run"),
        (no_checkpoint, ExportRefused, "no whole checkpoint"),
        (unknown_checkpoint, ExportRefused, "step-0000003: no such checkpoint; there are step-0000002, step-0000004"),
        (outside_checkpoint, ExportRefused, "no such checkpoint"),
        (broken_checkpoint, ExportRefused, "step-0000004: a broken checkpoint: trained.safetensors has changed"),
        (other_base, ExportRefused, f"not the base this run began with: expected sha256 {'0' * 64}"),
        (other_tokenizer, ExportRefused, "tokenizer_config.json: not the file this run was trained with"),
        (broken_metrics, ExportRefused, "metrics.jsonl, line 1: no metrics of a step"),
        (no_metrics, ExportRefused, "metrics.jsonl: cannot be read"),
        (no_table, DataInvalid, "pairs.parquet: no such file"),
        (table_without_pictures, ArtifactInvalid, "no pair with a picture that a server takes"),
        (table_that_does_not_fit, DataInvalid, "no pair fits the model: {'caption_too_long': 1}"),
        (no_evaluation, EvaluationInvalid, "run.json: not the report.json of an evaluation"),
        (evaluation_of_a_server, ExportRefused, "measured the server http://host:8000; evaluate the artifact itself"),
        (evaluation_of_unknown_weights, ExportRefused, "does not say which weights it measured"),
        (evaluation_on_the_training_table, ExportRefused, "somewhere/pairs_test.parquet are the training table of"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_is_one_line_and_leaves_nothing(
    fault: Callable[[Path, TinyRun], dict[str, Any]], kind: type[PunchlineError], words: str, own_run: Path, tiny: TinyRun, tmp_path: Path
) -> None:
    options = fault(own_run, tiny)
    with pytest.raises(kind) as raised:
        export(own_run, tmp_path / "out", tiny, **options)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert left_in(tmp_path) == {"run"}


def test_a_text_only_base_refuses_pictures(tiny: TinyRun, tmp_path: Path) -> None:
    text = write_text_run(tmp_path)
    text.train(tmp_path / "run", run={"max_steps": 1})
    with pytest.raises(DataInvalid, match=r"has pictures, and .* is a text-only base"):
        export(tmp_path / "run", tmp_path / "out", tiny)


def test_weights_that_do_not_fit_the_recipe(own_run: Path, tiny: TinyRun, tmp_path: Path) -> None:
    folder = own_run / "checkpoints" / "step-0000004"
    tensors = load_file(folder / TRAINED_NAME)
    tensors.pop(min(tensors))
    save_file(tensors, folder / TRAINED_NAME)
    seal = json.loads((folder / "complete.json").read_bytes())
    edit_json(folder / "complete.json", files=seal["files"] | {TRAINED_NAME: file_sha256(folder / TRAINED_NAME)})
    with pytest.raises(ExportRefused, match=r"step-0000004: does not fit the run's recipe .*1 weights are missing"):
        export(own_run, tmp_path / "out", tiny)


def test_a_broken_newest_checkpoint_is_passed_over(own_run: Path, tiny: TinyRun, tmp_path: Path) -> None:
    broken_checkpoint(own_run, tiny)
    assert open_artifact(str(export(own_run, tmp_path / "out", tiny))).config.training["step"] == 2


def test_an_existing_target_is_left_alone(run: Path, tiny: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("out", "link"):
        with pytest.raises(ExportRefused, match="exists already"):
            export(run, tmp_path / name, tiny)
    assert left_in(tmp_path) == {"out", "link"}
    assert left_in(tmp_path / "out") == set()


def interrupted(partial: Path) -> Proof:
    assert (partial / HEAD_NAME).is_file()
    raise KeyboardInterrupt


def disk_full(partial: Path) -> Proof:
    raise OSError(28, "No space left on device", str(partial / "golden.json"))


def other_head(partial: Path) -> Proof:
    """A head that is written other than it was trained."""
    edit_tensors(partial / HEAD_NAME, lambda tensors: tensors["weight"].neg_())
    write_config(partial, RewardModelConfig.model_validate_json((partial / CONFIG_NAME).read_bytes()))
    return prove(partial)


def rounded_away(partial: Path) -> Proof:
    """A device whose bfloat16 is another model."""
    proof = prove(partial)
    return replace(proof, differences=proof.differences | {"bfloat16": 5.0})


@pytest.mark.parametrize(
    ("crash", "kind", "words"),
    [
        (rounded_away, ArtifactInvalid, "golden scores in bfloat16 differ by 5.00e+00"),
        (interrupted, KeyboardInterrupt, ""),
        (disk_full, ExportFailed, "could not be written (No space left on device); nothing of it was kept"),
        (other_head, ArtifactInvalid, "golden scores in float32 differ"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_crash_in_the_middle_leaves_nothing(
    crash: Callable[[Path], Proof], kind: type[BaseException], words: str, run: Path, tiny: TinyRun, tmp_path: Path
) -> None:
    with pytest.raises(kind) as raised:
        export(run, tmp_path / "out", tiny, prove=crash)
    assert words in str(raised.value)
    assert left_in(tmp_path) == set()


def test_a_full_disk_ends_with_one_line(run: Path, tiny: TinyRun, tmp_path: Path) -> None:
    """No file may grow beyond ten thousand bytes: neither the tokenizer nor the adapter fits."""
    command = [sys.executable, "-m", "tests.training.limited", "10000", "training.export", str(run)]
    command += ["--out", str(tmp_path / "out"), "--pairs", str(table_of(tiny))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "500"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == ExportFailed.exit_code
    assert done.stderr.splitlines() == [f"refused: {tmp_path / 'out'}: could not be written (File too large); nothing of it was kept"]
    assert left_in(tmp_path) == set()


def test_the_fresh_process_says_what_it_found(exported: Path, tmp_path: Path) -> None:
    proof = prove_in_fresh_process(exported)
    assert proof.differences["float32"] < 1e-5 < proof.differences["bfloat16"] < 0.1
    assert len(proof.fingerprint) == 64
    assert proof.takes_images
    copy = shutil.copytree(exported, tmp_path / "artifact")
    (copy / HEAD_NAME).unlink()
    with pytest.raises(ArtifactInvalid, match=r"a fresh process could not load the artifact \(exit code 3\): .*missing"):
        prove_in_fresh_process(copy)


def test_a_difference_that_could_swap_captions_is_a_fault_however_small_the_scores(exported: Path, tmp_path: Path) -> None:
    """A head of a ten-thousandth: its scores spread by 3e-5, so that even the wrong sign is within the absolute tolerance of 1e-4."""
    copy = shutil.copytree(exported, tmp_path / "artifact")
    edit_tensors(copy / HEAD_NAME, lambda tensors: tensors["weight"].mul_(-1e-4))
    golden = json.loads((copy / "golden.json").read_bytes())
    items = [item | {"scores": [score * 1e-4 for score in item["scores"]]} for item in golden["items"]]
    edit_json(copy / "golden.json", items=items)
    write_config(copy, RewardModelConfig.model_validate_json((copy / CONFIG_NAME).read_bytes()))
    with pytest.raises(ArtifactInvalid, match="golden scores in float32 differ"):
        prove(copy)


class FakeHub:
    """Remembers what it was sent."""

    def __init__(self) -> None:
        self.sent: dict[str, set[str]] = {}

    def upload(self, folder: Path, repo: str) -> str:
        self.sent[repo] = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        return f"https://hub.example/{repo}"


def test_a_whole_artifact_is_sent(run: Path, tiny: TinyRun, tmp_path: Path) -> None:
    hub = FakeHub()
    artifact = export(run, tmp_path / "whole", tiny, embed_base=True)
    assert push_artifact(artifact, "me/umbrellas", hub) == "https://hub.example/me/umbrellas"
    assert {CONFIG_NAME, "README.md", "base/model.safetensors", "golden/0.png"} <= hub.sent["me/umbrellas"]


class RecordingApi(HfApi):
    """Sends nothing; keeps what the Hub would be asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[str, Any] = {}

    def create_repo(self, repo_id: str, **options: Any) -> str:  # type: ignore[override]
        return f"https://hub.example/{repo_id}"

    def upload_folder(self, **options: Any) -> None:  # type: ignore[override]
        self.asked = options


def test_one_commit_replaces_everything_a_repository_held(exported: Path) -> None:
    api = RecordingApi()
    assert HuggingFaceHub(api).upload(exported, "me/umbrellas") == "https://hub.example/me/umbrellas"
    assert (api.asked["folder_path"], api.asked["delete_patterns"]) == (exported, "*")


def test_a_folder_with_the_name_of_a_bundled_artifact_is_the_folder(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundled demo would be sent; ours is refused for its base."""
    shutil.copytree(exported, tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportRefused, match="a directory of this machine"):
        push_artifact(Path("demo"), "me/umbrellas", FakeHub())


@pytest.mark.parametrize("repo", ["umbrellas", "a/b/c", "me/", "../me", "me/umb rellas"])
def test_a_repository_has_an_owner(repo: str, exported: Path) -> None:
    hub = FakeHub()
    with pytest.raises(ExportRefused, match="not the name of a Hub repository"):
        push_artifact(exported, repo, hub)
    assert hub.sent == {}


def test_an_artifact_that_only_this_machine_can_load_is_not_sent(exported: Path) -> None:
    hub = FakeHub()
    with pytest.raises(ExportRefused, match="a directory of this machine; export it with --embed-base"):
        push_artifact(exported, "me/umbrellas", hub)
    assert hub.sent == {}


def test_the_command_line_refuses_in_one_line(run: Path, tiny: TinyRun, tmp_path: Path) -> None:
    arguments = [str(run), "--out", str(tmp_path / "out"), "--pairs", str(table_of(tiny)), "--checkpoint", "step-0000009"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == ExportRefused.exit_code == 3
    assert "no such checkpoint" in result.stderr.replace("\n", " ")
    assert left_in(tmp_path) == set()


def test_a_refusal_shows_paths_that_look_like_markup(tiny: TinyRun, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [str(tmp_path / "[/red]"), "--out", str(tmp_path / "out"), "--pairs", str(table_of(tiny))])
    assert result.exit_code == 3
    assert "[/red]: not a training run" in result.stderr.replace("\n", "")
