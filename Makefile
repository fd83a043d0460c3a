# All commands of the project. They build in .venv, from package registries, without root.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
VERSIONS ?=
PLATFORMS ?=
PYTHONS ?=
WAYS ?=
WHEELS := .venv-wheels
DOCS := .venv-docs
# What looks at the workflows. Lint goes on without it where it is not to be had within this time, unless NEED_TOOLS=yes.
ZIZMOR := zizmor==1.32.0
ACTIONLINT := github.com/rhysd/actionlint/cmd/actionlint@v1.7.12
TOOLS_WITHIN_S ?= 180
NEED_TOOLS ?= no
RUST_SOURCES := Cargo.toml Cargo.lock $(shell find rust/src -name '*.rs')

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-workers lint bench compat conformance conformance-plain fuzz soak suite metrics page wheels wheels-check wheels-twice test-install release-check docs pictures format clean

help: ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

demo: $(VENV)/.built ## The main job on three real homeservers, without and with the module; then a small call
	$(BIN)/python -m tests.demo

test: $(VENV)/.built ## The tests: the Rust core, then Python on real homeservers
	cargo test --quiet
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-slow: $(VENV)/.built ## The tests that take half a minute each, and the same faults at more moments
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

test-workers: $(VENV)/.built ## The conformance and integration suites and more on a Synapse of ten processes, with Postgres and Valkey: an hour
	$(BIN)/python -m pytest --workers -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder tests/workers tests/conformance tests/integration tests/page $(PYTEST_ARGS)

lint: $(VENV)/.built ## ruff, mypy, stubtest, rustfmt, clippy; whether the generated pages are true; zizmor and actionlint on the workflows
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
	$(BIN)/python -m tests.site.configuration --check
	@timeout $(TOOLS_WITHIN_S) $(BIN)/pip install --quiet --disable-pip-version-check $(ZIZMOR) || \
		{ echo "zizmor is not to be had from PyPI, so it is left out"; test $(NEED_TOOLS) = no; }
	test ! -x $(BIN)/zizmor || $(BIN)/zizmor --offline --quiet --no-progress .github
	@test -x $(BIN)/actionlint || GOBIN=$(abspath $(BIN)) timeout $(TOOLS_WITHIN_S) go install $(ACTIONLINT) || \
		{ echo "actionlint is not to be had, which go installs, so it is left out"; test $(NEED_TOOLS) = no; }
	test ! -x $(BIN)/actionlint || $(BIN)/actionlint
	@! git grep -nE '(pypi[.]org|pythonhosted[.]org|crates[.]io|npmjs[.](org|com))' -- ':!Makefile' | grep -v '^Cargo.lock:[0-9]*:source = "registry+' || { echo "A registry's host is named"; exit 1; }

bench: $(VENV)/.built ## Benchmarks: the Rust core; delivery beside SQL; /sync; what metrics cost it; refusing beside accepting; what each event costs; what it costs others when much goes wrong; newcomers, also plain ones and with busy cores; a call as it happens, also on plain Synapse; workers
	cargo bench --quiet
	$(BIN)/python -m benchmarks.delivery
	$(BIN)/python -m benchmarks.sync
	$(BIN)/python -m benchmarks.metrics
	$(BIN)/python -m benchmarks.receipt
	$(BIN)/python -m benchmarks.flood
	$(BIN)/python -m benchmarks.events
	$(BIN)/python -m benchmarks.events --workers
	$(BIN)/python -m benchmarks.harm
	$(BIN)/python -m benchmarks.newcomers --runs 5
	$(BIN)/python -m benchmarks.newcomers --runs 5 --plain --busy
	$(BIN)/python -m benchmarks.call --check
	$(BIN)/python -m benchmarks.present
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

suite: $(VENV)/.built ## Synapse's own tests of the sticky sections, with the module; pip fetches them
	$(BIN)/python -m tests.suite

metrics: $(VENV)/.built ## The dashboard and docs/metrics.svg, its queries on a live lab; needs Debian's prometheus, and matplotlib
	$(BIN)/python contrib/grafana/make.py
	$(BIN)/python -m tests.metrics

page: ## The page for administrators, from its sources in the folder page; needs Node and npm
	cd page && npm ci && node build.mjs

wheels: $(WHEELS)/.built ## Wheels for manylinux and musllinux, x86_64 and aarch64, and an sdist, audited; or PLATFORMS="manylinux-x86_64 sdist"; dist
	$(WHEELS)/bin/python -m tests.wheels build $(PLATFORMS)
	$(if $(filter-out sdist,$(or $(PLATFORMS),all)),$(WHEELS)/bin/python -m tests.wheels audit $(filter-out sdist,$(PLATFORMS)))

wheels-check: $(WHEELS)/.built ## What is in dist, on each CPython found, or PYTHONS="python3.12": this machine's wheel and the sdist; CI has the other machines
	$(WHEELS)/bin/python -m tests.wheels prove $(PYTHONS:%=--python %)

wheels-twice: $(WHEELS)/.built ## Whether two clones of the last commit give the same bytes
	$(WHEELS)/bin/python -m tests.wheels twice $(or $(PLATFORMS),manylinux-x86_64)

test-install: $(VENV)/.built ## What docs/install.md says, with the wheel in dist: pip, a new Python; as root with debootstrap also Debian's package and the image; or WAYS="pip"
	$(BIN)/python -m tests.install $(WAYS)

release-check: $(VENV)/.built ## Runs each command of CI and of a release dry, and says what the next release lacks
	$(BIN)/python -m tests.release check

docs: $(VENV)/.built $(DOCS)/.built ## The documentation site, in the folder site; fails at a dead link
	$(BIN)/python -m tests.site.configuration
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet
	@echo "site/index.html"

pictures: ## Draws the pictures of docs/how-it-works.md, where graphviz is
	@command -v dot >/dev/null || { echo "dot is not there: install graphviz"; exit 1; }
	for picture in docs/pictures/*.dot; do dot -Tsvg $$picture -o $${picture%.dot}.svg || exit 1; done

format: $(VENV)/.built ## Formats Python and Rust
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	cargo fmt

clean: ## Removes everything that was built
	rm -rf $(VENV) .venv-compat .venv-install $(WHEELS) $(DOCS) dist site target synapse_sticky/_core*.so tests/lab/js_sdk/node_modules page/node_modules

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

# What wheels are built and audited with: neither Synapse nor the module. pip knows groups since 25.1.
$(WHEELS)/.built: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or later is needed: make PYTHON=..."; exit 1; }
	test -x $(WHEELS)/bin/python || $(PYTHON) -m venv $(WHEELS)
	$(WHEELS)/bin/python -m pip install --quiet --disable-pip-version-check 'pip>=25.1'
	$(WHEELS)/bin/python -m pip install --quiet --disable-pip-version-check --group wheels
	touch $@

# What makes the site.
$(DOCS)/.built: pyproject.toml
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check 'pip>=25.1'
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --group docs
	touch $@
