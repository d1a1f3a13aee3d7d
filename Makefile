# make demo: compare all layouts on this machine.   make test: all tests that need no GPU.   make check: what CI runs.
# To use an interpreter that has the requirements already: make demo PYTHON=python3 SETUP=

PYTHON = .venv/bin/python
SETUP = .venv/.ready
# As many tests at a time as there are cores, and memory for: a process takes up to 2 GiB, a launched test 3 beside it.
WORKERS = --numprocesses logical --maxprocesses 8 --dist worksteal
ON_CPU = OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu $(PYTHON) -m pytest $(WORKERS) --durations=25 -m

demo: $(SETUP)
	$(PYTHON) launch/compare.py --output results/demo.json >/dev/null

test: $(SETUP)
	$(ON_CPU) "not gpu"

test-launched: $(SETUP)
	$(ON_CPU) "launch and not gpu"

test-in-process: $(SETUP)
	$(ON_CPU) "not launch and not gpu"

test-gpu: $(SETUP)
	$(PYTHON) -m pytest -m gpu

lint: $(SETUP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -c "from importlinter.cli import lint_imports_command; lint_imports_command()"

check: lint test

.venv/.ready: requirements.txt
	@echo "setting up .venv (once, about a minute) ..."
	python3 -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

.PHONY: demo test test-launched test-in-process test-gpu lint check
