"""Comparison of a run with the checkpoint that it resumes from: what changed, and which changes are allowed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ValidationError

from megatron_cpt.config import ModelConfig, RunConfig
from megatron_cpt.data.tokenfile.fingerprint import is_same_data
from megatron_cpt.errors import RefusedError, UserError

# Fields about the origin or the training of a model, which its weights do not depend on.
_NOT_SHAPE = ("preset", "init_std", "max_positions")


@dataclass(frozen=True)
class ResumeRule:
    """A part of run.yaml that should not change in the middle of a run.

    Attributes:
        name: for `--allow`.
        of: returns the value of this part in a resolved run.yaml.
        effect: the consequence of a change, for the user.
        allowed: `--allow` may permit a change.
    """

    name: str
    of: Callable[[Mapping[str, Any]], Any]
    effect: str
    allowed: bool = True


def model_shape(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model fields that weights depend on: with another rotary percent they load, but train wrong."""
    model = _with_defaults(ModelConfig, run["model"])
    if model.get("heads") and model.get("hidden"):  # a default that is written out means the same model
        model["kv_groups"] = model.get("kv_groups") or model["heads"]
        model["head_dim"] = model.get("head_dim") or model["hidden"] // model["heads"]
    return {key: value for key, value in model.items() if key not in _NOT_SHAPE}


