"""Task files of lm-evaluation-harness: found by name, and loaded with their documents."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_cpt.errors import UserError
from megatron_cpt.evaluate.harness_context import MISSING_ADVICE, MissingDataError, harness_errors
from megatron_cpt.evaluate.offline import BUILD_COMMAND, task_folder

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

logger = logging.getLogger(__name__)

_LOADED_CODE = "trust_remote_code"
_NO_TASK = "Unknown config shape"  # says the harness of a YAML file that is neither a task nor a group
_MAX_NOTES = 5


def load_tasks(wanted: Sequence[str], include_path: str | None = None) -> dict[str, Any]:
    """Return the harness's dictionary of tasks and groups.

    Args:
        wanted: tasks, groups, tags, patterns such as `mmlu_*`, or paths of task files.
        include_path: folder with further task files.

    Raises:
        UserError: a task is unknown, cannot be loaded, or asks to run code of others.
        CptError: the disk failed.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"include_path: {include_path}: no such folder; give the folder with the task files")
    with harness_errors("task files: cannot be read"), _notes_of_index() as notes:
        manager = _manager(wanted, include_path)
        names = _matching(wanted, manager, notes)
    for note in notes:
        if _NO_TASK not in note:  # such as a run.yaml in the same folder
            logger.warning("task files: %s", note)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    missing: dict[str, dict[str, None]] = {}
    for name in names:
        try:
            found = _load(name, manager)
        except MissingDataError as error:
            for task_name, reason in _tasks_without_data(name, manager, error.reason).items():
                missing.setdefault(reason, {})[task_name] = None
            continue
        for task_name, task in found["tasks"].items():
            _refuse_other_settings(task_name, task, loaded["tasks"].get(task_name, task))
        if not found["tasks"]:
            raise UserError(f"task {name}: a group without tasks; name some in its file")
        for kind, entries in loaded.items():
            entries.update(found.get(kind, {}))
    if missing:
        raise UserError(_describe_missing(missing))
    return loaded


def _load(name: str, manager: TaskManager) -> dict[str, Any]:
    with harness_errors(f"task {name}: cannot be loaded"):
        entries = _known_entries(name, manager)
        _refuse_code_of_others(name, entries)
        _require_tasks_of_groups(entries, manager)
        return manager.load([name])  # type: ignore[no-any-return]


def _require_tasks_of_groups(entries: Sequence[Any], manager: TaskManager) -> None:
    for entry in entries:
        children = (entry.cfg or {}).get("task")
        for child in children if isinstance(children, list) else ():
            if isinstance(child, str) and child not in manager.task_index:
                hint = _near_name(child, manager, "correct the name, or remove it")
                raise UserError(f"{entry.yaml_path}: lists {child}, which is not a known task, group or tag; {hint}")


def _near_name(name: str, manager: TaskManager, otherwise: str) -> str:
    near = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.7)
    return f"did you mean {near[0]}?" if near else otherwise


def _tasks_without_data(name: str, manager: TaskManager, reason: str) -> dict[str, str]:
    """Return the tasks of a task or group whose data is missing, with what `datasets` says."""
    from lm_eval.tasks._index import Kind

    missing: dict[str, str] = {}
    for entry in _known_entries(name, manager):
        if entry.kind is not Kind.GROUP and entry.name not in missing:
            try:
                _load(entry.name, manager)
            except MissingDataError as error:
                missing[entry.name] = error.reason
    return missing or {name: reason}


def _describe_missing(missing: Mapping[str, Mapping[str, None]]) -> str:
    lines = []
    for reason, (first, *others) in missing.items():
        lines.append(f"  {first}{f' and {len(others)} more' if others else ''}: {reason}")
    return "\n".join([f"tasks: {MISSING_ADVICE}:", *lines])


