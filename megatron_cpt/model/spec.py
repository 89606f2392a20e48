"""Layer specs: Transformer Engine where it is installed and a GPU is present, else the local one."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_cpt.model.attention import LocalAttention
from megatron_cpt.model.norm import LocalNorm


@dataclass(frozen=True)
class LayerSpec:
    """The modules a model is built from.

    Attributes:
        name: `transformer_engine` or `local`, for the log.
        layer: one transformer layer.
        norm: the class of the last norm.
    """

    name: str
    layer: ModuleSpec
    norm: Any

    def block(self, config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
        """The layers of this rank's pipeline stage (and virtual stage)."""
        count = get_num_layers_to_build(config, vp_stage=vp_stage)
        return TransformerBlockSubmodules(layer_specs=[self.layer] * count, layer_norm=self.norm)


def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be used here: installed, and a GPU to run on."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def choose_spec(*, qk_norm: bool) -> LayerSpec:
    """The best spec that this machine can run."""
    return transformer_engine_spec(qk_norm=qk_norm) if has_transformer_engine() else local_spec(qk_norm=qk_norm)


def transformer_engine_spec(*, qk_norm: bool) -> LayerSpec:
    """Layers of Transformer Engine: norms fused into the linear layers, flash attention, FP8."""
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    return LayerSpec("transformer_engine", get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm), TENorm)


def local_spec(*, qk_norm: bool) -> LayerSpec:
    """Layers of megatron-core and torch alone, on any device; checkpoints are interchangeable with the other spec's.

    megatron-core's local spec already maps its weight names to those of Transformer Engine (the norm belongs to the
    linear layer after it) when a checkpoint is written or read.
    """
    layer = get_gpt_layer_local_spec(qk_layernorm=qk_norm)
    modules = layer.submodules
    modules.input_layernorm = LocalNorm
    modules.pre_mlp_layernorm = LocalNorm
    attention = modules.self_attention.submodules
    attention.core_attention = LocalAttention
    attention.q_layernorm = attention.k_layernorm = LocalNorm if qk_norm else IdentityOp
    return LayerSpec("local", layer, LocalNorm)
