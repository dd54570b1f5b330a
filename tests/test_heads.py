"""The head: float32 arithmetic, its files, and every file that must be refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from app.artifacts import HeadSpec
from app.errors import ArtifactInvalid
from app.heads import Head, LinearHead, TwoLayerHead, head_from, head_spec_of, load_head, new_head, save_head

Tensors = dict[str, torch.Tensor]

GOOD = torch.arange(1.0, 9.0).reshape(1, 8)
TWO = HeadSpec(layers="two_layer", width=3, bias=True)
BARE = TWO.model_copy(update={"bias": False})
ACTIVATIONS: dict[str, nn.Module] = {"silu": nn.SiLU(), "gelu": nn.GELU(), "relu": nn.ReLU(), "tanh": nn.Tanh()}


class Malicious:
    """Unpickling this writes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., int], tuple[str]]:
        return os.system, (f"touch {self.trace}",)


def pickled(value: object) -> Callable[[Path], object]:
    return lambda folder: torch.save(value, folder / "head.pt")


def saved(**tensors: torch.Tensor) -> Callable[[Path], object]:
    return lambda folder: save_file(tensors, folder / "head.safetensors")


def cut(name: str, size: int) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        pickled({"weight": GOOD})(folder) if name.endswith(".pt") else saved(weight=GOOD)(folder)
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return write


FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("head.safetensors", lambda folder: None, "cannot be read"),
    "missing pickle": ("head.pt", lambda folder: None, "cannot be read"),
    "another width": ("head.pt", pickled({"weight": GOOD[:, :7]}), r"expected weight \[1, 8\] with one row, found \[1, 7\]"),
    "two rows": ("head.safetensors", saved(weight=GOOD.repeat(2, 1)), r"expected weight \[1, 8\] with one row, found \[2, 8\]"),
    "one dimension": ("head.safetensors", saved(weight=GOOD[0].clone()), r"found \[8\]"),
    "another key": ("head.safetensors", saved(score=GOOD), r"expected the one tensor 'weight', found \['score'\]"),
    "a bias": ("head.pt", pickled({"weight": GOOD, "bias": torch.ones(1)}), r"found \['bias', 'weight'\]"),
    "no key": ("head.pt", pickled({}), "found none"),
    "a bare tensor": ("head.pt", pickled(GOOD), "expected a dictionary of tensors, found Tensor"),
    "numbers": ("head.pt", pickled({"weight": [1.0]}), "expected a dictionary of tensors"),
    "whole numbers": ("head.pt", pickled({"weight": GOOD.long()}), "expected floating-point weight, found torch.int64"),
    "a sparse tensor": ("head.pt", pickled({"weight": GOOD.to_sparse()}), "expected floating-point weight, found .*sparse"),
    "NaN": ("head.safetensors", saved(weight=GOOD * float("nan")), "not finite"),
    "infinity": ("head.pt", pickled({"weight": GOOD / 0}), "not finite"),
    "all zero": ("head.pt", pickled({"weight": GOOD * 0}), "all zero"),
    "a whole module": ("head.pt", pickled(torch.nn.Linear(8, 1)), "refused to unpickle"),
    "cut pickle": ("head.pt", cut("head.pt", 900), "cannot be read|refused"),
    "empty pickle": ("head.pt", cut("head.pt", 0), "cannot be read|refused"),
    "cut safetensors": ("head.safetensors", cut("head.safetensors", 70), "cannot be read"),
    "empty safetensors": ("head.safetensors", cut("head.safetensors", 0), "cannot be read"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_head_is_refused_in_one_line_that_names_it(tmp_path: Path, fault: str) -> None:
    name, write, message = FAULTS[fault]
    write(tmp_path)
    with pytest.raises(ArtifactInvalid, match=message) as refusal:
        load_head(tmp_path / name, (1, 8))
    assert str(tmp_path / name) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_head_of_two_rows_is_refused_even_if_the_configuration_says_so(tmp_path: Path) -> None:
    save_file({"weight": GOOD.repeat(2, 1)}, tmp_path / "head.safetensors")
    with pytest.raises(ArtifactInvalid, match="one row"):
        load_head(tmp_path / "head.safetensors", (2, 8))


@pytest.mark.parametrize("value", ["alone", "in a dictionary"])
def test_pickled_code_does_not_run(tmp_path: Path, value: str) -> None:
    malicious = Malicious(tmp_path / "trace")
    torch.save(malicious if value == "alone" else {"weight": malicious}, tmp_path / "head.pt")
    with pytest.raises(ArtifactInvalid, match="refused to unpickle"):
        load_head(tmp_path / "head.pt", (1, 8))
    assert not (tmp_path / "trace").exists()
    torch.load(tmp_path / "head.pt", weights_only=False)  # the trap is real
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_heads_of_any_float_format_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save({"weight": GOOD.to(dtype)}, tmp_path / "head.pt")
    head = load_head(tmp_path / "head.pt", (1, 8))
    assert head.last.weight.dtype == torch.float32
    assert torch.equal(head.last.weight, GOOD)


def test_parameters_are_read_like_tensors(tmp_path: Path) -> None:
    torch.save({"weight": nn.Parameter(GOOD)}, tmp_path / "head.pt")
    weight = load_head(tmp_path / "head.pt", (1, 8)).last.weight
    assert (weight.is_leaf, torch.equal(weight, GOOD)) == (True, True)


def test_a_pickled_head_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"weight": GOOD}, tmp_path / "head.pt")
    load_head(tmp_path / "head.pt", (1, 8))
    assert "punchline convert" in caplog.text


