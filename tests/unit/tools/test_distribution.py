"""Metadata and content of the source distribution, as setuptools computes them."""

from __future__ import annotations

import email
import subprocess
import sys
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def egg_info(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("egg")
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "megatron_cpt.egg-info"


@pytest.fixture(scope="module")
def metadata(egg_info: Path) -> Message:
    return email.message_from_string((egg_info / "PKG-INFO").read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", ["docs", "examples", "tools"])
def test_the_source_distribution_has_every_file_of_a_folder(egg_info: Path, folder: str) -> None:
    listed = set((egg_info / "SOURCES.txt").read_text(encoding="utf-8").splitlines())
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".md", ".py", ".sh", ".sbatch", ".yaml")]
    assert files
    assert [path for path in files if path.relative_to(ROOT).as_posix() not in listed] == []


def test_the_metadata_say_what_the_package_runs_on(metadata: Message) -> None:
    classifiers = metadata.get_all("Classifier") or []
    assert "Programming Language :: Python :: 3.11" in classifiers
    assert "Operating System :: POSIX :: Linux" in classifiers


def test_every_release_that_the_tests_do_not_know_is_excluded(metadata: Message) -> None:
    requirements = [line.partition(";")[0].strip() for line in metadata.get_all("Requires-Dist") or []]
    bounded = {line for line in requirements if line.startswith(("torch<", "torch>", "megatron-core"))}
    assert len(bounded) == 2
    assert all("<" in line for line in bounded)
