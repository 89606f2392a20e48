"""Table of the options below `speed`, here called knobs: default, needs, settings, gain, source.

docs/operations/speed.md is generated from this table. megatron_cpt/model/kernel_options.py maps it to megatron-core.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_cpt.config.model import Activation
from megatron_cpt.config.schema import RunConfig


@dataclass(frozen=True)
class ComputePlace:
    """Device and libraries of a run, on which knobs depend.

    Attributes:
        transformer_engine: the layers come from Transformer Engine.
        adds_gradients: a matrix product of Apex or torch adds weight gradients to an fp32 buffer.
    """

    on_gpu: bool = False
    transformer_engine: bool = False
    adds_gradients: bool = False


GPU_CLUSTER = ComputePlace(on_gpu=True, transformer_engine=True, adds_gradients=True)
"""Assumption of plans: GPUs with the libraries of NVIDIA's containers."""


@dataclass(frozen=True)
class Need:
    """Condition of a knob, with its text in messages."""

    text: str
    holds: Callable[[RunConfig, ComputePlace], bool]


@dataclass(frozen=True)
class Knob:
    """Row of the table.

    Attributes:
        sets: settings of megatron-core and Transformer Engine.
        gain: effect on time or memory.
        source: file or recipe that shows the gain.
        needs: conditions, all of which must hold.
        is_default: on by default on any CUDA device; no knob is on a CPU.
    """

    name: str
    sets: str
    gain: str
    source: str
    needs: tuple[Need, ...] = ()
    is_default: bool = True


def _has_one_shape(run: RunConfig, place: ComputePlace) -> bool:
    shapes = {(run.length_of(phase), run.micro_batch_of(phase)) for phase in run.phases}
    return shapes <= {(run.seq_length, run.batch.micro)}


def _fits_user_buffers(run: RunConfig, place: ComputePlace) -> bool:
    return run.precision.fp4 is None and (run.precision.fp8 is None or run.precision.fp8.recipe != "blockwise")


def _overlaps_grad_reduce(run: RunConfig, place: ComputePlace) -> bool:
    requested = run.speed.overlap_grad_reduce
    return place.on_gpu if requested is None else requested


_GPU = Need("a CUDA device", lambda run, place: place.on_gpu)
_TE = Need("Transformer Engine", lambda run, place: place.transformer_engine)

