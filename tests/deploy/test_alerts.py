"""The alert rules ask for what the server has, say what to do, and each fires and keeps silent over series in alerts_test.yml.

With Prometheus' own `promtool` on the path or beside Python its verdict is asked too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.api.middleware import COUNTED_ROUTES
from app.runs import LIMITS
from app.settings import PREFIX, Settings
from tests.deploy.test_deploy import DEPLOY, FLUSH_S, ROOT, SETTINGS, TARGET_LABELS, compose, expression_faults, metric_names, series

RULES = DEPLOY / "alerts.yml"
CASES = DEPLOY / "alerts_test.yml"
SEVERITIES = {"critical", "warning"}
HIDDEN_LABELS = {"http_response_status_code"}  # its values are numbers, written nowhere in the code
SERIES_NAME = re.compile(r"([a-zA-Z_:][\w:]*)\{(.*)\}")

# What has to be watched, and by which rules. Two things are asked otherwise than an engine that hides less would be: no caption is
# ever cut, so captions refused as too long stand for truncated ones; a device fault ends the process, so a restart is watched beside it.
WATCHED = {
    "scores that are not finite": {"PunchlineNonfiniteScore"},
    "broken accounts": {"PunchlineAccountingBroken"},
    "golden scores": {"PunchlineGoldenDrift", "PunchlineGoldenStale"},
    "a dead batch loop": {"PunchlineBatcherDead", "PunchlineUnreachable"},
    "another model": {"PunchlineModelChanged"},
    "callers near their timeout": {"PunchlineNearTimeout"},
    "refused requests": {"PunchlineRejecting"},
    "a collapse of the scores": {"PunchlineSpreadCollapsed", "PunchlineScoresShifted"},
    "training runs that hack their reward": {"PunchlineRunWithoutSpread", "PunchlineRunScoresLength", "PunchlineRunDrift"},
    "captions that become too long": {"PunchlineCaptionsTooLong"},
    "caches": {"PunchlineCacheMismatch"},
    "a broken device": {"PunchlineDeviceFault", "PunchlineRestarted"},
    "a drain without an end": {"PunchlineDrainStuck"},
}


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}
RECORDED = {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}


def recorded_series() -> dict[str, set[str]]:
    """What the rules record, with the labels each keeps."""
    return {name: kept_labels(expression) for name, expression in RECORDED.items()}


def kept_labels(expression: str) -> set[str]:
    """Labels of a rule's result: those its outermost aggregation keeps, else those of its series."""
    grouped = re.search(r"\bby\s*\(([^)]*)\)", expression)
    if grouped:
        return {label.strip() for label in grouped[1].split(",")} - {"le"}
    scraped, recorded = series(), recorded_series_of(expression)
    found = set().union(*(scraped.get(name, set()) | recorded.get(name, set()) for name in metric_names(expression)))
    return found if recorded else found | TARGET_LABELS


def recorded_series_of(expression: str) -> dict[str, set[str]]:
    return {name: kept_labels(RECORDED[name]) for name in metric_names(expression) & RECORDED.keys()}


def rule_faults(rule: dict[str, Any]) -> list[str]:
    """What an alert rule says that is not so, or does not say."""
    annotations = rule.get("annotations", {})
    faults = expression_faults(rule["expr"], recorded=recorded_series())
    faults += [f"no {name}" for name in ("summary", "description") if not annotations.get(name)]
    faults += [] if rule.get("labels", {}).get("severity") in SEVERITIES else ["no severity"]
    shown = set(re.findall(r"\$labels\.(\w+)", " ".join(annotations.values())))
    faults += [f"it names the label {label}, which is not kept" for label in sorted(shown - kept_labels(rule["expr"]))]
    named = re.findall(rf"{PREFIX}[\w*]+", " ".join(annotations.values()))
    faults += [f"no setting {name}" for name in named if not any(fnmatch(setting, name) for setting in SETTINGS)]
    return faults + [f"nothing in the server is called {value}" for value in matched_values(rule["expr"]) if f'"{value}"' not in SOURCE]


def matched_values(expression: str) -> list[str]:
    """Every label value an expression asks for by name; jobs are Prometheus' own."""
    matchers = re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"', expression)
    return [value for label, values in matchers if label not in {"job", *HIDDEN_LABELS} for value in values.split("|")]


