"""Tables of a run on a cluster, and of the ranked layouts."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import IO

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from megatron_cpt.config import RunConfig
from megatron_cpt.planning.cluster.advise import AS_GOOD, Advice
from megatron_cpt.planning.cluster.estimate import MEMORY_MARGIN, Candidate, Cluster, fits, step_lines
from megatron_cpt.planning.cost.memory import GIB
from megatron_cpt.planning.hardware import Gpu
from megatron_cpt.views.plan_table import named_lines, print_parts

MAX_ROWS = 10
MAX_MISFITS = 6
# Model chunks of which the table shows the layers; `--json` has all of them.
MAX_SHOWN_CHUNKS = 8


def render_cluster(cluster: Cluster, stream: IO[str]) -> None:
    """Write memory, speed and time of a run on named GPUs."""
    print_parts(stream, [named_lines(_cluster_lines(cluster))])


def render_advice(advice: Advice, stream: IO[str]) -> None:
    """Write the ranked layouts, the run's own layout, and the splits that do not fit."""
    print_parts(stream, _advice_parts(advice))


def _cluster_lines(cluster: Cluster) -> Iterator[tuple[str, str]]:
    gpu, memory, speed, flops = cluster.gpu, cluster.memory, cluster.speed, cluster.flops
    yield "cluster", f"{cluster.layout.num_gpus:,} x {gpu.title}{_caution(gpu)}"
    verdict = "fits" if fits(memory, gpu) else "DOES NOT FIT"
    yield (
        "memory",
        f"about {memory.total / GIB:.1f} of {gpu.memory_gib:.1f} GiB on stage {memory.stage}, with "
        f"{memory.reserved / GIB:.1f} GiB for CUDA, NCCL and workspaces: {verdict} (margin {MEMORY_MARGIN:.0%})",
    )
    yield (
        "speed",
        f"about {speed.tokens_per_gpu:,.0f} tokens/s/GPU, {speed.step:.2f} s per step; "
        f"{speed.tokens_per_gpu * flops.full / 1e12:.0f} TFLOP/s/GPU with full attention counted "
        f"({cluster.mfu(flops.full):.1%} MFU of {cluster.peak / 1e12:,.0f}), "
        f"{speed.tokens_per_gpu * flops.causal / 1e12:.0f} causal ({cluster.mfu(flops.causal):.1%})",
    )
    parts = (f"{name} {share:.1%}" for name, share in step_lines(speed) if share >= 0.001)
    yield "step", ", ".join(parts)
    overlapped = cluster.overlapped
    with_overlap = (
        f"; with speed.tp_comm_overlap=true {overlapped.tokens_per_gpu:,.0f} tokens/s/GPU" if overlapped else ""
    )
    yield "knobs", f"{_knobs(cluster.knobs)}{with_overlap}"
    yield "time", f"about {cluster.seconds / 86400:.1f} days = {cluster.gpu_hours:,.0f} GPU hours (steps only)"
    for hint in cluster.hints:
        yield "hint", hint


def _knobs(on: frozenset[str]) -> str:
    return f"with Transformer Engine: {', '.join(sorted(on)) or 'nothing fused or overlapped'}"


def _caution(gpu: Gpu) -> str:
    return "" if gpu.is_calibrated else f"; {gpu.evidence}"


