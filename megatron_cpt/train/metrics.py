"""Losses by source and times: summed on each step, reported every few steps as a line of metrics.jsonl."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megatron_cpt.config import PrecisionConfig, TeacherConfig
from megatron_cpt.planning.cost.memory import GIB
from megatron_cpt.planning.hardware import GPUS, TERA

if TYPE_CHECKING:
    from megatron_cpt.train.setup import Session
    from megatron_cpt.train.step import StepResult


def mean_losses(total: torch.Tensor, names: Sequence[str]) -> tuple[float, dict[str, float]]:
    """Return the mean loss per token over all sources, and by source for each source that has tokens.

    Example: [[6.0, 3.0], [2.0, 1.0], [0.0, 0.0]] for web, code and qa gives 8 / 4 = 2.0 and {web: 2.0, code: 2.0}.

    Args:
        total: (num_sources, 2) summed loss and tokens.
        names: the sources.
    """
    loss_sum, tokens = total.sum(dim=0).tolist()
    by_source = {name: s / n for name, (s, n) in zip(names, total.tolist(), strict=True) if n}
    return loss_sum / tokens if tokens else float("nan"), by_source


def mean_divergences(
    total: torch.Tensor, names: Sequence[str], teacher: TeacherConfig
) -> tuple[float | None, dict[str, float]]:
    """Return the mean divergence per token from the teacher, and by source; sources with a factor of 0 do not count.

    Args:
        total: (num_sources, 3) summed cross entropy, tokens, summed divergence.
        names: the sources.
        teacher: section of run.yaml.
    """
    counted = [number for number, name in enumerate(names) if teacher.distills(name)]
    mean, by_source = mean_losses(total[counted][:, [2, 1]], [names[number] for number in counted])
    return mean if by_source else None, by_source


def mean_objective(total: torch.Tensor, names: Sequence[str], teacher: TeacherConfig | None) -> float:
    """Return the mean per token of the loss that the run minimizes: the cross entropy, or its mixture with divergences.

    Args:
        total: (num_sources, 2) summed cross entropy and tokens; with a teacher (num_sources, 3), also the divergence.
        names: the sources.
        teacher: section of run.yaml.
    """
    if teacher is None:
        return mean_losses(total, names)[0]
    weights = torch.tensor([teacher.weight_of(name) for name in names], dtype=total.dtype)
    mixed = (1.0 - weights) * total[:, 0] + weights * teacher.temperature**2 * total[:, 2]
    return mean_losses(torch.stack([mixed, total[:, 1]], dim=1), names)[0]


class Stopwatch:
    """Context manager that sums the wall seconds spent inside its blocks."""

    def __init__(self) -> None:
        self._seconds = self._entered = 0.0

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._seconds += time.perf_counter() - self._entered

    def take(self) -> float:
        """Return the sum, and reset it."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def named_losses(total: torch.Tensor, names: Sequence[str], teacher: TeacherConfig | None) -> dict[str, Any]:
    """Return `loss` and `loss_by_source`, and with a teacher `kl` and `kl_by_source`; arguments as `mean_objective`."""
    loss, by_source = mean_losses(total[:, :2], names)
    losses: dict[str, Any] = {"loss": loss, "loss_by_source": by_source}
    if teacher is not None:
        losses["kl"], losses["kl_by_source"] = mean_divergences(total, names, teacher)
    return losses


