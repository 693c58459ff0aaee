# make demo: see it work.  make test: the whole suite.  Everything runs in .venv, which `make env` keeps up to date.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := policies dualpath_ray actors deploy load_tests tests scripts

# One thread per process: tests run several engines at once, and idle OpenMP threads spin.
test: export OMP_NUM_THREADS ?= 1
export RAY_AUTH_MODE ?= disabled
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: env demo test test-live test-rdma lint format docs check-deploy audit lock clean

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "installing into $(VENV) ..." >&2
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --editable '.[dev]' --constraint constraints.txt
	@touch $@

demo: env
	@$(BIN)/dualpath demo $(ARGS)

# Those without a cluster on two processes, then those that start clusters one after the other; `make test ARGS=...` is pytest with arguments.
test: env
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	@status=0; \
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/policies tests/unit || status=$$?; \
	$(BIN)/python -m pytest tests/cluster tests/rdma || status=$$?; \
	exit $$status
endif

# Tests that start Ray several times, or take minutes (marked `live`): the deployed application replaced, scaled and robbed of its engines
# under load, machines that follow the load, `dualpath serve`, the docs' commands. Not part of `make test`.
test-live: export DUALPATH_TEST_LIVE := 1
test-live: export OMP_NUM_THREADS ?= 1
test-live: env
	$(BIN)/python -m pytest -v -m live tests $(ARGS)

# RDMA in a virtual machine with soft-RoCE devices (qemu-system-x86 and Debian or Ubuntu): minutes, within a limit of 15.
test-rdma: export DUALPATH_TEST_VM := 1
test-rdma: export OMP_NUM_THREADS ?= 1
test-rdma: env
	$(BIN)/python -m pytest -rs -v tests/rdma $(ARGS)

lint: env
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: env
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

# Pages that are written by the code they describe; tests fail when they are out of date.
docs: env
	$(BIN)/python -m dualpath_ray.config.reference > docs/settings.md
	$(BIN)/python -m dualpath_ray.telemetry.reference > docs/metrics.md
	$(BIN)/python -m deploy.monitoring.grafana > deploy/monitoring/grafana.json

# Every file under deploy/ that other programs read; CRDS=DIR names KubeRay's definitions.
check-deploy: env
	$(BIN)/python -m deploy.check --strict $(if $(CRDS),--crds $(CRDS))

# Known vulnerabilities of the versions in constraints.txt; says so where they cannot be looked up (ARGS=--strict: and fails).
audit: env
	@$(BIN)/python scripts/audit.py $(ARGS)

# Write constraints.txt anew from the versions that are installed in .venv now.
lock:
	$(BIN)/python scripts/lock.py > constraints.txt.new
	mv constraints.txt.new constraints.txt

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
