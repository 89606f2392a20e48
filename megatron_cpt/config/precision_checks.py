"""Rules about `precision` in run.yaml: requirements of FP8, FP4 and Transformer Engine."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_cpt.config.schema import RunConfig


def check_precision(config: RunConfig) -> Iterator[str]:
    """Yield combinations of number formats that cannot be computed."""
    fp8, fp4 = config.precision.fp8, config.precision.fp4
    is_emulated = fp8 is not None and fp8.backend == "emulated"
    if fp8 is not None and is_emulated and fp8.recipe not in ("delayed", "tensorwise"):
        yield f"precision.fp8.recipe: {fp8.recipe} is not emulated; choose delayed or tensorwise"
    if fp8 is not None and fp8.first_last_bf16 and fp8.recipe == "delayed":
        yield "precision.fp8.first_last_bf16: megatron-core refuses it with recipe delayed; choose another recipe or 0"
    if fp8 is not None and fp4 is not None:
        yield "precision.fp4: not possible together with precision.fp8; remove one of them"
    for name, section in (("fp8", fp8), ("fp4", fp4)):
        if section is None:
            continue
        if config.precision.compute != "bf16" and not (name == "fp8" and is_emulated):
            yield f"precision.{name}: needs precision.compute: bf16, as Transformer Engine does; set it"
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
    if fp8.backend == "emulated":
        yield f"{key}: the emulated backend keeps its weights in precision.compute; remove it"
    if not config.parallel.distributed_optimizer:
        yield f"{key}: needs parallel.distributed_optimizer: true, which holds the fp32 master weights; set it"
    if config.model.gated:
        yield f"{key}: a checkpoint splits the first weight of a gated MLP, which FP8 tensors do not allow; remove it"


def check_quantized_shapes(config: RunConfig) -> Iterator[str]:
    """Yield shapes that Transformer Engine would refuse in the first step.

    Matrix products need multiples of 8 rows and 16 columns, or of 32 where the recipe scales blocks. A micro-batch has
    one row per token of a rank: `batch.micro: 1` with `seq_length: 100` is refused, as 100 % 8 is 4.
    """
    precision, model, parallel = config.precision, config.model, config.parallel
    if not precision.uses_transformer_engine:
        return
    in_blocks = precision.fp4 is not None or (precision.fp8 is not None and precision.fp8.recipe == "mxfp8")
    rows, columns = (32, 32) if in_blocks else (8, 16)
    key = "precision.fp4" if precision.fp4 is not None else "precision.fp8"
    widths = {"model.hidden": model.hidden, "model.ffn_hidden / parallel.tensor": model.ffn_hidden // parallel.tensor}
    if model.head_dim is not None or model.hidden % model.heads == 0:
        widths["heads x head_dim / parallel.tensor"] = model.heads * model.head_size // parallel.tensor
    for name, width in widths.items():
        if width % columns:
            yield f"{key}: {name} is {width}, but Transformer Engine needs a multiple of {columns}; change the width"
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
                f"{key}: {name}: a micro-batch has {per_rank} tokens per rank, but Transformer Engine needs a multiple "
                f"of {rows}; change seq_length or batch.micro"
            )
