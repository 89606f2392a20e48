# Every target sets itself up: on a fresh machine `make demo` or `make test` is the only command that is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := all,docs,dev

.PHONY: setup demo test test-long test-fake-gpu gpu-bundle soak check docs bench gpu-test gpu-measure gpu-rehearse clean

setup: $(STAMP)

$(STAMP): setup.py constraints.txt
	@echo "== setting up $(VENV) (once; about a minute with a warm cache)"
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile --progress-bar off -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

demo: setup
	@echo "== the demo: real corpora, a base model, two continued runs; 5 to 7 minutes on 2 cores"
	$(BIN)/python examples/quickstart/demo.py

# Unit tests first. Distributed tests start up to 4 processes each and often wait, so three files run in parallel.
# Tests of one file share runs and stay in order. A process with one thread leaves the other core to other processes.
test test-long: export OMP_NUM_THREADS := 1
test: setup
	$(BIN)/python -m pytest tests/unit -n 2 --dist worksteal
	$(BIN)/python -m pytest tests/distributed -n 3 --dist loadfile -v --durations 5

# The long tests, and every property with many inputs.
test-long: setup
	$(BIN)/python -m pytest tests/unit -m 'hypothesis and not long' -n 2 --hypothesis-profile many
	$(BIN)/python -m pytest tests -m long -v -rs  # names what is skipped, such as the tests of Ray without '.[ray]'
	@if $(HAS_PYTHON312); then $(MAKE) test-fake-gpu; else echo "skipped: make test-fake-gpu; $(NO_PYTHON312)"; fi

# Software of the GPU machine (docs/operations/gpu.md) without its GPU: Python 3.12, torch for CUDA 13, 3 to 5 GB.
PYTHON312 ?= $(or $(shell python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null),\
	$(lastword $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3.12)),python3.12)
HAS_PYTHON312 := $(PYTHON312) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null
NO_PYTHON312 := $(PYTHON312) is not Python 3.12: make PYTHON312=/path/to/python3.12 ...
GPU_VENV ?= .venv-gpu
GPU_PACKAGES := torch==2.11.0 numpy transformers==5.17.0 pytest pytest-xdist hypothesis
GPU_BUNDLE := .gpu
GPU_SITE := build/gpu-site
# A folder with Transformer Engine's extension; without it, the extension is built: 20 CPU minutes.
GPU_BUNDLE_PREBUILT ?= $(wildcard ../shared/gpu/bundle)

$(GPU_VENV)/.installed:
	@$(HAS_PYTHON312) || { echo "$(NO_PYTHON312)" >&2; exit 2; }
	@echo "== setting up $(GPU_VENV) with torch for CUDA 13 (once; 3 to 5 GB)"
	test -x $(GPU_VENV)/bin/python || $(PYTHON312) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --no-compile --progress-bar off $(GPU_PACKAGES)
	touch $@

# Collects in .gpu the software that a GPU machine without network lacks; an interrupted call resumes.
gpu-bundle: setup $(GPU_VENV)/.installed
	$(BIN)/python tools/dev/gpu_bundle.py --output $(GPU_BUNDLE) --python $(GPU_VENV)/bin/python \
		$(if $(GPU_BUNDLE_PREBUILT),--prebuilt $(GPU_BUNDLE_PREBUILT))

$(GPU_BUNDLE)/MANIFEST.json:
	$(MAKE) gpu-bundle

# Tests with the real Transformer Engine and torch for CUDA, on a CPU.
test-fake-gpu: $(GPU_VENV)/.installed $(GPU_BUNDLE)/MANIFEST.json
	$(GPU_VENV)/bin/python tools/dev/gpu_site.py --bundle $(GPU_BUNDLE) --site $(GPU_SITE) >/dev/null
	PYTHONPATH=$(GPU_SITE):. $(GPU_VENV)/bin/python -m pytest tests/fake_gpu -m fake_gpu -v

# Injects random faults into a small job and compares it with a quiet one; benchmarks/results/soak.json adds up all drills.
FAULTS ?= 50
MINUTES ?= 10
soak: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak --faults $(FAULTS) --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

# In NVIDIA's container, Transformer Engine belongs to the container's own Python: make gpu-test GPU_PYTHON=python
GPU_PYTHON ?= $(BIN)/python
GPU_SETUP := $(if $(filter $(BIN)/python,$(GPU_PYTHON)),setup)

gpu-test: $(GPU_SETUP)
	$(GPU_PYTHON) -m pytest tests/gpu -m gpu -v

# Measures everything that needs a GPU. On a machine that has only Python and torch: make gpu-measure GPU_PYTHON=python3
# BUNDLE=.gpu, with the folder that `make gpu-bundle` made elsewhere.
BUDGET ?= 540
gpu-measure: $(GPU_SETUP)
	$(GPU_PYTHON) tools/dev/gpu_measure.py --out build/gpu-measure --budget $(BUDGET) $(if $(BUNDLE),--bundle $(BUNDLE))

# The same script at toy width on a CPU, with the software of the GPU machine and no network.
gpu-rehearse: $(GPU_VENV)/.installed $(GPU_BUNDLE)/MANIFEST.json
	tools/dev/offline.sh $(GPU_VENV)/bin/python tools/dev/gpu_measure.py --rehearse --bundle $(GPU_BUNDLE) \
		--out build/gpu-rehearsal

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/dev/structure.py
	$(BIN)/python tools/dev/prose.py
	$(MAKE) docs

# The documentation site in build/site; --strict turns broken links and missing pages into errors. Needs no network.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: setup
	$(BIN)/python benchmarks/data_startup.py
	$(BIN)/python benchmarks/data_resume.py
	$(BIN)/python benchmarks/data_loader.py
	$(BIN)/python benchmarks/data_cold_reads.py
	$(BIN)/python benchmarks/data_check.py
	$(BIN)/python benchmarks/data_preprocess.py
	$(BIN)/python benchmarks/loop_overhead.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/memory_model.py
	$(BIN)/python benchmarks/fake_gpu_memory.py
	$(BIN)/python benchmarks/adviser_accuracy.py
	$(BIN)/python benchmarks/report.py

clean:
	rm -rf $(VENV) $(GPU_VENV) $(GPU_BUNDLE) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