@contextlib.contextmanager
def _notes_of_index() -> Iterator[list[str]]:
    """Collect the user's files that the harness skips while it lists task files, which it only logs."""
    from lm_eval.tasks import _index

    notes: list[str] = []

    def note(record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if text.startswith(("Skip", "Duplicate")) and str(_own_folder()) not in text and text not in notes:
            notes.append(text)

    handler = logging.Handler()
    handler.emit = note  # type: ignore[method-assign]
    log, level = _index.log, _index.log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield notes
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _refuse_other_settings(name: str, task: Task, other: Task) -> None:
    """Refuse a task that is asked for twice with different settings, because its results have one place."""
    if task is not other and _plain(task.dump_config()) != _plain(other.dump_config()):
        raise UserError(
            f"task {name}: asked for twice with different settings, such as alone and in a group; evaluate them one "
            "after the other, or give one of them another name"
        )


def _plain(settings: dict[str, Any]) -> str:
    return json.dumps(settings, default=lambda value: getattr(value, "__qualname__", str(type(value))), sort_keys=True)


def _manager(wanted: Sequence[str], include_path: str | None) -> TaskManager:
    """Return the index of task files: without the harness's own if others are enough, because 14,000 take seconds."""
    from lm_eval.tasks import TaskManager

    offline = task_folder()
    folders = [str(offline)] if offline.is_dir() else []
    if include_path is not None:  # the last one wins
        folders.append(include_path)
    if folders:
        try:
            own = TaskManager(include_path=folders, include_defaults=False)
            is_enough = all(own.match_tasks([name]) for name in wanted) and _are_complete(wanted, own)
        except TypeError:
            _require_names(folders)
            raise
        if is_enough:
            return own
    return TaskManager(include_path=folders)


def _require_names(folders: Sequence[str]) -> None:
    """Refuse a file with `task: 2024`: the harness sorts all names, and its error names no file."""
    from lm_eval.tasks._index import TaskIndex

    for name, entry in TaskIndex.build(map(Path, folders)).items():
        if not isinstance(name, str):
            where, what = entry.yaml_path, "the name of a task"
            if where is None:
                where, what = f"task {min(entry.tags)}", "a tag"
            raise UserError(f"{where}: {what} is text, not {name!r}; put it in quotes")


def _are_complete(names: Sequence[str], manager: TaskManager) -> bool:
    return all(entry is not None for name in names for entry in _entries(name, manager))


def _matching(names: Sequence[str], manager: TaskManager, notes: Sequence[str]) -> list[str]:
    matching: dict[str, None] = {}
    for name in names:
        found = [name] if name in manager.all_tasks else fnmatch.filter(manager.all_tasks, name)
        if not found and name.endswith(".yaml") and not Path(name).is_file():
            raise UserError(f"task {name}: no such file")
        if not found and not name.endswith(".yaml"):
            hint = _near_name(name, manager, "`lm-eval ls tasks` lists them.")
            raise UserError(
                f"task {name}: not a known task, group or tag; {hint} Task files of your own need --include-path"
                f"{'' if task_folder().is_dir() else f', and `{BUILD_COMMAND}` builds the offline tasks'}"
                + "".join(f"\n  {note}" for note in notes[:_MAX_NOTES])
                + (f"\n  and {len(notes) - _MAX_NOTES} more files" if len(notes) > _MAX_NOTES else "")
            )
        matching.update(dict.fromkeys(found or [name]))
    return list(matching)


def _entries(name: str, manager: TaskManager, parents: tuple[str, ...] = ()) -> Iterator[Any]:
    """Yield the index entry of each task and group that a name stands for; None for a name that the index lacks."""
    from lm_eval.tasks._index import Kind

    for known in [name] if name in manager.task_index else manager.match_tasks([name]):
        entry = manager.task_index[known]
        if known in parents:
            raise UserError(f"{entry.yaml_path}: the group {known} contains itself, by {' > '.join(parents)}")
        if entry.kind is Kind.TAG:
            children: Sequence[Any] = sorted(entry.tags)
        elif entry.kind is Kind.GROUP:
            yield entry
            children = (entry.cfg or {}).get("task") or []
            children = children if isinstance(children, list) else [children]
        else:
            yield entry
            continue
        for child in children:
            if not isinstance(child, str | dict):
                raise UserError(f"{entry.yaml_path}: a group lists names of tasks, not {child!r}; put it in quotes")
            child_name = child if isinstance(child, str) else child.get("task", child.get("group"))
            if isinstance(child_name, str) and child_name in manager.task_index and child_name != known:
                yield from _entries(child_name, manager, (*parents, known))
            elif isinstance(child_name, str) and child_name != known:
                yield None


def _known_entries(name: str, manager: TaskManager) -> list[Any]:
    """Return the index entries of a name, without what the index lacks; none for the path of a file."""
    return [entry for entry in _entries(name, manager) if entry is not None] if name in manager.all_tasks else []


def _refuse_code_of_others(name: str, entries: Sequence[Any]) -> None:
    """Refuse a task file that asks to run a program that comes with its dataset.

    A few of the harness's own files still have the key, which has no effect since datasets 4.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    files = [(entry.yaml_path, entry.cfg) for entry in entries]
    files = files or [(Path(name), load_yaml(Path(name), resolve_func=False, recursive=True))]
    for path, content in files:
        is_own = path is not None and path.is_relative_to(_own_folder())
        if not is_own and _has_key(content, _LOADED_CODE):
            raise UserError(
                f"task {name}: {path} asks to run code that comes with its dataset (dataset_kwargs: {_LOADED_CODE}), "
                "which is never done; remove the key, and name local files"
            )


def _own_folder() -> Path:
    """Return the folder of the harness's own task files."""
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def _has_key(content: Any, key: str) -> bool:
    """Return whether a mapping at any depth has a key with a true value."""
    if isinstance(content, dict):
        return bool(content.get(key)) or any(_has_key(value, key) for value in content.values())
    return isinstance(content, list) and any(_has_key(value, key) for value in content)
