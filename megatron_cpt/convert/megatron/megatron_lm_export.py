"""Export of a checkpoint as a folder from which Megatron-LM's `--load` resumes: weights, moments, schedule, samples.

The tensors of our checkpoints are Megatron-LM's already, by name and shape, so their files are copied. Added are the
values that Megatron-LM looks up in `common.pt`, and the names of its folders:

    OUT/latest_checkpointed_iteration.txt      500
    OUT/iter_0000500/common.pt                 args, iteration, checkpoint_version, opt_param_scheduler, ...

Rules: `load_checkpoint`, `load_args_from_checkpoint` and `check_checkpoint_args` in megatron/training/checkpointing.py,
`load_state_dict` in megatron/core/optimizer_param_scheduler.py, as of megatron-core 0.16 and 0.19. Random states
are omitted (`no_save_rng`): Megatron-LM keeps pickles of other generators.
"""

from __future__ import annotations

import argparse
import pickle
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_cpt.checkpoint.layout import PLAN_FILE, resolve_checkpoint
from megatron_cpt.checkpoint.manifest import CorruptCheckpointError, FileDigest, Verify, find_faults, is_shard
from megatron_cpt.checkpoint.record import SavedRun, corrupt_as_refused, read_json, read_saved_run
from megatron_cpt.checkpoint.torchfile.unpickle import METADATA_FILE, read_metadata
from megatron_cpt.config import Activation, ModelConfig, Norm
from megatron_cpt.convert.job import Advance, JobFolder, no_progress, refuse_existing, run_parallel
from megatron_cpt.convert.megatron.config import read_megatron_model
from megatron_cpt.convert.megatron.torch_dist_reader import TorchDistWeights
from megatron_cpt.convert.megatron.torch_dist_writer import extra_state_keys, write_common, write_extra_states
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.identity import check_unchanged, identify
from megatron_cpt.files.output_path import refuse_output_inside
from megatron_cpt.files.system_errors import os_errors_as_cpt_errors
from megatron_cpt.files.whole_io import copy_file, write_content

_CHECKPOINT_VERSION = 3.0  # of Megatron-LM; before 2.0 the rows of linear_qkv had another order
_EXTRA_STATE_FILE = "__megatron_lm_0.distcp"
_DECAY_STYLES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "wsd": "WSD"}


@dataclass(frozen=True)
class MegatronLmReport:
    """Result of an export.

    Attributes:
        iteration: iteration from which Megatron-LM resumes; 0: the checkpoint has weights only.
        flags: arguments of Megatron-LM that the checkpoint needs.
        notes: differences that no argument removes.
    """

    iteration: int
    num_bytes: int
    flags: list[str]
    notes: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return asdict(self)


