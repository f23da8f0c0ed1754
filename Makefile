# Every target calls a small script; `make` lists them.
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# A question may hold any character: it travels in the environment, not through a shell's command line, and make is not
# to expand what is in it.
override Q := $(value Q)
export Q

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

## ---- try it

.PHONY: demo
demo: venv ## Provision an emulated K80 server here and chat with it
	@tools/demo up

.PHONY: chat
chat: venv ## Chat with the demo in the terminal
	@tools/demo chat

.PHONY: ask
ask: venv ## Ask the demo one question: make ask Q='Why is the sky blue?'
	@tools/demo ask

.PHONY: status
status: venv ## What each die of the demo serves, and how busy it is; JSON=1 prints JSON
	@tools/demo status $(if $(JSON),--json)

.PHONY: demo-down
demo-down: venv ## Remove the demo's server; the image that it built is kept
	@tools/demo down

.PHONY: demo-clean
demo-clean: venv ## Remove the demo's server, its built image and its keys
	@tools/demo clean

## ---- test it

# Two at a time, in this order: half of what a scenario does is waiting for downloads and for one core.
MAIN_SCENARIOS := default
HOST_SCENARIOS := driver driver-matrix toolkit
MORE_SCENARIOS := operations air-gapped fleet fleet-short

.PHONY: test
test: venv ## Lints, all tests, and a server from bare to a chat and through faults (needs Docker; 40 minutes)
	@$(MAKE) --jobs=2 test-molecule test-apart

.PHONY: test-molecule
test-molecule: $(MAIN_SCENARIOS:%=scenario-%) ## The main scenario, on an emulated server

.PHONY: test-operations
test-operations: scenario-operations ## What an operator does with it: updates, benchmarks, the doctor, monitoring

.PHONY: test-hosts
test-hosts: venv ## The driver, other distributions and the CUDA toolkit, on emulated servers (20 minutes)
	@$(MAKE) --jobs=2 $(HOST_SCENARIOS:%=scenario-%)

.PHONY: test-all
test-all: test test-hosts ## Both, updates and the doctor, a fleet, and a server without a way out
	@$(MAKE) --jobs=2 $(MORE_SCENARIOS:%=scenario-%)

# One scenario alone, such as scenario-driver.
scenario-%: venv packages
	@pytest 'tests/test_molecule.py::test_scenario[$*]' -m molecule --capture=no

# What they say is shown when they have ended, not between the lines of the scenario.
.PHONY: test-apart
test-apart: venv packages
	@mkdir -p build; { $(MAKE) lint && $(MAKE) test-package && $(MAKE) test-unit; } > build/test-apart.log 2>&1; \
	status=$$?; cat build/test-apart.log; exit $$status

.PHONY: test-fast
test-fast: venv ## Lints, and the tests that need no Docker, no engine, no playbook and no HAProxy (under 3 minutes)
	@$(MAKE) --jobs=2 --output-sync=target test-unit-fast lint test-package-fast

# Before whatever runs beside it: apt-get runs once at a time, and a scenario's tests want the browser, too.
.PHONY: packages
packages:
	@tools/test-packages

.PHONY: lint
lint: venv ## All lints
	@tools/lint

.PHONY: test-unit
test-unit: venv packages ## Tests of the roles' checks, of the inventory and of the tools
	@pytest tests

.PHONY: test-unit-fast
test-unit-fast: venv packages ## Those of them that take no seconds each
	@pytest tests -m 'not molecule and not slow'

.PHONY: test-package
test-package: venv ## Tests of vllm_k80, in the Python environment of the image
	@tools/package-env
	@cd vllm-k80-src && ../build/py311/bin/python -m pytest

.PHONY: test-package-fast
test-package-fast: venv ## Those of them that start no engine and build no wheel
	@tools/package-env
	@cd vllm-k80-src && ../build/py311/bin/python -m pytest -m 'not engine and not wheel'

.PHONY: test-reliability
test-reliability: venv ## A fleet under load while things break, twice each: renews docs/reliability.md (three hours, by its parts)
	@RELIABILITY=1 molecule test --scenario-name fleet

## ---- look at the kernels

.PHONY: kernels-report
kernels-report: ## What each kernel uses of a K80, and how long it takes, predicted (CUDA 11, no GPU; minutes)
	@python3 vllm-k80-src/tools/kernels_report.py
	@tools/package-env
	@build/py311/bin/python vllm-k80-src/tools/kernels_predict.py build/kernels-report.json
	@build/py311/bin/python vllm-k80-src/tools/kernels_costs.py build/kernels-report.json

.PHONY: models-table
models-table: ## Which well-known models fit on a die: the table of docs/models.md, anew
	@python3 vllm-k80-src/tools/models_table.py --write

## ---- keep it

.PHONY: venv
venv: .venv/stamp ## Install Ansible and the test tools into .venv
	@:

.venv/stamp: requirements.lock tools/venv
	@tools/venv

.PHONY: docs
docs: venv ## Renew what documentation has of the doctor's checks, the alerts and the roles' variables
	@python3 roles/doctor/files/k80-doctor --markdown > docs/troubleshooting.md
	@tools/alerts-table
	@tools/role-readmes

.PHONY: lock
lock: venv ## Renew requirements.lock from requirements.in
	@tools/lock
