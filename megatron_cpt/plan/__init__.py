"""Pure functions from a configuration to what a run will do: no torch, no disk, no GPU."""

from megatron_cpt.chunks import ChunkGrid
from megatron_cpt.plan.build import RunPlan, build_plan
from megatron_cpt.plan.flops import FlopsPerToken, flops_per_token
from megatron_cpt.plan.layout import Layout, layout_problems
from megatron_cpt.plan.memory import GIB, Memory, estimate_memory
from megatron_cpt.plan.parameters import Parameters, count_parameters
from megatron_cpt.plan.phases import PhasePlan
from megatron_cpt.plan.problem import Problem
from megatron_cpt.plan.schedule import Schedule
from megatron_cpt.plan.sources import SourceTotal, SourceUse
from megatron_cpt.plan.stretches import Mark, Stretch

__all__ = [
    "GIB",
    "ChunkGrid",
    "FlopsPerToken",
    "Layout",
    "Mark",
    "Memory",
    "Parameters",
    "PhasePlan",
    "Problem",
    "RunPlan",
    "Schedule",
    "SourceTotal",
    "SourceUse",
    "Stretch",
    "build_plan",
    "count_parameters",
    "estimate_memory",
    "flops_per_token",
    "layout_problems",
]
