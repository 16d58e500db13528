# Everyday commands. PYTHON is the interpreter of the virtual environment, VENV its directory.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALL = tools/setup/install.sh $(BIN)/python
PYTEST_ARGS ?=
CHAOS_ARGS ?=
GPU_ARGS ?=
SEED ?= 0
FUZZ_MINUTES ?= 20
# The lock file names the public index, even if this machine uses another one.
UV_LOCK = $(BIN)/uv lock --quiet --default-index https://pypi.org/simple
# Test processes: one more than cores, because tests wait for a third of their time. More than four
# compete for memory and save no time.
JOBS ?= $(shell cores=$$(env -u OMP_NUM_THREADS nproc); echo $$((cores < 4 ? cores + 1 : 4)))

.PHONY: demo skills docs check-lock lock test test-long test-all test-cluster test-cluster-all test-node wheels release chaos fuzz check format bench gpu clean help

help:  ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.installed  ## fetch, prepare, train, evaluate and register one model on five corpora; grow two skills
	$(BIN)/skillnet quickstart
	PATH="$(abspath $(BIN)):$$PATH" sh examples/skills.sh grow

skills: $(VENV)/.installed  ## add two skills to the demo's model, use them, remove them without a trace
	@PATH="$(abspath $(BIN)):$$PATH" sh examples/skills.sh

TEST_CLUSTER = timeout --signal=INT --kill-after=60 1800 $(BIN)/python -m pytest -x -rs tests/cluster
# In directory order. The default order runs the few slow files last, one after the other.
TESTS = $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --no-loadscope-reorder

test: $(VENV)/.installed-dev  ## run the tests, without long ones and slow ones
	$(TESTS) -m "not cluster and not bare and not slow and not long" $(PYTEST_ARGS)

test-long: $(VENV)/.installed-dev  ## run the tests that take half a minute or more: kills, outages, the tutorial
	$(TESTS) -m "long and not slow" $$(grep -rl --include='test_*.py' 'mark\.long' tests plugins) $(PYTEST_ARGS)

test-all: $(VENV)/.installed-dev  ## run all tests that need no nodes, with the slow ones
	$(TESTS) $(PYTEST_ARGS)

# The test nodes end with this command. Without root the tests are skipped with the reason. The steps
# build on each other, so the first failure (-x) ends the run.
test-cluster: $(VENV)/.installed-dev  ## run docs/cluster.md on nodes made of namespaces (root), without slow tests
	$(TEST_CLUSTER) -m "cluster and not slow" $(PYTEST_ARGS)

test-cluster-all: $(VENV)/.installed-dev  ## run all of docs/cluster.md on such nodes: a sweep, its pages, SLURM
	$(TEST_CLUSTER) -m cluster $(PYTEST_ARGS)

# Needs 10 GB of disk while it runs.
test-node: $(VENV)/.installed-dev  ## set up a node from a bare Debian and train on it (root, network, debootstrap)
	$(BIN)/python -m pytest -x -m bare -rs tests/cluster $(PYTEST_ARGS)

check: $(VENV)/.installed-dev  ## check style, format, types, imports, language and names
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tools.style.check

format: $(VENV)/.installed-dev  ## format the code and apply ruff's fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Strict: a broken link or a page outside the navigation fails. Loads nothing from a network.
docs: $(VENV)/.installed-docs  ## build the documentation site into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "The site is in build/site; open build/site/index.html"

# A fresh lock file needs no network. A stale one fails; without an index the check is skipped.
check-lock: $(VENV)/.installed-dev  ## check that uv.lock fits pyproject.toml
	@$(UV_LOCK) --check --offline 2>/dev/null || { $(UV_LOCK) --check; code=$$?; \
	    [ "$$code" = 2 ] && echo "uv.lock: not checked, because uv reaches no index" || exit "$$code"; }

lock: $(VENV)/.installed-dev  ## write uv.lock again after a change of dependencies
	$(UV_LOCK)

# On the oldest and the newest supported Python. Without torch, whose installation takes minutes.
wheels: $(VENV)/.installed-dev  ## build the wheels, install them without torch in empty environments, use them
	$(BIN)/python -m tools.release

release: check-lock  ## the same with all dependencies; train; check licences; write an SBOM
	$(BIN)/python -m tools.release --full

# Rows that the newest CSV of today has are not run again, so an interrupted run resumes.
chaos: $(VENV)/.installed-dev  ## inject faults into 86 small runs, kill commands at every file-system event; tracker outage
	$(BIN)/skillnet fetch
	$(BIN)/skillnet prepare headings drawings
	$(BIN)/python -m tests.chaos --launcher ranks --runs 45 --seed $(SEED) $(CHAOS_ARGS)
	$(BIN)/python -m tests.chaos --launcher ray --runs 26 --seed $(SEED) $(CHAOS_ARGS)
	$(BIN)/python -m tests.chaos --launcher hosts --runs 9 --seed $(SEED) $(CHAOS_ARGS)
	for launcher in ranks ray hosts; do \
	    $(BIN)/python -m tests.chaos --launcher $$launcher --later --seed $(SEED) $(CHAOS_ARGS) || exit 1; done
	$(BIN)/python -m tests.chaos.sweep_runs --seed $(SEED)
	$(BIN)/python -m tests.chaos.crash_lane --seed $(SEED)
	$(BIN)/python -m tools.docs.chaos_table
	SKILLNET_TEST_OUTAGE_S=60 $(BIN)/python -m pytest tests/integration/test_tracker_away.py

# Rounds with new random damage; the round that runs when the time is over is the last.
fuzz: $(VENV)/.installed-dev  ## damage all inputs at random for FUZZ_MINUTES (20)
	end=$$(($$(date +%s) + 60 * $(FUZZ_MINUTES))); round=0; \
	while [ "$$(date +%s)" -lt "$$end" ]; do round=$$((round + 1)); \
	    $(BIN)/python -m pytest -m fuzz -n $(JOBS) --dist loadgroup --hypothesis-profile=long \
	        $(PYTEST_ARGS) || exit 1; echo "fuzz: $$round round(s) without a failure"; done

bench: $(VENV)/.installed-dev  ## measure speed, as ratios, into benchmarks/results/
	$(BIN)/python -m benchmarks

# Exits with 2 on a machine without a GPU. GPU_ARGS: parts, --again, --rehearse.
gpu: $(VENV)/.installed-dev  ## measure a GPU in parts: rates, parity, steps, loader, checkpoints, ranks, the demo
	$(BIN)/python -m benchmarks.gpu $(GPU_ARGS)

clean:  ## remove the environment and caches, keep the runs
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache dist build

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14) \
	    and "Python 3.11 to 3.14 is needed; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(INSTALL) '.[train]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed-azurite | $(BIN)/python
	$(INSTALL) '.[dev,docs,tracker]'
	touch $@ $(VENV)/.installed $(VENV)/.installed-docs

$(VENV)/.installed-azurite: | $(BIN)/python
	npm install --silent --no-audit --no-fund --prefix $(VENV)/azurite azurite@3.37.0 || \
	    echo "Azurite is missing, so the tests of Azure's store will be skipped: npm is missing or failed"
	touch $@

$(VENV)/.installed-docs: pyproject.toml | $(BIN)/python
	$(INSTALL) '.[train,docs]'
	touch $@
