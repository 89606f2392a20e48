"""The section `speed` of run.yaml."""

from __future__ import annotations

from megatron_cpt.config.section import Section


class SpeedConfig(Section):
    """What makes a run faster; left out: on where the machine and the layout allow it (docs/speed.md)."""

    overlap_grad_reduce: bool | None = None
    """Reduce gradients in buckets during the last backward pass."""
    overlap_param_gather: bool | None = None
    """Gather the updated weights in buckets during the first forward pass."""
    tp_comm_overlap: bool | None = None
    """Tensor-parallel communication in pieces beside its matrix product."""
    fused_cross_entropy: bool | None = None
    """Loss and its gradient without fp32 copies of the logits."""
    fused_rope: bool | None = None
    """Rotary embedding in one kernel."""
    fused_activation: bool | None = None
    """The MLP's activation in one kernel."""
    fused_bias_dropout: bool | None = None
    """Bias, dropout and residual addition in one kernel."""
    fused_grad_accumulation: bool | None = None
    """Weight gradients added to the fp32 buffer inside the matrix product."""
