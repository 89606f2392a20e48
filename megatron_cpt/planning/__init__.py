"""Planning of a run: pure functions of its configuration, without torch, disk or GPU."""

from megatron_cpt.planning.cost.memory import GIB
from megatron_cpt.planning.cost.parameters import count_parameters, flops_per_token
from megatron_cpt.planning.cost.rank_layout import Layout
from megatron_cpt.planning.run_plan import RunPlan, build_plan
from megatron_cpt.planning.timeline.schedule import Schedule
from megatron_cpt.planning.timeline.segments import Segment
from megatron_cpt.sampling.spans import SpanGrid

__all__ = [
    "GIB",
    "Layout",
    "RunPlan",
    "Schedule",
    "Segment",
    "SpanGrid",
    "build_plan",
    "count_parameters",
    "flops_per_token",
]
