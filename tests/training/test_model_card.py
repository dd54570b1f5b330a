"""The model card: a header the Hub reads, a table for everything, figures as the files have them, plots that are pictures."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app.artifacts import Calibration, RewardModelConfig, ScoreDistribution
from training.controls import LENGTH, compared, skipped
from training.golden import Proof
from training.model_card import CardFacts, EvaluationInvalid, as_markdown, draw_plots, read_evaluation, write_card
from training.report import Coverage, Evaluation, Input, PairFigures, Reliability, as_json
from training.scorers import Target
from training.statistics import Bootstrap, agreement, by_contest, by_sigma, calibration, fit_temperature, histogram

MARGINS = [1.0, -1.0, 2.0, 2.0]
CONTESTS = ["a", "a", "a", "b"]
PROOF = Proof({"float32": 1.5e-7, "bfloat16": 0.015}, "f" * 64, "float32", "cpu", takes_images=True)
METRICS = [
    {"step": 1, "loss": 0.69, "accuracy": 0.5},
    {"step": 2, "loss": 0.5, "accuracy": 1.0},
    {"step": 2, "validation_loss": 0.25, "validation_accuracy": 0.75, "validation_num_pairs": 4},
]
TABLE = {"sha256": "0" * 64, "in_table": 1234, "drawn": 99, "used": 90, "left_out": {"caption_too_long": 9}, "contests": 7}


def make_evaluation(**target: Any) -> Evaluation:
    """Three of four margins above zero, in two contests with 2/3 and 1/1: pooled accuracy 0.75, mean of contests 5/6."""
    bootstrap = Bootstrap(num_draws=50, seed=0)
    temperature = fit_temperature(MARGINS)
    control = compared(LENGTH, np.array(MARGINS), np.array([1.0, 1.0, -1.0, -1.0]), CONTESTS, bootstrap)
    pairs = PairFigures(
        coverage=Coverage(5, 4, 10, {"caption_too_long": 1}, ("lost",)),
        agreement=agreement(MARGINS, CONTESTS, bootstrap),
        contests=tuple(by_contest(MARGINS, CONTESTS)),
        buckets=tuple(by_sigma(MARGINS, [3.5, 4.5, 3.5, None], CONTESTS, bootstrap)),
        margins=histogram(MARGINS),
        reliability=(Reliability("as it is", 1.0, calibration(MARGINS), 0.5),),
        temperature=temperature,
        controls=(control, skipped("shuffled images", "one image only")),
    )
    values = {"name": "model", "kind": "artifact", "fingerprint": "e" * 64, "dtype": "float32", "device": "cpu"}
    values |= {"default_prompt": "Go.", "fixed_prompt": False, "temperature": 1.0, "takes_images": True} | target
    inputs = {"pairs": Input("somewhere/pairs_test.parquet", "1" * 64, 5, 2)}
    return Evaluation(Target(**values), inputs, {"seed": 0}, {"torch": "2"}, "2026-01-02T03:04:05+00:00", 1.5, pairs, None)


def make_facts(evaluation: Evaluation | None = None, **changes: Any) -> CardFacts:
    training = {
        "recipe": {"model": {"base": "owner/base", "template": "{prompt}|`{caption}`"}, "lora": {"r": 4}},
        "data": {"pairs_train.parquet": TABLE | {"with_cut_prompt": 3}},
        "versions": {"torch": "2.13.0"},
        "step": 2,
        "base": {"name": "owner/base", "revision": None, "sha256": "2" * 64},
        "golden_pairs": {"table": "pairs_validation.parquet", "sha256": "3" * 64},
        "metrics": {"training": METRICS[1], "validation": METRICS[2], "evaluation": None},
    }
    config = RewardModelConfig(
        base_model_name="owner/base",
        score_head_shape=(1, 8),
        description="Likes umbrellas.",
        training=training,
        calibration=Calibration(temperature=2.5),
        score_distribution=ScoreDistribution(mean=0.5, std=1.25),
    )
    facts = CardFacts("Likes umbrellas; rm -rf", "me/umbrellas", config.model_copy(update=changes), METRICS, evaluation, PROOF)
    return replace(facts, proof=replace(PROOF, takes_images="caption_role" not in changes))


def test_the_header_names_library_base_and_tags() -> None:
    lines = as_markdown(make_facts(), ()).splitlines()
    header = lines[1 : lines.index("---", 1)]
    assert lines[0] == "---"
    assert header[:3] == ["library_name: peft", 'base_model: "owner/base"', "base_model_relation: adapter"]
    assert "- reward-model" in header
    assert not any(line.startswith("pipeline_tag") for line in header)


def test_a_text_only_model_is_a_text_ranker_called_without_a_picture() -> None:
    card = as_markdown(make_facts(caption_role="raw", kind="full_head", base_model_name="./base"), ())
    assert "pipeline_tag: text-ranking" in card
    assert "base_model_relation: finetune" in card
    assert "image=@" not in card
    body = card.split("-d '")[1].split("'\n")[0]
    assert set(json.loads(body)) == {"prompt", "captions"}
    assert "It reads text only." in card


def test_it_says_how_to_serve_and_call() -> None:
    card = as_markdown(make_facts(), ())
    assert "punchline serve --model me/umbrellas\n" in card
    assert "curl -s http://127.0.0.1:8000/score -F image=@cartoon.png -F caption=" in card
    assert "sigmoid((score_a - score_b) / 2.5)" in card
    assert "score 0.5 on average, with a standard deviation of 1.25" in card


def test_a_title_is_no_place_and_stands_in_no_command() -> None:
    card = as_markdown(replace(make_facts(), repo=None, name="Punchline's <b>\nmodel"), ())
    assert "punchline serve --model path/to/artifact\n" in card
    assert "\n# Punchline's \\<b> model\n" in card
    assert card.count("Punchline's") == 1


def test_a_model_without_a_fitted_temperature_is_not_calibrated() -> None:
    assert "not calibrated" not in as_markdown(make_facts(), ())
    assert "It is not calibrated" in as_markdown(make_facts(calibration=Calibration()), ())


def test_an_evaluation_says_what_it_ignored_and_that_it_saw_the_validation_table() -> None:
    evaluation = make_evaluation(device="`</code>\n# x")
    card = as_markdown(make_facts(evaluation), ())
    assert "could be scored. " in card
    assert "watched" not in card
    assert "on ` </code> # x`" in card.replace("`</code>", "` </code>")
    facts = make_facts(replace(evaluation, arguments={"ignore_prompts": True}))
    facts.config.training["data"]["pairs_validation.parquet"] = TABLE | {"with_cut_prompt": 0, "sha256": "1" * 64}
    card = as_markdown(facts, ())
    assert "of 2 contests could be scored, with prompts ignored." in card
    assert "`pairs_validation.parquet` is the table that training was watched on" in card


def test_tables_hold_whatever_a_value_holds() -> None:
    """A bar would end a cell, a back quote the code."""
    card = as_markdown(make_facts(), ())
    assert '| model.template | `` "{prompt}\\|`{caption}`" `` |' in card
    assert "| lora.r | `4` |" in card
    assert f"| `pairs_train.parquet` | 1,234 | 99 | 90 | 7 | 9 caption_too_long | 3 | `{'0' * 64}` |" in card


def test_figures_are_those_of_the_files() -> None:
    evaluation = make_evaluation()
    card = as_markdown(make_facts(evaluation), draw_plots(make_facts(evaluation)))
    low, high = evaluation.pairs.agreement.pooled.interval.low, evaluation.pairs.agreement.pooled.interval.high  # type: ignore[union-attr]
    assert f"| accuracy, all pairs | 0.7500 | {low:.4f} to {high:.4f} |" in card
    assert "| accuracy, mean of contests | 0.8333 |" in card
    assert "4 of 5 pairs of 2 contests could be scored" in card
    assert "left out: one image only" in card
    assert "evaluated on 2 contests only" in card
    assert "Last validation figures, step 2: loss 0.25, accuracy 0.75, pairs 4." in card
    assert "1.5e-07 in float32 and 1.5e-02 in bfloat16" in card


def test_without_an_evaluation_it_says_so() -> None:
    card = as_markdown(make_facts(), ())
    assert "exported without an evaluation" in card
    assert "## Evaluation" not in card


def test_plots_are_pictures_and_the_card_shows_each(tmp_path: Path) -> None:
    write_card(tmp_path, make_facts(make_evaluation()))
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    names = {path.name for path in (tmp_path / "card").iterdir()}
    assert names == {f"{name}.png" for name in ("learning_curve", "accuracy_by_contest", "accuracy_by_gap", "margins", "calibration")}
    for name in names:
        assert f"](card/{name})" in card
        assert Image.open(io.BytesIO((tmp_path / "card" / name).read_bytes())).format == "PNG"


def test_a_report_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    evaluation = make_evaluation()
    path = tmp_path / "report.json"
    path.write_text(as_json(evaluation), encoding="utf-8")
    assert read_evaluation(path) == evaluation


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ("[]", "not the report.json of an evaluation"),
        ('{"report": "punchline evaluation", "schema_version": 99}', "expected schema_version 1, found 99"),
        ('{"report": "punchline evaluation", "schema_version": 1}', "target: "),
    ],
)
def test_another_file_is_refused_by_name(text: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(EvaluationInvalid, match=words) as raised:
        read_evaluation(path)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)
