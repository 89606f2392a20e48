"""Starts of a run whose folder is not as the run left it: checkpoints gone, copied, renamed, or of another run."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.manifest import digest, find_faults, manifest_text
from megatron_cpt.errors import CptError
from megatron_cpt.provenance.plans_file import read_started_run
from tests.fixtures.make_run_directories import COMMITS, RUN
from tests.helpers.checkpoints import differing
from tests.helpers.formats import unpack
from tests.helpers.ranks import context, run_ranks
from tests.helpers.runs import newest, train_with_hooks

RUNS = [name for name in COMMITS if name.startswith("run")]


@dataclass
class Start:
    """One call of `train` and what it did.

    Attributes:
        folder: run.yaml, data/ and the run directory `run`.
        error: name and text of the error; empty without one.
        messages: log messages of level warning.
    """

    folder: Path
    overrides: Sequence[str] = ("stop_at_step=3",)
    allow: Sequence[str] = ()
    restart: bool = False
    fails_at: int | None = None
    status: int | None = None
    error: str = ""
    messages: list[str] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    def warning(self, text: str) -> str:
        """Return the only warning with a text."""
        (found,) = [message for message in self.messages if text in message]
        return found


def start_all(starts: Sequence[Start]) -> list[Start]:
    """Train one after the other in this process."""
    for start in starts:
        _start(start)
    return list(starts)


def _start(start: Start) -> None:
    from megatron_cpt.hooks import Hook

    class Failure(Hook):
        def on_step(self, session: Any) -> None:
            if session.state.step == start.fails_at:
                raise RuntimeError("killed")

    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: start.messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_cpt").addHandler(handler)
    overrides = [f"output={start.run}", f"sources.web.path={start.folder}/data/web", *start.overrides]
    try:
        start.status = train_with_hooks(
            str(start.folder / "run.yaml"), overrides, hooks=[Failure()], allow=start.allow, restart=start.restart
        )
    except (CptError, RuntimeError) as error:
        start.error = f"{type(error).__name__}: {error}"
    finally:
        logging.getLogger("megatron_cpt").removeHandler(handler)


def prepared(folder: Path, name: str = "run_2", **changes: Any) -> Start:
    """Return a start in an unpacked run directory, which has steps 1 and 2 and the checkpoint of step 2."""
    unpack(name, folder)
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN, sort_keys=False))
    return Start(folder, **changes)


def without_checkpoints(start: Start) -> Start:
    shutil.rmtree(start.checkpoints)
    return start


def train(*starts: Start) -> list[Start]:
    """Call `train` for each start, one after the other, in one new process; return them with what they did."""
    (done,) = run_ranks(1, start_all, list(starts))
    return done


def content(folder: Path) -> dict[str, bytes]:
    """Return the files of a run directory."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- checkpoints that are gone -----------------------------------------------------------------------------------------


def _emptied(start: Start) -> None:
    start.checkpoints.mkdir()


def _only_latest(start: Start) -> None:
    start.checkpoints.mkdir()
    (start.checkpoints / "latest").write_text("step-00000002\n")


def _only_metrics(start: Start) -> None:
    for name in ("run.yaml", "plan.json", "plans.jsonl"):
        (start.run / name).unlink()


def _damaged_plans(start: Start) -> None:
    (start.run / "plans.jsonl").write_text("{")


def test_a_run_without_its_checkpoints_is_refused_and_nothing_of_it_changes(tmp_path: Path) -> None:
    changes: list[Callable[[Start], object]] = [
        lambda start: None,
        _emptied,
        _only_latest,
        _only_metrics,
        _damaged_plans,
    ]
    starts = [without_checkpoints(prepared(tmp_path / name, name)) for name in RUNS]
    for change in changes:
        starts.append(without_checkpoints(prepared(tmp_path / change.__name__.strip("<>"))))
        change(starts[-1])
    for name in ("run.yaml", "plan.json", "metrics.jsonl"):
        starts.append(prepared(tmp_path / f"other-{name}"))
        shutil.rmtree(starts[-1].run)
        starts[-1].run.mkdir()
        (starts[-1].run / name).write_text("of somebody else\n")
    before = [content(start.run) for start in starts]
    starts = train(*starts)
    for start, files in zip(starts, before, strict=True):
        assert start.error.startswith(f"RefusedError: output: {start.run}: no checkpoint, but "), start
        assert "restart" in start.error
        named = start.error.partition("no checkpoint, but ")[2].partition(": ")[0].split(", ")
        assert set(named) == {name for name in files if "damaged" not in name}
        assert content(start.run) == files
        if start.folder.name.startswith("other"):
            assert "these files are of another program" in start.error
    known = starts[RUNS.index("run_2")]
    assert f"the checkpoints of this run are gone or not mounted: restore or mount {known.checkpoints}" in known.error


