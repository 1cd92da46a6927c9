# Two commands do everything on a fresh machine: `make demo` and `make test`.
SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= python3
READY := $(VENV)/.ready
RUN := $(VENV)/bin
DEMO_ROOT ?= $(CURDIR)/.demo/store
DEMO_PAGE ?= $(CURDIR)/.demo/storm.html
NATIVE := $(wildcard native/*.c native/*.h native/*/*.c native/*/*.h)

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint man format soak conformance wire bench bench-peers processors fuzz sanitize package clean

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
	$(RUN)/python tools/man.py --check

man: $(READY) ## write the man page from the command line's own help
	$(RUN)/python tools/man.py

format: $(READY) ## format Python and C
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .
	clang-format -i $(NATIVE) bench/*.[ch]

soak: $(READY) ## the long rounds that `make test` runs a seeded tenth of
	tools/setup --tests
	FLATMOUNT_SOAK=1 $(RUN)/pytest tests -m soak --timeout 7200

conformance: $(READY) ## containerd's own suite against the snapshotter, in each form
	tools/setup --tests
	$(RUN)/pytest tests/conformance

wire: $(READY) ## the Python of the snapshotter's wire format
	$(RUN)/python -m grpc_tools.protoc -Isrc --python_out=src --pyi_out=src src/flatmount/snapshotter/wire/*.proto

bench: $(READY) ## the ratios, each measured in one run
	$(RUN)/python -m bench

processors: $(READY) ## what this machine's locks and bursts cost, and how wrong the model of them is (6 minutes, root)
	mkdir -p .demo
	-$(RUN)/flatmount cpu model validate --budget 290s --output .demo/validation.json
	$(RUN)/flatmount cpu bench --budget 60s --output .demo/processors.json --html .demo/processors.html --validation .demo/validation.json

bench-peers: $(READY) ## starts against other binaries of containerd: make bench-peers CONTAINERD=DIR
	$(RUN)/pip install -q --disable-pip-version-check -e '.[engines]'
	FLATMOUNT_CONTAINERD=$(CONTAINERD) $(RUN)/python -m bench starts

sanitize: $(READY) ## the native code's tests under AddressSanitizer and UndefinedBehaviorSanitizer
	tools/sanitize "$(RUN)"

FUZZ_SECONDS ?= 180
fuzz: $(READY) ## random bytes as layers for FUZZ_SECONDS (180), from the corpus of the tests on
	$(RUN)/pip install -q --disable-pip-version-check -e '.[fuzz]'
	mkdir -p .fuzz/new
	$(RUN)/python -m fuzz .fuzz/new tests/corpus -artifact_prefix=.fuzz/ -max_total_time=$(FUZZ_SECONDS) -max_len=8192 -rss_limit_mb=4096 -timeout=30

package: $(READY) ## a wheel and a Debian package in dist/, each installed and tried
	tools/package "$(PYTHON)"

clean: ## remove what was built; stores and caches elsewhere stay
	rm -rf $(VENV) build dist .demo .fuzz .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src \( -name '*.so' -o -name flatmount-shim -o -name flatmount-assemble \) -delete
