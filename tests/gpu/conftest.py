"""Skip tests that this machine cannot run, and report at the end which tests ran on which device."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

from megatron_cpt.errors import UserError

# cuBLAS reads it when CUDA starts, which an earlier test of the process may cause; deterministic runs need it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

HERE = "tests/gpu/"
REHEARSAL = "GPU_TESTS_REHEARSAL"
"""Environment variable: run the tests that need no Transformer Engine on a CPU, to test their code."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip them without a CUDA device or, with `te`, without Transformer Engine."""
    from megatron_cpt.model.capabilities import read_machine

    here = [item for item in items if HERE in item.path.as_posix()]
    if not here:
        return
    machine = read_machine()
    for item in here:
        item.add_marker(pytest.mark.gpu)
        is_rehearsed = REHEARSAL in os.environ and not item.get_closest_marker("te")
        if machine.device is None and not is_rehearsed:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif item.get_closest_marker("te") and machine.transformer_engine is None:
            item.add_marker(pytest.mark.skip(reason=f"needs Transformer Engine; this machine has {machine}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skip a rehearsed test that asks for what a CPU does not have, such as an attention kernel."""
    try:
        return (yield)
    except UserError as error:
        if REHEARSAL in os.environ and HERE in item.path.as_posix():
            pytest.skip(str(error))
        raise


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print device, versions, and the tests that ran or were skipped; docs/operations/gpu.md quotes these lines."""
    from megatron_cpt.model.capabilities import read_machine

    def reports(outcome: str) -> list[pytest.TestReport]:
        found = terminalreporter.getreports(outcome)
        return [report for report in found if getattr(report, "nodeid", "").startswith(HERE)]

    ran = {outcome: reports(outcome) for outcome in ("passed", "failed", "error")}
    skipped = reports("skipped")
    if not skipped and not any(ran.values()):
        return
    terminalreporter.section("tests on a GPU")
    terminalreporter.line(f"{read_machine()}; {', '.join(_versions())}")
    for outcome, found in ran.items():
        for name, count in _by_test(found):
            terminalreporter.line(f"{outcome}: {name} ({count})")
    terminalreporter.line(f"total: {', '.join(f'{outcome} {len(found)}' for outcome, found in ran.items())}")
    for reason, count in Counter(_reason(report) for report in skipped).items():
        terminalreporter.line(f"skipped {count}: {reason}")


def _by_test(reports: Sequence[pytest.TestReport]) -> list[tuple[str, int]]:
    """Count the reports of each test over its parameters."""
    return sorted(Counter(report.nodeid.removeprefix(HERE).partition("[")[0] for report in reports).items())


def _reason(report: pytest.TestReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def _versions() -> Iterator[str]:
    for package in ("torch", "megatron-core", "transformer-engine", "apex"):
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            yield f"no {package}"


@pytest.fixture
def can_compute():
    """Return a function that skips the test if this GPU does not support the overrides."""
    from megatron_cpt.config import draft_config
    from megatron_cpt.model.capabilities import check_machine, read_machine
    from tests.unit.model.test_capabilities import RUN

    def check(*overrides: str) -> None:
        try:
            check_machine(draft_config(dict(RUN), list(overrides)).finish("run.yaml"), read_machine())
        except UserError as error:
            pytest.skip(str(error))

    return check


@pytest.fixture(autouse=True)
def _without_tf32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
