"""Comparison of the arms of an experiment: means over seeds, paired differences from the baseline, and a ranking."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_cpt.config import format_number_of
from megatron_cpt.experiment.arms import Experiment, Metric, Unit
from megatron_cpt.experiment.held_out_bytes import bits_per_byte_scales
from megatron_cpt.experiment.paired_test import PairedDifference, compare_pairs, holm
from megatron_cpt.experiment.unit_result import UnitResult, read_result
from megatron_cpt.report.learning import is_lower_better

BASELINE, BETTER, WORSE, NOISE, UNKNOWN, ONE_SEED = "baseline", "better", "worse", "noise", "unknown", "one seed"


@dataclass(frozen=True)
class ArmRow:
    """Arm in the ranking of a metric.

    Attributes:
        values: per seed; only finished runs with a finite value.
        mean: over the seeds; None without any.
        half_width: of the confidence interval of the mean; None with fewer than two seeds.
        difference: from the baseline, paired by seed; None for the baseline.
        corrected_p: p-value of the difference, corrected for the number of arms of this metric.
        verdict: `better`, `worse` or `noise` against the baseline; `one seed` or `unknown` where no test is possible.
        tied_with: arms whose difference from this one is noise, all pairs of arms corrected together.
    """

    arm: str
    values: Mapping[int, float]
    mean: float | None
    half_width: float | None
    difference: PairedDifference | None
    corrected_p: float | None
    verdict: str
    tied_with: Sequence[str]


@dataclass(frozen=True)
class MetricRanking:
    """All arms by one metric, the best first; arms without a value come last."""

    metric: str
    unit: str
    is_lower_better: bool
    rows: Sequence[ArmRow]


@dataclass(frozen=True)
class Comparison:
    """Result of an experiment.

    Attributes:
        num_finished: number of finished runs.
        missing: names of the runs that have no result.
        not_finite: runs and metrics whose value is NaN or infinite.
    """

    name: str
    baseline: str
    seeds: Sequence[int]
    confidence: float
    num_runs: int
    num_finished: int
    missing: Sequence[str]
    not_finite: Sequence[str]
    rankings: Sequence[MetricRanking]

    def sentences(self) -> list[str]:
        """Return the result in sentences: progress, ranking by the first metric, and how differences were judged."""
        first = self.rankings[0]
        known = [row for row in first.rows if row.mean is not None]
        progress = f"Runs: {self.num_finished} of {self.num_runs} finished"
        lines = [f"{progress}; missing: {_listed(self.missing)}." if self.missing else f"{progress}."]
        if known:
            order = ", ".join(f"{row.arm} {row.mean:.4f} ({row.verdict})" for row in known)
            lines.append(f"Ranking by {first.metric}, {first.unit}, best first: {order}.")
        if len(self.seeds) == 1:
            lines.append("Noise: unknown, because there is one seed; give at least two for intervals.")
        elif known:
            lines.append(self._noise_sentence(first))
        if self.not_finite:
            lines.append(f"Without a finite value: {_listed(self.not_finite)}.")
        return lines

    def _noise_sentence(self, first: MetricRanking) -> str:
        named = {word: [row.arm for row in first.rows if row.verdict == word] for word in (BETTER, WORSE, NOISE)}
        parts = [f"{word} than {self.baseline}: {_listed(named[word])}" for word in (BETTER, WORSE) if named[word]]
        parts += [f"not told apart from {self.baseline} (noise): {_listed(named[NOISE])}"] if named[NOISE] else []
        level = f"{format_number_of(len(self.seeds), 'seed')}, {self.confidence:.0%} confidence"
        return f"Differences, {level}: {'; '.join(parts) or 'none could be tested'}."

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        plain = asdict(self)
        return {"format": "megatron-cpt experiment", "format_version": 1, **plain, "sentences": self.sentences()}


METHOD = (
    "± is half the width of a t-interval over the seeds, without correction. A difference is the mean of the paired "
    "differences by seed, m ± t(n - 1) s / sqrt(n). p is of the two-sided paired t-test, after Holm's correction over "
    "all arms of a metric. `noise`: p is at least 1 - confidence. `not told apart from`: the same test for each pair "
    "of arms, corrected over all pairs."
)


def compare_arms(experiment: Experiment) -> Comparison:
    """Compare the finished runs of an experiment.

    Raises:
        RefusedError: a result on the disk is damaged.
        UserError: the unit is bits per byte, and the text of the held-out data cannot be counted.
    """
    results = {unit.name: read_result(unit) for unit in experiment.units}
    config = experiment.config
    scales = _scales(experiment)
    directions: dict[tuple[str, str], bool] = {}
    for result in results.values():
        directions.update(result.higher_is_better if result else {})
    not_finite: list[str] = []
    rankings = []
    for metric in experiment.metrics:
        values: dict[str, dict[int, float]] = {name: {} for name in config.arms}
        for unit in experiment.units:
            _add_value(values[unit.arm], unit, results[unit.name], metric, scales, not_finite)
        unit_name = config.unit.replace("_", " ") if metric.task is None else "score"
        is_lower = metric.task is None or is_lower_better(*metric.task, directions)
        rows = rank_arms(values, experiment.baseline, config.confidence, is_lower_better=is_lower)
        rankings.append(MetricRanking(metric.name, unit_name, is_lower, rows))
    missing = [name for name, result in results.items() if result is None]
    return Comparison(
        name=config.name,
        baseline=experiment.baseline,
        seeds=config.seeds,
        confidence=config.confidence,
        num_runs=len(results),
        num_finished=len(results) - len(missing),
        missing=missing,
        not_finite=not_finite,
        rankings=rankings,
    )


def rank_arms(
    values: Mapping[str, Mapping[int, float]], baseline: str, confidence: float, *, is_lower_better: bool
) -> list[ArmRow]:
    """Return the arms by their means, the best first.

    Args:
        values: per arm the value per seed.
        baseline: arm that the others are compared with.
        confidence: level of the intervals and of the verdicts.
        is_lower_better: a smaller value is better.
    """
    differences = {
        arm: _difference(own, values[baseline], confidence) for arm, own in values.items() if arm != baseline
    }
    corrected = dict(zip(differences, holm([one.p for one in differences.values()]), strict=True))
    ties = _ties(values, confidence)
    rows = []
    for arm, own in values.items():
        numbers = list(own.values())
        difference, p = differences.get(arm), corrected.get(arm)
        rows.append(
            ArmRow(
                arm=arm,
                values=dict(own),
                mean=statistics.fmean(numbers) if numbers else None,
                half_width=compare_pairs(numbers, [0.0] * len(numbers), confidence).half_width,
                difference=difference,
                corrected_p=p,
                verdict=_verdict(difference, p, 1 - confidence, is_lower_better),
                tied_with=ties[arm],
            )
        )
    sign = 1 if is_lower_better else -1
    return sorted(rows, key=lambda row: math.inf if row.mean is None else sign * row.mean)


def _difference(own: Mapping[int, float], other: Mapping[int, float], confidence: float) -> PairedDifference:
    common = [seed for seed in own if seed in other]
    return compare_pairs([own[seed] for seed in common], [other[seed] for seed in common], confidence)


def _ties(values: Mapping[str, Mapping[int, float]], confidence: float) -> dict[str, list[str]]:
    """Return per arm the arms that a test over all pairs does not tell apart from it."""
    pairs = list(itertools.combinations(values, 2))
    p_values = holm([_difference(values[one], values[other], confidence).p for one, other in pairs])
    tied: dict[str, list[str]] = {arm: [] for arm in values}
    for (one, other), p in zip(pairs, p_values, strict=True):
        if p is not None and p >= 1 - confidence:
            tied[one].append(other)
            tied[other].append(one)
    return tied


def _verdict(difference: PairedDifference | None, p: float | None, limit: float, is_lower_better: bool) -> str:
    if difference is None:
        return BASELINE
    if p is None:
        return ONE_SEED if difference.num_seeds else UNKNOWN
    if p >= limit:
        return NOISE
    return BETTER if (difference.mean < 0) == is_lower_better else WORSE


def _scales(experiment: Experiment) -> dict[str, float]:
    """Return per held-out source the factor from nats per token to the unit of the experiment."""
    runs = [run.config for run in experiment.prepared.values()]
    names = {name for run in runs if run.validation for name in run.validation.sources}
    if experiment.config.unit == "nats_per_token":
        return dict.fromkeys(names, 1.0)
    return bits_per_byte_scales(runs[0])


def _add_value(
    values: dict[int, float],
    unit: Unit,
    result: UnitResult | None,
    metric: Metric,
    scales: Mapping[str, float],
    not_finite: list[str],
) -> None:
    if result is None:
        return
    value = result.value(metric, scales)
    if math.isfinite(value):
        values[unit.seed] = value
    else:
        not_finite.append(f"{unit.name} ({metric.name})")


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