@dataclass
class LossMeter:
    """Sums of losses, tokens, FLOPs and times since the last line of metrics.

    Attributes:
        names: the sources, in the order of the vectors.
        data_wait: runs while the training thread waits for the loader.
        sync_wait: runs while the training thread waits for the results of a step: the device and the other ranks.
        pause: seconds spent on checkpoints and validations, which the rates exclude.
        contributes_loss: whether this rank's losses enter the sum over ranks. Only the last pipeline stage has losses,
            and its tensor-parallel ranks have equal ones, so one of them contributes.
        teacher: section of run.yaml.
    """

    names: Sequence[str]
    contributes_loss: bool
    teacher: TeacherConfig | None = None

    def __post_init__(self) -> None:
        self._sums = torch.zeros(len(self.names), 2 if self.teacher is None else 3, dtype=torch.float64)
        self.data_wait, self.sync_wait = Stopwatch(), Stopwatch()
        self._steps, self._tokens, self._flops = 0, 0, 0.0
        self._started, self.pause = time.perf_counter(), 0.0

    def add(self, loss_by_source: torch.Tensor, tokens: int, flops_per_token: float) -> None:
        """Add one step; losses that are not finite are skipped.

        Args:
            loss_by_source: over all ranks, as `StepResult` has it.
            tokens: trained on in this step by all ranks.
            flops_per_token: of training.
        """
        self._steps += 1
        self._tokens += tokens
        self._flops += tokens * flops_per_token
        if loss_by_source.isfinite().all():
            self._sums += loss_by_source

    def take(self) -> dict[str, Any]:
        """Return means and rates over the steps since the last call, and reset the sums."""
        losses = named_losses(self._sums, self.names, self.teacher)
        now = time.perf_counter()
        seconds = max(now - self._started, 1e-9)
        rates = {"tokens_per_second": self._tokens / seconds, "flops_per_second": self._flops / seconds}
        sums = {"step": seconds, "data_wait": self.data_wait.take(), "sync_wait": self.sync_wait.take()}
        times = {f"{name}_seconds": total / max(self._steps, 1) for name, total in sums.items()}
        times["pause_seconds"] = self.pause
        self._sums.zero_()
        self._steps, self._tokens, self._flops, self._started, self.pause = 0, 0, 0.0, now, 0.0
        return {**losses, **rates, **times}

    def skip_time(self, seconds: float) -> None:
        """Exclude seconds that were spent on a checkpoint or a validation from the rates, and count them as a pause."""
        self._started += seconds
        self.pause += seconds


def metrics_line(session: Session, result: StepResult) -> dict[str, Any]:
    """Return the line of metrics.jsonl for the steps since the last line; waits for neither GPU nor another rank."""
    plan, state, numbers = session.plan, session.state, session.meter.take()
    segment = plan.segment_of(state.step)
    flops_per_gpu = numbers["flops_per_second"] / session.ranks.world_size
    is_gpu = session.ranks.device.type == "cuda"
    peak = peak_flops(torch.cuda.get_device_name(), session.config.precision) if is_gpu else None
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux reports KiB
    peak_bytes = torch.cuda.max_memory_allocated() if is_gpu else peak_kib * 1024
    reserved_bytes = torch.cuda.max_memory_reserved() if is_gpu else None
    tokens_left = plan.after(session.last_step).tokens - state.tokens
    return {
        "step": state.step,
        "tokens": state.tokens,
        "global_batch": segment.global_batch,
        "seq_length": segment.seq_length,
        "phase": plan.phase_of(state.step).name,
        "lr": result.rate,
        "loss": numbers["loss"],
        **({"kl": numbers["kl"]} if "kl" in numbers else {}),
        "grad_norm": result.grad_norm,
        "tokens_per_second": numbers["tokens_per_second"],
        "step_seconds": numbers["step_seconds"],
        "data_wait_seconds": numbers["data_wait_seconds"],
        "sync_wait_seconds": numbers["sync_wait_seconds"],
        "pause_seconds": numbers["pause_seconds"],
        "tflops_per_gpu": flops_per_gpu / TERA,
        "mfu": flops_per_gpu / peak if peak is not None else None,
        "peak_memory_gib": peak_bytes / GIB,
        "reserved_memory_gib": reserved_bytes / GIB if reserved_bytes is not None else None,
        "eta": tokens_left / numbers["tokens_per_second"],
        "loss_by_source": numbers["loss_by_source"],
        **({"kl_by_source": numbers["kl_by_source"]} if "kl" in numbers else {}),
        "samples_by_source": state.samples_by_source,
        "skipped_updates": state.skipped,
    }


def peak_flops(device_name: str, precision: PrecisionConfig) -> float | None:
    """Return the dense peak of a GPU in FLOP/s, the denominator of MFU (model FLOPs utilization).

    Args:
        device_name: as CUDA reports it, for example "NVIDIA H100 80GB HBM3".
        precision: FP8 in Transformer Engine or torch counts with the FP8 peak, bf16 with the bf16 peak.

    Returns:
        None on a CPU, in other number formats, and for GPUs that `planning/hardware.py` does not list. The PCIe and NVL
        models of a listed GPU are slower than its SXM model, so their peak is unknown too.
    """
    words = re.findall(r"[a-z0-9]+", device_name.lower())
    gpu = next((GPUS[word] for word in words if word in GPUS), None)
    if gpu is None or precision.compute != "bf16" or precision.fp4 is not None or {"pcie", "nvl"} & set(words):
        return None
    return gpu.fp8 if precision.has_fp8_products else gpu.bf16