def test_save_and_load_keep_every_bit(tmp_path: Path) -> None:
    torch.save({"weight": torch.randn(1, 8)}, tmp_path / "head.pt")
    head = load_head(tmp_path / "head.pt", (1, 8))
    save_head(head, tmp_path / "head.safetensors")
    assert torch.equal(load_head(tmp_path / "head.safetensors", (1, 8)).last.weight, head.last.weight)


def test_scores_are_float32_whatever_comes_in_and_under_autocast() -> None:
    head = LinearHead(8)
    with torch.no_grad():
        head.linear.weight.copy_(GOOD / 3)
    hidden = torch.randn(5, 8).bfloat16()
    expected = (hidden.double() @ (GOOD / 3).double().T).squeeze(-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(hidden)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, atol=1e-5, rtol=1e-6)


def test_a_new_head_scores_zero_so_that_training_starts_at_ln_2() -> None:
    assert LinearHead(8)(torch.randn(3, 8)).tolist() == [0.0, 0.0, 0.0]


def two_layers(**changes: torch.Tensor | None) -> Tensors:
    """Tensors that fit TWO, with some of them changed, or left out if None; `first_weight` stands for `0.weight`."""
    torch.manual_seed(0)
    tensors = {"0.weight": torch.randn(3, 8), "0.bias": torch.randn(3), "2.weight": torch.randn(1, 3), "2.bias": torch.randn(1)}
    named = {name.replace("first_", "0.").replace("last_", "2."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in (tensors | named).items() if tensor is not None}


LINEAR_BIAS = HeadSpec(bias=True)
NAN, ONE = float("nan"), torch.ones(1)
REFUSALS: dict[str, tuple[Tensors, HeadSpec, str]] = {
    "no first weight": (two_layers(first_weight=None), TWO, "expected the tensors .*, found .*'0.bias', '2.bias', '2.weight'"),
    "no last weight": (two_layers(last_weight=None), TWO, "expected the tensors"),
    "no first bias": (two_layers(first_bias=None), TWO, "expected the tensors"),
    "no last bias": (two_layers(last_bias=None), TWO, "expected the tensors"),
    "nothing": ({}, TWO, "found none"),
    "a third layer": (two_layers() | {"4.weight": ONE}, TWO, "expected the tensors"),
    "biases nobody wants": (two_layers(), BARE, r"expected the tensors \['0.weight', '2.weight'\], found"),
    "a linear head's": ({"weight": GOOD}, TWO, r"found \['weight'\]"),
    "a two-layer head's": (two_layers(), HeadSpec(), "expected the one tensor 'weight', found"),
    "another width": (two_layers(first_weight=torch.ones(4, 8)), TWO, r"expected 0.weight \[3, 8\], found \[4, 8\]"),
    "another hidden size": (two_layers(first_weight=torch.ones(3, 7)), TWO, r"expected 0.weight \[3, 8\], found \[3, 7\]"),
    "first transposed": (two_layers(first_weight=torch.ones(8, 3)), TWO, r"found \[8, 3\]"),
    "first bias of one value": (two_layers(first_bias=ONE), TWO, r"expected 0.bias \[3\], found \[1\]"),
    "two scores": (two_layers(last_weight=torch.ones(2, 3)), TWO, r"expected 2.weight \[1, 3\] with one row, found \[2, 3\]"),
    "last bias of two values": (two_layers(last_bias=torch.ones(2)), TWO, r"expected 2.bias \[1\], found \[2\]"),
    "whole numbers": (two_layers(first_weight=torch.ones(3, 8).long()), TWO, "expected floating-point 0.weight, found torch.int64"),
    "a whole-numbered bias": (two_layers(last_bias=ONE.long()), TWO, "expected floating-point 2.bias"),
    "first not finite": (two_layers(first_weight=torch.full((3, 8), NAN)), TWO, "0.weight is not finite"),
    "first bias not finite": (two_layers(first_bias=torch.full((3,), NAN)), TWO, "0.bias is not finite"),
    "last not finite": (two_layers(last_weight=torch.ones(1, 3) / 0), TWO, "2.weight is not finite"),
    "last bias not finite": (two_layers(last_bias=-ONE / 0), TWO, "2.bias is not finite"),
    "first all zero": (two_layers(first_weight=torch.zeros(3, 8)), TWO, "0.weight is all zero"),
    "last all zero": (two_layers(last_weight=torch.zeros(1, 3)), TWO, "2.weight is all zero"),
    "beyond float32": (two_layers(last_weight=torch.full((1, 3), 1e300, dtype=torch.float64)), TWO, "2.weight is not finite"),
    "zero in float32": (two_layers(last_weight=torch.full((1, 3), 1e-300, dtype=torch.float64)), TWO, "2.weight is all zero"),
    "linear without its bias": ({"weight": GOOD}, LINEAR_BIAS, r"expected the tensors \['bias', 'weight'\], found \['weight'\]"),
    "linear bias not finite": ({"weight": GOOD, "bias": ONE * NAN}, LINEAR_BIAS, "bias is not finite"),
    "linear bias of no dimension": ({"weight": GOOD, "bias": torch.tensor(1.0)}, LINEAR_BIAS, r"expected bias \[1\], found \[\]"),
    "linear bias of two": ({"weight": GOOD, "bias": torch.ones(2)}, LINEAR_BIAS, r"expected bias \[1\], found \[2\]"),
    "a width no machine has": (two_layers(), TWO.model_copy(update={"width": 1 << 50}), "expected 0.weight"),
}


@pytest.mark.parametrize("fault", REFUSALS)
def test_tensors_of_another_head_are_refused_in_one_line(fault: str) -> None:
    tensors, spec, message = REFUSALS[fault]
    with pytest.raises(ArtifactInvalid, match=message) as refusal:
        head_from(tensors, spec, (1, 8), "here.safetensors")
    assert str(refusal.value).startswith("here.safetensors: ")
    assert "\n" not in str(refusal.value)


UNKNOWN: dict[str, Tensors] = {
    "nothing": {},
    "another name": {"score": GOOD},
    "half a bias": two_layers(first_bias=None),
    "both heads": two_layers() | {"weight": GOOD},
    "no width": two_layers(first_weight=torch.ones(0, 8)),
    "a number": two_layers(first_weight=torch.tensor(1.0)),
}


@pytest.mark.parametrize("fault", UNKNOWN)
def test_what_is_no_head_has_no_spec(fault: str) -> None:
    with pytest.raises(ArtifactInvalid, match=r"^v_head: expected .*, found"):
        head_spec_of(UNKNOWN[fault], "v_head")


@pytest.mark.parametrize("spec", [HeadSpec(), LINEAR_BIAS, BARE, TWO], ids=str)
def test_names_and_shapes_tell_everything_but_the_activation(spec: HeadSpec, tmp_path: Path) -> None:
    head = filled(spec, 8)
    assert head_spec_of(head.stack.state_dict()) == spec
    save_head(head, tmp_path / "head.safetensors")
    again = load_head(tmp_path / "head.safetensors", (1, 8), spec)
    assert all(torch.equal(tensor, head.stack.state_dict()[name]) for name, tensor in again.stack.state_dict().items())
    assert (again.spec, again.in_features, again.device) == (spec, 8, torch.device("cpu"))


def filled(spec: HeadSpec, hidden_size: int, seed: int = 0) -> Head:
    """A head off zero."""
    torch.manual_seed(seed)
    head = new_head(spec, hidden_size)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    return head


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 9),
    st.sampled_from(sorted(ACTIVATIONS)),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 1 << 16),
)
def test_a_two_layer_head_is_sequential_of_float64(
    hidden_size: int, width: int, rows: int, activation: str, bias: bool, dtype: torch.dtype, seed: int
) -> None:
    """The definition, computed in float64; under autocast as without."""
    head = filled(
        HeadSpec.model_validate({"layers": "two_layer", "width": width, "activation": activation, "bias": bias}), hidden_size, seed
    )
    twin = nn.Sequential(nn.Linear(hidden_size, width, bias=bias), ACTIVATIONS[activation], nn.Linear(width, 1, bias=bias)).double()
    twin.load_state_dict(head.stack.state_dict())
    hidden = torch.randn(rows, hidden_size).to(dtype)
    expected = twin(hidden.double()).squeeze(-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(hidden)
    assert (found.dtype, found.shape) == (torch.float32, (rows,))
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_bias_moves_all_scores_alike() -> None:
    hidden = torch.randn(5, 8)
    plain, biased = (head_from({"weight": GOOD} | bias, HeadSpec(bias=bool(bias)), (1, 8), "x")(hidden) for bias in ({}, {"bias": ONE * 3}))
    torch.testing.assert_close(biased - plain, torch.full((5,), 3.0))


def test_a_loaded_head_does_not_share_memory_with_what_it_was_made_of() -> None:
    tensors = two_layers()
    head = head_from(tensors, TWO, (1, 8), "x")
    tensors["0.weight"].zero_()
    assert head.stack.state_dict()["0.weight"].any()


def test_a_new_two_layer_head_scores_zero_and_learns_from_the_second_step_on() -> None:
    """Zero in the last layer stops the first one's gradient for one step only; zero in both would stop it for good."""
    torch.manual_seed(0)
    head, hidden = new_head(TWO, 8), torch.randn(6, 8)
    assert isinstance(head, TwoLayerHead)
    optimiser = torch.optim.SGD(head.parameters(), lr=0.1)
    norms = []
    for _ in range(2):
        optimiser.zero_grad()
        scores = head(hidden)
        nn.functional.softplus(scores[1::2] - scores[::2]).mean().backward()  # type: ignore[no-untyped-call]
        norms.append([float(parameter.grad.norm()) for parameter in head.parameters() if parameter.grad is not None])
        optimiser.step()
    assert new_head(TWO, 8)(hidden).tolist() == [0.0] * 6
    (first, _, last, _), (first_later, *_) = norms
    assert (first, last > 0, first_later > 0) == (0.0, True, True)
