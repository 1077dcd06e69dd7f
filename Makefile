# Each target sets up .venv when it has to: python3 with venv and pip is enough (and g++ for `make test` and the rest).
PYTHON ?= python3
RUN := .venv/bin/python -m
PIP := $(RUN) pip install --quiet --no-input --disable-pip-version-check --constraint constraints.txt
# Editable, so that what is tested and searched with is the working tree.
INSTALL := $(PIP) setuptools pybind11 ninja && $(PIP) --no-build-isolation --editable
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*.h)

.PHONY: search test check check-gpu bench bench-report format

search: .venv/.installed
	$(RUN) bmsn.search --fast-eval

# A process a core, of one thread each: they would wait for one another in every parallel loop.
test: .venv/.test
	OMP_NUM_THREADS=1 $(RUN) pytest --numprocesses auto --dist loadfile

check: .venv/.check
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy bmsn
	BMSN_BUILD_EXT=1 BMSN_WERROR=1 .venv/bin/python setup.py --quiet build_ext --build-temp build/check --build-lib build/check

# Compiles all Triton kernels for three generations of GPUs; needs none. `make test` compiles a part of them.
check-gpu: .venv/.test
	.venv/bin/python tests/aot.py

bench: .venv/.test
	$(RUN) pytest benchmarks --benchmark-only $(FULL)

# A table of ratios; FULL=--full runs the long ones, too.
bench-report: .venv/.test
	mkdir -p .benchmarks
	$(RUN) pytest benchmarks --benchmark-only --benchmark-json=.benchmarks/latest.json --quiet $(FULL)
	.venv/bin/python benchmarks/report.py .benchmarks/latest.json

format: .venv/.check
	$(RUN) ruff check --fix
	$(RUN) ruff format

.venv/bin/python:
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/.installed: $(SOURCES) | .venv/bin/python
	$(INSTALL) .
	touch $@

.venv/.test: export BMSN_BUILD_EXT = 1
.venv/.test: $(SOURCES) | .venv/bin/python
	$(INSTALL) '.[test,triton]'
	touch .venv/.installed $@

.venv/.check: .venv/.test
	$(PIP) ruff mypy
	touch $@
