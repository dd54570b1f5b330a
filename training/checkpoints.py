"""Checkpoints that are whole or not there: written beside, hashed, flushed to the disk, then renamed. Knows no model."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.artifacts import file_sha256
from app.errors import PunchlineError

log = logging.getLogger("punchline.training")
SEAL_NAME = "complete.json"
_PREFIX = "step-"
_NAME = re.compile(_PREFIX + r"(\d{7,})")


class CheckpointFailed(PunchlineError):
    """A checkpoint could not be written or is not whole; the message names it and the last whole one."""

    exit_code = 4


@dataclass(frozen=True, slots=True, order=True)
class Checkpoint:
    """A whole checkpoint: so many optimiser steps were done when it was written."""

    step: int
    path: Path


class Checkpoints:
    """The checkpoints of one run, at most `max_checkpoints` of them."""

    def __init__(self, folder: Path, max_checkpoints: int) -> None:
        self._folder = folder
        self._max = max_checkpoints

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """A folder to write into, which becomes the checkpoint when the block ends well.

        Raises CheckpointFailed for whatever stops the writing; what was there before stays.
        """
        partial = self._folder / f".{_PREFIX}{step:07d}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            _seal(partial, step)
            target = self._folder / f"{_PREFIX}{step:07d}"
            shutil.rmtree(target, ignore_errors=True)  # left over from a run that was resumed further back
            partial.rename(target)
            _flush(self._folder)
        except Exception as error:  # torch and safetensors raise their own kinds for a full disk
            shutil.rmtree(partial, ignore_errors=True)
            whole = self.newest()
            last = f"the last whole checkpoint is {whole.path}" if whole else "there is no whole checkpoint yet"
            raise CheckpointFailed(f"{partial}: could not be written ({_reason(error)}); {last}") from error
        self._drop_others(step)

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint; broken ones are named in the log and passed over."""
        for checkpoint in reversed(self.all()):
            if fault := find_fault(checkpoint.path):
                log.warning("%s: passed over, %s", checkpoint.path, fault)
            else:
                return checkpoint
        return None

    def all(self) -> list[Checkpoint]:
        """Every folder that has the name of a checkpoint, oldest first."""
        names = ((_NAME.fullmatch(path.name), path) for path in self._folder.glob(f"{_PREFIX}*"))
        return sorted(Checkpoint(int(name[1]), path) for name, path in names if name)

    def clear_partial(self) -> None:
        """Remove what a killed process left half-written."""
        for path in self._folder.glob(f".{_PREFIX}*.partial"):
            shutil.rmtree(path, ignore_errors=True)

    def _drop_others(self, step: int) -> None:
        """Later ones than this whole one were broken when the run went on from before them; of the earlier the oldest go."""
        earlier = [each for each in self.all() if each.step <= step]
        later = [each for each in self.all() if each.step > step]
        for checkpoint in (*later, *earlier[: -self._max]):
            shutil.rmtree(checkpoint.path, ignore_errors=True)


def find_fault(path: Path) -> str | None:
    """Why a checkpoint is not whole, or None: every file must have the SHA-256 it was sealed with."""
    try:
        files: dict[str, str] = json.loads((path / SEAL_NAME).read_bytes())["files"]
        for name, digest in files.items():
            if file_sha256(path / name) != digest:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it is not whole ({type(error).__name__})"
    return None


def _seal(partial: Path, step: int) -> None:
    """Flush every file, then write the list of their hashes: the last thing to arrive."""
    names = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
    for name in names:
        _flush(partial / name)
    seal = partial / SEAL_NAME
    seal.write_text(json.dumps({"step": step, "files": {name: file_sha256(partial / name) for name in names}}, indent=2) + "\n")
    _flush(seal)
    _flush(partial)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: Exception) -> str:
    """The operating system's own words when there are any."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.strerror:
            return chain.strerror
        chain = chain.__cause__ or chain.__context__
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
