"""Tiny Hugging Face models of every family, with random weights, in memory or as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_cpt.convert.mapping.rules import TensorRule

_SIZES = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # differs from hidden / heads
    "max_position_embeddings": 64,
}

FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "nemotron": {"model_type": "nemotron", "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "llama": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "smollm": {"model_type": "llama", "is_llama_config": True, "rope_interleaved": False, "tie_word_embeddings": True},
}
"""Keys of each family's config.json besides the sizes; embeddings are tied where real models tie them."""


def tiny_config(family: str, **changes: Any) -> dict[str, Any]:
    """Return the keys of a small config.json; `changes` have precedence."""
    return {**_SIZES, **FAMILY_CONFIGS[family], **changes}


def build_hf_model(config: dict[str, Any], seed: int = 0) -> Any:
    """Return a transformers model in fp32 whose weights, norms and biases included, are all random."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = dict(config)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config.pop("model_type"), **config), dtype=torch.float32, attn_implementation="eager"
        )
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


def hf_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors that `save_pretrained` writes: shared weights once."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def global_tensor(rule: TensorRule, *tensors: torch.Tensor) -> torch.Tensor:
    """Return the Megatron tensor of a rule, made of its Hugging Face tensors."""
    by_name = dict(zip(rule.hf, tensors, strict=True))
    return rule.megatron_rows(0, rule.megatron_shape[0], lambda name, rows: by_name[name][rows])


def save_hf_model(
    folder: Path,
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **changes: Any,
) -> Path:
    """Write a tiny model with transformers and return its folder.

    Args:
        folder: folder to write; created if needed.
        family: a key of `FAMILY_CONFIGS`.
        seed: seed of the random weights.
        dtype: dtype of the weights.
        max_shard_size: "20KB", for example, gives several shards with an index.
        changes: changed keys of config.json.
    """
    model = build_hf_model(tiny_config(family, **changes), seed).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
