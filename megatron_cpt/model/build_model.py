"""Build the chunks of megatron-core's GPT that belong to this rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_cpt.config import ModelConfig, ParallelConfig, PrecisionConfig, RunConfig
from megatron_cpt.model.capabilities import read_machine, with_fp8_backend
from megatron_cpt.model.finalize_gradients import finalize_gradients
from megatron_cpt.model.gradient_products import enable_in_transformer_engine, prepare_layers
from megatron_cpt.model.initialize import initialize_weights
from megatron_cpt.model.kernel_options import (
    Knobs,
    check_attention_variables,
    choose_knobs,
    connect_schedule,
    ddp_fields,
    initialize_user_buffers,
)
from megatron_cpt.model.padded_vocabulary import exclude_padding, zero_padding
from megatron_cpt.model.spec import LayerSpec, choose_spec
from megatron_cpt.model.transformer_config import transformer_config


@dataclass(frozen=True)
class Model:
    """Model of one rank.

    Attributes:
        chunks: model chunks in DDP: one per virtual pipeline stage.
        config: megatron-core's configuration, shared by the chunks.
        spec: name of the layer spec, `transformer_engine` or `local`.
        layers: description of the layer spec with versions, for the log.
        packs_documents: attention takes documents as sequences packed into one row (Transformer Engine), not as a mask.
        knobs: names of the `speed` knobs that are on.
    """

    chunks: Sequence[DistributedDataParallel]
    config: TransformerConfig
    spec: str
    layers: str
    packs_documents: bool
    knobs: frozenset[str]


def build_model(run: RunConfig, *, draw_weights: bool = True, is_trainable: bool = True) -> Model:
    """Build the model with random weights from `run.seed`, equal in every layout.

    Args:
        run: the run.
        draw_weights: False if a checkpoint is loaded next; then the weights are uninitialized memory.
        is_trainable: False builds no gradient buffers, which take 4 bytes per parameter.

    Raises:
        UserError: this machine does not support a `speed` setting. `check_machine` checks the other sections.
    """
    machine = read_machine()
    run = with_fp8_backend(run, machine)
    spec = choose_spec(qk_norm=run.model.qk_norm, precision=run.precision, machine=machine)
    is_te = spec.is_transformer_engine
    knobs = choose_knobs(run, machine, transformer_engine=is_te)
    check_attention_variables(run.speed.attention)
    initialize_user_buffers(run, knobs)
    config = transformer_config(
        run.model,
        run.parallel,
        run.precision,
        run.recompute,
        knobs,
        attention=run.speed.attention,
        deterministic=run.deterministic,
    )
    only_te_adds_gradients = config.gradient_accumulation_fusion and not prepare_layers()
    if only_te_adds_gradients:
        config.gradient_accumulation_fusion = False  # megatron-core's own layers would refuse it
    stages = range(run.parallel.virtual_pipeline) if run.parallel.virtual_pipeline > 1 else [None]
    unwrapped = [_build_chunk(run.model, run.longest_sequence, config, spec, stage) for stage in stages]
    if only_te_adds_gradients:
        enable_in_transformer_engine(unwrapped)
    if draw_weights:
        initialize_weights(unwrapped, run.model, run.seed)
        zero_padding(unwrapped, run.model)
    if not is_trainable:
        for chunk in unwrapped:
            chunk.requires_grad_(False)
    chunks = [
        _wrap(chunk, config, run.parallel, run.precision, knobs, number) for number, chunk in enumerate(unwrapped)
    ]
    connect_schedule(chunks, config, knobs)
    return Model(chunks, config, spec.name, spec.title, packs_documents=is_te, knobs=knobs)


def _build_chunk(
    model: ModelConfig, seq_length: int, config: TransformerConfig, spec: LayerSpec, stage: int | None
) -> GPTModel:
    chunk = GPTModel(
        config=config,
        transformer_layer_spec=spec.block(config, stage),
        vocab_size=model.padded_vocab,
        max_sequence_length=max(seq_length, model.max_positions or 0),
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        position_embedding_type="rope",
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        share_embeddings_and_output_weights=model.tied_embeddings,
        vp_stage=stage,
    )
    if model.rope_scaling is not None:
        _scale_rope(chunk, model)
    exclude_padding(chunk, model)
    return chunk.to(torch.cuda.current_device())


def _scale_rope(chunk: GPTModel, model: ModelConfig) -> None:
    """Scale the frequencies of RoPE; for Llama 3.1's rule the argument of GPTModel takes only the factor."""
    scaling = model.rope_scaling
    assert scaling is not None
    rope = chunk.rotary_pos_emb
    if scaling.type == "linear":
        rope.inv_freq = rope.inv_freq / scaling.factor
        return
    rope.inv_freq = rope._apply_scaling(
        rope.inv_freq,
        factor=scaling.factor,
        low_freq_factor=scaling.low_freq_factor,
        high_freq_factor=scaling.high_freq_factor,
        original_max_position_embeddings=scaling.original_max_positions,
    )


def _wrap(
    chunk: GPTModel,
    config: TransformerConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    knobs: Knobs,
    number: int,
) -> DistributedDataParallel:
    module = Float16Module(config, chunk) if config.bf16 else chunk
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, **ddp_fields(knobs, parallel), **_weights_in_fp8(precision)
    )
    # The other chunks reduce their gradients while the first one computes, so they need no small buckets.
    wrapped = DistributedDataParallel(config=config, ddp_config=ddp_config, module=module, disable_bucketing=number > 0)
    config.finalize_model_grads_func = finalize_gradients
    return wrapped


def _weights_in_fp8(precision: PrecisionConfig) -> dict[str, bool]:
    fp8 = precision.fp8
    if fp8 is None or not fp8.params:
        return {}
    # MXFP8 weights have two layouts of scales, so one buffer cannot hold them; the gradient buffer gathers them.
    return {"fp8_param_gather": True, "reuse_grad_buf_for_mxfp8_param_ag": fp8.recipe == "mxfp8"}