KNOBS = (
    Knob(
        "overlap_grad_reduce",
        sets="DDP `overlap_grad_reduce`, `no_sync_func`",
        gain="overlaps the reduction of gradients with the last backward pass, except its last bucket",
        source="megatron-core distributed/param_and_grad_buffer.py; on in NVIDIA's 15B recipe (dgxc-benchmarking)",
    ),
    Knob(
        "overlap_param_gather",
        needs=(
            Need("parallel.distributed_optimizer", lambda run, place: run.parallel.distributed_optimizer),
            Need("speed.overlap_grad_reduce: true", _overlaps_grad_reduce),
            # MXFP8 weights are gathered in the gradient buffer, which is zeroed between update and forward pass.
            Need("no MXFP8 weights", lambda run, place: not has_mxfp8_weights(run)),
        ),
        sets="DDP `overlap_param_gather`",
        gain="overlaps the gathering of updated weights with the first forward pass, except its first bucket",
        source="megatron-core distributed/param_and_grad_buffer.py; on in NVIDIA's 15B recipe",
    ),
    Knob(
        "tp_comm_overlap",
        needs=(
            _TE,
            Need("parallel.tensor above 1", lambda run, place: run.parallel.tensor > 1),
            Need("parallel.sequence", lambda run, place: run.parallel.sequence),
            Need("the same seq_length and batch.micro in every phase", _has_one_shape),
            # `fill_userbuffers_buffer_for_all_gather` accepts bf16, FP8 with one scale per tensor, and MXFP8.
            Need("neither blockwise FP8 nor FP4", _fits_user_buffers),
        ),
        is_default=False,
        sets="`tp_comm_overlap`, Transformer Engine's `initialize_ub`",
        gain="hides most tensor-parallel communication; off unless set: needs NVLink with multicast, or UB_SKIPMC=1",
        source="Transformer Engine module/base.py; on in NVIDIA's 15B recipe",
    ),
    Knob(
        "fused_cross_entropy",
        # The native kernel of megatron-core always returns a bf16 gradient.
        needs=(Need("precision.compute: bf16", lambda run, place: run.precision.compute == "bf16"),),
        # `te` returned wrong losses in several releases: NVIDIA/Megatron-LM issue 1750, PR 5115.
        sets="`cross_entropy_loss_fusion`, `cross_entropy_fusion_impl: native`",
        gain="saves fp32 logits, the largest tensors with a large vocabulary, and one of three collectives of the loss",
        source="megatron-core fusions/fused_cross_entropy.py",
    ),
    Knob(
        "fused_rope",
        needs=(_GPU, _TE),
        sets="`apply_rope_fusion`",
        gain="reads queries and keys once instead of four times, and saves tables of cosines per layer",
        source="megatron-core models/common/embeddings/rope_utils.py",
    ),
    Knob(
        "fused_activation",
        needs=(_GPU,),
        sets="`bias_activation_fusion` for SwiGLU, a compiled `activation_func` for other activations",
        # megatron-core's own fused GELU is the tanh approximation, so GELU is compiled instead.
        gain="reads the widest activations once; SwiGLU saves two wide tensors for the backward pass instead of four",
        source="megatron-core fusions/fused_bias_swiglu.py, fusions/fused_bias_gelu.py",
    ),
    Knob(
        "fused_bias_dropout",
        needs=(_GPU,),
        sets="`bias_dropout_fusion`",
        gain="reads the residual stream once instead of up to three times",
        source="megatron-core fusions/fused_bias_dropout.py",
    ),
    Knob(
        "fused_grad_accumulation",
        needs=(
            _GPU,
            Need(
                "Transformer Engine, Apex, or a torch that adds bf16 products to fp32 sums",
                lambda run, place: place.transformer_engine or place.adds_gradients,
            ),
        ),
        sets="`gradient_accumulation_fusion`",
        gain="saves bf16 weight gradients and their addition to the fp32 buffer in every micro-batch",
        source="megatron-core tensor_parallel/layers.py; without Apex model/gradient_products.py, checked at start",
    ),
)
"""All rows of the table."""


def has_mxfp8_weights(run: RunConfig) -> bool:
    """Return True if weights are stored in MXFP8, which megatron-core gathers in the gradient buffer."""
    fp8 = run.precision.fp8
    return fp8 is not None and fp8.recipe == "mxfp8" and fp8.params


def resolve_speed(run: RunConfig, place: ComputePlace) -> tuple[frozenset[str], list[str]]:
    """Return the names of the knobs that are on, and one message per knob that is set to true but not possible."""
    on: set[str] = set()
    problems = []
    for knob in KNOBS:
        requested = getattr(run.speed, knob.name)
        missing = [need.text for need in knob.needs if not need.holds(run, place)]
        if requested and missing:
            problems.append(f"speed.{knob.name}: needs {' and '.join(missing)}; remove it here")
        if requested or (requested is None and not missing and knob.is_default and place.on_gpu):
            on.add(knob.name)
    return frozenset(on), problems


def is_possible(name: str, run: RunConfig, place: ComputePlace) -> bool:
    """Return True if all conditions of a knob hold."""
    knob = next(knob for knob in KNOBS if knob.name == name)
    return all(need.holds(run, place) for need in knob.needs)


def fuses_swiglu(run: RunConfig, place: ComputePlace) -> bool:
    """Return True if one kernel computes SwiGLU, which then saves only its input for the backward pass."""
    is_swiglu = run.model.gated and run.model.activation is Activation.SILU
    return is_swiglu and "fused_activation" in resolve_speed(run, place)[0]


def knobs_table() -> str:
    """Return the table of knobs for docs/operations/speed.md."""
    rows: list[Sequence[str]] = [("key below `speed`", "cpu", "h100", "needs", "sets", "gain", "source")]
    for knob in KNOBS:
        needs = ", ".join(need.text for need in knob.needs) or "nothing"
        rows.append(
            (f"`{knob.name}`", "off", "on" if knob.is_default else "off", needs, knob.sets, knob.gain, knob.source)
        )
    return markdown_table(rows)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines)
