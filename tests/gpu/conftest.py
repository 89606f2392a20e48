"""What the tests of this folder ask of the machine, and why they skip."""

from __future__ import annotations

import pytest
import torch

from megatron_cpt.errors import UserError


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test here needs a device; those with `te` also Transformer Engine."""
    from megatron_cpt.model.machine import read_machine

    here = [item for item in items if "tests/gpu/" in item.path.as_posix()]
    if not here:
        return
    machine = read_machine()
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if machine.device is None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif item.get_closest_marker("te") and machine.transformer_engine is None:
            item.add_marker(pytest.mark.skip(reason=f"needs Transformer Engine; this machine has {machine}"))


@pytest.fixture
def can_compute():
    """Skip a test whose precision this GPU lacks, in the words that a user would read."""
    from megatron_cpt.config import draft_config
    from megatron_cpt.model.machine import check_machine, read_machine
    from tests.unit.test_machine import RUN

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