def test_the_users_own_run_file_may_lie_in_the_output_and_is_kept(tmp_path: Path) -> None:
    start = without_checkpoints(prepared(tmp_path, overrides=["stop_at_step=1"]))
    shutil.rmtree(start.run)
    start.run.mkdir()
    written = "# mine\n" + yaml.safe_dump({**RUN, "output": str(start.run)}, sort_keys=False)
    (start.run / "run.yaml").write_text(written)
    (done,) = train(start)
    assert (done.error, done.status) == ("", 0)
    assert (start.run / "run.given.yaml").read_text() == written
    assert "mine" not in (start.run / "run.yaml").read_text()


def test_restart_keeps_the_earlier_files_and_a_run_that_never_saved_starts_over(tmp_path: Path) -> None:
    first = without_checkpoints(prepared(tmp_path, restart=True, fails_at=2, overrides=["stop_at_step=2"]))
    (first.run / "tensorboard").mkdir()
    _only_latest(first)
    earlier, was = content(first.run), read_started_run(first.run)
    again = Start(tmp_path, overrides=["stop_at_step=2"])
    restart_in_script = Start(tmp_path, restart=True)
    first, again, restart_in_script = train(first, again, restart_in_script)

    assert first.error == "RuntimeError: killed"
    aside = tmp_path / "run" / "before-restart-1"
    names = {"metrics.jsonl", "plan.json", "plans.jsonl", "run.yaml"}
    assert content(aside) == {name: earlier[name] for name in names}
    assert (aside / "tensorboard").is_dir()

    assert (again.status, again.error) == (0, "")
    assert "starts over and the lines of that run are dropped" in again.warning("metrics.jsonl")
    now = read_started_run(tmp_path / "run")
    assert was is not None
    assert now is not None
    assert now.run_id not in (None, was.run_id)
    assert now.has_saved

    assert restart_in_script.status == 0
    assert "--restart: " in restart_in_script.warning("has checkpoints, so the run resumes")
    assert not (tmp_path / "run" / "before-restart-2").exists()
    assert newest(tmp_path / "run").name == "step-00000003"


# -- checkpoints under other names -------------------------------------------------------------------------------------


