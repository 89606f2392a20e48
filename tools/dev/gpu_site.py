"""Unpack a GPU bundle (`make gpu-bundle`) into a folder for PYTHONPATH, on a machine without network and pip.

    python3 tools/dev/gpu_site.py --bundle .gpu --site SITE        # prints one line per package
    PYTHONPATH=SITE:. python3 -m megatron_cpt ...

Needs nothing but Python. A package of the bundle that is marked `only_if_missing` is skipped if this Python already has
it, so that the machine's own packages keep the versions they were installed with. The rest takes precedence over
installed packages.

Transformer Engine (TE) arrives in three parts: the Python wheel, its core library (compressed with Zstandard) and the
extension for torch. TE asks importlib.metadata for the versions of all three, so the two libraries get a dist-info
folder of their own. TE also imports onnxscript and onnx, 20 MB that only its ONNX export uses; without them the site
gets modules that accept TE's declarations and do nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import zipfile
from collections.abc import Collection
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NoReturn

MANIFEST = "MANIFEST.json"
MARK = ".unpacked"
"""File in a complete site, with the checksum of the bundle's manifest."""

TE_LIBRARIES = "transformer_engine/wheel_lib"
CORE_LIBRARY = "libtransformer_engine.so"

_ONNX = '''"""Stand-in for {name}: Transformer Engine imports it for its ONNX export, which does not work then."""


class _Declaration:
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args, **kwargs):
        return self


{attributes} = _Declaration()
'''
STAND_INS = {"onnx": "defs", "onnxscript": "opset18 = values = onnx_types"}
"""Package -> the attributes that Transformer Engine uses when it is imported."""


class BundleError(Exception):
    """The bundle is damaged, or does not fit this machine."""


def unpack(bundle: Path, site: Path) -> dict[str, str]:
    """Unpack a bundle into a site folder; a site that is already complete is kept.

    Args:
        bundle: folder with MANIFEST.json.
        site: new folder, or the site of an earlier bundle, which is replaced.

    Returns:
        Version of each package; for a skipped package, the installed version.

    Raises:
        BundleError: a file is missing or damaged, versions differ, the Python version is wrong, or `site` is a folder
            with other content.
    """
    bundle, site = Path(bundle), Path(site).resolve()
    manifest, checksum = _read_manifest(bundle)
    installed = _installed(exclude=site)
    skipped = {
        package["name"]: installed[_normalized(package["name"])]
        for package in manifest["packages"]
        if package.get("only_if_missing") and _normalized(package["name"]) in installed
    }
    versions = {package["name"]: package["version"] for package in manifest["packages"]} | skipped
    mark = f"{checksum} without {sorted(skipped)}\n"
    if (site / MARK).is_file() and (site / MARK).read_text() == mark:
        return versions
    if site.exists() and not site.is_dir():
        raise BundleError(f"{site}: not a folder; choose an empty or new folder")
    if site.exists() and any(site.iterdir()) and not (site / MARK).is_file():
        raise BundleError(f"{site}: has files that no bundle left there; choose an empty or new folder")
    part = site.with_name(f".{site.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    _fill(bundle, part, [package for package in manifest["packages"] if package["name"] not in skipped], installed)
    (part / MARK).write_text(mark)
    shutil.rmtree(site, ignore_errors=True)
    part.rename(site)
    return versions


def _read_manifest(bundle: Path) -> tuple[dict[str, Any], str]:
    path = bundle / MANIFEST
    if not path.is_file():
        raise BundleError(f"{path}: no such file; make the bundle with: make gpu-bundle")
    content = path.read_bytes()
    try:
        manifest: dict[str, Any] = json.loads(content)
        wanted, packages = manifest["python"], manifest["packages"]
        for package in packages:
            _check_names(package)
        engine = {
            package["name"]: package["version"] for package in packages if "transformer_engine" in package["name"]
        }
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path}: not a manifest ({error!r}); make the bundle again") from error
    python = ".".join(map(str, sys.version_info[:2]))
    if wanted != python:
        raise BundleError(f"{bundle}: for Python {wanted}, but this is Python {python}; run Python {wanted}")
    if len(set(engine.values())) > 1:
        found = ", ".join(f"{name} {version}" for name, version in engine.items())
        raise BundleError(f"{path}: Transformer Engine refuses parts of different versions: {found}")
    return manifest, hashlib.sha256(content).hexdigest()


