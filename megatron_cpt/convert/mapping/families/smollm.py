"""SmolLM and SmolLM2 (arXiv 2502.02737): small Llamas, most with tied embeddings.

Their config.json has `is_llama_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_cpt.convert.mapping.families.llama import LLAMA


def _find_problems(config: Mapping[str, Any]) -> list[str]:
    if config.get("rope_interleaved"):
        return ["rope_interleaved: true; RoPE here rotates halves of a head, not neighboring elements"]
    return []


SMOLLM = replace(
    LLAMA,
    name="smollm",
    mark="is_llama_config",
    extra={"is_llama_config": True, "rope_interleaved": False},
    find_problems=_find_problems,
)
