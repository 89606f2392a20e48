"""The line of metrics.jsonl that every hook receives: losses, progress and how well the hardware is used."""

from __future__ import annotations

import re
import resource
from typing import TYPE_CHECKING, Any

import torch

from megatron_cpt.config import PrecisionConfig
from megatron_cpt.planning.cost.memory import GIB
from megatron_cpt.planning.hardware import GPUS, TERA
from megatron_cpt.train.step import StepResult

if TYPE_CHECKING:
    from megatron_cpt.train.setup import Session


def metrics_line(session: Session, result: StepResult) -> dict[str, Any]:
    """Return the line of metrics for the steps since the last line, and reset the meter.

    Nothing here waits for the GPU or for another rank.
    """
    plan, state, numbers = session.plan, session.state, session.meter.take()
    segment = plan.segment_of(state.step)
    flops_per_gpu = numbers["flops_per_second"] / session.ranks.world_size
    is_gpu = session.ranks.device.type == "cuda"
    device_name = torch.cuda.get_device_name() if is_gpu else "cpu"
    peak = peak_flops(device_name, session.config.precision)
    tokens_left = plan.after(session.last_step).tokens - state.tokens
    return {
        "step": state.step,
        "tokens": state.tokens,
        "global_batch": segment.global_batch,
        "seq_length": segment.seq_length,
        "phase": plan.phase_of(state.step).name,
        "lr": result.rate,
        "loss": numbers["loss"],
        "grad_norm": result.grad_norm,
        "tokens_per_second": numbers["tokens_per_second"],
        "tflops_per_gpu": flops_per_gpu / TERA,
        "mfu": flops_per_gpu / peak if peak is not None else None,
        "peak_memory_gib": (torch.cuda.max_memory_allocated() if is_gpu else _peak_resident_bytes()) / GIB,
        "eta": tokens_left / numbers["tokens_per_second"],
        "loss_by_source": numbers["loss_by_source"],
        "samples_by_source": state.samples_by_source,
        "skipped_updates": state.skipped,
    }


def peak_flops(device_name: str, precision: PrecisionConfig) -> float | None:
    """Return the dense peak of a GPU in FLOP/s, the denominator of MFU (model FLOPs utilization).

    Args:
        device_name: as CUDA reports it, for example "NVIDIA H100 80GB HBM3".
        precision: FP8 in Transformer Engine counts with the FP8 peak, bf16 with the bf16 peak.

    Returns:
        None on a CPU, in other number formats, and for GPUs that `planning/hardware.py` does not list. The PCIe and NVL
        models of a listed GPU are slower than its SXM model, so their peak is unknown too.
    """
    words = re.findall(r"[a-z0-9]+", device_name.lower())
    gpu = next((GPUS[word] for word in words if word in GPUS), None)
    if gpu is None or precision.compute != "bf16" or precision.fp4 is not None or {"pcie", "nvl"} & set(words):
        return None
    return gpu.fp8 if precision.uses_transformer_engine else gpu.bf16


def _peak_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux reports KiB
