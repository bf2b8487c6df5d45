# Two commands on a fresh machine: `make demo` and `make test`. Each makes .venv once (a few minutes, torch is large),
# then runs; later runs start at once. Versions are those of constraints.txt, with which everything here was tested.

PYTHON ?= python3
VENV := .venv
LOWEST := .venv-lowest
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
WORKERS ?= auto

.PHONY: help demo test test-lowest peft-suite browser docs lint format wheel clean

help:
	@echo "make demo    extend the embedded model from 512 to 4096 tokens and plot it (3 to 5 minutes on 2 cores)"
	@echo "make test    run the tests that need no GPU (about 4 minutes on 2 cores)"
	@echo "make test-lowest  the same with the lowest supported versions, in .venv-lowest"
	@echo "make peft-suite   run PEFT's own tests with LongLoraConfig (4 to 8 minutes)"
	@echo "make browser run the tests of longlora app in a browser; they need chromium and chromedriver"
	@echo "make docs    build the site into build/site (Python 3.11 or newer)"
	@echo "make lint    check format and style"
	@echo "make format  apply format and safe fixes"
	@echo "make wheel   build the wheel into dist/"

demo: $(VENV)/.demo
	@echo "== demo: 512 -> 4096 tokens with S2-Attn, on this machine's Python standard library"
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.test
	@echo "== tests: CPU, offline; add ARGS='-m gpu' on a machine with a GPU"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-lowest: $(LOWEST)/.test
	@echo "== tests with the lowest versions: $$($(LOWEST)/bin/python -m peft_longlora --version)"
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

peft-suite: $(VENV)/.suite
	@echo "== tests of peft, out of its source distribution on PyPI, with LongLoraConfig in place of LoraConfig"
	$(BIN)/python -m pytest -m slow tests/peft_suite -rPs $(ARGS)

browser: $(VENV)/.browser
	@echo "== browser: longlora app in headless Chromium (Debian: apt-get install chromium chromium-driver)"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser -rs tests/app/test_browser.py $(ARGS)

docs: $(VENV)/.docs
	@echo "== docs: the pages and the docstrings as a site; a warning is an error"
	$(BIN)/python docs/build.py

lint: $(VENV)/.test
	@echo "== lint: ruff format --check, ruff check"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: $(VENV)/.test
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) $(LOWEST) runs dist build

$(VENV)/bin/python:
	@echo "== making $(VENV) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV)

# The stamps are newer than what they were made from, so an edited pyproject.toml installs again.
$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "== installing the package and what the demo needs (the first time takes minutes)"
	$(PIP) -e ".[plot]" accelerate
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "== installing the package and what the tests need (the first time takes minutes)"
	$(PIP) -e ".[test]"
	@touch $@

$(LOWEST)/.test: pyproject.toml constraints-lowest.txt
	@echo "== making $(LOWEST) with the lowest versions (the first time takes minutes)"
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --disable-pip-version-check -c constraints-lowest.txt -e ".[test]"
	@touch $@

$(VENV)/.suite: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "== installing the package and what PEFT's tests need"
	$(PIP) -e ".[suite]"
	@touch $@

# Docstrings are read, not imported: the site needs neither torch nor the package.
$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "== installing what the site needs"
	$(PIP) "mkdocstrings[python]" zensical
	@touch $@

$(VENV)/.browser: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "== installing the package and what the browser's tests need"
	$(PIP) -e ".[browser]"
	@touch $@
