"""Tasks of lm-evaluation-harness on the model in memory, at the layout of the run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from megatron_cpt.backend import Ranks
from megatron_cpt.backend.collectives import is_true_on_any, on_main
from megatron_cpt.config import RunConfig
from megatron_cpt.data.tokenizers.tokenizer import load_tokenizer
from megatron_cpt.evaluate.harness import LoadedTasks, TaskChoice
from megatron_cpt.evaluate.ranks import LeadingEngine, StoppedEvaluation
from megatron_cpt.evaluate.requests import NotFiniteError
from megatron_cpt.files.whole_io import is_regular_file, open_reader
from megatron_cpt.provenance.run_history import METRICS_FILE

if TYPE_CHECKING:
    from megatron_cpt.model.build_model import Model

logger = logging.getLogger(__name__)

_BOOTSTRAP_ITERATIONS = 1000  # for metrics that are no means; 100,000 as in the harness take seconds per task

Fields = dict[str, Any]


class EvaluationTasks:
    """Tasks and tokenizer of section `evaluation`, checked before the model is built; a collective call.

    Raises:
        UserError: the harness or the tokenizer is missing, or a task cannot be loaded.
    """

    def __init__(self, config: RunConfig) -> None:
        section = config.evaluation
        assert section is not None
        assert config.tokenizer is not None, "checked by config/checks.py"
        self.tokenizer = load_tokenizer(config.tokenizer)
        self.loaded: LoadedTasks | None = None
        choice = TaskChoice(
            names=section.tasks,
            include_path=section.include_path,
            limit=section.limit,
            num_fewshot=section.num_fewshot,
        )

        def load() -> None:
            self.loaded = LoadedTasks(choice)
            self.loaded.check_prompts()

        on_main(load)  # the other ranks need no documents


class Evaluator:
    """Measurement of the tasks on the model of a run.

    Args:
        tasks: of the run.
        config, model, ranks: the run, and this rank's part of the model.
    """

    def __init__(self, tasks: EvaluationTasks, config: RunConfig, model: Model, ranks: Ranks) -> None:
        # imported here: megatron-core reads torch.cuda on import, and backend/cpu.py replaces it before
        from megatron_cpt.evaluate.engine import Engine

        self._tasks, self._is_main = tasks, ranks.is_main
        self._engine = LeadingEngine(Engine(model, config, ranks), tasks.tokenizer, ranks.world_size)

    def run(self, note: Callable[[], None], is_stop_requested: Callable[[], bool]) -> Fields | None:
        """Measure on every rank; a collective call that leaves the model unchanged.

        Args:
            note: called after each batch.
            is_stop_requested: whether this rank was asked to stop; all ranks then stop after the same batch.

        Returns:
            Fields of a line of metrics.jsonl: `evaluation` by task, `higher_is_better` by task and metric, and `tasks`
            as in results.json, all empty if the model computes NaN; None if a stop was requested.
        """

        def after_batch() -> None:
            note()
            if is_true_on_any(is_stop_requested()):
                raise StoppedEvaluation

        self._engine.after_batch = after_batch
        try:
            fields = self._engine.lead(self._run_tasks)
        except StoppedEvaluation:
            return None
        except NotFiniteError as error:  # the judge of the steps decides whether training continues
            if self._is_main:
                logger.warning("evaluation: %s; it has no results", error)
            return {"evaluation": {}, "higher_is_better": {}, "tasks": {}}
        return on_main(lambda: fields)

    def _run_tasks(self) -> Fields:
        from megatron_cpt.evaluate.lm_eval_model import HarnessModel

        assert self._tasks.loaded is not None, "rank 0 has loaded the tasks"
        model = HarnessModel(self._engine, self._tasks.tokenizer)
        found = self._tasks.loaded.run(model, bootstrap=_BOOTSTRAP_ITERATIONS)
        return {"evaluation": found.metrics, "higher_is_better": found.higher_is_better, "tasks": found.tasks}


def has_evaluation(run_directory: Path, step: int) -> bool:
    """Return whether metrics.jsonl has the evaluation after a step."""
    path = run_directory / METRICS_FILE
    if not is_regular_file(path):
        return False
    with open_reader(path) as file:
        for raw in file:
            with contextlib.suppress(ValueError):  # a line that was cut off
                line = orjson.loads(raw)
                if "evaluation" in line and line.get("step") == step:
                    return True
    return False
