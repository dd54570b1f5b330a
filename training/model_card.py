"""The model card of an artifact: README.md with the Hub's header, and its plots in card/. Every figure is one of a file."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pydantic import TypeAdapter, ValidationError

from app.artifacts import HeadSpec, RewardModelConfig
from app.errors import StartRefused
from training.golden import Proof
from training.plots import plot_best_of, plot_buckets, plot_calibration, plot_contests, plot_margins
from training.report import SCHEMA_VERSION, Evaluation, PairFigures
from training.statistics import Estimate

CARD_NAME = "README.md"
FOLDER = "card"
_FEW_CONTESTS = 10
_INK, _SOFT, _ACCENT = "#1d2430", "#8a94a3", "#2f5d8a"


class EvaluationInvalid(StartRefused):
    """A file that should hold the figures of an evaluation does not."""


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What the card tells; nothing is computed for it."""

    name: str  # the title
    repo: str | None  # the Hub repository it is sent to
    config: RewardModelConfig
    metrics: Sequence[dict[str, Any]]  # lines of metrics.jsonl
    evaluation: Evaluation | None
    proof: Proof


def read_evaluation(path: Path) -> Evaluation:
    """`report.json` of `python -m training.evaluate`. Raises EvaluationInvalid."""
    try:
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict) or values.get("report") != "punchline evaluation":
            raise EvaluationInvalid(f"{path}: not the report.json of an evaluation")
        if values.get("schema_version") != SCHEMA_VERSION:
            raise EvaluationInvalid(f"{path}: expected schema_version {SCHEMA_VERSION}, found {values.get('schema_version')}")
        return TypeAdapter(Evaluation).validate_python(values)
    except OSError as error:
        raise EvaluationInvalid(f"{path}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise EvaluationInvalid(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except ValueError:
        raise EvaluationInvalid(f"{path}: not JSON") from None


def write_card(root: Path, facts: CardFacts) -> None:
    """README.md and the plots it shows. Neither can change a score, so no hash of them is kept."""
    plots = draw_plots(facts)
    if plots:
        (root / FOLDER).mkdir(exist_ok=True)
    for name, png in plots.items():
        (root / FOLDER / f"{name}.png").write_bytes(png)
    (root / CARD_NAME).write_text(as_markdown(facts, plots), encoding="utf-8")


def draw_plots(facts: CardFacts) -> dict[str, bytes]:
    """PNG files by name, those only for which there are figures."""
    plots = {"learning_curve": plot_learning(facts.metrics)} if facts.metrics else {}
    if facts.evaluation is None:
        return plots
    pairs, captions = facts.evaluation.pairs, facts.evaluation.captions
    plots |= {
        "accuracy_by_contest": plot_contests(pairs.contests, pairs.agreement),
        "margins": plot_margins(pairs.margins),
        "calibration": plot_calibration(pairs.reliability),
    }
    if any(bucket.low is not None for bucket in pairs.buckets):
        plots["accuracy_by_gap"] = plot_buckets(pairs.buckets)
    if captions is not None and captions.best_of:
        plots["best_of_n"] = plot_best_of(captions.best_of)
    return plots


def plot_learning(metrics: Sequence[dict[str, Any]]) -> bytes:
    """Loss and accuracy over steps: of the training batches in grey, of the validation pairs in blue."""
    figure = Figure(figsize=(8.0, 3.4), layout="constrained")
    FigureCanvasAgg(figure)  # no display, whatever backend the machine is set to
    for axes, key in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for name, label, style in (
            (key, "training batches", {"color": _SOFT, "linewidth": 1.0}),
            (f"validation_{key}", "validation pairs", {"color": _ACCENT, "marker": "o"}),
        ):
            lines = [line for line in metrics if name in line]
            if lines:
                axes.plot([line["step"] for line in lines], [line[name] for line in lines], label=label, **style)
        axes.set_xlabel("step", color=_INK)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel(key, color=_INK)
        axes.grid(color="#e6e9ed")
        axes.legend(frameon=False, fontsize=8)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110, metadata={"Software": None})
    return png.getvalue()


def as_markdown(facts: CardFacts, plots: Iterable[str]) -> str:
    """The whole card."""
    sections = [
        _header(facts),
        f"# {_line(facts.name)}",
        facts.config.description,
        _what(facts.config),
        _serving(facts),
        _training(facts, plots),
        _data(facts.config.training["data"]),
        _evaluation(facts.evaluation, facts.config.training["data"], plots) if facts.evaluation else "",
        _limits(facts),
        _origin(facts),
    ]
    return "\n\n".join(section.strip("\n") for section in sections if section) + "\n"


def _header(facts: CardFacts) -> str:
    """The YAML that the Hub reads; a JSON string is a YAML string."""
    config = facts.config
    lines = ["library_name: peft" if config.kind == "lora_head" else "library_name: transformers"]
    base = config.training["base"]["name"]
    if _is_hub_id(base):
        lines += [f"base_model: {json.dumps(base)}", f"base_model_relation: {'adapter' if config.kind == 'lora_head' else 'finetune'}"]
    if not facts.proof.takes_images:
        lines.append("pipeline_tag: text-ranking")
    return "\n".join(["---", *lines, "tags:", "- reward-model", "- preference", "- punchline", "---"])


