"""The plug-in as ms-swift loads and calls it, in a process of its own with a stand-in for the package.

ms-swift 4.6.0 (PyPI). `swift/utils/utils.py`, `import_external_file`, which is why the plug-in is alone in its folder:

    py_dir = os.path.dirname(file_path)
    sys.path.insert(0, py_dir)
    module_name = f'_swift_external_{hashlib.sha256(file_path.encode()).hexdigest()}'
    spec = importlib.util.spec_from_file_location(module_name, file_path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)

`swift/rewards/orm.py`, `AsyncORM`; `swift/rlhf_trainers/grpo_trainer.py`, `_prepare_rewards`:

    if reward_func in orms:
        reward_func_class = orms[reward_func]
        reward_funcs[i] = reward_func_class(args=args)

`swift/rl_core/grpo_algorithm.py`, `compute_rewards_per_func`, an event loop for every step; columns by `rows_to_batched`, in which
a row without pictures has None and a step without any has no `images` at all; `swift/rl_core/advantage.py` then sums NaN as 0:

    completions = [s.messages[-1]['content'] for s in samples]
    async def _run_async_funcs():
        coros = [reward_funcs[idx](completions, **reward_kwargs) for idx in async_indices]
        return await asyncio.gather(*coros)
    for idx, output in zip(async_indices, asyncio.run(_run_async_funcs())):
        output = [r if r is not None else torch.nan for r in output]
    ...
    rewards = (rewards_per_func * reward_weights.unsqueeze(0)).nansum(dim=1)
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import app
from tests.fakes import expected_scores, picture
from tests.wire.server import Wire, wire

CARTOON, OTHER = picture(64, 48, seed=0), picture(64, 48, seed=1)
PLUG_IN = Path(app.__file__).parent / "client" / "swift" / "punchline_reward.py"

REWARDS = """
class AsyncORM:
    def __init__(self, args=None, **kwargs):
        self.args = args

    async def __call__(self, **kwargs):
        raise NotImplementedError


orms = {}
"""

LOADED = """
import asyncio, hashlib, importlib.util, os, pathlib, sys
file_path = sys.argv[1]
sys.path.insert(0, os.path.dirname(file_path))
module_name = f'_swift_external_{hashlib.sha256(file_path.encode()).hexdigest()}'
spec = importlib.util.spec_from_file_location(module_name, file_path)
module = importlib.util.module_from_spec(spec)
sys.modules[module_name] = module
spec.loader.exec_module(module)
from swift.rewards import orms
reward = orms['punchline'](args=object())
assert asyncio.iscoroutinefunction(getattr(reward, '__call__'))
def step(*rewards, completions, **columns):
    async def run():
        return await asyncio.gather(*[each(completions, trainer_state=object(), messages=[], request_id=[], **columns) for each in rewards])
    return asyncio.run(run())
"""

STEPS = """
cartoon, other = sys.argv[2:]
def image(path):
    return [{'bytes': None, 'path': path}]
print(*step(reward, completions=['a', 'b', '<caption>d</caption>'], images=[image(cartoon), image(other), image(cartoon)]))
print(*step(reward, orms['punchline'](), completions=['a'], images=[[{'bytes': pathlib.Path(other).read_bytes(), 'path': None}]]))
print(*step(reward, completions=['a', 'b'], images=[image(other)] * 2, reward_image=[cartoon] * 2, reward_prompt=['Be brief.', None]))
print(*step(reward, completions=[]))
"""

REFUSED = """
from app.client import Refused
try:
    step(reward, completions=['a', 'x' * 81], images=[[{'bytes': None, 'path': sys.argv[2]}]] * 2)
except Refused as error:
    print(type(error).__name__, error.code)
"""

SHADOWED = """
from importlib.machinery import PathFinder
names = [name.removesuffix('.py') for name in os.listdir(os.path.dirname(os.path.dirname(file_path))) if name.endswith('.py')]
print([name for name in names if name != '__init__' and PathFinder.find_spec(name, sys.path[:1])], len(names) > 5)
"""


@pytest.fixture
def server() -> Iterator[Wire]:
    with wire() as found:
        yield found


@pytest.fixture
def swift(tmp_path: Path) -> Path:
    """A folder with the stand-in."""
    package = tmp_path / "site" / "swift"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "rewards.py").write_text(REWARDS)
    return package.parent


def run(program: str, swift: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(swift), root]), **variables}
    command = [sys.executable, "-W", "error", "-c", LOADED + program, str(PLUG_IN), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment, cwd=swift)


def cartoons(tmp_path: Path) -> tuple[str, str]:
    for name, data in (("cartoon.png", CARTOON), ("other.png", OTHER)):
        (tmp_path / name).write_bytes(data)
    return str(tmp_path / "cartoon.png"), str(tmp_path / "other.png")


def url_of(server: Wire) -> str:
    return "http://{}:{}".format(*server.address)


def test_steps(server: Wire, swift: Path, tmp_path: Path) -> None:
    """A loop for each step, two of our rewards in one of them; connections are closed with their loop, or warnings would be errors."""
    done = run(STEPS, swift, *cartoons(tmp_path), PUNCHLINE_CLIENT_URL=url_of(server))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    a, d = expected_scores(CARTOON, ["a", "d"])
    (b,), (other,) = expected_scores(OTHER, ["b"]), expected_scores(OTHER, ["a"])
    prompted = [*expected_scores(CARTOON, ["a"], "Be brief."), *expected_scores(CARTOON, ["b"])]
    assert [ast.literal_eval("[" + line.replace("] [", "], [") + "]") for line in done.stdout.splitlines()] == [
        [[a, b, d]],
        [[other], [other]],
        [prompted],
        [[]],
    ]


def test_a_failure_stops_the_run(server: Wire, swift: Path, tmp_path: Path) -> None:
    done = run(REFUSED, swift, *cartoons(tmp_path), PUNCHLINE_CLIENT_URL=url_of(server))
    assert done.stdout == "Refused caption_too_long\n", done.stderr


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "PUNCHLINE_CLIENT_URL is not set"),
        ({"PUNCHLINE_CLIENT_URL": "http://any", "PUNCHLINE_CLIENT_MISSING": "none"}, "none for 0"),
        ({"PUNCHLINE_CLIENT_URL": "http://any", "PUNCHLINE_CLIENT_REFUSED": "none"}, "none for 0"),
        ({"PUNCHLINE_CLIENT_ULR": "http://any"}, "unknown PUNCHLINE_CLIENT_ULR"),
    ],
)
def test_what_is_told_wrong_stops_the_start(variables: dict[str, str], words: str, swift: Path) -> None:
    done = run("", swift, **variables)
    assert done.returncode == 1
    assert words in done.stderr


def test_our_modules_stand_before_no_library(swift: Path) -> None:
    """`sys.path` begins with the plug-in's folder; what is named like our other modules must still be found elsewhere, or nowhere."""
    done = run(SHADOWED, swift, PUNCHLINE_CLIENT_URL="http://any")
    assert done.stdout == "[] True\n", done.stderr
