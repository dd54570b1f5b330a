"""Prepacked and fused layers against plain torch, norm and rotary positions against transformers' own functions."""

from __future__ import annotations

import shutil
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm, apply_rotary_pos_emb, apply_rotary_pos_emb_vision

from app.artifacts import Artifact
from app.contracts import EncodedGroup
from app.encoding import Encoder
from app.engine import Engine
from app.layers import PrepackedLinear, can_prepack, compiled_steps, norm, plus, prepack, rotate, silu, times
from app.main import running
from app.model import load_model
from app.scoring import score_plain
from app.service import GroupRequest
from app.serving import describe
from app.settings import load_settings
from tests.scorers import MIB, reusing
from tests.tiny import encode, picture

quick = settings(max_examples=40, deadline=None, derandomize=True)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
each_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
RELATIVE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}  # of the largest value: bfloat16 keeps 8 bits and rounds once


def linear_of(inputs: int, outputs: int, *, bias: bool, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)


def packed(linear: nn.Linear) -> PrepackedLinear:
    return PrepackedLinear(linear)


def exact(linear: nn.Linear, x: Tensor) -> Tensor:
    """The product in float64 of what the layer holds."""
    return functional.linear(x.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double())


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype, *, roundings: int = 1) -> None:
    """`roundings`: how often a value is rounded to the format on its way."""
    assert found.dtype == dtype
    assert found.shape == expected.shape
    limit = roundings * RELATIVE[dtype] * max(1.0, float(expected.abs().max()))
    assert float((found.double() - expected.double()).abs().max()) <= limit


