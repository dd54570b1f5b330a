"""The artifact's files once it is loaded: whatever becomes of them, a running server is the model it was until it starts again."""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.main import running
from app.serving import application
from app.settings import Settings
from tests.planted import make_artifact
from tests.tiny import picture, write_published, write_text_only

pytestmark = pytest.mark.anyio
CAPTIONS = ["the penguin", "an iceberg, they said", "nobody told the octopus", ""]
PICTURE = {"image": base64.b64encode(picture(120, 80)).decode()}


def with_pictures(root: Path, seed: int) -> tuple[Path, dict[str, str]]:
    """Golden pictures in the artifact, its base beside it. What replaces it has none."""
    return (write_published(root, seed=seed) if seed else make_artifact(root)), PICTURE


def text_only(root: Path, seed: int) -> tuple[Path, dict[str, str]]:
    """Trained whole: base and head in one folder."""
    return write_text_only(root, kind="full_head", seed=seed), {}


def files(root: Path) -> list[Path]:
    """Of the artifact and of a base beside it."""
    return [path for path in root.parent.rglob("*") if path.is_file()]


def vanish(root: Path, _: Path) -> None:
    shutil.rmtree(root.parent)


def give_way(root: Path, other: Path) -> None:
    """A new version is moved to where the old one was."""
    old = root.parent.rename(root.parent.with_name("old"))
    other.parent.rename(root.parent)
    shutil.rmtree(old)


def be_overwritten(root: Path, other: Path) -> None:
    """As `cp` and `rsync --inplace` do: the files stay the same ones, which a process may have mapped, and hold other bytes."""
    for path in files(root):
        name = path.relative_to(root.parent)
        new = other.parent / name
        with path.open("r+b") as stream:
            stream.write(new.read_bytes() if new.is_file() else b"\0" * path.stat().st_size)
            os.fsync(stream.fileno())


def be_emptied(root: Path, _: Path) -> None:
    """To read a mapped file behind its end kills a process (SIGBUS)."""
    for path in files(root):
        os.truncate(path, 0)


FATES: list[Callable[[Path, Path], None]] = [vanish, give_way, be_overwritten, be_emptied]


@asynccontextmanager
async def served(root: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        running(Settings(model=str(root), offline=True, canary_s=0)) as runtime,
        httpx.AsyncClient(transport=httpx.ASGITransport(application(runtime)), base_url="http://punchline") as client,
    ):
        yield client


async def scores(client: httpx.AsyncClient, fields: dict[str, str]) -> tuple[list[float], str]:
    answer = await client.post("/score", json={**fields, "captions": CAPTIONS})
    assert answer.status_code == 200, answer.text
    return answer.json()["scores"], answer.headers["x-model-fingerprint"]


@pytest.mark.parametrize("fate", FATES, ids=lambda fate: fate.__name__)
@pytest.mark.parametrize("write", [with_pictures, text_only], ids=lambda write: write.__name__)
async def test_what_becomes_of_the_files_changes_nothing_until_the_next_start(
    tmp_path: Path, write: Any, fate: Callable[[Path, Path], None]
) -> None:
    """D4, L14. The same bits for captions that were never asked before, the same fingerprint, the self-test passes, all as before."""
    (root, fields), (other, _) = write(tmp_path / "served", 0), write(tmp_path / "other", 1)
    async with served(root) as client:
        expected = await scores(client, fields)
    async with served(root) as client:
        fate(root, other)
        assert await scores(client, fields) == expected
        report = await client.post("/selftest")
        assert (report.status_code, report.json()["passed"], report.json()["model_fingerprint"]) == (200, True, expected[1])
        card = (await client.get("/info")).json()
        assert (card["model"]["fingerprint"], card["ready"]) == (expected[1], True)


async def test_the_next_start_takes_what_lies_there(tmp_path: Path) -> None:
    """L14. So the files were replaced indeed."""
    (root, _), (other, _) = text_only(tmp_path / "served", 0), text_only(tmp_path / "other", 1)
    async with served(root) as client:
        before = await scores(client, {})
    give_way(root, other)
    async with served(root) as client:
        after = await scores(client, {})
    assert before[0] != after[0]
    assert before[1] != after[1]
