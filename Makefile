# make demo: compare all layouts on this machine.   make test: all tests.   make check: what CI runs.
# To use an interpreter that has the requirements already: make demo PYTHON=python3 SETUP=

PYTHON = .venv/bin/python
SETUP = .venv/.ready

demo: $(SETUP)
	$(PYTHON) launch/compare.py --output results/demo.json >/dev/null

test: $(SETUP)
	OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu $(PYTHON) -m pytest -m "not gpu" --durations=10

test-gpu: $(SETUP)
	$(PYTHON) -m pytest -m gpu

lint: $(SETUP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

check: lint test

.venv/.ready: requirements.txt
	@echo "setting up .venv (once, about a minute) ..."
	python3 -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

.PHONY: demo test test-gpu lint check
