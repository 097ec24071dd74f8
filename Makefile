# `make demo` and `make test` set up everything they need in .venv; nothing else is touched.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint format bench bench-gpu clean

demo: .venv/ready
	$(BIN)/lightning-gemini fit --config configs/opt_demo.yaml --trainer.strategy.init_args.device_memory 4MiB
	$(BIN)/lightning-gemini report runs/opt_demo

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/ready
	$(BIN)/python -m benchmarks

bench-gpu: .venv/ready
	$(BIN)/python -m benchmarks.gpu

clean:
	rm -rf .venv build *.egg-info

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch --editable '.[dev]'
	touch $@
