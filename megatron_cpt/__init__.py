"""Continued pretraining on megatron-core: two phases of data, one falling learning rate.

    import megatron_cpt as cpt

    run = cpt.load_run("run.yaml", ["parallel.tensor=2"])
    print(cpt.plan(run).steps)
    with cpt.Trainer(run) as trainer:
        result = trainer.fit()

Importing the package loads nothing else; each public name loads its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC_NAMES = {
    "ConfigError": "errors",
    "CptError": "errors",
    "EvaluateOptions": "evaluate.evaluate_checkpoint",
    "ExportOptions": "convert.exporter",
    "GrowOptions": "transform.grow.grow_checkpoint",
    "Hook": "hooks",
    "ImportOptions": "convert.importer",
    "PreprocessOptions": "data.preprocess.pipeline",
    "RefusedError": "errors",
    "RunConfig": "config",
    "RunPlan": "planning",
    "RunResult": "train.trainer",
    "TokenStream": "data",
    "Trainer": "train.trainer",
    "UserError": "errors",
    "evaluate": "evaluate.evaluate_checkpoint",
    "export_checkpoint": "convert.exporter",
    "grow_checkpoint": "transform.grow.grow_checkpoint",
    "import_checkpoint": "convert.importer",
    "load_run": "prepare",
    "plan": "prepare:plan_run",
    "preprocess": "data.preprocess.pipeline",
    "trace": "provenance.trace:trace_step",
    "write_report": "report.write_report",
}
"""Public names and the modules that define them, as "module" or "module:name"."""

__all__ = [*_PUBLIC_NAMES, "__version__"]  # noqa: PLE0604 - all are strings


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, defined_as = _PUBLIC_NAMES[name].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), defined_as or name)


def __dir__() -> list[str]:
    return sorted(__all__)
