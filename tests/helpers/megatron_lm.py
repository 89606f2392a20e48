"""megatron-core used as Megatron-LM uses it: its optimizer, its scheduler, its saves and loads of checkpoints.

Order of calls and values follow `save_checkpoint` and `load_checkpoint` in
megatron/training/checkpointing.py of Megatron-LM, for `--ckpt-format torch_dist --use-distributed-optimizer
--dist-ckpt-optim-fully-reshardable`. Adam is our stand-in for FusedAdam, whose state has the same layout; torch's own
AdamW cannot be saved in this format without Transformer Engine or Apex.
"""

from __future__ import annotations

import argparse
import queue
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.config import RunConfig

CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


@dataclass(frozen=True)
class Training:
    """Model, optimizer and scheduler on this rank."""

    chunk: Any
    model: Any
    optimizer: Any
    scheduler: Any
    batch: int

    @classmethod
    def build(cls, config: RunConfig, *, max_lr: float, min_lr: float, steps: int) -> Training:
        """Build everything with random weights, and rates as `--lr`, `--min-lr` and `--train-iters` set them."""
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        from megatron_cpt.checkpoint.state.state_dicts import unwrap
        from megatron_cpt.model.build_model import build_model
        from megatron_cpt.optim.group_step_adam import install_if_needed

        install_if_needed()
        chunks = list(build_model(config).chunks)
        is_bf16 = config.precision.compute == "bf16"
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=max_lr,
                min_lr=min_lr,
                weight_decay=0.1,
                bf16=is_bf16,
                params_dtype=torch.bfloat16 if is_bf16 else torch.float32,
                use_distributed_optimizer=config.parallel.distributed_optimizer,
            ),
            chunks,
        )
        batch = config.batch.global_
        scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=max_lr,
            min_lr=min_lr,
            lr_warmup_steps=0,
            lr_decay_steps=steps * batch,
            lr_decay_style="cosine",
            start_wd=0.1,
            end_wd=0.1,
            wd_incr_steps=steps * batch,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
        )
        return cls(chunks[0], unwrap(chunks[0]), optimizer, scheduler, batch)

    def step(self, seed: int) -> None:
        """Apply one update with random gradients."""
        generator = torch.Generator().manual_seed(seed)
        self.optimizer.zero_grad()
        for parameter in self.model.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
        self.optimizer.step()
        self.scheduler.step(increment=self.batch)

    def save(self, folder: Path, iteration: int, arguments: argparse.Namespace) -> None:
        """Save as `iter_XXXXXXX` with the tracker file."""
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.mapping import ShardedObject
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        if getattr(filesystem_async, "_results_queue", False) is None:
            filesystem_async._results_queue = queue.Queue()  # megatron-core would start a process for it
        model = self.model.sharded_state_dict(metadata=self._metadata())
        random_states = [{"torch_rng_state": torch.get_rng_state()}]
        state = {
            "args": arguments,
            "checkpoint_version": 3.0,
            "iteration": iteration,
            "model": model,
            "optimizer": self.optimizer.sharded_state_dict({"model": model}, metadata=self._metadata()),
            "opt_param_scheduler": self.scheduler.state_dict(),
            "rng_state": ShardedObject("rng_state", random_states, (1, 1), (0, 0), replica_id=0),
        }
        path = folder / f"iter_{iteration:07d}"
        path.mkdir(parents=True)
        dist_checkpointing.save(state, str(path), content_metadata=dict(CONTENT))
        (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))

    def load(self, folder: Path, *, should_override_schedule: bool = False) -> tuple[int, argparse.Namespace]:
        """Load the newest iteration; return it and the arguments in the checkpoint."""
        from megatron.core import dist_checkpointing

        path = folder / f"iter_{int((folder / 'latest_checkpointed_iteration.txt').read_text()):07d}"
        assert dist_checkpointing.check_is_distributed_checkpoint(str(path))
        common = dist_checkpointing.load_common_state_dict(str(path))
        arguments = common["args"]
        assert arguments.no_save_rng  # or else random states would have to be there
        assert not arguments.no_save_optim
        metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
        metadata |= {key: value for key, value in self._metadata().items() if key == "dp_cp_group"}
        model = self.model.sharded_state_dict(metadata=metadata)
        wanted = {
            "model": model,
            "optimizer": self.optimizer.sharded_state_dict({"model": model}, metadata=metadata, is_loading=True),
            "opt_param_scheduler": self.scheduler.state_dict(),
        }
        state = dist_checkpointing.load(wanted, str(path), strict="assume_ok_unexpected")
        assert state["checkpoint_version"] == 3.0
        self.model.load_state_dict(state["model"], strict=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.use_checkpoint_opt_param_scheduler = should_override_schedule
        self.scheduler.load_state_dict(state["opt_param_scheduler"])
        return state["iteration"], arguments

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return weights, master weights and moments by name; complete on one data-parallel rank."""
        from megatron_cpt.optim.owned_weights import only_part, owned_weights

        found = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        part = only_part(self.optimizer)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for parameter in [owned.parameter for owned in owned_weights(part)]:
            for kind, tensor in part._get_main_param_and_optimizer_states(parameter).items():
                found[f"{kind}.{names[id(parameter)]}"] = tensor.detach().clone().view(parameter.shape)
        return found

    def _metadata(self) -> dict[str, Any]:
        from megatron.core import parallel_state

        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        return {**CONTENT, "dp_cp_group": group}
