# Everything a developer does, on a machine with Python 3.11 or newer and make. `make` alone lists it.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.NOTPARALLEL:
# Demo, tests and benchmark start hundreds of processes; they compile what they share once, whatever the shell says.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
PY := $(VENV)/bin/python
# One stamp per place: a virtual environment that was moved or copied is made anew.
STAMP := $(VENV)/.installed-$(shell printf %s '$(CURDIR)' | cksum | cut -d' ' -f1)
# What is installed as the lock says. `STAMP` is later: with it the project itself is installed too.
PACKAGES := $(STAMP)-packages
# The first of these that is new enough; say PYTHON=/path/to/python3.13 to choose.
PYTHON ?=
PYTHONS := $(if $(PYTHON),$(PYTHON),python3 python3.14 python3.13 python3.12 python3.11)
# The tests wait more than they compute.
JOBS ?= $(shell expr 2 \* $$(getconf _NPROCESSORS_ONLN))
# The slow tests take minutes: restarts, outages, RabbitMQ, copies of the project.
MARK ?= not slow

# What goes with a folder that may be deleted.
GONE := $(if $(wildcard service/dev/demo/*.py),,demo) $(if $(wildcard tests/proof/chaos/*.py),,chaos) \
	$(if $(wildcard tests/proof/bench/*.py),,bench)
PEERS := tests/proof/bench/requirements

.PHONY: help demo test chaos bench dev token reset migrate downgrade migration lint fmt lock upgrade install secrets

help: ## List what there is
	@sed -n '$(GONE:%=/^%:/d;)s/^\([a-z]*\):.*## \(.*\)/  make \1 - \2/p' $(MAKEFILE_LIST) | awk -F' - ' '{ printf "%-18s %s\n", $$1, $$2 }'

demo: $(STAMP) ## Kill workers, relays and the broker under load, and count what was lost (under 90 s)
	@$(PY) -m service.dev demo

test: $(STAMP) ## Run the tests in parallel on PostgreSQL and Valkey (ARGS="-k name" for some of them)
	@$(PY) -m pytest -q -n $(JOBS) --maxprocesses 8 --dist worksteal -m "$(MARK)" $(ARGS)

chaos: $(STAMP) ## Attack the running system for 20 minutes (SCENARIO=a,b SEED=1 for one; SLOW=1: recovery times as shipped)
	@$(PY) -m tests.proof.chaos --scenario '$(SCENARIO)' --seed '$(SEED)' $(if $(SLOW),--slow)

bench: $(STAMP) $(VENV)/.bench ## Measure it beside what else there is, in 20 minutes (QUICK=1: in 4; ONLY=relay,api; OUT=folder)
	@$(PY) -m tests.proof.bench $(if $(QUICK),--quick) --only '$(ONLY)' $(if $(OUT),--out '$(OUT)')

dev: $(STAMP) ## Run everything until Ctrl-C; the data stays for the next time
	@$(PY) -m service.dev dev

token: $(STAMP) ## Print a token that `make dev` believes (AS=bob SCOPE="orders:read" for another one)
	@$(PY) -m service.dev token $(or $(AS),ada) $(SCOPE)

reset: $(STAMP) ## Delete the data of `make dev` (YES=1 does not ask)
	@YES='$(YES)' $(PY) -m service.dev reset

migrate: $(STAMP) ## Bring the database of `make dev` up to date
	@$(PY) -m service.dev migrate

downgrade: $(STAMP) ## Undo the latest migration of yours in that database, with its data
	@$(PY) -m service.dev downgrade

migration: $(STAMP) ## Write a migration from the models: make migration m="Add coupons"
	@$(PY) -m service.dev migration "$(m)"

lint: $(STAMP) ## Check style, types and the layers
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.compose-spec compose.yaml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(VENV)/bin/zizmor --offline --quiet --pedantic .github

fmt: $(STAMP) ## Format and mend what can be mended
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

UV_COMPILE := uv pip compile --universal --generate-hashes --no-annotate \
	--python-version 3.11 --custom-compile-command "make lock" --quiet
lock: ## Pin what is new in pyproject.toml, and move no other version (needs uv)
	@command -v uv >/dev/null || { echo "make lock needs uv: https://docs.astral.sh/uv" >&2; exit 1; }
	$(UV_COMPILE) $(UPGRADE) pyproject.toml --extra otel -o requirements.lock
	$(UV_COMPILE) $(UPGRADE) pyproject.toml --extra otel --group dev -o requirements-dev.lock
	$(if $(wildcard .ci/audit.in),$(UV_COMPILE) $(UPGRADE) .ci/audit.in -o .ci/audit.lock)
	$(if $(wildcard $(PEERS).in),$(UV_COMPILE) $(UPGRADE) $(PEERS).in -c requirements-dev.lock -o $(PEERS).lock)

upgrade: UPGRADE := --upgrade
upgrade: lock ## Move every version to the newest that pyproject.toml allows (needs uv)

# Compose mounts them with the rights that they have here, and the processes in the containers are not their owner.
secrets: ## Write passwords for compose.yaml into secrets/, where there are none yet
	@mkdir -p -m 700 secrets
	@for name in $$(sed -n 's|^ *file: ./secrets/||p' compose.yaml); do \
		[ -s secrets/$$name ] && continue; \
		od -An -N24 -tx1 /dev/urandom | tr -d ' \n' > secrets/$$name && chmod 644 secrets/$$name && echo "secrets/$$name"; \
	done

install: $(STAMP) ## Only set up the virtual environment

$(PACKAGES): requirements-dev.lock
	@found=; for python in $(PYTHONS); do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			found=$$python; $$python -c 'import ensurepip, venv' 2>/dev/null && break; \
		fi; \
	done; \
	[ -n "$$found" ] || { echo "no Python 3.11 or newer among: $(PYTHONS); install one, or run make with PYTHON=/path/to/python" >&2; exit 1; }; \
	$$found -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$$found has no venv: install it (on Debian and Ubuntu: apt install python3-venv), or run make with PYTHON=..." >&2; exit 1; }; \
	ls $(VENV)/.installed-* >/dev/null 2>&1 && [ ! -e $(STAMP) ] && rm -rf $(VENV); \
	if ! $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		echo "creating $(VENV) with $$found"; $$found -m venv --clear $(VENV) || exit 1; \
	fi
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip --upgrade >/dev/null
	@echo "installing the pinned dependencies (the first time takes a minute)"
	@$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@touch $@

$(STAMP): pyproject.toml $(PACKAGES)
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# The libraries that the benchmark compares with.
$(VENV)/.bench: $(PEERS).lock $(PACKAGES)
	@$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes -r $(PEERS).lock
	@touch $@
