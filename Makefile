# `make demo` and `make test` each need nothing but Python 3.11 or newer and a package registry.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test slow setup check format docs lock clean

demo: setup  ## train, evaluate and serve a small hybrid model on this machine
	@$(BIN)/sevenfold demo

test: setup  ## everything that CI runs
	@scripts/check

slow: setup  ## the same, then the tests that take more than a minute
	@scripts/check --slow

check: setup  ## format, lint, types, layers and documentation, without the tests
	@scripts/check --fast

setup:  ## make .venv hold what requirements/dev.txt pins
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) must be on the PATH (Python 3.11 or newer); name another, for example \`make $(MAKECMDGOALS) PYTHON=python3.12\`" >&2; \
	  exit 1; }
	@$(PYTHON) scripts/set_up.py

format: setup  ## rewrite the code to the house style
	@$(BIN)/ruff check --fix-only --quiet
	@$(BIN)/ruff format

docs: setup  ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lock: setup  ## resolve requirements/dev.txt anew
	@$(BIN)/python scripts/lock.py

clean:  ## remove the environment, caches and built pages; runs and demo output stay
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist site
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
