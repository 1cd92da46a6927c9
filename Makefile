# Two commands do everything on a fresh machine: `make demo` and `make test`.
SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= python3
READY := $(VENV)/.ready
RUN := $(VENV)/bin
DEMO_ROOT ?= $(CURDIR)/.demo/store
DEMO_PAGE ?= $(CURDIR)/.demo/storm.html
NATIVE := $(wildcard native/*.c native/*.h native/*/*.c)

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format soak conformance wire bench fuzz sanitize clean

help: ## show what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(READY) ## packages, virtual environment, extension

$(READY): pyproject.toml setup.py $(NATIVE) tools/setup
	tools/setup "$(PYTHON)" "$(VENV)"
	touch $@

demo: $(READY) ## make the demo image and run the storm on it
	mkdir -p $(dir $(DEMO_PAGE))
	FLATMOUNT_ROOT=$(DEMO_ROOT) $(RUN)/flatmount storm --containers 100 --concurrency 16 --repeats 3 --html $(DEMO_PAGE)

test: $(READY) ## everything: linters, unit, kernel and end-to-end tests
	tools/setup --tests
	$(MAKE) --no-print-directory lint
	$(RUN)/pytest tests

lint: $(READY) ## ruff, mypy, import rule
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports --no-cache

format: $(READY) ## format Python and C
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .
	clang-format -i native/*.c native/*.h native/*/*.c bench/*.c

soak: $(READY) ## the long rounds that `make test` runs a seeded tenth of
	tools/setup --tests
	FLATMOUNT_SOAK=1 $(RUN)/pytest tests -m soak --timeout 7200

conformance: $(READY) ## containerd's own suite against the snapshotter, in each form
	tools/setup --tests
	$(RUN)/pytest tests/conformance

wire: $(READY) ## the Python of the snapshotter's wire format
	$(RUN)/python -m grpc_tools.protoc -Isrc --python_out=src --pyi_out=src flatmount/snapshotter/wire/snapshots.proto

bench: $(READY) ## the ratios, each measured in one run
	$(RUN)/python -m bench

sanitize: $(READY) ## the native code's tests under AddressSanitizer and UndefinedBehaviorSanitizer
	tools/sanitize "$(RUN)"

clean: ## remove what was built; stores and caches elsewhere stay
	rm -rf $(VENV) build dist .demo .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src -name '*.so' -delete
