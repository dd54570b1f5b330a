"""What the deployment files say of this repository is true: metrics, settings, routes, files, ports. Starts nothing."""

from __future__ import annotations

import json
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.api.middleware import PUBLIC_PATHS
from app.metrics import Metrics
from app.settings import PREFIX, Settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE_FILES = ("compose.yaml", "compose.cpu.yaml")
DASHBOARDS = sorted((DEPLOY / "grafana/dashboards").glob("*.json"))
SETTINGS = {PREFIX + name.upper() for name in Settings.model_fields}
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
LINUX_PROCESS_SERIES = ("process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds", "process_start_time_seconds")
PROMETHEUS_SERIES = {"up": set[str](), "ALERTS": {"alertname", "alertstate", "severity"}}  # what it adds by itself
TARGET_LABELS = {"instance", "job"}  # Prometheus adds them to every series
FLUSH_S = 2  # a stopping server's last answers
PROMQL_WORDS = {"by", "without", "on", "ignoring", "group_left", "group_right", "bool", "offset", "and", "or", "unless", "inf", "nan"}
BUILD_TOOLS = {"gcc", "g++", "build-essential", "make", "ninja-build", "python3-pip", "python3-venv", "python3-dev", "git"}


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """(`RUN`, its text) for each instruction, comments dropped and continued lines joined."""
    lines = [line for line in dockerfile.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word.upper(), rest.strip()) for word, _, rest in (line.strip().partition(" ") for line in joined.splitlines())]


def last_stage(dockerfile: str) -> list[tuple[str, str]]:
    found = instructions(dockerfile)
    return found[max(index for index, (word, _) in enumerate(found) if word == "FROM") :]


def exec_form(text: str) -> list[str] | None:
    """The words of an instruction in exec form, None for shell form."""
    try:
        words = json.loads(text)
    except ValueError:
        return None
    return words if isinstance(words, list) and words and all(isinstance(word, str) for word in words) else None


def dockerfile_faults(dockerfile: str) -> list[str]:
    """What keeps an image from stopping, being watched or being confined properly."""
    stage = dict(last_stage(dockerfile))  # of repeated instructions the last one counts, as in Docker
    probe = stage.get("HEALTHCHECK", "NONE").partition("CMD ")[2]
    user = stage.get("USER", "root").partition(":")[0]
    checks = {
        "ENTRYPOINT is not of exec form": exec_form(stage.get("ENTRYPOINT", "")) is None,
        "CMD is not of exec form": exec_form(stage.get("CMD", "")) is None,
        "no HEALTHCHECK of exec form": exec_form(probe) is None,
        "USER is root": user in {"root", "0"},
    }
    return [fault for fault, found in checks.items() if found]


class ComposeLoader(yaml.SafeLoader):
    """YAML with Compose's own tags."""


ComposeLoader.add_constructor("!reset", lambda loader, node: None)


def compose(name: str) -> dict[str, Any]:
    return yaml.load((DEPLOY / name).read_text(), ComposeLoader)


def bound_files(service: dict[str, Any]) -> list[str]:
    """Host paths a service needs: mounted ones that are not volumes or chosen by the user, and required env files."""
    mounts = [entry.partition(":")[0] for entry in service.get("volumes", []) if entry.startswith((".", "/"))]
    return mounts + [entry if isinstance(entry, str) else entry["path"] for entry in service.get("env_file", []) if required(entry)]


def required(entry: str | dict[str, Any]) -> bool:
    return isinstance(entry, str) or entry.get("required", True)


def series() -> dict[str, set[str]]:
    """Every series the server and Prometheus can have, with its labels."""
    found: dict[str, set[str]] = {name: set() for name in LINUX_PROCESS_SERIES} | PROMETHEUS_SERIES
    for metric in vars(Metrics()).values():
        for family in metric.describe() if hasattr(metric, "describe") else ():
            hidden = {"_sum"} if min(getattr(metric, "_upper_bounds", [0])) < 0 else set()  # of what may be below 0 no sum is exposed
            for suffix in set(SUFFIXES[family.type]) - hidden:
                found[family.name + suffix] = {*metric._labelnames, *({"le"} if suffix == "_bucket" else ())}
    return found


def metric_names(expression: str) -> set[str]:
    """The metrics a PromQL expression reads."""
    text = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"", " ", expression)
    text = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", text)
    return {name for name in re.findall(r"[a-zA-Z_:][\w:]*\b(?!\s*\()", text) if name not in PROMQL_WORDS}


def expression_faults(expression: str, legend: str = "", recorded: dict[str, set[str]] | None = None) -> list[str]:
    """Metrics and labels of a query that neither the server nor what is recorded has."""
    known = series() | (recorded or {})
    names = metric_names(expression)
    faults = [f"no metric {name}" for name in sorted(names - known.keys())]
    for name, matchers in re.findall(r"([a-zA-Z_:][\w:]*)\s*\{([^}]*)\}", expression):
        labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
        faults += [f"{name} has no label {label}" for label in sorted(labels - known.get(name, labels) - TARGET_LABELS)]
    anywhere = TARGET_LABELS.union(*(known.get(name, set()) for name in names))
    grouped = {label.strip() for clause in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression) for label in clause.split(",")}
    faults += [f"no metric here has the label {label}" for label in sorted(grouped - anywhere)]
    faults += [f"the legend names {label}, which is not kept" for label in sorted(set(re.findall(r"\{\{\s*(\w+)", legend)) - grouped)]
    return faults


