# The project's verbs. Everything happens in $(VENV); a fresh machine needs python3.11 and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
RUN    := $(VENV)/bin/python
# A file's tests stay in one process, and so do all that start a Ray cluster: tests/conftest.py. A process that ends
# early ends the suite with its test's name: pytest-xdist 3.8 waits for ever for what the next one would have run.
IN_PROCESSES := -n $(or $(PROCESSES),2) --dist loadgroup --max-worker-restart 0
export HF_HUB_DISABLE_TELEMETRY := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: demo test test-long check bench docs lock platforms wheel help

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/.base
	$(VENV)/bin/pip install -q -c constraints.txt -e ".[dev,lmms-eval]"
	$(VENV)/bin/pip install -q --no-deps lmms-eval==0.7.3  # asks for av < 16; see pyproject.toml
	@touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/.base
	$(VENV)/bin/pip install -q -c constraints.txt -e ".[docs]"
	@touch $@

demo: | $(VENV)/.base  ## captions and answers by the bundled model, merged and not, beside their references; a few true-shape layers timed
	$(RUN) jobs/demo.py

test: $(VENV)/.dev  ## the CPU suite, at most 8 minutes on two idle cores
	$(RUN) -m pytest -m "not long" $(IN_PROCESSES) --durations=15

test-long: $(VENV)/.dev  ## chaos, fuzz, matrices, training smoke, at most 15 minutes on two idle cores
	$(RUN) -m pytest -m long $(IN_PROCESSES) --durations=15

check: $(VENV)/.dev  ## ruff, types and who may import what
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports --no-logo

bench: $(VENV)/.dev  ## the CPU benchmarks; JSON into benchmarks/results/, tables into README.md and docs/
	$(RUN) benchmarks/speed/reduction_speed.py --json benchmarks/results/reduction_speed_cpu_fp32.json
	$(RUN) benchmarks/tables/readme_tables.py --write

docs: $(VENV)/.docs  ## the documentation into build/site; fails on a broken link
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

lock:  ## pin every package that pyproject.toml leads to in constraints.txt; UPGRADE=--upgrade takes the newest of each
	$(PYTHON) -m venv build/uv && build/uv/bin/pip install -q "uv>=0.13,<0.14"
	build/uv/bin/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-annotate -q \
	  --custom-compile-command "make lock" --output-file constraints.txt $(UPGRADE)

platforms:  ## whether every pinned package has a wheel for Linux on aarch64 (glibc 2.31) and macOS 14 on arm64
	$(PYTHON) -m venv build/uv && build/uv/bin/pip install -q "uv>=0.13,<0.14"
	for platform in aarch64-manylinux_2_31 aarch64-apple-darwin; do \
	  MACOSX_DEPLOYMENT_TARGET=14.0 build/uv/bin/uv pip compile pyproject.toml --only-binary :all: -c constraints.txt -q \
	    --extra quantized --extra adapters --extra s3 --extra gcs --extra plots --python-version 3.11 \
	    --python-platform $$platform --output-file build/uv/$$platform.txt > build/uv/$$platform.log || exit 1; \
	done

wheel: | $(VENV)/.base  ## dist/illava-*.whl
	rm -rf build/lib build/bdist.*
	$(VENV)/bin/pip wheel -q --no-deps --wheel-dir dist .
