# Needs Python 3.11+ and pip; the first target makes .venv and installs the project.
PYTHON ?= python3
DATA ?= synthetic
OUT ?= runs/quickstart
GENERATOR ?= diffusion
SYNTHETIC := $(filter synthetic,$(DATA))
# Features of the Frechet distance, for photographs: a torch-fidelity name, or a Python file that registers an extractor.
FEATURES ?= $(if $(SYNTHETIC),none,$(firstword $(wildcard ../shared/weights/mobilenet_v2.py) inception-v3-compat))

NAME := $(if $(filter autoregressive,$(GENERATOR)),ar,dit)
RECIPE := configs/quickstart/$(if $(SYNTHETIC),,photos-)
BIN := .venv/bin
THREADS := $(shell getconf _NPROCESSORS_ONLN)
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no \
	--dynamo_backend no --num_cpu_threads_per_process $(THREADS)

PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(THREADS) --dist loadfile

# The folders of a clone, under the names that they have when installed: mypy looks for packages in a path alone.
TYPED := .venv/typed/nsvq
FOLDERS := $(filter-out nsvq,$(patsubst %/__init__.py,%,$(wildcard */__init__.py)))

# Seconds that a launcher leaves its processes for a checkpoint after SIGTERM.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT ?= 600

.PHONY: quickstart test test-fast soak gpu smoke lint format clean help

quickstart: .venv/installed  ## both stages, evaluation and pipeline; DATA=, OUT=, FEATURES=, GENERATOR=autoregressive
	$(LAUNCH) tokenizer/train.py --config $(RECIPE)nsvq.yaml --data "$(DATA)" --out "$(OUT)/nsvq"
	$(LAUNCH) $(GENERATOR)/train.py --config $(RECIPE)$(NAME).yaml --data "$(DATA)" --out "$(OUT)/$(NAME)" \
		--tokenizer "$(OUT)/nsvq/tokenizer"
	ln -sfn nsvq/tokenizer "$(OUT)/tokenizer" && ln -sfn $(NAME)/pipeline "$(OUT)/pipeline"
	$(LAUNCH) eval/reconstruction.py --tokenizer "$(OUT)/tokenizer" --data "$(DATA)" --features "$(FEATURES)" \
		--lpips none --workers 0 --limit 2000 --output "$(OUT)/reconstruction.json"
	$(LAUNCH) eval/generation.py --pipeline "$(OUT)/pipeline" --data "$(DATA)" --features "$(FEATURES)" \
		--workers 0 --reference_limit 2000 --samples 200 --guidance_scale 3 $(if $(filter dit,$(NAME)),--steps 25) $(if $(SYNTHETIC),--classifier trained) \
		--output "$(OUT)/generation.json"
	$(BIN)/python pipelines/summary.py --out "$(OUT)" --generator $(NAME)

test: .venv/installed  ## all tests, a process a core
	$(PYTEST)

test-fast: .venv/installed  ## without the slow tests, for the inner loop
	$(PYTEST) -m "not slow"

soak: .venv/installed  ## kill the trainers 20 times each, and compare with runs that nobody disturbed
	$(BIN)/python tests/harness/soak.py

gpu: .venv/bench  ## on a machine with an NVIDIA GPU: everything that only a GPU can show, in runs/gpu/report.md
	$(BIN)/python benchmarks/gpu.py $(OPTIONS)

smoke: .venv/installed  ## there, before a day's training: some minutes of both stages of the default recipe at full size
	$(BIN)/python benchmarks/gpu.py --parts smoke $(OPTIONS)

lint: .venv/installed  ## ruff and mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	rm -rf $(TYPED) && mkdir -p $(TYPED) && ln -s $(addprefix $(CURDIR)/,$(wildcard nsvq/*.py) $(FOLDERS)) $(TYPED)
	$(BIN)/mypy

format: .venv/installed  ## write code as ruff wants it
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:  ## remove .venv and runs
	rm -rf .venv runs

help:  ## these lines
	@sed -n 's/^\([a-z-]*\):.*  ## /\1: /p' Makefile

.venv/bench: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,bench]'
	touch $@

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
