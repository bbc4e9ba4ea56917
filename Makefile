# Every target sets itself up: .venv, torch, the package.
PY := .venv/bin/python
.PHONY: demo test lint type imports docs bench claims clean

demo:  ## prune a real sentence encoder and show the result
	@scripts/setup.sh demo
	@.venv/bin/sparseworks demo --out out/demo

test:  ## all tests
	@scripts/setup.sh test
	@$(PY) -m pytest

lint:
	@scripts/setup.sh test
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .

type:
	@scripts/setup.sh test
	@.venv/bin/mypy

imports:  ## who may import whom
	@scripts/setup.sh test
	@.venv/bin/lint-imports

docs:  ## the generated pages, and the site where mkdocs is installed
	@scripts/setup.sh test
	@$(PY) scripts/make_docs.py

bench:  ## speed and memory against peers, on demand
	@scripts/setup.sh test
	@$(PY) benchmarks/oneshot.py --out benchmarks/results/oneshot.json
	@$(PY) benchmarks/memory.py --out benchmarks/results/memory.json

claims:  ## run every claim that has no result yet
	@scripts/setup.sh test
	@.venv/bin/sparseworks claims run $$(.venv/bin/sparseworks claims list | awk '/not run/ {print $$1}')

clean:
	rm -rf .venv build out runs site