def _what(config: RewardModelConfig) -> str:
    temperature = config.calibration.temperature
    margin = "score_a - score_b" if temperature == 1 else f"(score_a - score_b) / {temperature:.4g}"
    lines = [
        "A reward model that gives every caption of a prompt, and of an image where it takes one, a single number. Only differences of "
        f"its scores mean anything: P(a preferred to b) = sigmoid({margin}).",
    ]
    if config.head.layers == "two_layer":
        lines.append(
            f"Its head has two layers with {config.head.width:,} values and {config.head.activation} between them{_biases(config.head)}."
        )
    elif config.head.bias:
        lines.append(f"Its head is one linear layer{_biases(config.head)}.")
    if temperature == 1:
        lines.append("It is not calibrated: no temperature was fitted to its margins, so that probability may be far off.")
    if config.score_distribution is not None:
        spread = config.score_distribution
        lines.append(
            f"Captions of `{config.training['golden_pairs']['table']}` score {spread.mean:.4g} on average, "
            f"with a standard deviation of {spread.std:.4g}."
        )
    return " ".join(lines)


def _biases(head: HeadSpec) -> str:
    return ", with biases, the last of which moves all scores alike" if head.bias else ""


def _serving(facts: CardFacts) -> str:
    base = facts.config.base_model_name
    where = "" if base.startswith("./") else f"\n\nThe base `{base}` is loaded besides; `--base-model` names another place it lies in."
    return f"## Use\n\n```\npunchline serve --model {facts.repo or 'path/to/artifact'}\n```\n\n```\n{_curl(facts)}\n```{where}"


def _curl(facts: CardFacts) -> str:
    captions = ("And this is where we keep the interns.", "He is only here for the coffee.")
    if facts.proof.takes_images:
        forms = " ".join(f'-F caption="{caption}"' for caption in captions)
        return f"curl -s http://127.0.0.1:8000/score -F image=@cartoon.png {forms}"
    body = ({} if facts.config.prompt_policy == "fixed" else {"prompt": "Where do the interns sit?"}) | {"captions": captions}
    return f"curl -s http://127.0.0.1:8000/score -H 'Content-Type: application/json' -d '{json.dumps(body)}'"


def _training(facts: CardFacts, plots: Iterable[str]) -> str:
    training = facts.config.training
    rows = [(name, _code(value)) for name, value in _flat(training["recipe"])]
    parts = [f"## Training\n\nCheckpoint of step {training['step']}.", _table(("recipe", "value"), rows)]
    for kind in ("training", "validation"):
        if line := training["metrics"][kind]:
            values = {name.removeprefix("validation_").removeprefix("num_"): value for name, value in line.items() if name != "step"}
            figures = ", ".join(f"{name} {_number(value)}" for name, value in values.items())
            parts.append(f"Last {kind} figures, step {line['step']}: {figures}.")
    return "\n\n".join([*parts, *_picture("learning_curve", "Loss and accuracy by step", plots)])


def _data(tables: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, table in tables.items():
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in table["left_out"].items()) or "none"
        counts = (f"{table[key]:,}" for key in ("in_table", "drawn", "used", "contests"))
        rows.append((f"`{name}`", *counts, left_out, f"{table['with_cut_prompt']:,}", f"`{table['sha256']}`"))
    head = ("table", "pairs", "drawn", "used", "contests", "left out", "used with a cut prompt", "sha256")
    return f"## Data\n\n{_table(head, rows)}"


def _evaluation(evaluation: Evaluation, tables: dict[str, dict[str, Any]], plots: Iterable[str]) -> str:
    pairs, target = evaluation.pairs, evaluation.target
    counts = f"{pairs.coverage.num_scored:,} of {pairs.coverage.num_pairs:,} pairs of {pairs.agreement.pooled.num_contests} contests"
    ignored = f", with {' and '.join(evaluation.ignored)} ignored" if evaluation.ignored else ""
    origin = f"Evaluated: {_span(target.fingerprint)}, {_span(target.dtype)} on {_span(target.device)}, {_span(evaluation.finished)}."
    inputs = " ".join(f"{name} {_span(Path(table.path).name)}, sha256 {_span(table.sha256)}." for name, table in evaluation.inputs.items())
    words = f"{counts} could be scored{ignored}. Intervals are 95 % and resample contests, since pairs of one contest are not independent."
    watched = [name for name, table in tables.items() if table["sha256"] in {each.sha256 for each in evaluation.inputs.values()}]
    if watched:
        inputs += f" {_span(watched[0])} is the table that training was watched on, so the figures may flatter."
    pictures = [
        *_picture("accuracy_by_contest", "Accuracy by contest", plots),
        *_picture("accuracy_by_gap", "Accuracy by how sure the crowd is", plots),
        *_picture("margins", "Margins", plots),
        *_picture("calibration", "Calibration", plots),
        *_picture("best_of_n", "Choosing the best of n", plots),
    ]
    table = _table(("figure", "value", "95 % interval"), _figures(evaluation))
    return "\n\n".join([f"## Evaluation\n\n{words} {origin} {inputs}", table, *pictures])


