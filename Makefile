PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
IMG2DATASET := .venv-img2dataset

# The benchmark's pictures; data/README.md says how to make these. Others: make bench-dvae TRAIN='a-*.tar' VAL=b.tar
TRAIN := data/photos/train-*.tar
VAL := data/photos/val-*.tar
PEER := --quiet --disable-pip-version-check --no-deps dalle-pytorch==1.6.6 axial-positional-embedding rotary-embedding-torch

.DEFAULT_GOAL := help

.PHONY: help setup demo test test-browser test-slow bench-dvae bench-transformer bench-transformer-loss bench-sampling bench-data bench-communication bench-sweep scaling-law soak-data soak-training sampling-curves bench-gpu bench-memory bench-evaluation docs docs-serve lint types clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-22s %s\n", $$1, $$2}'

setup: $(STAMP)  ## make .venv and install the project (done by the other targets, once)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, got " + sys.version.split()[0] + "; call make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(STAMP)  ## the whole pipeline on the generated data, ending in pictures and a table
	$(BIN)/python train.py stage=tokenizer
	$(BIN)/python train.py stage=dvae
	$(BIN)/python train.py stage=clip
	$(BIN)/python train.py stage=transformer
	$(BIN)/python -m dalle1.evaluation.report

test: $(STAMP) lint types  ## lint, types and tests, a file on each core
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 8 --dist loadfile

test-browser: $(STAMP)  ## all pages in a real browser; needs a Chromium (apt install chromium)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[browser]"
	$(BIN)/pytest -m browser

test-slow: $(STAMP) $(IMG2DATASET)/.installed  ## what takes minutes: shards that img2dataset itself writes (it is put into .venv-img2dataset), sharded training
	$(BIN)/pytest -m slow

$(IMG2DATASET)/.installed: tests/slow/img2dataset.txt
	$(PYTHON) -m venv $(IMG2DATASET)
	$(IMG2DATASET)/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@

bench-dvae: $(STAMP)  ## our dVAE against DALLE-pytorch's, 35 minutes (BENCH='--minutes 5' for less)
	$(BIN)/pip install $(PEER)
	$(BIN)/python benchmarks/dvae.py --train '$(TRAIN)' --val '$(VAL)' $(BENCH)

bench-transformer: $(STAMP)  ## speed and memory of our transformer against DALLE-pytorch's, 12 minutes
	$(BIN)/pip install $(PEER)
	$(BIN)/python benchmarks/transformer.py $(BENCH)

bench-transformer-loss: $(STAMP)  ## loss over time against DALLE-pytorch's, on what the demo has made, 15 minutes
	$(BIN)/pip install $(PEER)
	$(BIN)/python benchmarks/transformer_loss.py $(BENCH)

bench-sampling: $(STAMP)  ## speed of sampling against DALLE-pytorch's, 10 minutes
	$(BIN)/pip install $(PEER)
	$(BIN)/python benchmarks/sampling.py $(BENCH)

bench-data: $(STAMP)  ## pictures read per second against WebDataset and Pillow, 2 minutes
	$(BIN)/python benchmarks/data.py $(BENCH)

bench-evaluation: $(STAMP)  ## seconds of FID, KID, precision and recall, and the search for overlap, 1 minute
	$(BIN)/python benchmarks/evaluation.py $(BENCH)

bench-communication: $(STAMP)  ## loss and bytes sent of two processes with each way to send, on what the demo has made, 20 minutes
	$(BIN)/python benchmarks/communication.py $(BENCH)

bench-sweep: $(STAMP)  ## how often transformers draw what captions say, a minute each (BENCH='runs/sweeps/x/*' names their runs)
	$(BIN)/python benchmarks/sweep_accuracy.py $(BENCH)

scaling-law: $(STAMP)  ## loss of six transformers against their compute, on what the demo has made, half an hour
	$(BIN)/python benchmarks/scaling_law.py $(BENCH)

soak-data: $(STAMP)  ## memory while damaged data are read for a long time, 10 minutes
	$(BIN)/python benchmarks/data_soak.py $(BENCH)

soak-training: $(STAMP)  ## a run of two processes that is ended and started again for an hour (BENCH='--minutes 5' for less)
	$(BIN)/python benchmarks/preemption_soak.py $(BENCH)

sampling-curves: $(STAMP)  ## what candidates and guidance do to the demo's accuracy, half an hour
	$(BIN)/python -m dalle1.evaluation.sampling_curves

bench-gpu: $(STAMP)  ## sampling and training steps of the transformer on one CUDA device
	$(BIN)/python benchmarks/gpu.py $(BENCH)

bench-memory: $(STAMP)  ## memory of each device with DDP and with FSDP beside what plan says, 6 minutes, 9 GB
	$(BIN)/python benchmarks/memory.py $(BENCH)

docs: $(STAMP)  ## the documentation as a site in site/; a warning or a link that leads nowhere is an error
	$(BIN)/python tools/configuration_reference.py
	$(BIN)/mkdocs build

docs-serve: $(STAMP)  ## the same at http://127.0.0.1:8000, again after every change
	$(BIN)/mkdocs serve

lint: $(STAMP)  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## static types
	$(BIN)/mypy

clean:  ## remove .venv and caches, never data or runs
	rm -rf $(VENV) $(IMG2DATASET) .pytest_cache .mypy_cache .ruff_cache
