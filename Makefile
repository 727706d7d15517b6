PYTHON ?= python3
BIN = .venv/bin

.PHONY: setup train test soak lint bench
setup: .venv/.done

.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

train: setup
	$(BIN)/python -m fastdeit.train

# One thread a process: two of them share the work of the suite.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not soak" tests/fastdeit tests/benchmarks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not interpreter" tests/kernels tests/pipelines
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -m interpreter tests/kernels

# The long versions of the tests that kill, interrupt and resume runs.
soak: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak

# Ours beside its peers; without a GPU what can be measured on the CPU.
bench: setup
	$(BIN)/python -m benchmarks all

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
