"""Checkpoints: whole or not there, whatever happens in between."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest

from training.checkpoints import SEAL_NAME, CheckpointFailed, Checkpoints, find_fault


def write(checkpoints: Checkpoints, step: int, text: str = "weights") -> None:
    with checkpoints.writing(step) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "a.bin").write_text(f"{text} {step}")


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    assert checkpoints.newest() is None
    for step in (1, 2, 10, 100):
        write(checkpoints, step)
    assert [each.step for each in checkpoints.all()] == [10, 100]
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.step == 100
    assert (newest.path / "part" / "a.bin").read_text() == "weights 100"


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "unsealed", "seal cut"])
def test_a_broken_one_is_named_and_passed_over(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(tmp_path, 5)
    write(checkpoints, 1)
    write(checkpoints, 2)
    path = tmp_path / "step-0000002"
    file, seal = path / "part" / "a.bin", path / SEAL_NAME
    match damage:
        case "cut":
            file.write_text("weigh")
        case "changed":
            file.write_text("Weights 2")
        case "missing":
            file.unlink()
        case "unsealed":
            seal.unlink()
        case _:
            seal.write_text(seal.read_text()[:20])
    assert find_fault(path)
    with caplog.at_level(logging.WARNING):
        newest = checkpoints.newest()
    assert newest is not None
    assert newest.step == 1
    assert "step-0000002" in caplog.text


def test_going_on_from_before_a_broken_one_removes_it(tmp_path: Path) -> None:
    """Else the broken one, having the higher number, would push out the one just written."""
    checkpoints = Checkpoints(tmp_path, 1)
    write(checkpoints, 50)
    write(Checkpoints(tmp_path, 2), 100)
    (tmp_path / "step-0000100" / SEAL_NAME).unlink()
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.step == 50
    write(checkpoints, 75)
    assert [each.step for each in checkpoints.all()] == [75]


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 1)
    write(checkpoints, 1)
    (tmp_path / "step-0000001.bak").mkdir()
    write(checkpoints, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000001.bak", "step-0000002"]


def test_a_failure_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 1)
    write(checkpoints, 1)
    with pytest.raises(CheckpointFailed, match=r"No space left on device.*last whole checkpoint is .*step-0000001"):
        fill_the_disk(checkpoints)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001"]


def fill_the_disk(checkpoints: Checkpoints) -> None:
    """A library that hides the operating system's words behind its own."""
    with checkpoints.writing(2) as folder:
        (folder / "a.bin").write_text("half")
        raise RuntimeError("a library's words") from OSError(errno.ENOSPC, "No space left on device")


def test_the_first_failure_says_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointFailed, match="no whole checkpoint yet"), Checkpoints(tmp_path, 1).writing(1):
        raise RuntimeError("writer failed\nmore")


def test_a_killed_writer_leaves_nothing_that_counts(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 3)
    write(checkpoints, 1)
    partial = tmp_path / ".step-0000002.partial"
    partial.mkdir()
    (partial / "a.bin").write_text("half")
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.step == 1
    checkpoints.clear_partial()
    assert not partial.exists()


def test_a_step_taken_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 3)
    write(checkpoints, 1, "old")
    write(checkpoints, 1, "new")
    newest = checkpoints.newest()
    assert newest is not None
    assert (newest.path / "part" / "a.bin").read_text() == "new 1"