@quick
@given(
    shape=st.sampled_from([(1,), (7,), (600,), (1, 1), (2, 3), (1, 40), (5, 0)]),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_prepacked_layer_is_the_linear_layer(shape: tuple[int, ...], inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
    linear = linear_of(inputs, outputs, bias=bias, dtype=dtype)
    x = torch.randn(*shape, inputs, dtype=dtype)
    layer = packed(linear)
    assert (layer.in_features, layer.out_features) == (inputs, outputs)
    found = layer(x)
    assert found.shape == linear(x).shape
    if x.numel():
        assert_near(found, exact(linear, x), dtype)


@each_dtype
@each_bias
@pytest.mark.parametrize("rows", [1, 2, 63, 700])
@pytest.mark.parametrize("fuses", [True, False], ids=["on-tiles", "behind"])
def test_fused_steps_are_the_plain_ones(fuses: bool, rows: int, bias: bool, dtype: torch.dtype) -> None:
    linear = linear_of(64, 48, bias=bias, dtype=dtype)
    layer, x, other = PrepackedLinear(linear, fuses=fuses), torch.randn(rows, 64, dtype=dtype), torch.randn(rows, 48, dtype=dtype)
    kept = other.clone()
    product = exact(linear, x)
    for fused, plain, expected in (
        (silu(layer, x), silu(linear, x), functional.silu(product)),
        (times(layer, x, other), times(linear, x, other), product * other.double()),
        (plus(layer, x, other), plus(linear, x, other), product + other.double()),
    ):
        assert_near(fused, expected, dtype, roundings=4)  # oneDNN's exponential is good to a few units
        assert_near(plain, expected, dtype, roundings=4)
    assert torch.equal(other, kept)  # a residual is not written to


def test_fusing_rounds_once() -> None:
    """What the fusion is for beside speed: in bfloat16 it is nearer to the truth than rounding after each step."""
    linear = linear_of(64, 512, bias=False, dtype=torch.bfloat16)
    x, other = torch.randn(64, 64, dtype=torch.bfloat16), torch.randn(64, 512, dtype=torch.bfloat16)
    expected = exact(linear, x) * other.double()
    fused, plain = (float((times(each, x, other).double() - expected).norm()) for each in (PrepackedLinear(linear, fuses=True), linear))
    assert fused < plain


class Tower(nn.Module):
    """Plain linear layers at several depths, in a list, and layers that are no plain matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8, bias=False)) for _ in range(2)])
        self.norm = nn.LayerNorm(8)
        self.special = Special(8, 8)
        self.half = nn.Linear(8, 8).to(torch.float16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.special(self.norm(x))


class Special(nn.Linear):
    """Computes something else than its base."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_prepack_replaces_every_plain_layer_once_and_frees_its_weight() -> None:
    torch.manual_seed(0)
    tower, x = Tower().requires_grad_(False), torch.randn(9, 8)
    expected = tower(x)
    plain = [layer for layer in tower.modules() if can_prepack(layer)]
    weights, layers = [weakref.ref(layer.weight) for layer in plain], [weakref.ref(layer) for layer in plain]
    assert len(plain) == 5
    del plain
    assert prepack(tower) == 5
    assert [each() for each in (*weights, *layers)] == [None] * 10
    assert sum(type(layer) is nn.Linear for layer in tower.modules()) == 1  # of a format oneDNN is not asked for
    assert type(tower.special) is Special
    assert float((tower(x) - expected).abs().max()) <= 1e-6
    packed_layers = [layer for layer in tower.modules() if isinstance(layer, PrepackedLinear)]
    assert prepack(tower) == 0
    assert [layer for layer in tower.modules() if isinstance(layer, PrepackedLinear)] == packed_layers


def test_what_cannot_be_prepacked() -> None:
    assert can_prepack(nn.Linear(2, 2))
    assert can_prepack(nn.Linear(2, 2, dtype=torch.bfloat16))
    assert not can_prepack(nn.Linear(2, 2, dtype=torch.float64))
    assert not can_prepack(nn.Linear(2, 2, device="meta"))
    assert not can_prepack(Special(2, 2))
    assert not can_prepack(nn.Embedding(2, 2))
    assert not can_prepack(packed(linear_of(2, 2, bias=True)))


@each_dtype
def test_unmerged_lora_goes_on_working(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    tower = Tower().to(dtype)
    tower.special = tower.half = nn.Identity()
    adapted = get_peft_model(tower, LoraConfig(r=4, lora_alpha=8, target_modules=["first", "0.0", "1.0"], init_lora_weights=False)).eval()
    adapted.requires_grad_(False)
    x = torch.randn(9, 8, dtype=dtype)
    residual, expected = torch.randn(9, 8, dtype=dtype), adapted(x)
    fused = [silu(tower.first, x), times(tower.first, x, residual), plus(tower.first, x, residual)]
    assert prepack(adapted) == 11  # five bases, and two matrices of each of three adapters
    assert isinstance(tower.first.base_layer, PrepackedLinear)
    assert not isinstance(tower.first, PrepackedLinear)
    again = [silu(tower.first, x), times(tower.first, x, residual), plus(tower.first, x, residual)]
    for found, wanted in zip([adapted(x), *again], [expected, *fused], strict=True):
        assert_near(found, wanted, dtype, roundings=4)


@pytest.mark.parametrize("lora", ["merged", "unmerged"])
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 0.1)])
def test_a_prepacked_model_gives_the_scores_of_the_untouched_one(
    artifact: Artifact, encoder: Encoder, dtype: str, limit: float, lora: str
) -> None:
    group = encode(encoder, (300, 200), 0, ["the penguin", "an iceberg", "x", ""])
    model = load_model(artifact, dtype=dtype, lora=lora).model  # type: ignore[arg-type]
    (before,) = score_plain(model, [group])
    assert prepack(model) > 20
    (after,) = score_plain(model, [group])
    assert max(abs(a - b) for a, b in zip(before.values, after.values, strict=True)) <= limit


# Norm and positions


