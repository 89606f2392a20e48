"""Preparation of a run: read run.yaml, find the files it names, and plan the steps; report all problems together."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_cpt.checkpoint.layout import resolve_checkpoint
from megatron_cpt.checkpoint.record import read_run
from megatron_cpt.config import Draft, ModelConfig, RunConfig, SourceConfig, draft_config, format_count, read_mapping
from megatron_cpt.config.load_run import apply_overrides
from megatron_cpt.config.quantities import expand_paths
from megatron_cpt.data.teacher_cache.cache_header import read_header
from megatron_cpt.data.teacher_cache.read_cache import TeacherCache
from megatron_cpt.data.teacher_cache.top_k_records import DEFAULT_TOP_K, RecordFormat
from megatron_cpt.data.tokenfile.listed_documents import open_source
from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.data.tokenfile.sidecar import Sidecar, name_tokenizer, read_sidecar, sidecar_path
from megatron_cpt.data.tokenizers.tokenizer import read_fingerprint
from megatron_cpt.errors import ConfigError, RefusedError, UserError
from megatron_cpt.files.output_path import output_problem
from megatron_cpt.files.whole_io import exists, is_folder
from megatron_cpt.planning import RunPlan, build_plan
from megatron_cpt.planning.cost.teacher_cost import CacheCost, distilled_samples
from megatron_cpt.planning.timeline.epochs import listed, samples_in_epoch

_SIZE_TOLERANCE = 0.01  # relative difference between declared and actual tokens that needs no warning


@dataclass(frozen=True)
class PreparedRun:
    """Run whose configuration and plan have no problems.

    Attributes:
        source_tokens: tokens per source.
        prefixes: dataset prefixes and document lists per source; sources whose files are missing have no entry.
        tokenizer: name and fingerprint of the tokenizer of the run's ids, from run.yaml or else from the sidecars of
            its data; None: unknown.
        eod_ids: ids that end the documents of the data, by its sidecars.
        notes: sentences about the files that the start of training should show.
    """

    config: RunConfig
    plan: RunPlan
    source_tokens: dict[str, int]
    prefixes: dict[str, list[str]]
    tokenizer: tuple[str, str] | None = None
    eod_ids: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()


@dataclass
class _Files:
    """Facts about the files of each source, and messages about missing and damaged ones."""

    tokens: dict[str, int] = field(default_factory=dict)
    samples_per_epoch: dict[str, int] = field(default_factory=dict)
    prefixes: dict[str, list[str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    declared: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    too_short: list[str] = field(default_factory=list)
    sidecars: dict[str, Sidecar | None] = field(default_factory=dict)  # by prefix

    def start_notes(self) -> tuple[str, ...]:
        """Return the sentences for the start of training."""
        without = [prefix for prefix, sidecar in self.sidecars.items() if sidecar is None]
        if not without:
            return tuple(self.too_short)
        count = f"{len(without)} of {len(self.sidecars)} datasets have" if len(self.sidecars) > 1 else "the dataset has"
        return (
            *self.too_short,
            f"{count} no sidecar PREFIX.json ({listed(without)}): their tokenizer and content are not compared",
        )


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run.yaml and check its values; the files that it names may be missing.

    Example:
        >>> cpt.load_run("run.yaml", ["parallel.tensor=2"]).parallel.tensor
        2

    Args:
        path: the run.yaml.
        overrides: `key=value` entries that replace values of the file, by dotted path.

    Raises:
        UserError: the file cannot be read.
        ConfigError: lists every problem of the values.
    """
    if isinstance(overrides, str):
        raise TypeError(f"overrides: {overrides!r}; give a list of key=value strings")
    return _read_draft(path, overrides).finish(str(path))


def plan_run(run: RunConfig, *, num_gpus: int | None = None) -> RunPlan:
    """Plan a run: steps, phases, learning rates, epochs, memory and FLOPs. Imports no torch.

    A source whose files are missing is planned with its declared `tokens`.

    Example:
        >>> [(phase.name, phase.last_step) for phase in cpt.plan(cpt.load_run("run.yaml")).phases]
        [('general', 45225), ('qa', 63579)]

    Args:
        run: the run, from `load_run`.
        num_gpus: number of ranks that the run must fit; None: any number.

    Raises:
        ConfigError: lists every problem of the plan and of missing files.
        RefusedError: the plan has no problem, but a dataset is damaged.
    """
    if num_gpus is not None and num_gpus < 1:
        raise UserError(f"num_gpus: {num_gpus}; give at least 1")
    return _prepare(run.name, Draft(run), need_files=False, num_gpus=num_gpus).plan


