"""Evaluation of a checkpoint or a Hugging Face folder, alone or on every rank of a job."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from megatron_cpt import __version__
from megatron_cpt.backend.collectives import on_main
from megatron_cpt.backend.distributed import job_group
from megatron_cpt.backend.signals import stops_as_interrupts
from megatron_cpt.checkpoint.loading.inference_model import inference_run, load_inference_model, open_checkpoint
from megatron_cpt.checkpoint.record import SavedRun, WeightSet
from megatron_cpt.convert.temporary_checkpoint import Note, as_checkpoint
from megatron_cpt.data.tokenizers.tokenizer import Tokenizer
from megatron_cpt.errors import UserError
from megatron_cpt.evaluate.checkpoint_tokenizer import load_checkpoint_tokenizer
from megatron_cpt.evaluate.finished_requests import FinishedRequests
from megatron_cpt.evaluate.harness import BOOTSTRAP_ITERATIONS, HarnessResults, LoadedTasks, TaskChoice
from megatron_cpt.evaluate.harness_context import SEED
from megatron_cpt.evaluate.ranks import LeadingEngine
from megatron_cpt.files.atomic import write_output
from megatron_cpt.files.output_path import file_problem
from megatron_cpt.files.system_errors import os_errors_as_cpt_errors
from megatron_cpt.provenance.protected_files import refuse_run_file

if TYPE_CHECKING:
    from megatron_cpt.checkpoint.loading.inference_model import InferenceModel
    from megatron_cpt.config import RunConfig
    from megatron_cpt.evaluate.engine import Engine
    from megatron_cpt.evaluate.lm_eval_model import HarnessModel

CACHE_FILE = "finished_requests.sqlite"
"""Name of the file of finished requests, beside the output."""
# The other ranks wait in a collective while rank 0 reads documents, encodes them and computes standard errors.
_COLLECTIVE_TIMEOUT = 86400.0

Advance = Callable[[int, int], None]
"""Progress callback: advance(requests finished since the last call, requests known so far)."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Options of an evaluation; the defaults suit most models.

    Attributes:
        overrides: `key=value` entries such as `parallel.tensor=2` or `precision.compute=bf16`.
        limit: documents per task, the first ones; None: all.
        num_fewshot: examples in each prompt; None: the number that each task sets.
        include_path: folder with further task files.
        batch_size: rows of tokens in flight per data-parallel rank; None: 8. Answers do not depend on it.
        max_length: largest number of tokens in a forward pass; None: the model's.
        tokenizer: KIND:PATH; None: the tokenizer of the checkpoint's run, or the one imported with its weights.
        add_bos: put the start id in front of every prompt; None: as the tokenizer's own template does.
        cache: SQLite file of finished requests; None: `finished_requests.sqlite` beside the output.
        log_samples: also write documents, prompts and answers beside the output.
        allow_code_execution: run the programs that a model writes, for tasks that need it.
        online: let `datasets` download from a hub.
        weights: `ema`: the moving average of the checkpoint's weights.
    """

    overrides: Sequence[str] = ()
    limit: int | None = None
    num_fewshot: int | None = None
    include_path: str | None = None
    batch_size: int | None = None
    max_length: int | None = None
    tokenizer: str | None = None
    add_bos: bool | None = None
    cache: Path | None = None
    log_samples: bool = False
    allow_code_execution: bool = False
    online: bool = False
    weights: WeightSet = "raw"


def evaluate(
    model: str | Path,
    tasks: Sequence[str],
    output: str | Path | None = None,
    options: EvaluateOptions | None = None,
    *,
    advance: Advance = lambda amount, total: None,
    note: Note = lambda activity: None,
) -> dict[str, Any] | None:
    """Evaluate a model on tasks of lm-evaluation-harness; every rank of the job calls this function.

    Example:

        results = evaluate("runs/my-run", ["mmlu"], "results.json", EvaluateOptions(limit=200))
        results["results"]["mmlu"]["acc"]

    Args:
        model: a checkpoint, a run directory for its newest checkpoint, or a Hugging Face folder.
        tasks: names of tasks, groups or tags.
        output: JSON file to write; None writes nothing, and an interrupted evaluation starts over.
        advance: progress callback, see `Advance`.
        note: called on rank 0 before long work without progress.

    Returns:
        The content of the output on rank 0, None on the other ranks.

    Raises:
        KeyboardInterrupt: the process received a stop signal.
        UserError: a task is unknown or cannot be loaded, or an option is wrong; nothing was written.
        RefusedError: the checkpoint is corrupt.
    """
    options, output = options or EvaluateOptions(), Path(output) if output is not None else None
    if output is None and options.log_samples:
        raise UserError("--log-samples: writes beside the output; give --output FILE")
    if not tasks:
        raise UserError("--tasks: give at least one task")
    choice = TaskChoice(
        names=tasks,
        include_path=options.include_path,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        allow_code_execution=options.allow_code_execution,
        online=options.online,
    )
    started = time.perf_counter()
    with stops_as_interrupts(), job_group(timeout=_COLLECTIVE_TIMEOUT):
        loaded_tasks: list[LoadedTasks] = []
        on_main(lambda: _prepare(choice, output, options, loaded_tasks))
        with as_checkpoint(Path(model), output, note) as path:
            saved = open_checkpoint(path)
            run = inference_run(saved, options.overrides)
            tokenizer = load_checkpoint_tokenizer(saved, options.tokenizer)
            with load_inference_model(saved, run, options.weights) as loaded:
                return _evaluate(
                    model, saved, loaded, tokenizer, loaded_tasks, output, options, advance=advance, started=started
                )


def _prepare(choice: TaskChoice, output: Path | None, options: EvaluateOptions, tasks: list[LoadedTasks]) -> None:
    _check_files(output, options)
    tasks.append(LoadedTasks(choice))


def _cache_file(options: EvaluateOptions, output: Path | None) -> Path | None:
    return options.cache or (output.with_name(CACHE_FILE) if output is not None else None)


def _check_files(output: Path | None, options: EvaluateOptions) -> None:
    """Refuse a place where no results can be; nothing is created before the evaluation begins."""
    if output is not None:
        if problem := file_problem(output):
            raise UserError(f"--output {output}: {problem}")
        refuse_run_file("--output", output)
    cache = _cache_file(options, output)
    if cache is None:
        return
    if output is not None and output.absolute() == cache.absolute():
        raise UserError(f"--output {output}: the file of finished requests; choose another name")
    if output is not None and options.log_samples and _samples_file(output).absolute() == cache.absolute():
        raise UserError(f"--cache {cache}: --log-samples writes there; choose another name")
    if problem := file_problem(cache):
        raise UserError(f"--cache {cache}: {problem}")


def _samples_file(output: Path) -> Path:
    return output.with_name(f"{output.stem}.samples.jsonl")


def _evaluate(
    model: str | Path,
    saved: SavedRun,
    loaded: InferenceModel,
    tokenizer: Tokenizer,
    tasks: list[LoadedTasks],
    output: Path | None,
    options: EvaluateOptions,
    *,
    advance: Advance,
    started: float,
) -> dict[str, Any] | None:
    # imported here: the engine imports megatron-core, which reads torch.cuda on import, and the harness is optional
    from megatron_cpt.evaluate.engine import Engine

    batch = {} if options.batch_size is None else {"batch_size": options.batch_size}
    engine = Engine(loaded.model, loaded.run, loaded.ranks, max_length=options.max_length, **batch)
    leading = LeadingEngine(engine, tokenizer, loaded.ranks.world_size)
    digest = saved.weights_digest(options.weights)

    def work() -> dict[str, Any]:
        from megatron_cpt.evaluate.lm_eval_model import HarnessModel

        scope = json.dumps([digest, tokenizer.fingerprint, loaded.run.precision.model_dump(mode="json")])
        with _finished_requests(_cache_file(options, output)) as finished:
            harness_model = HarnessModel(
                leading, tokenizer, add_bos=options.add_bos, finished=finished, scope=scope, advance=advance
            )
            found = tasks[0].run(harness_model, with_samples=options.log_samples)
        samples = None
        if output is not None and options.log_samples:
            samples = _samples_file(output)
            _write_samples(samples, found)
        results = {
            **_results(found),
            "model": {
                "path": _text(model),
                "checkpoint": _text(saved.path.name),
                "step": _step(saved),
                "weights": options.weights,
            },
            "digests": {
                "checkpoint": digest,
                "tokenizer": tokenizer.fingerprint,
                "tasks": {name: facts["digest"] for name, facts in found.tasks.items()},
            },
            "config": _config(options, loaded.run, tasks[0], engine),
            "versions": _versions(),
            "requests": _counts(harness_model, engine),
            "seconds": time.perf_counter() - started,
            "samples_file": samples and samples.name,
        }
        if output is not None:
            with os_errors_as_cpt_errors():
                text = orjson.dumps(results, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
                write_output(output, text, has_several_writers=True)
        return results

    return leading.lead(work)


@contextlib.contextmanager
def _finished_requests(path: Path | None) -> Iterator[FinishedRequests | None]:
    if path is None:
        yield None
        return
    with os_errors_as_cpt_errors():
        path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(FinishedRequests(path)) as finished:
        yield finished


def _results(found: HarnessResults) -> dict[str, Any]:
    return {
        "results": found.metrics,
        "tasks": {
            name: {**facts, "higher_is_better": found.higher_is_better.get(name, {})}
            for name, facts in found.tasks.items()
        },
        "groups": found.groups,
    }


def _step(saved: SavedRun) -> int | None:
    train: Mapping[str, Any] = saved.state.get("train") or {}
    return train.get("step") or None  # an import is of no step


def _config(options: EvaluateOptions, run: RunConfig, tasks: LoadedTasks, engine: Engine) -> dict[str, Any]:
    return {
        "tasks": [_text(name) for name in tasks.choice.names],
        "limit": options.limit,
        "num_fewshot": options.num_fewshot,
        "include_path": options.include_path and _text(options.include_path),
        "fewshot_seed": SEED,
        "bootstrap_iterations": BOOTSTRAP_ITERATIONS,
        "max_length": engine.max_length,
        "add_bos": options.add_bos,
        "code_isolation": tasks.code_isolation,
        "overrides": list(options.overrides),
        "parallel": run.parallel.model_dump(mode="json"),
        "precision": run.precision.model_dump(mode="json"),
    }


def _text(path: str | Path) -> str:
    """Return a path as text that JSON takes, with the bytes of a name that is not UTF-8 as escapes."""
    return str(path).encode(errors="surrogateescape").decode(errors="backslashreplace")


def _versions() -> dict[str, str]:
    packages = ("lm_eval", "torch", "megatron-core", "datasets")
    return {"megatron_cpt": __version__, **{name: importlib.metadata.version(name) for name in packages}}


def _counts(model: HarnessModel, engine: Engine) -> dict[str, int]:
    own, tokens = model.counts, engine.counts
    return {
        "total": own.total,
        "answered_from_cache": own.answered_from_file,
        "truncated": own.truncated,
        "forward_tokens": tokens.forward_tokens,
        "padding_tokens": tokens.padding_tokens,
    }


def _write_samples(path: Path, found: HarnessResults) -> None:
    """Write one line per document of each task."""
    from lm_eval.utils import handle_non_serializable

    lines = (
        json.dumps({"task": task, **sample}, default=handle_non_serializable, ensure_ascii=False)
        for task, samples in found.samples.items()
        for sample in samples
    )
    with os_errors_as_cpt_errors():
        write_output(path, "".join(f"{line}\n" for line in lines), has_several_writers=True)
