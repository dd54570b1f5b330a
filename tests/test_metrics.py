"""Every metric has a conventional name and help that is true, and is set somewhere."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from app.metrics import Metrics
from tests.fakes import sample

APP = Path(__file__).parents[1] / "app"
PARTS = {name: part for name, part in vars(Metrics()).items() if name != "registry"}
UNBOUNDED = {"request_id", "caption", "prompt", "image", "image_id", "key", "url", "path", "user"}
UNITS = re.compile(r"_(ms|millis|milliseconds|us|minutes|hours|kb|mb|kib|mib|percent|sec|secs)(_|$)")


def written_names() -> dict[str, list[str]]:
    """The names as `metrics.py` spells them, by the factory that makes them."""
    tree = ast.parse((APP / "metrics.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    names: dict[str, list[str]] = {"_counter": [], "_gauge": [], "_histogram": []}
    for call in calls:
        if call.func.attr in names:  # type: ignore[attr-defined]
            names[call.func.attr].append(ast.literal_eval(call.args[0]))  # type: ignore[attr-defined]
    return names


def uses() -> Iterator[ast.Attribute]:
    """`metrics.x` and `self._metrics.x` outside `metrics.py`."""
    for path in APP.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and path.name != "metrics.py":
                owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
                if owner in ("metrics", "_metrics"):
                    yield node


def test_every_attribute_is_a_metric() -> None:
    assert all(isinstance(part, Counter | Gauge | Histogram) for part in PARTS.values())
    assert len(PARTS) == sum(map(len, written_names().values()))


def test_counters_and_only_counters_end_in_total() -> None:
    names = written_names()
    assert all(name.endswith("_total") for name in names["_counter"])
    assert not any(name.endswith("_total") for name in names["_gauge"] + names["_histogram"])


@pytest.mark.parametrize("name", [name for group in written_names().values() for name in group])
def test_names_are_conventional(name: str) -> None:
    assert re.fullmatch(r"(reward|http_server)_[a-z]+(_[a-z]+)*", name)
    assert not UNITS.search(name), "base units only: seconds, bytes"


@pytest.mark.parametrize("name", sorted(PARTS))
def test_labels_are_few_and_bounded(name: str) -> None:
    labels = PARTS[name]._labelnames
    assert not UNBOUNDED & set(labels)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", label) for label in labels)


@pytest.mark.parametrize("name", sorted(PARTS))
def test_help_is_a_sentence(name: str) -> None:
    (family,) = PARTS[name].describe()
    assert re.fullmatch(r"[A-Z0-9].+\.", family.documentation)


@pytest.mark.parametrize("name", sorted(PARTS))
def test_no_metric_is_dead(name: str) -> None:
    assert name in {node.attr for node in uses()}


def test_nothing_unknown_is_used() -> None:
    properties = {name for name, part in vars(Metrics).items() if isinstance(part, property)}
    assert {node.attr for node in uses()} <= set(vars(Metrics())) | properties


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("items", {"scored", "null", "client_error", "rejected", "failed", "cancelled"}),
        ("batches", {"ok", "split", "failed"}),
        ("tokens", {"requested", "computed", "cached"}),
        ("stage_duration", {"fetch", "decode", "encode", "queue", "forward"}),
        ("requests", {"ok", "client_error", "rejected", "failed", "cancelled"}),
        ("rejected", {"overloaded", "draining", "deadline_exceeded"}),
    ],
)
def test_help_names_the_labels_values(name: str, values: set[str]) -> None:
    (family,) = PARTS[name].describe()
    listed = family.documentation.partition(":")[2]
    assert set(re.findall(r"[a-z_]+", re.sub(r"\(.*?\)", "", listed))) == values


def test_label_values_written_in_the_code_are_in_the_help() -> None:
    for path in APP.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "labels":
                metric = PARTS.get(getattr(node.func.value, "attr", ""))
                texts = [each.value for each in node.args if isinstance(each, ast.Constant)]
                assert metric is None or all(text in metric.describe()[0].documentation for text in texts), (path.name, texts)


def test_two_servers_in_one_process_do_not_collide() -> None:
    one, other = Metrics(), Metrics()
    one.nonfinite.labels("demo").inc()
    assert sample(one, "reward_nonfinite_total") == 1
    assert sample(other, "reward_nonfinite_total") == 0


def test_the_exposition_can_be_read_back() -> None:
    metrics = Metrics()
    metrics.items.labels("demo", "scored").inc(3)
    families = {family.name: family for family in text_string_to_metric_families(generate_latest(metrics.registry).decode())}
    (sample,) = [each for each in families["reward_items"].samples if each.name == "reward_items_total"]
    assert (sample.labels, sample.value) == ({"model": "demo", "outcome": "scored"}, 3)
    assert "process_cpu_seconds" in families
