# `make demo` and `make test` need Python 3.10 or later (with venv) and make; everything else they fetch themselves.

PYTHON ?= python3
VENV ?= .venv
# How the tests are run to measure coverage: `-m coverage run`.
COVERAGE ?=
# More for pytest, e.g. make test ARGS='-k topics -x'
ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check
# --verifytypes does not heed --pythonpath: it asks the first python in PATH.
PYRIGHT := PATH="$(abspath $(BIN)):$$PATH" pyright
CODE := trio_mqtt_driver tests examples docs/conf.py docs/state_diagram.py

.PHONY: demo test coverage bench lint format types docs clean

demo: $(VENV)/.test
	$(BIN)/python examples/demo.py

test: $(VENV)/.test
	$(BIN)/python $(COVERAGE) -m pytest $(ARGS)

coverage:
	$(MAKE) test COVERAGE='-m coverage run'
	$(BIN)/python -m coverage report

# Takes about half an hour; ARGS=--quick for a look, ARGS=--help for the rest. docs/performance.md tells what it measures.
bench: $(VENV)/.test
	$(BIN)/python -m tests.benchmarks $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/flake8 $(CODE)

format: $(VENV)/.lint
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

types: $(VENV)/.lint
	$(BIN)/mypy
	$(PYRIGHT)
	$(PYRIGHT) --verifytypes trio_mqtt_driver --ignoreexternal

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --no-color -W --keep-going -q -b html docs docs/_build/html

clean:
	rm -rf $(VENV) .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache docs/_build

# One environment, filled as far as is needed: each stamp stands for an extra of pyproject.toml.
$(VENV)/.test: $(VENV)/.made
	$(INSTALL) -e '.[test]'
	@touch $@

$(VENV)/.lint: $(VENV)/.test
	$(INSTALL) -e '.[test,lint]'
	@touch $@

$(VENV)/.docs: $(VENV)/.test
	$(INSTALL) -e '.[test,docs]'
	@touch $@

$(VENV)/.made: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON) here. Debian: apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$$($(PYTHON) --version) is too old: set PYTHON to a Python 3.10 or later"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments. Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@
