"""A bundle is unpacked as an installer would: versions, metadata, libraries; damaged bundles are named."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests.helpers.dev_tools import FOLDER, load_dev_tool

gpu_site = load_dev_tool("gpu_site")

CORE, EXTENSION = "transformer_engine_cu13", "transformer_engine_torch"
PYTHON = ".".join(map(str, sys.version_info[:2]))
ONNX_USER = "import onnxscript\nfrom onnxscript import opset18 as op\nfrom onnx import defs\n" + (
    "trt = onnxscript.values.Opset('trt', version=1)\nschema = defs.OpSchema(name='x', inputs=[defs.OpSchema.A('y')])\n"
    "def f(a: onnxscript.onnx_types.TensorType) -> onnxscript.onnx_types.UINT8: ...\n"
)


def wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> dict[str, Any]:
    path = folder / f"{name}-{version}-py3-none-any.whl"
    metadata = {f"{name}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"}
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in {**files, **metadata}.items():
            archive.writestr(member, content)
    return entry(path, name, version)


def entry(path: Path, name: str, version: str, **more: Any) -> dict[str, Any]:
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"name": name, "version": version, "file": path.name, "sha256": checksum, **more}


def write_manifest(folder: Path, packages: list[dict[str, Any]], python: str = PYTHON) -> None:
    (folder / "MANIFEST.json").write_text(json.dumps({"python": python, "packages": packages}))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle with a package, zstandard, and Transformer Engine in three parts."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    core = folder / f"{CORE}.so.zst"
    core.write_bytes(zstandard.ZstdCompressor().compress(b"core library" * 1000))
    (folder / f"{EXTENSION}.so").write_bytes(b"extension")
    package = {"pkg/__init__.py": "", "pkg-1.5.data/purelib/pkg/more.py": "", "pkg-1.5.data/scripts/tool": ""}
    write_manifest(
        folder,
        [
            wheel(folder, "pkg", "1.5", package),
            wheel(folder, "transformer_engine", "2.12.0", {"transformer_engine/__init__.py": ONNX_USER}),
            entry(core, CORE, "2.12.0"),
            entry(folder / f"{EXTENSION}.so", EXTENSION, "2.12.0"),
        ],
    )
    return folder


def packages_of(bundle: Path) -> list[dict[str, Any]]:
    packages: list[dict[str, Any]] = json.loads((bundle / "MANIFEST.json").read_text())["packages"]
    return packages


def test_versions_and_metadata(bundle: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    versions = gpu_site.unpack(bundle, site)
    assert versions == {"pkg": "1.5", "transformer_engine": "2.12.0", CORE: "2.12.0", EXTENSION: "2.12.0"}
    found = {d.metadata["Name"]: d for d in distributions(path=[str(site)])}
    assert {name: distribution.version for name, distribution in found.items()} == versions
    assert [str(file) for file in found[CORE].files] == [
        f"{CORE}-2.12.0.dist-info/METADATA",
        f"{CORE}-2.12.0.dist-info/RECORD",
    ]
    libraries = site / "transformer_engine" / "wheel_lib"
    assert (libraries / "libtransformer_engine.so").read_bytes() == b"core library" * 1000
    assert (libraries / f"{EXTENSION}.so").read_bytes() == b"extension"
    assert (site / "pkg" / "more.py").exists()
    assert not list(site.glob("*.data"))


def test_the_onnx_export_is_not_needed_to_import(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_site, "_installed", lambda exclude: {})
    gpu_site.unpack(bundle, tmp_path / "site")
    command = [sys.executable, "-S", "-c", "import transformer_engine"]
    subprocess.run(command, check=True, env={"PYTHONPATH": str(tmp_path / "site")})


def test_the_real_onnx_is_kept(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_site, "_installed", lambda exclude: {"onnx": "1.20"})
    gpu_site.unpack(bundle, tmp_path / "site")
    assert not (tmp_path / "site" / "onnx").exists()
    assert (tmp_path / "site" / "onnxscript").exists()


def test_the_command_prints_one_line_per_package(bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "gpu_site.py"), "--bundle", str(bundle), "--site", str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "pkg 1.5",
        "transformer_engine 2.12.0",
        f"{CORE} 2.12.0",
        f"{EXTENSION} 2.12.0",
    ]
    (bundle / "MANIFEST.json").unlink()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"{bundle}/MANIFEST.json: no such file; make the bundle with: make gpu-bundle\n"


def test_an_installed_package_is_kept_where_the_bundle_allows_it(bundle: Path, tmp_path: Path) -> None:
    made = [
        wheel(bundle, "pytest", "0.1", {"pytest.py": ""}) | {"only_if_missing": True},
        wheel(bundle, "not_installed", "0.2", {"not_installed.py": ""}) | {"only_if_missing": True},
    ]
    write_manifest(bundle, made)
    versions = gpu_site.unpack(bundle, tmp_path / "site")
    assert versions == {"pytest": pytest.__version__, "not_installed": "0.2"}
    assert sorted(path.name for path in (tmp_path / "site").iterdir() if path.name.endswith(".py")) == [
        "not_installed.py"
    ]


def test_a_complete_site_is_kept_and_an_older_one_replaced(bundle: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    gpu_site.unpack(bundle, site)
    (site / "witness").touch()
    gpu_site.unpack(bundle, site)
    assert (site / "witness").exists()
    write_manifest(bundle, packages_of(bundle)[:1])
    assert gpu_site.unpack(bundle, site) == {"pkg": "1.5"}
    assert sorted(path.name for path in site.iterdir()) == [".unpacked", "pkg", "pkg-1.5.dist-info"]


def test_a_folder_with_other_files_is_refused(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "thesis.tex").touch()
    with pytest.raises(gpu_site.BundleError, match="has files that no bundle left there"):
        gpu_site.unpack(bundle, tmp_path / "site")
    assert (tmp_path / "site" / "thesis.tex").exists()


def _cut(bundle: Path) -> None:
    path = bundle / "pkg-1.5-py3-none-any.whl"
    path.write_bytes(path.read_bytes()[:-30])


def _no_zip(bundle: Path) -> None:
    path = bundle / "pkg-1.5-py3-none-any.whl"
    path.write_bytes(b"PK but no archive")
    write_manifest(bundle, [entry(path, "pkg", "1.5"), *packages_of(bundle)[1:]])


def _no_zstd(bundle: Path) -> None:
    path = bundle / f"{CORE}.so.zst"
    path.write_bytes(b"no frame")
    write_manifest(bundle, [entry(path, CORE, "2.12.0")])


def _missing(bundle: Path) -> None:
    (bundle / f"{EXTENSION}.so").unlink()


def _other_version(bundle: Path) -> None:
    packages = packages_of(bundle)
    packages[-1]["version"] = "2.13.0"
    write_manifest(bundle, packages)


def _other_python(bundle: Path) -> None:
    write_manifest(bundle, packages_of(bundle), python="3.8")


def _no_manifest(bundle: Path) -> None:
    (bundle / "MANIFEST.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_cut, r"pkg-1\.5-py3-none-any\.whl: damaged \(its SHA-256 is not the one in MANIFEST\.json\)"),
        (_no_zip, r"pkg-1\.5-py3-none-any\.whl: not a readable wheel"),
        (_no_zstd, r"\.so\.zst: damaged"),
        (_missing, rf"{EXTENSION}\.so: no such file, but MANIFEST\.json lists it"),
        (_other_version, rf"{CORE} 2\.12\.0, {EXTENSION} 2\.13\.0"),
        (_other_python, rf"for Python 3\.8, but this is Python {PYTHON}"),
        (_no_manifest, r"MANIFEST\.json: not a manifest"),
    ],
)
def test_damage_is_named_and_leaves_no_site(bundle: Path, tmp_path: Path, damage: Any, says: str) -> None:
    damage(bundle)
    with pytest.raises(gpu_site.BundleError, match=says):
        gpu_site.unpack(bundle, tmp_path / "site")
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize(
    "change", [{"file": "../pkg.whl"}, {"version": "1/../../x"}, {"name": "/tmp/x"}, {"file": None}, {"sha256": 1}]
)
def test_a_damaged_entry_of_the_manifest_is_named(bundle: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    packages = packages_of(bundle)
    write_manifest(bundle, [{**packages[0], **change}])
    with pytest.raises(gpu_site.BundleError, match="not a manifest"):
        gpu_site.unpack(bundle, tmp_path / "site")
    del packages[0]["sha256"]
    write_manifest(bundle, packages)
    with pytest.raises(gpu_site.BundleError, match="not a manifest"):
        gpu_site.unpack(bundle, tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_a_site_that_is_a_file_is_kept(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "site").write_text("mine")
    with pytest.raises(gpu_site.BundleError, match="not a folder"):
        gpu_site.unpack(bundle, tmp_path / "site")
    assert (tmp_path / "site").read_text() == "mine"
