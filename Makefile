# Everything needs only Python 3.11+ and a C++ compiler; the rest is installed into .venv.
#   make demo    build a small aligned chat model, harden it, attack it before and after
#   make real MODEL=DIR   harden a real chat model; REAL="--quick --harmful F ..." for its options
#   make test    lint, types and the whole test suite
#   make extras  lm-evaluation-harness and inspect_ai, for --lm-eval and es2fast/RUN
#   make clean   remove caches and builds; .venv and the models in runs/ stay
#   make sanitize  the native kernels' tests under the address and undefined-behaviour sanitizers
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
LOCK   ?= requirements/lock.txt
DEMO   ?=
MODEL  ?=
REAL   ?=
PYTEST ?=

BIN := $(VENV)/bin
# pip's build isolation would download torch again for DeepSpeed and for this package.
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Versions with which the tests ran; LOCK= takes the newest ones that fit.
INSTALL := $(PIP) install -q $(if $(LOCK),-c $(LOCK))

.PHONY: demo real test lint install extras sanitize bench clean

demo: $(VENV)/installed
	$(BIN)/es2fast demo $(DEMO)

ifeq ($(MODEL),)
real:
	$(error MODEL is not set; make real MODEL=DIR, a folder or a Hugging Face id)
else
real: $(VENV)/installed
	$(BIN)/es2fast harden $(MODEL) $(REAL)
endif

# Two processes, one thread each: more threads than cores make tiny matrices wait for each other.
test: $(VENV)/extras lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20 $(PYTEST)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Built apart from the library in use; Python itself is not instrumented, hence the preloads, and
# leaks in it are not ours. Torch's own threads and allocator stay as they are.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g
sanitize: $(VENV)/installed
	rm -rf build/sanitize && mkdir -p build/sanitize && cp -r es2fast csrc bench tests setup.py pyproject.toml README.md build/sanitize
	rm -f build/sanitize/es2fast/_native*.so
	cd build/sanitize && ES2FAST_CXXFLAGS="$(SANITIZE)" $(abspath $(BIN))/python setup.py -q build_ext --inplace
	ls build/sanitize/es2fast/_native*.so > /dev/null
	cd build/sanitize && PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		$(abspath $(BIN))/python -m pytest -q tests/ops -k "native and not compil and not installation" $(PYTEST)

# pytest-benchmark on the CPU; `make bench PYTEST=--benchmark-compare` sets it against the last run.
bench: $(VENV)/installed
	$(BIN)/python -m pytest bench --benchmark-autosave $(PYTEST)

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml setup.py $(wildcard csrc/*) $(LOCK)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q --upgrade pip "setuptools>=77" wheel ninja
	$(INSTALL) "$(TORCH)" numpy
	$(INSTALL) --no-build-isolation "deepspeed>=0.19.8"
	$(INSTALL) --no-build-isolation -e ".[test]"
	touch $@

extras: $(VENV)/extras

# Packages of optional features, whose tests would skip without them; the demo needs none.
$(VENV)/extras: $(VENV)/installed
	$(INSTALL) --no-build-isolation -e ".[lm-eval,inspect]"
	touch $@

# Not runs/, where hours of training are, and not the environment.
clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache *.egg-info
