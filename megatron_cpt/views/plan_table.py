"""Tables of a plan."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import IO

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from megatron_cpt.config import format_bytes, format_count, format_number_of
from megatron_cpt.planning.cost.memory import GIB
from megatron_cpt.planning.run_plan import RunPlan
from megatron_cpt.planning.timeline.epochs import REPEAT_LIMIT
from megatron_cpt.planning.timeline.schedule import Schedule
from megatron_cpt.views.terminal_console import TerminalConsole

_MOST_SOURCES = 200  # per phase; rich takes a millisecond per row


def render_plan(plan: RunPlan, stream: IO[str]) -> None:
    """Write a plan to a stream."""
    warnings = (Text.assemble(("warning: ", "bold yellow"), warning) for warning in plan.warnings)
    print_parts(stream, [named_lines(_summary_lines(plan)), _phases(plan), _sources(plan), *warnings])


def print_parts(stream: IO[str], parts: Iterable[RenderableType], *, width: int = 120) -> None:
    """Print tables and texts: in color and full width on a terminal, else plain and `width` characters wide."""
    console = TerminalConsole(file=stream)
    if console.is_terminal:
        console.print(*parts, sep="\n")
        return
    text = io.StringIO()
    TerminalConsole(file=text, width=width).print(*parts, sep="\n")
    stream.writelines(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())


def named_lines(lines: Iterable[tuple[str, str]]) -> Table:
    """Return a table of names in bold with a text beside each."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for name, text in lines:
        table.add_row(name, text)
    return table


def _summary_lines(plan: RunPlan) -> Iterable[tuple[str, str]]:
    flops, layout, memory = plan.flops, plan.layout, plan.memory
    ranks_per_replica = layout.num_gpus // layout.data_parallel
    yield (
        "run",
        f"{plan.name}: {format_count(plan.tokens)} tokens = {plan.steps:,} steps of "
        f"{f'{plan.tokens_per_step:,}' if plan.is_uniform else plan.step_sizes} tokens",
    )
    if plan.ramp:
        yield "batch ramp", _ramp(plan)
    yield "model", f"{format_count(plan.parameters.total)} parameters"
    yield (
        "FLOPs",
        f"{_flops(flops.full)} per token with full attention counted, {_flops(flops.causal)} causal; "
        f"in total {flops.full * plan.tokens_trained:.3g} and {flops.causal * plan.tokens_trained:.3g}",
    )
    if plan.teacher is not None:
        teacher = plan.teacher
        yield (
            "teacher",
            f"{format_count(teacher.parameters)} parameters, forward only on {teacher.share:.0%} of the micro-batches: "
            f"{_flops(teacher.flops.full)} per token more, {_flops(teacher.flops.causal)} causal",
        )
    if plan.teacher_cache is not None:
        cache = plan.teacher_cache
        size = f"{format_bytes(cache.num_bytes)}, {cache.bytes_per_token} bytes per token"
        yield (
            "teacher",
            f"cache of {size}{'' if cache.exists else ', not made yet (`megatron-cpt teach`)'}; a step reads "
            f"{format_bytes(cache.bytes_per_step)}",
        )
    yield "schedule", describe_schedule(plan.schedule)
    yield (
        "layout",
        f"{format_number_of(layout.num_gpus, 'rank')} = {layout.data_parallel:,} x {ranks_per_replica} per replica; "
        f"{format_number_of(layout.num_micro_batches, 'micro-batch')} per step, {layout.bubble:.1%} pipeline bubble",
    )
    if plan.evaluation_steps:
        yield "evaluation", _evaluations(plan.evaluation_steps)
    parts = ((name, gib) for name, gib in memory.to_dict().items() if name != "stage" and gib > 0)
    listed = ", ".join(f"{name} {_gib(gib)}" for name, gib in parts)
    yield "memory", f"about {_gib(memory.total / GIB)} per rank on pipeline stage {memory.stage}: {listed}"


