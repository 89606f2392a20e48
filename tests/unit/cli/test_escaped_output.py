"""Control characters in names, keys, paths and text reach no terminal, whichever command prints them."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.table import Table

import megatron_cpt
from megatron_cpt.cli import main
from megatron_cpt.cli.progress import described_progress
from megatron_cpt.config import dump_yaml
from megatron_cpt.data import IndexedDatasetWriter
from megatron_cpt.files.terminal import escape, escaped_output
from megatron_cpt.views.terminal_console import TerminalConsole

EVIL = "a\x1b]0;t\x07\x1b[2J\x9b1mb\u202ec\rd\ue000"
SHOWN = r"a\x1b]0;t\x07\x1b[2J\u009b1mb\u202ec\rd" + "\ue000"
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


@pytest.fixture
def evil_run(tmp_path: Path) -> Path:
    folder = tmp_path / EVIL
    folder.mkdir()
    with IndexedDatasetWriter(str(folder / "web"), np.uint16) as writer:
        for _ in range(50):
            writer.add_document(np.frombuffer(EVIL.encode() * 4, np.uint8).astype(np.uint16))
    run = {
        "name": EVIL,
        "output": str(folder / "out"),
        "model": {"preset": "tiny_nemotron", "vocab": 257},
        "seq_length": 32,
        "batch": {"global": 8},
        "tokens": 2560,
        "schedule": {"max_lr": 1e-3},
        "sources": {EVIL: {"path": str(folder / "web")}},
        "phases": [{"name": EVIL, "blend": {EVIL: 0.9}}],
    }
    (folder / "run.yaml").write_text(dump_yaml(run), encoding="utf-8")
    return folder


def test_escaped_json_is_json() -> None:
    """Before, `generate --json` printed `\\x7f` inside a string."""
    text = "".join(map(chr, range(0x300))) + "\u2028\u202e"
    assert json.loads(escape(json.dumps(text, ensure_ascii=False))) == text


def test_no_command_prints_a_control_character(evil_run: Path, tmp_path: Path, capfd) -> None:
    run, web = str(evil_run / "run.yaml"), str(evil_run / "web")
    text = evil_run / "in.jsonl"
    text.write_text(json.dumps({"text": EVIL}) + "\n" + json.dumps({EVIL: 1}) + "\n")
    commands = [
        ["plan", run],
        ["plan", run, "--gpus", "8", "--gpu", "h100", "--advise"],
        ["plan", run, f"{EVIL}=1", f"sources.{EVIL}.pth=1"],
        ["plan", f"{run}{EVIL}"],
        ["check", web],
        ["check", f"{web}{EVIL}"],
        ["inspect", web],
        ["inspect", web, "--document", "1", "--tokenizer", "byte"],
        ["merge", "--input", web, web, "--output-prefix", str(evil_run / "two")],
        ["split", "--input", web, "--held-out", str(evil_run / "h"), "--rest", str(evil_run / "r"), "--tokens", "9"],
        ["preprocess", "--input", str(text), "--output-prefix", str(evil_run / "o"), "--tokenizer", EVIL],
        ["preprocess", "--input", str(text), "--output-prefix", str(evil_run / "o"), "--tokenizer", "byte"],
        ["trace", str(evil_run), "--step", "1"],
        ["convert", "import", str(evil_run), str(evil_run / "ckpt")],
        ["convert", "verify", str(evil_run), str(evil_run / "ckpt")],
        [EVIL],
        ["plan", f"--{EVIL}"],
    ]
    shown = ""
    for command in commands:
        main(command)
        captured = capfd.readouterr()
        printed = captured.out + captured.err
        assert printed, command
        assert not UNSAFE.search(printed), (command, UNSAFE.search(printed), printed)
        shown += printed
    assert SHOWN in shown


def test_logs_and_tables_are_escaped_and_styles_are_not() -> None:
    out, log = io.StringIO(), io.StringIO()
    before, sys.stderr = sys.stderr, log
    try:
        with escaped_output():
            logging.StreamHandler().handle(logging.makeLogRecord({"msg": EVIL, "levelno": logging.ERROR}))
            print("\ud800", file=sys.stderr)
    finally:
        sys.stderr = before
    assert log.getvalue() == f"{SHOWN}\n\\ud800\n"
    console = TerminalConsole(file=out, force_terminal=True, width=200)
    table = Table(title=EVIL, title_style="bold")
    table.add_column(EVIL)
    table.add_row(EVIL)
    console.print(table)
    assert not UNSAFE.search(re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()))
    assert "\x1b[1m" in out.getvalue()
    assert escape("tab\tand\nline") == "tab\tand\nline"


def test_tables_are_shown_on_one_console_only() -> None:
    package = Path(megatron_cpt.__file__).parent
    users = [path.name for path in package.rglob("*.py") if re.search(r"rich.*import.*\bConsole\b", path.read_text())]
    assert users == ["terminal_console.py"]


def test_a_progress_bar_keeps_its_own_control_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar was shown as the text `\\x1b[2K`: while it runs, rich puts another stream in the place of ours."""
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    clear = "\x1b[2J"
    with escaped_output(), described_progress() as (show, notify):
        show(1, 4, clear)
        notify(clear)
        print(f"printed: {clear}", file=sys.stderr)
    text = shown.getvalue()
    assert "\x1b[2K" in text, "rich erases the line of the bar"
    assert r"\x1b[2K" not in text
    assert clear not in text
    assert r"note: \x1b[2J" in text
    assert "printed: " in text
