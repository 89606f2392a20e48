"""Check that all arms are measured on the same samples; losses on other held-out data cannot be compared."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from megatron_cpt.config import RunConfig


def measurement_problems(runs: Mapping[str, RunConfig], sources: Collection[str], *, has_tasks: bool) -> Iterator[str]:
    """Yield one message per setting of the measurement in which the arms differ.

    Args:
        runs: run.yaml per arm.
        sources: held-out sources whose losses are compared.
        has_tasks: scores of tasks are compared, too.
    """
    settings = {arm: _settings(run, sources, has_tasks) for arm, run in runs.items()}
    for key in dict.fromkeys(key for one in settings.values() for key in one):
        values = {arm: str(one.get(key)) for arm, one in settings.items()}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{arm} {value}" for arm, value in values.items())
            yield (
                f"{key}: the arms differ ({listed}), so they would be measured on other data and could not be "
                "compared; give all arms the same value"
            )


def _settings(run: RunConfig, sources: Collection[str], has_tasks: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if sources and run.validation is not None:
        paths = {name: run.validation.sources.get(name) for name in sources}
        found |= {f"validation.sources.{name}": path for name, path in paths.items()}
        # A batch of validation is a global batch: arms with other global batches need other `validation.batches`.
        found["validation.batches x batch.global"] = run.validation.batches * run.batch.global_
        found |= {"seq_length": run.seq_length, "documents.eod_loss": run.documents.eod_loss}
    if has_tasks and run.evaluation is not None:
        keys = ("limit", "num_fewshot", "include_path")
        found |= {f"evaluation.{key}": getattr(run.evaluation, key) for key in keys}
    return found
