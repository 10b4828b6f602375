# `make demo`, `make test` and `make serve` need only Python, make and a package index. Each makes .venv if there
# is none, installs the versions in constraints.txt, and runs.
#
#   make test PYTEST_ARGS="-k cache -x"     more arguments for pytest
#   make demo DEMO_PROMPT="KING HENRY:" DEMO_ARGS="--temperature 0.5 --seed 1"
#                                           another prompt, other options of `dllm-hf generate`
#   make serve SERVE_MODEL=hub_configs/sdar-tiny-shakespeare SERVE_ARGS="--port 9000"
#                                           another model, other options of `dllm-hf serve`
#   make test PYTHON=python3.12             another Python (for a new .venv)
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
#                                           the CPU build of PyTorch: a far smaller download on Linux

PYTHON      ?= python3
JOBS        ?= 2
OMP_THREADS ?= 1
PYTEST_ARGS ?=
DEMO_PROMPT ?= ROMEO:
DEMO_ARGS   ?= --max-new-tokens 192
SERVE_MODEL ?= hub_configs/llada-tiny-shakespeare
SERVE_ARGS  ?= --port 8000

VENV := .venv
PY   := $(VENV)/bin/python
# What is imported is compiled then, and once: pip would compile all that it installs, of which most is never imported.
PIP  := $(PY) -m pip --disable-pip-version-check install --quiet --no-compile -c constraints.txt
unexport PYTHONDONTWRITEBYTECODE

# A stamp is written only after its install has succeeded. It holds the path of this checkout: the
# editable install points at that path, so a copied or moved .venv is installed again, as is one
# whose Python has gone.
RUN_STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
SERVE_STAMP := $(VENV)/.installed-serve
DEPS      := pyproject.toml constraints.txt
stale      = $(shell $(PY) -c '' 2>/dev/null && [ "$$(cat $(1) 2>/dev/null)" = "$(CURDIR)" ] || echo FORCE)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo serve edge check test test-slow test-ray test-upstream lint types docs package clean venv FORCE

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

# One thread: the models are small, and a second one waits for whatever else the machine does.
demo: $(RUN_STAMP) ## Install, then watch small models continue a prompt and solve a Sudoku
	OMP_NUM_THREADS=$(OMP_THREADS) $(VENV)/bin/dllm-hf generate hub_configs/llada-tiny-shakespeare "$(DEMO_PROMPT)" $(DEMO_ARGS)
	OMP_NUM_THREADS=$(OMP_THREADS) $(PY) examples/sudoku.py solve hub_configs/llada-tiny-sudoku --delay 0.2

serve: $(SERVE_STAMP) ## Install, then serve a small model: a page at http://127.0.0.1:8000, until Ctrl-C
	OMP_NUM_THREADS=$(OMP_THREADS) $(VENV)/bin/dllm-hf serve $(SERVE_MODEL) $(SERVE_ARGS)

# Two processes: the second needs no code of a model.
edge: $(DEV_STAMP) ## Export a small model to ExecuTorch in int8, and solve a Sudoku with the file
	rm -rf build/edge
	OMP_NUM_THREADS=$(OMP_THREADS) $(VENV)/bin/dllm-hf export-edge hub_configs/llada-tiny-sudoku build/edge --quantization int8 --columns 81 --block-length 81
	OMP_NUM_THREADS=$(OMP_THREADS) $(PY) examples/edge_sudoku.py build/edge

# Types and tests side by side, each on a core of its own. `tests/one_of_each.txt` lists the tests.
check: lint ## Check style and types, and run one test of each kind: 90 seconds on two cores
	$(PY) -m mypy & types=$$!; \
	OMP_NUM_THREADS=$(OMP_THREADS) $(PY) -m pytest -q @tests/one_of_each.txt $(PYTEST_ARGS); tests=$$?; \
	wait $$types && exit $$tests

test: $(DEV_STAMP) ## Install, then run the tests (GPU tests are skipped without a GPU)
	OMP_NUM_THREADS=$(OMP_THREADS) $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow" --durations=12 $(PYTEST_ARGS)

