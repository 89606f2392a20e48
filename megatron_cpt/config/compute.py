"""Sections `precision`, `recompute` and `speed` of run.yaml: number formats, recomputation and faster kernels."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_cpt.config.quantities import Section


class Fp8Config(Section):
    """FP8 in the linear layers of the transformer; embedding, output layer and attention stay in `compute`."""

    backend: Literal["transformer_engine", "torch", "emulated"] | None = None
    """`torch` needs only PyTorch, `emulated` has the numbers of FP8 on any device without its speed; null is
    Transformer Engine where it is installed, else `torch`."""
    recipe: Literal["delayed", "tensorwise", "rowwise", "blockwise", "mxfp8"] = "delayed"
    """Rule for scaling factors: `tensorwise` is current scaling, `rowwise` has one factor per row (backend `torch`)."""
    format: Literal["hybrid", "e4m3"] = "hybrid"
    """FP8 format; `hybrid` uses E4M3 for weights and activations and E5M2 for gradients."""
    first_last_bf16: int = Field(0, ge=0)
    """Layers at each end of the model that stay in `compute`; must be 0 with recipe `delayed`."""
    amax_history: int = Field(1024, gt=0)
    """Past largest magnitudes kept per tensor; recipe `delayed` only."""
    amax_compute: Literal["max", "most_recent"] = "max"
    """Entry of the history that sets the scale; recipe `delayed` only."""
    margin: int = Field(0, ge=0)
    """Powers of two between the largest magnitude and the top of the format; recipe `delayed` only."""
    params: bool = False
    """Store and gather the weights of these layers in FP8; Transformer Engine only, not for gated MLPs."""


class Fp4Config(Section):
    """FP4 in the linear layers of the transformer, by Transformer Engine on Blackwell GPUs; excludes FP8."""

    recipe: Literal["nvfp4"] = "nvfp4"
    """Rule for scaling factors; `nvfp4` has one FP8 scale per 16 values and one fp32 scale per tensor."""
    first_last_bf16: int = Field(0, ge=0)
    """Layers at each end of the model that stay in bf16."""


class PrecisionConfig(Section):
    """Number formats of weights, activations and matrix products."""

    compute: Literal["fp32", "bf16"] = "bf16"
    """Format of weights and activations; `bf16` keeps fp32 master weights and fp32 gradients."""
    fp8: Fp8Config | None = None
    """FP8 in linear layers; null uses `compute`."""
    fp4: Fp4Config | None = None
    """FP4 in linear layers; null uses `compute`."""

    @property
    def uses_transformer_engine(self) -> bool:
        """True if matrix products run in FP8 or FP4 by Transformer Engine, unless a machine without it is found."""
        return self.fp4 is not None or (self.fp8 is not None and not self.has_local_fp8)

    @property
    def has_local_fp8(self) -> bool:
        """True if FP8 is computed by our own linear layers, on real hardware or emulated."""
        return self.fp8 is not None and (self.fp8.backend in ("torch", "emulated") or self.fp8.recipe == "rowwise")

    @property
    def has_fp8_products(self) -> bool:
        """True if matrix products run in the FP8 units of a GPU."""
        return self.fp8 is not None and self.fp8.backend != "emulated"

    @property
    def has_fp8_weights(self) -> bool:
        """True if weights are stored in FP8."""
        return self.fp8 is not None and self.fp8.params


class RecomputeConfig(Section):
    """Recomputation of activations in the backward pass, which saves memory and costs time."""

    granularity: Literal["none", "selective", "full"] = "none"
    """Recomputed part: `selective` is core attention, `full` is whole layers."""
    method: Literal["uniform", "block"] = "uniform"
    """`uniform` recomputes all layers in units, `block` the first layers of each stage; granularity `full` only."""
    num_layers: int = Field(1, gt=0)
    """Layers per unit (`uniform`) or recomputed layers per stage (`block`); granularity `full` only."""


class SpeedConfig(Section):
    """Options that make a run faster; null is on where machine and layout allow it (docs/operations/speed.md)."""

    attention: Literal["auto", "flash", "fused", "cudnn", "sdpa"] = "auto"
    """Attention kernel; `fused` and `cudnn` are cuDNN's, `sdpa` is torch's own choice, `auto` is the best here."""

    overlap_grad_reduce: bool | None = None
    """Reduce gradients in buckets during the last backward pass."""
    overlap_param_gather: bool | None = None
    """Gather the updated weights in buckets during the first forward pass."""
    tp_comm_overlap: bool | None = None
    """Overlap tensor-parallel communication with its matrix product; off unless set to true."""
    fused_cross_entropy: bool | None = None
    """Compute the loss and its gradient without fp32 copies of the logits."""
    fused_rope: bool | None = None
    """Rotary embedding in one kernel."""
    fused_activation: bool | None = None
    """Activation of the MLP in one kernel."""
    fused_bias_dropout: bool | None = None
    """Bias, dropout and residual addition in one kernel."""
    fused_grad_accumulation: bool | None = None
    """Add weight gradients to the fp32 buffer inside the matrix product."""
