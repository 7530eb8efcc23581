# The README's two commands. Both build .venv where it is absent and take no time for it the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BROWSER := chromium fonts-noto-cjk

# Settings of the user that would put packages elsewhere than into .venv.
export PIP_USER := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PIP_TARGET PIP_PREFIX PYTHONHOME PYTHONPATH

.PHONY: help demo test lint browser env clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   the small model with and without acceleration: table, out/demo.json, out/demo.png"
	@echo "make test   the whole test suite"
	@echo "make clean  removes .venv and what the two wrote"

demo: env
	$(BIN)/python -m para_core.demo

test: env browser lint
	$(BIN)/python -m pytest

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Keyed by content: what is installed changes when this file's, the project's or the found ComfyUI's requirements do.
# torch is installed only where it is absent, and pinned to what is there while everything else is installed.
env: $(BIN)/python
	@set -eu; \
	comfyui=$$($(BIN)/python -m para_core.demo.host); \
	host=$${comfyui:+$$comfyui/requirements.txt}; \
	want=$$(cat Makefile pyproject.toml $${host:+"$$host"} | cksum); \
	if [ "$$(cat $(VENV)/installed 2>/dev/null)" != "$$want" ]; then \
		$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install torch torchvision; \
		$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/constraints.txt; \
		$(BIN)/python -m pip install -c $(VENV)/constraints.txt -e '.[demo,test]' $${host:+-r "$$host"}; \
		echo "$$want" > $(VENV)/installed; \
	fi

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Para Accelerate needs Python 3.10 or newer; choose one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Where there is neither a browser nor the right to install one, the browser tests are skipped and say so.
browser:
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
		if command -v $$name >/dev/null; then exit 0; fi; \
	done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
		&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(BROWSER); then exit 0; fi; \
	echo "no Chromium here and none could be installed: the browser tests will be skipped"

clean:
	rm -rf $(VENV) out *.egg-info build .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
