"""Small checkpoints with random weights, written without a model, a run or transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.config import ModelConfig
from megatron_cpt.convert.checkpoint_files import write_records
from megatron_cpt.convert.mapping.shapes import expected_tensors
from megatron_cpt.convert.megatron.torch_dist_plan import Target, TensorSpec, plan_files
from megatron_cpt.convert.megatron.torch_dist_writer import extra_state_keys, write_extra_states, write_file
from megatron_cpt.convert.source import SourceCheckpoint

SMALL_MODEL = ModelConfig(layers=2, hidden=48, ffn_hidden=72, heads=4, kv_groups=2, head_dim=16, vocab=101)


def _unchanged(tensors: dict[str, torch.Tensor]) -> None:
    """Change nothing."""


@dataclass(frozen=True, kw_only=True)
class RandomCheckpoint:
    """Content of a checkpoint to write.

    Attributes:
        change: changes the tensors, by the local layer spec's names, before they are written.
        side_files: config and tokenizer files by name.
        state, run: more entries of state.json and run.yaml.
    """

    seed: int = 0
    model: ModelConfig = SMALL_MODEL
    dtype: torch.dtype = torch.float32
    target: Target = field(default_factory=Target)
    change: Callable[[dict[str, torch.Tensor]], None] = _unchanged
    side_files: Mapping[str, Path] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write the checkpoint and return its folder."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = expected_tensors(self.model)
        tensors = {name: torch.randn(shape, generator=generator).to(self.dtype) for name, shape in shapes.items()}
        self.change(tensors)
        specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        source = SourceCheckpoint(
            kind="torch_dist",
            family=None,
            model=self.model,
            specs=specs,
            read=lambda name, first, last: tensors[name][first:last],
            side_files=self.side_files,
        )
        folder.mkdir(parents=True)
        written = {
            plan.name: write_file(
                folder / plan.name, plan, specs, self.target.tensor, source.read, lambda num_bytes: None
            )
            for plan in plan_files(specs, self.model.layers, self.target)
        }
        written["__extra_0.distcp"] = write_extra_states(
            folder / "__extra_0.distcp", extra_state_keys(self.model.layers)
        )
        write_records(folder, folder.name, source, specs, written, state=self.state, run=self.run)
        return folder


def trained(step: int, **state: Any) -> dict[str, Any]:
    """Return entries of the state.json that a run writes after a step."""
    return {"run_id": "5e1f", "train": {"step": step, "tokens": 0, "samples_by_source": {}, "data": None}, **state}
