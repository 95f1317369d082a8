.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNS ?= runs

.PHONY: help install quickstart test test-slow check format bench tensorboard clean

help:  ## Show what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

# One environment for everything; made again when the versions change.
$(BIN)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("lit-clip needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	@echo "Installing lit-clip and what it needs into $(VENV) (some minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

install: $(BIN)/.installed  ## Make the environment in .venv

quickstart: install  ## Train a CLIP from scratch on 1,750 drawings, then validate it (about 10 minutes on 2 cores)
	@echo "Training on OpenMoji; logs and pictures go to $(RUNS)/quickstart ..."
	@$(BIN)/lit-clip fit --config configs/quickstart.yaml --trainer.logger.init_args.save_dir $(RUNS)
	@run=$$(ls -td $(RUNS)/quickstart/version_* | head -n 1) && \
	echo "Validating $$run/checkpoints/last.ckpt; the numbers must be the same ..." && \
	$(BIN)/lit-clip validate --config $$run/fit_config.yaml --ckpt_path $$run/checkpoints/last.ckpt && \
	echo "Look at $$run/zero_shot_*.png, and at the curves with: make tensorboard"

test: install  ## Run the tests (no network, under 15 minutes on 2 cores)
	@$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: install  ## Run the tests that take minutes each
	@$(BIN)/python -m pytest -m slow

check: install  ## Lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/basedpyright --pythonpath $(BIN)/python

format: install  ## Rewrite the code in the project's format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: install  ## Measure against open_clip, in the same run
	@$(BIN)/python benchmarks/train_step.py
	@$(BIN)/python benchmarks/text_encoding.py
	@$(BIN)/python benchmarks/load_model.py
	@$(BIN)/python benchmarks/loss_memory.py
	@$(BIN)/python benchmarks/step_memory.py
	@$(BIN)/python benchmarks/retrieval.py --images 5000 --captions 25000

tensorboard: install  ## Show the curves and pictures of all runs
	@$(BIN)/tensorboard --logdir $(RUNS)

clean:  ## Remove the environment and caches (not the runs)
	@rm -rf $(VENV) .pytest_cache .ruff_cache
