"""The one place that maps a package which is not installed to the extra of setup.py that brings it."""

from __future__ import annotations

import importlib.util

from megatron_cpt.errors import install_command

_EXTRA_BY_MODULE = {
    "torch": "train",
    "megatron": "train",
    "psutil": "train",
    "sentencepiece": "data",
    "tokenizers": "data",
    "zstandard": "data",
    "pyarrow": "data",
    "matplotlib": "plot",
    "tensorboard": "tensorboard",
    "transformers": "hf",
    "lm_eval": "eval",
    "ray": "ray",
    "faiss": "mine",
    "model2vec": "mine",
    "sentence_transformers": "mine",
}


def describe_missing_package(error: ModuleNotFoundError) -> str | None:
    """Return what to install; None if the package is not an optional one, or is installed but lacks a submodule."""
    module = (error.name or "").partition(".")[0]
    extra = _EXTRA_BY_MODULE.get(module)
    if extra is None or importlib.util.find_spec(module) is not None:
        return None
    return f"{module} is not installed; {install_command(extra)}"


def require_module(module: str) -> None:
    """Raise ModuleNotFoundError early, where a child process or only one rank would fail later."""
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)
