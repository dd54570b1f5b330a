"""Several real models in one process, over HTTP: two adapters on one base and a text-only model on another, each as it is alone."""

from __future__ import annotations

import asyncio
import base64
import random
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.artifacts import CONFIG_NAME
from app.converting import GoldenInput, convert
from app.errors import ArtifactInvalid
from app.layers import PrepackedLinear
from app.main import Runtime, running
from app.serving import application
from app.settings import Settings
from tests.fakes import sample
from tests.tiny import edit_json, picture, write_published, write_sibling, write_text_only

pytestmark = pytest.mark.anyio
CAPTIONS = ["the penguin", "an iceberg, they said", "nobody told the octopus", ""]
PICTURES = [base64.b64encode(picture(*size, seed)).decode() for seed, size in enumerate([(120, 80), (200, 300), (60, 60)])]
NAMES = ("humor", "wit", "text")


@dataclass(frozen=True)
class Served:
    runtime: Runtime
    client: httpx.AsyncClient

    async def score(self, model: str | None, captions: list[str], image: str | None, prompt: str | None = None) -> dict[str, Any]:
        given = {"model": model, "image": image, "prompt": prompt}
        answer = await self.client.post(
            "/score", json={"captions": captions} | {name: value for name, value in given.items() if value is not None}
        )
        assert answer.status_code == 200, answer.text
        return {**answer.json(), "signed": answer.headers["x-model-fingerprint"]}

    def counted(self, name: str, model: str, **labels: str) -> float:
        return sample(self.runtime.metrics, name, model=model, **labels)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`humor` and `wit` on one base, their pictures of different sizes; `text` trained whole. The first two with golden scores."""
    folder = tmp_path_factory.mktemp("served")
    published = write_published(folder / "published")
    edit_json(published / CONFIG_NAME, base_model_name=str(published.parent / "base"))
    second = write_sibling(published, folder / "second", seed=21, image={"long_edge": 112})
    (folder / "golden.png").write_bytes(picture(300, 200))
    inputs = [GoldenInput(folder / "golden.png", tuple(CAPTIONS)), GoldenInput(folder / "golden.png", tuple(CAPTIONS[:2]), "Be kind.")]
    full = {
        name: convert(str(source), folder / name, base_model=None, inputs=inputs, offline=True, progress=lambda step: None)
        for name, source in (("humor", published), ("wit", second))
    }
    return full | {"text": write_text_only(folder / "text", kind="full_head", seed=3)}


def settings_of(roots: dict[str, Path], **flags: Any) -> Settings:
    first, *others = roots.items()
    further = ",".join(f"{name}={root}" for name, root in others)
    options: dict[str, Any] = {"offline": True, "canary_s": 0, "cache_audit_every": 0} | flags
    return Settings(model=f"{first[0]}={first[1]}", models=further, **options)


@asynccontextmanager
async def serving(roots: dict[str, Path], **flags: Any) -> AsyncIterator[Served]:
    async with running(settings_of(roots, **flags)) as runtime:
        transport = httpx.ASGITransport(application(runtime))
        async with httpx.AsyncClient(transport=transport, base_url="http://punchline") as client:
            yield Served(runtime, client)


def combinations() -> Iterator[tuple[str, str | None, str | None]]:
    """Model, picture, prompt."""
    for name in NAMES:
        for image in [None] if name == "text" else PICTURES:
            for prompt in (None, "Be kind."):
                yield name, image, prompt


async def scores_alone(roots: dict[str, Path], **flags: Any) -> dict[tuple[str, str | None, str | None], dict[str, float]]:
    """What each model says of every caption when nobody else is served."""
    found: dict[tuple[str, str | None, str | None], dict[str, float]] = {}
    for name, root in roots.items():
        async with serving({name: root}, **flags) as served:
            for asked in (each for each in combinations() if each[0] == name):
                told = await served.score(None, CAPTIONS, asked[1], asked[2])
                found[asked] = dict(zip(CAPTIONS, told["scores"], strict=True))
    return found


async def test_each_scores_as_alone_whatever_is_asked_beside_it(roots: dict[str, Path]) -> None:
    """Bit for bit where company must not matter (deterministic), over random concurrent requests to all models."""
    wanted = await scores_alone(roots, lora="unmerged", deterministic=True)
    chance = random.Random(7)
    async with serving(roots, deterministic=True) as served:
        fingerprints = {name: model.loaded.fingerprint for name, model in served.runtime.models.items()}

        async def ask(asked: tuple[str, str | None, str | None], captions: list[str]) -> None:
            told = await served.score(asked[0], captions, asked[1], asked[2])
            assert told["scores"] == [wanted[asked][caption] for caption in captions]
            assert told["model_fingerprint"] == told["signed"] == fingerprints[asked[0]]

        everything = list(combinations())
        for _ in range(2):  # the second time much is known
            await asyncio.gather(*(ask(chance.choice(everything), chance.choices(CAPTIONS, k=chance.randint(1, 4))) for _ in range(60)))
    assert len({tuple(scores.values()) for scores in wanted.values()}) == len(wanted)


async def test_in_ordinary_company_scores_differ_by_rounding_only(roots: dict[str, Path]) -> None:
    wanted = await scores_alone(roots, lora="unmerged")
    async with serving(roots) as served:
        told = await asyncio.gather(*(served.score(name, CAPTIONS, image, prompt) for name, image, prompt in combinations()))
    for asked, answer in zip(combinations(), told, strict=True):
        assert answer["scores"] == pytest.approx(list(wanted[asked].values()), abs=1e-5)


async def test_one_base_is_in_memory_once(roots: dict[str, Path]) -> None:
    async with serving(roots) as served:
        humor, wit, text = (model.loaded.model.backbone for model in served.runtime.models.values())
        packed = [{id(each) for each in backbone.modules() if isinstance(each, PrepackedLinear)} for backbone in (humor, wit, text)]
        places = [{tensor.data_ptr() for tensor in backbone.parameters()} for backbone in (humor, wit, text)]
        # what is not shared: the matrices A and B of an adapter
        adapted = sum(hasattr(layer, "lora_A") for layer in humor.modules())
        assert (len(packed[0] - packed[1]), len(packed[0] & packed[1])) == (2 * adapted, len(packed[0]) - 2 * adapted)
        assert adapted
        assert places[0] == places[1]
        assert not (packed[0] & packed[2]) | (places[0] & places[2])
        assert [model.loaded.lora for model in served.runtime.models.values()] == ["unmerged", "unmerged", "none"]


async def test_a_stored_picture_counts_more_than_its_bytes(roots: dict[str, Path]) -> None:
    """Or tiny ones, whose key and place are the most of them, would take many times what the store may hold."""
    async with serving(roots) as served:
        before = served.counted("reward_cache_bytes", "", cache="images")
        await served.score("humor", CAPTIONS, PICTURES[1])
        grown = served.counted("reward_cache_bytes", "", cache="images") - before
        assert grown == len(base64.b64decode(PICTURES[1])) + 400


async def test_what_is_known_of_one_model_is_unknown_to_the_other(roots: dict[str, Path]) -> None:
    """The same picture, prompt and captions: everything is computed once for each model, and only then known."""
    caches = ("scores", "prefixes", "features", "pixels")

    def lookups(name: str) -> list[list[float]]:
        return [
            [served.counted("reward_cache_lookups_total", name, cache=cache, result=result) for result in ("hit", "miss")]
            for cache in caches
        ]

    async with serving(roots) as served:
        before = {name: lookups(name) for name in ("humor", "wit")}
        usages = [[(await served.score(name, CAPTIONS, PICTURES[1]))["usage"] for _ in range(2)] for name in ("humor", "wit")]
        for (cold, warm), name in zip(usages, ("humor", "wit"), strict=True):
            assert (cold["computed_tokens"] > 0, warm["computed_tokens"]) == (True, 0)
            grown = [[now - then for now, then in zip(*each, strict=True)] for each in zip(lookups(name), before[name], strict=True)]
            assert grown == [[len(CAPTIONS), len(CAPTIONS)], [0, 1], [0, 1], [1, 1]]
        # another long edge: other pixels, fewer tokens
        assert usages[1][0]["tokens"] < usages[0][0]["tokens"]
        assert served.counted("reward_cache_entries", "", cache="images") == 2  # once for all models: this picture and the golden one


async def test_the_state_routes_tell_of_every_model(roots: dict[str, Path]) -> None:
    async with serving(roots) as served:
        listed = {each["id"]: each["fingerprint"] for each in (await served.client.get("/v1/models")).json()["data"]}
        assert list(listed) == list(NAMES)
        assert len(set(listed.values())) == 3
        info = (await served.client.get("/info")).json()
        assert (info["model"]["name"], info["model"]["fingerprint"]) == ("humor", listed["humor"])
        assert {name: card["model"]["fingerprint"] for name, card in info["models"].items()} == listed
        assert all(card["startcheck"] and card["selftest"]["passed"] for card in info["models"].values())
        told = (await served.client.post("/selftest")).json()
        assert {name: report["kind"] for name, report in told["models"].items()} == {"humor": "golden", "wit": "golden", "text": "probe"}
        families = {each.name: each for each in text_string_to_metric_families((await served.client.get("/metrics")).text)}
        loaded = {each.labels["model"]: each.labels["fingerprint"] for each in families["reward_model_info"].samples}
        assert loaded == listed
        for name in ("reward_golden_last_error", "reward_golden_tolerance"):
            assert {each.labels["model"] for each in families[name].samples} == set(NAMES)
        assert (await served.client.get("/readyz")).status_code == 200
        served.runtime.models["wit"].last_report = None
        assert (await served.client.get("/readyz")).status_code == 503


async def test_an_unknown_name_is_404(roots: dict[str, Path]) -> None:
    async with serving(roots) as served:
        answer = await served.client.post("/score", json={"model": "irony", "captions": ["a"], "image": PICTURES[0]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_unknown")


async def test_swapped_adapters_are_refused_by_the_golden_scores(roots: dict[str, Path], tmp_path: Path) -> None:
    """Both fit the base, and no hash vouches for either."""
    swapped = {}
    for name in ("humor", "wit"):
        swapped[name] = shutil.copytree(roots[name], tmp_path / name)
        shutil.rmtree(swapped[name] / "backbone_adapter")
        edit_json(swapped[name] / CONFIG_NAME, files={})
    shutil.copytree(roots["wit"] / "backbone_adapter", swapped["humor"] / "backbone_adapter")
    shutil.copytree(roots["humor"] / "backbone_adapter", swapped["wit"] / "backbone_adapter")
    with pytest.raises(ArtifactInvalid, match=r"^model humor: .* self-test failed: check D15"):
        async with serving(swapped):
            pass
    with pytest.raises(ArtifactInvalid, match=r"^model wit: .* self-test failed: check D15"):
        async with serving({"text": roots["text"], "humor": roots["humor"], "wit": swapped["wit"]}):
            pass


@pytest.mark.parametrize("what", ["adapter", "processor", "nothing there"])
async def test_a_start_that_is_refused_names_the_model(roots: dict[str, Path], tmp_path: Path, what: str) -> None:
    broken = tmp_path / "broken"
    if what != "nothing there":
        shutil.copytree(roots["wit"], broken)
        edit_json(broken / CONFIG_NAME, files={})
        shutil.rmtree(broken / ("backbone_adapter" if what == "adapter" else "processor"))
    with pytest.raises(ArtifactInvalid, match=r"^model wit: "):
        async with serving({"humor": roots["humor"], "wit": broken}):
            pass


async def test_caches_are_shared_out_over_the_models(roots: dict[str, Path]) -> None:
    flags = {"prefix_cache_bytes": 3 << 20, "feature_cache_bytes": 3 << 20, "score_cache_bytes": 3 * 7000, "pixel_cache_bytes": 3 << 20}
    async with serving(roots, **flags) as served:
        assert served.runtime.budgets.prefix_cache_bytes == 3 << 20
        for number in range(30):
            await served.score("text", [f"caption {number}"], None)
        assert served.counted("reward_cache_bytes", "text", cache="scores") == 7000
        assert served.counted("reward_cache_entries", "text", cache="scores") == 10