def prepare_run(
    path: str | Path, overrides: Sequence[str] = (), *, need_files: bool, num_gpus: int | None = None
) -> PreparedRun:
    """Read a run.yaml, find its files and plan the run; see `load_run` and `plan_run`.

    Args:
        need_files: require every file that training reads. If False, a source whose files are missing is planned with
            its declared `tokens`.

    Raises:
        UserError: the run.yaml cannot be read.
        ConfigError: lists every problem of the configuration, the files and the plan.
        RefusedError: there is no such problem, but a dataset is damaged.
    """
    return _prepare(str(path), _read_draft(path, overrides), need_files, num_gpus)


def prepare_mapping(where: str, data: dict[str, Any], *, need_files: bool, num_gpus: int | None = None) -> PreparedRun:
    """Validate the content of a run.yaml, find its files and plan the run; see `prepare_run`.

    Args:
        where: name of the content in messages.
    """
    return _prepare(where, _draft_mapping(data, ()), need_files, num_gpus)


def prepare_config(config: RunConfig, *, need_files: bool, num_gpus: int | None = None) -> PreparedRun:
    """Look up the files of a valid configuration and plan it; see `prepare_run`."""
    return _prepare(config.name, Draft(config), need_files, num_gpus)


def _read_draft(path: str | Path, overrides: Sequence[str]) -> Draft:
    return _draft_mapping(read_mapping(path), overrides)


def _draft_mapping(data: dict[str, Any], overrides: Sequence[str]) -> Draft:
    overridden = copy.deepcopy(data)
    apply_overrides(overridden, overrides)
    if data.get("model") is not None and overridden.get("model") is not None:
        return draft_config(data, overrides)
    model, problem = _saved_model(overridden)
    draft = draft_config(data, overrides, saved_model=model)
    if problem is not None:
        missing = f"model: missing, and the checkpoint in init.from does not give it: {problem}"
        draft.problems[:] = [missing if text.startswith("model: missing;") else text for text in draft.problems]
    return draft


def _saved_model(overridden: Mapping[str, Any]) -> tuple[Any, str | None]:
    """Return the model section of the checkpoint that a run with these keys resumes or starts from.

    Without a valid one it is None, and the second value says why `init.from`, if it is given, has none.
    """
    problem = None
    init = overridden.get("init")
    start = init.get("from") if isinstance(init, dict) else None
    for folder in (overridden.get("output"), start):
        if isinstance(folder, str):
            # `train` reports a wrong checkpoint, and the validation of run.yaml a wrong path
            try:
                return read_run(resolve_checkpoint(expand_paths(folder))).get("model"), None
            except (UserError, RefusedError) as error:
                problem = str(error) if folder is start else None
            except ValueError:
                continue
    return None, problem


def _prepare(name: str, draft: Draft, need_files: bool, num_gpus: int | None) -> PreparedRun:
    if draft.config is None:
        raise ConfigError(name, draft.problems)
    config = _with_shape_of_teacher(draft.config)
    files = _find_files(draft, config, need_files)
    plan = build_plan(config, files.tokens, samples_per_epoch=files.samples_per_epoch, num_gpus=num_gpus)
    # A plan made with a stand-in for an invalid value reports false problems of that value.
    plan_problems = [problem.text for problem in plan.problems if draft.is_untouched(*problem.keys)]
    problems = [*draft.problems, *files.missing, *plan_problems]
    if problems:
        raise ConfigError(name, [*problems, *files.damaged])
    tokenizer = _compare_tokenizers(files, config.tokenizer)
    if files.damaged:
        raise RefusedError("\n".join(files.damaged))
    warnings = (*files.notes, *files.too_short, *plan.warnings)
    plan = replace(plan, warnings=warnings, teacher_cache=_cache_cost(config, plan, files.tokens))
    origins = [sidecar.origin for sidecar in files.sidecars.values() if sidecar is not None]
    eod_ids = frozenset(origin.eod_id for origin in origins if origin.eod_id is not None)
    return PreparedRun(config, plan, files.tokens, files.prefixes, tokenizer, eod_ids, files.start_notes())


