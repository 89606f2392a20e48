"""A run on a cluster, and the advice for one, as text that a person can read."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import IO

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_cpt.plan.cluster.advice import Advice, Candidate
from megatron_cpt.plan.cluster.advise import AS_GOOD
from megatron_cpt.plan.cluster.estimate import MEMORY_MARGIN, Cluster, fits, step_lines
from megatron_cpt.plan.cost.memory import GIB
from megatron_cpt.views.plan_table import WIDTH_WITHOUT_TERMINAL

MAX_ROWS = 10
MAX_MISFITS = 6


def render_cluster(cluster: Cluster, stream: IO[str]) -> None:
    """What the run takes on named GPUs: memory, speed, time."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for name, text in _cluster_lines(cluster):
        table.add_row(name, text)
    _write(stream, [table])


def render_advice(advice: Advice, stream: IO[str]) -> None:
    """The ranking, the run's own layout, and what does not fit."""
    _write(stream, list(_advice_parts(advice)))


def _write(stream: IO[str], parts: list[RenderableType]) -> None:
    console = Console(file=stream, markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(file=io.StringIO(), markup=False, highlight=False, width=WIDTH_WITHOUT_TERMINAL)
        with console.capture() as capture:
            console.print(*parts, sep="\n")
        stream.writelines(f"{line.rstrip()}\n" for line in capture.get().splitlines())
        return
    console.print(*parts, sep="\n")


def _cluster_lines(cluster: Cluster) -> Iterator[tuple[str, str]]:
    gpu, memory, speed, flops = cluster.gpu, cluster.memory, cluster.speed, cluster.flops
    yield "cluster", f"{cluster.layout.num_gpus:,} x {gpu.title}{_caution(gpu.is_calibrated)}"
    verdict = "fits" if fits(memory, gpu) else "DOES NOT FIT"
    yield (
        "memory",
        f"about {memory.total / GIB:.1f} of {gpu.memory_gib:.1f} GiB on stage {memory.stage}, with "
        f"{memory.reserved / GIB:.1f} GiB for CUDA, NCCL and workspaces: {verdict} (margin {MEMORY_MARGIN:.0%})",
    )
    yield (
        "speed",
        f"about {speed.tokens_per_gpu:,.0f} tokens/s/GPU, {speed.step:.2f} s a step; "
        f"{speed.tokens_per_gpu * flops.full / 1e12:.0f} TFLOP/s/GPU with full attention counted "
        f"({cluster.mfu(flops.full):.1%} MFU of {cluster.peak / 1e12:,.0f}), "
        f"{speed.tokens_per_gpu * flops.causal / 1e12:.0f} causal ({cluster.mfu(flops.causal):.1%})",
    )
    parts = (f"{name} {share:.1%}" for name, share in step_lines(speed) if share >= 0.001)
    yield "step", ", ".join(parts)
    overlapped = cluster.overlapped
    could = f"; with speed.tp_comm_overlap=true {overlapped.tokens_per_gpu:,.0f} tokens/s/GPU" if overlapped else ""
    yield "knobs", f"{_knobs(cluster.knobs)}{could}"
    yield "time", f"about {cluster.seconds / 86400:.1f} days = {cluster.gpu_hours:,.0f} GPU hours (steps only)"


def _knobs(on: frozenset[str]) -> str:
    """What a speed takes for granted."""
    return f"as on GPUs with Transformer Engine and Apex: {', '.join(sorted(on)) or 'nothing fused or overlapped'}"


def _caution(is_calibrated: bool) -> str:
    return "" if is_calibrated else "; the shares of its peaks are those of an H100, unchecked on this GPU"


def _advice_parts(advice: Advice) -> Iterator[RenderableType]:
    gpu = advice.gpu
    yield Text(
        f"Layouts for {advice.num_gpus:,} x {gpu.title}{_caution(gpu.is_calibrated)}: {advice.num_tried:,} tried, the "
        f"best of each split that fits {gpu.memory_gib:.1f} GiB with {MEMORY_MARGIN:.0%} to spare"
    )
    if not advice.is_uniform:
        steps = f"{advice.steps.global_batch:,} x {advice.steps.seq_length:,} tokens"
        yield Text(
            f"speeds: of steps of {steps}, in which most tokens are trained; memory: of the steps that need most"
        )
    if advice.ranking:
        yield _ranking(advice)
        yield _assumptions(advice.ranking)
        yield Text(f"to take the first: {' '.join(advice.ranking[0].overrides)}")
    else:
        yield Text("none fits; more GPUs, or GPUs with more memory, are needed")
    yield Text(_current(advice))
    if advice.other_batch is not None:
        other = advice.other_batch
        yield Text(
            f"batch.global={other.config.batch.global_} would allow {_name(other)}: about "
            f"{other.speed.tokens_per_gpu:,.0f} tokens/s/GPU"
        )
    misfits = [misfit for misfit in advice.misfits if " CP" not in misfit.split]
    for misfit in misfits[:MAX_MISFITS]:
        yield Text(f"not {misfit.split}: {misfit.reason}")
    if len(advice.misfits) > min(MAX_MISFITS, len(misfits)):
        yield Text("--json also has the other splits that do not fit")


def _assumptions(ranking: Sequence[Candidate]) -> Text:
    """The knobs behind the speeds, first the one that has to be set."""
    others = _knobs(ranking[0].knobs - {"tp_comm_overlap"})
    if not any(candidate.plain for candidate in ranking):
        return Text(f"knobs: {others}")
    asked = "speed.tp_comm_overlap=true wherever TP is above 1, which is off until asked for (in brackets: without)"
    return Text(f"knobs: {asked}; the rest {others}")


def _ranking(advice: Advice) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for header in ("", "layout", "DP", "tokens/s/GPU", "s/step", "GiB", "why"):
        table.add_column(header, justify="left" if header in ("layout", "why") else "right", overflow="fold")
    best = advice.ranking[0].speed.tokens_per_gpu
    for rank, candidate in enumerate(advice.ranking[:MAX_ROWS], start=1):
        as_good = "~" if rank > 1 and candidate.speed.tokens_per_gpu >= AS_GOOD * best else ""
        table.add_row(
            f"{rank}{as_good}",
            _name(candidate),
            f"{candidate.layout.data_parallel:,}",
            _tokens_per_gpu(candidate),
            f"{candidate.speed.step:.2f}",
            f"{candidate.memory.total / GIB:.1f}",
            candidate.why,
        )
    table.caption = f"~: as good as the first, within {1 - AS_GOOD:.0%}, which is about the error of the estimate"
    table.caption_justify = "left"
    return table


def _tokens_per_gpu(candidate: Candidate) -> str:
    plain = f" ({candidate.plain.tokens_per_gpu:,.0f})" if candidate.plain else ""
    return f"{candidate.speed.tokens_per_gpu:,.0f}{plain}"


def _name(candidate: Candidate) -> str:
    config = candidate.config
    virtual = f" VP{config.parallel.virtual_pipeline}" if config.parallel.virtual_pipeline > 1 else ""
    recompute = "" if config.recompute.granularity == "none" else f" {config.recompute.granularity} recompute"
    return f"{candidate.split}{virtual} MBS{config.batch.micro}{recompute}"


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
