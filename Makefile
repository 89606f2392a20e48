# Every target sets itself up: on a fresh machine `make demo` or `make test` is the only command that is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := dev,hf,eval,fast

.PHONY: setup demo test test-long check bench gpu-test clean

setup: $(STAMP)

$(STAMP): setup.py constraints.txt
	@echo "== setting up $(VENV) (once; about a minute with a warm cache)"
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile --progress-bar off -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

demo: setup
	@echo "== the demo: real corpora, a base model, two continued runs; about 7 minutes on 2 cores"
	$(BIN)/python examples/quickstart/demo.py

# Unit tests first, on all cores; the distributed ones start up to 4 processes of their own, so they go one by one.
test: setup
	$(BIN)/python -m pytest tests/unit -n 2 --dist worksteal
	$(BIN)/python -m pytest tests/distributed -v --durations 5

test-long: setup
	$(BIN)/python -m pytest tests -m long -v

gpu-test: setup
	$(BIN)/python -m pytest tests/gpu -m gpu -v

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python benchmarks/data_startup.py
	$(BIN)/python benchmarks/data_resume.py
	$(BIN)/python benchmarks/data_loader.py
	$(BIN)/python benchmarks/loop_overhead.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
