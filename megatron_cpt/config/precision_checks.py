"""Rules about `precision` in run.yaml: requirements of FP8, FP4 and Transformer Engine."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_cpt.config.schema import RunConfig

RECIPES = {
    "transformer_engine": ("delayed", "tensorwise", "blockwise", "mxfp8"),
    "torch": ("delayed", "tensorwise", "rowwise"),
    "emulated": ("delayed", "tensorwise"),
}
"""Recipes of each FP8 backend."""


def check_precision(config: RunConfig) -> Iterator[str]:
    """Yield combinations of number formats that cannot be computed."""
    fp8, fp4 = config.precision.fp8, config.precision.fp4
    if fp8 is not None and fp8.backend is not None and fp8.recipe not in RECIPES[fp8.backend]:
        known = " or ".join(RECIPES[fp8.backend])
        yield f"precision.fp8.recipe: backend {fp8.backend} has no {fp8.recipe}; choose {known}"
    if fp8 is not None and fp8.first_last_bf16 and fp8.recipe == "delayed":
        yield "precision.fp8.first_last_bf16: megatron-core refuses it with recipe delayed; choose another recipe or 0"
    if fp8 is not None and fp4 is not None:
        yield "precision.fp4: not possible together with precision.fp8; remove one of them"
    for name, section in (("fp8", fp8), ("fp4", fp4)):
        if section is None:
            continue
        needs_bf16 = name == "fp4" or not config.precision.has_local_fp8 or section.recipe == "rowwise"
        if config.precision.compute != "bf16" and needs_bf16:
            yield f"precision.{name}: needs precision.compute: bf16, because products return bf16; set it"
        if 2 * section.first_last_bf16 >= config.model.layers:
            yield (
                f"precision.{name}.first_last_bf16: {section.first_last_bf16} at each end leaves none of model.layers: "
                f"{config.model.layers} in {name.upper()}; choose fewer"
            )


def check_fp8_weights(config: RunConfig) -> Iterator[str]:
    """Yield what prevents storing weights in FP8."""
    fp8, key = config.precision.fp8, "precision.fp8.params: true"
    if fp8 is None or not fp8.params:
        return
    if config.precision.has_local_fp8:
        yield f"{key}: backend {fp8.backend} keeps its weights in precision.compute; remove it"
    if not config.parallel.distributed_optimizer:
        yield f"{key}: needs parallel.distributed_optimizer: true, which holds the fp32 master weights; set it"
    if config.model.gated:
        yield f"{key}: a checkpoint splits the first weight of a gated MLP, which FP8 tensors do not allow; remove it"


def check_quantized_shapes(config: RunConfig) -> Iterator[str]:
    """Yield shapes that Transformer Engine or `torch._scaled_mm` would refuse in the first step.

    Transformer Engine needs multiples of 8 rows and 16 columns, or of 32 where the recipe scales blocks;
    `torch._scaled_mm` needs multiples of 16. A micro-batch has one row per token of a rank: `batch.micro: 1` with
    `seq_length: 100` is refused, as 100 % 8 is 4.
    """
    precision, model, parallel = config.precision, config.model, config.parallel
    if precision.fp4 is None and not precision.has_fp8_products:
        return
    in_blocks = precision.fp4 is not None or (precision.fp8 is not None and precision.fp8.recipe == "mxfp8")
    library = "Transformer Engine" if precision.uses_transformer_engine else "torch"
    rows, columns = (32, 32) if in_blocks else (8, 16) if library == "Transformer Engine" else (16, 16)
    key = "precision.fp4" if precision.fp4 is not None else "precision.fp8"
    widths = {"model.hidden": model.hidden, "model.ffn_hidden / parallel.tensor": model.ffn_hidden // parallel.tensor}
    if model.head_dim is not None or model.hidden % model.heads == 0:
        widths["heads x head_dim / parallel.tensor"] = model.heads * model.head_size // parallel.tensor
        all_heads = model.heads + 2 * model.num_kv_groups
        widths["(heads + 2 kv_groups) x head_dim / parallel.tensor"] = all_heads * model.head_size // parallel.tensor
    for name, width in widths.items():
        if width % columns:
            yield f"{key}: {name} is {width}, but {library} needs a multiple of {columns}; change the width"
    micro_batches = {
        f"phases[{index}] (phase {phase.name})": config.micro_batch_of(phase) * config.length_of(phase)
        for index, phase in enumerate(config.phases)
    }
    if config.validation is not None:
        micro_batches["validation (batch.micro x seq_length)"] = config.batch.micro * config.seq_length
    for name, num_tokens in micro_batches.items():
        per_rank = num_tokens // parallel.context
        if per_rank % rows:
            yield (
                f"{key}: {name}: a micro-batch has {per_rank} tokens per rank, but {library} needs a multiple "
                f"of {rows}; change seq_length or batch.micro"
            )


def check_moments(config: RunConfig) -> Iterator[str]:
    """Yield decay rates that moments in bf16 cannot follow.

    bf16 has 8 bits of precision. A rate above 1 - 2^-8 changes a moment by less than half of its last bit, which rounds
    to no change: with `betas: [0.9, 0.999]` the second moment would never decay.
    """
    if config.optimizer.moments == "bf16" and max(config.optimizer.betas) > 1 - 2**-8:
        yield (
            f"optimizer.moments: bf16: cannot follow optimizer.betas {list(config.optimizer.betas)}, because a rate "
            "above 0.996 is lost in rounding; choose smaller rates or fp32"
        )
