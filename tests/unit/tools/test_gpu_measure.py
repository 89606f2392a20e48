"""The runner of GPU measurements: items that hang, crash or print garbage leave results.json whole and named.

The items are small scripts. Limits are either far longer than a script takes or end one that would never end.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks.gpu.items import ITEMS, PREDICTIONS, Item, Prediction

TOOL = Path(__file__).parents[3] / "tools" / "dev" / "gpu_measure.py"
GENEROUS = 300.0
SHORT = 1.0
START = """
import json, os, pathlib, signal, subprocess, sys, time
options = dict(argument[2:].partition("=")[::2] for argument in sys.argv[1:])
def write(**figures): pathlib.Path(options["figures"]).write_text(json.dumps(figures))
if not os.read(int(options["turn"]), 1): sys.exit()
"""
GOOD = "write(speed=3.0)"
HANGS = "write(speed=1.0); print('started', flush=True); time.sleep(10_000)"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_measure", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(key: str, code: str, *, limit: float = GENEROUS, expected: float = 0.0, is_first: bool = False) -> Item:
    return Item(
        key=key, title=f"item {key}", command=("-c", START + code), expected=expected, limit=limit, is_first=is_first
    )


def measure(tool: ModuleType, folder: Path, items: list[Item], *arguments: str) -> dict[str, Any]:
    tool.main([f"--out={folder / 'out'}", f"--work={folder / 'work'}", *arguments], items=items)
    return read(folder)


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "results.json").read_text())


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        (GOOD, "done", ""),
        ("write(speed=1.0); sys.exit('no kernel image')", "failed", "exit status 1: no kernel image"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "failed", "ended by SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "failed", "ended by SIGKILL; the system may be out of memory"),
        ("raise MemoryError('no 80 GiB')", "failed", "exit status 1: MemoryError: no 80 GiB"),
        ("sys.stdout.buffer.write(bytes(range(256)) * 9000)", "failed", "it wrote no figures"),
        ("pathlib.Path(options['figures']).write_text('{spe')", "failed", "its figures are not JSON"),
        ("pathlib.Path(options['figures']).write_text('[1]')", "failed", "its figures are not a JSON object"),
    ],
)
def test_every_end_of_an_item_has_a_name(tool: ModuleType, tmp_path: Path, code: str, status: str, reason: str) -> None:
    items = measure(tool, tmp_path, [script("1", code), script("2", GOOD)])["items"]
    assert items["1"]["status"] == status
    assert items["1"]["reason"].startswith(reason)
    assert items["2"]["status"] == "done"
    assert items["2"]["figures"] == {"speed": 3.0}


def test_an_item_that_hangs_is_killed_with_its_children_and_keeps_its_figures(tool: ModuleType, tmp_path: Path) -> None:
    child = "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(10_000)'])\n"
    code = child + "print(child.pid, flush=True)\n" + HANGS
    items = measure(tool, tmp_path, [script("1", code, limit=SHORT), script("2", GOOD)])["items"]
    assert items["1"]["status"] == "killed"
    assert items["1"]["reason"] == "reached its limit of 1 s"
    if items["1"]["log_tail"]:  # a busy machine may end the limit before the script has started its child
        assert is_gone(int(items["1"]["log_tail"][0]))
    assert items["2"]["status"] == "done"


def test_children_of_an_item_that_ended_are_gone(tool: ModuleType, tmp_path: Path) -> None:
    code = "print(subprocess.Popen(['sleep', '10000']).pid, flush=True); write(speed=1.0)"
    items = measure(tool, tmp_path, [script("1", code)])["items"]
    assert items["1"]["status"] == "done"
    assert is_gone(int(items["1"]["log_tail"][0]))


def is_gone(pid: int) -> bool:
    """Wait until a process that got SIGKILL is gone, or a zombie of its new parent; return False if it stays."""
    for _ in range(1000):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.02)
    return False


def test_an_item_that_does_not_fit_is_skipped_and_a_shorter_one_runs(tool: ModuleType, tmp_path: Path) -> None:
    items = [script("1", GOOD), script("2", GOOD, expected=2 * GENEROUS), script("3", GOOD)]
    found = measure(tool, tmp_path, items, f"--budget={GENEROUS}")["items"]
    assert [found[key]["status"] for key in "123"] == ["done", "skipped", "done"]
    assert "expects 600 s" in found["2"]["reason"]


def test_the_end_of_the_budget_ends_the_running_item(tool: ModuleType, tmp_path: Path) -> None:
    found = measure(tool, tmp_path, [script("1", HANGS), script("2", GOOD, expected=1.0)], f"--budget={SHORT}")
    assert found["items"]["1"]["status"] == "killed"
    assert found["items"]["1"]["reason"] == "the budget ended"
    assert found["items"]["2"]["status"] == "skipped"


def test_resume_measures_only_missing_items(tool: ModuleType, tmp_path: Path) -> None:
    count = "pathlib.Path(options['work'] + '.runs').open('a').write('x'); write(speed=1.0)"
    measure(tool, tmp_path, [script("1", count), script("2", "sys.exit(1)")])
    found = measure(tool, tmp_path, [script("1", count), script("2", GOOD)], "--resume")
    assert [found["items"][key]["status"] for key in "12"] == ["done", "done"]
    assert (tmp_path / "work" / "1.runs").read_text() == "x"
    with pytest.raises(SystemExit, match="do not mix"):
        measure(tool, tmp_path, [script("1", count)], "--resume", "--rehearse")


def test_resume_keeps_what_it_does_not_measure_again(tool: ModuleType, tmp_path: Path) -> None:
    fails = "print('===== 1 passed'); print('first log'); write(speed=1.0); sys.exit('too slow')"
    measure(tool, tmp_path, [script("1", fails), script("2", GOOD), script("3", fails)])
    out = tmp_path / "out"
    found = measure(tool, tmp_path, [script("2", GOOD)], "--resume")["items"]
    assert [found[key]["status"] for key in "123"] == ["failed", "done", "failed"]
    assert (out / "log.txt").read_text().count("first log") == 2
    assert "item 3 | failed" in (out / "summary.md").read_text()
    # 1 does not fit into the budget, so its record stays; 3 is measured again.
    items = [script("1", GOOD, expected=2 * GENEROUS), script("3", "print('second log'); write(speed=2.0)")]
    found = measure(tool, tmp_path, items, "--resume", f"--budget={GENEROUS}")["items"]
    assert [(found[key]["status"], found[key]["figures"]["speed"]) for key in "123"] == [
        ("failed", 1.0),
        ("done", 3.0),
        ("done", 2.0),
    ]
    log = (out / "log.txt").read_text()
    assert (log.count("first log"), log.count("second log")) == (1, 1)


def test_a_rehearsal_has_more_time_and_judges_nothing(tool: ModuleType, tmp_path: Path) -> None:
    found = measure(tool, tmp_path, [script("4", "write(mfu=0.01)")], "--rehearse")
    assert found["budget_seconds"] == 3600
    (verdict,) = [entry for entry in found["predictions"] if entry["figure"] == "4.mfu"]
    assert (verdict["value"], verdict["verdict"]) == (0.01, "not measured")
    measured = measure(tool, tmp_path / "gpu", [script("4", "write(mfu=0.01)")])
    assert measured["budget_seconds"] == 540
    (verdict,) = [entry for entry in measured["predictions"] if entry["figure"] == "4.mfu"]
    assert verdict["verdict"] == "missed"


def test_the_next_item_imports_early_and_waits_for_its_turn(tool: ModuleType, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    first = f"""
while not os.path.exists({str(ready)!r}): time.sleep(0.01)
write(second_has_begun=os.path.exists({str(ready)!r} + '.begun'))
"""
    early = f"import pathlib; pathlib.Path({str(ready)!r}).touch()\n"
    then = f"pathlib.Path({str(ready)!r} + '.begun').touch(); write(speed=1.0)"
    second = Item(key="2", title="", command=("-c", early + START + then), expected=0, limit=GENEROUS)
    found = measure(tool, tmp_path, [script("1", first), second])["items"]
    assert found["1"]["figures"] == {"second_has_begun": False}
    assert found["2"]["status"] == "done"


def test_nothing_starts_beside_the_item_that_unpacks(tool: ModuleType, tmp_path: Path) -> None:
    started = tmp_path / "started"
    second = Item(
        key="2",
        title="",
        command=("-c", f"import pathlib; pathlib.Path({str(started)!r}).touch()\n" + START + GOOD),
        expected=0,
        limit=GENEROUS,
    )
    first = script("0", f"write(early=os.path.exists({str(started)!r}))", is_first=True)
    found = measure(tool, tmp_path, [first, second])["items"]
    assert found["0"]["figures"] == {"early": False}
    assert found["2"]["status"] == "done"


def test_an_item_that_dies_before_its_turn_is_named(tool: ModuleType, tmp_path: Path) -> None:
    dead = Item(key="2", title="", command=("-c", "raise OSError('libcublas.so')"), expected=0, limit=GENEROUS)
    found = measure(tool, tmp_path, [script("1", GOOD), dead])["items"]
    assert found["2"]["status"] == "failed"
    assert found["2"]["reason"] == "exit status 1: OSError: libcublas.so"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_runner_leaves_whole_results_and_no_process(tmp_path: Path, number: signal.Signals) -> None:
    """The runner is a process of its own here, which the signal ends."""
    reason = "interrupted" if number is signal.SIGINT else f"stopped by {number.name}"
    items = tmp_path / "items.py"
    items.write_text(
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which `nohup` and `&` ignore
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        f"import importlib.util, sys\nspec = importlib.util.spec_from_file_location('gpu_measure', {str(TOOL)!r})\n"
        "tool = sys.modules['gpu_measure'] = importlib.util.module_from_spec(spec); spec.loader.exec_module(tool)\n"
        f"codes = {[START + HANGS, START + GOOD]!r}\n"
        "items = [tool.Item(key=str(i), title='', command=('-c', c), expected=0, limit=1e4)"
        " for i, c in enumerate(codes)]\n"
        f"arguments = ['--out={tmp_path / 'out'}', '--work={tmp_path / 'work'}', '--budget=10000']\n"
        "sys.exit(tool.main(arguments, items=items))"
    )
    with subprocess.Popen([sys.executable, items], stderr=subprocess.PIPE, text=True) as runner:
        log = tmp_path / "work" / "0.log"
        while not (log.exists() and "started" in log.read_text()):
            assert runner.poll() is None
            time.sleep(0.02)
        runner.send_signal(number)
        assert reason in runner.communicate(timeout=GENEROUS)[1]
    found = read(tmp_path)["items"]
    assert found["0"]["status"] == "killed"
    assert found["0"]["figures"] == {"speed": 1.0}
    assert found["1"]["reason"] == reason


def test_predictions_are_met_missed_or_not_measured() -> None:
    figures = {
        "0": {},
        "4": {"mfu": {"median": 0.5, "min": 0.1, "max": 0.9}, "step": 2.0},
        "5": {"step": 1.0, "no": "x"},
    }

    def verdict(figure: str, device: str = "", **bounds: Any) -> str:
        return Prediction(text="", figure=figure, device=device, **bounds).judge(figures, "NVIDIA H100")["verdict"]

    assert verdict("4.mfu", at_least=0.5) == "met"
    assert verdict("4.mfu", at_least=0.51) == "missed"
    assert verdict("4.mfu", at_least=0.4, at_most=0.6) == "met"
    assert verdict("4.step", over="5.step", at_most=1.03) == "missed"
    assert verdict("4.step", over="5.absent", at_most=1.03) == "not measured"
    assert verdict("5.no", at_most=1) == "not measured"
    assert verdict("4.mfu", at_least=0.1, device="H200") == "not measured"
    assert verdict("4.mfu", at_least=0.1, device="h100") == "met"


def test_the_table_is_consistent() -> None:
    keys = [item.key for item in ITEMS]
    assert len(set(keys)) == len(keys)
    root = TOOL.parents[2]
    for item in ITEMS:
        assert (root / item.command[1].replace(".", "/")).with_suffix(".py").exists(), item.command
        assert item.expected < item.limit
    named = [name.partition(".")[0] for each in PREDICTIONS for name in (each.figure, each.over or each.figure)]
    assert set(named) <= set(keys)


def test_items_are_chosen_by_number_or_letter(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert [item.key for item in tool.choose(ITEMS, "1,5")] == ["1", "5a", "5b"]
    assert [item.key for item in tool.choose(ITEMS, "3b")] == ["3b"]
    with pytest.raises(SystemExit, match="no such item"):
        tool.choose(ITEMS, "9")
    assert tool.main(["--list"]) == 0
    text = capsys.readouterr().out
    assert "plain PyTorch, torch.compile" in text
    assert ">= 700 on H100" in text
    assert "a budget of 540 s may skip the last items" in text
    assert tool.main(["--list", "--items=1"]) == 0
    assert "may skip" not in capsys.readouterr().out


def test_the_environment_of_an_item_keeps_caches_out_of_the_tree(tool: ModuleType, tmp_path: Path) -> None:
    options = tool.Options(out=tmp_path / "out", work=tmp_path / "work", bundle=tmp_path)
    found = tool.environment(options)
    assert found["PYTHONPATH"].split(os.pathsep)[:2] == [str(tmp_path / "work" / "site"), str(TOOL.parents[2])]
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TMPDIR"):
        assert found[name].startswith(str(tmp_path / "work"))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"items": {"1": {}}, "is_rehearsal": false, "started": ""}'])
def test_resume_names_a_damaged_file_of_results(tool: ModuleType, tmp_path: Path, content: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text(content)
    with pytest.raises(SystemExit, match="not the results of a measurement"):
        measure(tool, tmp_path, [script("1", GOOD)], "--resume")
    assert (tmp_path / "out" / "results.json").read_text() == content


def test_a_folder_of_results_that_cannot_be_made_is_named(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(SystemExit):
        measure(tool, tmp_path, [script("1", GOOD)])
    assert "File exists; choose another folder" in capsys.readouterr().err


def test_no_process_outlives_results_that_cannot_be_written(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = []

    class Noted(tool.Child):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            children.append(self)

    def disk_is_full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tool, "Child", Noted)
    monkeypatch.setattr(tool, "write_atomically", disk_is_full)
    with pytest.raises(OSError, match="No space left"):
        measure(tool, tmp_path, [script("1", HANGS), script("2", HANGS)])
    assert children
    assert all(child._process.returncode is not None for child in children)
