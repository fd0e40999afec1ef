# Python 3.10 or newer and make are all that is needed: every target makes its environment from nothing and reuses it afterwards.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
OLDEST_PYTHON ?= python3.10
BIN := $(VENV)/bin

# Photographs for the demo, and further options of the recipe: make demo IMAGE=my.jpg OPTIONS="--trainer.max_epochs 4"
IMAGE ?=
OPTIONS ?=
# Tests to run: make test TESTS=tests/engines
TESTS ?= tests
# Processes that share the tests out, file by file.
WORKERS ?= 2
LIGHT := not slow and not gpu

.PHONY: demo test test-slow test-oldest lint docs bench clean

$(VENV)/installed: setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is older than Python 3.10; give a newer one: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,test,lint,docs]'
	@touch $@

demo: $(VENV)/installed
	$(BIN)/lightning-plugins run panoramic_depth $(if $(IMAGE),--image $(IMAGE)) $(OPTIONS)

# The tensors of the tests are small, and the ranks share the cores: threads would wait for each other.
test test-slow test-oldest: export OMP_NUM_THREADS ?= 1

# The whole suite under pytorch_lightning, then what knows Lightning once more under lightning.pytorch. TESTS may hold nothing
# of the latter, and pytest exits with 5 where it selects nothing.
test: $(VENV)/installed
	LIGHTNING_PLUGINS_NAMESPACE=pytorch_lightning $(BIN)/python -m pytest $(TESTS) -n $(WORKERS) --dist loadfile -m "$(LIGHT)"
	LIGHTNING_PLUGINS_NAMESPACE=lightning.pytorch $(BIN)/python -m pytest $(TESTS) -n $(WORKERS) --dist loadfile -m "adapter and $(LIGHT)" || [ $$? -eq 5 ]

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest $(TESTS) -m "slow"

$(OLDEST)/installed: setup.py pyproject.toml constraints-oldest.txt
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[all,test]'
	@touch $@

test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python -m pytest $(TESTS) -n $(WORKERS) --dist loadfile -m "$(LIGHT)"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/installed
	$(BIN)/mkdocs build --strict

bench: $(VENV)/installed
	for script in benchmarks/[!_]*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) $(OLDEST) build site *.egg-info
