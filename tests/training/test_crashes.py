"""kill -9, a full disk and several processes, on the real command line."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.tiny_run import TinyRun
from training.checkpoints import Checkpoints
from training.loop import TRAINED_NAME

NUM_STEPS = 40
PATIENCE_S = 120.0


def command(tiny: TinyRun, out: Path, recipe: Path, *options: str) -> list[str]:
    return ["training.train", str(recipe), "--data", str(tiny.data), "--out", str(out), "--trackers", "none", *options]


def start(arguments: list[str], **more: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def write_recipe(tiny: TinyRun, path: Path, num_steps: int = NUM_STEPS) -> Path:
    path.write_text(
        f"""
        model = {{ base = "{tiny.base}", dtype = "float32" }}
        lora = {{ r = 4, alpha = 8.0, dropout = 0.1 }}
        data = {{ pairs_per_image = 2 }}
        optimiser = {{ learning_rate = 1e-3, schedule = "cosine", num_warmup_steps = 2 }}
        run = {{ seed = 3, batch_size = 4, num_accumulated = 2, max_steps = {num_steps}, save_every = 1, validate_every = 7 }}
        """
    )
    return path


def finish(process: subprocess.Popen[str]) -> str:
    _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, told
    return told


def kill_soon(process: subprocess.Popen[str], run: Path, num_more: int, delay_s: float) -> None:
    """SIGKILL once `num_more` further steps are logged and a moment has passed, wherever that finds the process."""
    began = num_lines(run)
    deadline = time.monotonic() + PATIENCE_S
    while num_lines(run) < began + num_more and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def num_lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def losses_of(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def killed_and_resumed(tiny: TinyRun, root: Path, num_kills: int) -> int:
    """Compare with an uninterrupted run; returns how many kills met a running process."""
    recipe = write_recipe(tiny, root / "recipe.toml")
    finish(start(command(tiny, root / "whole", recipe)))
    rng = random.Random(17)
    cut = root / "cut"
    num_met = 0
    for _ in range(num_kills):
        process = start(command(tiny, cut, recipe, "--resume"))
        kill_soon(process, cut, rng.randint(0, NUM_STEPS // (2 * num_kills)), rng.uniform(0, 0.03))
        num_met += process.returncode == -signal.SIGKILL
    finish(start(command(tiny, cut, recipe, "--resume")))
    assert losses_of(cut) == losses_of(root / "whole")
    whole, found = (load_file(newest(each) / TRAINED_NAME) for each in (root / "whole", cut))
    assert set(whole) == set(found)
    assert all(torch.equal(whole[name], found[name]) for name in whole)
    assert not list((cut / "checkpoints").glob(".*"))
    return num_met


def newest(run: Path) -> Path:
    checkpoint = Checkpoints(run / "checkpoints", 3).newest()
    assert checkpoint is not None
    assert checkpoint.step == NUM_STEPS
    return checkpoint.path


def test_killed_three_times_and_resumed_is_uninterrupted(tiny: TinyRun, tmp_path: Path) -> None:
    assert killed_and_resumed(tiny, tmp_path, 3) == 3


@pytest.mark.slow
def test_killed_twenty_times_and_resumed_is_uninterrupted(tiny: TinyRun, tmp_path: Path) -> None:
    num_met = killed_and_resumed(tiny, tmp_path, 20)
    print(f"{num_met} of 20 kills met a running process")
    assert num_met >= 15


def test_a_full_disk_ends_clearly_with_the_last_checkpoint_whole(tiny: TinyRun, tmp_path: Path) -> None:
    """A limit on the size of a file stands for the full disk: the optimiser's state no longer fits, and nothing is lost."""
    recipe = write_recipe(tiny, tmp_path / "recipe.toml", num_steps=3)
    finish(start(command(tiny, tmp_path / "run", recipe)))
    before = sorted((tmp_path / "run" / "checkpoints").iterdir())
    size = (before[-1] / "optimizer.bin").stat().st_size
    longer = write_recipe(tiny, tmp_path / "longer.toml", num_steps=6)
    description = json.loads((tmp_path / "run" / "run.json").read_text())
    description["recipe"]["run"]["max_steps"] = 6
    (tmp_path / "run" / "run.json").write_text(json.dumps(description))
    limited = ["tests.training.limited", str(size - 1), *command(tiny, tmp_path / "run", longer, "--resume")]
    process = start(limited)
    _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 4
    line = told.strip().splitlines()[-1]
    assert "could not be written" in line
    assert "step-0000003" in line
    assert "Traceback" not in told
    assert sorted((tmp_path / "run" / "checkpoints").iterdir()) == before
    finish(start(command(tiny, tmp_path / "run", longer, "--resume")))


def test_two_processes_train_as_one(tiny: TinyRun, tmp_path: Path) -> None:
    """DDP over two CPU processes with one batch each against one process with two: the same losses, one whole checkpoint."""
    recipe = write_recipe(tiny, tmp_path / "recipe.toml", num_steps=4)
    without_dropout = ("--set", "lora.dropout=0.0")
    finish(start(command(tiny, tmp_path / "one", recipe, *without_dropout)))
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]  # accelerate's launcher starts one on a CPU
    both = command(tiny, tmp_path / "two", recipe, *without_dropout, "--set", "run.num_accumulated=1")
    finish(start([*launch, *both], ACCELERATE_USE_CPU="true"))
    assert json.loads((tmp_path / "two" / "run.json").read_text())["devices"] == {"type": "cpu", "num_processes": 2}
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert [step for step, _ in two] == [1, 2, 3, 4]
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-5)
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-0000004")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-0000003")
    finish(start([*launch, *both, "--resume"], ACCELERATE_USE_CPU="true"))
    assert losses_of(tmp_path / "two") == two