# Files that take long come first: a file is one worker's.
test-slow: $(DEV_STAMP) ## Search at random (DLLM_HF_FUZZ=10000 for more cases), try exports, the server, the wheel and whole grids
	OMP_NUM_THREADS=$(OMP_THREADS) $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m slow tests/parallel tests/kernels/test_compilation.py tests/runtimes tests/serving tests/packaging tests/fuzz tests/evaluation tests/engine/test_replicas.py tests/generation/test_graphs.py tests/hub/test_bad_sources.py tests/hub/test_quantize.py tests/examples/test_adapt.py tests/examples/test_adapt_all.py $(PYTEST_ARGS)

test-ray: $(DEV_STAMP) ## Install Ray, then try a dataset of prompts and the server on it (DLLM_HF_RAY_ROWS=10000 for more than 300 rows)
	$(PIP) -e '.[ray]'
	OMP_NUM_THREADS=$(OMP_THREADS) $(PY) -m pytest tests/scaling $(PYTEST_ARGS)

test-upstream: $(DEV_STAMP) ## Install, then run transformers' own model tests (docs/upstream_tests.md)
	OMP_NUM_THREADS=$(OMP_THREADS) PYTHON=$(PY) .ci/test-upstream $(PYTEST_ARGS)

lint: $(DEV_STAMP) ## Check style with ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(DEV_STAMP) ## Check types with mypy
	$(PY) -m mypy

docs: $(DEV_STAMP) ## Build the documentation into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

package: $(DEV_STAMP) ## Build the source distribution and the wheel into dist/
	$(PY) -m build --no-isolation

clean: ## Remove .venv, caches and build output
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./.git -prune -o -type d \( -name __pycache__ -o -name '*.egg-info' \) -prune -exec rm -rf {} +

# The dev install is a superset of the others, so it writes all stamps.
$(DEV_STAMP): $(DEPS) $(call stale,$(DEV_STAMP)) | venv
	@rm -f $(RUN_STAMP) $(SERVE_STAMP) $(DEV_STAMP)
	@echo "Installing dllm-hf and its test tools into $(VENV) (the first time downloads PyTorch: minutes)"
	@$(PIP) -e '.[dev]'
	@echo "$(CURDIR)" > $(RUN_STAMP)
	@echo "$(CURDIR)" > $(SERVE_STAMP)
	@echo "$(CURDIR)" > $(DEV_STAMP)

$(SERVE_STAMP): $(DEPS) $(call stale,$(SERVE_STAMP)) | venv
	@rm -f $(RUN_STAMP) $(SERVE_STAMP) $(DEV_STAMP)
	@echo "Installing dllm-hf and its server into $(VENV) (the first time downloads PyTorch: minutes)"
	@$(PIP) -e '.[serve]'
	@echo "$(CURDIR)" > $(RUN_STAMP)
	@echo "$(CURDIR)" > $(SERVE_STAMP)

$(RUN_STAMP): $(DEPS) $(call stale,$(RUN_STAMP)) | venv
	@rm -f $(RUN_STAMP) $(SERVE_STAMP) $(DEV_STAMP)
	@echo "Installing dllm-hf into $(VENV) (the first time downloads PyTorch: minutes)"
	@$(PIP) -e .
	@echo "$(CURDIR)" > $(RUN_STAMP)

# Makes .venv, or repairs one that was left half made; does nothing to one that works.
venv:
	@if $(PY) -c 'import pip' 2>/dev/null; then exit 0; fi; \
	command -v $(PYTHON) >/dev/null || { \
	  echo "error: '$(PYTHON)' is not there. Name a Python 3.10 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: $$($(PYTHON) --version) is too old; dllm-hf needs 3.10 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }; \
	$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' cannot make virtual environments (no venv or ensurepip)." >&2; \
	  echo "       On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; \
	echo "Making $(VENV) with $$($(PYTHON) --version)"; \
	$(PYTHON) -m venv $(VENV)
