"""The README is executed: every console block is run and its output compared, every other command is checked to exist."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.server import Server, environment, started

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"
VARYING = {"request_id", "model_fingerprint", "fingerprint", "created", "first_seen_s", "last_seen_s"}
SEVERAL = re.compile(r"/v1/models|model=newyorker")  # what asks the server of the section on several models
NOT_RUN_HERE = {"docker", "git", "cd"}  # need an engine or the network; `deploy/` says what was built


@dataclass(frozen=True)
class Step:
    """One `$ command` of a console block with the output printed below it."""

    command: str
    output: str


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def steps() -> Iterator[Step]:
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            lines = part.splitlines()
            end = next(index for index, line in enumerate(lines) if not line.endswith("\\"))
            yield Step("\n".join(lines[: end + 1]), "\n".join(lines[end + 1 :]).strip())


STEPS = list(steps())


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One that nobody asked before: answers tell what was computed and what was known."""
    with started() as running:
        yield running


@pytest.fixture(scope="module")
def several() -> Iterator[Server]:
    with started("--models", "newyorker=newyorker") as running:
        yield running


def test_there_is_something_to_run() -> None:
    assert any("/score" in step.command for step in STEPS)
    assert any("/compare" in step.command for step in STEPS)


@pytest.mark.parametrize("step", STEPS, ids=[step.command[:60].replace("\n", " ") for step in STEPS])
def test_console_block(step: Step, server: Server, several: Server) -> None:
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = step.command.replace(ADDRESS, (several if SEVERAL.search(step.command) else server).url)
    variables = {**environment(), "PATH": binaries, "COLUMNS": "100"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=120, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    same(parsed(done.stdout), parsed(step.output))


def parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return [re.sub(r"[─━┏┓┗┛┡┩│┃└┘┴┬┼├┤╇╋┳┻ ]+", " ", line).strip() for line in text.strip().splitlines() if line.strip()]


def same(found: object, expected: object, where: str = "answer") -> None:
    """Equal in structure and text; numbers to 1e-4; ids may vary."""
    if isinstance(expected, dict):
        assert isinstance(found, dict)
        assert list(found) == list(expected), where
        for key in expected:
            if key not in VARYING:
                same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert isinstance(found, list)
        assert len(found) == len(expected), (where, found)
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            same(one, other, f"{where}[{index}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-4), where
    elif isinstance(expected, str) and expected.startswith("model "):
        assert isinstance(found, str)
        assert re.fullmatch(r"model [0-9a-f]{12}", found)
    else:
        assert found == expected, where


@pytest.mark.parametrize("block", blocks("python"))
def test_python_block(block: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    exec(compile(block.replace(ADDRESS, server.url), "README.md", "exec"), names)
    assert names


@pytest.mark.parametrize("line", [line for block in blocks("bash") for line in block.splitlines() if line and not line.startswith("#")])
def test_bash_commands_exist(line: str) -> None:
    words = [word for word in shlex.split(line, comments=True) if "=" not in word.split("/")[0] or word.startswith("-")]
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert set(words[1:]) <= targets
    elif words[0] == "python":
        assert words[1] == "-m"
        assert importlib.util.find_spec(words[2]) is not None
    elif words[0] == "punchline":
        command = [sys.executable, "-m", "app.cli", words[1], "--help"]
        assert subprocess.run(command, capture_output=True, env=environment(), timeout=60, check=False).returncode == 0
    elif "/" in words[0]:
        assert os.access(ROOT / words[0], os.X_OK), words[0]
    else:
        assert words[0] in NOT_RUN_HERE, line


def test_every_path_named_exists() -> None:
    named = re.findall(r"\]\(([^)#:]+)\)", README)
    assert named
    for path in named:
        assert (ROOT / path).exists(), path
