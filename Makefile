# `make demo` and `make test` need git, make and any Python 3; see .ci/setup.
# No command below needs an activated environment.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN := .venv/bin
READY := .venv/.ready
PYTEST := $(BIN)/python -m pytest
# One worker for each of two cores; a file's tests share a worker and its compilations.
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist loadfile

# What `make lowest` and `make latest` run: every docstring's example, and the imports.
QUICK := numpyro_score tests/test_import.py tests/test_public_names.py
UV := $(BIN)/uv

.PHONY: help setup demo test slow long mutants lowest latest lint format types imports docs \
	requirements clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-14s %s\n", $$1, $$2}' Makefile

setup: $(READY)  ## make .venv with the versions in uv.lock

$(READY): uv.lock pyproject.toml .ci/setup .ci/requirements.txt
	@.ci/setup

demo: $(READY)  ## learn a prior over digits and use it in a model
	$(BIN)/python examples/01_digits.py

test: $(READY)  ## run the tests, without those marked slow
	$(PYTEST) $(PARALLEL)

# Workers fill all cores. Threads of the linear algebra that JAX calls on CPUs would wait
# for each other, many times as long as a decomposition of a small matrix takes.
test slow long: export OPENBLAS_NUM_THREADS ?= 1
slow long: export XLA_FLAGS := --xla_backend_optimization_level=1 $(XLA_FLAGS)

slow: $(READY)  ## run the tests marked slow, without those marked long
	$(PYTEST) $(PARALLEL) -m "slow and not long" || test $$? -eq 5  # 5: no test is marked

long: $(READY)  ## run the slow tests that are left to the weekly run
	$(PYTEST) $(PARALLEL) -m "slow and long"

mutants: $(READY)  ## plant faults one at a time and print which the tests catch
	$(BIN)/python -m tests.mutants --slow

# Run the quick tests in an environment of their own: its name, uv's resolution, options.
define tests_with
	$(UV) venv --quiet --clear --python $(BIN)/python .venv-$(1)
	$(UV) pip install --quiet --python .venv-$(1)/bin/python --resolution $(2) \
		--editable ".[examples]"
	$(UV) pip install --quiet --python .venv-$(1)/bin/python --group test
	$(UV) pip freeze --quiet --python .venv-$(1)/bin/python
	.venv-$(1)/bin/python -m pytest $(PARALLEL) -m "not long" $(3) $(QUICK)
endef

# Old versions warn of their own age, which is no news.
lowest: $(READY)  ## quick tests with the lowest versions in pyproject.toml
	$(call tests_with,lowest,lowest-direct,-W ignore::DeprecationWarning)

latest: $(READY)  ## quick tests with the newest versions that there are
	$(call tests_with,latest,highest)

lint: $(READY)  ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## rewrite the code in the agreed format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)  ## check the type annotations of the package
	$(BIN)/mypy numpyro_score

imports: $(READY)  ## check that imports follow the layers
	$(BIN)/lint-imports

docs: $(READY)  ## build the documentation into docs/_build/html
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

requirements: $(READY)  ## write .ci/requirements.txt again after a change of uv.lock
	$(BIN)/uv export --quiet --frozen --no-hashes --no-emit-project --no-header \
		--no-annotate --output-file .ci/requirements.txt

clean:  ## remove what was built, and .venv
	rm -rf .venv .venv-lowest .venv-latest docs/_build dist build .pytest_cache .mypy_cache .ruff_cache \
		.import_linter_cache .jax_cache
