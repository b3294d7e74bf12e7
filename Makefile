# On a fresh machine with Python 3.11 or newer: `make demo` shows the project at work, `make test` proves it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: install demo test test-slow lint bench docs clean

install: $(READY)

demo: $(READY)
	$(BIN)/python -m recipes.demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(READY)
	$(BIN)/python -m benchmarks.pretrain_step
	$(BIN)/python -m benchmarks.caption
	$(BIN)/python -m benchmarks.capfilt
	$(BIN)/python -m benchmarks.rerank
	$(BIN)/python -m benchmarks.vqa_rank
	$(BIN)/python -m benchmarks.capfilt_job

docs: $(READY)
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build
	@echo "open docs/_build/index.html"

# uv installs the same packages as pip, several times faster; it lives in the environment that it fills.
$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) runs docs/_build
