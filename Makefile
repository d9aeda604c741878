# Everything there is to do here. `make` alone lists it.
# On a machine with Python 3.11 or newer, make and git, every target first does
# its own set-up (.venv, the pinned packages), once.

.DEFAULT_GOAL := help
.PHONY: help setup figures draw study train lint test lab benchmark docs export lock clean

# The Python that makes .venv: the first of these that is new enough and has venv.
# Another one: `make PYTHON=/path/to/python`.
NEW_ENOUGH := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && echo $$p && break; done)

PY := .venv/bin/python
UV := $(PY) -m uv
READY := .venv/ready

# extra words for the command of a target: make train args="-p target v -p dataset swiss"
args ?=
# where `make train` writes the notebook it has run
out ?= runs/train.ipynb

# The kernel `python3` is the one of .venv, whatever kernels the user has. Bytecode is kept: without it every process compiles torch anew.
unexport JUPYTER_PATH PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE
export JUPYTER_PREFER_ENV_PATH := 1
# glibc keeps memory that is freed: a training step wants the same megabytes again (the second's limit is 32 MB).
export MALLOC_TRIM_THRESHOLD_ := 1073741824
export MALLOC_MMAP_THRESHOLD_ := 33554432

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

setup: $(READY) ## make .venv with the pinned packages (the other targets do this by themselves)
	@echo ".venv is ready"

# The stamp comes last: without it a set-up was cut short, and starts afresh.
$(READY): settings.ini setup.py constraints.txt
	@"$(PYTHON)" -c '$(NEW_ENOUGH)' >/dev/null 2>&1 || { echo "lfdm needs Python 3.11 or newer with venv (Debian: apt install python3-venv). Where is yours? make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "Set-up, once: the pinned packages go into .venv (about 6 GB)."
	@test -f $@ || "$(PYTHON)" -m venv --clear .venv
	@rm -f $@
	@$(PY) -m pip install --quiet --constraint constraints.txt uv
	@$(UV) pip install --python $(PY) --constraint constraints.txt --build-constraint constraints.txt --compile-bytecode --editable ".[dev]"
	@mkdir -p .venv/etc/ipython # a kernel that serves this machine need not warn that it does not encrypt
	@echo "c.IPKernelApp.log_level = 'ERROR'" > .venv/etc/ipython/ipython_kernel_config.py
	@touch $@

# Notebooks run from the top; figures go to figures/, records to records/, the notebooks that ran to runs/.
scale ?= full
STUDY = mkdir -p runs; for n in $(1); do echo "== nbs/experiments/$$n.ipynb, $(scale) scale"; \
	$(PY) -m papermill nbs/experiments/$$n.ipynb runs/$$n.ipynb --no-progress-bar --stdout-file - --stderr-file - -p scale $(scale) || exit 1; done; \
	echo "The figures: figures/. With tables and text: $(1:%=runs/%.ipynb)"
SCALE_KNOWN = case "$(scale)" in full|quick) ;; *) echo "scale is full or quick, not $(scale)." >&2; exit 1;; esac

figures: $(READY) ## the whole 2D study from scratch: trains 96 networks, draws every figure (an hour on two cores; make figures scale=quick: 5 minutes)
	@$(SCALE_KNOWN)
	@$(call STUDY,theory thesis_runs thesis verdicts)

draw: $(READY) ## the same figures from the committed record, without training
	@$(SCALE_KNOWN)
	@$(call STUDY,theory thesis verdicts)

study: $(READY) ## one study: make study name=likelihood (or samplers, score_matching, score_target, ...; scale=quick)
	@$(SCALE_KNOWN)
	@test -f "nbs/experiments/$(name).ipynb" || { echo "There is no study '$(name)': $$(cd nbs/experiments && ls *.ipynb | sed 's/.ipynb//' | xargs)." >&2; exit 1; }
	@$(call STUDY,$(name))

train: $(READY) ## train, sample and judge one model: make train args="-p target v -p dataset swiss"
	@mkdir -p runs
	@$(PY) -m papermill nbs/train.ipynb "$(out)" --no-progress-bar --stdout-file - --stderr-file - $(args)
	@echo "The notebook with its figures: $(out)"

lint: $(READY) ## check style, width and unused names of notebooks, modules, tests and tools (ruff)
	@$(PY) -m ruff check --quiet && echo "lint: all good"

test: $(READY) lint ## run every test: lint, exports, README, links, packaging, site and all notebooks
	@$(PY) -m pytest $(args)

lab: $(READY) ## open JupyterLab on the notebooks
	@$(PY) -m jupyterlab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs $(args)

benchmark: $(READY) ## what a network of the study and a training step cost, beside the arithmetic alone (args=--quick: a minute and a half)
	@$(PY) benchmarks/study.py $(args)
	@$(PY) benchmarks/training.py $(args)

docs: $(READY) ## build the site into _docs (with Quarto where it is installed)
	@$(PY) tools/docs.py

export: $(READY) ## bring lfdm/, README.md and the pages of equations up to date with the notebooks, and clean these
	@$(PY) -c "from nbdev.doclinks import nbdev_export; nbdev_export()"
	@$(PY) -c "from nbdev.clean import nbdev_clean; nbdev_clean()"
	@$(PY) -c "from lfdm.ledger import write_pages; write_pages()"
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
