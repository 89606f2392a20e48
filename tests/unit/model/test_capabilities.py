"""Unsupported settings are refused before anything is loaded; the machines are given, so any machine runs this."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_cpt.backend import cpu
from megatron_cpt.config import RunConfig, draft_config
from megatron_cpt.errors import UserError
from tests.helpers.runs import small_run

cpu.install()

from megatron_cpt.model.capabilities import (  # noqa: E402
    Machine,
    check_machine,
    parse_version,
    read_machine,
    with_fp8_backend,
)

RUN = {
    "name": "run",
    "output": "out",
    "model": "tiny_nemotron",
    "seq_length": 64,
    "batch": {"global": 2},
    "tokens": 1280,
    "schedule": {"max_lr": 1e-3},
    "sources": {"a": {"path": "a"}},
    "phases": [{"name": "one", "blend": {"a": 1.0}}],
}
LAPTOP = Machine()
A100 = Machine("NVIDIA A100", (8, 0), (12, 8), (2, 8))
L40 = Machine("NVIDIA L40", (8, 9), (12, 8), (2, 8))
H100 = Machine("NVIDIA H100", (9, 0), (12, 9), (2, 8))
H100_WITH_CUDA_12_8 = Machine("NVIDIA H100", (9, 0), (12, 8), (2, 8))
H100_BARE = Machine("NVIDIA H100", (9, 0), (12, 9))
H100_BROKEN = Machine("NVIDIA H100", (9, 0), (12, 9), fault="undefined symbol: cublasLtMatmul")
H100_OLD = Machine("NVIDIA H100", (9, 0), (12, 9), (2, 0))
B200 = Machine("NVIDIA B200", (10, 0), (13, 0), (2, 8))
RTX_5090 = Machine("NVIDIA RTX 5090", (12, 0), (13, 0), (2, 8))


def _run(*overrides: str) -> RunConfig:
    return draft_config(dict(RUN), list(overrides)).finish("run.yaml")


def _fp8(recipe: str) -> str:
    return f"precision.fp8.recipe={recipe}"


TE_DELAYED = "precision.fp8={backend: transformer_engine, recipe: delayed}"
NVFP4 = "precision.fp4.recipe=nvfp4"


@pytest.mark.parametrize(
    ("machine", "override"),
    [
        (LAPTOP, "precision.compute=bf16"),
        (LAPTOP, "precision.fp8.backend=emulated"),
        (LAPTOP, "precision.fp8.backend=torch"),
        (H100_BARE, _fp8("delayed")),
        (H100_BARE, _fp8("tensorwise")),
        (H100, _fp8("rowwise")),
        (H100_BARE, "precision.compute=bf16"),
        (A100, "parallel.context=2"),
        (L40, _fp8("delayed")),
        (L40, _fp8("tensorwise")),
        (H100, _fp8("delayed")),
        (H100, _fp8("tensorwise")),
        (H100, _fp8("blockwise")),
        (H100_OLD, _fp8("delayed")),
        (B200, _fp8("mxfp8")),
        (B200, NVFP4),
        (RTX_5090, NVFP4),
    ],
)
def test_supported_settings(machine, override):
    check_machine(_run(override), machine)


@pytest.mark.parametrize(
    ("machine", "override", "message"),
    [
        (
            LAPTOP,
            "parallel.context=2",
            "parallel.context: 2: needs Transformer Engine on a GPU; this machine has no CUDA",
        ),
        (
            LAPTOP,
            _fp8("delayed"),
            "recipe: delayed: needs Transformer Engine on a GPU; .*precision.fp8.backend=emulated",
        ),
        (LAPTOP, _fp8("mxfp8"), "recipe: mxfp8: needs Transformer Engine on a GPU; "),
        (LAPTOP, NVFP4, "fp4.recipe: nvfp4: needs Transformer Engine on a GPU"),
        (H100_BARE, _fp8("blockwise"), "this machine has NVIDIA H100 .compute capability 9.0., CUDA 12.9, no Transf"),
        (H100_BARE, TE_DELAYED, "needs Transformer Engine on a GPU; .*precision.fp8.backend=torch"),
        (A100, "precision.fp8={backend: torch}", "backend: torch: needs an Ada, Hopper or newer GPU .8.9.; "),
        (A100, _fp8("rowwise"), "backend: torch: needs an Ada, Hopper or newer GPU .8.9.; "),
        (H100_BROKEN, _fp8("delayed"), "does not load .undefined symbol: cublasLtMatmul"),
        (
            A100,
            _fp8("delayed"),
            "recipe: delayed: needs an Ada, Hopper or newer GPU .8.9.; this machine has NVIDIA A100",
        ),
        (A100, _fp8("tensorwise"), "needs an Ada, Hopper"),
        (L40, _fp8("blockwise"), "recipe: blockwise: needs a Hopper or newer GPU .9.0. and CUDA 12.9; "),
        (H100_WITH_CUDA_12_8, _fp8("blockwise"), "needs CUDA 12.9; "),
        (H100_OLD, _fp8("tensorwise"), "needs Transformer Engine 2.2; "),
        (H100_OLD, _fp8("blockwise"), "needs Transformer Engine 2.3; "),
        (H100, _fp8("mxfp8"), "recipe: mxfp8: needs a Blackwell data-center GPU .10.x.; "),
        (RTX_5090, _fp8("mxfp8"), "needs a Blackwell data-center GPU"),
        (H100, NVFP4, "nvfp4: needs a Blackwell GPU .10.0.; "),
    ],
)
def test_unsupported_settings_are_refused(machine, override, message):
    with pytest.raises(UserError, match=message):
        check_machine(_run(override), machine)


@pytest.mark.parametrize(
    ("machine", "override", "backend"),
    [
        (H100, _fp8("tensorwise"), "transformer_engine"),
        (H100, _fp8("rowwise"), "torch"),
        (H100, "precision.fp8.backend=torch", "torch"),
        (H100_BARE, _fp8("tensorwise"), "torch"),
        (H100_BARE, _fp8("mxfp8"), "transformer_engine"),
        (H100_BARE, "precision.fp8.params=true", "transformer_engine"),
        (H100_BROKEN, _fp8("tensorwise"), "transformer_engine"),  # its fault is reported
        (LAPTOP, _fp8("tensorwise"), "transformer_engine"),
        (LAPTOP, "precision.fp8.backend=emulated", "emulated"),
    ],
)
def test_the_machine_chooses_the_fp8_backend(machine, override, backend):
    fp8 = with_fp8_backend(_run(override), machine).precision.fp8
    assert fp8 is not None
    assert fp8.backend == backend


def test_shapes_are_checked_for_the_chosen_backend():
    run = _run(_fp8("tensorwise"), "seq_length=40", "tokens=800")
    check_machine(run, H100)
    with pytest.raises(UserError, match=r"a micro-batch has 40 tokens per rank, but torch needs a multiple of 16"):
        check_machine(run, H100_BARE)


def test_all_problems_come_at_once():
    with pytest.raises(UserError) as caught:
        check_machine(_run("parallel.context=2", _fp8("blockwise")), LAPTOP)
    assert "parallel.context: 2: needs" in str(caught.value)
    assert "precision.fp8.recipe: blockwise: needs" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "version"), [("2.8.0", (2, 8)), ("2.11.0.dev1+9ab2", (2, 11)), ("12.9", (12, 9)), ("3", (3, 0))]
)
def test_versions(text, version):
    assert parse_version(text) == version


def test_the_check_comes_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from megatron_cpt.train import setup
    from tests.helpers.runs import train_here

    def never(*_: object, **__: object) -> None:
        pytest.fail("data or checkpoints were read first")

    monkeypatch.setattr(setup, "open_streams", never)
    monkeypatch.setattr(setup, "newest_valid", never)
    monkeypatch.setattr(setup, "read_machine", lambda: A100)
    with pytest.raises(UserError, match="needs an Ada"):
        train_here(str(small_run(tmp_path)), ["precision={compute: bf16, fp8: {recipe: delayed}}"])
    assert not (tmp_path / "out").exists()


def test_this_machine_can_be_read():
    assert (read_machine().device is None) == (str(read_machine()) == "no CUDA device")
