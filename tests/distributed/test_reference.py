"""Training equals a plain PyTorch loop over transformers' model classes, for every family, layout and kind of mask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_cpt.convert.exporter import ExportOptions, export_checkpoint
from megatron_cpt.convert.importer import ImportOptions, import_checkpoint
from megatron_cpt.provenance.trace import trace_step
from tests.helpers.hf_models import FAMILY_CONFIGS, save_hf_model
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import newest, read_metrics, small_run, train_here
from tests.reference.loop import Result, Settings, Step, train

STEPS, BATCH, LENGTH = 8, 8, 32
# None is a multiple of 128, so every model has rows of padding.
VOCABULARIES = {"nemotron": 257, "llama": 301, "mistral": 259, "qwen2": 500, "qwen3": 257, "smollm": 300}
# `mistral` and `smollm` have llama's layers, so their runs take place in long tests
FAMILIES = ("llama", "nemotron", "qwen2", "qwen3")
# number of ranks -> layout -> overrides; `tp2` and `pp2` are parts of `tp2-pp2`, so their runs take place in long tests
LAYOUTS: dict[int, dict[str, list[str]]] = {
    1: {"alone": []},
    4: {"tp2-pp2": ["parallel={tensor: 2, pipeline: 2}"]},
}
LONG_LAYOUTS = {2: {"dp2": [], "tp2": ["parallel={tensor: 2, sequence: true}"], "pp2": ["parallel.pipeline=2"]}}
# A large epsilon, because Adam divides by the gradient's size: at 1e-8 a gradient that is zero but for rounding moves a
# weight by the whole learning rate in a random direction.
SETTINGS = Settings(steps=STEPS, max_lr=1e-3, min_lr=1e-5, eps=1e-5)
VARIANTS = {
    "attention": (
        "documents={eod_id: 256, reset_attention: true}",
        replace(SETTINGS, reset_attention=True),
    ),
    "positions": (
        "documents={eod_id: 256, reset_attention: true, reset_positions: true, eod_loss: false}",
        replace(SETTINGS, reset_attention=True, reset_positions=True, eod_loss=False),
    ),
    "loss": ("documents={eod_id: 256, eod_loss: false}", replace(SETTINGS, eod_loss=False)),
    "skipped": (
        "resilience={spike: {action: skip, sigma: 0.5, window: 4, warmup: 2}}",
        replace(SETTINGS, spike=(0.5, 4, 2)),
    ),
}
VARIANT_FAMILY = "llama"


def _prepare(folder: Path, family: str) -> None:
    """Write a Hugging Face model, import it, and write the run.yaml that starts from it."""
    sizes = {"vocab_size": VOCABULARIES[family], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    import_checkpoint(save_hf_model(folder / "hf", family, **sizes), folder / "base", ImportOptions())
    run_file = small_run(
        folder,
        tokens=STEPS * BATCH * LENGTH,
        init={"from": str(folder / "base")},
        schedule={"shape": "cosine", "max_lr": SETTINGS.max_lr, "min_lr": SETTINGS.min_lr},
        optimizer={"eps": SETTINGS.eps},
    )
    run = yaml.safe_load(run_file.read_text())
    del run["model"]  # taken from the checkpoint
    run_file.write_text(yaml.safe_dump(run, sort_keys=False))


def _train_all(runs: Sequence[tuple[str, Sequence[str]]]) -> None:
    for path, overrides in runs:
        train_here(path, overrides)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train `FAMILIES` in `LAYOUTS`, and one family with every variant; return the folder of the families."""
    root = tmp_path_factory.mktemp("reference")
    for family in FAMILIES:
        _prepare(root / family, family)
    _train_in(root, LAYOUTS, FAMILIES, VARIANTS)
    return root


@pytest.fixture(scope="module")
def long_outputs(outputs: Path) -> Path:
    """Train every family and variant in all layouts."""
    others = sorted(set(FAMILY_CONFIGS) - set(FAMILIES))
    for family in others:
        _prepare(outputs / family, family)
    _train_in(outputs, LAYOUTS, others, ())
    _train_in(outputs, LONG_LAYOUTS, sorted(FAMILY_CONFIGS), VARIANTS)
    return outputs


def _train_in(
    root: Path, layouts_by_ranks: dict[int, dict[str, list[str]]], families: Iterable[str], variants: Iterable[str]
) -> None:
    run_files = {family: root / family / "run.yaml" for family in families}
    for num_ranks, layouts in layouts_by_ranks.items():
        runs = []
        for layout, changes in layouts.items():
            for family, path in run_files.items():
                runs.append((str(path), [*changes, f"output={root}/{family}/{layout}"]))
            for variant in variants:
                output = f"output={root}/{VARIANT_FAMILY}/{variant}-{layout}"
                runs.append((str(run_files[VARIANT_FAMILY]), [*changes, VARIANTS[variant][0], output]))
        run_ranks(num_ranks, _train_all, runs, timeout=900)


