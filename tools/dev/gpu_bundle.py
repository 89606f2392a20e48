"""Collect everything that a GPU machine without network lacks, in one folder under 64 MiB: `make gpu-bundle`.

    python tools/dev/gpu_bundle.py --output .gpu --python .venv-gpu/bin/python [--prebuilt DIR]

The machine has Python 3.12 and torch 2.11 for CUDA 13. The folder gets the wheels of PACKAGES, Transformer Engine (TE)
in three parts, and MANIFEST.json with versions, sizes and checksums. tools/dev/gpu_site.py unpacks it there.

- The core library is downloaded (190 MB), its GPU code for other architectures is zeroed (tools/dev/fatbin.py), and
  the result is compressed to 22 MB.
- The extension for torch has no wheel. It is taken from the folder `--prebuilt`, or built (tools/dev/te_extension.py).
- At the end the bundle is unpacked, every symbol of both libraries is looked up in torch's CUDA libraries, and TE and
  megatron-core are imported.

Files that are complete are kept, so the same command resumes an interrupted run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fatbin import FatbinError, prune
from gpu_site import CORE_LIBRARY, MANIFEST, TE_LIBRARIES, BundleError
from te_extension import MODULE, build, read_target

ROOT = Path(__file__).parents[2]
TOOLS = Path(__file__).parent
PYTHON_VERSION = "3.12"
TE_VERSION = "2.12.0"  # the newest whose core library resolves against torch 2.11: docs/operations/gpu.md
ARCHITECTURE = 90
MAX_BYTES = 64 << 20
"""Most that travels to the machine in one call, bundle and repository together."""

PACKAGES = {
    "megatron-core": "0.19.2",
    "pydantic": "2.14.4",
    "pydantic-core": "2.50.5",
    "annotated-types": "0.8.0",
    "typing-inspection": "0.4.5",
    "typing-extensions": "4.16.0",
    "orjson": "3.13.0",
    "zstandard": "0.25.0",
    "einops": "0.8.2",  # TE imports it
    "transformer-engine": TE_VERSION,
}
ONLY_IF_MISSING = {
    "annotated-doc": "0.0.7",
    "click": "8.5.1",
    "filelock": "4.3.1",
    "markdown-it-py": "4.3.0",
    "mdurl": "0.1.2",
    "packaging": "26.4",
    "psutil": "7.2.2",
    "pygments": "2.21.0",
    "pyyaml": "6.0.4",
    "rich": "15.0.0",
    "shellingham": "1.5.4",
    "typer": "0.29.2",
    "xxhash": "4.1.0",
}
"""Packages that the machine may have; its own version is used then."""

CORE, EXTENSION = "transformer_engine_cu13", MODULE
HEADERS = {"nvidia-cuda-crt": "13.0.88", "nvidia-cuda-cccl": "13.0.85"}
"""Headers of CUDA 13.0 that torch's packages lack; only for building the extension."""

PARTIAL = "MANIFEST.partial.json"
_COMPRESSION_LEVEL = 19


@dataclass(frozen=True)
class Options:
    """Folders and interpreter.

    Attributes:
        output: the bundle.
        python: interpreter of an environment with torch 2.11, whose pip downloads.
        cache: downloads and object files that are not part of the bundle.
        prebuilt: folder with the extension, or None to build it.
    """

    output: Path
    python: Path
    cache: Path
    prebuilt: Path | None


