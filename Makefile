# Every command of the project. `make` alone lists them.

PYTHON ?= python3
VENV ?= .venv
HOROVOD_OPTIONS ?=
JOBS ?= 2

# A relative VENV is meant from this folder, also when make is called from another one. Functions
# such as $(abspath) would split a path at its blanks.
override VENV := $(if $(filter /%,$(firstword $(VENV))),$(VENV),$(CURDIR)/$(VENV))
RUN := PATH="$(VENV)/bin:$$PATH" "$(VENV)/bin/python"
BOOTSTRAP = $(if $(shell command -v "$(PYTHON)"),"$(PYTHON)" horovod_lm/setup/bootstrap.py,\
	$(error no $(PYTHON) was found; install Python (on Debian or Ubuntu: apt-get install python3 \
	python3-venv python3-dev), or name the one to use: make PYTHON=/path/to/python3))
SETUP = $(BOOTSTRAP) --venv "$(VENV)" --horovod-options="$(HOROVOD_OPTIONS)"

.DEFAULT_GOAL := help
.PHONY: help setup example lab notebooks book test ray release faults fuzz bench doctor machines gpu clean

help:  ## list the commands
	@echo "make COMMAND, one of:"
	@sed -n 's/^\([a-z]*\):.*## /  \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'
	@echo "Options: VENV=PATH (an environment, for example \$$VIRTUAL_ENV or \$$CONDA_PREFIX; default .venv),"
	@echo "JOBS=1 (tests at a time; default 2), PYTHON=python3.12, TORCH_INDEX_URL=URL (an index with torch), HOROVOD_OPTIONS=--no-nccl"

setup:  ## make the environment: torch, this package, Horovod built for it
	@$(SETUP) $(if $(filter setup,$(MAKECMDGOALS)),--next)

example: setup  ## train a GPT on two Horovod ranks on real text, and let it talk
	@$(RUN) -m horovod_lm.teaching.notebooks horovod_transformer.example.ipynb \
		--out runs/example/horovod_transformer.example.ipynb
	@$(SETUP) --next

lab: setup  ## open JupyterLab on the course
	@$(RUN) -m jupyterlab

notebooks: setup  ## execute every notebook and store its outputs
	@$(RUN) -m horovod_lm.teaching.notebooks --in-place \
		$(sort $(wildcard *.ipynb)) $(sort $(wildcard notebooks/*.ipynb))

book: setup  ## make a static site of the pages in build/book, from their stored outputs
	@$(RUN) -c "import furo, myst_nb" 2>/dev/null || $(RUN) -m pip install --quiet --editable ".[book]"
	@$(RUN) -m sphinx -q -E -W --keep-going -c docs/book . build/book
	@echo "Open build/book/index.html in a browser."

test: setup  ## run every test
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy
	@$(RUN) -m pytest $(if $(filter-out 1,$(JOBS)),-n $(JOBS) --dist loadgroup)

ray: setup  ## test the job of Ray on a cluster of two simulated hosts: a minute
	@$(RUN) -c "import ray" 2>/dev/null || $(RUN) -m pip install --quiet --editable ".[ray]"
	@$(RUN) -m pytest tests/launch/test_ray.py

release:  ## run before a release: make test with what it leaves out for time, and ray, faults, fuzz
	@FULL=1 $(MAKE) test ray faults fuzz

faults: setup  ## kill, freeze and fill disks, and write the table of tests/faults/README.md
	@FAULTS_TABLE=tests/faults/README.md $(RUN) -m pytest -m fault

fuzz: setup  ## try 10,000 damaged or foreign files, settings, prompts and cells: 2 minutes
	@FUZZ=1 $(RUN) -m pytest tests/fuzz

bench: setup  ## compare speed with the peers on this machine: QUICK=1 (5 minutes), NANOGPT=PATH of its model.py
	@$(RUN) tests/benchmarks/bench.py $(if $(QUICK),--quick) $(if $(NANOGPT),--nanogpt "$(NANOGPT)")

doctor:  ## check this machine, and say how to fix what does not work; needs no set-up
	@$(if $(shell "$(VENV)/bin/python" -c "" >/dev/null 2>&1 && echo runs),\
		"$(VENV)/bin/python" -m horovod_lm.setup.doctor,$(BOOTSTRAP) doctor --venv "$(VENV)")

machines:  ## run the course on other systems (needs root and debootstrap): ROWS="trixie bookworm:g++-11"
	@$(PYTHON) tests/machines/machines.py $(ROWS)

gpu:  ## check the project on a GPU, without a network: PYTHON=(one that has torch) SOURCE=ARCHIVE OUT=FOLDER
	@$(PYTHON) tests/gpu/kit.py $(if $(SOURCE),--source "$(SOURCE)") $(if $(OUT),--out "$(OUT)")

clean:  ## delete prepared data and caches; runs and the environment stay
	rm -rf notebooks/data data/preprocessed build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
