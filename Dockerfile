# Two images of the same source:
#
#   docker build -t megatron-cpt .                  the last stage: NVIDIA's PyTorch container, for training
#   docker build -t megatron-cpt:cpu --target cpu . what `make setup` makes, for tests, plans and data on any machine
#
# Neither has been built where this file was written, which has no Docker. hadolint passes (tests/unit/launch); the commands
# of the cpu stage were run by hand in an empty folder, with the packages of constraints.txt at hand.

# --- cpu ---------------------------------------------------------------------------------------------------------------
FROM python:3.11-slim-bookworm AS cpu

# make for the Makefile; a compiler for megatron-core, which has no wheel of every release for every machine.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make g++ git \
    && rm -rf /var/lib/apt/lists/*

# PyPI's torch brings CUDA, 3 GB of it. pytorch.org has an index of wheels for CPUs; its address here leaves CUDA out:
# --build-arg PIP_EXTRA_INDEX_URL=...
ARG PIP_EXTRA_INDEX_URL=""

WORKDIR /workspace
# The package's metadata first: as long as they stay, so does the layer with everything that is installed.
COPY setup.py pyproject.toml constraints.txt Makefile README.md ./
COPY megatron_cpt/__init__.py megatron_cpt/
RUN PIP_NO_CACHE_DIR=1 make setup
COPY . .
# The files are newer than the stamp now; the environment is as it should be.
RUN touch .venv/.installed && .venv/bin/megatron-cpt plan examples/nemotron4_15b/run.yaml > /dev/null
ENV PATH=/workspace/.venv/bin:$PATH
CMD ["megatron-cpt", "--help"]

# --- gpu ---------------------------------------------------------------------------------------------------------------
# Release 25.12: PyTorch 2.10, CUDA 13.1, Python 3.12, with Transformer Engine and apex built against them; NCCL, its
# plugins and the tools of the network are NVIDIA's choice, too.
# https://docs.nvidia.com/deeplearning/frameworks/pytorch-release-notes/rel-25-12.html
FROM nvcr.io/nvidia/pytorch:25.12-py3 AS gpu

WORKDIR /workspace
COPY setup.py pyproject.toml constraints.txt README.md ./
COPY megatron_cpt/__init__.py megatron_cpt/
# Of constraints.txt what is not the container's own: its torch and numpy stay, held by /etc/pip/constraint.txt, which it
# names in PIP_CONSTRAINT. megatron-core is the release that the tests run with on Python 3.12.
RUN grep -E '^(megatron-core|pydantic|typer|transformers)==' constraints.txt > /tmp/constraints.txt \
    && pip install --no-cache-dir -c /tmp/constraints.txt -e '.[hf]' \
    && rm /tmp/constraints.txt
COPY . .
# Whatever pip did: these must be here, and in the versions that belong together.
RUN python -c "from importlib.metadata import version as v; \
print({name: v(name) for name in ('torch', 'megatron-core', 'transformer-engine', 'apex')})" \
    && megatron-cpt plan examples/nemotron4_15b/run.yaml > /dev/null
CMD ["megatron-cpt", "doctor"]
