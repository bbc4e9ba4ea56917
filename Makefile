# Every target sets itself up: .venv, torch, the package.
PY := .venv/bin/python
.PHONY: demo speed test lint type imports docs native sanitize wheel bench claims families reliability clean

demo:  ## prune a real sentence encoder and show the result
	@scripts/setup.sh demo
	@.venv/bin/sparseworks demo --out out/demo

speed:  ## time that encoder, sparse and dense, beside the runtimes that are installed
	@scripts/setup.sh demo
	@.venv/bin/sparseworks bench minilm --sparsity 0.8 0.9 --batch 1 16 --out out/speed

test:  ## all tests, one process a core (four at most), each of one thread
	@scripts/setup.sh test
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -n logical --maxprocesses 4 --dist loadfile

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
	@$(PY) scripts/speed_figure.py
	@$(PY) scripts/make_docs.py

native:  ## build the kernels again after a change, into the source tree
	@scripts/setup.sh test
	@$(PY) -m pip install --quiet nanobind cmake ninja
	@.venv/bin/cmake -S . -B build/native -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(PY) \
	  -DCMAKE_MAKE_PROGRAM=$(CURDIR)/.venv/bin/ninja >/dev/null
	@.venv/bin/cmake --build build/native
	@cp build/native/_native*.so src/sparseworks/kernels/

sanitize:  ## the tests of the kernels with AddressSanitizer and UBSan (g++); some minutes
	@scripts/setup.sh test
	@$(PY) -m pip install --quiet nanobind cmake
	@scripts/sanitize.sh

wheel:  ## sdist and wheel into dist/, tried in bare environments with and without a compiler
	@scripts/setup.sh test
	@$(PY) -m pip install --quiet build
	@scripts/check_wheel.sh

bench:  ## speed and memory against peers, on demand
	@scripts/setup.sh test
	@$(PY) benchmarks/oneshot.py --out benchmarks/results/oneshot.json
	@$(PY) benchmarks/kernels.py --out benchmarks/results/kernels.json
	@$(PY) benchmarks/decoding.py --out benchmarks/results/decoding.json
	@$(PY) benchmarks/active_inputs.py --out benchmarks/results/active_inputs.json
	@$(PY) benchmarks/speed.py --out benchmarks/results
	@$(PY) benchmarks/memory.py --out benchmarks/results/memory.json

claims:  ## run every claim that has no result of its present version
	@scripts/setup.sh test
	@.venv/bin/sparseworks claims run $$(.venv/bin/sparseworks claims list | awk '/not run|outdated/ {print $$1}')

families:  ## prune, save, slim and compile a small model of 87 families; some 15 minutes, resumes
	@scripts/setup.sh test
	@$(PY) -m pip install --quiet -c .venv/constraints.txt timm
	@$(PY) benchmarks/every_family.py --out benchmarks/results/families.json
	@$(PY) scripts/make_docs.py

reliability:  ## damage, kill and fuzz everything that is written; some 10 minutes
	@scripts/setup.sh test
	@$(PY) benchmarks/reliability.py --out benchmarks/results/reliability.json
	@$(PY) scripts/make_docs.py

clean:
	rm -rf .venv build out runs site
