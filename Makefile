# The commands of the README. `make setup` needs Python 3.11+, pip, make and gcc; everything it installs is in .venv/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-all check ui clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test,dev]'
	@touch $(STAMP)

demo: setup
	@$(BIN)/deepfloyd run flows/configs/demo.toml
	@echo "Prefect UI             make ui, then http://127.0.0.1:4200/runs"

# The unit suite: under 3 minutes on 2 cores.
test: setup
	$(BIN)/python -P -m pytest -m 'not slow'

# With real processes, servers, a browser, and the demo's learning figures: under 25 minutes.
test-all: setup
	$(BIN)/python -P -m pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ui: setup
	@$(BIN)/deepfloyd ui

clean:
	rm -rf build workspace .prefect
