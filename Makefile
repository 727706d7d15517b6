PYTHON ?= python3
BIN = .venv/bin

.PHONY: setup train test test-fast test-ptx soak lint bench
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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not soak" tests/test_*.py tests/fastdeit tests/benchmarks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not interpreter and not soak" tests/kernels tests/pipelines tests/ptx
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -m interpreter tests/kernels

# What notices most in about two minutes on two cores: the arithmetic of training, the settings, the recipes, losses,
# models, weights, teachers, views, checkpoints and resuming. No several processes, no reports, no kernels on the CPU.
FAST = $(patsubst %,tests/fastdeit/test_%.py,training_arithmetic settings recipes config deit_flags objective optimizer \
	schedule lamb model weights teacher checkpoint resume written_before) \
	$(patsubst %,tests/pipelines/test_%.py,sampler draws crop mixing auto_augment) \
	$(patsubst %,tests/kernels/test_%.py,distillation_loss mix_normalize)
test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not soak and not interpreter" tests/test_*.py $(FAST)

# The kernels' compiled code on the CPU (tests/ptx), at the sizes of real models too; `make test` takes a part of it.
test-ptx: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/ptx

# The long versions of the tests that kill, interrupt and resume runs.
soak: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak --ignore=tests/ptx

# Ours beside its peers; without a GPU what can be measured on the CPU.
bench: setup
	$(BIN)/python -m benchmarks all

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