def _advice_parts(advice: Advice) -> Iterator[RenderableType]:
    gpu = advice.gpu
    yield Text(
        f"Layouts for {advice.num_gpus:,} x {gpu.title}{_caution(gpu)}: {advice.num_tried:,} tried, the "
        f"best of each split that fits {gpu.memory_gib:.1f} GiB with {MEMORY_MARGIN:.0%} to spare"
    )
    if not advice.is_uniform:
        steps = f"{advice.steps.global_batch:,} x {advice.steps.seq_length:,} tokens"
        yield Text(f"speed: in steps of {steps}, which train most tokens; memory: in the steps that need most")
    if advice.ranking:
        yield _ranking(advice)
        yield _assumptions(advice.ranking)
        yield Text(f"to use the first: {shlex.join(advice.ranking[0].overrides)}")
    else:
        yield Text("no layout fits; use more GPUs, or GPUs with more memory")
    yield Text(_current(advice))
    if advice.other_batch is not None:
        other = advice.other_batch
        yield Text(
            f"batch.global={other.config.batch.global_} would allow {_name(other)}: about "
            f"{other.speed.tokens_per_gpu:,.0f} tokens/s/GPU"
        )
    misfits = [f"not {split}: {reason}" for split, reason in advice.misfits.items() if " CP" not in split]
    yield from map(Text, misfits[:MAX_MISFITS])
    if len(advice.misfits) > min(MAX_MISFITS, len(misfits)):
        yield Text("--json also has the other splits that do not fit")


def _assumptions(ranking: Sequence[Candidate]) -> Text:
    """Return the knobs on which the speeds depend, first the one that is off by default."""
    others = _knobs(ranking[0].knobs - {"tp_comm_overlap"})
    if not any(candidate.plain for candidate in ranking):
        return Text(f"knobs: {others}")
    overlap = "speed.tp_comm_overlap=true where TP is above 1, off by default (in parentheses: without it)"
    return Text(f"knobs: {overlap}; {others}")


def _ranking(advice: Advice) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for header in ("", "layout", "DP", "tokens/s/GPU", "s/step", "GiB", "why"):
        table.add_column(header, justify="left" if header in ("layout", "why") else "right", overflow="fold")
    best = advice.ranking[0].speed.tokens_per_gpu
    for rank, candidate in enumerate(advice.ranking[:MAX_ROWS], start=1):
        without = f" ({candidate.plain.tokens_per_gpu:,.0f})" if candidate.plain else ""
        as_good = "~" if rank > 1 and candidate.speed.tokens_per_gpu >= AS_GOOD * best else ""
        table.add_row(
            f"{rank}{as_good}",
            _name(candidate),
            f"{candidate.layout.data_parallel:,}",
            f"{candidate.speed.tokens_per_gpu:,.0f}{without}",
            f"{candidate.speed.step:.2f}",
            f"{candidate.memory.total / GIB:.1f}",
            candidate.why,
        )
    table.caption = f"~: as good as the first, within {1 - AS_GOOD:.0%}, which is about the error of the estimate"
    table.caption_justify = "left"
    return table


def _name(candidate: Candidate) -> str:
    config = candidate.config
    virtual = f" VP{config.parallel.virtual_pipeline}" if config.parallel.virtual_pipeline > 1 else ""
    recompute = "" if config.recompute.granularity == "none" else f" {config.recompute.granularity} recompute"
    return f"{candidate.split}{virtual}{_layers(config)} MBS{config.batch.micro}{recompute}"


def _layers(config: RunConfig) -> str:
    """Return the layers per model chunk, if they are unequal: ` 9+9+9+5`."""
    layout = config.parallel.pipeline_layout
    if layout is None or len(set(layout)) == 1:
        return ""
    return f" {'+'.join(map(str, layout))}" if len(layout) <= MAX_SHOWN_CHUNKS else " uneven"


def _current(advice: Advice) -> str:
    current = advice.current
    if current is None:
        return f"this run's own layout: {advice.current_problem}"
    text = (
        f"this run's own layout, {_name(current)}: about {current.speed.tokens_per_gpu:,.0f} tokens/s/GPU, "
        f"{current.memory.total / GIB:.1f} GiB"
    )
    if advice.current_overlapped is not None:
        text += f" (with speed.tp_comm_overlap=true {advice.current_overlapped.tokens_per_gpu:,.0f})"
    if advice.current_problem:
        return f"{text}; {advice.current_problem}"
    if advice.ranking:
        text += f", {current.speed.tokens_per_gpu / advice.ranking[0].speed.tokens_per_gpu:.0%} of the first"
    return f"{text}; {current.why}"
