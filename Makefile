# Every target first sets up .venv, which .venv/.ready marks as done.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test bench lint
# Threads that wait do not spin: beside a busy core that makes the demo a third shorter.
demo: .venv/.ready
	OMP_WAIT_POLICY=passive $(BIN)/fastdpo demo --output_dir demo_run

test: .venv/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet --numprocesses 2 --dist worksteal

bench: .venv/.ready  # hours; bench/README.md has the parts
	$(PIP) --editable '.[bench]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet bench

lint: .venv/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	touch $@
