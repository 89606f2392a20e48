"""The bundle keeps complete files, and is complete only after its checks; a stand-in for pip downloads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.dev_tools import load_dev_tool

gpu_bundle = load_dev_tool("gpu_bundle")


def _names(folder: Path, manifest: str = "MANIFEST.json") -> list[str]:
    return [package["name"] for package in json.loads((folder / manifest).read_text())["packages"]]


def _add(bundle, name: str, version: str = "1.0", content: str = "content") -> None:
    path = bundle.folder / f"{name}-{version}.whl"
    path.write_text(content)
    bundle.add(name, version, path)


def test_complete_files_are_kept(tmp_path: Path) -> None:
    first = gpu_bundle.Bundle(tmp_path)
    for name in ("a", "b", "c", "d"):
        _add(first, name)
    assert _names(tmp_path, "MANIFEST.partial.json") == ["a", "b", "c", "d"]  # this run is interrupted here
    (tmp_path / "b-1.0.whl").write_text("damaged")
    (tmp_path / "c-1.0.whl").unlink()
    second = gpu_bundle.Bundle(tmp_path)
    assert [second.keep(name, "1.0") for name in ("a", "b", "c", "x")] == [True, False, False, False]
    assert not second.keep("d", "1.1")
    assert _names(tmp_path, "MANIFEST.partial.json") == ["a", "b", "d"]
    second.finish(lambda: None)
    assert _names(tmp_path) == ["a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["MANIFEST.json", "a-1.0.whl"]


def test_a_bundle_is_complete_after_its_checks_only(tmp_path: Path) -> None:
    bundle = gpu_bundle.Bundle(tmp_path)
    _add(bundle, "a")

    def fail() -> None:
        assert (tmp_path / "MANIFEST.json").exists()  # the checks unpack the bundle
        raise gpu_bundle.BundleError("symbols: undefined symbol")

    with pytest.raises(gpu_bundle.BundleError, match="undefined symbol"):
        bundle.finish(fail)
    assert not (tmp_path / "MANIFEST.json").exists()
    again = gpu_bundle.Bundle(tmp_path)
    assert again.keep("a", "1.0")
    again.finish(lambda: None)
    assert _names(tmp_path) == ["a"]
    gpu_bundle.Bundle(tmp_path)  # work on it starts again
    assert not (tmp_path / "MANIFEST.json").exists()


def test_sizes_are_printed_and_limited(tmp_path: Path) -> None:
    for name, size in (("core.so.zst", 6), ("small.whl", 1), ("middle.whl", 2), ("other.whl", 3)):
        (tmp_path / name).write_bytes(bytes(size << 20))
    line = gpu_bundle.check_size(tmp_path, 4 << 20, limit=16 << 20)
    assert line == f"{tmp_path}: 12.0 MiB, the repository 4.0 MiB, together 16.0 of 16 MiB"
    with pytest.raises(
        gpu_bundle.BundleError,
        match=r"together 17\.0 of 16 MiB: too large for one call; the largest files are "
        r"core\.so\.zst 6\.0 MiB, other\.whl 3\.0 MiB, middle\.whl 2\.0 MiB",
    ):
        gpu_bundle.check_size(tmp_path, 5 << 20, limit=16 << 20)


def test_the_repository_is_what_git_does_not_ignore(repository: Path) -> None:
    tracked = (repository / "Makefile").stat().st_size
    assert tracked < gpu_bundle.repository_bytes(repository) < gpu_bundle.MAX_BYTES / 4


def test_a_failed_download_is_named(tmp_path: Path) -> None:
    pip = tmp_path / "python"
    pip.write_text("#!/bin/sh\necho 'ERROR: No matching distribution found' >&2\nexit 1\n")
    pip.chmod(0o755)
    with pytest.raises(gpu_bundle.BundleError, match=r"einops 0\.8\.2: pip download failed:\nERROR: No matching"):
        gpu_bundle.download("einops", "0.8.2", tmp_path, pip)


def test_a_download_is_found_under_the_name_of_the_file(tmp_path: Path) -> None:
    pip = tmp_path / "python"
    pip.write_text(f"#!/bin/sh\ntouch {tmp_path}/PyYAML_x-6.0-cp312-cp312-linux.whl\n")
    pip.chmod(0o755)
    assert gpu_bundle.download("pyyaml-x", "6.0", tmp_path, pip).name == "PyYAML_x-6.0-cp312-cp312-linux.whl"


def test_a_prebuilt_folder_without_the_extension_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = gpu_bundle.read_target.__globals__["Target"](tmp_path, tmp_path, ".cpython-312.so")
    monkeypatch.setattr(gpu_bundle, "read_target", lambda python: target)
    options = gpu_bundle.Options(tmp_path / "out", tmp_path / "python", tmp_path / "cache", prebuilt=tmp_path)
    with pytest.raises(gpu_bundle.BundleError, match=r"transformer_engine_torch\.cpython-312\.so: no such file"):
        gpu_bundle.take_extension(options)


def test_no_registry_is_named() -> None:
    """Downloads follow the user's own pip configuration."""
    source = Path(gpu_bundle.__file__).read_text()
    assert "http" not in source
    assert "index-url" not in source
