# Two images of the same source:
#
#   docker build -t megatron-cpt .                  last stage: NVIDIA's PyTorch container, for training
#   docker build -t megatron-cpt:cpu --target cpu . the environment of `make setup`, for tests, plans and data
#
# Neither image has been built yet: the development machine has no Docker. hadolint passes (tests/unit/launch), and the
# commands of the cpu stage were run by hand in an empty folder.

# --- cpu ---------------------------------------------------------------------------------------------------------------
FROM python:3.11-slim-bookworm AS cpu

# g++ builds megatron-core where its release has no wheel for the machine.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make g++ git \
    && rm -rf /var/lib/apt/lists/*

# PyPI's torch wheel installs 3 GB of CUDA libraries. pytorch.org has an index of CPU wheels; pass its address with
# --build-arg PIP_EXTRA_INDEX_URL=...
ARG PIP_EXTRA_INDEX_URL=""

WORKDIR /workspace
# Package metadata first: the layer with the installed packages is rebuilt only when the metadata change.
COPY setup.py pyproject.toml constraints.txt Makefile README.md ./
COPY megatron_cpt/__init__.py megatron_cpt/
RUN PIP_NO_CACHE_DIR=1 make setup
COPY . .
# COPY made the files newer than the stamp of `make setup`, although the environment is up to date.
RUN touch .venv/.installed && .venv/bin/megatron-cpt plan examples/nemotron4_15b/run.yaml > /dev/null
ENV PATH=/workspace/.venv/bin:$PATH
CMD ["megatron-cpt", "--help"]

# --- gpu ---------------------------------------------------------------------------------------------------------------
# Release 25.12: PyTorch 2.10, CUDA 13.1, Python 3.12, with matching builds of Transformer Engine, apex, NCCL and its
# network plugins.
# https://docs.nvidia.com/deeplearning/frameworks/pytorch-release-notes/rel-25-12.html
FROM nvcr.io/nvidia/pytorch:25.12-py3 AS gpu

WORKDIR /workspace
COPY setup.py pyproject.toml constraints.txt README.md ./
COPY megatron_cpt/__init__.py megatron_cpt/
# The container keeps its own torch and numpy: its PIP_CONSTRAINT names /etc/pip/constraint.txt. So only the other lines of
# constraints.txt apply. megatron-core is the release of our tests on Python 3.12.
RUN grep -E '^(megatron-core|pydantic|typer|transformers)==' constraints.txt > /tmp/constraints.txt \
    && pip install --no-cache-dir -c /tmp/constraints.txt -e '.[train,plot,hf]' \
    && rm /tmp/constraints.txt
COPY . .
# Fail the build if pip removed one of these packages.
RUN python -c "from importlib.metadata import version as v; \
print({name: v(name) for name in ('torch', 'megatron-core', 'transformer-engine', 'apex')})" \
    && megatron-cpt plan examples/nemotron4_15b/run.yaml > /dev/null
CMD ["megatron-cpt", "doctor"]
