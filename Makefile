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

NEWEST := $(VENV)-newest
OLDEST := $(VENV)-oldest

# Tests start hundreds of programs: with this set, each would compile our sources again.
unexport PYTHONDONTWRITEBYTECODE

# uv takes a quarter of pip's time. It does not read pip's settings of mirrors, so where it fails pip is tried.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
comma := ,
install = $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --editable '$(1)' || $(PIP) --editable '$(1)'

# $(call another,FOLDER,PACKAGES): an environment with other versions of these packages than pyproject.toml asks for.
define another
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(1)
	printf '$(2)' > $(1)/overrides.txt
	$(BIN)/uv pip install --quiet --python $(1)/bin/python --override $(1)/overrides.txt --editable '.[test]'
	$(BIN)/uv pip list --python $(1)/bin/python | grep -E '^(torch|megatron-core|transformers) '
endef

.PHONY: demo demo-training test test-slow test-newest test-oldest check format clean

demo: $(BASE)
	$(BIN)/python -m tests.demo
	$(MAKE) --no-print-directory demo-training

demo-training: $(TRAIN)
	$(BIN)/python -m tests.demo_training

test: check
	$(BIN)/python -m pytest $(WORKERS) -m "not gpu and not slow"

test-slow: $(FULL)
	$(BIN)/python -m pytest $(WORKERS) -m "slow and not gpu"

# Strict loads, keys and logits with the newest torch and megatron-core that package indexes have, whatever pyproject.toml allows,
# in an environment of its own. Continuous integration does not run it.
test-newest: $(FULL)
	$(call another,$(NEWEST),torch\nmegatron-core\n)
	$(NEWEST)/bin/python -m pytest -W ignore::SyntaxWarning -m "not gpu and not slow" tests/converter/test_te_keys.py tests/converter/test_golden.py \
		tests/converter/test_megatron.py tests/converter/test_families.py

# Strict loads with the oldest megatron-core that reads what mbconvert writes (docs/checkpoint.md).
test-oldest: $(FULL)
	$(call another,$(OLDEST),megatron-core==0.19.0\n)
	$(OLDEST)/bin/python -m pytest -m "not gpu and not slow" tests/converter/test_megatron.py

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
	$(PIP) uv
	$(call install,.)
	touch $@

$(TRAIN): $(BASE)
	@echo "installing torch and megatron-core, some minutes the first time"
	$(call install,.[train])
	touch $@

$(FULL): $(BASE)
	$(call install,.[test$(comma)check])
	touch $@

clean:
	rm -rf $(VENV) $(NEWEST) $(OLDEST) demo build *.egg-info
