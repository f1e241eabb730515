# make demo   set up, then learn made cars from pictures and write a report to look at
# make test   set up, then run the tests
# make check  set up, then run all checks: format, lint, import contracts, tests
# More processes for the tests: make test JOBS=8 (1 GB each).
# Another Python: make PYTHON=python3.12. Another torch, say a CUDA build you prefer: make TORCH=torch==2.12.1.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DEMO ?= demo
JOBS ?= 2
READY := $(VENV)/.ready

.PHONY: demo test lint check clean

demo: $(READY)
	$(VENV)/bin/latentscenes demo --out $(DEMO)

test: $(READY)
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal

lint: $(READY)
	$(VENV)/bin/ruff format --check src tests benchmarks docs
	$(VENV)/bin/ruff check src tests benchmarks docs
	$(VENV)/bin/lint-imports

check: lint test

clean:
	rm -rf $(VENV) $(DEMO)

# torch first and pinned, so that nothing later replaces a CPU build by one of several gigabytes
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet $(TORCH)
	$(VENV)/bin/python -m pip install --quiet --editable ".[dev]"
	touch $@