def export_megatron_lm(
    source: str | Path,
    target: str | Path,
    *,
    verify: Verify = "full",
    workers: int = 0,
    advance: Advance = no_progress,
) -> MegatronLmReport:
    """Export one of our checkpoints for Megatron-LM.

    Args:
        source: a checkpoint, or a run directory (its newest checkpoint).
        target: the folder to create, for `--load`; it must not exist.
        verify: share of the checksums to compare; shards are compared after the copy.
        workers: number of threads; 0: one per core.
        advance: progress callback, see `Advance`.

    Raises:
        UserError: the source does not exist, the target exists or is inside it, or the disk is too small.
        RefusedError: the source is corrupt or no checkpoint of ours, or Megatron-LM's arguments cannot describe its
            model.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise UserError(f"{source}: no such checkpoint or run directory")
    refuse_existing(target)
    path, started = resolve_checkpoint(source), time.perf_counter()
    refuse_output_inside(target, path)
    saved = read_saved_run(path)
    if faults := find_faults(path, verify, with_shards=False, manifest=saved.manifest):
        raise CorruptCheckpointError(path, faults)
    weights = TorchDistWeights(path)
    with corrupt_as_refused(path):
        run = _RunFacts.read(saved, read_megatron_model(path, weights, {}, None))
        common = run.common(weights.common())
    shards = {name: expected for name, expected in saved.manifest.items() if is_shard(name) or name == METADATA_FILE}
    identities = identify(path / name for name in shards)
    num_bytes = sum(expected.size for expected in shards.values())
    job = {"source": str(path.resolve()), "manifest": {name: expected.checksum for name, expected in shards.items()}}
    work_path = target.with_name(f".{target.name}.tmp")
    with os_errors_as_cpt_errors(work_path), JobFolder(work_path, target, job, needed_bytes=num_bytes) as work:
        folder = work.path / (f"iter_{run.iteration:07d}" if run.has_optimizer else "release")
        folder.mkdir(exist_ok=True)
        copied = {line["file"] for line in work.journal.lines if not _has_fault(folder, line["file"], shards)}

        def copy(name: str) -> None:
            copy_file(path / name, folder / name)
            work.journal.record({"file": name})
            advance(shards[name].size, num_bytes)

        # .metadata again: a call that was interrupted may have added to it
        run_parallel(copy, [name for name in shards if name not in copied or name == METADATA_FILE], workers)
        check_unchanged(identities)
        if faults := find_faults(folder, verify, manifest=shards):
            raise CorruptCheckpointError(path, faults)
        _add_extra_states(folder, run.model.layers)
        write_common(folder, common)
        tracker = work.path / "latest_checkpointed_iteration.txt"
        write_content(tracker, f"{run.iteration}\n".encode() if run.has_optimizer else b"release\n")
        work.publish()
    return MegatronLmReport(
        run.iteration if run.has_optimizer else 0,
        num_bytes,
        run.flags(target),
        run.notes(),
        time.perf_counter() - started,
    )


def _has_fault(folder: Path, name: str, shards: Mapping[str, FileDigest]) -> bool:
    """Return whether the copy that an earlier call has made of a shard is not the shard."""
    return name not in shards or bool(find_faults(folder, manifest={name: shards[name]}))


def _add_extra_states(folder: Path, num_layers: int) -> None:
    """Add the empty FP8 states of Transformer Engine's layers, which a run without these layers has not saved."""
    metadata = read_metadata(folder)
    missing = [key for key in extra_state_keys(num_layers) if key not in metadata.state_dict_metadata]
    if not missing:
        return
    for entry in write_extra_states(folder / _EXTRA_STATE_FILE, missing).entries:
        metadata.state_dict_metadata[entry.key] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(entry.key)] = _StorageInfo(_EXTRA_STATE_FILE, entry.position, entry.length)
    write_content(folder / METADATA_FILE, pickle.dumps(metadata))


