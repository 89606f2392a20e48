"""lm-evaluation-harness as this package uses it: offline, quiet, without a change of this process's random states."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import functools
import hashlib
import importlib.util
import json
import logging
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_cpt.errors import CptError, UserError, install_command
from megatron_cpt.evaluate.offline import BUILD_COMMAND, task_folder
from megatron_cpt.evaluate.offline.scores import token_counter
from megatron_cpt.evaluate.programs.code_execution import allow_code_execution, available_isolation
from megatron_cpt.files.retry import is_path_error
from megatron_cpt.files.system_errors import describe_os_error

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

SEED = 1234
"""Seed of few-shot examples and of all generators, as in the harness."""
BOOTSTRAP_ITERATIONS = 100_000
"""Resamples for the standard error of a metric that is not a mean, as in the harness."""

_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
_QUIET = ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS")
# The harness resamples in a pool of forked processes, and a fork of a process with communication threads may hang.
_NO_FORKS = ("DISABLE_MULTIPROC",)
_LOADED_CODE = "trust_remote_code"
_NOT_ON_DISK = ("ConnectionError", "OfflineModeIsEnabled", "DatasetNotFoundError", "LocalEntryNotFoundError")


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
        with _quiet(), _preserved_random_states():
            self._loaded = _load(choice)
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
        with _quiet(), _preserved_random_states():
            for name, task in self._tasks.items():
                self._seed(task)
                with _harness_errors(f"task {name}: its prompts cannot be built"):
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

        with _quiet(), _preserved_random_states(), _harness_errors("evaluation"), contextlib.ExitStack() as stack:
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
        """Set the number of few-shot examples with the harness's rule: a task's own 0 stays."""
        own, asked = task.get_config("num_fewshot"), self.choice.num_fewshot
        if own is None or (asked is not None and own != 0):
            task.set_config(key="num_fewshot", value=asked or 0)

    def _seed(self, task: Task) -> None:
        task.set_fewshot_seed(seed=SEED)


def set_environment(*, online: bool = False) -> None:
    """Set the variables that the harness and its libraries read when they are imported; the user's own values win.

    Args:
        online: let `datasets` download from a hub.
    """
    for name in (*([] if online else _OFFLINE), *_QUIET, *_NO_FORKS):
        os.environ.setdefault(name, "1")


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


def _load(choice: TaskChoice) -> dict[str, Any]:
    if choice.include_path is not None and not Path(choice.include_path).is_dir():
        raise UserError(f"include_path: {choice.include_path}: no such folder; give the folder with the task files")
    manager = _manager(choice)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in _matching(choice.names, manager):
        _refuse_code_of_others(name, manager)
        with _harness_errors(f"task {name}: cannot be loaded"):
            found = manager.load([name])
        for kind, entries in loaded.items():
            entries.update(found.get(kind, {}))
    return loaded


def _manager(choice: TaskChoice) -> TaskManager:
    """Return the index of task files: without the harness's own if others are enough, because 14,000 take seconds."""
    from lm_eval.tasks import TaskManager

    offline = task_folder()
    folders = [str(offline)] if offline.is_dir() else []
    if choice.include_path is not None:  # the last one wins
        folders.append(choice.include_path)
    if folders:
        own = TaskManager(include_path=folders, include_defaults=False)
        if all(own.match_tasks([name]) for name in choice.names) and _are_complete(choice.names, own):
            return own
    return TaskManager(include_path=folders)


def _are_complete(names: Sequence[str], manager: TaskManager) -> bool:
    return all(entry is not None for name in names for entry in _entries(name, manager))


def _matching(names: Sequence[str], manager: TaskManager) -> list[str]:
    matching: dict[str, None] = {}
    for name in names:
        found = [known for known in manager.all_tasks if fnmatch.fnmatchcase(known, name)]
        if not found and name.endswith(".yaml") and not Path(name).is_file():
            raise UserError(f"task {name}: no such file")
        if not found and not name.endswith(".yaml"):
            near = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.7)
            hint = f"did you mean {near[0]}?" if near else "`lm-eval ls tasks` lists them."
            raise UserError(
                f"task {name}: not a known task, group or tag; {hint} Task files of your own need --include-path"
                f"{'' if task_folder().is_dir() else f', and `{BUILD_COMMAND}` builds the offline tasks'}"
            )
        matching.update(dict.fromkeys(found or [name]))
    return list(matching)