class Bundle:
    """The files of the bundle. Until it is complete and checked, its manifest has the name PARTIAL."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._known = self._read_manifest()
        self._entries: dict[str, dict[str, Any]] = {}

    def _read_manifest(self) -> dict[str, dict[str, Any]]:
        """Return the files of an earlier run, and mark the bundle as incomplete."""
        if (self.folder / MANIFEST).exists():
            (self.folder / MANIFEST).replace(self.folder / PARTIAL)
        try:
            packages = json.loads((self.folder / PARTIAL).read_bytes())["packages"]
            return {package["name"]: package for package in packages}
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # the first run, or a damaged manifest: all files are made again

    def keep(self, name: str, version: str) -> bool:
        """Return whether a file from an earlier run is complete, and list it then."""
        entry = self._known.get(name)
        if entry is None or entry["version"] != version:
            return False
        path = self.folder / entry["file"]
        if not path.is_file() or _checksum(path) != entry["sha256"]:
            return False
        self._add(entry)
        return True

    def add(self, name: str, version: str, file: Path, *, only_if_missing: bool = False) -> None:
        """List a file in the bundle's folder."""
        entry = {"name": name, "version": version, "file": file.name, "bytes": file.stat().st_size}
        entry["sha256"] = _checksum(file)
        self._add(entry | ({"only_if_missing": True} if only_if_missing else {}))

    def _add(self, entry: dict[str, Any]) -> None:
        self._entries[entry["name"]] = entry
        listed = list((self._known | self._entries).values())  # so that an interrupted run forgets no complete file
        self._write([known for known in listed if (self.folder / known["file"]).is_file()])
        print(f"  {entry['name']} {entry['version']}: {entry['bytes'] / 2**20:.2f} MiB", flush=True)

    def finish(self, check: Callable[[], None]) -> None:
        """Drop files that are no longer part of the bundle, check it, and mark it as complete."""
        self._write(list(self._entries.values()))
        wanted = {entry["file"] for entry in self._entries.values()} | {PARTIAL}
        for path in self.folder.iterdir():
            if path.name not in wanted:
                path.unlink()
        (self.folder / PARTIAL).replace(self.folder / MANIFEST)
        try:
            check()
        except BaseException:
            (self.folder / MANIFEST).replace(self.folder / PARTIAL)
            raise

    def _write(self, packages: Sequence[dict[str, Any]]) -> None:
        manifest = {"python": PYTHON_VERSION, "architecture": f"sm_{ARCHITECTURE}", "packages": packages}
        part = self.folder / f"{PARTIAL}.part"
        part.write_text(json.dumps(manifest, indent=1) + "\n")
        part.replace(self.folder / PARTIAL)


def make_bundle(options: Options) -> None:
    """Make or complete the bundle and check it.

    Raises:
        BundleError, FatbinError: a download, the compiler or a check fails, or the bundle is too large.
    """
    bundle = Bundle(options.output)
    for name, version in {**PACKAGES, **ONLY_IF_MISSING}.items():
        listed = _module_name(name) if name == "transformer-engine" else name
        if not bundle.keep(listed, version):
            wheel = download(name, version, options.output, options.python)
            bundle.add(listed, version, wheel, only_if_missing=name in ONLY_IF_MISSING)
    if not bundle.keep(CORE, TE_VERSION):
        bundle.add(CORE, TE_VERSION, make_core(options))
    if not bundle.keep(EXTENSION, TE_VERSION):
        bundle.add(EXTENSION, TE_VERSION, take_extension(options))
    bundle.finish(lambda: check(options))