def _figures(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    pairs = evaluation.pairs
    rows = [("accuracy, all pairs", *_estimate(pairs.agreement.pooled)), ("accuracy, mean of contests", *_estimate(pairs.agreement.macro))]
    rows += _single_figures(pairs)
    for control in pairs.controls:
        if control.agreement is None or control.difference is None:
            rows.append((f"control: {control.name}", f"left out: {control.skipped}", ""))
            continue
        rows.append((f"control: {control.name}, {control.meaning}", *_estimate(control.agreement.pooled)))
        if control.guessing is not None:
            rows.append((f"control: {control.name}, a tie counted one half", *_estimate(control.guessing)))
        rows.append((f"model minus control: {control.name}, a tie counted one half", *_estimate(control.difference, signed=True)))
    for best in evaluation.captions.best_of if evaluation.captions else ():
        rows.append((f"best of {best.n}: mean crowd rating gained", *_estimate(best.gain, signed=True)))
    return rows


def _single_figures(pairs: PairFigures) -> list[tuple[str, str, str]]:
    outcomes, refused = pairs.agreement.outcomes, pairs.temperature.value is None
    return [
        ("ties, counted as no wins", f"{outcomes.ties:,}", ""),
        ("margin, mean and standard deviation", f"{outcomes.margin_mean:.4f} and {outcomes.margin_std:.4f}", ""),
        ("Bradley-Terry loss (ln 2 = 0.6931 knows nothing)", f"{outcomes.loss:.4f}", ""),
        ("fitted temperature", f"not calibrated: {pairs.temperature.refused}" if refused else _number(pairs.temperature.value), ""),
    ]


def _limits(facts: CardFacts) -> str:
    config = facts.config
    lines = [
        "Scores of different models, and of different images or prompts, do not compare.",
        f"A caption of more than {config.max_caption_tokens} tokens is refused; of a prompt the first {config.max_prompt_tokens} are read.",
        *_image_limits(facts),
        "It has the taste of the people behind its data, and knows captions and prompts of that kind only.",
        *_known_limits(facts.evaluation),
    ]
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _image_limits(facts: CardFacts) -> list[str]:
    edge = facts.config.image.long_edge
    if not facts.proof.takes_images:
        return ["It reads text only."]
    return [] if edge is None else [f"Images are shrunk to a long edge of {edge} pixels; smaller print is lost."]


def _known_limits(evaluation: Evaluation | None) -> list[str]:
    if evaluation is None:
        return ["It was exported without an evaluation: how well it agrees with people on new contests is not known."]
    num_contests = evaluation.pairs.agreement.pooled.num_contests
    few = f"It was evaluated on {num_contests} contests only; the intervals are themselves uncertain."
    return [few] if num_contests < _FEW_CONTESTS else []


def _origin(facts: CardFacts) -> str:
    training, proof = facts.config.training, facts.proof
    differences = " and ".join(f"{value:.1e} in {name}" for name, value in proof.differences.items())
    versions = ", ".join(f"{name} {value}" for name, value in training["versions"].items())
    return (
        f"## Origin\n\nBase sha256 `{training['base']['sha256']}`. Trained with {versions}. At export a fresh process loaded the files and "
        f"found the golden scores up to {differences}. Fingerprint in {proof.dtype} on {proof.device}: `{proof.fingerprint}`."
    )


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).is_dir()


def _flat(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _code(value: Any) -> str:
    """A value as JSON in code marks, on one line whatever it holds."""
    text = json.dumps(value, ensure_ascii=False)
    marks = "``" if "`" in text else "`"
    return f"{marks} {text} {marks}" if "`" in text else f"{marks}{text}{marks}"


def _line(text: str) -> str:
    """Somebody's words on one line, without marks that begin HTML or a link."""
    return " ".join(text.split()).translate({ord(mark): f"\\{mark}" for mark in "<[`"})


def _span(text: str) -> str:
    """Somebody's words as code, on one line: neither HTML nor Markdown."""
    return f"`{' '.join(text.replace('`', ' ').split())}`"


def _picture(name: str, title: str, plots: Iterable[str]) -> list[str]:
    return [f"![{title}]({FOLDER}/{name}.png)"] if name in plots else []


def _estimate(estimate: Estimate, *, signed: bool = False) -> tuple[str, str]:
    form = "+.4f" if signed else ".4f"
    interval = "none: one contest" if estimate.num_contests < 2 else "none"
    if estimate.interval is not None:
        interval = f"{estimate.interval.low:{form}} to {estimate.interval.high:{form}}"
    return format(estimate.value, form), interval


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"
