# Everything here runs in .venv, which the first target that needs it makes. `make help` says what there is.
PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
# Stamps: installed again only when what there is to install has changed.
DEMO := $(VENV)/.installed-demo
DEV := $(VENV)/.installed-dev

# Up to four processes share the processors: threads of theirs would only wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --maxprocesses 4 --dist loadfile
# For tests that often wait for processes that they started: one more than there are processors.
ONE_MORE := $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
COVERING := $(addprefix tests/,trust privacy federation flow aggregation clients)

.DEFAULT_GOAL := help
.PHONY: help demo test check browser postgres bench soak clean
# Targets share one environment and two processors.
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:  ## Say what each target does
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

demo: $(DEMO)  ## Five recyclers train one model on real photos, privately; ARGS="privacy.target_epsilon=2" changes it
	$(BIN)/fedgrade demo $(ARGS)

# A file's tests share what their module sets up, so a file stays with one process; more than four only wait for memory.
# Coverage counts, and makes slower, only the tests that reach the rooms that must be covered; those that calculate for
# long, in lines that others reach too, are marked no_cover.
test: check browser postgres  ## Everything that must hold: make check, then all tests but the slow ones
	$(PYTEST) --numprocesses auto $(COVERING) --cov=fedgrade.trust --cov=fedgrade.privacy --cov=fedgrade.federation \
		--cov-report=term:skip-covered --cov-fail-under=95 $(ARGS)
	$(PYTEST) --numprocesses $(ONE_MORE) tests $(addprefix --ignore=,$(COVERING)) $(ARGS)

check: $(DEV)  ## Style, types and the order of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(DEV)  ## Measure, and write the figures into docs/benchmarks.md
	$(BIN)/python tests/benchmarks/run.py --write docs/benchmarks.md $(ARGS)

soak: $(DEV)  ## The slow tests, minutes to hours: attacks, long audits; writes what they found into docs/soak.md
	FEDGRADE_FIGURES=docs/soak.md $(BIN)/python -m pytest -m slow $(ARGS)

clean:  ## Remove the environment and every cache; never runs/, which holds keys and ledgers
	rm -rf $(VENV) build dist *.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +

# Pip is the last thing that venv puts in place: an environment without it was interrupted.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "fedgrade needs Python 3.11 or newer, and $(PYTHON) is not; try: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)

$(DEMO): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing into $(VENV): several gigabytes the first time, most of them CUDA libraries that torch brings along."
	$(INSTALL) -e '.[demo]'
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing into $(VENV): several gigabytes the first time, most of them CUDA libraries that torch brings along."
	$(INSTALL) -e '.[dev]'
	@touch $(DEMO) $@

# Browser tests open pages in the system's Chromium; without one they skip.
browser:
	@if command -v chromium chromium-browser google-chrome >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		{ apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium >/dev/null; } \
			|| echo "Chromium could not be installed with apt-get: browser tests skip."; \
	else echo "No Chromium here, and no right to install one: browser tests skip."; fi

# One test file starts a PostgreSQL server of its own; without its programs it skips.
postgres:
	@if command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		{ apt-get update -qq && apt-get install -qq -y --no-install-recommends postgresql >/dev/null; } \
			|| echo "PostgreSQL could not be installed with apt-get: its tests skip."; \
	else echo "No PostgreSQL server here, and no right to install one: its tests skip."; fi
