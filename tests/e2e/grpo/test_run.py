"""TRL's GRPOTrainer learns from a live server, and does not notice that the server was killed. Figures are printed.

`trl/trainer/grpo_trainer.py` of TRL 1.16.0 (PyPI), `_calculate_rewards`, on a loop in a daemon thread:

    output = await func(prompts=prompts, completions=completions, completion_ids=completion_ids_list, **reward_kwargs)
    output = [r if r is not None else torch.nan for r in output]
    ...
    rewards_per_func[:, idx] = torch.tensor(output_reward_func, dtype=torch.float32, device=device)
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.server import environment

ROOT = Path(__file__).parents[3]
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_the_reward_rises_and_restarts_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """60 steps, the scores in deterministic mode, since the company of a score moves its last digits otherwise."""
    if importlib.util.find_spec("trl") is None:
        pytest.fail("TRL is missing: pip install -c constraints.txt -e '.[e2e]'")
    command = [sys.executable, "-m", "tests.e2e.grpo", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    with capsys.disabled():
        print("\n" + done.stdout)
    found = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert found["num_steps"] <= 200
    assert found["rise_in_errors"] > 3
    assert found["num_kills"] == 3
    assert found["same_captions"]
    assert found["same_rewards"]
