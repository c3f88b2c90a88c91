# make demo: a real fine-tune with proof.  make test: the tests.  Both set up ./.venv first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
# Two at a time, each with one thread: threads that wait for a core spin. A file's tests share what they set up, so they stay together, the longest files first (tests/conftest.py).
PYTEST := OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test check lint docs reference notebook parity clients real proof sweep clean

demo: $(INSTALLED)
	$(BIN)/python -m tunesmith.demo

test: $(INSTALLED)
	$(PYTEST)

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

# docs/first-fine-tune.ipynb with new outputs, minutes; tests compare their kinds.
notebook: $(INSTALLED)
	$(BIN)/python .ci/notebook.py

parity: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -e '.[parity]'
	$(PYTEST) -m parity

clients: $(INSTALLED)
	$(BIN)/python -m pytest -m clients

real: $(INSTALLED)
	$(PYTEST) -m 'real and not parity'

# Parity and real tier at once, so that neither process waits for the other's longest file.
proof: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -e '.[parity]'
	$(PYTEST) -m 'parity or real'

sweep: $(INSTALLED)
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -m sweep -n 2

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $(INSTALLED)

clean:
	rm -rf .venv demo site
