# Everything there is to do here. `make` alone lists it.
# On a machine with Python 3.11 or newer, make and git, every target first does
# its own set-up (.venv, the pinned packages), once.

.DEFAULT_GOAL := help
.PHONY: help setup figures draw study train lint test lab benchmark docs export lock clean

# The Python that makes .venv: the first of these that is new enough and has venv.
# Another one: `make PYTHON=/path/to/python`.
NEW_ENOUGH := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && echo $$p && break; done)
endif

PY := .venv/bin/python
UV := $(PY) -m uv
READY := .venv/ready

# `make train target=v epochs=5`: words on the command line, and no others (make also reads the environment).
# tools/words.py knows which ones a target takes, and refuses others before anything is done.
QUOTED = '$(subst ','\'',$(1))'
WORDS = $(call QUOTED,$(MAKEOVERRIDES))
ANY_PYTHON := $(firstword $(wildcard $(PY)) $(PYTHON))
ifneq ($(ANY_PYTHON),)
REFUSED := $(shell "$(ANY_PYTHON)" tools/words.py check $(call QUOTED,$(MAKECMDGOALS)) $(WORDS) 2>&1)
ifneq ($(REFUSED),)
$(error $(REFUSED))
endif
endif
# extra words for the command of a target: make test args="-k house"
args =

# The kernel `python3` is the one of .venv, whatever kernels the user has. Bytecode is kept: without it every process compiles torch anew.
unexport JUPYTER_PATH PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE
export JUPYTER_PREFER_ENV_PATH := 1
# glibc keeps memory that is freed: a training step wants the same megabytes again (the second's limit is 32 MB).
export MALLOC_TRIM_THRESHOLD_ := 1073741824
export MALLOC_MMAP_THRESHOLD_ := 33554432

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

setup: $(READY) ## make .venv with the pinned packages (the other targets do this by themselves; UV_TORCH_BACKEND=cpu leaves out CUDA)
	@echo ".venv is ready"

$(READY): settings.ini setup.py constraints.txt
	@"$(PYTHON)" -c '$(NEW_ENOUGH)' >/dev/null 2>&1 || { echo "lfdm needs Python 3.11 or newer with venv (Debian: apt install python3-venv). Where is yours? make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" tools/set_up.py

# Notebooks run from the top; figures go to figures/, records to records/, the notebooks that ran to runs/.
figures: $(READY) ## the whole 2D study from scratch: trains 96 networks, draws every figure (an hour on two cores; make figures scale=quick: 5 minutes)
	@$(PY) tools/words.py study $(WORDS) theory thesis_runs thesis verdicts

draw: $(READY) ## the same figures from the committed record, without training
	@$(PY) tools/words.py study $(WORDS) theory thesis verdicts

study: $(READY) ## one study: make study name=likelihood (or samplers, score_matching, score_target, ...; scale=quick)
	@$(PY) tools/words.py study $(WORDS) $(call QUOTED,$(name))

train: $(READY) ## train, sample and judge one model: make train target=v dataset=swiss epochs=5
	@$(PY) tools/words.py train $(WORDS)

lint: $(READY) ## check style, width and unused names of notebooks, modules, tests and tools (ruff)
	@$(PY) -m ruff check --quiet && echo "lint: all good"

test: $(READY) lint ## run every test: lint, exports, README, links, packaging, site and all notebooks
	@$(PY) -m pytest $(args)

lab: $(READY) ## open JupyterLab on the front page; a notebook that is saved is cleaned, so that one you only ran leaves no diff
	@$(PY) -m jupyterlab --config tools/lab.py $(args)

benchmark: $(READY) ## what a network of the study and a training step cost, beside the arithmetic alone (args=--quick: a minute and a half)
	@$(PY) benchmarks/study.py $(args)
	@$(PY) benchmarks/training.py $(args)

docs: $(READY) ## build the site into _docs (with Quarto where it is installed)
	@$(PY) tools/docs.py

export: $(READY) ## bring lfdm/, README.md and the pages of equations up to date with the notebooks, and clean these
	@$(PY) -c "from nbdev.doclinks import nbdev_export; nbdev_export()"
	@$(PY) -c "from nbdev.clean import nbdev_clean; nbdev_clean()"
	@$(PY) -c "from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml()"
	@$(PY) -c "from lfdm.ledger import write_pages; write_pages()"
	@$(PY) tools/address.py
	@$(PY) tools/readme.py

# Later versions of Python pull in a few packages more: each adds its own to those of 3.11.
lock: ## pin today's newest versions in constraints.txt
	@test -x $(PY) || $(MAKE) setup
	@: > constraints.tmp
	@for v in 3.11 3.12 3.13; do \
		echo uv | $(UV) pip compile setup.py - --extra dev --python-version $$v --constraint constraints.tmp \
			--no-header --no-annotate --quiet > constraints.new || exit 1; \
		LC_ALL=C sort -u constraints.new constraints.tmp -o constraints.tmp; done
	@{ sed -n '/^#/p' constraints.txt; cat constraints.tmp; } > constraints.new
	@mv constraints.new constraints.txt; rm constraints.tmp

clean: ## delete what can be built again (never runs/, nor .venv)
	@rm -rf _docs _proc build dist lfdm.egg-info .pytest_cache .hypothesis constraints.tmp constraints.new
	@find lfdm nbs tests tools -name __pycache__ -prune -exec rm -rf {} + -o -name .ipynb_checkpoints -prune -exec rm -rf {} +
