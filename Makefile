# make demo            everything from text to the dashboard at http://127.0.0.1:8050 (SERVE=0: stop before serving)
# make test            every test and check, in TEST_PROCESSES=2 processes; sets up what it lacks
# make install         .venv with what the demo needs
# make check           formatting, lint, types and layers only
SHELL := /bin/bash
PYTHON ?= python3
SERVE ?= 1
TEST_PROCESSES ?= 2
WORKSPACE ?= workspace
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.runtime-installed
DEV := $(VENV)/.dev-installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo install test check chromium clean

install: $(RUNTIME)

$(RUNTIME): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, $(PYTHON) is %d.%d; name another with make PYTHON=..." % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) -e '.[demo,peers]'
	@touch $@

$(DEV): $(RUNTIME)
	$(PIP) -e '.[demo,peers,dev]'
	@touch $@

demo: install
	$(BIN)/scope demo $(WORKSPACE) $(if $(filter 0,$(SERVE)),--no-serve,--serve)

check: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports pyproject.toml
	$(BIN)/mypy

# Browser tests drive Debian's Chromium: from CHROMIUM=, else from the PATH, else installed where this runs as root.
chromium:
	@if [ -n "$$CHROMIUM" ] || command -v chromium >/dev/null || command -v chromium-browser >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "Installing Chromium for the browser tests"; \
	  (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-noto-core fonts-noto-cjk) >/dev/null; \
	else echo "No Chromium: install it or give CHROMIUM=/path; the browser tests will be skipped (in CI they fail)."; fi

test: check chromium
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .hypothesis .import_linter_cache
