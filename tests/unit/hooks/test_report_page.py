"""report.html and events.jsonl of a running job."""

from __future__ import annotations

from types import SimpleNamespace

import orjson
import pytest

from megatron_cpt.backend.process_age import seconds_since_process_start
from megatron_cpt.hooks import event_log, report_page
from megatron_cpt.hooks.event_log import EventsFile
from megatron_cpt.hooks.report_page import ReportPage
from tests.helpers.report_runs import training_line, write_run


def session(folder, *, step=200, is_main=True, is_resumed=False):
    return SimpleNamespace(
        output=folder,
        origin=None,
        is_resumed=is_resumed,
        state=SimpleNamespace(step=step),
        meter=SimpleNamespace(pause=1.5),
        ranks=SimpleNamespace(is_main=is_main, world_size=4, device=SimpleNamespace(type="cpu")),
    )


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run")


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(report_page.time, "monotonic", lambda: self.now)


def test_the_page_follows_the_run_and_takes_at_most_a_hundredth_of_its_time(folder, monkeypatch):
    clock, hook, page = Clock(monkeypatch), ReportPage(), folder / "report.html"

    def write(readers, path, original=report_page.write_page):
        original(readers, path)
        clock.now += 2.0

    monkeypatch.setattr(report_page, "write_page", write)
    hook.on_validation(session(folder), {})
    first = page.read_text()
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(orjson.dumps(training_line(210)) + b"\n")
    clock.now += 199.0
    hook.on_validation(session(folder), {})
    assert page.read_text() == first
    clock.now += 1.0
    hook.on_validation(session(folder), {})
    assert "210K tokens" in page.read_text()
    page.unlink()
    hook.on_end(session(folder))
    assert page.exists(), "the last page is always written"


def test_a_page_that_cannot_be_written_is_one_warning(folder, caplog):
    (folder / "report.html").mkdir()
    hook = ReportPage()
    hook._next_time = -1.0
    for _ in range(2):
        hook.on_validation(session(folder), {})
        hook.on_end(session(folder))
    assert len(caplog.records) == 1
    assert f"{folder}/report.html cannot be written (UserError: " in caplog.text
    (folder / "report.html").rmdir()
    hook.on_end(session(folder))
    assert (folder / "report.html").is_file()


def test_only_the_main_rank_writes(folder):
    other = session(folder, is_main=False)
    events = (folder / "events.jsonl").read_bytes()
    for hook in (ReportPage(), EventsFile()):
        hook.on_start(other)
        hook.on_validation(other, {})
        hook.on_stop(other, "")
        hook.on_end(other)
    assert not (folder / "report.html").exists()
    assert (folder / "events.jsonl").read_bytes() == events


def test_a_start_names_the_checkpoints_that_it_has_skipped(tmp_path):
    for step in (100, 120, 140):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    hook = EventsFile()
    hook.on_start(session(tmp_path, step=100, is_resumed=True))
    hook.on_stop(session(tmp_path, step=130), "stopped by SIGTERM")
    start, stop = [orjson.loads(line) for line in (tmp_path / "events.jsonl").read_bytes().splitlines()]
    assert (start["event"], start["step"], start["resumed"], start["ranks"]) == ("start", 100, True, 4)
    assert start["skipped_checkpoints"] == ["step-00000120", "step-00000140"]
    assert 0 < start["startup_seconds"] == pytest.approx(seconds_since_process_start(), abs=60)
    assert set(start["versions"]) == {"megatron_cpt", "torch", "megatron-core"}
    assert (stop["event"], stop["reason"], stop["pause_seconds"]) == ("stop", "stopped by SIGTERM", 1.5)


@pytest.mark.parametrize("error", [FileNotFoundError("/proc"), AttributeError("CLOCK_BOOTTIME"), IndexError(19)])
def test_an_unknown_age_of_the_process_is_null(tmp_path, monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(event_log, "seconds_since_process_start", fail)
    EventsFile().on_start(session(tmp_path))
    assert orjson.loads((tmp_path / "events.jsonl").read_bytes())["startup_seconds"] is None


def test_events_that_cannot_be_written_are_a_warning(tmp_path, caplog):
    (tmp_path / "events.jsonl").mkdir()
    EventsFile().on_start(session(tmp_path))
    assert "events.jsonl: cannot be written: Is a directory" in caplog.text
