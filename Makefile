# make train       trains the default model (one to two minutes)
# make test        runs the tests (about a minute)
# make benchmark   measures the speed
# Each makes a virtual environment in .venv the first time, and installs nothing after that.

PYTHON ?= python3

# OpenMP threads that wait spin for a while before they sleep. Left alone they spin so long that on a
# busy machine everything stalls; asleep at once, two threads are slower than one. This is between.
export GOMP_SPINCOUNT ?= 10000

# glibc hands large freed blocks back to the system at once; fetching them again, page by page, costs a
# tenth of a run with a full cache. Let it keep them.
export MALLOC_TRIM_THRESHOLD_ ?= 4000000000
export MALLOC_MMAP_THRESHOLD_ ?= 33554432

.PHONY: train test test-slow benchmark lint

train: .venv/installed
	.venv/bin/python train.py

test: .venv/installed
	.venv/bin/python -m pytest

test-slow: .venv/installed
	.venv/bin/python -m pytest -m slow

benchmark: .venv/installed
	.venv/bin/python experiments/benchmark.py

lint: .venv/installed-dev
	.venv/bin/ruff check .

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --requirement requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	.venv/bin/python -m pip install --requirement requirements-dev.txt
	touch $@
