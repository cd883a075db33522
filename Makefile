# Two commands set up everything on a machine with Python 3.11+, git and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
QUIET := --disable-pip-version-check --quiet
PIP := $(BIN)/python -m pip $(QUIET)
PIP_VERSION := pip==26.3
UV_VERSION := uv==0.13.9
SBOM_VERSION := cyclonedx-bom==7.5.0
ANARCII := pkg:anarcii/models
TESTS ?= tests
# What pip is asked for: the locked release, as its build for the CPU where the configured index has one (1 GB), else as
# the index has it (6 GB with CUDA). Another build: make TORCH="torch==2.13.0 --index-url URL" demo
TORCH_LOCKED := $(shell cat requirements/torch.txt)
TORCH ?= $(TORCH_LOCKED)

# Tests use one thread in each of as many processes as there are cores.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test check docs format lint types rows peft-suite slow bench lock sbom test-latest test-oldest clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*  ## /\1\t/' | expand -t 14

demo: $(VENV)/demo.stamp  ## compare real models: a strong finetune, a gentle one, and an independent training
	$(BIN)/specbasis compare $(ANARCII)/antibody/antibody_4_2_128_512.pt \
		$(ANARCII)/tcr/tcr_4_2_128_512.pt $(ANARCII)/shark/shark_4_2_128_512.pt \
		$(ANARCII)/antibody/antibody_4_1_128_512.pt --out out/demo

test: $(VENV)/dev.stamp  ## the fast tests
	$(BIN)/python -m pytest -n auto --dist worksteal $(TESTS)

check: $(VENV)/dev.stamp lint types test  ## all that a change must pass: format, lint, types, tests (README and examples too)

lint: $(VENV)/dev.stamp  ## format and lint, without changing anything
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/dev.stamp  ## mypy
	$(BIN)/mypy

docs: $(VENV)/docs.stamp  ## the site, in site/: open site/index.html; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(VENV)/dev.stamp  ## mend format and lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

rows: $(VENV)/demo.stamp  ## the list of measures in docs/rows.md anew
	$(BIN)/python -c 'from pathlib import Path; from specbasis.measures.table import write_listing; write_listing(Path("docs/rows.md"))'

peft-suite: $(VENV)/dev.stamp  ## PEFT's own tests of every method, with ours
	$(BIN)/python tests/peft_suite.py

slow: $(VENV)/dev.stamp  ## real runs that take minutes
	$(BIN)/python -m pytest -m slow $(TESTS)

bench: $(VENV)/dev.stamp  ## time, accuracy and memory against other tools (DIFFRACT_PYTHON, WEIGHTWATCHER_PYTHON: ones that have them)
	$(BIN)/python benchmarks/speed.py
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/one_matrix.py
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/bench_adapter.py
	$(BIN)/python benchmarks/bench_finetune.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/bench_nulls.py
	$(BIN)/python benchmarks/bench_pretrain.py

lock: .venv-uv/stamp  ## requirements/*.txt anew from pyproject.toml: one lock for Python 3.11 to 3.13, with hashes
	$(LOCK) --extra dev --extra build -o requirements/dev.txt
	$(LOCK) --extra demo --extra build -c requirements/dev.txt -o requirements/demo.txt
	$(LOCK) --extra docs -c requirements/dev.txt -o requirements/docs.txt

LOCK = .venv-uv/bin/uv pip compile pyproject.toml --upgrade --universal --python-version 3.11 --generate-hashes --no-annotate \
	--no-header --quiet --prerelease disallow -c requirements/torch.txt --no-emit-package torch

sbom: $(VENV)/demo.stamp .venv-sbom/stamp  ## what is installed in .venv, with its licences, as CycloneDX: out/sbom.json
	mkdir -p out
	.venv-sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type library --output-reproducible \
		-o out/sbom.json $(BIN)/python

test-latest:  ## the tests with the newest versions that pyproject.toml admits, in .venv-latest
	rm -rf .venv-latest && $(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip $(QUIET) install "$(PIP_VERSION)"
	.venv-latest/bin/python -m pip $(QUIET) install $(filter-out $(TORCH_LOCKED),$(TORCH)) -e ".[dev]"
	.venv-latest/bin/python -m pip list --format freeze
	.venv-latest/bin/python -m pytest -n auto --dist worksteal $(TESTS)

test-oldest: .venv-uv/stamp  ## the tests with the oldest versions that pyproject.toml admits, in .venv-oldest
	rm -rf .venv-oldest && $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip $(QUIET) install "$(PIP_VERSION)"
	.venv-uv/bin/uv pip compile pyproject.toml --extra dev --resolution lowest-direct --python .venv-oldest/bin/python \
		--no-header --no-annotate --quiet -o .venv-oldest/oldest.txt
	# The oldest torchao that PEFT takes wants a newer torch: its tests skip here.
	sed -i.all '/^torchao==/d' .venv-oldest/oldest.txt
	.venv-oldest/bin/python -m pip $(QUIET) install -r .venv-oldest/oldest.txt
	.venv-oldest/bin/python -m pip $(QUIET) install --no-deps -e .
	.venv-oldest/bin/python -m pip list --format freeze
	.venv-oldest/bin/python -m pytest -n auto --dist worksteal $(TESTS)

clean:  ## remove all that make made
	rm -rf $(VENV) .venv-uv .venv-sbom .venv-latest .venv-oldest out dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/python.stamp: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "specbasis is locked for Python 3.11 to 3.13; $(PYTHON) is another: make PYTHON=python3.12 demo"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install "$(PIP_VERSION)"
	@touch $@

# Everything but torch by its hash; then torch, which finds all that its CPU build needs; then the project, with the locked build tools.
LOCKED = $(PIP) install --require-hashes --no-deps -r

$(VENV)/torch.stamp: $(VENV)/demo-lock.stamp requirements/torch.txt
	@if [ "$(TORCH)" = "$(TORCH_LOCKED)" ] && $(PIP) install "$(TORCH_LOCKED)+cpu" 2>/dev/null; then :; \
		else echo '$(PIP) install $(TORCH)'; $(PIP) install $(TORCH); fi
	@touch $@

$(VENV)/demo-lock.stamp: $(VENV)/python.stamp requirements/demo.txt
	$(LOCKED) requirements/demo.txt
	@touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp requirements/dev.txt
	$(LOCKED) requirements/dev.txt
	@touch $@

$(VENV)/docs.stamp: $(VENV)/demo.stamp requirements/docs.txt
	$(LOCKED) requirements/docs.txt
	@touch $@

.venv-sbom/stamp: Makefile
	$(PYTHON) -m venv .venv-sbom
	.venv-sbom/bin/python -m pip $(QUIET) install "$(SBOM_VERSION)"
	@touch $@

.venv-uv/stamp: Makefile
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/python -m pip $(QUIET) install "$(UV_VERSION)"
	@touch $@