def download(name: str, version: str, folder: Path, python: Path, *, source: bool = False) -> Path:
    """Download one wheel or source archive with the pip of an environment, and return the file."""
    pattern = f"{_module_name(name)}-{version}*{'.tar.gz' if source else '.whl'}"
    for old in _glob(folder, pattern):
        old.unlink()  # of an interrupted run
    kind = ["--no-binary", name, "--no-build-isolation"] if source else ["--only-binary", ":all:"]
    command = [python, "-m", "pip", "download", "--quiet", "--no-deps", *kind, "--dest", folder, f"{name}=={version}"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    found = _glob(folder, pattern)
    if done.returncode or not found:
        raise BundleError(f"{name} {version}: pip download failed:\n{done.stderr.strip()[-1000:]}")
    return found[0]


def _glob(folder: Path, pattern: str) -> list[Path]:
    return [path for path in folder.glob("*") if fnmatch(path.name.lower(), pattern.lower())]


def _module_name(name: str) -> str:
    return name.replace("-", "_")


def make_core(options: Options) -> Path:
    """Download TE's core library, zero the GPU code of other architectures, and compress it."""
    import zstandard

    cache, target = options.cache, options.output / f"{CORE}-{TE_VERSION}-sm_{ARCHITECTURE}.so.zst"
    cache.mkdir(parents=True, exist_ok=True)
    plain, pruned = cache / CORE_LIBRARY, cache / "pruned.so"
    wheel = download(CORE, TE_VERSION, cache, options.python)
    member = f"{TE_LIBRARIES}/{CORE_LIBRARY}"
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, plain.open("wb") as out:
        shutil.copyfileobj(source, out, 8 << 20)
    kept, zeroed = prune(plain, pruned, ARCHITECTURE)
    print(f"  GPU code: {kept / 2**20:.0f} MiB for sm_{ARCHITECTURE} kept, {zeroed / 2**20:.0f} MiB zeroed", flush=True)
    part = target.with_suffix(".part")
    compressor = zstandard.ZstdCompressor(level=_COMPRESSION_LEVEL, threads=os.cpu_count() or 1, write_checksum=True)
    with pruned.open("rb") as source, part.open("wb") as out:
        compressor.copy_stream(source, out, size=pruned.stat().st_size)
    part.rename(target)
    for path in (wheel, plain, pruned):
        path.unlink()
    return target


def take_extension(options: Options) -> Path:
    """Copy the extension from the folder of prebuilt files, or build it."""
    name = f"{EXTENSION}{read_target(options.python).suffix}"
    library = None if options.prebuilt is None else options.prebuilt / name
    if library is not None and not library.is_file():
        raise BundleError(f"{library}: no such file; with an empty GPU_BUNDLE_PREBUILT the extension is built")
    if library is None:
        print("  building TE's extension for torch: about 20 CPU minutes, once", flush=True)
        work = options.cache / "extension"
        work.mkdir(parents=True, exist_ok=True)
        for package, version in HEADERS.items():
            with zipfile.ZipFile(download(package, version, work, options.python)) as archive:
                archive.extractall(work / "headers")
        archive = download(EXTENSION, TE_VERSION, work, options.python, source=True)
        library = build(archive, work / "headers", work, options.python)
    return Path(shutil.copy(library, options.output / name))


def check(options: Options) -> None:
    """Check the size, unpack the bundle as the GPU machine does, resolve all symbols, and import what it brings."""
    size = check_size(options.output, repository_bytes(ROOT))
    site = options.cache / "site"
    libraries = site / TE_LIBRARIES
    extension = libraries / f"{EXTENSION}{read_target(options.python).suffix}"
    steps = {
        "unpack": [TOOLS / "gpu_site.py", "--bundle", options.output, "--site", site],
        "symbols": [TOOLS / "te_symbols.py", libraries / CORE_LIBRARY, extension],
        "import": ["-W", "ignore", "-c", "import transformer_engine.pytorch, megatron.core, megatron_cpt.cli"],
    }
    for name, arguments in steps.items():
        path = os.pathsep.join([str(site), str(ROOT)]) if name == "import" else ""
        command = [str(options.python), *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise BundleError(f"{name}: {(done.stderr.strip() or done.stdout.strip())[-1500:]}")
        if name == "symbols":
            print("\n".join(f"  {line}" for line in done.stdout.splitlines()), flush=True)
    print(f"  imported on a CPU: Transformer Engine, megatron-core, megatron_cpt\n{size}", flush=True)


def check_size(bundle: Path, repository: int, limit: int = MAX_BYTES) -> str:
    """Return a line with the sizes of the bundle and the repository.

    Raises:
        BundleError: together they are larger than the limit.
    """
    files = sorted(bundle.iterdir(), key=lambda path: -path.stat().st_size)
    size = sum(path.stat().st_size for path in files)
    line = f"{bundle}: {size / 2**20:.1f} MiB, the repository {repository / 2**20:.1f} MiB"
    total = f"{(size + repository) / 2**20:.1f} of {limit / 2**20:.0f} MiB"
    if size + repository > limit:
        largest = ", ".join(f"{path.name} {path.stat().st_size / 2**20:.1f} MiB" for path in files[:3])
        raise BundleError(f"{line}, together {total}: too large for one call; the largest files are {largest}")
    return f"{line}, together {total}"


def repository_bytes(root: Path) -> int:
    """Return the size of the files that git tracks or does not ignore; these travel with the bundle."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return sum((root / name).lstat().st_size for name in names if name and (root / name).is_file())


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """Make the bundle; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--output", type=Path, required=True, help="folder of the bundle")
    parser.add_argument("--python", type=Path, required=True, help="Python 3.12 with torch 2.11")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "gpu-bundle", help="folder for downloads")
    parser.add_argument("--prebuilt", type=Path, help="folder with TE's extension; it is built otherwise")
    options = parser.parse_args(arguments)
    try:
        make_bundle(Options(options.output, options.python, options.cache, options.prebuilt))
    except (BundleError, FatbinError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
