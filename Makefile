# `make demo` and `make test` need nothing but python3 (3.11 or newer) with venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
KILLS ?= 20
MINUTES ?= 10
TEST_PROCESSES ?= 2
PYTEST = $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

.PHONY: setup demo test test-quick soak wheels lint bench bench-encode bench-f0 bench-train bench-convert clean

setup: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: setup
	$(BIN)/python run_pipeline.py demo-corpus demo/corpus
	$(BIN)/python run_pipeline.py extract demo/corpus demo/dataset --config configs/demo.yaml
	$(BIN)/python run_pipeline.py verify demo/dataset
	$(BIN)/python run_pipeline.py report demo/dataset
	$(BIN)/python run_pipeline.py train demo/dataset demo/run --config configs/tiny.yaml
	$(BIN)/python run_pipeline.py convert demo/run demo/corpus/soprano/song-01.flac demo/converted.wav \
		--speaker alto --transpose auto --report

test: setup
	$(PYTEST) -m 'not soak'

test-quick: setup
	$(PYTEST) -m 'not soak and not ray and not slow'

soak: setup
	$(BIN)/python benchmarks/robust.py
	CANTOR_SOAK_KILLS=$(KILLS) $(BIN)/python -m pytest -m soak -s

wheels: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --dry-run --ignore-installed --only-binary=:all: \
		--constraint constraints.txt '.[dev]'
	@echo "Every dependency has a wheel for $$($(BIN)/python --version)."

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/extract.py --minutes $(MINUTES)

bench-encode: setup
	$(BIN)/python benchmarks/encode.py

bench-train: setup
	$(BIN)/python benchmarks/train.py

bench-convert: setup
	$(BIN)/python benchmarks/convert.py

bench-f0: setup
	$(BIN)/python benchmarks/f0.py --page docs/f0.md

clean:
	rm -rf demo bench-out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
