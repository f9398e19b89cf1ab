# Two commands do all the set-up: `make demo` and `make test`. Each makes .venv once; later runs reuse it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test check bench soak clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("cai_graph needs Python 3.11 or newer; set PYTHON=python3.12, say" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## prompts go through the embedded model; the log is cai.db
	$(BIN)/cai demo

test: $(VENV)/.installed  ## the whole test suite, with the tiny model only
	$(BIN)/python -m pytest

check: $(VENV)/.installed  ## format, lint, types, import contracts, fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -m 'not local'

bench: $(VENV)/.installed  ## side-by-side benchmarks; figures go to benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks

soak: $(VENV)/.installed  ## long kill loops on the log, of its writers and of its server
	CAI_LOG_KILLS=1000 $(BIN)/python -m pytest tests/test_log_crash.py --timeout 0
	CAI_LOG_FALLS=200 $(BIN)/python -m pytest tests/test_log_postgres.py -k "killed or falls" --timeout 0

clean:
	rm -rf $(VENV) cai.db cai.db-wal cai.db-shm
