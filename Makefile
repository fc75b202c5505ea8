# make demo   the main job end to end, on a simulated log
# make test   the test suite
# make check  lint, format, types, import direction
# make bench  the benchmarks, small, and peers in environments of their own; plots in bench-results/. An hour.
#             Each has options for the sizes in docs/log.md
# make bench-quick  their ratios beside those of the last times, under 5 minutes
# All set up .venv first; nothing else is needed but Python 3.11 or newer.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check bench bench-quick clean

demo: .venv/ready
	$(BIN)/longretriever demo

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/ready
	$(BIN)/python benchmarks/ingest.py --events 2000000
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/sharding.py
	$(BIN)/python benchmarks/index.py
	$(BIN)/python benchmarks/serving.py --events 1000000 --users 200 --items 200000 --categories 1000
	$(BIN)/python benchmarks/routing.py
	$(BIN)/python benchmarks/simulate_router.py
	$(BIN)/python benchmarks/bulk.py
	$(BIN)/python benchmarks/peers.py --work bench-results --plot bench-results/training.svg
	$(BIN)/python benchmarks/index_peers.py --items 200000 --categories 500 --work bench-results --plot bench-results/index.svg

bench-quick: .venv/ready
	$(BIN)/python benchmarks/regressions.py

.venv: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; say which with: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,rivals,market,pgvector,redis,report,dev]'
	touch $@

clean:
	rm -rf .venv bench-results demo build dist *.egg-info
