"""Tasks of lm-evaluation-harness and their results."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_cpt.errors import UserError, install_command
from megatron_cpt.evaluate.harness_context import SEED, harness_context, harness_errors, set_environment
from megatron_cpt.evaluate.load_tasks import load_tasks
from megatron_cpt.evaluate.offline.scores import token_counter
from megatron_cpt.evaluate.programs.code_execution import allow_code_execution, available_isolation

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task

BOOTSTRAP_ITERATIONS = 100_000
"""Resamples for the standard error of a metric that is not a mean, as in the harness."""


@dataclass(frozen=True, kw_only=True)
class TaskChoice:
    """Tasks to evaluate.

    Attributes:
        names: tasks, groups, tags, patterns such as `mmlu_*`, or paths of task files.
        include_path: folder with further task files.
        limit: documents per task, the first ones; None: all.
        num_fewshot: examples in each prompt, except for tasks that set 0; None: the number that each task sets.
        allow_code_execution: run the programs that a model writes, for tasks that need it.
        online: let `datasets` download from a hub.
    """

    names: Sequence[str]
    include_path: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    allow_code_execution: bool = False
    online: bool = False


@dataclass(frozen=True)
class HarnessResults:
    """Results of an evaluation.

    Attributes:
        metrics: by task or group, the metrics and standard errors under the harness's names.
        tasks: by task, its version, few-shot examples, numbers of documents, and a digest of documents and prompts.
        groups: tasks of each group.
        higher_is_better: by task and metric.
        samples: documents, prompts and answers by task; empty unless asked for.
    """

    metrics: dict[str, dict[str, float]]
    tasks: dict[str, dict[str, Any]]
    groups: dict[str, list[str]]
    higher_is_better: dict[str, dict[str, bool]]
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


class LoadedTasks:
    """Tasks of lm-evaluation-harness with their documents; each `run` gives the same prompts.

    Attributes:
        choice: the tasks as they were asked for.
        code_isolation: isolation of the programs that tasks run, see `programs`; None if no task runs any.

    Raises:
        UserError: the harness is missing, a task is unknown, cannot be loaded, or needs what was not allowed.
        CptError: the disk failed.
    """

    def __init__(self, choice: TaskChoice) -> None:
        _require_harness(choice)
        self.choice = choice
        with harness_context():
            self._loaded = load_tasks(choice.names, choice.include_path)
        for name, task in self._tasks.items():
            _check_task(name, task, choice.allow_code_execution)
            self._set_fewshot(task)
        runs_programs = any(getattr(task, "UNSAFE_CODE", False) for task in self._tasks.values())
        self.code_isolation = available_isolation() if runs_programs else None

    @property
    def names(self) -> list[str]:
        """Names of the tasks, with groups resolved."""
        return list(self._tasks)

    @property
    def _tasks(self) -> dict[str, Task]:
        return self._loaded["tasks"]  # type: ignore[no-any-return]

    def check_prompts(self) -> None:
        """Build all prompts once, to find an error in a task's file before a long run.

        Raises:
            UserError: a prompt cannot be built.
        """
        with harness_context():
            for name, task in self._tasks.items():
                self._seed(task)
                with harness_errors(f"task {name}: its prompts cannot be built"):
                    task.build_all_requests(limit=self.choice.limit)

    def run(self, model: LM, *, with_samples: bool = False, bootstrap: int = BOOTSTRAP_ITERATIONS) -> HarnessResults:
        """Evaluate a model on all tasks.

        Args:
            with_samples: also return documents, prompts and answers.
            bootstrap: resamples for the standard error of a metric that is not a mean.

        Raises:
            UserError: a task fails, for example because its metric needs a package.
        """
        from lm_eval.evaluator import evaluate

        with harness_context(), harness_errors("evaluation"), contextlib.ExitStack() as stack:
            if (encode := getattr(model, "tok_encode", None)) is not None:
                stack.enter_context(token_counter(lambda text: len(encode(text, add_special_tokens=False))))
            if self.choice.allow_code_execution:
                stack.enter_context(allow_code_execution())
            for task in self._tasks.values():
                self._seed(task)
            found = evaluate(
                lm=model,
                task_dict=self._loaded,
                limit=self.choice.limit,
                bootstrap_iters=bootstrap,
                log_samples=with_samples,
                confirm_run_unsafe_code=self.choice.allow_code_execution,
            )
        assert found is not None, "HarnessModel has rank 0"
        return self._results(found)

    def _results(self, found: Any) -> HarnessResults:
        tasks = {
            name: {
                "version": found["versions"].get(name),
                "num_fewshot": found["n-shot"].get(name),
                "documents": found["n-samples"][name]["effective"],
                "of_documents": found["n-samples"][name]["original"],
                "digest": _task_digest(task),
            }
            for name, task in self._tasks.items()
        }
        return HarnessResults(
            metrics={name: metric_values(values) for name, values in found["results"].items()},
            tasks=tasks,
            groups={name: list(children) for name, children in found["group_subtasks"].items() if children},
            higher_is_better=found["higher_is_better"],
            samples=found.get("samples") or {},
        )

    def _set_fewshot(self, task: Task) -> None:
        """Set the number of few-shot examples with the harness's rule: a task's own 0 stays, and whole texts have 0."""
        own, asked = task.get_config("num_fewshot"), self.choice.num_fewshot
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            task.set_config(key="num_fewshot", value=0)
        elif own is None or (asked is not None and own != 0):
            task.set_config(key="num_fewshot", value=asked or 0)

    def _seed(self, task: Task) -> None:
        task.set_fewshot_seed(seed=SEED)


def metric_values(values: dict[str, Any]) -> dict[str, float]:
    """Return the numbers among a task's results, without the name of the filter `none`.

    Example:
        >>> metric_values({"alias": "copa", "acc,none": 0.5, "acc_stderr,none": 0.1, "exact_match,strict": 0.2})
        {'acc': 0.5, 'acc_stderr': 0.1, 'exact_match,strict': 0.2}
    """
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, int | float)
    }


def _require_harness(choice: TaskChoice) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"evaluation: lm_eval is not installed; {install_command('eval')}")
    set_environment(online=choice.online)


def _check_task(name: str, task: Task, allow_code_execution: bool) -> None:
    if getattr(task, "UNSAFE_CODE", False) and not allow_code_execution:
        raise UserError(
            f"task {name}: runs programs that the model writes; allow it with --allow-code-execution, which `evaluate` "
            "has and an evaluation during training has not, or remove the task"
        )
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"task {name}: shows pictures or sounds, which a language model cannot read; remove the task")


def _task_digest(task: Task) -> str:
    """Return a digest of a task's documents, prompts and metrics, equal for equal requests and scoring."""
    digest = hashlib.sha256(json.dumps([task.VERSION, sorted(task.aggregation())], default=str).encode())
    for instance in task.instances:
        plain = [instance.request_type, instance.args, instance.doc, instance.doc_id, instance.idx]
        digest.update(json.dumps(plain, default=str, sort_keys=True).encode())
    return f"sha256:{digest.hexdigest()}"
