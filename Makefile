# Two commands do everything on a fresh machine with Python 3.11 or newer: make quickstart, make test.

PYTHON := $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
  command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
METRICS := .venv-metrics/bin

.PHONY: help quickstart test lint test-metrics clean

help:
	@echo "make quickstart    set up, then train, sample and evaluate a small text-to-image model (5 to 8 minutes on 2 cores)"
	@echo "make test          set up, then lint and the whole test suite (about 25 minutes on 2 cores)"
	@echo "make lint          ruff, format and lint"
	@echo "make test-metrics  FID against torch-fidelity, in an environment of its own"
	@echo "Everything is in .venv: .venv/bin/ldm, or 'source .venv/bin/activate' and then ldm"

python:
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 found: install one (Debian: apt install python3.11 python3.11-venv; else uv or pyenv)"; exit 2; }

# A stamp a requirements file: set-up is repeated only when the file changes, and an interrupted one is not taken for done.
.venv/run.stamp: requirements.txt pyproject.toml | python
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

.venv/test.stamp: requirements-test.txt .venv/run.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	@touch $@

# torchvision's own requirements would bring a CUDA build of torch, hence --no-deps.
.venv-metrics/stamp: requirements.txt requirements-metrics.txt | python
	$(PYTHON) -m venv .venv-metrics
	$(METRICS)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt "pytest>=8,<10" torch==2.13.0
	$(METRICS)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-metrics.txt
	@touch $@

test-metrics: .venv-metrics/stamp
	$(METRICS)/python -m pytest tests/metrics

quickstart: .venv/run.stamp
	$(BIN)/python -m experiments.quickstart

lint: .venv/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# Other flags of pytest: make test ARGS="-k sampler -x". Workers: make test WORKERS=8.
WORKERS := 2
test: .venv/test.stamp lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

clean:
	rm -rf .venv .venv-metrics build *.egg-info
