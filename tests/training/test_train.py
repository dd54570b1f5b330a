"""The command: what it refuses in one line, and what it says while it goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.training.tiny_run import TinyRun, write_tiny_run
from training.recipe import RecipeInvalid
from training.tracking import choose_trackers, forget_after
from training.train import app, flatten, in_batches, write_whole


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return write_tiny_run(tmp_path_factory.mktemp("tiny"), num_train=16, num_validation=4)


def call(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    return done.exit_code, done.stderr


def write_recipe(tiny: TinyRun, path: Path) -> Path:
    path.write_text(
        f'model = {{ base = "{tiny.base}", dtype = "float32" }}\nlora = {{ r = 2, alpha = 4.0 }}\n'
        "optimiser = { learning_rate = 1e-3 }\nrun = { seed = 1, batch_size = 4, max_steps = 2 }\n"
    )
    return path


def test_a_run_from_the_command_line(tiny: TinyRun, tmp_path: Path) -> None:
    """Steps, validation and TensorBoard's file are there; a run again is refused, resumed it is done."""
    recipe, out = write_recipe(tiny, tmp_path / "x.toml"), tmp_path / "run"
    code, told = call(recipe, "--data", tiny.data, "--out", out, "--trackers", "tensorboard")
    assert code == 0, told
    assert "validation accuracy" in told
    assert "2 steps done" in told
    assert list((out / "logs").rglob("events.out.tfevents.*"))
    assert json.loads((out / "run.json").read_text())["recipe"]["run"]["max_steps"] == 2
    code, told = call(recipe, "--data", tiny.data, "--out", out)
    assert (code, "--resume goes on" in told) == (4, True)
    assert call(recipe, "--data", tiny.data, "--out", out, "--resume", "--trackers", "none")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["no_such_recipe"], 3, "humor_20k"),
        (["x.toml", "--set", "run.sed=1"], 3, "run.sed"),
        (["x.toml", "--set", 'model.base="./nowhere"'], 3, "./nowhere"),
        (["x.toml", "--data", "nowhere"], 3, "pairs_train.parquet"),
        (["x.toml", "--set", "run.batch_size=64"], 3, "fewer than the 64 of one step"),
        (["x.toml", "--set", 'lora.targets="no_such_layer"'], 3, "lora.targets"),
        (["x.toml", "--out", "x.toml"], 4, "File exists"),
    ],
)
def test_refusals_are_one_line(tiny: TinyRun, tmp_path: Path, arguments: list[str], code: int, named: str) -> None:
    recipe = write_recipe(tiny, tmp_path / "x.toml")
    given = [str(recipe) if each == "x.toml" else each for each in arguments]
    data = [] if "--data" in given else ["--data", tiny.data]
    out = [] if "--out" in given else ["--out", tmp_path / "run"]
    found, told = call(*given, *data, *out, "--trackers", "none")
    assert found == code
    last = [line for line in told.splitlines() if line.startswith("refused:")]
    assert len(last) == 1
    assert named in last[0]
    assert "Traceback" not in told


def test_metrics_of_steps_to_come_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    forget_after(path, 3)
    assert not path.exists()
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4}\n{"st')
    forget_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_trackers() -> None:
    assert "tensorboard" in choose_trackers("auto")
    assert choose_trackers("none") == []
    assert choose_trackers("tensorboard, none") == ["tensorboard"]
    with pytest.raises(RecipeInvalid, match="tensorbord"):
        choose_trackers("tensorbord")


def test_sections_are_flat_for_trackers() -> None:
    assert flatten({"a": {"b": 1, "c": [1, 2]}, "d": None, "e": "x"}) == {"a.b": 1, "a.c": "[1, 2]", "d": "None", "e": "x"}


def test_validation_takes_every_pair_once(tiny: TinyRun) -> None:
    from training.pairs import read_pairs

    pairs = read_pairs(tiny.data / "pairs_train.parquet")
    batches = in_batches(pairs, 5)
    assert sorted(index for batch in batches for index in batch) == list(range(16))
    assert [len(batch) for batch in batches] == [5, 5, 5, 1]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "one")
    write_whole(path, "two")
    assert path.read_text() == "two"
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]