def _find_files(draft: Draft, config: RunConfig, need_files: bool) -> _Files:
    files = _Files()
    for name, source in config.sources.items():
        if draft.is_valid(f"sources.{name}.path"):
            _find_source(files, name, source, config.span_length(name), need_files)
    if need_files:
        if draft.is_untouched("output") and (problem := output_problem(config.output)):
            files.missing.append(f"output: {config.output}: {problem}")
        _find_validation(files, draft, config)
        files.missing += [f"{problem}; {fix}" for problem, fix in _missing_start(draft, config)]
    else:
        files.notes += [f"{problem}; `train` needs it" for problem, _ in _missing_start(draft, config)]
        files.notes += _faults_of_cache(draft, config, files.prefixes)
    if files.declared:
        files.notes.insert(0, f"planned with declared sizes, because the files are missing: {listed(files.declared)}")
    return files


def _find_source(files: _Files, name: str, source: SourceConfig, seq_length: int, need_files: bool) -> None:
    key = f"sources.{name}"
    try:
        datasets = open_source(source.paths)
        sizes = _read_files(files, datasets)
    except UserError as error:
        if need_files:
            files.missing.append(_line(f"{key}.path", error))
        elif source.tokens is None:
            files.missing.append(f"{_line(f'{key}.path', error)}; to plan without the files, set {key}.tokens")
        else:
            files.tokens[name] = source.tokens
            files.declared.append(name)
        return
    except RefusedError as error:
        files.damaged.append(_line(f"{key}.path", error))
        return
    tokens = sum(sizes)
    files.prefixes[name], files.tokens[name] = [dataset.prefix for dataset in datasets], tokens
    files.samples_per_epoch[name] = sum(samples_in_epoch(size, seq_length) for size in sizes)
    short = [size for size in sizes if samples_in_epoch(size, seq_length) == 0]
    if short and files.samples_per_epoch[name]:  # a source without any sample is a problem of the plan
        files.too_short.append(
            f"source {name}: {len(short)} of its {len(sizes)} files, {sum(short) / tokens:.1%} of its tokens, are "
            f"shorter than one sample (seq_length + 1 = {seq_length + 1:,} tokens) and are never read; join them: "
            "`megatron-cpt merge`"
        )
    if source.tokens is not None and abs(tokens - source.tokens) > _SIZE_TOLERANCE * source.tokens:
        files.notes.append(
            f"source {name}: its files hold {format_count(tokens)} tokens, not the declared "
            f"{format_count(source.tokens)}; the plan uses the files"
        )


def _find_validation(files: _Files, draft: Draft, config: RunConfig) -> None:
    if config.validation is None or not draft.is_untouched("validation"):
        return
    for name, path in config.validation.sources.items():
        try:
            _read_files(files, open_source(path))
        except (UserError, RefusedError) as error:
            problems = files.damaged if isinstance(error, RefusedError) else files.missing
            problems.append(_line(f"validation.sources.{name}", error))


def _read_files(files: _Files, datasets: Sequence[IndexedDataset]) -> list[int]:
    """Note the sidecars of datasets and of the pairs that document lists choose from; return the tokens of each."""
    for dataset in datasets:
        for pair in dataset.parts:
            files.sidecars[pair.prefix] = read_sidecar(pair.header)
    return [dataset.num_tokens for dataset in datasets]


def _compare_tokenizers(files: _Files, spec: str | None) -> tuple[str, str] | None:
    """Note each dataset whose ids are of another tokenizer; return name and fingerprint of the run's tokenizer."""
    reference, owner = None, "run.yaml"
    if spec is not None:
        with contextlib.suppress(UserError):  # `train` reports a missing tokenizer
            reference = (spec, read_fingerprint(spec))
    for prefix, sidecar in files.sidecars.items():
        if sidecar is None or sidecar.origin.fingerprint is None:
            continue
        if reference is None:
            reference, owner = (sidecar.origin.tokenizer or "unknown", sidecar.origin.fingerprint), prefix
        elif sidecar.origin.fingerprint != reference[1]:
            files.damaged.append(
                f"{prefix}: its ids are of tokenizer {sidecar.origin.name}, {owner} has {name_tokenizer(*reference)}: "
                "equal ids mean other text; set tokenizer to the first one, encode the text again, or, if both give "
                f"the same ids, remove {sidecar_path(prefix)}"
            )
    return reference


