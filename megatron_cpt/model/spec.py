"""Layer specs: Transformer Engine's on a GPU where it is installed, else the local one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_cpt.config import Fp8Config, PrecisionConfig
from megatron_cpt.model.capabilities import Machine
from megatron_cpt.model.fp8_emulated import EmulatedFp8, LocalFp8
from megatron_cpt.model.fp8_torch import TorchFp8
from megatron_cpt.model.local_modules import LocalAttention, LocalNorm


@dataclass(frozen=True)
class LayerSpec:
    """Modules of a model.

    Attributes:
        name: `transformer_engine` or `local`.
        title: description with versions, for the log.
        layer: spec of a transformer layer.
        norm: class of the final norm.
        end_layer: spec of the first and last `num_end_layers` layers, if it differs from `layer`.
        num_end_layers: number of such layers at each end of the model.
    """

    name: str
    title: str
    layer: ModuleSpec
    norm: Any
    end_layer: ModuleSpec | None = None
    num_end_layers: int = 0

    @property
    def is_transformer_engine(self) -> bool:
        """True if the layers are Transformer Engine's."""
        return self.name == "transformer_engine"

    def block(self, config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
        """Return the layers of this rank's pipeline stage and virtual stage."""
        first = get_transformer_layer_offset(config, vp_stage=vp_stage)
        numbers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
        layers = [self._layer(number, config.num_layers) for number in numbers]
        return TransformerBlockSubmodules(layer_specs=layers, layer_norm=self.norm)

    def _layer(self, number: int, num_layers: int) -> ModuleSpec:
        is_end = min(number, num_layers - 1 - number) < self.num_end_layers
        return self.end_layer if is_end and self.end_layer is not None else self.layer


def choose_spec(*, qk_norm: bool, precision: PrecisionConfig, machine: Machine) -> LayerSpec:
    """Return the fastest spec for a machine; FP8 by torch or emulated exists only in the local one."""
    if machine.transformer_engine is None or precision.has_local_fp8:
        return local_spec(qk_norm=qk_norm, fp8=precision.fp8)
    return transformer_engine_spec(qk_norm=qk_norm)


def transformer_engine_spec(*, qk_norm: bool) -> LayerSpec:
    """Return the spec of Transformer Engine: norms fused into linear layers, flash attention, FP8."""
    import transformer_engine
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    return LayerSpec(
        name="transformer_engine",
        title=f"Transformer Engine {transformer_engine.__version__}",
        layer=get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm),
        norm=TENorm,
    )


def local_spec(*, qk_norm: bool, fp8: Fp8Config | None = None) -> LayerSpec:
    """Return the spec that needs only megatron-core and torch, for any device.

    Checkpoints fit both specs: megatron-core saves local layers under Transformer Engine's weight names, in which a
    norm belongs to the linear layer after it.

    The linear layers compute in FP8 if its backend is `torch`, and emulate it if that is `emulated`.
    """
    plain = _local_layer(qk_norm=qk_norm)
    if fp8 is None or fp8.backend not in ("torch", "emulated"):
        return LayerSpec("local", "local, of megatron-core and torch", plain, LocalNorm)
    layer = _local_layer(qk_norm=qk_norm)
    _put_fp8(layer, fp8)
    kind = "emulated FP8" if fp8.backend == "emulated" else "FP8 by torch"
    return LayerSpec(
        name="local",
        title=f"local, of megatron-core and torch, with {kind} ({fp8.recipe}, {fp8.format})",
        layer=layer,
        norm=LocalNorm,
        end_layer=plain,
        num_end_layers=fp8.first_last_bf16,
    )


def _local_layer(*, qk_norm: bool) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(qk_layernorm=qk_norm)
    modules = layer.submodules
    modules.input_layernorm = LocalNorm
    modules.pre_mlp_layernorm = LocalNorm
    attention = modules.self_attention.submodules
    attention.core_attention = LocalAttention
    attention.q_layernorm = attention.k_layernorm = LocalNorm if qk_norm else IdentityOp
    return layer


def _put_fp8(layer: ModuleSpec, fp8: Fp8Config) -> None:
    assert fp8.recipe in ("delayed", "tensorwise", "rowwise")  # checked by config
    recipe = LocalFp8(fp8.recipe, fp8.format, fp8.amax_history, fp8.amax_compute, fp8.margin)
    column, row = (EmulatedFp8 if fp8.backend == "emulated" else TorchFp8).linears(recipe)
    attention = layer.submodules.self_attention.submodules
    attention.linear_qkv, attention.linear_proj = column, row
    mlp = layer.submodules.mlp  # a ModuleSpec in megatron-core 0.16, a partial in 0.19
    linears = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
    linears.linear_fc1, linears.linear_fc2 = column, row
