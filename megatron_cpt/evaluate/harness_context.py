"""Surroundings in which lm-evaluation-harness works: quiet, offline, with one message per error."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from megatron_cpt.errors import CptError, UserError
from megatron_cpt.files.retry import is_path_error
from megatron_cpt.files.system_errors import describe_os_error

SEED = 1234
"""Seed of few-shot examples and of all generators, as in the harness."""

_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
_QUIET = ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS")
# The harness resamples in a pool of forked processes, and a fork of a process with communication threads may hang.
_NO_FORKS = ("DISABLE_MULTIPROC",)
_NOT_ON_DISK = ("ConnectionError", "OfflineModeIsEnabled", "DatasetNotFoundError", "LocalEntryNotFoundError")

MISSING_ADVICE = "the data is not on this machine, and the network is not used; use local files, or allow --online"


class MissingDataError(UserError):
    """Documents of a task that are not on this machine.

    Attributes:
        reason: message of `datasets`.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def set_environment(*, online: bool = False) -> None:
    """Set the variables that the harness and its libraries read when they are imported; the user's own values win.

    Args:
        online: let `datasets` download from a hub.
    """
    for name in (*([] if online else _OFFLINE), *_QUIET, *_NO_FORKS):
        os.environ.setdefault(name, "1")


@contextlib.contextmanager
def harness_errors(what: str) -> Iterator[None]:
    """Turn any error of the harness, of `datasets` or of a task's file into one message.

    Raises:
        MissingDataError: the task's data is not on this machine, and may not be downloaded.
        UserError: the task, its file or its data is at fault.
        CptError: the disk failed.
    """
    try:
        yield
    except (CptError, MemoryError):
        raise
    except SystemExit as error:  # of a function in a task's file
        raise UserError(f"{what} (a function of the task called sys.exit); correct it, or remove the task") from error
    except Exception as error:
        chain = list(_chain(error))
        for cause in chain:
            if isinstance(cause, OSError) and not is_path_error(cause):
                raise CptError(f"{what}: {describe_os_error(cause)}") from error
        is_missing = any(type(cause).__name__ in _NOT_ON_DISK for cause in chain)
        first = error if is_missing else _first_cause(error)
        kind, lines = type(first).__name__, str(first).strip().splitlines()
        reason = lines[0] if lines else kind
        if is_missing and os.environ.get(_OFFLINE[0]) == "1":
            raise MissingDataError(f"{what} ({kind}: {reason}); {MISSING_ADVICE}", reason) from error
        if isinstance(first, ModuleNotFoundError):
            advice = f"install {first.name}"
        else:
            advice = "correct the task's file or its data, or remove the task"
        raise UserError(f"{what} ({kind}: {reason}); {advice}") from error


def _first_cause(error: BaseException) -> BaseException:
    """Return the error that says most: `datasets` says "An error occurred while generating the dataset"."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it was raised from; `datasets` wraps errors of the disk."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def harness_context() -> Iterator[None]:
    """Let the harness work: quietly, with templates in a sandbox, and without a change of random states."""
    with _quiet(), _sandboxed_templates(), _errors_of_ratios(), _preserved_random_states():
        yield


def ratio_error(pairs: Sequence[tuple[float, float]]) -> float:
    """Return the standard error of the ratio sum(x) / sum(y) over at least two documents, by linearization.

    Example: log-likelihoods and bytes of texts. Source: W. G. Cochran, Sampling Techniques, section 2.11.
    """
    x, y = np.array(pairs, dtype=np.float64).T
    rest = x - x.sum() / y.sum() * y
    return float(np.sqrt(len(x) / (len(x) - 1) * np.sum(rest**2)) / y.sum())


@contextlib.contextmanager
def _errors_of_ratios() -> Iterator[None]:
    """Give a standard error to bits per byte and perplexities of whole texts, for which the harness has none."""
    from lm_eval import evaluator_utils
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity

    own = evaluator_utils.stderr_for_metric

    def stderr_for_metric(metric: Callable[..., float], bootstrap_iters: int) -> Any:
        if metric is bits_per_byte:
            return lambda items: ratio_error(items) / math.log(2)
        if metric is weighted_perplexity:
            return lambda items: ratio_error(items) * weighted_perplexity(items)
        return own(metric, bootstrap_iters)

    evaluator_utils.stderr_for_metric = stderr_for_metric
    try:
        yield
    finally:
        evaluator_utils.stderr_for_metric = own


@contextlib.contextmanager
def _sandboxed_templates() -> Iterator[None]:
    """Keep the templates of task files from calling Python: `{{ cycler.__init__.__globals__.os }}` is an error."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    own = utils.env
    sandbox = SandboxedEnvironment(
        loader=own.loader, undefined=own.undefined, keep_trailing_newline=own.keep_trailing_newline
    )
    sandbox.filters = own.filters
    utils.env = sandbox
    try:
        yield
    finally:
        utils.env = own


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
        one.setLevel(logging.CRITICAL)  # what fails is said once, by `harness_errors`
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