def panels(path: Path) -> list[dict[str, Any]]:
    return [panel for panel in json.loads(path.read_text())["panels"] if panel["type"] != "row"]


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text()


def test_the_image_stops_on_a_signal_is_watched_and_is_not_root(dockerfile: str) -> None:
    assert dockerfile_faults(dockerfile) == []


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("ENTRYPOINT punchline serve", "ENTRYPOINT is not of exec form"),
        ("CMD serve", "CMD is not of exec form"),
        ("HEALTHCHECK NONE", "no HEALTHCHECK of exec form"),
        ("HEALTHCHECK --interval=5s CMD curl localhost:8000/livez", "no HEALTHCHECK of exec form"),
        ("USER root", "USER is root"),
        ("USER 0:0", "USER is root"),
    ],
)
def test_a_faulty_dockerfile_is_seen(dockerfile: str, line: str, fault: str) -> None:
    assert dockerfile_faults(f"{dockerfile}\n{line}\n") == [fault]


def test_a_stage_without_user_and_health_check_is_seen(dockerfile: str) -> None:
    assert len(dockerfile_faults(f"{dockerfile}\nFROM debian\n")) == 4


def test_signals_arrive_during_the_load_too(dockerfile: str) -> None:
    entrypoint = exec_form(dict(last_stage(dockerfile))["ENTRYPOINT"])
    assert entrypoint == ["tini", "--", "punchline"]
    assert "tini" in shlex.split(" ".join(text for word, text in last_stage(dockerfile) if word == "RUN"))


def test_the_health_check_asks_a_public_route(dockerfile: str) -> None:
    probe = dict(last_stage(dockerfile))["HEALTHCHECK"]
    assert "/livez" in probe
    assert "/livez" in PUBLIC_PATHS
    assert "--start-period=" in probe


def test_the_final_stage_installs_no_build_tools(dockerfile: str) -> None:
    words = {word for kind, text in last_stage(dockerfile) if kind == "RUN" for word in text.split()}
    assert words & BUILD_TOOLS == set()
    assert "pip" not in words


def test_the_image_sets_only_settings_that_exist(dockerfile: str) -> None:
    environment = " ".join(text for word, text in last_stage(dockerfile) if word == "ENV")
    named = set(re.findall(rf"\b({PREFIX}\w+)=", environment))
    assert named >= {"PUNCHLINE_HOST", "PUNCHLINE_PORT"}
    assert named <= SETTINGS


def test_both_variants_have_all_their_stages(dockerfile: str) -> None:
    images = [text.split() for word, text in instructions(dockerfile) if word == "FROM"]
    stages = {words[2] for words in images if len(words) == 3}
    chosen = [words[0] for words in images if "${VARIANT}" in words[0]]
    assert chosen
    for variant in ("gpu", "cpu"):
        assert {name.replace("${VARIANT}", variant) for name in chosen} <= stages


def test_code_comes_after_every_install_from_the_network(dockerfile: str) -> None:
    found = instructions(dockerfile)
    copied = next(index for index, (word, text) in enumerate(found) if (word, text) == ("COPY", "app app"))
    later = [text for word, text in found[copied:] if word == "RUN" and "pip install" in text]
    assert len(later) == 1
    assert "--no-index" in later[0]


