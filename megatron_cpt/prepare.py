"""run.yaml and the files it names -> a configuration and a plan, or everything that is wrong with them at once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_cpt.config import Draft, RunConfig, SourceConfig, draft_config, format_count, read_mapping
from megatron_cpt.data.tokenfile.reader import expand_prefixes, read_header
from megatron_cpt.errors import ConfigError, RefusedError, UserError
from megatron_cpt.plan import RunPlan, build_plan
from megatron_cpt.plan.timeline.epochs import listed

_SIZE_TOLERANCE = 0.01  # of the declared size, before a plan made with it is worth a warning


@dataclass(frozen=True)
class PreparedRun:
    """A run that may start, or be shown.

    Attributes:
        config: the configuration, without problems.
        plan: its plan, without problems.
        source_tokens: tokens of each source.
        prefixes: the data sets of each source, as far as its files are there.
    """

    config: RunConfig
    plan: RunPlan
    source_tokens: dict[str, int]
    prefixes: dict[str, list[str]]


@dataclass
class _Files:
    """What was found on the disk, by source, and lines about what was not."""

    tokens: dict[str, int] = field(default_factory=dict)
    samples_per_epoch: dict[str, int] = field(default_factory=dict)
    prefixes: dict[str, list[str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    declared: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def prepare_run(
    path: str | Path, overrides: Sequence[str] = (), *, need_files: bool, num_gpus: int | None = None
) -> PreparedRun:
    """Read a run.yaml, look its files up and plan it.

    Args:
        path: the run.yaml.
        overrides: `key=value` each.
        need_files: whether every file that training reads must be there. If not, a source whose files are missing is
            planned with its declared `tokens`.
        num_gpus: ranks that it must fit; left out: any number.

    Raises:
        UserError: the run.yaml cannot be read.
        ConfigError: with the problems of the configuration, of the files and of the plan.
        RefusedError: nothing is wrong but that a data set is broken.
    """
    return _prepare(str(path), draft_config(read_mapping(path), overrides), need_files, num_gpus)


def prepare_config(config: RunConfig, *, need_files: bool, num_gpus: int | None = None) -> PreparedRun:
    """Look up the files of a valid configuration and plan it; see `prepare_run`."""
    return _prepare(config.name, Draft(config), need_files, num_gpus)


def _prepare(name: str, draft: Draft, need_files: bool, num_gpus: int | None) -> PreparedRun:
    if draft.config is None:
        raise ConfigError(name, draft.problems)
    config, files = draft.config, _find_files(draft, draft.config, need_files)
    plan = build_plan(config, files.tokens, samples_per_epoch=files.samples_per_epoch, num_gpus=num_gpus)
    # Where a value was a stand-in, what the plan says about it would be a false alarm.
    planned = [problem.text for problem in plan.problems if draft.is_untouched(*problem.keys)]
    problems = [*draft.problems, *files.missing, *planned]
    if problems:
        raise ConfigError(name, [*problems, *files.broken])
    if files.broken:
        raise RefusedError("\n".join(files.broken))
    plan = replace(plan, warnings=(*files.notes, *plan.warnings))
    return PreparedRun(config, plan, files.tokens, files.prefixes)


def _find_files(draft: Draft, config: RunConfig, need_files: bool) -> _Files:
    files = _Files()
    for name, source in config.sources.items():
        if draft.is_valid(f"sources.{name}.path"):
            _find_source(files, name, source, config.span_length(name), need_files)
    if need_files:
        _find_validation(files, draft, config)
        files.missing += _missing_start(draft, config)
    if files.declared:
        files.notes.insert(0, f"planned with declared sizes, for the files are not here: {listed(files.declared)}")
    return files


def _find_source(files: _Files, name: str, source: SourceConfig, seq_length: int, need_files: bool) -> None:
    key = f"sources.{name}"
    try:
        prefixes = expand_prefixes(source.paths)
        sizes = [read_header(prefix).num_tokens for prefix in prefixes]
    except UserError as error:
        if need_files:
            files.missing.append(_line(f"{key}.path", error))
        elif source.tokens is None:
            files.missing.append(f"{_line(f'{key}.path', error)}; to plan without the files give {key}.tokens")
        else:
            files.tokens[name] = source.tokens
            files.declared.append(name)
        return
    except RefusedError as error:
        files.broken.append(_line(f"{key}.path", error))
        return
    tokens = sum(sizes)
    files.prefixes[name], files.tokens[name] = prefixes, tokens
    files.samples_per_epoch[name] = sum(max(0, size - 1) // seq_length for size in sizes)
    if source.tokens is not None and abs(tokens - source.tokens) > _SIZE_TOLERANCE * source.tokens:
        files.notes.append(
            f"source {name}: its files hold {format_count(tokens)} tokens, not the declared "
            f"{format_count(source.tokens)}; planned with what they hold"
        )


def _find_validation(files: _Files, draft: Draft, config: RunConfig) -> None:
    if config.validation is None or not draft.is_untouched("validation"):
        return
    for name, path in config.validation.sources.items():
        key = f"validation.sources.{name}"
        try:
            for prefix in expand_prefixes(path):
                read_header(prefix)
        except UserError as error:
            files.missing.append(_line(key, error))
        except RefusedError as error:
            files.broken.append(_line(key, error))


def _missing_start(draft: Draft, config: RunConfig) -> Iterator[str]:
    """The checkpoint and the tokenizer, where they are named but not there."""
    start = config.init.from_
    if start is not None and draft.is_untouched("init") and not os.path.exists(start) and not _has_started(config):
        way_out = "give a checkpoint or a run directory, or leave it out for random weights"
        yield f"init.from: {start}: no such checkpoint; {way_out}"
    kind, _, path = (config.tokenizer or "").partition(":")
    if path and draft.is_untouched("tokenizer") and not os.path.exists(path):
        yield f"tokenizer: {kind}:{path}: no such file; give KIND:PATH of the tokenizer that the data were made with"


def _has_started(config: RunConfig) -> bool:
    """Whether the run goes on from checkpoints of its own, so that `init` no longer counts."""
    return any(Path(config.output, "checkpoints").glob("step-*"))


def _line(key: str, error: Exception) -> str:
    return f"{key}: {str(error).removeprefix('path: ')}"
