"""The head: float32 arithmetic, its files, and every file that must be refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from app.errors import ArtifactInvalid
from app.heads import LinearHead, load_head, save_head

GOOD = torch.arange(1.0, 9.0).reshape(1, 8)


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
    assert head.linear.weight.dtype == torch.float32
    assert torch.equal(head.linear.weight, GOOD)


def test_a_pickled_head_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"weight": GOOD}, tmp_path / "head.pt")
    load_head(tmp_path / "head.pt", (1, 8))
    assert "punchline convert" in caplog.text


def test_save_and_load_keep_every_bit(tmp_path: Path) -> None:
    torch.save({"weight": torch.randn(1, 8)}, tmp_path / "head.pt")
    head = load_head(tmp_path / "head.pt", (1, 8))
    save_head(head, tmp_path / "head.safetensors")
    assert torch.equal(load_head(tmp_path / "head.safetensors", (1, 8)).linear.weight, head.linear.weight)


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
