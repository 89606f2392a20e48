"""Table of what makes a run faster: knob, default, needs, gain, source.

docs/speed.md is generated from this table; megatron_cpt/model/kernel_options.py maps it to megatron-core's settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_cpt.config.model import Activation
from megatron_cpt.config.schema import RunConfig


@dataclass(frozen=True)
class ComputePlace:
    """What a knob may ask about where a run computes.

    Attributes:
        on_gpu: a CUDA device is there.
        transformer_engine: the layers are Transformer Engine's.
        apex: Apex's extension for weight gradients is installed.
    """

    on_gpu: bool = False
    transformer_engine: bool = False
    apex: bool = False


GPU_CLUSTER = ComputePlace(on_gpu=True, transformer_engine=True, apex=True)
"""What a plan takes for granted: GPUs with all that NVIDIA's containers hold."""


@dataclass(frozen=True)
class Need:
    """A condition of a knob: how a message says it, and whether it holds."""

    text: str
    holds: Callable[[RunConfig, ComputePlace], bool]


@dataclass(frozen=True)
class Knob:
    """A line of the table.

    Attributes:
        name: the key below `speed`.
        cpu, h100: on by default, on a CPU and on any CUDA device.
        needs: all must hold.
        sets: megatron-core's own names.
        buys: what one gets.
        source: where that is said or shown.
    """

    name: str
    cpu: bool
    h100: bool
    needs: tuple[Need, ...]
    sets: str
    buys: str
    source: str


def _has_one_shape(run: RunConfig, place: ComputePlace) -> bool:
    shapes = {(run.length_of(phase), run.micro_batch_of(phase)) for phase in run.phases}
    return shapes <= {(run.seq_length, run.batch.micro)}


def _fits_user_buffers(run: RunConfig, place: ComputePlace) -> bool:
    return run.precision.fp4 is None and (run.precision.fp8 is None or run.precision.fp8.recipe != "blockwise")


def _overlaps_grad_reduce(run: RunConfig, place: ComputePlace) -> bool:
    asked = run.speed.overlap_grad_reduce
    return place.on_gpu if asked is None else asked


_GPU = Need("a CUDA device", lambda run, place: place.on_gpu)
_TE = Need("Transformer Engine", lambda run, place: place.transformer_engine)

KNOBS = (
    Knob(
        "overlap_grad_reduce",
        cpu=False,
        h100=True,
        needs=(),
        sets="DDP `overlap_grad_reduce`, `no_sync_func`",
        buys="the exchange of gradients disappears behind the last backward pass, all but its last bucket",
        source="megatron-core distributed/param_and_grad_buffer.py; on in NVIDIA's 15B recipe (dgxc-benchmarking)",
    ),
    Knob(
        "overlap_param_gather",
        cpu=False,
        h100=True,
        needs=(
            Need("parallel.distributed_optimizer", lambda run, place: run.parallel.distributed_optimizer),
            Need("speed.overlap_grad_reduce: true", _overlaps_grad_reduce),
            # Their weights travel through the gradient buffer, which is zeroed between the update and the forward pass.
            Need("no MXFP8 weights", lambda run, place: not has_mxfp8_weights(run)),
        ),
        sets="DDP `overlap_param_gather`",
        buys="the gathering of new weights disappears behind the first forward pass, all but its first bucket",
        source="megatron-core distributed/param_and_grad_buffer.py; on in NVIDIA's 15B recipe",
    ),
    Knob(
        "tp_comm_overlap",
        cpu=False,
        h100=False,
        needs=(
            _TE,
            Need("parallel.tensor above 1", lambda run, place: run.parallel.tensor > 1),
            Need("parallel.sequence", lambda run, place: run.parallel.sequence),
            Need("the same seq_length and batch.micro in every phase", _has_one_shape),
            # `fill_userbuffers_buffer_for_all_gather` takes bf16, FP8 with one scale a tensor, and MXFP8.
            Need("neither blockwise FP8 nor FP4", _fits_user_buffers),
        ),
        sets="`tp_comm_overlap`, Transformer Engine's `initialize_ub`",
        buys="most of what tensor parallelism adds to a step; off until asked for: it needs NVLink with multicast (or "
        "UB_SKIPMC=1) between the ranks of a tensor group, and a failure is one at start-up",
        source="Transformer Engine module/base.py; on in NVIDIA's 15B recipe",
    ),
    Knob(
        "fused_cross_entropy",
        cpu=False,
        h100=True,
        # megatron-core's native one makes its gradient bf16 whatever the logits are.
        needs=(Need("precision.compute: bf16", lambda run, place: run.precision.compute == "bf16"),),
        sets="`cross_entropy_loss_fusion`, `cross_entropy_fusion_impl: native` (`te` has been wrong in several "
        "releases, NVIDIA/Megatron-LM issue 1750, PR 5115)",
        buys="memory and time of fp32 logits, with 256,000 tokens in the vocabulary the largest tensors of all, and "
        "one of the three tensor-parallel exchanges of the loss",
        source="megatron-core fusions/fused_cross_entropy.py",
    ),
    Knob(
        "fused_rope",
        cpu=False,
        h100=True,
        needs=(_GPU, _TE),
        sets="`apply_rope_fusion`",
        buys="four passes over queries and keys become one, and no tables of cosines a layer",
        source="megatron-core models/common/embeddings/rope_utils.py",
    ),
    Knob(
        "fused_activation",
        cpu=False,
        h100=True,
        needs=(_GPU,),
        sets="`bias_activation_fusion` for SwiGLU; for the others the function itself, compiled",
        buys="one pass over the widest activations; SwiGLU keeps two wide tensors for its backward pass instead of "
        "four. GELU is not megatron-core's fused one, which is its tanh approximation",
        source="megatron-core fusions/fused_bias_swiglu.py, fusions/fused_bias_gelu.py",
    ),
    Knob(
        "fused_bias_dropout",
        cpu=False,
        h100=True,
        needs=(_GPU,),
        sets="`bias_dropout_fusion`",
        buys="one pass over the residual stream instead of up to three",
        source="megatron-core fusions/fused_bias_dropout.py",
    ),
    Knob(
        "fused_grad_accumulation",
        cpu=False,
        h100=True,
        needs=(_GPU, Need("Apex (fused_weight_gradient_mlp_cuda)", lambda run, place: place.apex)),
        sets="`gradient_accumulation_fusion`",
        buys="no bf16 weight gradients and no pass that adds them up, in every micro-batch",
        source="megatron-core tensor_parallel/layers.py; NVIDIA's containers have Apex",
    ),
)
"""The table; docs/speed.md shows it."""


