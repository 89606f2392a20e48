"""Check that each symbol a library of Transformer Engine (TE) needs is in this Python's torch and CUDA libraries.

    python tools/dev/te_symbols.py libtransformer_engine.so [transformer_engine_torch.cpython-312-x86_64-linux-gnu.so]

Loads the libraries in the order given with RTLD_NOW, so that the dynamic linker resolves every function before it
returns. Needs no GPU. The exit status is 1 if a symbol is missing; the linker names the first one.
"""

from __future__ import annotations

import ctypes
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

# TE loads these from torch's environment before its core library (transformer_engine/common/__init__.py).
CUDA_LIBRARIES = (
    "cudnn/lib/libcudnn*.so.9",
    "nccl/lib/libnccl.so.2",
    "cu13/lib/libcudart.so.13",
    "cu13/lib/libcublas*.so.13",
    "cu13/lib/libcurand.so.10",
    "cu13/lib/libnvrtc.so.13",
)
PACKAGES = ("torch", "nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-nccl-cu13")


def main(libraries: list[str]) -> int:
    """Load the libraries and print one line each; return the exit status."""
    nvidia = Path(torch.__file__).parents[1] / "nvidia"
    for pattern in CUDA_LIBRARIES:
        for path in sorted(nvidia.glob(pattern)):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    print(", ".join(f"{package} {_version(package)}" for package in PACKAGES))
    for library in libraries:
        try:
            ctypes.CDLL(str(Path(library).resolve()), mode=os.RTLD_NOW | ctypes.RTLD_GLOBAL)
        except OSError as error:
            print(str(error).replace(f"{Path(library).resolve().parent}/", ""))
            return 1
        print(f"{Path(library).name}: every symbol is resolved")
    return 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
