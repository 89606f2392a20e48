"""Identity of a run: its configuration, changes of it, and the digests of data, tokenizer, code and checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_cpt.report.metrics_columns import as_mapping
from megatron_cpt.report.operation import starts
from megatron_cpt.report.page import MISSING, DataTable, PageSection, whole
from megatron_cpt.report.run_record import RunRecord

_MAX_CELL = 200
_MAX_DIFFERENCES = 200
_UNSET = "not set"


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Return dotted keys and values as text: {"batch": {"global": 8}} becomes {"batch.global": "8"}."""
    if isinstance(value, Mapping) and value:
        return {key: text for name, one in value.items() for key, text in flatten(one, f"{prefix}.{name}").items()}
    if isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
        return {
            key: text
            for place, one in enumerate(value)
            for key, text in flatten(one, f"{prefix}.{as_mapping(one).get('name', place)}").items()
        }
    return {prefix.lstrip("."): _text(value)}


def _text(value: Any) -> str:
    text = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else str(value)
    assert text is not None
    return text if len(text) <= _MAX_CELL else f"{text[:_MAX_CELL]} ..."


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the keys whose values differ between run.yaml files, with the value of each; null is as good as absent."""
    flat = [flatten(config) if config else {} for config in configs]
    keys = dict.fromkeys(key for one in flat for key in one)
    found = {key: [one.get(key, _UNSET) for one in flat] for key in keys}
    return {key: values for key, values in found.items() if len({_UNSET if v == "null" else v for v in values}) > 1}


def configuration_section(runs: Sequence[RunRecord]) -> PageSection:
    """Return the differences between the runs, the changes within the first one, and its main settings."""
    run = runs[0]
    parts = [*_difference_table(runs), *_change_table(run), *_settings_table(run)]
    sentences = [] if len(runs) > 1 else ["Compare with other runs: megatron-cpt report RUN --compare OTHER_RUN"]
    return PageSection("configuration", "Configuration", sentences, parts)


def _difference_table(runs: Sequence[RunRecord]) -> Iterator[DataTable]:
    if len(runs) < 2:
        return
    found = differences([run.config for run in runs])
    rows = [[key, *values] for key, values in list(found.items())[:_MAX_DIFFERENCES]]
    note = f"{len(found) - len(rows)} more differ." if len(found) > len(rows) else ""
    columns = frozenset(range(1, len(runs) + 1))
    headers = ["key of run.yaml", *(run.title for run in runs)]
    yield DataTable("Differences between the runs", headers, rows or [["none", *[""] * len(runs)]], columns, note)


def _change_table(run: RunRecord) -> Iterator[DataTable]:
    """Yield the keys of run.yaml that changed during the run, by plans.jsonl."""
    rows = []
    for before, after in zip(run.plans, run.plans[1:], strict=False):
        changed = differences([as_mapping(before.get("run")), as_mapping(after.get("run"))])
        rows += [[whole(after.get("after_step")), key, *values] for key, values in changed.items()]
    if rows:
        headers = ["after step", "key of run.yaml", "before", "from then on"]
        yield DataTable("Changes during the run", headers, rows[:_MAX_DIFFERENCES], frozenset({1, 2, 3}))


_SETTINGS = (
    *("model.preset", "init.from", "init.load", "tokenizer", "seq_length", "batch.global", "batch.micro", "tokens"),
    *("schedule.shape", "schedule.max_lr", "schedule.min_lr", "optimizer.name", "optimizer.weight_decay"),
    *("parallel.tensor", "parallel.pipeline", "parallel.context", "precision.compute", "seed"),
)


def _settings_table(run: RunRecord) -> Iterator[DataTable]:
    flat = flatten(run.config) if run.config else {}
    rows = [[key, flat[key]] for key in _SETTINGS if flat.get(key, "null") != "null"]
    if rows:
        yield DataTable(
            "Main settings", ["key", "value"], rows, frozenset({1}), f"All of them: {run.folder / 'run.yaml'}"
        )


def digests(run: RunRecord) -> list[tuple[str, str]]:
    """Return what identifies a run: name and digest, of checkpoint, tokenizer, code and the files of each source."""
    state = run.newest.state if run.newest else {}
    newest_plan = run.plans[-1] if run.plans else {}
    found = [(f"manifest of checkpoint {run.newest.name} (SHA-256)", run.newest.digest)] if run.newest else []
    if state.get("tokenizer_fingerprint"):
        found.append(("tokenizer", str(state["tokenizer_fingerprint"])))
    versions = as_mapping(state.get("versions"))
    for line in starts(run):
        versions = as_mapping(line.get("versions")) or versions
    if versions:
        found.append(("code", ", ".join(f"{name} {version}" for name, version in versions.items())))
    data = as_mapping(state.get("data_fingerprints")) or as_mapping(newest_plan.get("data_fingerprints"))
    return found + [(f"data of {name}", str(digest)) for name, digest in data.items()]


def identity_section(runs: Sequence[RunRecord]) -> PageSection:
    """Return the table of digests; a digest that all runs share is shown once."""
    by_run = [dict(digests(run)) for run in runs]
    names = list(dict.fromkeys(name for found in by_run for name in found))
    rows = []
    for name in names:
        values = [found.get(name, MISSING) for found in by_run]
        if len(set(values)) == 1:
            rows.append([name, "all" if len(runs) > 1 else runs[0].title, values[0]])
        else:
            rows += [[name, run.title, value] for run, value in zip(runs, values, strict=True)]
    table = DataTable("Digests", ["of", "run", "digest"], rows[:_MAX_DIFFERENCES], frozenset({1, 2}))
    sentences = [f"{run.title}: {run.folder}" for run in runs]
    return PageSection("identity", "Data, tokenizer, code and checkpoint", sentences, [table] if rows else [])
