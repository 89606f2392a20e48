"""Build Transformer Engine's extension for torch from its source archive, with g++ and the headers of pip packages.

NVIDIA publishes no wheel of this extension. Its own build wants a CUDA Toolkit, but all sources are plain C++: headers
come from torch, the nvidia packages that torch requires, nvidia-cuda-crt and nvidia-cuda-cccl. Object files are kept,
so a build that was interrupted resumes; the whole build takes about 20 CPU minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from gpu_site import BundleError

MODULE = "transformer_engine_torch"
_FLAGS = (
    *("-O2", "-g0", "-w", "-fPIC", "-std=c++17", "-fvisibility=hidden", "-fno-strict-overflow", "-DNDEBUG"),
    *("-DTORCH_API_INCLUDE_EXTENSION_H", f"-DTORCH_EXTENSION_NAME={MODULE}"),
)
_PRECOMPILED = ("extensions.h", "pybind.h", "common.h")
"""Headers of every source file. They take most of the time, so they are compiled once."""
_LIBRARIES = ("c10", "torch", "torch_cpu", "torch_python", "c10_cuda", "torch_cuda")
_QUESTION = """
import sysconfig
folders = sysconfig.get_paths()
print(folders["platlib"], folders["include"], sysconfig.get_config_var("EXT_SUFFIX"))
"""


@dataclass(frozen=True)
class Target:
    """Python environment that the extension is built for.

    Attributes:
        packages: its site-packages folder.
        include: folder of Python.h.
        suffix: ending of its extension modules, such as `.cpython-312-x86_64-linux-gnu.so`.
    """

    packages: Path
    include: Path
    suffix: str


def read_target(python: Path) -> Target:
    """Return the folders of a Python environment."""
    done = subprocess.run([python, "-c", _QUESTION], capture_output=True, text=True, check=True)
    packages, include, suffix = done.stdout.split()
    return Target(Path(packages), Path(include), suffix)


def build(archive: Path, headers: Path, work: Path, python: Path) -> Path:
    """Compile and link the extension.

    Args:
        archive: source archive of transformer_engine_torch.
        headers: folder into which nvidia-cuda-crt and nvidia-cuda-cccl are unpacked.
        work: folder for sources and object files.
        python: interpreter of the environment that has torch.

    Returns:
        The stripped library, in `work`.

    Raises:
        BundleError: the compiler fails.
    """
    target = read_target(python)
    sources = _extract(archive, work)
    objects = work / "objects"
    objects.mkdir(exist_ok=True)
    compiler = ["g++", *_FLAGS, *_includes(sources, headers, target)]
    prefix = objects / "prefix.h"
    prefix.write_text("".join(f'#include "{name}"\n' for name in _PRECOMPILED))
    _make(objects / "prefix.h.gch", [*compiler, "-x", "c++-header", str(prefix)])

    def compile_one(file: Path) -> Path:
        out = objects / f"{'_'.join(file.relative_to(sources / 'csrc').with_suffix('').parts)}.o"
        _make(out, [*compiler, "-include", str(prefix), "-c", str(file)])
        return out

    files = sorted((sources / "csrc").rglob("*.cpp"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(compile_one, files))
    library = work / f"{MODULE}{target.suffix}"
    folders = (target.packages / "torch" / "lib", target.packages / "nvidia" / "cu13" / "lib")
    link = [*(f"-L{folder}" for folder in folders), *(f"-l{name}" for name in _LIBRARIES), "-s"]
    library.unlink(missing_ok=True)
    _make(library, ["g++", "-shared", *map(str, compiled), *link])
    return library


def _extract(archive: Path, work: Path) -> Path:
    with tarfile.open(archive) as file:
        file.extractall(work, filter="data")
    return work / archive.name.removesuffix(".tar.gz")


def _includes(sources: Path, headers: Path, target: Target) -> list[str]:
    nvidia = target.packages / "nvidia"
    torch = target.packages / "torch" / "include"
    own = [sources / "common_headers" / part for part in (".", "common", "common/include")] + [sources / "csrc"]
    system = [torch, torch / "torch/csrc/api/include", target.include]
    system += [folder / "nvidia/cu13/include" for folder in (target.packages, headers)]
    system += [headers / "nvidia/cu13/include/cccl", nvidia / "cudnn/include", nvidia / "nccl/include"]
    return [f"-I{folder}" for folder in own] + [part for folder in system for part in ("-isystem", str(folder))]


def _make(out: Path, command: Sequence[str]) -> None:
    """Run a command that writes a file, unless the file exists; an interrupted command leaves none."""
    if out.exists():
        return
    part = out.with_name(f"{out.name}.part")
    print(f"  {out.name}", file=sys.stderr)
    try:
        done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True, check=False)
    except OSError as error:
        raise BundleError(
            f"{command[0]}: {error.strerror}; install a C++ compiler, or give GPU_BUNDLE_PREBUILT=DIR"
        ) from error
    if done.returncode:
        raise BundleError(f"{out.name}: the compiler failed:\n{done.stderr[-2000:]}")
    part.rename(out)
