# On a fresh machine with Python 3.11 or newer: `make demo` shows the project at work, `make test` proves it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: install demo test test-slow lint bench docs image clean

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

# A container of `blip serve`; for GPUs: make image TORCH_INDEX=https://download.pytorch.org/whl/cu130
DOCKER ?= docker
IMAGE ?= openblip
image:
	$(DOCKER) build --tag $(IMAGE) $(if $(TORCH_INDEX),--build-arg TORCH_INDEX=$(TORCH_INDEX)) .

# An environment of an older Python, or half of one, is made anew; one of `uv venv`, which has no pip, gets it. uv installs
# the same packages as pip, several times faster; it lives in the environment that it fills.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11) and "openblip needs Python 3.11 or newer, and %s is %s: \
make install PYTHON=python3.12" % (sys.executable, sys.version.split()[0]))

$(READY): pyproject.toml
	@$(BIN)/python -c '$(NEW_ENOUGH)' 2>/dev/null || { $(PYTHON) -c '$(NEW_ENOUGH)' && \
	  $(PYTHON) -m venv $$(test -f $(VENV)/pyvenv.cfg && echo --clear) $(VENV); }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null || { echo "$(VENV) has no pip \
	  and this Python cannot make it: install python3-venv, or give PYTHON=another" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) runs docs/_build
