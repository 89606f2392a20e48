"""Error and coverage of the law: fit it on small runs, predict the end of other runs, compare with what they measured.

    python benchmarks/law.py --fit RUN_DIR ... --held-out RUN_DIR ... [--record NAME]

The held-out runs are longer than the fitted ones, or of other blends, switches and schedules. Only their
plan.json and the loss of the trunk on their held-out samples are used. Prints, per run and held-out source, the last
measured loss, the predicted one and its interval; then the share of predictions within 1 %, and inside the interval.
`--record NAME` writes results/NAME.json.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from record import machine, write_result

from megatron_cpt.law.finished_runs import FinishedRun, read_finished_runs
from megatron_cpt.law.fit_runs import fit_runs
from megatron_cpt.law.fitted_law import CONFIDENCE, RunLaw

GOAL = 0.01  # relative error of a final loss


@dataclass(frozen=True)
class Comparison:
    """Measured and predicted loss of one held-out source at the last validation of a run; `width` is relative."""

    run: str
    held_out: str
    start: float
    measured: float
    predicted: float
    width: float

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.measured - 1.0

    @property
    def is_inside(self) -> bool:
        """True if the interval contains the measured loss."""
        return abs(math.log(self.predicted / self.measured)) <= self.width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out", type=Path, nargs="+", required=True)
    parser.add_argument("--record", metavar="NAME")
    options = parser.parse_args()
    # Read together, so that runs of another model, tokenizer or trunk are refused.
    runs = read_finished_runs([*options.fit, *options.held_out])
    fitted, held_out = runs[: len(options.fit)], runs[len(options.fit) :]
    law = fit_runs(fitted)
    found = [one for run in held_out for one in compare(law, run)]
    print(f"{'run':24} {'held-out':10} {'before':>8} {'measured':>8} {'predicted':>9} {'interval':>9} {'error':>7}")
    for one in found:
        mark = "" if one.is_inside else "  outside"
        print(
            f"{one.run[-24:]:24} {one.held_out:10} {one.start:8.4f} {one.measured:8.4f} {one.predicted:9.4f} "
            f"±{one.width:8.2%} {one.error:+7.2%}{mark}"
        )
    summary = summarize(law, fitted, held_out, found)
    for name, value in summary.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    if options.record:
        write_result(options.record, {"machine": machine(), **summary, "comparisons": [asdict(one) for one in found]})


def compare(law: RunLaw, run: FinishedRun) -> list[Comparison]:
    forecasts = law.forecast(run.path)
    found = []
    for one in law.held_out:
        measured = run.losses.get(one.name)
        if measured is None or not math.isfinite(measured[-1]):
            continue
        knot = run.path.knots_at([int(run.steps[-1])])[0]
        forecast = forecasts[one.name]
        name = "/".join(Path(run.folder).parts[-2:])  # ARM/seed-S in an experiment
        start = run.start[one.name]  # of the trunk, so it can be measured before the run
        change, width = float(forecast.change[knot]), float(forecast.width[knot])
        found.append(Comparison(name, one.name, start, float(measured[-1]), start * math.exp(change), width))
    return found


def summarize(
    law: RunLaw, fitted: Sequence[FinishedRun], held_out: Sequence[FinishedRun], found: Sequence[Comparison]
) -> dict[str, Any]:
    errors = [abs(one.error) for one in found]
    longest = max(float(run.path.tokens[-1]) for run in held_out)
    return {
        "fitted_runs": len(fitted),
        "held_out_runs": len(held_out),
        "fitted_tokens_of_longest_held_out": law.fitted.tokens / longest,
        "predictions": len(found),
        "mean_error": sum(errors) / len(errors),
        "largest_error": max(errors),
        "share_within_goal": sum(error <= GOAL for error in errors) / len(errors),
        "confidence": CONFIDENCE,
        "coverage": sum(one.is_inside for one in found) / len(found),
    }


if __name__ == "__main__":
    main()