@dataclass(frozen=True)
class Variable:
    """An environment variable that examples/nemotron4_15b/cluster.sh sets."""

    name: str
    value: str
    buys: str


ENVIRONMENT = (
    Variable(
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "1",
        "communication starts before the matrix product that should hide it; 32 where only context parallelism is used",
    ),
    Variable(
        "PYTORCH_CUDA_ALLOC_CONF",
        "expandable_segments:True",
        "less memory lost to fragmentation by a pipeline's micro-batches",
    ),
    Variable("NCCL_IB_TIMEOUT", "22", "a flapping link costs seconds and not the run"),
    Variable("NCCL_IB_RETRY_CNT", "7", "the same"),
)
"""Read by NCCL, torch and CUDA when a process starts, so a launcher sets them."""


def has_mxfp8_weights(run: RunConfig) -> bool:
    """Whether weights are kept in MXFP8, which megatron-core sends through the gradient buffer."""
    fp8 = run.precision.fp8
    return fp8 is not None and fp8.recipe == "mxfp8" and fp8.params


def resolve_speed(run: RunConfig, place: ComputePlace) -> tuple[frozenset[str], list[str]]:
    """Which knobs are on.

    Args:
        run: the run; a knob that it sets counts, the rest follow the table.
        place: where it computes.

    Returns:
        The names of those that are on, and for each one that was asked for and cannot be, a message.
    """
    on: set[str] = set()
    problems = []
    for knob in KNOBS:
        asked = getattr(run.speed, knob.name)
        missing = [need.text for need in knob.needs if not need.holds(run, place)]
        if asked and missing:
            problems.append(f"speed.{knob.name}: needs {' and '.join(missing)}; leave it out here")
        if asked or (asked is None and not missing and (knob.h100 if place.on_gpu else knob.cpu)):
            on.add(knob.name)
    return frozenset(on), problems


def is_possible(name: str, run: RunConfig, place: ComputePlace) -> bool:
    """Whether a knob can be on, asked for or not."""
    knob = next(knob for knob in KNOBS if knob.name == name)
    return all(need.holds(run, place) for need in knob.needs)


def fuses_swiglu(run: RunConfig, place: ComputePlace) -> bool:
    """Whether a gated MLP's activation is one kernel with its product, and keeps its input only."""
    is_swiglu = run.model.gated and run.model.activation is Activation.SILU
    return is_swiglu and "fused_activation" in resolve_speed(run, place)[0]


def markdown_tables() -> tuple[str, str]:
    """The table of knobs and that of environment variables, as docs/speed.md has them."""
    knobs: list[Sequence[str]] = [("key below `speed`", "cpu", "h100", "needs", "sets", "buys", "source")]
    for knob in KNOBS:
        defaults = ("on" if default else "off" for default in (knob.cpu, knob.h100))
        needs = ", ".join(need.text for need in knob.needs) or "nothing"
        knobs.append((f"`{knob.name}`", *defaults, needs, knob.sets, knob.buys, knob.source))
    variables: list[Sequence[str]] = [("variable", "value", "buys")]
    variables += [(f"`{variable.name}`", f"`{variable.value}`", variable.buys) for variable in ENVIRONMENT]
    return _markdown(knobs), _markdown(variables)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines)
