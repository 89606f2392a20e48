"""Tables of an experiment: its planned arms, and the ranking of its arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import IO, Any

from rich import box
from rich.table import Table
from rich.text import Text

from megatron_cpt.config import format_count, format_number_of
from megatron_cpt.planning import RunPlan
from megatron_cpt.planning.cluster.estimate import Cluster
from megatron_cpt.views.plan_table import print_parts


def render_arms(
    plans: Mapping[str, RunPlan],
    ranks: Mapping[str, int],
    num_seeds: int,
    clusters: Mapping[str, Cluster],
    stream: IO[str],
) -> None:
    """Write the table of planned arms to a stream.

    Args:
        plans: plan per arm.
        ranks: processes per run, by arm.
        num_seeds: runs per arm.
        clusters: estimate per arm on named GPUs; empty: none.
    """
    rows = [arm_cells(name, plan, ranks[name], clusters.get(name)) for name, plan in plans.items()]
    headers = ["arm", "tokens", "steps", "phases switch after step", "learning rate", "ranks"]
    headers += ["hours", "GPU hours"] if clusters else []
    parts: list[Any] = [_table(headers, rows, left=(0, 3, 4))]
    total = f"{format_number_of(len(plans), 'arm')} x {format_number_of(num_seeds, 'seed')}"
    total += f" = {format_number_of(len(plans) * num_seeds, 'run')}"
    tokens = format_count(sum(plan.tokens_trained for plan in plans.values()) * num_seeds)
    hours = f", {sum(one.gpu_hours for one in clusters.values()) * num_seeds:,.0f} GPU hours" if clusters else ""
    parts.append(Text(f"{total}, {tokens} tokens{hours}"))
    warnings: dict[str, list[str]] = {}
    for name, plan in plans.items():
        for text in plan.warnings:
            warnings.setdefault(text, []).append(name)
    for text, names in warnings.items():
        of_arms = "" if len(names) == len(plans) else f"{', '.join(names)}: "
        parts.append(Text.assemble(("warning: ", "bold yellow"), of_arms, text))
    print_parts(stream, parts)


def arm_cells(name: str, plan: RunPlan, ranks: int, cluster: Cluster | None) -> list[str]:
    """Return an arm's cells: tokens, steps, switches, range of the learning rate, ranks, and time on a cluster."""
    switches = [f"{one.last_step:,} ({after.name})" for one, after in zip(plan.phases, plan.phases[1:], strict=False)]
    last = plan.schedule.rate(plan.steps)
    cells = [name, format_count(plan.tokens_trained), f"{plan.steps:,}", ", ".join(switches) or "none"]
    cells += [f"{plan.schedule.max_lr:.3g} to {last:.3g}", f"{ranks}"]
    if cluster is not None:
        cells += [f"{cluster.seconds / 3600:,.1f}", f"{cluster.gpu_hours:,.0f}"]
    return cells


def render_rankings(
    sentences: Sequence[str], rankings: Sequence[tuple[str, Sequence[Sequence[str]]]], stream: IO[str]
) -> None:
    """Write the result of an experiment to a stream.

    Args:
        sentences: the result in words.
        rankings: per metric its title and the cells of its rows.
    """
    headers = ["arm", "mean", "difference", "p", "result", "not told apart from"]
    parts: list[Any] = []
    for title, rows in rankings:
        parts += [Text(title, style="bold"), _table(headers, rows, left=(0, 4, 5))]
    print_parts(stream, [*parts, *map(Text, sentences)])


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for place, header in enumerate(headers):
        table.add_column(header, justify="left" if place in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
