PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# faiss-cpu and faiss-gpu conflict, so one of them is chosen here.
EXTRA ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)

.PHONY: demo install lint test test-integration bench clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRA),test]' --constraint constraints.txt
	touch $@

demo: $(READY)
	$(BIN)/tac-ray demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test: $(READY)
	$(BIN)/python -m pytest -m "not integration and not browser and not gpu"

test-integration: $(READY)
	$(BIN)/python -m pytest -m "integration or browser" --timeout 1200

bench: $(READY)
	@set -e; for name in embed kmeans neighbors head graph; do $(BIN)/python benchmarks/$$name.py; done

clean:
	rm -rf $(VENV) build *.egg-info
