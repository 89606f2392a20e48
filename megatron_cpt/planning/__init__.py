"""Planning of a run: pure functions of its configuration, without torch, disk or GPU."""

from megatron_cpt.planning.cost.flops import FlopsPerToken, flops_per_token
from megatron_cpt.planning.cost.memory import GIB, Memory, estimate_memory
from megatron_cpt.planning.cost.parameters import Parameters, count_parameters
from megatron_cpt.planning.cost.rank_layout import Layout, layout_problems
from megatron_cpt.planning.problem import Problem
from megatron_cpt.planning.run_plan import RunPlan, build_plan
from megatron_cpt.planning.timeline.epochs import SourceTotal, SourceUse
from megatron_cpt.planning.timeline.phases import PhasePlan
from megatron_cpt.planning.timeline.schedule import Schedule
from megatron_cpt.planning.timeline.segments import RunProgress, Segment
from megatron_cpt.sampling.spans import SpanGrid

__all__ = [
    "GIB",
    "FlopsPerToken",
    "Layout",
    "Memory",
    "Parameters",
    "PhasePlan",
    "Problem",
    "RunPlan",
    "RunProgress",
    "Schedule",
    "Segment",
    "SourceTotal",
    "SourceUse",
    "SpanGrid",
    "build_plan",
    "count_parameters",
    "estimate_memory",
    "flops_per_token",
    "layout_problems",
]