@dataclass(frozen=True)
class _RunFacts:
    """Values of a run that Megatron-LM keeps in its checkpoints.

    Attributes:
        run: the resolved run.yaml.
        model: its model.
        layout: sizes of the ranks that saved.
        iteration, samples: trained so far.
        schedule: the plan's schedule in steps; empty for imported weights.
        segments: parts of the plan with one batch and one sequence length each.
    """

    run: Mapping[str, Any]
    model: ModelConfig
    layout: Mapping[str, int]
    has_optimizer: bool
    iteration: int
    samples: int
    schedule: Mapping[str, Any]
    segments: list[Mapping[str, Any]]

    @classmethod
    def read(cls, saved: SavedRun, model: ModelConfig) -> _RunFacts:
        plan = read_json(saved.path / PLAN_FILE) if PLAN_FILE in saved.manifest else {}
        is_run = "schedule" in plan
        train = saved.state["train"]
        return cls(
            run=saved.run,
            model=model,
            layout=saved.state["layout"],
            has_optimizer=is_run,
            iteration=int(train["step"]),
            samples=sum(train["samples_by_source"].values()),
            schedule=plan.get("schedule", {}),
            segments=[part for phase in plan.get("phases", []) for part in phase["stretches"]],
        )

    @property
    def is_distributed(self) -> bool:
        return bool(self.run["parallel"]["distributed_optimizer"]) if self.has_optimizer else False

    def common(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of common.pt; `stored` is the content in our checkpoint."""
        common = dict(stored) if self.has_optimizer else {}
        common |= {
            "args": argparse.Namespace(**self._arguments()),
            "iteration": self.iteration if self.has_optimizer else 0,
            "checkpoint_version": _CHECKPOINT_VERSION,
            "content_metadata": {
                **({"distrib_optim_sharding_type": "fully_reshardable"} if self.is_distributed else {}),
                **({"distrib_optim_fully_reshardable_mem_efficient": False} if self.is_distributed else {}),
                "singleton_local_shards": False,
                "chained_optim_avoid_prefix": True,
            },
        }
        if self.has_optimizer:
            common["opt_param_scheduler"] = self._scheduler()
            for group in _groups(common):  # checkpoints of earlier versions have constants here
                group |= {"max_lr": self.schedule["max_lr"], "min_lr": self.schedule["min_lr"]}
        return common

    def flags(self, target: Path) -> list[str]:
        """Return the arguments that Megatron-LM needs besides its data."""
        flags = ["--load", str(target), "--use-checkpoint-args", "--ckpt-format", "torch_dist"]
        if self.model.padded_vocab != self.model.vocab:
            flags += ["--make-vocab-size-divisible-by", str(self.model.vocab_multiple)]
        if self.has_optimizer:
            # megatron-core 0.19 finds the optimizer's groups by these two
            flags += ["--lr", repr(self.schedule["max_lr"]), "--min-lr", repr(self.schedule["min_lr"])]
            flags += ["--use-checkpoint-opt_param-scheduler"]
        return [*flags, "--use-distributed-optimizer"] if self.is_distributed else flags

    def notes(self) -> list[str]:
        """Return what differs in Megatron-LM whatever its arguments are."""
        notes = []
        padding = self.model.padded_vocab - self.model.vocab
        if padding and not self.model.padding_in_softmax:
            notes.append(f"Megatron-LM lets {padding} rows of padding take part in the softmax, so its loss is higher")
        if len({(part["global_batch"], part["seq_length"]) for part in self.segments}) > 1:
            notes.append("batch or sequence length change during the run; Megatron-LM counts its schedule in samples")
        return notes

    def _scheduler(self) -> dict[str, Any]:
        batch, decay = self._batch(), float(self.run["optimizer"]["weight_decay"])
        total = max(part["first_sample"] + _num_samples(part) for part in self.segments)
        return {
            "max_lr": self.schedule["max_lr"],
            "min_lr": self.schedule["min_lr"],
            "lr_warmup_steps": self.schedule["warmup_steps"] * batch,
            "num_steps": self.samples,
            "lr_decay_style": _DECAY_STYLES[self.schedule["shape"]],
            "lr_decay_steps": total,
            "start_wd": decay,
            "end_wd": decay,
            "wd_incr_style": "constant",
            "wd_incr_steps": total,
        }

    def _batch(self) -> int:
        parts = [part for part in self.segments if part["first_step"] <= self.iteration + 1]
        return int(parts[-1]["global_batch"])

    def _arguments(self) -> dict[str, Any]:
        arguments = {
            **model_arguments(self.model),
            "tensor_model_parallel_size": self.layout["tensor"],
            "pipeline_model_parallel_size": self.layout["pipeline"],
            "context_parallel_size": self.layout["context"],
            "world_size": self.layout["world_size"],
            "ckpt_format": "torch_dist",
            "iteration": self.iteration,
            "consumed_train_samples": self.samples,
            "consumed_valid_samples": 0,
            "skipped_train_samples": 0,
            "no_save_optim": not self.has_optimizer,
            "no_save_rng": True,
            "use_distributed_optimizer": self.is_distributed,
        }
        if not self.has_optimizer:
            return arguments
        model_ranks = self.layout["tensor"] * self.layout["pipeline"] * self.layout["context"]
        return arguments | {
            "seq_length": self.run["seq_length"],
            "max_position_embeddings": self.model.max_positions or self.run["seq_length"],
            "data_parallel_size": self.layout["world_size"] // model_ranks,
            "global_batch_size": self._batch(),
            "micro_batch_size": self.segments[-1]["micro_batch"],
            "train_iters": self.schedule["steps"],
            "lr": self.schedule["max_lr"],
            "min_lr": self.schedule["min_lr"],
            "lr_decay_style": _DECAY_STYLES[self.schedule["shape"]],
            "lr_wsd_decay_iters": self.schedule["decay_steps"] or None,
            "lr_wsd_decay_style": self.schedule["decay_shape"],
            "bf16": self.run["precision"]["compute"] == "bf16",
        }


def _groups(common: Mapping[str, Any]) -> list[dict[str, Any]]:
    optimizer = common["optimizer"]
    groups: list[dict[str, Any]] = optimizer.get("optimizer", optimizer)["param_groups"]
    return groups


def _num_samples(segment: Mapping[str, Any]) -> int:
    return int((segment["last_step"] - segment["first_step"] + 1) * segment["global_batch"])


def model_arguments(model: ModelConfig) -> dict[str, Any]:
    """Return Megatron-LM's arguments for a model; `read_megatron_model` is the inverse.

    Raises:
        RefusedError: no arguments describe it.
    """
    activation = (model.activation, model.gated)
    if activation not in ((Activation.SQUARED_RELU, False), (Activation.SILU, True), (Activation.GELU, False)):
        gated = "gated" if model.gated else "not gated"
        raise RefusedError(
            f"model.activation: {model.activation}, {gated}: Megatron-LM has no argument for it; export "
            "to Hugging Face instead"
        )
    return {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "ffn_hidden_size": model.ffn_hidden,
        "num_attention_heads": model.heads,
        "num_query_groups": model.num_kv_groups,
        "group_query_attention": model.num_kv_groups != model.heads,
        "kv_channels": model.head_size,
        "max_position_embeddings": model.max_positions,
        "vocab_size": model.vocab,
        "padded_vocab_size": model.padded_vocab,
        "make_vocab_size_divisible_by": model.vocab_multiple,
        "position_embedding_type": "rope",
        "add_position_embedding": True,  # Megatron-LM's default, which it compares; it means learned ones or RoPE
        "use_rotary_position_embeddings": False,  # the deprecated form of position_embedding_type
        "rotary_percent": model.rotary_percent,
        "rotary_base": model.rotary_base,
        "rotary_interleaved": False,
        **_rope_arguments(model),
        "squared_relu": model.activation is Activation.SQUARED_RELU,
        "swiglu": model.gated,
        "normalization": "RMSNorm" if model.norm is Norm.RMSNORM else "LayerNorm",
        "apply_layernorm_1p": model.norm is Norm.LAYERNORM1P,
        "norm_epsilon": model.norm_eps,
        "qk_layernorm": model.qk_norm,
        "add_bias_linear": model.linear_bias,
        "add_qkv_bias": model.qkv_bias,
        "untie_embeddings_and_output_weights": not model.tied_embeddings,
        "init_method_std": model.init_std,
        "attention_dropout": model.attention_dropout,
        "hidden_dropout": model.hidden_dropout,
        "apply_query_key_layer_scaling": False,
    }


def _rope_arguments(model: ModelConfig) -> dict[str, Any]:
    scaling = model.rope_scaling
    if scaling is None:
        return {"use_rope_scaling": False, "rotary_seq_len_interpolation_factor": None}
    if scaling.type == "linear":
        return {"use_rope_scaling": False, "rotary_seq_len_interpolation_factor": scaling.factor}
    fixed = (scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_positions)
    if fixed != (1.0, 4.0, 8192):
        raise RefusedError(
            "model.rope_scaling: Megatron-LM has low_freq_factor 1, high_freq_factor 4 and original_max_positions 8192 "
            "only; export to Hugging Face instead"
        )
    return {
        "use_rope_scaling": True,
        "rope_scaling_factor": scaling.factor,
        "rotary_seq_len_interpolation_factor": None,
    }


def describe(report: MegatronLmReport) -> str:
    """Return the arguments and the notes of a report as lines for people."""
    lines = ["resume with Megatron-LM and its data arguments:" if report.iteration else "start Megatron-LM with:"]
    return "\n".join([*lines, f"  {' '.join(report.flags)}", *(f"note: {note}" for note in report.notes)])