@each_dtype
@pytest.mark.parametrize("heads", [(), (3,)])  # of states, or of each head as Qwen3 has it
@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_norm_is_that_of_transformers(tokens: int, heads: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = Qwen2_5_VLRMSNorm(48, eps=1e-5).to(dtype).requires_grad_(False)
    layer.weight.normal_()
    hidden = torch.randn(tokens, *heads, 48, dtype=dtype) * 30
    found, expected = norm(hidden, layer), layer(hidden)
    assert found.shape == (tokens, *heads, 48)
    if tokens:
        assert_near(found, expected, dtype, roundings=2)


def test_norm_keeps_its_epsilon_and_large_values_finite() -> None:
    layer = Qwen2_5_VLRMSNorm(16, eps=1e-2).requires_grad_(False)
    small, large = torch.full((1, 16), 1e-3), torch.full((1, 16), 1e4, dtype=torch.bfloat16)
    assert torch.allclose(norm(small, layer), layer(small), rtol=1e-6)
    assert float(norm(small, layer).max()) < 0.1
    assert torch.isfinite(norm(large, layer.to(torch.bfloat16))).all()


@each_dtype
@pytest.mark.parametrize(("heads", "dim"), [(1, 2), (4, 16), (2, 128)])
def test_rotate_is_that_of_transformers(heads: int, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    angles = torch.randn(11, dim // 2) * 50
    cos, sin = (torch.cat([each, each], -1).to(dtype) for each in (angles.cos(), angles.sin()))  # [tokens, dim]
    query, key = torch.randn(11, heads, dim, dtype=dtype), torch.randn(11, 1, dim, dtype=dtype)
    kept = query.clone()
    halves = [each[:, None, : dim // 2].contiguous() for each in (cos, sin)]
    expected = apply_rotary_pos_emb(query.transpose(0, 1), key.transpose(0, 1), cos, sin, unsqueeze_dim=0)
    for tensor, wanted in zip((query, key), expected, strict=True):
        assert_near(rotate(tensor, *halves), wanted.transpose(0, 1), dtype, roundings=2)
    assert torch.equal(query, kept)
    if dtype == torch.float32:
        seen, _ = apply_rotary_pos_emb_vision(query, key, cos, sin)
        assert_near(rotate(query, *halves), seen, dtype, roundings=2)


def test_rotate_takes_views_and_leaves_lengths_alone() -> None:
    """A turn by no angle changes nothing; by any, no length."""
    whole = torch.randn(5, 3, 4, 16)
    query = whole.unbind(1)[1]
    still, angles = torch.zeros(5, 1, 8), torch.randn(5, 1, 8) * 9
    assert torch.equal(rotate(query, still.cos(), still.sin()), query)
    turned = rotate(query, angles.cos(), angles.sin())
    assert torch.allclose(turned.norm(dim=-1), query.norm(dim=-1), rtol=1e-5)
    assert torch.allclose(rotate(turned, angles.cos(), -angles.sin()), query, atol=1e-5)


# Compiled


torchs_own = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # its compiler imports what it deprecates
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler here")
CPU = torch.device("cpu")
LENGTHS = (2, 3, 5, 16, 17, 31, 48, 64, 100, 333)


def num_compiled() -> int:
    return int(counters["stats"]["unique_graphs"])


@torch.inference_mode()
def all_steps(num_tokens: int, width: int) -> list[Tensor]:
    """Every step on the same numbers, whoever calls and however often."""
    generator = torch.Generator().manual_seed(width)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    linear = nn.Linear(width, width)
    linear.weight, linear.bias = (nn.Parameter(draw(*shape), requires_grad=False) for shape in ((width, width), (width,)))
    layer = Qwen2_5_VLRMSNorm(width, eps=1e-6).requires_grad_(False)
    x, other, angles = draw(num_tokens, width), draw(num_tokens, width), draw(num_tokens, 1, 8)
    turned = rotate(x.view(num_tokens, width // 16, 16), angles.cos(), angles.sin())
    return [norm(x, layer), turned, silu(linear, x), times(linear, x, other), plus(linear, x, other)]


@needs_compiler
@torchs_own
def test_compiled_steps_compute_the_same_and_compile_once_for_all_lengths() -> None:
    expected = [all_steps(length, 80) for length in (1, 0, *LENGTHS)]
    with compiled_steps(CPU):
        before = num_compiled()
        all_steps(64, 80)
        after = num_compiled()
        assert after - before == 5
        found = [all_steps(length, 80) for length in (1, 0, *LENGTHS)]
        assert num_compiled() == after
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.allclose(one, other, atol=1e-5, rtol=1e-5) for one, other in zip(ours, theirs, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(all_steps(17, 80), expected[2 + LENGTHS.index(17)], strict=True))


@needs_compiler
@torchs_own
def test_another_thread_compiles_nothing_again() -> None:
    """The practice batch runs on the main thread, requests on the device's."""
    with compiled_steps(CPU), ThreadPoolExecutor(1) as device_thread:
        here = all_steps(64, 80)
        before = num_compiled()
        there = device_thread.submit(all_steps, 64, 80).result()
        assert num_compiled() == before
    assert all(torch.equal(one, other) for one, other in zip(here, there, strict=True))


@needs_compiler
@torchs_own
def test_a_compiled_model_gives_the_same_scores_and_deterministic_ones_in_any_company(artifact: Artifact, encoder: Encoder) -> None:
    captions = ["the penguin", "an iceberg", "x", "", "the penguin again and again, at length"]
    groups = [encode(encoder, (300, 200), 0, captions), encode(encoder, (120, 260), 1, captions[:2], "Be kind.")]
    alone = [encode(encoder, (300, 200), 0, [caption]) for caption in reversed(captions)]
    engine = Engine(load_model(artifact).model)
    expected = scores_of(engine, [groups], deterministic=False)
    with compiled_steps(CPU):
        found = scores_of(engine, [groups], deterministic=False)
        together = scores_of(engine, [groups], deterministic=True)
        single = scores_of(engine, [[group] for group in alone], deterministic=True)
    assert max(abs(one - other) for one, other in zip(found, expected, strict=True)) <= 1e-5
    assert found != expected  # else nothing was compiled
    assert together[: len(captions)] == single[::-1]


def scores_of(engine: Engine, batches: list[list[EncodedGroup]], *, deterministic: bool) -> list[float]:
    """By a scorer that remembers no score."""
    scorer = reusing(engine, max_bytes=(MIB, MIB, 0), deterministic=deterministic)
    return [value for groups in batches for scores in scorer.score(scorer.prepare(groups)) for value in scores.values]


@needs_compiler
@torchs_own
@pytest.mark.anyio
async def test_a_server_compiles_at_start_and_in_no_request(published: Path) -> None:
    """Pictures and captions of lengths that were not met before."""
    options = {"model": str(published), "offline": True, "num_threads": 1, "score_cache_bytes": 0}
    async with running(load_settings(**options, compile=True)) as runtime:
        before = num_compiled()
        told = describe(runtime)["runtime"]
        for number, size in enumerate([(90, 60), (400, 300), (30, 200)]):
            asked = GroupRequest(("x", "the penguin " * (number + 1), ""), image=picture(*size, number), prompt="Be kind. " * number)
            assert (await runtime.first.service.score([asked], timeout_s=60))[0].scores
        assert num_compiled() == before
    assert told["compile"]
    assert told["attention"] == {"text": "cpu", "images": "cpu"}


def test_without_a_compiler_the_start_is_refused(tmp_path: Path) -> None:
    """In a process that finds no program at all, nor what others compiled before."""
    script = "import torch\nfrom app.layers import compiled_steps\nwith compiled_steps(torch.device('cpu')):\n    print('compiled')"
    variables = {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=variables, check=False, timeout=300)
    assert "compiled" not in done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("app.errors.SettingsInvalid: PUNCHLINE_COMPILE: this machine cannot compile for cpu (")
    assert "No working C++ compiler" in last
