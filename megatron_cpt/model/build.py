"""A config -> megatron-core GPT, in the chunks that this rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_cpt.config import ModelConfig, ParallelConfig, RunConfig
from megatron_cpt.errors import UserError
from megatron_cpt.model.initialise import initialise_weights
from megatron_cpt.model.spec import LayerSpec, choose_spec
from megatron_cpt.model.transformer_config import transformer_config


@dataclass(frozen=True)
class Model:
    """What training needs of a model.

    Attributes:
        chunks: DDP-wrapped model chunks, one, or one for each virtual pipeline stage.
        config: megatron-core's configuration, shared by the chunks.
        spec: name of the layer spec, `transformer_engine` or `local`.
    """

    chunks: Sequence[DistributedDataParallel]
    config: TransformerConfig
    spec: str


def build_model(run: RunConfig) -> Model:
    """Build the model with random weights from `run.seed`, the same for any layout.

    Raises:
        UserError: when the machine cannot compute what `precision` or `parallel` asks for.
    """
    spec = choose_spec(qk_norm=run.model.qk_norm)
    _check_machine(run, spec)
    config = transformer_config(run.model, run.parallel, run.precision, run.recompute)
    stages = range(run.parallel.virtual_pipeline) if run.parallel.virtual_pipeline > 1 else [None]
    bare = [_build_chunk(run.model, run.seq_length, config, spec, stage) for stage in stages]
    initialise_weights(bare, run.model, run.seed)
    return Model([_wrap(chunk, config, run.parallel) for chunk in bare], config, spec.name)


def _check_machine(run: RunConfig, spec: LayerSpec) -> None:
    if spec.name == "transformer_engine":
        if run.documents.reset_attention:
            raise UserError(
                "documents.reset_attention: Transformer Engine's causal attention takes no mask and would ignore it; "
                "leave it out on this machine"
            )
        return
    wanted = []
    if run.precision.fp8 is not None:
        wanted.append("precision.fp8")
    if run.parallel.context > 1:
        wanted.append(f"parallel.context: {run.parallel.context}")
    if wanted:
        raise UserError(
            f"{' and '.join(wanted)}: needs a GPU with Transformer Engine, which this machine does not have; "
            "leave it out here (for a rehearsal: precision.fp8=null parallel.context=1)"
        )


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
    return chunk.to(torch.cuda.current_device())


def _scale_rope(chunk: GPTModel, model: ModelConfig) -> None:
    """Llama 3.1's frequencies; GPTModel's own argument takes the factor but not the other three numbers."""
    scaling = model.rope_scaling
    assert scaling is not None
    rope = chunk.rotary_pos_emb
    rope.inv_freq = rope._apply_scaling(
        rope.inv_freq,
        factor=scaling.factor,
        low_freq_factor=scaling.low_freq_factor,
        high_freq_factor=scaling.high_freq_factor,
        original_max_position_embeddings=scaling.original_max_positions,
    )


def _wrap(chunk: GPTModel, config: TransformerConfig, parallel: ParallelConfig) -> DistributedDataParallel:
    module = Float16Module(config, chunk) if config.bf16 else chunk
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=False,
    )
    wrapped = DistributedDataParallel(config=config, ddp_config=ddp_config, module=module)
    config.finalize_model_grads_func = finalize_model_grads
    return wrapped