def _ramp(plan: RunPlan) -> str:
    last = plan.ramp[-1]
    # A phase may end within a size, so sizes may occur twice.
    shown = list(dict.fromkeys(f"{segment.global_batch:,}" for segment in plan.ramp))
    if len(shown) > 3:
        shown = [*shown[:2], f"... {shown[-1]}"]
    return (
        f"batches of {', '.join(shown)} until step {last.last_step:,}, the end of {last.end.samples:,} samples and "
        f"{format_count(last.end.tokens)} tokens"
    )


def _evaluations(steps: Sequence[int]) -> str:
    shown = [f"{step:,}" for step in steps]
    if len(shown) > 6:
        shown = [*shown[:4], f"... {shown[-1]}"]
    times = f"{len(steps)} times: " if len(steps) > 1 else ""
    return f"{times}after step{'s' if len(steps) > 1 else ''} {', '.join(shown)}"


def _flops(value: float) -> str:
    return f"{value / 1e9:.2f} GFLOPs" if value >= 1e9 else f"{value / 1e6:.2f} MFLOPs"


def _gib(gib: float) -> str:
    return f"{gib:.1f} GiB" if gib >= 0.1 else f"{gib * 1024:.1f} MiB"


def describe_schedule(schedule: Schedule) -> str:
    """Return a schedule as one line of text."""
    text = f"{schedule.shape} {schedule.max_lr:.3g}"
    text += "" if schedule.shape == "constant" else f" -> {schedule.min_lr:.3g}"
    if schedule.shape == "wsd":
        text += f", {schedule.decay_shape} decay over the last {schedule.decay_steps:,} steps"
    return text + (f", warmup of {schedule.warmup_steps:,} steps" if schedule.warmup_steps else ", no warmup")


def _phases(plan: RunPlan) -> Table:
    headers = ["phase", "first step", "last step", "steps", "tokens", "of the run", "rate of first", "rate of last"]
    table = _table(*headers, *([] if plan.is_uniform else ["batch", "length"]))
    for phase in plan.phases:
        sizes = list(dict.fromkeys(f"{segment.global_batch:,}" for segment in phase.segments))
        batch = sizes[0] if len(sizes) == 1 else f"{sizes[0]} - {sizes[-1]}"
        table.add_row(
            phase.name,
            f"{phase.first_step:,}",
            f"{phase.last_step:,}",
            f"{phase.num_steps:,}",
            format_count(phase.tokens),
            f"{phase.num_steps / plan.steps:.2%}",
            f"{phase.lr_first:.4g}",
            f"{phase.lr_last:.4g}",
            *([] if plan.is_uniform else [batch, f"{phase.seq_length:,}"]),
        )
    return table


def _sources(plan: RunPlan) -> Table:
    table = _table("phase", "source", "weight", "samples", "tokens", "epochs", "limit")
    for phase in plan.phases:
        for number, (name, use) in enumerate(islice(phase.sources.items(), _MOST_SOURCES)):
            title, weight, tokens = phase.name if number == 0 else "", f"{use.weight:.4f}", format_count(use.tokens)
            table.add_row(title, name, weight, f"{use.samples:,}", tokens, _epochs(use.epochs), "")
        _add_rest(table, len(phase.sources))
        table.add_section()
    for number, (name, total) in enumerate(islice(plan.sources.items(), _MOST_SOURCES)):
        label = Text("whole run" if number == 0 else "", style="bold")
        limit = "" if total.max_epochs is None else f"{total.max_epochs:g}"
        tokens = f"{format_count(total.tokens)} of {format_count(total.size or 0)}"
        share = f"{total.tokens / plan.tokens_trained:.4f}"
        table.add_row(label, name, share, f"{total.samples:,}", tokens, _epochs(total.epochs), limit)
    _add_rest(table, len(plan.sources))
    return table


def _add_rest(table: Table, num_sources: int) -> None:
    if num_sources > _MOST_SOURCES:
        table.add_row("", f"and {num_sources - _MOST_SOURCES:,} more: --json lists all of them")


def _table(*headers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for header in headers:
        is_text = header in ("phase", "source")
        table.add_column(header, justify="left" if is_text else "right", overflow="fold" if is_text else "ellipsis")
    return table


def _epochs(epochs: float | None) -> Text:
    if epochs is None:
        return Text("?")
    return Text(f"{epochs:.3f}", style="bold yellow" if epochs > REPEAT_LIMIT else "")
