PYTHON ?= python3
BIN = .venv/bin

.PHONY: setup train test lint bench
setup: .venv/.done

.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

train: setup
	$(BIN)/python -m fastdeit.train

test: setup
	$(BIN)/python -m pytest -n 2 -m "not interpreter"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -m interpreter

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
