"""Growth of a transformers model in memory, through Megatron's layout of its tensors."""

from __future__ import annotations

from typing import Any

import torch

from megatron_cpt.config import ModelConfig
from megatron_cpt.convert.huggingface.config import read_model, to_hf_config
from megatron_cpt.convert.mapping.resolve import resolve
from megatron_cpt.transform.grow.growth_axes import layer_origins
from megatron_cpt.transform.grow.growth_rules import IDENTITY_ZEROS, grow_tensor
from megatron_cpt.transform.grow.growth_target import find_obstacles, grown_eps
from tests.helpers.hf_models import build_hf_model, global_tensor, hf_tensors


def grown_shape(model: ModelConfig, *, width: int = 1, depth: int = 1, **changes: Any) -> ModelConfig:
    """Return a model section with whole factors of width and depth, or with given fields; growth must reach it."""
    fields = {
        **model.model_dump(mode="json"),
        "hidden": model.hidden * width,
        "ffn_hidden": model.ffn_hidden * width,
        "heads": model.heads * width,
        "kv_groups": model.num_kv_groups * width,
        "head_dim": model.head_size,
        "layers": model.layers * depth,
        **changes,
    }
    target = ModelConfig.model_validate({**fields, "norm_eps": grown_eps(model, fields["hidden"])})
    assert list(find_obstacles(model, target)) == []
    return target


def grow_hf_model(small: Any, config: dict[str, Any], target: ModelConfig, *, noise: float, seed: int = 0) -> Any:
    """Return a transformers model of the target's shape with the grown weights of a small one."""
    family, model = read_model(config)
    tensors = hf_tensors(small)
    old = {rule.megatron: global_tensor(rule, *(tensors[name] for name in rule.hf)) for rule in resolve(family, model)}
    origins = layer_origins(model.layers, target.layers)
    grown = {}
    for rule in resolve(family, target):
        name = rule.megatron
        if name.startswith("decoder.layers."):
            number, _, rest = name.removeprefix("decoder.layers.").partition(".")
            origin = origins[int(number)]
            tensor = grow_tensor(
                name, old[f"decoder.layers.{origin.layer}.{rest}"], model, target, noise=noise, seed=seed
            )
            if origin.is_identity and name.endswith(IDENTITY_ZEROS):
                tensor = torch.zeros_like(tensor)
        else:
            tensor = grow_tensor(name, old[name], model, target, noise=noise, seed=seed)
        for hf, shape in zip(rule.hf, rule.hf_shapes, strict=True):
            grown[hf] = rule.hf_rows(hf, 0, shape[0], lambda _, rows, tensor=tensor: tensor[rows])
    large = build_hf_model(to_hf_config(family, target, "float32"))
    missing, unexpected = large.load_state_dict(grown, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    large.tie_weights()
    return large


def relative_difference(small: Any, large: Any) -> float:
    """Return the largest difference of both models' logits, divided by the largest logit, over 2 x 24 tokens."""
    tokens = torch.randint(0, small.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, after = small(tokens).logits, large(tokens).logits
    return float((before - after).abs().max() / before.abs().max())


def difference_after_growth(config: dict[str, Any], *, noise: float = 0.3, **growth: Any) -> float:
    """Grow a random model of a config.json and return the relative difference of the logits."""
    small = build_hf_model(config)
    target = grown_shape(read_model(config)[1], **growth)
    return relative_difference(small, grow_hf_model(small, config, target, noise=noise))
