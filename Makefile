# Everything needs only Python 3.11+ and a C++ compiler; the rest is installed into .venv.
#   make demo    build a small aligned chat model, harden it, attack it before and after
#   make test    lint, types and the whole test suite
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
DEMO   ?=
PYTEST ?=

BIN := $(VENV)/bin
# pip's build isolation would download torch again for DeepSpeed and for this package.
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test lint install clean

demo: $(VENV)/installed
	$(BIN)/es2fast demo $(DEMO)

test: $(VENV)/installed lint
	$(BIN)/python -m pytest $(PYTEST)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q --upgrade pip "setuptools>=77" wheel ninja
	$(PIP) install -q "$(TORCH)" numpy
	$(PIP) install -q --no-build-isolation "deepspeed>=0.19.8"
	$(PIP) install -q --no-build-isolation -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) runs build .pytest_cache .mypy_cache .ruff_cache *.egg-info
