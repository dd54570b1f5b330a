"""The rules of the house that a machine can hold: who imports whom, who may load torch, short functions, no asserts."""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BENCH = (
    "bench",
    *(
        f"bench.{name}"
        for name in (
            "workload",
            "conversations",
            "flops",
            "limit",
            "memory",
            "loopback",
            "ways",
            "load",
            "caller",
            "overhead",
            "noise",
            "report",
            "tables",
            "plot",
            "run",
            "noise_run",
            "command",
        )
    ),
)
# Lowest first. A module imports only from modules that stand before it; imports for type checking and inside functions count too.
TABLE = (
    ("errors", "settings", "contracts", "metrics"),
    (
        "planning",
        "caches",
        "parts",
        "reuse",
        "budgets",
        "machine",
        "preference",
        "tallies",
        "joining",
        "runs",
        "containers",
        "images",
        "layouts",
        "artifacts",
    ),
    (
        "hardware",
        "turns",
        "admission",
        "dialling",
        "fetching",
        "framing",
        "tokens",
        "encoding",
        "faults",
        "transfer",
        "varlen",
        "layers",
        "vision",
        "decoder",
        "attention",
        "packing",
        "heads",
        "bases",
        "adapters",
        "sharing",
        "model",
        "engine",
        "dispatch",
        "batching",
        "lanes",
        "geometry",
    ),
    ("scoring", "golden", "monitors", "service", "startcheck", "selftest", "canary"),
    (
        "api.body_room",
        "api.bodies",
        "api.schemas",
        "api.card",
        "api.answers",
        "api.leaving",
        "api.middleware",
        "api.requests",
        "api.pages",
        "api.runs",
        "api.routes",
        "api.dialects",
        "api.dialects.asked",
        "api.dialects.chats",
        "api.dialects.pictures",
        "api.dialects.wire",
        "api.dialects.trainers",
        "api.dialects.engines",
        "api.dialects.pairs",
        "api.dialects.table",
        "api.dialects.routes",
        "api",
    ),
    ("connections", "draining", "served", "main", "proof", "serving"),
    (
        "client.errors",
        "client.pictures",
        "client.answers",
        "client.requests",
        "client.calls",
        "client.results",
        "client.blocking",
        "client.concurrent",
        "client",
        "client.columns",
        "client.completions",
        "client.rollouts",
        "client.environment",
        "client.trl",
        "client.verl",
        "client.swift",
        "client.swift.punchline_reward",
    ),
    BENCH,
    ("converting", "inspecting", "remote", "cli"),
)
ORDER = {"app": 0} | {f"app.{name}": place for place, name in enumerate((name for row in TABLE for name in row), start=1)}
HEAVY = {"torch", "transformers", "peft"}
MAY_LOAD_HEAVY = {
    f"app.{name}"
    for name in (
        "framing",
        "tokens",
        "encoding",
        "faults",
        "transfer",
        "varlen",
        "layers",
        "vision",
        "decoder",
        "attention",
        "packing",
        "heads",
        "bases",
        "adapters",
        "sharing",
        "model",
        "engine",
        "scoring",
    )
} | {"app.served", "app.main", "app.converting", "app.inspecting", "app.geometry", "app.hardware", *(f"app.{name}" for name in BENCH)}
MAY_LOAD_HEAVY_LATE = {"app.cli"}
LOADS_HEAVY_BY_IMPORT = MAY_LOAD_HEAVY | {"app.serving"}
TRAINING_MAY_IMPORT = {
    f"app.{name}"
    for name in (
        "contracts",
        "errors",
        "images",
        "layouts",
        "artifacts",
        "encoding",
        "attention",
        "packing",
        "heads",
        "bases",
        "model",
        "scoring",
        "golden",
    )
} | {"app", "app.geometry", "app.hardware"}
VAGUE = {"utils", "util", "helpers", "helper", "common", "manager", "handler", "misc"}


@dataclass(frozen=True)
class Module:
    """A source file, parsed."""

    name: str
    path: Path
    tree: ast.Module

    def __str__(self) -> str:
        return self.name


def modules_of(package: str) -> list[Module]:
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append(Module(name, path, ast.parse(path.read_text(encoding="utf-8"))))
    return found


APP, TRAINING, TESTS = modules_of("app"), modules_of("training"), modules_of("tests")
SHIPPED = [*APP, *TRAINING]
NAMES = {module.name for module in (*SHIPPED, *TESTS)}