def test_what_is_copied_exists_and_is_let_through(dockerfile: str) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {text.split()[0] for word, text in instructions(dockerfile) if word == "COPY" and not text.startswith("--from")}
    assert copied == allowed
    assert [name for name in copied if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_compose_files_are_yaml_with_services(name: str) -> None:
    assert "punchline" in compose(name)["services"]


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_compose_refers_to_files_that_exist(name: str) -> None:
    paths = [path for service in compose(name)["services"].values() for path in bound_files(service)]
    assert [path for path in paths if not (DEPLOY / path).exists()] == []


def test_a_missing_file_would_be_seen() -> None:
    service = {"volumes": ["./nowhere:/x:ro", "named:/y"], "env_file": ["needed.env", {"path": "optional.env", "required": False}]}
    assert bound_files(service) == ["./nowhere", "needed.env"]


def test_compose_builds_this_dockerfile_in_a_variant_it_has() -> None:
    for name, variant in zip(COMPOSE_FILES, ("gpu", "cpu"), strict=True):
        service = compose(name)["services"]["punchline"]
        assert service["build"]["args"]["VARIANT"] == variant
        assert service["image"] == f"punchline:{variant}"
    assert (DEPLOY / compose("compose.yaml")["services"]["punchline"]["build"]["context"] / "Dockerfile").is_file()


def test_the_gpu_is_reserved_and_the_cpu_file_takes_that_back() -> None:
    reserved = compose("compose.yaml")["services"]["punchline"]["deploy"]["resources"]["reservations"]["devices"]
    assert reserved == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
    assert compose("compose.cpu.yaml")["services"]["punchline"]["deploy"] is None


def test_compose_names_only_volumes_configs_and_services_it_has() -> None:
    whole = compose("compose.yaml")
    for service in whole["services"].values():
        mounts = [entry.partition(":")[0] for entry in service.get("volumes", []) if not entry.startswith((".", "/", "$"))]
        assert set(mounts) <= whole["volumes"].keys()
        assert {entry["source"] for entry in service.get("configs", [])} <= whole["configs"].keys()
        assert set(service.get("depends_on", [])) <= whole["services"].keys()


def test_compose_sets_only_settings_that_exist() -> None:
    named = {name for name in compose("compose.yaml")["services"]["punchline"]["environment"] if name.startswith(PREFIX)}
    assert named <= SETTINGS


def test_compose_waits_longer_than_the_drain() -> None:
    grace = compose("compose.yaml")["services"]["punchline"]["stop_grace_period"]
    defaults = {name: Settings.model_fields[name].default for name in ("drain_notice_s", "drain_s")}
    assert int(grace.removesuffix("s")) > sum(defaults.values()) + FLUSH_S


def test_prometheus_scrapes_the_service_on_its_port_with_the_key_compose_writes() -> None:
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    whole = compose("compose.yaml")
    assert host in whole["services"]
    assert whole["services"][host]["ports"][0].endswith(f":{port}")
    assert job.get("metrics_path", "/metrics") == "/metrics"
    assert job["authorization"]["credentials_file"] in {entry["target"] for entry in whole["services"]["prometheus"]["configs"]}


def test_grafana_finds_its_data_source_and_dashboards() -> None:
    grafana = compose("compose.yaml")["services"]["grafana"]
    mounted = {entry.split(":")[1]: DEPLOY / entry.split(":")[0] for entry in grafana["volumes"] if entry.startswith(".")}
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/punchline.yaml").read_text())["providers"]
    assert source["url"].removeprefix("http://").partition(":")[0] in compose("compose.yaml")["services"]
    assert list(mounted[provider["options"]["path"]].glob("*.json")) == DASHBOARDS
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (mounted[str(home.parent)] / home.name).is_file()
    for dashboard in DASHBOARDS:
        chosen = {item["name"]: item for item in json.loads(dashboard.read_text())["templating"]["list"]}
        assert chosen["datasource"]["current"]["value"] == source["uid"]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_every_panel_asks_for_metrics_and_labels_that_exist(path: Path) -> None:
    faults = {
        panel["title"]: found
        for panel in panels(path)
        for target in panel["targets"]
        if (found := expression_faults(target["expr"], target["legendFormat"]))
    }
    assert faults == {}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_panels_have_their_own_ids_and_places(path: Path) -> None:
    found = panels(path)
    assert len({panel["id"] for panel in found}) == len(found)
    cells = [
        (column, line)
        for place in (panel["gridPos"] for panel in found)
        for column in range(place["x"], place["x"] + place["w"])
        for line in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(column for column, _ in cells) < 24


def test_the_dashboard_shows_every_metric_of_the_scorer() -> None:
    shown = {name for path in DASHBOARDS for panel in panels(path) for target in panel["targets"] for name in metric_names(target["expr"])}
    families = {family.name for metric in vars(Metrics()).values() if hasattr(metric, "describe") for family in metric.describe()}
    assert [name for name in sorted(families) if not any(fnmatch(series_name, f"{name}*") for series_name in shown)] == []


@pytest.mark.parametrize(
    ("expression", "legend", "fault"),
    [
        ("rate(reward_requests[5m])", "", "no metric reward_requests"),
        ("reward_readiness", "", "no metric reward_readiness"),
        ("rate(reward_batch_items_total[5m])", "", "no metric reward_batch_items_total"),
        ('rate(reward_tokens_total{type="computed"}[5m])', "", "reward_tokens_total has no label type"),
        ("sum by (result) (rate(reward_requests_total[5m]))", "", "no metric here has the label result"),
        ("sum by (code) (rate(reward_errors_total[5m]))", "{{endpoint}}", "the legend names endpoint, which is not kept"),
    ],
)
def test_a_faulty_query_is_seen(expression: str, legend: str, fault: str) -> None:
    assert expression_faults(expression, legend) == [fault]


def test_a_query_with_everything_in_it_is_read_right() -> None:
    rate = 'rate(reward_stage_duration_seconds_bucket{instance=~"$instance"}[5m])'
    expression = f"histogram_quantile(0.99, sum by (le, stage) ({rate})) or reward_ready"
    assert metric_names(expression) == {"reward_stage_duration_seconds_bucket", "reward_ready"}
    assert expression_faults(expression, "{{stage}}") == []