def _check_names(package: dict[str, Any]) -> None:
    """Raise a ValueError if a file would be read outside the bundle, or written outside the site."""
    for name in (package["name"], package["version"], package["file"], package["sha256"]):
        if Path(name).name != name:
            raise ValueError(f"{name!r} is not a plain name")


def _installed(exclude: Path) -> dict[str, str]:
    """Return the version of each package of this Python, outside a folder."""
    path = [entry for entry in sys.path if Path(entry or ".").resolve() != exclude]
    found = {}
    for distribution in distributions(path=path):
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(_normalized(name), distribution.version)
    return found


def _normalized(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _fill(bundle: Path, site: Path, packages: list[dict[str, Any]], installed: Collection[str]) -> None:
    for package in packages:
        _verify(bundle, package)
    wheels = [package for package in packages if package["file"].endswith(".whl")]
    for package in wheels:
        _unpack_wheel(bundle / package["file"], site)
    for package in packages:
        if package in wheels:
            continue
        folder = site / TE_LIBRARIES
        folder.mkdir(parents=True, exist_ok=True)
        if package["file"].endswith(".zst"):
            _decompress(bundle / package["file"], folder / CORE_LIBRARY, site)
        else:
            shutil.copy(bundle / package["file"], folder / Path(package["file"]).name)
        _write_dist_info(site, package["name"], package["version"])
    if any(package["name"] == "transformer_engine" for package in packages):
        for name, attributes in STAND_INS.items():
            if name not in installed:
                (site / name).mkdir()
                (site / name / "__init__.py").write_text(_ONNX.format(name=name, attributes=attributes))


def _verify(bundle: Path, package: dict[str, Any]) -> None:
    path = bundle / package["file"]
    if not path.is_file():
        raise BundleError(f"{path}: no such file, but {MANIFEST} lists it; copy the bundle again")
    if hashlib.sha256(path.read_bytes()).hexdigest() != package["sha256"]:
        raise BundleError(f"{path}: damaged (its SHA-256 is not the one in {MANIFEST}); copy or make the bundle again")


def _unpack_wheel(wheel: Path, site: Path) -> None:
    """Unpack a wheel, as an installer does: the content of `NAME.data/purelib` and `platlib` belongs into the site."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise BundleError(f"{wheel}: not a readable wheel ({error}); make the bundle again") from error
    for data in site.glob("*.data"):
        for kind in ("purelib", "platlib"):
            if (data / kind).is_dir():
                shutil.copytree(data / kind, site, dirs_exist_ok=True)
        shutil.rmtree(data)


def _decompress(source: Path, target: Path, site: Path) -> None:
    sys.path.insert(0, str(site))  # the bundle brings zstandard
    try:
        import zstandard
    except ImportError as error:
        raise BundleError(f"{source}: unpacking needs the zstandard package in the bundle ({error})") from error
    finally:
        sys.path.remove(str(site))
    try:
        with source.open("rb") as compressed, target.open("wb") as plain:
            zstandard.ZstdDecompressor().copy_stream(compressed, plain, write_size=8 << 20)
    except zstandard.ZstdError as error:
        raise BundleError(f"{source}: damaged ({error}); make the bundle again") from error


def _write_dist_info(site: Path, name: str, version: str) -> None:
    """Describe a library as an installed package: metadata, and a record without checksums."""
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "RECORD").write_text(f"{folder.name}/METADATA,,\n{folder.name}/RECORD,,\n")


def main(arguments: list[str] | None = None) -> int:
    """Unpack and print one line per package; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--bundle", type=Path, required=True, help="folder that `make gpu-bundle` wrote")
    parser.add_argument("--site", type=Path, required=True, help="folder for PYTHONPATH")
    options = parser.parse_args(arguments)
    try:
        versions = unpack(options.bundle, options.site)
    except BundleError as error:
        _fail(str(error))
    for name, version in versions.items():
        print(f"{name} {version}")
    return 0


def _fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main())
