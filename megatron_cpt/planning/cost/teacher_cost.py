"""Cost of distillation: a second model that computes forward only, and a loss with two distributions per token.

The teacher has weights without gradients or optimizer. Its activations are freed before the student's are made. With
several pipeline stages its final hidden states of all micro-batches of a step wait on the last stage for the loss
(`train/distillation/online_teacher.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cpt.config import ModelConfig, ParallelConfig, PrecisionConfig, RecomputeConfig, RunConfig
from megatron_cpt.planning.cost.activations import tokens_of_micro_batch
from megatron_cpt.planning.cost.parameters import FlopsPerToken, count_parameters, flops_per_token
from megatron_cpt.planning.cost.rank_layout import Layout

PIECE_ELEMENTS = 2**25
"""Largest number of logits that the loss of distillation computes at a time: 128 MiB in fp32."""
CPU_PIECE_ELEMENTS = 2**22  # larger pieces get fresh memory from the system, at a page fault per 4 KiB
PIECE_TENSORS = 5  # alive at the same time, fp32: both distributions, their logarithms, and the gradient
LOSS_BYTES = 144
"""Bytes per logit that the kernels of this loss move beyond the kernels of the cross entropy; counted by hand."""


@dataclass(frozen=True)
class TeacherCost:
    """Cost of a teacher that runs beside the model.

    Attributes:
        parameters: of the teacher.
        share: of the micro-batches that need it, see `distilled_share`.
        flops: of its forward pass per token of the run, a third of training it times `share`; not in the plan's FLOPs.
    """

    parameters: int
    share: float
    flops: FlopsPerToken


@dataclass(frozen=True)
class CacheCost:
    """Cost of a cached teacher on the disk.

    Attributes:
        bytes_per_token: of a distilled source.
        num_bytes: size of the cache.
        bytes_per_step: that all ranks of one pipeline stage and tensor rank read together, in the largest step of the
            phase with the largest share of distilled samples.
        exists: False if the cache is not made yet, and the size is computed for all distilled sources with the default
            number of tokens per record.
    """

    bytes_per_token: int
    num_bytes: int
    bytes_per_step: int
    exists: bool


def distilled_samples(config: RunConfig) -> float:
    """Return the share of the samples that are distilled, in the phase with the largest share."""
    teacher = config.teacher
    if teacher is None:
        return 0.0
    shares = [
        sum(weight for name, weight in phase.blend.items() if teacher.distills(name)) / sum(phase.blend.values())
        for phase in config.phases
    ]
    return min(1.0, max(shares))


def teacher_cost(config: RunConfig) -> TeacherCost | None:
    """Return the cost of the teacher, or None if no teacher runs beside the model."""
    run = teacher_run(config)
    if run is None:
        return None
    share, training = distilled_share(config), flops_per_token(run.model, config.seq_length)
    forward = FlopsPerToken(training.full * share / 3, training.causal * share / 3)
    return TeacherCost(count_parameters(run.model).total, share, forward)


def teacher_run(config: RunConfig, model: ModelConfig | None = None) -> RunConfig | None:
    """Return the run that builds the teacher, or None if no teacher runs beside the student.

    It computes in the student's format without FP8, and recomputes nothing.

    Args:
        config: the run.
        model: the teacher's model; None: as `teacher.model` says, or else the student's.
    """
    if config.teacher_checkpoint is None or config.teacher is None:
        return None
    model = model or config.teacher.model or config.model
    # the same padding, so that both models have the same columns on a rank
    model = model.model_copy(update={"vocab_multiple": config.model.vocab_multiple, "padding_in_softmax": False})
    tensor, pipeline = config.teacher.layout(config.parallel)
    parallel = config.parallel.model_copy(
        update={
            "tensor": tensor,
            "pipeline": pipeline,
            "virtual_pipeline": config.parallel.virtual_pipeline if pipeline > 1 else 1,
        }
    )
    off = ("overlap_grad_reduce", "overlap_param_gather", "tp_comm_overlap", "fused_grad_accumulation")
    return config.model_copy(
        update={
            "model": model,
            "parallel": parallel.model_copy(update={"pipeline_layout": _pipeline_layout(config, parallel, model)}),
            "precision": PrecisionConfig(compute=config.precision.compute),
            "recompute": RecomputeConfig(),
            "speed": config.speed.model_copy(update=dict.fromkeys(off, False)),
            "teacher": None,
        }
    )


def _pipeline_layout(config: RunConfig, parallel: ParallelConfig, model: ModelConfig) -> list[int] | None:
    """Return the layers per model chunk of the teacher; None: equally many."""
    if model.layers == config.model.layers and parallel.pipeline == config.parallel.pipeline:
        return parallel.pipeline_layout
    chunks = parallel.pipeline * parallel.virtual_pipeline
    even, rest = divmod(model.layers, chunks)
    return [even + (number < rest) for number in range(chunks)] if rest else None


def distilled_share(config: RunConfig) -> float:
    """Return the share of micro-batches that need the teacher, in the phase with the largest share.

    Example: a source with 0.2 of the blend is distilled, the others are not; of micro-batches of 2 samples,
    1 - 0.8^2 = 0.36 have one of its samples.
    """
    return 1.0 - (1.0 - distilled_samples(config)) ** config.batch.micro


def loss_piece_bytes(config: RunConfig) -> float:
    """Return bytes of the fp32 tensors of one piece of the loss of distillation."""
    if config.teacher is None:
        return 0.0
    logits = tokens_of_micro_batch(config) * config.model.padded_vocab / config.parallel.tensor
    return 4.0 * PIECE_TENSORS * min(logits, PIECE_ELEMENTS)


def hidden_state_bytes(config: RunConfig, layout: Layout) -> float:
    """Return bytes of the teacher's hidden states on the last stage: those that wait, and those in the loss."""
    run = teacher_run(config)
    if run is None:
        return 0.0
    whole = (2 if config.precision.compute == "bf16" else 4) * run.model.hidden * tokens_of_micro_batch(config)
    kept = whole / (run.parallel.tensor if run.parallel.sequence else 1)
    return whole + kept * (layout.num_micro_batches if run.parallel.pipeline > 1 else 1)