SOURCE = "\n".join(path.read_text() for path in sorted((ROOT / "app").rglob("*.py")))


def ground(expression: str) -> set[str]:
    """The server's metrics behind an expression, through what is recorded."""
    names = metric_names(expression)
    return (names - RECORDED.keys()).union(*(ground(RECORDED[name]) for name in names & RECORDED.keys()))


def cases() -> list[dict[str, Any]]:
    tests: list[dict[str, Any]] = yaml.safe_load(CASES.read_text())["tests"]
    return tests


def labels_of(text: str) -> dict[str, str]:
    return dict(re.findall(r'(\w+)="([^"]*)"', text))


def targets(case: dict[str, Any], metrics: set[str], by: set[str]) -> set[tuple[str, ...]]:
    """The servers, or runs, of a case that have one of these metrics."""
    found = [(match[1], labels_of(match[2])) for entry in case["input_series"] if (match := SERIES_NAME.fullmatch(entry["series"]))]
    return {tuple(labels[label] for label in sorted(by)) for name, labels in found if name in metrics}


def fired(case: dict[str, Any], alert: str, by: set[str]) -> Iterator[set[tuple[str, ...]]]:
    """At each moment a case looks: the servers, or runs, an alert is expected to name."""
    for look in case["promql_expr_test"]:
        found = [labels_of(sample["labels"]) for sample in look["exp_samples"]]
        yield {tuple(labels[label] for label in sorted(by)) for labels in found if labels["alertname"] == alert}


def case_faults(alert: str, rule: dict[str, Any], known_cases: list[dict[str, Any]]) -> list[str]:
    """An alert has a case that says when it does not fire yet, over what it fires, and beside it over what it never does."""
    by = kept_labels(rule["expr"]) & TARGET_LABELS
    for case in known_cases:
        moments = list(fired(case, alert, by))
        ever = set().union(*moments)
        if ever:
            silent = targets(case, ground(rule["expr"]), by) - ever
            faults = {"no moment without it": set() not in moments and "info" not in rule["expr"], "nothing silent beside it": not silent}
            return [fault for fault, found in faults.items() if found]
    return ["it never fires"]


def test_every_danger_has_its_rule_and_every_rule_its_danger() -> None:
    """`promtool` refuses duplicate names only within a group, hence the count."""
    named = [rule["alert"] for rule in rules() if "alert" in rule]
    assert len(set(named)) == len(named)
    assert set().union(*WATCHED.values()) == set(named)


@pytest.mark.parametrize("alert", ALERTS)
def test_a_rule_asks_for_what_the_server_has_and_says_what_to_do(alert: str) -> None:
    assert rule_faults(ALERTS[alert]) == []


@pytest.mark.parametrize("name", RECORDED)
def test_what_is_recorded_exists(name: str) -> None:
    assert expression_faults(RECORDED[name], recorded=recorded_series()) == []


@pytest.mark.parametrize("alert", ALERTS)
def test_a_rule_is_shown_to_fire_and_to_keep_silent(alert: str) -> None:
    assert case_faults(alert, ALERTS[alert], cases()) == []


def test_cases_have_only_series_that_exist() -> None:
    known = series()
    for case in cases():
        for entry in case["input_series"]:
            match = SERIES_NAME.fullmatch(entry["series"])
            assert match, entry
            assert set(labels_of(match[2])) <= known[match[1]] | TARGET_LABELS, entry


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"expr": "reward_nonfinite > 0"}, "no metric reward_nonfinite"),
        ({"expr": "sum by (job, instance, cache) (reward_nonfinite_total) > 0"}, "no metric here has the label cache"),
        ({"expr": 'reward_errors_total{code="caption_too_wide"} > 0'}, "nothing in the server is called caption_too_wide"),
        ({"expr": "job:reward_score:median > 0"}, "no metric job:reward_score:median"),
        ({"labels": {"severity": "bad"}}, "no severity"),
        ({"annotations": {"summary": "x"}}, "no description"),
        ({"annotations": {"summary": "{{ $labels.cache }}", "description": "x"}}, "it names the label cache, which is not kept"),
        ({"annotations": {"summary": "x", "description": "Set PUNCHLINE_CACHES=0."}}, "no setting PUNCHLINE_CACHES"),
    ],
)
def test_a_faulty_rule_is_seen(change: dict[str, Any], fault: str) -> None:
    assert rule_faults({**ALERTS["PunchlineDrainStuck"], **change}) == [fault]


