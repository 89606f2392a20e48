"""Time of a pipeline's passes, pass by pass, for stages of unequal depth.

Under 1F1B the slowest stage sets the pace: m t_max + (sum(t) - t_max). The interleaved schedule has that pace only if
the model chunks that run at the same time take equally long. Example with m = 96, 8 stages of 2 chunks, and a head as
long as 4 layers on the last one: `[2, 2, 2, 2, 3, 3, 3, 1, 2, 2, 2, 2, 2, 2, 2, 0]` has stages of 4, 5 and 5 layers'
time, but waits so often that a step takes 30 % longer than the formula says.
"""

from __future__ import annotations

from collections.abc import Sequence

# Groups of as many micro-batches as stages that are simulated; later groups take as long as the last of these.
_GROUPS = 4


def balance(num_layers: int, loads: Sequence[float]) -> list[int]:
    """Share layers so that the largest load is as small as possible; a layer is a load of 1.

    Among equal loads the last one gets the layer: its stage keeps fewer micro-batches in flight. For example, 32 layers
    and `loads` (0, 0, 0, 4), a head as long as 4 layers, give [9, 9, 9, 5].
    """
    layers = [0] * len(loads)
    for _ in range(num_layers):
        lightest = min(range(len(loads)), key=lambda part: (round(loads[part] + layers[part], 6), -part))
        layers[lightest] += 1
    return layers


def balanced_layout(num_layers: int, stages: int, virtual: int, head: float) -> list[int]:
    """Return a `parallel.pipeline_layout` whose stages take about equally long; the head counts as `head` layers."""
    by_stage = balance(num_layers, [*[0.0] * (stages - 1), head])
    by_chunk = []
    for stage, layers in enumerate(by_stage):
        own_head = head if stage == stages - 1 else 0.0
        # Reversed: the first chunks of all stages get the layers that are left over, so that they wait for each other
        # least.
        by_chunk.append(balance(layers, [own_head, *[0.0] * (virtual - 1)])[::-1])
    return [by_chunk[stage][chunk] for chunk in range(virtual) for stage in range(stages)]


def schedule_seconds(seconds: Sequence[Sequence[float]], num_micro_batches: int) -> float:
    """Return the time of all passes of a step.

    Args:
        seconds: of one micro-batch, forward and backward, per stage and chunk; a third of them is forward.
        num_micro_batches: a multiple of the number of stages with several chunks, as the schedule requires.
    """
    stages = len(seconds)
    simulated = _GROUPS * stages
    if num_micro_batches <= simulated:
        return _simulate(seconds, num_micro_batches)
    shorter, longer = (_simulate(seconds, count) for count in (simulated - stages, simulated))
    return longer + (num_micro_batches - simulated) * (longer - shorter) / stages


# One pass: (backward, stage, chunk, micro-batch).
_Pass = tuple[bool, int, int, int]


def _simulate(seconds: Sequence[Sequence[float]], num_micro_batches: int) -> float:
    stages, chunks = len(seconds), len(seconds[0])
    waiting = [_passes(stages, stage, chunks, num_micro_batches)[::-1] for stage in range(stages)]
    clocks, ends = [0.0] * stages, dict[_Pass, float]()
    while any(waiting):
        for stage, passes in enumerate(waiting):
            while passes and ((needed := _needed(passes[-1], stages, chunks)) is None or needed in ends):
                done = passes.pop()
                share = 2 / 3 if done[0] else 1 / 3
                start = max(clocks[stage], 0.0 if needed is None else ends[needed])
                clocks[stage] = ends[done] = start + share * seconds[stage][done[2]]
    return max(clocks)


def _passes(stages: int, stage: int, chunks: int, num_micro_batches: int) -> list[_Pass]:
    """Return the passes of a stage in megatron-core's order: warm-up, one forward and one backward, cool-down."""
    total, ahead = num_micro_batches * chunks, stages - stage - 1
    warmup = min(total, 2 * ahead + (chunks - 1) * stages if chunks > 1 else ahead)
    # Groups of as many micro-batches as stages pass chunk 0, then chunk 1, and come back in reverse order.
    turns = [
        (number // stages % chunks, number // (stages * chunks) * stages + number % stages) for number in range(total)
    ]
    forward = [(False, stage, chunk, micro) for chunk, micro in turns]
    backward = [(True, stage, chunks - 1 - chunk, micro) for chunk, micro in turns]
    steady = [one for pair in zip(forward[warmup:], backward, strict=False) for one in pair]
    return [*forward[:warmup], *steady, *backward[total - warmup :]]


def _needed(one: _Pass, stages: int, chunks: int) -> _Pass | None:
    """Return the pass on another stage whose result this one takes; None for the first."""
    is_backward, stage, chunk, micro = one
    if not is_backward:
        if stage > 0:
            return False, stage - 1, chunk, micro
        return (False, stages - 1, chunk - 1, micro) if chunk > 0 else None
    if stage < stages - 1:
        return True, stage + 1, chunk, micro
    return (True, 0, chunk + 1, micro) if chunk < chunks - 1 else (False, stage, chunk, micro)
