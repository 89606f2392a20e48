"""Settings of deterministic runs: set before CUDA starts, refused by name if the environment contradicts, restored."""

from __future__ import annotations

import os

import pytest
import torch

from megatron_cpt.backend import kernel_settings
from megatron_cpt.backend.deterministic import VARIABLES
from megatron_cpt.errors import UserError


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "NVTE_FUSED_ATTN"):
        monkeypatch.delenv(name, raising=False)


def _state() -> tuple[bool, bool, bool, dict[str, str | None]]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        {name: os.environ.get(name) for name in (*VARIABLES, "NVTE_FUSED_ATTN")},
    )


def _fail_inside() -> None:
    with kernel_settings(deterministic=True):
        on, _, fills, variables = _state()
        assert (on, fills) == (True, False)
        assert variables["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert variables["NCCL_ALGO"] == "^NVLS"
        assert variables["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
        raise RuntimeError("inside")


def test_settings_hold_inside_and_are_restored_after_an_error() -> None:
    before = _state()
    with pytest.raises(RuntimeError, match="inside"):
        _fail_inside()
    assert _state() == before


def test_settings_of_the_program_around_come_back() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with kernel_settings(deterministic=True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_without_the_key_only_the_variables_of_attention_are_restored() -> None:
    before = _state()
    with kernel_settings(deterministic=False):
        assert _state() == before
        os.environ["NVTE_FUSED_ATTN"] = "0"  # as megatron-core does when it builds a model
    assert _state() == before


def test_deterministic_values_of_the_user_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with kernel_settings(deterministic=True):
        assert (os.environ["NCCL_ALGO"], os.environ["CUBLAS_WORKSPACE_CONFIG"]) == ("Tree", ":16:8")
    assert os.environ["NCCL_ALGO"] == "Tree"


@pytest.mark.parametrize(
    ("name", "value"),
    [("CUBLAS_WORKSPACE_CONFIG", ":0:0"), ("NCCL_ALGO", "NVLS"), ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")],
)
def test_other_values_are_refused_by_name(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    before = _state()
    with pytest.raises(UserError, match=f"deterministic: {name}={value} allows"), kernel_settings(deterministic=True):
        pytest.fail("entered")
    assert _state() == before


def test_cuda_must_not_have_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="must be set before CUDA starts"), kernel_settings(deterministic=True):
        pytest.fail("entered")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with kernel_settings(deterministic=True):
        pass
