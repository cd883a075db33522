# Two commands set up everything on a machine with Python 3.11+, git and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
ANARCII := pkg:anarcii/models
TESTS ?= tests

# Tests use one thread in each of as many processes as there are cores.
export OMP_NUM_THREADS ?= 1

bench: $(VENV)/dev.stamp  ## time, accuracy and memory against other tools (DIFFRACT_PYTHON, WEIGHTWATCHER_PYTHON: ones that have them)
	$(BIN)/python benchmarks/speed.py
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/one_matrix.py
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/bench_adapter.py
	$(BIN)/python benchmarks/bench_finetune.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/bench_nulls.py
	$(BIN)/python benchmarks/bench_pretrain.py

.PHONY: demo test check format lint types slow bench clean

demo: $(VENV)/demo.stamp  ## compare real models: a strong finetune, a gentle one, and an independent training
	$(BIN)/specbasis compare $(ANARCII)/antibody/antibody_4_2_128_512.pt \
		$(ANARCII)/tcr/tcr_4_2_128_512.pt $(ANARCII)/shark/shark_4_2_128_512.pt \
		$(ANARCII)/antibody/antibody_4_1_128_512.pt --out out/demo

test: $(VENV)/dev.stamp  ## the fast tests
	$(BIN)/python -m pytest -n auto $(TESTS)

check: $(VENV)/dev.stamp lint types test  ## all that a change must pass: format, lint, types, tests (README and examples too)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/dev.stamp
	$(BIN)/mypy

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

slow: $(VENV)/dev.stamp  ## real runs that take minutes
	$(BIN)/python -m pytest -m slow $(TESTS)

clean:
	rm -rf $(VENV) out

$(VENV)/python.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "specbasis needs Python 3.11 or newer; $(PYTHON) is older: make PYTHON=python3.12 demo"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade "pip>=24"
	$(PIP) install -c constraints.txt torch
	@touch $@

$(VENV)/demo.stamp: $(VENV)/python.stamp pyproject.toml
	$(PIP) install -c constraints.txt -e ".[demo]"
	@touch $@

$(VENV)/dev.stamp: $(VENV)/python.stamp pyproject.toml
	$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@
