# Two commands matter: `make demo` and `make test`. Both build what they need in .venv, once, and reuse it until the
# requirements in pyproject.toml change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
REQUIREMENTS := $(shell sed -n '/^dependencies/,/^\[tool.ruff\]/p' pyproject.toml | cksum | cut -d' ' -f1)
BASE := $(VENV)/.base-$(REQUIREMENTS)
TRAIN := $(VENV)/.train-$(REQUIREMENTS)
FULL := $(VENV)/.full-$(REQUIREMENTS)

# Two processes share the tests, a file at a time: fixtures of a file are made once.
WORKERS := -n 2 --dist loadfile

.PHONY: demo demo-training test test-slow check format clean

demo: $(BASE)
	$(BIN)/python -m tests.demo
	$(MAKE) --no-print-directory demo-training

demo-training: $(TRAIN)
	$(BIN)/python -m tests.demo_training

test: check
	$(BIN)/python -m pytest $(WORKERS) -m "not gpu and not slow"

test-slow: $(FULL)
	$(BIN)/python -m pytest $(WORKERS) -m "slow and not gpu"

check: $(FULL)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(FULL)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(BASE):
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 12), "mbtools needs Python 3.12, this is " + sys.version'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(TRAIN): $(BASE)
	@echo "installing torch and megatron-core, some minutes the first time"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train]'
	touch $@

$(FULL): $(BASE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,check]'
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info
