# All commands of the project. They build in .venv, from package registries, without root.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
VERSIONS ?=
RUST_SOURCES := Cargo.toml Cargo.lock $(shell find rust/src -name '*.rs')

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-workers lint bench compat conformance conformance-plain fuzz soak format clean

help: ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

demo: $(VENV)/.built ## The main job on three real homeservers, without and with the module
	$(BIN)/python -m tests.demo

test: $(VENV)/.built ## The tests: the Rust core, then Python on real homeservers
	cargo test --quiet
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-slow: $(VENV)/.built ## The tests that take half a minute each, and the same faults at more moments
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

test-workers: $(VENV)/.built ## The conformance and integration suites and more on a Synapse of ten processes, with Postgres and Valkey: an hour
	$(BIN)/python -m pytest --workers -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder tests/workers tests/conformance tests/integration $(PYTEST_ARGS)

lint: $(VENV)/.built ## ruff, mypy, stubtest, rustfmt, clippy; whether docs/conformance.md is true
	@cargo fmt --version >/dev/null 2>&1 || { echo "rustfmt is missing: rustup component add rustfmt"; exit 1; }
	@cargo clippy --version >/dev/null 2>&1 || { echo "clippy is missing: rustup component add clippy"; exit 1; }
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest synapse_sticky._core
	cargo fmt --check
	cargo clippy --quiet --all-targets -- -D warnings
	cargo clippy --quiet --lib --features extension-module -- -D warnings
	cargo clippy --quiet --all-targets --all-features -- -D warnings
	$(BIN)/python -m tests.conformance.page --check
	$(BIN)/python -m tests.compat --check
	@! git grep -nE '(pypi[.]org|pythonhosted[.]org|crates[.]io)' -- ':!Makefile' | grep -v '^Cargo.lock:[0-9]*:source = "registry+' || { echo "A registry's host is named"; exit 1; }

bench: $(VENV)/.built ## Benchmarks: the Rust core; delivery beside SQL; /sync; refusing beside accepting; what each event costs; what it costs others when much goes wrong; newcomers, also plain ones and with busy cores; workers
	cargo bench --quiet
	$(BIN)/python -m benchmarks.delivery
	$(BIN)/python -m benchmarks.sync
	$(BIN)/python -m benchmarks.receipt
	$(BIN)/python -m benchmarks.flood
	$(BIN)/python -m benchmarks.events
	$(BIN)/python -m benchmarks.events --workers
	$(BIN)/python -m benchmarks.harm
	$(BIN)/python -m benchmarks.newcomers --runs 5
	$(BIN)/python -m benchmarks.newcomers --runs 5 --plain --busy
	$(BIN)/python -m benchmarks.workers

compat: $(VENV)/.built ## The check and a short story on each Synapse, from 1.162 to the newest, or VERSIONS="1.163.1"; docs/compat
	$(BIN)/python -m tests.compat $(VERSIONS)

conformance: $(VENV)/.built ## Every requirement of MSC4354, asked of Synapse with the module; docs/conformance.md
	$(BIN)/python -m pytest tests/conformance --record $(PYTEST_ARGS)
	$(BIN)/python -m tests.conformance.page

conformance-plain: $(VENV)/.built ## The same, asked of plain Synapse, which fails some
	$(BIN)/python -m pytest tests/conformance --plain --record $(PYTEST_ARGS) || test $$? -eq 1
	$(BIN)/python -m tests.conformance.page

fuzz: $(VENV)/.built ## Everything that comes from outside, in every shape, for ten minutes; prints its seeds
	$(BIN)/python -m tests.fuzz --minutes 10

soak: $(VENV)/.built ## Four servers, floods, joins, redactions, crashes, strangers: ten minutes, then what was promised is checked; prints its seed
	$(BIN)/python -m tests.soak --minutes 10

format: $(VENV)/.built ## Formats Python and Rust
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	cargo fmt

clean: ## Removes everything that was built
	rm -rf $(VENV) .venv-compat target synapse_sticky/_core*.so

# The environment: the module itself (its Python files used where they are, its Rust core built),
# Synapse, and what linting and testing need. The core can be told to panic here, and in no wheel.
$(VENV)/.built: pyproject.toml $(RUST_SOURCES)
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.10 or later is needed: $(PYTHON) is not there"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or later is needed, $(PYTHON) is older: make PYTHON=..."; exit 1; }
	@command -v cargo >/dev/null || { echo "A Rust toolchain is needed: cargo is not there"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	MATURIN_PEP517_ARGS="--features extension-module,panics" \
		$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@