def imports(module: Module, *, late: bool = True) -> Iterator[str]:
    """Full names of what a module imports, submodules resolved; without those inside functions if not `late`."""
    for node in ast.walk(module.tree) if late else at_import(module.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in NAMES else str(node.module)


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(child):
            continue
        yield child
        yield from at_import(child)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def each(modules: list[Module]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("module", modules, ids=str)


def test_the_table_lists_every_module() -> None:
    assert {module.name for module in APP} == set(ORDER)


@each(APP)
def test_imports_go_down_the_table(module: Module) -> None:
    upward = [name for name in imports(module) if name.partition(".")[0] == "app" and ORDER[name] >= ORDER[module.name]]
    assert upward == []


@each(SHIPPED)
def test_imports_are_absolute_and_by_name(module: Module) -> None:
    """So that the other tests see them all."""
    nodes = [node for node in ast.walk(module.tree) if isinstance(node, ast.ImportFrom)]
    assert all(node.level == 0 and [alias.name for alias in node.names] != ["*"] for node in nodes)


@each(APP)
def test_app_knows_neither_training_nor_tests(module: Module) -> None:
    assert not {name.partition(".")[0] for name in imports(module)} & {"training", "tests"}


@each(TRAINING)
def test_training_takes_only_the_shared_code_path(module: Module) -> None:
    taken = {name for name in imports(module) if name.partition(".")[0] == "app"}
    assert taken <= TRAINING_MAY_IMPORT
    assert "tests" not in {name.partition(".")[0] for name in imports(module)}


@each([module for module in APP if module.name.startswith("app.client")])
def test_the_client_knows_nothing_of_the_server(module: Module) -> None:
    """It runs in trainers' environments: of ours only itself, of others httpx and tenacity. The plug-in is loaded by the one it is for."""
    others = {name.partition(".")[0] for name in imports(module)} - set(sys.stdlib_module_names)
    assert others <= {"app", "httpx", "tenacity"} | ({"swift"} if module.name == "app.client.swift.punchline_reward" else set())
    assert all(name.startswith("app.client") for name in imports(module) if name.partition(".")[0] == "app")


@each([module for module in APP if module.name not in MAY_LOAD_HEAVY])
def test_torch_stays_where_it_belongs(module: Module) -> None:
    late = module.name in MAY_LOAD_HEAVY_LATE
    assert not {name.partition(".")[0] for name in imports(module, late=not late)} & HEAVY


@each([module for module in APP if module.name not in LOADS_HEAVY_BY_IMPORT])
def test_nothing_else_loads_torch_through_another_module(module: Module) -> None:
    """The command line, the HTTP layer and the whole loop are imported without it."""
    by_name = {each.name: each for each in APP}
    seen, left = set(), {module.name}
    while left:
        name = left.pop()
        seen.add(name)
        left |= {other for other in imports(by_name[name], late=False) if other in by_name} - seen
    assert not seen & LOADS_HEAVY_BY_IMPORT


def test_the_plug_in_of_ms_swift_is_alone_in_its_folder() -> None:
    """ms-swift puts the folder before all others: a `requests.py` or `trl.py` in it would be taken for the library of that name."""
    assert {path.name for path in (ROOT / "app/client/swift").glob("*.py")} == {"__init__.py", "punchline_reward.py"}


@each(SHIPPED)
def test_only_settings_reads_the_environment(module: Module) -> None:
    """Those of the server, and what a trainer's process is told."""
    nodes = list(ast.walk(module.tree))
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "os"}
    taken = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "os" for alias in node.names}
    assert module.name in {"app.settings", "app.client.environment"} or not (read | taken) & {"environ", "getenv", "environb", "putenv"}


@each(SHIPPED)
def test_no_assert_outside_tests(module: Module) -> None:
    assert [node.lineno for node in ast.walk(module.tree) if isinstance(node, ast.Assert)] == []


@each([*SHIPPED, *TESTS])
def test_a_module_is_named_for_what_it_does(module: Module) -> None:
    assert not set(module.name.split(".")) & VAGUE


@each([module for module in SHIPPED if module.name != "app.errors"])
def test_a_docstring_of_one_to_five_lines(module: Module) -> None:
    """The error tree draws itself and is longer."""
    text = ast.get_docstring(module.tree)
    assert text
    assert 1 <= len(text.splitlines()) <= 5


@each(SHIPPED)
def test_no_function_is_long(module: Module) -> None:
    assert [(node.name, num_lines(node)) for node in functions(module) if num_lines(node) > 45] == []


def test_functions_are_short() -> None:
    assert statistics.median(num_lines(node) for module in APP for node in functions(module)) <= 10


@each([*SHIPPED, *TESTS])
def test_no_error_is_swallowed(module: Module) -> None:
    broad = {"Exception", "BaseException", None}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler) and (getattr(node.type, "id", None) in broad and not isinstance(node.type, ast.Tuple)):
            assert not all(isinstance(step, ast.Pass | ast.Continue) or is_ellipsis(step) for step in node.body), node.lineno
        if isinstance(node, ast.Call) and "suppress" in (getattr(node.func, "id", ""), getattr(node.func, "attr", "")):
            assert not {getattr(argument, "id", "") for argument in node.args} & {"Exception", "BaseException"}, node.lineno


def is_ellipsis(step: ast.stmt) -> bool:
    return isinstance(step, ast.Expr) and isinstance(step.value, ast.Constant) and step.value.value is ...


@each(TESTS)
def test_tests_use_fakes_and_no_mocks(module: Module) -> None:
    assert mocks(module) == []


def mocks(module: Module) -> list[str]:
    """What it imports or calls to put something in another's place. `from unittest import mock` imports `unittest`."""
    found = [name for name in imports(module) if name.split(".")[0] in {"unittest", "mock", "pytest_mock"}]
    used = [(getattr(node.value, "id", ""), node.attr) for node in ast.walk(module.tree) if isinstance(node, ast.Attribute)]
    return found + [f"{owner}.{name}" for owner, name in used if (owner, name) == ("monkeypatch", "setattr")]


def test_the_rules_would_notice(tmp_path: Path) -> None:
    """The reading of imports itself: submodules, type checking, and functions."""
    text = "import torch\nfrom app import metrics\nif TYPE_CHECKING:\n    import app.cli\ndef f():\n    from app.api import routes\n"
    module = Module("app.errors", tmp_path, ast.parse(text))
    assert list(imports(module)) == ["torch", "app.metrics", "app.cli", "app.api.routes"]
    assert list(imports(module, late=False)) == ["torch", "app.metrics"]


@pytest.mark.parametrize(
    "text",
    [
        "from unittest import mock",
        "from unittest.mock import patch",
        "import unittest.mock as m",
        "import mock",
        "from pytest_mock import MockerFixture",
        "def test(monkeypatch):\n    monkeypatch.setattr(app, 'x', 1)\n",
    ],
)
def test_a_mock_would_be_noticed(tmp_path: Path, text: str) -> None:
    assert len(mocks(Module("tests.test_x", tmp_path, ast.parse(text)))) == 1
