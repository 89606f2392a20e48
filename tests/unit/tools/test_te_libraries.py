"""Transformer Engine's extension is built in steps that resume; missing symbols of a library are named."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.helpers.dev_tools import FOLDER, load_dev_tool

te_extension = load_dev_tool("te_extension")

ARCHIVE = "transformer_engine_torch-2.12.0"
ONE = 'extern "C" int two();\nextern "C" __attribute__((visibility("default"))) int one() { return two() + NUMBER; }\n'
TWO = 'extern "C" int two() { return 2; }\n'


def write_archive(folder: Path, sources: dict[str, str]) -> Path:
    headers = {"extensions.h": "#define NUMBER 40\n", "pybind.h": "", "common.h": ""}
    root = folder / "source" / ARCHIVE
    for name, content in {**headers, **sources}.items():
        path = root / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    archive = folder / f"{ARCHIVE}.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(root, ARCHIVE)
    return archive


@pytest.fixture(autouse=True)
def _without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(te_extension, "_LIBRARIES", ())  # torch's CUDA libraries


def test_a_build_resumes(tmp_path: Path) -> None:
    archive = write_archive(tmp_path, {"one.cpp": ONE, "more/two.cpp": "no C++"})
    work = tmp_path / "work"
    with pytest.raises(te_extension.BundleError, match=r"more_two\.o: the compiler failed:\n(.|\n)*two\.cpp"):
        te_extension.build(archive, tmp_path, work, Path(sys.executable))
    objects = work / "objects"
    assert sorted(path.name for path in objects.iterdir()) == ["one.o", "prefix.h", "prefix.h.gch"]
    before = (objects / "one.o").stat().st_mtime_ns
    archive = write_archive(tmp_path, {"more/two.cpp": TWO})
    library = te_extension.build(archive, tmp_path, work, Path(sys.executable))
    assert (objects / "one.o").stat().st_mtime_ns == before
    assert library.name == f"transformer_engine_torch{te_extension.read_target(Path(sys.executable)).suffix}"
    code = f"import ctypes; print(ctypes.CDLL({str(library)!r}).one())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "42\n"


def test_no_compiler_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = write_archive(tmp_path, {"one.cpp": ONE})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(te_extension.BundleError, match=r"g\+\+: No such file or directory; install a C\+\+ compiler"):
        te_extension.build(archive, tmp_path, tmp_path / "work", Path(sys.executable))


def test_missing_symbols_are_named(tmp_path: Path) -> None:
    for name, source in (("one", ONE.replace("NUMBER", "1")), ("two", TWO)):
        (tmp_path / f"{name}.cpp").write_text(source)
        library = tmp_path / f"{name}.so"
        subprocess.run(["g++", "-shared", "-fPIC", str(tmp_path / f"{name}.cpp"), "-o", str(library)], check=True)
    command = [sys.executable, str(FOLDER / "te_symbols.py")]
    alone = subprocess.run([*command, str(tmp_path / "one.so")], capture_output=True, text=True, check=False)
    assert alone.returncode == 1
    assert alone.stdout.splitlines()[1:] == ["one.so: undefined symbol: two"]
    both = [str(tmp_path / name) for name in ("two.so", "one.so")]
    done = subprocess.run([*command, *both], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.splitlines()[1:] == ["two.so: every symbol is resolved", "one.so: every symbol is resolved"]
