# Every target makes what it needs on a machine that has only Python 3.11 or newer, and reinstalls nothing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ENGINE := .venv-engine

.PHONY: demo ablation accuracy test test-engine lint docs bench

demo: $(VENV)/.stamp-tensorboard  ## train, quantize, align, export, compare: about 4 minutes on 2 cores, installation not counted
	$(BIN)/python -m lockstep.recipes.demo

ablation: $(VENV)/.stamp-tensorboard  ## GRPO in four arms of three seeds, trainer and rollouts in bf16 or INT4: about 10 minutes on 2 cores
	$(BIN)/python -m lockstep.recipes.ablation --jobs 2

accuracy: $(VENV)/.stamp-ptq  ## QAT, QAD and post-training quantization of 10 million parameters, on a CPU
	$(BIN)/python benchmarks/accuracy/study.py --size small --seeds 1

test: $(VENV)/.stamp-dev  ## everything but the engine
	$(BIN)/python -m pytest -n 2

test-engine: $(VENV)/.stamp-dev  ## serve the exports in vLLM, in its own environment
	PYTHON=$(PYTHON) tests/engine/install.sh $(ENGINE)
	$(BIN)/python -m pytest -m engine tests/engine

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.stamp-docs  ## into site/; a broken link or reference is an error
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.stamp-dev  ## every benchmark in a size for CPUs, about a minute
	$(BIN)/python benchmarks/run.py --quick --device cpu

# One stamp for each extra of pyproject.toml.
$(VENV)/.stamp-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): about a minute, and what the download of PyTorch takes"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@