def test_a_rule_without_its_cases_is_seen() -> None:
    rule = {"expr": "sum by (instance) (reward_nonfinite_total) > 0"}
    bad, good = ({"series": f'reward_nonfinite_total{{instance="{name}"}}'} for name in ("bad", "good"))
    never, now = {"exp_samples": []}, {"exp_samples": [{"labels": '{alertname="A", instance="bad"}'}]}
    assert case_faults("A", rule, [{"input_series": [bad, good], "promql_expr_test": [never]}]) == ["it never fires"]
    assert case_faults("A", rule, [{"input_series": [bad], "promql_expr_test": [never, now]}]) == ["nothing silent beside it"]
    assert case_faults("A", rule, [{"input_series": [bad, good], "promql_expr_test": [now]}]) == ["no moment without it"]
    assert case_faults("A", rule, [{"input_series": [bad, good], "promql_expr_test": [never, now]}]) == []


def test_limits_follow_from_the_settings() -> None:
    settings = {name: field.default for name, field in Settings.model_fields.items()}
    near, stuck = ALERTS["PunchlineNearTimeout"], ALERTS["PunchlineDrainStuck"]
    assert float(near["expr"].rpartition(">")[2]) == 0.8 * settings["default_timeout_ms"] / 1000
    assert set(matched_values(near["expr"])) == COUNTED_ROUTES - {"/images", "/selftest"}  # those that callers wait for
    assert int(stuck["for"].removesuffix("s")) > settings["drain_notice_s"] + settings["drain_s"] + FLUSH_S
    assert int(re.findall(r"> (\d+)\s", ALERTS["PunchlineGoldenStale"]["expr"])[0]) > settings["canary_s"]


def test_limits_of_a_run_are_those_of_its_page() -> None:
    limits = {"PunchlineRunWithoutSpread": "flat_share", "PunchlineRunScoresLength": "length_correlation", "PunchlineRunDrift": "drift"}
    for alert, name in limits.items():
        found = {abs(float(number)) for number in re.findall(r"[<>]=? (-?[\d.]+)", ALERTS[alert]["expr"])}
        assert found == {LIMITS[name], LIMITS["min_captions"]}


def test_prometheus_loads_the_rules_that_compose_mounts() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    mounts = dict(entry.split(":")[:2] for entry in compose("compose.yaml")["services"]["prometheus"]["volumes"] if entry.startswith("."))
    beside = Path(mounts["./prometheus.yml"]).parent
    assert config["rule_files"] == [RULES.name]
    assert Path(mounts[f"./{RULES.name}"]) == beside / RULES.name
    assert {rule["expr"].count('job="') for rule in ALERTS.values()} == {0, 1}
    jobs = {job["job_name"] for job in config["scrape_configs"]}
    assert {job for rule in ALERTS.values() for job in re.findall(r'job="([^"]*)"', rule["expr"])} == jobs


@pytest.fixture
def promtool() -> str:
    found = shutil.which("promtool", path=f"{os.environ['PATH']}:{Path(sys.executable).parent}")  # `make e2e` puts it beside python
    if found is None:
        pytest.skip("promtool is not on the path (`make e2e`, or Debian: apt install prometheus)")
    return found


def run(*words: str | Path) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_finds_the_rules_right(promtool: str) -> None:
    assert f"SUCCESS: {len(rules())} rules found" in run(promtool, "check", "rules", RULES)


def test_promtool_finds_the_configuration_right(promtool: str, tmp_path: Path) -> None:
    """Beside its rules, and with a key file, which only Compose writes."""
    config = (DEPLOY / "prometheus.yml").read_text()
    (tmp_path / "key").write_text("secret")
    (tmp_path / "prometheus.yml").write_text(config.replace("/etc/prometheus/scrape_key", str(tmp_path / "key")))
    shutil.copy(RULES, tmp_path)
    assert f"SUCCESS: {len(rules())} rules found" in run(promtool, "check", "config", tmp_path / "prometheus.yml")


def test_promtool_sees_every_rule_fire_and_keep_silent(promtool: str) -> None:
    assert "SUCCESS" in run(promtool, "test", "rules", CASES)
