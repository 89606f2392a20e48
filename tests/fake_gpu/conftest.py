"""Mark the tests of this folder `fake_gpu`: `make test-fake-gpu` runs them, with Python 3.12 and torch for CUDA."""

from __future__ import annotations

import pytest

HERE = "tests/fake_gpu/"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder."""
    for item in items:
        if HERE in item.path.as_posix():
            item.add_marker(pytest.mark.fake_gpu)
