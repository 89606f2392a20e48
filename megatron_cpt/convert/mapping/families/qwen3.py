"""Qwen3, dense (arXiv 2505.09388): Llama with RMSNorm over each query and key head, and a separate `head_dim`."""

from __future__ import annotations

from dataclasses import replace

from megatron_cpt.convert.mapping.families.common import ATTENTION, EMBEDDINGS, GATED_MLP, NORMS, QK_NORMS
from megatron_cpt.convert.mapping.families.qwen2 import QWEN2

QWEN3 = replace(
    QWEN2,
    name="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    weights=(*EMBEDDINGS, *NORMS, *ATTENTION, *QK_NORMS, *GATED_MLP),
    fixed={"gated": True, "norm": "rmsnorm", "qkv_bias": False, "qk_norm": True},
    defaults={**QWEN2.defaults, "head_dim": 128},
    extra={"attention_bias": False, **QWEN2.extra},
)
