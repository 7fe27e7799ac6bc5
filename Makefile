# make quickstart   a whole small study, installed and run
# make compress     a model of one's own: make compress MODEL=/data/my-model RATIO=20 (METHOD, OUT, CALIBRATION, TEST, DTYPE)
# make export       a checkpoint for other tools: make export CHECKPOINT=folder TO=dense OUT=folder (TO: same, dense, gguf)
# make check        before a commit: style, types and the fast tests that run no whole model
# make test         the checks and the tests; for root, apt installs SLURM and Chromium if they are missing, else their tests are skipped
# make test-slurm   of these, the tests on a throw-away SLURM cluster, 9 minutes
# make bench        how fast parts are against plain forward passes, within 8 minutes: make bench (SIZE=7b on a GPU, within 10; FILE=bench.json)
# make plan         what a study will need of memory, disk and time: make plan CONFIG=config/paper.yaml (GPUS=0 without GPUs)
# make status       what of a run is done, runs, failed and is missing: make status RUN=results/quickstart
# make docs         the pages as a site in site/, to be opened at site/index.html
# make why          what would run and why: make why CONFIG=config/paper.yaml TARGET=results/paper/tables/table_1.csv (DIRECTORY=OUT for
#                   the OUT/study.yaml of make compress)
# All set up ./.venv first if it is missing.

PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
ifneq ($(words $(BIN)),1)
$(error $(BIN): Snakemake starts its jobs by this path, and a space divides it. Clone into a folder without one, or name another for the environment: make VENV=/path/of/venv)
endif
export PATH := $(BIN):$(PATH)
# Every job is a Python of its own, which would compile the library and look up its fingerprints anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup quickstart compress export check fast test all-tests test-slurm lint style types plan status why bench benchmark memory schema rulegraph docs

setup: $(VENV)/.installed

$(VENV)/.installed: envs/requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): about 2 GB; nothing more is said for about three minutes"
	$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -r envs/requirements.txt
	@# pip compiles on one processor. (Some packages bring files that no Python 3 compiles.)
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@

quickstart: setup
	@python workflow_scripts/run.py --configfile config/quickstart.yaml --profile profiles/local
	@PYTHONPATH=workflow_scripts python -m lowrank.paper.show results/quickstart

quoted = '$(subst ','\'',$($(1)))'
# A variable of the environment is no option: `OUT` and `TEST` are common names.
option = $(if $(filter command,$(firstword $(origin $(1)))),'$(2)$(subst ','\'',$($(1)))')

# The command knows by make's flags whether an option is misspelt.
compress: setup
	@MAKE_WAS_GIVEN="$$MAKEFLAGS" python workflow_scripts/compress.py $(call option,METHOD,--method=) $(call option,OUT,--out=) \
		$(call option,CALIBRATION,--calibration=) $(call option,TEST,--test=) $(call option,DTYPE,--dtype=) \
		-- $(call quoted,MODEL) '$(RATIO)'

export: setup
	@python workflow_scripts/export.py $(call option,TO,--to=) -- $(call option,CHECKPOINT,) $(call option,OUT,)

check: setup
	$(MAKE) --jobs 2 --output-sync=target lint fast

# Of the tests that are not marked as slow, those that run no whole model: the others are for `make test`.
FAST := project config $(addprefix unit/, bases calibration cluster compression config jobs paper progress ranks reruns sources)

# Tests call make as a user does, not as a part of this one; an environment that was named is still theirs.
NAMED := $(if $(filter command,$(firstword $(origin VENV))),VENV='$(abspath $(VENV))')
PYTEST := env -u MAKELEVEL -u MAKEFLAGS -u MFLAGS $(NAMED) OMP_NUM_THREADS=1 python -m pytest

fast: setup
	$(PYTEST) -n 2 -m "not slow and not slurm" $(addprefix tests/, $(FAST)) tests/unit/test_*.py

# The long ones first. One process more than processors, since the one with SLURM's tests mostly waits.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(os.cpu_count(), 8) + 1)')
LONG := tests/slurm tests/survival tests/e2e tests/workflow

test: setup
	$(MAKE) --jobs 3 style types all-tests

all-tests: setup
	$(PYTEST) -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(LONG) tests/unit tests/config tests/docs tests/project

test-slurm: setup
	python -m pytest -m slurm tests/slurm

lint: style types

style: setup
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile rules
	snakemake --lint --configfile config/quickstart.yaml
	zizmor --offline --quiet .github/workflows

types: setup
	PYTHONPATH=workflow_scripts mypy

CONFIG ?= config/paper.yaml

plan: setup
	PYTHONPATH=workflow_scripts python -m lowrank.cluster.plan $(call option,GPUS,--gpus-per-job=) $(call quoted,CONFIG)

RUN ?= results/quickstart

status: setup
	@PYTHONPATH=workflow_scripts python -m lowrank.progress.status $(call quoted,RUN)

why: setup
	@python workflow_scripts/why.py $(TARGET) --configfile $(call quoted,CONFIG) $(call option,DIRECTORY,--directory=) --cores 1

# With MODEL=folder also the peaks of `make memory`, which take their own time.
bench: setup
	@python -m tests.benchmarks $(call option,SIZE,--size=) $(call option,MODEL,--model=) -- $(call option,FILE,)

# The quickstart's time and memory, cold.
benchmark: setup
	python tests/benchmarks/quickstart.py

# Peaks of the stages on a small model, beside the plan's estimates: make memory MODEL=folder
memory: setup
	python tests/benchmarks/memory.py $(call option,MODEL,)

# After a change of the config's sections: the schema that editors use, and the page of all keys.
schema: setup
	PYTHONPATH=workflow_scripts python -m lowrank.config schema > config/schema.json.tmp
	mv config/schema.json.tmp config/schema.json
	PYTHONPATH=workflow_scripts python -m lowrank.config reference > docs/config.md.tmp
	mv docs/config.md.tmp docs/config.md

# After a change of what rules read and make: the picture of docs/architecture.md. It needs Graphviz.
rulegraph: setup
	python docs/rulegraph.py

# Its packages are pinned in envs/docs.txt and have an environment of their own. (The theme's warning
# is of a mkdocs that is not pinned.) With SOURCES, links to code lead to a host:
# make docs SOURCES=https://host/owner/rankwise/blob/main
docs: $(VENV)/docs/.installed
	NO_MKDOCS_2_WARNING=1 SOURCES=$(call option,SOURCES,) $(VENV)/docs/bin/mkdocs build --strict --quiet
	@echo "site/index.html; with its search: python -m http.server --directory site"

$(VENV)/docs/.installed: envs/docs.txt
	$(PYTHON) -m venv $(VENV)/docs
	$(VENV)/docs/bin/python -m pip install --quiet --disable-pip-version-check -r envs/docs.txt
	touch $@
