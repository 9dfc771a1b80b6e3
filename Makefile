# make run       the main job: install into .venv and run the demo (same as ./build_and_run.sh)
# make test      what CI does: lint, types, unit tests, Triton kernels in the interpreter, compile-only tests, lessons
# make test-gpu  what needs a GPU; with the machine's own python, no install and no network
# make bench     benchmarks against the peers that this machine has; writes JSON under bench/results
PYTHON ?= python3
# processes that compile and test side by side on the one GPU; needs pytest-xdist
GPU_WORKERS ?= 8

.PHONY: run test test-gpu bench format clean

run:
	./build_and_run.sh

test: .venv/dev-installed
	PATH="$(CURDIR)/.venv/bin:$$PATH" scripts/check

test-gpu:
	PYTHONPATH="$(CURDIR)" $(PYTHON) -m pytest -m gpu -n $(GPU_WORKERS) -p no:benchmark tests/gpu

bench:
	PYTHONPATH="$(CURDIR)" $(PYTHON) -m bench.run

format: .venv/dev-installed
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

.venv/dev-installed: pyproject.toml constraints.txt
	scripts/install '.[cli,dev,docs]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-output