def _entries(name: str, manager: TaskManager) -> Iterator[Any]:
    """Yield the index entry of each task that a name stands for; None for a name that the index lacks."""
    from lm_eval.tasks._index import Kind

    for known in manager.match_tasks([name]):
        entry = manager.task_index[known]
        if entry.kind is Kind.TAG:
            children: Sequence[Any] = sorted(entry.tags)
        elif entry.kind is Kind.GROUP:
            children = (entry.cfg or {}).get("task") or []
            children = [children] if isinstance(children, str | dict) else children
        else:
            yield entry
            continue
        for child in children:
            child_name = child if isinstance(child, str) else child.get("task", child.get("group"))
            if isinstance(child_name, str) and child_name in manager.task_index and child_name != known:
                yield from _entries(child_name, manager)
            elif isinstance(child_name, str) and child_name != known:
                yield None


def _refuse_code_of_others(name: str, manager: TaskManager) -> None:
    """Refuse a task file that asks to run a program that comes with its dataset.

    A few of the harness's own files still have the key, which has no effect since datasets 4.
    """
    import datasets
    import lm_eval.tasks

    own_files = Path(lm_eval.tasks.__file__).parent
    for entry in _entries(name, manager):
        options = (entry.cfg or {}).get("dataset_kwargs") if entry is not None else None
        if not isinstance(options, dict) or not options.get(_LOADED_CODE):
            continue
        is_own = entry.yaml_path is not None and Path(entry.yaml_path).is_relative_to(own_files)
        if not is_own or int(datasets.__version__.partition(".")[0]) < 4:
            raise UserError(
                f"task {entry.name}: {entry.yaml_path} asks to run code that comes with its dataset "
                f"(dataset_kwargs: {_LOADED_CODE}), which is never done; remove the key, and name local files"
            )


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


@contextlib.contextmanager
def _harness_errors(what: str) -> Iterator[None]:
    """Turn any error of the harness, of `datasets` or of a task's file into one message.

    Raises:
        UserError: the task, its file or its data is at fault.
        CptError: the disk failed.
    """
    try:
        yield
    except (CptError, MemoryError):
        raise
    except Exception as error:
        for cause in _chain(error):
            if isinstance(cause, OSError) and not is_path_error(cause):
                raise CptError(f"{what}: {describe_os_error(cause)}") from error
        kind, lines = type(error).__name__, str(error).strip().splitlines()
        reason = lines[0] if lines else kind
        if kind in _NOT_ON_DISK and os.environ.get(_OFFLINE[0]) == "1":
            advice = "its data is not on this machine, and the network is not used; use local files, or allow --online"
        elif isinstance(error, ModuleNotFoundError):
            advice = f"install {error.name}"
        else:
            advice = "correct the task's file or its data, or remove the task"
        raise UserError(f"{what} ({kind}: {reason}); {advice}") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it was raised from; `datasets` wraps errors of the disk."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's reports and bars away: stdout belongs to the command, stderr to its own progress bar."""
    from lm_eval.api import task as harness_tasks

    # TQDM_DISABLE has no effect where torch has imported tqdm before, and this bar has no switch of its own.
    bar = harness_tasks.tqdm
    harness_tasks.tqdm = functools.partial(bar, disable=True)
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets", "huggingface_hub")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        harness_tasks.tqdm = bar
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


@contextlib.contextmanager
def _preserved_random_states() -> Iterator[None]:
    """Restore the generators that tasks draw from; the harness's seeds make an evaluation repeatable."""
    plain, array = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(SEED)
    try:
        yield
    finally:
        random.setstate(plain)
        np.random.set_state(array)