def _missing_start(draft: Draft, config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield problem and fix if the named checkpoint or tokenizer does not exist."""
    start = config.init.from_
    # A run that has checkpoints of its own resumes from them and ignores `init`.
    checkpoints = Path(config.output, "checkpoints")
    has_started = is_folder(checkpoints) and any(checkpoints.glob("step-*"))
    if start is not None and draft.is_untouched("init") and not exists(start) and not has_started:
        fix = "give a checkpoint or a run directory, or remove it to start from random weights"
        yield f"init.from: {start}: no such checkpoint", fix
    yield from _missing_teacher(draft, config)
    kind, _, path = (config.tokenizer or "").partition(":")
    if not path or kind == "null" or not draft.is_untouched("tokenizer"):
        return
    if not exists(path):
        fix = "give KIND:PATH of the tokenizer that the data was made with"
        yield f"tokenizer: {kind}:{path}: no such file", fix
        return
    try:
        read_fingerprint(f"{kind}:{path}")
    except UserError as error:  # a folder without the tokenizer's file
        problem, _, fix = str(error).partition("; ")
        yield problem, fix


def _with_shape_of_teacher(config: RunConfig) -> RunConfig:
    """Return the run with the shape of its teacher from the checkpoint, for the plan; `train` reports a wrong one."""
    teacher, path = config.teacher, config.teacher_checkpoint
    if teacher is None or teacher.model is not None or path is None:
        return config
    with contextlib.suppress(UserError, RefusedError, ValueError):
        model = ModelConfig.model_validate(read_run(resolve_checkpoint(path)).get("model"))
        return config.model_copy(update={"teacher": teacher.model_copy(update={"model": model})})
    return config


def _cache_cost(config: RunConfig, plan: RunPlan, tokens: Mapping[str, int]) -> CacheCost | None:
    """Return the size of a cached teacher and what a step reads of it; `train` reports a wrong cache.

    Args:
        tokens: of each source.
    """
    teacher = config.teacher
    if teacher is None or teacher.cache is None:
        return None
    largest_step = max(segment.tokens_per_step for segment in plan.segments)
    read = math.ceil(distilled_samples(config) * largest_step)
    try:
        header = read_header(Path(teacher.cache))
    except RefusedError:
        record = RecordFormat(DEFAULT_TOP_K, config.model.vocab).num_bytes
        distilled = sum(count for name, count in tokens.items() if teacher.distills(name))
        return CacheCost(record, distilled * record, read * record, exists=False)
    return CacheCost(header.records.num_bytes, header.num_bytes, read * header.records.num_bytes, exists=True)


def _missing_teacher(draft: Draft, config: RunConfig) -> Iterator[tuple[str, str]]:
    if config.teacher is None or not draft.is_untouched("teacher", "init"):
        return
    if (path := config.teacher_checkpoint) is not None and not exists(path):
        yield f"teacher.from: {path}: no such checkpoint", "give a checkpoint or a run directory"
    if (path := config.teacher.cache) is not None and not exists(path):
        yield f"teacher.cache: {path}: no such folder", "make it with `megatron-cpt teach`"


def _faults_of_cache(draft: Draft, config: RunConfig, sources: Iterable[str]) -> list[str]:
    """Return why `train` would refuse the folder in `teacher.cache`, and which samples are longer than its windows."""
    teacher, faults = config.teacher, []
    if teacher is None or teacher.cache is None or not draft.is_untouched("teacher") or not exists(teacher.cache):
        return []
    try:
        cache = TeacherCache(teacher.cache)
    except RefusedError as error:
        return [f"teacher.cache: {error}"]
    for name in filter(teacher.distills, sources):
        try:
            cache.require_source(name, open_source(config.sources[name].paths), config.span_length(name))
        except RefusedError as error:
            faults.append(f"teacher.cache: {error}")
    if config.longest_sequence > (window := cache.header.window):
        faults.append(
            f"teacher.cache: the teacher has read {window:,} tokens at once, samples have up to "
            f"{config.longest_sequence:,}: it knows less of their beginning than the model; `megatron-cpt teach "
            f"--window {config.longest_sequence}` makes a cache without this limit"
        )
    return faults


def _line(key: str, error: Exception) -> str:
    return f"{key}: {str(error).removeprefix('path: ')}"