def test_a_copy_under_another_name_is_never_the_newest(tmp_path: Path) -> None:
    start = prepared(tmp_path, overrides=["stop_at_step=4", "checkpoint.every=1"])
    shutil.copytree(start.checkpoints / "step-00000002", start.checkpoints / "step-00000099")
    assert layout.resolve_checkpoint(start.run).name == "step-00000002"
    start, again = train(start, Start(tmp_path, overrides=["stop_at_step=5"]))
    for one in (start, again):
        assert one.status == 0
        assert "is under another name and is skipped: it holds step 2" in one.warning("step-00000099")
    steps = [json.loads(line)["step"] for line in (start.run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]
    assert newest(start.run).name == "step-00000005"


def test_only_copies_under_other_names_are_refused(tmp_path: Path) -> None:
    start = prepared(tmp_path)
    (start.checkpoints / "step-00000002").rename(start.checkpoints / "step-00000099")
    (start,) = train(start)
    assert "RefusedError" in start.error
    assert "step-00000099: it holds step 2; remove it, or name it after its step" in start.error


def test_a_checkpoint_of_another_run_is_refused_unless_allowed(tmp_path: Path) -> None:
    other = prepared(tmp_path / "other")
    shutil.rmtree(other.run)
    (other,) = train(other)
    assert other.status == 0
    own = prepared(tmp_path / "own", overrides=["stop_at_step=4"])
    shutil.copytree(newest(other.run), own.checkpoints / "step-00000003")
    before = content(own.run)
    (refused,) = train(own)
    assert "- run: the checkpoint is of another run" in refused.error
    assert "to resume anyway: --allow run" in refused.error
    assert content(own.run) == before
    allowed, later = train(
        Start(own.folder, overrides=own.overrides, allow=["run"]), Start(own.folder, overrides=["stop_at_step=5"])
    )
    assert (allowed.status, later.status) == (0, 0)
    ids = {
        json.loads((path / "state.json").read_text())["run_id"] for path in sorted(own.checkpoints.glob("step-*"))[1:]
    }
    now, others = read_started_run(own.run), read_started_run(other.run)
    assert now is not None
    assert others is not None
    assert ids == {now.run_id} == {others.run_id}


def test_a_checkpoint_without_run_id_is_used_with_a_warning(tmp_path: Path) -> None:
    start, old = prepared(tmp_path / "new"), prepared(tmp_path / "old", "run_1_last")
    shutil.rmtree(start.checkpoints)
    shutil.copytree(old.checkpoints, start.checkpoints)
    (start,) = train(start)
    assert start.status == 0
    assert "so it may be of another run" in start.warning("without run ids")


def _latest_folder(checkpoints: Path) -> None:
    (checkpoints / "latest").mkdir()
    (checkpoints / "latest" / "file").touch()


ODD_LATEST: dict[str, Callable[[Path], object]] = {
    "folder": _latest_folder,
    "dangling": lambda checkpoints: (checkpoints / "latest").symlink_to("step-00000099"),
    "link": lambda checkpoints: (checkpoints / "latest").symlink_to("step-00000002"),
    "pipe": lambda checkpoints: os.mkfifo(checkpoints / "latest"),
}
ODD_NAMES: dict[str, Callable[[Path], object]] = {
    "step-٠٠٠٠٠٠٩٩": Path.mkdir,
    "step-0000000099": Path.mkdir,
    "step-00000099": os.mkfifo,
    "step-00000098": Path.touch,
    "step-00000097": lambda path: path.symlink_to("nowhere"),
    "step-99": Path.mkdir,
    "step-\udcff": Path.mkdir,
}


def test_odd_names_are_ignored_with_a_warning_and_block_nothing(tmp_path: Path) -> None:
    starts = []
    for kind, make in ODD_LATEST.items():
        starts.append(prepared(tmp_path / kind))
        (starts[-1].checkpoints / "latest").unlink()
        make(starts[-1].checkpoints)
    for name, make in ODD_NAMES.items():
        starts.append(prepared(tmp_path / f"{len(starts)}"))
        make(starts[-1].checkpoints / name)
    pipe = prepared(tmp_path / "manifest")
    damaged = pipe.checkpoints / "step-00000099"
    damaged.mkdir()
    os.mkfifo(damaged / "manifest.json")
    utf8 = prepared(tmp_path / "utf8")
    (utf8.checkpoints / "latest").write_bytes(b"\xff\xfe")
    *starts, pipe, utf8 = train(*starts, pipe, utf8)
    for start, name in zip(starts, [*["latest"] * len(ODD_LATEST), *ODD_NAMES], strict=True):
        assert (start.status, start.error) == (0, ""), start
        assert start.warning("ignored, since they are neither").endswith(f": {name}")
        assert (start.checkpoints / "step-00000003").is_dir()
    assert pipe.status == 0
    assert "step-00000099 is corrupt and is skipped" in pipe.warning("manifest.json")
    assert (utf8.status, newest(utf8.run).name) == (0, "step-00000003")


# -- all formats -------------------------------------------------------------------------------------------------------


def test_runs_of_every_format_resume_and_equal_formats_of_one_arithmetic_give_equal_bits(tmp_path: Path) -> None:
    starts = train(*(prepared(tmp_path / name, name) for name in RUNS))
    assert [(start.status, start.error) for start in starts] == [(0, "")] * len(RUNS)
    ends = {name: start.checkpoints / "step-00000003" for name, start in zip(RUNS, starts, strict=True)}
    # up to run_1_xxh3, rows of padding took part in the softmax
    for first, others in (("run_1_first", RUNS[1:4]), ("run_1_last", RUNS[5:])):
        for other in others:
            assert differing(ends[first], ends[other]) == [], (first, other)
    for start in starts:
        started = read_started_run(start.run)
        assert started is not None
        assert started.run_id is not None
        assert started.has_saved


# -- bounded work ------------------------------------------------------------------------------------------------------


def open_newest(folder: Path) -> tuple[str, set[str]]:
    """Return the name of the newest valid checkpoint, and all checkpoints whose folder or files were touched."""
    from megatron_cpt.checkpoint.loading.find_valid import find_valid, newest_valid

    opened: set[str] = set()

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir") and arguments and isinstance(arguments[0], str | os.PathLike):
            parts = Path(arguments[0]).parts
            opened.update(part for part in parts[-2:] if part.startswith("step-"))

    sys.addaudithook(note)
    saved = newest_valid(folder)
    assert saved is not None
    assert find_valid(folder).path == saved.path
    return saved.path.name, opened


def test_only_the_newest_of_10000_checkpoints_is_opened(tmp_path: Path) -> None:
    for step in range(1, 10_000):
        (tmp_path / layout.checkpoint_name(step)).mkdir()
    path = tmp_path / layout.checkpoint_name(10_000)
    path.mkdir()
    for name in (".metadata", "metadata.json", "__0_0.distcp"):
        (path / name).touch()
    (path / "run.yaml").write_text("name: small\n")
    (path / "state.json").write_text('{"format_version": 2, "train": {"step": 10000}}')
    (path / "manifest.json").write_text(manifest_text({file.name: digest(file) for file in path.iterdir()}))
    assert run_ranks(1, open_newest, tmp_path) == [(path.name, {path.name})]


# -- disks that refuse a save ------------------------------------------------------------------------------------------


def save_with_errors(start: Start, failures: Sequence[int]) -> list[Start]:
    """Start a run once per error number, which every fsync below the new checkpoint gives, and once without."""
    done = []
    for number in failures:
        one, fsync = Start(start.folder), os.fsync

        def failing(fd: Any, number: int = number, fsync: Callable[[Any], None] = fsync) -> None:
            fd = fd if isinstance(fd, int) else fd.fileno()
            if ".step-00000003.tmp" in os.readlink(f"/proc/self/fd/{fd}"):
                raise OSError(number, os.strerror(number))
            fsync(fd)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", failing)
            _start(one)
        done.append(one)
    return [*done, *start_all([start])]


def test_a_save_that_the_disk_refuses_is_one_error_and_the_run_resumes(tmp_path: Path) -> None:
    failures = [errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOSPC]
    start, quiet = prepared(tmp_path / "disk"), prepared(tmp_path / "quiet")
    ((*failed, healed),) = run_ranks(1, save_with_errors, start, failures)
    for one, number in zip(failed, failures, strict=True):
        assert one.error.startswith("CptError: the checkpoint of step 3 was not written: rank 0: ")
        assert os.strerror(number) in one.error
        assert "earlier checkpoints are unchanged" in one.error
    assert healed.status == 0
    train(quiet)
    assert differing(newest(healed.run), newest(quiet.run)) == []
    assert sorted(path.name for path in healed.checkpoints.iterdir()) == ["latest", "step-00000002", "step-00000003"]


# -- suspended in a save -----------------------------------------------------------------------------------------------


def stop_at_every_change(start: Start, results: Any) -> None:
    """Train in a child that stops itself (SIGSTOP) before every change of its checkpoints; look, and let it continue.

    Puts the names of the valid and of all published checkpoints at each stop into the queue, and the exit status.
    """
    pid = os.fork()
    if pid == 0:
        sys.addaudithook(_stop_before_changes(str(start.checkpoints)))
        status = 1
        try:
            _start(start)
            status = start.status if start.status is not None else 1
        finally:
            os._exit(status)
    while True:
        _, status = os.waitpid(pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            break
        published = layout.list_checkpoints(start.checkpoints)
        results.put([(path.name, find_faults(path)) for path in published])
        os.kill(pid, signal.SIGCONT)
    results.put(os.waitstatus_to_exitcode(status))


def _stop_before_changes(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    def stop(event: str, arguments: tuple[Any, ...]) -> None:
        is_change = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir") or (
            event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        )
        if is_change and str(arguments[0]).startswith(folder):
            os.kill(os.getpid(), signal.SIGSTOP)

    return stop


def test_a_run_suspended_at_any_change_of_a_save_has_valid_checkpoints_and_continues(tmp_path: Path) -> None:
    overrides = ["stop_at_step=4", "checkpoint.every=1", "checkpoint.keep=1", "checkpoint.async=true"]
    start, quiet = (
        prepared(tmp_path / "stopped", overrides=overrides),
        prepared(tmp_path / "quiet", overrides=overrides),
    )
    results = context.Queue()
    process = context.Process(target=stop_at_every_change, args=(start, results))
    process.start()
    seen = []
    while not isinstance(found := results.get(timeout=240), int):
        seen.append(found)
    process.join()
    assert found == 0
    assert len(seen) > 20
    for published in seen:
        assert published
        assert [faults for _, faults in published if faults] == []
    train(quiet)
    assert differing(newest(start.run), newest(quiet.run)) == []
