# make demo: a real fine-tune with proof.  make test: the tests.  Both set up ./.venv first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
# Two at a time: few tests keep one core busy. A file's tests share what they set up, so they stay together, the longest files first (tests/conftest.py).
PAIRS := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test check lint docs reference parity clients real sweep clean

demo: $(INSTALLED)
	$(BIN)/python -m tunesmith.demo

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PAIRS)

check: lint test

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/python .ci/house.py
	$(BIN)/pyright --pythonpath $(BIN)/python

# The site, in site/: any web server shows the folder. The variable leaves out an advertisement.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# docs/reference/, from the source; a test compares them.
reference: $(INSTALLED)
	$(BIN)/python .ci/reference

parity: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -e '.[parity]'
	$(BIN)/python -m pytest -m parity $(PAIRS)

clients: $(INSTALLED)
	$(BIN)/python -m pytest -m clients

real: $(INSTALLED)
	$(BIN)/python -m pytest -m 'real and not parity' $(PAIRS)

sweep: $(INSTALLED)
	$(BIN)/python -m pytest -m sweep -n 2

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $(INSTALLED)

clean:
	rm -rf .venv demo site
