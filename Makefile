.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNS ?= runs
BENCH := $(RUNS)/bench
# A benchmark, its options, and what its file is called beside its name.
measure = $(BIN)/python benchmarks/$(1).py $(2) --json $(BENCH)/$(1)$(3).json

.PHONY: help install quickstart test test-slow check format bench bench-check tensorboard clean

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

$(BIN)/.bench: $(BIN)/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@touch $@

quickstart: install  ## Train a CLIP from scratch on 1,750 drawings, then validate it (about 10 minutes on 2 cores)
	@echo "Training on OpenMoji; logs and images go to $(RUNS)/quickstart ..."
	@$(BIN)/lit-clip fit --config configs/quickstart.yaml --trainer.logger.init_args.save_dir $(RUNS)
	@run=$$(ls -td $(RUNS)/quickstart/version_* | head -n 1) && \
	echo "Validating $$run/checkpoints/last.ckpt; the numbers must be the same ..." && \
	$(BIN)/lit-clip validate --config $$run/fit_config.yaml --ckpt_path $$run/checkpoints/last.ckpt && \
	echo "Look at $$run/zero_shot_*.png, and at the curves with: make tensorboard"

test: install  ## Run the tests (no network, under 15 minutes on 2 cores)
	@$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: install  ## Run the tests that take minutes each
	@$(BIN)/python -m pytest -m slow

check: install  ## Lint, format, types and the import rule
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/basedpyright --pythonpath $(BIN)/python
	@$(BIN)/lint-imports --no-logo --no-cache

format: install  ## Rewrite the code in the project's format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(BIN)/.bench  ## Measure against open_clip, in the same run; the table and the check follow (an hour or two, alone)
	@mkdir -p $(BENCH) && rm -f $(BENCH)/*.json
	@for model in ViT-B-32 quickstart; do \
	$(call measure,train_step,--model $$model,.$$model.fp32) && \
	$(call measure,train_step,--model $$model --bf16,.$$model.bf16) && \
	$(call measure,train_step,--model $$model --pairs 0 --losses 20,.$$model.losses) || exit 1; done
	@for model in ViT-B-16 RN50; do \
	$(call measure,train_step,--model $$model --pairs 3,.$$model.fp32) && \
	$(call measure,train_step,--model $$model --pairs 3 --bf16,.$$model.bf16) || exit 1; done
	@$(call measure,image_forward)
	@$(call measure,text_encoding)
	@$(call measure,zero_shot_classifier,--classes 50)
	@$(call measure,image_pipeline)
	@$(BIN)/python benchmarks/decoders.py
	@$(call measure,epoch,,.fp32)
	@$(call measure,epoch,--bf16,.bf16)
	@$(call measure,start_up)
	@$(call measure,load_model)
	@$(call measure,loss_memory)
	@$(call measure,step_memory)
	@$(call measure,retrieval,--images 5000 --captions 25000)
	@$(call measure,linear_probe,--no-tight --no-search)
	@$(MAKE) --no-print-directory bench-check

bench-check: install  ## The table of the last make bench, and whether its ratios are what they should be
	@$(BIN)/python benchmarks/report.py $(BENCH)
	@$(BIN)/python benchmarks/check_ratios.py $(BENCH) --against benchmarks/expected_ratios.yaml --all

tensorboard: install  ## Show the curves and images of all runs
	@$(BIN)/tensorboard --logdir $(RUNS)

clean:  ## Remove the environment and caches (not the runs)
	@rm -rf $(VENV) .pytest_cache .ruff_cache
