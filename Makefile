# Everything happens in .venv, made on first use and again when the build files change.
# Variables: PYTHON (the interpreter to start from), CORA_DATA (data folder), ARGS (passed on).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
NATIVE = $(shell find csrc benchmarks tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
BUILD := pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/* csrc/*/*)

# A data folder beside the project is taken when none is named.
ifndef CORA_DATA
ifneq ($(wildcard ../shared/data),)
export CORA_DATA := $(abspath ../shared/data)
endif
endif

.PHONY: demo test bench performance sanitize lint clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py --output demo-output $(ARGS)

# As many processes as processors; a file's tests, which share what they made, stay in one.
test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

# Each kernel against torch; whole models are timed by `cora bench`.
bench: $(VENV)/.test
	$(BIN)/python -m pytest benchmarks $(ARGS)

# The native tests under AddressSanitizer, and between guard pages.
sanitize: $(VENV)/.test
	$(BIN)/python tests/sanitize/run.py $(ARGS)

# Every kernel and whole networks against other libraries (docs/performance.md), about ten minutes.
performance: $(VENV)/.peers
	$(BIN)/python benchmarks/performance.py $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output .pytest_cache .mypy_cache .ruff_cache

# The build's own requirements go into the environment: built without isolation, torch is there once.
$(VENV)/.tools: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) 'setuptools>=77' wheel 'cmake>=3.22' ninja torch
	touch $@

$(VENV)/.demo: $(VENV)/.tools $(BUILD)
	$(PIP) --no-build-isolation -e '.[demo]'
	touch $@

# With the demo's packages: one build serves both.
$(VENV)/.test: $(VENV)/.tools $(BUILD)
	$(PIP) --no-build-isolation -e '.[test,demo]'
	touch $(VENV)/.demo $@

$(VENV)/.peers: $(VENV)/.test
	$(PIP) --no-build-isolation -e '.[test,demo,peers]'
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) clang-format mypy ruff types-tqdm
	touch $@
