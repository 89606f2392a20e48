"""Each `speed` knob off, one at a time, on the 15B's layers: the time of a step compared with the default.

python -m benchmarks.gpu.knobs
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from typing import Any, get_args

from benchmarks.gpu.measured import Report, run_item, spread


def measure(report: Report) -> None:
    """Time the default, then every other setting; each row is written at once."""
    from benchmarks.gpu.loops import MachineState
    from benchmarks.gpu.workload import (
        STACK,
        WARM_UP,
        StepClock,
        config_of,
        draw_weights_on_device,
        run_mapping,
        train,
    )
    from megatron_cpt.errors import UserError

    draw_weights_on_device()
    steps = 2 if report.is_rehearsal else 10
    rows: dict[str, Any] = {}

    def time_speed(name: str, speed: dict[str, Any]) -> float | None:
        run = run_mapping(
            report,
            STACK,
            micro=2,
            num_micro_batches=2,
            steps=WARM_UP + steps,
            precision={"compute": "bf16"},
            output=str(report.memory / name),
            speed=speed,
        )
        clock = StepClock()
        try:
            train(config_of(run), [clock, MachineState(report)])
        except UserError as error:
            rows[name] = {"unavailable": str(error)}
            report.note(step_seconds=rows)
            return None
        rows[name] = spread(clock.seconds[WARM_UP:])
        report.note(step_seconds=rows)
        return statistics.median(clock.seconds[WARM_UP:])

    default = time_speed("default", {})
    assert default is not None, "the default needs nothing that a machine may lack"
    times = [time_speed(name, speed) for name, speed in variants(report.figures["speed"], report.is_rehearsal)]
    report.note(best_over_default=min([default, *filter(None, times)]) / default)


def variants(on: list[str], is_rehearsal: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a name and a `speed` section for each knob that is on, and for each choice of a knob with names.

    A rehearsal yields one, because the code is the same for all.
    """
    from megatron_cpt.config.compute import SpeedConfig

    for name, field in list(SpeedConfig.model_fields.items())[: 1 if is_rehearsal else None]:
        choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str) and choice != "auto"]
        for choice in choices:
            yield f"{name}-{choice}", {name: choice}
        if not choices and (name in on or is_rehearsal):
            yield f"no-{name}", {name: False}


IMPORTS = ("benchmarks.gpu.trainer_imports", "benchmarks.gpu.loops")

if __name__ == "__main__":
    sys.exit(run_item(measure, imports=IMPORTS))
