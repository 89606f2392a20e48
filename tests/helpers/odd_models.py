"""Random small config.json files with odd sizes, of every family, for property tests."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.helpers.hf_models import FAMILY_CONFIGS, tiny_config


@st.composite
def odd_configs(draw: st.DrawFn, family: str | None = None) -> tuple[str, dict[str, Any]]:
    """Draw (family, config.json) with unusual head sizes, 1 to 3 groups, odd vocabularies, tied or untied, biases."""
    family = family or draw(st.sampled_from(sorted(FAMILY_CONFIGS)))
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    heads = groups * per_group
    config = {
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": draw(st.sampled_from([4, 8, 12])),
        "hidden_size": heads * draw(st.integers(1, 5)),
        "intermediate_size": draw(st.integers(1, 40)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(8, 300)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if family in ("nemotron", "llama", "smollm"):
        config["attention_bias"] = config["mlp_bias"] = draw(st.booleans())
    return family, tiny_config(family, **config)
