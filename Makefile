# Two commands do all the set-up: `make demo` and `make test`. Each makes .venv once; later runs reuse it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test check bench soak consumers clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("cai_graph needs Python 3.11 or newer; set PYTHON=python3.12, say" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## prompts go through the embedded model; the log is cai.db
	$(BIN)/cai demo

test: $(VENV)/.installed  ## the whole test suite, with the tiny model only; two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(VENV)/.installed  ## format, lint, types, import contracts, fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not local'

bench: $(VENV)/.installed  ## side-by-side benchmarks; figures go to benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks

soak: $(VENV)/.installed consumers  ## long kill loops; lowest versions; foreign trainers read our formats; sharded training; PPO against TRL's
	CAI_LOWEST=1 $(BIN)/python -m pytest tests/test_lowest.py
	CAI_LOG_KILLS=1000 $(BIN)/python -m pytest tests/log/test_log_crash.py --timeout 0
	CAI_LOG_FALLS=200 $(BIN)/python -m pytest tests/log/test_log_postgres.py -k "killed or falls" --timeout 0
	$(BIN)/python -m pytest tests/trainers/export/test_consumers.py tests/trainers/test_elsewhere.py
	CAI_SHARDED_KILLS=1 $(BIN)/python -m pytest tests/trainers/stages/test_processes.py tests/trainers/test_online.py tests/trainers/ppo/test_ppo.py \
		-k "zero or sharded" --timeout 0
	CAI_TRL_PPO=1 $(BIN)/python -m pytest tests/trainers/ppo/test_ppo_trl.py -s --timeout 0

consumers: $(VENV)/.installed  ## OpenRLHF, verl, LLaMA-Factory, axolotl and DeepSpeed beside the project, for `make soak`
	test -d .consumers/venv || $(PYTHON) -m venv .consumers/venv
	.consumers/venv/bin/python -m pip install --quiet torch==2.13.0 transformers==4.57.1 'datasets<5' peft accelerate \
		omegaconf pylatexenc tensordict codetiming hydra-core tyro av ray pandas pyarrow trl==0.24.0 fire einops pillow
	.consumers/venv/bin/python -m pip install --quiet --no-deps openrlhf==0.11.2 verl==0.9.1 llamafactory==0.9.5
	$(BIN)/python -m pip install --quiet --no-deps --target .consumers/configs --upgrade verl==0.9.1 openrlhf==0.11.2 \
		hydra-core omegaconf antlr4-python3-runtime==4.9.3
	$(BIN)/python -m pip install --quiet --no-deps --target .consumers/axolotl --upgrade axolotl==0.19.0 addict posthog \
		numba llvmlite fastcore zstandard schedulefree backoff distro colorama art python-dotenv fire termcolor
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target .consumers/deepspeed \
		--upgrade deepspeed==0.19.8 hjson py-cpuinfo einops ninja msgpack

clean:
	rm -rf $(VENV) .consumers cai.db cai.db-wal cai.db-shm