def _train_plain_pytorch(
    folder: Path, output: str, settings: Settings, num_steps: int = STEPS
) -> tuple[Result, dict[str, torch.Tensor]]:
    """Return the reference's losses on the samples of a run, and its final weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32, attn_implementation="eager")
    traces = [trace_step(folder / output, step) for step in range(1, num_steps + 1)]
    steps = [Step(trace.phase, [sample.to_dict() for sample in trace.samples]) for trace in traces]
    result = train(model.train(), steps, settings)
    return result, {name: tensor.detach() for name, tensor in model.state_dict().items()}


def _assert_equal_to_plain_pytorch(
    folder: Path,
    settings: Settings,
    *,
    variant: str = "",
    layouts_by_ranks: dict[int, dict[str, list[str]]] = LAYOUTS,
) -> Result:
    reference, weights = _train_plain_pytorch(folder, f"{variant}alone", settings)
    for layout in (name for layouts in layouts_by_ranks.values() for name in layouts):
        output = folder / f"{variant}{layout}"
        lines = read_metrics(output)
        assert [line["loss"] for line in lines] == pytest.approx(reference.losses, rel=1e-5), layout
        assert [line["grad_norm"] for line in lines] == pytest.approx(reference.grad_norms, rel=1e-5), layout
        for line, by_source in zip(lines, reference.by_source, strict=True):
            assert line["loss_by_source"] == pytest.approx(by_source, rel=1e-5), layout
        assert lines[-1]["skipped_updates"] == len(reference.skipped)
        exported = _export(output)
        assert exported
        for name, tensor in exported.items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-5, atol=1e-5, msg=f"{layout}: {name}")
    return reference


def _export(output: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    export_checkpoint(newest(output), output / "hf", ExportOptions())
    return {name: tensor for file in (output / "hf").glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_training_equals_plain_pytorch(outputs: Path, family: str) -> None:
    reference = _assert_equal_to_plain_pytorch(outputs / family, SETTINGS)
    assert reference.losses[-1] < reference.losses[0] - 0.01, "the run must learn, or equal losses would prove nothing"


@pytest.mark.parametrize("variant", VARIANTS)
def test_masks_and_skipped_steps_equal_plain_pytorch(outputs: Path, variant: str) -> None:
    reference = _assert_equal_to_plain_pytorch(outputs / VARIANT_FAMILY, VARIANTS[variant][1], variant=f"{variant}-")
    assert bool(reference.skipped) == (variant == "skipped")
    if variant != "skipped":
        plain = read_metrics(outputs / VARIANT_FAMILY / "alone")
        assert reference.losses[0] != pytest.approx(plain[0]["loss"], rel=1e-4), "the documents must matter"


def test_padding_takes_part_in_the_softmax_only_if_asked(outputs: Path) -> None:
    folder = outputs / "qwen2"
    overrides = ["model.padding_in_softmax=true", "stop_at_step=1", f"output={folder}/padded"]
    run_ranks(1, train_here, str(folder / "run.yaml"), overrides)
    (line,) = read_metrics(folder / "padded")
    settings = replace(SETTINGS, padding=512 - VOCABULARIES["qwen2"])
    reference, _ = _train_plain_pytorch(folder, "alone", settings, num_steps=1)
    assert line["loss"] == pytest.approx(reference.losses[0], rel=1e-5)
    assert line["loss"] > read_metrics(folder / "alone")[0]["loss"] + 1e-3


@pytest.mark.long
@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS))
def test_long_layouts_equal_plain_pytorch(long_outputs: Path, family: str) -> None:
    layouts = LONG_LAYOUTS if family in FAMILIES else LAYOUTS | LONG_LAYOUTS
    _assert_equal_to_plain_pytorch(long_outputs / family, SETTINGS, layouts_by_ranks=layouts)


@pytest.mark.long
@pytest.mark.parametrize("variant", VARIANTS)
def test_masks_and_skipped_steps_in_long_layouts_equal_plain_pytorch(long_outputs: Path, variant: str) -> None:
    _assert_equal_to_plain_pytorch(
        long_outputs / VARIANT_FAMILY, VARIANTS[variant][1], variant=f"{variant}-", layouts_by_ranks=LONG_LAYOUTS
    )
