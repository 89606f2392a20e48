"""Offline tasks built from tiny packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_cpt.evaluate.offline.build_tasks import build
from tests.helpers.task_packages import packages, write_packages


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_packages(folder / "packages", packages())
    build(folder)
    return folder
