# Needs Python 3.11+ and pip; the first target makes .venv and installs the project.
PYTHON ?= python3
DATA ?= synthetic
OUT ?= runs/quickstart
SYNTHETIC := $(filter synthetic,$(DATA))
# Features of the Frechet distance, for photographs: a torch-fidelity name, or a Python file that registers an extractor.
FEATURES ?= $(if $(SYNTHETIC),none,$(firstword $(wildcard ../shared/weights/mobilenet_v2.py) inception-v3-compat))

RECIPE := configs/quickstart/$(if $(SYNTHETIC),,photos-)
BIN := .venv/bin
THREADS := $(shell getconf _NPROCESSORS_ONLN)
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no \
	--dynamo_backend no --num_cpu_threads_per_process $(THREADS)

.PHONY: quickstart test soak format lint clean

quickstart: .venv/installed
	$(LAUNCH) tokenizer/train.py --config $(RECIPE)nsvq.yaml --data "$(DATA)" --out "$(OUT)/nsvq"
	$(LAUNCH) diffusion/train.py --config $(RECIPE)dit.yaml --data "$(DATA)" --out "$(OUT)/dit" \
		--tokenizer "$(OUT)/nsvq/tokenizer"
	ln -sfn nsvq/tokenizer "$(OUT)/tokenizer" && ln -sfn dit/pipeline "$(OUT)/pipeline"
	$(LAUNCH) eval/reconstruction.py --tokenizer "$(OUT)/tokenizer" --data "$(DATA)" --features "$(FEATURES)" \
		--lpips none --workers 0 --limit 2000 --output "$(OUT)/reconstruction.json"
	$(LAUNCH) eval/generation.py --pipeline "$(OUT)/pipeline" --data "$(DATA)" --features "$(FEATURES)" \
		--workers 0 --reference_limit 2000 --samples 200 --guidance_scale 3 --steps 25 $(if $(SYNTHETIC),--classifier trained) \
		--output "$(OUT)/generation.json"
	$(BIN)/python pipelines/summary.py --out "$(OUT)"

test: .venv/installed
	$(BIN)/pytest

# Kills both trainers 20 times each and compares with runs that nobody disturbed.
soak: .venv/installed
	$(BIN)/python tests/harness/soak.py

lint: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: .venv/installed
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf .venv runs

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