def _with_defaults(section: type[BaseModel], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the saved values, with defaults for fields that are newer than the checkpoint."""
    try:
        return section.model_validate(dict(saved)).model_dump(mode="json", by_alias=True)
    except ValidationError:  # of a version with other fields: compare without defaults, so every difference shows
        return dict(saved)


def _blends(run: Mapping[str, Any]) -> list[Any]:
    sources = run["sources"].items()
    limits = {name: source["max_epochs"] for name, source in sources if source.get("on_exhausted") == "renormalize"}
    return [limits, *({"name": phase["name"], "blend": phase["blend"]} for phase in run["phases"])]


def _documents(run: Mapping[str, Any]) -> list[Any]:
    return [run["documents"], {name: source.get("fim") for name, source in run["sources"].items() if source.get("fim")}]


def _ends(run: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **run["schedule"],
        "tokens": run["tokens"],
        "phases": [{"name": phase["name"], "until": phase["until"]} for phase in run["phases"]],
    }


def _phase_lengths(run: Mapping[str, Any]) -> dict[str, int]:
    lengths = {phase["name"]: phase.get("seq_length") or run["seq_length"] for phase in run["phases"]}
    return lengths if len(set(lengths.values())) > 1 else {}  # a single length is compared by the rule `seq_length`


def _phase_batches(run: Mapping[str, Any]) -> dict[str, int]:
    own = {phase["name"]: (phase.get("batch") or {}).get("global") for phase in run["phases"]}
    return {name: size for name, size in own.items() if size}


def span_lengths(run: Mapping[str, Any]) -> dict[str, int]:
    """Return the length of the longest samples of each source, in tokens."""
    lengths: dict[str, int] = {}
    for phase in run["phases"]:
        for name in phase["blend"]:
            lengths[name] = max(lengths.get(name, 0), phase.get("seq_length") or run["seq_length"])
    return lengths


def _teacher(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the teacher with its loss; the shape of its model follows from its checkpoint."""
    section = run.get("teacher")
    if not section:
        return None
    # the same checkpoint, named as the start of the run or by its path
    source = run["init"]["from"] if section.get("from") == "init" else section.get("from")
    factors = {name: section["sources"].get(name, 1.0) for name in run["sources"]}
    return {**section, "from": source, "sources": factors, "model": None}


RULES = (
    ResumeRule("model", model_shape, "the weights belong to another model", allowed=False),
    ResumeRule("batch", lambda run: run["batch"]["global"], "steps are counted in global batches", allowed=False),
    ResumeRule("seed", lambda run: run["seed"], "the order of every source changes: samples repeat", allowed=False),
    ResumeRule("ramp_up", lambda run: run["batch"].get("ramp_up"), "the batch grows in another way from this step on"),
    ResumeRule("phase_length", _phase_lengths, "a source continues in the new length with its next unread window"),
    ResumeRule("phase_batch", _phase_batches, "steps of the phase use another batch; none of them may be done already"),
    ResumeRule("blend", _blends, "the new weights count from this step on; no sample is read twice"),
    ResumeRule("schedule", _ends, "the rate jumps to the new schedule's value at this step"),
    ResumeRule("optimizer", lambda run: run["optimizer"], "the new values count from this step on"),
    ResumeRule(
        "precision", lambda run: run["precision"], "the run continues in another number format from its fp32 weights"
    ),
    ResumeRule("tokenizer", lambda run: run["tokenizer"], "ids may mean other text from this step on"),
    ResumeRule("documents", _documents, "masks change from this step on"),
    ResumeRule("teacher", _teacher, "the loss has another target or weight from this step on"),
)
DATA = ResumeRule(
    "data", lambda fingerprints: fingerprints, "a source's samples are renumbered: some are read twice, some never"
)
RUN = ResumeRule("run", lambda run_id: run_id, "its weights, optimizer and position in the data continue here")
SPANS = ResumeRule("seq_length", span_lengths, "a source is cut into spans of its longest samples", allowed=False)
ALLOWABLE = tuple(rule.name for rule in (*RULES, DATA, RUN) if rule.allowed)


@dataclass(frozen=True)
class Change:
    """One difference between the checkpoint and the run that resumes from it."""

    rule: ResumeRule
    what: str

    def __str__(self) -> str:
        return f"{self.rule.name}: {self.what}: {self.rule.effect}"


def check_allowed_names(allow: Collection[str]) -> None:
    """Check the names given to `--allow`.

    Raises:
        UserError: a name is unknown.
    """
    unknown = sorted(set(allow) - set(ALLOWABLE))
    if unknown:
        raise UserError(f"--allow {' '.join(unknown)}: not a change that can be allowed; known: {', '.join(ALLOWABLE)}")


def find_changes(
    saved_run: Mapping[str, Any],
    run: RunConfig,
    saved_data: Mapping[str, str],
    data: Mapping[str, str],
    tokenizers: tuple[str | None, str | None] = (None, None),
    document_ends: tuple[int | None, int | None] | None = None,
    run_ids: tuple[str | None, str | None] = (None, None),
    teachers: tuple[str | None, str | None] = (None, None),
) -> list[Change]:
    """Return the differences that matter; parallel layout, micro-batch, logging and the like may change freely.

    Args:
        saved_run: the checkpoint's resolved run.yaml.
        run: the run that resumes.
        saved_data: fingerprint of each source in the checkpoint.
        data: fingerprint of each source now; only sources in both are compared.
        tokenizers: fingerprints of the tokenizer's content, saved and now; if both are known, its path may change.
        document_ends: end-of-document ids, saved and now; None: the checkpoint is of a version that did not save it.
        run_ids: ids of the run that saved the checkpoint, and of the run directory; None: unknown.
        teachers: hashes of the teacher's content, saved and now; if both are known, its path may change.
    """
    now = run.to_dict()
    saved_run = _with_defaults(RunConfig, saved_run)
    changes = []
    for rule in RULES:
        before, after = rule.of(saved_run), rule.of(now)
        if rule.name == "tokenizer" and None not in tokenizers:
            before, after = (f"content {fingerprint}" for fingerprint in tokenizers)
        if rule.name == "teacher" and None not in teachers and before is not None and after is not None:
            before, after = (
                {**section, "from": None, "cache": None, "content": digest}
                for section, digest in zip((before, after), teachers, strict=True)
            )
        if before != after:
            changes.append(Change(rule, _difference(before, after)))
    if document_ends is not None and document_ends[0] != document_ends[1]:
        changes = _add_document_end(changes, *document_ends)
    was, will = span_lengths(saved_run), span_lengths(now)
    recut = [f"source {name} {was[name]} -> {will[name]}" for name in will if was.get(name, will[name]) != will[name]]
    if recut:
        changes.append(Change(SPANS, f"{', '.join(recut)} tokens"))
    replaced = [name for name in data if name in saved_data and not is_same_data(saved_data[name], data[name])]
    if replaced:
        changes.append(Change(DATA, f"the files of {', '.join(replaced)} differ from the files that were read before"))
    if None not in run_ids and run_ids[0] != run_ids[1]:
        changes.append(
            Change(RUN, f"the checkpoint is of another run ({run_ids[0]}) than this directory ({run_ids[1]})")
        )
    return changes


def _add_document_end(changes: list[Change], before: int | None, after: int | None) -> list[Change]:
    """Return the changes with a changed end of documents, as a part of the change that causes it."""
    what = f"end-of-document id {before} -> {after}"
    rules = [change.rule.name for change in changes]
    cause = next((name for name in ("documents", "tokenizer") if name in rules), None)
    if cause is None:
        return [*changes, Change(next(rule for rule in RULES if rule.name == "documents"), what)]
    return [
        replace(change, what=f"{change.what}, {what}") if change.rule.name == cause else change for change in changes
    ]


def refuse_unless_allowed(changes: list[Change], allow: Collection[str], where: str) -> None:
    """Refuse a resume that would corrupt the run.

    Raises:
        RefusedError: some changes are not allowed; the message lists them and says how to allow them.
    """
    refused = [change for change in changes if change.rule.name not in allow or not change.rule.allowed]
    if not refused:
        return
    lines = [f"{where}: this run differs from the one that was saved:", *(f"  - {change}" for change in refused)]
    possible = [change.rule.name for change in refused if change.rule.allowed]
    if len(possible) == len(refused):
        lines.append(f"to resume anyway: --allow {' '.join(possible)}")
    else:
        final = ", ".join(change.rule.name for change in refused if not change.rule.allowed)
        lines.append(f"{final} cannot change within a run; start a new one with another output and init.from: {where}")
    raise RefusedError("\n".join(lines))


def _difference(before: Any, after: Any, where: str = "") -> str:
    """Describe every difference with its path; the path of a list's entry is its `name`."""
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = [(_name_of(a), a, b) for a, b in zip(before, after, strict=True) if _name_of(a) == _name_of(b)]
    elif isinstance(before, dict) and isinstance(after, dict):
        pairs = [(str(key), before.get(key), after.get(key)) for key in {**before, **after}]
    else:
        pairs = []
    found = [_difference(a, b, ".".join(filter(None, (where, key)))) for key, a, b in pairs if a != b]
    return ", ".join(found) if found else f"{where} {before} -> {after}".lstrip()


def _name_of(entry: Any) -> str:
    return str(entry.get("name", "")) if isinstance(entry, dict) else ""
